"""One process at a time writes a file: who comes second gets an error, before anything is mixed up."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil


def holder(lock: Path) -> int | None:
    """The process that holds a lock; None if it has ended, however it did, or there is no lock."""
    try:
        record = json.loads(lock.read_text(encoding="utf-8"))
        pid, started = int(record["pid"]), float(record["started"])
    except (OSError, ValueError, KeyError, TypeError):  # none, or half written by a process that was killed
        return None
    if record.get("machine") != socket.gethostname():
        return pid  # which nobody here can ask; removing the file is for the user to decide
    with contextlib.suppress(psutil.Error):  # its number may by now be another's, who started later
        return pid if abs(psutil.Process(pid).create_time() - started) < 1 else None
    return None


@contextlib.contextmanager
def only_one(path, flag: str) -> Iterator[None]:
    """Holds .NAME.lock beside `path`, a file or a folder, which this process is going to write.

    Raises ValueError, which names `flag` and the process, while another one that is alive holds it. Processes that
    begin at the very same moment may both get it.
    """
    path, this = Path(path), psutil.Process()
    lock = path.absolute().with_name(f".{path.absolute().name}.lock")
    if (pid := holder(lock)) not in (None, this.pid):
        raise ValueError(
            f"{flag}: process {pid} is writing {path}. Wait for it or stop it, or choose\n"
            f"another {flag}. If there is no such process: remove {lock}"
        )
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps({"pid": this.pid, "started": this.create_time(), "machine": socket.gethostname()}))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if holder(lock) == os.getpid():
                lock.unlink()
