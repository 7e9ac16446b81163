"""dataset/shapes.py: all common layouts of pictures and text give the same training examples."""

import base64
import csv
import gzip
import io
import json
import re
import signal
import tarfile
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from dataset import pictures as picture_stores
from dataset.batches import StepSampler
from dataset.formats import CHUNK, array_rows
from dataset.lm_dataset import VLMDataset
from dataset.rows import rows_of
from dataset.shapes import PROMPTS, ReadOptions, normal
from dataset.values import BadRow
from model.processing import ImageProcessor
from scripts import inspect_data
from tests.conftest import write_rows
from tests.test_loop import interrupt, losses
from tests.test_sources import chat, picture
from train_sft_vlm import main as train

P = 16  # placeholders of a picture in the tests' world
CHATS = [  # turns and pictures
    (chat("<image>\nWhat colour is this?", "It is red."), ["red"]),
    (chat("<image>\n这是什么颜色？", "绿色。", "确定吗？", "是的。"), ["green"]),
    (chat("<image>\n<image>\nWhich colours are these?", "Red and blue."), ["red", "blue"]),
    (chat("Say hello.", "Hello."), []),
]
CAPTIONS = [("A red square.", "red"), ("一个绿色的方块。", "green"), ("A blue square.", "blue")]


def names(colours):
    return [f"{colour}.png" for colour in colours]


def files_of(colours):
    return [{"bytes": picture(colour), "path": f"{colour}.png"} for colour in colours]


def data_url(colour):
    return f"data:image/png;base64,{base64.b64encode(picture(colour)).decode()}"


def sharegpt(turns):
    return [{"from": {"user": "human", "assistant": "gpt"}[t["role"]], "value": t["content"]} for t in turns]


def parts(turns, colours, show):
    """Content as parts; show: colour → the part of a picture."""
    colours = iter(colours)
    content = []
    for t in turns:
        *pictures, text = t["content"].split("<image>\n")
        content.append([show(next(colours)) for _ in pictures] + [{"type": "text", "text": text}])
    return [{"role": t["role"], "content": c} for t, c in zip(turns, content)]


def openai(colour):
    return {"type": "image_url", "image_url": {"url": data_url(colour)}}


def llava(image="image"):
    rows = [{"id": str(i), "conversations": sharegpt(turns)} for i, (turns, _) in enumerate(CHATS)]
    for row, (_, colours) in zip(rows, CHATS):
        if colours:
            row[image] = names(colours) if len(colours) > 1 or image == "images" else names(colours)[0]
    return rows


def messages(show=None, **columns):
    rows = [{"messages": parts(turns, colours, show) if show else turns} for turns, colours in CHATS]
    return [row | {key: of(colours) for key, of in columns.items()} for row, (_, colours) in zip(rows, CHATS)]


def write_json(path, rows, **options):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, **options)
    return path


