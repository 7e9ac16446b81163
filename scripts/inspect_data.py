"""Inspect a data set before training on it: figures in the terminal, and a page for the browser with pictures,
conversations and the tokens that carry loss. The last line is the command that trains on it.

    python -m scripts.inspect_data rows.jsonl --images_path pictures
    python -m scripts.inspect_data 'data/*.parquet' --samples 40
    python -m scripts.inspect_data "hf://datasets/owner/name/sft_*.parquet"     # one shard
    python -m scripts.inspect_data llava.json --to rows.parquet     # for other programs

The code of training reads, checks, repairs and shortens the rows; a training on them need not check them again. The
pictures of all rows are searched for, but only those of the samples are opened. The page is one file that loads nothing
else.
"""

if __spec__ is None:  # started by its path: Python would not find the other folders
    raise SystemExit("type -m scripts.inspect_data instead of scripts/inspect_data.py")

from common.start import begin, unwind
from dataset.flags import add_prompt_argument, add_urls_argument

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

import io
import re
import tempfile
import textwrap
from itertools import chain, compress
from pathlib import Path

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from common.cli import Parser, not_negative, positive, run_main
from common.display import WIDTH, typed
from common.files import write_text
from common.machine import usable_cores
from dataset.examples import encode_row
from dataset.features import Pictures
from dataset.lm_dataset import KINDS, VLMDataset
from dataset.rows import MENDED
from dataset.shapes import ReadOptions
from dataset.sources import Shard
from dataset.streaming import is_streamed
from dataset.writing import write_rows
from inference.models import export_of, list_models
from model.build import find_part
from model.flags import add_parts_arguments
from model.generations import MINIMIND_2
from model.model_vlm import VLMConfig
from model.processing import IGNORE, ImageProcessor, load_tokenizer
from model.weights import find_weights, generation_at, read_sidecar
from scripts.templates import data_url, render
from trainer.advice import sizes
from trainer.loader import ignore_interrupt, load_data
from trainer.optimizer import fitting_batch

LANGUAGES = ["other", "English", "Chinese", "mixed"]  # by script: neither, Latin letters, Han characters, both
LATIN, HAN = re.compile("[A-Za-z]"), re.compile("[\u3400-\u9fff]")
MOST = 5  # pictures or answers per row; rows with more share a bar
BINS = 10  # bars in the chart of lengths
MANY = 50_000  # rows from which a progress bar is shown

# ---------------------------------------------------------------------------- figures


def survey(data: VLMDataset) -> np.ndarray:
    """Returns uint8 (usable rows, 3): index in LANGUAGES of the answers, number of pictures, number of answers, as in
    the files. One pass over the rows, with 100 of them in memory at a time."""
    rows = (row for *_, row in chain.from_iterable(data.sources))
    total, usable = data.starts[-1], np.zeros(data.starts[-1], bool)
    usable[data.rows] = True
    rows = tqdm(rows, "looking at rows", total, unit="row", dynamic_ncols=True, disable=total < MANY)
    traits = np.zeros((len(data), 3), np.uint8)
    for at, row in enumerate(compress(rows, usable)):
        answers = [turn["content"] for turn in row.conversations if turn["role"] == "assistant"]
        text = "\n".join(answers)
        language = bool(LATIN.search(text)) + 2 * bool(HAN.search(text))
        traits[at] = language, min(len(row.images), 255), min(len(answers), 255)
    return traits


