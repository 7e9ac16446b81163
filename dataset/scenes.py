"""The built-in picture world: small scenes of coloured shapes, with conversations about them in English and Chinese.

    python -m dataset.scenes --out_dir out/scenes --scenes 12000 --val_scenes 400 --seed 0

Data for a model that starts from nothing, without any download. It writes what any data set of this repo consists of,
out_dir/{train,val,val_new}.jsonl and out_dir/images/, so that everything that reads them is the ordinary path:

    {"conversations": [{"role": "user", "content": "<image>\\nWhat colour is the star?"},
                       {"role": "assistant", "content": "purple"}],
     "image": "val_new_00007.jpg", "kind": "colour", "lang": "en"}

* `kind` and `lang` are there to split scores by; the reader leaves them alone.
* One question has one right answer in one form, so that exact match is fair. Where a picture cannot settle a question
  (which of two red circles? is it left of, or just about below?) the question is not asked.
* Among the questions a scene allows, the one whose answer was given least often so far is asked (`used`), so a model
  that never looks scores little: less than 20% (tests/test_scenes.py measures it).
* val holds other scenes of the same kind as train. Those of val_new have what no picture and no text of train has, a
  combination of colour and shape (NEW_PAIRS) or three of a shape in a corner (`is_new`), and all its questions are
  about that. Each colour and each shape for itself occurs in train.

--form captions writes a caption of every object, for contrastive training; --form text writes conversations with the
scene in words in place of the picture, for training on text. With the same seed the scenes are the same. Pictures are
in `dataset.scene_pictures`.
"""

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from io import BytesIO
from itertools import permutations
from pathlib import Path

from dataset.scene_pictures import COLOURS, NEW_PAIRS, OLD_PAIRS, SHAPES, Scene, Thing, draw, is_new, random_scene

# ---------------------------------------------------------------------------- words

