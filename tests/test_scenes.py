"""The picture world is as promised: the same every time, balanced, right, and val_new keeps its combinations."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest
from PIL import Image

from dataset import scenes as world
from dataset.lm_dataset import VLMDataset
from dataset.scene_pictures import COLOURS, NEW_PAIRS, PLACES, SHAPES, Scene, Thing
from model.processing import ImageProcessor, load_tokenizer
from scripts import train_tokenizer

SCENES, VAL = 2000, 400
ZH = world.CHINESE
COLOUR_WORDS = {"en": {word: word for word in COLOURS}, "zh": {ZH[word]: word for word in COLOURS}}
SHAPE_WORDS = {"en": {word: word for word in SHAPES}, "zh": {ZH[word]: word for word in SHAPES}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    world.write_world(folder, scenes=SCENES, val_scenes=VAL, seed=0)
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    """{split: its rows}"""
    return {
        split: [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "val", "val_new")
    }


@pytest.fixture(scope="module")
def scenes():
    """{name of a picture: its scene}"""
    counts = {"train": SCENES, "val": VAL, "val_new": VAL}
    return {
        f"{split}_{i:05}.jpg": scene
        for split, count in counts.items()
        for i, scene in enumerate(world.scenes_of(split, count, 0))
    }


def exchanges(row):
    """[(question without <image>, answer), ...]"""
    texts = [turn["content"].replace("<image>", "").strip() for turn in row["conversations"]]
    return list(zip(texts[::2], texts[1::2]))


# ---------------------------------------------------------------------------- reading a question back


def nouns(lang):
    """{noun: (colour, shape)}, one of which may be missing"""
    found = {}
    for colour in (*COLOURS, ""):
        for shape in (*SHAPES, ""):
            if lang == "en":
                found[f"{colour} {shape or 'object'}".strip()] = (colour, shape)
            else:
                found[(ZH[colour][0] + ZH[shape] if colour else ZH[shape]) if shape else f"{ZH.get(colour)}图形"] = (
                    colour,
                    shape,
                )
    return {noun: look for noun, look in found.items() if any(look)}


def slot_values(lang):
    """{slot: {text: what it means}}"""

    def words(*found):
        return {word if lang == "en" else ZH[word]: word for word in found}

    x = nouns(lang)
    return {
        "x": x,
        "y": x,
        "ax": {(f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}" if lang == "en" else noun): x[noun] for noun in x},
        "xs": {(re.sub("cross$", "crosse", noun) + "s" if lang == "en" else noun): x[noun] for noun in x},
        "p": words(*sum(PLACES, ())),
        "d": words("left or right of", "above or below"),
    }


SLOTS = {lang: slot_values(lang) for lang in ("en", "zh")}
PATTERNS = {
    lang: [
        (
            kind,
            form,
            re.compile(
                re.sub(
                    r"\\{(\w+)\\}",
                    lambda slot, lang=lang: f"(?P<{slot[1]}>{'|'.join(SLOTS[lang][slot[1]])})",
                    re.escape(wording[lang]),
                )
            ),
        )
        for kind, forms in world.ASK.items()
        if kind != "each"
        for form, wordings in forms.items()
        for wording in wordings
    ]
    for lang in ("en", "zh")
}


@cache
def understand(question, lang):
    """(kind, form, {slot: meaning}) of a question, which must be the only way to take it."""
    found = [(kind, form, pattern.fullmatch(question)) for kind, form, pattern in PATTERNS[lang]]
    found = [each for each in found if each[2]]
    assert len(found) == 1, (question, found)
    kind, form, match = found[0]
    meanings = {slot: SLOTS[lang][slot][text] for slot, text in match.groupdict().items()}
    return kind, form, {{"ax": "x", "xs": "x"}.get(slot, slot): meaning for slot, meaning in meanings.items()}


# ---------------------------------------------------------------------------- answering it from coordinates


def side_of(one, other, axis):
    """On which side of the other, by a sixth of the picture at least."""
    gap, sides = (
        (one.x - other.x, ("left", "right")) if axis == "left or right of" else (one.y - other.y, ("above", "below"))
    )
    assert abs(gap) > 1 / 6  # not on one line, where it would be neither
    return sides[gap > 0]


def place(thing):
    return PLACES[int(thing.y * 3)][int(thing.x * 3)]


def noun(thing, lang, mentions=("colour", "shape")):
    colour, size, shape = ((thing.colour, thing.size, thing.shape)[i] if each in mentions else "" for i, each in
                           enumerate(("colour", "size", "shape")))  # fmt: skip
    if lang == "zh":
        return ZH.get(size, "") + ZH.get(colour, "")[:1] + ZH[shape]
    text = " ".join(word for word in (size, colour, shape) if word)
    return f"{'an' if text.startswith('orange') else 'a'} {text}"


def description(scene, form, lang):
    """What a picture's description should be: things from left to right, row by row."""
    things = sorted(scene.things, key=lambda thing: (int(thing.y * 3), int(thing.x * 3)))
    if form == "list":
        looks = [(thing.shape, thing.colour, thing.size, place(thing)) for thing in things]
        if lang == "zh":
            return "，".join("".join(ZH[word] for word in words) for words in looks)
        return ", ".join(map(" ".join, looks))
    mentions = {"short": "colour shape", "shape in place": "shape"}.get(form, "colour shape size")
    said = [noun(thing, lang, mentions) for thing in things]
    if form == "short":
        parts = []
        for each, number in Counter(said).items():
            word = ("one", "two", "three", "four")[number - 1]
            if lang == "zh":
                parts.append(ZH[word] + each)
            else:
                bare = each.split(" ", 1)[1]
                parts.append(each if number == 1 else f"{word} {bare}{'es' if bare.endswith('cross') else 's'}")
        joined = (", " if lang == "en" else "、").join(parts)
        return (" and " if lang == "en" else "和").join(joined.rsplit(", " if lang == "en" else "、", 1))
    if lang == "zh":
        return "，".join(f"{ZH[place(thing)]}有一个{each}" for thing, each in zip(things, said))
    return " and ".join(", ".join(f"{each} in the {place(thing)}" for thing, each in zip(things, said)).rsplit(", ", 1))


