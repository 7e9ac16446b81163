"""Is anything lost, or wrong without a word? Kills, flipped bits, full disks, malformed rows, many visitors at once.

    python -m scripts.benchmark_faults                                  # all of it on a CPU; half an hour
    python -m scripts.benchmark_faults --only rows --rows 20000
    python -m scripts.benchmark_faults --only web --out_dir out/quickstart

Everything is made in a temporary folder, from drawn scenes and model/tiny, and the page is asked on this machine alone.
A table tells what was tried; a fault is printed as it is found, and any ends the program with status 1.
"""

if __spec__ is None:  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.benchmark_faults instead of scripts/benchmark_faults.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from common.cli import Parser, not_negative, positive, run_main
from common.display import duration
from common.start import unwind
from dataset.scenes import write_world
from model.processing import IMAGE_TAG, load_tokenizer
from model.weights import check_values, read_weights
from scripts.quickstart.steps import memory

LIMIT = 600  # seconds for a command of a few; longer is a fault
KILLED = -9  # exit status after `kill -9`
TINY = ["--tokenizer_path", "model/tiny", "--vision_model_path", "model/tiny/clip"]
WEIGHTS, RESUME = "sft_vlm_128.pth", "sft_vlm_128.resume.pt"


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
    """Exit status and what was said."""
    out, both = subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(list(map(str, command)), stdout=out, stderr=both, timeout=LIMIT)
    return done.returncode, done.stdout.decode(errors="replace")


def prepare(bench: Bench) -> None:
    write_world(bench.base / "data", scenes=bench.args.scenes, val_scenes=16, seed=bench.args.seed)
    started = time.perf_counter()
    status, said = run(training(bench, bench.base))
    bench.seconds = time.perf_counter() - started
    if status:
        raise ValueError(f"a training that nothing disturbed ended with status {status}:\n{said[-2000:]}")


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
    """A training that is killed: mostly a while after its first save, else before. Exit status, and what was said."""

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
    wanted = [read_weights(bench.base / name) for name in (WEIGHTS, RESUME)]
    killed = runs = in_saves = exact = left = 0
    while killed < bench.args.kills:
        out, runs, status = bench.work / f"killed_{runs}", runs + 1, KILLED
        out.mkdir()
        while status == KILLED and killed < bench.args.kills:
            halves = set(out.glob(".*.tmp"))
            status, said = run_and_kill(bench, out)
            killed += status == KILLED
            in_saves += bool(set(out.glob(".*.tmp")) - halves)
        if status == KILLED:
            status, said = run(training(bench, out))
        if status:
            bench.fault(f"kills: a run that goes on ended with status {status}: {said[-1000:]}")
        elif not same(wanted, [read_weights(out / name) for name in (WEIGHTS, RESUME)]):
            bench.fault("kills: other weights or optimizer than those of the run that nothing disturbed")
        else:
            exact += 1
        if locks := list(out.glob(".*.lock")):
            bench.fault(f"kills: {locks[0].name} is left after the end")
        left += len(list(out.glob(".*.tmp")))
        shutil.rmtree(out)
    found = f"{exact} of {runs} trainings ended bit for bit as undisturbed, optimizer too"
    return f"{killed} × `kill -9`, {in_saves} in a save", f"{found}; {left} .tmp younger than a minute left"


# ---------------------------------------------------------------------------- flips


