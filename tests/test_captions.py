import json
import os
import shutil
import sys

import pytest
from PIL import Image

import eval_vlm
from inference import captions
from model.model_vlm import MiniMindVLM


@pytest.fixture
def folder(world, tmp_path):
    """Seven pictures, in a folder below too, and three files that are none."""
    folder = tmp_path / "pictures"
    shutil.copytree(world / "pictures", folder / "b")
    shutil.move(folder / "b/red.png", folder / "z.png")
    whole = (folder / "z.png").read_bytes()
    (folder / "cut.PNG").write_bytes(whole[:60])
    (folder / "b/empty.jpg").touch()
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "notes.txt").write_text("no picture by its name")
    (folder / "folder.png").mkdir()
    if sys.platform == "linux":
        (folder / os.fsdecode(b"\xff.png")).write_bytes(whole)
    else:
        (folder / "ÿ.png").write_bytes(whole)
    return folder


@pytest.fixture
def caption(trained, folder, tmp_path):
    """caption("--prompt", ...) → the lines of the file."""
    path = tmp_path / "new/captions.jsonl"

    def run(*flags):
        eval_vlm.main([*trained, "--captions", str(path), "--image_dir", str(folder), "--batch_size", "2", *flags])
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    run.path = path
    return run


ASK = ("--prompt", "What colour is this?", "--max_new_tokens", "16")


def test_every_picture_has_a_line_in_order_and_the_broken_ones_say_why(caption, capsys):
    lines = caption(*ASK)
    names = [line["image"] for line in lines]
    inside = ["b/black.png", "b/blue.png", "b/empty.jpg", "b/green.png", "b/white.png", "b/yellow.png"]
    assert names[:-1] == [*inside, "cut.PNG", "gone.jpg", "z.png"] and names[-1] in ("ÿ.png", "\udcff.png")
    answers = {line["image"]: line["answer"] for line in lines if "answer" in line}
    assert answers["b/blue.png"] == "It is blue." and answers["z.png"] == answers[names[-1]] == "It is red."
    assert {line["prompt"] for line in lines if "answer" in line} == {"What colour is this?"}
    errors = {line["image"]: line["error"] for line in lines if "error" in line}
    assert sorted(errors) == ["b/empty.jpg", "cut.PNG", "gone.jpg"]
    assert "empty.jpg is not a picture that can be read: it is empty" in errors["b/empty.jpg"]
    assert "gone.jpg: no such file" in errors["gone.jpg"]
    assert "10 pictures, 3 of them broken" in capsys.readouterr().out


@pytest.mark.parametrize("workers", ["0", "1"])
def test_what_was_interrupted_goes_on_and_gives_the_same_file(caption, monkeypatch, workers):
    whole = caption(*ASK)
    caption.path.unlink()
    answered = captions.answer_batches

    def stopped(*args):
        batches = answered(*args)
        yield next(batches)
        yield next(batches)
        raise KeyboardInterrupt

    monkeypatch.setattr(captions, "answer_batches", stopped)
    with pytest.raises(KeyboardInterrupt):
        caption(*ASK, "--num_workers", workers)
    assert caption.path.read_bytes().count(b"\n") == 4
    monkeypatch.undo()
    half = caption.path.read_bytes()[:-20]  # as if the power had gone
    for cut in (half, half[: half.rindex(b"\n") + 5], half[: half.rindex(b"\n")]):
        caption.path.write_bytes(cut)
        assert caption(*ASK, "--num_workers", workers) == whole
    written = caption.path.stat().st_mtime_ns
    monkeypatch.setattr(captions.PictureQuestions, "__getitem__", None)  # nothing is left to ask
    assert caption(*ASK) == whole and caption.path.stat().st_mtime_ns == written


