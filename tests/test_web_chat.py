"""The one-file chat in headless Chromium, over file:// with the network off. A worker that only pretends answers."""

import base64
import json
import os
import re
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import web_demo_vlm
from dataset.sources import read_rows
from inference.chat import chat_of, load_for_page
from inference.generate import ask as asked
from inference.models import find_models, load_model, pictures_first
from model.rgb import to_rgb
from model.web import BETWEEN, PIECE, page_of, web_state
from scripts.convert_vlm import __main__ as convert_vlm
from scripts.convert_vlm.check_web import with_weights
from tests.browser import LAPTOP, PHONE, browser_at, needs_chromium, screenshot, wait_until

pytestmark = [needs_chromium, pytest.mark.slow]
CONFIG = {
    "name": "tiny",
    "prompts": {"en": ["What is in the picture?", "What colour is it?"], "zh": ["图片里有什么？", "是什么颜色的？"]},
    "chat": {"pictures_first": False},
    "needs_picture": True,
    "processor": {"size": 32, "crop_size": [32, 32]},
}
WEIGHTS = bytes(range(256)) * 40000  # 10 MB, in several parts

# Says what it was asked for "Repeat", talks until it is stopped for "Talk on", breaks for "Break: why", and looks at
# the left of all pictures, above the middle.
WORKER = r"""
"use strict";
let stopped = false, words = [], pictures = [], came = 0;
const say = (message) => postMessage(message), wait = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
const hear = {
  load({tokenizer, kernel}) {
    if (tokenizer.model !== "BPE <|im_end|>" || kernel.join() !== "0,97,115,109") throw Error("load");
  },
  part({bytes}) {
    if (!bytes.every((byte, i) => byte === (came + i) % 256)) throw Error("part");
    say({type: "progress", share: (came += bytes.length) / (256 * 40000)});
    if (came === 256 * 40000) say({type: "ready", seconds: 0.3});
  },
  async ask({type, turns, ...rest}) {
    stopped = false;
    pictures = await Promise.all(rest.pictures.map(async ({id, blob}) => {
      if (!blob) return {id};
      const bitmap = await createImageBitmap(blob), {width, height} = bitmap;
      const context = new OffscreenCanvas(1, 1).getContext("2d");
      context.drawImage(bitmap, 0, 0);
      return {id, rgba: [...context.getImageData(0, 0, 1, 1).data], width, height};
    }));
    const asked = turns.at(-1).content.replace(/\n?<image>\n?/g, "");
    const chinese = /[\u3400-\u9fff]/.test(asked);
    let answer = chinese ? "一个黄色的圆形，在蓝色的背景上。" : "a yellow circle on a blue background";
    if (asked === "Repeat") answer = JSON.stringify({...rest, turns, pictures});
    if (asked.startsWith("Break: ")) return say({type: "error", message: asked.slice(7)});
    if (asked === "Crash") return setTimeout(() => { throw Error("Array buffer allocation failed"); });
    if (asked === "Say <b>") answer = "<b>bold</b> <img src=x onerror='document.title=1'>";
    if (asked === "Talk on") answer = "and on ".repeat(2000);
    const pieces = chinese ? [...answer] : answer.split(/(?= )/);
    let text = "";
    for (const piece of pieces) {
      if (stopped) break;
      say({type: "text", text: (text += piece)});
      await wait(asked === "Repeat" ? 0 : 5);
    }
    words = [...text.matchAll(/[\u3400-\u9fff]|[a-z]+/g)].map(({0: text, index}, n) => (
      {text, begin: index, end: index + text.length, tokens: [n + 100]}
    ));
    const figures = {tokens: pieces.length, seconds: 0.11, firstSeconds: 0.05, kept: pictures.map(({id}) => id)};
    const forgotten = asked === "Long" ? 2 : 0;
    say({type: "done", text, words, ...figures, forgotten, why: stopped ? "stopped" : "end"});
  },
  stop: () => (stopped = true),
  clear() {},
  look({token}) {
    const map = Float32Array.from({length: 16}, (_, i) => (i === 5 ? 0.4 : 0.01) / pictures.length);
    say({type: "attention", token, word: words[token - 100], side: 4, maps: pictures.map(() => map)});
  },
};
onmessage = ({data}) => hear[data.type](data);
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page with everything that an exported one has in it, but a worker that only pretends."""
    samples = [
        "data:image/png;base64," + base64.b64encode(Path(f"dataset/eval_images/scene_{n}.png").read_bytes()).decode()
        for n in (1, 2, 3)
    ]
    pieces = [WEIGHTS[at : at + PIECE] for at in range(0, len(WEIGHTS), PIECE)]
    filled = {
        "CONFIG": json.dumps(CONFIG | {"samples": samples}).replace("<", "\\u003c"),
        "TOKENIZER": json.dumps({"model": "BPE <|im_end|>"}).replace("<", "\\u003c"),
        "WEIGHTS": BETWEEN.join(base64.b64encode(piece).decode() for piece in pieces),
        "KERNEL": base64.b64encode(b"\0asm").decode(),
        "ENGINE": WORKER,
    }
    page = page_of(filled)
    assert all(text in page for text in filled.values()) and not re.search(r"/\*[A-Z]+\*/", page)
    path = tmp_path_factory.mktemp("chat") / "chat.html"
    path.write_text(page, encoding="utf-8")
    return path.as_uri()


