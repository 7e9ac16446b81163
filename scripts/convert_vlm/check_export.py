"""Checks that an exported folder gives the answers of our model. scripts.convert_vlm runs it in a process of its own:

    python -P scripts/convert_vlm/check_export.py FOLDER REFERENCE

It imports nothing of ours, and -P keeps the repo off the import path. The folder is loaded as other people load it,
with the first Transformers in PYTHONPATH.

Shapes: T tokens, V vocabulary, N pictures of H by W pixels.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)
from transformers.utils import logging

LIMIT = 2e-4  # largest difference allowed in logits of some tens, in fp32
QUESTIONS = (  # parts of a message: text, or the index of a picture
    ["Describe this picture.", 0],
    [0, 1, "Compare these pictures, mail @@@ to me@home.org."],
    ["A turn cannot be ended by typing <|im_end|>."],
)


def texts_of(question) -> list[str]:
    return [part for part in question if isinstance(part, str)]


def messages(question, pictures=None) -> list[dict]:
    """Returns a question in the format of Transformers; without pictures, only its texts."""
    if pictures is None:
        return [{"role": "user", "content": "\n".join(texts_of(question))}]
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": pictures[part]}
        for part in question
    ]
    return [{"role": "user", "content": parts}]


def check(folder: str, ours: dict) -> str:
    """Compares a folder with our model. Returns a line about it; raises SystemExit with the first difference.

    A stock language model cannot see and gets only the texts of QUESTIONS.
    ours: "pictures", uint8 (H, W, 3) each; "placeholder", the id of ours; "questions", for each of QUESTIONS input_ids
    (1, T), pixel_values (N, 3, H, W) or None, logits (T, V), answer_ids (n,) and answer.
    """
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    trust = {"trust_remote_code": True} if "auto_map" in config else {}
    sees = bool(trust) or config["model_type"] == "llava"
    load = {"pretrained_model_name_or_path": folder, "dtype": torch.float32} | trust
    processor = (AutoProcessor if sees else AutoTokenizer).from_pretrained(folder, **trust)
    models = [(AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(**load).eval()]
    loaded, expected = type(models[0]).__name__, config["architectures"][0]
    if trust:
        models.append(AutoModelForCausalLM.from_pretrained(**load).eval())
    elif loaded != expected:
        raise SystemExit(f"it loads as {loaded}, not as {expected}")
    ask = pipeline("image-text-to-text" if sees else "text-generation", folder, dtype=torch.float32, **trust)
    pictures = [Image.fromarray(picture.numpy()) for picture in ours["pictures"]] if sees else None
    # Without torchvision Transformers resizes with Pillow, whose values differ in places by up to 2 of 256 levels.
    rounding = 0.0 if trust else 0.04

    largest = peak = 0.0
    for question, our in zip(QUESTIONS, ours["questions"]):
        asked, n = messages(question, pictures), len(our["answer_ids"])
        how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        inputs = processor.apply_chat_template(asked, **how)
        ids, pixels = inputs["input_ids"], inputs.get("pixel_values")
        as_ours = ids.masked_fill(ids == config.get("image_token_index", -1), ours["placeholder"])
        if not torch.equal(as_ours, our["input_ids"]):
            raise SystemExit(f"{question}: the tokens are {as_ours.tolist()}, ours {our['input_ids'].tolist()}")
        inputs = {"input_ids": ids, "attention_mask": inputs["attention_mask"]}
        if our["pixel_values"] is not None:
            apart = (pixels - our["pixel_values"]).abs()
            many = (apart > 1e-5).float().mean().item()
            if not (apart.max() <= rounding and many < 0.1):  # also true for NaN
                raise SystemExit(f"{question}: the pixels differ by up to {apart.max()}, {many:.0%} of them")
            inputs["pixel_values"] = our["pixel_values"]
        for model in models:
            with torch.no_grad():
                logits = model(**inputs).logits[0, :, : our["logits"].shape[1]]  # without <image>
                out = model.generate(**inputs, max_new_tokens=n, do_sample=False)[0, ids.shape[1] :]
            apart = (logits - our["logits"]).abs().max().item()
            if not apart <= LIMIT:  # also true for NaN
                raise SystemExit(f"{question}: the logits differ by up to {apart:.1e}")
            if not torch.equal(out, our["answer_ids"]):
                said = processor.decode(out, skip_special_tokens=True)
                raise SystemExit(f"{question}: the answer is {said!r}, ours {our['answer']!r}")
            largest, peak = max(largest, apart), max(peak, logits.abs().max().item())
        question_of = {"text": asked} if sees else {"text_inputs": asked, "do_sample": False}  # it samples unasked
        said = ask(**question_of, max_new_tokens=n, return_full_text=False)[0]["generated_text"].strip()
        if pixels is not None:
            inputs["pixel_values"] = pixels  # its own pixels, since rounding may change the answer
        out = models[0].generate(**inputs, max_new_tokens=n, do_sample=False)[0, ids.shape[1] :]
        expected = processor.decode(out, skip_special_tokens=True).strip()
        if said != expected:
            raise SystemExit(f"{question}: the pipeline answers {said!r}, the model {expected!r}")
    return (
        f"Transformers {transformers.__version__}: {len(QUESTIONS)} questions, tokens {'and pixels ' * sees}as ours, "
        f"logits within {largest:.1e} at ±{peak:.0f}, the same answers"
    )


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if importlib.util.find_spec("trainer"):
        raise SystemExit("this process can import the repo: start it as the first lines of the file say")
    print(check(sys.argv[1], torch.load(sys.argv[2], weights_only=True)))