def answer(question, lang, shown):
    """(the answer, the things it is about) from where things are; asserts that the question has one answer."""
    kind, form, slots = understand(question, lang)
    things = shown[0].things
    english = lang == "en"

    def say(word):
        return word if english else ZH[word]

    def looking_like(look):
        return [thing for thing in things if look[0] in ("", thing.colour) and look[1] in ("", thing.shape)]

    def the(look):
        (found,) = looking_like(look)
        return found

    def only(found):
        (thing,) = found
        return thing

    def number(found):
        return say(("one", "two", "three", "four")[len(found) - 1])

    def called(look):  # as the question does
        if english:
            return " ".join(word for word in (look[0], look[1] or "object") if word)
        return (ZH[look[0]][0] + ZH[look[1]] if look[0] else ZH[look[1]]) if look[1] else ZH[look[0]] + "图形"

    def is_in(look):
        where = say(place(the(look)))
        return f"the {called(look)} is in the {where}" if english else f"{called(look)}在{where}"

    def has_size(look):
        size = say(the(look).size)
        return f"the {called(look)} is {size}" if english else f"{called(look)}是{size}的"

    def so(one, other, conclusion):
        return f"{one}, {other}: {conclusion}" if english else f"{one}，{other}：{conclusion}"

    def which_picture(second):
        return {"en": ("the first", "the second"), "zh": ("第一张", "第二张")}[lang][second]

    yes_no = {"en": ("no", "yes"), "zh": ("没有", "有")}[lang]
    match kind, form:
        case "describe", _:
            return description(shown[0], form, lang), list(things)
        case "what", "at":
            thing, where = only([thing for thing in things if place(thing) == slots["p"]]), say(slots["p"])
            return f"in the {where} is {noun(thing, lang)}" if english else f"{where}是{noun(thing, lang)}", [thing]
        case "what", "shape":
            x, shape = called(slots["x"]), noun(the(slots["x"]), lang, ("shape",))
            return f"the {x} is {shape}" if english else f"{x}是{shape}", [the(slots["x"])]
        case "colour", "of":
            x, colour = called(slots["x"]), say(the(slots["x"]).colour)
            return f"the {x} is {colour}" if english else f"{x}是{colour}", [the(slots["x"])]
        case "count", "all":
            return number(things), []
        case "count", _:
            return number(looking_like(slots["x"])), looking_like(slots["x"])
        case "where", _:
            return is_in(slots["x"]), [the(slots["x"])]
        case "exists", _:
            return yes_no[bool(looking_like(slots["x"]))], [slots["x"]]
        case "relation", _:
            x, y = the(slots["x"]), the(slots["y"])
            return so(is_in(slots["x"]), is_in(slots["y"]), say(side_of(x, y, slots["d"]))), [x, y]
        case "size", "of":
            return has_size(slots["x"]), [the(slots["x"])]
        case "size", _:
            x, y = the(slots["x"]), the(slots["y"])
            assert max(x.radius, y.radius) > 1.4 * min(x.radius, y.radius)
            bigger = called(slots["x"] if x.radius > y.radius else slots["y"])
            conclusion = f"the {bigger}" if english else bigger
            return so(has_size(slots["x"]), has_size(slots["y"]), conclusion), [x, y]
        case "compare", "more":
            first, second = (len(each.things) for each in shown)
            assert first != second
            has = [
                f"{which_picture(i)}{' has ' if english else '有'}{number(each.things)}" for i, each in enumerate(shown)
            ]
            return so(*has, which_picture(second > first)), []
        case "compare", "has":
            pairs = [[(thing.colour, thing.shape) for thing in each.things] for each in shown]
            assert (slots["x"] in pairs[0]) != (slots["x"] in pairs[1])
            return which_picture(slots["x"] in pairs[1]), [slots["x"]]
    raise AssertionError(question)


