"""Files of rows → tables on disk. `datasets` opens Parquet and Arrow. For JSON, COCO, CSV and tar the table holds the
text of each row, so that a broken row is only one bad row."""

import codecs
import csv
import glob
import gzip
import hashlib
import json
import re
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import datasets
import pyarrow.parquet

from common.cli import disk_full, reason
from dataset.rows import from_json
from dataset.shapes import PICTURES, shape_of
from dataset.values import BadRow

TABLES = {".parquet": "parquet", ".arrow": "arrow"}  # suffix → its name in `datasets`
TEXTS = ("", ".json", ".jsonl", ".ndjson", ".txt")
SHOWN = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")  # suffixes of pictures in a tar
CHUNK = 1 << 23  # characters of a JSON array to read at once


def open_text(path: Path, newline: str | None = None):
    opener = gzip.open if path.suffix == ".gz" else open
    # -sig: programs on Windows often write a byte order mark.
    return opener(path, "rt", encoding="utf-8-sig", errors="mark", newline=newline)


def other_encoding(path: Path) -> str:
    """ "UTF-16" or "GBK" if a text file seems to have this encoding, which Windows writes; otherwise ""."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        start = file.read(1 << 16)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[:100].count(0) > 20:
        return "UTF-16"
    lines = [line for line in start.split(b"\n")[:-1] or [start] if not line.isascii()]

    def read(encoding):
        return sum(line.decode(encoding, "ignore").encode(encoding) == line for line in lines)

    return "GBK" if read("utf-8") < len(lines) / 2 < read("gb18030") else ""


def form_of(path: Path) -> str:
    """The format of a file that is not a table: "csv", "tsv", "tar", "array", "coco" or "lines".

    Raises ValueError for any other file.
    """
    if suffix(path) in (".csv", ".tsv", ".tar"):
        return suffix(path)[1:]
    if suffix(path) not in TEXTS:
        raise ValueError(f"the format {suffix(path)} is not supported")
    with open_text(path) as file:
        start = file.read(CHUNK >> 10).lstrip()
        first = start.partition("\n")[0]
        if start.startswith("["):
            return "array"
        if first == start:
            first += file.readline()
        alone = not (start[len(first) :] + file.read(100)).strip()
    if first.strip() == "{":  # an object over several lines
        return "coco"
    row = None
    with suppress(ValueError, RecursionError):
        row = json.loads(first) if alone else None
    if isinstance(row, dict) and any(isinstance(value, list) for value in row.values()):
        try:
            shape_of(tuple(row))
        except BadRow:
            return "coco"
    if suffix(path) == ".txt" and not start.startswith("{"):
        raise ValueError("it is not JSON; name a table with a header .csv, or .tsv if tabs separate its columns")
    return "lines"


def array_rows(path: Path) -> Iterator[str]:
    """The text of each element of a JSON array, read in parts. Raises ValueError for a broken element, because the
    start of the next one is unknown."""
    decoder, blank = json.JSONDecoder(), re.compile(r"[\s,]*")
    with open_text(path) as file:
        text, number = file.read(CHUNK), 1
        at = text.index("[") + 1
        while True:
            at = blank.match(text, at).end()
            if text[at : at + 1] == "]":
                if text[at + 1 :].strip() or file.read(CHUNK).strip():
                    raise ValueError(f"the array ends after row {number - 1}, but more text follows")
                return
            try:
                _, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                cut = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated string") or error.pos > len(text) - 16
                )
                more = file.read(CHUNK) if cut or at == len(text) else ""
                if not more:
                    raise ValueError(f"row {number} is not valid JSON ({error})") from None
                text, at = text[at:] + more, 0
                continue
            yield text[at:end]
            at, number = end, number + 1


def coco_rows(path: Path) -> Iterator[str]:
    """COCO captions, {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]} → one row for each
    picture that has captions. Raises ValueError for an object of another form."""
    with open_text(path) as file:
        content = from_json(file.read())
    images, annotations = (content.get(key) for key in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list):
        raise ValueError(f"it is one object with {', '.join(content)}: write its rows as an array, or one row per line")
    for name, entries, keys in (("images", images, ("id", "file_name")), ("annotations", annotations, ("image_id",))):
        for key in (*keys, "caption")[: 2 if name == "images" else None]:
            if entries and key not in entries[0]:
                raise ValueError(f"its {name} have no {key}, only {', '.join(entries[0])}")
    captions = {}
    for annotation in annotations:
        captions.setdefault(str(annotation["image_id"]), []).append(annotation["caption"])
    for image in images:
        if texts := captions.get(str(image["id"])):
            yield json.dumps({"file_name": image["file_name"], "caption": texts}, ensure_ascii=False)


def csv_rows(path: Path, separator: str) -> Iterator[str]:
    """The rows of CSV or TSV with a header. Raises ValueError, which names the line, if columns would shift."""
    csv.field_size_limit(1 << 30)  # a data URL may be long
    with open_text(path, newline="") as file:
        lines = csv.reader(file, delimiter=separator, strict=True)
        header = next(lines, [])
        if no_name := next((name for name in header if "://" in name or len(name.split()) > 4), None):
            raise ValueError(f"line 1 is not a header ({no_name[:60]}): add one, such as image{separator}caption")
        other = next((mark for mark in ";|\t" if len(header) == 1 and mark in header[0]), None)
        if other:
            raise ValueError(f"its columns are separated by {other!r}: save it with {separator!r} between them")
        if len(set(header)) < len(header):
            raise ValueError(f"line 1 names a column twice: {', '.join(header)}")
        try:
            for fields in lines:
                if fields and len(fields) != len(header):
                    raise ValueError(f"line {lines.line_num} has {len(fields)} fields, the header {len(header)}")
                if separator == "\t" and any("\n" in field or "\t" in field for field in fields):
                    raise ValueError(
                        f"a field that ends in line {lines.line_num} contains a tab or line break: is a quote missing?"
                    )
                if fields:
                    yield json.dumps(dict(zip(header, fields)), ensure_ascii=False)
        except csv.Error as error:
            raise ValueError(f"line {lines.line_num}: {error}; double the quotes inside a quoted field") from None


def tar_rows(path: Path) -> Iterator[tuple[str, list[bytes]]]:
    """(JSON, pictures) of each sample of a WebDataset: consecutive files with the same name up to the first dot. The
    JSON holds the fields of the sample's JSON file, and its text files under their suffix."""
    name, fields, pictures = None, {}, []
    with tarfile.open(path) as tar:
        for member in tar:
            if not member.isfile() or Path(member.name).name.startswith("."):
                continue
            folder, _, file = member.name.rpartition("/")
            stem, _, kind = file.partition(".")
            if (folder, stem) != name:
                if name:
                    yield sample(fields, pictures)
                name, fields, pictures = (folder, stem), {}, []
            content = tar.extractfile(member).read()
            number, _, last = kind.lower().rpartition(".")
            if f".{last}" in SHOWN and (not number or number.isdigit()):
                pictures.append(content)
            elif f".{last}" in SHOWN:  # a mask, say
                fields[kind.lower()] = b""
            else:
                fields[kind.lower()] = content
    if name:
        yield sample(fields, pictures)


