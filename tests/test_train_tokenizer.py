"""scripts/train_tokenizer.py: the contract that the model rests on, and what users get wrong."""

import json
import re
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from common.cli import run_main
from model.processing import encode_chat, load_tokenizer
from scripts.train_tokenizer import main

WORDS = ("red", "green", "blue", "square", "circle", "dog", "runs", "over", "grass", "红色", "圆形", "一只狗", "草地上")


def row(user, assistant, **extra):
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return {"conversations": turns, **extra}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        row(
            f"What is this, {one}@{two}.com @@@@?\n<image>",
            f"A {one} {two}.\n\n  It {two} @ {one}, {two}.",
            image="a.jpg",
        )
        for one in WORDS
        for two in WORDS
    ]
    path.write_text("\n".join(json.dumps(each, ensure_ascii=False) for each in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    main(["--data_path", str(data), "--out_dir", str(folder), "--vocab_size", "340"])
    return folder


def test_the_ids_are_those_of_the_contract(folder):
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == tokenizer.vocab_size == 340
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 0)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    printable = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    assert tokenizer.convert_tokens_to_ids(printable) == list(range(3, 3 + len(printable)))
    assert tokenizer.convert_tokens_to_ids("@") == 34


def test_the_file_is_plain_byte_level_bpe_without_normalizer_or_prefix_space(folder):
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert saved["normalizer"] is None
    assert saved["pre_tokenizer"]["type"] == "ByteLevel"
    assert saved["pre_tokenizer"]["add_prefix_space"] is False
    assert not list(folder.glob("*.tmp"))


def test_no_merge_contains_the_placeholder_though_the_text_is_full_of_it(folder):
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert saved["merges"]
    assert not [merge for merge in saved["merges"] if "@" in "".join(merge)]
    tokenizer = load_tokenizer(folder)
    for text in ("@" * 196 + "\nWhat?", "!@@@@", "dog@@ @@dog", "(@@", "@@@@。", " @@@"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ids.count(34) == text.count("@")


@pytest.mark.parametrize(
    "text", ["A red dog, 'runs'.", "红色的狗", "é🙂\t\r\n  x ", "ﬁ Å Å", "\x00\x7f", "  two  spaces , here"]
)
def test_any_text_comes_back_unchanged(folder, text):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert 0 not in ids  # nothing is unknown


def test_frequent_words_are_one_token(folder):
    tokenizer = load_tokenizer(folder)
    for text in ("user", "assistant", " helpful"):
        assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1


@pytest.mark.parametrize(
    "answer",
    ["A dog.", "", " ", "\n", "\n\n\nA dog.", "  A dog", "   ", "\t\n A  dog \n", "红色@@", "\u3000\u3000一只狗"],
)
@pytest.mark.parametrize("system", [None, "Be brief.", " \n"])
def test_the_chat_template_gives_the_ids_that_training_sees(folder, answer, system):
    tokenizer = load_tokenizer(folder)
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns += [
        {"role": "user", "content": "What is this? @@@@\n"},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": " \n and now ?"},
    ]
    for conversation in (turns, turns[:-1], turns[:-2], [*turns, {"role": "assistant", "content": answer}]):
        pieces = encode_chat(tokenizer, conversation, [34] * 196)
        expected = [token for ids, _, _ in pieces for token in ids]
        assert tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False) == expected


def test_the_template_tells_answers_from_questions(folder):
    """As TRL asks, so that the question is not learned too."""
    tokenizer = load_tokenizer(folder)
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": " A dog.\n"}] * 2
    expected = [int(answer) for ids, answer, _ in encode_chat(tokenizer, turns, [34] * 196) for _ in ids]
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    assert tokenizer.apply_chat_template(turns, **how)["assistant_masks"] == expected and 1 in expected


def test_the_chat_format_is_the_public_one(folder):
    text = load_tokenizer(folder).apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_another_process_with_another_hash_seed_writes_the_same_bytes(data, folder, tmp_path):
    command = [sys.executable, "-m", "scripts.train_tokenizer", "--data_path", data, "--out_dir", tmp_path]
    subprocess.run([*command, "--vocab_size", "340"], check=True, capture_output=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_parquet_gives_the_same_bytes_as_jsonl_and_rows_that_training_does_not_take_are_left_out(
    data, folder, tmp_path, capsys
):
    texts = [json.dumps(json.loads(line)["conversations"]) for line in data.read_text(encoding="utf-8").splitlines()]
    texts.append(json.dumps(row("<image> or <image>?", "Two, of one picture only." * 99)["conversations"]))
    columns = {"conversations": texts, "image_bytes": [[b"not opened"]] * (len(texts) - 1) + [[]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    main(["--data_path", str(tmp_path / "*.parquet"), "--out_dir", str(tmp_path / "new"), "--vocab_size", "340"])
    assert (tmp_path / "new/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert capsys.readouterr().out.startswith("skipped 1 rows that training cannot use either\n")


def test_it_says_how_well_it_compresses_both_languages(data, tmp_path, capsys):
    main(["--data_path", str(data), "--out_dir", str(tmp_path), "--vocab_size", "340"])
    out = capsys.readouterr().out
    assert "English: " in out and "Chinese: " in out and "characters/token" in out


def test_an_empty_answer_counts_for_no_language(data, tmp_path):
    empty = {"conversations": [{"role": "user", "content": "问"}, {"role": "assistant", "content": ""}]}
    (tmp_path / "zh.jsonl").write_text(f"{json.dumps(empty)}\n", encoding="utf-8")
    main(["--data_path", str(tmp_path / "zh.jsonl"), "--out_dir", str(tmp_path / "new"), "--vocab_size", "259"])
    assert (tmp_path / "new/tokenizer.json").is_file()


def test_too_little_text_gives_the_tokens_it_has_and_says_how_many(data, tmp_path, capsys):
    main(["--data_path", str(data), "--out_dir", str(tmp_path / "few")])
    (reached,) = re.findall(r"--vocab_size 6400: the text is enough for (\d+) tokens", capsys.readouterr().out)
    assert len(load_tokenizer(tmp_path / "few")) == int(reached) < 6400
    main(["--data_path", str(data), "--out_dir", str(tmp_path / "asked"), "--vocab_size", reached])
    assert "is enough for" not in capsys.readouterr().out
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("few", "asked")]
    assert files[0] == files[1]


@pytest.mark.parametrize("size", ["258", "0", "-1"])
def test_a_vocabulary_smaller_than_the_bytes_is_refused(data, tmp_path, size):
    with pytest.raises(ValueError, match=f"--vocab_size {size}: must be at least 259"):
        main(["--data_path", str(data), "--out_dir", str(tmp_path), "--vocab_size", size])


def test_a_vocabulary_of_bytes_alone_works(data, tmp_path):
    main(["--data_path", str(data), "--out_dir", str(tmp_path), "--vocab_size", "259"])
    assert len(load_tokenizer(tmp_path)) == 259


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_path .*nowhere.jsonl: no such file"):
        main(["--data_path", str(tmp_path / "nowhere.jsonl"), "--out_dir", str(tmp_path)])


@pytest.mark.parametrize(
    "line",
    [
        "{broken",
        "[]",
        "{}",
        '{"conversations": []}',
        '{"conversations": [{"role": "user", "content": 5}]}',
        "\xff",
        '{"conversations": [{"role": "user", "content": "half a pair: \\ud800"}]}',
    ],
)
def test_a_line_that_is_no_row_is_named_with_its_number(tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(row("a", "b")).encode() + b"\n\n" + line.encode("latin-1") + b"\n")
    with pytest.raises(ValueError, match=r"--data_path .*bad.jsonl:3 is not a conversation"):
        main(["--data_path", str(path), "--out_dir", str(tmp_path / "new")])


def test_a_tokenizer_that_weights_may_depend_on_is_not_overwritten(data, folder):
    before = (folder / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="--out_dir .* contains a tokenizer already"):
        main(["--data_path", str(data), "--out_dir", str(folder), "--vocab_size", "300"])
    assert (folder / "tokenizer.json").read_bytes() == before


def test_a_typo_on_the_command_line_is_one_message_and_no_traceback(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: main(["--data_path", "nowhere.jsonl", "--out_dir", str(tmp_path)]))
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert "--data_path nowhere.jsonl: no such file" in told and "Traceback" not in told


def test_with_split_chinese_no_token_holds_two_characters_and_a_word_is_the_same_beside_any_other(data, tmp_path):
    main(["--data_path", str(data), "--out_dir", str(tmp_path), "--vocab_size", "330", "--split_chinese"])
    tokenizer = load_tokenizer(tmp_path)
    tokens = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    assert "红" in tokens and not [token for token in tokens if len(re.findall("[\u4e00-\u9fff]", token)) > 1]
    alone = tokenizer("圆形")["input_ids"]
    assert tokenizer("红色的圆形")["input_ids"][-len(alone) :] == alone
