"""Rows of any shape become training rows and held-out rows of other pictures."""

import json
from io import BytesIO

import pytest
from PIL import Image

from dataset import split
from dataset.lm_dataset import VLMDataset
from model.processing import ImageProcessor
from tests.conftest import turn, write_rows


def jpeg(colour, size=(40, 30), kind="JPEG"):
    file = BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return file.getvalue()


def colour(number):
    return number % 256, 40 + number // 256, 100


@pytest.fixture
def photos(tmp_path):
    """30 pictures with two English captions and a Chinese one each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    rows = []
    for number in range(30):
        (folder / f"{number}.jpg").write_bytes(jpeg(colour(number * 8)))
        captions = [f"colour {number}", f"a colour, number {number}", f"颜色{number}"]
        rows.append({"image": f"{number}.jpg", "captions": captions})
    return write_rows(tmp_path / "rows.jsonl", rows), folder


def run(out, *flags):
    split.main([*map(str, flags), "--out_dir", str(out)])
    return [read(out / f"{name}.jsonl") for name in ("train", "val")]


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def images(rows):
    return {row["image"] for row in rows}


def test_no_picture_is_on_both_sides_and_the_split_is_always_the_same(photos, tmp_path):
    rows, folder = photos
    train, val = run(tmp_path / "a", "--data_path", rows, "--images_path", folder)
    assert len(images(train)) == 27 and len(images(val)) == 3 and not images(train) & images(val)
    assert len(train) == 27 * 3 and len(val) == 3 * 2  # each caption; one question for each language
    assert images(train) | images(val) == {path.name for path in (tmp_path / "a/images").iterdir()}
    refs = json.loads((tmp_path / "a/val_refs.json").read_text(encoding="utf-8"))
    assert set(refs) == images(val) and all(len(captions) == 3 for captions in refs.values())
    assert all(row["conversations"][1]["content"] in refs[row["image"]] for row in val)
    refs = json.loads((tmp_path / "a/train_refs.json").read_text(encoding="utf-8"))
    assert {(name, text) for name, texts in refs.items() for text in texts} == {
        (row["image"], row["conversations"][1]["content"]) for row in train
    }
    lines = rows.read_text(encoding="utf-8").splitlines()
    backwards = tmp_path / "backwards.jsonl"
    backwards.write_text("\n".join(reversed(lines)), encoding="utf-8")
    assert images(run(tmp_path / "b", "--data_path", backwards, "--images_path", folder)[1]) == images(val)


def test_the_rows_of_typical_captions_are_a_part_of_the_training_rows(photos, tmp_path):
    rows, folder = photos
    others = write_rows(
        tmp_path / "others.jsonl",
        [{"image": f"{n}.jpg", "captions": ["who knows", f"the colour {n}"]} for n in range(30)],
    )
    train, _ = run(tmp_path / "out", "--data_path", rows, others, "--images_path", folder)
    typical = read(tmp_path / "out/typical.jsonl")
    assert len(train) == 27 * 5 and len(typical) == 27 * 3  # two of four in English, the Chinese one
    assert typical == [row for row in train if row in typical]  # in the same order
    assert {row["conversations"][1]["content"] for row in typical}.isdisjoint({"who knows"})


def test_a_picture_under_two_names_is_one(photos, tmp_path):
    rows, folder = photos
    for number in range(30):
        (folder / f"copy_{number}.jpg").write_bytes((folder / f"{number}.jpg").read_bytes())
    copies = [{"image": f"copy_{number}.jpg", "caption": f"again {number}"} for number in range(30)]
    copies = write_rows(tmp_path / "copies.jsonl", copies)
    train, val = run(tmp_path / "out", "--data_path", rows, copies, "--images_path", folder)
    assert len(images(train) | images(val)) == 30 and not images(train) & images(val)
    assert len(train) == 27 * 4


def test_large_pictures_become_small_and_small_jpegs_stay_as_they_are(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    contents = {"wide.jpg": jpeg("red", (600, 300)), "small.jpg": jpeg("blue", (50, 64)), "late.jpg": jpeg("lime")}
    contents["high.png"] = jpeg("green", (100, 900), "PNG")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    rows = write_rows(tmp_path / "rows.jsonl", [{"image": name, "caption": f"it is {name}"} for name in contents])
    train, val = run(tmp_path / "out", "--data_path", rows, "--images_path", folder, "--image_size", 64)
    sizes = {}
    for row in train + val:
        with Image.open(tmp_path / "out/images" / row["image"]) as image:
            assert image.format == "JPEG"
            sizes[row["conversations"][1]["content"].removeprefix("it is ")] = image.size
            if "small" in row["conversations"][1]["content"]:
                assert (tmp_path / "out/images" / row["image"]).read_bytes() == contents["small.jpg"]
    assert sizes == {"wide.jpg": (128, 64), "small.jpg": (50, 64), "high.png": (64, 576), "late.jpg": (40, 30)}


def test_rows_of_other_kinds_are_left_out_and_counted(photos, tmp_path, capsys):
    rows, folder = photos
    others = [{"conversations": [turn("user", "Hi"), turn("assistant", "Hello")]}]
    two = [turn("user", "<image>\nWhat?"), turn("assistant", "This."), turn("user", "And?"), turn("assistant", "That.")]
    others += [{"image": "1.jpg", "conversations": two}]
    others += [
        {"image": ["1.jpg", "2.jpg"], "conversations": [turn("user", "<image><image>?"), turn("assistant", "x")]}
    ]
    train, _ = run(
        tmp_path / "out", "--data_path", rows, write_rows(tmp_path / "o.jsonl", others), "--images_path", folder
    )
    assert len(train) == 27 * 3
    assert "30 pictures with 90 captions; 3 rows without exactly one of each skipped" in capsys.readouterr().out


def test_rows_to_hold_out_can_be_given_with_further_captions(photos, tmp_path, capsys):
    rows, folder = photos
    val = [{"image": f"{number}.jpg", "caption": f"colour {number}"} for number in range(5)]
    val = write_rows(tmp_path / "val.jsonl", val)
    refs = tmp_path / "refs.json"
    refs.write_text(json.dumps({f"{number}.jpg": [f"colour {number}", f"more {number}"] for number in range(5)}))
    flags = ["--data_path", rows, "--images_path", folder, "--val_path", val]
    train, held_out = run(tmp_path / "out", *flags, "--refs_path", refs)
    assert len(images(train)) == 25 and len(held_out) == 5
    assert "5 pictures of --val_path are also in --data_path: not used for training" in capsys.readouterr().out
    captions = json.loads((tmp_path / "out/val_refs.json").read_text()).values()
    assert sorted(captions) == [[f"colour {number}", f"more {number}"] for number in range(5)]
    refs.write_text('{"else.jpg": ["a"]}')
    with pytest.raises(ValueError, match="--refs_path contains none of the pictures of --val_path"):
        run(tmp_path / "other", *flags, "--refs_path", refs)


def test_pictures_in_the_rows_are_written_out_and_training_reads_the_result(tmp_path, tokenizer):
    import pyarrow as pa
    import pyarrow.parquet

    table = [{"image": {"bytes": jpeg(colour(n * 9)), "path": None}, "caption": f"number {n}"} for n in range(20)]
    pa.parquet.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
    train, val = run(tmp_path / "out", "--data_path", tmp_path / "rows.parquet")
    assert len(train) == 18 and len(val) == 2
    data = VLMDataset(tmp_path / "out/train.jsonl", None, tokenizer, ImageProcessor(32, (32, 32)), 300, [34] * 16)
    assert len(data) == 18 and data[0]["pictures"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"image": "gone.jpg", "caption": "x"}, r"gone.jpg in .*rows.jsonl is not in .*photos"),
        ({"image": "https://a.example/b.jpg", "caption": "x"}, r"https://.*\n--allow_urls downloads it"),
        (
            {"image": "broken.jpg", "caption": "x"},
            r"--images_path: .*broken.jpg cannot be read.*\nFix the picture, or remove its rows from .*rows.jsonl",
        ),
        ({"conversations": [turn("user", "Hi"), turn("assistant", "Ho")]}, "no row with one picture and one caption"),
        ({"image": "0.jpg", "caption": "x"}, "two pictures are held out, so none is left"),
    ],
)
def test_unusable_pictures_are_named(photos, tmp_path, row, message):
    rows, folder = photos
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    write_rows(rows, [row])
    with pytest.raises((ValueError, OSError), match=message):
        run(tmp_path / "out", "--data_path", rows, "--images_path", folder)


def test_references_without_held_out_rows_are_refused(photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path / "out", "--data_path", photos[0], "--refs_path", "refs.json")
    assert "--refs_path requires --val_path" in capsys.readouterr().err
