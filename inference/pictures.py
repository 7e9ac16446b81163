"""Finds and opens the pictures that are asked about: in a folder, from a file or from a URL."""

import re
import time
from functools import cache
from io import BytesIO
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from common.web import fetch_pieces
from model.files import impostor
from model.processing import ImageProcessor

NO_PICTURES = {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf", ".gbr", ".cur"}


@cache
def picture_suffixes() -> set[str]:
    """Returns the suffixes of files that count as pictures in a folder: all formats that Pillow opens, and HEIC."""
    Image.init()
    opened = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    return (opened - NO_PICTURES) | {".heic", ".heif"}


def pictures_in(folder: Path, pattern: str) -> tuple[list[Path], int]:
    """Returns the pictures of a folder, sorted, and the number of other files. Ignores files that macOS adds."""
    files = sorted(path for path in folder.glob(pattern) if not path.is_dir() and not path.name.startswith("._"))
    files = [path for path in files if "__MACOSX" not in path.parts]
    pictures = [path for path in files if path.suffix.lower() in picture_suffixes()]
    return pictures, len(files) - len(pictures)


# Limits for a picture from the network: bytes, seconds, and seconds without data.
LARGEST, LONGEST, SILENT = 50 * 10**6, 60, 20


def fetch_picture(url: str) -> BytesIO:
    """Downloads a picture. Raises ValueError, without the URL, if there is none or if it exceeds LARGEST or LONGEST."""
    late, data = time.monotonic() + LONGEST, BytesIO()
    for piece in fetch_pieces(url, SILENT):
        if data.tell() + len(piece) > LARGEST:
            raise ValueError(f"it is larger than {LARGEST // 10**6} MB")
        if time.monotonic() > late:
            raise ValueError(f"it takes longer than {LONGEST} s")
        data.write(piece)
    return data


def open_image(path, processor: ImageProcessor, flag: str = "--image") -> Image.Image:
    """Opens a picture from a file or a URL and reads all of it, for `processor.resize`. Raises FileNotFoundError or
    ValueError, which name `flag`."""
    address = re.match(r"(\w+)://", str(path))
    if address and address[1].lower() not in ("http", "https"):
        raise ValueError(f"{flag} {path}: a URL must begin with http:// or https://")
    if not address and not Path(path).is_file():
        raise FileNotFoundError(f"{flag} {path}: no such file")
    try:
        with processor.open(fetch_picture(path) if address else path) as image:
            image.load()
            return image
    except UnidentifiedImageError:
        reason = impostor(path) if not address else ""
        known = "Pillow does not know its format"
        if Path(path).suffix.lower() in (".heic", ".heif"):
            known = "Pillow cannot read HEIC photos: convert it to JPEG"
        reason = f"it {reason}" if reason else known
    except Exception as error:  # Pillow's decoders raise many types
        reason = error
    raise ValueError(f"{flag} {path} is not a picture that can be read: {reason}")
