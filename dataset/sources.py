"""Opens files of rows in all supported formats, and finds the pictures that belong to the rows.

    rows.jsonl, rows.json       one row per line, an array of rows, or COCO captions; also .gz
    rows.parquet, rows.arrow    a table that contains pictures or their names; also a folder of `save_to_disk`
    rows.csv, rows.tsv          a table of text with a header
    rows.tar                    WebDataset: 1.jpg, 1.txt, 2.jpg, 2.txt, ... or 1.json
    folder/metadata.csv         next to its pictures (or metadata.jsonl, metadata.parquet)

Every format becomes a table on disk that is mapped into memory: worker processes share it, and it may be larger than
the memory. For JSON the table holds the text of each row, so a broken row is only one bad row. The layout of a row is
determined when it is read (dataset/shapes.py, dataset/rows.py).
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
    """Parses a part of a table, whose first record has the number `first`. Yields (number of the record, index among
    its rows, Row, BadRow or None for a blank line)."""
    for number, record in enumerate(batch.to_pylist(), first):
        try:
            if not is_json:
                rows = rows_of(record, number, options)
            elif record["text"].strip():
                rows = parse_line(record["text"], number, options, record.get("pictures"))
            else:
                rows = [None]
        except BadRow as error:
            rows = [error.with_traceback(None)]  # a traceback would keep the table open
        for which, row in enumerate(rows):
            yield number, which, row


class Source:
    """The rows of one file, and their pictures.

    Attributes:
        table: its records, memory-mapped.
        is_json: the records are JSON text, in a column "text".
        pictures_path: where to look for pictures, for messages.
    """

    not_read = ()  # columns that are not read; for JSON, of the first valid row
    latest = (None, None)  # (number, pictures) of the last record read, because pictures are requested one by one

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
        """Keeps only the columns to read. Raises BadRow if no shape fits them."""
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
        """A function (part of the table, number of its first row) → rows, for other processes; it holds no table."""
        return partial(parse, is_json=self.is_json, options=self.options)

    def __iter__(self) -> Iterator[tuple[int, int, Row | BadRow | None]]:
        """All rows in order, as `parse` yields them, with 100 records in memory at a time."""
        for i, batch in enumerate(self.records.iter(100)):
            yield from self.parse()(batch, 100 * i)

    def row(self, number: int, which: int = 0) -> Row:
        """Row `which` of a record; a record with several captions has several rows."""
        return [row for *_, row in self.parse()(self.records[number], number)][which]

    def where(self, number: int) -> str:
        """file:number of a record, counted from 1: a line of JSONL, an element of an array, or a row of a table."""
        return f"{self.path}:{number + 1}"

    # ---- pictures, by the names that rows use

    def record_pictures(self, number: int) -> list[str | bytes]:
        """The pictures of a record: names, URLs, or contents of files."""
        latest, pictures = self.latest
        if latest != number:
            (record,) = self.records[number].to_pylist()
            if self.is_json:
                record = with_pictures(from_json(record["text"]), record.get("pictures"))
            pictures = normal(record, self.options).pictures
            self.latest = number, pictures  # one assignment, because threads may read at the same time
        return pictures

    def store(self, name: str) -> Folder | Zip | None:
        """The folder or zip to search for a picture."""
        return Folder(Path(name).anchor) if Path(name).is_absolute() else self.pictures

    def has(self, name: str) -> bool:
        if inline_place(name):
            return True
        store = self.store(name)
        return self.options.allow_urls if is_url(name) else store is not None and store.has(name)

    def open(self, name: str) -> BytesIO | Path:
        """The path of a picture, or its content. Raises various errors, see `use_picture`."""
        if place := inline_place(name):
            picture = self.record_pictures(place[0])[place[1]]
            return BytesIO(picture if isinstance(picture, bytes) else decode_url(picture))
        if is_url(name):
            return fetch(name, Path(datasets.config.HF_DATASETS_CACHE) / "pictures")
        return self.store(name).open(name)

    def file(self, name: str) -> Path:
        """The file that contains a picture, for its modification time."""
        if inline_place(name):
            return self.path
        return self.open(name) if is_url(name) else self.store(name).file(name)

    def identity(self, name: str) -> str:
        """A string that is equal for the same picture, also in another source."""
        if inline_place(name):
            return hashlib.sha256(self.open(name).getvalue()).hexdigest()
        return self.where_picture(name)

    def where_picture(self, name: str) -> str:
        """The position of a picture, for messages."""
        if place := inline_place(name):
            return f"picture {place[1] + 1} of {self.where(place[0])}"
        store = self.store(name)
        return name if is_url(name) or store is None else store.where_picture(name)


def first_keys(text: str) -> tuple[str, ...]:
    """The keys of a row in JSON; () if it is broken."""
    with suppress(BadRow, AttributeError):
        return tuple(from_json(text))
    return ()


def decode_url(url: str) -> bytes:
    """The bytes in a data URL."""
    head, _, data = url.partition(",")
    return base64.b64decode(data) if head.endswith(";base64") else unquote_to_bytes(data)


class Shard(Source):
    """Rows of a stream; each row records its origin. See dataset/streaming.py."""

    is_json, pictures, pictures_path = False, None, "the stream, whose rows must contain their pictures"

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
    """The files of a --data_path: a file, a pattern such as data/*.parquet, a name without .jsonl or .parquet, a folder
    of pictures with metadata, or a folder of `save_to_disk`. Raises ValueError for other folders."""
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
            what = f"choose one of {', '.join(parts)} in it" if parts else "name its files"
            example = path / parts[0] if parts else f"'{path / ('*' + (kinds or ['.parquet'])[0])}'"
            if not kinds and not parts:
                raise ValueError(
                    f"{flag} {path} is a folder without rows: expected metadata.csv with file_name and text"
                )
            raise ValueError(f"{flag} {path} is a folder: {what}, for example {example}")
        return files
    files = [file for file in (path, Path(f"{path}.jsonl"), Path(f"{path}.parquet")) if file.is_file()][:1]
    if not files and glob.has_magic(str(path)):
        root = Path(path.anchor)
        files = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
    return files


def row_parts(folder: Path) -> bool:
    """Whether a folder contains a part of a data set, such as train."""
    names = ("state.json", "metadata.jsonl", "metadata.csv", "metadata.parquet")
    return folder.is_dir() and any((folder / name).is_file() for name in names)


def open_rows(path, images_path=None, flag: str = "--data_path", options: ReadOptions = DEFAULT) -> list[Source]:
    """Opens the rows of a --data_path (see `row_files`); downloads remote files first. Messages name `flag`.

    Raises FileNotFoundError or ValueError.
    """
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
    """Yields all rows of these paths, each with its source. A BadRow is a conversation that training does not accept.

    Raises FileNotFoundError for a missing file, and ValueError for a row that is not a conversation, which names
    `flag`, file and number.
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
