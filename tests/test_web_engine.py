"""inference/web in node: the page's engine says what PyTorch says, from text and pixels to answers."""

import base64
import json
import random
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from inference.attention import attention_to_pictures, words_of
from inference.generate import user_turn
from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing import ImageProcessor, encode_chat
from model.web import DTYPES, ENCODERS, SOURCES, WEB, check_web, write_web
from scripts.convert_vlm import __main__ as convert_vlm
from scripts.convert_vlm import check_web as check
from tests.conftest import lively, small_config, turn
from tests.test_convert_vlm import save  # noqa: F401 (a fixture)
from tests.test_encoders import folders  # noqa: F401 (a fixture)
from tests.test_generations import parts, public, siglip_folder, words, words_folder  # noqa: F401 (fixtures)

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="needs node (nodejs.org) to run the page's JavaScript")
CONFIGS = {
    "dense": {},
    "moe": {"use_moe": True},
    "few experts": {"use_moe": True, "n_routed_experts": 3, "num_experts_per_tok": 1, "n_shared_experts": 0},
    "one key head": {"num_attention_heads": 4, "num_key_value_heads": 1, "rope_theta": 5e4, "rms_norm_eps": 1e-3},
    "merged": {"spatial_merge_size": 2, "num_attention_heads": 16},  # heads of 4: too narrow for the kernel
}


def run(script: str, given) -> list | dict:
    """What `script` returns, which finds the page's classes, and `given`."""
    sources = [(WEB / name).read_text(encoding="utf-8") for name in SOURCES]
    read = 'const given = JSON.parse(require("fs").readFileSync(0, "utf8"));'
    said = f"(async () => {{ {script} }})().then((out) => process.stdout.write(JSON.stringify(out)));"
    code = "\n".join([*sources, read, said])
    done = subprocess.run([NODE, "-e", code], input=json.dumps(given), capture_output=True, text=True, encoding="utf-8")
    assert not done.returncode, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture
def page(tmp_path, clip_folder, tokenizer, tokenizer_folder):
    """page(dtype, use_moe=True, ...) → (folder with the page, its model, what is stored), of lively weights."""

    def make(dtype="fp16", split=False, **config):
        model = lively(MiniMindVLM(small_config(clip_folder, **config), clip_folder).eval())
        sign = tokenizer.convert_tokens_to_ids("@")
        model.config.image_ids = [sign] * len(model.config.image_ids)
        with torch.no_grad():
            model.model.norm.weight *= 6  # logits of some tens
        stored = write_web(tmp_path, model, tokenizer, tokenizer_folder, {"pictures_first": True}, "tiny", dtype, split)
        return tmp_path, model, stored

    return make


@pytest.fixture
def pictures():
    noise = np.random.default_rng(0).integers(0, 256, (2, 45, 60, 3), dtype=np.uint8)
    return [Image.fromarray(each) for each in noise]


# ---------------------------------------------------------------------------- text


HARD = [
    "",
    "Hello world's  it'll we'RE\n\n  x \t\r\n ",
    "你好，世界！今天 天气１２３，日本語テキスト한국어 العربية हिन्दी ½Ⅷ",
    "👩‍👩‍👧 🇩🇪 e\u0301 𐍈 𝟘𝟙 \U0001f9d1\u200d🚀",
    "\x00\x01\x1c\x85\ufeff\u180e\u200b \u3000a \u2028x\u2029 \xa0y\u202f",
    "<|im_end|>typed<|endoftext|> <think> x</think> <|image_pad|><think></think>",
    "a" * 300 + " " * 70 + "红" * 100,
]


def mixed_texts(n: int) -> list[str]:
    draw = random.Random(0)
    ranges = [(9, 14), (32, 127), (32, 127), (0x80, 0x600), (0x2000, 0x2100), (0x4E00, 0x9FFF), (0x1F300, 0x1F700)]
    return ["".join(chr(draw.randrange(*draw.choice(ranges))) for _ in range(draw.randrange(60))) for _ in range(n)]


