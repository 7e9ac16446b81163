"""The picture world is reproducible, balanced and right, and the combinations of val_new occur nowhere else."""

import json
import math
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from PIL import Image

from dataset import scene_questions, scene_wordings
from dataset import scenes as world
from dataset.lm_dataset import VLMDataset
from dataset.scene_pictures import COLOURS, NEW_PAIRS, PLACES, SHAPES, Scene, Thing, without_colour
from model.processing import ImageProcessor, load_tokenizer
from scripts import train_tokenizer
from tests.conftest import no_space

SCENES, VAL = 2000, 400
ZH = scene_questions.CHINESE
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
        for split in ("train", "val", "val_wording", "val_new")
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
    """[(question without <image>, answer, names of the pictures it is about)]"""
    names, shown, found = iter(row.get("image", "").split(", ")), [], []
    texts = [turn["content"] for turn in row["conversations"]]
    for question, given in zip(texts[::2], texts[1::2]):
        tags = question.count("<image>")
        shown = [next(names) for _ in range(tags)] or shown
        found.append((question.replace("<image>", "").strip(), given, shown))
    return found


# ---------------------------------------------------------------------------- reading a question back


def plainly(text, lang):
    """A question or wording in lower case and in the world's own words, without politeness and marks."""
    text = text.lower().replace("color", "colour")
    others, _ = scene_wordings.aliases(lang)
    own = {alias: word for word, aliases in others.items() for alias in (word, *aliases)}
    words = "|".join(sorted(map(re.escape, own), key=len, reverse=True))
    if lang == "en":
        text = re.sub(r"\b(what|where)'s", r"\1 is", text)
        text = re.sub(
            rf"\b({words})(es|s)?\b", lambda m: own[m[1]] + (plural(own[m[1]])[len(own[m[1]]) :] if m[2] else ""), text
        )
        text = text.replace("this picture", "the picture")
    else:
        text = text.replace(",", "，").replace("?", "？")
        text = re.sub(words, lambda m: own[m[0]], text)
        text = re.sub("[这][张幅]图片", "图片", text)
        text = re.sub(
            f"([{''.join(ZH[colour][0] for colour in COLOURS)}])色的?(?={'|'.join(ZH[s] for s in SHAPES)})", r"\1", text
        )
    text = text.strip("?.!？。！")
    for before in sorted(scene_wordings.BEFORE[lang], key=len, reverse=True):
        text = text.removeprefix(before.lower())
    after = "|".join(sorted(scene_wordings.AFTER[lang], key=len, reverse=True))
    return re.sub(f"({after})+$", "", text).strip(".!")


def plural(noun):
    return noun + ("es" if noun.endswith("s") else "s")


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


def an(noun):
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def slot_values(lang):
    """{slot: {text: what it means}}"""

    def words(*found):
        return {word if lang == "en" else ZH[word]: word for word in found}

    x = nouns(lang)
    if lang == "en":
        claims = {word: word for word in (*COLOURS, "big", "small")} | {an(shape): shape for shape in SHAPES}
        claims |= {f"in the {place}": place for place in sum(PLACES, ())}
        sides = {"left of": "left", "right of": "right", "above": "above", "below": "below"}
    else:
        claims = {f"是{ZH[word]}": word for word in (*COLOURS, *SHAPES)} | {"是大的": "big", "是小的": "small"}
        claims |= {f"在{ZH[place]}": place for place in sum(PLACES, ())}
        sides = words("left", "right", "above", "below")
    return {
        "x": x,
        "y": x,
        "ax": {(an(noun) if lang == "en" else noun): x[noun] for noun in x},
        "xs": {(plural(noun) if lang == "en" else noun): x[noun] for noun in x},
        "p": words(*sum(PLACES, ())),
        "d": words("left or right of", "above or below"),
        "s": {
            text: "left or right of" if side in ("left", "right") else "above or below" for text, side in sides.items()
        },
        "v": claims,
    }


