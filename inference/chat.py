"""A conversation on the web page: loads models, selects the part of the history they read, and streams answers.

`inference.generate.ask` asks the model, with the same tokens as in training. A `UserError` is for the visitor to fix.
"""

import argparse
import math
import threading
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import StoppingCriteria, TextIteratorStreamer

from common.devices import pick_device, pick_dtype
from inference.generate import ask, user_turn
from inference.models import load_model
from model.generations import without_thoughts
from model.packed import pack
from model.processing import IMAGE_TAG, ImageProcessor, TooManyPixels, encode_chat

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")

# ---------------------------------------------------------------------------- models


def load_for_page(weights: Path, args):
    """Returns the model, on its device and ready to answer, and its tokenizer."""
    flags = {"load": int(weights.is_dir()), "weights": str(weights)}
    flags |= {"hidden_size": None, "use_moe": False}  # they chose the first weights; these may be others
    model, tokenizer, _ = load_model(argparse.Namespace(**vars(args) | flags))
    device = pick_device(args.device)
    return pack(model.to(device), pick_dtype(args.dtype, device)), tokenizer


# ---------------------------------------------------------------------------- conversation


class UserError(Exception):
    """An error that the visitor can fix: a key of TEXT and the values for its sentence."""

    def __init__(self, key: str, **values):
        super().__init__(key)
        self.key, self.values = key, values


def paths_of(files: list) -> list[str]:
    """Returns the paths of Gradio's files: each is a path, or {"path"} when a question is asked again."""
    return [file if isinstance(file, str) else file["path"] for file in files]


def parts(content) -> tuple[str, list[str]]:
    """Returns the text and the picture paths of a message in any of Gradio's formats.

    The page sends {"type": "text", "text"} and {"type": "file", "file": {"path"}}, the API sends str and {"path"}.
    """
    items = content if isinstance(content, (list, tuple)) else [content]
    items = [{"text": item} if isinstance(item, str) else item for item in items]
    files = [item.get("file", item) for item in items]
    return "\n".join(item["text"] for item in items if "text" in item), [f["path"] for f in files if f.get("path")]


def turns_of(history: list[dict]) -> list[tuple[str, list[str], str]]:
    """Returns (question, paths of its pictures, answer) for each answered turn, in order."""
    turns, asked = [], None
    for message in history:
        mark = (message.get("metadata") or {}).get("id")
        text, files = parts(message["content"])
        if message["role"] == "user":
            asked = text, files
        elif mark == "notice":
            asked = None
            continue
        elif mark != "seen" and asked and text:
            turns.append((*asked, text))
            asked = None
    return turns


def open_picture(path: str, processor: ImageProcessor, max_pixels: float) -> Image.Image:
    """Opens a picture and reads all of it, for `processor.resize`. max_pixels: in millions. Raises UserError."""
    name = Path(path).name
    try:
        with processor.open(path, max_pixels, FORMATS) as image:
            image.load()
            return image
    except MemoryError:
        raise
    except TooManyPixels:
        raise UserError("pixels", name=name, limit=max_pixels) from None
    except Exception:  # Pillow's decoders raise many types
        raise UserError("broken", name=name) from None


def check_question(text: str, pictures: list, args) -> None:
    if len(text) > args.max_text:
        raise UserError("long", n=len(text), limit=args.max_text)
    if len(pictures) > args.max_pictures:
        raise UserError("many", n=len(pictures), limit=args.max_pictures)
    if (tags := text.count(IMAGE_TAG)) not in (0, len(pictures)):
        raise UserError("tags", tag=IMAGE_TAG, n=tags, pictures=len(pictures))


def chat_of(turns: list, first: bool) -> list[dict]:
    """Converts turns to the format of `encode_chat`; the last one may lack its answer. first: see `user_turn`."""
    chat = []
    for text, files, answer in turns:
        chat.append({"role": "user", "content": user_turn(text, len(files), first)})
        chat += [{"role": "assistant", "content": answer}] if answer else []
    return chat


def truncate(turns: list, tokenizer, image_ids: list[int], args, first: bool = False) -> list:
    """Returns the last turns that fit into --max_seq_len tokens and have no more pictures than four questions may have.

    Raises UserError if a question breaks a limit, or if not even the last turn fits.
    """

    def tokens_in(turn):
        text, files, answer = turn
        check_question(text, files, args)  # earlier ones too: a manipulated page can send any history
        if len(answer) > 64 * args.max_new_tokens:  # characters, far more than an answer can have: manipulated too
            return math.inf
        try:
            return sum(len(piece) for piece, _, _ in encode_chat(tokenizer, chat_of([turn], first), image_ids))
        except ValueError:  # a run of placeholders, typed or generated
            if answer:
                return math.inf
            raise UserError("run", sign=tokenizer.convert_ids_to_tokens(image_ids[0])) from None

    kept, tokens, pictures = [], 0, 0
    for turn in reversed(turns):
        tokens, pictures = tokens + tokens_in(turn), pictures + len(turn[1])
        if tokens > args.max_seq_len or pictures > 4 * args.max_pictures:
            break
        kept.insert(0, turn)
    if not kept:
        raise UserError("room", limit=args.max_seq_len)
    return kept


class Stop(StoppingCriteria):
    """Ends an answer on request or when its time is up, and counts its tokens."""

    def __init__(self, seconds: float):
        self.start, self.seconds, self.tokens = time.monotonic(), seconds, 0
        self.stopped, self.late = threading.Event(), False

    def took(self) -> float:
        return time.monotonic() - self.start

    def __call__(self, input_ids, scores, **kwargs):
        self.tokens += 1
        self.late = self.took() > self.seconds
        return torch.full(input_ids.shape[:1], self.late or self.stopped.is_set(), device=input_ids.device)


def stream(model, tokenizer, chat: list[dict], pictures: list, args, stop: Stop):
    """Yields the text of the answer as it grows. Closing the generator stops the model."""
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failures = []

    def work():
        try:
            ask(model, tokenizer, chat, pictures, args, streamer, [stop])
        except Exception as error:  # raised again below, in the visitor's thread
            failures.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    answer = ""
    try:
        for piece in streamer:
            answer += piece
            if streamer.text_queue.empty():  # the page may be slower than the model: skip to the latest text
                yield without_thoughts(answer)
    finally:
        stop.stopped.set()
        thread.join()
    if failures:
        raise failures[0]
    yield without_thoughts(answer)
