"""Many visitors of the page at once: a part of `scripts.benchmark_faults`."""

import json
import random
import re
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil

from common.display import duration
from model.processing import IMAGE_TAG
from scripts.benchmark.faults_files import LIMIT, Bench, python
from scripts.quickstart.steps import memory


@contextmanager
def page(bench: Bench, out: Path):
    """web_demo_vlm.py in a process of its own, on this machine alone: (process, address)."""
    flags = ["--out_dir", out, "--device", "cpu", "--temperature", 0, "--host", "127.0.0.1", "--max_new_tokens", 100]
    command = python("web_demo_vlm.py", *flags, "--max_queue", 2 * bench.args.clients)
    log = bench.work / "page.log"
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        try:
            deadline = time.monotonic() + LIMIT
            while not (opened := re.search(r"open (http://127\.\S+)", log.read_text())):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise ValueError(f"the page did not start: {log.read_text()[-2000:]}")
                time.sleep(0.1)
            yield psutil.Process(process.pid), opened[1]
        finally:
            process.terminate()
    if "Traceback" in log.read_text():
        bench.fault(f"web: the page's log holds a traceback: {log.read_text()[-2000:]}")


def connect(address: str):
    from gradio_client import Client  # only now: it comes with Gradio, which the other parts do without

    return Client(address, verbose=False, download_files=False)


def ask(client, question: str, picture: Path) -> str:
    """The answer of a new conversation. Raises what gradio_client raises, also when there is none in two minutes."""
    from gradio_client import handle_file

    client.reset_session()
    message = {"text": question, "files": [handle_file(str(picture))]}
    replies = client.submit(message, api_name="/chat").result(timeout=120)
    last = replies[-1] if isinstance(replies, list) else replies
    return last if isinstance(last, str) else str(last["content"])


def choose_questions(bench: Bench, out: Path) -> list[tuple[str, Path, str]]:
    """At most 40 of val.jsonl: (question, picture, its answer)."""
    rows = [json.loads(line) for line in (out / "data/val.jsonl").open(encoding="utf-8")]
    rows = [row for row in rows if row.get("image") and "," not in row["image"]]
    questions = []
    for row in bench.rng.sample(rows, min(40, len(rows))):
        question, answer = (turn["content"] for turn in row["conversations"][:2])
        questions.append((question.replace(IMAGE_TAG, "").strip(), out / "data/images" / row["image"], answer))
    return questions


def web(bench: Bench) -> tuple[str, str]:
    """Visitors at once get the answers that one gets who is alone."""
    out, clients, count, lock = bench.args.out_dir or bench.base, bench.args.clients, Counter(), threading.Lock()
    questions = choose_questions(bench, out)
    with page(bench, out) as (process, address):
        client = connect(address)
        alone = [ask(client, question, picture) for question, picture, _ in questions]
        before, deadline = memory(process) / 1e9, time.monotonic() + bench.args.seconds

        def visit(number: int) -> None:
            rng, visitor = random.Random(f"{bench.args.seed} {number}"), connect(address)
            while time.monotonic() < deadline:
                which = rng.randrange(len(questions))
                try:
                    answer = ask(visitor, *questions[which][:2])
                except Exception as error:  # whatever the client makes of a full queue, a refusal, a lost connection
                    answer, kind = repr(error), "refused"
                else:
                    kind = "right" if answer == alone[which] else "refused" if answer.startswith("⚠️") else "other"
                with lock:
                    count[kind] += 1
                    if kind != "right":
                        bench.fault(f"web: {questions[which][0]!r}: {answer!r}, alone {alone[which]!r}")

        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(visit, range(clients)))
        after = memory(process) / 1e9
    answers = f"{count['right']:,} answers as alone, {count['other']} others, {count['refused']} refused or too late"
    true = sum(answer == expected for answer, (*_, expected) in zip(alone, questions))
    truth = f"alone {true} of {len(questions)} are those of val.jsonl"
    tried = f"{clients} visitors for {duration(bench.args.seconds)}"
    return tried, f"{answers}; {truth}; {before:.2f} GB before, {after:.2f} after"