SLOTS = {lang: slot_values(lang) for lang in ("en", "zh")}


@cache
def patterns(lang):
    """[(kind, form, is it held out, what matches a question in this wording, made plain)]"""
    found = []
    for kind, forms in scene_wordings.wordings().items():
        for form, of_form in forms.items():
            for held_out, texts in enumerate(of_form[lang]):
                for text in texts if kind != "each" else ():
                    text = plainly(text.replace("{pic}", "the picture" if lang == "en" else "图片"), lang)
                    values = {slot: f"(?P<{slot}>{'|'.join(found)})" for slot, found in SLOTS[lang].items()}
                    pattern = re.sub(r"\\{(\w+)\\}", lambda slot, values=values: values[slot[1]], re.escape(text))
                    found.append((kind, form, bool(held_out), re.compile(pattern)))
    return found


@cache
def understand(question, lang):
    """(kind, form, {slot: meaning}, is the wording held out) of a question, which must be the only way to take it."""
    ways, plain = set(), plainly(question, lang)
    for kind, form, held_out, pattern in patterns(lang):
        if match := pattern.fullmatch(plain):
            slots = {slot: SLOTS[lang][slot][text] for slot, text in match.groupdict().items()}
            slots = {{"ax": "x", "xs": "x", "s": "d"}.get(slot, slot): meaning for slot, meaning in slots.items()}
            about = {
                **dict.fromkeys(COLOURS, "colour"),
                **dict.fromkeys(SHAPES, "shape"),
                "big": "size",
                "small": "size",
            }
            fits = {
                "exists": form == ("pair" if all(slots.get("x", "")) else "part"),
                "check": form == about.get(slots.get("v"), "place"),
            }
            if fits.get(kind, True):
                ways.add((kind, form, tuple(sorted(slots.items())), held_out))
    assert len(ways) == 1, (question, plain, ways)
    kind, form, slots, held_out = ways.pop()
    return kind, form, dict(slots), held_out


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
        parts = said if lang == "en" else [f"一个{each}" for each in said]
        joined = (", " if lang == "en" else "、").join(parts)
        return (" and " if lang == "en" else "和").join(joined.rsplit(", " if lang == "en" else "、", 1))
    if lang == "zh":
        return "，".join(f"{ZH[place(thing)]}有一个{each}" for thing, each in zip(things, said))
    return " and ".join(", ".join(f"{each} in the {place(thing)}" for thing, each in zip(things, said)).rsplit(", ", 1))


