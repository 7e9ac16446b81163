"""model/weights.py: saving, full disks, and loading only parts that belong together."""

import errno
import io
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPModel

from common.files import write_safely
from model import build, weights
from model.build import build_model, load_weights, upcycle
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig
from model.weights import (
    find_weights,
    known_names,
    make_sidecar,
    read_sidecar,
    read_weights,
    refuse_other_architecture,
    save_weights,
    weights_name,
)
from scripts import train_llm, train_tokenizer
from tests.conftest import lively, turn, write_rows
from train_sft_vlm import parse_args


@pytest.fixture
def args(flags):
    return parse_args(flags)


@pytest.fixture
def bare(flags):
    """Flags that name weights and no architecture, which is then read from the weights."""
    kept = flags[: flags.index("--hidden_size")]
    return parse_args(kept)


def save(args, stage="sft_vlm", **config) -> tuple[Path, MiniMindVLM]:
    """A random model as training leaves it: weights and their JSON."""
    torch.manual_seed(5)
    for key, value in config.items():
        setattr(args, key, value)
    model, _, origin = build_model(args, None)
    path = Path(args.out_dir) / weights_name(stage, model.config)
    save_weights(path, model, make_sidecar(model, origin, step=7))
    return path, model


# ---------------------------------------------------------------------------- writing


def public_shapes(moe: bool) -> dict:
    """Names and shapes as in the public files, at width 64, 2 layers, 300 tokens, an encoder of width 32."""
    shapes = {"model.embed_tokens.weight": (300, 64), "lm_head.weight": (300, 64), "model.norm.weight": (64,)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (64, 64) for name in "qo"}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (16, 64) for name in "kv"}
        shapes |= {f"{layer}.{name}_layernorm.weight": (64,) for name in ("input", "post_attention")}
        parts = ["experts.0.", "experts.1.", "experts.2.", "experts.3.", "shared_experts.0."] if moe else [""]
        for part in parts:
            shapes |= {f"{layer}.mlp.{part}{name}_proj.weight": (192, 64) for name in ("gate", "up")}
            shapes[f"{layer}.mlp.{part}down_proj.weight"] = (64, 192)
        if moe:
            shapes[f"{layer}.mlp.gate.weight"] = (4, 64)
    return shapes | {"vision_proj.vision_proj.0.weight": (64, 32), "vision_proj.vision_proj.0.bias": (64,)}


def test_answers_end_where_the_tokenizer_says(flags, tokenizer_folder, tmp_path):
    """A tokenizer from elsewhere, in which <|im_end|> is not 2."""
    folder = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, folder)
    found = json.loads((folder / "tokenizer.json").read_text())
    ids = {"<|im_start|>": 2, "<|im_end|>": 1}
    found["model"]["vocab"] |= ids
    for token in found["added_tokens"]:
        token["id"] = ids.get(token["content"], token["id"])
    (folder / "tokenizer.json").write_text(json.dumps(found))
    model, tokenizer, _ = build_model(parse_args([*flags, "--tokenizer_path", str(folder)]), None)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 1
    assert (model.config.eos_token_id, model.generation_config.eos_token_id, model.config.bos_token_id) == (1, 1, 2)


@pytest.mark.parametrize("moe", [False, True])
def test_a_file_of_weights_is_the_public_one_in_fp16_without_the_encoder(args, moe):
    path, model = save(args, use_moe=moe)
    state = torch.load(path, weights_only=True)
    assert path.name == ("sft_vlm_64_moe.pth" if moe else "sft_vlm_64.pth")
    assert {key: tuple(value.shape) for key, value in state.items()} == public_shapes(moe)
    assert {value.dtype for value in state.values()} == {torch.float16}
    assert all(torch.equal(value, model.state_dict()[key].half()) for key, value in state.items())
    assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()  # stored once


def test_the_json_next_to_weights_describes_them(args):
    path, _ = save(args)
    about = json.loads(path.with_suffix(".json").read_text())
    assert {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "use_moe": False}.items() <= about[
        "config"
    ].items()
    assert len(about["tokenizer"]["sha256"]) == len(about["vision_model"]["sha256"]) == 64
    assert about["versions"]["torch"] == torch.__version__ and about["step"] == 7 and about["command"]


def full_disk(file):
    file.write(b"x" * 1000)
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failure", ["write", "flush", "rename"])
def test_a_write_that_fails_leaves_the_last_good_file_and_nothing_else(tmp_path, monkeypatch, failure):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"good")
    if failure == "flush":  # where a full disk shows on a network drive
        monkeypatch.setattr(os, "fsync", lambda fd: full_disk(io.BytesIO()))
    if failure == "rename":
        monkeypatch.setattr(Path, "replace", lambda *_: full_disk(io.BytesIO()))
    with pytest.raises(OSError, match=r"could not write .*weights.pth .the disk is full.; nothing was overwritten"):
        write_safely(path, full_disk if failure == "write" else lambda file: file.write(b"new"))
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pth"]
    assert path.read_bytes() == b"good"


def test_weights_that_do_not_fit_on_the_disk_leave_the_last_good_ones(args):
    """With a real limit on the size of files, which torch.save runs into half way."""
    path, model = save(args)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    with torch.no_grad():
        model.model.norm.weight.fill_(3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not write .*sft_vlm_64.pth"):
            save_weights(path, model, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])  # fp16 ends at 65504
def test_weights_that_are_not_finite_in_fp16_are_not_saved(args, value):
    path, model = save(args)
    before = path.read_bytes()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(
        ValueError, match=r"model.layers.1.mlp.up_proj.weight .* not finite in fp16; .* was not changed"
    ):
        save_weights(path, model, {})
    assert path.read_bytes() == before


