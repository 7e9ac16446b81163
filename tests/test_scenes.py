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
                found[(ZH[colour] + "的" if colour else "") + (ZH[shape] if shape else "图形")] = (colour, shape)
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
        "d": words("left of", "right of", "above", "below"),
        "m": words("leftmost", "rightmost", "topmost", "lowest"),
        "s": words("big", "small"),
        "o": words("first", "second"),
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


def is_beyond(one, other, side):
    """Clearly on this side: by a sixth of the picture."""
    gap = {"left": other.x - one.x, "right": one.x - other.x, "above": other.y - one.y, "below": one.y - other.y}
    return gap[side.split()[0]] > 1 / 6


def place(thing):
    return PLACES[int(thing.y * 3)][int(thing.x * 3)]


def noun(thing, lang, mentions=("colour", "shape")):
    colour, size, shape = ((thing.colour, thing.size, thing.shape)[i] if each in mentions else "" for i, each in
                           enumerate(("colour", "size", "shape")))  # fmt: skip
    if lang == "zh":
        return (ZH[colour] + "的" if colour else "") + ZH.get(size, "") + ZH[shape]
    text = " ".join(word for word in (size, colour, shape) if word)
    return f"{'an' if text.startswith('orange') else 'a'} {text}"


def description(scene, form, lang):
    """What a picture's description should be: things from left to right, row by row."""
    things = sorted(scene.things, key=lambda thing: (int(thing.y * 3), int(thing.x * 3)))
    mentions = {"short": "colour shape", "shapes": "shape", "sizes": "size shape", "layout": "shape"}
    mentions = mentions.get(form, "colour shape size" if form == "full" else "colour shape")
    said = [noun(thing, lang, mentions) for thing in things]
    if form in ("short", "shapes", "sizes"):
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
    scene = shown[slots["o"] == "second"] if "o" in slots else shown[0]
    things = scene.things

    def say(word):
        return word if lang == "en" else ZH[word]

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

    def which_picture(second):
        return {"en": ("the first", "the second"), "zh": ("第一张", "第二张")}[lang][second]

    yes_no = {"en": ("no", "yes"), "zh": ("没有", "有") if kind == "exists" else ("不是", "是")}[lang]
    match kind, form:
        case "describe", _:
            return description(scene, form, lang), list(things)
        case (("what" | "colour"), "at"):
            thing = only([thing for thing in things if place(thing) == slots["p"]])
            return (noun(thing, lang) if kind == "what" else say(thing.colour)), [thing]
        case "what", "most":
            side = {"leftmost": "left", "rightmost": "right", "topmost": "above", "lowest": "below"}[slots["m"]]
            thing = only([one for one in things if all(one is o or is_beyond(one, o, side) for o in things)])
            return noun(thing, lang), [thing]
        case "what", "shape":
            return say(the(slots["x"]).shape), [the(slots["x"])]
        case ("colour", "of") | ("compare", "colour"):
            return say(the(slots["x"]).colour), [the(slots["x"])]
        case ("count", "all") | ("compare", "count"):
            return number(things), []
        case "count", _:
            return number(looking_like(slots["x"])), looking_like(slots["x"])
        case "where", _:
            return say(place(the(slots["x"]))), [the(slots["x"])]
        case "exists", _:
            return yes_no[bool(looking_like(slots["x"]))], [slots["x"]]
        case "relation", "what":
            y = the(slots["y"])
            thing = only([one for one in things if is_beyond(one, y, slots["d"])])
            return noun(thing, lang), [thing, y]
        case "relation", _:
            x, y = the(slots["x"]), the(slots["y"])
            sides = [side for side in ("left", "right", "above", "below") if is_beyond(x, y, side)]
            if form == "side":
                return say(only(sides)), [x, y]
            assert is_beyond(x, y, slots["d"]) != is_beyond(y, x, slots["d"])  # not on one line, where both would be no
            return yes_no[is_beyond(x, y, slots["d"])], [x, y]
        case "size", "of":
            return say(the(slots["x"]).size), [the(slots["x"])]
        case "size", "only":
            thing = only([thing for thing in things if thing.size == slots["s"]])
            return noun(thing, lang), [thing]
        case "size", _:
            x, y = the(slots["x"]), the(slots["y"])
            assert max(x.radius, y.radius) > 1.4 * min(x.radius, y.radius)
            if form == "is":
                return yes_no[x.radius > y.radius], [x, y]
            bigger = noun(max(x, y, key=lambda thing: thing.radius), lang)
            return re.sub("^an? ", "the ", bigger), [x, y]
        case "compare", "more":
            first, second = (len(each.things) for each in shown)
            assert first != second
            return which_picture(second > first), []
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
                assert row["kind"] in (kind, "multi")
                seen.add((kind, form, row["lang"]))
    assert seen == {(kind, form, lang) for kind, forms in world.ASK.items() for form in forms for lang in ("en", "zh")}


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
            max_length=320,
            image_special_token="@" * 16,
        )
        assert not data.bad and data.shortened == 0 and len(data) > 3 * VAL
        compared = next(i for i in range(len(data)) if json.loads(data.line(i))["kind"] == "compare")
        assert data[compared]["pictures"].shape == (2, 3, 64, 64)


