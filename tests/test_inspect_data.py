"""scripts/inspect_data.py: its figures are those of the data, its marks those of the labels, its page loads nothing."""

import base64
import html
import io
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_sft_vlm
from common.cli import run_main
from dataset import lm_dataset
from dataset.lm_dataset import IGNORE, VLMDataset
from inference.models import list_models
from model.processing import ImageProcessor
from scripts import inspect_data
from tests.conftest import turn, write_rows
from tests.test_sources import BLACK, chat, picture, row, write_parquet
from trainer.advice import answer

EVIL = '<script>alert("&")</script></mark>'
LONG = row("Tell me a story.", "A very long story. " * 20)


@pytest.fixture
def look(clip_folder, tokenizer_folder, tmp_path, monkeypatch, capsys):
    """look("rows.jsonl", *flags) → what it prints, and the page; in a folder with images/{red,green,blue}.png."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for colour in ("red", "green", "blue"):
        (tmp_path / f"images/{colour}.png").write_bytes(picture(colour))

    def look(*flags):
        folders = ["--tokenizer_path", str(tokenizer_folder), "--vision_model_path", str(clip_folder)]
        inspect_data.main([*folders, "--html", "new/page.html", *flags])
        return capsys.readouterr().out, (tmp_path / "new/page.html").read_text(encoding="utf-8")

    return look


@pytest.fixture
def mixed(tmp_path):
    """JSONL and Parquet in English, Chinese and other scripts, with bad rows of two kinds and two that are mended."""
    rows = [
        row("What is this?\n<image>", "It is red.", image="red.png"),
        row("<image>\n这是什么颜色？", "绿色。", "And in English?", "Green.", image="green.png"),
        row("<image>\n<image>\n<image>\nWhich colours?", "红，蓝。", image="red.png, blue.png"),
        row("6 * 7?", "42"),
        row("<image>", "It is pink.", image="pink.png"),
        LONG,
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write("{no JSON\n\n[more of it\n")
    write_parquet(tmp_path / "a.parquet", [(chat("什么？\n<image>", "蓝色。"), [picture("blue")])])
    write_parquet(tmp_path / "b.parquet", [(chat("Say hello.", "Hello."), [BLACK])])
    return ["rows.jsonl", "*.parquet"]


def table(out: str, title: str) -> dict[str, tuple[int, float]]:
    """{label: (rows, percent)} of a chart in what is printed."""
    lines = out.partition(f"\n{title}")[2].partition("\n\n")[0].splitlines()[1:]
    return {
        found[1]: (int(found[2]), float(found[3]))
        for found in (re.fullmatch(r"  (.+?) +(\d+) +([\d.]+)%(?:  #+)?", line) for line in lines)
    }


def figure(out: str, what: str) -> str:
    return re.search(rf"^ *(\S+)  {re.escape(what)}", out, re.MULTILINE)[1]


def cards(page: str) -> dict[str, list[tuple[bool, str, int]]]:
    """{file:line: [(carries loss, text, tokens), ...]} of the samples."""
    found = {}
    for card in page.split('<div class="card sample">')[1:]:
        where = re.search(r'<div class="tags">(.+?) ·', card)[1]
        boxes = re.findall(
            r'<(mark|span)(?: class="chip"| data-n="(\d)")?>(.*?)</\1>', card.split('class="tokens"')[1], re.DOTALL
        )
        found[where] = [
            (tag == "mark", html.unescape(text.replace("<i></i>", "")), int(many or 1)) for tag, many, text in boxes
        ]
    return found


def marked(boxes) -> str:
    return "".join(text for loss, text, _ in boxes if loss)


# ---------------------------------------------------------------------------- figures


def test_the_figures_are_those_of_the_data(look, mixed):
    out, page = look(*mixed)
    assert re.search(r"^ +9 +5  rows.jsonl\n +1 +1  a.parquet\n +1 +1  b.parquet$", out, re.MULTILINE)
    assert (figure(out, "usable rows"), figure(out, "bad rows")) == ("7", "3")
    assert figure(out, "rows had more <image>") == figure(out, "rows had no <image>") == "1"
    assert table(out, "language of the answers") == {
        "English": (3, 42.9),
        "Chinese": (2, 28.6),
        "mixed": (1, 14.3),
        "other": (1, 14.3),
    }
    assert table(out, "pictures in a row") == {"0": (3, 42.9), "1": (3, 42.9), "2": (1, 14.3)}
    assert table(out, "answers in a row") == {"1": (6, 85.7), "2": (1, 14.3)}
    assert sum(rows for rows, _ in table(out, "tokens of a row").values()) == 7
    assert "       2  not valid JSON\n            rows.jsonl:7: " in out
    assert "       1  picture file missing\n            rows.jsonl:5: pink.png is not in images" in out
    for value, what in re.findall(r"^ +(\S+)  ([a-z].*)$", out.split("\n\n")[2], re.MULTILINE):
        assert f"<b>{value}</b><span>{html.escape(what)}</span>" in page
    assert '<th scope="row">not valid JSON</th><td>2</td>' in page and '<th scope="row">Chinese</th>' in page


def test_what_max_seq_len_costs_is_said_in_rows_and_tokens(look, mixed):
    out, page = look(*mixed)
    longest, shortest = (int(figure(out, f"tokens in the {which} row")) for which in ("longest", "shortest"))
    assert figure(out, "rows shortened to 1,536 tokens") == "0" and " shortened:" not in page
    answers = int(re.search(r"tokens cut off \(0 of (\d+)\)", out)[1])

    out, page = look(*mixed, "--max_seq_len", str(longest - 51))  # 50 and the line break behind
    assert figure(out, "rows shortened") == "1" and figure(out, "tokens in the shortest row") == str(shortest)
    assert figure(out, "of answer tokens cut off") == f"{50 / answers:.1%}" and f"(50 of {answers})" in out
    assert " shortened: 50 answer tokens lost" in page
    assert LONG["conversations"][1]["content"].startswith(marked(cards(page)["rows.jsonl:6"]))  # without <|im_end|>


def test_lines_fit_80_columns_and_end_with_what_to_type_next(look, mixed):
    out, _ = look(*mixed, "--images_path", "images", "--max_seq_len", "640")
    assert max(map(len, out.replace(out[out.index("To train") :], "").splitlines())) <= 80
    command = " ".join(out.split("$ ")[1].replace("\\\n", "").split())
    expected = "--data_path rows.jsonl '*.parquet' --images_path images --tokenizer_path "
    assert command.startswith(f"python train_sft_vlm.py --from_weight none {expected}")
    sizes = "--epochs 250 --batch_size 8 --out_dir out/mine"  # for 7 rows
    assert command.endswith(f" --max_seq_len 640 {sizes} --on_bad_row skip")
    assert "No weights to start from: train small ones (python -m scripts.quickstart)" in " ".join(out.split())


def printed(out: str) -> list[str]:
    """The training that it prints, as a shell takes it, without the `python` before."""
    command = shlex.split(out.split("To train on it:\n$ ")[1].replace("\\\n", ""))
    assert command[:2] == ["python", "train_sft_vlm.py"]
    return command[2:]


def test_the_training_that_it_prints_learns_from_the_weights_that_it_is_given(trained, tmp_path, monkeypatch, capsys):
    """Tokenizer, encoder, epochs and batch follow: nothing needs to be added to what is typed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    jewels = {"red": "ruby", "green": "emerald", "blue": "sapphire", "yellow": "topaz", "black": "onyx"}
    for colour in jewels:
        (tmp_path / f"pictures/{colour}.png").write_bytes(picture(colour))
    rows = [row("Which jewel is it?", f"a fine {jewel}", image=f"{colour}.png") for colour, jewel in jewels.items()]
    write_rows(tmp_path / "rows.jsonl", rows * 4)
    weights = str(Path(trained[trained.index("--out_dir") + 1]) / "sft_vlm_64.pth")
    inspect_data.main(["rows.jsonl", "--images_path", "pictures", "--from_weight", weights])
    out = capsys.readouterr().out
    assert "20  rows had pictures and no <image>" in out and "@×" not in out and "are assumed" not in out
    run = train_sft_vlm.main([*printed(out), "--device", "cpu", "--num_workers", "0"])
    told = capsys.readouterr().out
    assert "too few" not in told and "diverged" not in told and run.total_steps == 252
    given = [answer(run, run.loader.data.tokenizer, run.loader.data, i) for i in range(5)]
    assert given == [f"a fine {jewel}" for jewel in jewels.values()]
    assert run.checkpoint.path == Path("out/mine/sft_vlm_64.pth")

    inspect_data.main(["rows.jsonl", "--images_path", "pictures"])  # the newest in out/: those just made
    assert printed(capsys.readouterr().out)[:2] == ["--from_weight", "out/mine/sft_vlm_64.pth"]


