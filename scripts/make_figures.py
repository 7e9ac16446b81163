"""Draws the figures of the documentation from our own code and runs.

    python -m scripts.make_figures                        # all, into docs/images
    python -m scripts.make_figures --only patches         # one

Each function below draws one figure. Most need nothing but the bundle in model/tiny; those of a trained model need
`python -m scripts.quickstart` first.
"""

if __spec__ is None:  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.make_figures instead of scripts/make_figures.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

import io
import random
from pathlib import Path
from tempfile import TemporaryDirectory

from common.cli import Parser, run_main
from common.files import write_safely

FIGURES = {}  # {file name: (function, does it need the quickstart?)}
TINY = Path("model/tiny")
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text, in the reader's font: small files
    "svg.hashsalt": "minimind",  # the same bytes every time
    "axes.spines.top": False,
    "axes.spines.right": False,
}
BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#e07b28", "#3a9a57", "#9a9a9a"  # picture, text, answer, the rest


def draws(name: str, trained: bool = False):
    """Registers a function that draws docs/images/`name`: it returns a figure of matplotlib, or a Pillow picture.

    trained: it is called with the folder of a finished quickstart, others with nothing.
    """

    def register(function):
        FIGURES[name] = function, trained
        return function

    return register


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of matplotlib (in inches) and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def bare(axes) -> None:
    """No ticks and no frame."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def save(figure, path: Path) -> None:
    """SVG for lines; PNG with a palette for pictures."""
    from PIL import Image

    file = io.BytesIO()
    if path.suffix == ".svg":
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    else:
        if not isinstance(figure, Image.Image):
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png", dpi=80)
            figure = Image.open(drawn).convert("RGB")
        figure.quantize(128, dither=Image.Dither.NONE).save(file, "png", optimize=True)
    write_safely(path, lambda target: target.write(file.getvalue()))


def example_scene(seed: int = 9):
    """A scene such as the quickstart draws, three objects; lessons 1, 4 and 6 show the same one."""
    from dataset.scene_pictures import random_scene

    return random_scene(random.Random(seed), objects=(3, 3))


# ---------------------------------------------------------------------------- 1 what a VLM is, 4 the merge


@draws("patches.png")
def patches():
    """A picture as it is, as the encoder sees it, and cut into its patches."""
    from dataset.scene_pictures import draw
    from model.processing import ImageProcessor

    image = draw(example_scene(), 224)
    seen = ImageProcessor.from_pretrained(TINY / "clip").resize(image).permute(1, 2, 0).numpy()  # (72, 72, 3)
    figure, (whole, small, *_) = new_figure(7.6, 2.6, 1, 3, width_ratios=[1, 1, 1])
    whole.imshow(image)
    small.imshow(seen)
    whole.set_title("224 × 224", color=GREY)
    small.set_title("72 × 72", color=GREY)
    cut = figure.axes[2]
    cut.set_title("9 × (24 × 24)", color=GREY)
    gap = 8
    for row in range(3):
        for column in range(3):
            left, top = column * (24 + gap), row * (24 + gap)
            patch = seen[24 * row : 24 * row + 24, 24 * column : 24 * column + 24]
            cut.imshow(patch, extent=(left, left + 24, top + 24, top))
            cut.text(left + 12, top + 24 + gap / 2, f"{3 * row + column}", ha="center", va="center", size=7, color=BLUE)
    cut.set(xlim=(0, 3 * 24 + 2 * gap), ylim=(3 * 24 + 3 * gap, 0))
    for axes in figure.axes:
        bare(axes)
    return figure


def question_tokens(question: str) -> list[str]:
    """What the model reads of a question after the system's turn, token by token."""
    from model.processing import encode_chat, load_tokenizer

    tokenizer = load_tokenizer(TINY, "@" * 9)
    pieces = encode_chat(tokenizer, [{"role": "user", "content": question}], [34] * 9)
    ids = [token for piece, _, _ in pieces for token in piece]
    start = ids.index(1, 1)  # after the system's turn
    shown = {"\n": "\\n", "<|im_start|>": "im_start", "<|im_end|>": "im_end"}
    return [shown.get(text, text.strip()) for text in map(tokenizer.decode, ids[start:])]


