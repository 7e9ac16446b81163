"""Does memory grow with the data? Start-up time and memory of the data pipeline on a Parquet file of the public schema.

    python -m scripts.benchmark_data                       # 2.9 million rows, 8 workers; minutes, and 10 GB of disk
    python -m scripts.benchmark_data --rows 50000
    python -m scripts.benchmark_data --form json --rows 600000      # an array as LLaVA's, 1 GB

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
from contextlib import suppress
from itertools import chain, repeat
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet
import torch
from PIL import Image
from tqdm import tqdm

from common.cli import Parser
from common.files import write_safely
from common.machine import usable_cores
from dataset.batches import StepSampler
from dataset.lm_dataset import VLMDataset
from dataset.scene_pictures import draw
from dataset.scenes import caption, scenes_of
from model.processing import ImageProcessor, load_tokenizer
from trainer.loader import make_loader

ROW_GROUP = 10_000  # rows
START = (
    "{seconds:.0f} s to the first batch of {rows:,} rows ({text_rows:,} of text only); then {rows_per_s:,.0f} rows/s; "
    "main process {main_gb:.2f} GB; all together {private_gb:.2f} GB of their own and {files_gb:.2f} GB of mapped files"
)
SCHEMA = pa.schema({"conversations": pa.string(), "image_bytes": pa.binary()})


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_rows(path: Path, rows: int, scenes: list, pictures: list[bytes]) -> None:
    """Captions in English and Chinese of these scenes, over and over, in the public schema; a tenth is text only."""
    black = encoded(Image.new("RGB", (8, 8)), "PNG")

    def row(i):
        sees = i % 10 > 0
        question = f"What is in picture {i}?" + "\n<image>" * sees
        answer = caption(scenes[i % 64], ("en", "zh")[i % 2])
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        text = json.dumps(turns, ensure_ascii=False)
        return {"conversations": text, "image_bytes": pictures[i % 64] if sees else black}

    def write(file):
        with pyarrow.parquet.ParquetWriter(file, SCHEMA) as writer:
            for start in tqdm(range(0, rows, ROW_GROUP), desc=f"writing {path}", unit="group"):
                group = [row(i) for i in range(start, min(start + ROW_GROUP, rows))]
                writer.write_table(pa.Table.from_pylist(group, SCHEMA))

    write_safely(path, write)


def write_array(path: Path, rows: int, scenes: list, pictures: list[bytes]) -> None:
    """The same as one JSON array in the shape of LLaVA, 1.7 kB a row, and a folder of pictures beside it."""
    for i, picture in enumerate(pictures):
        write_safely(
            path.with_name(f"{path.stem}_images") / f"{i}.jpg", lambda file, content=picture: file.write(content)
        )

    def row(i):
        turns = []
        for turn in range(9):
            question = "<image>\n" * (turn == 0 and i % 10 > 0) + f"What is in picture {i}?"
            turns += [{"from": "human", "value": question}]
            turns += [{"from": "gpt", "value": caption(scenes[(i + turn) % 64], ("en", "zh")[i % 2])}]
        return {"id": str(i), "conversations": turns} | ({"image": f"{i % 64}.jpg"} if i % 10 else {})

    def write(file):
        for i in tqdm(range(rows), desc=f"writing {path}", unit="row"):
            file.write(b",\n" if i else b"[")
            file.write(json.dumps(row(i), ensure_ascii=False).encode())
        file.write(b"]")

    write_safely(path, write)


def watch(peak: dict[str, float]) -> None:
    """Keeps in `peak` the most GB that this process and its workers take: memory of their own, and pages of files
    mapped into memory. Of pages that several share, each counts its part (PSS)."""
    while True:
        now = dict.fromkeys(peak, 0.0)
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            with suppress(psutil.Error):  # gone meanwhile
                for area in process.memory_maps(grouped=True):
                    now["files_gb" if area.path.endswith(".arrow") else "private_gb"] += area.pss / 1e9
        peak.update({key: max(peak[key], now[key]) for key in peak})
        time.sleep(1)


def start(args) -> dict:
    """What a training run does before and between its steps."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(args.tokenizer_path)
    processor = ImageProcessor(size=72, crop_size=(72, 72))
    data = VLMDataset(args.file, None, tokenizer, processor, 640, [34] * 9)
    sampler = StepSampler(data.lengths, args.batch_size)
    loader = make_loader(data, sampler, args, torch.device("cpu"), tokenizer)
    batches = chain.from_iterable(repeat(loader))  # over and over
    next(batches)
    facts = {"rows": len(data), "text_rows": data.without_picture, "seconds": time.perf_counter() - started}
    facts["main_gb"], peak = psutil.Process().memory_info().rss / 1e9, {"private_gb": 0.0, "files_gb": 0.0}
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    rows, started = 0, time.perf_counter()
    while time.perf_counter() < started + args.seconds:
        rows += len(next(batches)["rows"])
    return facts | peak | {"rows_per_s": rows / args.seconds}


def parse_args(argv):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--rows", type=int, default=2_900_000, help="rows of the file")
    add(
        "--form",
        choices=["parquet", "json"],
        default="parquet",
        help="pictures inside, or an array with names of files",
    )
    add("--num_workers", type=int, default=8, help="processes that decode pictures")
    add("--batch_size", type=int, default=32, help="rows")
    add("--seconds", type=float, default=60, help="how long batches are drawn")
    add("--tokenizer_path", type=Path, default=Path("model/tiny"), metavar="DIR", help="folder with tokenizer.json")
    add("--work_dir", type=Path, default=Path("out/benchmark_data"), help="the file and its cache")
    add("--file", type=Path, help=argparse.SUPPRESS)  # a start on this file, in a process of its own
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    if args.file:
        print(json.dumps(start(args)))
        return
    args.work_dir.mkdir(parents=True, exist_ok=True)
    file = args.work_dir / f"{args.rows}.{args.form}"
    if not file.is_file():
        scenes = list(scenes_of("train", 64, seed=0))
        pictures = [encoded(draw(scene, 64), "JPEG", quality=75) for scene in scenes]
        {"parquet": write_rows, "json": write_array}[args.form](file, args.rows, scenes, pictures)
    print(f"{file}: {args.rows:,} rows, {file.stat().st_size / 1e9:.2f} GB; {usable_cores()} cores")
    environment = os.environ | {"HF_DATASETS_CACHE": str(args.work_dir / "cache")}
    flags = sys.argv[1:] if argv is None else argv
    command = [sys.executable, "-m", "scripts.benchmark_data", *flags, "--file", str(file)]
    for which in ("first", "second"):
        out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
        print(f"{which} start: {START.format_map(json.loads(out.splitlines()[-1]))}", flush=True)


if __name__ == "__main__":
    main()
