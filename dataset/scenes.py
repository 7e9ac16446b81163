"""The built-in picture world: small scenes of coloured shapes, with conversations about them in English and Chinese.

    python -m dataset.scenes --out_dir out/scenes --scenes 12000 --seed 0

Data for a model that starts from nothing, without any download. It writes what any data set of this repo consists of,
{train,val,val_wording,val_new}.jsonl and images/ in out_dir, so that everything that reads them is the ordinary path:

    {"conversations": [{"role": "user", "content": "<image>\\nWhat colour is the star?"},
                       {"role": "assistant", "content": "the star is purple"}],
     "image": "val_new_00007.jpg", "kind": "colour", "lang": "en"}

* `kind` (of a conversation: of each question) and `lang` are there to split scores by; the reader leaves them alone.
* One question has one right answer in one form, so that exact match is fair. Where a picture cannot settle a question
  (which of two red circles? is it left of, or just about below?) the question is not asked.
* Among the questions a scene allows, the one whose answer was given least often so far is asked (`used`), so a model
  that never looks scores little: about a fifth (tests/test_scenes.py measures it).
* val holds other scenes of the same kind as train; val_wording asks the same about them, in wordings that train never
  has (`dataset.scene_wordings`). The scenes of val_new have what no picture and no text of train has, a combination of
  colour and shape (NEW_PAIRS) or three of a shape in a corner (`is_new`), and all its questions are about that. Each
  colour and each shape for itself occurs in train.

--form captions writes a caption of every object, for contrastive training, where one in five objects of train is in a
shade that no word is for; --form text writes conversations with the scene in words in place of the picture, for
training on text. With the same seed the scenes are the same. Pictures are in `dataset.scene_pictures`.
"""

if __spec__ is None:  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m dataset.scenes instead of dataset/scenes.py")

if __name__ == "__main__":
    from common.start import begin

    begin()  # Ctrl-C or a missing package is one sentence from here on

import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path

from dataset.scene_pictures import (
    COLOURS,
    NEW_PAIRS,
    OLD_PAIRS,
    PLACES,
    SHAPES,
    Scene,
    Thing,
    draw,
    is_new,
    random_scene,
    save_jpeg,
    without_colour,
)
from dataset.scene_wordings import Words, plural, wordings

# ---------------------------------------------------------------------------- words

VOCABULARY = """
red 红色, orange 橙色, yellow 黄色, green 绿色, blue 蓝色, purple 紫色, black 黑色, white 白色
circle 圆形, square 方块, triangle 三角, star 星星, heart 爱心, cross 十字, ring 圆环, moon 月亮, object 图形
big 大, small 小, one 一个, two 两个, three 三个, four 四个, first 第一张, second 第二张
top left 左上角, top middle 上方, top right 右上角, middle left 左侧, middle 正中, middle right 右侧
bottom left 左下角, bottom middle 下方, bottom right 右下角
left 左边, right 右边, above 上面, below 下面
left or right of 左边还是右边, above or below 上面还是下面
"""
ANSWERS = {  # that are the same for every scene
    "greet": {
        "en": "hello, I can tell you about the shapes in a picture: colour, size, place and number",
        "zh": "你好，我能回答图片里图形的颜色、大小、位置和数量",
    },
    "blind": {"en": "there is no picture, please show me one", "zh": "没有图片，请先给我一张"},
}
NO_YES = {"en": ("no", "yes"), "zh": ("没有", "有")}  # is it there?
IS_SO = {"en": ("no", "yes"), "zh": ("不是", "是")}
NUMBERS = ("one", "two", "three", "four")
SIDES = {"left": "left of", "right": "right of"}  # in English, before a noun
AXES = {"left or right of": ("left", "right"), "above or below": ("above", "below")}
EACH = {  # what "each" asks of one object, and how it calls it in English
    "colour": ("colour", "of", "the {x}"),
    "shape": ("what", "shape", "the {x}"),
    "place": ("where", "of", "the {x}"),
    "size": ("size", "of", "the {x}"),
    "object": ("what", "at", "the {p}"),
    "exists": ("exists", "", "{ax}"),
    "count": ("count", "part", "{xs}"),
    "check": ("check", "", "the {x} {v}"),
}
LOOK_UPS = ("colour", "shape", "place", "size", "object")  # the lists that say what things are like
KINDS = {  # share of rows, as far as scenes allow; "multi" is a conversation of several questions, "each" of lists
    "describe": 6,
    "what": 3,
    "colour": 3,
    "count": 6,
    "where": 3,
    "exists": 3,
    "relation": 5,
    "size": 4,
    "check": 4,
    "multi": 13,
    "compare": 5,
    "greet": 1,
    "blind": 1,
    "each": 5,
}
USUAL = tuple(kind for kind in KINDS if kind != "each")  # that is for practice: all objects looked up, one by one
TURNS = (
    "what",
    "colour",
    "count",
    "where",
    "exists",
    "relation",
    "size",
    "check",
)  # a description would give away the rest
LENGTH = (4, 12)  # questions drawn for a conversation; those that cannot be asked, or come twice, fall away
LANGS = ("en", "zh")


