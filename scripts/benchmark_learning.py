"""How many rows does a recipe need to reach the validation loss of the original one?

    python -m scripts.benchmark_learning --data_path DATA --results learned \\
        -- --tokenizer_path model/tiny --vision_model_path model/tiny/clip \\
        --from_weight out/quickstart/pretrain_vlm_128.pth

DATA holds train*.jsonl, val*.jsonl and images/; what follows `--` goes to train_sft_vlm.py. The original recipe is
AdamW with one learning rate for all, a cosine down to a tenth, no warmup; its rate is the best of --rates. It sees all
--rows. Each recipe sees shares of them, with a schedule of its own that ends there, and has reached the original where
its last validation loss is not above that of the same seed; one that has not, on average, is not tried with a
smaller share. Runs that are done are not done again.
"""

if __spec__ is None:  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.benchmark_learning instead of scripts/benchmark_learning.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

import json
import os
import random
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common.cli import Parser, positive, run_main
from common.display import markdown
from common.files import write_json, write_text
from model.files import read_json


def recipes(rate: float, batch_size: int) -> dict[str, dict]:
    """{name: flags}; the first is the original."""
    base = {"learning_rate": rate, "projector_learning_rate": rate, "warmup_iters": 0, "schedule": "cosine"}
    base |= {"batch_size": batch_size, "optimizer": "adamw"}
    embeddings = {"embedding_learning_rate": 3 * rate, "projector_learning_rate": 3 * rate}
    muon = base | {"optimizer": "muon", "warmup_iters": 20}
    faster = muon | {"learning_rate": 2 * rate, "embedding_learning_rate": rate}
    return {
        "original: AdamW, one rate, no warmup": base,
        "warmup of 50 steps": base | {"warmup_iters": 50},
        "embeddings and projector at three times the rate": base | embeddings,
        "a line to zero instead of a cosine to a tenth": base | {"schedule": "linear"},
        "twice the batch": base | {"batch_size": batch_size * 2},
        "half the batch": base | {"batch_size": batch_size // 2},
        "a quarter of the batch": base | {"batch_size": batch_size // 4},
        "Muon for the matrices of the blocks": muon,
        "Muon, its rate doubled": faster,
        "Muon, four times its rate": faster | {"learning_rate": 4 * rate},
        "Muon, eight times its rate": faster | {"learning_rate": 8 * rate},
        "Muon, sixteen times its rate": faster | {"learning_rate": 16 * rate},
        "Muon, its rate doubled, half the batch": faster | {"batch_size": batch_size // 2},
        "Muon, a line to zero": muon | {"schedule": "linear"},
    }


def subset(data: Path, rows: int, path: Path) -> None:
    """Writes the first rows of all training files together, shuffled once, to `path`."""
    files = sorted(data.glob("train*.jsonl"))  # lines end with a line feed alone: other ends may stand in a text
    lines = [line.rstrip("\n") for file in files for line in file.open(encoding="utf-8")]
    if len(lines) < rows:
        raise ValueError(f"--rows {rows}: {data} has {len(lines)}")
    random.Random(0).shuffle(lines)
    write_text(path, "".join(f"{line}\n" for line in lines[:rows]))


def rows_file(args, share: float) -> Path:
    return args.out_dir / f"train_{round(args.rows * share)}.jsonl"


def command_of(job: dict, args, out: Path) -> list[str]:
    flags = dict(recipes(job["rate"], args.batch_size)[job["recipe"]])
    flags |= {"data_path": rows_file(args, job["share"]), "images_path": args.data_path / "images", "seed": job["seed"]}
    flags |= {"out_dir": out, "num_workers": 0, "device": "cpu"}
    given = [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    val_files = map(str, sorted(args.data_path.glob("val*.jsonl")))
    return ["train_sft_vlm.py", *args.flags, *given, "--val_path", *val_files]


def last_loss(command: list[str], out: Path) -> float:
    """Runs it on one thread, with its output in out/log. Returns the last validation loss, and leaves no weights."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log").open("w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        status = subprocess.run([sys.executable, *command], stdout=log, stderr=log, env=environment).returncode
    if status:
        raise ValueError(f"a run ended with status {status}, see {out / 'log'}")
    metrics = next(out.glob("*.metrics.jsonl")).read_text().splitlines()
    for file in out.glob("*.p*"):  # weights and checkpoints: megabytes that nobody asked for
        file.unlink()
    return [record["val_loss"] for record in map(json.loads, metrics) if "val_loss" in record][-1]


def train(job: dict, args) -> dict:
    """A run of train_sft_vlm.py in a process of its own, if not done before → the job with its last validation loss."""
    name = "_".join(f"{key}{job[key]}" for key in ("recipe", "rate", "share", "seed"))
    out = args.out_dir / "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
    done, command = out / "result.json", command_of(job, args, out)
    if not done.exists():
        write_json(done, {"command": command, "val_loss": last_loss(command, out)})
    result = read_json(done)
    if result["command"] != command:
        before = shlex.join(result["command"])
        raise ValueError(f"{done} is of another run, {before}. Choose another --out_dir, or remove it")
    loss, share = result["val_loss"], f"{job['share']:.0%}"
    print(f"{loss:.4f}  {share} of the rows, seed {job['seed']}, {job['recipe']} at {job['rate']}", flush=True)
    return job | {"val_loss": loss}


def compare(args, run) -> tuple[list[dict], list[dict], dict]:
    """run: jobs → jobs with losses. Returns those of the original at all rates, of the original at the best of them,
    and {(recipe, share): those of all seeds}."""

    def job(name, rate, share=1.0, seed=args.seeds[0]):
        return {"recipe": name, "rate": rate, "share": share, "seed": seed}

    original, *_ = names = list(recipes(1, args.batch_size))
    tuned = run([job(original, rate) for rate in args.rates])
    rate = min(tuned, key=lambda job: job["val_loss"])["rate"]
    base = run([job(original, rate, seed=seed) for seed in args.seeds])
    groups = {}
    for share in sorted(args.shares, reverse=True):  # the original, too: what are so many rows worth?
        for done in run([job(name, rate, share, seed) for name in names for seed in args.seeds]):
            groups.setdefault((done["recipe"], share), []).append(done)
        names = [name for name in names if statistics.mean(gaps(groups[name, share], base)) <= 0]
    return tuned, base, groups


def gaps(jobs: list[dict], base: list[dict]) -> list[float]:
    """How far each is above the original of the same seed."""
    return [job["val_loss"] - original["val_loss"] for job, original in zip(jobs, base)]


def cells(jobs: list[dict], base: list[dict]) -> list[str]:
    """A row of the table."""
    losses, above = [job["val_loss"] for job in jobs], gaps(jobs, base)
    row = [jobs[0]["recipe"], f"{jobs[0]['share']:.0%}", f"{statistics.mean(losses):.4f}"]
    row.append(f"{min(losses):.4f} to {max(losses):.4f}")
    if jobs is base:
        return [*row, "", ""]
    gap = f"{statistics.mean(above):+.4f} ({min(above):+.4f} to {max(above):+.4f})"
    return [*row, gap, f"{sum(gap <= 0 for gap in above)} of {len(above)}"]


def report(args, tuned: list[dict], base: list[dict], groups: dict) -> str:
    names = list(recipes(1, args.batch_size))
    order = sorted(groups, key=lambda group: names.index(group[0]))  # of a recipe the largest share stays first
    rows = [cells(jobs, base) for jobs in (base, *(groups[group] for group in order))]
    head = ["recipe", "rows", "validation loss", "lowest to highest", "above the original's", "seeds that reach it"]
    tried = ", ".join(f"{job['rate']:g}: {job['val_loss']:.4f}" for job in tuned)
    scope = f"{args.rows} rows of {args.data_path.name}, batches of {args.batch_size}, seeds {args.seeds}"
    return f"{scope}. Rates tried for the original: {tried}.\n\n{markdown(head, rows)}\n"


def parse_args(argv):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--data_path", type=Path, required=True, metavar="DIR", help="train*.jsonl, val*.jsonl and images/")
    add("--results", type=Path, required=True, metavar="PATH", help="PATH.md and PATH.json are written")
    add("--out_dir", type=Path, default=Path("out/learning"), help="of the runs")
    add = parser.group("the comparison").add_argument
    add("--rows", type=positive(int), default=8000, help="that the original recipe sees")
    add("--batch_size", type=positive(int), default=16, help="of the original recipe")
    add("--rates", nargs="+", type=positive(float), default=[1e-3, 2e-3, 4e-3], help="that the original chooses from")
    add("--shares", nargs="+", type=positive(float), default=[0.4, 0.6], help="of the rows, for all other recipes")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the order of rows, and of weights that start anew")
    add("--jobs", type=positive(int), default=2, help="runs at a time, a thread each")
    parser.start.add_argument("flags", nargs="*", metavar="FLAGS", help="after --: flags of train_sft_vlm.py")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for share in sorted({1.0, *args.shares}, reverse=True):  # before the runs, which write beside each other
        subset(args.data_path, round(args.rows * share), rows_file(args, share))
    with ThreadPoolExecutor(args.jobs) as pool:
        tuned, base, groups = compare(args, lambda jobs: list(pool.map(lambda job: train(job, args), jobs)))
    jobs = [*tuned, *base[1:], *(job for group in groups.values() for job in group)]
    write_json(args.results.with_suffix(".json"), jobs)
    text = report(args, tuned, base, groups)
    write_text(args.results.with_suffix(".md"), text)
    print(f"\n{text}")


if __name__ == "__main__":
    run_main(main)
