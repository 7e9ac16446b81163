"""The diagrams of README.md and README_zh.md, as SVG: how a picture becomes an answer, and what learns in each stage.

Text is large enough for a phone, where the page shows a diagram at half its width. Each has a ground of its own, so
that it is legible on any page; ground and text both follow the reader's light or dark mode.
"""

import math
from html import escape

from scripts.make_figures.drawing import draws, example_scene

WIDTH = 640
CSS = """
text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC", "Noto Sans CJK SC",
  "Microsoft YaHei", sans-serif; font-size: 19px; text-anchor: middle; dominant-baseline: central; fill: #1f2328; }
.bold { font-weight: 600; }
.small { font-size: 16.5px; }
.left { text-anchor: start; }
.soft { fill: #59636e; }
.ground { fill: #ffffff; stroke: #d1d9e0; }
.learns { fill: #ffffff; }
.arrow { stroke: #59636e; stroke-width: 2.5; fill: none; marker-end: url(#tip); }
.tip { fill: #59636e; }
rect.learns { fill: #b34d00; }
rect.frozen { fill: #e4e7eb; }
.hatch { stroke: #b4bac2; stroke-width: 1.5; }
rect.picture { fill: #cfe5f5; stroke: #0072b2; stroke-width: 2; }
rect.word { fill: #fbe0cf; stroke: #b34d00; stroke-width: 2; }
rect.plain { fill: #eef1f4; stroke: #8c959f; stroke-width: 2; }
.rim { fill: none; stroke: #0072b2; stroke-width: 2; }
rect.answer { fill: #cdeee2; stroke: #007a59; stroke-width: 2; }
text.picture { fill: #005a8f; }
.group { fill: none; stroke: #8c959f; stroke-width: 1.5; stroke-dasharray: 5 4; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; }
  .soft { fill: #9da7b1; }
  .ground { fill: #0d1117; stroke: #3d444d; }
  .arrow { stroke: #9da7b1; }
  .tip { fill: #9da7b1; }
  rect.frozen { fill: #2b3138; }
  .hatch { stroke: #4a525b; }
  rect.picture { fill: #0b3350; stroke: #58b0e8; }
  rect.word { fill: #4a2308; stroke: #f0863c; }
  rect.plain { fill: #1c2128; stroke: #6e7781; }
  .rim { stroke: #58b0e8; }
  rect.answer { fill: #06402f; stroke: #2fbf93; }
  text.picture { fill: #8dcbf3; }
  text.learns { fill: #ffffff; }
}
"""
DEFINITIONS = """
<marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="5" markerHeight="5" orient="auto-start-reverse">
<path class="tip" d="M0 0L10 5L0 10z"/></marker>
<pattern id="hatch" width="9" height="9" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">
<path class="hatch" d="M0 0V9"/></pattern>
"""