def sample(fields: dict[str, bytes], pictures: list[bytes]) -> tuple[str, list[bytes]]:
    texts = {kind: content.decode("utf-8", "mark") for kind, content in fields.items()}
    row = texts.pop("json", "{}")
    with suppress(ValueError, RecursionError):  # otherwise one bad row
        values = json.loads(row)
        values = values if isinstance(values, dict) else {"conversations": values}
        row = json.dumps(
            {key: value for key, value in values.items() if key not in PICTURES} | texts, ensure_ascii=False
        )
    return row, pictures


READERS = {"array": array_rows, "coco": coco_rows}
TEXT_ROWS = datasets.Features(
    {"text": datasets.Value("large_string"), "pictures": datasets.List(datasets.Value("large_binary"))}
)


def text_rows(path: Path, form: str) -> Iterator[dict]:
    """Yields {"text", "pictures"} for `datasets`."""
    separators = {"csv": ",", "tsv": "\t"}
    if form == "tar":
        for text, pictures in tar_rows(path):
            yield {"text": text, "pictures": pictures}
    else:
        rows = csv_rows(path, separators[form]) if form in separators else READERS[form](path)
        for text in rows:
            yield {"text": text, "pictures": None}


def blame_cache(error: Exception) -> None:
    """Raises OSError if the error is about the disk or folder in which `datasets` caches its tables."""
    error, folder = error.__cause__ or error, Path(datasets.config.HF_DATASETS_CACHE)
    full, name = disk_full(error), getattr(error, "filename", None)
    if full or name and (folder in (Path(name), *Path(name).parents) or Path(name) in folder.parents):
        what = reason(error) if full else f"it cannot be written: {error.strerror}"
        raise OSError(
            f"rows are cached in {folder}, and {what}.\nFix this or set another folder: HF_DATASETS_CACHE=DIR"
        )