def test_languages_kinds_and_wordings_are_mixed(rows):
    for split in rows.values():
        languages = Counter(row["lang"] for row in split)
        assert abs(languages["en"] - languages["zh"]) <= 0.02 * len(split)
        assert {row["kind"] for row in split} == set(world.KINDS)
    for row in rows["train"]:
        chinese = [bool(re.search("[\u4e00-\u9fff]", "".join(pair))) for pair in exchanges(row)]
        assert set(chinese) == {row["lang"] == "zh"}
        assert len(chinese) in (range(2, 9) if row["kind"] == "multi" else (1,))
    for forms in world.ASK.values():
        for lang in ("en", "zh"):
            assert len({wording[lang] for wordings in forms.values() for wording in wordings}) >= 6


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
            kind, form, _ = understand(question, row["lang"])
            answers[kind, form, row["lang"]][given] += 1
    closed = {"yes", "no", "有", "没有", "是", "不是", "big", "small", "大", "小", "the first", "the second"}
    for (kind, form, _), found in answers.items():
        if set(found) <= closed | {"第一张", "第二张"}:
            assert max(found.values()) <= 0.58 * found.total(), (kind, form, found)
        elif kind == "count" or form == "side":
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
        alone = [(Scene((thing,), *[None] * 4), form) for thing in scene.things for form in ("full", "layout")]
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
                named = given.removeprefix("the ")
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
                assert not re.search(rf"{colour} {shape}|{ZH[colour]}的[大小]?{ZH[shape]}", text), row
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
            kinds[row["kind"]] += 1
            lines = first.split("\n")
            orders = [[scene, other], [other, scene]] if row["kind"] == "compare" else [[scene]]
            assert len(lines) == len(orders) + 1
            turns = [turn["content"] for turn in row["conversations"]]
            question = lines[-1] if row["kind"] == "compare" or understandable(lines[-1], lang) else lines[0]
            given = [(question, turns[1]), *zip(turns[2::2], turns[3::2])]
            told = [line for line in lines if line != question]
            shown = next(order for order in orders if all(tells(line, each, lang) for line, each in zip(told, order)))
            assert all(answer(asked, lang, shown)[0] == reply for asked, reply in given)
    assert set(kinds) == set(world.KINDS)


def understandable(line, lang):
    try:
        return bool(understand(line, lang))
    except AssertionError:
        return False


def tells(line, scene, lang):
    """Does this line say in words what is where in this scene, and nothing else, in reading order?"""
    wanted = [re.sub("^an? ", "", noun(thing, lang, ("colour", "shape", "size"))) for thing in scene.things]
    places = [place(thing) if lang == "en" else ZH[place(thing)] for thing in scene.things]
    return re.split("; |；", line) == [f"{p}{': ' if lang == 'en' else '：'}{x}" for p, x in zip(places, wanted)]


@pytest.mark.parametrize(
    "flags",
    [["--scenes", "0"], ["--val_scenes", "0"], ["--image_size", "8"], ["--rows", "0"], ["--kinds", "poem"]],
)
def test_wrong_flags_are_named(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        world.main(["--out_dir", str(tmp_path / "out"), *flags])
    assert flags[0] in f"{error.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()
