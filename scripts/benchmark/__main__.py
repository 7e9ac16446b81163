"""How fast is it, and what makes it so? Training, reading pictures, answering and starting, against the original way.

    python -m scripts.benchmark                            # everything this machine can do
    python -m scripts.benchmark --kinds sft generation --rounds 5
    python -m scripts.benchmark --size tiny                # seconds: does it run?

The original way pads all rows to --max_seq_len, computes softmax over T×T in the open and logits for every position,
loads all of CLIP and runs it in fp32 on every picture of every epoch. Each further row of a table adds one improvement
to the row above it. All rows train the same weights on the same rows, in turn, round after round; the ratio is that of
the same round. Weights are random, of the shapes of the 26M model and CLIP ViT-B/16: speed does not depend on them.

Writes docs/results/benchmark_{device}.md and .json.
"""

if __spec__ is None or __spec__.name == "__main__":  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.benchmark instead of scripts/benchmark")

from common.start import begin, unwind

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

import argparse
import platform
import subprocess
import sys
import time
from functools import partial
from importlib.util import find_spec
from inspect import getdoc
from pathlib import Path

import torch
import transformers

from common.cli import Parser, positive, run_main
from common.devices import pick_device
from common.display import duration, markdown
from common.files import write_json, write_text
from common.machine import usable_cores
from scripts.benchmark import tables
from scripts.benchmark.inputs import SIZES
from scripts.report import cpu_name

PUBLIC_ROWS = {"pretrain": 595_000, "sft": 300_000}
HEAD = """# Benchmark: {device_name}

- **What**: the speed of the {size} model with random weights; each row of a table against its first row.
- **Where**: {device_name}, {threads} threads; PyTorch {torch}, Transformers {transformers}, Python {python}; {date}.
{findings}
- **Repeat**: `{command}` (commit {commit}).

Each figure is the median of {rounds} rounds. Each ratio compares times of the same round; the lowest and highest are \
in brackets."""
FINDINGS = {  # kind: a line of the summary, of the ratios of its last two rows
    "pretrain": "- **Stage 1**: {:.1f} times as fast as the original way, with cached picture features {:.1f} times.",
    "sft": "- **Stage 2**: {:.1f} times as fast as the original way, with cached features {:.1f} times.",
    "peers": "- **Next to Transformers**, stage 2, features cached: {:.2f} times as fast, with 49 tokens {:.2f} times.",
    "generation": "- **Answers**, 16 at once: {:.2f} times as many tokens per second, with int8 weights {:.2f} times.",
}
STEPS = """{rows} rows in batches of {batch_size}, the original way at {max_seq_len} tokens. Useful FLOP are those of \
real tokens, without any waste; peak is the measured rate of large matrix products in the same precision."""
RATE = {"": "{name}", "samples/s": "{samples_per_s:.2f}"}
SPAN = {"ratio": "{ratio:.2f}× ({ratio_range[0]:.2f} to {ratio_range[1]:.2f})"}
STEP = RATE | {"real tokens/s": "{tokens_per_s:,.0f}", "padding": "{padding:.0%}"}
STEP |= {"useful FLOP/s of peak": "{utilisation:.0%}", "GB": "{memory_gb:.1f}", **SPAN, "first loss": "{loss:.6f}"}
PEERS = {"stage": "{stage}", **RATE, "padding": "{padding:.0%}", "GB": "{memory_gb:.1f}", **SPAN}
PEERS |= {"first loss": "{loss:.6f}"}
ANSWER = {"answers at once": "{batch}", "": "{name}", "first token": "{first_token_s:.2f} s"}
ANSWER |= {"tokens/s": "{tokens_per_s:.0f}", **SPAN, "against one of the first row": "{against_one_stream:.1f}×"}
PICTURES = {"": "{name}", "pictures/s and core": "{pictures_per_s_and_core:,.0f}"}
TABLES = {  # kind: what measures it, title, columns and what stands in them
    "pretrain": (partial(tables.training_table, "pretrain"), "Stage 1: a step of pretrain", STEP),
    "sft": (partial(tables.training_table, "sft"), "Stage 2: a step of sft", STEP),
    "peers": (tables.peers_table, "Beside today's peers", PEERS),
    "experts": (tables.experts_table, "Experts", RATE | SPAN),
    "ranks": (tables.ranks_table, "Ranks", RATE | {"ratio": "{ratio:.2f}×"}),
    "pipeline": (tables.pipeline_table, "Pictures", PICTURES),
    "generation": (tables.generation_table, "Answers", ANSWER),
    "captions": (tables.captions_table, "Captions", {"": "{name}", "pictures/s": "{pictures_per_s:.2f}", **SPAN}),
    "startup": (tables.startup_table, "Starting", {"": "{name}", "time": "{median_s:.2f} s"}),
}