VOCABULARY = """
red 红色, orange 橙色, yellow 黄色, green 绿色, blue 蓝色, purple 紫色, black 黑色, white 白色
circle 圆形, square 正方形, triangle 三角形, star 五角星, heart 爱心, cross 十字, ring 圆环, moon 月牙, object 图形
big 大, small 小, one 一个, two 两个, three 三个, four 四个, first 第一张, second 第二张, yes 是, no 不是
top left 左上角, top middle 上方, top right 右上角, middle left 左侧, middle 正中, middle right 右侧
bottom left 左下角, bottom middle 下方, bottom right 右下角
left of 左边, right of 右边, above 上面, below 下面, left 左边, right 右边
leftmost 最左边, rightmost 最右边, topmost 最上面, lowest 最下面
"""
MENTIONS = {  # form of a description: what it says of each thing, and whether it says where it is
    "short": (("colour", "shape"), False),
    "shapes": (("shape",), False),
    "sizes": (("size", "shape"), False),
    "layout": (("shape",), True),
    "places": (("colour", "shape"), True),
    "full": (("colour", "shape", "size"), True),
}
NUMBERS = ("one", "two", "three", "four")
SIDES = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}  # step in columns, in rows
MOST = {"leftmost": "left of", "rightmost": "right of", "topmost": "above", "lowest": "below"}
# kind, form of question, its wordings. {x} {y} objects, {ax} {xs} with "a" and in the plural, {p} a place, {d} a side,
# {m} leftmost and so on, {s} a size, {o} first or second.
WORDINGS = """
describe short   | Describe the picture briefly.                 | 简单描述这张图片。
                 | What is in the picture?                       | 图片里有什么？
                 | What can you see here?                        | 你看到了什么？
                 | List the objects, only colour and shape.      | 列出图形，只说颜色和形状。
                 | Write a short caption.                        | 写一个简短的标题。
describe shapes  | Which shapes are in the picture?              | 图片里有哪些形状？
                 | List only the shapes.                         | 只列出形状。
describe sizes   | List the shapes with their sizes.             | 列出形状和大小。
                 | Which shapes are there, big and small?        | 有哪些形状，是大是小？
describe layout  | Say which shape is where.                     | 说出哪个形状在哪里。
                 | List only the shapes and their places.        | 只列出形状和位置。
describe places  | Say what is where.                            | 说出什么在哪里。
                 | Name every object and its place.              | 说出每个图形和它的位置。
                 | List the objects with their places.           | 列出图形和位置。
describe full    | Describe the picture in detail.               | 详细描述这张图片。
                 | Describe size, colour, shape and place.       | 描述大小、颜色、形状和位置。
                 | Write a full caption, with sizes and places.  | 写一个完整的标题，包括大小和位置。
what at          | What is in the {p}?                           | {p}是什么？
                 | Which object is in the {p}?                   | {p}是哪个图形？
                 | Name the object in the {p}.                   | 说出{p}的图形。
what most        | What is the {m} object?                       | {m}的图形是什么？
                 | Name the {m} object.                          | 说出{m}的图形。
what shape       | What shape is the {x}?                        | {x}是什么形状？
                 | Name the shape of the {x}.                    | 说出{x}的形状。
colour of        | What colour is the {x}?                       | {x}是什么颜色？
                 | Which colour does the {x} have?               | {x}是哪种颜色？
                 | Name the colour of the {x}.                   | 说出{x}的颜色。
colour at        | What colour is the object in the {p}?         | {p}的图形是什么颜色？
                 | Which colour is in the {p}?                   | {p}是哪种颜色？
                 | Name the colour in the {p}.                   | 说出{p}的颜色。
count all        | How many objects are there?                   | 有几个图形？
                 | How many objects do you see?                  | 你看到几个图形？
                 | Count all the objects.                        | 数一数所有的图形。
count part       | How many {xs} are there?                      | 有几个{x}？
                 | Count the {xs}.                               | 数一数{x}。
count pair       | How many {xs} do you see?                     | 你看到几个{x}？
                 | How many {xs} does the picture show?          | 图片里有几个{x}？
where of         | Where is the {x}?                             | {x}在哪里？
                 | In which place is the {x}?                    | {x}在什么位置？
                 | Name the place of the {x}.                    | 说出{x}的位置。
                 | Where do you see the {x}?                     | 你在哪里看到{x}？
                 | Where in the picture is the {x}?              | {x}在图片的哪个位置？
                 | Find the {x} and name its place.              | 找到{x}，说出位置。
exists pair      | Is there {ax}?                                | 有{x}吗？
                 | Does the picture show {ax}?                   | 图中有没有{x}？
                 | Can you find {ax}?                            | 这里有{x}吗？
exists part      | Is there {ax} in the picture?                 | 图片里有{x}吗？
                 | Do you see {ax}?                              | 有没有{x}？
                 | Yes or no: is there {ax}?                     | 回答有或没有：有{x}吗？
relation is      | Is the {x} {d} the {y}?                       | {x}是在{y}的{d}吗？
                 | Yes or no: is the {x} {d} the {y}?            | {x}是不是在{y}的{d}？
relation side    | Is the {x} left of, right of, above or below the {y}? | {x}在{y}的左边、右边、上面还是下面？
                 | Left, right, above or below: where is the {x}, seen from the {y}? | {x}在{y}的哪一边？
relation what    | What is {d} the {y}?                          | {y}的{d}是什么？
                 | Which object is {d} the {y}?                  | {y}的{d}是哪个图形？
size of          | Is the {x} big or small?                      | {x}是大还是小？
                 | What size is the {x}, big or small?           | {x}有多大，大还是小？
size is          | Is the {x} bigger than the {y}?               | {x}是不是比{y}大？
                 | Yes or no: is the {x} bigger than the {y}?    | 是不是{x}比{y}大？
size which       | Which is bigger, the {x} or the {y}?          | {x}和{y}，哪个更大？
                 | What is bigger: the {x} or the {y}?           | 哪个更大，{x}还是{y}？
size only        | What is the only {s} object?                  | 唯一的{s}图形是什么？
                 | Only one object is {s}: which?                | 只有一个{s}图形，是哪个？
compare more     | Which picture has more objects, the first or the second?  | 哪张图片的图形更多，第一张还是第二张？
                 | Which has more objects, the first or the second picture?  | 第一张和第二张，哪张的图形更多？
compare has      | Which picture shows {ax}, the first or the second?        | 哪张图片有{x}，第一张还是第二张？
                 | Is there {ax} in the first or the second picture?         | 第一张和第二张，哪张有{x}？
compare colour   | What colour is the {x} in the {o} picture?                | {o}图片里的{x}是什么颜色？
                 | Look at the {o} picture: what colour is the {x}?          | 看{o}图片：{x}是什么颜色？
compare count    | How many objects are in the {o} picture?                  | {o}图片里有几个图形？
                 | Look at the {o} picture: how many objects are there?      | 看{o}图片：有几个图形？
"""
KINDS = {  # share of rows, as far as scenes allow; "multi" is a conversation of several questions
    "describe": 5,
    "what": 3,
    "colour": 3,
    "count": 6,
    "where": 3,
    "exists": 2,
    "relation": 5,
    "size": 4,
    "multi": 12,
    "compare": 2,
}
TURNS = ("what", "colour", "count", "where", "exists", "relation", "size")  # a description would give away the rest
LANGS = ("en", "zh")