def flips(bench: Bench) -> tuple[str, str]:
    """A bit of a file of weights, or of a checkpoint, is the other one: refused by name, or no value differs."""
    wanted = {name: read_weights(bench.base / name) for name in (WEIGHTS, RESUME)}
    found = Counter()
    for i in range(bench.args.flips):
        name = (WEIGHTS, RESUME)[i % 2]
        path, content = bench.work / name, bytearray((bench.base / name).read_bytes())
        at = bench.rng.randrange(8 * len(content))
        content[at // 8] ^= 1 << at % 8
        path.write_bytes(content)
        try:
            state = read_weights(path)
            check_values(state["weights"] if name == RESUME else state, path)
        except ValueError as error:
            found["refused"] += 1
            if str(path) not in str(error):
                bench.fault(f"flips: bit {at} of {name}: the message names no file: {error}")
        except Exception as error:
            bench.fault(f"flips: bit {at} of {name}: {error!r}")
        else:
            found["harmless"] += 1
            if not same(state, wanted[name]):
                bench.fault(f"flips: bit {at} of {name}: other values were loaded")
    return f"{bench.args.flips} files with a flipped bit", f"{found['refused']} refused, {found['harmless']} the same"


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
    text, pictures, cache = bench.base / "data/train.jsonl", bench.base / "data/images", f"HF_DATASETS_CACHE={small}"
    weights = ["--weights", before / WEIGHTS, *TINY]
    captions = ["--captions", small / "captions.jsonl", "--image_dir", pictures, "--max_new_tokens", 4]
    cases = {  # what: (MB left on the disk, command)
        "a checkpoint": (5, training(bench, small)),
        "the cache of rows": (0.01, ["env", cache, *training(bench, bench.work / "other")]),
        "drawn data": (0.2, python("-m", "dataset.scenes", "--scenes", 400, "--out_dir", small)),
        "a tokenizer": (0.01, python("-m", "scripts.train_tokenizer", "--data_path", text, "--out_dir", small)),
        "captions": (0, python("eval_vlm.py", *weights, *captions, "--device", "cpu")),
    }
    for to in ("llava", "transformers", "pth"):
        cases[f"a {to} export"] = (1, python("-m", "scripts.convert_vlm", "--to", to, *weights, "--output", small / to))
    called = 0
    for what, (room, command) in cases.items():
        after = bench.work / f"after {what}"
        after.mkdir()
        pages = sum(-(-path.stat().st_size // 4096) for path in before.iterdir() if path.is_file())
        size = 4096 * (pages + int(room * 1e6 / 4096))
        on_disk = ["unshare", "-Urm", "sh", "-c", ON_SMALL_DISK, "sh", size, small, before, after, *command]
        status, said = run(on_disk)
        about = f"disk: {what}, with status {status}: {said[-1000:]}"
        if status and "the disk is full" in said and "what stood there is untouched" in said:
            called += 1
        else:
            bench.fault(f"it is not called full, or nothing is said of what stood there: {about}")
        for path in before.iterdir():
            if ".metrics." not in path.name and path.read_bytes() != (after / path.name).read_bytes():
                bench.fault(f"{path.name} is another: {about}")
    return f"{len(cases)} disks that fill up: {', '.join(cases)}", f"{called} called full, nothing on them changed"


# ---------------------------------------------------------------------------- rows

VALUES = json.loads(r'[null, true, 3, -1.5, NaN, 1e999, "", "\ud800", "\u0000\u001b[2J", [], ["a"], {}, {"a": 1}]')
VALUES += [10**400, "x" * 100_000]
TEXTS = [
    IMAGE_TAG,
    IMAGE_TAG * 9,
    "@" * 9,
    "@" * 500,
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "\u2028",
    "\r",
    "\ufdd0",
]


def flip(content: bytes, rng) -> bytes:
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 30)) if content else 0):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


def mutate(row: dict, others: list[Path], pictures: Path, number: int, rng) -> bytes:
    """A line of JSONL in which one thing is wrong, or unusual. A damaged picture is written to `pictures`."""
    row = json.loads(json.dumps(row))
    turns = row["conversations"]
    place = rng.choice([row, *turns])  # of what is mutated
    key = rng.choice(list(place))
    kind = rng.choice(("bytes", "cut", "drop", "rename", "type", "turns", "text", "picture", "picture"))
    if kind == "drop":
        del place[key]
    elif kind == "rename":
        place[rng.choice((key.upper(), key + "s", "img", "from", ""))] = place.pop(key)
    elif kind == "type":
        place[key] = rng.choice(VALUES)
    elif kind == "turns":
        rng.shuffle(turns)
        row["conversations"] = rng.choices(turns, k=rng.randrange(6))
    elif kind == "text":
        turn = rng.choice(turns)
        at = rng.randrange(len(turn["content"]) + 1)
        turn["content"] = turn["content"][:at] + rng.choice(TEXTS) + turn["content"][at:]
    elif kind == "picture" and row.get("image"):
        name = f"damaged_{number}.jpg"
        content = (pictures / row["image"].split(",")[0]).read_bytes()
        cut = content[: rng.randrange(len(content))]
        content = rng.choice((flip(content, rng), cut, cut + flip(content, rng), rng.choice(others).read_bytes()))
        (pictures / name).write_bytes(content)
        row["image"] = name
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    return flip(line, rng) if kind == "bytes" else line[: rng.randrange(len(line))] if kind == "cut" else line