def new_among(about):
    """Is there a held-out pair, or three of a shape in a 2×2 corner of the grid?"""
    pairs = [thing if isinstance(thing, tuple) else (thing.colour, thing.shape) for thing in about]
    if not NEW_PAIRS.isdisjoint(pairs):
        return True
    things = [thing for thing in about if isinstance(thing, Thing)]
    for shape in SHAPES:
        for near_x in (lambda x: x < 0.6, lambda x: x > 0.4):
            for near_y in (lambda y: y < 0.6, lambda y: y > 0.4):
                if sum(thing.shape == shape and near_x(thing.x) and near_y(thing.y) for thing in things) >= 3:
                    return True
    return False


# ---------------------------------------------------------------------------- tests


def test_every_question_can_be_taken_one_way_and_its_answer_is_right(rows, scenes):
    seen = set()
    for split in rows.values():
        for row in split:
            shown = [scenes[name] for name in row["image"].split(", ")]
            for question, given in exchanges(row):
                assert given == answer(question, row["lang"], shown)[0], (row, shown)
                kind, form, _ = understand(question, row["lang"])
                assert kind in row["kind"] if isinstance(row["kind"], list) else kind == row["kind"]
                seen.add((kind, form, row["lang"]))
    kinds = set(world.ASK) - {"each"}
    assert seen == {(kind, form, lang) for kind in kinds for form in world.ASK[kind] for lang in ("en", "zh")}