def read_wordings(table: str) -> dict[str, dict[str, list[dict[str, str]]]]:
    """{kind: {form: [{"en": a question, "zh": the same}, ...]}}"""
    found = {}
    for line in table.strip().splitlines():
        head, english, chinese = (part.strip() for part in line.split("|"))
        if head:
            kind, form = head.split()
            wordings = found.setdefault(kind, {}).setdefault(form, [])
        wordings.append({"en": english, "zh": chinese})
    return found


ASK = read_wordings(WORDINGS)
CHINESE = dict(entry.rsplit(" ", 1) for line in VOCABULARY.strip().splitlines() for entry in line.split(", "))


def say(word: str, lang: str) -> str:
    return word if lang == "en" else CHINESE[word]


@cache
def name(lang: str, colour: str = "", shape: str = "", size: str = "") -> str:
    """A noun without article: "big red star", "红色的大五角星"; without shape "red object"; only shape "star"."""
    shape = shape or "object"
    if lang == "en":
        return " ".join(word for word in (size, colour, shape) if word)
    return (CHINESE[colour] + "的" if colour else "") + (CHINESE[size] if size else "") + CHINESE[shape]


def a(noun: str, lang: str) -> str:
    return noun if lang == "zh" else f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    return noun + ("es" if noun.endswith("s") else "s")


def several(number: int, noun: str, lang: str) -> str:
    """ "a red star", "two red stars"; "两个红色的五角星"."""
    if lang == "zh":
        return CHINESE[NUMBERS[number - 1]] + noun
    return a(noun, lang) if number == 1 else f"{NUMBERS[number - 1]} {plural(noun)}"


def join(parts: list[str], comma: str, last: str) -> str:
    return last.join(part for part in (comma.join(parts[:-1]), parts[-1]) if part)


# ---------------------------------------------------------------------------- questions
# Each function yields what can be asked about a scene in one form: (slots of the wording, answer, is it about a
# combination that is new).


def find(scene: Scene, colour: str = "", shape: str = "") -> list[Thing]:
    return [thing for thing in scene.things if colour in ("", thing.colour) and shape in ("", thing.shape)]


def named(scene: Scene, lang: str) -> list[tuple[Thing, str]]:
    """The things that colour and shape tell from all others, with these for a name."""
    return [
        (thing, name(lang, thing.colour, thing.shape))
        for thing in scene.things
        if len(find(scene, thing.colour, thing.shape)) == 1
    ]


def beyond(thing: Thing, other: Thing, side: str) -> bool:
    """Is it clearly on this side of the other, that is, in another column (or row)?"""
    column, row = SIDES[side]
    return (thing.column - other.column) * column + (thing.row - other.row) * row > 0


def caption(scene: Scene, lang: str, form: str) -> str:
    """The one right description in this form of "describe", in reading order; without places alike ones are counted."""
    said, with_places = MENTIONS[form]
    nouns = [name(lang, **{each: getattr(thing, each) for each in said}) for thing in scene.things]
    if not with_places:
        parts = [several(number, noun, lang) for noun, number in Counter(nouns).items()]
        return join(parts, *((", ", " and ") if lang == "en" else ("、", "和")))
    if lang == "zh":
        return "，".join(f"{CHINESE[thing.place]}有一个{noun}" for noun, thing in zip(nouns, scene.things))
    return join([f"{a(noun, lang)} in the {thing.place}" for noun, thing in zip(nouns, scene.things)], ", ", " and ")


def describe(scene, form, lang):
    yield {}, caption(scene, lang, form), "colour" in MENTIONS[form][0]


def what(scene, form, lang):
    for thing in scene.things:
        answer = a(name(lang, thing.colour, thing.shape), lang)
        if form == "at":
            yield {"p": say(thing.place, lang)}, answer, thing.new
        elif form == "shape" and len(find(scene, thing.colour)) == 1:
            yield {"x": name(lang, thing.colour)}, say(thing.shape, lang), thing.new
        elif form == "most" and len(scene.things) > 1:
            for word, side in MOST.items():
                if all(beyond(thing, other, side) for other in scene.things if other is not thing):
                    yield {"m": say(word, lang)}, answer, thing.new


