"""Train a small model that answers questions about pictures in English and Chinese, in minutes, on a laptop.

    python -m scripts.quickstart                                   # no GPU, no download
    python -m scripts.quickstart --from_zero --out_dir out/zero    # also train tokenizer, encoder and LLM first
    python -m scripts.quickstart --device auto                     # on a GPU, if there is one
    python -m scripts.quickstart --help

It draws scenes (dataset/scenes.py), trains the language model of the bundle on them (train_pretrain_vlm.py,
train_sft_vlm.py), and scores the result (eval_vlm.py). Every command is shown before it runs, so that you can do the
same with your own pictures. Stop with Ctrl-C; run the same command again to resume. At the end, out/quickstart/ holds

    report.html, report_zh.html    what it can and cannot do; report.json
    chat.html                      the model as a page, to ask it in a browser
    sft_vlm_{hidden}{_moe}.pth     the model
    steps.json                     each command with its time and memory
"""

if __spec__ is None or __spec__.name == "__main__":  # started by its path: Python would not find the other folders
    raise SystemExit("type -m scripts.quickstart instead of scripts/quickstart")

from common.start import begin

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

import re
import time
from pathlib import Path

from common.cli import SWITCH, Parser
from common.display import duration, gigabytes
from common.lock import only_one
from scripts import make_bundle, report
from scripts.quickstart.report_words import PAGE
from scripts.quickstart.steps import (
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


def recipe(out: Path, llm: Path, model: list, device: str = "cpu") -> list[Step]:
    """Returns the commands. llm: the weights to start from; model: the flags that name the model."""
    captions, data = out / "captions", out / "data"

    def rows(folder):
        read = ["--data_path", folder / "train.jsonl", "--val_path", folder / "val.jsonl"]
        return [*read, "--images_path", folder / "images"]

    train, on_device = launcher(device)
    training = [*on_device, "--trainable", "all", "--batch_size", 16, "--num_workers", 0, "--save_interval", 400]
    training += ["--optimizer", "muon", "--warmup_iters", 20]
    scoring = ["--images_path", data / "images", "--batch_size", 64, "--num_workers", 0]
    scoring += ["--max_new_tokens", 80, "--no_loss", "--device", device]
    # fmt: off
    return [
        Step("data 1", "draw scenes with descriptions, for stage 1", [
            "python", "-m", "dataset.scenes", "--out_dir", captions, "--scenes", 1500, "--val_scenes", 50,
            "--image_size", 72, "--kinds", "describe", "--rows", 2, "--seed", 3,
        ], makes=captions),
        Step("data 2", "draw scenes with conversations about them, for stage 2", [
            "python", "-m", "dataset.scenes", "--out_dir", data, "--scenes", 10000, "--val_scenes", 75,
            "--image_size", 72,
        ], makes=data),
        Step("stage 1", "the projector learns to translate pictures for the language model", [
            *train, "train_pretrain_vlm.py", *model, *rows(captions), "--from_weight", llm, *training,
            "--learning_rate", 2e-3, "--projector_learning_rate", 4e-3,
        ], resumable=True),
        Step("stage 2", "the whole model learns to answer", [
            *train, "train_sft_vlm.py", *model, *rows(data), *training,
            "--learning_rate", 3e-3, "--projector_learning_rate", 2e-3, "--weight_decay", 0.5,
        ], resumable=True),
        Step("score val", "questions about other scenes; then again with shuffled pictures", [
            "python", "eval_vlm.py", *model, "--data_path", data / "val.jsonl", *scoring,
            "--output", out / "val.json",
        ]),
        Step("score val_wording", "the same questions in wordings that never occurred in training", [
            "python", "eval_vlm.py", *model, "--data_path", data / "val_wording.jsonl", *scoring,
            "--output", out / "val_wording.json",
        ]),
        Step("score val_new", "questions about combinations that never occurred in training", [
            "python", "eval_vlm.py", *model, "--data_path", data / "val_new.jsonl", *scoring,
            "--output", out / "val_new.json",
        ]),
        Step("page", "the model as one file that answers in any browser, offline", [
            "python", "-m", "scripts.convert_vlm", "--to", "web", *model, "--output", out / PAGE,
        ], makes=out / PAGE),
    ]
    # fmt: on


def find_llm(bundle: Path) -> tuple[Path, int]:
    """Returns the language model of a bundle, and its hidden_size from the file name. Raises FileNotFoundError."""
    again = "python -m scripts.quickstart --from_zero"
    missing = [name for name in ("tokenizer.json", "clip/config.json") if not (bundle / name).is_file()]
    if missing:
        raise FileNotFoundError(f"--bundle {bundle} has no {missing[0]}. To train all of it from scratch:\n$ {again}")
    matches = [(path, re.fullmatch(r"llm_(\d+)\.pth", path.name)) for path in sorted(bundle.glob("llm_*.pth"))]
    models = [(path, int(match[1])) for path, match in matches if match]
    if len(models) != 1:
        count = f"{len(models)} llm_{{hidden}}.pth, expected 1"
        raise FileNotFoundError(f"--bundle {bundle}: {count}. To train one:\n$ {again}")
    return models[0]


def next_commands(out: Path, weights: Path, args) -> list[tuple[str, list[str]]]:
    """Returns commands to try next: (purpose, command)."""
    picture = out / "data/images/val_00000.jpg"
    ask = ["python", "eval_vlm.py", "--weights", weights, "--image", picture]
    ask += ["--prompt", report.first_prompts(weights)["en"], "--greedy"]
    look = ["python", "-m", "scripts.inspect_data", "rows.jsonl", "--images_path", "pictures", "--from_weight", weights]
    public = ["python", "-m", "scripts.download", "--what", "clip", "vlm"]
    if not args.from_zero:
        more = "train tokenizer, encoder and language model from scratch too", ["--from_zero", "--out_dir", "out/zero"]
    elif not args.use_moe:
        more = "the same with a mixture of experts", ["--from_zero", "--use_moe", "--out_dir", "out/zero_moe"]
    else:
        more = "the same without experts", ["--from_zero", "--out_dir", "out/zero"]
    commands = [
        ("ask about a picture", ask),
        ("inspect your own rows and pictures; the last line is the command to train on them", look),
        (more[0], ["python", "-m", "scripts.quickstart", *more[1]]),
        ("this model only learns shapes and words for them; photos need the 26M weights", public),
    ]
    return [(what, [str(part) for part in command]) for what, command in commands]


def parse_args(argv):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--out_dir", type=Path, default=Path("out/quickstart"), help="folder for all files")
    add("--bundle", type=Path, metavar="DIR", help="folder of tokenizer, encoder and LLM; default: model/tiny")
    add("--from_zero", action="store_true", help="train these three first, in OUT_DIR/tiny; takes an hour in total")
    add("--use_moe", **SWITCH, help="turn the language model into a mixture of experts, which start as copies")
    add_device_argument(parser)
    add("--restart", action="store_true", help="delete OUT_DIR and everything in it, and start over")
    args = parser.parse_args(argv)
    if args.from_zero and args.bundle:
        parser.error("--bundle: --from_zero trains its own bundle; leave out one of the two")
    args.bundle = args.bundle or Path("model/tiny")
    return args


def quickstart(args, again: str) -> dict:
    """Runs the steps that are not done yet, writes and prints the report, and returns it."""
    started = time.perf_counter()
    device, out, moe = resolve(args.device), args.out_dir, "_moe" if args.use_moe else ""
    steps, bundle = [], args.bundle
    if args.from_zero:
        bundle, hidden_size = out / "tiny", make_bundle.HIDDEN_SIZE
        steps, llm = make_bundle.recipe(bundle, device), bundle / f"llm_{hidden_size}.pth"
    else:
        llm, hidden_size = find_llm(bundle)
    model = ["--tokenizer_path", bundle, "--vision_model_path", bundle / "clip", "--hidden_size", hidden_size]
    model += [*(["--use_moe"] if args.use_moe else []), "--out_dir", out]
    steps += recipe(out, llm, model, device)

    with only_one(out, "--out_dir"):
        open_folder(out, args.restart)
        earlier = sum(record["seconds"] for record in read_records(out))
        records = run_steps(steps, out, again)
    weights = out / f"sft_vlm_{hidden_size}{moe}.pth"
    result = report.summary(out, records, next_commands(out, weights, args))
    english, chinese = finish(result, out, earlier + time.perf_counter() - started, report.write_pages)
    print("\n" + report.table(out))
    print("\n" + report.examples(out))
    print(f"\n{duration(result['wall_s'])} in total, at most {gigabytes(result['peak_gb'])} of memory")
    print(f"the report, with pictures and curves: {english}\n中文报告（含图片和曲线）：{chinese}")
    print(f"the model as a page, for questions about your own pictures: {out / PAGE}")
    print_next(result)
    return result


def main(argv=None):
    return run_recipe(quickstart, parse_args(argv), "scripts.quickstart", argv)


if __name__ == "__main__":
    main()
