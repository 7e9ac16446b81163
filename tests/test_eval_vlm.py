import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval_vlm
from inference import asking, generate, models, pictures
from model.processing import ImageProcessor
from tests.conftest import turn, write_rows


def test_it_answers_about_one_picture_in_a_stream(trained, world, capsys):
    eval_vlm.main(
        [*trained, "--image", str(world / "pictures/blue.png"), "--prompt", "What colour is this?", "--greedy"]
    )
    printed = capsys.readouterr().out
    assert "[blue.png] What colour is this?" in printed and "It is blue." in printed


def test_it_answers_about_two_pictures_in_one_question(trained, world, capsys):
    pictures = [str(world / "pictures/red.png"), str(world / "pictures/blue.png")]
    prompt = "<image>\n<image>\nWhich colours are these?"
    eval_vlm.main([*trained, "--image", *pictures, "--prompt", prompt, "--greedy"])
    assert "They are red and blue." in capsys.readouterr().out


def test_without_image_it_asks_about_every_picture_of_a_folder_alone_or_together(trained, world, capsys):
    folder = ["--image_dir", str(world / "pictures"), "--greedy", "--max_new_tokens", "3"]
    eval_vlm.main([*trained, *folder])
    assert capsys.readouterr().out.count(".png] What colour is this?") == 6  # the commonest question of its training
    eval_vlm.main([*trained, *folder, "--use_multi", "2", "--weights", "sft_vlm"])
    names = "[black.png, blue.png, green.png, red.png, white.png, yellow.png]"
    assert f"{names} Compare these pictures." in capsys.readouterr().out  # its rows ask about two only once


def test_sampling_follows_the_seed(trained, world, capsys):
    ask = [*trained, "--image", str(world / "pictures/red.png"), "--prompt", "Tell me.", "--temperature", "5"]
    ask += ["--top_p", "1", "--max_new_tokens", "12"]

    def answer(seed):
        eval_vlm.main([*ask, "--seed", str(seed)])
        return capsys.readouterr().out

    assert answer(1) == answer(1) != answer(2)


def test_it_scores_rows_and_shuffled_pictures_score_less(trained, world, tmp_path, capsys):
    output = tmp_path / "scores.json"
    rows = ["--data_path", str(world / "rows.jsonl"), "--images_path", str(world / "pictures")]
    result = eval_vlm.main([*trained, *rows, "--max_new_tokens", "16", "--output", str(output)])
    assert result["true"]["en"]["exact_match"] == result["true"]["zh"]["exact_match"] == 1
    assert result["shuffled"]["en"]["exact_match"] <= 0.5
    assert result["shuffled"]["en"]["loss"] > result["true"]["en"]["loss"] + 0.5
    saved = json.loads(output.read_text(encoding="utf-8"))
    assert saved["true"] == result["true"] and len(saved["answers"]) == sum(saved["questions"].values()) == 20
    assert set(saved["answers"][0]) == {
        *("kind", "language", "images", "question", "references"),
        *("answer", "right", "images_shuffled", "answer_shuffled", "right_shuffled"),
    }
    parameters = saved["parameters"]  # of CLIP the vision half: positions, patches, 2 layers and 2 norms at least
    assert parameters["projector"] == 32 * 64 + 64 and parameters["encoder"] > 17000
    weights = torch.load(trained[trained.index("--out_dir") + 1] + "/sft_vlm_64.pth")  # lm_head is embed_tokens
    counted = sum(value.numel() for key, value in weights.items() if key != "lm_head.weight")
    assert parameters["llm"] + parameters["projector"] == counted
    assert saved["device"] == "cpu"
    answers = saved["answers"]
    assert all(answer["right"] for answer in answers) and saved["by_kind"] == {}  # the rows name no kind
    assert all(answer["images"] != answer["images_shuffled"] for answer in answers if len(answer["images"]) == 1)
    assert "exact match" in capsys.readouterr().out


