"""Writes files atomically: to a temporary file in the same folder, flushed, then renamed. Does not import PyTorch."""

import glob
import json
import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

from common.cli import FULL, UNTOUCHED, disk_full


def write_safely(path, write) -> None:
    """Calls write(temporary binary file), then renames the file to `path`, so `path` is complete at any moment.

    Creates the folder if needed. Raises OSError if writing fails; an existing file is then unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # left behind, for example by `kill -9`
        pid = old.name.split(".")[-2]
        with suppress(OSError):  # another process removed it first
            age = time.time() - old.stat().st_mtime  # a newer one may belong to another machine
            if age > 60 and pid.isdigit() and not psutil.pid_exists(int(pid)):
                old.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise OSError(f"could not write {path} ({FULL if disk_full(error) else error}); {UNTOUCHED}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text: str) -> None:
    write_safely(path, lambda file: file.write(text.encode()))


def write_json(path, value: dict | list) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