@draws("merge.png")
def merge():
    """The tokens of a question, and the sequence after the merge, with patches in the places of the placeholders."""
    from matplotlib.patches import Rectangle

    from dataset.scene_pictures import draw
    from model.processing import ImageProcessor

    tokens = question_tokens("<image>\nWhat is this?")
    seen = ImageProcessor.from_pretrained(TINY / "clip").resize(draw(example_scene(), 224)).permute(1, 2, 0).numpy()
    cells = iter([seen[24 * row : 24 * row + 24, 24 * i : 24 * i + 24] for row in range(3) for i in range(3)])
    figure, axes = new_figure(9.2, 2.2)
    for x, token in enumerate(tokens):
        colour = BLUE if token == "@" else ORANGE
        for y in (1.9, 0):
            if y == 0 and token == "@":
                axes.imshow(next(cells), extent=(x, x + 0.9, 0, 0.9), zorder=2)
            axes.add_patch(Rectangle((x, y), 0.9, 0.9, facecolor=f"{colour}40", edgecolor=colour))
        axes.text(x + 0.45, 2.95, token, rotation=55, color=colour, size=9, rotation_mode="anchor")
        axes.annotate("", (x + 0.45, 1.0), (x + 0.45, 1.85), arrowprops={"arrowstyle": "->", "color": colour})
    axes.set(xlim=(-0.1, len(tokens) + 1), ylim=(-0.1, 4.6), aspect="equal")
    bare(axes)
    return figure


@draws("visible.png")
def visible():
    """Which token sees which: a picture before the question, and after it."""
    import torch
    from matplotlib.colors import to_rgb

    from model.attention import visible_keys

    figure, panels = new_figure(8, 4, 1, 2)
    for axes, question in zip(panels, ("<image>\nWhat is this?", "What is this?\n<image>")):
        tokens = question_tokens(question)[3:-3]  # without the marks of the turns
        T = len(tokens)
        sees = visible_keys(None, T, T, 0, torch.device("cpu"))[0, 0]  # (T, T)
        colours = [to_rgb(BLUE if token == "@" else ORANGE) for token in tokens]
        axes.imshow([[colours[key] if sees[row, key] else (0.93,) * 3 for key in range(T)] for row in range(T)])
        axes.set_xticks(range(T), tokens, rotation=90, size=8)
        axes.set_yticks(range(T), tokens, size=8)
        axes.xaxis.tick_top()
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            for tick, colour in zip(ticks, colours):
                tick.set_color(colour)
        axes.tick_params(length=0)
        axes.hlines([i + 0.5 for i in range(T - 1)], -0.5, T - 0.5, color="white", linewidth=1)
        axes.vlines([i + 0.5 for i in range(T - 1)], -0.5, T - 0.5, color="white", linewidth=1)
        axes.spines[:].set_visible(False)
    return figure


# ---------------------------------------------------------------------------- 2 tokens and the decoder