@pytest.mark.parametrize("specials", [False, True], ids=["typed", "specials"])
def test_texts_become_the_same_tokens_and_tokens_the_same_text(tokenizer, words, specials):  # noqa: F811
    for each in (tokenizer, words):  # with the second, <think> is a token that is not special
        backend, texts = each.backend_tokenizer, HARD + mixed_texts(500)
        backend.encode_special_tokens = not specials
        expected = [backend.encode(text, add_special_tokens=False).ids for text in texts]
        draw = random.Random(1)
        ids = [[draw.randrange(len(each)) for _ in range(draw.randrange(1, 30))] for _ in range(300)]
        given = {"json": json.loads(backend.to_str()), "texts": texts, "ids": ids, "specials": specials}
        said = run(
            """const tokenizer = new Tokenizer(given.json);
            return {ids: given.texts.map((text) => tokenizer.encode(text, given.specials)),
                    texts: given.ids.map((ids) => tokenizer.decode(ids))};""",
            given,
        )
        assert said == {"ids": expected, "texts": [each.decode(row, skip_special_tokens=True) for row in ids]}


def test_a_text_that_streams_waits_for_the_rest_of_a_character(tokenizer):
    text = "a红🚀 é龘"
    backend = tokenizer.backend_tokenizer
    given = {"json": json.loads(backend.to_str()), "ids": tokenizer(text, add_special_tokens=False)["input_ids"]}
    said = run(
        """const decoder = new Decoder(new Tokenizer(given.json));
        const pieces = given.ids.map((id) => decoder.add([id]));
        const half = new Decoder(decoder.tokenizer);
        const cut = half.add(given.ids.slice(0, -1)) + "|" + half.end();
        return {pieces, end: decoder.end(), cut};""",
        given,
    )
    assert "".join(said["pieces"]) == text and said["end"] == "" and "" in said["pieces"]
    assert re.fullmatch("a红🚀 é\\|\ufffd", said["cut"])  # the bytes of 龘 are three tokens


# ---------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("resample", [2, 3], ids=["bilinear", "bicubic"])
def test_pictures_are_resized_to_the_bit(resample):
    settings = [{"size": 72, "crop_size": (72, 72)}, {"size": (64, 48), "crop_size": (64, 48)}]
    settings += [{"size": 60, "crop_size": (72, 64)}]  # wider than what there is
    sizes = [(72, 72), (224, 224), (300, 200), (37, 91), (1000, 31), (1500, 7), (3, 700), (1, 1), (71, 73), (640, 480)]
    noise, jobs, expected = np.random.default_rng(0), [], []
    for i, (width, height) in enumerate(sizes):
        rgba = noise.integers(0, 256, (height, width, 4), dtype=np.uint8)
        rgba[..., 3] |= 255 * (i % 2)  # half of them transparent
        for each in settings:
            processor = ImageProcessor(**each, resample=resample)
            expected.append(processor.resize(Image.fromarray(rgba)).numpy().tobytes())
            jobs.append([base64.b64encode(rgba.tobytes()).decode(), width, height, each | {"resample": resample}])
    said = run(
        """return given.map(([rgba, width, height, settings]) => {
          const lines = linesIn(new Uint8ClampedArray(Buffer.from(rgba, "base64")), width);
          const pixels = resize(lines, width, height, settings);
          return Buffer.from(pixels).toString("base64");
        });""",
        jobs,
    )
    for (_, width, height, each), theirs, ours in zip(jobs, said, expected):
        assert base64.b64decode(theirs) == ours, (width, height, each)


# ---------------------------------------------------------------------------- the model


