"""Files that others made: what they are, and whether their values can be. Shipped with exported folders."""

import json
import re
import zipfile
from pathlib import Path


def impostor(file) -> str:
    """What is there in place of the file that was to be read, "is empty" and the like; "" where nothing strikes.

    file: its path, or its content as bytes.
    """
    if not isinstance(file, bytes):
        with Path(file).open("rb") as opened:
            file = opened.read(200)
    if len(file) < 200 and not file.strip():
        return "is empty"
    if file.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself; type: git lfs pull"
    if re.match(rb"\s*<(!doctype\s+html|html|head)\b", file, re.I):
        return "is a web page, as of an error or a login, not the file itself: fetch it again"
    return ""


def read_json(path) -> dict:
    """The object in a JSON file; ValueError names the file if it is not one."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} {impostor(path) or f'is not valid JSON: {error}'}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected an object {{...}}")
    return value


def check_number(path, key: str, value, least: float, most: float, kind: type = int) -> None:
    """ValueError names a file, and a key in it whose value is no number of this kind between these two."""
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        what = "an integer" if kind is int else "a number"
        raise ValueError(f"{path}: {key} is {value!r}, expected {what} from {least:g} to {most:g}")


def why_unreadable(error: BaseException) -> str:
    """A line about weights that could not be read, without PyTorch's advice to switch its protection off."""
    causes = [error]
    while causes[-1].__context__ is not None:  # some versions of Transformers raise an error of their own on top
        causes.append(causes[-1].__context__)
    for cause in causes:
        if match := re.search(r"GLOBAL (\S+)", str(cause)):
            return f"it would call {match[1]}, where only tensors are read. Do not use a file that runs code"
    reason = (str(error) or type(error).__name__).split("\n")[0]
    if "ignore_mismatched_sizes" in reason:
        return "they have other shapes than its config.json says"
    return "it is no file of tensors that PyTorch wrote, or a damaged one" if "weights_only" in reason else reason


def check_records(path: Path) -> None:
    """ValueError if a file of PyTorch, a zip of records, is damaged: PyTorch itself ignores the checksums in it.

    Files from before PyTorch 1.6 are no zip, and have none.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as records:
        size = path.stat().st_size
        for record in records.infolist():
            if record.file_size > size:  # PyTorch does not compress: whoever did wants to fill the memory
                raise ValueError(f"{record.filename} in it says to be larger than the file")
        if damaged := records.testzip():
            raise ValueError(f"{damaged} in it is damaged, its checksum is another. Fetch or copy the file again")
