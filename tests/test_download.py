"""scripts/download, with both hubs' own libraries, against a server on this machine that speaks their routes."""

import errno
import hashlib
import json
import logging
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import huggingface_hub
import modelscope_hub
import pytest

import eval_vlm
import train_pretrain_vlm
import train_sft_vlm
from dataset.sources import row_files
from inference.models import choose_model
from model.build import find_part
from model.generations import MINIMIND_3
from model.weights import find_weights
from scripts.download import __main__ as download
from scripts.download.hubs import HuggingFace
from scripts.download.tasks import ENCODERS

SOURCES = ["hf", "modelscope"]
CLIP, SIGLIP = "model/vision_model/clip-vit-base-patch16", "model/vision_model/siglip2-base-p32-256-ve"
LATER = ["--generation", "3v"]
LARGE = (".pth", ".zip", ".jsonl", ".parquet", ".safetensors", ".bin", ".h5")  # in LFS; the rest is in git itself


def content(name, size):
    return random.Random(name).randbytes(size)


TOKENIZER, LATER_TOKENIZER = content("tokenizer", 700), content("later tokenizer", 800)
WEIGHTS = ["llm_512.pth", "llm_768.pth", "llm_768_moe.pth", "pretrain_vlm_512.pth", "sft_vlm_512.pth"]
LATER_WEIGHTS = [f"{stage}_768{moe}.pth" for stage in ("llm", "pretrain_vlm", "sft_vlm") for moe in ("", "_moe")]
ROWS = ["pretrain_data.jsonl", "pretrain_images.zip", "sft_data.jsonl", "sft_images.zip", "sft_vlm_data_multi.jsonl"]