@pytest.mark.parametrize("plain", [False, True], ids=["kernel", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", CONFIGS)
def test_the_page_answers_as_the_model_does(page, tokenizer, pictures, config, dtype, plain):
    folder, model, stored = page(dtype, **CONFIGS[config])
    assert any(value.dtype == torch.int8 for value in stored.values()) == (dtype == "int8")
    line = check.check_page(folder, model, tokenizer, stored, check.questions_of(pictures), plain)
    assert line.startswith("node: 4 questions, tokens and pixels as ours") and "the same answers" in line
    assert int(re.search(r"±(\d+)", line)[1]) >= 10  # 1e-3 means something


def test_without_simd_the_model_is_plain_and_what_it_cannot_read_is_a_sentence(page):
    folder, _, stored = page()
    said = run(
        """const page = require("fs").readFileSync(given, "utf8");
        const read = (id) => page.match(new RegExp(`"${id}">([^]*?)</script>`))[1];
        const weights = Buffer.from(read("weights"), "base64"), kernel = new Uint8Array(9);
        const memory = memoryFor(weights.length, kernel);
        new Uint8Array(memory.buffer).set(weights);
        const model = new MiniMindV(JSON.parse(read("config")), new Weights(memory, kernel));
        const picture = Array(16).fill(model.config.decoder.placeholder);
        const wrong = [[5, 300], Array(513).fill(5), picture, [5]].map((ids) => {
          try {
            return model.forward(ids, [], model.newCache()).length;
          } catch (error) {
            return error.message;
          }
        });
        const words = ["WebAssembly.Memory.grow(): Unable to grow instance memory", "Array buffer allocation failed",
          "Invalid array length", "Maximum call stack size exceeded"];
        const told = [], tokenizer = JSON.parse(read("tokenizer"));
        globalThis.postMessage = ({message}) => told.push(message);
        for (const known of [kernel, Uint8Array.from(Buffer.from(read("kernel"), "base64"))]) {
          await handle({type: "load", config: {bytes: 2 ** 45}, tokenizer, kernel: known});
          await handle({type: "part", bytes: new Uint8Array(9)});
        }
        return [model.weights.kernel ?? "none", wrong, words.map((each) => sentence(new RangeError(each))), told];""",
        str(folder / "chat.html"),
    )
    full = "This device has too little free memory. Close other pages, or use fewer or smaller pictures."
    wrong = [
        "The model has no token 300. Its tokenizer is a different one.",
        "513 tokens are more than the model reads: 512. Start a new chat.",
        "The text has places for 1, but there are 0 pictures.",
        300,  # logits
    ]
    assert said == ["none", wrong, [full] * 4, [full] * 2]


@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_a_minimind_3v_does_too(public, words_folder, tmp_path, pictures, use_moe):  # noqa: F811
    _, model, tokenizer = public(use_moe)
    stored = write_web(tmp_path, model, tokenizer, words_folder, {})
    thought = [turn("user", "Why?"), turn("assistant", "<think>\nHm.\n</think>\n\nSo."), turn("user", "<think>")]
    line = check.check_page(tmp_path, model, tokenizer, stored, [*check.questions_of(pictures), (thought, [])])
    assert line.startswith("node: 5 questions") and "the same answers" in line


@pytest.mark.parametrize("kind", ENCODERS)
def test_it_sees_with_every_encoder_that_it_knows(folders, kind, tokenizer, tokenizer_folder, tmp_path, pictures):  # noqa: F811
    small = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
    sign = tokenizer.convert_tokens_to_ids("@")
    config = VLMConfig.for_encoder(folders / kind, sign, **small)
    model = lively(MiniMindVLM(config, folders / kind).eval())
    stored = write_web(tmp_path, model, tokenizer, tokenizer_folder, {})
    line = check.check_page(tmp_path, model, tokenizer, stored, check.questions_of(pictures))
    assert line.startswith("node: 4 questions")


def test_a_page_with_other_weights_is_not_kept(page, tokenizer, pictures):
    folder, model, stored = page()
    with torch.no_grad():
        stored["vision_proj.vision_proj.0.bias"] += 0.1
    with pytest.raises(ValueError, match="'Describe this picture.\\\\n<image>': the page's logits differ by up to"):
        check.check_page(folder, model, tokenizer, stored, check.questions_of(pictures))


def test_what_a_page_takes_is_measured(page):
    folder, _, _ = page("int8")
    script = Path(check.__file__).with_suffix(".js")
    big = "import subprocess, sys; filled = b'x' * 1_000_000_000; subprocess.run(sys.argv[1:], check=True)"
    command = [sys.executable, "-c", big, NODE, script, folder, "--speed"]  # whose own memory must not count
    said = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    took = json.loads(said.stdout)
    assert min(took.values()) > 0, took
    assert took["prompt"] > 16 and 20 < took["memory_mb"] < 900


def test_tokens_are_drawn_as_transformers_draws_them():
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0)) * 3
    cases = [{"temperature": 0.7, "top_p": 0.8}, {"temperature": 1.3, "top_k": 5}, {"temperature": 1, "top_p": 1e-6}]
    draws = [i / 1000 + 5e-4 for i in range(1000)]
    said = run(
        """const {sample} = MiniMindV.prototype, logits = Float32Array.from(given.logits);
        return given.cases.map((settings) => given.draws.map((draw) => sample(logits, settings, () => draw)));""",
        {"logits": logits.tolist(), "cases": cases, "draws": draws},
    )
    for case, tokens in zip(cases, said):
        scores = TemperatureLogitsWarper(float(case["temperature"]))(None, logits[None])
        scores = TopKLogitsWarper(case["top_k"])(None, scores) if "top_k" in case else scores
        scores = TopPLogitsWarper(case["top_p"])(None, scores) if "top_p" in case else scores
        shares = torch.bincount(torch.tensor(tokens), minlength=50) / 1000
        torch.testing.assert_close(shares, scores.softmax(-1)[0], atol=2e-3, rtol=0)