def section(kind: str, rows: list[dict], run: dict) -> list[str]:
    measure, title, columns = TABLES[kind]
    lines = [[cell.format_map(row) for cell in columns.values()] for row in rows if "waiting" not in row]
    lines += [[row["name"], f"{row['waiting']:.1%}"] for row in rows if "waiting" in row]
    table = markdown(list(columns), lines)
    if kind not in PUBLIC_ROWS:
        return [f"## {title}", getdoc(measure), table]
    epoch, cached = (duration(PUBLIC_ROWS[kind] / row["samples_per_s"]) for row in rows[-2:])
    limit, cached_limit = (row["ratio"] / row["utilisation"] for row in rows[-2:])
    below = (
        f"One epoch of {PUBLIC_ROWS[kind]:,} rows at these rates: {epoch}, with cached features {cached}. The most "
        "that the last two rows could reach, with nothing but useful FLOP at the peak rate: "
        f"{limit:.1f}× and {cached_limit:.1f}×."
    )
    return [f"## {title}", STEPS.format_map(run), table, below]


def report(results: dict) -> str:
    run = results["about"]
    parts = [part for kind in TABLES if kind in results for part in section(kind, results[kind], run)]
    ratios = {kind: [row["ratio"] for row in results[kind][-2:]] for kind in FINDINGS if kind in results}
    findings = "\n".join(FINDINGS[kind].format(*ratios[kind]) for kind in ratios) or "- **Found**: see the tables."
    return "\n\n".join([HEAD.format_map(run | {"findings": findings}), *parts]) + "\n"


def describe_run(args, device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{usable_cores()} cores of {cpu_name()}"
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device_name": name,
        "command": " ".join(["python -m scripts.benchmark", *sys.argv[1:]]),
        "commit": commit or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **{key: getattr(args, key) for key in ("size", "rows", "batch_size", "max_seq_len", "rounds", "threads")},
    }


def parse_args(argv):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    kinds = [kind for kind in TABLES if kind != "peers" or find_spec("accelerate")]
    what = "what to measure; default: all, peers if accelerate, which Transformers' Trainer needs, is installed"
    add("--kinds", nargs="+", default=kinds, choices=TABLES, metavar="KIND", help=what)
    add("--device", default="auto", metavar="NAME", help="auto (CUDA, else MPS, else CPU), cuda, cuda:1, mps, cpu")
    add("--size", default="26m", choices=list(SIZES), help="of the model; tiny: to see whether all of it runs")
    add("--rounds", type=positive(int), default=3, help="how often everything is measured")
    add("--out_dir", type=Path, default=Path("docs/results"), help="folder of the tables")
    add = parser.group("how much of it").add_argument
    add("--rows", type=positive(int), help="of a pass; default: 16, on a GPU 2048")
    add("--batch_size", type=positive(int), help="rows of a step; default: 8, on a GPU 32")
    add("--max_seq_len", type=positive(int), default=640, help="tokens to which the original way pads")
    add("--new_tokens", type=positive(int), default=64, help="of each answer")
    add("--num_workers", type=positive(int), default=2, help="processes that decode pictures")
    add("--threads", type=positive(int), default=torch.get_num_threads(), help="of a CPU")
    compiled = "torch.compile, in a row of its own; default: unless tiny"
    add("--compile", action=argparse.BooleanOptionalAction, help=compiled)
    add("--as_rank", action="store_true", help=argparse.SUPPRESS)  # one of the processes of `ranks`
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    unwind()  # there are temporary files
    device = pick_device(args.device)
    gpu = device.type == "cuda"
    args.rows, args.batch_size = args.rows or (2048 if gpu else 16), args.batch_size or (32 if gpu else 8)
    args.compile = args.size != "tiny" if args.compile is None else args.compile
    torch.set_num_threads(args.threads)
    if args.as_rank:
        return tables.as_rank(args, device)
    results = {"about": describe_run(args, device)}
    for kind in args.kinds:
        print(f"{kind} ...", flush=True)
        results[kind] = TABLES[kind][0](args, device)
        write_json(args.out_dir / f"benchmark_{device.type}.json", results)
        text = report(results)
        write_text(args.out_dir / f"benchmark_{device.type}.md", text)
    print(f"\n{text}", flush=True)
    return results


if __name__ == "__main__":
    run_main(main)
