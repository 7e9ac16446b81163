"""Prepares inputs of the model: pictures → uint8 tensors, conversations → tokens.

Training, evaluation and the web page all use this file, so a model is asked in exactly the form it was trained on.

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

IMAGE_TAG = "<image>"  # marks the position of a picture in the text of a data set
DEFAULT_SYSTEM = "You are a helpful assistant"
NO_THOUGHT = "<think>\n\n</think>\n\n"  # an answer of MiniMind-3 begins with it
IGNORE = -100  # label of a token without loss
ROOMY = 4  # a large JPEG is decoded at reduced size, at least this many times the model's edge
USUAL = {"do_resize": True, "do_rescale": True, "do_normalize": True, "rescale_factor": 1 / 255}  # required
MAY_FOLLOW = {"system": (None,), "user": (None, "system", "assistant"), "assistant": ("user",)}  # role → before it


# ---------------------------------------------------------------------------- pictures


class TooManyPixels(ValueError):
    """A picture that would take too much memory to decode."""


class ImageProcessor:
    """Preprocessing for the encoder: shortest edge to `size`, or squash to it, centre crop, scale to 0..1, normalise.

    Equal to Transformers' processors on torchvision, but in two steps: `resize` stops at uint8, a quarter of the bytes
    for workers and transfers; `normalize` does the rest on the model's device. Compared with processors on Pillow, 1 in
    100 values differs by one of 256 levels: PyTorch rounds filter weights to 16 bits, and takes 40% of the time.
    """

    FILTERS = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}  # Pillow applies the others

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
        """Reads preprocessor_config.json, with sizes as numbers or objects. Raises ValueError, which names the key."""
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
        """The content of `preprocessor_config.json`."""
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
        """Opens a picture for `resize`, from a path or an open file, without reading its pixels yet.

        A JPEG of at least 2 · ROOMY times the edge is decoded at 1/2, 1/4 or 1/8 of its size, which saves time and
        memory. Most values of `resize` then change by at most one of 256 levels; at sharp edges between bright colours
        by up to 11.

        most: limit in million pixels; default: the number at which Pillow warns. formats: see `PIL.Image.open`.
        Raises TooManyPixels, and what Pillow raises for a file that is not a picture.
        """
        limit = min(most * 1e6, 2 * Image.MAX_IMAGE_PIXELS) if most else Image.MAX_IMAGE_PIXELS
        try:
            image = Image.open(file, formats=formats)
            pixels = image.width * image.height
            if pixels > limit:
                image.close()
        except Image.DecompressionBombError as error:  # Pillow raises at twice the number at which it warns
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
            if long > 100 * short:  # a line: scaling it could take gigabytes, and the crop keeps only its middle
                left, top = (max(edge - 100 * short, 0) // 2 for edge in (width, height))
                image = image.crop((left, top, width - left, height - top))
                width, height = image.size
                short, long = sorted((width, height))
            scaled = int(self.size * long / short)  # the long edge, same aspect ratio
            width, height = (self.size, scaled) if width <= height else (scaled, self.size)
        else:
            height, width = self.size
        mode = self.FILTERS.get(self.resample)
        if mode is None and (width, height) != image.size:
            image, white = to_rgb(image, white).resize((width, height), self.resample), None

        def scaled(pixels, height, width):
            same = (height, width) == pixels.shape[2:]
            return pixels if same else F.interpolate(pixels, (height, width), mode=mode, antialias=True)

        # First the width, then the height, as PyTorch does. In bands, because a large picture would otherwise be in
        # memory several times: in Pillow, in RGB, as an array, and in PyTorch's layout.
        narrow = []
        for band in bands(image):
            pixels = torch.from_numpy(np.array(to_rgb(band, white))).permute(2, 0, 1)[None]  # (1, 3, rows, W)
            narrow.append(scaled(pixels, band.height, width))
        pixels = scaled(torch.cat(narrow, dim=2), height, width)[0]
        if (height, width) != self.crop_size:
            top, left = (height - self.crop_size[0]) // 2, (width - self.crop_size[1]) // 2
            bottom, right = height - self.crop_size[0] - top, width - self.crop_size[1] - left
            pixels = F.pad(pixels, (-left, -right, -top, -bottom))  # negative padding crops
        return pixels.contiguous()

    def normalize(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (..., 3, H, W) → float32 (..., 3, H, W): (pixels / 255 - mean) / std."""
        # Mean and standard deviation of the encoder's training pictures: its inputs get the same range as in training.
        mean = torch.tensor(self.image_mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.image_std, device=pixels.device).view(3, 1, 1)
        return (pixels.float() / 255).sub_(mean).div_(std)  # in place: a batch of pictures is large

    def __call__(self, images, return_tensors: str = "pt") -> dict[str, torch.Tensor]:
        """One picture or a list → {"pixel_values": float32 (N, 3, H, W)}, as Transformers' processors do."""
        images = images if isinstance(images, (list, tuple)) else [images]
        return {"pixel_values": self.normalize(torch.stack([self.resize(image) for image in images]))}