CHINESE = dict(entry.rsplit(" ", 1) for line in VOCABULARY.strip().splitlines() for entry in line.split(", "))


def say(word: str, lang: str) -> str:
    return word if lang == "en" else CHINESE[word]


@cache
def name(lang: str, colour: str = "", shape: str = "", size: str = "") -> str:
    """A noun without article: "big red star", "大红星星"; without shape "red object", "红色图形"; only shape "star"."""
    if lang == "en":
        return " ".join(word for word in (size, colour, shape or "object") if word)
    if not shape:
        return CHINESE.get(size, "") + CHINESE.get(colour, "") + CHINESE["object"]
    return CHINESE.get(size, "") + CHINESE.get(colour, "")[:1] + CHINESE[shape]


def a(noun: str, lang: str) -> str:
    return noun if lang == "zh" else f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def join(parts: list[str], comma: str, last: str) -> str:
    return last.join(part for part in (comma.join(parts[:-1]), parts[-1]) if part)


# ---------------------------------------------------------------------------- questions
# Each function yields what can be asked about a scene in one form: (slots of the wording, answer, is it about a
# combination that is new).


def find(scene: Scene, colour: str = "", shape: str = "", size: str = "") -> list[Thing]:
    look = {"colour": colour, "shape": shape, "size": size}
    return [thing for thing in scene.things if all(look[of] in ("", getattr(thing, of)) for of in look)]


def named(scene: Scene, lang: str) -> list[tuple[Thing, str]]:
    """The things that a name tells from all others: their shape if no other has it, else colour and shape."""
    found = []
    for thing in scene.things:
        for look in ({"shape": thing.shape}, {"shape": thing.shape, "colour": thing.colour}):
            if len(find(scene, **look)) == 1:
                found.append((thing, name(lang, **look)))
                break
    return found


def caption(scene: Scene, lang: str, full: bool = True, colour: bool = True) -> str:
    """What there is, in reading order: "a red star and a blue ring"; full: "a big red star in the middle".

    Things that look alike are not put together ("two red stars"): to group them is what the model did worst.
    """
    nouns = [
        name(lang, thing.colour if colour else "", thing.shape, thing.size if full and colour else "")
        for thing in scene.things
    ]
    if not full:
        parts = [f"一个{noun}" if lang == "zh" else a(noun, lang) for noun in nouns]
        return join(parts, *((", ", " and ") if lang == "en" else ("、", "和")))
    if lang == "zh":
        return "，".join(f"{CHINESE[thing.place]}有一个{noun}" for noun, thing in zip(nouns, scene.things))
    return join([f"{a(noun, lang)} in the {thing.place}" for noun, thing in zip(nouns, scene.things)], ", ", " and ")


# Answers repeat what was asked about before they say what is asked for, and where two things are compared, they say
# first what is known of each. A small model answers word by word: it looks up a thing best right after naming it, and
# compares what it has already said far sooner than what it would have to keep in mind.


def state(lang: str, x: str, english: str, chinese: str, y: str) -> str:
    return (english if lang == "en" else chinese).format(x=x, y=y)


def is_where(thing: Thing, x: str, lang: str) -> str:
    return state(lang, x, "the {x} is in the {y}", "{x}在{y}", say(thing.place, lang))


def has_size(thing: Thing, x: str, lang: str) -> str:
    return state(lang, x, "the {x} is {y}", "{x}是{y}的", say(thing.size, lang))


def conclude(known: list[str], answer: str, lang: str) -> str:
    """ "the star is big, the ring is small: the star" """
    return ", ".join(known) + f": {answer}" if lang == "en" else "，".join(known) + f"：{answer}"


