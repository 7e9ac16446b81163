"""Train a model from scratch that describes photos like yours: any data set of pictures with captions, on a laptop.

    python -m scripts.from_photos --data_path captions.csv --images_path photos
    python -m scripts.from_photos --data_path rows.parquet --device auto
    python -m scripts.from_photos --help

Nothing is downloaded and nothing is pretrained: it trains a tokenizer, a picture encoder, a decoder and the projector
between them, and scores the result on photos that none of these has seen. Every command is shown before it runs. Stop
with Ctrl-C; run the same command again to resume. At the end, out/photos/ holds

    report.html, report_zh.html    scores, curves, twenty photos; report.json
    scst_vlm_192.pth               the model
    steps.json                     each command with its time and memory
"""

if __spec__ is None or __spec__.name == "__main__":  # started by its path: Python would not find the other folders
    raise SystemExit("type -m scripts.from_photos instead of scripts/from_photos")

from common.start import begin

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

import time
from pathlib import Path

from common.cli import Parser
from common.display import duration, gigabytes
from common.lock import only_one
from dataset.flags import add_captions_arguments
from scripts.from_photos import report
from scripts.quickstart.steps import (
    PROCESSES,
    Step,
    add_device_argument,
    finish,
    launcher,
    open_folder,
    print_next,
    read_records,
    resolve,
    run_recipe,
    run_steps,
)

HIDDEN_SIZE = 192  # of encoder and decoder
SEEN = 200_000  # pictures that the encoder sees in training; if there are fewer, it sees them repeatedly
EPOCHS = 100  # at most for the encoder: after that it has memorized them


def split_step(out: Path, args) -> Step:
    """Returns the first step, whose result says how many pictures there are."""
    command = ["python", "-m", "dataset.split", "--data_path", *args.data_path, "--out_dir", out / "data"]
    for flag in ("images_path", "val_path", "refs_path", "prompt", "allow_urls"):
        value = getattr(args, flag)
        if value:
            command += [f"--{flag}", *([] if value is True else value if isinstance(value, list) else [value])]
    return Step("photos", "shrink the photos, and hold some of them out", command, makes=out / "data")