@contextmanager
def opened(address, **device):
    """The page once it can be asked. It asks nobody for anything and says nothing on the console."""
    with browser_at(address, offline=True, **device) as page:
        page.wait_for_selector("#send:enabled")
        yield page
        assert page.console == []


def ask(page, text, *pictures):
    """Types and sends; the answer to it once it is whole."""
    count = page.locator(".turn").count()
    if pictures:
        page.set_input_files("#files", pictures)
        wait_until(lambda: page.locator("#waiting canvas").count() == len(pictures))
    page.locator("#text").fill(text)
    page.keyboard.press("Enter")
    return answer(page, count + 1)


def answer(page, turn):
    page.locator(".turn").nth(turn - 1).locator(".retry").wait_for()
    return page.locator(".answer").last.inner_text()


def picture_file(image, name="picture.png", **options):
    file = BytesIO()
    image.save(file, format=Image.registered_extensions()[Path(name).suffix], **options)
    return {"name": name, "mimeType": "", "buffer": file.getvalue()}


def test_questions_are_answered_and_the_worker_hears_what_it_should(written):
    red = picture_file(Image.new("RGBA", (40, 30), (255, 0, 0, 128)))
    blue = picture_file(Image.new("RGB", (50, 20), "blue"), "blue.bmp")
    with opened(written, **LAPTOP) as page:
        assert page.get_by_text(re.compile(r"tiny, ready after \d+\.\d s")).is_visible()
        assert page.locator("#offers button:not(.picture)").all_inner_texts() == CONFIG["prompts"]["en"]
        assert page.locator(".weights").count() == 0 and page.locator("html").get_attribute("lang") == "en"
        heard = json.loads(ask(page, "Repeat", red))
        assert heard["turns"] == [{"role": "user", "content": "Repeat\n<image>"}]
        assert heard["pictures"] == [{"id": 1, "rgba": [255, 0, 0, 128], "width": 40, "height": 30}]
        assert heard.items() >= {"temperature": 0.65, "top_p": 0.85, "max_new_tokens": 512}.items()
        page.locator("button[aria-label=Settings]").click()
        assert page.get_by_role("slider", name=re.compile("^Temperature 0.65")).count() == 1
        for name, value in {"temperature": 0.5, "top_p": 0.95, "length": 64}.items():
            page.locator(f"#{name}").fill(str(value))
        page.locator("button[aria-label=Settings]").click()
        assert page.locator("#settings").is_hidden()
        first = page.locator(".answer").inner_text()
        heard = json.loads(ask(page, "Repeat", red, blue))  # the picture before is known, the same file is new
        assert [message["role"] for message in heard["turns"]] == ["user", "assistant", "user"]
        assert heard["turns"][1]["content"] == first and heard["turns"][2]["content"] == "<image>\n<image>\nRepeat"
        sent = {picture["id"]: "rgba" in picture for picture in heard["pictures"]}
        assert sent == {1: False, 2: True, 3: True}
        assert heard.items() >= {"temperature": 0.5, "top_p": 0.95, "max_new_tokens": 64}.items()
        assert ask(page, "What?") == "a yellow circle on a blue background"
        assert page.get_by_text("7 tokens · 100 tokens/s").is_visible()
        assert page.get_by_text("first token after 50 ms · 110 ms in total").last.is_visible()
        assert page.locator("#answered").text_content() == "a yellow circle on a blue background"
        ask(page, "Long")
        for sentence in (
            "the conversation is too long: its first 2 turns were left out",
            "对话过长，最早的 2 轮已略去",
        ):
            assert page.get_by_text(sentence).is_visible()
            page.locator("#language").click()
        assert ask(page, "Say <b>") == "<b>bold</b> <img src=x onerror='document.title=1'>"
        assert page.title() == "MiniMind-V"  # shown, not run