@pytest.mark.skipif(not shutil.which("wat2wasm"), reason="no wat2wasm here: apt-get install wabt")
def test_the_assembled_kernel_is_what_its_text_says(tmp_path):
    subprocess.run(["wat2wasm", WEB / "matmul.wat", "-o", tmp_path / "matmul.wasm"], check=True)
    assert (tmp_path / "matmul.wasm").read_bytes() == (WEB / "matmul.wasm").read_bytes()


# ---------------------------------------------------------------------------- the worker


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


WORKER = """
const fs = require("fs"), page = fs.readFileSync(given.page, "utf8"), told = [];
const read = (id) => page.match(new RegExp(`<script[^>]* (?:id|class)="${id}"[^>]*>([^]*?)</script>`))[1];
const bytes = (text) => Uint8Array.from(Buffer.from(text, "base64"));
globalThis.postMessage = (message) => {
  told.push(message);
  if (message.type === "text" && given.stop) onmessage({data: {type: "stop"}});
};
const [config, json] = [JSON.parse(read("config")), JSON.parse(read("tokenizer"))];
const send = async (data) => { onmessage({data}); await work; };
const [weights, kernel] = [bytes(read("weights")), bytes(read("kernel"))];
await send({type: "load", config, tokenizer: json, kernel});
for (let at = 0; at < weights.length; at += 50_000) await send({type: "part", bytes: weights.slice(at, at + 50_000)});
const forward = MiniMindV.prototype.forward, lengths = [];
MiniMindV.prototype.forward = function (ids, ...rest) {
  lengths.push(ids.length);
  return forward.call(this, ids, ...rest);
};
for (const message of given.messages) {
  const pictures = message.pictures?.map(({rgba, ...facts}) => ({rgba: rgba && bytes(rgba), ...facts}));
  await send({...message, pictures});
  told.at(-1).lengths = lengths.splice(0);
  if (told.at(-1).maps) told.at(-1).maps = told.at(-1).maps.map((map) => [...map]);
}
return told.filter(({type}) => !["progress", "ready", "text"].includes(type));
"""


def asking(text, pictures, before=(), **more) -> dict:
    packed = [np.asarray(picture.convert("RGBA")) for picture in pictures]
    shown = [
        {"rgba": base64.b64encode(each.tobytes()).decode(), "width": each.shape[1], "height": each.shape[0]}
        for each in packed
    ]
    settings = {"temperature": 0, "top_p": 1, "max_new_tokens": 24} | more
    return {"type": "ask", "turns": [*before, turn("user", text)], "pictures": shown, **settings}