# ---------------------------------------------------------------------------- reading


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("name", ["evil.pth", "folder/pytorch_model.bin"])
@pytest.mark.parametrize("write", [torch.save, lambda value, path: Path(path).write_bytes(pickle.dumps(value, 2))])
def test_a_file_that_would_run_code_is_refused_and_runs_nothing(bare, tmp_path, write, name):
    victim, path = tmp_path / "it_ran", tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write({"model.norm.weight": Payload(f"touch {victim}")}, path)
    (path.parent / "config.json").write_text('{"model_type": "minimind-v"}')
    given = find_weights(str(path if name == "evil.pth" else path.parent), bare.out_dir, None, False)
    with pytest.raises(ValueError, match=f"{name} is not a file of weights that can .* it would call posix.system"):
        build_model(bare, given)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Payload(f"touch {victim}")))  # the payload is a real one
    assert victim.exists()


def test_a_file_cut_short_is_refused_in_one_line(args):
    path, _ = save(args)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="sft_vlm_64.pth is not a file of weights") as error:
        read_weights(path)
    assert "\n" not in str(error.value)


def test_names_that_do_not_match_are_an_error_that_names_them(make_vlm):
    """Loaded with strict=False alone, such a file leaves the model at random: the loss starts at 8 and stays there."""
    model = make_vlm()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {f"net.{key}": torch.zeros_like(value) for key, value in model.text_state_dict().items()}
    with pytest.raises(ValueError) as error:
        load_weights(model, state, "wrong.pth")
    assert "wrong.pth does not fit this model" in str(error.value)
    assert "21 missing, first: model.embed_tokens.weight" in str(error.value)
    assert "unknown, first: net.model." in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "change, problem",
    [
        (lambda state: state.pop("model.norm.weight"), "1 missing, first: model.norm.weight. Likely: an incomplete"),
        (lambda state: state.update(extra=torch.ones(1)), "1 unknown, first: extra"),
        (lambda state: state.update({"lm_head.weight": torch.ones(300, 64)}), "lm_head and embed_tokens differ"),
        (
            lambda state: state.update({"vision_proj.vision_proj.0.weight": torch.ones(64, 16)}),
            r"1 of another shape, first: vision_proj.vision_proj.0.weight is .*, expected \(64, 32\). Likely: .*vision",
        ),
    ],
)
def test_a_single_tensor_that_is_wrong_is_named(make_vlm, change, problem):
    model = make_vlm()
    state = dict(model.text_state_dict())
    change(state)
    with pytest.raises(ValueError, match=problem):
        load_weights(model, state, "wrong.pth")


def test_a_language_model_gives_all_but_the_projector_and_this_is_reported(make_vlm):
    model, other = make_vlm(), make_vlm()
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.normal_()
    state = {key: value for key, value in other.state_dict().items() if key.startswith("model.")}  # lm_head is tied
    projector = model.vision_proj.vision_proj[0].weight.clone()
    line = load_weights(model, known_names(state)[0], "llm_64.pth")
    assert line == "loaded 21 tensors from llm_64.pth; new: projector"
    assert torch.equal(model.lm_head.weight, other.model.embed_tokens.weight)
    assert torch.equal(model.vision_proj.vision_proj[0].weight, projector)
    whole, older, ignored = known_names(other.state_dict())
    assert load_weights(model, whole, "whole.pth") == "loaded 23 tensors from whole.pth" and not older
    assert ignored and all(key.startswith("vision_encoder.") for key in ignored)


@pytest.mark.parametrize(
    "config, cause",
    [
        ({"hidden_size": 128}, "another hidden_size or vocabulary"),
        ({"num_hidden_layers": 3}, "another number of layers"),
        ({"num_hidden_layers": 1}, "another number of layers"),
        ({"use_moe": True}, "one is a mixture of experts, the other dense"),
    ],
)
def test_a_mismatch_is_reported_with_its_likely_cause(make_vlm, config, cause):
    one, other = make_vlm(), make_vlm(**config)
    for model, state in ((one, other.text_state_dict()), (other, one.text_state_dict())):
        with pytest.raises(ValueError, match=f"x.pth does not fit this model: .* first: .*Likely: {cause}"):
            load_weights(model, state, "x.pth")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_the_prefix_of_a_wrapper_is_removed(make_vlm, prefix):
    state = make_vlm().text_state_dict()
    found, older, ignored = known_names({prefix + key: value for key, value in state.items()})
    assert set(found) == set(state) and not older and not ignored


def test_the_architecture_is_read_off_the_file_with_and_without_its_json(args, bare):
    path, model = save(args, hidden_size=128, num_hidden_layers=3, use_moe=True)
    for json_there in (True, False):
        if not json_there:
            path.with_suffix(".json").unlink()
        loaded, _, origin = build_model(bare, path)
        assert f"loaded {len(loaded.text_state_dict())} tensors from {path}" in origin.note
        assert ("warning" in origin.note) != json_there  # the JSON records the tokenizer
        assert (loaded.config.hidden_size, loaded.config.num_hidden_layers, loaded.config.use_moe) == (128, 3, True)
        assert (loaded.config.intermediate_size, loaded.config.vocab_size) == (model.config.intermediate_size, 300)
        for key, value in loaded.text_state_dict().items():
            assert value.dtype == torch.float32 and torch.equal(value, model.state_dict()[key].half().float())


