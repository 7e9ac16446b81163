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
from common.files import write_json, write_text


def recipes(rate: float, batch_size: int) -> dict[str, dict]:
    """{name: flags}; the first is the original."""
    base = {"learning_rate": rate, "projector_learning_rate": rate, "warmup_iters": 0, "schedule": "cosine"}
    base |= {"batch_size": batch_size, "optimizer": "adamw"}
    muon = base | {"optimizer": "muon", "warmup_iters": 20}
    faster = muon | {"learning_rate": 2 * rate, "embedding_learning_rate": rate}
    return {
        "original: AdamW, one rate, no warmup": base,
        "warmup of 50 steps": base | {"warmup_iters": 50},
        "embeddings and projector at three times the rate": base
        | {"embedding_learning_rate": 3 * rate, "projector_learning_rate": 3 * rate},
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


def train(job: dict, args) -> dict:
    """A run of train_sft_vlm.py in a process of its own, on one thread → the job with its last validation loss."""
    name = "_".join(f"{key}{job[key]}" for key in ("recipe", "rate", "share", "seed"))
    out = args.out_dir / "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in name)
    done = out / "result.json"
    flags = recipes(job["rate"], args.batch_size)[job["recipe"]] | {
        "data_path": rows_file(args, job["share"]),
        "images_path": args.data_path / "images",
        "seed": job["seed"],
        "out_dir": out,
        "num_workers": 0,
        "device": "cpu",
    }
    command = ["train_sft_vlm.py", *args.flags]
    command += [str(part) for key, value in flags.items() for part in (f"--{key}", value)]
    command += ["--val_path", *map(str, sorted(args.data_path.glob("val*.jsonl")))]
    if not done.exists():
        out.mkdir(parents=True, exist_ok=True)
        with (out / "log").open("w") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            code = subprocess.run([sys.executable, *command], stdout=log, stderr=log, env=environment).returncode
        if code:
            raise ValueError(f"a run ended with status {code}, see {out / 'log'}")
        metrics = next(out.glob("*.metrics.jsonl")).read_text().splitlines()
        losses = [record["val_loss"] for record in map(json.loads, metrics) if "val_loss" in record]
        write_json(done, {"command": command, "val_loss": losses[-1]})
        for file in out.glob("*.p*"):  # weights and checkpoints: megabytes that nobody asked for
            file.unlink()
    result = json.loads(done.read_text())
    if result["command"] != command:
        was = shlex.join(result["command"])
        raise ValueError(f"{done} is of another run, {was}. Choose another --out_dir, or remove it")
    job |= {"val_loss": result["val_loss"]}
    print(
        f"{job['val_loss']:.4f}  {job['share']:.0%} of the rows, seed {job['seed']}, {job['recipe']} at {job['rate']}"
    )
    sys.stdout.flush()
    return job


def parse_args(argv):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--data_path", type=Path, required=True, metavar="DIR", help="train*.jsonl, val*.jsonl and images/")
    add("--results", type=Path, required=True, metavar="PATH", help="PATH.md and PATH.json are written")
    add("--out_dir", type=Path, default=Path("out/learning"), help="of the runs")
    add = parser.group("the comparison").add_argument
    add("--rows", type=positive(int), default=8000, help="that the original recipe sees")
    add("--batch_size", type=positive(int), default=16, help="of the original recipe")
    add(
        "--rates", nargs="+", type=positive(float), default=[1e-3, 2e-3, 4e-3], help="that the original may choose from"
    )
    add("--shares", nargs="+", type=positive(float), default=[0.4, 0.6], help="of the rows, for all other recipes")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="of the order of rows, and of weights that start anew")
    add("--jobs", type=positive(int), default=2, help="runs at a time, a thread each")
    parser.start.add_argument("flags", nargs="*", metavar="FLAGS", help="after --: flags of train_sft_vlm.py")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    names = list(recipes(1, args.batch_size))
    original = names[0]
    args.out_dir.mkdir(parents=True, exist_ok=True)
    for share in sorted({1.0, *args.shares}, reverse=True):  # before the runs, which write beside each other
        subset(args.data_path, round(args.rows * share), rows_file(args, share))
    with ThreadPoolExecutor(args.jobs) as pool:

        def run(jobs):
            return list(pool.map(lambda job: train(job, args), jobs))

        tuned = run({"recipe": original, "rate": rate, "share": 1.0, "seed": args.seeds[0]} for rate in args.rates)
        rate = min(tuned, key=lambda job: job["val_loss"])["rate"]
        base = run({"recipe": original, "rate": rate, "share": 1.0, "seed": seed} for seed in args.seeds)
        wanted = {job["seed"]: job["val_loss"] for job in base}
        found, left = [], names  # the original, too: what are so many rows worth?
        for share in sorted(args.shares, reverse=True):
            tried = run(
                {"recipe": name, "rate": rate, "share": share, "seed": seed} for name in left for seed in args.seeds
            )
            found += tried
            left = [name for name in left if statistics.mean(gaps(of(tried, name, share), wanted)) <= 0]
    rows = [[original, "100%", *losses(base), "", ""]]
    for name in names:
        for share in sorted(args.shares, reverse=True):
            jobs = of(found, name, share)
            if not jobs:
                continue
            above = gaps(jobs, wanted)
            reached = f"{sum(gap <= 0 for gap in above)} of {len(above)}"
            gap = f"{statistics.mean(above):+.4f} ({min(above):+.4f} to {max(above):+.4f})"
            rows.append([name, f"{share:.0%}", *losses(jobs), gap, reached])
    head = ["recipe", "rows", "validation loss", "lowest to highest", "above the original's", "seeds that reach it"]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
    tried = ", ".join(f"{job['rate']:g}: {job['val_loss']:.4f}" for job in tuned)
    text = (
        f"{args.rows} rows of {args.data_path.name}, batches of {args.batch_size}, seeds {args.seeds}. Rates tried for "
        f"the original: {tried}.\n\n{table}\n"
    )
    write_text(args.results.with_suffix(".md"), text)
    write_json(args.results.with_suffix(".json"), [*tuned, *base[1:], *found])
    print(f"\n{text}")
    return rows


def of(jobs, name: str, share: float) -> list[dict]:
    return [job for job in jobs if job["recipe"] == name and job["share"] == share]


def gaps(jobs, wanted: dict[int, float]) -> list[float]:
    """How far each is above the original of the same seed."""
    return [job["val_loss"] - wanted[job["seed"]] for job in jobs]


def losses(jobs) -> tuple[str, str]:
    found = [job["val_loss"] for job in jobs]
    return f"{statistics.mean(found):.4f}", f"{min(found):.4f} to {max(found):.4f}"


if __name__ == "__main__":
    run_main(main)