def colour(scene, form, lang):
    for thing in scene.things:
        if form == "at":
            yield {"p": say(thing.place, lang)}, say(thing.colour, lang), thing.new
        elif len(find(scene, shape=thing.shape)) == 1:
            yield {"x": say(thing.shape, lang)}, say(thing.colour, lang), thing.new


def count(scene, form, lang):
    if form == "all":
        yield {}, say(NUMBERS[len(scene.things) - 1], lang), False
        return
    looks = [(thing.colour, thing.shape) for thing in scene.things]
    if form == "part":
        looks = [(colour, "") for colour, _ in looks] + [("", shape) for _, shape in looks]
    for look in dict.fromkeys(looks):
        found, noun = find(scene, *look), name(lang, *look)
        yield {"x": noun, "xs": plural(noun)}, say(NUMBERS[len(found) - 1], lang), is_new(found)


def where(scene, form, lang):
    for thing, noun in named(scene, lang):
        yield {"x": noun}, say(thing.place, lang), thing.new


def exists(scene, form, lang, rng, new):
    """Of what is not there, half has the colour of one thing and the shape of another."""
    if form == "pair":  # what is new is not even denied in train
        pairs = [(one.colour, other.shape) for one in scene.things for other in scene.things]
        pairs.append(rng.choice(sorted(NEW_PAIRS) if new else OLD_PAIRS))
        pairs = [pair for pair in pairs if (pair in NEW_PAIRS) == new]
    else:
        colours, shapes = [thing.colour for thing in scene.things], [thing.shape for thing in scene.things]
        pairs = [(colour, "") for colour in (*colours, rng.choice(list(COLOURS)))]
        pairs += [("", shape) for shape in (*shapes, rng.choice(SHAPES))]
    for pair in dict.fromkeys(pairs):
        noun, (no, yes) = name(lang, *pair), ("no", "yes") if lang == "en" else ("没有", "有")
        yield {"x": noun, "ax": a(noun, lang)}, yes if find(scene, *pair) else no, form == "pair"


def relation(scene, form, lang):
    known = named(scene, lang)
    if form == "what":
        for thing, noun in known:
            others = [other for other in scene.things if other is not thing]
            for side in SIDES:
                found = [other for other in others if beyond(other, thing, side)]
                if len(found) == 1 and all(beyond(thing, other, side) for other in others if other is not found[0]):
                    answer = a(name(lang, found[0].colour, found[0].shape), lang)
                    yield {"y": noun, "d": say(side, lang)}, answer, thing.new or found[0].new
        return
    for (one, x), (other, y) in permutations(known, 2):
        sides = [side for side in SIDES if beyond(one, other, side)]
        if form == "is":
            for side in SIDES:
                if side in sides or beyond(other, one, side):
                    answer = say("yes" if side in sides else "no", lang)
                    yield {"x": x, "y": y, "d": say(side, lang)}, answer, one.new or other.new
        elif len(sides) == 1:
            yield {"x": x, "y": y}, say(sides[0].removesuffix(" of"), lang), one.new or other.new


def size(scene, form, lang):
    known = named(scene, lang)
    if form == "of":
        for thing, noun in known:
            yield {"x": noun}, say(thing.size, lang), thing.new
    elif form == "only":
        sizes = Counter(thing.size for thing in scene.things)
        for thing in scene.things:
            if sizes[thing.size] == 1 < len(scene.things):
                answer = a(name(lang, thing.colour, thing.shape), lang)
                yield {"s": say(thing.size, lang)}, answer, thing.new
    else:
        for (one, x), (other, y) in permutations(known, 2):
            if one.size != other.size:
                bigger = x if one.size == "big" else y
                which = f"the {bigger}" if lang == "en" else bigger
                answer = which if form == "which" else say("yes" if bigger == x else "no", lang)
                yield {"x": x, "y": y}, answer, one.new or other.new