def repositories():
    """{(kind, name without owner): {path: bytes}}, as both hubs hold them."""
    clip = [
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "tf_model.h5",
        "onnx/config.json",
    ]
    parquet = ["pretrain_i2t.parquet", "sft_i2t.parquet"]
    config = content("config", 90)
    texts, later_texts = (
        {"tokenizer.json": text, "tokenizer_config.json": config, "config.json": b"{}", "pytorch_model.bin": b"0"}
        for text in (TOKENIZER, LATER_TOKENIZER)
    )
    files = {
        ("model", "clip-vit-base-patch16"): {name: content(name, 900) for name in clip},
        ("model", "MiniMind2-V-PyTorch"): {name: content(name, 30_000) for name in WEIGHTS},
        ("dataset", "minimind-v_dataset"): {name: content(name, 5_000) for name in [*ROWS, *parquet]},
    }
    files["model", "minimind-3v-pytorch"] = {name: content(f"later {name}", 40_000) for name in LATER_WEIGHTS}
    for encoder in ["siglip2-base-p32-256-ve", *(name.split("/")[1] for name in ENCODERS.values())]:
        files.setdefault(("model", encoder), {name: content(f"{encoder} {name}", 900) for name in clip[:3]})
    files |= {("model", name): dict(texts) for name in ("MiniMind2-Small-V", "MiniMind2-V")}
    return files | {("model", name): dict(later_texts) for name in ("minimind-3v", "minimind-3v-moe")}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(200, b"")

    def do_GET(self):
        url = urlsplit(self.path)  # from a proxy's client it begins with http://
        path, query = url.path, {key: values[0] for key, values in parse_qs(url.query).items()}
        name = query.get("FilePath", path)
        self.server.requests.append((name, self.headers.get("Range"), self.headers.get("Authorization"), self.path))
        fault = next((f for f in self.server.faults if f.times and re.search(f.where, name)), None)
        if fault and isinstance(fault.kind, int):
            fault.times -= 1
            return self.answer(fault.kind, b"{}", {"Retry-After": "0"})
        if path.startswith("/cdn/"):
            return self.send(self.server.blobs[path[5:]], fault)
        hub = re.fullmatch(r"/api/(models|datasets)/(jingyaogong|openai|google|facebook)/([^/]+)/tree/main", path)
        file = re.fullmatch(r"/(datasets/)?(jingyaogong|openai|google|facebook)/([^/]+)/resolve/main/(.+)", path)
        owners = "gongjy|openai-mirror|google|facebook"
        scope = re.fullmatch(rf"/api/v1/(models|datasets)/({owners})/([^/]+)/repo(/files|/tree)?", path)
        found = hub or file or scope
        if found is None:
            return self.answer(404, b"{}")
        kind = "dataset" if (found[1] or "").startswith("datasets") else "model"
        files = self.server.files.get((kind, found[3]))
        if files is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if hub:
            return self.answer(200, json.dumps([hf_entry(*item) for item in files.items()]).encode())
        if scope and scope[4]:
            listed = [scope_entry(*item) for item in files.items()]
            return self.answer(200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": listed}}).encode())
        body = files.get(query.get("FilePath") or file[4])
        if body is None:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        if file and file[4].endswith(LARGE):  # the bytes of large files come from elsewhere
            key = f"{sha256(body)}/{file[4]}"
            self.server.blobs[key] = body
            return self.answer(302, b"", {"Location": f"/cdn/{key}"})
        return self.send(body, fault)

    def send(self, body, fault):
        self.server.packed += "gzip" in self.headers.get("Accept-Encoding", "")
        start = int((self.headers.get("Range") or "bytes=0-")[6:].split("-")[0])
        size = len(body)
        if start >= size:
            return self.answer(416, b"", {"Content-Range": f"bytes */{size}"})
        if fault:
            fault.times -= 1
        if fault and fault.kind == "whole":  # it knows nothing of Range
            return self.answer(200, body)
        if fault and fault.kind == "corrupt":
            body = body[:-1] + bytes([body[-1] ^ 1])
        headers = {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if "Range" in self.headers else {}
        body = body[start:]
        if fault and fault.kind == "short":  # shorter than listed, and says so
            return self.answer(200, body[:-7])
        cut = len(body) // 2 if fault and fault.kind == "cut" else None
        return self.answer(206 if headers else 200, body, headers, cut)

    def answer(self, status, body, headers=None, cut=None):
        self.send_response(status)
        for key, value in ({"Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:cut])
        self.server.sent += len(body[:cut])
        self.close_connection = cut is not None

    def log_message(self, *args):
        pass


def sha256(body):
    return hashlib.sha256(body).hexdigest()


def hf_entry(path, body):
    oid = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    lfs = {"lfs": {"oid": sha256(body), "size": len(body), "pointerSize": 130}} if path.endswith(LARGE) else {}
    return {"type": "file", "path": path, "size": len(body), "oid": oid} | lfs


def scope_entry(path, body):
    return {"Path": path, "Name": path.split("/")[-1], "Type": "blob", "Size": len(body), "Sha256": sha256(body)}


@pytest.fixture
def hubs(monkeypatch, tmp_path):
    """The server. .files is what it holds, .faults what goes wrong, .requests what was asked: (file, range, login)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files, server.faults, server.requests, server.blobs = repositories(), [], [], {}
    server.sent = server.packed = 0
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.handle_error = lambda *about: None  # clients that hang up are what some tests are about
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN", "MODELSCOPE_API_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    for folder, text in {"model": TOKENIZER, "model/minimind-3v": LATER_TOKENIZER}.items():
        monkeypatch.setitem(download.TOKENIZERS, f"{folder}/tokenizer.json", sha256(text))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # the libraries wait between attempts
    monkeypatch.setattr(modelscope_hub._download, "DOWNLOAD_RETRY_TIMES", 2)  # it waits by other means, for a minute
    logging.getLogger("modelscope_hub").handlers.clear()  # they write to what was stderr in an earlier test
    huggingface_hub.close_session()  # it keeps the proxies of an earlier test
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def get(tmp_path):
    def run(source, *flags):
        return download.main(["--source", source, "--root", str(tmp_path / "root"), *flags])

    run.root = tmp_path / "root"
    return run


def fault(hubs, where, kind, times=1):
    hubs.faults.append(SimpleNamespace(where=where, kind=kind, times=times))


def refused(capsys, get, *flags):
    """What the user is told: one message, no traceback."""
    with pytest.raises(SystemExit) as stop:
        get(*flags)
    assert isinstance(stop.value.code, str) and stop.value.code.startswith("\nerror: ")
    assert "Traceback" not in "".join(capsys.readouterr())
    return stop.value.code


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def asked_for(hubs, name):
    return [request for request in hubs.requests if request[0].endswith(name)]


def closed_port():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        return f"http://127.0.0.1:{server.server_port}"


# ---------------------------------------------------------------------------- what arrives, and where


@pytest.mark.parametrize("source", SOURCES)
def test_all_files_are_where_the_scripts_look_and_a_second_run_fetches_nothing(hubs, get, source, capsys):
    get(source)
    found = tree(get.root)
    del found[".download.json"]
    names = ["config.json", "preprocessor_config.json", "model.safetensors"]
    expected = {f"{CLIP}/{name}": content(name, 900) for name in names}
    expected |= {f"dataset/{name}": content(name, 5_000) for name in ROWS[:4]}
    expected |= {"model/tokenizer.json": TOKENIZER, "model/tokenizer_config.json": content("config", 90)}
    assert found == expected | {"out/llm_512.pth": content("llm_512.pth", 30_000)}
    assert not list(get.root.rglob(".download"))
    told = capsys.readouterr().out
    assert hubs.url in told and "30 KB" in told and "python train_pretrain_vlm.py" in told

    sent = [len(body) for body in expected.values()]
    hubs.requests.clear()
    get(source)
    assert all("/tree/" in url or "/repo/" in url for _, _, _, url in hubs.requests)
    assert "0 B to download" in capsys.readouterr().out and sum(sent) < hubs.sent


@pytest.mark.parametrize("source", SOURCES)
def test_older_and_nested_names_get_the_names_that_the_scripts_know(hubs, get, source):
    weights, rows = hubs.files["model", "MiniMind2-V-PyTorch"], hubs.files["dataset", "minimind-v_dataset"]
    weights["lm_512.pth"] = weights.pop("llm_512.pth")
    for stage in ("pretrain", "sft"):
        rows[f"jsonl/{stage}_vlm_data.jsonl"] = rows.pop(f"{stage}_data.jsonl")
        rows[f"jsonl/{stage}_images.zip"] = rows.pop(f"{stage}_images.zip")
    rows["jsonl/sft_vlm_data_multi.jsonl"] = b"rows with two pictures"
    clip = hubs.files["model", "clip-vit-base-patch16"]
    del clip["model.safetensors"]
    get(source)
    assert (get.root / "out/llm_512.pth").read_bytes() == weights["lm_512.pth"]
    assert (get.root / "dataset/sft_data.jsonl").read_bytes() == content("sft_data.jsonl", 5_000)
    assert sorted(path.name for path in (get.root / "dataset").iterdir()) == sorted(ROWS[:4])
    assert (get.root / CLIP / "pytorch_model.bin").read_bytes() == clip["pytorch_model.bin"]


@pytest.mark.parametrize(("asked", "suffix"), [("auto", "parquet"), ("parquet", "parquet"), ("auto", "jsonl")])
def test_the_smaller_format_is_taken_if_it_is_there(hubs, get, asked, suffix, capsys):
    if (asked, suffix) == ("auto", "parquet"):
        del hubs.files["dataset", "minimind-v_dataset"]["sft_images.zip"]
    get("hf", "--what", "data", "--data_format", asked)
    assert (get.root / f"dataset/sft_data.{suffix}").is_file()
    assert len(list((get.root / "dataset").iterdir())) == (2 if suffix == "parquet" else 4)
    assert f"using {suffix}" in capsys.readouterr().out or asked != "auto"


def test_a_trained_model_comes_with_its_tokenizer_and_how_to_ask_it(hubs, get):
    assert get("hf", "--what", "vlm")[0][:5] == ["python", "-m", "scripts.download", "--what", "clip"]
    assert sorted(tree(get.root / "out")) == ["pretrain_vlm_512.pth", "sft_vlm_512.pth"]
    assert get("hf", "--what", "clip")[-1][:2] == ["python", "eval_vlm.py"]
    (get.root / "model/tokenizer.json").rename(get.root / "elsewhere.json")
    assert download.next_commands(download.parse_args(["--root", str(get.root)]), ["clip", "vlm"])[0][4:] == [
        "vlm", "--root", get.root
    ]  # fmt: skip


def test_the_next_commands_are_ones_that_the_scripts_take(hubs, get, monkeypatch):
    commands = get("modelscope", "--size", "104m", "--use_moe")
    for command, script in zip(commands, (train_pretrain_vlm, train_sft_vlm), strict=True):
        args = script.parse_args(command[2:])
        assert command[1] == f"{script.__name__}.py"
        assert (args.hidden_size, args.use_moe, args.out_dir) == (768, True, str(get.root / "out"))
        assert args.data_path == [str(get.root / "dataset" / f"{command[1].split('_')[1]}_data.jsonl")]
        assert args.vision_model_path == str(get.root / CLIP) and args.tokenizer_path == str(get.root / "model")
    assert (get.root / "out/llm_768_moe.pth").is_file()

    get.root.joinpath("here").mkdir()
    monkeypatch.chdir(get.root / "here")
    assert download.main([]) == [["python", "train_pretrain_vlm.py"], ["python", "train_sft_vlm.py"]]
    assert download.main(["--what", "vlm"]) == [["python", "eval_vlm.py"]]


# ---------------------------------------------------------------------------- the generation of 2026


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("moe", ["", "_moe"])
def test_all_of_the_later_generation_goes_beside_the_older_and_a_second_run_fetches_nothing(
    hubs, get, source, moe, capsys
):
    get(source)
    older = tree(get.root)
    flags = [*LATER, *(["--use_moe"] if moe else []), "--what", "all", "vlm"]
    get(source, *flags)
    names = ["config.json", "preprocessor_config.json", "model.safetensors"]
    expected = {f"{SIGLIP}/{name}": content(f"siglip2-base-p32-256-ve {name}", 900) for name in names}
    rows = {stage: content(f"{stage}_i2t.parquet", 5_000) for stage in ("pretrain", "sft")}
    expected |= {f"dataset/{stage}_data.parquet": body for stage, body in rows.items()}
    weights = [f"{stage}_768{moe}.pth" for stage in ("llm", "pretrain_vlm", "sft_vlm")]
    expected |= {f"out/{name}": content(f"later {name}", 40_000) for name in weights}
    texts = {"tokenizer.json": LATER_TOKENIZER, "tokenizer_config.json": content("config", 90)}
    expected |= {f"model/minimind-3v/{name}": text for name, text in texts.items()}
    found = tree(get.root)
    del found[".download.json"], older[".download.json"]
    assert found == older | expected
    hubs.requests.clear()
    capsys.readouterr()
    get(source, *flags)
    assert all("/tree/" in url or "/repo/" in url for _, _, _, url in hubs.requests)
    assert "0 B to download" in capsys.readouterr().out


def test_the_command_line_fetches_it(hubs, tmp_path):
    command = [sys.executable, "-m", "scripts.download", *LATER, "--what", "encoder", "data", "--root", str(tmp_path)]
    told = [subprocess.run(command, check=True, capture_output=True, text=True).stdout for _ in range(2)]
    assert "13 KB to download" in told[0] and "0 B to download" in told[1]
    assert "Next:\npython -m scripts.download --what llm --generation 3v" in told[1]


@pytest.mark.parametrize("moe", [[], ["--use_moe"]])
def test_the_scripts_find_what_was_fetched_of_the_later_generation(hubs, get, moe, monkeypatch):
    """Also where the older ones lie beside it, from within the folder and from elsewhere."""
    get("hf")
    elsewhere = get("hf", *LATER, *moe)
    monkeypatch.chdir(get.root)
    for commands in elsewhere, download.main([*LATER, *moe, "--source", "hf"]):
        for command, script in zip(commands, (train_pretrain_vlm, train_sft_vlm), strict=True):
            args, stage = script.parse_args(command[2:]), command[1].split("_")[1]
            assert command[1] == f"{script.__name__}.py"
            assert row_files(Path(args.data_path[0]))[0].resolve() == get.root / f"dataset/{stage}_data.parquet"
            name = f"{args.from_weight}_768{'_moe' if moe else ''}.pth"
            (get.root / "out" / name).touch()  # stage 1 makes what stage 2 takes
            weights = find_weights(args.from_weight, args.out_dir, args.hidden_size, args.use_moe)
            assert weights.resolve() == get.root / "out" / name
            for part, folder in (("tokenizer", "model/minimind-3v"), ("vision_model", SIGLIP)):
                flag = getattr(args, f"{part}_path")
                place = find_part(part, flag, weights, dict.fromkeys(["tokenizer", "vision_model"], {}), MINIMIND_3)
                assert Path(place).resolve() == get.root / folder and any(Path(place).iterdir())
    (get.root / "out" / name).unlink()
    (ask,) = download.main([*LATER, *moe, "--source", "hf", "--what", "vlm"])
    (get.root / "out/sft_vlm_1024.pth").touch()  # newer
    path = Path(f"out/sft_vlm_768{'_moe' if moe else ''}.pth")
    assert ask[1] == "eval_vlm.py" and choose_model(eval_vlm.parse_args(ask[2:])) == path


@pytest.mark.parametrize("source", SOURCES)
def test_names_that_are_a_little_different_are_found_in_the_later_generation_too(hubs, get, source):
    weights, texts = hubs.files["model", "minimind-3v-pytorch"], hubs.files["model", "minimind-3v"]
    weights["minimind-3v_llm-768.pth"] = weights.pop("llm_768.pth")
    weights["weights/sft-vlm-768.pth"] = weights.pop("sft_vlm_768.pth")
    weights["sft_vlm_multi_768.pth"] = b"another one"
    eyes = hubs.files["model", "siglip2-base-p32-256-ve"]
    eyes["vision.safetensors"] = eyes.pop("model.safetensors")
    del texts["tokenizer.json"]  # the folder of the experts has the same
    get(source, *LATER, "--what", "all", "vlm")
    assert (get.root / "out/llm_768.pth").read_bytes() == weights["minimind-3v_llm-768.pth"]
    assert (get.root / "out/sft_vlm_768.pth").read_bytes() == weights["weights/sft-vlm-768.pth"]
    assert (get.root / SIGLIP / "model.safetensors").read_bytes() == eyes["vision.safetensors"]
    assert (get.root / "model/minimind-3v/tokenizer.json").read_bytes() == LATER_TOKENIZER


def test_weights_of_the_other_generation_that_are_named_alike_are_not_replaced_unasked(hubs, get, capsys):
    get("hf", "--size", "104m", "--what", "llm")
    told = refused(capsys, get, "hf", *LATER, "--what", "llm")
    assert "out/llm_768.pth (30,000 bytes, expected 40,000)" in told and "--root" in told
    get("hf", *LATER, "--what", "llm", "--overwrite")
    assert (get.root / "out/llm_768.pth").read_bytes() == content("later llm_768.pth", 40_000)
    assert "llm 104m dense auto" not in json.loads((get.root / ".download.json").read_text())["asked"]
    hubs.files["model", "minimind-3v-pytorch"]["llm_768.pth"] = content("newer", 40_000)
    get("hf", *LATER, "--what", "llm")  # now it is this one's, and a newer one replaces it
    assert (get.root / "out/llm_768.pth").read_bytes() == content("newer", 40_000)
    assert "llm_768.pth" in refused(capsys, get, "hf", "--size", "104m", "--what", "llm")


def test_without_experts_on_the_hub_it_says_how_to_make_them(hubs, get, capsys):
    del hubs.files["model", "minimind-3v-pytorch"]["llm_768_moe.pth"]
    told = refused(capsys, get, "modelscope", *LATER, "--use_moe", "--what", "llm")
    assert "gongjy/minimind-3v-pytorch has no llm_768_moe.pth" in told
    args = train_pretrain_vlm.parse_args(told.splitlines()[-1].split()[2:])
    assert args.use_moe and args.from_weight == "out/llm_768.pth"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([*LATER, "--size", "104m"], "leave --size and --encoder out"),
        ([*LATER, "--encoder", "dinov2"], "leave --size and --encoder out"),
        (["--what", "clip", "vlm", "--encoder", "dinov2"], "trained models have theirs"),
        (["--what", "llm", "--encoder", "dinov2"], "Use it with --what encoder"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit):
        download.parse_args(flags)
    assert said in capsys.readouterr().err


# ---------------------------------------------------------------------------- other encoders


@pytest.mark.parametrize(("encoder", "source"), list(zip(ENCODERS, SOURCES * 4)))
def test_any_encoder_goes_into_a_folder_of_its_own_with_how_to_train_with_it(hubs, get, source, encoder, monkeypatch):
    get(source, "--what", "llm", "data")
    (command, sft) = get(source, "--what", "clip", "--encoder", encoder)
    folder = get.root / "model/vision_model" / ENCODERS[encoder].split("/")[1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["config.json", "preprocessor_config.json", "model.safetensors"]
    )
    for args in train_pretrain_vlm.parse_args(command[2:]), train_sft_vlm.parse_args(sft[2:]):
        assert args.vision_model_path == str(folder)
    monkeypatch.chdir(get.root)
    commands = download.main(["--source", source, "--what", "encoder", "--encoder", encoder])
    eyes = ["--vision_model_path", str(folder.relative_to(get.root))]
    assert commands == [["python", "train_pretrain_vlm.py", *eyes], ["python", "train_sft_vlm.py", *eyes]]
    hubs.requests.clear()
    download.main(["--source", source, "--what", "encoder", "--encoder", encoder])
    assert all("/tree/" in url or "/repo/" in url for _, _, _, url in hubs.requests)


def test_an_encoder_alone_comes_with_what_else_is_needed(hubs, get):
    fetch, train = get("hf", "--what", "encoder", "--encoder", "dinov2")
    assert fetch[2:] == ["scripts.download", "--what", "llm", "data", "--root", str(get.root)]
    assert train_pretrain_vlm.parse_args(train[2:]).vision_model_path.endswith("vision_model/dinov2-base")
    get("hf", "--what", *fetch[4:6])
    args = train_pretrain_vlm.parse_args(train[2:])
    assert row_files(Path(args.data_path[0])) == [get.root / "dataset/pretrain_data.jsonl"]


@pytest.mark.parametrize(("source", "page"), [("hf", "huggingface.co/"), ("modelscope", "modelscope.cn/models/")])
def test_terms_to_accept_are_named_with_their_page(hubs, get, source, page, capsys):
    fault(hubs, "config.json", 403, times=100)
    told = refused(capsys, get, source, "--what", "clip", "--encoder", "dinov3")
    assert f"on {page}facebook/dinov3-vitb16-pretrain-lvd1689m, and export" in told
    fault(hubs, "/tree/|/repo/", 404, times=100)
    assert "Or try the other hub: --source" in refused(capsys, get, source, "--what", "clip", "--encoder", "vit")


# ---------------------------------------------------------------------------- what goes wrong on the way


@pytest.mark.parametrize("source", SOURCES)
def test_a_cut_connection_goes_on_where_it_was(hubs, get, source):
    fault(hubs, "llm_512", "cut", times=2)
    get(source, "--what", "llm")
    ranges = [r for _, r, _, url in asked_for(hubs, "llm_512.pth") if "/resolve/" not in url]
    assert ranges == [None, "bytes=15000-", "bytes=22500-"] and hubs.packed == 0
    assert (get.root / "out/llm_512.pth").read_bytes() == content("llm_512.pth", 30_000)


@pytest.mark.parametrize("source", SOURCES)
def test_a_server_that_sends_all_again_is_taken_at_its_word(hubs, get, source, capsys):
    fault(hubs, "llm_512", "cut")
    fault(hubs, "llm_512", "whole")
    get(source, "--what", "llm")
    assert (get.root / "out/llm_512.pth").read_bytes() == content("llm_512.pth", 30_000)
    assert [f.times for f in hubs.faults] == [0, 0] and "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("later", SOURCES)
@pytest.mark.parametrize("first", SOURCES)
def test_the_next_run_goes_on_where_one_ended_also_from_the_other_hub(hubs, get, first, later, capsys):
    fault(hubs, "llm_512", "cut")
    fault(hubs, "llm_512", 403, times=100)
    assert "HTTP 403" in refused(capsys, get, first, "--what", "llm")
    assert not (get.root / "out/llm_512.pth").exists()
    hubs.faults.clear()
    hubs.requests.clear()
    get(later, "--what", "llm")
    assert "15 KB already here" in capsys.readouterr().out
    assert {r for _, r, _, _ in asked_for(hubs, "llm_512.pth")} == {"bytes=15000-"}
    assert (get.root / "out/llm_512.pth").read_bytes() == content("llm_512.pth", 30_000)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])  # in LFS, and in git
def test_a_damaged_file_is_fetched_once_more(hubs, get, source, name, capsys):
    fault(hubs, name, "corrupt")
    get(source, "--what", "clip")
    assert (get.root / CLIP / name).read_bytes() == content(name, 900)
    assert f"{name} arrived damaged" in capsys.readouterr().out


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("kind", ["corrupt", "short"])
def test_a_file_that_stays_damaged_is_refused_and_not_kept(hubs, get, source, kind, capsys):
    fault(hubs, "model.safetensors", kind, times=100)
    told = refused(capsys, get, source, "--what", "clip")
    assert "differs twice from" in told and "model.safetensors" in told
    assert not [name for name in get.root.rglob("*") if "safetensors" in name.name or name.name == ".download"]


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_not_there_is_said_with_what_is(hubs, get, source, capsys):
    del hubs.files["model", "MiniMind2-V-PyTorch"]["llm_512.pth"]
    told = refused(capsys, get, source, "--what", "llm")
    assert "no llm_512.pth or lm_512.pth" in told and "llm_768.pth, llm_768_moe.pth" in told
    told = refused(capsys, get, source, "--what", "vlm", "--size", "104m")
    assert "no pretrain_vlm_768.pth or sft_vlm_768.pth" in told
    del hubs.files["model", "clip-vit-base-patch16"]
    told = refused(capsys, get, source, "--what", "clip")
    assert "has no open" in told and "HTTP 404" in told and "--source" in told
    hubs.files["dataset", "minimind-v_dataset"]["a/sft_data.jsonl"] = b"1"
    hubs.files["dataset", "minimind-v_dataset"]["b/sft_data.jsonl"] = b"2"
    del hubs.files["dataset", "minimind-v_dataset"]["sft_data.jsonl"]
    assert "several files sft_data.jsonl: a/sft" in refused(capsys, get, source, "--what", "data")
    assert not get.root.exists()


@pytest.mark.parametrize("source", SOURCES)
def test_a_listed_file_that_cannot_be_fetched_is_named(hubs, get, source, capsys):
    fault(hubs, "llm_512", 404, times=100)
    told = refused(capsys, get, source, "--what", "llm")
    assert "MiniMind2-V-PyTorch/llm_512.pth" in told and "HTTP 404" in told


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("status", [401, 403])
def test_a_private_repository_asks_for_a_token(hubs, get, source, status, capsys):
    fault(hubs, "/tree/|/repo/", status, times=100)
    token = {"hf": "HF_TOKEN=...", "modelscope": "MODELSCOPE_API_TOKEN=..."}[source]
    told = refused(capsys, get, source, "--what", "clip")
    assert f"HTTP {status}" in told and token in told and "clip-vit-base-patch16" in told


@pytest.mark.parametrize(("source", "name"), [("hf", "HF_TOKEN"), ("modelscope", "MODELSCOPE_API_TOKEN")])
def test_the_token_is_sent_with_every_request(hubs, get, source, name, monkeypatch):
    monkeypatch.setenv(name, "hf_secret")
    get(source, "--what", "llm")
    relevant = [r for r in hubs.requests if "internalAcceleration" not in r[0]]
    assert len(relevant) >= 5 and {login for _, _, login, _ in relevant} == {"Bearer hf_secret"}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("where", ["/tree/|/repo/", "llm_512"])
def test_too_many_requests_are_waited_for_a_few_times(hubs, get, source, where, capsys):
    fault(hubs, where, 429, times=2)
    get(source, "--what", "llm")
    assert (get.root / "out/llm_512.pth").is_file()
    shutil.rmtree(get.root)
    fault(hubs, where, 429, times=1000)
    told = refused(capsys, get, source, "--what", "llm")
    assert "HTTP 429" in told and "Wait a few minutes" in told
    assert hubs.faults[1].times < 998


def test_without_room_nothing_is_begun(hubs, get, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=30_000))
    told = refused(capsys, get, "hf", "--what", "llm")
    assert "31 KB are to be downloaded" in told and "30 KB left" in told and "--root" in told
    assert not get.root.exists() and not asked_for(hubs, ".pth")


@pytest.mark.parametrize("source", SOURCES)
def test_on_a_disk_that_fills_up_what_is_there_stays(hubs, get, source, capsys):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        told = refused(capsys, get, source, "--what", "llm")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "cannot write more" in told and os.strerror(errno.EFBIG) in told and "to resume" in told
    assert not (get.root / "out/llm_512.pth").exists()
    hubs.requests.clear()
    get(source, "--what", "llm")
    ranges = {r for _, r, _, _ in asked_for(hubs, "llm_512.pth")}
    assert len(ranges) == 1 and ranges != {None}
    assert (get.root / "out/llm_512.pth").read_bytes() == content("llm_512.pth", 30_000)


def test_without_network_both_hubs_are_named_and_what_is_there_suffices(hubs, get, capsys, monkeypatch):
    get("hf", "--what", "llm")
    capsys.readouterr()
    nowhere = [closed_port(), closed_port()]
    monkeypatch.setenv("HF_ENDPOINT", nowhere[0])
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", nowhere[1])
    assert get("auto", "--what", "llm")
    assert "All files are here already" in capsys.readouterr().out
    told = refused(capsys, get, "auto")
    assert all(url in told for url in nowhere) and "HTTPS_PROXY" in told and "HF_ENDPOINT=" in told
    assert "--source modelscope" in refused(capsys, get, "hf")
    (get.root / "out/llm_512.pth").write_bytes(b"")
    assert "no answer" in refused(capsys, get, "auto", "--what", "llm")


def test_the_first_hub_that_answers_is_taken(hubs, get, capsys, monkeypatch):
    get("auto", "--what", "clip")
    assert any("/resolve/" in url for _, _, _, url in hubs.requests)
    shutil.rmtree(get.root)
    hubs.requests.clear()
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    get("auto", "--what", "clip")
    assert hubs.requests and all("/api/v1/" in url for _, _, _, url in hubs.requests)


@pytest.mark.parametrize(("source", "name"), [("hf", "HF_ENDPOINT"), ("modelscope", "MODELSCOPE_ENDPOINT")])
def test_a_proxy_is_used(hubs, get, source, name, monkeypatch):
    monkeypatch.setenv(name, "http://hub.invalid")
    monkeypatch.setenv("HTTP_PROXY", hubs.url)
    monkeypatch.setenv("http_proxy", hubs.url)
    get(source, "--what", "clip")
    assert (get.root / CLIP / "model.safetensors").is_file()
    assert all(url.startswith("http://hub.invalid/") for _, _, _, url in hubs.requests)


def test_when_the_network_goes_away_the_other_hub_is_offered(hubs, get, capsys, monkeypatch):
    def gone(self, file, target):
        raise ConnectionResetError("the cable")

    monkeypatch.setattr(HuggingFace, "fetch", gone)
    told = refused(capsys, get, "hf", "--what", "llm")
    assert "the cable" in told and "again to resume" in told and "--source modelscope" in told


# ---------------------------------------------------------------------------- what is already there


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("repo", "flags"), [("MiniMind2-Small-V", []), ("minimind-3v", LATER)])
def test_the_tokenizer_of_another_generation_is_refused(hubs, get, source, repo, flags, capsys):
    hubs.files["model", repo]["tokenizer.json"] = TOKENIZER if flags else content("a later generation", 700)
    told = refused(capsys, get, source, "--what", "llm", *flags)
    assert f"{repo}/tokenizer.json is not the tokenizer of these weights" in told
    assert not [name for name in tree(get.root) if "tokenizer.json" in name]


@pytest.mark.parametrize("source", SOURCES)
def test_a_file_that_was_brought_by_hand_is_verified_instead_of_fetched(hubs, get, source):
    (get.root / "out").mkdir(parents=True)
    (get.root / "out/llm_512.pth").write_bytes(content("llm_512.pth", 30_000))
    (get.root / "model").mkdir()
    (get.root / "model/tokenizer.json").write_bytes(TOKENIZER)
    get(source, "--what", "llm")
    assert not asked_for(hubs, "llm_512.pth") and not asked_for(hubs, "tokenizer.json")


def test_what_is_verified_from_one_hub_is_not_fetched_from_the_other(hubs, get):
    get("hf")
    hubs.requests.clear()
    get("modelscope")
    assert all("/repo/" in url for _, _, _, url in hubs.requests)


def test_your_own_weights_are_only_replaced_if_you_say_so(hubs, get, capsys):
    get("hf", "--what", "vlm")
    mine = get.root / "out/pretrain_vlm_512.pth"
    mine.write_bytes(b"hours of training")
    mine.with_suffix(".json").write_text("{}")
    hubs.requests.clear()
    told = refused(capsys, get, "hf", "--what", "vlm")
    assert "pretrain_vlm_512.pth (17 bytes, expected 30,000)" in told and "--overwrite" in told
    assert mine.read_bytes() == b"hours of training" and not asked_for(hubs, ".pth")
    get("hf", "--what", "vlm", "--overwrite")
    assert mine.read_bytes() == content("pretrain_vlm_512.pth", 30_000)
    assert not mine.with_suffix(".json").exists()  # it spoke of the other weights


def test_a_newer_file_on_the_hub_replaces_the_one_that_came_from_there(hubs, get):
    get("modelscope", "--what", "clip")
    hubs.files["model", "clip-vit-base-patch16"]["config.json"] = b"{}"
    get("modelscope", "--what", "clip")
    assert (get.root / CLIP / "config.json").read_bytes() == b"{}"


def test_without_its_record_everything_is_verified_anew(hubs, get):
    get("hf", "--what", "clip")
    (get.root / ".download.json").write_text("not JSON")
    hubs.requests.clear()
    get("hf", "--what", "clip")
    assert all("/tree/" in url for _, _, _, url in hubs.requests)


def test_it_starts_without_loading_torch():
    code = "import sys, scripts.download.__main__; assert not {'torch', 'modelscope', 'requests'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
