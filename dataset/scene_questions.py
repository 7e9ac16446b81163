"""Questions about a scene of the picture world, and their right answers, in English and Chinese.

Each kind of question is a function that yields all possible questions of one form about a scene: (slots of the wording,
answer, whether it is about a new combination). `ask` selects the one with the rarest answer so far, and
`dataset.scene_wordings` puts it into words. `dataset.scenes` combines questions into conversations.

Answers first repeat the object of the question; comparisons first state the facts about both objects. A small model
answers word by word: it looks up an object best right after naming it, and it learns to compare written facts much
faster than facts that it would have to infer silently.
"""

from collections import Counter
from functools import cache
from itertools import permutations

from dataset.scene_pictures import COLOURS, NEW_PAIRS, OLD_PAIRS, PLACES, SHAPES, Scene, Thing, is_new
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
ANSWERS = {  # the same for every scene
    "greet": {
        "en": "hello, I can tell you about the shapes in a picture: colour, size, place and number",
        "zh": "你好，我能回答图片里图形的颜色、大小、位置和数量",
    },
    "blind": {"en": "there is no picture, please show me one", "zh": "没有图片，请先给我一张"},
}
NO_YES = {"en": ("no", "yes"), "zh": ("没有", "有")}  # for the kind exists
IS_SO = {"en": ("no", "yes"), "zh": ("不是", "是")}
NUMBERS = ("one", "two", "three", "four")
SIDES = {"left": "left of", "right": "right of"}  # in English, before a noun
AXES = {"left or right of": ("left", "right"), "above or below": ("above", "below")}
EACH = {  # list → kind and form of the question about one object, and its name in English
    "colour": ("colour", "of", "the {x}"),
    "shape": ("what", "shape", "the {x}"),
    "place": ("where", "of", "the {x}"),
    "size": ("size", "of", "the {x}"),
    "object": ("what", "at", "the {p}"),
    "exists": ("exists", "", "{ax}"),
    "count": ("count", "part", "{xs}"),
    "check": ("check", "", "the {x} {v}"),
}
LOOK_UPS = ("colour", "shape", "place", "size", "object")  # lists of attributes
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


def find(scene: Scene, colour: str = "", shape: str = "", size: str = "") -> list[Thing]:
    look = {"colour": colour, "shape": shape, "size": size}
    return [thing for thing in scene.things if all(look[of] in ("", getattr(thing, of)) for of in look)]


def named(scene: Scene, lang: str) -> list[tuple[Thing, str]]:
    """Things with a unique name, and this name: the shape if no other thing has it, otherwise colour and shape."""
    names = []
    for thing in scene.things:
        for look in ({"shape": thing.shape}, {"shape": thing.shape, "colour": thing.colour}):
            if len(find(scene, **look)) == 1:
                names.append((thing, name(lang, **look)))
                break
    return names


