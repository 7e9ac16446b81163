import json
import os
import re
import select
import shlex
import shutil
import subprocess
import sys
import time
from itertools import count, takewhile
from pathlib import Path

import pytest
import torch

import eval_vlm
from inference import terminal


@pytest.fixture
def talk(trained, world, monkeypatch, capsys):
    """talk(line, ...) → what is printed after the help."""

    def run(*lines, flags=()):
        said = iter(lines)

        def typed(prompt):
            print(prompt, end="")
            line = next(said, EOFError)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr("builtins.input", typed)
        eval_vlm.main([*trained, "--chat", "--greedy", "--max_new_tokens", "16", *flags])
        return capsys.readouterr().out.partition(terminal.HELP)[2]

    return run


@pytest.fixture
def turns(monkeypatch):
    """What was asked, as ([content of each turn], pictures)."""
    asked, generate = [], terminal.generate

    def watched(model, tokenizer, conversations, images, args, streamer):
        asked.append(([turn["content"] for turn in conversations], len(images)))
        return generate(model, tokenizer, conversations, images, args, streamer)

    monkeypatch.setattr(terminal, "generate", watched)
    return asked


def test_a_conversation_keeps_its_pictures_until_it_is_cleared(talk, turns, world):
    pictures = world / "pictures"
    out = talk(
        *(f"/image {pictures / 'red.png'}", "这是什么颜色？", "确定吗？", "/clear", ""),
        *(f"/image '{pictures / 'red.png'}'", f"/image {pictures / 'blue.png'}", "Which colours are these?"),
    )
    assert "这是红色。\n\n> 是的。\n" in out and "conversation cleared" in out
    assert "picture 2 attached to the next question" in out
    assert turns == [
        (["这是什么颜色？\n<image>"], 1),
        (["这是什么颜色？\n<image>", "这是红色。", "确定吗？"], 1),
        (["<image>\n<image>\nWhich colours are these?"], 2),
    ]
    assert "They are red and blue" in out


def test_who_gives_no_picture_to_a_model_that_always_had_one_is_told(talk, trained, world, tmp_path):
    folder = shutil.copytree(Path(trained[trained.index("--out_dir") + 1]), tmp_path / "out")
    path, line = folder / "sft_vlm_64.json", "(there is no picture, and this model was never trained without one)\n"
    about = json.loads(path.read_text(encoding="utf-8"))
    talking = ["--out_dir", str(folder)]
    ask = ("What colour is this?", "Sure?", f"/image {world / 'pictures/red.png'}", "Which?", "And?", "/clear", "What?")
    assert line not in talk(*ask, flags=talking)  # one of its rows has no picture
    path.write_text(json.dumps(about | {"rows_without_picture": 0}), encoding="utf-8")
    out = talk(*ask, flags=talking)
    assert out.count(line) == 3 and out.count("> " + line) == 3 and len(line) <= 80
    del about["rows_without_picture"]  # as with public weights
    path.write_text(json.dumps(about), encoding="utf-8")
    assert line not in talk(*ask, flags=talking)


def test_a_mistake_is_told_and_the_conversation_goes_on(talk, turns, world, tmp_path):
    (tmp_path / "note.jpg").write_text("no picture")
    out = talk(
        *("/image nowhere.jpg", "/image ~nobody.jpg"),
        *(f"/image {tmp_path / 'note.jpg'}", "/image ftp://a/b.jpg", "/image", "/foo", "/help"),
        *("Are <image> and <image> alike?", "@" * 40, "\udcff", KeyboardInterrupt, "What colour is this?"),
        flags=["--image", str(world / "pictures/green.png")],
    )
    for told in (
        *("/image nowhere.jpg: no such file", "/image ~nobody.jpg: no such file"),
        *("note.jpg is not a picture that can be read", "a URL must begin with http:// or https://"),
        *("/image needs a file", "/foo is not a command", "/clear"),
        *("the question has 2 <image>", "16 or more '@' in a row", "is not Unicode", "Press Ctrl-D to exit"),
    ):
        assert told in out
    assert "/clear starts a new conversation" not in out
    assert "It is green." in out and turns[-1] == (["What colour is this?\n<image>"], 1)