def test_same_seed_gives_same_bytes_and_another_seed_another_world(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):  # each in a process of its own, where sets have another order
        flags = ["--scenes", "40", "--val_scenes", "10", "--seed", str(seed), "--out_dir", str(tmp_path / name)]
        environment = os.environ | {"PYTHONHASHSEED": str(ord(name))}
        subprocess.run([sys.executable, "-m", "dataset.scenes", *flags], check=True, env=environment)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 3 + 40 + 10 + 10
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_other_rows_show_the_same_pictures_and_no_picture_is_in_two_splits(folder, tmp_path):
    world.write_world(tmp_path, scenes=20, val_scenes=5, seed=0, kinds=("describe",), rows=2)
    for path in sorted((tmp_path / "images").iterdir()):
        assert path.read_bytes() == (folder / "images" / path.name).read_bytes()
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [json.loads(line) for line in lines]
    assert {(row["image"], row["lang"]) for row in captions} == {
        (f"train_{i:05}.jpg", lang) for i in range(20) for lang in ("en", "zh")
    }
    pictures = [path.read_bytes() for path in (folder / "images").iterdir()]
    assert len(set(pictures)) == len(pictures) == SCENES + 2 * VAL


def test_rows_go_through_the_ordinary_reader(folder, tmp_path):
    train_tokenizer.main(
        ["--data_path", str(folder / "train.jsonl"), "--out_dir", str(tmp_path / "tok"), "--vocab_size", "500"]
    )
    tokenizer = load_tokenizer(tmp_path / "tok", "@" * 16)
    for split in ("val", "val_new"):
        data = VLMDataset(
            folder / f"{split}.jsonl",
            folder / "images",
            tokenizer,
            ImageProcessor(64, (64, 64)),
            max_length=640,
            image_special_token="@" * 16,
        )
        assert not data.bad and data.shortened == 0 and len(data) > 3 * VAL
        compared = next(i for i in range(len(data)) if data.row(i).kind == "compare")
        assert data[compared]["pictures"].shape == (2, 3, 64, 64)


def test_languages_kinds_and_wordings_are_mixed(rows):
    for split in rows.values():
        languages = Counter(row["lang"] for row in split)
        assert abs(languages["en"] - languages["zh"]) <= 0.02 * len(split)
        assert {row["kind"] for row in split if isinstance(row["kind"], str)} == set(world.USUAL) - {"multi"}
    for row in rows["train"]:
        chinese = [bool(re.search("[\u4e00-\u9fff]", "".join(pair))) for pair in exchanges(row)]
        assert set(chinese) == {row["lang"] == "zh"}
        kinds = [row["kind"]] if isinstance(row["kind"], str) else row["kind"]
        assert [understand(question, row["lang"])[0] for question, _ in exchanges(row)] == kinds
        assert isinstance(row["kind"], str) or 2 <= len(kinds) <= max(world.LENGTH)
    for kind in set(world.ASK) - {"each"}:
        for wordings in world.ASK[kind].values():
            assert all(len({wording[lang] for wording in wordings}) == len(wordings) >= 2 for lang in ("en", "zh"))


def test_english_has_its_articles_and_plurals(rows):
    text = " ".join(
        part for row in rows["train"] if row["lang"] == "en" for pair in exchanges(row) for part in pair
    ).lower()
    assert not re.findall(r"\ba [aeiou]\w*|\ban [^aeiou]\w*|\w*crosss\w*", text)
    assert not re.findall(rf"\b(?:two|three|four) (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})\b", text)
    assert "crosses" in text and "an orange" in text


def test_answers_are_balanced(rows):
    answers = defaultdict(Counter)
    for row in rows["train"]:
        for question, given in exchanges(row):
            kind, form, slots = understand(question, row["lang"])
            form = slots.get("d", form)
            last = re.split("[:：]| is |是|在", given)[-1] if kind != "describe" else given  # what was not known before
            answers[kind, form, row["lang"]][last.strip()] += 1
    closed = {"yes", "no", "有", "没有", "big", "small", "大", "小", "the first", "the second", "第一张", "第二张"}
    closed |= {"left", "right", "above", "below", "左边", "右边", "上面", "下面"}
    for (kind, form, _), found in answers.items():
        if set(found) <= closed:
            most = 0.65 if form == "more" else 0.58  # few rows compare, and two pictures leave one answer
            assert max(found.values()) <= most * found.total(), (kind, form, found)
        elif kind == "count":
            assert len(found) == 4 and max(found.values()) <= 0.36 * found.total(), (kind, form, found)
        elif kind in ("colour", "where") or form in ("shape", "colour"):
            assert max(found.values()) <= 1.5 * found.total() / len(found) + 5, (kind, form, found)