def rows(bench: Bench) -> tuple[str, str]:
    """Rows and pictures in which something is wrong are refused by file and line, or make an example."""
    from dataset.lm_dataset import VLMDataset  # only now: its cache is to be in the temporary folder
    from inference.chat import UserError, open_picture
    from model.processing import ImageProcessor

    pictures = bench.work / "pictures"
    shutil.copytree(bench.base / "data/images", pictures)
    good = [json.loads(line) for line in (bench.base / "data/train.jsonl").open(encoding="utf-8")]
    others = [path for path in [*bench.base.iterdir(), *Path("model/tiny").iterdir()] if path.is_file()]
    processor = ImageProcessor.from_pretrained("model/tiny/clip")
    placeholders = "@" * 9
    tokenizer = load_tokenizer("model/tiny", placeholders)
    found = Counter()
    for start in range(0, bench.args.rows, 500):
        path = bench.work / f"rows_{start}.jsonl"
        numbers = range(start, min(start + 500, bench.args.rows))
        lines = [mutate(bench.rng.choice(good), others, pictures, number, bench.rng) for number in numbers]
        path.write_bytes(b"\n".join([*lines, json.dumps(good[0]).encode()]))
        try:
            data = VLMDataset(path, pictures, tokenizer, processor, 640, placeholders, on_bad_row="skip")
            messages = [message for kind in data.bad.values() for message in kind]
            examples = [data[row] for row in range(len(data))]
        except Exception as error:
            bench.fault(f"rows: rows from number {start} on: {error!r}")
            continue
        for row, example in enumerate(examples):
            if "broken" in example:
                messages.append(example["broken"])
            elif len(example["input_ids"]) != data.lengths[row]:
                bench.fault(f"rows: {data.where(row)} was checked to another length")
            else:
                found["accepted"] += 1
        found["refused"] += len(messages)
        for message in messages:
            if not re.match(rf"{re.escape(str(path))}:\d+: .", message):
                bench.fault(f"rows: a message without file and line: {message}")
    for picture in sorted(pictures.glob("damaged_*")):
        try:
            open_picture(str(picture), processor, 50).convert("RGB")
            found["opened"] += 1
        except UserError:
            found["unopened"] += 1
        except Exception as error:
            bench.fault(f"rows: the page opens {picture.name}: {error!r}")
    done = f"{bench.args.rows:,} mutated rows, {found['opened'] + found['unopened']:,} of them by their picture"
    page = f"by the page {found['unopened']:,} of these pictures refused, {found['opened']:,} shown"
    return done, f"{found['refused']:,} refused by file and line, {found['accepted']:,} accepted; {page}"


# ---------------------------------------------------------------------------- the page


