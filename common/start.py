"""How every script starts, and how it ends if it is stopped or a package is missing: with one message.

This module imports only the standard library, so `begin` runs before any import that takes seconds.
"""

import atexit
import errno
import os
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path

STEP = "MINIMIND_STEP"  # environment variable set for a step of a recipe: the recipe prints the last message
PROCESS = os.getpid()
BROKEN_PIPE = 141  # the exit status that a shell reports for a write to a closed pipe
# Ctrl-C, kill, and a closed terminal or lost SSH connection (no such signal on Windows)
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def begin() -> None:
    """Scripts call this before they import anything else. From then on a signal or a missing package causes one
    message instead of a traceback, and a closed output pipe (`| head`) ends the script silently.

    Ctrl-C exits at once, even during an import, a read or a write. Our files survive this, as they survive `kill -9`.
    Code that must finish or remove something calls `unwind` to get an exception, or sets its own handler.
    """
    sys.excepthook = excepthook
    atexit.register(flush)
    ranks, first = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0") == "0"
    silent = STEP in os.environ or not first
    # SIG_DFL also ends a rank that waits for another one in C++. Torchrun sends SIGTERM to the others when one rank has
    # failed; that rank has already printed the error.
    for number in STOPS:
        set_handler(number, signal.SIG_DFL if silent or (ranks > 1 and number != signal.SIGINT) else leave)


def set_handler(number, handler):
    """Like signal.signal, but keeps SIGHUP ignored if `nohup` made it so. Returns the previous handler."""
    before = signal.getsignal(number)
    # SIGINT is set in any case: a shell ignores it for `command &`, and `kill -INT` should stop a training there too.
    if number in (signal.SIGINT, signal.SIGTERM) or before != signal.SIG_IGN:
        signal.signal(number, handler)
    return before


def unwind() -> None:
    """From here on, a signal that stops the program raises KeyboardInterrupt."""
    for number in STOPS:
        set_handler(number, signal.default_int_handler)


def leave(number, frame, *more: str) -> None:
    """Signal handler: prints the command to resume, with the flags `more` added, and exits with status 130."""
    if os.getpid() == PROCESS:  # not in a forked worker
        with suppress(RuntimeError, OSError):  # the signal came during a print(), or the pipe is closed
            sys.stdout.flush()
        report_stopped("stopped", *more)
    os._exit(130)


def report_stopped(what: str, *more: str) -> None:
    """Prints the last message: only on rank 0, and not in a step of a recipe, which prints its own."""
    if STEP not in os.environ and os.environ.get("RANK", "0") == "0":
        message = f"\n{what}. To resume, type:\n  {command(*more)}"
        try:
            print(message, file=sys.stderr, flush=True)
        except (RuntimeError, OSError):  # a signal came during a print(), or the pipe is closed
            with suppress(OSError):
                os.write(2, f"{message}\n".encode())


def script() -> list[str]:
    """The part of the command between `python` and the flags: train_sft_vlm.py, or -m scripts.train_llm."""
    spec = sys.modules["__main__"].__spec__
    as_module = spec is not None and spec.origin == sys.argv[0]
    return ["-m", spec.name.removesuffix(".__main__")] if as_module else [Path(sys.argv[0]).name]


def command(*more: str) -> str:
    """The command that was typed, with the flags `more` added. Drops --restart, which would remove the saved state."""
    typed, dropped = sys.argv[1:], ("--restart", *more)
    flags = [  # without --from_resume, --from_resume 1 and --from_resume=1
        flag
        for before, flag in zip(["", *typed], typed)
        if flag.partition("=")[0] not in dropped and (before not in dropped or flag.startswith("-"))
    ]
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
    launcher = "python"
    if ranks > here:  # on each machine, with the same --master_addr or --rdzv_endpoint as before
        launcher = f"torchrun --nnodes {ranks // here} --nproc_per_node {here} --master_addr ..."
    elif ranks > 1:
        launcher = f"torchrun --nproc_per_node {here}"
    return f"{launcher} {shlex.join([*script(), *flags, *more])}"


def missing_package(error: ImportError) -> str:
    """An error message for a missing package or a wrong version, with what to type."""
    activate = r".venv\Scripts\activate" if os.name == "nt" else ". .venv/bin/activate"
    outside = sys.prefix == sys.base_prefix and Path(".venv").is_dir()
    return f"{error}. Type: {activate if outside else 'pip install -r requirements.txt'}"


def silence_broken_pipe(error: BaseException) -> bool:
    """Whether printing failed because the pipe is closed; if so, discards all further output."""
    if getattr(error, "errno", None) != (errno.EINVAL if os.name == "nt" else errno.EPIPE):
        return False
    for stream in (sys.stdout, sys.stderr):
        try:
            print(file=stream, flush=True)  # maybe another pipe broke
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return True
    return False


def flush() -> None:
    """Flushes at exit, where Python would complain about a closed pipe."""
    try:
        sys.stdout.flush()
    except OSError as error:
        silence_broken_pipe(error)


def excepthook(kind, error, traceback) -> None:
    """sys.excepthook: reports a failed import as one message, because the user can fix it."""
    if silence_broken_pipe(error):
        sys.exit(BROKEN_PIPE)
    if not isinstance(error, ImportError) or os.environ.get("MINIMIND_TRACEBACK"):
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        sys.exit(2)