@pytest.mark.skipif(sys.platform == "win32", reason="names and quotes of other systems")
@pytest.mark.parametrize("name", ["a b.png", "a [1] & b's.png", "(a) $b; c.png", "a.png"])
def test_a_file_dropped_on_the_terminal_is_found(name):
    backslashes = re.sub(r"([^\w.])", r"\\\1", name)
    for typed in (name, f" {name} ", shlex.quote(name), backslashes, f'"{name}"'):
        assert terminal.dropped(typed) == name


def test_a_conversation_that_cannot_go_on_says_how_to_clear_it(talk, monkeypatch):
    def long(model, tokenizer, conversations, images, args, streamer):
        if len(conversations) > 1:
            raise ValueError("too many tokens")
        streamer.on_finalized_text("Yes.", stream_end=True)

    monkeypatch.setattr(terminal, "generate", long)
    out = talk("one", "two", "/image nowhere.jpg", "/clear", "three")
    assert out.count("too many tokens\n/clear starts a new conversation") == out.count("starts a new") == 1
    assert out.count("Yes.") == 2


def test_a_stopped_answer_stands_as_far_as_it_came(talk, monkeypatch, world):
    asked = []

    def stopped(model, tokenizer, conversations, images, args, streamer):
        asked.append(([turn["content"] for turn in conversations], len(images)))
        streamer.put(torch.tensor([[1, 2, 3]]))  # the prompt, which is not printed
        for token in tokenizer("It is gr")["input_ids"] if len(asked) > 1 else []:
            streamer.put(torch.tensor([token]))
        raise KeyboardInterrupt

    monkeypatch.setattr(terminal, "generate", stopped)
    out = talk("one", "two", "three", flags=["--image", str(world / "pictures/green.png")])
    assert "It is gr" in out
    assert asked == [(["one\n<image>"], 1), (["two\n<image>"], 1), (["two\n<image>", "It is gr", "three"], 1)]


def test_tab_completes_commands_and_files(world, monkeypatch):
    def all_of(text):
        return list(takewhile(bool, (terminal.complete(text, state) for state in count())))

    monkeypatch.chdir(world)
    assert all_of("/im") == ["/image "]
    assert all_of("pict") == ["pictures/"] and all_of("pictures/bl") == ["pictures/black.png", "pictures/blue.png"]
    assert all_of("nowhere/") == all_of("~no-such-user/") == []


def test_questions_may_come_through_a_pipe(trained, world):
    lines = f"/image {world / 'pictures/blue.png'}\nWhat colour is this?\n"
    command = [sys.executable, "eval_vlm.py", *trained, "--chat", "--greedy"]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert "It is blue." in done.stdout and done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a pty")
def test_in_a_terminal_the_arrow_up_asks_again_and_ctrl_d_leaves(trained, world, tmp_path):
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "eval_vlm.py", *trained, "--chat", "--greedy", "--image", world / "pictures/blue.png"]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    out = ""

    def wait_for(text, times):
        nonlocal out
        until = time.monotonic() + 120
        while out.count(text) < times and time.monotonic() < until and select.select([ours], [], [], 120)[0]:
            out += os.read(ours, 4096).decode(errors="replace")
        assert out.count(text) >= times, out

    try:
        wait_for("> ", 1)
        os.write(ours, b"What colour is this?\r")
        wait_for("It is blue.", 1)
        wait_for("> ", 2)
        os.write(ours, b"\x1b[A\r")  # arrow up
        wait_for("What colour is this?", 2)
        wait_for("> ", 3)
        os.write(ours, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    history = Path(trained[trained.index("--out_dir") + 1]) / ".chat_history"
    assert history.read_text().splitlines()[-1].endswith("What colour is this?")