def test_the_json_supplies_facts_that_shapes_do_not_contain(args, bare):
    """Four heads of 16 with one key/value head, and another theta: the same shapes as other numbers would give."""
    args.num_attention_heads, args.num_key_value_heads = 4, 1
    model, _, origin = build_model(args, None)
    model = MiniMindVLM(VLMConfig(**model.config.to_dict() | {"rope_theta": 5e5}), args.vision_model_path)
    path = Path(args.out_dir) / "sft_vlm_64.pth"
    save_weights(path, model, make_sidecar(model, origin))
    loaded, _, _ = build_model(bare, path)
    assert (loaded.config.num_attention_heads, loaded.config.num_key_value_heads) == (4, 1)
    assert loaded.config.rope_theta == 5e5
    path.with_suffix(".json").unlink()
    half, _, _ = build_model(bare, path)  # as wide as the public 8 and 2: taken for these
    assert (half.config.num_attention_heads, half.config.num_key_value_heads) == (8, 2)
    bare.num_attention_heads = 4  # without a JSON, the flag is needed
    loaded, _, _ = build_model(bare, path)
    assert (loaded.config.num_attention_heads, loaded.config.num_key_value_heads) == (4, 1)
    for wrong in (1, 3, 1000):
        bare.num_attention_heads = wrong
        with pytest.raises(ValueError, match=f"num_attention_heads={wrong} does not fit .*sft_vlm_64.pth"):
            build_model(bare, path)


@pytest.mark.parametrize(
    "flag, value, has",
    [
        *(("hidden_size", 128, 64), ("num_hidden_layers", 3, 2)),
        *(("num_attention_heads", 4, 8), ("num_key_value_heads", 4, 2)),
    ],
)
def test_a_flag_that_contradicts_the_file_is_refused(args, bare, flag, value, has):
    path, _ = save(args)
    setattr(bare, flag, value)
    with pytest.raises(ValueError, match=f"--{flag} {value}: .*sft_vlm_64.pth has {has}; omit the flag"):
        build_model(bare, path)


def test_a_json_of_other_weights_is_refused(args, bare):
    path, _ = save(args)
    deeper, _ = save(args, num_hidden_layers=3, stage="pretrain_vlm")
    shutil.copy(deeper.with_suffix(".json"), path.with_suffix(".json"))
    with pytest.raises(ValueError, match="says num_hidden_layers=3, but sft_vlm_64.pth contains 2: they do not fit"):
        build_model(bare, path)


def test_another_tokenizer_is_refused_by_its_hash_and_by_its_size(args, bare, tmp_path):
    path, _ = save(args)
    rows = [
        {
            "conversations": [
                turn("user", "zebra xylophone " * 9),
                turn("assistant", "quux corge grault waldo fred plugh " * 9),
            ]
        }
    ]
    data = write_rows(tmp_path / "words.jsonl", rows)

    def train(size):
        bare.tokenizer_path = str(tmp_path / str(size))
        train_tokenizer.main(["--data_path", str(data), "--out_dir", bare.tokenizer_path, "--vocab_size", str(size)])

    train(290)
    with pytest.raises(ValueError, match=r"290 has 290 tokens, .* was trained with 300: pass the --tokenizer_path"):
        build_model(bare, path)
    train(300)
    with pytest.raises(ValueError, match=f"300 is not the tokenizer of .*, which is {args.tokenizer_path}"):
        build_model(bare, path)


def test_another_encoder_is_refused(args, bare, tmp_path):
    path, _ = save(args)
    bare.vision_model_path = str(tmp_path / "clip")
    shutil.copytree(args.vision_model_path, bare.vision_model_path)
    build_model(bare, path)  # a copy elsewhere is the same encoder
    model = CLIPModel.from_pretrained(args.vision_model_path)
    with torch.no_grad():
        model.vision_model.encoder.layers[0].mlp.fc1.weight[0, 0] += 1
    model.save_pretrained(bare.vision_model_path)
    with pytest.raises(ValueError, match=f"clip is not the encoder of .*, which is {args.vision_model_path}"):
        build_model(bare, path)


def test_tokenizer_and_encoder_are_those_that_the_json_names(args, bare, tmp_path):
    path, _ = save(args)
    named = bare.tokenizer_path, bare.vision_model_path
    bare.tokenizer_path = bare.vision_model_path = None
    _, _, origin = build_model(bare, path)
    assert (origin.tokenizer_path, origin.vision_model_path) == named
    about = json.loads(path.with_suffix(".json").read_text())
    about["vision_model"]["path"] = str(tmp_path / "gone")
    path.with_suffix(".json").write_text(json.dumps(about))
    message = (
        r"sft_vlm_64.json names the vision_model .*gone, which does not exist\n\(looked in .*Pass it with --vision_m"
    )
    with pytest.raises(FileNotFoundError, match=message):
        build_model(bare, path)


@pytest.mark.parametrize("json_there", [True, False])
def test_the_flags_stay_as_they_were_given(args, bare, json_there):
    path, _ = save(args)
    if json_there:  # which names both folders
        bare.tokenizer_path = bare.vision_model_path = None
    else:
        path.with_suffix(".json").unlink()
    for flags, given, training in ((args, None, True), (bare, path, True), (bare, path, False)):
        before = dict(vars(flags))
        build_model(flags, given, training=training)
        assert vars(flags) == before


def test_weights_without_a_recorded_encoder_are_loaded_without_hashing_it(args, bare, monkeypatch):
    """It takes a second, of every question that the public weights are asked."""
    path, _ = save(args)
    path.with_suffix(".json").unlink()
    monkeypatch.setattr(build, "fingerprint", lambda encoder: 1 / 0)
    build_model(bare, path)


def test_tokenizer_and_encoder_are_found_from_elsewhere_and_where_they_were_moved(args, bare, tmp_path, monkeypatch):
    """Named relative to the folder where training was started, or next to the weights in a renamed folder."""
    path, _ = save(args)
    about = json.loads(path.with_suffix(".json").read_text())
    shutil.copytree(about["vision_model"]["path"], path.parent / "run/clip")
    shutil.copytree(about["tokenizer"]["path"], path.parent / "words")
    about["vision_model"]["path"], about["tokenizer"]["path"] = "run/clip", "an/older/place/words"
    path.with_suffix(".json").write_text(json.dumps(about))
    renamed = path.parent.rename(tmp_path / "renamed") / path.name
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    bare.tokenizer_path = bare.vision_model_path = None
    _, _, origin = build_model(bare, renamed)
    assert origin.vision_model_path == str(renamed.parent / "run/clip")
    assert origin.tokenizer_path == str(renamed.parent / "words")


