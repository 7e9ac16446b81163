"""Rows as people have them: files of any kind that `datasets` opens, or JSON, and the pictures that belong to them.

    rows.jsonl, rows.json       a row in each line, or an array of rows, or COCO's captions; also .gz
    rows.parquet, rows.arrow    a table, with the pictures in it or their names; also a folder of `save_to_disk`
    rows.csv, rows.tsv          a table of text
    rows.tar                    WebDataset: 1.jpg, 1.txt, 2.jpg, 2.txt, ... or 1.json
    folder/metadata.csv         of a folder with the pictures beside (or metadata.jsonl, metadata.parquet)

Whatever it is becomes a table that lies on disk and is mapped into memory: worker processes share it, and it may be
larger than the memory. Of JSON the table holds the text of each row, so that one that is broken is one bad row. What a
row means is decided when it is read (dataset/shapes.py, dataset/rows.py).
"""

import base64
import codecs
import csv
import glob
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote_to_bytes

import datasets
import pyarrow as pa
import pyarrow.parquet

from common.cli import disk_full, reason
from dataset.pictures import fetch, is_url, open_pictures, pictures_beside
from dataset.remote import download, is_remote, list_remote
from dataset.rows import Row, from_json, inline_place, parse_line, rows_of
from dataset.shapes import DEFAULT, BadRow, ReadOptions, normal, shape_of
from model.files import impostor

TABLES = {".parquet": "parquet", ".arrow": "arrow", ".csv": "csv", ".tsv": "csv", ".tar": "webdataset"}
CHUNK = 1 << 23  # characters of a JSON array that are read at once


# ---------------------------------------------------------------------------- JSON


def open_text(path: Path):
    opener = gzip.open if path.suffix == ".gz" else open
    # -sig: Windows likes to put a mark at the start.
    return opener(path, "rt", encoding="utf-8-sig", errors="mark")


def other_encoding(path: Path) -> str:
    """ "UTF-16" or "GBK", as Windows saves them, if that is what a text file seems to be in; else ""."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        start = file.read(1 << 16)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[:100].count(0) > 20:
        return "UTF-16"
    lines = [line for line in start.split(b"\n")[:-1] or [start] if not line.isascii()]

    def read(encoding):
        return sum(line.decode(encoding, "ignore").encode(encoding) == line for line in lines)

    return "GBK" if read("utf-8") < len(lines) / 2 < read("gb18030") else ""


def json_form(path: Path) -> str:
    """ "array", "object" (one for the whole file, as COCO's), or "lines"."""
    with open_text(path) as file:
        start = file.read(CHUNK >> 10).lstrip()
        if start.startswith("["):
            return "array"
        first, _, rest = start.partition("\n")
        if not rest:
            first += file.readline()
    with suppress(ValueError, RecursionError):
        return "object" if {"images", "annotations"} <= set(json.loads(first)) else "lines"
    return "object" if re.match(r'\{\s*\n\s*"(info|licenses|images|annotations)"\s*:\s*[\[{]', start) else "lines"


def elements(path: Path) -> Iterator[str]:
    """The text of each element of a JSON array, which is read a part at a time. Raises ValueError for a broken one, as
    nobody knows where the next begins."""
    decoder = json.JSONDecoder()
    with open_text(path) as file:
        text = file.read(CHUNK)
        at, number = text.index("[") + 1, 1
        while True:
            at = re.compile(r"[\s,]*").match(text, at).end()
            if text[at : at + 1] == "]":
                return
            try:
                _, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                cut = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated string") or error.pos > len(text) - 8
                )
                more = file.read(CHUNK) if cut or at == len(text) else ""
                if not more:
                    raise ValueError(f"row {number} is not valid JSON ({error})") from None
                text, at = text[at:] + more, 0
                continue
            yield text[at:end]
            at, number = end, number + 1