def answer(question, lang, shown):
    """(the answer, the things it is about) from where things are; asserts that the question has one answer."""
    kind, form, slots, _ = understand(question, lang)
    things = shown[0].things if shown else []
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

    def concluded(known, conclusion):
        return f"{known}: {conclusion}" if english else f"{known}：{conclusion}"

    def so(one, other, conclusion):
        return concluded(f"{one}, {other}" if english else f"{one}，{other}", conclusion)

    def which_picture(second):
        return {"en": ("the first", "the second"), "zh": ("第一张", "第二张")}[lang][second]

    def what_they_have():
        between = " has " if english else "有"
        return [f"{which_picture(i)}{between}{description(each, 'short', lang)}" for i, each in enumerate(shown)]

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
            return concluded("objects" if english else "图形", number(things)), []
        case "count", _:
            counted = plural(called(slots["x"])) if english else called(slots["x"])
            return concluded(counted, number(looking_like(slots["x"]))), looking_like(slots["x"])
        case "where", _:
            return is_in(slots["x"]), [the(slots["x"])]
        case "exists", _:
            asked_about = an(called(slots["x"])) if english else called(slots["x"])
            return concluded(asked_about, yes_no[bool(looking_like(slots["x"]))]), [slots["x"]]
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
        case "check", _:
            thing, value = the(slots["x"]), slots["v"]
            true = place(thing) if form == "place" else getattr(thing, form)
            denied = (value, thing.shape) if form == "colour" else (thing.colour, value)
            if english:
                is_so = f"the {called(slots['x'])} is {an(true) if form == 'shape' else true}"
                is_so = is_in(slots["x"]) if form == "place" else is_so
                return concluded(is_so, "yes" if value == true else "no"), [thing, denied]
            is_so = f"{called(slots['x'])}是{ZH[true]}" + "的" * (form == "size")
            is_so = is_in(slots["x"]) if form == "place" else is_so
            return concluded(is_so, "是" if value == true else "不是"), [thing, denied]
        case "greet", _:
            return scene_questions.ANSWERS["greet"][lang], []
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
            asked_about = an(called(slots["x"])) if english else called(slots["x"])
            said = (", " if english else "，").join([*what_they_have(), asked_about])
            return concluded(said, which_picture(slots["x"] in pairs[1])), [slots["x"]]
        case "compare", "both":
            return (", " if english else "，").join(what_they_have()), [t for each in shown for t in each.things]
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
    for name, split in rows.items():
        for row in split:
            for question, given, names in exchanges(row):
                shown, lang = [scenes[name] for name in names if name], row["lang"]
                kind, form, _, held_out = understand(question, lang)
                assert held_out == (name == "val_wording"), row
                seen.add((name == "val_wording", kind, form, lang))
                if row["kind"] == "blind":
                    assert not shown and given == scene_questions.ANSWERS["blind"][lang]
                    continue
                assert given == answer(question, lang, shown)[0], (row, shown)
                assert kind in row["kind"] if isinstance(row["kind"], list) else kind == row["kind"]
    table = scene_wordings.wordings()
    assert seen == {
        (held_out, kind, form, lang)
        for held_out in (False, True)
        for kind in set(table) - {"each"}
        for form in table[kind]
        for lang in ("en", "zh")
    }


def test_val_wording_asks_the_questions_of_val(rows):
    """The same rows, questions and answers; only the words differ."""
    assert len(rows["val"]) == len(rows["val_wording"])
    for one, other in zip(rows["val"], rows["val_wording"]):
        assert [one.get(key) for key in ("image", "kind", "lang")] == [
            other.get(key) for key in ("image", "kind", "lang")
        ]
        assert [given for _, given, _ in exchanges(one)] == [given for _, given, _ in exchanges(other)]
        for (question, _, _), (in_other_words, _, _) in zip(exchanges(one), exchanges(other)):
            meant, meant_too = understand(question, one["lang"]), understand(in_other_words, one["lang"])
            assert meant[:2] == meant_too[:2] and set(meant[2]) == set(meant_too[2])
            assert all(meant[2][slot] == meant_too[2][slot] for slot in meant[2])


def test_there_are_many_wordings_and_some_of_each_kind_are_held_out():
    for kind, forms in scene_wordings.wordings().items():
        for lang in ("en", "zh"):
            known = [text for of_form in forms.values() for text in of_form[lang][0]]
            held_out = [text for of_form in forms.values() for text in of_form[lang][1]]
            if kind == "each":
                assert len(known) == len(forms) and not held_out
                continue
            assert len(known) >= (20 if kind == "describe" else 8) and len(held_out) >= 3, kind
            assert not {plainly(text, lang) for text in known} & {plainly(text, lang) for text in held_out}


def test_pictures_are_before_and_after_the_text_with_any_separator(rows):
    places = Counter(
        (before[-1:], after[:1]) if before else ("first", re.match(r"\s*", after)[0])
        for row in rows["train"]
        if row.get("image") and ", " not in row["image"]
        for before, after in [row["conversations"][0]["content"].split("<image>")]
    )
    assert {(" ", ""), ("\n", ""), ("first", ""), ("first", " "), ("first", "\n\n")} <= set(places)
    after = [count for place, count in places.items() if place[0] != "first"]
    assert 0.4 < sum(after) / places.total() < 0.6