def test_heads_that_no_public_file_has_are_asked_for(args, bare):
    """Read as 8 and 8, such a file would load and talk nonsense."""
    args.num_attention_heads = args.num_key_value_heads = 4
    path, _ = save(args)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="with width 64 and keys of 64. Pass the --num_attention_heads"):
        build_model(bare, path)
    bare.num_attention_heads = 4
    assert build_model(bare, path)[0].config.num_key_value_heads == 4


def no_heads(state):
    state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(7)


def clip(state):
    state.clear()
    state["vision_model.embeddings.class_embedding"] = torch.ones(32)


def checkpoint(state):
    whole = dict(state)
    state.clear()
    state.update(weights=whole, step=3)


@pytest.mark.parametrize(
    "change, message",
    [
        (no_heads, "q_norm of 7 does not fit queries of 64 and keys of 16. Download the file again"),
        (
            clip,
            "has no model.embed_tokens.weight .first tensor: vision_model.embeddings.*: this is an encoder; pass its",
        ),
        (checkpoint, "has no model.embed_tokens.weight .first tensor: none.: this is not a known form of MiniMind"),
        (lambda state: state.pop("model.layers.0.mlp.up_proj.weight"), "has no model.layers.0.mlp.up_proj.weight"),
        (lambda state: state.pop("model.layers.1.mlp.up_proj.weight"), "1 missing, first: model.layers.1.mlp.up_proj"),
    ],
)
def test_weights_of_other_models_are_refused_with_an_error_that_names_them(args, bare, change, message):
    path, _ = save(args)
    path.with_suffix(".json").unlink()
    state = torch.load(path)
    change(state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"sft_vlm_64.pth:? {message}|sft_vlm_64.pth does not fit .*{message}"):
        build_model(bare, path)


# ---------------------------------------------------------------------------- the tokenizer of weights without JSON


def test_known_fingerprints_decide_for_weights_without_json(args, bare, monkeypatch):
    path, _ = save(args)
    path.with_suffix(".json").unlink()
    note = build_model(bare, path)[2].note
    assert "warning: " in note and "is not the public one" in note
    mine = weights.tokenizer_hash(bare.tokenizer_path)
    monkeypatch.setattr(build, "PUBLIC_TOKENIZER", mine)
    assert build_model(bare, path)[2].note == f"loaded 23 tensors from {path}"
    monkeypatch.setattr(build, "LATER_TOKENIZER", mine)
    with pytest.raises(ValueError, match="(?s)the tokenizer of a later generation .*: python -m scripts.download"):
        build_model(bare, path)


def test_a_tokenizer_with_the_placeholder_elsewhere_is_refused(args, bare, tmp_path):
    """As many tokens, and every one of them another."""
    path, _ = save(args)
    path.with_suffix(".json").unlink()
    bare.tokenizer_path = str(shutil.copytree(args.tokenizer_path, tmp_path / "other"))
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    vocab["@"], vocab["!"] = vocab["!"], vocab["@"]
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="other has the id 3 for '@', but .* with the id 34. Pass that"):
        build_model(bare, path)


# ---------------------------------------------------------------------------- before April 2025


def older_state(moe: bool) -> dict[str, torch.Tensor]:
    """Random fp16 weights, 64 wide, 2 layers, 300 tokens, with the names and buffers of then."""
    shapes = {"tok_embeddings.weight": (300, 64), "norm.weight": (64,)}
    for i in range(2):
        shapes |= {
            f"layers.{i}.attention.{w}.weight": (16 if w in ("wk", "wv") else 64, 64) for w in ("wq", "wk", "wv")
        }
        shapes |= {f"layers.{i}.attention.wo.weight": (64, 64)}
        shapes |= {f"layers.{i}.{norm}_norm.weight": (64,) for norm in ("attention", "ffn")}
        for part in ("experts.0.", "experts.1.", "experts.2.", "experts.3.", "shared_experts.") if moe else ("",):
            shapes |= {f"layers.{i}.feed_forward.{part}{w}.weight": (192, 64) for w in ("w1", "w3")}
            shapes[f"layers.{i}.feed_forward.{part}w2.weight"] = (64, 192)
        if moe:
            shapes[f"layers.{i}.feed_forward.gate.weight"] = (4, 64)
    random = torch.Generator().manual_seed(3)
    state = {key: 0.15 * torch.randn(shape, generator=random) + (len(shape) == 1) for key, shape in shapes.items()}
    state = {key: value.half() for key, value in state.items()}
    state["output.weight"] = state["tok_embeddings.weight"]
    buffers = {"pos_cis": torch.ones(9, 4, dtype=torch.complex64), "layers.0.attention.mask": torch.ones(1, 1, 9, 9)}
    return state | buffers