def test_it_scores_by_kind_of_question_and_without_the_loss(trained, world, tmp_path, capsys):
    lines = (world / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) | {"kind": "multi" if "确定" in line else "colour"} for line in lines[:4]]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--data_path", str(path), "--images_path", str(world / "pictures"), "--max_new_tokens", "16", "--no_loss"]
    result = eval_vlm.main([*trained, *flags, "--output", str(tmp_path / "scores.json")])
    assert result["by_kind"] == {
        "colour": {"en": {"questions": 2, "true": 1.0, "shuffled": 0.0}},
        "multi": {"zh": {"questions": 4, "true": 1.0, "shuffled": 0.5}},  # "Sure?" is "yes" about any picture
    }
    assert result["true"]["en"] == {"exact_match": 1.0}
    assert "colour" in capsys.readouterr().out


def test_batches_answer_as_single_questions_do(trained, world, tmp_path):
    rows = [
        "--data_path",
        str(world / "rows.jsonl"),
        "--images_path",
        str(world / "pictures"),
        "--max_new_tokens",
        "16",
    ]
    rows += ["--output", str(tmp_path / "scores.json")]
    alone = eval_vlm.main([*trained, *rows, "--batch_size", "1"])
    together = eval_vlm.main([*trained, *rows, "--batch_size", "20"])
    assert alone["answers"] == together["answers"]


def test_a_transformers_folder_answers_as_the_weights_do(trained, world, tokenizer, tmp_path, capsys):
    model, _, _ = models.load_model(eval_vlm.parse_args(trained))
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    ask = ["--image", str(world / "pictures/green.png"), "--prompt", "What colour is this?", "--greedy"]
    eval_vlm.main([*trained, *ask, "--load", "1", "--weights", str(tmp_path / "folder")])
    assert "It is green." in capsys.readouterr().out


def flags_of(*more):
    return eval_vlm.parse_args([*more])


@pytest.fixture
def several(tmp_path):
    """out/ with weights of several stages, widths and days, the newest last, and an exported folder."""
    out = tmp_path / "out"
    names = [
        "sft_vlm_512.pth",
        "quickstart/pretrain_vlm_128.pth",
        "quickstart/sft_vlm_128.pth",
        "mine/sft_vlm_128_moe.pth",
    ]
    for day, name in enumerate([*names, "mine/sft_vlm_128.old.pth", "a/b/sft_vlm_64.pth"]):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"")
        os.utime(out / name, (1e9 + day, 1e9 + day))
    (out / "export").mkdir()
    (out / "export/config.json").write_text('{"model_type": "minimind-v"}')
    return out


def test_the_newest_weights_that_fit_are_taken(several):
    def find(*more):
        return [
            str(path.relative_to(several)) for path in models.find_models(flags_of("--out_dir", str(several), *more))
        ]

    mine, quickstart, public = "mine/sft_vlm_128_moe.pth", "quickstart/sft_vlm_128.pth", "sft_vlm_512.pth"
    assert find() == find("--weights", "sft_vlm") == [mine, quickstart, public]
    assert find("--hidden_size", "128") == [mine, quickstart] and find("--use_moe") == [mine]
    assert find("--hidden_size", "512") == [public]
    assert find("--model_mode", "0") == find("--weights", "pretrain_vlm") == ["quickstart/pretrain_vlm_128.pth"]
    assert find("--load", "1") == ["export"]
    named = several / "quickstart/pretrain_vlm_128.pth"
    assert find("--weights", str(named)) == ["quickstart/pretrain_vlm_128.pth"]
    listed = [str(path.relative_to(several)) for path in models.list_models(several)]
    assert listed == ["export", mine, quickstart, "quickstart/pretrain_vlm_128.pth", public]


