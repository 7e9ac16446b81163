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
import glob
import hashlib
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote_to_bytes

import datasets
import pyarrow as pa

from dataset.formats import TABLES, open_table, suffix
from dataset.pictures import Folder, Zip, fetch, is_url, open_pictures, pictures_beside
from dataset.remote import download, is_remote, list_remote
from dataset.rows import Row, from_json, inline_place, parse_line, rows_of, with_pictures
from dataset.shapes import DEFAULT, ReadOptions, normal, shape_of
from dataset.values import BadRow
from model.files import impostor


def parse(batch: pa.Table, first: int, is_json: bool, options: ReadOptions):
    """The rows of a part of a table whose first record has this number: (number, which row of the record, Row, BadRow,
    or None for a blank line), ..."""
    for number, record in enumerate(batch.to_pylist(), first):
        try:
            if not is_json:
                rows = rows_of(record, number, options)
            elif record["text"].strip():
                rows = parse_line(record["text"], number, options, record.get("pictures"))
            else:
                rows = [None]
        except BadRow as error:
            rows = [error.with_traceback(None)]  # which would keep the table open
        for which, row in enumerate(rows):
            yield number, which, row


class Source:
    """The rows of one file, and their pictures.

    Attributes:
        table: its records, mapped from the disk.
        is_json: they are the text of JSON, in a column "text".
        pictures_path: where pictures are looked for, for messages.
    """

    not_read = ()  # columns whose content the model does not see; of JSON, those of a first row
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
            names = table.column_names
            table = table.select_columns(shape_of(tuple(names)).columns(names))
        else:
            names = next((row for row in map(first_keys, table.select(range(min(len(table), 10)))["text"]) if row), ())
        self.table = table
        with suppress(BadRow):
            self.not_read = shape_of(tuple(names)).not_read(names)
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
            if self.is_json:
                record = with_pictures(from_json(record["text"]), record.get("pictures"))
            pictures = normal(record, self.options).pictures
            self.latest = number, pictures  # both at once, as threads may read too
        return pictures

    def store(self, name: str) -> Folder | Zip | None:
        """Where a picture of this name is looked for."""
        return Folder(Path(name).anchor) if Path(name).is_absolute() else self.pictures

    def has(self, name: str) -> bool:
        if inline_place(name):
            return True
        store = self.store(name)
        return self.options.allow_urls if is_url(name) else store is not None and store.has(name)

    def open(self, name: str) -> BytesIO | Path:
        """A picture's file or its content. Raises whatever goes wrong."""
        if place := inline_place(name):
            picture = self.record_pictures(place[0])[place[1]]
            return BytesIO(picture if isinstance(picture, bytes) else decode_url(picture))
        if is_url(name):
            return fetch(name, Path(datasets.config.HF_DATASETS_CACHE) / "pictures")
        return self.store(name).open(name)

    def file(self, name: str) -> Path:
        """What a picture lies in, for its times."""
        if inline_place(name):
            return self.path
        return self.open(name) if is_url(name) else self.store(name).file(name)

    def identity(self, name: str) -> str:
        """Equal for equal pictures, also of other sources."""
        if inline_place(name):
            return hashlib.sha256(self.open(name).getvalue()).hexdigest()
        return self.where_picture(name)

    def where_picture(self, name: str) -> str:
        """For messages."""
        if place := inline_place(name):
            return f"picture {place[1] + 1} of {self.where(place[0])}"
        store = self.store(name)
        return name if is_url(name) or store is None else store.where_picture(name)


def first_keys(text: str) -> tuple[str, ...]:
    with suppress(BadRow, AttributeError):
        return tuple(from_json(text))
    return ()


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
            kinds = sorted(
                {
                    file.suffix
                    for file in path.iterdir()
                    if suffix(file) in (*TABLES, ".json", ".jsonl", ".csv", ".tsv", ".tar")
                }
            )
            parts = [folder.name for folder in sorted(path.iterdir()) if row_parts(folder)]
            what = f"name one of {', '.join(parts)} in it" if parts else "name its files"
            example = path / parts[0] if parts else f"'{path / ('*' + (kinds or ['.parquet'])[0])}'"
            if not kinds and not parts:
                raise ValueError(
                    f"{flag} {path} is a folder without rows: expected metadata.csv with file_name and text"
                )
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