def test_a_question_waits_for_its_picture_and_is_kept_when_that_is_broken(written):
    slow = "real = createImageBitmap; createImageBitmap = async (file) => (await new Promise((go) => read = go),"
    slow += " real(file)); 0"  # a function as the last value would be called
    red, broken = picture_file(Image.new("RGB", (40, 30), "red")), {"name": "a.png", "mimeType": "", "buffer": b"no"}
    with opened(written, **LAPTOP) as page:
        page.evaluate(slow)
        for picture in (broken, red):
            page.set_input_files("#files", [picture])
            page.locator("#text").fill("Repeat")
            page.keyboard.press("Enter")
            assert page.locator(".turn").count() == 0 and page.locator("#text").input_value() == "Repeat"
            page.evaluate("read()")
            if picture is broken:
                page.get_by_text("This browser cannot read a.png as a picture.").wait_for()
                assert page.locator(".turn").count() == 0 and page.locator("#text").input_value() == "Repeat"
        assert json.loads(answer(page, 1))["turns"] == [{"role": "user", "content": "Repeat\n<image>"}]


def test_stop_retry_and_clear_with_mouse_and_keyboard(written):
    with opened(written, **LAPTOP) as page:
        assert page.evaluate("document.activeElement.id") == "text"
        page.locator("#offers button:not(.picture)").first.click()
        assert page.locator("#text").input_value() == "What is in the picture?"
        page.locator("#text").fill("Talk on")
        page.keyboard.press("Shift+Enter")
        assert page.locator("#text").input_value() == "Talk on\n" and page.locator(".turn").count() == 0
        page.locator("#text").dispatch_event("keydown", {"key": "Enter", "isComposing": True})  # of an input method
        assert page.locator(".turn").count() == 0
        page.keyboard.press("Enter")
        said = page.locator(".answer").inner_text
        for number, end in enumerate((lambda: page.keyboard.press("Escape"), lambda: page.locator("#stop").click()), 1):
            wait_until(lambda: "and on and on" in said())
            assert page.locator("#send").is_hidden() and page.locator(".retry:enabled").count() == 0
            end()
            answer(page, 1)
            assert page.get_by_text("stopped", exact=True).count() == 1 and len(said()) < 2000 * 7
            assert page.get_by_text("There is no picture, and this model").is_visible()
            if number == 1:
                page.locator(".retry").click()
                wait_until(lambda: "stopped" not in page.locator(".about").inner_text())
        page.locator("#text").fill("Talk on")
        page.locator("#send").click()
        wait_until(lambda: page.locator(".answer").last.inner_text())
        page.locator("#clear").click()  # in the middle of an answer
        page.get_by_text("Add a picture and ask about it.").wait_for()
        assert page.locator(".turn").count() == 0
        assert len(json.loads(ask(page, "Repeat"))["turns"]) == 1
        page.locator("#language").focus()
        order = []
        while page.evaluate("document.activeElement.id") != "send":
            page.keyboard.press("Tab")
            order.append(page.evaluate("document.activeElement.id || document.activeElement.parentNode.id || 'retry'"))
        expected = ["adjust", "clear", "log", "retry", *["offers"] * 5, "choose", "text", "send"]
        assert order == expected
        fields = page.locator("button:visible, textarea:visible, #log, img")
        assert fields.evaluate_all("all => all.every((e) => e.ariaLabel || e.innerText || e.alt === '')")