def test_another_question_is_asked_of_all_pictures_that_are_not_broken(caption, tmp_path):
    before = caption(*ASK)
    questions = tmp_path / "questions.txt"
    questions.write_text("What colour is this?\n\n这是什么颜色？\n", encoding="utf-8")
    added = caption("--prompts_path", str(questions), "--max_new_tokens", "32")[len(before) :]
    assert {line["prompt"] for line in added} == {"这是什么颜色？"} and len(added) == 7
    caption.path.unlink()
    both = caption("--prompts_path", str(questions), "--max_new_tokens", "32")
    assert len(both) == 2 * 7 + 3 and [line["image"] for line in both[:2]] == ["b/black.png"] * 2


@pytest.mark.parametrize(
    "content", ["notes\n", "notes", "[1]\n", '{"image": "a.jpg"}\n', '{"a": 1}', "\n", '{"image": "a.jpg"}']
)
def test_a_file_of_something_else_is_refused_and_left_alone(caption, content):
    caption.path.parent.mkdir()
    caption.path.write_text(content)
    with pytest.raises(ValueError, match=r"--captions .*captions.jsonl:1 is not a line of captions"):
        caption(*ASK)
    assert caption.path.read_text() == content


def test_mistakes_name_the_flag(trained, tmp_path, capsys):
    ask = [*trained, "--captions", str(tmp_path / "captions.jsonl"), "--image_dir"]
    with pytest.raises(FileNotFoundError, match="--image_dir nowhere: no such folder"):
        eval_vlm.main([*ask, "nowhere"])
    with pytest.raises(FileNotFoundError, match=r"--image_dir .*: no pictures there, 0 other files"):
        eval_vlm.main([*ask, str(tmp_path)])
    with pytest.raises(ValueError, match=r"--captions .* is a folder. Expected a file of lines of JSON"):
        eval_vlm.main([*trained, "--captions", str(tmp_path), "--image_dir", "dataset/eval_images"])
    for flags in (["--chat"], ["--image", "a.jpg"], ["--json"]):
        with pytest.raises(SystemExit):
            eval_vlm.parse_args(["--captions", "a.jsonl", *flags])
        assert "not allowed" in (error := capsys.readouterr().err) or "give one of them" in error


def test_every_format_that_pillow_opens_is_a_picture_and_the_rest_is_counted(caption, tmp_path, capsys):
    folder = tmp_path / "all"
    (folder / "__MACOSX").mkdir(parents=True)
    image = Image.new("RGB", (32, 32), "red")
    for name in ("a.jfif", "b.avif", "c.ppm", "d.tga", "E.JPG"):
        image.save(folder / name, {"a.jfif": "JPEG"}.get(name))
    for name in ("._a.jfif", "__MACOSX/a.jpg", "notes.txt", "paper.pdf"):
        (folder / name).write_bytes(b"no picture")
    (folder / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic")
    lines = caption("--image_dir", str(folder), "--prompt", "What?")
    assert {line["image"]: "answer" in line for line in lines} == {
        "a.jfif": True, "b.avif": True, "c.ppm": True, "d.tga": True, "E.JPG": True, "phone.heic": False,
    }  # fmt: skip
    assert "Pillow cannot read HEIC photos: convert it to JPEG" in str(lines)
    assert f"{folder}: 2 other files, not pictures, were skipped" in capsys.readouterr().out


def test_beams_are_searched_where_answers_are_not_sampled(caption, trained, monkeypatch, capsys):
    asked, generate = [], MiniMindVLM.generate

    def count(self, **how):
        asked.append(how["num_beams"])
        return generate(self, **how)

    monkeypatch.setattr(MiniMindVLM, "generate", count)
    lines = caption(*ASK, "--num_beams", "3")
    assert set(asked) == {3}
    assert {line["image"]: line["answer"] for line in lines if "answer" in line}["b/blue.png"] == "It is blue."
    with pytest.raises(SystemExit):
        eval_vlm.main([*trained, "--num_beams", "3", "--image", "a.png"])
    assert "--num_beams is for --data_path and --captions" in capsys.readouterr().err