def test_a_newer_llava_is_not_what_the_next_training_starts_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = Path("out/sft_vlm_64_llava")
    made.mkdir(parents=True)
    Path("out/sft_vlm_64.pth").touch()
    for name, text in (
        ("config.json", '{"model_type": "llava", "projector_hidden_act": "linear"}'),
        ("tokenizer.json", ""),
    ):
        (made / name).write_text(text)
    os.utime("out/sft_vlm_64.pth", (1e9, 1e9))
    assert list_models("out") == [made, Path("out/sft_vlm_64.pth")]
    assert inspect_data.choose_weights(inspect_data.parse_args(["rows.jsonl"])) == Path("out/sft_vlm_64.pth")


def test_epochs_and_batch_follow_from_the_rows_and_the_width(trained, tmp_path):
    args = inspect_data.parse_args(["rows.jsonl"])
    weights = Path(trained[trained.index("--out_dir") + 1]) / "sft_vlm_64.pth"
    for path, rows, expected in (
        (weights, 100, ["--epochs", "20", "--batch_size", "8"]),
        (weights, 10_000, ["--epochs", "8", "--batch_size", "16"]),
        (None, 1000, ["--epochs", "20", "--batch_size", "32"]),
        (None, 10**6, ["--epochs", "1", "--batch_size", "32"]),
    ):
        command = inspect_data.next_command(args, path, rows, False)
        assert command[command.index("--epochs") :][:4] == expected