def coco_rows(path: Path) -> Iterator[str]:
    """Captions in the form of COCO: {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}. A row
    for each picture that has some."""
    with open_text(path) as file:
        content = from_json(file.read())
    images, annotations = (content.get(key) for key in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise ValueError(f"it is one object with {', '.join(content)}")
    captions = {}
    for annotation in annotations:
        if "caption" not in annotation:
            raise ValueError(f"its annotations have no caption, but {', '.join(annotation)}")
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    for image in images:
        if image["id"] in captions:
            yield json.dumps({"file_name": image["file_name"], "caption": captions[image["id"]]}, ensure_ascii=False)


def text_rows(path: Path, form: str) -> Iterator[dict]:
    for text in (elements if form == "array" else coco_rows)(path):
        yield {"text": text}


# ---------------------------------------------------------------------------- tables


def blame_cache(error: Exception) -> None:
    """OSError if what `datasets` stumbled over is the disk or the folder on which it keeps its tables."""
    error, folder = error.__cause__ or error, Path(datasets.config.HF_DATASETS_CACHE)
    full, name = disk_full(error), getattr(error, "filename", None)
    if full or name and (folder in (Path(name), *Path(name).parents) or Path(name) in folder.parents):
        what = reason(error) if full else f"it cannot be written: {error.strerror}"
        raise OSError(f"rows are cached in {folder}, and {what}.\nMend that, or name another: HF_DATASETS_CACHE=DIR")


def suffix(path: Path) -> str:
    """Of what is in a file, without .gz."""
    return path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def load_table(path: Path) -> datasets.Dataset:
    """The rows of a file as `datasets` keeps them; of JSON their text, in a column "text"."""
    if path.is_dir():
        return datasets.load_from_disk(str(path))
    kind, options = TABLES.get(suffix(path)), {}
    if kind == "parquet" and not pyarrow.parquet.read_metadata(path).num_rows:
        raise ValueError("it has no rows")  # which `datasets` says in other words
    if kind == "csv":  # everything is text, also NA and 007
        sep = "\t" if suffix(path) == ".tsv" else ","
        with open_text(path) as file:
            names = next(csv.reader(file, delimiter=sep), [])
        text = datasets.Features(dict.fromkeys(names, datasets.Value("string")))
        options = {"sep": sep, "features": text, "keep_default_na": False, "encoding": "utf-8-sig"}
    elif not kind:
        form = json_form(path)
        if form != "lines":
            status = path.stat()
            key = repr((str(path.absolute()), status.st_size, status.st_mtime_ns, form))
            fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
            source = {"path": path, "form": form}
            return datasets.Dataset.from_generator(text_rows, gen_kwargs=source, fingerprint=fingerprint)
        kind, options = "text", {"encoding": "utf-8-sig", "encoding_errors": "mark"}
    # escape: [ and * in a path are no patterns
    return datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)


def open_table(path: Path, flag: str) -> datasets.Dataset:
    """As `load_table`. Raises ValueError that names the file, and says what was expected there."""
    kind = "a folder of save_to_disk" if path.is_dir() else TABLES.get(suffix(path), "JSON rows in UTF-8")
    kind = {"parquet": "Parquet", "arrow": "Arrow", "csv": "CSV with a header", "webdataset": "WebDataset"}.get(
        kind, kind
    )
    if not path.is_dir() and suffix(path) not in (".parquet", ".arrow", ".tar") and (other := other_encoding(path)):
        raise ValueError(
            f"{flag} {path} is {other}, expected UTF-8. Type: iconv -f {other} -t UTF-8 {path} > rows{suffix(path)}"
        )
    try:
        table = load_table(path)
        if not len(table):
            raise ValueError("it has no rows")
    except Exception as error:  # whatever the reader of a format raises
        blame_cache(error)
        why = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{flag} {path} cannot be read: {why}. Expected {kind}") from None
    return table


# ---------------------------------------------------------------------------- sources


def parse(batch: pa.Table, first: int, is_json: bool, options: ReadOptions):
    """The rows of a part of a table whose first record has this number: (number, which row of the record, Row, BadRow,
    or None for a blank line), ..."""
    for number, record in enumerate(batch.to_pylist(), first):
        try:
            if not is_json:
                rows = rows_of(spread(record), number, options)
            elif record["text"].strip():
                rows = parse_line(record["text"], number, options)
            else:
                rows = [None]
        except BadRow as error:
            rows = [error.with_traceback(None)]  # which would keep the table open
        for which, row in enumerate(rows):
            yield number, which, row