def test_mistakes_are_sentences_and_the_next_question_is_answered(written):
    broken = {"name": "broken.png", "mimeType": "image/png", "buffer": b"\x89PNG no"}
    red = picture_file(Image.new("RGB", (9, 9), "red"))
    with opened(written, **LAPTOP) as page:
        told = page.locator("#told")
        page.locator("#send").click()
        assert told.inner_text() == "Type a question, or add a picture."
        page.set_input_files("#files", [broken])
        told.get_by_text("cannot read broken.png as a picture. Save it as JPEG or PNG").wait_for()
        page.set_input_files("#files", [red] * 5)
        wait_until(lambda: page.locator("#waiting canvas").count() == 5)
        page.locator("#text").fill("What?")
        page.keyboard.press("Enter")
        assert "You added 5 pictures; the limit is 4" in told.inner_text()
        page.locator("#language").click()
        assert told.inner_text() == "共 5 张图片，每次提问最多 4 张。"
        page.locator("#language").click()
        page.locator("#clear").click()
        page.locator("#text").fill("And <image>?")
        page.keyboard.press("Enter")  # is not lost
        assert told.inner_text() == "Write <image> once for each picture, or leave it out."
        assert page.locator("#text").input_value() == "And <image>?"
        sentences = {
            "Array buffer allocation failed": "ran out of memory",
            "The question is longer than the model can read: 900 tokens of 511.": "longer than the model reads",
            "The text has places for 2, but there are 1 pictures.": "Write <image> once for each picture",
            "file:///weights.bin cannot be fetched (no network).": "only from a web server",
            "http://localhost/weights.bin cannot be fetched (404).": "from the network",
            "a mistake of ours": "went wrong. a mistake of ours",
        }
        for reason, sentence in sentences.items():
            ask(page, f"Break: {reason}")
            assert sentence in page.locator(".about").last.inner_text()
        ask(page, "Crash")
        assert "ran out of memory" in page.locator(".about").last.inner_text()
        heard = json.loads(ask(page, "Repeat", red))  # what failed is no part of the conversation
        assert len(heard["turns"]) == 1 and len(heard["pictures"]) == 1 and told.inner_text() == ""


LEVELS = """(canvas) => {
    const {data} = canvas.getContext("2d").getImageData(0, 0, 224, 224);
    return [[84, 84], [200, 200]].map(([x, y]) => data.slice(4 * (224 * y + x)).slice(0, 3).reduce((a, b) => a + b));
}"""


def test_a_word_shows_where_the_decoder_looked(written, tmp_path):
    with opened(written, **LAPTOP) as page:
        ask(page, "What?", "dataset/eval_images/scene_1.png")
        page.locator(".answer span").get_by_text("yellow").click()
        caption = page.locator("figure output")
        caption.wait_for()
        assert caption.inner_text() == "“yellow”: 55% of its attention on pictures"
        bright, dark = page.locator("figure canvas").evaluate(LEVELS)
        assert bright > 2 * dark
        screenshot(page, "look_laptop_en_light", tmp_path)
        page.get_by_label("Next word").click()
        caption.get_by_text("“circle”").wait_for()
        assert page.locator(".chosen").inner_text() == "circle"
        page.get_by_label("Close").click()
        assert page.locator("figure").is_hidden() and not page.locator(".chosen").count()
        ask(page, "And?")
        page.locator(".answer span").get_by_text("yellow").first.click()  # of an answer that is not the last
        page.get_by_role("button", name="Where did it look?").click()  # the last one is about the same picture
        page.locator("figure canvas").last.wait_for()
        assert page.locator("figure").first.is_hidden() and caption.last.inner_text().startswith("“a”")


DROP = """async ([data, type]) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0)), transfer = new DataTransfer();
    transfer.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
    const event = type == "paste" ? new ClipboardEvent("paste", {clipboardData: transfer, bubbles: true})
        : new DragEvent("drop", {dataTransfer: transfer, bubbles: true, cancelable: true});
    document.querySelector("#text").dispatchEvent(event);
}"""