def test_who_never_looks_scores_little(rows):
    """The best guess from the question alone: what train answers to this very question most often, else to questions
    of this form most often."""
    asked, formed = defaultdict(Counter), defaultdict(Counter)
    for row in rows["train"]:
        for question, given in exchanges(row):
            asked[question][given] += 1
            formed[understand(question, row["lang"])[:2] + (row["lang"],)][given] += 1
    for split in ("val", "val_new"):
        for guess_by in ("question", "form"):
            right = []
            for row in rows[split]:
                for question, given in exchanges(row):
                    form = formed[understand(question, row["lang"])[:2] + (row["lang"],)]
                    known = asked[question] if guess_by == "question" and asked[question] else form
                    right.append(known.most_common(1)[0][0] == given)
            share = sum(right) / len(right)
            print(f"{split}, guessing by {guess_by}: {share:.1%} of {len(right)}")
            assert share <= 0.3


def test_captions_say_of_every_thing_what_and_where_it_is(scenes):
    scene = next(scene for scene in scenes.values() if len(scene.things) == 3)
    found = world.captions_of(scene, "a.jpg")
    for lang in ("en", "zh"):
        said = [row["conversations"][1]["content"] for row in found if row["lang"] == lang]
        alone = [(Scene((thing,), *[None] * 4), form) for thing in scene.things for form in ("full", "shape in place")]
        assert said == [description(one, form, lang) for one, form in alone]
    assert {(row["image"], row["kind"], row["conversations"][0]["content"]) for row in found} == {
        ("a.jpg", "caption", "<image>")
    }


@pytest.mark.parametrize("form, pictures", [("captions", 8), ("text", 0)])
def test_other_forms_are_written_and_read(tmp_path, form, pictures):
    written = world.write_world(tmp_path, scenes=6, val_scenes=1, seed=0, form=form)
    assert len(list(tmp_path.glob("images/*.jpg"))) == pictures
    for split, number in written.items():
        lines = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(lines) == number > 0
        assert all(("image" in line) == (pictures > 0) for line in lines)


def test_who_is_named_first_says_nothing(rows):
    first = []
    for row in rows["train"]:
        for question, given in exchanges(row):
            kind, form, _ = understand(question, row["lang"])
            if (kind, form) == ("size", "which"):
                named = re.split("[:：]", given)[1].strip().removeprefix("the ")
                between = max(question.rfind(word) for word in (" or the ", "和", "还是"))
                first.append(question.find(named) < between)
    assert 0.4 < sum(first) / len(first) < 0.6


def test_what_is_held_out_occurs_in_val_new_only(rows, scenes):
    for name, scene in scenes.items():
        assert new_among(scene.things) == name.startswith("val_new"), name
        assert 1 <= len(scene.things) <= 4
    for split in ("train", "val"):
        for row in rows[split]:
            text = " ".join(turn["content"] for turn in row["conversations"])
            for colour, shape in NEW_PAIRS:
                assert not re.search(rf"{colour} {shape}|{ZH[colour][0]}色?{ZH[shape]}", text), row
    drawn = [thing for name, scene in scenes.items() if name.startswith("train") for thing in scene.things]
    assert {thing.colour for thing in drawn} == set(COLOURS) and {thing.shape for thing in drawn} == set(SHAPES)
    assert {colour for colour, _ in NEW_PAIRS} == set(COLOURS) and {shape for _, shape in NEW_PAIRS} == set(SHAPES)