def write_table(path, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def as_dataset(rows, **features):
    table = datasets.Dataset.from_list(rows)
    for name, kind in features.items():
        table = table.cast_column(name, kind)
    return table


def write_tar(path, samples):
    """samples: [{suffix: content}]"""
    with tarfile.open(path, "w") as tar:
        for i, sample in enumerate(samples):
            for suffix, content in sample.items():
                info = tarfile.TarInfo(f"{i:05}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_text(path, rows, sep=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=sep)
        writer.writeheader()
        writer.writerows(rows)
    return path


def jsonl_gz(path):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in llava())
    return path


def on_disk(path):
    rows = [{"conversations": sharegpt(turns), "images": files_of(colours)} for turns, colours in CHATS]
    as_dataset(rows, images=datasets.List(datasets.Image())).save_to_disk(path)
    return path


def arrow(path):
    rows = [{"conversations": sharegpt(turns), "images": files_of(colours)} for turns, colours in CHATS]
    with pa.OSFile(str(path), "wb") as file:
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    return path


# Name of the file → what writes it: all of CHATS, in a shape that somebody has.
LAYOUTS = {
    "llava.json": lambda path: write_json(path, llava()),
    "indented.json": lambda path: write_json(path, llava(), indent=2),
    "onevision.json.gz": lambda path: write_json(path, llava("images")),
    "lines.jsonl.gz": jsonl_gz,
    "lines.json": lambda path: write_rows(path, llava()),
    "struct.parquet": lambda path: write_table(
        path, [{"conversations": sharegpt(turns), "images": files_of(colours)} for turns, colours in CHATS]
    ),
    "raw.parquet": lambda path: write_table(
        path, [{"conversations": turns, "images": [*map(picture, colours)]} for turns, colours in CHATS]
    ),
    "names.parquet": lambda path: write_table(
        path, [{"conversations": sharegpt(turns), "image": names(colours)} for turns, colours in CHATS]
    ),
    "hub.parquet": lambda path: (
        as_dataset(
            [{"messages": turns, "images": files_of(colours)} for turns, colours in CHATS],
            images=datasets.List(datasets.Image()),
        ).to_parquet(path),
        path,
    )[1],
    "stream.arrow": arrow,
    "disk": on_disk,
    "swift.jsonl": lambda path: write_rows(path, messages(images=names)),
    "openai.jsonl": lambda path: write_rows(path, messages(openai)),
    "trl.json": lambda path: write_json(path, messages(lambda colour: {"type": "image"}, images=names)),
    "transformers.jsonl": lambda path: write_rows(
        path, messages(lambda colour: {"type": "image", "path": f"{colour}.png"})
    ),
    "trl.parquet": lambda path: write_table(
        path, messages(lambda colour: {"type": "image", "text": None}, images=files_of)
    ),
    "texts.parquet": lambda path: write_table(
        path,
        [
            {
                "images": files_of(colours),
                "texts": [
                    {"user": q["content"].replace("<image>\n", ""), "assistant": a["content"], "source": "x"}
                    for q, a in zip(turns[::2], turns[1::2])
                ],
            }
            for turns, colours in CHATS
        ],
    ),
    "query.jsonl": lambda path: write_rows(
        path,
        [
            {
                "query": turns[-2]["content"],
                "response": turns[-1]["content"],
                "history": [[q["content"], a["content"]] for q, a in zip(turns[:-2:2], turns[1:-2:2])],
                "images": names(colours),
            }
            for turns, colours in CHATS
        ],
    ),
    "completion.jsonl": lambda path: write_rows(
        path,
        [{"prompt": turns[:-1], "completion": turns[-1:], "images": names(colours)} for turns, colours in CHATS],
    ),
    "web.tar": lambda path: write_tar(
        path,
        [
            {"json": json.dumps({"conversations": sharegpt(turns)}).encode(), "jpg": picture(colours[0])}
            for turns, colours in CHATS[:2]
        ],
    ),
}
# The same of CAPTIONS.
CAPTION_LAYOUTS = {
    "captions.csv": lambda path: write_text(path, [{"image": f"{c}.png", "caption": text} for text, c in CAPTIONS]),
    "captions.tsv": lambda path: write_text(
        path, [{"text": text, "image_path": f"{c}.png"} for text, c in CAPTIONS], "\t"
    ),
    "captions.parquet": lambda path: write_table(
        path, [{"image": files_of([c])[0], "text": text} for text, c in CAPTIONS]
    ),
    "list.jsonl": lambda path: write_rows(path, [{"image": f"{c}.png", "captions": [text]} for text, c in CAPTIONS]),
    "folder": lambda path: metadata(path, "csv"),
    "folder_of_lines": lambda path: metadata(path, "jsonl"),
    "captions.tar": lambda path: write_tar(path, [{"png": picture(c), "txt": text.encode()} for text, c in CAPTIONS]),
    "coco.json": lambda path: write_json(path, coco(CAPTIONS), indent=1),
}


def metadata(path, kind):
    path.mkdir()
    rows = [{"file_name": f"{colour}.png", "text": text} for text, colour in CAPTIONS]
    for _, colour in CAPTIONS:
        (path / f"{colour}.png").write_bytes(picture(colour))
    (write_text if kind == "csv" else write_rows)(path / f"metadata.{kind}", rows)
    return path


def coco(captions):
    colours = dict.fromkeys(colour for _, colour in captions)
    ids = {colour: 100 + i for i, colour in enumerate(colours)}
    images = [{"license": 1, "file_name": f"{colour}.png", "id": ids[colour]} for colour in colours]
    annotations = [{"image_id": ids[colour], "id": i, "caption": text} for i, (text, colour) in enumerate(captions)]
    return {"info": {"year": 2017}, "images": images, "annotations": annotations}


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "images").mkdir()
    for colour in ("red", "green", "blue"):
        (tmp_path / "images" / f"{colour}.png").write_bytes(picture(colour))
    return tmp_path / "images"


@pytest.fixture
def read(tokenizer, clip_folder):
    def read(data_path, images_path=None, **options):
        processor = ImageProcessor.from_pretrained(clip_folder)
        return VLMDataset(data_path, images_path, tokenizer, processor, 200, [34] * P, options=ReadOptions(**options))

    return read


def same(data, others, rows=None):
    rows = range(len(others)) if rows is None else rows
    assert len(data) == len(rows)
    for i, other in enumerate(rows):
        for key in ("input_ids", "labels", "pictures"):
            ours, theirs = data[i][key], others[other][key]
            assert (ours is None and theirs is None) or torch.equal(ours, theirs), (i, key)


# ---------------------------------------------------------------------------- every layout