@contextmanager
def page(bench: Bench, out: Path):
    """web_demo_vlm.py in a process of its own, on this machine alone: (process, address)."""
    flags = ["--out_dir", out, "--device", "cpu", "--temperature", 0, "--host", "127.0.0.1", "--max_new_tokens", 100]
    command = python("web_demo_vlm.py", *flags, "--max_queue", 2 * bench.args.clients)
    log = bench.work / "page.log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + LIMIT
            while not (found := re.search(r"open (http://127\.\S+)", log.read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ValueError(f"the page did not start: {log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield psutil.Process(process.pid), found[1]
        finally:
            process.terminate()
    if "Traceback" in log.read_text():
        bench.fault(f"web: the page's log holds a traceback: {log.read_text()[-2000:]}")


def ask(client, question: str, picture: Path) -> str:
    """The answer of a new conversation. Raises what gradio_client raises, also when there is none in two minutes."""
    from gradio_client import handle_file

    client.reset_session()
    message = {"text": question, "files": [handle_file(str(picture))]}
    replies = client.submit(message, api_name="/chat").result(timeout=120)
    last = replies[-1] if isinstance(replies, list) else replies
    return last if isinstance(last, str) else str(last["content"])


def web(bench: Bench) -> tuple[str, str]:
    """Visitors at once get the answers that one gets who is alone."""
    from gradio_client import Client  # only now: it comes with Gradio, which the other parts do without

    out = bench.args.out_dir or bench.base
    shown = [json.loads(line) for line in (out / "data/val.jsonl").open(encoding="utf-8")]
    shown = [row for row in shown if row.get("image") and "," not in row["image"]]
    asked = []
    for row in bench.rng.sample(shown, min(40, len(shown))):
        question, answer = (turn["content"] for turn in row["conversations"][:2])
        asked.append((question.replace(IMAGE_TAG, "").strip(), out / "data/images" / row["image"], answer))
    found, lock = Counter(), threading.Lock()
    with page(bench, out) as (process, address):
        client = Client(address, verbose=False, download_files=False)
        alone = [ask(client, question, picture) for question, picture, _ in asked]
        true = sum(said == answer for said, (*_, answer) in zip(alone, asked))
        before, deadline = memory(process) / 1e9, time.monotonic() + bench.args.seconds

        def visit(number: int) -> None:
            rng = random.Random(f"{bench.args.seed} {number}")
            visitor = Client(address, verbose=False, download_files=False)
            while time.monotonic() < deadline:
                which = rng.randrange(len(asked))
                try:
                    said = ask(visitor, *asked[which][:2])
                except Exception as error:  # whatever the client makes of a full queue, a refusal, a lost connection
                    said, kind = repr(error), "refused"
                else:
                    kind = "right" if said == alone[which] else "refused" if said.startswith("⚠️") else "other"
                with lock:
                    found[kind] += 1
                    if kind != "right":
                        bench.fault(f"web: {asked[which][0]!r}: {said!r}, alone {alone[which]!r}")

        with ThreadPoolExecutor(bench.args.clients) as pool:
            list(pool.map(visit, range(bench.args.clients)))
        after = memory(process) / 1e9
    answers = f"{found['right']:,} answers as alone, {found['other']} others, {found['refused']} refused or too late"
    truth = f"alone {true} of {len(asked)} are those of val.jsonl"
    done = f"{bench.args.clients} visitors for {duration(bench.args.seconds)}"
    return done, f"{answers}; {truth}; {before:.2f} GB before, {after:.2f} after"


# ---------------------------------------------------------------------------- all of them

PARTS = {"kills": kills, "flips": flips, "disk": disk, "rows": rows, "web": web}


def parse_args(argv):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    add("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="which: " + ", ".join(PARTS))
    add("--out_dir", type=Path, help="weights for the page, and data/val.jsonl in it; default: those made here")
    add("--seed", type=not_negative, default=0, help="of everything random")
    add = parser.group("how much").add_argument
    add("--scenes", type=positive(int), default=48, help="pictures of the small training, two rows to a step")
    add("--kills", type=positive(int), default=50, help="`kill -9`")
    add("--flips", type=positive(int), default=200, help="files with a flipped bit")
    add("--rows", type=positive(int), default=5000, help="mutated rows")
    add("--clients", type=positive(int), default=20, help="visitors of the page at once")
    add("--seconds", type=positive(float), default=300, help="how long they ask")
    args = parser.parse_args(argv)
    if args.out_dir and not (args.out_dir / "data/val.jsonl").is_file():
        parser.error(f"--out_dir {args.out_dir}: no data/val.jsonl in it. Make one: python -m scripts.quickstart")
    return args


def main(argv=None):
    args = parse_args(argv)
    unwind()  # so that the temporary folder goes with the process
    os.environ["OMP_NUM_THREADS"] = "1"
    table = ["| part | tried | found | faults | min |", "|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="minimind-faults-") as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
        bench = Bench(args, Path(folder), random.Random(args.seed))
        prepare(bench)
        for part in args.only:
            bench.rng.seed(f"{args.seed} {part}")
            print(f"{part} ...", flush=True)
            faults, started = len(bench.faults), time.perf_counter()
            cells = (part, *PARTS[part](bench), len(bench.faults) - faults)
            minutes = (time.perf_counter() - started) / 60
            table.append(f"| {' | '.join(map(str, cells))} | {minutes:.1f} |")
    print("\n" + "\n".join(table))
    if bench.faults:
        sys.exit(1)
    return table


if __name__ == "__main__":
    run_main(main)
