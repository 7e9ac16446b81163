"""The page through its API, and the page itself in headless Chromium (slow)."""

import argparse
import json
import os
import re
import shutil
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path

import gradio as gr
import httpx
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

import inference.chat
import inference.page
import web_demo_vlm
from inference.chat import Stop, UserError, load_for_page, open_picture, truncate, turns_of
from inference.generate import ask
from inference.models import find_models, list_models, load_model
from inference.page import TEXT, serve, show_as_text
from model.build import Origin
from model.model_vlm import MiniMindVLM
from model.processing import ImageProcessor
from model.weights import make_sidecar, save_weights
from tests.browser import LAPTOP, PHONE, browser_at, needs_chromium, screenshot, wait_until
from tests.conftest import lively, small_config, turn

LIMITS = [
    "--max_text",
    "80",
    "--max_pictures",
    "2",
    "--max_pixels",
    "1",
    "--max_upload",
    "0.1",
    "--max_new_tokens",
    "3000",
]


@pytest.fixture(scope="module", autouse=True)
def uploads(tmp_path_factory):
    """Where pictures of visitors go."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("uploads")))
        yield Path(os.environ["GRADIO_TEMP_DIR"])


@pytest.fixture(scope="module")
def out(tmp_path_factory, clip_folder, tokenizer_folder, tokenizer):
    """Folder with a model that talks nonsense for long, another one below, and the first one exported."""
    out = tmp_path_factory.mktemp("out")
    for seed, path in enumerate([out / "sft_vlm_64.pth", out / "below/sft_vlm_64.pth"]):
        config = small_config(clip_folder, vocab_size=len(tokenizer), max_position_embeddings=8192)
        model = lively(MiniMindVLM(config, clip_folder), seed)
        origin = Origin(str(tokenizer_folder), str(clip_folder), model.vision_encoder)
        save_weights(path, model, make_sidecar(model, origin))
        os.utime(path, (1e9 - seed, 1e9 - seed))
    model, _, _ = load_model(flags(out, "--weights", str(out / "sft_vlm_64.pth")))
    model.save_pretrained(out / "export")
    tokenizer.save_pretrained(out / "export")
    shutil.copytree(clip_folder, out / "export/clip")
    return out


def flags(out, *more):
    return web_demo_vlm.parse_args(["--out_dir", str(out), "--device", "cpu", "--temperature", "0", *LIMITS, *more])


@pytest.fixture(scope="module")
def address(out):
    with serve(flags(out)) as (_, address):
        yield address


class Visitor:
    """Somebody who asks through the API; `answer` is that of the last question, `title` the line about it."""

    def __init__(self, address, **more):
        self.client = Client(address, verbose=False, download_files=False, **more)

    def submit(self, text, *pictures, length=40, **settings):
        files = [handle_file(path) for path in pictures]
        settings = {"max_new_tokens": length} | settings
        return self.client.submit({"text": text, "files": files}, api_name="/chat", **settings)

    def ask(self, text, *pictures, **settings):
        return self.read(self.submit(text, *pictures, **settings).result(60))

    def read(self, replies):
        replies = replies if isinstance(replies, list) else [replies]
        texts = [reply if isinstance(reply, str) else reply["content"] for reply in replies]
        self.title = replies[0]["metadata"].get("title", "") if isinstance(replies[0], dict) else ""
        return texts[-1]


@pytest.fixture
def visitor(address):
    return Visitor(address)


@pytest.fixture(scope="module")
def expected(out):
    """expected(conversation, paths of pictures) → what the model says, asked without any page."""
    args = flags(out)
    model, tokenizer = load_for_page(out / "sft_vlm_64.pth", args)
    args.greedy = True

    def answer(chat, pictures, length=40):
        args.max_new_tokens = length
        return ask(model, tokenizer, chat, [Image.open(path) for path in pictures], args)

    return answer


# ---------------------------------------------------------------------------- conversation


def test_an_answer_streams_and_is_the_models_own(visitor, world, expected):
    red = world / "pictures/red.png"
    job = visitor.submit("What?", red, length=400)
    final = visitor.read(job.result(60))
    assert final == expected([turn("user", "What?\n<image>")], [red], 400)
    grown = [visitor.read(output) for output in job.outputs()]
    assert len(set(grown)) > 5 and all(after.startswith(before) for before, after in zip(grown, grown[1:]))
    assert visitor.title.startswith("Pictures seen: 1 · 400 tokens in ") and visitor.title.endswith(" s")


def test_earlier_turns_and_their_pictures_stay_part_of_the_conversation(visitor, world, expected):
    red, blue = world / "pictures/red.png", world / "pictures/blue.png"
    first = visitor.ask("What?", red)
    refused = visitor.ask("")  # is no part of it
    second = visitor.ask("And these?", blue, red)
    third = visitor.ask("Sure?")
    chat = [turn("user", "What?\n<image>"), turn("assistant", first)]
    chat += [turn("user", "<image>\n<image>\nAnd these?")]
    assert second == expected(chat, [red, blue, red])
    chat += [turn("assistant", second), turn("user", "Sure?")]
    assert third == expected(chat, [red, blue, red]) and refused.startswith("⚠️")
    assert "Pictures seen: 3 (3 from earlier turns)" in visitor.title


def test_history_reads_the_same_in_both_of_gradios_shapes():
    note = {"id": "seen", "title": "Pictures seen: 1"}
    through_api = [
        turn("user", [{"path": "a.png"}, "What?"]),
        {"role": "assistant", "content": "about", "metadata": note},
        {"role": "assistant", "content": [{"path": "seen.png"}], "metadata": {"id": "seen"}},
        turn("assistant", "A cat."),
        turn("user", ["Too long"]),
        {"role": "assistant", "content": "⚠️ no", "metadata": {"id": "notice"}},
        turn("user", ["stopped before it began"]),
    ]
    from_page = [
        turn("user", [{"type": "file", "file": {"path": "a.png"}}, {"type": "text", "text": "What?"}]),
        {"role": "assistant", "content": [{"type": "text", "text": "about"}], "metadata": note},
        {"role": "assistant", "content": [{"type": "file", "file": {"path": "s.png"}}], "metadata": {"id": "seen"}},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}], "metadata": None},
        turn("user", [{"type": "text", "text": "Too long"}]),
        {"role": "assistant", "content": [{"type": "text", "text": "⚠️ no"}], "metadata": {"id": "notice"}},
        turn("user", [{"type": "text", "text": "stopped before it began"}]),
    ]
    assert turns_of(through_api) == turns_of(from_page) == [("What?", ["a.png"], "A cat.")]


def test_two_visitors_at_once_share_nothing(address, world, expected):
    pictures = [world / "pictures/red.png", world / "pictures/blue.png"]
    visitors = [Visitor(address), Visitor(address)]
    for text, asked in (("What?", pictures), ("And?", [])):
        jobs = [v.submit(text, *([picture] if asked else []), length=200) for v, picture in zip(visitors, pictures)]
        answers = [v.read(job.result(60)) for v, job in zip(visitors, jobs)]
        if asked:
            firsts = answers
    for picture, first, second in zip(pictures, firsts, answers):
        chat = [turn("user", "What?\n<image>")]
        assert first == expected(chat, [picture], 200)
        assert second == expected([*chat, turn("assistant", first), turn("user", "And?")], [picture], 200)
    assert firsts[0] != firsts[1]


def test_an_empty_question_about_a_picture_asks_what_is_in_it(visitor, world, expected):
    red = world / "pictures/red.png"
    assert visitor.ask("", red) == expected([turn("user", "Describe this picture.\n<image>")], [red])


@contextmanager
def facts(out, name="sft_vlm_64.json", **facts):
    """The JSON of weights says this too, meanwhile."""
    path = out / name
    before = path.read_text(encoding="utf-8")
    path.write_text(json.dumps(json.loads(before) | facts), encoding="utf-8")
    yield
    path.write_text(before, encoding="utf-8")


def test_an_empty_question_is_one_that_the_model_knows_in_the_language_of_the_browser(address, out, world, expected):
    red, blue = world / "pictures/red.png", world / "pictures/blue.png"
    chinese = {"accept-language": "zh-CN,zh;q=0.9"}
    with facts(out, prompts={"en": ["What colour is this?"], "zh": ["这是什么？"], "en several": ["Which colours?"]}):
        assert Visitor(address).ask("", red) == expected([turn("user", "What colour is this?\n<image>")], [red])
        zh = Visitor(address, headers=chinese)
        assert zh.ask("", red) == expected([turn("user", "这是什么？\n<image>")], [red])
        both = [turn("user", "<image>\n<image>\nWhich colours?")]
        assert Visitor(address, headers=chinese).ask("", red, blue) == expected(both, [red, blue])


def test_the_picture_comes_first_for_a_model_that_learned_so(address, out, world, expected):
    red = world / "pictures/red.png"
    with facts(out, pictures_first=True):
        assert Visitor(address).ask("What?", red) == expected([turn("user", "<image>\nWhat?")], [red])


def test_who_gives_no_picture_to_a_model_that_always_had_one_is_told(address, out, world):
    for rows, warned in ((0, True), (3, False)):
        with facts(out, rows_without_picture=rows):
            visitor = Visitor(address)
            assert visitor.ask("What?") and visitor.title.startswith(TEXT["en"]["unseen"]) == warned
            visitor.ask("What?", world / "pictures/red.png")
            assert visitor.title.startswith("Pictures seen: 1 ·")
            visitor.ask("And?")
            assert visitor.title.startswith("Pictures seen: 1 (1 from earlier turns)")


def test_what_no_longer_fits_is_left_out_and_said(out, world):
    with serve(flags(out, "--max_seq_len", "150", "--max_text", "400")) as (_, address):
        visitor = Visitor(address)
        for _ in range(3):
            visitor.ask("What?", world / "pictures/red.png", length=20)
        assert "1 from earlier turns" in visitor.title
        assert "longer than the 150 tokens" in visitor.ask("x y z " * 60)


def test_an_answer_that_looks_like_a_picture_is_left_out_with_those_before_it(out, tokenizer):
    turns = [("One?", [], "1"), ("Two?", [], "@" * 20), ("Three?", [], "3"), ("Four?", [], "")]
    assert truncate(turns, tokenizer, [34] * 16, flags(out)) == turns[2:]


def test_text_is_shown_as_it_is_and_read_back_as_it_was():
    chatbot = gr.Chatbot()
    show_as_text(chatbot)
    said = "<b>2 < 3</b> &amp; <script>alert(1)</script>"
    shown = chatbot.postprocess([turn("user", [said, {"path": "a.png"}]), turn("assistant", said)])
    assert (
        shown.root[1].content[0].text == "&lt;b&gt;2 &lt; 3&lt;/b&gt; &amp;amp; &lt;script&gt;alert(1)&lt;/script&gt;"
    )
    back = chatbot.preprocess(shown)
    assert [back[0]["content"][0]["text"], back[1]["content"][0]["text"]] == [said, said]


def test_sentences_are_in_the_language_of_the_browser(address):
    assert Visitor(address, headers={"accept-language": "zh-CN,zh;q=0.9"}).ask("") == "⚠️ " + TEXT["zh"]["empty"]
    assert TEXT["zh"].keys() == TEXT["en"].keys()


# ---------------------------------------------------------------------------- models


def test_weights_and_exports_are_found_in_out_and_one_folder_below(out, tmp_path):
    assert find_models(flags(out))[0] == out / "sft_vlm_64.pth"  # an export is newer, but --load 0 wants .pth
    assert set(list_models(out)) == {out / "sft_vlm_64.pth", out / "below/sft_vlm_64.pth", out / "export"}
    assert find_models(flags(out, "--load", "1"))[0] == out / "export"
    assert find_models(flags(out, "--weights", str(out / "below/sft_vlm_64.pth")))[0] == out / "below/sft_vlm_64.pth"
    with pytest.raises(FileNotFoundError, match=r"no sft_vlm_multi_\*\.pth .*\n--weights .*export"):
        find_models(flags(out, "--use_multi", "2"))
    with pytest.raises(FileNotFoundError, match="Train or download one:\npython -m scripts.quickstart"):
        find_models(flags(tmp_path))


def test_a_visitor_chooses_the_model(visitor, out, world):
    red = world / "pictures/red.png"
    answers = [
        Visitor(visitor.client.src).ask("What?", red, weights=str(out / name))
        for name in ("sft_vlm_64.pth", "below/sft_vlm_64.pth", "export")
    ]
    assert answers[0] == answers[2] != answers[1]
    with pytest.raises(AppError):
        visitor.ask("What?", weights="/etc/passwd")


def test_weights_that_broke_since_give_a_sentence(out, world, capsys):
    path = out / "below/pretrain_vlm_64.pth"
    path.write_bytes(b"no weights")
    try:
        with serve(flags(out)) as (_, address):
            visitor = Visitor(address)
            assert visitor.ask("What?", weights=str(path)) == "⚠️ " + TEXT["en"]["failed"]
            assert "⚠️" not in visitor.ask("What?")
    finally:
        path.unlink()
    assert "is not a file of weights" in capsys.readouterr().err


def test_the_page_and_the_api_together_ask_one_question_at_a_time_and_keep_two_models(out, monkeypatch):
    models, before, met, meet = [], [], [], threading.Barrier(2)

    def load(path, args):
        before.append(sum(model() is not None for model in models))
        model, tokenizer = load_for_page(path, args)
        models.append(weakref.ref(model))
        return model, tokenizer

    def watched(*args):
        with suppress(threading.BrokenBarrierError):
            meet.wait(1)  # for another question that is at work too
            met.append(args)
        yield from inference.chat.stream(*args)

    monkeypatch.setattr(inference.page, "load_for_page", load)
    monkeypatch.setattr(inference.page, "stream", watched)
    with serve(flags(out)) as (_, address):
        weights = [str(out / name) for name in ("sft_vlm_64.pth", "below/sft_vlm_64.pth", "export")]
        through_api, on_page = Visitor(address), Visitor(address).client
        for one, other in (weights[:2], weights[1:], weights[::2]):
            on_page.predict({"text": "What?", "files": []}, api_name="/_clear_and_save_textbox")
            asked = on_page.submit(one, 0, 0.85, 5, api_name="/_submit_fn")
            through_api.ask("What?", weights=other, length=5)
            asked.result(60)
    assert not met and len(before) > 3 and max(before) < 2


# ---------------------------------------------------------------------------- limits


@pytest.mark.parametrize(
    ("text", "pictures", "sentence"),
    [
        ("", [], "Type a question"),
        ("x" * 81, [], "The text has 81 characters; the limit is 80"),
        ("What?", ["red", "red", "red"], "3 pictures; the limit is 2"),
        ("What?", ["large"], "large.png has more than 1 million pixels"),
        ("What?", ["bomb"], "bomb.png has more than 1 million pixels"),
        ("What?", ["broken"], "broken.png cannot be read as a picture"),
        ("<image> <image>?", ["red"], "contains <image> 2 times, but there are 1 pictures"),
        ("@" * 20, [], "so many @ in a row"),
    ],
)
def test_each_limit_is_a_sentence_and_the_next_question_is_answered(visitor, world, tmp_path, text, pictures, sentence):
    Image.new("1", (1100, 1000)).save(tmp_path / "large.png")
    bomb = Image.new("1", (20000, 20000))  # 400 million pixels in 50 kB, which Pillow itself refuses
    bomb.save(tmp_path / "bomb.png") if "bomb" in pictures else None
    (tmp_path / "broken.png").write_bytes((world / "pictures/red.png").read_bytes()[:60])
    shutil.copy(world / "pictures/red.png", tmp_path)
    assert sentence in visitor.ask(text, *(tmp_path / f"{name}.png" for name in pictures))
    assert "⚠️" not in visitor.ask("What?", tmp_path / "red.png")


def test_a_large_file_is_not_taken(address, uploads):
    before = set(uploads.rglob("*"))
    files = {"files": ("large.png", b"x" * 100_001)}
    assert httpx.post(f"{address}/gradio_api/upload", files=files).status_code == 413
    assert not [path for path in set(uploads.rglob("*")) - before if path.is_file()]


def test_settings_beyond_their_limits_are_refused(visitor):
    for setting in ({"length": 3001}, {"temperature": 3}, {"top_p": 0}):
        with pytest.raises(AppError):
            visitor.ask("What?", **setting)


def test_the_smallest_values_that_flags_take_are_ones_the_page_takes(out, world):
    with serve(flags(out, "--top_p", "0.01", "--max_new_tokens", "1")) as (_, address):
        visitor = Visitor(address)
        visitor.ask("What?", world / "pictures/red.png", length=1, top_p=0.01)
        assert "⚠️" not in visitor.title


def test_the_page_starts_behind_a_proxy_and_on_a_busy_machine(out, monkeypatch):
    """A proxy that does not answer, and a look at the page that came too late."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "example.com")
    monkeypatch.setattr(gr.networking, "url_ok", lambda url: False)
    with serve(flags(out)) as (_, address):
        assert Visitor(address).ask("What?", length=3)
    assert os.environ["no_proxy"].split(",") == ["127.0.0.1", "example.com", "localhost"]


