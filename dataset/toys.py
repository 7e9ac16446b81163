"""A second picture world, for fine-tuning: toys on a light background, with its own things, colours and wordings.

    python -m dataset.toys --out_dir out/toys                                  # 40,000 questions about 4,000 pictures
    python -m dataset.toys --out_dir out/mine --scenes 100 --rows 1 --kinds name       # 100 rows, a small data set

It gives a model trained on `dataset.scenes` something new to learn: houses, trees and fish instead of circles and
stars, pink and brown instead of red and blue, other questions, some with "not". A picture shows one large toy. The
encoder of model/tiny has never seen a toy, but its features suffice at this size; at half the size and any position,
one in six fails. The script writes out_dir/{train,val}.jsonl and out_dir/images/:

    {"conversations": [{"role": "user", "content": "Is no house present?\\n<image>"},
                       {"role": "assistant", "content": "yes"}], "image": "val_00007.jpg", "kind": "not", "lang": "en"}

Each question has one right answer in one form. Of all possible questions, the one with the rarest answer so far is
asked, so guessing without looking scores little (tests/test_toys.py measures it).
"""

if __spec__ is None:  # started by its path, where Python cannot import the other folders
    raise SystemExit("type -m dataset.toys instead of dataset/toys.py")

if __name__ == "__main__":
    from common.start import begin

    begin()  # from here on, Ctrl-C or a missing package gives one message

import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw

from dataset.scene_pictures import PATTERNS, grain, ground, save_jpeg
from dataset.scenes import check_numbers, refuse_to_overwrite

COLOURS = {
    "pink": (244, 140, 178),
    "brown": (134, 82, 42),
    "grey": (128, 128, 130),
    "cyan": (30, 196, 208),
    "navy": (24, 34, 104),
    "lime": (160, 216, 46),
}
# Parts of a toy, back to front: (form, brightness, corners or box), between -1 and 1, x to the right, y down.
TOYS = {
    "house": [
        ("polygon", 1, (-0.7, 0.95, -0.7, -0.1, 0.7, -0.1, 0.7, 0.95)),
        ("polygon", 0.6, (-0.95, -0.1, 0, -0.95, 0.95, -0.1)),
        ("polygon", 0.3, (-0.2, 0.95, -0.2, 0.3, 0.2, 0.3, 0.2, 0.95)),
    ],
    "tree": [
        ("polygon", 0.4, (-0.16, 0.95, -0.16, 0, 0.16, 0, 0.16, 0.95)),
        ("ellipse", 1, (-0.85, -0.5, 0.05, 0.4)),
        ("ellipse", 1, (-0.05, -0.5, 0.85, 0.4)),
        ("ellipse", 1, (-0.5, -0.95, 0.5, 0.15)),
    ],
    "fish": [
        ("polygon", 0.6, (0.3, 0, 0.95, -0.55, 0.95, 0.55)),
        ("ellipse", 1, (-0.95, -0.5, 0.55, 0.5)),
        ("ellipse", 0.2, (-0.68, -0.22, -0.46, 0)),
    ],
    "boat": [
        ("polygon", 0.4, (-0.06, 0.4, -0.06, -0.95, 0.06, -0.95, 0.06, 0.4)),
        ("polygon", 1.3, (0.12, -0.85, 0.75, 0.25, 0.12, 0.25)),
        ("polygon", 1, (-0.95, 0.35, 0.95, 0.35, 0.6, 0.9, -0.6, 0.9)),
    ],
    "car": [
        ("polygon", 0.6, (-0.55, 0, -0.35, -0.5, 0.35, -0.5, 0.6, 0)),
        ("polygon", 1, (-0.95, 0, 0.95, 0, 0.95, 0.5, -0.95, 0.5)),
        ("ellipse", 0.2, (-0.75, 0.25, -0.25, 0.75)),
        ("ellipse", 0.2, (0.25, 0.25, 0.75, 0.75)),
    ],
    "cup": [
        ("arc", 0.6, (0.1, -0.45, 0.95, 0.4)),
        ("polygon", 1, (-0.8, -0.75, 0.55, -0.75, 0.4, 0.8, -0.65, 0.8)),
        ("ellipse", 0.4, (-0.8, -0.92, 0.55, -0.58)),
    ],
}
VOCABULARY = """
pink 粉色, brown 棕色, grey 灰色, cyan 青色, navy 深蓝色, lime 黄绿色
house 房子, tree 树, fish 鱼, boat 船, car 汽车, cup 杯子, yes 对, no 不对
"""
CHINESE = dict(entry.split() for line in VOCABULARY.strip().splitlines() for entry in line.split(", "))
LANGS = ("en", "zh")
# Kind and form of a question, its wordings. {c}: a colour, {x}: a toy. Chinese questions ask whether a statement is
# right (对吗), because "yes" to a negative question would be ambiguous.
WORDINGS = """
name all   | Which toy is shown here?                   | 这里是哪个玩具？
           | Name the toy in this image.                | 说出图中的玩具。
color of   | Tell me the color of the {x}.              | 告诉我{x}的颜色。
           | What color was the {x} painted?            | {x}涂成了什么颜色？
toy of     | Which toy is {c}?                          | 哪个玩具是{c}的？
           | What is the {c} toy called?                | {c}的玩具叫什么？
has toy    | Does the image contain a {x}?              | 图中有{x}，对吗？
           | Is a {x} present?                          | 能找到{x}，对吗？
has color  | Does the image contain anything {c}?       | 图中有{c}的东西，对吗？
           | Is anything {c} present?                   | 能找到{c}的东西，对吗？
has both   | Does the image contain a {c} {x}?          | 图中有{c}的{x}，对吗？
           | Is a {c} {x} present?                      | 能找到{c}的{x}，对吗？
is of      | Does the {x} look {c}?                     | {x}看上去是{c}的，对吗？
           | Was the {x} painted {c}?                   | {x}涂成了{c}，对吗？
not of     | Does the {x} not look {c}?                 | {x}看上去不是{c}的，对吗？
           | Was the {x} not painted {c}?               | {x}没有涂成{c}，对吗？
not toy    | Does the image not contain a {x}?          | 图中没有{x}，对吗？
           | Is no {x} present?                         | 找不到{x}，对吗？
not both   | Does the image not contain a {c} {x}?      | 图中没有{c}的{x}，对吗？
           | Is no {c} {x} present?                     | 找不到{c}的{x}，对吗？
"""
# Share of rows, if a picture allows it. Yes and no can be guessed, so they are less than half.
KINDS = {"name": 2, "color": 2, "toy": 2, "has": 1.5, "is": 1, "not": 2}