@draws("rope.png")
def rope():
    """How far RoPE has turned the pairs of a head: some as points on a circle, all as cosines."""
    import torch

    from model.attention import precompute_freqs_cis

    cos, sin = precompute_freqs_cis(dim=32, end=96, theta=1e6)
    figure, _ = new_figure(7.6, 4.2, 2, 4, height_ratios=[3, 2])
    grid = figure.axes[0].get_gridspec()
    colours = [f"C{i}" for i in range(4)]
    for axes, pair, colour in zip(figure.axes[:4], (0, 1, 2, 4), colours):
        around = torch.linspace(0, 2 * torch.pi, 100)
        axes.plot(around.cos(), around.sin(), color=GREY, linewidth=0.7)
        for m in range(12):
            x, y = cos[m, pair].item(), sin[m, pair].item()
            axes.plot(x, y, "o", color=colour, alpha=0.25 + 0.75 * m / 11)
            if m in (0, 1, 2) and pair < 4:
                axes.text(1.24 * x, 1.24 * y, m, ha="center", va="center", size=8)
        axes.set(title=f"i = {pair}", aspect="equal", xlim=(-1.4, 1.4), ylim=(-1.4, 1.4))
        bare(axes)
    for axes in figure.axes[4:]:
        axes.remove()
    below = figure.add_subplot(grid[1, :])
    below.imshow(cos[:, :16].T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    below.set(xlabel="m", ylabel="i", yticks=[0, 4, 8, 12])
    return figure


# ---------------------------------------------------------------------------- 3 eyes


@draws("contrastive.png")
def contrastive():
    """The products of 16 pictures and 16 captions before and after 40 steps on them, as lesson 3 trains."""
    import torch

    from dataset.scene_pictures import draw
    from dataset.scene_questions import caption
    from dataset.scenes import scenes_of
    from model.processing import ImageProcessor, load_tokenizer
    from scripts.train_clip.__main__ import make_optimizer, parse_args
    from scripts.train_clip.captions import encode_captions
    from scripts.train_clip.towers import build_config, build_model, contrastive_loss, encode_pictures, encode_texts
    from trainer.optimizer import set_learning_rate

    sizes = {"image_size": 72, "patch_size": 24, "hidden_size": 64, "num_hidden_layers": 2, "text_hidden_size": 64}
    sizes |= {"text_num_hidden_layers": 1, "projection_dim": 64, "muon_learning_rate": 5e-3}
    sizes |= dict.fromkeys(("data_path", "tokenizer_path", "out_dir"), "-")
    args = parse_args([str(part) for name, value in sizes.items() for part in (f"--{name}", value)])
    tokenizer, processor = load_tokenizer(TINY, "@" * 9), ImageProcessor.from_pretrained(TINY / "clip")
    torch.manual_seed(0)
    clip = build_model(build_config(args, len(tokenizer)))
    scenes = list(scenes_of("train", 16, seed=0, objects=(1, 1)))
    pixels = processor.normalize(torch.stack([processor.resize(draw(scene, 72)) for scene in scenes]))
    ids = encode_captions(tokenizer, [caption(scene, "en") for scene in scenes], args.max_text_len)
    optimizer, right, products = make_optimizer(clip, args), torch.eye(16, dtype=torch.bool), []
    set_learning_rate(optimizer, 1.0)
    for _ in range(41):
        seen, read = encode_pictures(clip, pixels)[1], encode_texts(clip, ids)
        products.append((seen[:, 0] @ read.T).detach())  # (16, 16)
        loss, _ = contrastive_loss(seen, read, right, clip.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    figure, both = new_figure(5.4, 2.7, 1, 2)
    for axes, step in zip(both, (0, 40)):
        shown = axes.imshow(products[step], cmap="viridis", vmin=-1, vmax=1)
        axes.set_title(f"{step}", color=GREY)
        bare(axes)
    figure.colorbar(shown, ax=both, ticks=[-1, 0, 1])
    return figure


# ---------------------------------------------------------------------------- 5 training


@draws("stages.svg")
def stages():
    """What learns in each of the two stages, at the 26M model's defaults: a row of boxes for each stage."""
    from matplotlib.patches import FancyBboxPatch

    figure, both = new_figure(6.4, 2.2, 2, 1)
    for stage, (axes, blocks) in enumerate(zip(both, ([7], range(8))), start=1):
        parts = [("CLIP", 2.4, False), ("Linear", 1.2, True)]
        parts += [(f"{block}", 0.6, block in blocks) for block in range(8)]
        left = 0.6
        axes.text(0, 0.5, stage, ha="center", va="center", size=14, color=GREY)
        for name, width, learns in parts:
            colour, style = ORANGE if learns else "#d9d9d9", "round,pad=0,rounding_size=0.08"
            axes.add_patch(FancyBboxPatch((left, 0.15), width, 0.7, boxstyle=style, facecolor=colour, edgecolor="none"))
            axes.text(left + width / 2, 0.5, name, ha="center", va="center", color="white" if learns else "black")
            left += width + (0.3 if width > 1 else 0.08)
        axes.set(xlim=(-0.3, left), ylim=(0, 1))
        bare(axes)
    return figure


@draws("learning_rates.svg")
def learning_rates():
    """Loss of 40 steps at three learning rates, all of the decoder from the bundle, as lesson 5 trains."""
    import math
    from collections import Counter

    import torch

    from dataset.batches import collate
    from dataset.examples import encode_row
    from dataset.rows import Row
    from dataset.scene_pictures import draw
    from dataset.scenes import rows_of, scenes_of
    from model.build import load_weights
    from model.files import read_json
    from model.model_vlm import MiniMindVLM, VLMConfig
    from model.processing import ImageProcessor, load_tokenizer
    from model.weights import read_weights
    from trainer.optimizer import choose_trainable, make_optimizer, schedule, set_learning_rate

    tokenizer, decoder = load_tokenizer(TINY, "@" * 9), read_json(TINY / "llm_128.json")["config"]
    config = VLMConfig.for_encoder(TINY / "clip", tokenizer.convert_tokens_to_ids("@"), **decoder)
    processor, examples = ImageProcessor.from_pretrained(TINY / "clip"), []
    for i, scene in enumerate(scenes_of("train", 320, seed=0)):
        (drawn,) = rows_of(scene, "a.jpg", random.Random(i), Counter(), 1, ("describe",))
        ids, labels, *_ = encode_row(Row(drawn["conversations"], ["a.jpg"]), tokenizer, config.image_ids, 400)
        example = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "row": i}
        examples.append(example | {"pictures": processor.resize(draw(scene, 72))[None]})

    figure, axes = new_figure(5.6, 3)
    for rate, colour in ((1e-5, BLUE), (1e-3, GREEN), (1e-1, ORANGE)):
        torch.manual_seed(0)
        model = MiniMindVLM(config, TINY / "clip")
        load_weights(model, read_weights(TINY / "llm_128.pth"), TINY / "llm_128.pth")
        choose_trainable(model, "all")
        optimizer, losses = make_optimizer(model, rate, rate, weight_decay=0.1), []
        for step in range(40):
            batch = collate(examples[8 * step : 8 * step + 8])
            set_learning_rate(optimizer, schedule(step, 40, warmup=100))
            loss = model(batch["input_ids"], labels=batch["labels"], pixel_values=batch["pixel_values"]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([each for each in model.parameters() if each.requires_grad], 1.0)
            optimizer.step()
            losses.append(loss.item())
        axes.plot(losses, color=colour, label=f"{rate:.0e}")
    axes.axhline(math.log(config.vocab_size), color=GREY, linestyle="--")
    axes.text(39, math.log(config.vocab_size) + 0.3, "ln V", ha="right", color=GREY)
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


# ---------------------------------------------------------------------------- 6 does it look?


@draws("shuffled.svg")
def shuffled():
    """Exact match by kind of question, with the pictures of the rows and with shuffled ones."""
    from model.files import read_json

    scores = read_json("docs/results/quickstart.json")
    true, swapped = scores["val"]["by_kind"], scores["shuffled"]["by_kind"]
    kinds = sorted(true, key=lambda kind: true[kind] - swapped[kind])
    figure, axes = new_figure(6, 3.4)
    for shift, shares, colour in ((0.2, true, BLUE), (-0.2, swapped, GREY)):
        axes.barh([y + shift for y in range(len(kinds))], [100 * shares[kind] for kind in kinds], 0.38, color=colour)
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlim=(0, 100))
    axes.xaxis.set_major_formatter("{x:.0f}%")
    return figure


@draws("attention.png", trained=True)
def attention(quickstart: Path):
    """Where the quickstart's model looked for each word of a short answer."""
    from PIL import Image

    import eval_vlm
    from dataset.scene_pictures import draw
    from inference.attention import draw_attention
    from inference.generate import generate, user_turn
    from inference.models import load_model

    args = eval_vlm.parse_args(["--out_dir", str(quickstart), "--greedy", "--device", "cpu"])
    model, tokenizer, _ = load_model(args)
    image, prompt = draw(example_scene(), 224), "what is in the top left?"
    turns = [{"role": "user", "content": user_turn(prompt, 1, first=True)}]
    ids, start, pixels = generate(model, tokenizer, turns, [image], args)
    with TemporaryDirectory() as folder:
        path = Path(folder, "attention.png")
        draw_attention(path, model, tokenizer, ids, start, pixels, [image], prompt)
        return Image.open(path).convert("RGB").reduce(2)


# ---------------------------------------------------------------------------- the command


def parse_args(argv=None):
    parser = Parser(__file__, __doc__)
    add = parser.start.add_argument
    names = sorted(Path(name).stem for name in FIGURES)
    add("--only", nargs="+", choices=names, metavar="NAME", help=f"figures to draw: {', '.join(names)}; default: all")
    add("--quickstart", type=Path, default=Path("out/quickstart"), metavar="DIR", help="a finished quickstart")
    add("--out_dir", type=Path, default=Path("docs/images"), metavar="DIR", help="where the figures go")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    import matplotlib

    chosen = {name: entry for name, entry in FIGURES.items() if not args.only or Path(name).stem in args.only}
    weights = args.quickstart / "sft_vlm_128.pth"
    for name, (function, trained) in chosen.items():
        if trained and not weights.is_file():
            print(f"{name} left out: there is no {weights}. Make it: python -m scripts.quickstart")
            continue
        with matplotlib.rc_context(STYLE):
            save(function(args.quickstart) if trained else function(), args.out_dir / name)
        size = (args.out_dir / name).stat().st_size
        print(f"written: {args.out_dir / name} ({size / 1000:.0f} kB)")


if __name__ == "__main__":
    run_main(main)
