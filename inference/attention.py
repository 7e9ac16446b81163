"""Draws where on the picture the decoder looked for each word of its answer.

A token of the answer is chosen at the position before it. At that position, each head of each layer distributes a
weight of 1 over the positions so far, including the P placeholders of a picture. The figure shows the mean over layers
and heads.

Shapes as in model_minimind.py and model_vlm.py; A tokens of an answer. The last g·g of the P positions are patches
(DINO has registers before them).
"""

import math
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from model.processing import ImageProcessor

# A word begins at a Chinese character, after a space, and where letters follow Chinese.
BEGIN = re.compile(r"[\u3400-\u9fff]|(?<!\S)\S|(?<=[\u3000-\u9fff\uff00-\uffef])[^\W\u3400-\u9fff]")
CHINESE = re.compile(r"NotoSansCJK|SourceHanSans|wqy|msyh|simhei|PingFang|STHeiti|Hiragino|DroidSansFallback", re.I)
EDGE = 224  # smallest edge of a panel, in pixels
COLUMNS = 6


@torch.no_grad()
def attention_to_pictures(model, ids, start: int, pixels):
    """Returns the attention of each answer token to each patch: float (A, N, P), mean over layers and heads.

    ids: int64 (1, T), question and answer; start: index where the answer begins; pixels: uint8 (N, 3, H, W).
    """
    out = model(ids, pixel_values=pixels, logits_to_keep=1, output_attentions=True)
    layers = [weights[0, :, start - 1 : -1].mean(dim=0) for weights in out.attentions]  # (A, T) each
    on_pictures = torch.stack(layers).mean(dim=0)[:, model.find_pictures(ids)[0]]  # (A, N·P)
    return on_pictures.view(len(on_pictures), len(pixels), -1).cpu()


def words_of(tokenizer, answer: list[int]) -> list[tuple[str, list[int]]]:
    """Splits an answer into words, each with the indices of its tokens. In Chinese each character is a word; if one
    token covers two characters, they are one word."""
    text = tokenizer.decode(answer, skip_special_tokens=True)
    starts = {match.start() for match in BEGIN.finditer(text)}
    words, waiting, begin = [], [], 0
    for i in range(len(answer)):
        # A character may take several tokens; it is complete with the last of them.
        end = len(tokenizer.decode(answer[: i + 1], skip_special_tokens=True).rstrip("\ufffd"))
        waiting.append(i)
        if end > begin:
            if not words or not starts.isdisjoint(range(begin, end)):
                words.append(("", []))
            words[-1] = words[-1][0] + text[begin:end], words[-1][1] + waiting
            waiting, begin = [], end
    return [(word.strip(), places) for word, places in words if word.strip()]


def as_seen(image, processor):
    """Returns the part of a picture that the model sees, enlarged for people to look at: uint8 (H, W, 3)."""
    scale = -(-EDGE // min(processor.crop_size))
    size = processor.size * scale if isinstance(processor.size, int) else tuple(edge * scale for edge in processor.size)
    larger = ImageProcessor(size, tuple(edge * scale for edge in processor.crop_size))
    return larger.resize(image).permute(1, 2, 0).numpy()


def fonts(text: str) -> list[str]:
    """Returns matplotlib's font, and one with Chinese characters if `text` needs it. Prints advice if there is none."""
    from matplotlib import font_manager

    names = ["DejaVu Sans"]
    if re.search("[\u3000-\u9fff\uff00-\uffef]", text):
        paths = sorted(path for path in font_manager.findSystemFonts() if CHINESE.search(Path(path).name))
        paths.sort(key=lambda path: "Regular" not in path)
        if paths:
            font_manager.fontManager.addfont(paths[0])
            names.append(font_manager.get_font(paths[0]).family_name)
        else:
            advice = "no font has Chinese characters: install one (apt install fonts-noto-cjk), or write FILE.svg"
            print(advice, file=sys.stderr)
    return names


def spotlight(picture, heat):
    """Shows a picture uint8 (H, W, 3) in colour where heat float (g, g) is 1, dark where it is 0: float (H, W, 3)."""
    H, W, _ = picture.shape
    light = F.interpolate(heat[None, None], (H, W), mode="bilinear")[0, 0, ..., None]  # (H, W, 1); no overshoot
    colours = torch.from_numpy(picture).float() / 255
    return colours * light + 0.35 * colours.mean(dim=-1, keepdim=True) * (1 - light)


def draw_attention(path: Path, model, tokenizer, ids, start: int, pixels, images: list, prompt: str) -> None:
    """Writes the figure: the pictures, and a copy of them for each word of the answer, lit where the decoder looked.
    All words share one scale. The percentage at a word is the share of its attention on pictures; the rest is on text.

    ids, start, pixels: from `inference.generate.generate`; images: the pictures. Raises ValueError if `path` cannot be
    written or has a suffix that matplotlib does not know.
    """
    import matplotlib
    from matplotlib.figure import Figure

    answer = ids[0, start:].tolist()
    words = words_of(tokenizer, answer)
    heat = attention_to_pictures(model, ids, start, pixels)  # (A, N, P)
    g, N = math.isqrt(heat.shape[-1]), len(images)
    heats = [heat[places].mean(dim=0) for _, places in words]  # (N, P) each
    brightest = max((float(each.max()) for each in heats), default=1.0)
    columns = max(1, COLUMNS // N)  # of panels, N pictures each
    rows = -(-(len(words) + 1) // columns)
    text = tokenizer.decode(answer, skip_special_tokens=True).strip()
    style = {"font.family": fonts(prompt + text), "svg.fonttype": "none", "text.parse_math": False}
    with matplotlib.rc_context(style):
        height = 2 * rows + 0.5  # inches
        figure = Figure(figsize=(1.7 * N * columns, height))
        figure.suptitle(prompt if len(prompt) < 80 else f"{prompt[:79]}…", y=1 - 0.1 / height, color="grey", wrap=True)
        # Laid out by hand: matplotlib's layout engines take a minute for a hundred words.
        figure.subplots_adjust(0.01, 0.1 / height, 0.99, 1 - 0.7 / height, wspace=0.05, hspace=0.25)
        grid = figure.subplots(rows, columns * N, squeeze=False).reshape(rows * columns, N)
        for axes in grid.flat:
            axes.axis("off")
        for n, image in enumerate(images):
            picture = as_seen(image, model.processor)
            grid[0, n].imshow(picture)
            for row, (word, _), each in zip(grid[1:], words, heats):
                row[n].imshow(spotlight(picture, (each[n, -g * g :] / brightest).view(g, g)).numpy())
                row[n].set_title(word if n == 0 else "", loc="left", size=12)
                row[n].set_title(f"{each[n].sum():.0%}", loc="right", size=8, color="grey")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=100)
        except (OSError, ValueError) as error:
            raise ValueError(f"--show_attention {path} cannot be written: {error}") from None
