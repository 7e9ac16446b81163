"""Does memory grow with the data? Start-up time and memory of the data pipeline on a Parquet file of the public schema.

    python -m scripts.benchmark_data                       # 2.9 million rows, 8 workers; minutes, and 10 GB of disk
    python -m scripts.benchmark_data --rows 50000

The file is made from a few small pictures, repeated. Each start is a process of its own, as a training run would be:
the first one converts and checks all rows, the second finds that done. Then batches are drawn as training draws them,
while the memory of all processes is watched.
"""

if __spec__ is None:  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.benchmark_data instead of scripts/benchmark_data.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

import argparse
import io
import json
import os
import subprocess
import sys
import threading
import time
from itertools import chain, repeat
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet
import torch
from tqdm import tqdm

from common.cli import Parser
from common.machine import usable_cores
from dataset.batches import StepSampler
from dataset.lm_dataset import VLMDataset
from dataset.scene_pictures import draw
from dataset.scenes import caption, scenes_of
from model.processing import ImageProcessor, load_tokenizer
from trainer.loader import make_loader

ROW_GROUP = 10_000  # rows


def write_rows(path: Path, rows: int) -> None:
    """Captions in English and Chinese of 64 scenes, over and over, in the public schema; a tenth is text only."""
    scenes = list(scenes_of("train", 64, seed=0))
    pictures = []
    for scene in scenes:
        file = io.BytesIO()
        draw(scene, 64).save(file, "JPEG", quality=75)
        pictures.append(file.getvalue())
    file = io.BytesIO()
    draw(scenes[0], 64).resize((8, 8)).point(lambda _: 0).save(file, "PNG")
    black = file.getvalue()

    schema = pa.schema({"conversations": pa.string(), "image_bytes": pa.binary()})
    beside = path.with_suffix(".tmp")
    with pyarrow.parquet.ParquetWriter(beside, schema) as writer:
        for start in tqdm(range(0, rows, ROW_GROUP), desc=f"writing {path}", unit="group"):
            texts, images = [], []
            for i in range(start, min(start + ROW_GROUP, rows)):
                seen = i % 10 > 0
                question = f"What is in picture {i}?" + "\n<image>" * seen
                answer = caption(scenes[i % 64], ("en", "zh")[i % 2])
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                texts.append(json.dumps(turns, ensure_ascii=False))
                images.append(pictures[i % 64] if seen else black)
            writer.write_table(pa.table([texts, images], schema=schema))
    beside.replace(path)


class Memory(threading.Thread):
    """Watches this process and its workers. Of pages that several share, each counts its part (PSS)."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = {"own": 0.0, "files": 0.0}  # GB: memory of their own, and pages of files mapped into memory
        self.start()

    def run(self):
        while True:
            own = files = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    maps = process.memory_maps(grouped=True)
                except psutil.Error:  # gone meanwhile
                    continue
                own += sum(area.pss for area in maps if not area.path.endswith(".arrow"))
                files += sum(area.pss for area in maps if area.path.endswith(".arrow"))
            self.peak = {
                "own": max(self.peak["own"], own / 1e9),
                "files": max(self.peak["files"], files / 1e9),
            }
            time.sleep(1)


def start(args) -> dict:
    """What a training run does before and between its steps."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(args.tokenizer_path)
    processor = ImageProcessor(size=72, crop_size=(72, 72))
    data = VLMDataset(args.file, None, tokenizer, processor, 640, "@" * 9)
    sampler = StepSampler(data.lengths, args.batch_size)
    loader = make_loader(data, sampler, args, torch.device("cpu"), tokenizer)
    batches = chain.from_iterable(repeat(loader))  # over and over
    next(batches)
    found = {"rows": len(data), "text_rows": data.mended["placeholder"], "seconds": time.perf_counter() - started}
    idle = psutil.Process().memory_info().rss / 1e9
    memory, rows, started = Memory(), 0, time.perf_counter()
    while time.perf_counter() < started + args.seconds:
        rows += len(next(batches)["rows"])
    found |= {"rows_per_s": rows / args.seconds, "main_gb": idle}
    return found | {f"{key}_gb": value for key, value in memory.peak.items()}


def main(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--rows", type=int, default=2_900_000, help="rows of the file")
    add("--num_workers", type=int, default=8, help="processes that decode pictures")
    add("--batch_size", type=int, default=32, help="rows")
    add("--seconds", type=float, default=60, help="how long batches are drawn")
    add("--tokenizer_path", type=Path, default=Path("model/tiny"), metavar="DIR", help="folder with tokenizer.json")
    add("--work_dir", type=Path, default=Path("out/benchmark_data"), help="the file and its cache")
    add("--file", type=Path, help=argparse.SUPPRESS)  # a start on this file, in a process of its own
    args = parser.parse_args(argv)
    if args.file:
        print(json.dumps(start(args)))
        return
    args.work_dir.mkdir(parents=True, exist_ok=True)
    file = args.work_dir / f"{args.rows}.parquet"
    if not file.is_file():
        write_rows(file, args.rows)
    print(f"{file}: {args.rows:,} rows, {file.stat().st_size / 1e9:.2f} GB; {usable_cores()} cores")
    cache = os.environ | {"HF_DATASETS_CACHE": str(args.work_dir / "cache")}
    for which in ("first", "second"):
        flags = sys.argv[1:] if argv is None else argv
        command = [sys.executable, "-m", "scripts.benchmark_data", *flags, "--file", str(file)]
        out = subprocess.run(command, env=cache, check=True, stdout=subprocess.PIPE).stdout
        found = json.loads(out.splitlines()[-1])
        print(
            f"{which} start: {found['seconds']:.0f} s to the first batch of {found['rows']:,} rows "
            f"({found['text_rows']:,} of text only); then {found['rows_per_s']:,.0f} rows/s; main process "
            f"{found['main_gb']:.2f} GB; all together {found['own_gb']:.2f} GB of their own and "
            f"{found['files_gb']:.2f} GB of mapped files",
            flush=True,
        )


if __name__ == "__main__":
    main()