def test_lengths_fall_into_at_most_10_round_ranges():
    random = np.random.default_rng(0)
    for lengths in (np.array([7]), np.array([5, 1500]), random.integers(40, 90, 999), random.geometric(0.01, 9999)):
        found = inspect_data.length_bins(lengths)
        assert sum(rows for _, rows in found) == len(lengths) and len(found) <= 10
        for label, rows in found:
            first, _, last = label.replace(",", "").replace("or more", "to 9999").partition(" to ")
            assert ((lengths >= int(first)) & (lengths <= int(last or first))).sum() == rows, (label, found)


# ---------------------------------------------------------------------------- the page


def test_marks_are_exactly_the_tokens_with_loss(look, tmp_path, tokenizer, clip_folder):
    rows = [
        row("<image><image>\nWhat <|im_end|> @@@?", "红色 and 😀.\n\nYes\ufffd", image="red.png, blue.png"),
        row("<image>", "It is red.", "确定吗？", f"{EVIL} 是的<|im_end|>。", image="red.png"),
    ]
    write_rows(tmp_path / "rows.jsonl", rows)
    out, page = look("rows.jsonl")
    processor = ImageProcessor.from_pretrained(clip_folder)
    data = VLMDataset("rows.jsonl", None, tokenizer, processor, 1536, [34] * 16)
    assert len(cards(page)) == 2
    for i in range(2):
        boxes = cards(page)[f"rows.jsonl:{i + 1}"]
        answers = [said["content"] for said in rows[i]["conversations"] if said["role"] == "assistant"]
        assert marked(boxes) == "".join(f"{answer}<|im_end|>" for answer in answers)
        labels, text = data[i]["labels"], "".join(text for _, text, _ in boxes)
        assert sum(many for loss, _, many in boxes if loss) == (labels != IGNORE).sum()
        assert text.replace("@×16", "@" * 16) == tokenizer.decode(data[i]["input_ids"])
        assert ("�" in text) == (i == 0)  # the one that was typed; characters of several tokens are whole
        assert [text for _, text, _ in boxes].count("@×16") == len(data[i]["pictures"])
        assert max(many for _, _, many in boxes) > 1  # and say so
        assert [text for loss, text, _ in boxes if loss].count("<|im_end|>") == len(answers)  # in boxes of their own


def test_a_row_that_is_cut_inside_a_character_ends_with_dots(look, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [row("Hi.", "😀😀")])
    longest = int(figure(look("rows.jsonl")[0], "tokens in the longest row"))
    boxes = cards(look("rows.jsonl", "--max_seq_len", str(longest - 3))[1])[
        "rows.jsonl:1"
    ]  # <|im_end|> and half a face
    assert marked(boxes) == "😀…"


def test_the_page_shows_markup_and_runs_nothing(look, tmp_path):
    name = "<img src=x onerror=y>.png"
    (tmp_path / "images" / name).write_bytes(picture("red"))
    evil = [row(f"<image>{EVIL}", EVIL, image=name), {"conversations": [turn(EVIL, "a"), turn("assistant", "b")]}]
    write_rows(tmp_path / "<b>.jsonl", evil)
    _, page = look("<b>.jsonl")
    assert "<mark>&lt;</mark>" in page and "<mark>&amp;</mark>" in page and "unknown role &#39;&lt;script&gt;" in page
    assert page.count(html.escape(name)) == 2 and "&lt;b&gt;.jsonl" in page and "<b>." not in page
    assert "<script" not in page and "<link" not in page and page.count("<img") == 1
    assert "http://" not in page and "https://" not in page and "url(" not in page and "@import" not in page
    assert all(source.startswith("data:image/png;base64,") for source in re.findall(r'(?:src|href)="(.*?)"', page))