def conclusion(answer: str) -> str:
    """The last part of an answer that ends so, "the star"; else all of it."""
    return answer.replace("：", ": ").rsplit(": ", 1)[-1]


def describe(scene, form, lang):
    if form == "list":
        yield {}, listing(scene, lang), True
    else:
        yield {}, caption(scene, lang, form == "full"), True


def listing(scene: Scene, lang: str) -> str:
    """ "star red big top left, ring blue small middle": the shape first, from which captions never go to the colour."""
    between, comma = (" ", ", ") if lang == "en" else ("", "，")
    looks = [(thing.shape, thing.colour, thing.size, thing.place) for thing in scene.things]
    return comma.join(between.join(say(word, lang) for word in words) for words in looks)


def what(scene, form, lang):
    for thing in scene.things:
        if form == "at":
            place, noun = say(thing.place, lang), a(name(lang, thing.colour, thing.shape), lang)
            yield {"p": place}, state(lang, place, "in the {x} is {y}", "{x}是{y}", noun), thing.new
        elif len(find(scene, thing.colour)) == 1:
            x, shape = name(lang, thing.colour), a(say(thing.shape, lang), lang)
            yield {"x": x}, state(lang, x, "the {x} is {y}", "{x}是{y}", shape), thing.new


def colour(scene, form, lang):
    for thing in scene.things:
        if len(find(scene, shape=thing.shape)) == 1:
            x = say(thing.shape, lang)
            yield {"x": x}, state(lang, x, "the {x} is {y}", "{x}是{y}", say(thing.colour, lang)), thing.new


def each(scene, form, lang, rng, new):
    """One question about all that a question of this form can be asked about, in any order.

    Where most answers would be the same ("no", "one"), about some: as many of those as of the others.
    """
    kind, of_one, one = EACH[form]
    if kind == "exists":
        found = list(exists(scene, "some", lang, rng, False))
    elif kind == "check":  # one question of each form about a thing: its answer would tell the answer of another
        of_one_thing = {}
        for of_one in wordings()["check"]:
            for asked in check(scene, of_one, lang, rng, new):
                of_one_thing.setdefault((of_one, asked[0]["x"]), []).append(asked)
        found = [rng.choice(asked) for asked in of_one_thing.values()]
    else:
        found = list(QUESTIONS[kind](scene, of_one, lang))
    rng.shuffle(found)
    if kind in ("exists", "count", "check"):
        usual = {"exists": NO_YES[lang][0], "count": say("one", lang), "check": IS_SO[lang][0]}[kind]
        rare = [asked for asked in found if conclusion(asked[1]) != usual][:3]
        found = rare + [asked for asked in found if conclusion(asked[1]) == usual][: max(2, len(rare))]
        rng.shuffle(found)
    if len(found) > 1:
        said_of = one if lang == "en" else "{x}{v}" if kind == "check" else "{p}" if form == "object" else "{x}"
        them = [said_of.format(**slots) for slots, _, _ in found]
        joined = join(them, *((", ", " and ") if lang == "en" else ("、", "和")))
        said = (", " if lang == "en" else "，").join(answer for _, answer, _ in found)
        yield {"them": joined}, said, any(new for _, _, new in found)


def count(scene, form, lang):
    if form == "all":
        everything = "objects" if lang == "en" else say("object", lang)
        yield {}, conclude([everything], say(NUMBERS[len(scene.things) - 1], lang), lang), False
        return
    looks = [(thing.colour, "") for thing in scene.things] + [("", thing.shape) for thing in scene.things]
    for look in dict.fromkeys(looks):
        found, noun = find(scene, *look), name(lang, *look)
        answer = conclude([plural(noun) if lang == "en" else noun], say(NUMBERS[len(found) - 1], lang), lang)
        yield {"x": noun, "xs": plural(noun)}, answer, is_new(found)


def where(scene, form, lang):
    for thing, x in named(scene, lang):
        yield {"x": x}, is_where(thing, x, lang), thing.new


