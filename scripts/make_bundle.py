"""Make a tiny bundle from nothing: tokenizer, picture encoder and language model of the built-in picture world.

    python -m scripts.make_bundle                           # into model/tiny
    python -m scripts.make_bundle --out_dir out/mine --work_dir out/mine_work

What the quickstart starts from. The encoder learns from pictures and captions, contrastively only; the language model
from text only, never a picture; so none of them can see and talk before stage 1. `recipe` is the list of commands, each
of which is shown before it runs. Ctrl-C and a second start go on where it was. The bundle is

    tokenizer.json, tokenizer_config.json      scripts.train_tokenizer
    clip/                                      scripts.train_clip, an ordinary CLIP folder, vision half only
    llm_{hidden}.pth, .json                    scripts.train_llm in five lessons, fp16
"""

import argparse
import json
import math
import shlex
import shutil
import sys
from pathlib import Path

from scripts.steps import Step, duration, gigabytes, open_folder, run_steps

HIDDEN_SIZE = 128  # of the language model
PROCESSES = 2  # that learn together, a core each
LIMIT_MB = 8  # what a repository can carry


def recipe(folder: Path, brief: bool = False) -> list[Step]:
    """The commands that make a bundle in `folder`, with all files they need on the way.

    brief: without the last two lessons, which only practise.
    """
    captions, words, lookups, text = (folder / name for name in ("captions", "words", "lookups", "text"))
    weak, clip = folder / "weak", folder / "clip"
    one, two, three, four = (folder / f"lesson_{number}" for number in range(1, 5))
    llm = ["torchrun", "--nproc_per_node", PROCESSES, "-m", "scripts.train_llm"]
    llm += ["--tokenizer_path", folder, "--max_seq_len", 400, "--num_workers", 0, "--warmup_iters", 50]
    muon = ["--batch_size", 16, "--optimizer", "muon", "--val_interval", 500]
    weights = f"llm_{HIDDEN_SIZE}.pth"
    # fmt: off
    steps = [
        Step("captions", "draw pictures with a caption of each object in two languages, for the encoder", [
            "python", "-m", "dataset.scenes", "--form", "captions", "--out_dir", captions,
            "--scenes", 40000, "--val_scenes", 500, "--image_size", 72, "--seed", 1,
        ]),
        Step("words", "scenes of one object in words, with descriptions, for the language model's first lesson", [
            "python", "-m", "dataset.scenes", "--form", "text", "--out_dir", words,
            "--scenes", 32000, "--val_scenes", 100, "--rows", 2, "--kinds", "describe", "--objects", 1, 1,
            "--seed", 3,
        ]),
        Step("lookups", "scenes of three or four, with questions about each of them, for its second lesson", [
            "python", "-m", "dataset.scenes", "--form", "text", "--out_dir", lookups,
            "--scenes", 60000, "--val_scenes", 100, "--rows", 2, "--kinds", "each", "--objects", 3, 4, "--seed", 4,
        ]),
        Step("text", "scenes in words with whole conversations about them, for its third lesson", [
            "python", "-m", "dataset.scenes", "--form", "text", "--out_dir", text,
            "--scenes", 42000, "--val_scenes", 200, "--rows", 2, "--kinds", "multi", "describe", "compare", "each",
            "--seed", 2,
        ]),
        Step("tokenizer", "learn which letters make a token", [
            "python", "-m", "scripts.train_tokenizer", "--data_path", text / "train.jsonl",
            "--vocab_size", 1749, "--split_chinese", "--out_dir", folder,
        ], makes=folder / "tokenizer.json"),
        Step("encoder", "train the picture encoder: which caption belongs to which picture?", [
            "python", "-m", "scripts.train_clip", "--vision_only",
            "--data_path", captions / "train.jsonl", "--val_path", captions / "val.jsonl",
            "--images_path", captions / "images", "--tokenizer_path", folder, "--out_dir", clip,
            "--image_size", 72, "--patch_size", 24, "--hidden_size", 128, "--num_hidden_layers", 4,
            "--text_hidden_size", 128, "--text_num_hidden_layers", 1, "--projection_dim", 128,
            "--max_text_len", 16, "--min_scale", 1, "--patch_pool", "max", "--patch_weight", 0.8,
            "--batch_size", 128, "--epochs", 14, "--val_interval", 2,
        ], makes=clip),
        Step("first lesson", "the decoder learns what the words for an object say of it", [
            *llm, "--data_path", words / "train.jsonl", "--val_path", words / "val.jsonl", "--out_dir", one,
            "--hidden_size", HIDDEN_SIZE, "--num_hidden_layers", 4,
            "--num_attention_heads", 4, "--num_key_value_heads", 4,
            "--batch_size", 32, "--learning_rate", 1e-3, "--embedding_learning_rate", 1e-2,
        ], resumable=True),
        Step("second lesson", "it learns to find one object among several, by place, colour or shape", [
            *llm, "--data_path", lookups / "train.jsonl", "--val_path", lookups / "val.jsonl", "--out_dir", two,
            "--from_weight", one / weights, *muon, "--learning_rate", 4e-3,
        ], resumable=True),
        Step("third lesson", "it learns to answer all kinds of questions", [
            *llm, "--data_path", text / "train.jsonl", "--val_path", text / "val.jsonl",
            "--out_dir", folder if brief else three,
            "--from_weight", two / weights, *muon, "--learning_rate", 4e-3,
        ], resumable=True),
    ]
    if not brief:
        steps.append(Step("fourth lesson", "the same rows in another order, once more with large steps", [
            *llm, "--data_path", text / "train.jsonl", "--val_path", text / "val.jsonl", "--out_dir", four,
            "--from_weight", three / weights, *muon, "--learning_rate", 3e-3, "--seed", 43,
        ], resumable=True))
        steps.append(Step("weak", "questions of the kinds that it answers worst", [
            "python", "-m", "dataset.scenes", "--form", "text", "--out_dir", weak,
            "--scenes", 20000, "--val_scenes", 100, "--rows", 2, "--kinds", "compare", "count", "exists",
            "--seed", 5,
        ]))
        steps.append(Step("fifth lesson", "it practises these, with half of the other rows", [
            *llm, "--data_path", weak / "train.jsonl", text / "train.jsonl", "--data_weights", 1, 0.5,
            "--val_path", text / "val.jsonl", "--out_dir", folder,
            "--from_weight", four / weights, *muon, "--learning_rate", 3e-3, "--seed", 44,
        ], resumable=True))
    # fmt: on
    for step in steps:
        step.command = [str(part) for part in step.command]
    return steps