def older_logits(state, ids):
    """The older network, one row of tokens at a time, in double precision, written from its description."""
    state = {key: value.double() for key, value in state.items() if key != "pos_cis"}
    T, d = len(ids), 8
    turns = torch.outer(torch.arange(T, dtype=torch.double), 1e6 ** (-torch.arange(0, d, 2, dtype=torch.double) / d))
    turns = torch.polar(torch.ones_like(turns), turns)[:, None]  # (T, 1, d/2)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * state[f"{name}.weight"]

    def linear(x, name):
        return x @ state[f"{name}.weight"].T

    def rotate(x):  # neighbours are real and imaginary part
        pairs = torch.view_as_complex(x.reshape(T, -1, d // 2, 2))
        return torch.view_as_real(pairs * turns).reshape(x.shape)

    def feed_forward(x, name):
        return linear(F.silu(linear(x, f"{name}.w1")) * linear(x, f"{name}.w3"), f"{name}.w2")

    def experts(x, name):
        out = feed_forward(x, f"{name}.shared_experts")
        for t, scores in enumerate(linear(x, f"{name}.gate").softmax(-1)):
            best = scores.topk(2)
            for score, e in zip(best.values / best.values.sum(), best.indices.tolist()):
                out[t] += score * feed_forward(x[t], f"{name}.experts.{e}")
        return out

    x = state["tok_embeddings.weight"][ids]
    for i in range(2):
        h, name = norm(x, f"layers.{i}.attention_norm"), f"layers.{i}.attention"
        q = rotate(linear(h, f"{name}.wq").view(T, 8, d))
        k, v = rotate(linear(h, f"{name}.wk").view(T, 2, d)), linear(h, f"{name}.wv").view(T, 2, d)
        heads = []
        for head in range(8):
            scores = q[:, head] @ k[:, head // 4].T / d**0.5
            scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, head // 4])
        x = x + linear(torch.cat(heads, -1), f"{name}.wo")
        h, name = norm(x, f"layers.{i}.ffn_norm"), f"layers.{i}.feed_forward"
        x = x + (experts(h, name) if f"{name}.gate.weight" in state else feed_forward(h, name))
    return linear(norm(x, "norm"), "output")


@torch.no_grad()
@pytest.mark.parametrize("moe", [False, True])
def test_older_weights_are_found_and_give_the_logits_of_the_older_network(bare, moe, monkeypatch):
    state, path = older_state(moe), Path(bare.out_dir) / f"lm_64{'_moe' if moe else ''}.pth"
    path.parent.mkdir()
    torch.save(state, path)
    assert find_weights("llm", bare.out_dir, None, False) == path
    model, _, origin = build_model(bare, path)
    assert origin.note.endswith(
        f"loaded {len(model.text_state_dict()) - 2} tensors from {path} (older naming: renamed, rotary rows reordered)"
        "; new: projector; ignored: 2 (first: pos_cis)"
    )
    ids = torch.randint(40, 300, (2, 50), generator=torch.Generator().manual_seed(1))
    expected = torch.stack([older_logits(state, row) for row in ids])
    torch.testing.assert_close(model.eval()(ids).logits.double(), expected, rtol=0, atol=1e-5)

    monkeypatch.setattr(build, "half_split", lambda state, heads: state)  # the names alone are not enough
    unturned, _, _ = build_model(bare, path)
    assert (unturned.eval()(ids).logits - expected).abs().max() > 0.1


# ---------------------------------------------------------------------------- Transformers folders


def assert_same_weights(loaded, model):
    expected = {key: value.half().float() for key, value in model.text_state_dict().items()}
    assert set(expected) == set(loaded.text_state_dict())
    assert all(torch.equal(value, expected[key]) for key, value in loaded.text_state_dict().items())


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "100KB"}])
@pytest.mark.parametrize("moe", [False, True])
def test_a_folder_that_this_code_has_written_is_read(args, bare, tokenizer, moe, shards):
    args.num_attention_heads, args.num_key_value_heads, args.use_moe = 4, 1, moe
    model, _, _ = build_model(args, None)
    model.config.rope_theta = 5e5
    folder = Path(args.out_dir) / "folder"
    model.half().save_pretrained(folder, **shards)
    assert (folder / "model.safetensors.index.json").is_file() == bool(shards)
    tokenizer.save_pretrained(folder)
    bare.tokenizer_path = None
    loaded, _, origin = build_model(bare, find_weights(str(folder), bare.out_dir, None, False))
    assert origin.note == f"loaded {len(model.text_state_dict())} tensors from {folder}"
    assert origin.tokenizer_path == str(folder)
    kept = ("num_attention_heads", "num_key_value_heads", "rope_theta", "use_moe", "image_ids")
    assert [getattr(loaded.config, key) for key in kept] == [getattr(model.config, key) for key in kept]
    assert_same_weights(loaded, model)


def public_folder(args, tokenizer, kind="bin", **config) -> tuple[Path, MiniMindVLM]:
    """In the format of the hubs: its own code, fp16, the tokenizer, no encoder."""
    model, _, _ = build_model(args, None)
    folder = Path(args.out_dir) / "MiniMind2-V"
    folder.mkdir(parents=True)
    state = {key: value.half() for key, value in model.text_state_dict().items()}
    parts = [dict(list(state.items())[i::2]) for i in range(2)]
    if kind == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif kind == "sharded bin":
        names = [f"pytorch_model-0000{i + 1}-of-00002.bin" for i in range(2)]
        for name, part in zip(names, parts):
            torch.save(part, folder / name)
        index = {"weight_map": {key: name for name, part in zip(names, parts) for key in part}}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:  # of the tied pair the other half is there
        del state["model.embed_tokens.weight"]
        save_file(state, folder / "model.safetensors")
    about = {
        "architectures": ["MiniMindVLM"],
        "auto_map": {"AutoConfig": "model_vlm.VLMConfig", "AutoModelForCausalLM": "model_vlm.MiniMindVLM"},
        "model_type": "minimind-v",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": None,
        "vocab_size": 300,
        "rope_theta": 1000000.0,
        "use_moe": False,
        "n_shared_experts": True,
        "image_special_token": "@" * 16,
        "image_ids": [34] * 16,
        "torch_dtype": "float16",
        "transformers_version": "4.49.0",
    }
    (folder / "config.json").write_text(json.dumps(about | config))
    tokenizer.save_pretrained(folder)
    return folder, model