@pytest.mark.parametrize("name", LAYOUTS)
def test_conversations_of_every_layout_give_the_same_examples(read, pictures, tmp_path, name):
    plain = [
        {"conversations": turns, "image": names(colours)} if colours else {"conversations": turns}
        for turns, colours in CHATS
    ]
    expected = read(write_rows(tmp_path / "plain.jsonl", plain))
    data = read(LAYOUTS[name](tmp_path / name), pictures)
    same(data, expected, [0, 1] if name == "web.tar" else None)
    assert not data.bad and not data.mended and len(data.shapes) <= 2
    assert not {*data.not_read} - {"id"}


@pytest.mark.parametrize("name", CAPTION_LAYOUTS)
def test_captions_of_every_layout_give_the_same_examples(read, pictures, tmp_path, name):
    data = read(CAPTION_LAYOUTS[name](tmp_path / name), None if name.startswith("folder") else pictures)
    rows = []
    for text, colour in CAPTIONS:
        question = normal({"image": "a", "caption": text}).chats[0][0]["content"]
        rows.append({"conversations": chat(question, text), "image": f"{colour}.png"})
    same(data, read(write_rows(tmp_path / "plain.jsonl", rows)))
    assert [re.split("[ ,]", shape)[0] for shape in data.shapes] == ["caption"]


def test_prompts_for_captions_can_be_given_and_default_to_their_language(read, pictures, tmp_path):
    path = CAPTION_LAYOUTS["captions.csv"](tmp_path / "captions.csv")
    data = read(path, pictures, prompts=("What is it?",))
    assert all(data.row(i).conversations[0]["content"] == "<image>\nWhat is it?" for i in range(3))
    asked = [read(path, pictures).row(i).conversations[0]["content"].removeprefix("<image>\n") for i in range(3)]
    assert [text in PROMPTS["en"] for text in asked] == [True, False, True] and asked[1] in PROMPTS["zh"]
    chats = LAYOUTS["llava.json"](tmp_path / "llava.json")
    assert read(path, pictures).captioned and not read(chats, pictures, prompts=("What is it?",)).captioned
    with pytest.raises(ValueError, match="--prompt may contain <image> once at most"):
        read(path, pictures, prompts=("<image> or <image>?",))


def test_questions_with_several_answers_take_the_commonest(read, pictures, tmp_path):
    vqa = [{"answer": "red", "answer_id": 1}, {"answer": "blue", "answer_id": 2}, {"answer": "blue", "answer_id": 3}]
    rows = [
        {"question": "Which?", "answers": vqa, "image": "blue.png"},
        {"question": "Which?", "answers": ["red", "blue", "red"], "image": "red.png"},
        {"question": "How many?", "answer": 3, "image": "red.png"},
        {"query": "Which?", "label": ["blue"], "image": "blue.png"},
    ]
    data = read(write_rows(tmp_path / "rows.jsonl", rows), pictures)
    assert [data.row(i).conversations[-1]["content"] for i in range(4)] == ["blue", "red", "3", "blue"]
    assert data.shapes == {
        "question (question, answers), pictures (image)": 2,
        "question (question, answer), pictures (image)": 1,
        "question (query, label), pictures (image)": 1,
    }


