"""model/llm.py: a decoder becomes a stock language model with the same answers, and back."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

import train_pretrain_vlm
import train_sft_vlm
from model import llm
from model.build import build_model
from model.llm import build_decoder
from model.processing import encode_chat
from model.weights import make_sidecar, save_weights
from scripts.convert_vlm import __main__ as convert_vlm
from scripts.convert_vlm import check_export
from tests.conftest import lively, turn
from tests.test_convert_vlm import CONFIGS, MOE, TEXTS, convert, save, state_of  # noqa: F401 (fixtures)
from tests.test_flags import ROOT
from tests.test_generations import parts, public, siglip_folder, words, words_folder  # noqa: F401 (fixtures)
from tests.test_model_minimind import OTHER, needs_other
from train_sft_vlm import parse_args

SHARED = {"n_routed_experts": 6, "num_experts_per_tok": 3, "n_shared_experts": 2}
KINDS = pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])


def same_words(weights, back) -> bool:
    """Does a file hold all that another one holds, but the projector?"""
    ours, theirs = state_of(weights), state_of(back)
    ours = {key: value for key, value in ours.items() if not key.startswith("vision_proj.")}
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture
def convert_public(public, parts, tmp_path, monkeypatch):  # noqa: F811
    """convert_public(use_moe, ...) → (weights of minimind-3v, the folder made of them)."""

    def run(use_moe, *more, apart=False):
        if not apart:
            monkeypatch.setattr(convert_vlm, "check_folder", lambda made, ours: check_export.check(str(made), ours))
        weights, _, _ = public(use_moe)
        made = tmp_path / "made"
        command = [*("--to", "llm", "--weights", str(weights), "--output", str(made)), *parts[:2]]
        convert_vlm.main([*command, *more])
        return weights, made

    return run


def saved_again(made):
    """As after a training by others: in the layout of this version, without minimind.json."""
    folder = made.with_name(f"{made.name}_again")
    AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(made).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("config", [{}, MOE, {"num_attention_heads": 4, "rope_theta": 5e4}, MOE | SHARED], ids=str)
def test_a_minimind_2_is_a_llama_or_a_granite_and_comes_back_to_the_bit(save, convert, config, capsys):  # noqa: F811
    weights = save(**config)
    made = convert("llm", weights)
    said = capsys.readouterr().out
    assert "3 questions, tokens as ours, logits within" in said and not list(made.glob("*.py"))
    assert int(said.split("at ±")[1].split(",")[0]) >= 10
    kind = "granitemoeshared" if config.get("use_moe") else "llama"
    assert json.loads((made / "config.json").read_text())["model_type"] == kind

    name = weights.name.replace("sft_vlm", "llm")
    back = convert("pth", made) / name
    known, about = (json.loads(path.with_suffix(".json").read_text()) for path in (weights, back))
    assert same_words(weights, back) and about["stage"] == "llm" and about["step"] == 7 and not about["vision_model"]
    assert about["config"].items() <= known["config"].items()
    assert about["tokenizer"]["sha256"] == known["tokenizer"]["sha256"]
    assert same_words(weights, convert("pth", saved_again(made)) / name)


@KINDS
def test_a_minimind_3_is_a_qwen3_and_comes_back_to_the_bit(convert_public, convert, use_moe, capsys):  # noqa: F811
    weights, made = convert_public(use_moe)
    assert "3 questions, tokens as ours, logits within" in capsys.readouterr().out
    assert json.loads((made / "config.json").read_text())["model_type"] == ("qwen3_moe" if use_moe else "qwen3")
    for folder in (made, saved_again(made)):
        back = convert("pth", folder) / weights.name.replace("sft_vlm", "llm")
        assert same_words(weights, back)
        about = json.loads(back.with_suffix(".json").read_text())["config"]
        assert about["qk_norm"] and about["norm_top1_prob"] and about["aux_loss_alpha"] == 5e-4
        assert about["head_dim"] == 16 and about["max_position_embeddings"] == 32768


@CONFIGS
def test_what_comes_back_is_where_a_training_starts(save, convert, flags, config):  # noqa: F811
    back = next(convert("pth", convert("llm", save(**config))).glob("llm_64*.pth"))
    flags[flags.index("--from_weight") + 1] = str(back)
    run = train_pretrain_vlm.main([*flags, "--trainable", "projector"])
    known = state_of(back)
    assert run.state.step and torch.equal(run.model.model.norm.weight, known["model.norm.weight"].float())


def test_a_language_model_alone_becomes_one_too(convert, flags, tokenizer_folder, tmp_path):  # noqa: F811
    model, _, origin = build_model(parse_args(flags), None, sees=False)
    weights = tmp_path / "llm_64.pth"
    save_weights(weights, lively(model), make_sidecar(model, origin, stage="llm"))
    made = convert("llm", weights)
    assert same_words(weights, convert("pth", made) / weights.name)
    with pytest.raises(ValueError, match="is a language model without training on pictures: train it first"):
        convert("transformers", made, *flags[flags.index("--vision_model_path") :][:2])


# ---------------------------------------------------------------------------- tokens


def ids_of(tokenizer, chat, **how):
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True} | how
    return tokenizer.apply_chat_template(chat, **how)["input_ids"]


def check_typed(theirs, ours):
    """What people type is text for a stock tokenizer, and the same tokens as in a training of ours."""
    for text in TEXTS:
        for before in ([], [turn("system", text)]):
            chat = [*before, turn("user", text), turn("assistant", text), turn("user", f"{text}\n{text}")]
            want = [token for piece, _, _ in encode_chat(ours, chat, []) for token in piece]
            assert ids_of(theirs, chat) == want
            chat[-1] = {"role": "user", "content": [{"type": "text", "text": text}, {"type": "text", "text": text}]}
            assert ids_of(theirs, chat) == want
    assert theirs.decode(ids_of(theirs, [turn("user", "an <image>?")])).count("<image>") == 1
    with pytest.raises(Exception, match="it sees no pictures"):
        ids_of(theirs, [{"role": "user", "content": [{"type": "image"}]}])


def test_typed_text_becomes_the_tokens_of_training(save, convert, tokenizer):  # noqa: F811
    check_typed(AutoTokenizer.from_pretrained(made := convert("llm", save())), tokenizer)
    assert "<image>" not in (made / "chat_template.jinja").read_text() + (made / "tokenizer.json").read_text()


def test_and_those_of_a_minimind_3(convert_public, words):  # noqa: F811
    _, made = convert_public(False)
    check_typed(AutoTokenizer.from_pretrained(made), words)


# ---------------------------------------------------------------------------- what it is, what it is not


def test_the_card_describes_a_language_model(save, convert):  # noqa: F811
    weights = save(**MOE)
    path = weights.with_suffix(".json")
    known = {"prompts": {"en": ["What colour is this?"]}, "pictures_first": True, "rows_without_picture": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | known))
    made = convert("llm", weights)
    card, about = (made / "README.md").read_text(), json.loads((made / "minimind.json").read_text())
    assert not known.keys() & about.keys() and about["vision_model"] == {} and about["stage"] == "llm"
    assert "A small language model, made with MiniMind-V: stock language model, which" in card
    assert "(2 layers, 64 wide, 4 experts of which 2 work)" in card and "trust_remote_code" not in card
    assert not re.search("colour|encoder|projector|image|photo|at pictures", card)


def test_the_check_sees_another_answer(save, convert, monkeypatch):  # noqa: F811
    right = llm.to_stock
    monkeypatch.setattr(llm, "to_stock", lambda *args: {key: 1.01 * value for key, value in right(*args).items()})
    with pytest.raises(SystemExit, match="the logits differ by up to"):
        convert("llm", save())


def test_other_language_models_are_refused(tokenizer_folder, convert, tmp_path):  # noqa: F811
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    folder = tmp_path / "other"
    Qwen3ForCausalLM(Qwen3Config(vocab_size=300, num_key_value_heads=2, **small)).save_pretrained(folder)
    shutil.copy(tokenizer_folder / "tokenizer.json", folder)
    for to in ("pth", "llm"):
        with pytest.raises(ValueError, match="other is a qwen3 that --to llm did not make, so it contains no MiniMind"):
            convert(to, folder)


def test_errors_say_what_to_do(save, convert, flags):  # noqa: F811
    made = convert("llm", save())
    with pytest.raises(ValueError, match=f"got llama. Convert it: .* --to pth --weights {made}"):
        train_sft_vlm.main([*flags, "--from_weight", str(made)])
    (made / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.json there\nSave it too: tokenizer.save_pretrained"):
        convert("pth", made)
    with pytest.raises(ValueError, match="--to llm requires experts whose weights sum to 1, but this model has num_"):
        convert("llm", save(use_moe=True, num_experts_per_tok=1))


# ---------------------------------------------------------------------------- strangers


@pytest.mark.slow
@KINDS
def test_a_process_that_cannot_see_the_repo_loads_it(convert_public, use_moe, capsys):
    convert_public(use_moe, apart=True)
    assert "3 questions, tokens as ours, logits within" in capsys.readouterr().out


@pytest.mark.slow
@needs_other
@pytest.mark.parametrize("newer, use_moe", [(False, False), (True, True)], ids=["minimind-2", "minimind-3-moe"])
def test_the_command_makes_what_another_version_loads(save, public, parts, convert, tmp_path, newer, use_moe):  # noqa: F811
    """The full command; the code of its card runs on that version, in its own folder."""
    weights = public(use_moe)[0] if newer else save(use_moe=use_moe)
    made = tmp_path / "there" / "mine"
    command = [
        sys.executable,
        "-m",
        "scripts.convert_vlm",
        "--to",
        "llm",
        "--weights",
        str(weights),
        "--output",
        str(made),
    ]
    more = parts[:2] if newer else []
    here = subprocess.run([*command, *more], cwd=ROOT, capture_output=True, text=True)
    assert here.returncode == 0, here.stderr
    assert "3 questions, tokens as ours, logits within" in here.stdout
    build = build_decoder(parse_args(more), weights)
    ours = convert_vlm.reference(build[0].eval(), build[1], [])
    line = convert_vlm.check_folder(made, ours, OTHER)
    assert line.startswith("Transformers 4.57.6: 3 questions, tokens as ours, logits within")

    (snippet,) = re.findall(r"```python\n(.*?)```", (made / "README.md").read_text(encoding="utf-8"), re.S)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHONPATH": OTHER}
    ran = subprocess.run(
        [sys.executable, "-P", "-c", snippet], cwd=made.parent, env=env, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout
