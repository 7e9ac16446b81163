"""Locks: only one process at a time writes a file. A second one gets an error before it writes anything."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil


def holder(lock: Path) -> int | None:
    """The id of the process that holds a lock; None if the process has ended or there is no lock."""
    try:
        record = json.loads(lock.read_text(encoding="utf-8"))
        pid, started = int(record["pid"]), float(record["started"])
    except (OSError, ValueError, KeyError, TypeError):  # no lock, or incomplete because its writer was killed
        return None
    if record.get("machine") != socket.gethostname():
        return pid  # cannot be checked from this machine; the user decides whether to remove the file
    with contextlib.suppress(psutil.Error):  # the id may belong to another process by now, with a later start
        return pid if abs(psutil.Process(pid).create_time() - started) < 1 else None
    return None


@contextlib.contextmanager
def only_one(path, flag: str) -> Iterator[None]:
    """Holds .NAME.lock next to `path`, a file or folder that this process is going to write.

    Raises ValueError, which names `flag` and the process, if another running process holds the lock. Two processes
    that start at the same moment may both get it.
    """
    path, this = Path(path), psutil.Process()
    lock = path.absolute().with_name(f".{path.absolute().name}.lock")
    if (pid := holder(lock)) not in (None, this.pid):
        raise ValueError(
            f"{flag}: process {pid} is writing {path}. Wait for it, stop it or choose\n"
            f"another {flag}. If there is no such process, remove {lock}"
        )
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps({"pid": this.pid, "started": this.create_time(), "machine": socket.gethostname()}))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if holder(lock) == os.getpid():
                lock.unlink()
