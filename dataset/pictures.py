"""Finds and reads the pictures that rows name: in a folder, in a zip (without unpacking it), or on the web."""

import hashlib
import re
import struct
import time
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from common.files import write_safely
from common.web import fetch_pieces
from dataset.remote import download, is_remote
from dataset.values import BadRow
from model.files import impostor

LARGEST = 1 << 28  # bytes of a picture's file: one in a zip could unpack to more than fits into memory
FETCHED, SECONDS = 1 << 25, 30  # limits for a picture on the web: bytes, and time to download it


def spellings(name: str) -> Iterator[str]:
    """A name as it is, and as other systems write it: with / for \\, with composed or decomposed accents."""
    name = name.removeprefix("./")
    yield name
    name = name.replace("\\", "/").removeprefix("./")
    if not name.isascii() or "/" in name:
        yield from dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))])


def file_name(entry: zipfile.ZipInfo) -> str:
    """The intended name of an entry. Without the UTF-8 flag Python assumes CP437, but most names are UTF-8 or GBK."""
    if entry.flag_bits & 0x800 or entry.filename.isascii():
        return entry.filename
    for encoding in ("utf-8", "gb18030"):
        with suppress(UnicodeError):
            return entry.filename.encode("cp437").decode(encoding)
    return entry.filename


class Folder:
    """Pictures in a folder, by relative path."""

    def __init__(self, path):
        self.path = Path(path)

    def find(self, name: str) -> Path | None:
        folder = f"{self.path.absolute().name}/"  # rows may say images/a.jpg and --images_path images
        for spelled in spellings(name):
            for inside in (spelled, spelled.removeprefix(folder)):
                with suppress(OSError, ValueError):  # too long, or with a zero byte
                    if (self.path / inside).is_file():
                        return self.path / inside
        return None

    def has(self, name: str) -> bool:
        return self.find(name) is not None

    def open(self, name: str):
        """The path of a picture; also a path that does not exist."""
        return self.find(name) or self.path / name

    file = open  # the file that contains a picture

    def where_picture(self, name: str) -> str:
        return str(self.open(name))


class Zip:
    """Pictures in a zip, by their path in it, without the folders that all of them share. The zip is not unpacked.

    As Python objects, the index of a zip with a million files takes half a gigabyte in every worker. As arrays it takes
    tens of megabytes, which forked workers share.
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
            what = impostor(path) or f"cannot be read: {error}. Download it again"
            raise ValueError(f"--images_path {path} {what}") from None
        if any(entry.flag_bits & 1 for entry in entries):
            raise ValueError(f"--images_path {path} is encrypted: unpack it and pass the folder")
        packed = {entry.compress_type for entry in entries} - {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
        if packed:
            raise ValueError(
                f"--images_path {path} uses compression method {packed.pop()}: unpack it and pass the folder"
            )
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
                at = int(np.searchsorted(self.names, inside, side="right")) - 1  # the last entry of this name
                if at >= 0 and self.names[at] == inside:
                    return at
        return None

    def has(self, name: str) -> bool:
        return self.find(name) is not None

    def open(self, name: str) -> BytesIO:
        """The content of a picture's file. Raises ValueError if it is damaged or too large for a picture."""
        offset, size, unpacked, crc, method = self.entries[self.find(name)].tolist()
        if max(size, unpacked) > LARGEST:
            raise ValueError(f"it unpacks to {max(size, unpacked):,} bytes, the limit for a picture is {LARGEST:,}")
        with self.path.open("rb") as file:
            file.seek(offset)
            # The entry's own header: its extra field may have another length than the one in the index.
            name_length, extra_length = struct.unpack("<26xHH", file.read(30))
            file.seek(name_length + extra_length, 1)
            data = file.read(size)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(-15).decompress(data, unpacked + 1)  # one byte more reveals a wrong size
        if len(data) != unpacked or zlib.crc32(data) != crc:
            raise ValueError("its checksum is wrong, the zip is damaged")
        return BytesIO(data)

    def file(self, name: str) -> Path:
        return self.path

    def where_picture(self, name: str) -> str:
        return f"{self.path}:{name}"


def common_folder(names: list[str]) -> int:
    """Length of the folder that all paths share: 7 for ["images/a.jpg", "images/b.jpg"]."""
    if not names:
        return 0
    first, last = min(names), max(names)
    common = next((i for i, (a, b) in enumerate(zip(first, last)) if a != b), min(len(first), len(last)))
    return first.rfind("/", 0, common) + 1


def open_pictures(path) -> Folder | Zip:
    """Opens --images_path: a folder or a zip, also a zip at hf://... Raises FileNotFoundError, ValueError."""
    path = download(path, "--images_path") if is_remote(path) else path
    if Path(path).is_dir():
        return Folder(path)
    if Path(path).is_file():
        return Zip(path)
    raise FileNotFoundError(f"--images_path {path}: no such folder or zip")


def pictures_beside(path: Path) -> Folder | Zip | None:
    """Finds the pictures of rows without --images_path: sft_images or images next to sft_data.jsonl, as folder or zip;
    for metadata.csv its own folder. Returns None if there are none."""
    if path.stem == "metadata":
        return Folder(path.parent)
    stem = path.stem.removesuffix("_data").removesuffix("_vlm")
    for name in (f"{path.stem}_images", f"{stem}_images", f"{stem}_images.zip", "images", "images.zip"):
        if (path.parent / name).exists():
            return open_pictures(path.parent / name)
    return None


def is_url(name: str) -> bool:
    return name.lower().startswith(("http://", "https://"))


def fetch(url: str, folder: Path) -> Path:
    """Downloads a picture into `folder` unless it is there, and returns its path. Raises OSError or ValueError."""
    name = hashlib.sha256(url.encode()).hexdigest()
    path = folder / name[:2] / name  # not a million in one folder
    if path.is_file():
        return path
    content, deadline = bytearray(), time.monotonic() + SECONDS
    for piece in fetch_pieces(url, SECONDS):
        content += piece
        if len(content) > FETCHED or time.monotonic() > deadline:
            raise ValueError(f"the download exceeds {FETCHED >> 20} MB or {SECONDS} seconds")
    with Image.open(BytesIO(content)):  # raises if the server sent something else, such as a web page
        write_safely(path, lambda file: file.write(content))
    return path


def use_picture(source, name: str, use):
    """Returns use(the bytes of a picture's file). Any error becomes a BadRow that names the file."""
    content = b"unread"
    try:
        file = source.open(name)
        content = file.read_bytes() if isinstance(file, Path) else file.getvalue()
        return use(content)
    except Exception as error:  # each of Pillow's decoders raises its own errors
        why = "not a picture format that Pillow knows" if isinstance(error, UnidentifiedImageError) else error
        what = impostor(content) or f"cannot be read: {why}"
        raise BadRow("broken", f"{source.where_picture(name)} {what}") from None