def test_a_picture_may_come_in_the_middle_of_a_conversation(rows):
    shown = [[names for _, _, names in exchanges(row)] for row in rows["train"] if isinstance(row["kind"], list)]
    later = [names for names in shown if names[0] != names[-1]]
    assert 0.1 < len(later) / len(shown) < 0.3
    assert all(len(each) == 1 for names in later for each in names)


def test_plain_rows_know_one_wording_of_each_question(tmp_path):
    world.main(["--out_dir", str(tmp_path), "--scenes", "200", "--val_scenes", "5", "--form", "text", "--plain"])
    assert not (tmp_path / "val_wording.jsonl").exists()
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    firsts = [row["conversations"][0]["content"].split("\n") for row in rows if row["kind"] == "describe"]
    asked = Counter(line for lines in firsts for line in lines if not line.startswith("picture: "))
    assert len(asked) == 6 and "Describe this picture." in asked


def test_same_seed_gives_same_bytes_and_another_seed_another_world(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):  # each in its own process, where sets have another order
        flags = ["--scenes", "40", "--val_scenes", "10", "--seed", str(seed), "--out_dir", str(tmp_path / name)]
        environment = os.environ | {"PYTHONHASHSEED": str(ord(name))}
        subprocess.run([sys.executable, "-m", "dataset.scenes", *flags], check=True, env=environment)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 4 + 40 + 10 + 10
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
    for split in ("val", "val_wording", "val_new"):
        data = VLMDataset(
            folder / f"{split}.jsonl",
            folder / "images",
            tokenizer,
            ImageProcessor(64, (64, 64)),
            max_length=640,
            image_ids=[34] * 16,
        )
        assert not data.bad and data.shortened == 0 and len(data) > 3 * VAL
        compared = next(i for i in range(len(data)) if data.row(i).kind == "compare")
        assert data[compared]["pictures"].shape == (2, 3, 64, 64)


def test_languages_and_kinds_are_mixed(rows):
    for name, split in rows.items():
        languages = Counter(row["lang"] for row in split)
        assert abs(languages["en"] - languages["zh"]) <= 0.02 * len(split)
        kinds = set(world.USUAL) - {"multi"} - (set(scene_questions.ANSWERS) if name == "val_new" else set())
        assert {row["kind"] for row in split if isinstance(row["kind"], str)} == kinds
    for row in rows["train"]:
        chinese = [bool(re.search("[\u4e00-\u9fff]", "".join(pair))) for *pair, _ in exchanges(row)]
        assert set(chinese) == {row["lang"] == "zh"}
        kinds = [row["kind"]] if isinstance(row["kind"], str) else row["kind"]
        if row["kind"] != "blind":
            assert [understand(question, row["lang"])[0] for question, *_ in exchanges(row)] == kinds
        assert isinstance(row["kind"], str) or 2 <= len(kinds) <= max(world.LENGTH)


def test_english_has_its_articles_and_plurals(rows):
    text = " ".join(
        part for row in rows["train"] if row["lang"] == "en" for *pair, _ in exchanges(row) for part in pair
    ).lower()
    assert not re.findall(r"\ba [aeiou]\w*|\ban [^aeiou]\w*|\w*crosss\w*", text)
    assert not re.findall(rf"\b(?:two|three|four) (?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})\b", text)
    assert "crosses" in text and "an orange" in text


