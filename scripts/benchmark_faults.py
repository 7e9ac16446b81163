"""Is anything lost, or wrong without a word? Kills, flipped bits, full disks, malformed rows, many visitors at once.

    python -m scripts.benchmark_faults                                  # all of it on a CPU; half an hour
    python -m scripts.benchmark_faults --only rows --rows 20000
    python -m scripts.benchmark_faults --only web --out_dir out/quickstart

Everything is made in a temporary folder, from drawn scenes and model/tiny, and the page is asked on this machine alone.
A table tells what was tried; a fault is printed as it is found, and any ends the program with status 1.
"""

if __spec__ is None:  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.benchmark_faults instead of scripts/benchmark_faults.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

import os
import random
import sys
import tempfile
import time
from pathlib import Path

from common.cli import Parser, not_negative, positive, run_main
from common.start import unwind
from scripts.benchmark.faults_files import Bench, disk, flips, kills, prepare
from scripts.benchmark.faults_rows import rows
from scripts.benchmark.faults_web import web

PARTS = {"kills": kills, "flips": flips, "disk": disk, "rows": rows, "web": web}


def parse_args(argv):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="which: " + ", ".join(PARTS))
    add("--out_dir", type=Path, help="weights for the page, and data/val.jsonl in it; default: those made here")
    add("--seed", type=not_negative, default=0, help="of everything random")
    add = parser.group("how much").add_argument
    add("--scenes", type=positive(int), default=48, help="pictures of the small training, two rows to a step")
    add("--kills", type=positive(int), default=50, help="`kill -9`")
    add("--flips", type=positive(int), default=200, help="files with a flipped bit")
    add("--rows", type=positive(int), default=5000, help="mutated rows")
    add("--clients", type=positive(int), default=20, help="visitors of the page at once")
    add("--seconds", type=positive(float), default=300, help="how long they ask")
    args = parser.parse_args(argv)
    if args.out_dir and not (args.out_dir / "data/val.jsonl").is_file():
        parser.error(f"--out_dir {args.out_dir}: no data/val.jsonl in it. Make one: python -m scripts.quickstart")
    return args


def main(argv=None):
    args = parse_args(argv)
    unwind()  # so that the temporary folder goes with the process
    os.environ["OMP_NUM_THREADS"] = "1"
    table = ["| part | tried | found | faults | min |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="minimind-faults-") as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
        bench = Bench(args, Path(folder), random.Random(args.seed))
        prepare(bench)
        for part in args.only:
            bench.rng.seed(f"{args.seed} {part}")
            print(f"{part} ...", flush=True)
            faults, started = len(bench.faults), time.perf_counter()
            cells = (part, *PARTS[part](bench), len(bench.faults) - faults)
            minutes = (time.perf_counter() - started) / 60
            table.append(f"| {' | '.join(map(str, cells))} | {minutes:.1f} |")
    print("\n" + "\n".join(table))
    if bench.faults:
        sys.exit(1)
    return table


if __name__ == "__main__":
    run_main(main)