def test_an_answer_ends_when_its_time_is_over(out, world):
    with serve(flags(out, "--max_seconds", "0.5")) as (_, address):
        visitor = Visitor(address)
        assert visitor.ask("What?", world / "pictures/red.png", length=3000)
        assert "stopped at the limit of 0.5 s" in visitor.title
        assert "⚠️" not in visitor.ask("And?", length=5)


def test_of_many_visitors_the_last_are_remembered(out, monkeypatch):
    monkeypatch.setattr(inference.page, "VISITORS", 2)
    with serve(flags(out)) as (page, address):
        visitors = [Visitor(address) for _ in range(4)]
        assert all(visitor.ask("What?", length=3) for visitor in visitors)
        kept = [visitor.client.session_hash for visitor in visitors[-2:]]
        assert list(page.state_holder.session_data) == kept


def test_a_full_queue_sends_visitors_away(out):
    with serve(flags(out, "--max_queue", "1")) as (_, address):
        first = Visitor(address).submit("What?", length=3000)
        while not first.outputs():
            time.sleep(0.05)
        waiting = Visitor(address).submit("What?")
        time.sleep(0.5)
        with pytest.raises(Exception, match="[Qq]ueue is full"):
            Visitor(address).ask("What?")
        first.cancel()
        assert waiting.result(60)