def test_a_chat_goes_on_from_the_cache_and_pictures_are_looked_at_as_in_pytorch(page, tokenizer, pictures, monkeypatch):
    folder, model, stored = page()
    first = asking("<image>\nWhat is this?", pictures[:1])
    # What the model says is noise, which may not be read as it was said: the second question comes without it.
    before = [*first["turns"], turn("assistant", "It is red.")]
    messages = [
        first | {"turns": [turn("user", "What is this?") | {"pictures": 1}]},  # it knows where to put them
        asking("确定吗？", pictures[:1], before),
        {"type": "look", "token": 2},
        asking("确定吗？", pictures[1:], before),  # another picture in its place
    ]
    said = run(WORKER, {"page": str(folder / "chat.html"), "messages": messages})
    rounded = check.with_weights(model, stored)
    monkeypatch.setattr(check, "TOKENS", 24)
    for message, done in ((first, said[0]), (messages[1], said[1])):
        ours = check.ask(rounded, tokenizer, message["turns"], pictures[:1])
        assert done["text"] == ours["text"].strip() and done["tokens"] == len(ours["answer"])
        assert done["why"] == ("end" if ours["answer"][-1] == 2 else "length")
    prompt = len(ours["ids"])
    assert said[0]["lengths"][0] > 16 and 0 < said[1]["lengths"][0] < prompt - 20  # the first turn is in the cache
    assert said[3]["lengths"][0] > said[1]["lengths"][0] + 16 and said[3]["lengths"][0] < prompt  # from the picture on

    ids = torch.tensor([[*ours["ids"], *ours["answer"]]])
    maps = attention_to_pictures(rounded, ids, prompt, ours["pixels"])  # (A, 1, P)
    word = said[2]["word"]
    assert word in said[1]["words"] and 2 in word["tokens"] and said[2]["side"] == 4
    torch.testing.assert_close(torch.tensor(said[2]["maps"]), maps[word["tokens"]].mean(dim=0), atol=1e-5, rtol=0)


def test_the_words_of_an_answer_are_those_of_the_figure(tokenizer):
    texts = [" It is 红色 blue,  ok. 这是🚀red。", "龘a", ""]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    said = run(
        """tokenizer = new Tokenizer(given.json);
        return given.ids.map((ids) => {
          answer = {ids};
          const text = tokenizer.decode(ids);
          return [wordsOf(text), withoutThoughts(text)];
        });""",
        {"json": json.loads(tokenizer.backend_tokenizer.to_str()), "ids": ids},
    )
    for row, (found, shown) in zip(ids, said):
        assert [(word["text"], word["tokens"]) for word in found] == words_of(tokenizer, row)
        utf16 = shown.encode("utf-16-le")  # as JavaScript counts
        for word in found:
            assert utf16[2 * word["begin"] : 2 * word["end"]].decode("utf-16-le") == word["text"]


def test_pictures_that_the_worker_keeps_need_not_come_again(page, pictures):
    folder, _, _ = page()
    first, second = (asking("<image>", [picture])["pictures"][0] | {"id": n} for n, picture in enumerate(pictures))
    ask = asking("<image>", [])
    several = asking("<image><image>", [])
    messages = [
        ask | {"pictures": [first]},
        ask | {"pictures": [{"id": 0}]},
        several | {"pictures": [{"id": 0}, second]},
        several | {"pictures": [{"id": 1}, {"id": 0}]},
        several | {"pictures": [second, first]},
        ask | {"pictures": [{"id": 7}]},
    ]
    said = run(WORKER, {"page": str(folder / "chat.html"), "messages": messages})
    assert [each.get("kept") for each in said] == [[0], [0], [0, 1], [1, 0], [1, 0], None]
    assert said[0]["text"] == said[1]["text"] and said[1]["lengths"][0] == 1  # all of it is in the cache
    assert said[3]["text"] == said[4]["text"] != said[2]["text"] and said[4]["lengths"][0] == 1
    assert said[5]["message"] == "A picture is no longer available. Ask again."


def test_of_a_long_chat_the_first_turns_are_left_out(page, pictures):
    folder, _, _ = page()
    long = "<image>" + "红" * 60  # about 200 tokens of 512
    turns = [turn("user", long), turn("assistant", "a"), turn("user", long), turn("assistant", "b")]
    ask = asking(long, [])
    shown = [asking("", [pictures[n % 2]])["pictures"][0] | {"id": n} for n in range(3)]
    messages = [
        ask | {"turns": turns + ask["turns"], "pictures": shown},
        {"type": "look", "token": 0},
        ask | {"turns": turns[2:] + ask["turns"], "pictures": shown[1:]},
        ask | {"turns": turns[2:] + ask["turns"], "pictures": shown[1:], "max_new_tokens": 200},  # it needs more room
    ]
    said = run(WORKER, {"page": str(folder / "chat.html"), "messages": messages})
    assert [each.get("forgotten") for each in said] == [1, None, 0, 1]
    assert [each.get("kept") for each in said] == [[1, 2], None, [1, 2], [2]]
    assert said[0]["text"] == said[2]["text"] and len(said[1]["maps"]) == 2