def exists(scene, form, lang, rng, new):
    """Of what is not there, half has the colour of one thing and the shape of another.

    form: "pair" of colour and shape; "part", one of them; "some" for lists, parts and pairs of size and shape. Lists
    of pairs of colour and shape taught that what they never name, as the pairs of val_new, is not there.
    """
    if form == "pair":  # what is new is not even denied in train
        pairs = [(one.colour, other.shape) for one in scene.things for other in scene.things]
        pairs.append(rng.choice(sorted(NEW_PAIRS) if new else OLD_PAIRS))
        pairs = [pair for pair in pairs if (pair in NEW_PAIRS) == new]
    else:
        colours, shapes = [thing.colour for thing in scene.things], [thing.shape for thing in scene.things]
        pairs = [(colour, "") for colour in (*colours, rng.choice(list(COLOURS)))]
        pairs += [("", shape) for shape in (*shapes, rng.choice(SHAPES))]
    if form == "some":
        pairs += [("", thing.shape, size) for thing in scene.things for size in ("big", "small")]
    for pair in dict.fromkeys(pairs):
        noun = name(lang, *pair)
        answer = conclude([a(noun, lang)], NO_YES[lang][bool(find(scene, *pair))], lang)
        yield {"x": noun, "ax": a(noun, lang), "xs": plural(noun)}, answer, form == "pair"


def relation(scene, form, lang):
    """Left or right, above or below: not yes or no, which small models still guess after 60,000 such questions."""
    for (one, x), (other, y) in permutations(named(scene, lang), 2):
        for axis, sides in AXES.items():
            step = one.column - other.column if axis == "left or right of" else one.row - other.row
            if step:
                known = [is_where(one, x, lang), is_where(other, y, lang)]
                answer = conclude(known, say(sides[step > 0], lang), lang)
                for side in sides:  # some wordings ask about one of the two
                    of_side = SIDES.get(side, side) if lang == "en" else say(side, lang)
                    slots = {"x": x, "y": y, "d": say(axis, lang), "s": of_side}
                    yield slots, answer, one.new or other.new


def size(scene, form, lang):
    if form == "of":
        for thing, x in named(scene, lang):
            yield {"x": x}, has_size(thing, x, lang), thing.new
        return
    for (one, x), (other, y) in permutations(named(scene, lang), 2):
        if one.size != other.size:
            bigger = x if one.size == "big" else y
            known = [has_size(one, x, lang), has_size(other, y, lang)]
            answer = conclude(known, f"the {bigger}" if lang == "en" else bigger, lang)
            yield {"x": x, "y": y}, answer, one.new or other.new


def check(scene, form, lang, rng, new):
    """Is it so? Half the time not; then often as another thing there is. First comes what it is, then yes or no."""
    values = {"colour": list(COLOURS), "shape": SHAPES, "size": ("big", "small"), "place": sum(PLACES, ())}[form]
    if form == "colour":
        asked_about = [
            (thing, say(thing.shape, lang)) for thing in scene.things if len(find(scene, "", thing.shape)) == 1
        ]
    elif form == "shape":
        asked_about = [
            (thing, name(lang, thing.colour)) for thing in scene.things if len(find(scene, thing.colour)) == 1
        ]
    else:
        asked_about = named(scene, lang)
    for thing, x in asked_about:
        true = getattr(thing, form)
        others = [getattr(other, form) for other in scene.things] if rng.random() < 0.5 else values
        others = [value for value in others if value != true] or [value for value in values if value != true]
        for value in (true, rng.choice(others)):
            look = {"colour": thing.colour, "shape": thing.shape} | {form: value}
            asked_new = (look["colour"], look["shape"]) in NEW_PAIRS
            if asked_new and not new:  # what is new is not even denied in train
                continue
            is_so = "the {x} is {y}" if lang == "en" else "{x}{y}"
            answer = conclude([is_so.format(x=x, y=predicate(form, true, lang))], IS_SO[lang][value == true], lang)
            yield {"x": x, "v": predicate(form, value, lang)}, answer, thing.new or asked_new


def predicate(form: str, value: str, lang: str) -> str:
    """What is said of a thing: "red", "a star", "in the top left"; "是红色", "是大的", "在左上角"."""
    if lang == "en":
        return a(value, lang) if form == "shape" else f"in the {value}" if form == "place" else value
    return "在" * (form == "place") + "是" * (form != "place") + say(value, lang) + "的" * (form == "size")


def compare(scenes, form, lang):
    if form == "more":
        first, second = (len(scene.things) for scene in scenes)
        if first != second:
            counts = [has(say(NUMBERS[number - 1], lang), i, lang) for i, number in enumerate((first, second))]
            yield {}, conclude(counts, which_picture(second > first, lang), lang), False
        return
    shown = [has(caption(scene, lang, full=False), i, lang) for i, scene in enumerate(scenes)]
    if form == "both":
        yield {}, (", " if lang == "en" else "，").join(shown), True
        return
    for second, scene in enumerate(scenes):
        for thing in scene.things:
            noun = name(lang, thing.colour, thing.shape)
            if not find(scenes[1 - second], thing.colour, thing.shape):
                answer = conclude([*shown, a(noun, lang)], which_picture(second, lang), lang)
                yield {"x": noun, "ax": a(noun, lang)}, answer, thing.new