@pytest.mark.parametrize("kind", ["bin", "sharded bin", "safetensors"])
def test_a_public_folder_is_read_without_running_its_code(args, bare, tokenizer, kind):
    folder, model = public_folder(args, tokenizer, kind)
    bare.tokenizer_path = None
    loaded, own, origin = build_model(bare, folder)
    assert origin.note == f"loaded 23 tensors from {folder}" and own.get_vocab() == tokenizer.get_vocab()
    assert_same_weights(loaded, model)
    bare.tokenizer_path = str(args.tokenizer_path)  # another file, which the folder says nothing about
    assert build_model(bare, folder)[2].note.startswith("warning: ")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_hidden_layers": 3}, "config.json says num_hidden_layers=3, but MiniMind2-V contains 2"),
        ({"model_type": "clip"}, "config.json: expected a MiniMind with model_type minimind-v, got clip"),
        (
            {"image_special_token": "@" * 49},
            "gives 16 patches, .*MiniMind2-V was trained with 49: pass the --vision_model",
        ),
        ({"image_ids": [40] * 16}, "has the id 34 for '@', but .*MiniMind2-V was trained with the id 40"),
    ],
)
def test_a_folder_with_another_configuration_is_refused(args, bare, tokenizer, config, message):
    folder, _ = public_folder(args, tokenizer, **config)
    bare.tokenizer_path = None
    with pytest.raises(ValueError, match=message):
        build_model(bare, folder)


def test_a_folder_without_weights_or_with_a_lost_shard_is_named(args, bare, tokenizer):
    folder, _ = public_folder(args, tokenizer, "sharded bin")
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(FileNotFoundError, match="pytorch_model-00002-of-00002.bin: no such weights"):
        build_model(bare, folder)
    (folder / "pytorch_model.bin.index.json").unlink()
    with pytest.raises(FileNotFoundError, match="MiniMind2-V: no model.safetensors, pytorch_model.bin or index"):
        build_model(bare, folder)


# ---------------------------------------------------------------------------- from dense to experts


def dense_and_experts(routed=4, shared=1, **config):
    """A lively dense language model, and the mixture of experts that it becomes; both in eval mode."""
    small = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 300, "max_position_embeddings": 64} | config
    dense = lively(MiniMindForCausalLM(MiniMindConfig(**small))).eval()
    config = MiniMindConfig(**small, use_moe=True, n_routed_experts=routed, n_shared_experts=shared)
    experts = MiniMindForCausalLM(config).eval()
    gates = {key: value for key, value in experts.state_dict().items() if key.endswith("mlp.gate.weight")}
    load_weights(experts, upcycle(dense.state_dict(), config) | gates, "dense.pth")
    return dense, experts


TOKENS = torch.randint(0, 300, (3, 40), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def difference(dense, experts) -> float:
    """The largest, as a share of the largest logit."""
    one, two = dense(TOKENS).logits, experts(TOKENS).logits
    return float((one - two).abs().max() / one.abs().max())


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.parametrize("routed, per_token", [(2, 2), (4, 2), (7, 3)])
def test_a_dense_model_and_the_experts_it_becomes_give_the_same_logits(routed, shared, per_token):
    dense, experts = dense_and_experts(routed, shared, num_experts_per_tok=per_token)
    assert difference(dense, experts) < 1e-5
    torch.manual_seed(7)  # whatever the gate chooses
    for layer in experts.model.layers:
        torch.nn.init.normal_(layer.mlp.gate.weight, std=5)
    assert difference(dense, experts) < 1e-5
    for layer in experts.model.layers:
        torch.nn.init.zeros_(layer.mlp.gate.weight)  # all scores alike: whichever wins a tie
    assert difference(dense, experts) < 1e-5


@pytest.mark.parametrize("gate", [{"num_experts_per_tok": 1}, {"norm_topk_prob": False}])
def test_a_gate_whose_weights_do_not_sum_to_one_is_refused(gate):
    with pytest.raises(ValueError, match="converting dense weights to experts requires num_experts_per_tok >= 2 and"):
        dense_and_experts(**gate)


@pytest.mark.parametrize("shared", [1, 2])
def test_the_share_of_each_copy_is_what_makes_them_the_same(shared):
    """The difference sees it when down_proj is not scaled, in a single copy or in all."""
    dense, experts = dense_and_experts(shared=shared)
    for whole in (lambda name: "down_proj" in name, lambda name: "shared_experts.0.down_proj" in name):
        before = {key: value.clone() for key, value in experts.state_dict().items()}
        with torch.no_grad():
            for name, weight in experts.named_parameters():
                weight.mul_(1 + shared if whole(name) else 1)
        assert difference(dense, experts) > 0.1
        experts.load_state_dict(before)
    state = experts.state_dict()
    for part in ("gate_proj", "up_proj", "down_proj"):
        own = dense.state_dict()[f"model.layers.1.mlp.{part}.weight"] / (1 + shared if part == "down_proj" else 1)
        copies = [value for key, value in state.items() if key.startswith("model.layers.1.mlp.") and f".{part}." in key]
        assert len(copies) == 4 + shared and all(torch.equal(value, own) for value in copies)


def test_the_loss_in_training_is_the_same_too_and_the_balance_is_that_of_a_random_gate():
    """The auxiliary loss is separate from the loss: 0.1 per layer if all experts are used equally."""
    dense, experts = dense_and_experts()
    dense.train(), experts.train()
    one, two = dense(TOKENS, labels=TOKENS), experts(TOKENS, labels=TOKENS)
    assert two.loss.item() == pytest.approx(one.loss.item(), rel=1e-5)
    assert one.aux_loss == 0 and 0.19 < two.aux_loss.item() < 0.3  # of two layers
    (two.loss + two.aux_loss).backward()
    for layer in experts.model.layers:
        assert layer.mlp.gate.weight.grad.abs().max() > 0  # from the balance: experts that are alike give it nothing
        busy = [expert.down_proj.weight.grad for expert in layer.mlp.experts]
        assert all(grad.abs().max() > 0 for grad in busy)
        assert not any(torch.equal(busy[0], grad) for grad in busy[1:])  # other tokens: so they part


def test_a_dense_file_with_use_moe_becomes_experts_that_are_saved_and_loaded_as_such(args, bare):
    path, _ = save(args)
    dense, _, _ = build_model(bare, path)
    bare.use_moe = True
    experts, _, origin = build_model(bare, path, training=True)
    assert experts.config.use_moe and experts.config.intermediate_size == dense.config.intermediate_size
    assert origin.note == (
        f"loaded {len(experts.text_state_dict())} tensors from {path}; "
        "each expert starts as its dense feed-forward, the gates at random"
    )
    ids = TOKENS.clone()
    ids[ids == 34] = 35  # no stray placeholder
    with torch.no_grad():
        one, two = dense.eval()(ids).logits, experts.eval()(ids).logits
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)

    moe_path = path.with_name(weights_name("sft_vlm", experts.config))
    assert moe_path.name == "sft_vlm_64_moe.pth"
    save_weights(moe_path, experts, make_sidecar(experts, origin))
    for asked in (False, True):  # with or without the flag: the file says what it is
        bare.use_moe = asked
        again, _, origin = build_model(bare, moe_path)
        assert again.config.use_moe
        assert origin.note == f"loaded {len(again.text_state_dict())} tensors from {moe_path}"
        gate = "model.layers.1.mlp.gate.weight"
        assert torch.equal(again.state_dict()[gate], experts.state_dict()[gate].half().float())