def test_stage_3_is_asked_like_stage_2_unless_a_mode_is_named(several):
    def find(*more):
        return [path.name for path in models.find_models(flags_of("--out_dir", str(several / "quickstart"), *more))]

    scst = several / "quickstart/scst_vlm_128.pth"
    scst.write_bytes(b"")
    assert find() == ["scst_vlm_128.pth", "sft_vlm_128.pth"]
    assert find("--model_mode", "1") == find("--weights", "sft_vlm") == ["sft_vlm_128.pth"]
    assert find("--model_mode", "3") == find("--weights", "scst_vlm") == ["scst_vlm_128.pth"]
    os.utime(scst, (1e9, 1e9))
    assert find()[0] == "sft_vlm_128.pth"  # trained further


def test_the_public_folder_comes_before_other_exports(several, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MiniMind2-V").mkdir()
    (tmp_path / "MiniMind2-V/config.json").write_text('{"model_type": "minimind-v"}')
    assert models.find_models(flags_of("--load", "1")) == [Path("MiniMind2-V")]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "no sft_vlm_*.pth in empty or its subfolders. Train or download one:\n"),
        (
            ["--out_dir", "out", "--hidden_size", "64", "--use_moe"],
            "no sft_vlm_64_moe.pth in out or its subfolders",
        ),
        (["--out_dir", "out", "--use_multi", "2"], "no sft_vlm_multi_*.pth in out or its subfolders. Choose another"),
        (["--load", "1"], "no Transformers folder in empty or its subfolders"),
        (["--weights", "none"], "--weights none: an untrained model cannot answer"),
        (["--weights", "typo"], "--weights typo: no such file or folder"),
        (["--weights", "out/quickstart"], "it has no config.json\nFor the .pth files in it: --out_dir out/quickstart"),
        (["--load", "1", "--weights", "out/sft_vlm_512.pth"], "it has no config.json\nLeave --load 1 out"),
    ],
)
def test_who_finds_no_weights_is_told_in_two_lines_what_to_type(several, monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        models.find_models(flags_of("--out_dir", "empty", *flags))
    text = str(error.value)
    assert message in text and len(text.splitlines()) <= 2 and max(map(len, text.splitlines())) <= 80
    suggested = re.search(r"--weights (out/\S+)", text)
    assert "out" not in flags or Path(suggested[1]).exists()


def test_eval_says_which_weights_it_took_and_how_to_choose_others(trained, world, tmp_path, capsys):
    out = Path(trained[trained.index("--out_dir") + 1])
    for folder in ("older", "newer"):
        shutil.copytree(out, tmp_path / folder)
    os.utime(tmp_path / "older/sft_vlm_64.pth", (1e9, 1e9))
    ask = ["--image", str(world / "pictures/red.png"), "--greedy", "--out_dir", str(tmp_path)]
    eval_vlm.main([*trained, *ask])
    printed = capsys.readouterr().out
    other = tmp_path / "older/sft_vlm_64.pth"
    assert f"the newest of 2 models that fit; to choose another: --weights {other}" in printed
    assert f"tensors from {tmp_path / 'newer/sft_vlm_64.pth'}" in printed
    eval_vlm.main([*trained, *ask, "--weights", str(tmp_path / "older/sft_vlm_64.pth")])
    printed = capsys.readouterr().out
    assert "the newest of" not in printed and f"tensors from {tmp_path / 'older/sft_vlm_64.pth'}" in printed


def test_every_way_of_asking_puts_the_pictures_in_the_same_place():
    assert generate.user_turn("What?", 0) == "What?"
    assert generate.user_turn("What?", 1) == "What?\n<image>"
    assert generate.user_turn("What?", 1, first=True) == "<image>\nWhat?"
    assert generate.user_turn("Which?", 2) == "<image>\n<image>\nWhich?"
    assert generate.user_turn("Is <image> like <image>?", 2) == "Is <image> like <image>?"


def test_the_first_question_is_one_that_the_weights_know(trained, world, tmp_path, capsys):
    folder = shutil.copytree(Path(trained[trained.index("--out_dir") + 1]), tmp_path / "out")
    weights, path = folder / "sft_vlm_64.pth", folder / "sft_vlm_64.json"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    image = str(world / "pictures/red.png")
    ask = [*trained, "--out_dir", str(folder), "--greedy", "--max_new_tokens", "12", "--image", image]

    def asked(*more):
        eval_vlm.main([*ask, *more])
        return re.search(r"\.png\] (.*)\n", capsys.readouterr().out)[1]

    for prompts, one, two in (
        ({"zh": ["这是什么颜色？"]}, "这是什么颜色？", "Compare these pictures."),
        ({"en": ["A?", "B?"], "zh several": ["一样吗？"]}, "A?", "一样吗？"),
        ({}, "Describe this picture.", "Compare these pictures."),
    ):
        path.write_text(json.dumps(metadata | {"prompts": prompts}), encoding="utf-8")
        assert (asked(), asked(image)) == (one, two)
    assert models.prompts_of(weights, "zh") == ["描述这张图片。"]
    assert asked("--prompt", "Mine?") == "Mine?"


def test_a_picture_stands_where_most_rows_of_the_training_had_it(trained, world, tmp_path, monkeypatch):
    folder = shutil.copytree(Path(trained[trained.index("--out_dir") + 1]), tmp_path / "out")
    path = folder / "sft_vlm_64.json"
    metadata = json.loads(path.read_text(encoding="utf-8"))
    asked = []
    monkeypatch.setattr(asking, "generate", lambda *given: asked.append(given[2][0]["content"]) or (None, 0, None))
    ask = [*trained, "--out_dir", str(folder), "--image", str(world / "pictures/red.png"), "--prompt", "What?"]
    for first in (True, False, None):
        path.write_text(json.dumps(metadata | {"pictures_first": first}), encoding="utf-8")
        eval_vlm.main(ask)
    assert asked == ["<image>\nWhat?", "What?\n<image>", "What?\n<image>"]


def test_two_pictures_are_asked_about_as_the_rows_ask(trained, world, capsys):
    pictures = [str(world / "pictures/red.png"), str(world / "pictures/blue.png")]
    eval_vlm.main([*trained, "--image", *pictures, "--prompt", "Which colours are these?", "--greedy"])
    assert "[red.png, blue.png] Which colours are these?\nThey are red and blue." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "nowhere.jpg"], "--image nowhere.jpg: no such file"),
        (["--image_dir", "."], "no pictures in"),
        (["--image", "PICTURE", "--prompt", "<image> <image>?"], "--prompt has 2 <image>, but there are 1 pictures"),
        (["--data_path", "nowhere.jsonl"], "--data_path nowhere.jsonl: no such file"),
        (["--data_path", "ROWS", "--images_path", "PICTURES", "--refs_path", "nowhere.json"], "--refs_path nowhere"),
        (["--data_path", "ROWS", "--images_path", "PICTURES", "--refs_path", "TEXT"], "expected a list of captions"),
    ],
)
def test_mistakes_name_the_flag(trained, world, tmp_path, flags, message):
    (tmp_path / "text.json").write_text('{"red.png": "a caption that is no list"}')
    here = {"TEXT": tmp_path / "text.json"}
    here |= {"PICTURE": world / "pictures/red.png", "ROWS": world / "rows.jsonl", "PICTURES": world / "pictures"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        eval_vlm.main([*trained, *(str(here.get(flag, flag)) for flag in flags)])


def test_answers_come_as_json_for_each_question_of_a_file_and_nothing_else_does(trained, world, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("blue", "red"):
        (folder / f"{name}.png").write_bytes((world / f"pictures/{name}.png").read_bytes())
    (folder / "broken.png").write_bytes(b"no picture")
    (tmp_path / "questions.txt").write_text("\ufeffWhat colour is this?\r\n\r\n这是什么颜色？\r\n", encoding="utf-8")
    flags = ["--prompts_path", str(tmp_path / "questions.txt"), "--greedy", "--max_new_tokens", "30"]
    eval_vlm.main([*trained, "--image_dir", str(folder), *flags, "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [Path(line["picture"]).stem for line in lines]
    assert names == ["blue", "blue", "broken", "red", "red"] and "not a picture" in lines[2].pop("error")
    assert [line["answer"] for line in lines if "answer" in line] == [
        *("It is blue.", "这是蓝色。", "It is red.", "这是红色。")
    ]
    assert [line["prompt"] for line in lines[:2]] == ["What colour is this?", "这是什么颜色？"]
    assert set(lines[0]) == {"picture", "prompt", "answer", "seconds", "tokens"}
    assert 3 <= lines[0]["tokens"] <= 30 and lines[0]["seconds"] > 0
    eval_vlm.main([*trained, "--image_dir", str(folder), *flags])
    out = capsys.readouterr().out
    assert "broken.png is not a picture" in out and "[red.png] 这是什么颜色？\n这是红色。" in out
    both = [str(folder / "red.png"), str(folder / "blue.png")]
    eval_vlm.main([*trained, "--image", *both, "--prompt", "Which colours are these?", "--greedy", "--json"])
    assert json.loads(capsys.readouterr().out)["picture"] == both


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_file_name_that_is_not_unicode_is_escaped_in_what_is_printed(trained, world, tmp_path):
    (tmp_path / os.fsdecode(b"\xff.png")).write_bytes((world / "pictures/red.png").read_bytes())
    command = [sys.executable, "eval_vlm.py", *trained, "--image_dir", str(tmp_path), "--json", "--max_new_tokens", "3"]
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}  # as in most locales
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=strict)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["picture"] == str(tmp_path / "\udcff.png")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file. Expected a text file, one question per line"),
        ("folder", "cannot be read: .* Expected a text file"),
        (b"\n \n", "contains no question"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"<image> <image>?", r"questions.txt has 2 <image>, but there are 1 pictures"),
    ],
)
def test_a_file_without_questions_is_named(trained, world, tmp_path, content, message):
    path = tmp_path / "questions.txt"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"--prompts_path .*{message}"):
        eval_vlm.main([*trained, "--image", str(world / "pictures/red.png"), "--prompts_path", str(path)])


