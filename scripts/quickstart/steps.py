"""Recipes as a list of commands, one after the other: what quickstart, make_bundle and from_photos share.

Every command is shown as a user would type it and then run as a process of its own, so there is nothing in a recipe
that could not be done by hand. What is done stands in folder/steps.json, with the time and memory it took: a second
start skips it. No torch here: importing it would take seconds, and memory beside that of the steps.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from common.cli import reason
from common.display import duration, gigabytes, typed
from common.files import write_json
from common.machine import physical_cores
from common.start import BROKEN_PIPE, STEP, STOPS, set_handler

PROCESSES = 2  # that train together on a CPU, each with its own batch of a step
MAX_THREADS = 8  # of each: a large machine should not spend its time on dividing the work of a small model
LOOKING = 0.05  # of the time goes at most to looks at the memory, each of which can take a tenth of a second


@dataclass
class Step:
    name: str  # "stage 1"
    description: str  # a line for the user
    command: list  # as it would be typed, beginning with "python" or "torchrun"
    resumable: bool = False  # does it know --from_resume?
    makes: Path | None = None  # if not resumable: a file or folder that must be gone before it can begin again

    def __post_init__(self):
        self.command = [str(part) for part in self.command]


# ---------------------------------------------------------------------------- files


def read_records(folder: Path) -> list[dict]:
    """steps.json: {"name", "command", "status", "seconds", "peak_gb"} for each step that was begun, in order.

    status: "begun" (it runs, or was interrupted), "done" or "failed". seconds: of all attempts; peak_gb: of the worst.
    """
    path = folder / "steps.json"
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): remove it to begin anew") from None


def open_folder(folder: Path, restart: bool, flag: str = "--out_dir") -> None:
    """Makes the folder of a run, or finds one of an earlier start, which `restart` removes. flag: what names it.

    Raises ValueError if there are files of somebody else in it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} {folder} is a file: choose another")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "steps.json").is_file():
            raise ValueError(f"{flag} {folder} holds other files, which would get mixed up: choose another folder")
        if restart:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------------------- one command


def add_device_argument(parser) -> None:
    usage = "cpu, with which all figures were measured; cuda, mps, auto: one process on that device"
    parser.start.add_argument("--device", choices=["cpu", "cuda", "mps", "auto"], default="cpu", help=usage)


def resolve(device: str) -> str:
    """cpu, cuda or mps. Raises ValueError if it is not there."""
    if device == "cpu":
        return device
    from common.devices import pick_device  # only now, as it imports PyTorch

    kind = pick_device(device).type
    print(f"--device {device}: everything is computed on {kind}")
    return kind


def launcher(device: str) -> tuple[list, list]:
    """How the command of a training begins and ends, so that it makes the same steps on every machine.

    Two processes share a CPU, whatever the number of its cores; on another device one takes the batches of both.
    """
    if device == "cpu":
        return ["torchrun", "--nproc_per_node", PROCESSES], ["--device", device]
    return ["python"], ["--device", device, "--accumulation_steps", PROCESSES]