# ---------------------------------------------------------------------------- text


def language(text: str) -> str:
    """ "zh" if the text contains a Chinese character, otherwise "en"."""
    return "zh" if re.search("[\u3400-\u9fff]", text) else "en"


def encode_chat(tokenizer, conversations: list[dict], image_ids: list[int]) -> list[tuple[list[int], bool, int]]:
    """A conversation → pieces (ids, is_answer, number of pictures), in order; their concatenation is the model's input.

    Only answers get labels: the model learns to write answers, not questions or placeholders.

    `<|im_start|>system\\n...<|im_end|>\\n<|im_start|>user\\n...<|im_end|>\\n<|im_start|>assistant\\n` is a prompt
    piece, `answer<|im_end|>` an answer piece. Generation starts at the boundary, so training and generation use the
    same tokens. A conversation that ends with the user's turn is a prompt for an answer. Text from users is plain text:
    a `<|im_end|>` inside it becomes ordinary tokens and does not end the turn.

    A tokenizer with a `<think>` token belongs to MiniMind-3: no default system turn, and each prompt ends with an empty
    `<think>` block. If an answer in the data contains a thought, the thought is learned instead.

    Args:
        conversations: [{"role": "system" | "user" | "assistant", "content": str}, ...], `<image>` in user turns.
        image_ids: the P placeholder tokens that replace each `<image>`; empty if no turn has one.
    Raises ValueError for an unknown role, turns out of order, placeholders typed as text, or text that is not Unicode.
    """
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    backend = tokenizer.backend_tokenizer  # three times as fast as tokenizer(...), which sets these in each call
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True

    def text(string):
        try:
            return backend.encode(string, add_special_tokens=False).ids
        except TypeError:  # half a surrogate pair; Python also uses these for bytes that are not UTF-8
            raise ValueError(f"the text {ascii(string[:80])} is not Unicode: save or send it as UTF-8") from None

    P, sign = len(image_ids), backend.id_to_token(image_ids[0]) if image_ids else ""
    typed = len(sign) == 1  # people can type "@", but not <|image_pad|>, which is inserted as an id
    run = re.compile(f"{re.escape(sign)}{{{P},}}" if typed else r"(?!)")  # runs that the model would read as pictures
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
            content = content.replace(IMAGE_TAG, sign * P)  # one token per patch
        if typed and sum(len(match) // P for match in run.findall(content)) != tags:
            raise ValueError(
                f"{role}: the text has {P} or more {sign!r} in a row, as a picture has. "
                f"Shorten the run; pictures are written {IMAGE_TAG}"
            )
        if role == "assistant":
            block, answer = after_thoughts(text, content) if thoughtful else ([], text(content))
            pieces += [([*prompt, *block], False, pictures), ([*answer, end], True, 0)]  # only the second is learned
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
    """An answer of MiniMind-3 → (ids that end the prompt, ids to learn). text: str → ids.

    Both come from one tokenization, because blanks at the start of an answer may merge with the newlines before it.
    """
    before, _, said = content.rpartition("</think>")
    thought = before.split("</think>")[0].split("<think>")[-1].strip("\n")
    ids = text(f"<think>\n{thought}\n</think>\n\n" + said.lstrip("\n"))
    n = 0 if thought else len(commonprefix([ids, text(NO_THOUGHT)]))
    return ids[:n], ids[n:]
