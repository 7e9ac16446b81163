"""The messages of a run around its progress. Before the first step: that the run is too short. After the last one:
whether it diverged, its time and memory, one of its answers, and the next command."""

import contextlib
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from common.devices import autocast
from common.display import WIDTH, duration, gigabytes, typed
from common.distributed import gather, is_main, say, world_size
from dataset.examples import encode_row
from dataset.lm_dataset import VLMDataset
from dataset.pictures import Folder
from dataset.rows import Row
from dataset.values import BadRow
from model.processing import IGNORE, IMAGE_TAG

FEW, ENOUGH, PLENTY = 50, 250, 5000  # steps: too few to learn from; enough for 100 rows; enough for 10,000 rows
PASSES, SMALLEST = 20, 8  # epochs, and rows per batch, for small data sets
UNTAUGHT = 0.2  # nats: untrained weights may be this much worse than guessing, as their logits are small but not 0
LEARNING_RATES = ("learning_rate", "projector_learning_rate", "embedding_learning_rate")
LONGEST = 64  # tokens of the example answer


def sizes(rows: int, batch_size: int, ranks: int = 1) -> tuple[int, int]:
    """Returns (epochs, batch size) that suit a number of rows: PASSES epochs, but at least ENOUGH steps, and at most
    PLENTY steps unless one epoch has more. batch_size: the upper limit."""
    while batch_size > SMALLEST and PASSES * rows < ENOUGH * batch_size * ranks:
        batch_size //= 2
    steps = math.ceil(rows / (batch_size * ranks))  # of an epoch
    return max(math.ceil(ENOUGH / steps), min(PASSES, PLENTY // steps), 1), batch_size


def report_start(run) -> None:
    """Prints a note if the run is already finished, or too short to learn much."""
    args, steps = run.args, run.total_steps
    if run.state.step >= steps:
        say(f"this run is finished, {steps} of {steps} steps are done. To train further from its weights,")
        say(f"replace --from_resume by --from_weight {run.checkpoint.path} --epochs {args.epochs}")
    elif steps < FEW:
        rows = run.loader.rows_per_epoch
        epochs, batch_size = sizes(rows, args.batch_size, world_size())
        single = " --accumulation_steps 1" * (args.accumulation_steps > 1)
        say(f"only {steps} steps, too few to learn much: {rows:,} rows, {args.batch_size} per batch.")
        say(f"For this many rows try --epochs {epochs} --batch_size {batch_size}{single}")


def report_end(run, tokenizer, seconds: float) -> None:
    """Prints the summary after the last step. All ranks must call it. seconds: duration of the run."""
    memory = max(gather(peak_memory()))
    say(f"It took {duration(seconds)} and at most {describe_memory(memory, run.device, world_size())}")
    if not is_main():
        return
    guessing = math.log(run.model.config.vocab_size)
    loss = sum(run.progress.last) / max(len(run.progress.last), 1)
    if loss > guessing + UNTAUGHT:
        rates = {key: getattr(run.args, key, None) for key in LEARNING_RATES}
        lower = " ".join(f"--{key} {value / 5:.2g}" for key, value in rates.items() if value)
        say(f"It diverged: a loss of {loss:.2f} is worse than guessing, {guessing:.2f}. Start again from")
        say(f"the previous weights with {lower}")
        return
    if run.progress.measures == "reward" and not any(run.progress.last):
        say("All rewards were 0: no answer ended and agreed with a reference. Longer ones: --max_new_tokens 100")
    if run.val_loader is not None:
        show_answer(run, tokenizer)
    what, command = next_step(run)
    say(f"{what}\n$ {typed(command)}")


# ---------------------------------------------------------------------------- memory


def peak_memory() -> int:
    """Returns the peak memory of this process in bytes."""
    if sys.platform == "linux":  # whose ru_maxrss begins with the memory of the process that started this one
        peak = re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())
        if peak:  # not every sandbox reports it
            return 1024 * int(peak[1])
    now = psutil.Process().memory_info()
    if hasattr(now, "peak_wset"):  # Windows
        return now.peak_wset
    import resource  # does not exist on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def describe_memory(memory: int, device: torch.device, ranks: int) -> str:
    """Describes the memory of the run for a sentence. memory: bytes per process."""
    text = f"{gigabytes(memory / 1e9)} of memory"
    if device.type == "cuda":
        text += f", on the GPU {gigabytes(torch.cuda.max_memory_reserved(device) / 1e9)}"
    return text + f", in each of {ranks} processes" * (ranks > 1)


# ---------------------------------------------------------------------------- an example answer


def up_to_first_answer(row: Row) -> Row:
    """Cuts a conversation after its first answer."""
    end = next(i for i, turn in enumerate(row.conversations) if turn["role"] == "assistant")
    return replace(row, conversations=row.conversations[: end + 1])


def first_question(row: Row) -> str:
    """Returns the question before the first answer, without its <image> tags."""
    return up_to_first_answer(row).conversations[-2]["content"].replace(IMAGE_TAG, "").strip()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def answer(run, tokenizer, data: VLMDataset, row: int) -> str:
    """Returns the greedy answer to the first question of a row. Raises BadRow for a broken picture."""
    ids, labels, names, _ = encode_row(up_to_first_answer(data.row(row)), tokenizer, data.image_ids, data.max_length)
    prompt = torch.tensor([ids[: next(i for i, label in enumerate(labels) if label != IGNORE)]], device=run.device)
    if not names:
        inputs = {}
    elif data.features:  # of the pictures of all turns; those of the first question come first
        inputs = {"image_features": data.features.of_row(row)[: len(names)].to(run.device)}
    else:
        inputs = {"pixel_values": torch.stack([data.load_picture(row, name) for name in names]).to(run.device)}
    run.model.eval()
    with autocast(run.device, run.dtype):
        out = run.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=LONGEST,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            **inputs,
        )
    run.model.train()
    return tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)