@pytest.fixture
def server(world, monkeypatch):
    """The address of a server: /NAME.png from the world's pictures, and answers that nobody hopes for."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            picture = world / "pictures" / self.path.strip("/").partition("?")[0]
            body, status = b"", 404
            if picture.is_file():
                body, status = picture.read_bytes(), 200
            elif self.path == "/page":
                body, status = b"<html>", 200
            elif self.path == "/moved":
                status = 302
            elif self.path == "/silent":
                time.sleep(1)
            self.send_response(status)
            if self.path == "/moved":
                self.send_header("Location", "file:///etc/hostname")
            self.send_header("Content-Length", str(len(body) + 100 * (self.path == "/green.png?cut")))
            self.end_headers()
            with suppress(BrokenPipeError):  # the client of /silent has gone
                self.wfile.write(body)

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_a_picture_may_have_an_address(trained, server, capsys):
    ask = ["--prompt", "What colour is this?", "--greedy"]
    eval_vlm.main([*trained, "--image", f"{server}/blue.png?size=1", *ask])
    assert "It is blue." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none.png", "the server answers 404 Not Found"),
        ("page", "Pillow does not know its format"),
        ("moved", "No connection adapters were found for 'file:"),
        ("silent", "the server is silent for"),
        ("green.png?cut", "the server cannot be reached, or broke off"),
    ],
)
def test_an_address_without_a_picture_says_why_in_a_line(server, monkeypatch, name, message):
    monkeypatch.setattr(pictures, "SILENT", 0.3)
    with pytest.raises(ValueError, match=f"--image http.* is not a picture that can be read: {message}") as error:
        pictures.open_image(f"{server}/{name}", ImageProcessor())
    assert "\n" not in str(error.value)


def test_a_picture_may_not_be_too_large_too_slow_or_from_elsewhere(server, world, monkeypatch):
    red = f"{server}/red.png"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    for path in (red, world / "pictures/red.png"):
        with pytest.raises(ValueError, match="it has 0.00144 million pixels, at most 0.0005 are read: make it smaller"):
            pictures.open_image(path, ImageProcessor())
    monkeypatch.setattr(pictures, "LONGEST", -1)
    with pytest.raises(ValueError, match="takes longer than"):
        pictures.open_image(red, ImageProcessor())
    monkeypatch.setattr(pictures, "LARGEST", 50)
    with pytest.raises(ValueError, match="it is larger than"):
        pictures.open_image(red, ImageProcessor())
    with pytest.raises(ValueError, match="a URL must begin with http:// or https://"):
        pictures.open_image("file:///etc/hostname", ImageProcessor())
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with pytest.raises(ValueError, match="cannot be reached"):
            pictures.open_image(f"http://127.0.0.1:{closed.getsockname()[1]}/a.png", ImageProcessor())


def test_a_text_file_is_no_picture(trained, tmp_path):
    path = tmp_path / "note.jpg"
    path.write_text("no picture")
    with pytest.raises(ValueError, match=r"--image .*note\.jpg is not a picture"):
        eval_vlm.main([*trained, "--image", str(path)])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--image a.jpg --data_path rows.jsonl", "--data_path cannot be combined with --image: give one"),
        ("--data_path rows.jsonl --image_dir pictures", "--data_path cannot be combined with --image_dir: give one"),
        ("--image a.jpg --image_dir pictures", "--image cannot be combined with --image_dir: give one"),
        ("--json --output answers.jsonl", "--output is only for scores: give rows with --data_path, or leave it out"),
        ("--images_path pictures", "--images_path is only for scores"),
        ("--chat --no_loss", "--no_loss is only for scores"),
        ("--captions a.jsonl --refs_path a.json", "--refs_path is only for scores"),
        ("--captions a.jsonl --use_multi 2", "--captions asks about each picture alone: give --model_mode 2"),
        ("--top_p 1.1", "--top_p: must be above 0 and at most 1, got 1.1"),
        ("--num_workers -1", "--num_workers: must not be below 0, got -1"),
    ],
)
def test_a_flag_that_would_be_ignored_is_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        eval_vlm.parse_args(flags.split())
    assert message in capsys.readouterr().err


def test_earlier_scores_stay_until_there_are_new_ones(trained, world, tmp_path, monkeypatch):
    output = tmp_path / "scores.json"
    output.write_text('{"true": "an hour of answers"}')
    rows = ["--data_path", str(world / "rows.jsonl"), "--images_path", str(world / "pictures")]
    monkeypatch.setattr("inference.scoring.answer_batches", None)
    with pytest.raises(TypeError):
        eval_vlm.main([*trained, *rows, "--output", str(output)])
    assert json.loads(output.read_text()) == {"true": "an hour of answers"}


def test_a_question_asks_with_the_tokens_of_training(trained, world, tokenizer):
    seen = []
    model, _, _ = models.load_model(eval_vlm.parse_args(trained))
    model.generate = lambda input_ids, **kwargs: seen.append(input_ids) or torch.cat([input_ids, input_ids[:, :1]], 1)
    args = eval_vlm.parse_args([*trained, "--greedy"])
    image = pictures.open_image(world / "pictures/red.png", ImageProcessor())
    generate.ask(model, tokenizer, [turn("user", "What?\n<image>")], [image], args)
    assert tokenizer.decode(seen[0][0]) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nWhat?\n"
        + "@" * 16
        + "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_help_and_a_mistyped_flag_do_not_wait_for_pytorch():
    code = "import sys, eval_vlm; eval_vlm.parse_args(['--greedy']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
