"""dataset/lm_dataset.py: labels of a row, bad rows and their report, assignment of rows to batches."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dataset.batches import StepSampler, collate
from dataset.lm_dataset import KINDS, VLMDataset
from model.processing import IGNORE, ImageProcessor
from tests.conftest import turn, write_rows

P = 16  # placeholders of a picture in the tests' world
AT = 34


def row(*turns, **extra):
    """row("question", "answer", "question", ...) → a row of a data set."""
    roles = ("user", "assistant")
    return {"conversations": [turn(roles[i % 2], text) for i, text in enumerate(turns)], **extra}


@pytest.fixture
def read(tokenizer, clip_folder, world, tmp_path):
    """read(rows or bytes, ...) → a VLMDataset of them; read(...) → of the existing file."""

    def read(rows=None, name="rows.jsonl", **options):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        if rows is not None:
            path.write_bytes(rows) if isinstance(rows, bytes) else write_rows(path, rows)
        options = {"images_path": world / "pictures", "max_length": 200, "image_ids": [34] * P} | options
        preprocess = ImageProcessor.from_pretrained(clip_folder)
        return VLMDataset(path, tokenizer=tokenizer, preprocess=preprocess, **options)

    return read


def learned(example, tokenizer) -> list[str]:
    """The stretches of text that have labels."""
    labels = example["labels"].tolist()
    cuts = [i for i in range(1, len(labels)) if (labels[i] == IGNORE) != (labels[i - 1] == IGNORE)]
    pieces = [labels[a:b] for a, b in zip([0, *cuts], [*cuts, len(labels)])]
    return [tokenizer.decode(piece) for piece in pieces if piece[0] != IGNORE]


def check_whole(example) -> None:
    """Labels equal the tokens, and there is a complete run of placeholders for each picture."""
    ids, labels = example["input_ids"], example["labels"]
    assert ids.shape == labels.shape
    assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])
    pictures = 0 if example["pictures"] is None else len(example["pictures"])
    assert (ids == AT).sum() == pictures * P


# ---------------------------------------------------------------------------- one row


def test_only_the_answers_of_a_conversation_are_learned(read, tokenizer):
    data = read([row("What is this?\n<image>", "A dog.", "Sure?", "Yes.", image="red.png")])
    assert learned(data[0], tokenizer) == ["A dog.<|im_end|>", "Yes.<|im_end|>"]
    assert tokenizer.decode(data[0]["input_ids"]) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        f"<|im_start|>user\nWhat is this?\n{'@' * P}<|im_end|>\n<|im_start|>assistant\nA dog.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    check_whole(data[0])


@pytest.mark.parametrize("images", ["red.png, blue.png", " red.png,blue.png ,", ["red.png", "blue.png"]])
def test_several_pictures_come_in_the_order_of_their_names(read, images):
    example = read([row("<image> or\n<image>?", "Both.", image=images)])[0]
    assert example["pictures"].dtype == torch.uint8 and example["pictures"].shape == (2, 3, 32, 32)
    assert example["pictures"][:, :, 5, 5].tolist() == [[255, 0, 0], [0, 0, 255]]
    check_whole(example)


@pytest.mark.parametrize("question", ["<image>\nWhat?", "What?\n<image>", "Is <image> nice?", "<image>", "<image>？"])
def test_the_picture_may_be_anywhere_in_the_question(read, tokenizer, question):
    example = read([row(question, "Yes.", image="red.png")])[0]
    assert question.replace("<image>", "@" * P) in tokenizer.decode(example["input_ids"])
    assert len(example["pictures"]) == 1
    check_whole(example)


@pytest.mark.parametrize("extra", [{}, {"image": ""}, {"image": None}, {"image": []}])
def test_a_row_without_a_picture_needs_no_folder_of_pictures(read, extra):
    example = read([row("Say hello.", "Hello.", **extra)], images_path=None)[0]
    assert example["pictures"] is None


# ---------------------------------------------------------------------------- what the JSON of weights says of rows


def test_the_commonest_first_questions_about_a_picture_are_the_prompts(read):
    one, two, three = {"image": "red.png"}, {"image": "red.png, blue.png"}, {"image": "red.png, blue.png, green.png"}
    questions = ["<image>\nWhat is this?"] * 3 + ["Describe it. <image>"] * 2 + ["<image>\nAsked once?", "<image>"]
    questions += ["<image>\n这是什么？"] * 4 + ["<image>说说hello"] * 5 + ["<image>\nA?", "<image>\nB?"] * 2
    rows = [row(text, "An answer.", "Only later?", "Yes.", **one) for text in questions]
    rows += [row("<image>\n<image>\nAlike?", "Yes.", **two), row("<image> <image> <image>Alike?", "No.", **three)]
    rows += [row("Hello", "Hello!"), row("Hello", "Hi!"), row("你好", "你好！")]
    about = read(rows).summary
    assert about == {
        "rows_without_picture": 3,
        "prompts": {
            "en": ["What is this?", "Describe it.", "A?"],
            "zh": ["说说hello", "这是什么？"],
            "en several": ["Alike?"],
        },
        "pictures_first": True,
    }
    rows = [
        row("What?\n<image>", "That.", **one),
        row("Why?\n<image>", "So.", **one),
        row("<image>\nWho?", "I.", **one),
    ]
    assert read(rows).summary == {"rows_without_picture": 0, "prompts": {}, "pictures_first": False}


def test_rows_without_pictures_name_no_prompt(read):
    assert read([row("Hello", "Hello!")] * 3).summary == {"rows_without_picture": 3, "prompts": {}}
    text = [row("What is this?\n<image>", "That.", image="red.png")] * 3
    assert read(text, image_ids=[]).summary == {"rows_without_picture": 3, "prompts": {}}


def test_prompts_come_from_the_same_sample_of_many_rows_in_each_call(read, monkeypatch):
    rows = [row(f"<image>\nWhat is {i % 7}?", "That.", image="red.png") for i in range(400)]
    monkeypatch.setattr("dataset.lm_dataset.ASKED", 30)
    data, asked = read(rows), []
    real = data.row
    monkeypatch.setattr(data, "row", lambda number: asked.append(number) or real(number))
    about = data.summary
    assert len(asked) == 30 and max(asked) > 350 and len({number % 7 for number in asked}) == 7  # from everywhere
    assert about == data.summary == read(rows).summary and len(asked) == 30 and len(about["prompts"]["en"]) == 3


# ---------------------------------------------------------------------------- too long


def test_a_long_answer_loses_its_end_and_does_not_learn_to_stop_there(read, tokenizer):
    rows = [row("What?\n<image>", "red green blue " * 30, image="red.png")]
    whole = read(rows, max_length=500)
    data = read(rows, max_length=80)
    assert (whole.shortened, data.shortened) == (0, 1)
    assert data.lengths.tolist() == [80] == [len(data[0]["input_ids"])]
    assert torch.equal(data[0]["input_ids"], whole[0]["input_ids"][:80])
    (answer,) = learned(data[0], tokenizer)
    assert ("red green blue " * 30).startswith(answer)
    check_whole(data[0])


def test_no_length_ever_cuts_a_picture_or_keeps_one_that_is_not_asked_about(read, tokenizer):
    """For every max_length: a trailing <image>, and a second question with its own picture."""
    rows = [row("Which?\n<image>", "red", "And this one?\n<image>", "blue green", image="red.png, blue.png")]
    whole = read(rows)
    length, first = int(whole.lengths[0]), whole[0]["labels"].tolist()
    begin = next(i for i, label in enumerate(first) if label != IGNORE)  # where the first answer starts
    seen = set()
    for max_length in range(begin - 1, length + 1):
        data = read(rows, max_length=max_length, on_bad_row="skip") if max_length > begin else None
        if data is None:
            with pytest.raises(ValueError, match=f"first question has {begin} tokens, --max_seq_len allows"):
                read(rows, max_length=max_length)
            continue
        example = data[0]
        check_whole(example)
        assert len(example["input_ids"]) <= max_length
        assert torch.equal(example["input_ids"], whole[0]["input_ids"][: len(example["input_ids"])])
        assert data.shortened == (learned(example, tokenizer) != ["red<|im_end|>", "blue green<|im_end|>"])
        seen.add(len(example["pictures"]))
    assert seen == {1, 2}


# ---------------------------------------------------------------------------- rows that are refused

GOOD = row("Hi.", "Hello.")
BAD = [
    ("json", b'{"conversations": [', "Expecting value"),
    ("json", b"\0\0\0", "Expecting value"),
    ("json", b"[" * 100_000, "recursion"),
    ("json", b'{"conversations": [{"role": "user", "content": "\\ud83d"}]}', "surrogates"),
    ("key", b"[]", 'no "conversations" list'),
    ("key", b'{"conversations": "a"}', 'no "conversations" list'),
    ("key", b'{"conversations": [{"role": "user"}]}', '"role" and "content"'),
    ("key", json.dumps(row(1, "b")).encode(), "both text"),
    ("key", json.dumps(row("a", "b", image=5)).encode(), '"image" must be text'),
    ("key", json.dumps(row("a", "b", image=[5])).encode(), '"image" must be text'),
    ("role", b'{"conversations": [{"role": "robot", "content": "a"}, {"role": "assistant", "content": "b"}]}', "robot"),
    ("role", b'{"conversations": [{"role": "assistant", "content": "b"}]}', "assistant after system"),
    ("answer", json.dumps(row("a")).encode(), "nothing to learn"),
    ("answer", b'{"conversations": []}', "nothing to learn"),
    ("count", json.dumps(row("<image>", "b", image="red.png, blue.png")).encode(), "1 <image> in the user's turns, 2"),
    ("count", json.dumps(row("<image>", "b")).encode(), "1 <image> in the user's turns, 0 pictures"),
    ("count", json.dumps(row("a", "<image>", image="red.png")).encode(), "0 <image> in the user's turns, 1 pictures"),
    ("missing", json.dumps(row("<image>", "b", image="no.png")).encode(), "no.png is not in"),
    ("missing", json.dumps(row("<image>", "b", image=".")).encode(), ". is not in"),
    ("long", json.dumps(row("word " * 200, "b")).encode(), "--max_seq_len allows 200"),
]


@pytest.mark.parametrize("kind, line, reason", BAD, ids=lambda value: str(value)[:30])
def test_a_bad_row_is_named_by_its_line_and_refused_or_left_out(read, tmp_path, kind, line, reason):
    text = json.dumps(GOOD).encode() + b"\n\n" + line + b"\n" + json.dumps(GOOD).encode() + b"\n"
    with pytest.raises(ValueError) as error:
        read(text)
    assert f"{tmp_path / 'rows.jsonl'}:3: " in str(error.value) and reason in str(error.value)
    assert str(error.value).startswith("1 of 4 rows are not usable:") and KINDS[kind] in str(error.value)
    assert str(error.value).endswith("or skip these rows with --on_bad_row skip")

    data = read(text, on_bad_row="skip")
    assert len(data) == 2 and list(data.bad) == [kind]
    assert data.where(1) == f"{tmp_path / 'rows.jsonl'}:4"
    assert torch.equal(data[0]["input_ids"], data[1]["input_ids"])


def test_the_report_counts_every_kind_over_all_files_and_shows_three_examples(tokenizer, clip_folder, world, tmp_path):
    first = write_rows(
        tmp_path / "first.jsonl", [GOOD, row("a"), *[row("<image>", "b", image=f"{i}.png") for i in range(4)]]
    )
    second = write_rows(tmp_path / "second.jsonl", [row("a"), GOOD])
    data = VLMDataset(
        [first, second], world / "pictures", tokenizer, ImageProcessor.from_pretrained(clip_folder), on_bad_row="skip"
    )
    assert len(data) == 2 and [data.where(i) for i in range(2)] == [f"{first}:1", f"{second}:2"]
    lines = [line.strip() for line in data.report().splitlines()]
    assert lines == [
        "6 of 8 rows are not usable:",
        "4  picture file missing",
        *(f"{first}:{line}: {line - 3}.png is not in {world / 'pictures'}" for line in (3, 4, 5)),
        "2  no assistant turn",
        *(f"{place}: no assistant turn, so nothing to learn" for place in (f"{first}:2", f"{second}:1")),
    ]


def test_a_data_set_without_a_usable_row_is_refused_even_under_skip(read):
    with pytest.raises(ValueError, match="no usable row in .*rows.jsonl\n1 of 2 rows are not usable"):
        read(b"\n" + json.dumps(row("a")).encode() + b"\n", on_bad_row="skip")


def test_files_and_folders_that_are_not_there_are_named_with_their_flag(read, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_path .*nowhere.jsonl: no such file"):
        VLMDataset(tmp_path / "nowhere.jsonl", None, tokenizer)
    with pytest.raises(FileNotFoundError, match="--images_path .*nowhere: no such folder or zip"):
        read([GOOD], images_path=tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--data_path .*rows.jsonl is empty"):
        read(b"")


# ---------------------------------------------------------------------------- files as people have them


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_fine(read, tokenizer, encoding, end):
    text = end.join(
        [json.dumps(row("你好", "您好。"), ensure_ascii=False), "", "  ", json.dumps(GOOD)]
    )  # no end at the end
    data = read(text.encode(encoding))
    assert len(data) == 2 and not data.bad
    assert data.where(1).endswith(":4")
    assert [learned(data[i], tokenizer) for i in range(2)] == [["您好。<|im_end|>"], ["Hello.<|im_end|>"]]


def test_separators_of_unicode_inside_a_text_do_not_split_the_line(read, tokenizer):
    answer = "one\u2028two\u2029three\x85four"
    data = read([row("Hi.", answer), GOOD])
    assert len(data) == 2 and learned(data[0], tokenizer) == [answer + "<|im_end|>"]


@pytest.mark.parametrize("encoding", ["gbk", "utf-16"])
def test_a_file_that_is_not_utf8_is_named_with_its_likely_encoding(read, encoding):
    what = encoding.upper()
    with pytest.raises(ValueError, match=rf"--data_path .*rows.jsonl is {what}, expected UTF-8. Type: iconv -f {what}"):
        read(json.dumps(row("你好", "您好。"), ensure_ascii=False).encode(encoding))


def test_one_byte_that_is_not_utf8_is_one_bad_row(read, tokenizer):
    lines = [json.dumps(row("你好", "您好。"), ensure_ascii=False).encode() for _ in range(3)]
    lines[1] = lines[1].replace("好".encode(), "好".encode()[:-1], 1)
    with pytest.raises(ValueError, match=r"rows.jsonl:2: character \d+ is not valid UTF-8"):
        read(b"\n".join(lines))
    data = read(b"\n".join(lines), on_bad_row="skip")
    assert [data.where(i)[-2:] for i in range(2)] == [":1", ":3"] and [*data.bad] == ["json"]
    assert learned(data[1], tokenizer) == ["您好。<|im_end|>"]


def test_a_path_may_hold_the_characters_of_a_pattern(read):
    read([GOOD, GOOD], name="v1/rows.jsonl")
    assert len(read([GOOD], name="v[1]/rows.jsonl")) == 1


def test_a_changed_file_is_read_again(read):
    assert len(read([GOOD])) == 1
    assert len(read([GOOD, GOOD])) == 2


def test_rows_without_their_pictures_are_not_answered_from_the_cache(read, tokenizer):
    rows = [row("What?\n<image>", "Red.", image="red.png")]
    seeing, blind, again = read(rows), read(image_ids=[], images_path=None), read()
    assert seeing.lengths == again.lengths > blind.lengths + P
    assert blind[0]["pictures"] is None and len(again[0]["pictures"]) == 1
    assert len(blind[0]["input_ids"]) == blind.lengths
    assert learned(blind[0], tokenizer) == learned(seeing[0], tokenizer) == ["Red.<|im_end|>"]


def test_another_max_length_is_not_answered_from_the_cache(read):
    read([row("Hi.", "red " * 50)])
    assert [int(read(max_length=length).lengths[0]) for length in (100, 60, 100)] == [100, 60, 100]


@pytest.mark.parametrize("kind", ["truncated", "text", "empty"])
def test_a_broken_picture_gives_an_item_with_the_reason(read, world, tmp_path, kind):
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    content = {"truncated": content[: len(content) // 2], "text": b"not a picture", "empty": b""}[kind]
    (tmp_path / "broken.jpg").write_bytes(content)
    data = read([row("<image>", "b", image="broken.jpg"), row("<image>", "b", image="whole.jpg")], images_path=tmp_path)
    assert set(data[0]) == {"row", "broken"}
    what = "is empty" if kind == "empty" else "cannot be read: "
    assert data[0]["broken"].startswith(f"{data.sources[0].path}:1: {tmp_path / 'broken.jpg'} {what}")
    assert data[1]["pictures"].shape == (1, 3, 32, 32)
    batch = collate([data[0], data[1]])
    assert batch["rows"] == [1] and batch["broken"] == [data[0]["broken"]]
    assert len(batch["input_ids"]) == len(batch["pixel_values"]) == 1


def test_a_picture_of_too_many_pixels_is_a_broken_one_and_not_decoded(read, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    for name, size in (("large", (64, 63)), ("larger", (900, 900)), ("small", (62, 64))):
        Image.new("L", size).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(ImageProcessor, "resize", lambda self, image: torch.tensor(image.size))
    rows = [row("<image>", "b", image=f"{name}.png") for name in ("large", "larger", "small")]
    data = read(rows, images_path=tmp_path)
    for at, (name, pixels) in enumerate((("large", "0.004032"), ("larger", "0.81"))):
        where = f"{data.where(at)}: {tmp_path / name}.png cannot be read"
        assert data[at]["broken"] == f"{where}: it has {pixels} million pixels, at most 0.004 are read: make it smaller"
    assert data[2]["pictures"].tolist() == [[62, 64]]


# ---------------------------------------------------------------------------- batches


def test_a_batch_is_padded_to_its_longest_row_and_keeps_pictures_in_reading_order(read):
    data = read(
        [
            row("<image> and <image>?", "a", image="red.png, blue.png"),
            row("No picture.", "b"),
            row("<image>", "A longer answer than the others have.", image="green.png"),
        ]
    )
    examples = [data[i] for i in (1, 0, 2)]
    batch = collate(examples, pad_token_id=7)
    longest = max(len(example["input_ids"]) for example in examples)
    B, T = batch["input_ids"].shape
    assert B == 3 and T % 8 == 0 and 0 <= T - longest < 8
    for i, example in enumerate(examples):
        n = len(example["input_ids"])
        assert torch.equal(batch["input_ids"][i, :n], example["input_ids"]) and (batch["input_ids"][i, n:] == 7).all()
        assert torch.equal(batch["labels"][i, :n], example["labels"]) and (batch["labels"][i, n:] == IGNORE).all()
        assert batch["attention_mask"][i].tolist() == [1] * n + [0] * (T - n)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["pixel_values"][:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255], [0, 128, 0]]
    assert batch["rows"] == [1, 0, 2] and batch["broken"] == []


@pytest.mark.parametrize("examples", [[], [{"row": 3, "broken": "x:4: y"}]])
def test_a_batch_without_a_usable_row_is_one_of_padding(examples):
    batch = collate(examples)
    assert batch["input_ids"].shape == (1, 8) and batch["attention_mask"].sum() == 0
    assert (batch["labels"] == IGNORE).all() and batch["pixel_values"] is None
    assert batch["rows"] == [] and batch["broken"] == [example["broken"] for example in examples]


@pytest.mark.slow
def test_worker_processes_that_start_afresh_give_the_same_batches(read, world):
    """As on macOS and Windows, where everything a worker needs is pickled."""
    data = read((world / "rows.jsonl").read_bytes())
    sampler = StepSampler(data.lengths, 4, seed=1)
    assert len(pickle.dumps(data)) < 1_000_000  # workers share the rows on disk, they get no copy

    def batches(workers):
        how = {"num_workers": workers, "multiprocessing_context": "spawn"} if workers else {}
        return list(DataLoader(data, batch_sampler=sampler, collate_fn=collate, **how))

    alone, shared = batches(0), batches(2)
    assert len(alone) == len(shared) == 4
    for one, other in zip(alone, shared):
        assert one["rows"] == other["rows"]
        for key in ("input_ids", "labels", "attention_mask", "pixel_values"):
            assert torch.equal(one[key], other[key]) if one[key] is not None else other[key] is None


# ---------------------------------------------------------------------------- which rows when

LENGTHS = np.random.default_rng(0).integers(10, 500, 1003)


def steps(sampler):
    """The batches of an iteration over one rank's sampler, step by step."""
    batches = iter(sampler)
    found = [
        [next(batches) for _ in range(sampler.batches_in_step(step))]
        for step in range(sampler.first_step, sampler.steps_per_epoch)
    ]
    assert next(batches, None) is None
    assert len(sampler) == sum(map(len, found))
    return found


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "ranks, accumulation, batch_size", [(1, 1, 8), (3, 4, 9), (2, 4, 7), (4, 1, 1003), (2, 1, 5000)]
)
def test_ranks_share_an_epoch_so_that_every_row_comes_once(shuffle, ranks, accumulation, batch_size):
    samplers = [
        StepSampler(LENGTHS, batch_size, accumulation, 1, rank, ranks, shuffle=shuffle) for rank in range(ranks)
    ]
    dealt = [steps(sampler) for sampler in samplers]
    rows = [row for of_rank in dealt for step in of_rank for batch in step for row in batch]
    assert sorted(rows) == list(range(len(LENGTHS)))
    assert len({tuple(map(len, of_rank)) for of_rank in dealt}) == 1  # all ranks run as many batches in every step
    assert all(len(step) == accumulation for step in dealt[0][:-1])
    assert all(any(of_rank[i][j] for of_rank in dealt) for i, step in enumerate(dealt[0]) for j in range(len(step)))