def test_answers_are_balanced(rows):
    answers = defaultdict(Counter)
    for row in rows["train"]:
        for question, given, _ in exchanges(row):
            kind, form, slots, _ = understand(question, row["lang"])
            if kind == "greet" or row["kind"] == "blind":
                continue
            form = slots.get("d", form)
            last = re.split("[:：]| is |是|在", given.replace("不是", "no"))[-1]  # what was not known before
            last = given if kind == "describe" or form == "both" else last or "是"
            answers[kind, form, row["lang"]][last.strip()] += 1
    closed = {
        "yes",
        "no",
        "是",
        "有",
        "没有",
        "big",
        "small",
        "大",
        "小",
        "the first",
        "the second",
        "第一张",
        "第二张",
    }
    closed |= {"left", "right", "above", "below", "左边", "右边", "上面", "下面"}
    for (kind, form, _), found in answers.items():
        if set(found) <= closed:
            most = 0.65 if form == "more" else 0.58  # few rows compare, and two pictures leave one answer
            assert max(found.values()) <= most * found.total(), (kind, form, found)
        elif kind == "count":
            assert len(found) == 4 and max(found.values()) <= 0.36 * found.total(), (kind, form, found)
        elif kind in ("colour", "where") or form in ("shape", "colour"):
            assert max(found.values()) <= 1.5 * found.total() / len(found) + 5, (kind, form, found)


def test_guessing_without_looking_scores_little(rows):
    """The best guess from the question alone: what train answers to this very question most often, else to questions
    of this form most often."""
    asked, formed = defaultdict(Counter), defaultdict(Counter)

    def meaning(row):
        for question, given, _ in exchanges(row) if row["kind"] not in ("blind", "greet") else ():
            kind, form, slots, _ = understand(question, row["lang"])
            key = kind, form, row["lang"]
            yield (*key, *sorted(slots.items())), key, given

    for row in rows["train"]:
        for question, form, given in meaning(row):
            asked[question][given] += 1
            formed[form][given] += 1
    for split in ("val", "val_wording", "val_new"):
        for guess_by in ("question", "form"):
            right = []
            for question, form, given in (each for row in rows[split] for each in meaning(row)):
                known = asked[question] if guess_by == "question" and asked[question] else formed[form]
                right.append(known.most_common(1)[0][0] == given)
            share = sum(right) / len(right)
            print(f"{split}, guessing by {guess_by}: {share:.1%} of {len(right)}")
            assert share <= 0.3


def test_captions_name_every_thing_and_its_place(scenes):
    scene = next(scene for scene in scenes.values() if len(scene.things) == 3)
    found = world.captions_of(scene, "a.jpg")
    for lang in ("en", "zh"):
        said = [row["conversations"][1]["content"] for row in found if row["lang"] == lang]
        alone = [(Scene((thing,), *[None] * 4), form) for thing in scene.things for form in ("full", "shape in place")]
        assert said == [description(one, form, lang) for one, form in alone]
    assert {(row["image"], row["kind"], row["conversations"][0]["content"]) for row in found} == {
        ("a.jpg", "caption", "<image>")
    }


def test_a_shade_without_a_name_is_far_from_all_colours_and_is_not_named(scenes):
    rng, things = random.Random(0), []
    for scene in list(scenes.values())[:300]:
        shaded = without_colour(scene, rng)
        assert [replace(thing, colour="", rgb=()) for thing in shaded.things] == [
            replace(thing, colour="", rgb=()) for thing in scene.things
        ]
        things += shaded.things
        said = {row["conversations"][1]["content"] for row in world.captions_of(shaded, "a.jpg")}
        for thing in shaded.things:
            named = [text for text in said if re.search(rf"{thing.size} \w+ {thing.shape} in the {thing.place}$", text)]
            assert bool(named) == bool(thing.colour)
    nameless = [thing for thing in things if not thing.colour]
    assert 0.15 < len(nameless) / len(things) < 0.25
    assert min(math.dist(thing.rgb, rgb) for thing in nameless for rgb in COLOURS.values()) > 100


def test_only_the_encoders_training_pictures_have_such_shades(tmp_path):
    for form in ("chat", "captions"):
        world.write_world(tmp_path / form, scenes=20, val_scenes=10, seed=0, form=form)
    same = {
        path.name
        for path in (tmp_path / "chat/images").iterdir()
        if path.read_bytes() == (tmp_path / "captions/images" / path.name).read_bytes()
    }
    assert {f"{split}_{i:05}.jpg" for split in ("val", "val_new") for i in range(10)} <= same
    assert 0 < len(same) - 20 < 20