def test_values_in_csv_are_always_text(read, pictures, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('\ufeffimage,question,answer\nred.png,"What, ""exactly""?\nSay it.",007\nblue.png,Which?,NA\n')
    data = read(path, pictures)
    assert [[turn["content"] for turn in data.row(i).conversations] for i in range(2)] == [
        ['<image>\nWhat, "exactly"?\nSay it.', "007"],
        ["<image>\nWhich?", "NA"],
    ]
    path.write_text("image;caption\nred.png;A cat.\n")
    with pytest.raises(ValueError, match="rows.csv cannot be read: its columns are separated by ';'"):
        read(path, pictures)


@pytest.mark.parametrize(
    "name, text, why",
    [
        ("rows.csv", "question,answer,image\nWhat?,cat,red.png,\n", "line 2 has 4 fields, the header 3"),
        ("rows.csv", "image,question,answer\nred.png,What?\n", "line 2 has 2 fields, the header 3"),
        ("rows.csv", "image,caption,image\nred.png,a,b\n", "line 1 names a column twice"),
        (
            "rows.tsv",
            'image\tcaption\nred.png\t"A cat" sits\n',
            "expected after '\"'; double the quotes inside a quoted field",
        ),
        ("rows.tsv", 'image\tcaption\nred.png\t"A\nblue.png\tb"\nred.png\tc\n', "ends in line 3 contains a tab or"),
        ("rows.csv", "image,caption\n", "it has no rows"),
        ("rows.json", "[]", "it has no rows"),
        ("rows.json", "[{}]\n[{}]", "the array ends after row 1, but more text follows"),
        ("rows.json", '{\n "data": []\n}', "it is one object with data: write its rows as an array"),
        ("rows.json.gz", "[]", "Not a gzipped file"),
        ("rows.feather", "ARROW1", "the format .feather is not supported"),
        ("rows.txt", "image,caption\nred.png,a\n", "it is not JSON; name a table with a header .csv"),
        (
            "rows.tsv",
            "a very typical bus station\thttp://x/y.jpg\n",
            "line 1 is not a header (a very typical bus station)",
        ),
        ("rows.json", '{"annotations": [{"image_id": 1, "caption": "a"}]}', "it is one object with annotations: write"),
        ("rows.json", '{"info": {}, "questions": [{"question": "a"}]}', "it is one object with info, questions: write"),
        ("rows.tar", "no tar", "cannot be read: file could not be opened successfully"),
    ],
)
def test_a_file_in_which_rows_would_be_lost_or_shift_is_refused(read, pictures, tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        read(tmp_path / name, pictures)
    assert f"--data_path {tmp_path / name} cannot be read: " in str(error.value) and why in str(error.value)


def test_samples_of_a_tar_may_differ_and_a_bad_one_is_one_bad_row(read, tmp_path):
    samples = [
        {"JPG": picture("red"), "txt": b"A red square."},
        {"json": json.dumps({"conversations": sharegpt(CHATS[3][0])}).encode()},
        {"0.png": picture("red"), "1.png": picture("blue"), "json": json.dumps(sharegpt(CHATS[2][0])).encode()},
        {"png": picture("red"), "json": b"{no json"},
        {"png": picture("blue"), "json": b'{"caption": "A blue square.", "url": "http://x/y.png", "image": "y.png"}'},
    ]
    path = write_tar(tmp_path / "rows.tar", samples)
    with pytest.raises(ValueError, match=r"1 of 5 rows are not usable:\n +1  not valid JSON\n +.*rows.tar:4: "):
        read(path)
    data = read(write_tar(tmp_path / "good.tar", [*samples[:3], samples[4]]))
    assert [len(data.row(i).images) for i in range(4)] == [1, 0, 2, 1]
    assert data[2]["pictures"][:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


def test_pictures_with_an_absolute_path_need_no_folder(read, pictures, tmp_path):
    rows = [
        {"image": f"file://{pictures}/red.png", "caption": "Red."},
        {"image": f"{pictures}/blue.png", "caption": "Blue."},
    ]
    (tmp_path / "elsewhere").mkdir()
    data = read(write_rows(tmp_path / "elsewhere" / "rows.jsonl", rows))
    assert [data[i]["pictures"][0, :, 0, 0].tolist() for i in range(2)] == [[255, 0, 0], [0, 0, 255]]


def test_instructions_come_with_their_input_and_history(read, pictures, tmp_path):
    row = {"instruction": "Which?", "input": "One word.", "output": "Red.", "history": [["Hi.", "Hello."]]}
    row |= {"images": ["red.png"], "system": "Be brief."}
    data = read(write_rows(tmp_path / "rows.jsonl", [row]), pictures)
    texts = ["Be brief.", "<image>\nHi.", "Hello.", "Which?\nOne word.", "Red."]
    assert [turn["content"] for turn in data.row(0).conversations] == texts


@pytest.mark.parametrize(
    "row, why",
    [
        ({"image": "a.jpg"}, '"image" has no text column'),
        ({"caption": "A cat."}, '"caption" has no picture column: name it "image"'),
        ({"image": "a.jpg", "question": "What?"}, '"question" has no answer column: name it "answer"'),
        ({"image": "a.jpg", "answer": "A cat."}, '"answer" has no question column: name it "question"'),
        ({"id": 1, "name": "x"}, "the columns are id, name, but none of them is"),
        ({"image": None, "caption": "A cat."}, 'a caption in "caption" but no picture'),
        ({"image": "a.jpg", "caption": ["", " "]}, 'no caption in "caption"'),
        (
            {"image": "a.jpg", "question": "Which?", "answer": 1, "choices": ["a", "b"]},
            "the number of a choice: replace it by the text of the answer",
        ),
        (
            {"image": "a.jpg", "question": "Which?", "label": 1},
            "the number of a choice: replace it by the text of the answer",
        ),
        ({"image": "a.jpg", "question": {"en": "What?"}, "answer": "A cat."}, '"question" must be text'),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a"}]}]}, "has type 'video'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "1 parts of turns refer to pictures"),
        ({"messages": chat("a", "b"), "image": ["a.jpg", 3]}, '"image" must be text'),
        ({"messages": chat("a", "b"), "image": "a.jpg", "videos": ["b.mp4"]}, '"videos" is not read'),
    ],
)
def test_rows_that_no_rule_reads_are_errors_with_the_column(row, why):
    with pytest.raises(BadRow) as error:
        normal(row)
    assert why in str(error.value)


@pytest.mark.parametrize(
    "row, why",
    [
        (
            {"question": "<image 1> What?", "answer": "b", "image_1": {"bytes": b"a", "path": None}},
            '"image_1" is not read',
        ),
        ({"question": "What?", "answer": "b", "screenshot": {"bytes": None, "path": "a.png"}}, '"screenshot" seems to'),
        ({"question": "What?", "answer": "b", "filepath": "train/a.jpg"}, '"filepath" seems to contain pictures'),
        ({"question": "What?", "answer": "b", "media": ["a.webp"]}, '"media" seems to contain pictures'),
        ({"query": "<img>a.jpg</img>What?", "response": "b"}, "<img>a.jpg</img> in the text is not read"),
        ({"question": "Is <image 1> red?", "answer": "b"}, "<image 1> in the text is not read"),
        ({"image": "a.jpg", "images": ["b.jpg", "c.jpg"], "messages": chat("a", "b")}, "contain different pictures"),
        ({"image": "a.jpg", "question": "Which?", "answer": "B", "choices": ["cat", "dog"]}, "the number of a choice"),
        (
            {"image": "a.jpg", "question": "Which?", "answer": "1", "choices": "['cat', 'dog']"},
            "the number of a choice",
        ),
        ({"image": "a.jpg", "question": "Which?", "answers": ["", " "]}, 'no answer in "answers"'),
        ({"image": "a.jpg", "question": "Which?", "answers": [["cat"], ["dog"]]}, '"answers" must be text'),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": 5}]}, "a list of calls"),
        ({"image": "a.jpg", "question": "Where?", "answer": [10, 20]}, '"answer" must be text, or a list of texts'),
        ({"image": "a.jpg", "image2": "b.jpg", "question": "Which?", "answer": "b"}, '"image2" is not read'),
        ({"image": "a.jpg", "image_b": {"bytes": b"a"}, "messages": chat("a", "b")}, '"image_b" is not read'),
        ({"image_id": 458752, "question": "What?", "answer": "net"}, '"image_id" names a picture that the row lacks'),
        ({"messages": chat("<video>\nWhat?", "b")}, "<video> in the text is not read"),
        ({"image": "a.jpg", "messages": chat("<image_00> What?", "b")}, "<image_00> in the text is not read"),
        ({"image": "a.jpg", "messages": chat("<image>Find it", "<bbox>")}, "<bbox> in the text is not read"),
        ({"image": "a.jpg", "question": "?", "choices": ["2", "3", "1"], "answer": 1}, "the number of a choice"),
        ({"image": "a.jpg", "question": "?", "options": {"A": "x"}, "answer": "A"}, "the number of a choice"),
        ({"image": "a.jpg", "question": "?", "choices": "A: x, B: y", "answer": "B"}, "the number of a choice"),
        (
            {"image": "a.jpg", "question": "?", "choice_a": "x", "choice_b": "y", "answer": "A"},
            "the number of a choice",
        ),
        (
            {"messages": [*chat("a"), {"role": "assistant", "content": "bad", "weight": 0}]},
            "has weight 0 or loss false",
        ),
        ({"messages": chat("a", "bad"), "label": False}, '"label" is false'),
        ({"messages": chat("a"), "chosen": "b", "rejected": "c"}, '"chosen": rows with wrong answers'),
        ({"image": "a.jpg", "question": "Which colour?", "caption": "red"}, '"question" is next to "caption"'),
        ({"image": "a.jpg", "caption_0": "true", "caption_1": "false"}, '"image" has no text column'),
        ({"image": ["a.jpg", "b.jpg"], "caption": ["a", "b"]}, "2 pictures and as many captions"),
        ({"image": "a.jpg", "caption": float("nan")}, '"caption" must be text'),
        ({"image": {"<image_00>": "a.jpg"}, "messages": chat("a", "b")}, "contains an object with <image_00>"),
        ({"image": "/9j/" + "A" * 300, "messages": chat("a", "b")}, "contains base64: write data:image/jpeg;base64,"),
    ],
)
def test_rows_that_would_be_learned_wrong_are_errors(row, why):
    with pytest.raises(BadRow) as error:
        rows_of(row, 0)
    assert why in str(error.value)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": {"from": ["human", "gpt"], "value": None}},
        {"messages": chat("a", "b"), "tools": 5, "system": 3, "image": {"bytes": 4}},
        {"question": "What?", "answer": "b", "history": 5},
        {"question": {}, "answer": {}, "image": [[]]},
    ],
)
def test_a_value_of_any_type_is_skipped_or_gives_a_clear_error(row):
    with suppress(BadRow):
        assert rows_of(row, 0)