def test_every_answer_of_val_new_is_about_something_held_out(rows, scenes):
    corners = 0
    for row in rows["val_new"]:
        shown = [scenes[name] for name in row["image"].split(", ")]
        for question, _ in exchanges(row):
            about = answer(question, row["lang"], shown)[1]
            assert new_among(about), row
            corners += NEW_PAIRS.isdisjoint(
                each if isinstance(each, tuple) else (each.colour, each.shape) for each in about
            )
    assert corners > 50  # three of a kind in a corner


@pytest.mark.parametrize("colour", COLOURS)
def test_colour_place_and_size_can_be_read_from_the_pixels(colour):
    for shape in SHAPES:
        for size, radius in (("big", 0.16), ("small", 0.1)):
            row, column = len(colour) % 3, len(shape) % 3
            x, y = 0.2 + 0.3 * column, 0.2 + 0.3 * row
            thing = Thing(colour, shape, size, column, row, x, y, radius, COLOURS[colour])
            grey = (160, 160, 160)
            scene = Scene((thing,), (0,), ("plain", 0), (grey, grey), noise=5)
            pixels = np.asarray(world.draw(scene, 64), dtype=int)
            assert pixels.shape == (64, 64, 3)
            palette = np.array([grey, *COLOURS.values()])
            nearest = ((pixels[:, :, None] - palette) ** 2).sum(-1).argmin(-1)
            down, across = np.nonzero(nearest == 1 + list(COLOURS).index(colour))
            assert len(down) > (60 if size == "big" else 20)
            assert thing.place == PLACES[int(np.median(down) / 64 * 3)][int(np.median(across) / 64 * 3)]
            assert 1.0 * radius * 64 < np.ptp(down) + 1 < 2.3 * radius * 64


def test_pictures_come_in_any_size(tmp_path):
    scene = world.random_scene(random.Random(0))
    for side in (32, 128, 224):
        assert world.draw(scene, side).size == (side, side)
    assert world.draw(scene, 64).tobytes() == world.draw(scene, 64).tobytes()
    world.main(["--out_dir", str(tmp_path), "--scenes", "2", "--val_scenes", "1", "--image_size", "96"])
    with Image.open(tmp_path / "images" / "train_00001.jpg") as image:
        assert image.size == (96, 96)


def test_text_rows_hold_the_whole_scene_in_words_and_the_same_questions(scenes):
    used, several = Counter(), [scenes[f"train_{i:05}.jpg"] for i in range(300)]
    kinds = Counter()
    for i, scene in enumerate(several):
        other = several[i - 1]
        for row in world.text_rows_of(scene, random.Random(i), used, other=other):
            lang, first = row["lang"], row["conversations"][0]["content"]
            assert "image" not in row and "<image>" not in first
            kinds["multi" if isinstance(row["kind"], list) else row["kind"]] += 1
            lines = first.split("\n")
            orders = [[scene, other], [other, scene]] if row["kind"] == "compare" else [[scene]]
            assert len(lines) == len(orders) + 1
            turns = [turn["content"] for turn in row["conversations"]]
            question = lines[-1] if row["kind"] == "compare" or understandable(lines[-1], lang) else lines[0]
            given = [(question, turns[1]), *zip(turns[2::2], turns[3::2])]
            told = [line for line in lines if line != question]
            shown = next(order for order in orders if all(tells(line, each) for line, each in zip(told, order)))
            assert all(answer(asked, lang, shown)[0] == reply for asked, reply in given)
    assert set(kinds) == set(world.USUAL)


def understandable(line, lang):
    try:
        return bool(understand(line, lang))
    except AssertionError:
        return False


def tells(line, scene):
    """Does this line say in words what is where in this scene, and nothing else, in reading order?"""
    wanted = [f"{place(thing)}{thing.size}{thing.colour}{thing.shape}".replace(" ", "") for thing in scene.things]
    return line.removeprefix("picture: ").split(" ") == wanted