def spread(record: dict) -> dict:
    """With what the JSON files of a WebDataset hold as columns."""
    return {**record, **record.pop("json")} if isinstance(record.get("json"), dict) else record


class Source:
    """The rows of one file, and their pictures.

    Attributes:
        table: its records, mapped from the disk.
        is_json: they are the text of JSON, in a column "text".
        pictures_path: where pictures are looked for, for messages.
    """

    latest = (None, None)  # the pictures of the record read last, which are asked for one by one

    def __init__(self, path: Path, images_path=None, flag: str = "--data_path", options: ReadOptions = DEFAULT):
        self.path, self.options = path, options
        table = open_table(path, flag)
        self.is_json = not path.is_dir() and suffix(path) not in TABLES
        try:
            self.use(table)
        except BadRow as error:
            raise ValueError(f"{flag} {path}: {error}") from None
        self.pictures = open_pictures(images_path) if images_path is not None else pictures_beside(path)
        self.pictures_path = self.pictures.path if self.pictures else "--images_path, not given"

    def use(self, table: datasets.Dataset) -> None:
        """Keeps the columns that are read. Raises BadRow if no shape fits them."""
        if not self.is_json:
            names, inside = table.column_names, table.features.get("json")
            names = [*names, *(inside if isinstance(inside, dict) else ())]
            read = {"json", *shape_of(tuple(names)).columns(names)}
            table = table.select_columns([name for name in table.column_names if name in read])
        self.table = table
        self.records = table.with_format("arrow")  # pictures as they are stored, not decoded

    def parse(self):
        """Function (part of the table, number of its first row) → rows; it goes to other processes, without table."""
        return partial(parse, is_json=self.is_json, options=self.options)

    def __iter__(self) -> Iterator[tuple[int, int, Row | BadRow | None]]:
        """All rows in order, as of `parse`; 100 records at a time in memory."""
        for i, batch in enumerate(self.records.iter(100)):
            yield from self.parse()(batch, 100 * i)

    def row(self, number: int, which: int = 0) -> Row:
        """A row of a record: of several captions, which."""
        return [row for *_, row in self.parse()(self.records[number], number)][which]

    def where(self, number: int) -> str:
        """file:number of a record, from 1: the line of JSONL, the element of an array, the row of a table."""
        return f"{self.path}:{number + 1}"

    # ---- pictures, by the names that rows have for them

    def record_pictures(self, number: int) -> list[str | bytes]:
        latest, pictures = self.latest
        if latest != number:
            (record,) = self.records[number].to_pylist()
            pictures = normal(from_json(record["text"]) if self.is_json else spread(record), self.options).pictures
            self.latest = number, pictures  # both at once, as threads may read too
        return pictures

    def has(self, name: str) -> bool:
        if inline_place(name):
            return True
        return self.options.allow_urls if is_url(name) else self.pictures is not None and self.pictures.has(name)

    def open(self, name: str) -> BytesIO | Path:
        """A picture's file or its content. Raises whatever goes wrong."""
        if place := inline_place(name):
            picture = self.record_pictures(place[0])[place[1]]
            return BytesIO(picture if isinstance(picture, bytes) else decode_url(picture))
        if is_url(name):
            return fetch(name, Path(datasets.config.HF_DATASETS_CACHE) / "pictures")
        return self.pictures.open(name)

    def file(self, name: str) -> Path:
        """What a picture lies in, for its times."""
        if inline_place(name):
            return self.path
        return self.open(name) if is_url(name) else self.pictures.file(name)

    def identity(self, name: str) -> str:
        """Equal for equal pictures, also of other sources."""
        if inline_place(name):
            return hashlib.sha256(self.open(name).getvalue()).hexdigest()
        return name if is_url(name) or not self.pictures else self.pictures.where_picture(name)

    def where_picture(self, name: str) -> str:
        """For messages."""
        if place := inline_place(name):
            return f"picture {place[1] + 1} of {self.where(place[0])}"
        return name if is_url(name) else self.pictures.where_picture(name)


