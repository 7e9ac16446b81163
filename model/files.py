"""Checks files from other sources: their format and their values. Copied into exported folders."""

import json
import re
import zipfile
from pathlib import Path


def impostor(file) -> str:
    """Why a file is not the expected one, for example "is empty"; "" if nothing is wrong.

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
        return "is a web page (an error or a login?), not the file itself: download it again"
    return ""


def read_json(path) -> dict:
    """The object in a JSON file. Raises ValueError, which names the file, for anything else."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} {impostor(path) or f'is not valid JSON: {error}'}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} contains a {type(value).__name__}, expected an object {{...}}")
    return value


def check_number(path, key: str, value, least: float, most: float, kind: type = int) -> None:
    """Raises ValueError, which names file and key, unless the value is a number of this kind from least to most."""
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        what = "an integer" if kind is int else "a number"
        raise ValueError(f"{path}: {key} is {value!r}, expected {what} from {least:g} to {most:g}")


def why_unreadable(error: BaseException) -> str:
    """One line about unreadable weights, without PyTorch's advice to turn its protection off."""
    causes = [error]
    while causes[-1].__context__ is not None:  # some versions of Transformers wrap the error
        causes.append(causes[-1].__context__)
    for cause in causes:
        if match := re.search(r"GLOBAL (\S+)", str(cause)):
            return f"it would call {match[1]}, but only tensors are allowed. Do not use a file that runs code"
    reason = (str(error) or type(error).__name__).split("\n")[0]
    if "ignore_mismatched_sizes" in reason:
        return "their shapes differ from its config.json"
    if "weights_only" in reason or isinstance(error, KeyError):  # a KeyError names the number of a letter
        return "it is not a file of tensors from PyTorch, or it is damaged"
    return reason


def check_records(path: Path) -> None:
    """Raises ValueError if a file of PyTorch, which is a zip of records, is damaged: PyTorch ignores the checksums.

    Files from before PyTorch 1.6 are not a zip and have no checksums.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as records:
        size = path.stat().st_size
        for record in records.infolist():
            if record.file_size > size:  # PyTorch does not compress: a compressed record could fill the memory
                raise ValueError(f"{record.filename} in it claims to be larger than the file")
        if damaged := records.testzip():
            raise ValueError(f"{damaged} in it is damaged (wrong checksum). Download or copy the file again")
