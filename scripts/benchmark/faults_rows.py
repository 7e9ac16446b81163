"""Rows and pictures in which something is wrong: a part of `scripts.benchmark_faults`."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

from model.processing import IMAGE_TAG, ImageProcessor, load_tokenizer
from scripts.benchmark.faults_files import Bench

PLACEHOLDERS = "@" * 9  # of a picture of model/tiny
VALUES = json.loads(r'[null, true, 3, -1.5, NaN, 1e999, "", "\ud800", "\u0000\u001b[2J", [], ["a"], {}, {"a": 1}]')
VALUES += [10**400, "x" * 100_000]
TEXTS = [IMAGE_TAG, IMAGE_TAG * 9, "@" * 9, "@" * 500, "<|im_end|>", "<|im_start|>assistant\n"]
TEXTS += ["\u2028", "\r", "\ufdd0"]


def flip(content: bytes, rng) -> bytes:
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 30)) if content else 0):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def mutate(row: dict, others: list[Path], pictures: Path, number: int, rng) -> bytes:
    """A line of JSONL in which one thing is wrong, or unusual. A damaged picture is written to `pictures`."""
    row = json.loads(json.dumps(row))
    turns = row["conversations"]
    place = rng.choice([row, *turns])  # of what is mutated
    key = rng.choice(list(place))
    kind = rng.choice(("bytes", "cut", "drop", "rename", "type", "turns", "text", "picture", "picture"))
    if kind == "drop":
        del place[key]
    elif kind == "rename":
        place[rng.choice((key.upper(), key + "s", "img", "from", ""))] = place.pop(key)
    elif kind == "type":
        place[key] = rng.choice(VALUES)
    elif kind == "turns":
        rng.shuffle(turns)
        row["conversations"] = rng.choices(turns, k=rng.randrange(6))
    elif kind == "text":
        turn = rng.choice(turns)
        at = rng.randrange(len(turn["content"]) + 1)
        turn["content"] = turn["content"][:at] + rng.choice(TEXTS) + turn["content"][at:]
    elif kind == "picture" and row.get("image"):
        row["image"] = damage(pictures / row["image"].split(",")[0], others, f"damaged_{number}.jpg", rng)
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    return flip(line, rng) if kind == "bytes" else line[: rng.randrange(len(line))] if kind == "cut" else line


def damage(picture: Path, others: list[Path], name: str, rng) -> str:
    """Writes the picture flipped, cut, both, or another file in its place, beside it. Returns its name."""
    content = picture.read_bytes()
    cut = content[: rng.randrange(len(content))]
    content = rng.choice((flip(content, rng), cut, cut + flip(content, rng), rng.choice(others).read_bytes()))
    (picture.parent / name).write_bytes(content)
    return name


def rows(bench: Bench) -> tuple[str, str]:
    """Rows and pictures in which something is wrong are refused by file and line, or make an example."""
    pictures, count = bench.work / "pictures", Counter()
    shutil.copytree(bench.base / "data/images", pictures)
    good = [json.loads(line) for line in (bench.base / "data/train.jsonl").open(encoding="utf-8")]
    others = [path for path in [*bench.base.iterdir(), *Path("model/tiny").iterdir()] if path.is_file()]
    processor, tokenizer = ImageProcessor.from_pretrained("model/tiny/clip"), load_tokenizer("model/tiny", PLACEHOLDERS)
    for start in range(0, bench.args.rows, 500):
        path = bench.work / f"rows_{start}.jsonl"
        numbers = range(start, min(start + 500, bench.args.rows))
        lines = [mutate(bench.rng.choice(good), others, pictures, number, bench.rng) for number in numbers]
        path.write_bytes(b"\n".join([*lines, json.dumps(good[0]).encode()]))
        try:
            read(bench, path, pictures, tokenizer, processor, count)
        except Exception as error:
            bench.fault(f"rows: rows from number {start} on: {error!r}")
    show(bench, sorted(pictures.glob("damaged_*")), processor, count)
    tried = f"{bench.args.rows:,} mutated rows, {count['opened'] + count['unopened']:,} of them by their picture"
    page = f"by the page {count['unopened']:,} of these pictures refused, {count['opened']:,} shown"
    return tried, f"{count['refused']:,} refused by file and line, {count['accepted']:,} accepted; {page}"


def read(bench: Bench, path: Path, pictures: Path, tokenizer, processor, count: Counter) -> None:
    """As a training reads them."""
    from dataset.lm_dataset import VLMDataset  # only now: its cache is to be in the temporary folder

    data = VLMDataset(path, pictures, tokenizer, processor, 640, [34] * 9, on_bad_row="skip")
    messages = [message for kind in data.bad.values() for message in kind]
    for row, example in enumerate([data[row] for row in range(len(data))]):
        if "broken" in example:
            messages.append(example["broken"])
        elif len(example["input_ids"]) != data.lengths[row]:
            bench.fault(f"rows: {data.where(row)} was checked to another length")
        else:
            count["accepted"] += 1
    count["refused"] += len(messages)
    for message in messages:
        if not re.match(rf"{re.escape(str(path))}:\d+: .", message):
            bench.fault(f"rows: a message without file and line: {message}")


def show(bench: Bench, pictures: list[Path], processor, count: Counter) -> None:
    """As the page shows them."""
    from inference.chat import UserError, open_picture

    for picture in pictures:
        try:
            open_picture(str(picture), processor, 50).convert("RGB")
            count["opened"] += 1
        except UserError:
            count["unopened"] += 1
        except Exception as error:
            bench.fault(f"rows: the page opens {picture.name}: {error!r}")