def show_answer(run, tokenizer) -> None:
    """Prints the model's answer to the first held-out row next to the expected one."""

    def show(title, text):
        text = " ".join(text.split())
        room = WIDTH - 12
        say(f"  {title:10}{text if len(text) <= room else text[: room - 3] + '...'}")

    data = run.val_loader.dataset
    with contextlib.suppress(BadRow):  # the validation has reported it
        given, row = answer(run, tokenizer, data, 0), data.row(0)
        say(f"Example answer, {data.where(0)}:")
        show("question", first_question(row))
        show("expected", up_to_first_answer(row).conversations[-1]["content"])
        show("answer", given)


# ---------------------------------------------------------------------------- the next command


def next_step(run) -> tuple[str, list[str]]:
    """Returns the next command and a line that introduces it: (line, command)."""
    weights = str(run.checkpoint.path)
    if not hasattr(run.args, "vision_model_path"):
        command = ["python", "train_pretrain_vlm.py", "--from_weight", weights, "--trainable", "all"]
        command += ["--data_path", "rows.jsonl", "--images_path", "pictures"]
        return "Next, train on rows with pictures (stage 1):", command
    command = ["python", "eval_vlm.py", "--weights", weights, "--image"]
    data = run.val_loader.dataset if run.val_loader is not None else run.loader.data
    for number in range(min(len(data or []), 100)):
        source = data.sources[data.locate(number)[0]]
        if isinstance(source.pictures, Folder):  # not a zip, as the command names a file
            row = data.row(number)
            question = first_question(row)
            if len(row.images) == 1 and 0 < len(question) <= WIDTH and "\n" not in question:
                picture = source.where_picture(row.images[0])
                return "To ask the model:", [*command, picture, "--prompt", question, "--greedy"]
    return "To ask the model:", [*command, "dataset/eval_images/scene_1.png", "--greedy"]
