"""How every script starts, and how it ends where it is stopped or a package is missing: with one sentence.

Nothing here imports what is not in Python itself, so that `begin` comes before all that takes seconds to import.
"""

import atexit
import errno
import os
import shlex
import signal
import sys
from contextlib import suppress
from pathlib import Path

STEP = "MINIMIND_STEP"  # environment variable of a recipe's step, whose last words are the recipe's
PROCESS = os.getpid()
BROKEN_PIPE = 141  # the status that a shell gives to what wrote into a pipe that nobody reads any more
# Ctrl-C, kill, and a terminal that was closed or an SSH connection that was lost (Windows knows no such signal)
STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def begin() -> None:
    """Called by a script before it imports anything: from here on what stops it, and a missing package, are one
    message instead of a traceback; and where nobody reads what it prints (`| head`) it ends without a word.

    Ctrl-C leaves at once, whatever is half imported, half read or half written: all files of ours stand that, as they
    stand `kill -9`. Who has something to finish or to remove asks for an exception, see `unwind`, or sets a handler.
    """
    sys.excepthook = excepthook
    atexit.register(flush)
    ranks, first = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0") == "0"
    silent = STEP in os.environ or not first
    # SIG_DFL also ends a rank that waits for another in C++. Torchrun ends ranks by SIGTERM when one has failed, and
    # that one has said why.
    for number in STOPS:
        set_handler(number, signal.SIG_DFL if silent or (ranks > 1 and number != signal.SIGINT) else leave)


def set_handler(number, handler):
    """signal.signal, but the end of a terminal stays ignored where `nohup` made it so. Returns the handler before."""
    before = signal.getsignal(number)
    # Not so SIGINT, which a shell has ignored by what it starts with `&`: `kill -INT` is to stop a training there too.
    if number in (signal.SIGINT, signal.SIGTERM) or before != signal.SIG_IGN:
        signal.signal(number, handler)
    return before


def unwind() -> None:
    """From here on what stops the program raises KeyboardInterrupt."""
    for number in STOPS:
        set_handler(number, signal.default_int_handler)


def leave(number, frame, *more: str) -> None:
    """Handles a signal: says what to type to go on, with these flags more, and ends the program with status 130."""
    if os.getpid() == PROCESS:  # else a helper that was forked
        with suppress(RuntimeError, OSError):  # it came in the middle of a print(); or nobody reads any more
            sys.stdout.flush()
        report_stopped("stopped", *more)
    os._exit(130)


def report_stopped(what: str, *more: str) -> None:
    """The last words: once, on the first rank, and not in a step of a recipe, which has its own."""
    if STEP not in os.environ and os.environ.get("RANK", "0") == "0":
        message = f"\n{what}. To go on, type:\n  {command(*more)}"
        try:
            print(message, file=sys.stderr, flush=True)
        except (RuntimeError, OSError):  # a signal came in the middle of a print(), or nobody reads any more
            with suppress(OSError):
                os.write(2, f"{message}\n".encode())


def script() -> list[str]:
    """What was typed between `python` and the flags: train_sft_vlm.py, or -m scripts.train_llm."""
    spec = sys.modules["__main__"].__spec__
    as_module = spec is not None and spec.origin == sys.argv[0]
    return ["-m", spec.name.removesuffix(".__main__")] if as_module else [Path(sys.argv[0]).name]


def command(*more: str) -> str:
    """The command that was typed, with these flags more. --restart would remove what is there to go on with."""
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
    """What to type when a package is not there, or is another version."""
    activate = r".venv\Scripts\activate" if os.name == "nt" else ". .venv/bin/activate"
    outside = sys.prefix == sys.base_prefix and Path(".venv").is_dir()
    return f"{error}. Type: {activate if outside else 'pip install -r requirements.txt'}"


def silence_broken_pipe(error: BaseException) -> bool:
    """Whether printing failed because nobody reads any more; whatever is printed then goes nowhere."""
    if getattr(error, "errno", None) != (errno.EINVAL if os.name == "nt" else errno.EPIPE):
        return False
    for stream in (sys.stdout, sys.stderr):
        try:
            print(file=stream, flush=True)  # it may have been another pipe that broke
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return True
    return False


def flush() -> None:
    """At the end, where Python itself would complain."""
    try:
        sys.stdout.flush()
    except OSError as error:
        silence_broken_pipe(error)


def excepthook(kind, error, traceback) -> None:
    """sys.excepthook: a package that is missing, while modules are imported, is the user's to mend."""
    if silence_broken_pipe(error):
        sys.exit(BROKEN_PIPE)
    if not isinstance(error, ImportError) or os.environ.get("MINIMIND_TRACEBACK"):
        sys.__excepthook__(kind, error, traceback)
    else:
        print(f"error: {missing_package(error)}", file=sys.stderr)
        sys.exit(2)