def decode_url(url: str) -> bytes:
    """What a data URL holds."""
    head, _, data = url.partition(",")
    return base64.b64decode(data) if head.endswith(";base64") else unquote_to_bytes(data)


class Shard(Source):
    """Rows of a stream, each of which knows its place there; see dataset/streaming.py."""

    is_json, pictures, pictures_path = False, None, "the stream, whose rows must hold their pictures"

    def __init__(self, path: Path, options: ReadOptions = DEFAULT):
        self.path, self.options = path, options
        table = datasets.Dataset.from_file(str(path))
        self.origins = table.select_columns(["origin"])
        self.use(table.remove_columns("origin"))

    def __str__(self):
        return "a shard of the stream"

    def where(self, number: int) -> str:
        return self.origins[number]["origin"]


# ---------------------------------------------------------------------------- --data_path


def row_files(path: Path, flag: str = "--data_path") -> list[Path]:
    """What a --data_path stands for: a file, a pattern such as data/*.parquet, a name without .jsonl or .parquet, a
    folder of pictures with metadata, one of `save_to_disk`."""
    if path.is_dir():
        metadata = [path / f"metadata.{kind}" for kind in ("jsonl", "csv", "parquet")]
        files = [file for file in metadata if file.is_file()][:1] or [path] * (path / "state.json").is_file()
        if not files:
            kinds = sorted({file.suffix for file in path.iterdir() if suffix(file) in (*TABLES, ".json", ".jsonl")})
            parts = [folder.name for folder in sorted(path.iterdir()) if row_parts(folder)]
            what = f"name one of {', '.join(parts)} in it" if parts else "name its files"
            example = path / parts[0] if parts else f"'{path / ('*' + (kinds or ['.parquet'])[0])}'"
            raise ValueError(f"{flag} {path} is a folder: {what}, as in {example}")
        return files
    files = [file for file in (path, Path(f"{path}.jsonl"), Path(f"{path}.parquet")) if file.is_file()][:1]
    if not files and glob.has_magic(str(path)):
        root = Path(path.anchor)
        files = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
    return files


def row_parts(folder: Path) -> bool:
    """Whether a folder holds a part of a data set, such as train."""
    names = ("state.json", "metadata.jsonl", "metadata.csv", "metadata.parquet")
    return folder.is_dir() and any((folder / name).is_file() for name in names)


def open_rows(path, images_path=None, flag: str = "--data_path", options: ReadOptions = DEFAULT) -> list[Source]:
    """The rows of a --data_path, see `row_files`; those of a hub are fetched first. flag: which one messages name."""
    if isinstance(path, Shard):
        return [path]
    files = [download(url) for url in list_remote(path, flag)] if is_remote(path) else row_files(Path(path), flag)
    if not files:
        raise FileNotFoundError(
            f"{flag} {path}: no such file. Expected JSONL, JSON, Parquet, Arrow, CSV or tar.\n"
            "For the public rows, type: python -m scripts.download --what data"
        )
    for file in files:
        if file.is_file() and (what := impostor(file)):
            raise ValueError(f"{flag} {file} {what}")
    datasets.disable_progress_bars()
    return [Source(file, images_path, flag, options) for file in files]


def read_rows(
    paths, images_path=None, flag: str = "--data_path", options: ReadOptions = DEFAULT
) -> Iterator[tuple[Source, Row | BadRow]]:
    """All rows of these paths, each with its source; a BadRow is a conversation, but none that training takes.

    Raises FileNotFoundError for a missing file, and ValueError, naming `flag`, file and number, for what is none.
    """
    for path in paths:
        for source in open_rows(path, images_path, flag, options):
            for number, _, row in source:
                if isinstance(row, BadRow) and row.kind in ("json", "key", "answer"):
                    raise ValueError(
                        f"{flag} {source.where(number)} is not a conversation ({row}).\nExpected "
                        '{"conversations": [{"role": "user", "content": "..."}, ...]}'
                    )
                if row is not None:
                    yield source, row
