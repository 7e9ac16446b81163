"""Kills, flipped bits and full disks: parts of `scripts.benchmark_faults`, and what all parts share."""

import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dataset.scenes import write_world
from model.weights import check_values, read_weights

LIMIT = 600  # seconds for a command of a few; longer is a fault
KILLED = -9  # exit status after `kill -9`
TINY = ["--tokenizer_path", "model/tiny", "--vision_model_path", "model/tiny/clip"]
WEIGHTS, RESUME = FILES = "sft_vlm_128.pth", "sft_vlm_128.resume.pt"


@dataclass
class Bench:
    """What all parts share."""

    args: object
    work: Path  # removed at the end
    rng: random.Random
    seconds: float = 0  # of the training that nothing disturbed, in work/base
    faults: list[str] = field(default_factory=list)

    def fault(self, what: str) -> None:
        self.faults.append(what)
        print(f"FAULT: {what}", flush=True)

    @property
    def base(self) -> Path:
        return self.work / "base"


def python(*parts) -> list[str]:
    return [sys.executable, *map(str, parts)]


def training(bench: Bench, out: Path) -> list[str]:
    """The command of a small training that saves after every step. Started again, it goes on."""
    rows = ["--data_path", bench.base / "data/train.jsonl", "--from_weight", "model/tiny/llm_128.pth", *TINY]
    flags = ["--out_dir", out, "--device", "cpu", "--num_workers", 0, "--batch_size", 8, "--save_interval", 1]
    return python("train_sft_vlm.py", *rows, *flags, "--from_resume")


def run(command: list) -> tuple[int, str]:
    """Exit status and output."""
    out, both = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(list(map(str, command)), stdout=out, stderr=both, timeout=LIMIT)
    return done.returncode, done.stdout.decode(errors="replace")


def prepare(bench: Bench) -> None:
    write_world(bench.base / "data", scenes=bench.args.scenes, val_scenes=16, seed=bench.args.seed)
    started = time.perf_counter()
    status, output = run(training(bench, bench.base))
    bench.seconds = time.perf_counter() - started
    if status:
        raise ValueError(f"a training that nothing disturbed ended with status {status}:\n{output[-2000:]}")


def same(a, b) -> bool:
    """Are two nested values equal, tensors bit for bit?"""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# ---------------------------------------------------------------------------- kills


def run_and_kill(bench: Bench, out: Path) -> tuple[int, str]:
    """A training that is killed: mostly a while after its first save, else before. Exit status and output."""

    def saved():
        return (out / RESUME).stat().st_mtime_ns if (out / RESUME).is_file() else None

    before, early, log = saved(), bench.rng.random() < 0.2, out / "log"
    with log.open("w") as file, subprocess.Popen(training(bench, out), stdout=file, stderr=file) as process:
        while not early and saved() == before and process.poll() is None:
            time.sleep(0.01)
        with suppress(subprocess.TimeoutExpired):
            process.wait(bench.rng.uniform(0, bench.seconds / (1 if early else 4)))
        process.kill()
    return process.returncode, log.read_text(errors="replace")


def kills(bench: Bench) -> tuple[str, str]:
    """`kill -9` at any moment of a run and of those that go on with it: what comes out is that of one without."""
    wanted, count = [read_weights(bench.base / name) for name in FILES], Counter()
    while count["killed"] < bench.args.kills:
        out, status = bench.work / f"killed_{count['runs']}", KILLED
        out.mkdir()
        while status == KILLED and count["killed"] < bench.args.kills:
            halves = set(out.glob(".*.tmp"))
            status, output = run_and_kill(bench, out)
            count["killed"] += status == KILLED
            count["in_saves"] += bool(set(out.glob(".*.tmp")) - halves)
        if status == KILLED:
            status, output = run(training(bench, out))
        exact = not status and same(wanted, [read_weights(out / name) for name in FILES])
        if status:
            bench.fault(f"kills: a run that goes on ended with status {status}: {output[-1000:]}")
        elif not exact:
            bench.fault("kills: other weights or optimizer than those of the run that nothing disturbed")
        if locks := list(out.glob(".*.lock")):
            bench.fault(f"kills: {locks[0].name} is left after the end")
        count["runs"] += 1
        count["exact"] += exact
        count["left"] += len(list(out.glob(".*.tmp")))
        shutil.rmtree(out)
    result = f"{count['exact']} of {count['runs']} trainings ended bit for bit as undisturbed, optimizer too"
    tried = f"{count['killed']} × `kill -9`, {count['in_saves']} in a save"
    return tried, f"{result}; {count['left']} .tmp younger than a minute left"


# ---------------------------------------------------------------------------- flips