@pytest.mark.parametrize("form, pictures", [("captions", 8), ("text", 0)])
def test_other_forms_are_written_and_read(tmp_path, form, pictures):
    written = world.write_world(tmp_path, scenes=6, val_scenes=1, seed=0, form=form)
    assert len(list(tmp_path.glob("images/*.jpg"))) == pictures
    for split, number in written.items():
        lines = [json.loads(line) for line in (tmp_path / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(lines) == number > 0
        assert all(("image" in line) == (pictures > 0) for line in lines)


def test_the_order_of_names_does_not_reveal_the_answer(rows):
    first = []
    for row in rows["train"]:
        for question, given, _ in exchanges(row):
            if row["kind"] != "blind" and understand(question, row["lang"])[:2] == ("size", "which"):
                known, bigger = re.split("[:：] ?", given)
                first.append(known.startswith(bigger))
    assert 0.4 < sum(first) / len(first) < 0.6


def test_what_is_held_out_occurs_in_val_new_only(rows, scenes):
    for name, scene in scenes.items():
        assert new_among(scene.things) == name.startswith("val_new"), name
        assert 1 <= len(scene.things) <= 4
    for split in ("train", "val"):
        for row in rows[split]:
            text = " ".join(plainly(turn["content"], row["lang"]) for turn in row["conversations"])
            for colour, shape in NEW_PAIRS:
                assert not re.search(rf"{colour} {shape}|{ZH[colour][0]}色?{ZH[shape]}", text), row
    drawn = [thing for name, scene in scenes.items() if name.startswith("train") for thing in scene.things]
    assert {thing.colour for thing in drawn} == set(COLOURS) and {thing.shape for thing in drawn} == set(SHAPES)
    assert {colour for colour, _ in NEW_PAIRS} == set(COLOURS) and {shape for _, shape in NEW_PAIRS} == set(SHAPES)


def test_every_answer_of_val_new_is_about_something_held_out(rows, scenes):
    corners = 0
    for row in rows["val_new"]:
        for question, _, names in exchanges(row):
            about = answer(question, row["lang"], [scenes[name] for name in names])[1]
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


OBJECT = f"(?:{'|'.join(name.replace(' ', '') for name in sum(PLACES, ()))})(?:big|small)(?:{'|'.join(COLOURS)})"
TOLD = re.compile(rf"picture:((?: {OBJECT}(?:{'|'.join(SHAPES)}))+)(?=\s|$)")  # a picture in words


def test_text_rows_hold_the_whole_scene_in_words_and_the_same_questions(scenes):
    used, several = Counter(), [scenes[f"train_{i:05}.jpg"] for i in range(300)]
    looks = [
        "".join(f" {place(thing).replace(' ', '')}{thing.size}{thing.colour}{thing.shape}" for thing in scene.things)
        for scene in several
    ]
    in_words, kinds = dict(zip(looks, several)), Counter()
    for i, scene in enumerate(several[1:], start=1):
        for row in world.text_rows_of(scene, random.Random(i), used, other=several[i - 1]):
            assert "image" not in row
            kinds["multi" if isinstance(row["kind"], list) else row["kind"]] += 1
            turns, shown = [turn["content"] for turn in row["conversations"]], []
            for asked, given in zip(turns[::2], turns[1::2]):
                shown = [in_words[words] for words in TOLD.findall(asked)] or shown
                assert "<image>" not in asked and all(each in looks[i - 1 : i + 1] for each in TOLD.findall(asked))
                if row["kind"] not in ("blind", "greet"):
                    assert given == answer(TOLD.sub("", asked).strip(), row["lang"], shown)[0], row
    assert set(kinds) == set(world.USUAL)


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
        for row in world.text_rows_of(scene, random.Random(i), used, kinds=["each"], style="plain"):
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


def there_are(noun, scene, lang):
    """How many things fit a noun that may include the size: "big star", "大星星"."""
    known = {size: size if lang == "en" else ZH[size] for size in ("big", "small")}
    size = next((size for size, word in known.items() if noun.startswith(word)), "")
    colour, shape = nouns(lang)[noun.removeprefix(known.get(size, "")).strip()]
    looks = [(thing.size, thing.colour, thing.shape) for thing in scene.things]
    return sum(all(word in ("", part) for word, part in zip((size, colour, shape), look)) for look in looks)


def test_lists_of_objects_counts_and_claims_have_the_answers_of_single_questions(scenes):
    verdicts = Counter()
    for i, scene in enumerate([scenes[f"train_{i:05}.jpg"] for i in range(150)]):
        for form in ("exists", "count", "check"):
            for row in world.text_rows_of(scene, random.Random(i), Counter(), 2, ["each"], lists=[form], style="plain"):
                lang = row["lang"]
                question, given = (turn["content"].split("\n")[-1] for turn in row["conversations"])
                many = scene_wordings.wordings()["each"][form][lang][0][0]
                before, after = map(re.escape, many.split("{them}"))
                asked = re.split(", | and |、|和", re.fullmatch(f"{before}(.+){after}", question)[1])
                said = re.split(", |，", given)
                assert len(asked) == len(said) > 1 and len(set(asked)) == len(asked)
                for one, its_answer in zip(asked, said):
                    known, verdict = re.split("[:：] ?", its_answer)
                    verdicts[form, lang, verdict] += 1
                    if form == "check":
                        single = f"Is {one}?" if lang == "en" else f"{one}，对不对？"
                        assert its_answer == answer(single, lang, [scene])[0]
                        continue
                    assert known == one
                    noun = re.sub("^an? ", "", one) if form == "exists" else re.sub(r"(?<=s)es$|s$", "", one)
                    found = there_are(noun if lang == "en" else one, scene, lang)
                    if form == "exists":
                        assert verdict == {"en": ("no", "yes"), "zh": ("没有", "有")}[lang][found > 0]
                    else:
                        number = ("one", "two", "three", "four")[found - 1]
                        assert verdict == (number if lang == "en" else ZH[number])
    for form, both in {"exists": ("no", "yes", "没有", "有"), "check": ("no", "yes", "不是", "是")}.items():
        found = [
            [verdicts[form, lang, verdict] for verdict in pair] for lang, pair in (("en", both[:2]), ("zh", both[2:]))
        ]
        assert all(0.7 < no / yes < 1.4 and yes > 100 for no, yes in found), (form, found)


def test_lists_ask_only_the_selected_kinds(tmp_path):
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
    with pytest.raises(SystemExit, match="error: --out_dir .*: val.jsonl exists already. Choose another folder"):
        world.main(["--out_dir", str(tmp_path), "--scenes", "3", "--val_scenes", "3"])
    assert [path.name for path in tmp_path.iterdir()] == ["val.jsonl"]
    assert (tmp_path / "val.jsonl").read_text() == "mine\n"


def test_scenes_hold_as_many_objects_as_asked_for(tmp_path):
    flags = ["--out_dir", str(tmp_path), "--scenes", "30", "--val_scenes", "5", "--form", "text", "--kinds", "describe"]
    world.main([*flags, "--objects", "2", "3"])
    lines = (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()
    told = [TOLD.search(row["conversations"][0]["content"])[1].split() for row in map(json.loads, lines)]
    assert {len(words) for words in told} == {2, 3}


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


def test_a_disk_that_fills_up_while_scenes_are_drawn_is_called_full(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "save_jpeg", no_space)
    with pytest.raises(SystemExit, match="error: the disk is full; nothing was overwritten"):
        world.main(["--out_dir", str(tmp_path), "--scenes", "1", "--val_scenes", "1"])
    assert not list(tmp_path.glob("*.jsonl"))
