"""Where rows and their pictures lie: JSONL or Parquet, a folder or a zip that stays zipped.

    rows.jsonl + pictures/ or pictures.zip     {"conversations": [...], "image": "a.jpg, b.jpg"}, one row per line
    rows.parquet                               columns conversations (the list as JSON) and image_bytes (one, or a list)

Both are read through `datasets`, as Arrow tables that lie on disk and are mapped into memory: worker processes share
them, and a table may be larger than the memory. A row is checked when it is parsed, and what public data sets are known
to get wrong is mended there, and counted: see MENDED.
"""

import codecs
import glob
import hashlib
import json
import re
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet
from PIL import Image, UnidentifiedImageError

from common.cli import disk_full, reason
from model.files import impostor
from model.processing import IMAGE_TAG

MENDED = {
    "untagged": "had pictures and no <image>: it was put before the first question",
    "surplus": "had more <image> than pictures: the last ones were left out",
    "placeholder": "had no <image> and a picture of at most 8×8: read as text",
    "blank": "have a blank answer, from which a model learns to say nothing",
    "twice": "have a key twice, of which the last counts",
}
LARGEST = 1 << 28  # bytes of a file of a picture in a zip, which might unpack to more than the memory holds
# Where other layouts name a row's pictures: were they left out, the model would learn to answer blindly.
OTHER_PICTURES = re.compile(r"(image|img|picture|photo)s?(_?(path|file|name|url|bytes|base64)s?)?|file_name", re.I)


# A byte that is no UTF-8 is read as this, which no text may hold (a "noncharacter" of Unicode), and found by row.
NO_TEXT = "\ufdd0"
codecs.register_error("mark", lambda error: (NO_TEXT, error.start + 1))


def printable(text: str) -> str:
    """Text from data as it may go to a terminal: control characters escaped, what is very long without its middle."""
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return text if len(text) <= 500 else f"{text[:350]} ... {text[-130:]}"


class BadRow(ValueError):
    """A row that cannot be learned from. `kind` is a key of `dataset.lm_dataset.KINDS`."""

    def __init__(self, kind: str, message: str):
        super().__init__(printable(message))
        self.kind = kind


# ---------------------------------------------------------------------------- one row


@dataclass
class Row:
    conversations: list[dict]  # {"role", "content"}, as many <image> in the user's turns as there are images
    images: list[str]  # names, to be opened by the `pictures` of the row's source
    kind: str | list = ""  # what the row says of its questions, as drawn scenes do; see inference/scoring.py
    mended: str = ""  # a key of MENDED


def checked(conversations, images: list[str], **about) -> Row:
    """Conversations as they were parsed, and names of pictures → a Row. Raises BadRow."""
    if not isinstance(conversations, list):
        raise BadRow("key", 'no "conversations" list')
    for turn in conversations:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            raise BadRow("key", 'a turn needs "role" and "content", both text')
    if not any(turn["role"] == "assistant" for turn in conversations):
        raise BadRow("answer", "no assistant turn, nothing to learn")
    if images and not any(IMAGE_TAG in turn["content"] for turn in conversations):
        return checked(add_tags(conversations, len(images)), images, **{"mended": "untagged"} | about)
    tags = sum(turn["content"].count(IMAGE_TAG) for turn in conversations if turn["role"] == "user")
    if tags > len(images) > 0:
        return Row(drop_tags(conversations, len(images)), images, **about, mended="surplus")
    if tags != len(images):
        raise BadRow("count", f"{tags} {IMAGE_TAG} in the user's turns, {len(images)} pictures")
    blank = any(turn["role"] == "assistant" and not turn["content"].strip() for turn in conversations)
    return Row(conversations, images, **{"mended": "blank" if blank else ""} | about)


def add_tags(conversations: list[dict], count: int) -> list[dict]:
    """The conversation with so many tags before its first question. Raises BadRow if there is none."""
    for at, turn in enumerate(conversations):
        if turn["role"] == "user":
            asked = turn | {"content": f"{IMAGE_TAG}\n" * count + turn["content"]}
            return [*conversations[:at], asked, *conversations[at + 1 :]]
    raise BadRow("role", f"{count} pictures, and no user turn to show them in")


def drop_tags(conversations: list[dict], keep: int) -> list[dict]:
    """The conversation with its first `keep` tags, each other one gone with the line break before it."""

    def tag(match):
        nonlocal keep
        keep -= 1
        return match[0] if keep >= 0 else ""

    return [
        turn | {"content": re.sub(rf"\n?{IMAGE_TAG}", tag, turn["content"]).strip()} if turn["role"] == "user" else turn
        for turn in conversations
    ]