def test_the_same_seed_makes_the_same_experts(args, bare):
    path, _ = save(args)
    bare.use_moe = True
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_model(bare, path, training=True)[0].text_state_dict())
    one, same, other = states
    assert all(torch.equal(one[key], same[key]) for key in one)
    apart = {key for key in one if not torch.equal(one[key], other[key])}
    assert apart == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}


@pytest.mark.parametrize("json_there", [True, False])
def test_a_language_model_of_text_becomes_experts_that_see(args, bare, json_there):
    """Two changes at once: the projector is new, and every feed-forward becomes several."""
    flags = ["--tokenizer_path", str(args.tokenizer_path), "--hidden_size", "64", "--num_hidden_layers", "2"]
    model, _, origin = build_model(train_llm.parse_args(flags), None, sees=False)
    assert type(model) is MiniMindForCausalLM and origin.note == "started from scratch"
    path = Path(args.out_dir) / "llm_64.pth"
    save_weights(path, model, make_sidecar(model, origin))
    if not json_there:
        path.with_suffix(".json").unlink()
    bare.use_moe = True
    seeing, _, origin = build_model(bare, path, training=True)
    assert type(seeing) is MiniMindVLM and seeing.config.use_moe
    assert origin.note.endswith("new: projector; each expert starts as its dense feed-forward, the gates at random")


@pytest.mark.parametrize("prompts", ["What?", {"en": "What?"}, {"en": []}, {"en": [7]}])
def test_prompts_of_another_form_are_named(tmp_path, prompts):
    (tmp_path / "sft_vlm_64.json").write_text(json.dumps({"prompts": prompts}))
    with pytest.raises(ValueError, match=r"sft_vlm_64.json: .*prompts"):
        read_sidecar(tmp_path / "sft_vlm_64.pth")


# ---------------------------------------------------------------------------- finding


