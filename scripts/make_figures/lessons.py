"""The figures of the course's lessons, in the order of the lessons.

`say(english, chinese)` gives the words of the figure's language.
"""

import math
import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts.make_figures.drawing import BLUE, GREEN, GREY, ORANGE, TINY, bare, draws, example_scene, new_figure

# ---------------------------------------------------------------------------- 1 what a VLM is, 4 the merge


@draws("patches.png")
def patches(say):
    """A picture as it is, as the encoder sees it, and cut into its patches."""
    from dataset.scene_pictures import draw
    from model.processing import ImageProcessor

    image = draw(example_scene(), 224)
    seen = ImageProcessor.from_pretrained(TINY / "clip").resize(image).permute(1, 2, 0).numpy()  # (72, 72, 3)
    figure, (whole, small, *_) = new_figure(7.6, 2.9, 1, 3)
    whole.imshow(image)
    small.imshow(seen)
    whole.set_title(say("the file: 224 × 224", "原图：224 × 224"))
    small.set_title(say("scaled: 72 × 72", "缩小：72 × 72"))
    cut = figure.axes[2]
    cut.set_title(say("9 patches of 24 × 24", "9 个图块，各 24 × 24"))
    gap = 11
    for row in range(3):
        for column in range(3):
            left, top = column * (24 + gap), row * (24 + gap)
            patch = seen[24 * row : 24 * row + 24, 24 * column : 24 * column + 24]
            cut.imshow(patch, extent=(left, left + 24, top + 24, top))
            cut.text(
                left + 12, top + 24 + gap / 2, f"{3 * row + column}", ha="center", va="center", size=10, color=BLUE
            )
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
def merge(say):
    """The tokens of a question, and the sequence after the merge, with patches in the places of the placeholders."""
    from matplotlib.patches import Rectangle

    from dataset.scene_pictures import draw
    from model.processing import ImageProcessor

    tokens = question_tokens("<image>\nWhat is this?")
    seen = ImageProcessor.from_pretrained(TINY / "clip").resize(draw(example_scene(), 224)).permute(1, 2, 0).numpy()
    cells = iter([seen[24 * row : 24 * row + 24, 24 * i : 24 * i + 24] for row in range(3) for i in range(3)])
    figure, axes = new_figure(9.2, 2.5)
    axes.set_title(say("Patches take the places of the placeholders", "图块占据占位符的位置"))
    for x, token in enumerate(tokens):
        colour = BLUE if token == "@" else ORANGE
        for y in (1.9, 0):
            if y == 0 and token == "@":
                axes.imshow(next(cells), extent=(x, x + 0.9, 0, 0.9), zorder=2)
            axes.add_patch(Rectangle((x, y), 0.9, 0.9, facecolor=f"{colour}40", edgecolor=colour))
        axes.text(x + 0.45, 2.95, token, rotation=60, color=colour, size=11, rotation_mode="anchor")
        axes.annotate("", (x + 0.45, 1.0), (x + 0.45, 1.85), arrowprops={"arrowstyle": "->", "color": colour})
    for y, label in ((2.35, say("tokens", "词元")), (0.45, say("after\nthe merge", "合并后"))):
        axes.text(-0.4, y, label, ha="right", va="center")
    axes.set(xlim=(-3.2, len(tokens) + 1.2), ylim=(-0.1, 5), aspect="equal")
    bare(axes)
    return figure