def from_json(text: str, pairs_hook=None):
    """What a JSON text holds. Raises BadRow. pairs_hook: makes an object of its pairs, see `json.loads`."""
    if isinstance(text, str) and NO_TEXT in text:
        raise BadRow("json", f"character {text.index(NO_TEXT) + 1} is no UTF-8")
    try:
        value = text if isinstance(text, list) else json.loads(text, object_pairs_hook=pairs_hook)
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is valid JSON, but no text
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow("json", str(error)) from None
    return value


def parse_line(line: str) -> Row:
    """A line of JSONL → a Row. Raises BadRow."""
    twice = []

    def noting(pairs: list) -> dict:
        found = dict(pairs)
        twice.extend(found if len(found) < len(pairs) else ())
        return found

    row = from_json(line, noting)
    if not isinstance(row, dict):
        raise BadRow("key", 'no "conversations" list')
    images = whole(image_names(row))
    for key, value in row.items():
        if not images and value and OTHER_PICTURES.fullmatch(key):
            raise BadRow("key", f'"{key}" seems to name pictures, which are read from "image": rename it')
    mended = {"mended": "twice"} if twice else {}
    return checked(row.get("conversations"), images, kind=row.get("kind") or "", **mended)


def image_names(row: dict) -> list[str]:
    """What the "image" of a row of JSONL names, also with a list or null there. Raises BadRow."""
    images = row.get("image") or []
    if isinstance(images, str):
        images = images.split(",")
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise BadRow("key", '"image" must be text, as in "a.jpg" or "a.jpg, b.jpg", or a list of texts')
    return [name.strip() for name in images]


def parse_record(conversations: str, image_bytes: bytes | list | None, number: int) -> Row:
    """A row of Parquet → a Row, whose pictures are called "number.0", "number.1", ... Raises BadRow."""
    pictures = picture_list(image_bytes)
    value = from_json(conversations)
    text_only = isinstance(value, list) and not any(IMAGE_TAG in str(turn) for turn in value)
    if text_only and len(pictures) == 1 and is_placeholder(pictures[0]):
        return replace(checked(value, []), mended="placeholder")
    return checked(value, [f"{number}.{i}" for i in range(len(pictures))])


def picture_list(image_bytes) -> list[bytes]:
    """Also of a column of Image() of `datasets`: {"bytes", "path"}. Raises BadRow where there is only a path."""
    found = []
    for picture in image_bytes if isinstance(image_bytes, list) else [image_bytes]:
        if isinstance(picture, dict):
            if not picture.get("bytes") and picture.get("path"):
                raise BadRow("key", f"image_bytes holds the path {picture['path']} in place of a picture")
            picture = picture.get("bytes")
        found.append(picture)
    return whole(found)


def whole(pictures: list) -> list:
    """Names or contents of pictures without empty ones at the end. Raises BadRow for one before, as the others would
    move to the wrong <image>."""
    while pictures and not pictures[-1]:
        pictures = pictures[:-1]
    if not all(pictures):
        raise BadRow("count", f"picture {[bool(picture) for picture in pictures].index(False) + 1} is empty")
    return pictures


def is_placeholder(picture: bytes) -> bool:
    """Text rows of the public Parquet files carry a black picture of 8×8, as the column may not be empty."""
    try:
        with Image.open(BytesIO(picture)) as image:
            return max(image.size) <= 8
    except Exception:  # not a picture: said when the row is used
        return False


# ---------------------------------------------------------------------------- pictures


def spellings(name: str) -> Iterator[str]:
    """A name as it is, and as another system would write it: with / for \\, letters and accents together or apart."""
    name = name.removeprefix("./")
    yield name
    name = name.replace("\\", "/").removeprefix("./")
    if not name.isascii() or "/" in name:
        yield from dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))])


def file_name(entry: zipfile.ZipInfo) -> str:
    """As it was meant: what does not say that it is UTF-8 is taken for CP437 by Python, and is UTF-8 or GBK mostly."""
    if entry.flag_bits & 0x800 or entry.filename.isascii():
        return entry.filename
    for encoding in ("utf-8", "gb18030"):
        with suppress(UnicodeError):
            return entry.filename.encode("cp437").decode(encoding)
    return entry.filename