def test_on_a_phone_in_chinese_and_dark(written, tmp_path):
    with opened(written, **PHONE) as page:
        page.get_by_text("添加一张图片，然后提问。").wait_for()
        assert page.locator("html").get_attribute("lang") == "zh-CN"
        assert page.locator("#camera").get_attribute("capture") == "environment" and page.locator("#photo").is_visible()
        screenshot(page, "empty_phone_zh_dark", tmp_path)
        page.locator("#offers .picture").first.tap()
        data = base64.b64encode(picture_file(Image.new("RGB", (60, 40), "orange"))["buffer"]).decode()
        for how in ("paste", "drop"):
            page.evaluate(DROP, [data, how])
        wait_until(lambda: page.locator("#waiting canvas").count() == 3)
        page.locator("#offers button:not(.picture)").first.tap()
        screenshot(page, "asking_phone_zh_dark", tmp_path)
        page.locator("#send").tap()
        assert answer(page, 1) == "一个黄色的圆形，在蓝色的背景上。"
        assert page.get_by_text("token/秒").is_visible()
        page.locator(".answer span").nth(2).tap()
        page.locator("figure output").get_by_text("“黄”：").wait_for()
        screenshot(page, "chat_phone_zh_dark", tmp_path)
        page.locator("#language").tap()
        assert page.locator(".retry").inner_text() == "Retry" and page.get_by_text("of its attention").is_visible()
        page.locator("#language").tap()
        page.locator("#adjust").tap()
        screenshot(page, "settings_phone_zh_dark", tmp_path)
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(int(level) for level in dark[4:-1].split(",")[:3]) < 60
        page.locator("#adjust").tap()
        page.emulate_media(color_scheme="light")
        screenshot(page, "chat_phone_zh_light", tmp_path)


def test_on_a_laptop(written, tmp_path):
    with opened(written, **LAPTOP) as page:
        screenshot(page, "empty_laptop_en_light", tmp_path)
        ask(page, "What is in the picture?", "dataset/eval_images/scene_1.png")
        ask(page, "What colour is it?")
        page.set_input_files("#files", "dataset/eval_images/scene_3.png")
        page.locator("#text").fill("And what is in this one?")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            screenshot(page, f"chat_laptop_en_{scheme}", tmp_path)


PIXELS = """async (data) => {
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const bitmap = await decode(new Blob([bytes])), {width, height} = bitmap, lineOf = linesOf(bitmap);
    return [width, height, Array.from({length: height}, (_, y) => [...lineOf(y)]).flat()];
}"""


def test_pixels_are_those_that_pillow_reads(written):
    """Orientation, alpha, palettes, CMYK, profiles. Not 16-bit greys: Chromium rounds them to 8 bits, Python cuts."""
    noise = np.random.default_rng(0).integers(0, 256, (36, 48, 4), np.uint8)
    rgba = Image.fromarray(noise).resize((96, 72))
    rgb, exif = rgba.convert("RGB"), Image.Exif()
    exif[0x0112] = 6
    files = {
        "jpeg": picture_file(rgb, "a.jpg"),
        "turned": picture_file(rgb, "a.jpg", exif=exif),
        "cmyk": picture_file(rgb.convert("CMYK"), "a.jpg"),
        "grey": picture_file(rgb.convert("L"), "a.jpg"),
        "png": picture_file(rgb),
        "alpha": picture_file(rgba),
        "grey alpha": picture_file(rgba.convert("LA")),
        "palette": picture_file(rgb.quantize(64), transparency=bytes(range(0, 256, 4))),
        "one bit": picture_file(rgb.convert("1")),
        "profile": picture_file(rgb, icc_profile=swapped_profile()),
        "webp": picture_file(rgba, "a.webp"),
        "gif": picture_file(rgb.quantize(64), "a.gif"),
    }
    with opened(written, **LAPTOP) as page:
        page.add_script_tag(content=Path("inference/web/resize.js").read_text(encoding="utf-8"))  # the worker's
        for name, file in files.items():
            width, height, data = page.evaluate(PIXELS, base64.b64encode(file["buffer"]).decode())
            pixels = Image.frombytes("RGBA", (width, height), bytes(data))
            assert to_rgb(pixels).tobytes() == to_rgb(Image.open(BytesIO(file["buffer"]))).tobytes(), name


def swapped_profile() -> bytes:
    """A colour profile that would show red as green."""
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return profile.replace(b"rXYZ", b"?XYZ").replace(b"gXYZ", b"rXYZ").replace(b"?XYZ", b"gXYZ")


def be_greedy(page):
    page.locator("#adjust").click()
    page.locator("#temperature").fill("0")
    page.locator("#adjust").click()