def variables(command: list[str]) -> dict[str, str]:
    """Environment variables that a command needs here; those that are set already stay as they are."""
    if command[0] != "torchrun":
        return {}
    needed = {"OMP_NUM_THREADS": str(max(min(physical_cores() // PROCESSES, MAX_THREADS), 1))}
    if os.name == "nt":  # PyTorch for Windows is built without libuv, which torchrun wants by default
        needed["USE_LIBUV"] = "0"
    return {name: os.environ.get(name, value) for name, value in needed.items()}


def memory(process: psutil.Process) -> int:
    """Bytes that a process and all below it take: PSS on Linux, where pages that they share count once, else RSS."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            info = each.memory_full_info() if psutil.LINUX else each.memory_info()
            total += getattr(info, "pss", info.rss)
        except psutil.Error:  # it has just ended
            continue
    return total


def run(command: list[str]) -> tuple[int, bool, float, float]:
    """Runs a command. Returns its exit status, whether it was to stop meanwhile, its seconds, its peak in GB.

    Ctrl-C, and the end of a terminal, reach the command too, which is given the time to finish and save.
    """
    started, peak, interrupted = time.perf_counter(), 0, False
    python = [sys.executable, *(["-m", "scripts.torchrun"] if command[0] == "torchrun" else [])]
    environment = os.environ | variables(command) | {STEP: "1"}  # how to go on is for us to say
    process = subprocess.Popen([*python, *command[1:]], env=environment)
    ended = threading.Event()

    def watch():
        nonlocal peak
        try:
            watched = psutil.Process(process.pid)
            while not ended.is_set():
                before = time.perf_counter()
                peak = max(peak, memory(watched))
                ended.wait(max(0.25, (time.perf_counter() - before) / LOOKING))
        except psutil.Error:  # it has ended before us
            pass

    def stop(number, frame):
        nonlocal interrupted
        interrupted = True
        if number == signal.SIGTERM:  # `kill` reaches this process alone, so it is passed on
            process.terminate()

    before = {number: set_handler(number, stop) for number in STOPS}
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        process.wait()
    finally:
        for number, handler in before.items():
            set_handler(number, handler)
        ended.set()
        watcher.join()
    return process.returncode, interrupted, time.perf_counter() - started, peak / 1e9


# ---------------------------------------------------------------------------- all of them


def check_same(steps: list[Step], records: list[dict], folder: Path) -> None:
    """ValueError if the folder holds steps with other settings, whose results would get mixed up with these."""
    for step, record in zip(steps, records):
        if (record["name"], record["command"]) != (step.name, step.command):
            raise ValueError(
                f"{folder} holds a run with other settings. Its step {record['name']!r} was\n"
                f"$ {typed(record['command'])}\nand {step.name!r} would now be\n$ {typed(step.command)}\n"
                "Keep it and choose another folder, or remove it and begin anew with --restart"
            )


def run_steps(steps: list[Step], folder: Path, again: str) -> list[dict]:
    """Runs what is not done yet; returns the records of all steps, see `read_records`.

    again: the command that goes on after an interruption. Raises SystemExit(130) after Ctrl-C, ValueError when a step
    fails or an earlier start had other settings.
    """
    records = read_records(folder)
    check_same(steps, records, folder)
    for number, step in enumerate(steps):
        title = f"[{number + 1}/{len(steps)}] {step.name}: "
        if number == len(records):
            records.append({"name": step.name, "command": step.command, "status": "new", "seconds": 0, "peak_gb": 0})
        record = records[number]
        gone = step.makes is not None and not step.makes.exists()  # moved or removed since
        if record["status"] == "done" and not gone:
            print(f"{title}done already, {duration(record['seconds'])}")
            continue
        command = step.command
        if record["status"] != "new" and step.resumable:
            command = [*command, "--from_resume"]
        elif record["status"] != "new" and step.makes is not None:
            shutil.rmtree(step.makes) if step.makes.is_dir() else step.makes.unlink(missing_ok=True)
        record["status"] = "begun"
        write_json(folder / "steps.json", records)

        # One thread each is what torchrun takes anyway: not worth a word.
        needed = [f"{name}={value}" for name, value in variables(command).items() if value != "1"]
        print(f"\n{title}{step.description}\n$ {typed([*needed, *command])}", flush=True)
        status, interrupted, seconds, peak_gb = run(command)
        interrupted = interrupted or status in (130, -signal.SIGINT, BROKEN_PIPE)
        record["seconds"] = round(record["seconds"] + seconds, 2)
        record["peak_gb"] = round(max(record["peak_gb"], peak_gb), 3)
        record["status"] = "done" if status == 0 else "begun" if interrupted else "failed"
        write_json(folder / "steps.json", records)
        if interrupted:
            print(f"\nstopped. To resume, type:\n  {again}", file=sys.stderr, flush=True)
            raise SystemExit(130)
        if status:
            how = f"ended with status {status}" if status > 0 else f"was killed by {signal.Signals(-status).name}"
            hint = ", perhaps for want of memory" if status == -9 else ""
            raise ValueError(
                f"step {number + 1}, {step.name!r}, {how}{hint}. What it said stands above; its command is\n"
                f"$ {typed(command)}\nWhen it is mended, go on with\n$ {again}"
            )
        print(f"{step.name}: {duration(seconds)}, {gigabytes(peak_gb)} at most", flush=True)
    return records


# ---------------------------------------------------------------------------- a recipe as a command


def finish(result: dict, folder: Path, seconds: float, write_pages) -> list[Path]:
    """Writes report.json with the time of the whole run, and the pages made of it, whose paths it returns."""
    result["wall_s"] = round(seconds, 1)
    write_json(folder / "report.json", result)
    return write_pages(folder)


def print_next(result: dict) -> None:
    print("\nWhat to try next:")
    for what, command in result["next"]:
        print(f"\n# {what}\n{typed(command)}")


def run_recipe(run, args, module: str, argv) -> dict:
    """run(args, the command that goes on after an interruption); an error it raises ends in a sentence."""
    flags = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--restart"]
    try:
        return run(args, shlex.join(["python", "-m", module, *flags]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"\nerror: {reason(error)}") from None