class Folder:
    """Pictures in a folder, by their path in it."""

    def __init__(self, path):
        self.path = Path(path)

    def find(self, name: str) -> Path | None:
        own = f"{self.path.absolute().name}/"  # rows may say images/a.jpg and --images_path images
        for spelled in spellings(name):
            for inside in (spelled, spelled.removeprefix(own)):
                with suppress(OSError, ValueError):  # too long, or with a zero byte: not a name at all
                    if (self.path / inside).is_file():
                        return self.path / inside
        return None

    def has(self, name: str) -> bool:
        return self.find(name) is not None

    def open(self, name: str):
        """What `PIL.Image.open` takes."""
        return self.find(name) or self.path / name

    file = open  # that a picture lies in

    def where(self, name: str) -> str:
        return str(self.open(name))


class Zip:
    """Pictures in a zip, which stays one: by their path in it, without the folders that all of them are in.

    The index of a zip with a million files takes half a gigabyte as Python objects, which every worker would have to
    read anew; as arrays it takes tens of megabytes, which forked workers share.
    """

    def __init__(self, path):
        self.path = Path(path)
        try:
            with zipfile.ZipFile(path) as archive:
                entries = [
                    entry
                    for entry in archive.infolist()
                    if not entry.is_dir() and not re.search(r"(^|/)(__MACOSX/|\._)", entry.filename)
                ]
        except zipfile.BadZipFile as error:
            what = impostor(path) or f"cannot be read: {error}. Fetch it again"
            raise ValueError(f"--images_path {path} {what}") from None
        if any(entry.flag_bits & 1 for entry in entries):
            raise ValueError(f"--images_path {path} is encrypted: unpack it, and give the folder")
        packed = {entry.compress_type for entry in entries} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
        if packed:
            raise ValueError(f"--images_path {path} is packed by method {packed.pop()}: unpack it, and give the folder")
        entries = [entry for entry in entries if len(entry.filename) < 256]  # longer ones would widen the array
        names = list(map(file_name, entries))
        start = common_folder(names)
        self.folder = names[0][:start].encode() if names else b""
        encoded = np.array([name[start:].encode() for name in names], dtype=bytes)
        order = np.argsort(encoded, kind="stable")
        self.names = encoded[order]
        self.entries = np.array(
            [
                (entry.header_offset, entry.compress_size, entry.file_size, entry.CRC, entry.compress_type)
                for entry in entries
            ],
            dtype=np.int64,
        ).reshape(-1, 5)[order]

    def find(self, name: str) -> int | None:
        for wanted in map(str.encode, spellings(name)):
            for inside in (wanted, wanted.removeprefix(self.folder)):
                at = int(np.searchsorted(self.names, inside, side="right")) - 1  # of several under one name the last
                if at >= 0 and self.names[at] == inside:
                    return at
        return None

    def has(self, name: str) -> bool:
        return self.find(name) is not None

    def open(self, name: str) -> BytesIO:
        """The file's bytes. Raises ValueError if they are damaged, or too many for a picture."""
        offset, size, unpacked, crc, method = self.entries[self.find(name)].tolist()
        if max(size, unpacked) > LARGEST:
            raise ValueError(f"it unpacks to {max(size, unpacked):,} bytes, a picture has at most {LARGEST:,}")
        with self.path.open("rb") as file:
            file.seek(offset)
            # The entry's own header, whose extra field may differ in length from the one in the index.
            name_length, extra_length = struct.unpack("<26xHH", file.read(30))
            file.seek(name_length + extra_length, 1)
            data = file.read(size)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-15).decompress(data, unpacked + 1)  # one more shows that it says too few
        if len(data) != unpacked or zlib.crc32(data) != crc:
            raise ValueError("its checksum is wrong, the zip is damaged")
        return BytesIO(data)

    def file(self, name: str) -> Path:
        return self.path

    def where(self, name: str) -> str:
        return f"{self.path}:{name}"


def common_folder(names: list[str]) -> int:
    """How many characters all paths have in common as folders: 7 for ["images/a.jpg", "images/b.jpg"]."""
    if not names:
        return 0
    first, last = min(names), max(names)
    common = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first.rfind("/", 0, common) + 1


def open_pictures(path) -> Folder | Zip:
    """--images_path: a folder or a zip."""
    if Path(path).is_dir():
        return Folder(path)
    if Path(path).is_file():
        return Zip(path)
    raise FileNotFoundError(f"--images_path {path}: no such folder or zip")


def pictures_beside(path: Path) -> Folder | Zip | None:
    """The pictures of sft_data.jsonl when no --images_path is given: sft_images or images beside it, folder or zip."""
    stem = path.stem.removesuffix("_data").removesuffix("_vlm")
    for name in (f"{stem}_images", f"{stem}_images.zip", "images", "images.zip"):
        if (path.parent / name).exists():
            return open_pictures(path.parent / name)
    return None