def test_values_in_other_forms_are_read():
    call = '{"name": "add"}'
    for calls in (f"[{call}]", json.loads(call), [{"function": None, "name": "add"}]):
        (turns,) = normal({"messages": [*chat("a"), {"role": "assistant", "content": None, "tool_calls": calls}]}).chats
        assert '"name": "add"' in turns[1]["content"] and turns[1]["content"].count("<tool_call>") == 1
    old = {"role": "assistant", "content": None, "function_call": {"name": "add"}}
    assert normal({"messages": [*chat("a"), old]}).chats[0][1]["content"] == f"<tool_call>\n{call}\n</tool_call>"
    columns = {"answer": ["a", "b", "b"], "answer_id": [1, 2, 3]}
    row = {"question": "Which?", "answers": columns, "images": {"bytes": [b"a", b"b"], "path": ["a", "b"]}}
    assert normal(row).chats[0][1]["content"] == "b" and normal(row).pictures == [b"a", b"b"]
    assert normal({"question": "Which?", "answers": "['cat', 'cat', 'dog']"}).chats[0][1]["content"] == "cat"
    for answer in ("[10, 20, 30, 40]", "['a', 'b']", "[0.1, 0.5]"):
        assert normal({"question": "Where?", "answer": answer}).chats[0][1]["content"] == answer
    assert normal({"query": "How many?", "label": ["14"]}).chats[0][1]["content"] == "14"
    row = {"image": "a.jpg", "caption_0": "a", "caption_1": "b", "caption_2": "c"}
    assert len(normal(row).chats) == 3 and normal(row).shape == "caption (caption_0, ...), pictures (image)"
    assert normal({"caption": "a", "url": "http://x/y"}).pictures == ["http://x/y"]
    row = {"image": [None], "image_path": "file:///a/b.jpg", "question": "Which?", "answer": "a", "choices": ["a", "b"]}
    assert normal(row).pictures == ["/a/b.jpg"]
    text = [{"type": "text", "text": None}, {"type": "image", "image": "a.jpg"}, "What?"]
    (turns,) = normal({"messages": [{"role": "user", "content": text}, *chat("a", "b")[1:]]}).chats
    assert turns[0]["content"] == "<image>\nWhat?"