def has(what_it_has: str, second: bool, lang: str) -> str:
    return state(lang, which_picture(second, lang), "{x} has {y}", "{x}有{y}", what_it_has)


def which_picture(second: bool, lang: str) -> str:
    return ("the " if lang == "en" else "") + say("second" if second else "first", lang)


QUESTIONS = {function.__name__: function for function in (describe, what, colour, count, where, relation, size)}


def ask(scenes, kind: str, lang: str, rng, used: Counter, new: bool, words: Words, form: str = ""):
    """A question of this kind about the scene (two to compare): (what it means, question, answer), None where there is
    none to ask.

    form: of question; drawn without it.
    used: how often each conclusion was given so far, by form of question and language; the rarest that is possible now
    is asked for.
    """
    form = form or rng.choice(list(wordings()[kind]))
    if kind == "exists":
        found = exists(scenes[0], form, lang, rng, new)
    elif kind == "check":
        found = check(scenes[0], form, lang, rng, new)
    elif kind == "compare":
        found = compare(scenes, form, lang)
    elif kind == "each":
        found = each(scenes[0], form, lang, rng, new)
    elif kind == "greet":
        found = [({}, ANSWERS[kind][lang], True)]
    else:
        found = QUESTIONS[kind](scenes[0], form, lang)
    found = [(slots, answer) for slots, answer, about_new in found if about_new or not new]
    if not found:
        return None
    key = (kind, form, lang)
    rarest = min(used[key, conclusion(answer)] for _, answer in found)
    slots, answer = rng.choice([(slots, answer) for slots, answer in found if used[key, conclusion(answer)] == rarest])
    if kind == "count" and rarest > min(used[key, say(each, lang)] for each in NUMBERS) + 2:
        return None  # most scenes hold one of most things: "one" waits for the others
    used[key, conclusion(answer)] += 1
    return (*key, *slots.values()), words.ask(*key, slots), answer


# ---------------------------------------------------------------------------- rows


def rows_of(
    scene, image: str, rng, used: Counter, rows=4, kinds=USUAL, new=False, other=None, lists=LOOK_UPS, style="train"
) -> list[dict]:
    """Conversations about a scene, half of them Chinese, in the format of the module's docstring; `rows` of them, fewer
    where the scene allows fewer.

    Args:
        image: the name of its picture.
        rng: random.Random.
        used: see `ask`; one for a whole split.
        kinds: the keys of KINDS to choose from.
        new: for val_new, ask only about what is_new.
        other: (scene, name of the picture) to compare with; without it there is no "compare".
        lists: the keys of EACH to choose from.
        style: of the wordings, see `Words`. Another one asks the same questions.
    """
    kinds = [kind for kind in kinds if kind != "compare" or other]
    kinds = [kind for kind in kinds if not (new and kind in ANSWERS)]  # they are about nothing
    weights = [KINDS[kind] for kind in kinds]
    words = Words(style, random.Random(repr(scene)))
    found, meanings, first = [], set(), rng.randrange(2)
    for _ in range(8 * rows if kinds else 0):
        lang = LANGS[(first + len(found)) % 2]
        kind = rng.choices(kinds, weights)[0]
        pictures, turns = [(scene, image)], [(kind, "")]
        if kind == "compare":
            pictures.insert(rng.randrange(2), other)
        elif kind == "greet" and rng.random() < 0.5:
            pictures = []
        elif kind == "multi":
            turns = [(turn, "") for turn in rng.choices(TURNS, k=rng.randint(*LENGTH))]
        elif kind == "each":
            turns = [(kind, form) for form in rng.sample(lists, min(3, len(lists)))]
        elif kind == "blind":
            turns = [(rng.choice((*TURNS, "describe")), "")]
        switch = len(turns)  # where the other picture comes, which the turns from there on are about
        if kind == "multi" and other and rng.random() < 0.2:
            switch = len(turns) // 2
        asked = {}  # what a question means: kind, question, answer, pictures
        for i, (turn, form) in enumerate(turns):
            shown = pictures if i < switch else [other]
            scenes = [one for one, _ in shown] or [scene]
            if asking := ask(scenes, turn, lang, rng, used, new, words, form):
                meaning, question, answer = asking
                asked.setdefault((*meaning, i < switch, answer), (turn, question, answer, shown))
        if len(asked) < (2 if kind == "multi" else 1) or not meanings.isdisjoint(asked):
            continue
        meanings.update(asked)
        # Lists too, which are easier to learn so; they draw all the same, so that the rows after them stay as are.
        picture_first, chat, names, seen = rng.random() < 0.5 or kind == "each", [], [], []
        for _, question, answer, shown in asked.values():
            if shown != seen and kind != "blind":
                tags = words.between().join(["<image>"] * len(shown))
                names += [picture for _, picture in shown]
                question = words.between().join([tags, question] if picture_first else [question, tags])
            answer, seen = ANSWERS[kind][lang] if kind == "blind" else answer, shown
            chat += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        kinds_asked = [turn for turn, *_ in asked.values()] if kind == "multi" else kind
        image_of_row = {"image": ", ".join(names)} if names else {}
        found.append({"conversations": chat, **image_of_row, "kind": kinds_asked, "lang": lang})
        if len(found) == rows:
            break
    return found