def caption(scene: Scene, lang: str, full: bool = True, colour: bool = True) -> str:
    """Lists all things in reading order: "a red star and a blue ring"; full: "a big red star in the middle".

    Equal things are not grouped ("two red stars"): grouping had the lowest scores.
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


def state(lang: str, x: str, english: str, chinese: str, y: str) -> str:
    return (english if lang == "en" else chinese).format(x=x, y=y)


def is_where(thing: Thing, x: str, lang: str) -> str:
    return state(lang, x, "the {x} is in the {y}", "{x}在{y}", say(thing.place, lang))


def has_size(thing: Thing, x: str, lang: str) -> str:
    return state(lang, x, "the {x} is {y}", "{x}是{y}的", say(thing.size, lang))


def conclude(known: list[str], answer: str, lang: str) -> str:
    """Facts and conclusion, for example "the star is big, the ring is small: the star"."""
    return ", ".join(known) + f": {answer}" if lang == "en" else "，".join(known) + f"：{answer}"


def conclusion(answer: str) -> str:
    """The conclusion of an answer from `conclude`, for example "the star"; any other answer as it is."""
    return answer.replace("：", ": ").rsplit(": ", 1)[-1]


def describe(scene, form, lang):
    if form == "list":
        yield {}, listing(scene, lang), True
    else:
        yield {}, caption(scene, lang, form == "full"), True


def listing(scene: Scene, lang: str) -> str:
    """For example "star red big top left, ring blue small middle": shape before colour, unlike in captions."""
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
    """One question about all objects that this form of question fits, in random order.

    If most answers would be the same ("no", "one"), it covers only some objects, to balance the answers.
    """
    kind, of_one, one = EACH[form]
    if kind == "exists":
        answers = list(exists(scene, "some", lang, rng, False))
    elif kind == "check":  # one question of each form about a thing: one answer would reveal the answer of another
        of_one_thing = {}
        for of_one in wordings()["check"]:
            for asked in check(scene, of_one, lang, rng, new):
                of_one_thing.setdefault((of_one, asked[0]["x"]), []).append(asked)
        answers = [rng.choice(asked) for asked in of_one_thing.values()]
    else:
        answers = list(QUESTIONS[kind](scene, of_one, lang))
    rng.shuffle(answers)
    if kind in ("exists", "count", "check"):
        usual = {"exists": NO_YES[lang][0], "count": say("one", lang), "check": IS_SO[lang][0]}[kind]
        rare = [asked for asked in answers if conclusion(asked[1]) != usual][:3]
        answers = rare + [asked for asked in answers if conclusion(asked[1]) == usual][: max(2, len(rare))]
        rng.shuffle(answers)
    if len(answers) > 1:
        named_as = one if lang == "en" else "{x}{v}" if kind == "check" else "{p}" if form == "object" else "{x}"
        them = [named_as.format(**slots) for slots, _, _ in answers]
        joined = join(them, *((", ", " and ") if lang == "en" else ("、", "和")))
        listed = (", " if lang == "en" else "，").join(answer for _, answer, _ in answers)
        yield {"them": joined}, listed, any(new for _, _, new in answers)


def count(scene, form, lang):
    if form == "all":
        everything = "objects" if lang == "en" else say("object", lang)
        yield {}, conclude([everything], say(NUMBERS[len(scene.things) - 1], lang), lang), False
        return
    looks = [(thing.colour, "") for thing in scene.things] + [("", thing.shape) for thing in scene.things]
    for look in dict.fromkeys(looks):
        things, noun = find(scene, *look), name(lang, *look)
        answer = conclude([plural(noun) if lang == "en" else noun], say(NUMBERS[len(things) - 1], lang), lang)
        yield {"x": noun, "xs": plural(noun)}, answer, is_new(things)


def where(scene, form, lang):
    for thing, x in named(scene, lang):
        yield {"x": x}, is_where(thing, x, lang), thing.new


def exists(scene, form, lang, rng, new):
    """Half of the missing pairs combine the colour of one thing with the shape of another.

    form: "pair" of colour and shape; "part": one of them; "some": for lists, parts and pairs of size and shape. Lists
    with pairs of colour and shape taught the model to deny pairs that they never name, such as those of val_new.
    """
    if form == "pair":  # train does not name new pairs, not even to deny them
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
    """Left or right, above or below. Not yes or no: small models still guess these after 60,000 such questions."""
    for (one, x), (other, y) in permutations(named(scene, lang), 2):
        for axis, sides in AXES.items():
            step = one.column - other.column if axis == "left or right of" else one.row - other.row
            if step:
                known = [is_where(one, x, lang), is_where(other, y, lang)]
                answer = conclude(known, say(sides[step > 0], lang), lang)
                for side in sides:  # some wordings ask about one side
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
    """Claims, half of them false, often with an attribute of another thing. Answers state the fact, then yes or no."""
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
            if asked_new and not new:  # train does not name new pairs, not even to deny them
                continue
            is_so = "the {x} is {y}" if lang == "en" else "{x}{y}"
            answer = conclude([is_so.format(x=x, y=predicate(form, true, lang))], IS_SO[lang][value == true], lang)
            yield {"x": x, "v": predicate(form, value, lang)}, answer, thing.new or asked_new


def predicate(form: str, value: str, lang: str) -> str:
    """The predicate of a claim: "red", "a star", "in the top left"; "是红色", "是大的", "在左上角"."""
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
    """A question of this kind about the scene (or two, to compare): (meaning, question, answer). None if impossible.

    form: of the question; "" for a random one.
    used: how often each conclusion occurred so far, by form of question and language; `ask` selects the rarest one.
    """
    form = form or rng.choice(list(wordings()[kind]))
    if kind == "exists":
        possible = exists(scenes[0], form, lang, rng, new)
    elif kind == "check":
        possible = check(scenes[0], form, lang, rng, new)
    elif kind == "compare":
        possible = compare(scenes, form, lang)
    elif kind == "each":
        possible = each(scenes[0], form, lang, rng, new)
    elif kind == "greet":
        possible = [({}, ANSWERS[kind][lang], True)]
    else:
        possible = QUESTIONS[kind](scenes[0], form, lang)
    possible = [(slots, answer) for slots, answer, on_new in possible if on_new or not new]
    if not possible:
        return None
    key = (kind, form, lang)
    rarest = min(used[key, conclusion(answer)] for _, answer in possible)
    slots, answer = rng.choice(
        [(slots, answer) for slots, answer in possible if used[key, conclusion(answer)] == rarest]
    )
    if kind == "count" and rarest > min(used[key, say(each, lang)] for each in NUMBERS) + 2:
        return None  # most counts are one: limit "one" to the frequency of the others
    used[key, conclusion(answer)] += 1
    return (*key, *slots.values()), words.ask(*key, slots), answer
