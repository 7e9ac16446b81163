"""What a run says beside its progress: before, that it is too short; after, whether it diverged, what it took, one of
its answers, and what to type next."""

import contextlib
import math
import sys
from dataclasses import replace

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

FEW, ENOUGH, PLENTY = 50, 250, 5000  # steps: what is too short to learn from, what suits 100 rows, what suits 10,000
PASSES, SMALLEST = 20, 8  # epochs, and rows a batch, where there are few rows
UNTAUGHT = 0.2  # nats by which untrained weights, whose logits are small but not 0, may be worse than guessing
LEARNING_RATES = ("learning_rate", "projector_learning_rate", "embedding_learning_rate")
LONGEST = 64  # tokens of the answer that is shown


def sizes(rows: int, batch_size: int, ranks: int = 1) -> tuple[int, int]:
    """(epochs, batch size) that suit so many rows: PASSES of them, but ENOUGH steps at least, and no more than PLENTY
    if an epoch has fewer. batch_size: the largest that is wanted."""
    while batch_size > SMALLEST and PASSES * rows < ENOUGH * batch_size * ranks:
        batch_size //= 2
    steps = math.ceil(rows / (batch_size * ranks))  # of an epoch
    return max(math.ceil(ENOUGH / steps), min(PASSES, PLENTY // steps), 1), batch_size


def report_start(run) -> None:
    """That the run is done already, or too short to teach much."""
    args, steps = run.args, run.total_steps
    if run.state.step >= steps:
        say(f"this run is finished, {steps} of {steps} steps are done. To train on from its weights,")
        say(f"instead of --from_resume: --from_weight {run.checkpoint.path} --epochs {args.epochs}")
    elif steps < FEW:
        rows = run.loader.rows_per_epoch
        epochs, batch_size = sizes(rows, args.batch_size, world_size())
        single = " --accumulation_steps 1" * (args.accumulation_steps > 1)
        say(f"only {steps} steps, too few to learn much: {rows:,} rows, {args.batch_size} a batch.")
        say(f"What suits so many: --epochs {epochs} --batch_size {batch_size}{single}")


def report_end(run, tokenizer, seconds: float) -> None:
    """After the last step. Called on all ranks."""
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
        say(f"the weights of before with {lower}")
        return
    if run.val_loader is not None:
        show_answer(run, tokenizer)
    what, command = next_step(run)
    say(f"{what}\n$ {typed(command)}")


# ---------------------------------------------------------------------------- what it took


def peak_memory() -> int:
    """Bytes of memory that this process had at most."""
    now = psutil.Process().memory_info()
    if hasattr(now, "peak_wset"):  # Windows
        return now.peak_wset
    import resource  # which Windows has not

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def describe_memory(memory: int, device: torch.device, ranks: int) -> str:
    """memory: bytes of a process."""
    text = f"{gigabytes(memory / 1e9)} of memory"
    if device.type == "cuda":
        text += f", on the GPU {gigabytes(torch.cuda.max_memory_reserved(device) / 1e9)}"
    return text + f", in each of {ranks} processes" * (ranks > 1)


# ---------------------------------------------------------------------------- one answer


def up_to_first_answer(row: Row) -> Row:
    """A conversation up to its first answer."""
    end = next(i for i, turn in enumerate(row.conversations) if turn["role"] == "assistant")
    return replace(row, conversations=row.conversations[: end + 1])


def first_question(row: Row) -> str:
    """The question before the first answer, without its tags."""
    return up_to_first_answer(row).conversations[-2]["content"].replace(IMAGE_TAG, "").strip()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def answer(run, tokenizer, data: VLMDataset, row: int) -> str:
    """The greedy answer to the first question of a row. Raises BadRow for a broken picture."""
    ids, labels, names, _ = encode_row(up_to_first_answer(data.row(row)), tokenizer, data.image_ids, data.max_length)
    prompt = torch.tensor([ids[: next(i for i, label in enumerate(labels) if label != IGNORE)]], device=run.device)
    if not names:
        inputs = {}
    elif data.features:  # of all turns; this one's come first
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
    """The model's answer to the first held-out row, beside the expected one."""

    def show(title, text):
        text = " ".join(text.split())
        room = WIDTH - 12
        say(f"  {title:10}{text if len(text) <= room else text[: room - 3] + '...'}")

    data = run.val_loader.dataset
    with contextlib.suppress(BadRow):  # the validation has reported it
        given, row = answer(run, tokenizer, data, 0), data.row(0)
        say(f"One answer, to {data.where(0)}:")
        show("question", first_question(row))
        show("expected", up_to_first_answer(row).conversations[-1]["content"])
        show("answer", given)


# ---------------------------------------------------------------------------- what to type next


def next_step(run) -> tuple[str, list[str]]:
    """(what it does, the command)."""
    weights = str(run.checkpoint.path)
    if not hasattr(run.args, "vision_model_path"):
        command = ["python", "train_pretrain_vlm.py", "--from_weight", weights, "--trainable", "all"]
        command += ["--data_path", "rows.jsonl", "--images_path", "pictures"]
        return "Next it learns to see, from rows with pictures (stage 1):", command
    command = ["python", "eval_vlm.py", "--weights", weights, "--image"]
    data = run.val_loader.dataset if run.val_loader is not None else run.loader.data
    for number in range(min(len(data or []), 100)):
        source = data.sources[data.locate(number)[0]]
        if isinstance(source.pictures, Folder):  # rather than a zip
            row = data.row(number)
            question = first_question(row)
            if len(row.images) == 1 and 0 < len(question) <= WIDTH and "\n" not in question:
                picture = source.where_picture(row.images[0])
                return "To ask it:", [*command, picture, "--prompt", question, "--greedy"]
    return "To ask it:", [*command, "dataset/eval_images/scene_1.png", "--greedy"]