def test_pictures_are_those_that_the_model_sees(look, tmp_path, clip_folder):
    Image.new("RGB", (90, 40), "red").save(tmp_path / "images/wide.png")
    write_rows(tmp_path / "rows.jsonl", [row("<image>", "b", image="wide.png")])
    _, page = look("rows.jsonl")
    shown = Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,(.*?)"', page)[1])))
    assert shown.size == (32, 32) and shown.getpixel((16, 16)) == (255, 0, 0)


def test_a_sample_with_a_broken_picture_is_named(look, tmp_path):
    (tmp_path / "images/broken.png").write_bytes(picture("red")[:50])
    write_rows(tmp_path / "rows.jsonl", [row("<image>", "b", image=f"{name}.png") for name in ("broken", "red")])
    out, page = look("rows.jsonl")
    said = "1 of 2 samples have a picture that cannot be read: rows.jsonl:1: images/broken.png cannot be read"
    told = " ".join(out.split())
    assert "those of the samples were opened" in told and said in told and said in page
    assert (
        '<div class="answer wrong">rows.jsonl:1: images/broken.png cannot be read' in page and page.count("<img") == 1
    )
    assert "--on_bad_row skip" in out.splitlines()[-1]


@pytest.mark.parametrize("many", [False, True])
def test_every_picture_is_opened_if_asked_for(look, tmp_path, monkeypatch, many):
    """With many of them by worker processes."""
    count = 503 if many else 30
    names = [f"images/{i}.png" for i in range(count)]
    for name in names:
        (tmp_path / name).write_bytes(picture("red"))
    (tmp_path / names[7]).write_bytes(picture("red")[:60])
    (tmp_path / names[20]).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n")
    write_rows(tmp_path / "rows.jsonl", [row("<image>\nWhat?", "red", image=Path(name).name) for name in names])
    out, page = look("rows.jsonl", "--samples", "1", "--open_all")
    said = " ".join(out.split())
    assert f"All {count} pictures were opened, 2 of them cannot be read" in said
    assert "rows.jsonl:8: images/7.png cannot be read" in said
    assert "rows.jsonl:21: images/20.png is a Git LFS pointer" in said
    assert "--on_bad_row skip" in said and "20.png is a Git LFS pointer" in page


def test_samples_are_the_shortest_the_longest_and_some_of_every_kind(look, tmp_path):
    rows = [row(f"Is it {i}?", "It is.") for i in range(300)]
    rows[150] = row("<image>\n<image>", "两个。", image="red.png, blue.png")
    rows[151], rows[152] = row("?", "I"), LONG
    write_rows(tmp_path / "rows.jsonl", rows)
    first, again, other = (
        list(cards(look("rows.jsonl", "--samples", "5", "--seed", seed)[1])) for seed in ("0", "0", "1")
    )
    assert first == again != other
    for chosen in (first, other):
        assert len(chosen) == 5 and "rows.jsonl:151" in chosen
        assert (chosen[0], chosen[-1]) == ("rows.jsonl:152", "rows.jsonl:153")


# ---------------------------------------------------------------------------- what is missing


def test_without_a_usable_row_the_table_of_bad_rows_is_the_message(look, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", [row("<image>", "b", image="no.png"), row("Hi.")])
    with pytest.raises(SystemExit):
        run_main(lambda: look("rows.jsonl"))
    error = capsys.readouterr().err
    assert "error: no usable row in rows.jsonl\n2 of 2 rows are not usable:" in error and "Traceback" not in error
    assert "1  no assistant turn\n            rows.jsonl:2: " in error and not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError, match="--data_path none.jsonl: no such file"):
        look("none.jsonl")


def test_without_an_encoder_196_tokens_per_picture_are_assumed_and_that_is_said(look, mixed):
    out, page = look(*mixed, "--vision_model_path", "nowhere")
    assert "No encoder in nowhere: assuming 196 tokens per picture" in out and "No encoder in nowhere" in page
    assert "@×196" in page and int(figure(out, "tokens in the longest row")) > 2 * 196


def test_training_finds_the_rows_checked(look, mixed, tokenizer, monkeypatch):
    look(*mixed)
    monkeypatch.setattr(lm_dataset, "check_rows", None)
    data = VLMDataset(mixed, None, tokenizer, None, 1536, [34] * 16, on_bad_row="skip")
    assert len(data) == 7