@draws("visible.png")
def visible(say):
    """Which token sees which: a picture before the question, and after it."""
    import torch
    from matplotlib.colors import to_rgb

    from model.attention import visible_keys

    figure, panels = new_figure(9, 5.4, 1, 2)
    figure.suptitle(say("Which token (row) sees which (column)?", "每个词元（行）能看到哪些词元（列）？"), size=13)
    orders = {
        "<image>\nWhat is this?": say("picture first", "图片在前"),
        "What is this?\n<image>": say("question first", "问题在前"),
    }
    for axes, (question, order) in zip(panels, orders.items()):
        tokens = question_tokens(question)[3:-3]  # without the marks of the turns
        T = len(tokens)
        sees = visible_keys(None, T, T, 0, torch.device("cpu"))[0, 0]  # (T, T)
        colours = [to_rgb(BLUE if token == "@" else ORANGE) for token in tokens]
        axes.imshow([[colours[key] if sees[row, key] else (0.93,) * 3 for key in range(T)] for row in range(T)])
        axes.set_xticks(range(T), tokens, rotation=90, size=10)
        axes.set_yticks(range(T), tokens, size=10)
        axes.set_xlabel(order, size=12, labelpad=8)
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
def rope(say):
    """How far RoPE has turned the pairs of a head: some as points on a circle, all as cosines."""
    import torch

    from model.attention import precompute_freqs_cis

    cos, sin = precompute_freqs_cis(dim=32, end=96, theta=1e6)
    figure, _ = new_figure(8, 5, 2, 4, height_ratios=[3, 2.6])
    title = say("RoPE turns pair i by an angle that grows with position m", "RoPE：第 i 对数的旋转角度随位置 m 增大")
    figure.suptitle(title, size=13)
    grid = figure.axes[0].get_gridspec()
    colours = (BLUE, ORANGE, GREEN, "#444444")
    for axes, pair, colour in zip(figure.axes[:4], (0, 1, 2, 4), colours):
        around = torch.linspace(0, 2 * torch.pi, 100)
        axes.plot(around.cos(), around.sin(), color=GREY, linewidth=0.7)
        for m in range(12):
            x, y = cos[m, pair].item(), sin[m, pair].item()
            axes.plot(x, y, "o", color=colour, alpha=0.25 + 0.75 * m / 11)
            if m in (0, 1, 2) and pair < 4:
                axes.text(1.24 * x, 1.24 * y, m, ha="center", va="center", size=10)
        axes.set(title=say(f"pair i = {pair}", f"第 {pair} 对"), aspect="equal", xlim=(-1.4, 1.4), ylim=(-1.4, 1.4))
        bare(axes)
    for axes in figure.axes[4:]:
        axes.remove()
    below = figure.add_subplot(grid[1, :])
    shown = below.imshow(cos[:, :16].T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
    below.set(xlabel=say("position m", "位置 m"), ylabel=say("pair i", "第 i 对"), yticks=[0, 4, 8, 12])
    figure.colorbar(shown, ax=below, ticks=[-1, 0, 1], label=say("cosine", "余弦"), pad=0.01)
    return figure


# ---------------------------------------------------------------------------- 3 eyes


@cache  # for both languages
def contrastive_products() -> list:
    """The products (16, 16) of 16 pictures and 16 captions before each of 41 steps on them, as lesson 3 trains."""
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
    return products


@draws("contrastive.png")
def contrastive(say):
    """How alike pictures and captions are before and after 40 steps."""
    products = contrastive_products()
    figure, both = new_figure(7, 3.9, 1, 2)
    figure.suptitle(say("How alike are picture and caption?", "图片与说明有多相似？"), size=13)
    titles = {0: say("before training", "训练前"), 40: say("after 40 steps", "40 步之后")}
    for axes, step in zip(both, (0, 40)):
        shown = axes.imshow(products[step], cmap="viridis", vmin=-1, vmax=1)
        bare(axes)
        axes.set(title=titles[step], xlabel=say("16 captions", "16 句说明"))
    both[0].set_ylabel(say("16 pictures", "16 张图片"))
    figure.colorbar(shown, ax=both, ticks=[-1, 0, 1], label=say("cosine", "余弦相似度"))
    return figure


# ---------------------------------------------------------------------------- 5 training


@cache  # for both languages
def losses_at_rates() -> tuple[dict, int]:
    """{rate: losses of 40 steps}, all of the decoder from the bundle, as lesson 5 trains; and the vocabulary's size."""
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

    losses = {rate: [] for rate in (1e-5, 1e-3, 1e-1)}
    for rate in losses:
        torch.manual_seed(0)
        model = MiniMindVLM(config, TINY / "clip")
        load_weights(model, read_weights(TINY / "llm_128.pth"), TINY / "llm_128.pth")
        choose_trainable(model, "all")
        optimizer = make_optimizer(model, rate, rate, weight_decay=0.1)
        for step in range(40):
            batch = collate(examples[8 * step : 8 * step + 8])
            set_learning_rate(optimizer, schedule(step, 40, warmup=100))
            loss = model(batch["input_ids"], labels=batch["labels"], pixel_values=batch["pixel_values"]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([each for each in model.parameters() if each.requires_grad], 1.0)
            optimizer.step()
            losses[rate].append(loss.item())
    return losses, config.vocab_size


@draws("learning_rates.svg")
def learning_rates(say):
    """Loss of 40 steps at three learning rates."""
    losses, V = losses_at_rates()
    figure, axes = new_figure(7.2, 4)
    for (rate, curve), (colour, line) in zip(losses.items(), ((BLUE, ":"), (GREEN, "-"), (ORANGE, "-."))):
        axes.plot(curve, line, color=colour, linewidth=2)
        axes.text(39.6, curve[-1], f"{rate:.0e}".replace("e-0", "e-"), va="center", color=colour)
    axes.axhline(math.log(V), color=GREY, linestyle="--")
    axes.text(39, math.log(V) + 0.3, "ln V", ha="right", color="#555555")
    title = say("Loss of 40 steps at three learning rates", "三种学习率下 40 步的损失")
    axes.set(title=title, xlabel=say("step", "步"), ylabel=say("loss, nats per token", "损失（nat / 词元）"))
    axes.set(xlim=(0, 43), ylim=(0, None))
    return figure


# ---------------------------------------------------------------------------- 6 does it look?


@draws("shuffled.svg")
def shuffled(say):
    """Exact match by kind of question, with the pictures of the rows and with shuffled ones."""
    from model.files import read_json
    from scripts.quickstart.report_words import WORDS

    scores = read_json("docs/results/quickstart.json")
    true, swapped = scores["val"]["by_kind"], scores["shuffled"]["by_kind"]
    kinds = sorted(true, key=lambda kind: true[kind] - swapped[kind])
    figure, axes = new_figure(7.2, 5)
    with_true, with_others = say("its own picture", "原图"), say("shuffled picture", "打乱后的图片")
    for shift, shares, colour, label in ((0.2, true, BLUE, with_true), (-0.2, swapped, "#b5b5b5", with_others)):
        heights = [100 * shares[kind] for kind in kinds]
        axes.barh([y + shift for y in range(len(kinds))], heights, 0.38, color=colour, label=label)
    names = say(WORDS["en"], WORDS["zh"])["kinds"]
    axes.set_yticks(range(len(kinds)), [names.get(kind, kind) for kind in kinds])
    axes.set(xlim=(0, 100), xlabel=say("right answers (exact match)", "准确率（完全匹配）"))
    axes.set_ylabel(say("kind of question", "题型"))
    axes.set_title(say("The quickstart's model, by kind of question", "quickstart 模型各题型的准确率"))
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    axes.xaxis.set_major_formatter("{x:.0f}%")
    return figure


@draws("attention.png", trained=True)
def attention(say, quickstart: Path):
    """Where the quickstart's model looked for each word of a short answer."""
    from PIL import Image

    import eval_vlm
    from dataset.scene_pictures import draw
    from inference.attention import draw_attention
    from inference.generate import generate, user_turn
    from inference.models import load_model

    args = eval_vlm.parse_args(["--out_dir", str(quickstart), "--greedy", "--device", "cpu"])
    model, tokenizer, _ = load_model(args)
    image, prompt = draw(example_scene(), 224), say("what is in the top left?", "左上角是什么？")
    turns = [{"role": "user", "content": user_turn(prompt, 1, first=True)}]
    ids, start, pixels = generate(model, tokenizer, turns, [image], args)
    with TemporaryDirectory() as folder:
        path = Path(folder, "attention.png")
        draw_attention(path, model, tokenizer, ids, start, pixels, [image], prompt)
        return Image.open(path).convert("RGB")