def test_a_table_that_no_shape_fits_is_refused_with_its_columns(read, tmp_path):
    path = write_table(tmp_path / "rows.parquet", [{"image": b"a", "label": 3}])
    with pytest.raises(
        ValueError, match='--data_path .*rows.parquet: the columns are image, label, and "image" has no'
    ):
        read(path)


def test_turns_of_systems_and_tools_are_text_that_every_tokenizer_knows():
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "1 + 1, 2 + 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "2 and 4."},
    ]
    (turns,) = normal({"messages": messages}).chats
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    text = '<tool_call>\n{"name": "add", "arguments": "{\\"a\\": 1}"}\n</tool_call>'
    assert turns[2]["content"] == f"{text}\n{text}"
    assert turns[3]["content"] == "<tool_response>\n2\n</tool_response>\n<tool_response>\n4\n</tool_response>"
    (turns,) = normal({"messages": messages, "tools": [{"name": "add"}], "system": "Be brief."}).chats
    assert turns[0]["content"] == 'Be brief.\n\n<tools>\n[{"name": "add"}]\n</tools>' and len(turns) == 5
    row = {
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {"from": "function_call", "value": '{"name": "add"}'},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "2."},
        ],
        "system": "Be brief.",
        "tools": '[{"name": "add"}]',
    }
    (turns,) = normal(row).chats
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant", "user", "assistant"]
    assert turns[0]["content"] == 'Be brief.\n\n<tools>\n[{"name": "add"}]\n</tools>'