def svg(height: int, title: str, parts: list[str]) -> str:
    """title: what screen readers say."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
            f' role="img"><title>{escape(title)}</title>',
            f"<style>{CSS}</style><defs>{DEFINITIONS}</defs>",
            f'<rect class="ground" x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="12"/>',
            *parts,
            "</svg>\n",
        ]
    )


def text(x: float, y: float, words: str, style: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(words)}</text>'


def rectangle(x: float, y: float, width: float, height: float, style: str, radius: float = 8) -> str:
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"'
    hatch = f'<rect {place} fill="url(#hatch)"/>' if style == "frozen" else ""
    return f'<rect class="{style}" {place}/>{hatch}'


def box(x: float, y: float, width: float, height: float, style: str, *lines: str) -> str:
    """Lines of text in a rectangle, the first of them bold."""
    parts = [rectangle(x, y, width, height, style)]
    for i, line in enumerate(lines):
        at = y + height / 2 + 24 * (i - (len(lines) - 1) / 2)
        parts.append(text(x + width / 2, at, line, f"{'small' if i else 'bold'} {'learns' * (style == 'learns')}"))
    return "".join(parts)


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path class="arrow" d="M{x1:g} {y1:g}L{x2:g} {y2:g}"/>'


def scene_of(side: float) -> str:
    """The example scene as shapes of SVG in a square of `side`."""
    scene = example_scene()
    parts = [f'<rect width="{side}" height="{side}" fill="rgb{scene.tones[1]}"/>']
    for thing in scene.things:
        if thing.shape == "star":
            turns = [(math.pi * i / 5, 1.08 if i % 2 == 0 else 0.46) for i in range(10)]
            points = [(r * math.sin(turn), 0.08 - r * math.cos(turn)) for turn, r in turns]
        elif thing.shape == "triangle":
            points = [(0, -0.95), (1, 0.82), (-1, 0.82)]
        else:
            assert thing.shape == "square"
            points = [(-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82)]
        corners = [(thing.x + thing.radius * x, thing.y + thing.radius * y) for x, y in points]
        shown = " ".join(f"{side * x:.1f},{side * y:.1f}" for x, y in corners)
        parts.append(f'<polygon points="{shown}" fill="rgb{thing.rgb}" stroke="#333" stroke-width="{side / 90:.1f}"/>')
    return "".join(parts)


@draws("architecture.svg")
def architecture(say) -> str:
    """From a picture and a question to an answer: two lanes that meet where features overwrite embeddings."""
    left, right, lane, gap = 20, 330, 290, 20
    side, cell, step = 126, 34, 41
    one, other = left + side / 2, right + side / 2  # where the arrows of the lanes go down
    grid = "".join(f"M{9 * i} 0V{side}M0 {9 * i}H{side}" for i in range(1, 14))
    picture = f'<g id="scene">{scene_of(side)}</g>'
    parts = [
        f'<g transform="translate({left} {gap})">{picture}<path d="{grid}" stroke="#fff" stroke-opacity=".55"/></g>',
        text(left + side + 12, 45, "224 × 224", "left bold"),
        text(left + side + 12, 72, say("cut into", "切成"), "left small"),
        text(left + side + 12, 96, "14 × 14 = 196", "left small"),
        text(left + side + 12, 120, say("patches", "个图块"), "left small"),
        box(
            right,
            gap,
            lane,
            side,
            "word",
            say("question", "问题"),
            "<image>",
            say("What is in the top left?", "左上角是什么？"),
        ),
        arrow(one, 148, one, 178),
        arrow(other, 148, other, 178),
        box(left, 182, lane, 66, "frozen", "CLIP ViT-B/16", say("encoder, frozen", "编码器，冻结")),
        box(right, 182, lane, 66, "plain", "tokenizer", say("text → token ids", "文本 → 词元编号")),
        arrow(one, 250, one, 300),
        text(one + 12, 272, "196 × 768", "left small soft"),
        arrow(other, 250, other, 300),
        text(other + 12, 272, say("“@” × 196 + words", "“@” × 196 + 文字"), "left small soft"),
        box(left, 304, lane, 66, "learns", "VisionProj", say("one linear layer", "一个线性层")),
        box(right, 304, lane, 66, "learns", "embed_tokens", say("ids → vectors", "编号 → 向量")),
        arrow(one, 372, one, 422),
        text(one + 12, 394, "196 × hidden", "left small soft"),
        arrow(other, 372, other, 422),
        text(other + 12, 394, "T × hidden", "left small soft"),
    ]

    def tiles(start: float, y: float) -> None:
        """Three patches and the last one."""
        for i, patch in enumerate((43, 44, 45, None, 195)):
            x = start + step * i
            if patch is None:
                parts.append(text(x + cell / 2, y + cell / 2, "…", "bold"))
                continue
            row, column = divmod(patch, 14)
            view = f'viewBox="{9 * column} {9 * row} 9 9" x="{x:g}" y="{y}" width="{cell}" height="{cell}"'
            parts.append(f'<svg {view}><use href="#scene"/></svg>{rectangle(x, y, cell, cell, "rim", 3)}')

    def words(start: float, y: float) -> None:
        for i in range(2):
            parts.append(rectangle(start + step * i, y, cell, cell, "word", 3))

    tiles(left + 30, 426)
    for i in range(5):
        x = right + 5 + step * i
        if i == 3:
            parts.append(text(x + cell / 2, 426 + cell / 2, "…", "bold"))
        else:
            parts.append(
                rectangle(x, 426, cell, cell, "picture", 3) + text(x + cell / 2, 426 + cell / 2, "@", "picture")
            )
    words(right + 5 + 5 * step, 426)
    parts += [
        arrow(left + 30 + 5 * step, 443, right - 2, 443),
        text(left, 492, say("The features overwrite", "图块特征覆盖"), "left small"),
        text(left, 516, say("the embeddings of “@”.", "“@” 的词向量。"), "left small"),
        arrow(other, 462, other, 484),
    ]
    tiles(right + 5, 488)
    words(right + 5 + 5 * step, 488)
    blocks = "RMSNorm · RoPE · GQA · SwiGLU"
    parts += [
        arrow(other, 524, other, 546),
        box(left, 550, WIDTH - 2 * left, 66, "learns", say("MiniMind decoder", "MiniMind 解码器"), blocks),
        arrow(WIDTH / 2, 618, WIDTH / 2, 648),
        text(WIDTH / 2 + 12, 632, say("logits, one token at a time", "logits，逐个生成词元"), "left small soft"),
        box(170, 652, 300, 52, "answer", say("“a white star”", "“一个白色五角星”")),
    ]
    title = say(
        "MiniMind-V: a frozen CLIP turns a picture into 196 features, one linear layer projects them, they overwrite "
        "the embeddings of 196 placeholders in the question, and the decoder writes the answer",
        "MiniMind-V：冻结的 CLIP 把图片变成 196 个特征，线性层投影后覆盖问题中 196 个占位符的词向量，解码器生成回答",
    )
    return svg(724, title, parts)


def learning_parameters() -> tuple[int, int, int]:
    """Of the 26M model: what learns in stage 1, what learns in stage 2, all but the encoder."""
    import torch

    from model.model_vlm import MiniMindVLM, VLMConfig
    from trainer.optimizer import choose_trainable

    with torch.device("meta"):  # shapes only
        model, counts = MiniMindVLM(VLMConfig(), None), []
    for choice in ("last_layer", "all"):  # the defaults of the two scripts
        choose_trainable(model, choice)
        counts.append(sum(weight.numel() for weight in model.parameters() if weight.requires_grad))
    return *counts, sum(weight.numel() for weight in model.parameters())


@draws("stages.svg")
def stages(say) -> str:
    """What learns in each of the two stages at the 26M model's defaults: a row of boxes for each stage."""
    first, second, whole = (f"{count / 1e6:.1f}M" for count in learning_parameters())
    names = say("pretrain, on captions", "预训练，图片说明"), say("SFT, on conversations", "SFT，图片对话")
    parts = []
    for stage, (name, count, learns) in enumerate(zip(names, (first, second), ([7], range(8))), start=1):
        y = 26 + 158 * (stage - 1)
        head = say(f"Stage {stage}: {name}", f"第{'一二'[stage - 1]}阶段：{name}")
        parts += [
            text(20, y + 10, head, "left bold"),
            f'<text x="620" y="{y + 10}" class="small soft" style="text-anchor: end">'
            + say(f"{count} of {whole} learn", f"训练 {count} / {whole}")
            + "</text>",
            box(20, y + 42, 76, 66, "frozen", "CLIP"),
            arrow(98, y + 75, 112, y + 75),
            box(116, y + 42, 124, 66, "learns", "VisionProj"),
            arrow(242, y + 75, 256, y + 75),
            f'<rect class="group" x="260" y="{y + 34}" width="360" height="82" rx="10"/>',
            box(268, y + 42, 78, 66, "learns" if stage == 2 else "frozen", say("embed", "词向量")),
        ]
        for block in range(8):
            style = "learns" if block in learns else "frozen"
            x = 352 + 33 * block
            parts.append(rectangle(x, y + 42, 29, 66, style, 5))
            parts.append(text(x + 14.5, y + 75, str(block + 1), f"bold {'learns' * (style == 'learns')}"))
    parts += [
        rectangle(20, 344, 28, 24, "learns", 5),
        text(58, 356, say("learns", "训练"), "left small"),
        rectangle(128, 344, 28, 24, "frozen", 5),
        text(166, 356, say("frozen", "冻结"), "left small"),
        '<rect class="group" x="248" y="344" width="28" height="24" rx="5"/>',
        text(286, 356, say("decoder: embeddings, blocks 1 to 8", "解码器：词向量、第 1～8 层"), "left small"),
        text(20, 392, say("M: million parameters, CLIP not counted", "M：百万参数，不含 CLIP"), "left small soft"),
    ]
    title = say(
        "Stage 1 trains the projector and the decoder's last block, stage 2 the projector and the whole decoder; "
        "CLIP is frozen in both",
        "第一阶段训练投影层和解码器的最后一层，第二阶段训练投影层和整个解码器；CLIP 始终冻结",
    )
    return svg(414, title, parts)
