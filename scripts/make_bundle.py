"""Train a tiny bundle from scratch: tokenizer, picture encoder and language model of the built-in picture world.

    python -m scripts.make_bundle                           # into model/tiny
    python -m scripts.make_bundle --out_dir out/mine --work_dir out/mine_work

The quickstart starts from this bundle. The encoder learns only contrastively, from pictures and captions; the language
model learns only from text. No part can both see and talk before stage 1. `recipe` lists the commands; each is shown
before it runs. Stop with Ctrl-C; run the same command again to resume. The bundle is

    tokenizer*.json            scripts.train_tokenizer
    clip/                      scripts.train_clip, the picture half of a CLIP
    llm_{hidden}.pth, .json    scripts.train_llm in eight lessons, fp16
"""

if __spec__ is None:  # started by its path: Python would not find the other folders
    raise SystemExit("type -m scripts.make_bundle instead of scripts/make_bundle.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

import math
import shlex
import shutil
import sys
from pathlib import Path

from common.cli import Parser, reason
from common.display import duration, gigabytes
from common.lock import only_one
from common.metrics import points, read_metrics
from model.files import read_json
from scripts.quickstart.steps import Step, add_device_argument, launcher, open_folder, resolve, run_steps

HIDDEN_SIZE = 128  # of the language model
LIMIT_MB = 8  # size limit for the repository


def recipe(folder: Path, device: str = "cpu") -> list[Step]:
    """Returns the commands that make a bundle in `folder`, with all files that they need.

    All lessons but the last use one wording of each question. Once the decoder knows where to find an answer, it learns
    other wordings quickly.

    Each lesson teaches only a few ways to look an object up, from single questions. With all of them in one lesson the
    decoder did not learn places at all; in conversations it can repeat what was said before
    (docs/results/quickstart.md).
    """
    captions, words, text, clip = (folder / name for name in ("captions", "words", "text", "clip"))
    train, on_device = launcher(device)
    llm = [*train, "-m", "scripts.train_llm", *on_device]
    llm += ["--tokenizer_path", folder, "--max_seq_len", 400, "--num_workers", 0, "--warmup_iters", 50]
    muon = ["--batch_size", 16, "--optimizer", "muon", "--learning_rate", 2e-3, "--val_interval", 250]
    weights = f"llm_{HIDDEN_SIZE}.pth"

    def in_words(name, description, scenes, kinds, objects, seed, *more):
        command = ["python", "-m", "dataset.scenes", "--form", "text", "--out_dir", folder / name, "--scenes", scenes]
        command += ["--val_scenes", 100, "--rows", 2, "--seed", seed, "--objects", *objects]
        return Step(name, description, [*command, "--kinds", *kinds, *more], makes=folder / name)

    def lesson(number, last=False, **shares):
        out = folder if last else folder / f"lesson_{number}"
        command = [*llm, "--data_path", *(folder / name / "train.jsonl" for name in shares)]
        command += ["--data_weights", *shares.values(), "--val_path", folder / next(iter(shares)) / "val.jsonl"]
        return [*command, "--out_dir", out, "--from_weight", folder / f"lesson_{number - 1}" / weights, *muon]

    # fmt: off
    return [
        Step("captions", "draw pictures with a caption of each object in two languages, for the encoder", [
            "python", "-m", "dataset.scenes", "--form", "captions", "--out_dir", captions,
            "--scenes", 40000, "--val_scenes", 500, "--image_size", 72, "--seed", 1,
        ], makes=captions),
        in_words("words", "scenes of one object in words, with descriptions, for the language model's first lesson",
                 32000, ["describe"], (1, 1), 3, "--plain"),
        *(in_words(name, f"scenes of three or four objects, with lists of their {name}s, for lessons two to four",
                   20000, ["each"], (3, 4), seed, "--plain", "--lists", name)
          for seed, name in enumerate(("colour", "shape", "size", "place", "object"), start=4)),
        in_words("describe", "scenes of one to four objects, with descriptions, for lesson five",
                 20000, ["describe"], (1, 4), 10, "--plain"),
        *(in_words(name, f"scenes with lists of {facts}, for lesson six",
                   20000, ["each"], (2, 4), seed, "--plain", "--lists", name)
          for seed, name, facts in ((13, "exists", "what is there and what is not"),
                                    (14, "check", "what is true and what is not"),
                                    (15, "count", "how many there are"))),
        in_words("talk", "scenes in words with whole conversations about them, for lesson seven",
                 18000, ["multi", "describe", "compare", "each"], (1, 4), 12, "--plain"),
        in_words("text", "the same as people type them, for lesson eight",
                 42000, ["multi", "describe", "compare", "each", "greet", "blind"], (1, 4), 2),
        in_words("practice", "more questions of the kinds with the most errors, for lesson eight",
                 20000, ["describe", "compare", "count", "exists", "check"], (1, 4), 9),
        Step("tokenizer", "learn which letters form a token", [
            "python", "-m", "scripts.train_tokenizer", "--data_path", text / "train.jsonl",
            "--vocab_size", 2300, "--split_chinese", "--out_dir", folder,
        ], makes=folder / "tokenizer.json"),
        Step("encoder", "train the picture encoder: which caption belongs to which picture?", [
            "python", "-m", "scripts.train_clip", "--vision_only",
            "--data_path", captions / "train.jsonl", "--val_path", captions / "val.jsonl",
            "--images_path", captions / "images", "--tokenizer_path", folder, "--out_dir", clip,
            "--image_size", 72, "--patch_size", 24, "--hidden_size", 128, "--num_hidden_layers", 4,
            "--text_hidden_size", 128, "--text_num_hidden_layers", 1, "--projection_dim", 128,
            "--max_text_len", 16, "--min_scale", 1, "--patch_pool", "max", "--patch_weight", 0.8,
            "--batch_size", 128, "--epochs", 8, "--muon_learning_rate", 5e-3, "--weight_decay", 0.5,
            "--val_interval", 2, "--device", device,
        ], makes=clip),
        Step("first lesson", "the decoder learns what the words for an object mean", [
            *llm, "--data_path", words / "train.jsonl", "--val_path", words / "val.jsonl",
            "--out_dir", folder / "lesson_1",
            "--hidden_size", HIDDEN_SIZE, "--num_hidden_layers", 4,
            "--num_attention_heads", 4, "--num_key_value_heads", 4,
            "--batch_size", 32, "--optimizer", "adamw", "--learning_rate", 1e-3, "--embedding_learning_rate", 1e-2,
        ], resumable=True),
        Step("second lesson", "it learns to find one object among several, and to say how it looks",
             lesson(2, colour=1.1, size=1.1, shape=0.55), resumable=True),
        Step("third lesson", "to say where it is",
             lesson(3, place=1, colour=0.2, size=0.3, shape=0.1), resumable=True),
        Step("fourth lesson", "to find it by its place",
             lesson(4, object=1, place=0.3, colour=0.1, size=0.2, shape=0.1), resumable=True),
        Step("fifth lesson", "to name one object after the other",
             lesson(5, describe=1, object=0.2, place=0.2), resumable=True),
        Step("sixth lesson", "to say what is there, what is true, and how many there are",
             lesson(6, exists=0.6, check=0.6, count=0.3, describe=0.1, place=0.1, object=0.1), resumable=True),
        Step("seventh lesson", "to answer all kinds of questions", lesson(7, talk=1), resumable=True),
        Step("eighth lesson", "to understand questions as people type them",
             lesson(8, last=True, text=0.6, practice=0.5), resumable=True),
    ]
    # fmt: on


def files() -> list[str]:
    """Returns the names of the files that belong to the bundle."""
    llm = f"llm_{HIDDEN_SIZE}"
    clip = ("config.json", "preprocessor_config.json", "model.safetensors", "metrics.json")
    return ["tokenizer.json", "tokenizer_config.json", *(f"clip/{name}" for name in clip), f"{llm}.pth", f"{llm}.json"]


def figures(folder: Path) -> list[str]:
    """Returns a line about each part: recall of the encoder, perplexity of the language model."""
    lines = []
    for path, recalls in read_json(folder / "clip/metrics.json")["retrieval"].items():
        shares = ", ".join(f"{key.replace('_', ' ')} {value:.1f}%" for key, value in recalls.items())
        lines.append(f"encoder on {path}:\n  {shares}")
    losses = points(read_metrics(folder / f"llm_{HIDDEN_SIZE}.metrics.jsonl"), "val_loss")
    if losses:
        lines.append(f"language model: perplexity {math.exp(losses[-1][1]):.3f} per answer token")
    return lines


def main(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--out_dir", type=Path, default=Path("model/tiny"), help="folder of the bundle")
    add("--work_dir", type=Path, default=Path("out/bundle"), help="data and checkpoints")
    add_device_argument(parser)
    add("--restart", action="store_true", help="delete --work_dir and everything in it, and start over")
    args = parser.parse_args(argv)
    flags = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--restart"]
    try:
        with only_one(args.work_dir, "--work_dir"):
            open_folder(args.work_dir, args.restart, flag="--work_dir")
            steps = recipe(args.work_dir, resolve(args.device))
            again = shlex.join(["python", "-m", "scripts.make_bundle", *flags])
            records = run_steps(steps, args.work_dir, again)
        print()
        total = 0
        for name in files():
            (args.out_dir / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(args.work_dir / name, args.out_dir / name)
            size = (args.out_dir / name).stat().st_size
            total += size
            print(f"{str(args.out_dir / name):50}{size / 1e6:>8.2f} MB")
        print(f"{'total':50}{total / 1e6:>8.2f} MB")
        if total > LIMIT_MB * 1e6:
            print(f"warning: more than {LIMIT_MB} MB, too much for the repository")
        print()
        for record in records:
            print(f"{record['name']:20}{duration(record['seconds']):>14}{gigabytes(record['peak_gb']):>10} at most")
        print(f"{'total':20}{duration(sum(record['seconds'] for record in records)):>14}\n")
        print("\n".join(figures(args.work_dir)))
    except (ValueError, OSError) as error:
        raise SystemExit(f"\nerror: {reason(error)}") from None


if __name__ == "__main__":
    main()