def files() -> list[str]:
    """What of it belongs to the bundle."""
    llm = f"llm_{HIDDEN_SIZE}"
    clip = ("config.json", "preprocessor_config.json", "model.safetensors", "metrics.json")
    return ["tokenizer.json", "tokenizer_config.json", *(f"clip/{name}" for name in clip), f"{llm}.pth", f"{llm}.json"]


def figures(folder: Path) -> list[str]:
    """What the parts can do, a line each: recall of the encoder, perplexity of the language model."""
    lines = []
    for path, found in json.loads((folder / "clip/metrics.json").read_text(encoding="utf-8"))["retrieval"].items():
        shares = ", ".join(f"{key.replace('_', ' ')} {value:.1f}%" for key, value in found.items())
        lines.append(f"encoder on {path}:\n  {shares}")
    metrics = folder / f"llm_{HIDDEN_SIZE}.metrics.jsonl"
    losses = [json.loads(line).get("val_loss") for line in metrics.read_text(encoding="utf-8").splitlines()]
    losses = [loss for loss in losses if loss is not None]
    if losses:
        lines.append(f"language model: perplexity {math.exp(losses[-1]):.3f} per answer token")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out_dir", type=Path, default=Path("model/tiny"), help="folder of the bundle (default: model/tiny)")
    add("--work_dir", type=Path, default=Path("out/bundle"), help="data and checkpoints (default: out/bundle)")
    add("--restart", action="store_true", help="remove --work_dir with all that is in it and begin anew")
    args = parser.parse_args(argv)
    flags = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--restart"]
    try:
        open_folder(args.work_dir, args.restart, flag="--work_dir")
        records = run_steps(
            recipe(args.work_dir),
            args.work_dir,
            shlex.join(["python", "-m", "scripts.make_bundle", *flags]),
        )
        print()
        total = 0
        for name in files():
            (args.out_dir / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(args.work_dir / name, args.out_dir / name)
            size = (args.out_dir / name).stat().st_size
            total += size
            print(f"{str(args.out_dir / name):50}{size / 1e6:>8.2f} MB")
        print(f"{'in all':50}{total / 1e6:>8.2f} MB")
        if total > LIMIT_MB * 1e6:
            print(f"warning: more than {LIMIT_MB} MB, too much for the repository")
        print()
        for record in records:
            print(f"{record['name']:20}{duration(record['seconds']):>14}{gigabytes(record['peak_gb']):>10} at most")
        print(f"{'in all':20}{duration(sum(record['seconds'] for record in records)):>14}\n")
        print("\n".join(figures(args.work_dir)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"\nerror: {error}") from None


if __name__ == "__main__":
    main()