def test_an_answer_can_be_stopped_and_what_goes_wrong_is_a_sentence(page, pictures):
    folder, _, _ = page()
    messages = [
        asking("<image>", pictures[:1], max_new_tokens=400),
        asking("<image><image>", pictures[:1]),
        asking("@" * 16, []),
        asking("half \ud83d of it", []),
        asking("红" * 600, []),
        {"type": "look", "token": 999},
        asking("<image>", []) | {"pictures": [{"blob": "no file"}]},
        asking("Say hello.", []),
    ]
    said = run(WORKER, {"page": str(folder / "chat.html"), "messages": messages, "stop": True})
    assert (said[0]["type"], said[0]["why"]) == ("done", "stopped") and said[0]["tokens"] < 10
    assert [each.get("message", each["type"]) for each in said[1:]] == [
        "The text has places for 2, but there are 1 pictures.",
        "The text has 16 or more @ in a row, like a picture. Shorten the run.",
        "The text contains half a character. Type it again.",
        "The question is longer than the model can read: 1818 tokens of 511.",
        "The answer has no word at token 999.",
        "A picture can no longer be read, or is too large. Add it again, or add a smaller one.",
        "done",
    ]


def test_weights_come_in_pieces_and_tell_how_far_they_are(tmp_path):
    for name, piece in (("a", bytes(range(200))), ("b", b"c" * 90)):
        (tmp_path / name).write_bytes(piece)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    tries = [[("a", 200), ("b", 90)], [("a", 200), ("b", 91)], [("a", 199)], [("a", 200), ("gone", 1)]]
    said = run(
        """const out = [];
        Weights = class { constructor({buffer}) { this.buffer = buffer; } };
        for (const urls of given) {
          const shares = [], bytes = urls.reduce((sum, {bytes}) => sum + bytes, 0);
          globalThis.postMessage = ({share}) => shares.push(share ?? 1);
          const config = {bytes, files: urls, decoder: {num_hidden_layers: 0}};
          coming = {config, memory: memoryFor(bytes, null), at: 0};
          out.push([await fetchAll(urls).then(() => [...new Uint8Array(model.weights.buffer)], sentence), shares]);
        }
        return out;""",
        [[{"url": f"{address}/{name}", "bytes": size} for name, size in urls] for urls in tries],
    )
    server.shutdown()
    assert bytes(said[0][0]) == bytes(range(200)) + b"c" * 90
    assert said[0][1] == sorted(said[0][1]) and said[0][1][-1] == 1
    assert [each for each, _ in said[1:]] == [
        f"{address}/b came in part only. Reload the page.",
        f"{address}/a is longer than expected. Reload the page.",
        f"{address}/gone cannot be fetched (404). Reload the page.",
    ]


# ---------------------------------------------------------------------------- the command