def compare(scenes, form, lang):
    counts = [len(scene.things) for scene in scenes]
    if form == "more":
        if counts[0] != counts[1]:
            yield {}, which_picture(counts[1] > counts[0], lang), False
        return
    for second, scene in enumerate(scenes):
        o = {"o": say("second" if second else "first", lang)}
        if form == "count":
            yield o, say(NUMBERS[counts[second] - 1], lang), False
            continue
        for thing in scene.things:
            noun = name(lang, thing.colour, thing.shape)
            if form == "has" and not find(scenes[1 - second], thing.colour, thing.shape):
                yield {"x": noun, "ax": a(noun, lang)}, which_picture(second, lang), thing.new
            elif form == "colour" and len(find(scene, shape=thing.shape)) == 1:
                yield o | {"x": say(thing.shape, lang)}, say(thing.colour, lang), thing.new


def which_picture(second: bool, lang: str) -> str:
    return ("the " if lang == "en" else "") + say("second" if second else "first", lang)


QUESTIONS = {function.__name__: function for function in (describe, what, colour, count, where, relation, size)}


def ask(scenes, kind: str, lang: str, rng, used: Counter, new: bool) -> tuple[str, str] | None:
    """A question of this kind about the scene (two to compare) with its answer; None where there is none to ask.

    used: how often each answer was given so far, by form of question and language; the rarest that is possible now is
    asked for.
    """
    form = rng.choice(list(ASK[kind]))
    if kind == "exists":
        found = exists(scenes[0], form, lang, rng, new)
    elif kind == "compare":
        found = compare(scenes, form, lang)
    else:
        found = QUESTIONS[kind](scenes[0], form, lang)
    found = [(slots, answer) for slots, answer, about_new in found if about_new or not new]
    if not found:
        return None
    key = (kind, form, lang)
    rarest = min(used[key, answer] for _, answer in found)
    slots, answer = rng.choice([(slots, answer) for slots, answer in found if used[key, answer] == rarest])
    if "count" in (kind, form) and rarest > min(used[key, say(each, lang)] for each in NUMBERS) + 2:
        return None  # most scenes hold one of most things: "one" waits for the others
    used[key, answer] += 1
    return rng.choice(ASK[kind][form])[lang].format(**slots), answer


# ---------------------------------------------------------------------------- rows


def rows_of(scene, image: str, rng, used: Counter, rows=4, kinds=tuple(KINDS), new=False, other=None) -> list[dict]:
    """Conversations about a scene, half of them Chinese, in the format of the module's docstring; `rows` of them, fewer
    where the scene allows fewer.

    Args:
        image: the name of its picture.
        rng: random.Random.
        used: see `ask`; one for a whole split.
        kinds: the keys of KINDS to choose from.
        new: for val_new, ask only about what is_new.
        other: (scene, name of the picture) to compare with; without it there is no "compare".
    """
    kinds = [kind for kind in kinds if kind != "compare" or other]
    weights = [KINDS[kind] for kind in kinds]
    found, questions, first = [], set(), rng.randrange(2)
    for _ in range(8 * rows if kinds else 0):
        lang = LANGS[(first + len(found)) % 2]
        kind = rng.choices(kinds, weights)[0]
        shown = [(scene, image)]
        if kind == "compare":
            shown.insert(rng.randrange(2), other)
        turns = rng.choices(TURNS, k=rng.randint(2, 8)) if kind == "multi" else [kind]
        asked = [ask([each for each, _ in shown], turn, lang, rng, used, new) for turn in turns]
        asked = list(dict.fromkeys(pair for pair in asked if pair))
        if len(asked) < (2 if kind == "multi" else 1) or not questions.isdisjoint(asked):
            continue
        questions.update(asked)
        chat = []
        for question, answer in asked:
            chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        tags = "\n".join(["<image>"] * len(shown))
        parts = [tags, chat[0]["content"]]
        chat[0]["content"] = "\n".join(parts if kind == "compare" or rng.random() < 0.5 else parts[::-1])
        names = ", ".join(picture for _, picture in shown)
        found.append({"conversations": chat, "image": names, "kind": kind, "lang": lang})
        if len(found) == rows:
            break
    return found


def describe_in_words(scene: Scene, lang: str) -> str:
    """Everything in the picture that can be asked about, in the order of its patches."""
    colon, comma = (": ", "; ") if lang == "en" else ("：", "；")
    nouns = [name(lang, thing.colour, thing.shape, thing.size) for thing in scene.things]
    return comma.join(say(thing.place, lang) + colon + noun for noun, thing in zip(nouns, scene.things))