def test_missing_weights_are_reported_with_a_list_of_existing_ones(args, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--from_weight llm: no .*/llm_512.pth \(.* has no .pth file\)"):
        find_weights("llm", args.out_dir, None, False)
    path, _ = save(args)
    save(args, stage="pretrain_vlm", use_moe=True)
    with pytest.raises(FileNotFoundError, match=r"llm_64_moe.pth .* has pretrain_vlm_64_moe.pth, sft_vlm_64.pth\)"):
        find_weights("llm", args.out_dir, 64, True)
    assert find_weights("sft_vlm", args.out_dir, 64, False) == Path(args.out_dir) / "sft_vlm_64.pth"
    assert find_weights("none", args.out_dir, 64, False) is None
    assert find_weights(str(path), tmp_path, 64, False) == path
    for name in ("some/where.pth", "./folder"):
        with pytest.raises(FileNotFoundError, match=f"--from_weight {name}: no such file or folder"):
            find_weights(name, args.out_dir, 64, False)


@pytest.mark.parametrize(
    "stage, what",
    [
        ("llm", "download it: python -m scripts.download --what llm"),
        ("pretrain_vlm", "make it: python train_pretrain_vlm.py"),
        ("sft_vlm", "download it: python -m scripts.download --what vlm"),
        ("typo", "a stage: pretrain_vlm, sft_vlm, scst_vlm, llm"),
    ],
)
def test_an_error_about_missing_weights_says_what_to_type(monkeypatch, tmp_path, stage, what):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as error:
        find_weights(stage, "out", None, False)
    assert what in str(error.value) and max(map(len, str(error.value).splitlines())) <= 80


@pytest.mark.parametrize(
    "there, stage, asked, found",
    [  # asked: hidden_size, use_moe
        (["sft_vlm_256"], "sft_vlm", (None, False), "sft_vlm_256"),
        (["sft_vlm_256_moe"], "sft_vlm", (None, False), "sft_vlm_256_moe"),  # the file says what it is
        (["sft_vlm_256_moe"], "sft_vlm", (256, False), "sft_vlm_256_moe"),
        (["sft_vlm_256", "sft_vlm_512", "sft_vlm_512_moe"], "sft_vlm", (None, False), "sft_vlm_512"),
        (["sft_vlm_512", "sft_vlm_256_moe"], "sft_vlm", (None, True), "sft_vlm_256_moe"),
        (["sft_vlm_256", "sft_vlm_multi_768", "pretrain_vlm_64"], "sft_vlm", (None, False), "sft_vlm_256"),
        (["lm_768"], "llm", (None, False), "lm_768"),
        (["lm_512", "llm_256"], "llm", (None, False), "lm_512"),
        (["lm_512", "llm_512"], "llm", (None, False), "llm_512"),
        (["sft_vlm_256", "sft_vlm_768"], "sft_vlm", (None, False), ValueError),
        (["sft_vlm_256", "sft_vlm_256_moe"], "sft_vlm", (None, False), ValueError),
        (["sft_vlm_256"], "sft_vlm", (512, False), FileNotFoundError),
        (["sft_vlm_256"], "sft_vlm", (None, True), FileNotFoundError),
    ],
)
def test_the_only_file_of_a_stage_needs_no_flags(tmp_path, there, stage, asked, found):
    for name in there:
        (tmp_path / f"{name}.pth").touch()
    if isinstance(found, str):
        assert find_weights(stage, tmp_path, *asked) == tmp_path / f"{found}.pth"
    else:
        with pytest.raises(found, match=f"(contains|has) {there[0]}.pth"):
            find_weights(stage, tmp_path, *asked)


def test_a_deeper_model_of_the_same_name_is_not_overwritten(args):
    path, model = save(args)
    refuse_other_architecture(path, model.config)  # the same one again is
    refuse_other_architecture(path.with_name("llm_64.pth"), model.config)  # and what is not there
    model.config.num_hidden_layers = 3
    for json_there in (True, False):
        if not json_there:
            path.with_suffix(".json").unlink()
        with pytest.raises(ValueError, match=r"another model \(num_hidden_layers 2, not 3\).* another --out_dir"):
            refuse_other_architecture(path, model.config)


# ---------------------------------------------------------------------------- damaged, and no weights at all


def flip(path: Path, at: int) -> None:
    """One bit of a file, as a disk or a network turns it."""
    content = bytearray(path.read_bytes())
    content[at] ^= 64
    path.write_bytes(content)


def test_one_bit_of_a_tensor_that_is_not_as_it_was_written_is_refused(args, bare):
    path, model = save(args)
    whole = path.read_bytes()
    for tensor in list(model.text_state_dict().values())[:3]:
        written = tensor.detach().half().numpy().tobytes()
        flip(path, whole.index(written) + len(written) // 2)
        with pytest.raises(ValueError, match="sft_vlm_64.pth is not a file .*data/.* in it is damaged"):
            build_model(bare, path)
        path.write_bytes(whole)
    assert build_model(bare, path)[2].note.startswith("loaded")


def test_leftovers_of_a_killed_process_are_removed(tmp_path):
    path = tmp_path / "out/sft_vlm_64.pth"
    path.parent.mkdir()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    names = {pid: path.with_name(f".{path.name}.{pid}.tmp") for pid in (ended.pid, os.getppid(), "mine")}
    for left in names.values():
        left.write_bytes(bytes(1000))
        os.utime(left, (0, 0))
    write_safely(path, lambda file: file.write(b"whole"))
    there = {file.name for file in path.parent.iterdir()}
    assert there == {path.name, names[os.getppid()].name, names["mine"].name}
    names[ended.pid].write_bytes(bytes(1000))  # just now: perhaps by another machine, where that process lives
    write_safely(path, lambda file: file.write(b"whole"))
    assert names[ended.pid].exists()


def test_a_record_larger_than_its_file_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(ValueError, match="archive/data.pkl in it claims to be larger than the file"):
        read_weights(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda weight: weight.index_fill(0, torch.tensor([1]), torch.nan), "contains NaN or infinite values"),
        (lambda weight: weight.index_fill(0, torch.tensor([1]), torch.inf), "contains NaN or infinite values"),
        (lambda weight: weight.to(torch.int32), "is int32, expected floats"),
        (lambda weight: weight.to(torch.complex64), "is complex64, expected floats"),
        (lambda weight: weight.to_sparse(), "is sparse_coo, expected floats"),
    ],
)
def test_invalid_weights_are_refused_with_the_name_of_the_tensor(args, bare, change, message):
    path, _ = save(args)
    state = read_weights(path)
    state["model.norm.weight"] = change(state["model.norm.weight"])
    torch.save(state, path)
    with pytest.raises(ValueError, match=f"sft_vlm_64.pth: model.norm.weight {message}"):
        build_model(bare, path)


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("num_attention_heads", -8, "expected an integer from 1"),
        ("num_hidden_layers", "2", "expected an integer"),
        ("rope_theta", 0, "expected a number from 1"),
        ("rms_norm_eps", "small", "expected a number"),
        ("rms_norm_eps", 0, "expected a number"),
        ("use_moe", "no", "expected true or false"),
        ("hidden_act", 3, "expected a text"),
        ("n_layers", 2, "is unknown to this model"),
    ],
)
def test_a_configuration_that_no_model_can_have_is_refused_by_its_key(args, bare, key, value, message):
    path, _ = save(args)
    about = json.loads(path.with_suffix(".json").read_text())
    about["config"][key] = value
    path.with_suffix(".json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"sft_vlm_64.json: .*{key}.* {message}"):
        build_model(bare, path)


@pytest.mark.parametrize("index", [{}, {"weight_map": [1]}, {"weight_map": {"a": "../elsewhere.safetensors"}}])
def test_an_index_of_shards_that_names_none_is_refused(tmp_path, index):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match='index.json: expected "weight_map"'):
        read_weights(tmp_path)