def test_the_command_makes_one_file_or_a_folder(
    save,  # noqa: F811
    tmp_path,
    world,
    clip_folder,
    tokenizer_folder,
    capsys,
    monkeypatch,
):
    weights = save()
    shown = [str(world / "pictures" / f"{colour}.png") for colour in ("red", "blue")]
    command = ["--to", "web", "--weights", str(weights), "--tokenizer_path", str(tokenizer_folder)]
    command += ["--vision_model_path", str(clip_folder), "--images", *shown, "--output"]
    convert_vlm.main([*command, str(tmp_path / "one")])
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["chat.html"]
    convert_vlm.main([*command, str(tmp_path / "page.html")])
    assert (tmp_path / "page.html").read_bytes() == (tmp_path / "one/chat.html").read_bytes()
    made, template = ((path / "chat.html").read_text(encoding="utf-8") for path in (tmp_path / "one", WEB))
    assert all(made.count(mark) == template.count(mark) for mark in ("</script", "<!--"))  # none in what was put in
    assert made.count("data:image/jpeg;base64,") == 2  # pictures to begin with
    assert '"prompts": {"en": ["Describe this picture."], "zh": ["描述这张图片。"]}' in made  # its JSON has none
    monkeypatch.setattr("model.web.PIECE", 50_000)
    convert_vlm.main([*command, str(tmp_path / "several"), "--split", "--dtype", "fp16"])
    names = sorted(path.name for path in (tmp_path / "several").iterdir())
    assert names[0] == "chat.html" and len(names) > 3 and names[1].startswith("weights_")
    assert capsys.readouterr().out.count("node: 4 questions, tokens and pixels as ours") == 3
    other = str(tmp_path / "other.html")
    with pytest.raises(SystemExit):
        convert_vlm.main([*command, other, "--split"])
    assert "other.html is one file, --split makes several: name a folder" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("model.web.ONE_FILE", 0)
        with pytest.raises(
            ValueError, match=r"--output .*other\.html: the page needs \d+ files next to it: name a folder"
        ):
            convert_vlm.main([*command, other])
    unchecked = "not checked whether the page answers as the model does: that needs node 16 or later"
    answer = subprocess.CompletedProcess([], 0, stdout="v12.22.9\n")
    for i, (thing, name, value) in enumerate(
        [(check.subprocess, "run", lambda *_, **__: answer), (check.shutil, "which", lambda name: None)]
    ):
        monkeypatch.setattr(thing, name, value)
        capsys.readouterr()
        convert_vlm.main([*command, str(tmp_path / f"unchecked_{i}")])
        assert unchecked in capsys.readouterr().out


def test_what_the_page_cannot_do_is_refused(make_vlm, tokenizer_folder, tmp_path):
    model = make_vlm()
    model.processor.resample = 1
    with pytest.raises(ValueError, match="--to web: .*resample 1"):
        check_web(model, tokenizer_folder)
    model.processor.resample, model.config.hidden_act = 3, "mish"
    with pytest.raises(ValueError, match="--to web: the page does not support hidden_act 'mish'"):
        check_web(model, tokenizer_folder)
    model.config.hidden_act = "silu"
    model.vision_encoder.config.model_type = "aimv2"
    with pytest.raises(ValueError, match="the page does not support this AIMv2 encoder. It supports\nCLIP, SigLIP"):
        check_web(model, tokenizer_folder)
    model.vision_encoder.config.model_type = "clip_vision_model"
    other = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    other.add_tokens([AddedToken("<x>", lstrip=True)])
    other.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="is not a plain byte-level BPE"):
        check_web(model, tmp_path)
    check_web(model, tokenizer_folder)


def test_a_prompt_is_the_same_tokens_as_in_training(page, tokenizer):
    folder, model, _ = page()
    chats = [
        [
            turn("system", "Be <image> brief."),
            turn("user", "<image>a<image>\n"),
            turn("assistant", " <image> "),
            turn("user", ""),
        ],
        [turn("user", "@@@ <|im_end|>\n")],
    ]
    asked = [("a", 0, True), ("a", 1, True), ("a", 1, False), ("a", 2, False), ("<image> a <image>", 2, False)]
    said = run(
        """const page = require("fs").readFileSync(given.page, "utf8");
        const read = (id) => JSON.parse(page.match(new RegExp(`id="${id}">([^]*?)</script>`))[1]);
        const model = new MiniMindV(read("config"), null), tokenizer = new Tokenizer(read("tokenizer"));
        const prompts = given.chats.map((chat) => model.encodeChat(chat, tokenizer));
        return [...prompts, given.asked.map(([text, pictures, first]) => {
          model.config.chat.pictures_first = first;
          return model.userTurn(text, pictures);
        })];""",
        {"page": str(folder / "chat.html"), "chats": chats, "asked": asked},
    )
    assert said.pop() == [user_turn(*each) for each in asked]
    for chat, theirs in zip(chats, said):
        pieces = encode_chat(tokenizer, chat, model.config.image_ids)
        assert theirs["ids"] == [token for piece, _, _ in pieces for token in piece]
        assert theirs["pictures"] == sum(pictures for _, _, pictures in pieces)
