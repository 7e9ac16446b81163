"""Pictures with captions, in any shape → rows for training, and rows about other pictures for scoring.

    python -m dataset.split --data_path rows.parquet --out_dir out/rows
    python -m dataset.split --data_path a.csv --images_path a --out_dir out/a

It uses rows with one picture and one answer; the answer is the caption. It writes

    out_dir/train.jsonl      a row for each caption: {"image": "0a1b.jpg", "conversations": [question, caption]}
    out_dir/typical.jsonl    of each picture and language, the two rows whose captions agree most with its other ones
    out_dir/val.jsonl        one row for each held-out picture and language
    out_dir/train_refs.json  {picture: all its captions}, for `train_scst_vlm.py --refs_path`
    out_dir/val_refs.json    the same of held-out pictures, for `eval_vlm.py --refs_path`
    out_dir/images/          the pictures as JPEG, with a shorter side of at most --image_size

Pictures are identified by content: a picture with two names is on one side only. Without --val_path, a tenth of the
pictures (at most 1,000) is held out, the same ones in every run.
"""

if __spec__ is None:  # started by its path, where Python cannot import the other folders
    raise SystemExit("type -m dataset.split instead of dataset/split.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # from here on, Ctrl-C or a missing package gives one message

import hashlib
import json
from io import BytesIO
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from common.cli import Parser, positive, run_main
from common.files import write_json, write_text
from dataset.cider import most_typical
from dataset.flags import add_captions_arguments
from dataset.pictures import is_url, use_picture
from dataset.references import read_references
from dataset.rows import Row
from dataset.scenes import refuse_to_overwrite
from dataset.shapes import ReadOptions
from dataset.sources import Source, read_rows
from dataset.values import BadRow
from model.processing import ImageProcessor, language
from model.rgb import to_rgb

MOST = 1000  # held-out pictures, unless --val_path names them


def small_jpeg(content: bytes, processor: ImageProcessor) -> bytes:
    """A picture as JPEG with a shorter side of at most processor.size; a small JPEG is returned unchanged."""
    with processor.open(BytesIO(content)) as image:
        scale = processor.size / min(image.size)
        if image.format == "JPEG" and scale >= 1:
            image.load()  # raises if the picture is broken
            return content
        image = to_rgb(image)
        if scale < 1:
            image = image.resize([max(round(side * scale), 1) for side in image.size], Image.Resampling.LANCZOS)
        jpeg = BytesIO()
        image.save(jpeg, "JPEG", quality=92)
        return jpeg.getvalue()


class Photos:
    """Writes pictures into a folder, each under one name, regardless of its names in the rows."""

    def __init__(self, folder: Path, processor: ImageProcessor):
        self.folder, self.processor = folder, processor
        self.names = {}  # Source.identity → file name here, so a picture with five captions is read once

    def name(self, source: Source, name: str) -> str:
        """The file name here of a picture of `source`; writes the file on first use. Raises FileNotFoundError, or
        ValueError for a broken picture."""
        if not source.has(name):
            hint = "--allow_urls downloads it" if is_url(name) else "Pass their folder or zip with --images_path"
            raise FileNotFoundError(f"{name} in {source.path} is not in {source.pictures_path}.\n{hint}")
        identity = source.identity(name)
        if identity not in self.names:
            try:
                self.names[identity] = use_picture(source, name, self.write)
            except BadRow as error:
                hint = f"Fix the picture, or remove its rows from {source.path}"
                raise ValueError(f"--images_path: {error}\n{hint}") from None
        return self.names[identity]

    def write(self, content: bytes) -> str:
        path = self.folder / f"{hashlib.sha256(content).hexdigest()[:16]}.jpg"
        path.write_bytes(small_jpeg(content, self.processor))
        return path.name

    def read(self, paths, images_path, flag: str, options: ReadOptions, refs: dict[str, list[str]] | None = None):
        """Returns {file name here: [(question, caption)]} and {file name here: captions from refs}; `refs` uses the
        names in the rows. Raises ValueError if no row can be used."""
        rows, more, left_out = {}, {}, 0
        for source, row in tqdm(
            read_rows(paths, images_path, flag, options), flag, unit="row", mininterval=2, dynamic_ncols=True
        ):
            turns = row.conversations if isinstance(row, Row) and len(row.images) == 1 else []
            spoken = [turn for turn in turns if turn["role"] != "system"]
            if len(spoken) != 2 or not spoken[1]["content"].strip():
                left_out += 1
                continue
            (shown,) = row.images
            name = self.name(source, shown)
            rows.setdefault(name, []).append((spoken[0]["content"], spoken[1]["content"].strip()))
            if refs:
                more[name] = refs.get(shown, refs.get(Path(shown).name, []))
        if not rows:
            raise ValueError(f"{flag} {' '.join(map(str, paths))}: no row with one picture and one caption")
        total = sum(map(len, rows.values()))
        note = f"; {left_out:,} rows without exactly one of each skipped" if left_out else ""
        print(f"{flag}: {len(rows):,} pictures with {total:,} captions{note}")
        return rows, more


def row_line(name: str, question: str, caption: str) -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": caption}]
    return json.dumps({"image": name, "conversations": turns}, ensure_ascii=False) + "\n"


def held_out(rows: dict) -> list[str]:
    """A tenth of the pictures. Names are hashes, so the first ones in order are a random sample."""
    return sorted(rows)[: min(max(len(rows) // 10, 2), MOST)]


def write_split(out_dir: Path, train: dict, val: dict, references: dict) -> None:
    """Writes the files of the module's docstring. train, val: {picture: [(question, caption)]}; references: {picture:
    more captions}."""
    print("comparing each caption with the others of its picture ...", flush=True)  # 12 s for 60,000
    rows = [(name, *row) for name, rows in train.items() for row in rows]
    lines = {"train": [row_line(*row) for row in rows], "val": []}
    lines["typical"] = [lines["train"][number] for number in most_typical([(name, text) for name, _, text in rows])]
    for name, theirs in val.items():
        firsts = {}
        for question, caption in theirs:
            firsts.setdefault(language(caption), (question, caption))
        lines["val"] += [row_line(name, *row) for row in firsts.values()]
    for split, pictures in (("train", train), ("val", val)):
        captions = {
            name: list(dict.fromkeys([*(caption for _, caption in theirs), *references.get(name, [])]))
            for name, theirs in pictures.items()
        }
        write_json(out_dir / f"{split}_refs.json", captions)
    for split in ("val", "typical", "train"):
        write_text(out_dir / f"{split}.jsonl", "".join(lines[split]))
    print(
        f"{out_dir}: {len(lines['train']):,} rows about {len(train):,} pictures ({len(lines['typical']):,} of them "
        f"typical), {len(lines['val']):,} rows about {len(val):,} held-out ones"
    )


def main(argv=None):
    parser = Parser(__file__, "\n\n".join(__doc__.split("\n\n")[:2]))
    add_captions_arguments(parser)
    add = parser.start.add_argument
    add("--out_dir", type=Path, required=True, metavar="DIR", help="output folder, created if needed")
    add("--image_size", type=positive(int), default=128, metavar="PIXELS", help="shorter side of larger pictures")
    args = parser.parse_args(argv)
    if args.refs_path and not args.val_path:
        parser.error("--refs_path requires --val_path: without it, captions come from the rows")
    refuse_to_overwrite(args.out_dir, ("train", "val"))
    refs = read_references(args.refs_path)
    (args.out_dir / "images").mkdir(parents=True, exist_ok=True)

    options = ReadOptions(tuple(args.prompt or ()), allow_urls=args.allow_urls)
    photos = Photos(args.out_dir / "images", ImageProcessor(args.image_size))
    train, _ = photos.read(args.data_path, args.images_path, "--data_path", options)
    if args.val_path:
        val, more = photos.read(args.val_path, args.images_path, "--val_path", options, refs)
        if refs and not any(more.values()):
            raise ValueError("--refs_path contains none of the pictures of --val_path: use the names in the rows")
        shared = [name for name in val if train.pop(name, None)]
        if shared:
            print(f"{len(shared):,} pictures of --val_path are also in --data_path: not used for training")
    else:
        more, val = {}, {name: train.pop(name) for name in held_out(train)}
    if not train:
        raise ValueError("--data_path: two pictures are held out, so none is left for training. Provide more pictures")
    write_split(args.out_dir, train, val, more)


if __name__ == "__main__":
    run_main(main)