def use_picture(source, name: str, use):
    """use(the bytes of a picture's file). Whatever goes wrong becomes a BadRow that names the file."""
    content = b"unread"
    try:
        file = source.open(name)
        content = file.read_bytes() if isinstance(file, Path) else file.getvalue()
        return use(content)
    except Exception as error:  # Pillow's decoders raise whatever their format makes them stumble over
        why = "no kind of picture that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        what = impostor(content) or f"cannot be read: {why}"
        raise BadRow("broken", f"{source.where(name)} {what}") from None


# ---------------------------------------------------------------------------- rows


def other_encoding(path: Path) -> str:
    """ "UTF-16" or "GBK", as Windows saves them, if that is what a text file seems to be in; else ""."""
    with path.open("rb") as file:
        start = file.read(1 << 16)
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or start[:100].count(0) > 20:
        return "UTF-16"
    lines = [line for line in start.split(b"\n")[:-1] or [start] if not line.isascii()]

    def read(encoding):
        return sum(line.decode(encoding, "ignore").encode(encoding) == line for line in lines)

    return "GBK" if read("utf-8") < len(lines) / 2 < read("gb18030") else ""


def blame_cache(error: Exception) -> None:
    """OSError if what `datasets` stumbled over is the disk or the folder on which it keeps its tables."""
    error, folder = error.__cause__ or error, Path(datasets.config.HF_DATASETS_CACHE)
    full, name = disk_full(error), getattr(error, "filename", None)
    if full or name and (folder in (Path(name), *Path(name).parents) or Path(name) in folder.parents):
        what = reason(error) if full else f"it cannot be written: {error.strerror}"
        raise OSError(f"rows are cached in {folder}, and {what}.\nMend that, or name another: HF_DATASETS_CACHE=DIR")


class Jsonl:
    """A file of rows, one per line, and the folder or zip of their pictures."""

    def __init__(self, path: Path, images_path=None, flag: str = "--data_path"):
        self.path = path
        if encoding := other_encoding(path):
            raise ValueError(
                f"{flag} {path} is {encoding}, expected UTF-8. Type: iconv -f {encoding} -t UTF-8 {path} > rows.jsonl"
            )
        try:  # -sig: Windows likes to put a mark at the start. escape: [ and * in a path are no patterns.
            self.table = datasets.load_dataset(
                "text",
                data_files=glob.escape(str(path)),
                split="train",
                encoding="utf-8-sig",
                encoding_errors="mark",
            )
        except (datasets.exceptions.DatasetGenerationError, OSError) as error:
            blame_cache(error)
            why = error.__cause__ or error
            raise ValueError(f"{flag} {path} cannot be read: {why}. Expected JSONL in UTF-8") from None
        self.pictures = open_pictures(images_path) if images_path is not None else pictures_beside(path)
        self.pictures_path = self.pictures.path if self.pictures else "--images_path, not given"

    @staticmethod
    def parse(batch, first: int) -> Iterator[Row | BadRow | None]:
        """The rows of an Arrow table; None for a blank line."""
        for line in batch["text"].to_pylist():
            try:
                yield parse_line(line) if line.strip() else None
            except BadRow as error:
                yield error

    def row(self, number: int) -> Row:
        return parse_line(self.table[number]["text"])

    def place(self, number: int) -> str:
        """file:line of a row"""
        return f"{self.path}:{number + 1}"

    def has(self, name: str) -> bool:
        return self.pictures is not None and self.pictures.has(name)

    def open(self, name: str):
        return self.pictures.open(name)

    def file(self, name: str) -> Path:
        return self.pictures.file(name)

    def identity(self, name: str):
        """Equal for equal pictures."""
        return name

    def where(self, name: str) -> str:
        return self.pictures.where(name)


def undecoded(table: datasets.Dataset) -> datasets.Dataset:
    """With image_bytes as they are, where `datasets` would give pictures of Pillow."""
    kind, several = table.features["image_bytes"], None
    if isinstance(kind, (list, datasets.Sequence)):
        kind, several = (kind[0] if isinstance(kind, list) else kind.feature), datasets.Sequence
    if not isinstance(kind, datasets.Image):
        return table
    plain = datasets.Image(decode=False)
    return table.cast_column("image_bytes", several(plain) if several else plain)


