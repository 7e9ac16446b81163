"""The second picture world is reproducible, right, balanced, and shares nothing with the first."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest

from dataset import scene_pictures, scene_wordings
from dataset import toys as world
from dataset.lm_dataset import VLMDataset
from model.processing import ImageProcessor

SCENES, VAL = 600, 200
ZH = world.CHINESE
COLOURS = {"en": {word: word for word in world.COLOURS}, "zh": {ZH[word]: word for word in world.COLOURS}}
NAMES = {"en": {word: word for word in world.TOYS}, "zh": {ZH[word]: word for word in world.TOYS}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    world.write_toys(folder, scenes=SCENES, val_scenes=VAL)
    return folder


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def rows(folder):
    return {split: read(folder / f"{split}.jsonl") for split in ("train", "val")}


def shown(row):
    """The toy of a row's picture, drawn from the same seed."""
    split, number = row["image"].removesuffix(".jpg").split("_")
    return world.random_toy(random.Random(f"0 {split} {int(number)}"))


def exchange(row):
    question, answer = (turn["content"] for turn in row["conversations"])
    assert question.startswith("<image>\n") or question.endswith("\n<image>")
    return question.replace("<image>", "").strip(), answer


def understand(question, lang):
    """(kind, form, colour, name) of a question, which must be the only way to take it."""
    found = []
    for (kind, form), wordings in world.ASK.items():
        for wording in wordings:
            pattern = re.escape(wording[lang]).replace(r"\{c\}", f"(?P<c>{'|'.join(COLOURS[lang])})")
            match = re.fullmatch(pattern.replace(r"\{x\}", f"(?P<x>{'|'.join(NAMES[lang])})"), question)
            if match:
                slots = match.groupdict()
                found.append((kind, form, COLOURS[lang].get(slots.get("c")), NAMES[lang].get(slots.get("x"))))
    assert len(found) == 1, (question, found)
    return found[0]


def answer_of(question, lang, toy):
    """From the toy, without the code that wrote the row."""
    kind, form, colour, name = understand(question, lang)
    words = (toy.colour, toy.name) if lang == "en" else (ZH[toy.colour], ZH[toy.name])
    if kind == "name":
        return {"en": "a {} {}", "zh": "{}的{}"}[lang].format(*words)
    if kind in ("color", "toy"):
        assert (name or toy.name, colour or toy.colour) == (toy.name, toy.colour)
        return words[kind == "toy"]
    assert form != "of" or name == toy.name  # "the house" is there
    true = colour in (None, toy.colour) and name in (None, toy.name)
    return {"en": ("no", "yes"), "zh": ("不对", "对")}[lang][true != (kind == "not")]


def test_every_question_can_be_taken_one_way_and_its_answer_is_right(rows):
    seen = set()
    for row in rows["train"] + rows["val"]:
        question, answer = exchange(row)
        assert answer == answer_of(question, row["lang"], shown(row)), row
        kind, form, *_ = understand(question, row["lang"])
        assert kind == row["kind"] and bool(re.search("[\u4e00-\u9fff]", question + answer)) == (row["lang"] == "zh")
        seen.add((kind, form, row["lang"]))
    assert seen == {(*form, lang) for form in world.ASK for lang in ("en", "zh")}


def test_there_are_ten_questions_a_picture_half_of_them_chinese_and_none_twice(rows):
    for split, pictures in (("train", SCENES), ("val", VAL)):
        assert len(rows[split]) == 10 * pictures == len({(row["image"], exchange(row)[0]) for row in rows[split]})
        assert abs(Counter(row["lang"] for row in rows[split])["zh"] - 5 * pictures) <= pictures / 2