def encoder_size(pictures: int) -> tuple[int, int]:
    """Returns (epochs, pictures per batch) for the encoder: large batches, but about 20 or more of them per epoch."""
    return max(1, min(EPOCHS, SEEN // pictures)), min(max(pictures // 20, 16), 128, pictures)


def stage_size(captions: int) -> tuple[int, float, int]:
    """Returns (captions per batch, peak learning rate, epochs) for each of the decoder's steps: large batches if one
    epoch has 300 of them, else small ones and two epochs."""
    return (64, 2e-3, 1) if captions >= 20_000 else (16, 1e-3, 2)


def recipe(out: Path, photos: dict[str, int], device: str = "cpu", dtype: str = "auto") -> list[Step]:
    """Returns the other steps. photos: see `report.count_photos`; dtype: precision of the arithmetic."""
    data, tokenizer, clip = out / "data", out / "tokenizer", out / "clip"
    epochs, batch = encoder_size(photos["train"])
    rows_per_batch, rate, passes = stage_size(photos["captions"])
    rows, typical = (
        ["--data_path", data / f"{name}.jsonl", "--val_path", data / "val.jsonl"] for name in ("train", "typical")
    )
    images = ["--images_path", data / "images"]
    train, on_device = launcher(device)
    model = ["--tokenizer_path", tokenizer, "--hidden_size", HIDDEN_SIZE, "--out_dir", out]
    seeing = [*model, "--vision_model_path", clip]
    training = [*on_device, "--dtype", dtype, "--num_workers", 0, "--save_interval", 100]
    training += ["--epochs", passes] if passes > 1 else []
    training += ["--optimizer", "muon", "--batch_size", rows_per_batch // PROCESSES, "--learning_rate"]
    windows = ["--min_scale", 0.5, "--flip"]
    stage = [*seeing, *images, *windows, *training]
    # fmt: off
    return [
        Step("tokenizer", "learn which letters form a token", [
            "python", "-m", "scripts.train_tokenizer", "--data_path", data / "train.jsonl", "--out_dir", tokenizer,
        ], makes=tokenizer),
        Step("encoder", "learn to see: which caption belongs to which photo?", [
            "python", "-m", "scripts.train_clip", *rows, *images, "--tokenizer_path", tokenizer, "--out_dir", clip,
            "--vision_only", "--epochs", epochs, "--batch_size", batch, "--captions_per_picture", 3,
            "--hidden_size", HIDDEN_SIZE, "--num_hidden_layers", 4, "--patch_size", 8, "--mask_ratio", 0.75, *windows,
            "--text_mask_ratio", 0.25, "--muon_learning_rate", 5e-3, "--weight_decay", 0.5,
            "--device", device, "--dtype", dtype,
        ], makes=clip),
        Step("decoder", "learn to talk, from all captions without the photos", [
            *train, "-m", "scripts.train_llm", *model, *rows, *training, rate, "--num_hidden_layers", 4,
        ], resumable=True),
        Step("stage 1", "the projector learns to translate photos for the decoder", [
            *train, "train_pretrain_vlm.py", *stage, rate, *rows, "--trainable", "all", "--image_tokens", 64,
        ], resumable=True),
        Step("stage 2", "the whole model learns to answer, from the most typical captions", [
            *train, "train_sft_vlm.py", *stage, rate, *typical, "--schedule", "linear",
        ], resumable=True),
        Step("stage 3", "learn from how well its own captions agree with people's", [
            *train, "train_scst_vlm.py", *stage, 0.15 * rate, *typical, "--data_weights", 0.5, "--schedule", "linear",
            "--refs_path", data / "train_refs.json",
        ], resumable=True),
        Step("scores", "describe the held-out photos; then again with shuffled photos", [
            "python", "eval_vlm.py", *seeing, "--weights", out / f"scst_vlm_{HIDDEN_SIZE}.pth",
            *images, "--data_path", data / "val.jsonl",
            "--refs_path", data / "val_refs.json", "--max_new_tokens", 40, "--num_beams", 3, "--batch_size", 64,
            "--num_workers", 0, "--device", device, "--dtype", dtype, "--output", out / "val.json",
        ]),
    ]
    # fmt: on


def next_commands(weights: Path) -> list[tuple[str, list[str]]]:
    """Returns commands to try next: (purpose, command)."""
    return [
        ("ask about a photo", ["python", "eval_vlm.py", "--weights", str(weights), "--image", "photo.jpg", "--greedy"]),
        ("talk about photos in the browser", ["python", "web_demo_vlm.py", "--weights", str(weights)]),
    ]


def parse_args(argv):
    parser = Parser(__file__, __doc__)
    add_captions_arguments(parser)
    add = parser.start.add_argument
    add("--out_dir", type=Path, default=Path("out/photos"), help="folder for all files")
    add_device_argument(parser)
    precision = "precision of training and scores; bfloat16 takes much less time on a CPU with AMX"
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help=precision)
    add("--restart", action="store_true", help="delete OUT_DIR and everything in it, and start over")
    return parser.parse_args(argv)


def from_photos(args, again: str) -> dict:
    """Runs the steps that are not done yet, writes and prints the report, and returns it."""
    started, device, out = time.perf_counter(), resolve(args.device), args.out_dir
    first = split_step(out, args)
    with only_one(out, "--out_dir"):
        open_folder(out, args.restart)
        earlier = sum(record["seconds"] for record in read_records(out))
        if not (out / "data/train.jsonl").is_file():
            run_steps([first], out, again)
        photos = report.count_photos(out)
        records = run_steps([first, *recipe(out, photos, device, args.dtype)], out, again)
    weights = out / f"scst_vlm_{HIDDEN_SIZE}.pth"
    result = report.summary(out, records, next_commands(weights))
    english, chinese = finish(result, out, earlier + time.perf_counter() - started, report.write_pages)
    print("\n" + report.table(result))
    print(f"\n{duration(result['wall_s'])} in total, at most {gigabytes(result['peak_gb'])} of memory")
    print(f"the report, with photos and curves: {english}\n中文报告（含照片和曲线）：{chinese}")
    print_next(result)
    return result


def main(argv=None):
    return run_recipe(from_photos, parse_args(argv), "scripts.from_photos", argv)


if __name__ == "__main__":
    main()
