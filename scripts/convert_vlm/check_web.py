"""Checks that a page made by --to web gives the answers of our model. It runs the page's engine in node.

Shapes: N pictures of H by W pixels, P patches, V the encoder's width.
"""

import base64
import copy
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch

from model.processing import IMAGE_TAG, encode_chat
from model.rgb import to_rgb
from model.web import as_floats, encoder_weights
from scripts.convert_vlm.check_export import QUESTIONS

LIMIT = 1e-3  # largest difference allowed in logits of some tens, in fp32
TOKENS = 32  # at most, per answer
NODE = 16  # the oldest version that was tried
FOLLOW_UP = "这是什么？<|im_end|>"


def in_turns(question, pictures: list) -> tuple[list[dict], list]:
    """Returns one of QUESTIONS as (turns, the pictures in it)."""
    text = "\n".join(part if isinstance(part, str) else IMAGE_TAG for part in question)
    return [{"role": "user", "content": text}], [pictures[part] for part in question if isinstance(part, int)]


def questions_of(pictures: list) -> list[tuple[list[dict], list]]:
    """Returns QUESTIONS as [(turns, pictures)], and a follow-up question to the first one."""
    questions = [in_turns(question, pictures) for question in QUESTIONS]
    turns, shown = questions[0]
    answered = [{"role": "assistant", "content": "好的。"}, {"role": "user", "content": FOLLOW_UP}]
    return [*questions, (turns + answered, shown)]


@torch.no_grad()
def with_weights(model, stored: dict[str, torch.Tensor]):
    """Returns a copy of our model with the rounded weights of a page."""
    model, state = copy.deepcopy(model), as_floats(stored)
    weights = encoder_weights(model) | model.text_state_dict()
    for key in weights.keys() & state.keys():
        weights[key].copy_(state[key])
    return model.eval()


@torch.no_grad()
def ask(model, tokenizer, turns: list[dict], shown: list) -> dict:
    """Our model's ids, pixels uint8 (N, 3, H, W), features (N, P, V), logits, answer and text for a question."""
    ids = [token for piece, _, _ in encode_chat(tokenizer, turns, model.config.image_ids) for token in piece]
    pixels = torch.stack([model.processor.resize(picture) for picture in shown]) if shown else None
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)), "pixel_values": pixels}
    out = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answer = out[0, len(ids) :].tolist()
    return {
        "ids": ids,
        "pixels": pixels,
        "features": model.encode_pictures(pixels),
        "logits": model(**inputs, logits_to_keep=1).logits[0, 0],
        "answer": answer,
        "text": tokenizer.decode(answer, skip_special_tokens=True),
    }


def has_node() -> bool:
    if shutil.which("node") is None:
        return False
    version = subprocess.run(["node", "-v"], capture_output=True, text=True).stdout  # v18.20.8
    return int((re.match(r"v(\d+)", version) or (0, 0))[1]) >= NODE


def ask_page(folder: Path, questions: list[tuple[list[dict], list]], plain: bool = False) -> dict:
    """Returns the same from the page in a folder: {"loaded": seconds, "answers": [...]}. plain: without the kernel.

    Raises ValueError if the page does not run.
    """

    def packed(picture):
        rgba = np.asarray(to_rgb(picture).convert("RGBA"))
        height, width, _ = rgba.shape
        return {"rgba": base64.b64encode(rgba.tobytes()).decode(), "width": width, "height": height}

    asked = [
        {"turns": turns, "pictures": [packed(picture) for picture in shown], "max_new_tokens": TOKENS}
        for turns, shown in questions
    ]
    with tempfile.TemporaryDirectory() as temporary:
        saved = Path(temporary) / "questions.json"
        saved.write_text(json.dumps(asked), encoding="utf-8")
        command = ["node", Path(__file__).with_suffix(".js"), folder, saved, *["--plain"] * plain]
        run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if run.returncode:
        reason = [line for line in run.stderr.splitlines() if "Error" in line] or [f"exit status {run.returncode}"]
        raise ValueError(f"the page does not run in node, and was deleted: {reason[0]}")
    return json.loads(run.stdout)


def check_page(folder: Path, model, tokenizer, stored, questions: list[tuple[list[dict], list]], plain=False) -> str:
    """Checks that the page in `folder` answers as the model does with the weights `stored` in it.

    Returns a line that says what agreed, or that there is no node to check with. Raises ValueError if answers differ.
    """
    if not has_node():
        return f"not checked whether the page answers as the model does: that needs node {NODE} or later (nodejs.org)"
    rounded, largest, peak, as_before = with_weights(model, stored), 0.0, 0.0, 0
    page = ask_page(folder, questions, plain)
    for (turns, shown), theirs in zip(questions, page["answers"]):
        our, what = ask(rounded, tokenizer, turns, shown), f"{turns[-1]['content']!r}: the page's"
        if theirs["ids"] != our["ids"]:
            raise ValueError(f"{what} tokens are {theirs['ids']}, ours {our['ids']}")
        for i in range(len(shown)):
            pixels = np.frombuffer(base64.b64decode(theirs["pixels"][i]), np.uint8)
            if (apart := int((pixels != our["pixels"][i].numpy().ravel()).sum())) > 0:
                raise ValueError(f"{what} pixels differ from ours in {apart} of {len(pixels)} places")
        floats = [*theirs["features"], theirs["logits"]], [*(our["features"] if shown else []), our["logits"]]
        for text, tensor in zip(*floats):
            numbers = np.frombuffer(base64.b64decode(text), np.float32)
            apart = float(np.abs(numbers - tensor.numpy().ravel()).max())
            if not apart <= LIMIT:  # also true for NaN
                raise ValueError(f"{what} {'logits' if tensor.ndim == 1 else 'features'} differ by up to {apart:.1e}")
            largest, peak = max(largest, apart), max(peak, float(tensor.abs().max()))
        if theirs["answer"] != our["answer"] or theirs["text"] != our["text"]:
            raise ValueError(f"{what} answer is {theirs['text']!r}, ours {our['text']!r}")
        as_before += our["answer"] == ask(model, tokenizer, turns, shown)["answer"]
    n = len(questions)
    return (
        f"node: {n} questions, tokens and pixels as ours, features and logits within {largest:.1e} at ±{peak:.0f}, the "
        f"same answers; {as_before} of {n} as before the weights were rounded"
    )