def test_guessing_without_looking_scores_little(rows):
    """The best guess from the question alone, and yes or no to a form of question."""
    asked, formed, closed = defaultdict(Counter), defaultdict(Counter), defaultdict(Counter)
    for row in rows["train"]:
        question, answer = exchange(row)
        form = (*understand(question, row["lang"])[:2], row["lang"])
        asked[question][answer] += 1
        formed[form][answer] += 1
        if row["kind"] in ("has", "is", "not"):
            closed[form][answer] += 1
    assert all(max(found.values()) <= 0.55 * found.total() for found in closed.values())
    right = 0
    for row in rows["val"]:
        question, answer = exchange(row)
        known = asked[question] or formed[(*understand(question, row["lang"])[:2], row["lang"])]
        right += known.most_common(1)[0][0] == answer
    print(f"guessing by question: {right / len(rows['val']):.1%}")
    assert right / len(rows["val"]) <= 0.33


def test_nothing_of_it_is_in_the_first_world():
    assert not set(world.COLOURS) & set(scene_pictures.COLOURS) and not set(world.TOYS) & set(scene_pictures.SHAPES)
    asked = {wording[lang] for wordings in world.ASK.values() for wording in wordings for lang in wording}
    assert not [text for text in asked if text.replace("{c}", "{v}") in scene_wordings.WORDINGS]


def test_same_seed_gives_same_bytes_and_another_seed_another_world(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):  # each in its own process, where sets have another order
        flags = ["--scenes", "20", "--val_scenes", "5", "--seed", str(seed), "--out_dir", str(tmp_path / name)]
        environment = os.environ | {"PYTHONHASHSEED": str(ord(name))}
        subprocess.run([sys.executable, "-m", "dataset.toys", *flags], check=True, env=environment)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 2 + 20 + 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_fewer_rows_show_the_same_pictures_and_no_picture_is_in_two_splits(folder, tmp_path):
    world.main(["--out_dir", str(tmp_path), "--scenes", "20", "--val_scenes", "5", "--rows", "1", "--kinds", "name"])
    assert len(read(tmp_path / "train.jsonl")) == 20 and {row["kind"] for row in read(tmp_path / "val.jsonl")} == {
        "name"
    }
    for path in (tmp_path / "images").iterdir():
        assert path.read_bytes() == (folder / "images" / path.name).read_bytes()
    pictures = [path.read_bytes() for path in (folder / "images").iterdir()]
    assert len(set(pictures)) == len(pictures) == SCENES + VAL


@pytest.mark.parametrize("colour", world.COLOURS)
def test_every_toy_has_its_colour_and_stands_out(colour):
    for name in world.TOYS:
        toy = world.Toy(colour, name, 0.5, 0.5, 0.3)
        pixels = np.asarray(world.draw(toy, random.Random(1), 72)).astype(int)
        near = np.abs(pixels - world.COLOURS[colour]).max(axis=2) < 45
        assert near[14:58, 14:58].sum() > 120, name
        assert near.sum() == near[13:59, 13:59].sum(), name


def test_rows_go_through_the_ordinary_reader(folder, tokenizer):
    shape = ImageProcessor(64, (64, 64))
    data = VLMDataset(folder / "val.jsonl", folder / "images", tokenizer, shape, 640, image_ids=[34] * 16)
    assert len(data) == 10 * VAL and not data.bad and not data.mended and data[0]["pictures"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("flags", [["--scenes", "0"], ["--rows", "21"], ["--image_size", "8"], ["--kinds", "poem"]])
def test_wrong_flags_are_named(flags, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        world.main(["--out_dir", str(tmp_path / "out"), *flags])
    assert flags[0] in f"{error.value} {capsys.readouterr().err}" and not (tmp_path / "out").exists()


def test_rows_that_are_there_are_not_overwritten(tmp_path):
    (tmp_path / "val.jsonl").write_text("mine\n")
    with pytest.raises(SystemExit, match="error: --out_dir .*: val.jsonl exists already. Choose another folder"):
        world.main(["--out_dir", str(tmp_path), "--scenes", "3", "--val_scenes", "3"])
    assert (tmp_path / "val.jsonl").read_text() == "mine\n" and len(list(tmp_path.iterdir())) == 1