def describe_in_words(scene: Scene) -> str:
    """All that can be asked about, in the order of the patches: "picture: topleftbigredstar middlesmallbluering".

    One word for an object, its place and all of its looks, as in a picture a patch is one vector.
    """
    words = [f"{thing.place.replace(' ', '')}{thing.size}{thing.colour}{thing.shape}" for thing in scene.things]
    return " ".join(["picture:", *words])


def captions_of(scene: Scene, image: str) -> list[dict]:
    """For each thing rows in each language that say what it is and where: "a big red star in the middle", and without
    the colour "a star in the middle": an encoder must know a shape in a colour that it never had.
    """
    said = [
        (lang, caption(replace(scene, things=(thing,)), lang, colour=colour))
        for thing in scene.things
        for colour in ((True, False) if thing.colour else (False,))
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


def text_rows_of(
    scene, rng, used, rows=4, kinds=USUAL, new=False, other=None, lists=LOOK_UPS, style="train"
) -> list[dict]:
    """As `rows_of`, with each picture in words instead, so without "image"; other: a scene to compare with."""
    scenes = {"one": scene, "two": other}
    found = rows_of(scene, "one", rng, used, rows, kinds, new, other and (other, "two"), lists, style)
    for row in found:
        told = [describe_in_words(scenes[picture]) for picture in row.pop("image", "").split(", ") if picture]
        for turn in row["conversations"][::2]:
            # The word for an object must not grow together with what stands beside it.
            content = re.sub(r"(?<=\S)(?=<image>)|(?<=<image>)(?=\S)", "\n", turn["content"])
            while "<image>" in content:
                content = content.replace("<image>", told.pop(0), 1)
            turn["content"] = content
    return found


def scenes_of(split: str, count: int, seed: int, objects=(1, 4)) -> Iterator[Scene]:
    """The scenes of "train", "val" or "val_new". Each has its own seed, so more of them leave the first ones as are."""
    for i in range(count):
        yield random_scene(random.Random(f"{seed} {split} {i}"), split == "val_new", objects)


def refuse_to_overwrite(out_dir: Path, splits) -> None:
    """ValueError if rows of one of these splits stand there already."""
    for split in splits:
        if (out_dir / f"{split}.jsonl").exists():
            raise ValueError(
                f"--out_dir {out_dir}: {split}.jsonl is there already. Choose another folder, or remove it"
            )


def write_world(
    out_dir,
    scenes=12000,
    val_scenes=400,
    seed=0,
    image_size=64,
    rows=4,
    kinds=USUAL,
    form="chat",
    objects=(1, 4),
    lists=LOOK_UPS,
    plain=False,
) -> dict:
    """Writes {train,val,val_wording,val_new}.jsonl and images/ into out_dir; returns {split: number of rows}.

    Same arguments, same bytes. Other rows or kinds show the same scenes. The .jsonl stand there only when complete. One
    that stands there already may be somebody's own: ValueError.
    form: "chat", conversations; "text", with scenes in words and without images/; "captions", see `captions_of`.
    plain: each question in its first wording alone; then there is no val_wording, nor is there with captions.
    """
    out_dir = Path(out_dir)
    splits = {"train": scenes, "val": val_scenes, "val_wording": val_scenes, "val_new": val_scenes}
    if plain or form == "captions":
        del splits["val_wording"]
    refuse_to_overwrite(out_dir, splits)
    (out_dir if form == "text" else out_dir / "images").mkdir(parents=True, exist_ok=True)
    written = {}
    for split, count in splits.items():
        of_scenes = "val" if split == "val_wording" else split  # the same pictures and questions in other words
        style = "plain" if plain else "held out" if split == "val_wording" else "train"
        start, used, other, written[split] = time.perf_counter(), Counter(), None, 0
        beside = out_dir / f"{split}.jsonl.tmp"
        with beside.open("w", encoding="utf-8", newline="\n") as file:
            for i, scene in enumerate(scenes_of(of_scenes, count, seed, objects)):
                rng, new = random.Random(f"{seed} {of_scenes} {i} rows"), split == "val_new"
                if form == "text":
                    found = text_rows_of(scene, rng, used, rows, kinds, new, other, lists, style)
                    other = scene
                else:
                    image = f"{of_scenes}_{i:05}.jpg"
                    if form == "captions" and split == "train":
                        scene = without_colour(scene, rng)
                    if split == of_scenes:
                        save_jpeg(draw(scene, image_size), out_dir / "images" / image)
                    if form == "captions":
                        found = captions_of(scene, image)
                    else:
                        found = rows_of(scene, image, rng, used, rows, kinds, new, other, lists, style)
                    other = (scene, image)
                for row in found:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written[split] += len(found)
        rate = count / (time.perf_counter() - start)
        print(f"{out_dir / split}.jsonl: {count:,} scenes, {written[split]:,} rows, {rate:,.0f} scenes/s")
    for split in splits:
        (out_dir / f"{split}.jsonl.tmp").replace(out_dir / f"{split}.jsonl")
    return written


# ---------------------------------------------------------------------------- the run


def check_numbers(args) -> None:
    """ValueError for a flag of a drawn world that is out of bounds."""
    limits = {"scenes": (1, 10**6), "val_scenes": (1, 10**6), "image_size": (32, 1024), "rows": (1, 20)}
    for flag, (least, most) in limits.items():
        if not least <= getattr(args, flag) <= most:
            raise ValueError(f"--{flag} {getattr(args, flag)}: expected {least} to {most}")


def main(argv=None):
    from common.cli import Parser, reason  # here, as a world without a command line needs none

    parser = Parser(__file__, "\n\n".join(__doc__.split("\n\n")[:2]))  # the rest is for those who read the code
    add = parser.start.add_argument
    add("--out_dir", type=Path, default=Path("out/scenes"), help="folder to write to, made if needed")
    add("--scenes", type=int, default=12000, help="pictures to train on")
    add("--val_scenes", type=int, default=400, help="pictures of val, and of val_new")
    add("--seed", type=int, default=0, help="another number, another world")
    forms = "chat, for a VLM; text, in which words take the place of pictures, for an LLM; captions, for an encoder"
    add("--form", choices=("chat", "text", "captions"), default="chat", help=forms)
    add = parser.group("the scenes").add_argument
    add("--image_size", type=int, default=64, metavar="PIXELS", help="side of a picture, 32 to 1024")
    few = "least and most objects in a scene, 1 to 4"
    add("--objects", type=int, nargs=2, default=(1, 4), metavar=("MIN", "MAX"), help=few)
    add("--rows", type=int, default=4, help="conversations about a picture")
    kinds = f"conversations to write, of {', '.join(KINDS)}"
    add("--kinds", nargs="+", choices=KINDS, default=list(USUAL), metavar="KIND", help=kinds)
    lists = f"what conversations of kind each ask of all objects, of {', '.join(EACH)}"
    add("--lists", nargs="+", choices=EACH, default=list(LOOK_UPS), metavar="LIST", help=lists)
    plain = "each question in its first wording alone, as for a model's first lessons"
    add("--plain", action="store_true", help=plain)
    args = parser.parse_args(argv)
    try:
        check_numbers(args)
        if not 1 <= args.objects[0] <= args.objects[1] <= 4:
            raise ValueError(f"--objects {args.objects[0]} {args.objects[1]}: expected two numbers from 1 to 4, rising")
        write_world(**vars(args))
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {reason(error)}") from None


if __name__ == "__main__":
    main()
