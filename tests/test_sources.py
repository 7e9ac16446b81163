"""dataset/sources.py: zips, Parquet, several files with weights, and repairs of known defects."""

import io
import json
import shutil
import zipfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image

from dataset import sources
from dataset.batches import StepSampler
from dataset.lm_dataset import VLMDataset
from dataset.pictures import Folder, Zip
from dataset.rows import drop_tags, parse_line, rows_of
from dataset.values import BadRow
from inference.scoring import ShuffledPictures
from model import weights
from model.files import read_json
from model.model_vlm import MiniMindVLM
from model.processing import ImageProcessor, load_tokenizer
from tests.conftest import no_space, turn, write_rows

P = 16  # placeholders of a picture in the tests' world


def chat(*texts):
    return [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]


def row(*texts, image=None):
    return {"conversations": chat(*texts), **({"image": image} if image else {})}


def picture(colour, size=(32, 32)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def parsed(line):
    """The one row of a line."""
    (only,) = parse_line(line)
    return only


BLACK = picture("black", (8, 8))  # what text rows of the public Parquet files carry


def write_parquet(path, rows, several=True, **options):
    """rows: (conversations, [pictures])"""
    texts = [json.dumps(conversations, ensure_ascii=False) for conversations, _ in rows]
    images = [pictures if several else pictures[0] for _, pictures in rows]
    kind = pa.list_(pa.binary()) if several else pa.binary()
    table = pa.table({"conversations": texts, "image_bytes": pa.array(images, kind)})
    pyarrow.parquet.write_table(table, path, **options)
    return path


@pytest.fixture
def read(tokenizer, clip_folder):
    def read(data_path, images_path=None, **options):
        options = {"max_length": 200, "image_ids": [34] * P} | options
        return VLMDataset(data_path, images_path, tokenizer, ImageProcessor.from_pretrained(clip_folder), **options)

    return read


def text(data, tokenizer, i) -> str:
    return tokenizer.decode(data[i]["input_ids"])


def colours(data) -> list[list]:
    """The middle pixel of every picture of every row."""
    return [[] if data[i]["pictures"] is None else data[i]["pictures"][:, :, 16, 16].tolist() for i in range(len(data))]


RED, GREEN, BLUE = [255, 0, 0], [0, 128, 0], [0, 0, 255]


# ---------------------------------------------------------------------------- zip


@pytest.fixture
def make_zip(tmp_path):
    def make_zip(names, name="pictures.zip", method=zipfile.ZIP_DEFLATED, comment=b""):
        with zipfile.ZipFile(tmp_path / name, "w", method) as archive:
            for entry, colour in names.items():
                archive.writestr(entry, picture(colour))
            archive.comment = comment
        return tmp_path / name

    return make_zip


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("folder", ["", "sft_images/", "a/b/"])
def test_a_zip_is_read_as_the_folder_it_holds_without_being_unpacked(read, make_zip, tmp_path, method, folder):
    archive = make_zip({f"{folder}{name}.png": name for name in ("red", "green", "blue")}, method=method, comment=b"hi")
    rows = [row("<image>", "b", image="blue.png"), row("<image>\n<image>", "b", image="red.png, ./green.png")]
    data = read(write_rows(tmp_path / "rows.jsonl", rows), archive)
    assert colours(data) == [[BLUE], [RED, GREEN]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures.zip", "rows.jsonl"]


def test_folders_inside_a_zip_that_only_some_share_belong_to_the_names(make_zip):
    archive = Zip(
        make_zip({"all/x/red.png": "red", "all/xy.png": "green", "__MACOSX/all/red.png": "blue", "all/é中.png": "blue"})
    )
    assert [archive.has(name) for name in ("x/red.png", "xy.png", "é中.png")] == [True] * 3
    assert [archive.has(name) for name in ("red.png", "x/", "al/xy.png", "", "zz", "x/red.pn")] == [False] * 6
    assert Image.open(archive.open("é中.png")).getpixel((0, 0)) == (0, 0, 255)


def test_a_picture_that_is_not_in_the_zip_is_named_with_its_row(read, make_zip, tmp_path):
    archive = make_zip({"red.png": "red"})
    path = write_rows(
        tmp_path / "rows.jsonl", [row("<image>", "b", image="red.png"), row("<image>", "b", image="no.png")]
    )
    with pytest.raises(ValueError, match=r"rows.jsonl:2: no.png is not in .*pictures.zip"):
        read(path, archive)


def test_names_find_their_picture_with_the_folders_of_the_zip_too_and_the_last_of_several(make_zip, tmp_path):
    path = make_zip({"x/a.png": "red", "x/b.png": "green"})
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x/a.png", picture("blue"))
        archive.writestr("x/" + "long" * 1000, b"")
    found = Zip(path)
    assert found.has("x/b.png") and found.has("b.png") and found.names.nbytes < 100
    assert Image.open(found.open("a.png")).getpixel((0, 0)) == (0, 0, 255)
    with pytest.raises(ValueError, match="uses compression method 12: unpack it"):
        Zip(make_zip({"a.png": "red"}, "bz.zip", method=zipfile.ZIP_BZIP2))


def test_a_damaged_picture_in_a_zip_is_a_broken_picture_of_its_row(read, make_zip, tmp_path):
    archive = make_zip({"red.png": "red", "green.png": "green"}, method=zipfile.ZIP_STORED)
    content = bytearray(archive.read_bytes())
    content[content.index(picture("red")) + 60] ^= 1
    archive.write_bytes(content)
    path = write_rows(tmp_path / "rows.jsonl", [row("<image>", "b", image=f"{name}.png") for name in ("red", "green")])
    data = read(path, archive)
    assert data[0]["broken"].startswith(f"{path}:1: {archive}:red.png cannot be read: its checksum is wrong")
    assert data[1]["pictures"][0, :, 16, 16].tolist() == GREEN


def test_a_broken_zip_and_an_encrypted_one_are_refused(make_zip, tmp_path):
    (tmp_path / "cut.zip").write_bytes(make_zip({"red.png": "red"}).read_bytes()[:-10])
    with pytest.raises(ValueError, match="--images_path .*cut.zip cannot be read: .* Download it again"):
        Zip(tmp_path / "cut.zip")
    content = bytearray(make_zip({"red.png": "red"}).read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "secret.zip").write_bytes(content)
    with pytest.raises(ValueError, match="secret.zip is encrypted: unpack it"):
        Zip(tmp_path / "secret.zip")


def test_a_zip_of_many_pictures_takes_little_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "many.zip", "w", zipfile.ZIP_STORED) as archive:
        for i in range(20_000):
            archive.writestr(f"{i:07}.jpg", b"x")
    found = Zip(tmp_path / "many.zip")
    assert found.names.nbytes + found.entries.nbytes < 60 * 20_000  # bytes; as ZipInfo objects they take 600 each
    assert found.open("0012345.jpg").read() == b"x"


@pytest.mark.parametrize("rows", ["sft_data", "sft_vlm_data"])
@pytest.mark.parametrize("place", ["sft_images", "sft_images.zip", "images", "images.zip"])
def test_pictures_beside_the_rows_need_no_flag(read, make_zip, tmp_path, place, rows):
    if place.endswith(".zip"):
        make_zip({"red.png": "red"}, place)
    else:
        (tmp_path / place).mkdir()
        (tmp_path / place / "red.png").write_bytes(picture("red"))
    write_rows(tmp_path / f"{rows}.jsonl", [row("<image>", "b", image="red.png")])
    assert colours(read(tmp_path / rows)) == [[RED]]  # nor does the rows' own suffix


# ---------------------------------------------------------------------------- Parquet


@pytest.mark.parametrize("several", [False, True])
def test_parquet_rows_give_the_same_examples_as_jsonl(read, tokenizer, tmp_path, several):
    rows = [(chat("What?\n<image>", "红色。"), [picture("red")]), (chat("<image>", "b", "c", "d"), [picture("blue")])]
    if several:
        rows.append((chat("<image> or <image>?", "b"), [picture("red"), picture("green")]))
    data = read(write_parquet(tmp_path / "rows.parquet", rows, several))
    (tmp_path / "images").mkdir()
    lines = []
    for i, (conversations, pictures) in enumerate(rows):
        names = [f"{i}_{k}.png" for k in range(len(pictures))]
        for name, content in zip(names, pictures):
            (tmp_path / "images" / name).write_bytes(content)
        lines.append({"conversations": conversations, "image": names})
    same = read(write_rows(tmp_path / "same.jsonl", lines))
    assert len(data) == len(same) == len(rows) and data.lengths.tolist() == same.lengths.tolist()
    for i in range(len(rows)):
        for key in ("input_ids", "labels", "pictures"):
            assert torch.equal(data[i][key], same[i][key])
    assert data.where(1) == f"{tmp_path / 'rows.parquet'}:2"


def test_public_oddities_are_mended_and_counted(read, tokenizer, tmp_path):
    rows = [
        (chat("<image>\n<image>\n<image>\nWhich is red?", "The first."), [picture("red"), picture("blue")]),
        (chat("Say hello.", "Hello."), [BLACK]),
        (chat("<image>", "Black."), [BLACK]),  # a picture that is asked about stays one
        (chat("Say hello.", "Hello."), []),
    ]
    data = read(write_parquet(tmp_path / "rows.parquet", rows))
    assert data.mended == {"surplus": 1, "placeholder": 1} and not data.bad
    assert colours(data) == [[RED, BLUE], [], [[0, 0, 0]], []]
    assert f"user\n{'@' * P}\n{'@' * P}\nWhich is red?<|im_end|>" in text(data, tokenizer, 0)
    assert text(data, tokenizer, 1) == text(data, tokenizer, 3)


def test_pictures_without_a_tag_come_before_the_first_question(read, tokenizer, make_zip, tmp_path):
    rows = [row("Hi.", "b", "And?", "c", image="red.png"), row("Which?", "b", image="red.png, blue.png")]
    rows[0]["conversations"].insert(0, turn("system", "Be brief."))
    data = read(
        write_rows(tmp_path / "rows.jsonl", rows), make_zip({name: name[:-4] for name in ("red.png", "blue.png")})
    )
    assert data.mended == {"untagged": 2} and colours(data) == [[RED], [RED, BLUE]]
    assert f"brief.<|im_end|>\n<|im_start|>user\n{'@' * P}\nHi.<|im_end|>" in text(data, tokenizer, 0)
    assert f"user\n{'@' * P}\n{'@' * P}\nWhich?<|im_end|>" in text(data, tokenizer, 1)
    path = write_parquet(tmp_path / "rows.parquet", [(chat("Hi.", "b"), [picture("red")]), (chat("a", "b"), [BLACK])])
    data = read(path)
    assert data.mended == {"untagged": 1, "placeholder": 1} and colours(data) == [[RED], []]


@pytest.mark.parametrize("key", ["images", "image_path", "img", "image_paths", "picture", "file_name", "image_url"])
def test_pictures_are_read_under_the_names_that_others_have_for_them(key):
    read = parsed(json.dumps(row("What?", "red") | {key: ["a.jpg"]}))
    assert read.images == ["a.jpg"] and read.shape == f"conversations, pictures ({key})"


@pytest.mark.parametrize("key", ["imageUrl", "photos", "Image", "image_base64", "video"])
def test_pictures_under_a_key_that_is_not_read_are_an_error(key):
    """Otherwise the run would train blind without a word."""
    line = json.dumps(row("What?", "red") | {key: ["a.jpg"]})
    with pytest.raises(BadRow, match=f'"{key}" is not read, pictures come from "image": rename or'):
        parsed(line)
    if key != "video":
        assert parsed(json.dumps(row("What?", "red", image="a.jpg") | {key: "b.jpg"})).images == ["a.jpg"]
    assert parsed(json.dumps(row("What?", "red") | {key: None, "image_id": 7, "image_width": 9})).images == []


def test_blank_answers_and_keys_that_come_twice_are_counted(read, tmp_path):
    rows = [row("What?", " \n"), row("What?", "red"), row("What?", "red", "And?", "")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    answer = json.dumps(turn("assistant", "red"))
    twice = f'{{"conversations": [{{"role": "user", "role": "user", "content": "What?"}}, {answer}]}}\n'
    path.write_text(path.read_text() + twice)
    data = read(path)
    assert data.mended == {"blank": 2, "twice": 1} and not data.bad and len(data) == 4


@pytest.mark.parametrize("several", [False, True])
def test_a_column_of_pictures_as_datasets_writes_it_is_read(read, tmp_path, several):
    rows = [(chat("What?\n<image>", "red"), ["red"]), (chat("<image>\nWhat?", "blue"), ["blue"])]
    pictures = [Image.new("RGB", (32, 32), colours[0]) for _, colours in rows]
    kind = datasets.Sequence(datasets.Image()) if several else datasets.Image()
    columns = {
        "conversations": [json.dumps(conversations) for conversations, _ in rows],
        "image_bytes": [[picture] for picture in pictures] if several else pictures,
    }
    features = datasets.Features({"conversations": datasets.Value("string"), "image_bytes": kind})
    datasets.Dataset.from_dict(columns, features).to_parquet(tmp_path / "rows.parquet")
    data = read(tmp_path / "rows.parquet")
    assert colours(data) == [[RED], [BLUE]]


@pytest.mark.parametrize(
    "stored, named",
    [
        ("a.png", "images/a.png"),  # name with the folder
        ("b/a.png", "b\\a.png"),
        ("b/a.png", ".\\images\\b\\a.png"),
        ("cafe\u0301.png", "caf\xe9.png"),  # as macOS stores names
        ("caf\xe9.png", "cafe\u0301.png"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_folder_and_zip_find_names_by_one_rule(tmp_path, stored, named, kind):
    folder = tmp_path / "images"
    (folder / stored).parent.mkdir(parents=True)
    (folder / stored).write_bytes(picture("red"))
    (folder / "other.png").write_bytes(picture("blue"))
    pictures = Folder(folder)
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
            for path in (folder / stored, folder / "other.png"):
                file.write(path, f"images/{path.relative_to(folder)}")
        pictures = Zip(tmp_path / "images.zip")
    assert pictures.has(named) and not pictures.has("b/b.png")
    found = pictures.open(named)
    assert (found.read_bytes() if kind == "folder" else found.getvalue()) == picture("red")


@pytest.mark.parametrize("encoding", ["utf-8", "gbk"])
def test_names_in_a_zip_that_do_not_say_their_encoding_are_read(tmp_path, encoding):
    """As the archivers of macOS and of Chinese Windows write them."""

    class Unsaid(zipfile.ZipInfo):
        def _encodeFilenameFlags(self):
            return "红色.png".encode(encoding), self.flag_bits

    with zipfile.ZipFile(tmp_path / "images.zip", "w") as file:
        file.writestr(Unsaid("x.png"), picture("red"))
        file.writestr("__MACOSX/._x.png", b"no picture")
        file.writestr("._x.png", b"no picture")
    pictures = Zip(tmp_path / "images.zip")
    assert pictures.has("红色.png") and len(pictures.names) == 1


@pytest.mark.parametrize("says", [1 << 29, 100])
def test_a_picture_that_unpacks_to_more_than_there_is_memory_is_refused(tmp_path, says):
    """Whatever it says how large it is."""
    path = tmp_path / "images.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a.png", bytes(10**7))
        file.writestr("b.png", picture("red"))
    pictures = Zip(path)
    pictures.entries[0, 2] = says
    with pytest.raises(ValueError, match="unpacks to 536,870,912 bytes" if says > 100 else "checksum is wrong"):
        pictures.open("a.png")
    assert pictures.open("b.png").getvalue() == picture("red")


def test_a_missing_name_with_a_comma_gets_a_hint(read, tmp_path):
    (tmp_path / "a,b.png").write_bytes(picture("red"))
    write_rows(tmp_path / "rows.jsonl", [row("<image>\n<image>\nWhat?", "red", image="a,b.png")])
    with pytest.raises(ValueError, match=r'put a name that contains a comma into a list: \["a,b.jpg"\]'):
        read(tmp_path / "rows.jsonl", tmp_path)
    write_rows(tmp_path / "listed.jsonl", [row("<image>\nWhat?", "red", image=["a,b.png"])])
    assert colours(read(tmp_path / "listed.jsonl", tmp_path)) == [[RED]]


def test_text_from_data_cannot_control_the_terminal(read, tmp_path):
    name = "a\x1b[2J\x07\u202e\nb.png" + 900 * "x"
    path = write_rows(tmp_path / "rows.jsonl", [row("What?\n<image>", "red", image=name)])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: ") as told:
        read(path, tmp_path)
    (line,) = [line for line in str(told.value).splitlines() if "a\\x1b[2J\\x07\\u202e\\nb.png" in line]
    assert line.isprintable() and len(line) < 700


def test_a_tag_in_an_answer_or_pictures_without_a_question_are_not_mended():
    with pytest.raises(BadRow, match="0 <image> in the user's turns, 1 pictures"):
        parsed(json.dumps(row("a", "<image>", image="a.png")))
    with pytest.raises(BadRow, match="1 pictures but no user turn"):
        parsed(json.dumps({"conversations": [turn("assistant", "A cat.")], "image": "a.png"}))


def test_surplus_tags_are_removed_with_their_line_break():
    found = drop_tags(chat("<image>\nWhich?", "<image>", "And\n<image>", "d", "<image>\nthis?", "f"), 2)
    assert [turn["content"] for turn in found] == ["<image>\nWhich?", "<image>", "And\n<image>", "d", "this?", "f"]
    line = json.dumps(row("<image>\n<image>\n<image>", "b", image="a.jpg, b.jpg"))
    assert (parsed(line).mended, parsed(line).conversations[0]["content"]) == ("surplus", "<image>\n<image>")


@pytest.mark.parametrize("image", [", b.jpg", ["", "b.jpg"]])
def test_an_empty_picture_before_another_does_not_move_that_one(image):
    with pytest.raises(BadRow, match="picture 1 is empty"):
        parsed(json.dumps(row("<image> then <image>", "b", image=image)))
    with pytest.raises(BadRow, match="picture 2 is empty"):
        rows_of({"conversations": chat("<image><image><image>", "b"), "image_bytes": [b"a", None, b"c"]}, 0)


def test_an_invalid_name_is_a_missing_picture(read, tmp_path):
    (tmp_path / "images").mkdir()
    path = write_rows(tmp_path / "rows.jsonl", [row("<image>", "b", image=["A" * 5000])])
    with pytest.raises(ValueError, match="rows.jsonl:1: AAA.* is not in"):
        read(path)


def test_pictures_that_are_shuffled_in_parquet_are_other_pictures(read, tmp_path):
    colours_of = ["red", "red", "blue", "blue", "green", "red", "red", "blue"]
    rows = [(chat("<image>", "b"), [picture(colour)]) for colour in colours_of]
    data = read(write_parquet(tmp_path / "rows.parquet", rows))
    shuffled = ShuffledPictures(data, 0)
    assert all(own != other for own, other in zip(colours(data), colours(shuffled)))
    with pytest.raises(ValueError, match="no two different pictures"):
        ShuffledPictures(read(write_parquet(tmp_path / "same.parquet", rows[:2])), 0)


def test_a_bad_row_of_parquet_is_named_and_a_broken_picture_too(read, tmp_path):
    rows = [(chat("<image>", "b"), [picture("red")]), ("not a list", []), (chat("<image>", "b"), [b"no picture"])]
    data = read(write_parquet(tmp_path / "rows.parquet", rows), on_bad_row="skip")
    assert data.bad == {"key": [f'{tmp_path / "rows.parquet"}:2: no "conversations" list']}
    assert data[1]["broken"].startswith(
        f"{tmp_path / 'rows.parquet'}:3: picture 1 of {tmp_path / 'rows.parquet'}:3 cannot be read: "
    )


def test_a_file_that_is_not_parquet_or_has_other_columns_is_refused(read, tmp_path):
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="--data_path .*cut.parquet cannot be read: .* Expected Parquet"):
        read(tmp_path / "cut.parquet")
    pyarrow.parquet.write_table(pa.table({"text": ["a"], "label": ["b"]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match='other.parquet: the columns are text, label, and "text" has no picture'):
        read(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="empty.parquet cannot be read: it has no rows"):
        read(write_parquet(tmp_path / "empty.parquet", []))


# ---------------------------------------------------------------------------- several


def test_a_pattern_reads_all_its_files_in_order(read, tmp_path):
    for i, colour in enumerate(("red", "green", "blue")):
        write_parquet(tmp_path / f"part-{i}.parquet", [(chat("<image>", "b"), [picture(colour)])])
    data = read(tmp_path / "part-*.parquet")
    assert colours(data) == [[RED], [GREEN], [BLUE]] and data.where(2) == f"{tmp_path / 'part-2.parquet'}:1"
    with pytest.raises(FileNotFoundError, match=r"--data_path .*none-\*.parquet: no such file"):
        read(tmp_path / "none-*.parquet")
    with pytest.raises(ValueError, match=r"is a folder: name its files, for example '.*/\*.parquet'"):
        read(tmp_path)


def test_each_file_may_have_pictures_of_its_own(read, make_zip, tmp_path):
    archive = make_zip({"a.png": "red"})
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/a.png").write_bytes(picture("blue"))
    rows = [row("<image>", "b", image="a.png")]
    paths = [write_rows(tmp_path / f"{name}.jsonl", rows) for name in ("one", "two")]
    paths.append(write_parquet(tmp_path / "three.parquet", [(chat("<image>", "b"), [picture("green")])]))
    data = read(paths, [archive, tmp_path / "folder", None], weights=[1, 2, 0.7])
    assert colours(data) == [[RED], [BLUE], [GREEN]] and data.parts == [(0, 1, 1), (1, 2, 2), (2, 3, 0.7)]
    with pytest.raises(ValueError, match="--images_path has 2 values, --data_path has 3: give one per path"):
        read(paths, [archive, archive])
    with pytest.raises(ValueError, match="--data_weights has 1 values, --data_path has 3"):
        read(paths, archive, weights=[1])
    with pytest.raises(ValueError, match=r"--data_weights 0.3 takes none of the 1 rows of .*two.jsonl"):
        read(paths, archive, weights=[1, 0.3, 1])


def epochs(parts, count, **options) -> list[list[int]]:
    sampler = StepSampler(np.full(max(end for _, end, _ in parts), 50), 4, parts=parts, **options)
    found = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        found.append([row for batch in sampler for row in batch])
    return found


def test_weights_say_how_often_an_epoch_passes_over_a_part():
    parts = [(0, 100, 1), (100, 140, 2.5), (140, 200, 0.5), (200, 203, 0.1)]
    for rows in epochs(parts, 3):
        counts = np.bincount(rows, minlength=203)
        assert (counts[:100] == 1).all() and counts[100:140].sum() == 100 and set(counts[100:140]) == {2, 3}
        assert counts[140:200].sum() == 30 and counts[140:].max() == 1 and counts[200:].sum() == 0
    two = np.bincount(sum(epochs(parts, 2), []), minlength=203)
    assert (two[100:140] == 5).all() and (two[140:200] == 1).all()  # the halves of two epochs make a whole


def test_with_weights_ranks_still_share_the_epoch_and_the_order_follows_from_the_seed():
    parts = [(0, 100, 0.3), (100, 140, 2)]
    alone = epochs(parts, 2, seed=3)
    assert epochs(parts, 2, seed=3) == alone != epochs(parts, 2, seed=4)
    ranks = [epochs(parts, 2, seed=3, rank=rank, world_size=2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*ranks)] == [sorted(rows) for rows in alone]


def test_a_folder_does_not_contain_paths_below_a_file(tmp_path):
    assert not Folder(tmp_path).has(".") and not Folder(tmp_path).has("no.png")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2\nsize 12345\n"
IMPOSTORS = [
    (POINTER, "is a Git LFS pointer, not the file itself; type: git lfs pull"),
    (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is a web page .an error or a login"),
    (b" \n", "is empty"),
]


@pytest.mark.parametrize("content, message", IMPOSTORS)
@pytest.mark.parametrize("what", ["weights", "safetensors", "encoder", "tokenizer", "json", "rows", "parquet", "zip"])
def test_an_empty_file_a_pointer_or_a_web_page_is_reported_as_such(
    tmp_path, tokenizer_folder, clip_folder, what, content, message
):
    names = {
        "weights": "w.pth", "safetensors": "w.safetensors", "json": "w.json", "rows": "r.jsonl", "parquet": "r.parquet",
        "zip": "i.zip", "encoder": "model.safetensors", "tokenizer": "tokenizer.json",
    }  # fmt: skip
    if what in ("encoder", "tokenizer"):
        shutil.copytree(clip_folder if what == "encoder" else tokenizer_folder, tmp_path, dirs_exist_ok=True)
    path = tmp_path / names[what]
    path.write_bytes(content)
    read = {
        "weights": weights.read_weights, "safetensors": weights.read_weights, "json": read_json,
        "rows": sources.open_rows, "parquet": sources.open_rows, "zip": Zip,
        "encoder": lambda path: MiniMindVLM.get_vision_model(path.parent),
        "tokenizer": lambda path: load_tokenizer(path.parent),
    }[what]  # fmt: skip
    with pytest.raises(ValueError, match=f"{path.name}.* {message}"):
        read(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_an_error_about_the_cache_of_rows_names_its_setting(read, tmp_path, monkeypatch, suffix):
    (tmp_path / "file").touch()
    rows = [row("What?", "A cat.")]
    if suffix == "jsonl":
        path = write_rows(tmp_path / "rows.jsonl", rows)
    else:
        path = write_parquet(tmp_path / "rows.parquet", [(rows[0]["conversations"], [BLACK])])
    with monkeypatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file/cache")
        with pytest.raises(OSError, match="file/cache, and it cannot be written: Not a .*\n.*HF_DATASETS_CACHE=DIR"):
            read(path)
    full = r"rows are cached in \S+, and the disk is full; nothing was overwritten.\n.*HF_DATASETS_CACHE=DIR"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=full):
        patch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", no_space)
        read(path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match=full):
        patch.setattr(datasets.Dataset, "map", no_space)
        read(path)
    assert len(read(path)) == 1