def flips(bench: Bench) -> tuple[str, str]:
    """A bit of a file of weights, or of a checkpoint, is the other one: refused by name, or no value differs."""
    wanted, count = {name: read_weights(bench.base / name) for name in FILES}, Counter()
    for i in range(bench.args.flips):
        name = FILES[i % 2]
        path, content = bench.work / name, bytearray((bench.base / name).read_bytes())
        at = bench.rng.randrange(8 * len(content))
        content[at // 8] ^= 1 << at % 8
        path.write_bytes(content)
        try:
            state = read_weights(path)
            check_values(state["weights"] if name == RESUME else state, path)
        except ValueError as error:
            count["refused"] += 1
            if str(path) not in str(error):
                bench.fault(f"flips: bit {at} of {name}: the message names no file: {error}")
        except Exception as error:
            bench.fault(f"flips: bit {at} of {name}: {error!r}")
        else:
            count["harmless"] += 1
            if not same(state, wanted[name]):
                bench.fault(f"flips: bit {at} of {name}: other values were loaded")
    return f"{bench.args.flips} files with a flipped bit", f"{count['refused']} refused, {count['harmless']} the same"


# ---------------------------------------------------------------------------- full disks

ON_SMALL_DISK = """
mount -t tmpfs -o size="$1" none "$2" && cp -a "$3/." "$2" || exit 99
disk="$2"; after="$4"; shift 4
"$@"; status=$?
cp -a "$disk/." "$after"; exit $status
"""


def disk(bench: Bench) -> tuple[str, str]:
    """The disk is full while something is written: it is called so, and the files that stood there are the same.

    The disk is a tmpfs in a mount namespace of its own, for which Linux asks for no rights on most machines.
    """
    small, before = bench.work / "small", bench.work / "before"
    small.mkdir()
    before.mkdir()
    if not shutil.which("unshare") or run(["unshare", "-Urm", "mount", "-t", "tmpfs", "none", small])[0]:
        return "not tried", "a small disk needs `unshare -Urm mount`, which is not allowed here"
    with subprocess.Popen(training(bench, before), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not (before / WEIGHTS).is_file() and process.poll() is None:
            time.sleep(0.05)
        process.terminate()  # it finishes its step and saves
    cases = writers(bench, small, before / WEIGHTS)
    full = sum(run_on_full_disk(bench, what, *case, small, before) for what, case in cases.items())
    return f"{len(cases)} disks that fill up: {', '.join(cases)}", f"{full} called full, nothing on them changed"


def writers(bench: Bench, small: Path, weights: Path) -> dict[str, tuple[float, list]]:
    """{what is written: (MB left on the disk, command)}"""
    text, pictures, cache = bench.base / "data/train.jsonl", bench.base / "data/images", f"HF_DATASETS_CACHE={small}"
    model = ["--weights", weights, *TINY]
    captions = ["--captions", small / "captions.jsonl", "--image_dir", pictures, "--max_new_tokens", 4]
    cases = {
        "a checkpoint": (5, training(bench, small)),
        "the cache of rows": (0.01, ["env", cache, *training(bench, bench.work / "other")]),
        "drawn data": (0.2, python("-m", "dataset.scenes", "--scenes", 400, "--out_dir", small)),
        "a tokenizer": (0.01, python("-m", "scripts.train_tokenizer", "--data_path", text, "--out_dir", small)),
        "captions": (0, python("eval_vlm.py", *model, *captions, "--device", "cpu")),
    }
    for to in ("llava", "transformers", "pth"):
        cases[f"a {to} export"] = (1, python("-m", "scripts.convert_vlm", "--to", to, *model, "--output", small / to))
    return cases


def run_on_full_disk(bench: Bench, what: str, room: float, command: list, small: Path, before: Path) -> bool:
    """Is the disk called full? It holds the files of `before`, and `room` MB more."""
    after = bench.work / f"after {what}"
    after.mkdir()
    pages = sum(-(-path.stat().st_size // 4096) for path in before.iterdir() if path.is_file())
    size = 4096 * (pages + int(room * 1e6 / 4096))
    status, output = run(["unshare", "-Urm", "sh", "-c", ON_SMALL_DISK, "sh", size, small, before, after, *command])
    case = f"disk: {what}, with status {status}: {output[-1000:]}"
    full = bool(status) and "the disk is full" in output and "nothing was overwritten" in output
    if not full:
        bench.fault(f"it is not called full, or nothing is said of what stood there: {case}")
    for path in before.iterdir():
        if ".metrics." not in path.name and path.read_bytes() != (after / path.name).read_bytes():
            bench.fault(f"{path.name} is another: {case}")
    return full