class Parquet:
    """A file of rows in the schema of the public Parquet files, pictures included."""

    latest = (None, None)  # the record read last, which is asked for again, once for each of its pictures

    def __init__(self, path: Path, images_path=None, flag: str = "--data_path"):
        self.path = path
        try:
            if not pyarrow.parquet.read_metadata(path).num_rows:
                raise ValueError("it has no rows")
            self.table = datasets.load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
            blame_cache(error)
            why = str(error.__cause__ or error).splitlines()[0]
            raise ValueError(f"{flag} {path} cannot be read: {why}. Expected Parquet") from None
        missing = {"conversations", "image_bytes"} - set(self.table.column_names)
        if missing:
            raise ValueError(
                f"{flag} {path} has no column {' and '.join(sorted(missing))}, but "
                f"{', '.join(self.table.column_names)}. Expected conversations (JSON) and image_bytes"
            )
        self.table = undecoded(self.table.select_columns(["conversations", "image_bytes"]))

    @staticmethod
    def parse(batch, first: int) -> Iterator[Row | BadRow]:
        """The rows of an Arrow table, the first of which has this number."""
        columns = (batch[key].to_pylist() for key in ("conversations", "image_bytes"))
        for i, record in enumerate(zip(*columns)):
            try:
                yield parse_record(*record, first + i)
            except BadRow as error:
                yield error

    def record(self, number: int) -> dict:
        latest, record = self.latest
        if latest != number:
            record = self.table[number]
            self.latest = number, record  # both at once, as threads may read too
        return record

    def row(self, number: int) -> Row:
        record = self.record(number)
        return parse_record(record["conversations"], record["image_bytes"], number)

    def has(self, name: str) -> bool:
        return True

    def open(self, name: str) -> BytesIO:
        number, which = map(int, name.split("."))
        return BytesIO(picture_list(self.record(number)["image_bytes"])[which])

    def file(self, name: str) -> Path:
        return self.path

    def place(self, number: int) -> str:
        return f"{self.path}:{number + 1}"

    def identity(self, name: str):
        return hashlib.sha256(self.open(name).getvalue()).hexdigest()

    def where(self, name: str) -> str:
        number, which = map(int, name.split("."))
        return f"picture {which + 1} of {self.place(number)}"


class Shard(Parquet):
    """Rows of a stream, each of which knows its place there; see dataset/streaming.py."""

    def __init__(self, path: Path):
        self.path = path
        table = datasets.Dataset.from_file(str(path))
        self.places = table.select_columns(["origin"])
        self.table = undecoded(table.select_columns(["conversations", "image_bytes"]))

    def __str__(self):
        return "a shard of the stream"

    def place(self, number: int) -> str:
        return self.places[number]["origin"]


def row_files(path: Path, flag: str = "--data_path") -> list[Path]:
    """What a --data_path stands for: a file, a pattern such as data/*.parquet, a name without .jsonl or .parquet."""
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder: name its files, as in '{path / '*.parquet'}'")
    files = [file for file in (path, Path(f"{path}.jsonl"), Path(f"{path}.parquet")) if file.is_file()][:1]
    if not files and glob.has_magic(str(path)):
        root = Path(path.anchor)
        files = sorted(file for file in root.glob(str(path.relative_to(root))) if file.is_file())
    return files


def open_rows(path, images_path=None, flag: str = "--data_path") -> list[Jsonl | Parquet]:
    """The rows of a --data_path, see `row_files`. flag: which one messages name."""
    if isinstance(path, Shard):
        return [path]
    path = Path(path)
    files = row_files(path, flag)
    if not files:
        raise FileNotFoundError(
            f"{flag} {path}: no such file. Expected JSONL or Parquet.\n"
            "For the public rows, type: python -m scripts.download --what data"
        )
    for file in files:
        if what := impostor(file):
            raise ValueError(f"{flag} {file} {what}")
    datasets.disable_progress_bars()
    return [(Parquet if file.suffix.lower() == ".parquet" else Jsonl)(file, images_path, flag) for file in files]


def each_row(source: Jsonl | Parquet) -> Iterator[Row | BadRow | None]:
    """All rows of a source in order, 100 at a time in memory; None for a blank line."""
    for i, batch in enumerate(source.table.with_format("arrow").iter(100)):
        yield from source.parse(batch, 100 * i)


def read_rows(paths, images_path=None, flag: str = "--data_path") -> Iterator[tuple[Jsonl | Parquet, Row | BadRow]]:
    """All rows of these paths, each with its source; a BadRow is a conversation, but none that training takes.

    Raises FileNotFoundError for a missing file, and ValueError, naming `flag`, file and line, for what is none.
    """
    for path in paths:
        for source in open_rows(path, images_path, flag):
            for number, row in enumerate(each_row(source)):
                if isinstance(row, BadRow) and row.kind in ("json", "key", "answer"):
                    raise ValueError(
                        f"{flag} {source.place(number)} is not a conversation ({row}).\nExpected "
                        '{"conversations": [{"role": "user", "content": "..."}, ...]}'
                    )
                if row is not None:
                    yield source, row