def read_wordings() -> dict[tuple[str, str], list[dict[str, str]]]:
    """{(kind, form): [{"en": a question, "zh": the same}, ...]}"""
    wordings, form = {}, ("", "")
    for line in WORDINGS.strip().splitlines():
        head, english, chinese = (part.strip() for part in line.split("|"))
        form = tuple(head.split()) or form
        wordings.setdefault(form, []).append({"en": english, "zh": chinese})
    return wordings


ASK = read_wordings()

# ---------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Toy:
    """x, y: its centre; x, y and radius are fractions of the picture's side."""

    colour: str
    name: str
    x: float
    y: float
    radius: float


def random_toy(rng: random.Random) -> Toy:
    x, y, radius = rng.uniform(0.42, 0.58), rng.uniform(0.42, 0.58), rng.uniform(0.26, 0.4)
    return Toy(rng.choice(list(COLOURS)), rng.choice(list(TOYS)), x, y, radius)


def draw(toy: Toy, rng: random.Random, side: int) -> Image.Image:
    """The picture of a toy, RGB, side × side pixels, on a patterned background."""
    tone = tuple(rng.randint(222, 244) for _ in range(3))
    image = Image.new("RGB", (side, side), tone)
    image.paste(tuple(level - 22 for level in tone), mask=ground(*rng.choice(PATTERNS), side))
    image = image.resize((4 * side, 4 * side))  # draw it four times larger and scale it down, for smooth edges
    pen, shade = ImageDraw.Draw(image), rng.uniform(0.92, 1.08)
    for form, brightness, numbers in TOYS[toy.name]:
        middle = (toy.x, toy.y) * (len(numbers) // 2)
        points = [(at + toy.radius * number) * 4 * side for at, number in zip(middle, numbers)]
        rgb = tuple(min(255, round(level * brightness * shade)) for level in COLOURS[toy.colour])
        if form == "arc":
            pen.arc(points, 0, 360, rgb, width=round(toy.radius * side))
        else:
            getattr(pen, form)(points, rgb)
    left, top = rng.randrange(32), rng.randrange(32)
    noise = grain(side).crop((left, top, left + side, top + side))
    return ImageChops.add(image.resize((side, side), Image.Resampling.BOX), noise, offset=-128)


# ---------------------------------------------------------------------------- questions


def say(word: str, lang: str) -> str:
    return word if lang == "en" else CHINESE[word]


def claims(toy: Toy, form: str) -> list[tuple[str, str]]:
    """(colour, name) for questions with yes or no, "" if it does not matter. False pairs share the colour or the name
    of the toy."""
    if form == "toy":
        return [("", name) for name in TOYS]
    if form == "color":
        return [(colour, "") for colour in COLOURS]
    colours = [] if form == "of" else [(toy.colour, name) for name in TOYS if name != toy.name]
    return [(colour, toy.name) for colour in COLOURS] + colours


def answers(toy: Toy, kind: str, form: str, lang: str) -> Iterator[tuple[str, str, str]]:
    """All questions of a form: (colour, name, answer), the first two in English."""
    colour, name = say(toy.colour, lang), say(toy.name, lang)
    if kind in ("name", "color", "toy"):
        noun = f"a {colour} {name}" if lang == "en" else f"{colour}的{name}"
        yield toy.colour, toy.name, {"name": noun, "color": colour, "toy": name}[kind]
        return
    for colour, name in claims(toy, form):
        there = colour in ("", toy.colour) and name in ("", toy.name)
        yield colour, name, say("yes" if there != (kind == "not") else "no", lang)


def rows_of(toy: Toy, image: str, rng: random.Random, used: Counter, rows: int, kinds) -> list[dict]:
    """At most `rows` rows about a picture, no question twice, half of them Chinese.

    used: how often each answer occurred so far, by form of question and language; shared by a whole split.
    """
    forms = [each for each in ASK if each[0] in kinds]
    shares = [KINDS[kind] / sum(kind == other for other, _ in forms) for kind, _ in forms]
    chats, first = {}, rng.randrange(2)
    for _ in range(8 * rows):
        lang = LANGS[(first + len(chats)) % 2]
        kind, form = rng.choices(forms, shares)[0]
        possible = list(answers(toy, kind, form, lang))
        if len(chats) == rows:
            break
        rarest = min(used[kind, form, lang, answer] for *_, answer in possible)
        colour, name, answer = rng.choice([each for each in possible if used[kind, form, lang, each[2]] == rarest])
        wording = rng.choice(ASK[kind, form])[lang]
        question = wording.format(c=colour and say(colour, lang), x=name and say(name, lang))
        if question not in chats:
            used[kind, form, lang, answer] += 1
            asked = "\n".join(rng.sample(("<image>", question), 2))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
            chats[question] = {"conversations": turns, "image": image, "kind": kind, "lang": lang}
    return list(chats.values())


# ---------------------------------------------------------------------------- the world


def write_toys(out_dir, scenes=4000, val_scenes=400, rows=10, kinds=tuple(KINDS), image_size=72, seed=0) -> dict:
    """Writes train.jsonl, val.jsonl and images/ into out_dir; returns {split: number of rows}.

    The same arguments give the same bytes. The .jsonl files appear only when they are complete. Raises ValueError if
    one exists already.
    """
    out_dir, splits = Path(out_dir), {"train": scenes, "val": val_scenes}
    refuse_to_overwrite(out_dir, splits)
    (out_dir / "images").mkdir(parents=True, exist_ok=True)
    written = {}
    for split, count in splits.items():
        used, lines = Counter(), []
        for i in range(count):
            rng = random.Random(f"{seed} {split} {i}")
            toy, image = random_toy(rng), f"{split}_{i:05}.jpg"
            save_jpeg(draw(toy, rng, image_size), out_dir / "images" / image)
            lines += [json.dumps(row, ensure_ascii=False) for row in rows_of(toy, image, rng, used, rows, kinds)]
        text = "".join(f"{line}\n" for line in lines)
        (out_dir / f"{split}.jsonl.tmp").write_text(text, encoding="utf-8", newline="\n")
        written[split] = len(lines)
        print(f"{out_dir / split}.jsonl: {count:,} pictures, {len(lines):,} rows")
    for split in splits:
        (out_dir / f"{split}.jsonl.tmp").replace(out_dir / f"{split}.jsonl")
    return written


def main(argv=None):
    from common.cli import Parser, reason  # here, because write_toys() does not need it

    parser = Parser(__file__, "\n\n".join(__doc__.split("\n\n")[:2]))  # the rest is for readers of the code
    add = parser.start.add_argument
    add("--out_dir", type=Path, default=Path("out/toys"), help="output folder, created if needed")
    add("--scenes", type=int, default=4000, help="number of pictures for training")
    add("--val_scenes", type=int, default=400, help="number of pictures in val")
    add("--rows", type=int, default=10, help="questions per picture")
    kinds = f"kinds of questions to write: {', '.join(KINDS)}"
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help=kinds)
    add("--image_size", type=int, default=72, metavar="PIXELS", help="width and height of a picture, 32 to 1024")
    add("--seed", type=int, default=0, help="another number gives other pictures")
    args = parser.parse_args(argv)
    try:
        check_numbers(args)
        write_toys(**vars(args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {reason(error)}") from None


if __name__ == "__main__":
    main()