def captions_of(scene: Scene, image: str) -> list[dict]:
    """For each thing rows in each language that say what it is and where: "a big red star in the middle", and without
    the colour "a star in the middle": an encoder must know a shape in a colour that it never had.
    """
    said = [
        (lang, caption(replace(scene, things=(thing,)), lang, form))
        for thing in scene.things
        for form in ("full", "layout")
        for lang in LANGS
    ]
    return [
        {
            "conversations": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": text}],
            "image": image,
            "kind": "caption",
            "lang": lang,
        }
        for lang, text in said
    ]


def text_rows_of(scene, rng, used, rows=4, kinds=tuple(KINDS), new=False, other=None) -> list[dict]:
    """As `rows_of`, with each picture in words instead, so without "image"; other: a scene to compare with."""
    scenes = {"one": scene, "two": other}
    found = rows_of(scene, "one", rng, used, rows, kinds, new, other and (other, "two"))
    for row in found:
        for picture in row.pop("image").split(", "):
            words = describe_in_words(scenes[picture], row["lang"])
            row["conversations"][0]["content"] = row["conversations"][0]["content"].replace("<image>", words, 1)
    return found


def scenes_of(split: str, count: int, seed: int) -> Iterator[Scene]:
    """The scenes of "train", "val" or "val_new". Each has its own seed, so more of them leave the first ones as are."""
    for i in range(count):
        yield random_scene(random.Random(f"{seed} {split} {i}"), new=split == "val_new")


def write_world(
    out_dir, scenes=12000, val_scenes=400, seed=0, image_size=64, rows=4, kinds=tuple(KINDS), form="chat"
) -> dict:
    """Writes train.jsonl, val.jsonl, val_new.jsonl and images/ into out_dir; returns {split: number of rows}.

    Same arguments, same bytes. Other rows or kinds show the same scenes. A .jsonl stands there only when complete.
    form: "chat", conversations; "text", with scenes in words and without images/; "captions", see `captions_of`.
    """
    out_dir = Path(out_dir)
    (out_dir if form == "text" else out_dir / "images").mkdir(parents=True, exist_ok=True)
    written = {}
    for split, count in (("train", scenes), ("val", val_scenes), ("val_new", val_scenes)):
        start, used, other, written[split] = time.perf_counter(), Counter(), None, 0
        beside = out_dir / f"{split}.jsonl.tmp"
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            for i, scene in enumerate(scenes_of(split, count, seed)):
                rng = random.Random(f"{seed} {split} {i} rows")
                if form == "text":
                    found = text_rows_of(scene, rng, used, rows, kinds, split == "val_new", other)
                    other = scene
                else:
                    image = f"{split}_{i:05}.jpg"
                    jpeg = BytesIO()
                    draw(scene, image_size).save(jpeg, "JPEG", quality=92, subsampling=0)
                    (out_dir / "images" / image).write_bytes(jpeg.getvalue())
                    if form == "captions":
                        found = captions_of(scene, image)
                    else:
                        found = rows_of(scene, image, rng, used, rows, kinds, split == "val_new", other)
                    other = (scene, image)
                for row in found:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written[split] += len(found)
        beside.replace(out_dir / f"{split}.jsonl")
        rate = count / (time.perf_counter() - start)
        print(f"{out_dir / split}.jsonl: {count:,} scenes, {written[split]:,} rows, {rate:,.0f} scenes/s")
    return written


# ---------------------------------------------------------------------------- the run


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out_dir", type=Path, default=Path("out/scenes"), help="folder to write to, made if needed")
    parser.add_argument("--scenes", type=int, default=12000, help="pictures to train on, number")
    parser.add_argument("--val_scenes", type=int, default=400, help="pictures of val, and of val_new, number")
    parser.add_argument("--seed", type=int, default=0, help="another number, another world")
    parser.add_argument("--image_size", type=int, default=64, help="side of a picture, pixels, 32 to 1024")
    parser.add_argument("--rows", type=int, default=4, help="conversations about a picture, number")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of conversation to write")
    forms = "chat, for a VLM; text, in which words take the place of pictures, for an LLM; captions, for an encoder"
    parser.add_argument("--form", choices=("chat", "text", "captions"), default="chat", help=forms)
    args = parser.parse_args(argv)
    try:
        limits = {"scenes": (1, 10**6), "val_scenes": (1, 10**6), "image_size": (32, 1024), "rows": (1, 20)}
        for flag, (least, most) in limits.items():
            if not least <= getattr(args, flag) <= most:
                raise ValueError(f"--{flag} {getattr(args, flag)}: expected {least} to {most}")
        write_world(**vars(args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:  # what is complete stays, and the same command draws the rest anew
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