ONE_OF = {  # a question about all of them → the same about one
    "en": {
        r"What colours are (.+)\?": "What colour is {}?",
        r"What shapes are (.+)\?": "What shape is {}?",
        r"Where are (.+)\?": "Where is {}?",
        r"What sizes are (.+)\?": "What size is {}?",
        r"What is in (.+)\?": "What is in {}?",
    },
    "zh": {
        "(.+)各是什么颜色？": "{}是什么颜色？",
        "(.+)各是什么形状？": "{}是什么形状？",
        "(.+)各在哪里？": "{}在哪里？",
        "(.+)各有多大？": "{}有多大？",
        "(.+)各是什么？": "{}是什么？",
    },
}


def test_a_question_about_each_is_answered_as_the_questions_about_one(scenes):
    used, forms = Counter(), Counter()
    for i, scene in enumerate([scenes[f"train_{i:05}.jpg"] for i in range(100)]):
        for row in world.text_rows_of(scene, random.Random(i), used, kinds=["each"]):
            lang, between = row["lang"], ", " if row["lang"] == "en" else "，"
            turns = [turn["content"] for turn in row["conversations"]]
            asked = [next(line for line in turn.split("\n") if not line.startswith("picture:")) for turn in turns[::2]]
            assert 1 <= len(set(asked)) == len(asked) <= 3
            for question, given in zip(asked, turns[1::2]):
                found = ((re.fullmatch(many, question), one) for many, one in ONE_OF[lang].items())
                match, one = next((match, one) for match, one in found if match)
                them = re.split(", | and |、|和", match[1])
                assert len(them) > 1
                assert given == between.join(answer(one.format(x), lang, [scene])[0] for x in them)
                forms[lang, one] += 1
    assert len(forms) == 10 and min(forms.values()) > 10


def test_lists_ask_only_what_they_are_told_to(tmp_path):
    flags = ["--scenes", "30", "--val_scenes", "5", "--form", "text", "--kinds", "each"]
    for lists, known in [
        (["place"], r"Where are |各在哪里？"),
        (["size", "shape"], r"What s(ize|hape)s |各(有多大|是什么形状)？"),
    ]:
        out = tmp_path / lists[0]
        world.main([*flags, "--out_dir", str(out), "--lists", *lists])
        rows = [json.loads(line) for line in (out / "train.jsonl").read_text(encoding="utf-8").splitlines()]
        asked = [turn["content"] for row in rows for turn in row["conversations"][::2]]
        assert len(asked) > 30 and all(re.search(known, question) for question in asked)


def test_rows_that_are_there_are_not_overwritten(tmp_path):
    (tmp_path / "val.jsonl").write_text("mine\n")
    with pytest.raises(SystemExit, match="error: --out_dir .*: val.jsonl is there already. Choose another folder"):
        world.main(["--out_dir", str(tmp_path), "--scenes", "3", "--val_scenes", "3"])
    assert [path.name for path in tmp_path.iterdir()] == ["val.jsonl"]
    assert (tmp_path / "val.jsonl").read_text() == "mine\n"


def test_scenes_hold_as_many_objects_as_asked_for(tmp_path):
    flags = ["--out_dir", str(tmp_path), "--scenes", "30", "--val_scenes", "5", "--form", "text", "--kinds", "describe"]
    world.main([*flags, "--objects", "2", "3"])
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    told = [row["conversations"][0]["content"] for row in map(json.loads, lines)]
    words = [next(line for line in text.split("\n") if line.startswith("picture: ")).split() for text in told]
    assert {len(each) for each in words} == {1 + 2, 1 + 3}


@pytest.mark.parametrize(
    "flags",
    [
        ["--scenes", "0"],
        ["--val_scenes", "0"],
        ["--image_size", "8"],
        ["--rows", "0"],
        ["--kinds", "poem"],
        ["--objects", "0", "4"],
    ],
)
def test_wrong_flags_are_named(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        world.main(["--out_dir", str(tmp_path / "out"), *flags])
    assert flags[0] in f"{error.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()
