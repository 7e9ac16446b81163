"""Recipes: lists of commands that run one after the other, as in quickstart, make_bundle and from_photos.

Every command is shown as a user would type it, and runs as a process of its own. Everything in a recipe can be done by
hand. folder/steps.json records the steps that are done, with their time and memory; a second start skips them. This
module does not import torch, which would take seconds, and memory next to that of the steps.
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

PROCESSES = 2  # they train together on a CPU, each with its own batch of a step
MAX_THREADS = 8  # per process: with more, dividing the work of a small model takes longer than doing it
LOOKING = 0.05  # largest share of the time for measuring memory, which can take a tenth of a second each time


@dataclass
class Step:
    name: str  # "stage 1"
    description: str  # one line for the user
    command: list  # as a user would type it, beginning with "python" or "torchrun"
    resumable: bool = False  # whether it has --from_resume
    makes: Path | None = None  # if not resumable: a file or folder to delete before the step starts again

    def __post_init__(self):
        self.command = [str(part) for part in self.command]


# ---------------------------------------------------------------------------- files


def read_records(folder: Path) -> list[dict]:
    """Reads steps.json: {"name", "command", "status", "seconds", "peak_gb"} for each step that was started, in order.

    status: "begun" (running or interrupted), "done" or "failed". seconds: sum over all attempts; peak_gb: maximum.
    Raises ValueError if the file is not JSON.
    """
    path = folder / "steps.json"
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): remove it to start over") from None


def open_folder(folder: Path, restart: bool, flag: str = "--out_dir") -> None:
    """Creates the folder of a run, or accepts that of an earlier start, which `restart` empties. flag: for errors.

    Raises ValueError if the folder contains files that are not from a run.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{flag} {folder} is a file: choose another")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / "steps.json").is_file():
            raise ValueError(f"{flag} {folder} contains files that are not from a run: choose another folder")
        if restart:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


# ---------------------------------------------------------------------------- one command


def add_device_argument(parser) -> None:
    usage = "cpu: the figures in the docs were measured on it; cuda, mps, auto: one process on that device"
    parser.start.add_argument("--device", choices=["cpu", "cuda", "mps", "auto"], default="cpu", help=usage)


def resolve(device: str) -> str:
    """Returns cpu, cuda or mps. Raises ValueError if the device is not available."""
    if device == "cpu":
        return device
    from common.devices import pick_device  # imported here, as it imports PyTorch

    kind = pick_device(device).type
    print(f"--device {device}: everything is computed on {kind}")
    return kind


def launcher(device: str) -> tuple[list, list]:
    """Returns how the command of a training begins and ends, such that it makes the same steps on every machine.

    Two processes share a CPU, whatever the number of its cores; on another device one process handles the batches of
    both.
    """
    if device == "cpu":
        return ["torchrun", "--nproc_per_node", PROCESSES], ["--device", device]
    return ["python"], ["--device", device, "--accumulation_steps", PROCESSES]


def variables(command: list[str]) -> dict[str, str]:
    """Returns the environment variables that a command needs on this machine; those already set keep their values."""
    if command[0] != "torchrun":
        return {}
    needed = {"OMP_NUM_THREADS": str(max(min(physical_cores() // PROCESSES, MAX_THREADS), 1))}
    if os.name == "nt":  # PyTorch for Windows is built without libuv, which torchrun uses by default
        needed["USE_LIBUV"] = "0"
    return {name: os.environ.get(name, value) for name, value in needed.items()}


def memory(process: psutil.Process) -> int:
    """Returns the bytes that a process and its descendants use: PSS on Linux, where shared pages count once, or RSS."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            info = each.memory_full_info() if psutil.LINUX else each.memory_info()
            total += getattr(info, "pss", info.rss)
        except psutil.Error:  # it has just ended
            continue
    return total


def run(command: list[str]) -> tuple[int, bool, float, float]:
    """Runs a command. Returns its exit status, whether it was asked to stop, its seconds, and its peak memory in GB.

    Ctrl-C and a closing terminal reach the command too; it gets the time to finish its step and save.
    """
    started, peak, interrupted = time.perf_counter(), 0, False
    python = [sys.executable, *(["-m", "scripts.torchrun"] if command[0] == "torchrun" else [])]
    environment = os.environ | variables(command) | {STEP: "1"}  # this process says how to resume
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
        except psutil.Error:  # the process has ended
            pass

    def stop(number, frame):
        nonlocal interrupted
        interrupted = True
        if number == signal.SIGTERM:  # `kill` reaches only this process, so pass it on
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
    """Raises ValueError if the folder contains steps with other settings, whose results must not mix with these."""
    for step, record in zip(steps, records):
        if (record["name"], record["command"]) != (step.name, step.command):
            raise ValueError(
                f"{folder} contains a run with other settings. Its step {record['name']!r} was\n"
                f"$ {typed(record['command'])}\nbut {step.name!r} is now\n$ {typed(step.command)}\n"
                "Choose another folder to keep that run, or delete it and start over with --restart"
            )


def run_steps(steps: list[Step], folder: Path, again: str) -> list[dict]:
    """Runs the steps that are not done yet; returns the records of all steps, see `read_records`.

    again: the command that resumes after an interruption. Raises SystemExit(130) after Ctrl-C, ValueError if a step
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

        # One thread per process is torchrun's default and need not be shown.
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
            hint = ", perhaps because memory ran out" if status == -9 else ""
            raise ValueError(
                f"step {number + 1}, {step.name!r}, {how}{hint}. Its output is above; its command is\n"
                f"$ {typed(command)}\nWhen the cause is fixed, resume with\n$ {again}"
            )
        print(f"{step.name}: {duration(seconds)}, {gigabytes(peak_gb)} at most", flush=True)
    return records


# ---------------------------------------------------------------------------- a recipe as a command


def finish(result: dict, folder: Path, seconds: float, write_pages) -> list[Path]:
    """Writes report.json with the time of the whole run, and its pages; returns the paths of the pages."""
    result["wall_s"] = round(seconds, 1)
    write_json(folder / "report.json", result)
    return write_pages(folder)


def print_next(result: dict) -> None:
    print("\nWhat to try next:")
    for what, command in result["next"]:
        print(f"\n# {what}\n{typed(command)}")


def run_recipe(run, args, module: str, argv) -> dict:
    """Calls run(args, the command that resumes after an interruption); ends with a message if it raises an error."""
    flags = [flag for flag in (sys.argv[1:] if argv is None else argv) if flag != "--restart"]
    try:
        return run(args, shlex.join(["python", "-m", module, *flags]))
    except (ValueError, OSError) as error:
        raise SystemExit(f"\nerror: {reason(error)}") from None