def test_seed_and_epoch_alone_determine_the_order():
    def order(seed, epoch):
        sampler = StepSampler(LENGTHS, 8, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 0) == order(1, 0)
    assert len({str(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}) == 6


def test_rows_of_like_length_together_save_most_of_the_padding():
    def padding(batches):
        return sum(sum(max(LENGTHS[batch]) - LENGTHS[batch]) for batch in batches) / LENGTHS.sum()

    at_random = np.random.default_rng(1).permutation(len(LENGTHS))
    assert padding([at_random[i : i + 8] for i in range(0, len(LENGTHS), 8)]) > 0.6
    sampler = StepSampler(LENGTHS, 8, seed=1)
    assert padding(list(sampler)) < 0.05
    means = [LENGTHS[batch].mean() for batch in sampler]  # but long batches and short ones come mixed
    assert abs(np.corrcoef(means[1:], means[:-1])[0, 1]) < 0.3


@pytest.mark.parametrize("ranks, accumulation", [(2, 2), (4, 1)])
def test_ranks_and_accumulation_make_the_same_steps(ranks, accumulation):
    samplers = [StepSampler(LENGTHS, 9, accumulation, 1, rank, ranks) for rank in range(ranks)]
    together = [
        sorted(row for batches in of_ranks for batch in batches for row in batch)
        for of_ranks in zip(*map(steps, samplers))
    ]
    assert together == [
        sorted(row for batch in step for row in batch)
        for step in steps(StepSampler(LENGTHS, 9, accumulation_steps=4, seed=1))
    ]
    assert len(together) == 28


def test_an_iteration_from_the_middle_is_the_tail_of_the_whole():
    sampler = StepSampler(LENGTHS, 8, 3, seed=1, rank=1, world_size=2)
    sampler.set_epoch(2)
    whole = steps(sampler)
    sampler.set_epoch(2, first_step=5)
    assert steps(sampler) == whole[5:]
    sampler.set_epoch(2, first_step=sampler.steps_per_epoch)
    assert steps(sampler) == []


def test_the_batches_of_a_step_have_like_lengths_so_that_no_rank_waits():
    lengths = np.random.default_rng(0).integers(20, 300, 4000)
    ranks = [list(StepSampler(lengths, 16, rank=rank, world_size=2)) for rank in (0, 1)]
    longest = [[lengths[batch].max() for batch in batches] for batches in ranks]
    apart = [abs(int(a) - int(b)) for a, b in zip(*longest)]
    assert sum(apart) / len(apart) < 20  # 90 when batches are dealt out at random
    assert abs(np.corrcoef(longest[0][:-1], longest[0][1:])[0, 1]) < 0.3  # while the steps come in any order