def test_running_out_of_memory_is_a_sentence_and_the_next_visitor_is_answered(address, monkeypatch, world):
    for error, key in (
        (torch.OutOfMemoryError("CUDA out of memory"), "memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory"),
        (KeyError("a mistake of ours"), "failed"),
    ):

        def fail(*args, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(inference.chat, "ask", fail)
            assert Visitor(address).ask("What?", world / "pictures/red.png") == "⚠️ " + TEXT["en"][key]
        assert "⚠️" not in Visitor(address).ask("What?", world / "pictures/red.png")


def test_pictures_of_other_formats_than_named_are_not_opened(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "picture.eps")
    (tmp_path / "picture.eps").rename(tmp_path / "picture.png")
    with pytest.raises(UserError, match="broken"):
        open_picture(str(tmp_path / "picture.png"), ImageProcessor(), 1)


# ---------------------------------------------------------------------------- stopping


@pytest.fixture
def stops(monkeypatch):
    """The Stop of each answer, in order."""
    made = []

    class Kept(Stop):
        def __init__(self, seconds):
            super().__init__(seconds)
            made.append(self)

        def __call__(self, *args, **kwargs):
            time.sleep(0.03)  # so that a browser on a busy machine is in time to stop 3,000 tokens
            return super().__call__(*args, **kwargs)

    monkeypatch.setattr(inference.page, "Stop", Kept)
    return made


def assert_ended(stop):
    """Nobody works on an answer any more, long before its 3,000 tokens."""
    wait_until(stop.stopped.is_set)
    wait_until(lambda: not [thread for thread in threading.enumerate() if thread.name.endswith("(work)")])
    assert stop.tokens < 2900


def test_stop_ends_generation(visitor, stops):
    job = visitor.submit("What?", length=3000)
    wait_until(job.outputs)
    job.cancel()
    assert_ended(stops[0])
    assert "⚠️" not in visitor.ask("What?", length=5)


def test_generation_ends_when_the_connection_is_lost(address, stops):
    config = httpx.get(f"{address}/config").json()
    index = next(each["id"] for each in config["dependencies"] if each["api_name"] == "chat")
    values = {each["id"]: each["props"].get("value") for each in config["components"]}
    inputs = next(each["inputs"] for each in config["dependencies"] if each["id"] == index)
    data = [{"text": "What?", "files": []}, None, *(values[i] for i in inputs[2:])]
    body = {"data": data, "fn_index": index, "session_hash": "gone"}
    httpx.post(f"{address}/gradio_api/queue/join", json=body).raise_for_status()
    with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=gone") as events:
        for line in events.iter_lines():
            if "process_generating" in line:
                break
    assert_ended(stops[0])


# ---------------------------------------------------------------------------- who may come in, and what they may see


def test_auth_lets_in_who_knows_the_password(out):
    with serve(flags(out, "--auth", "ann:se:cret", "bob:x")) as (_, address):
        assert httpx.get(f"{address}/config").status_code == 401
        with pytest.raises(Exception, match="Could not login"):
            Visitor(address, auth=("ann", "wrong"))
        assert "⚠️" not in Visitor(address, auth=("ann", "se:cret")).ask("What?", length=5)


def test_hosts_of_this_machine_need_no_warning():
    hosts = ["127.0.0.1", "::1", "localhost", "0.0.0.0", "192.168.1.5", "example.org"]
    assert [web_demo_vlm.is_local(host) for host in hosts] == [True, True, True, False, False, False]


def test_an_open_door_is_warned_of(out, monkeypatch, capsys):
    @contextmanager
    def closed(args):
        yield argparse.Namespace(block_thread=lambda: None), "http://0.0.0.0:7860"

    monkeypatch.setattr(inference.page, "serve", closed)
    monkeypatch.setattr(web_demo_vlm, "unwind", lambda: None)
    for more, warned in (([], True), (["--auth", "ann:x"], False)):
        monkeypatch.setenv("GRADIO_TEMP_DIR", "")
        web_demo_vlm.main(["--host", "0.0.0.0", *more])
        assert ("warning: --host 0.0.0.0 lets anybody in" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("bad", [["--auth", "ann"], ["--temperature", "2.5"], ["--top_p", "1.1"], ["--port", "0"]])
def test_mistyped_flags_are_told(bad, capsys):
    with pytest.raises(SystemExit):
        web_demo_vlm.parse_args(bad)
    assert bad[0] in capsys.readouterr().err


def test_an_address_that_cannot_be_had_is_told(address):
    for flag in (["--port", address[-4:]], ["--port", "70000"], ["--host", "256.1.1.1"]):
        with pytest.raises(OSError, match=rf"{flag[0]} {flag[1]}: cannot listen there"):
            web_demo_vlm.main(flag)


def test_files_of_the_machine_stay_there(address, uploads):
    secret = Path("README.md").resolve()
    assert httpx.get(f"{address}/gradio_api/file={secret}").status_code == 403
    config = httpx.get(f"{address}/config").json()
    undo = next(each["id"] for each in config["dependencies"] if "undo" in str(each["targets"]))
    submit = next(each["id"] for each in config["dependencies"] if "submit" in str(each["targets"]))
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    component = {"type": "component", "component": "file", "value": {"path": str(secret)}}
    forged = [component | {"constructor_args": {}, "props": {}}, {"type": "file", "file": file}]
    calls = [(undo, [[turn("user", [content])]]) for content in forged]
    for index, data in [*calls, (submit, [{"text": "What?", "files": [file]}])]:
        body = {"data": data, "fn_index": index, "session_hash": "x"}
        httpx.post(f"{address}/gradio_api/queue/join", json=body)
        with httpx.stream("GET", f"{address}/gradio_api/queue/data?session_hash=x") as events:
            assert "complete" in "".join(events.iter_lines())
    assert not list(uploads.rglob(secret.name))


# ---------------------------------------------------------------------------- the page itself


def type_and_send(page, text, *pictures):
    if pictures:
        page.set_input_files("input[type=file]", [str(path) for path in pictures])
        page.wait_for_function(f"document.querySelectorAll('.thumbnail-image').length == {len(pictures)}")
    page.locator("textarea").fill(text)
    page.keyboard.press("Enter")


def set_length(page, tokens):
    """Sets the longest answer. Gradio puts the defaults back just after the settings open for the first time."""
    number = page.locator("input[type=number]").last

    def stays():
        number.fill(str(tokens))
        page.keyboard.press("Tab")
        page.wait_for_timeout(300)
        return number.input_value() == str(tokens)

    wait_until(stays)


def answers(page) -> list[str]:
    return page.locator(".bot-row .message-content").all_inner_texts()


def wait_for_answer(page, number, sign=re.compile("tokens in|个 token|⚠️")):
    """The answer to so many questions, once it is whole and the page takes the next question."""
    page.locator(".bot-row").nth(number - 1).filter(has_text=sign).wait_for()
    page.wait_for_selector("button.submit-button")
    page.wait_for_selector("textarea:not([disabled])")
    return answers(page)[-1]


PASTE = """async () => {
    const picture = await (await fetch(document.querySelector("#samples img").src)).blob();
    const clipboardData = new DataTransfer();
    clipboardData.items.add(new File([picture], "pasted.png", {type: "image/png"}));
    document.querySelector("textarea").dispatchEvent(new ClipboardEvent("paste", {clipboardData, bubbles: true}));
}"""


@pytest.mark.slow
@needs_chromium
def test_the_page_streams_stops_retries_undoes_and_clears(address, stops, world, expected):
    red = world / "pictures/red.png"
    with browser_at(address, **LAPTOP) as page:
        page.locator("#questions button").first.wait_for()
        screenshot(page, "empty_laptop_en_light")
        page.locator("#questions button").get_by_text("Describe this picture.").click()
        wait_until(lambda: page.locator("textarea").input_value() == "Describe this picture.")
        page.get_by_text("Settings").click()
        set_length(page, 40)
        screenshot(page, "settings_laptop_en_light")
        page.get_by_text("Settings").click()
        markup = "<b>What?</b> <img src=x onerror='document.title=1'>"
        type_and_send(page, markup, red)
        first = wait_for_answer(page, 1)
        asked = page.locator(".user-row .message-content").inner_text()
        assert asked == markup and page.title() == "MiniMind-V"  # shown, not run
        assert (
            page.locator(".bot-row img").count() == 1 and page.get_by_text("Pictures seen: 1 · 40 tokens").is_visible()
        )
        chat = [turn("user", markup + "\n<image>")]
        same = expected(chat, [red])
        assert "".join(first.split()) == "".join(same.split())

        page.locator("button[title=Retry]").click()
        wait_until(lambda: len(stops) == 2)
        assert wait_for_answer(page, 1) == first and len(answers(page)) == 1

        type_and_send(page, "And?")  # the history comes in the shape that the page has for it
        second = wait_for_answer(page, 2)
        same = expected([*chat, turn("assistant", same), turn("user", "And?")], [red])
        assert "".join(second.split()) == "".join(same.split())
        assert page.get_by_text("Pictures seen: 1 (1 from earlier turns)").is_visible()
        screenshot(page, "chat_laptop_en_light")

        page.locator("button[title=Undo]").click()
        wait_until(lambda: len(answers(page)) == 1)
        assert page.locator("textarea").input_value() == "And?"
        assert not page.locator("button[title=Share]:visible").count()

        page.get_by_text("Settings").click()
        set_length(page, 3000)
        type_and_send(page, "Talk on.")
        wait_until(lambda: len(stops) == 4 and len(answers(page)) == 2 and answers(page)[-1])
        grown = answers(page)[-1]
        wait_until(lambda: len(answers(page)[-1]) > len(grown))
        screenshot(page, "streaming_laptop_en_light")
        page.locator("button.stop-button").click()
        assert_ended(stops[3])
        stopped = wait_for_answer(page, 2, re.compile("."))
        set_length(page, 20)
        type_and_send(page, "And now?")
        wait_for_answer(page, 3)
        assert answers(page)[1] == stopped and page.get_by_text("20 tokens in").is_visible()

        page.locator("button[title=Clear]").click()
        wait_until(lambda: not answers(page))
        page.evaluate(PASTE)
        page.wait_for_selector(".thumbnail-image")
        type_and_send(page, "Hello?")
        wait_for_answer(page, 1)
        assert page.get_by_text(re.compile("Pictures seen: 1 ·")).is_visible()


@pytest.mark.slow
@needs_chromium
def test_the_questions_are_those_of_the_model_that_is_chosen(address, out):
    below = {"en": ["What is below?", "And beside it?"], "zh": ["下面是什么？"]}
    with facts(out, "below/sft_vlm_64.json", prompts=below), browser_at(address, **LAPTOP) as page:
        shown = page.locator("#questions button").all_inner_texts
        wait_until(lambda: shown() == ["Describe this picture."])
        page.get_by_text("Settings").click()
        page.get_by_label("Model").click()
        page.get_by_role("option", name="below/sft_vlm_64.pth").click()
        wait_until(lambda: shown() == below["en"])


@pytest.mark.slow
@needs_chromium
def test_closing_the_page_ends_generation(address, stops):
    with browser_at(address, **LAPTOP) as page:
        type_and_send(page, "What?")
        wait_until(lambda: stops and answers(page) and answers(page)[-1])
        page.goto("about:blank")
        assert_ended(stops[0])


@pytest.mark.slow
@needs_chromium
def test_on_a_phone_in_chinese_and_dark_samples_are_picked_and_nothing_sticks_out(address):
    with browser_at(address, **PHONE) as page:
        page.get_by_text("添加一张图片，然后提问。").wait_for()
        page.locator("#questions button").first.click()
        wait_until(lambda: page.locator("textarea").input_value() == "描述这张图片。")
        for number in (1, 2):
            page.locator("#samples button").nth(number).click()
            page.wait_for_function(f"document.querySelectorAll('.thumbnail-image').length == {number}")
        screenshot(page, "samples_phone_zh_dark")
        page.get_by_text("设置").click()
        set_length(page, 30)
        page.get_by_text("设置").click()
        type_and_send(page, "")
        wait_for_answer(page, 1)
        assert page.get_by_text("模型看到 2 张图片 · 30 个 token").is_visible()
        type_and_send(page, "x" * 81)
        assert wait_for_answer(page, 2) == "⚠️ " + TEXT["zh"]["long"].format(n=81, limit=80)
        screenshot(page, "chat_phone_zh_dark")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(int(level) for level in dark[4:-1].split(",")[:3]) < 60


@pytest.mark.slow
@needs_chromium
@pytest.mark.skipif(
    "MINIMIND_QUICKSTART" not in os.environ, reason="MINIMIND_QUICKSTART names no folder of a quickstart"
)
@pytest.mark.parametrize(
    ("device", "name", "questions"),
    [
        (
            LAPTOP,
            "laptop_en_light",
            {"What is in the picture?": "a yellow circle", "what color is the circle": "yellow"},
        ),
        (PHONE, "phone_zh_dark", {"图片里有什么？": "一个黄圆形", "圆圈是什么颜色的": "黄色"}),
    ],
)
def test_the_quickstarts_model_says_what_it_sees(device, name, questions):
    args = ["--weights", "sft_vlm", "--out_dir", os.environ["MINIMIND_QUICKSTART"], "--temperature", "0"]
    with serve(web_demo_vlm.parse_args(args)) as (_, address), browser_at(address, **device) as page:
        pictures = ["dataset/eval_images/scene_1.png"]
        for number, (asked, right) in enumerate(questions.items(), 1):
            type_and_send(page, asked, *pictures)
            assert right in wait_for_answer(page, number)
            pictures = []
        assert page.locator(".bot-row img").count() == 2  # seen for the question, and for the one after it
        screenshot(page, f"quickstart_{name}")


def test_who_may_come_in_can_be_told_where_others_do_not_see_it(monkeypatch, capsys):
    monkeypatch.setenv("MINIMIND_AUTH", "ann:secret bob:x")
    assert web_demo_vlm.parse_args([]).auth == ["ann:secret", "bob:x"]
    assert web_demo_vlm.parse_args(["--auth", "eve:y"]).auth == ["eve:y"]
    monkeypatch.setenv("MINIMIND_AUTH", "secret")
    with pytest.raises(SystemExit):
        web_demo_vlm.parse_args([])
    assert "MINIMIND_AUTH secret...: expected NAME:PASSWORD" in capsys.readouterr().err