def suffix(path: Path) -> str:
    """The suffix of a file in lower case, without .gz."""
    return path.with_suffix("").suffix.lower() if path.suffix.lower() == ".gz" else path.suffix.lower()


def load_table(path: Path) -> datasets.Dataset:
    """The rows of a file or of a folder of `save_to_disk`. Rows of other formats are JSON in a column "text"."""
    if path.is_dir():
        return datasets.load_from_disk(str(path))
    kind, options = TABLES.get(suffix(path)), {}
    if kind == "parquet" and not pyarrow.parquet.read_metadata(path).num_rows:
        raise ValueError("it has no rows")  # `datasets` has another message for this
    if not kind:
        form = form_of(path)
        if form != "lines":
            status = path.stat()
            key = repr((str(path.absolute()), status.st_size, status.st_mtime_ns, form))
            source = {"gen_kwargs": {"path": path, "form": form}, "features": TEXT_ROWS}
            try:  # few rows in memory at once, because they may hold pictures
                return datasets.Dataset.from_generator(
                    text_rows,
                    fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
                    writer_batch_size=100,
                    **source,
                )
            except ValueError as error:
                raise ValueError("it has no rows" if "corresponds to no data" in str(error) else error) from None
        kind, options = "text", {"encoding": "utf-8-sig", "encoding_errors": "mark"}
    # escape: [ and * in this path are not patterns
    return datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", **options)


def open_table(path: Path, flag: str) -> datasets.Dataset:
    """As `load_table`. Raises ValueError, which names `flag`, the file, and what was expected."""
    kinds = {".parquet": "Parquet", ".arrow": "Arrow", ".csv": "CSV with a header", ".tsv": "TSV with a header"}
    kinds |= {".tar": "a tar", **dict.fromkeys(TEXTS, "JSON rows in UTF-8")}
    other = ""
    try:
        if path.is_file() and suffix(path) in (*TEXTS, ".csv", ".tsv"):
            other = other_encoding(path)
        table = [] if other else load_table(path)
        if not other and not len(table):
            raise ValueError("it has no rows")
    except Exception as error:  # each reader raises its own errors
        blame_cache(error)
        why = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        every = "JSON, JSONL, Parquet, Arrow, CSV, TSV or tar"
        expected = "a folder of save_to_disk" if path.is_dir() else kinds.get(suffix(path), every)
        raise ValueError(f"{flag} {path} cannot be read: {why}. Expected {expected}") from None
    if other:
        raise ValueError(
            f"{flag} {path} is {other}, expected UTF-8. Type: iconv -f {other} -t UTF-8 {path} > rows{path.suffix}"
        )
    return table