def test_pictures_keep_their_place_among_the_parts(read, pictures, tmp_path):
    show = [{"type": "text", "text": "Is"}, {"type": "image", "image": "red.png"}, {"type": "text", "text": "like"}]
    show += [openai("blue"), {"type": "text", "text": "?"}]
    messages = [{"role": "user", "content": show}, {"role": "assistant", "content": "No."}]
    data = read(write_rows(tmp_path / "rows.jsonl", [{"messages": messages}]), pictures)
    assert data.row(0).conversations[0]["content"] == "Is\n<image>\nlike\n<image>\n?"
    assert data[0]["pictures"][:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


# ---------------------------------------------------------------------------- several captions

SEVERAL = [(f"Caption {i} of {colour}.", colour) for colour in ("red", "green", "blue") for i in range(4)]


def test_of_several_captions_an_epoch_takes_one_or_all(read, pictures, tmp_path):
    path = write_json(tmp_path / "coco.json", coco(SEVERAL))
    data = read(path, pictures)
    assert len(data) == 12 and data.groups.tolist() == [0, 4, 8] and data.where(5) == f"{path}:2"
    assert [data.row(i).conversations[-1]["content"] for i in range(12)] == [text for text, _ in SEVERAL]
    drawn = []
    for epoch in range(40):
        sampler = StepSampler(data.lengths, 2, seed=1, parts=data.parts, groups=data.groups)
        sampler.set_epoch(epoch)
        rows = np.concatenate(list(sampler)).astype(int)
        assert sorted(rows // 4) == [0, 1, 2] and sampler.steps_per_epoch == 2
        ranks = [StepSampler(data.lengths, 1, 1, 1, rank, 2, parts=data.parts, groups=data.groups) for rank in (0, 1)]
        for rank in ranks:
            rank.set_epoch(epoch)
        assert sorted(row for rank in ranks for batch in rank for row in batch) == sorted(rows)
        drawn += rows.tolist()
    assert set(drawn) == set(range(12))
    everything = read(path, pictures, captions="all")
    assert everything.groups is None and len(everything) == 12


def test_weights_of_several_captions_count_pictures(read, pictures, tmp_path, tokenizer):
    path = write_json(tmp_path / "coco.json", coco(SEVERAL))
    data = VLMDataset([path], pictures, tokenizer, None, 200, [34] * P, weights=[0.4])
    assert len(StepSampler(data.lengths, 1, parts=data.parts, groups=data.groups)) == 1
    with pytest.raises(ValueError, match="--data_weights 0.1 takes none of the 3 rows of .*coco.json"):
        VLMDataset([path], pictures, tokenizer, None, 200, [34] * P, weights=[0.1])


def test_rows_with_one_and_with_several_captions_share_an_epoch(read, pictures, tmp_path):
    several = write_json(tmp_path / "coco.json", coco(SEVERAL))
    data = read([LAYOUTS["llava.json"](tmp_path / "llava.json"), several], pictures)
    assert data.groups.tolist() == [0, 1, 2, 3, 4, 8, 12]
    sampler = StepSampler(data.lengths, 3, parts=[(0, 4, 1), (4, 16, 2)], groups=data.groups)
    rows = np.concatenate(list(sampler)).astype(int)
    assert sorted(rows[rows < 4]) == [0, 1, 2, 3] and sorted(rows[rows >= 4] // 4) == [1, 1, 2, 2, 3, 3]


# ---------------------------------------------------------------------------- JSON arrays


@pytest.mark.parametrize("size", [7, 64, CHUNK])
def test_an_array_is_read_in_parts_of_any_size(tmp_path, monkeypatch, size):
    monkeypatch.setattr("dataset.formats.CHUNK", size)
    rows = [{"a": 'x"]},{' * 3, "b": [1, {"c": "\\\n\t中"}]}, {}, {"d": 1.5e-3, "e": None}] * 5
    for indent in (None, 3):
        path = write_json(tmp_path / "rows.json", rows, indent=indent)
        assert [json.loads(text) for text in array_rows(path)] == rows


def test_an_element_that_is_not_a_row_is_named_by_its_number(read, pictures, tmp_path):
    path = write_json(tmp_path / "rows.json", [*llava(), {"image": "red.png"}, *llava()])
    with pytest.raises(ValueError, match=r'rows.json:5: the columns are image, and "image" has no text column'):
        read(path, pictures)
    path.write_text(json.dumps(llava())[:-30])
    with pytest.raises(ValueError, match=r"--data_path .*rows.json cannot be read: row 4 is not valid JSON"):
        read(path, pictures)
    path.write_text('{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "bbox": []}]}')
    with pytest.raises(ValueError, match="its annotations have no caption, only image_id, bbox"):
        read(path, pictures)
    path.write_text('{"images": ["red.png"], "messages": [}\n' + json.dumps(llava()[0]) + "\n")
    with pytest.raises(ValueError, match="1 of 2 rows are not usable"):  # lines, of which one is broken
        read(path, pictures)


def test_coco_is_recognised_by_its_form_with_any_type_of_id(read, pictures, tmp_path):
    content = coco(CAPTIONS)
    content["annotations"] += [{"image_id": 100, "caption": None}, {"image_id": 999, "caption": "Nothing."}]
    for annotation in content["annotations"]:
        annotation["image_id"] = str(annotation["image_id"])
    content = {"type": "captions", "categories": []} | content
    for indent in (None, 2):
        assert len(read(write_json(tmp_path / f"{indent}.json", content, indent=indent), pictures)) == 3


# ---------------------------------------------------------------------------- the web


@pytest.fixture
def web():
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if self.path == "/slow":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                with suppress(OSError):
                    for _ in range(100):
                        self.wfile.write(b"a")
                        time.sleep(0.1)
                return
            content = picture(Path(self.path).stem) if self.path.endswith(("red.png", "blue.png")) else b""
            content = b"<html>Too many requests</html>" if self.path == "/page.html" else content
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_pictures_on_the_web_are_fetched_once_and_only_if_allowed(read, web, tmp_path, monkeypatch):
    url, asked = web
    rows = [{"image_url": f"{url}/{name}.png", "caption": "A square."} for name in ("red", "none")]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"rows.jsonl:1: http.*/red.png is on the web: --allow_urls downloads"):
        read(path)
    data = read(path, allow_urls=True)
    assert not asked and data[0]["pictures"][0, :, 0, 0].tolist() == data[0]["pictures"][0, :, 5, 5].tolist()
    assert data[0]["pictures"][0, :, 0, 0].tolist() == [255, 0, 0] and asked == ["/red.png"]
    assert "404" in data[1]["broken"] and f"{url}/none.png cannot be read" in data[1]["broken"]
    with pytest.raises(BadRow, match="not a picture format"):
        read(write_rows(tmp_path / "page.jsonl", [{"image_url": f"{url}/page.html", "caption": "A page."}]),
             allow_urls=True).load_picture(0, f"{url}/page.html")  # fmt: skip
    assert asked.count("/page.html") == 1
    monkeypatch.setattr(picture_stores, "SECONDS", 1)
    started = time.monotonic()
    data = read(
        write_rows(tmp_path / "slow.jsonl", [{"image_url": f"{url}/slow", "caption": "Slow."}]), allow_urls=True
    )
    assert "the download exceeds 32 MB or 1 seconds" in data[0]["broken"] and time.monotonic() - started < 10
    monkeypatch.setattr(picture_stores, "FETCHED", 10)
    rows = [{"image_url": f"{url}/blue.png", "caption": "A square."}]
    data = read(write_rows(tmp_path / "more.jsonl", rows), allow_urls=True)
    assert "the download exceeds 0 MB or 1 seconds" in data[0]["broken"]


# ---------------------------------------------------------------------------- end to end


@pytest.fixture
def everything(tmp_path, pictures):
    """All layouts, in one folder."""
    return [str(write(tmp_path / name)) for name, write in (LAYOUTS | CAPTION_LAYOUTS).items()]


@pytest.fixture
def parts_flags(tokenizer_folder, clip_folder):
    return ["--tokenizer_path", str(tokenizer_folder), "--vision_model_path", str(clip_folder)]


def test_inspect_data_reports_how_rows_were_read(everything, pictures, parts_flags, tmp_path, capsys):
    page = tmp_path / "page.html"
    inspect_data.main([*everything, "--images_path", str(pictures), *parts_flags, "--html", str(page)])
    out = capsys.readouterr().out
    assert (
        f"{4 * len(LAYOUTS) - 2 + 3 * len(CAPTION_LAYOUTS):>12}  usable rows" in out and "           0  bad rows" in out
    )
    for shape in ("conversations, pictures (image)", "caption (text), pictures (file_name)"):
        assert f"rows read as {shape}" in out and f"read as {shape}" in page.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--cache_features", "features"], ["--captions_per_epoch", "all"]])
def test_all_shapes_learn_in_one_run_that_resumes_as_if_it_had_not_stopped(
    everything, pictures, parts_flags, tmp_path, monkeypatch, capsys, extra
):
    monkeypatch.chdir(tmp_path)
    captions = str(write_json(tmp_path / "several.json", coco(SEVERAL)))
    paths, weights = [*everything, captions], ["1"] * len(everything) + ["2"]
    flags = [*parts_flags, "--from_weight", "none", "--hidden_size", "32", "--num_hidden_layers", "1", *extra]
    flags += ["--data_path", *paths, "--images_path", str(pictures), "--data_weights", *weights, "--dtype", "float32"]
    flags += ["--batch_size", "32", "--num_workers", "0", "--log_interval", "1", "--epochs", "2", "--device", "cpu"]
    flags += ["--save_interval", "2"]
    train([*flags, "--out_dir", "whole"])
    assert "rows read as texts, pictures (images)" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        interrupt(patch, 5, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train([*flags, "--out_dir", "parts"])
    train([*flags, "--out_dir", "parts", "--from_resume"])
    whole, resumed = losses("whole"), losses("parts")
    assert resumed == whole and len(whole) >= 8 and all(np.isfinite([loss for *_, loss in whole]))


@pytest.mark.parametrize("name", ["train_data.jsonl", "rows.parquet"])
def test_rows_go_out_and_come_back_the_same(everything, pictures, read, parts_flags, tmp_path, capsys, name):
    out = tmp_path / "out" / name
    flags = [*parts_flags, "--html", str(tmp_path / "page.html"), "--to", str(out)]
    inspect_data.main([*everything, "--images_path", str(pictures), *flags])
    assert f"written: {out}" in " ".join(capsys.readouterr().out.split())
    same(read(out), read(everything, pictures))
    if name.endswith("parquet"):
        table = datasets.load_dataset("parquet", data_files=str(out), split="train")
        assert isinstance(table.features["images"].feature, datasets.Image)  # which hubs show
        assert table[0]["conversations"][0] == {"from": "human", "value": "<image>\nWhat colour is this?"}
    else:
        assert json.loads(out.read_text(encoding="utf-8").splitlines()[0])["image"].startswith("train_data_images/")
        assert len(list((out.parent / "train_data_images").iterdir())) == 3


def test_other_output_formats_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        inspect_data.main(["rows.jsonl", "--to", "rows.csv"])
    assert "--to rows.csv: expected a name that ends in .parquet or .jsonl" in capsys.readouterr().err
    path = write_rows(tmp_path / "rows.jsonl", llava())
    with pytest.raises(SystemExit):
        inspect_data.main([str(path), "--to", str(path)])
    assert "exists already; choose another" in capsys.readouterr().err and path.stat().st_size > 0
