"""From what people have to what the model reads: pictures → uint8 tensors, conversations → tokens.

Training, asking and the web page all come through here, so that a model is asked exactly the way it was taught.

Shapes: N pictures, H and W of a picture, P placeholders (patches) of a picture.

Reading path, 6 of 10; next: dataset/examples.py
"""

import json
import re
from os.path import commonprefix
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from .families import FAMILIES, OPENAI, vision_config
from .files import check_number, read_json
from .rgb import bands, to_rgb, upright, white_of
from .tokenizer import load_tokenizer as load_tokenizer
from .tokenizer import thinks

IMAGE_TAG = "<image>"  # stands in the text of a data set where the picture belongs
DEFAULT_SYSTEM = "You are a helpful assistant"
NO_THOUGHT = "<think>\n\n</think>\n\n"  # with which an answer of MiniMind-3 begins
IGNORE = -100  # label of a token without loss
ROOMY = 4  # a large JPEG is decoded smaller, to so many times the edge that the model wants, or more
USUAL = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}  # of a processor
MAY_FOLLOW = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user",)}  # roles in a chat


# ---------------------------------------------------------------------------- pictures


class TooManyPixels(ValueError):
    """A picture that would take too much memory to decode."""


class ImageProcessor:
    """What encoders want of a picture: shortest edge to `size`, or squashed to it, centre crop, 0..1, normalised.

    Equal to Transformers' processors on torchvision, but in two halves: `resize` stops at uint8, a quarter of
    the bytes for workers and transfers, and `normalize` does the rest on whatever device the model is on. From what
    that class does on Pillow 1 in 100 values differ, by one of 256 levels: PyTorch rounds the weights of a filter to 16
    bits, and so takes 40% of the time.
    """

    FILTERS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}  # Pillow does the others

    def __init__(
        self,
        size: int | tuple[int, int] = 224,
        crop_size: tuple[int, int] = (224, 224),
        resample: int = Image.Resampling.BICUBIC,
        image_mean=OPENAI["image_mean"],
        image_std=OPENAI["image_std"],
    ):
        """size: the shortest edge, or (height, width) to squash to; crop_size: (height, width); all in pixels."""
        self.size, self.crop_size, self.resample = size, crop_size, resample
        self.image_mean, self.image_std = list(image_mean), list(image_std)

    @classmethod
    def from_pretrained(cls, folder) -> "ImageProcessor":
        """Reads `preprocessor_config.json` of an encoder's folder, in the old style (plain numbers) or the new one."""
        path, vision = Path(folder) / "preprocessor_config.json", vision_config(folder)
        family, edge = FAMILIES[vision["model_type"]], vision["image_size"]
        written = read_json(path) if path.exists() else {}
        config = {"size": edge} | family.pixels | {key: value for key, value in written.items() if value is not None}
        cropped = "crop_size" in config and config.get("do_center_crop", not family.squash)
        for key, usual in USUAL.items():
            if config.get(key, usual) != usual:
                raise ValueError(f"{path}: {key} is {config[key]!r}, expected {usual!r}")

        def pair(value):
            return (value.get("height"), value.get("width")) if isinstance(value, dict) else (value, value)

        size = config["size"]
        if isinstance(size, dict):
            size = size["shortest_edge"] if "shortest_edge" in size else pair(size)
        elif family.squash and not cropped:
            size = pair(size)
        whole = size if isinstance(size, tuple) else pair(size)
        crop = pair(config["crop_size"]) if cropped else whole
        processor = cls(size, crop)
        for key, values in (("size", whole), ("crop_size", crop)):
            for value in values:
                check_number(path, key, value, 1, 10_000)
        for key, least, most in (("resample", 0, 5), ("image_mean", -1e3, 1e3), ("image_std", 1e-6, 1e3)):
            value = config[key]
            several = value if isinstance(value, list) else [value]
            if key != "resample" and len(several) != 3:
                raise ValueError(f"{path}: {key} is {value!r}, expected three numbers")
            for number in several:
                check_number(path, key, number, least, most, int if key == "resample" else float)
            setattr(processor, key, value)
        return processor

    def save_pretrained(self, folder) -> None:
        """Writes `preprocessor_config.json`."""
        text = json.dumps(self.to_dict(), indent=2) + "\n"
        (Path(folder) / "preprocessor_config.json").write_text(text, encoding="utf-8")

    def to_dict(self) -> dict:
        """In the words of Transformers."""
        height, width = self.crop_size
        size = self.size
        return {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": size} if isinstance(size, int) else {"height": size[0], "width": size[1]},
            "resample": int(self.resample),
            "do_center_crop": True,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": self.image_mean,
            "image_std": self.image_std,
        }

    def open(self, file, most: float | None = None, formats=None) -> Image.Image:
        """A picture for `resize`, from a path or an open file; its pixels are not read yet.

        A JPEG of at least 2 · ROOMY times the edge is decoded at half its size, a quarter or an eighth, in a fraction
        of time and memory. `resize` then gives values that are mostly within one of 256 levels, and up to 11 apart at
        sharp edges between bright colours.

        most: million pixels it may have; default: those above which Pillow warns. formats: see `PIL.Image.open`.
        Raises TooManyPixels, and whatever Pillow raises for what is no picture.
        """
        limit = min(most * 1e6, 2 * Image.MAX_IMAGE_PIXELS) if most else Image.MAX_IMAGE_PIXELS
        try:
            image = Image.open(file, formats=formats)
            pixels = image.width * image.height
            if pixels > limit:
                image.close()
        except Image.DecompressionBombError as error:  # twice as many as it warns of
            pixels = int(re.search(r"\d+", str(error))[0])
        if pixels > limit:
            raise TooManyPixels(
                f"it has {pixels / 1e6:,.4g} million pixels, at most {limit / 1e6:.4g} are read: make it smaller"
            )
        edge = self.size if isinstance(self.size, int) else max(self.size)
        image.draft(None, (ROOMY * edge, ROOMY * edge))
        return image

    def resize(self, image: Image.Image) -> torch.Tensor:
        """A picture of any mode and size → uint8 (3, H, W)."""
        image = upright(image)
        white = white_of(image)
        width, height = image.size
        if isinstance(self.size, int):
            short, long = sorted((width, height))
            if long > 100 * short:  # a line: scaled whole it could take gigabytes, and the crop leaves only its middle
                left, top = (max(edge - 100 * short, 0) // 2 for edge in (width, height))
                image = image.crop((left, top, width - left, height - top))
                width, height = image.size
                short, long = sorted((width, height))
            scaled = int(self.size * long / short)  # the long edge, in proportion
            width, height = (self.size, scaled) if width <= height else (scaled, self.size)
        else:
            height, width = self.size
        mode = self.FILTERS.get(self.resample)
        if mode is None and (width, height) != image.size:
            image, white = to_rgb(image, white).resize((width, height), self.resample), None

        def scaled(pixels, height, width):
            same = (height, width) == pixels.shape[2:]
            return pixels if same else F.interpolate(pixels, (height, width), mode=mode, antialias=True)

        # First the width, then the height, as PyTorch does it too: a large picture need not lie in memory as Pillow has
        # it, in RGB, as an array and in PyTorch's own layout, all at once.
        narrow = []
        for band in bands(image):
            pixels = torch.from_numpy(np.array(to_rgb(band, white))).permute(2, 0, 1)[None]  # (1, 3, rows, W)
            narrow.append(scaled(pixels, band.height, width))
        pixels = scaled(torch.cat(narrow, dim=2), height, width)[0]
        if (height, width) != self.crop_size:
            top, left = (height - self.crop_size[0]) // 2, (width - self.crop_size[1]) // 2
            bottom, right = height - self.crop_size[0] - top, width - self.crop_size[1] - left
            pixels = F.pad(pixels, (-left, -right, -top, -bottom))  # less than none: crops, the edges go unseen
        return pixels.contiguous()

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (..., 3, H, W) → float32 (..., 3, H, W): (pixels / 255 - mean) / std."""
        # The mean and spread of the encoder's own training pictures: it gets numbers like those it learned from.
        mean = torch.tensor(self.image_mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.image_std, device=pixels.device).view(3, 1, 1)
        return (pixels.float() / 255 - mean) / std

    def __call__(self, images, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """One picture or a list → {"pixel_values": float32 (N, 3, H, W)}, as Transformers' processors do."""
        images = images if isinstance(images, (list, tuple)) else [images]
        return {"pixel_values": self.normalize(torch.stack([self.resize(image) for image in images]))}


# ---------------------------------------------------------------------------- text


def language(text: str) -> str:
    """ "zh" where there is a Chinese character, else "en"."""
    return "zh" if re.search("[\u3400-\u9fff]", text) else "en"


def encode_chat(tokenizer, conversations: list[dict], image_ids: list[int]) -> list[tuple[list[int], bool, int]]:
    """A conversation as pieces (ids, is_answer, number of pictures), in order; joined, they are the model's input.

    Only answers get labels: the model learns to write them, not questions or placeholders.

    `<|im_start|>system\\n...<|im_end|>\\n<|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n` is a prompt
    piece, `answer<|im_end|>` an answer piece: the boundary is where generation starts, so a model is trained on exactly
    the tokens it will see. A conversation that ends with the user ends ready to answer. What people typed is plain
    text: a `<|im_end|>` inside it is spelled out in ordinary tokens and ends nothing.

    A tokenizer with a `<think>` token is of MiniMind-3: no system turn but one that is given, and each prompt ends with
    an empty `<think>` block. An answer that thinks in the data learns to, in place of that.

    Args:
        conversations: [{"role": "system" | "user" | "assistant", "content": str}, ...], `<image>` in user turns.
        image_ids: P times the token that takes the place of each `<image>`; empty if no turn has one.
    Raises ValueError for an unknown role, turns out of order, placeholders typed as text, or text that is not Unicode.
    """
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    backend = tokenizer.backend_tokenizer  # a third of the time of tokenizer(...), whose every call sets these anew
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True

    def text(string):
        try:
            return backend.encode(string, add_special_tokens=False).ids
        except TypeError:  # half a surrogate pair, by which Python also keeps bytes that are no UTF-8
            raise ValueError(f"the text {ascii(string[:80])} is not Unicode: save or send it as UTF-8") from None

    P, sign = len(image_ids), backend.id_to_token(image_ids[0]) if image_ids else ""
    typed = len(sign) == 1  # as "@" is, which people type too, and not <|image_pad|>: it is put in as an id
    run = re.compile(f"{re.escape(sign)}{{{P},}}" if typed else r"(?!)")  # what the model takes for pictures
    turns, newline, thoughtful = list(conversations), text("\n"), thinks(tokenizer)
    if not thoughtful and (not turns or turns[0]["role"] != "system"):
        turns = [{"role": "system", "content": DEFAULT_SYSTEM}, *turns]
    pieces = []
    prompt, pictures, last = [], 0, None
    for turn in turns:
        role, content = turn["role"], turn["content"]
        if role not in MAY_FOLLOW:
            raise ValueError(f"unknown role {role!r}, expected system, user or assistant")
        if last not in MAY_FOLLOW[role]:
            raise ValueError(f"turn order: {role} after {last}; expected user, assistant, user, assistant, ...")
        tags = content.count(IMAGE_TAG) if role == "user" else 0
        if tags and typed:
            content = content.replace(IMAGE_TAG, sign * P)  # a token for each patch
        if typed and sum(len(match) // P for match in run.findall(content)) != tags:
            raise ValueError(
                f"{role}: the text has {P} or more {sign!r} in a row, as a picture has. "
                f"Shorten the run; pictures are written {IMAGE_TAG}"
            )
        if role == "assistant":
            block, answer = after_thoughts(text, content) if thoughtful else ([], text(content))
            pieces += [([*prompt, *block], False, pictures), ([*answer, end], True, 0)]  # the second is learned
            prompt, pictures = [*newline], 0
        else:
            pictures += tags
            first, *others = content.split(IMAGE_TAG) if tags else [content]
            said = text(f"{role}\n{first}") + [token for part in others for token in (*image_ids, *text(part))]
            prompt = [*prompt, start, *said, end, *newline]
            if role == "user":
                prompt += [start, *text("assistant\n")]  # the answer follows
        last = role
    if thoughtful and last == "user":
        prompt += text(NO_THOUGHT)
    return [*pieces, (prompt, False, pictures)]


def after_thoughts(text, content: str) -> tuple[list[int], list[int]]:
    """An answer of MiniMind-3 → (what the prompt ends with, what is learned). text: str → ids.

    Its tokens are those of the whole, as blanks at its beginning may be one with the lines before.
    """
    before, _, said = content.rpartition("</think>")
    thought = before.split("</think>")[0].split("<think>")[-1].strip("\n")
    ids = text(f"<think>\n{thought}\n</think>\n\n" + said.lstrip("\n"))
    n = 0 if thought else len(commonprefix([ids, text(NO_THOUGHT)]))
    return ids[:n], ids[n:]