def ask_both(page, model, tokenizer, args, first, pictures, questions):
    """A new conversation, whose first question has the pictures: (what the page answers, what PyTorch answers).
    first: whether one picture comes before the text."""
    page.locator("#clear").click()
    images, turns, ours = [Image.open(path) for path in pictures], [], []
    for question in questions:
        shown = [] if turns else pictures
        chat = chat_of([*turns, (question, shown, "")], first)
        ours.append(asked(model, tokenizer, chat, images, args))
        turns.append((question, shown, ask(page, question, *shown)))
    return [said for _, _, said in turns], ours


def test_a_trained_model_answers_on_its_page_as_in_pytorch(trained, world, tmp_path):
    """The whole of it: trained, exported, opened in a browser, asked in two languages."""
    out = trained[trained.index("--out_dir") + 1]
    convert_vlm.main(["--to", "web", "--out_dir", out, "--output", str(tmp_path / "page")])
    args = web_demo_vlm.parse_args(["--out_dir", out, "--device", "cpu", "--temperature", "0"])
    args.greedy = True
    weights = find_models(args)[0]
    model, tokenizer = load_for_page(weights, args)
    with opened((tmp_path / "page/chat.html").as_uri(), **LAPTOP) as page:
        be_greedy(page)
        for colour, questions in (("red", ["What colour is this?", "Sure?"]), ("blue", ["这是什么颜色？", "确定吗？"])):
            picture = str(world / f"pictures/{colour}.png")
            theirs, ours = ask_both(page, model, tokenizer, args, pictures_first(weights), [picture], questions)
            assert theirs == ours
            page.locator(".answer span").last.click()
            page.locator("figure output").get_by_text(re.compile("[1-9]%")).wait_for()


@pytest.fixture(scope="module")
def quickstarts(tmp_path_factory):
    """The page of a quickstart's newest weights: (folder of the quickstart, arguments to ask it in PyTorch, weights,
    address)."""
    if "MINIMIND_QUICKSTART" not in os.environ:
        pytest.skip("MINIMIND_QUICKSTART names no folder of a quickstart")
    out, page = Path(os.environ["MINIMIND_QUICKSTART"]), tmp_path_factory.mktemp("quickstart") / "page"
    args = web_demo_vlm.parse_args(["--weights", "sft_vlm", "--out_dir", str(out), "--device", "cpu"])
    args.greedy = True
    weights = find_models(args)[0]
    convert_vlm.main(["--to", "web", "--weights", str(weights), "--output", str(page)])
    return out, args, weights, (page / "chat.html").as_uri()


def test_the_quickstarts_page_answers_50_validation_questions_as_pytorch(quickstarts):
    out, args, weights, address = quickstarts
    model, tokenizer, _ = load_model(args)  # not packed, which no copy is made of
    model, count = with_weights(model, web_state(model, "int8")), 0  # else about one answer in a thousand is another
    with opened(address, **LAPTOP) as page:
        be_greedy(page)
        for _, row in read_rows([out / "data/val.jsonl"]):
            users = [turn["content"] for turn in row.conversations if turn["role"] == "user"]
            questions = [text.replace("<image>", " ").strip() for text in users]  # the page sets it, too
            pictures = [str(out / "data/images" / name) for name in row.images]
            theirs, ours = ask_both(page, model, tokenizer, args, pictures_first(weights), pictures, questions)
            assert theirs == ours, users
            count += len(questions)
            if count >= 50:
                return


def test_the_quickstarts_page_on_a_phone(quickstarts):
    """In two languages, about its second sample picture, as in the README's picture of the page."""
    for locale, scheme, question, word in (
        ("en-US", "light", "Describe this picture.", "black"),
        ("zh-CN", "dark", "描述这张图片。", "黑"),
    ):
        look = {
            "locale": locale,
            "color_scheme": scheme,
            "device_scale_factor": 1.5,
            "viewport": {"width": 390, "height": 900},
        }
        with opened(quickstarts[-1], **PHONE | look) as page:
            be_greedy(page)
            page.locator("#offers .picture").nth(1).tap()
            page.locator("#waiting canvas").wait_for()
            ask(page, question)
            page.locator(".answer span").get_by_text(word, exact=True).tap()
            page.locator("figure canvas").wait_for()
            page.wait_for_timeout(400)  # where it was tapped is coloured for a while
            screenshot(page, f"quickstart_phone_{locale}")