def length_bins(lengths: np.ndarray) -> list[tuple[str, int]]:
    """Returns (range, rows) for at most BINS ranges of a round width; the last is open if a few rows are far longer."""
    low, high = int(lengths.min()), np.percentile(lengths, 99)
    widths = (factor * 10**power for power in range(9) for factor in (1, 2, 5))
    width = next(width for width in widths if (high - low) / width < BINS - 2)
    start = low // width * width
    counts = np.bincount(np.minimum((lengths - start) // width, BINS - 1)).tolist()
    starts = range(start, start + width * BINS, width)
    labels = [f"{first:,} to {first + width - 1:,}" if width > 1 else f"{first:,}" for first in starts[:-1]]
    return list(zip([*labels, f"{starts[-1]:,} or more"], counts))


def charts(data: VLMDataset, traits: np.ndarray) -> dict[str, list[tuple[str, int]]]:
    """Returns {title: [(label, rows), ...]}."""

    def bars(values, labels):
        return [(label, rows) for label, rows in zip(labels, np.bincount(values).tolist()) if rows]

    numbers = [*map(str, range(MOST + 1)), f"{MOST + 1} or more"]
    languages, pictures, answers = traits[:, 0], *np.minimum(traits[:, 1:], MOST + 1).T
    return {
        "language of the answers, by script": sorted(bars(languages, LANGUAGES), key=lambda bar: -bar[1]),
        "pictures in a row": bars(pictures, numbers),
        "answers in a row": bars(answers, numbers),
        f"tokens of a row, at most {data.max_length:,}": length_bins(data.lengths),
    }


def facts(data: VLMDataset) -> list[tuple[str, str]]:
    """Returns (value, what it is) for the usable rows."""
    loss = data.answer_tokens - data.lost_tokens
    lost = f"of answer tokens cut off ({data.lost_tokens:,} of {data.answer_tokens:,})"
    return [
        (f"{len(data):,}", "usable rows"),
        (f"{sum(map(len, data.bad.values())):,}", "bad rows"),
        *((f"{rows:,}", f"rows read as {shape}") for shape, rows in data.shapes.items()),
        *((f"{rows:,}", f"rows {MENDED[key]}") for key, rows in data.mended.items()),
        (f"{data.lengths.min():,}", "tokens in the shortest row"),
        (f"{np.median(data.lengths):,.0f}", "tokens in the median row"),
        (f"{np.percentile(data.lengths, 95):,.0f}", "tokens, 95th percentile"),
        (f"{data.lengths.max():,}", "tokens in the longest row"),
        (f"{loss / data.lengths.sum():.1%}", f"of tokens carry loss ({loss:,} of {data.lengths.sum():,})"),
        (f"{data.shortened:,}", f"rows shortened to {data.max_length:,} tokens (--max_seq_len)"),
        (f"{data.lost_tokens / data.answer_tokens:.1%}", lost),
    ]


def files(data: VLMDataset) -> list[tuple[str, int, int]]:
    """Returns (path, rows, usable rows) of each file."""
    usable = np.diff(np.searchsorted(data.rows, data.starts)).tolist()
    names = [str(source if isinstance(source, Shard) else source.path) for source in data.sources]
    return list(zip(names, np.diff(data.starts).tolist(), usable))


def wrap(text: str) -> str:
    """Wraps text to the width of a terminal, each line indented like the one it continues; does not break paths."""
    lines = []
    for line in text.splitlines():
        indent = " " * (len(line) - len(line.lstrip()))
        indents = {"initial_indent": indent, "subsequent_indent": indent}
        lines += textwrap.wrap(line.strip(), WIDTH, **indents, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)


def terminal(data: VLMDataset, figures: dict) -> str:
    """Formats all figures for a terminal."""
    lines = [f"{'rows':>12}{'usable':>12}  file"]
    for path, rows, usable in files(data):
        lines.append(f"{rows:>12,}{usable:>12,}  {path if len(path) <= 54 else '...' + path[-51:]}")
    lines += ["", *(f"{value:>12}  {what}" for value, what in facts(data))]
    if data.bad:
        lines += ["", wrap(data.report())]
    for title, counts in figures.items():
        total, most = sum(rows for _, rows in counts), max(rows for _, rows in counts)
        lines += ["", title]
        for label, rows in counts:
            bar = "#" * -(-36 * rows // most)  # at least one for any row
            lines.append(f"  {label:18}{rows:>11,}{rows / total:>8.1%}  {bar}".rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------------------- samples


def open_all(data: VLMDataset) -> tuple[int, list[str]]:
    """Opens every picture, on all cores. Returns their number, and file:line and reason for those that are broken."""
    pictures = Pictures([data])
    pictures.decode = True
    how = {"num_workers": usable_cores(), "worker_init_fn": ignore_interrupt} if len(pictures) > 500 else {}
    loader = DataLoader(pictures, batch_size=32, collate_fn=verdicts, **how)
    broken, bar = [], tqdm(total=len(pictures), unit="picture", dynamic_ncols=True)
    for batch in loader:
        broken += [(i, why) for i, why in batch if why]
        bar.update(len(batch))
    bar.close()
    return len(pictures), [f"{pictures.where(i)}: {why}" for i, why in broken]


def verdicts(batch: list[tuple]) -> list[tuple[int, str]]:
    """Drops the pixels, which need not be sent to the main process."""
    return [(i, why) for i, _, _, why in batch]


def choose(data: VLMDataset, traits: np.ndarray, samples: int, seed: int) -> list[int]:
    """Picks the shortest row, the longest, and others at random, in turn from each language and number of pictures;
    sorted by length."""
    order = np.random.default_rng(seed).permutation(len(data))
    groups = (traits[:, 0] * (MOST + 2) + np.minimum(traits[:, 1], MOST + 1))[order]
    by_group = [order[groups == group][:samples] for group in np.unique(groups)]
    drawn = [rows[i] for i in range(samples) for rows in by_group if i < len(rows)]
    chosen = dict.fromkeys(map(int, [data.lengths.argmin(), data.lengths.argmax(), *drawn]))
    return sorted([*chosen][:samples], key=lambda row: data.lengths[row])


def tokens(ids: list[int], labels: list[int], tokenizer, image_ids: list[int]) -> list[dict]:
    """Returns the tokens of a row as boxes: {"text", "loss": whether it carries loss, "chip": whether it is not plain
    text, "count": number of tokens}. Tokens that form one character share a box, and so do the placeholders of a
    picture."""
    special, decode = tokenizer.added_tokens_decoder, tokenizer.backend_tokenizer.decode
    boxes, at = [], 0
    while at < len(ids):
        end, chip = at + 1, True
        text = decode(ids[at:end], skip_special_tokens=False)
        if ids[at : at + len(image_ids)] == image_ids:
            text, end = f"{text}×{len(image_ids)}", at + len(image_ids)
        elif ids[at] not in special:
            while text.endswith("\ufffd") and end < len(ids) and ids[end] not in special:  # part of a character
                end += 1
                text = decode(ids[at:end], skip_special_tokens=False)
            if end == len(ids):  # shortened inside a character
                text = re.sub("\ufffd+$", "…", text)
            chip = False
        boxes.append({"text": text, "loss": labels[at] != IGNORE, "chip": chip, "count": end - at})
        at = end
    return boxes


def as_png(pixels) -> str:
    """Returns the URL of a picture uint8 (3, H, W), as the model sees it, for the page."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "PNG")
    return data_url(file.getvalue(), "png")


def sample(data: VLMDataset, row: int, example: dict, language: str) -> dict:
    """Returns what a card shows of a row: {"tags", "broken": why its picture cannot be read} or {"tags", "pictures",
    "boxes", "han"}. example: data[row]."""
    tags = [data.where(row), language]
    if "broken" in example:
        return {"tags": tags, "broken": example["broken"]}
    ids, labels = example["input_ids"].tolist(), example["labels"].tolist()
    _, _, names, answers = encode_row(data.row(row), data.tokenizer, data.image_ids, data.max_length)
    loss = sum(label != IGNORE for label in labels)
    tags += [f"{len(ids):,} tokens", f"{loss:,} with loss"]
    tags += [f"shortened: {answers - loss:,} answer tokens lost"] if loss < answers else []
    return {
        "tags": tags,
        "pictures": list(zip(map(as_png, example["pictures"]), names)) if names else [],
        "boxes": tokens(ids, labels, data.tokenizer, data.image_ids),
        "han": language in ("Chinese", "mixed"),
    }


def page(data: VLMDataset, figures: dict, samples: list[dict], notes: list[str], command: list[str]) -> str:
    return render(
        "inspect.html",
        language="en",
        notes=notes,
        facts=facts(data),
        files=[(path, f"{rows:,}", f"{usable:,}") for path, rows, usable in files(data)],
        bad=[(KINDS[kind], f"{len(rows):,}") for kind, rows in data.bad.items()],
        report=data.report() if data.bad else "",
        figures=figures,
        samples=samples,
        placeholders=data.tokenizer.convert_ids_to_tokens(data.image_ids),
        command=typed(command),
    )


# ---------------------------------------------------------------------------- main


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    rows = "rows as for training: JSON, JSONL, Parquet, Arrow, CSV or tar; files, glob patterns or hf://..."
    add("data_path", nargs="+", metavar="PATH", help=rows)
    add("--images_path", nargs="+", metavar="PATH", help="folder or zip of the pictures, one for all or one each")
    add("--stream_rows", type=positive(int), default=1000, help="number of rows of hf://... to fetch and inspect")
    add("--html", default="out/inspect.html", metavar="FILE", help="file for the page")
    add("--samples", type=positive(int), default=12, help="number of rows on the page")
    written = "write the usable rows as they were read, with pictures, for other programs: rows.parquet or rows.jsonl"
    add("--to", metavar="FILE", help=written)
    add("--open_all", action="store_true", help="open every picture, on all cores, to find broken ones")
    add = parser.group("as training will read them").add_argument
    add("--max_seq_len", type=positive(int), default=1536, help="largest row in tokens, placeholders included")
    newest = "weights to train from, or none; default: the newest in out/ and its subfolders"
    add("--from_weight", metavar="FILE", help=newest)
    add("--seed", type=not_negative, default=0, help="seed that picks the samples")
    add_prompt_argument(parser)
    add_urls_argument(parser)
    add_parts_arguments(parser)
    args = parser.parse_args(argv)
    if args.to and Path(args.to).suffix not in (".parquet", ".jsonl"):
        parser.error(f"--to {args.to}: expected a name that ends in .parquet or .jsonl")
    if args.to and Path(args.to).exists():
        parser.error(f"--to {args.to} exists already; choose another name, or remove the file")
    return args


def choose_weights(args) -> Path | None:
    """Returns --from_weight or the newest weights; None if there are none, or if flags name a tokenizer or encoder."""
    if args.from_weight:
        return find_weights(args.from_weight, "./out", None, False)
    if args.tokenizer_path or args.vision_model_path:
        return None
    return next(
        (path for path in list_models("./out") if export_of(path) != "llava"), None
    )  # training cannot start from one


def next_command(args, weights: Path | None, rows: int, skip: bool) -> list[str]:
    """Returns the command that trains on these rows, with epochs and batches that suit their number. skip: whether bad
    rows would stop it."""
    command = ["python", "train_sft_vlm.py", "--from_weight", str(weights or "none"), "--data_path", *args.data_path]
    if args.images_path:
        command += ["--images_path", *args.images_path]
    command += ["--prompt", *args.prompt] if args.prompt else []
    command += ["--allow_urls"] * args.allow_urls
    for flag in ("tokenizer_path", "vision_model_path"):
        if getattr(args, flag):
            command += [f"--{flag}", getattr(args, flag)]
    if args.max_seq_len != parse_args(["PATH"]).max_seq_len:  # the default of training
        command += ["--max_seq_len", str(args.max_seq_len)]
    width = read_sidecar(weights)["config"].get("hidden_size") if weights else None
    epochs, batch_size = sizes(rows, fitting_batch(width or 512))
    command += ["--epochs", str(epochs), "--batch_size", str(batch_size), "--out_dir", "out/mine"]
    return command + ["--on_bad_row", "skip"] * skip


def main(argv=None):
    args = parse_args(argv)
    if args.to or not any(map(is_streamed, args.data_path)):  # --to needs all rows
        return look(args, args.data_path)
    stream = load_data(args, None, None, args.data_path, args.images_path)
    unwind()  # so that the temporary file is deleted
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        shard = stream.plan(args.stream_rows, args.seed, epoch=0)[0]
        stream.fetch(shard, Path(folder) / "rows.arrow")
        return look(args, Shard(Path(folder) / "rows.arrow"), stream.rows)


def look(args, rows: list[str] | Shard, total: int | None = None) -> None:
    """Prints the figures and writes the page. rows: for `VLMDataset`; total: number of rows in the whole stream."""
    notes = ["The pictures of all rows were searched for; only those of the samples were opened."]
    weights = choose_weights(args)
    sidecar = read_sidecar(weights) if weights else {}
    generation = generation_at(weights) if weights else MINIMIND_2
    words = find_part("tokenizer", args.tokenizer_path, weights, sidecar, generation)
    eyes = find_part("vision_model", args.vision_model_path, weights, sidecar, generation)
    if (Path(eyes) / "config.json").exists() or generation is not MINIMIND_2:
        merge = sidecar.get("config", {}).get("spatial_merge_size", 1)
        config = VLMConfig.for_encoder(eyes, spatial_merge_size=merge, **generation.eyes)
        processor = ImageProcessor.from_pretrained(eyes)
    else:
        config, processor = VLMConfig(), ImageProcessor()
        notes.append(f"No encoder in {eyes}: assuming 196 tokens per picture, as with the public CLIP.")
    tokenizer = load_tokenizer(words, config.image_special_token)
    print(wrap(f"checking {', '.join(args.data_path)} ..."), flush=True)
    data = VLMDataset(
        rows,
        args.images_path,
        tokenizer,
        processor,
        args.max_seq_len,
        tokenizer.convert_tokens_to_ids([config.image_token] * len(config.image_ids)),
        on_bad_row="skip",
        options=ReadOptions(tuple(args.prompt or ()), allow_urls=args.allow_urls),
    )
    traits = survey(data)
    figures = charts(data, traits)
    print(f"\n{terminal(data, figures)}\n")

    chosen = choose(data, traits, args.samples, args.seed)
    examples = [data[row] for row in chosen]
    if args.open_all:
        count, broken = open_all(data)
        notes = [f"All {count:,} pictures were opened, {len(broken):,} of them cannot be read{':' * bool(broken)}"]
        notes += broken[:20] + [f"and {len(broken) - 20:,} more"] * (len(broken) > 20)
    else:
        broken = [example["broken"] for example in examples if "broken" in example]
        if broken:
            notes.append(f"{len(broken)} of {len(chosen)} samples have a picture that cannot be read: {broken[0]}")
    if data.not_read:
        notes.append(f"Ignored columns: {', '.join(data.not_read)}.")
    if args.prompt and not data.captioned:
        notes.append("--prompt is not used here: no row is a picture with only captions.")
    if data.groups is not None:
        notes.append(f"An epoch has {len(data.groups):,} rows: one caption of each picture.")
    if args.to:
        notes.append(write_rows(data, Path(args.to)))
    if total:
        notes.append(f"These are {data.starts[-1]:,} of {total:,} streamed rows, from row groups picked by --seed.")
    if not weights and args.from_weight != "none":
        small, public = "python -m scripts.quickstart", "python -m scripts.download --what clip vlm"
        notes.append(f"No weights to start from: train small ones ({small}) or download the public ones ({public}).")
    command = next_command(
        args, weights, total or (len(data) if data.groups is None else len(data.groups)), skip=bool(data.bad or broken)
    )
    samples = [sample(data, row, example, LANGUAGES[traits[row, 0]]) for row, example in zip(chosen, examples)]
    write_text(args.html, page(data, figures, samples, notes, command))
    print(*map(wrap, notes), f"\nwritten: {args.html}", f"To train on it:\n$ {typed(command)}", sep="\n")


if __name__ == "__main__":
    run_main(main)
