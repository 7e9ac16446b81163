"""scripts/train_llm.py: a language model from text, or from rows whose pictures are left out, that stage 1 takes."""

import json
import math
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import train_pretrain_vlm
from common import cli
from dataset import scenes
from dataset.lm_dataset import VLMDataset
from model.model_minimind import MiniMindForCausalLM
from model.processing import IGNORE, load_tokenizer
from scripts import train_llm, train_tokenizer
from tests.conftest import turn, write_rows
from tests.test_loop import LONG, interrupt, into, losses, same
from trainer.progress import read_metrics

ROOT = Path(__file__).parent.parent
SMALL = ["--hidden_size", "64", "--num_hidden_layers", "2"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder with train.jsonl, val.jsonl, scenes in words and conversations about them, and their tokenizer."""
    folder = tmp_path_factory.mktemp("corpus")
    used, other = Counter(), None
    rows = []
    for scene in scenes.scenes_of("train", 14, 0):
        rows += scenes.text_rows_of(scene, random.Random(len(rows)), used, rows=3, other=other)
        other = scene
    assert not any("image" in row for row in rows)
    write_rows(folder / "train.jsonl", rows[:32])
    write_rows(folder / "val.jsonl", rows[32:39])
    data = ["--data_path", str(folder / "train.jsonl")]
    train_tokenizer.main([*data, "--out_dir", str(folder / "tokenizer"), "--vocab_size", "400"])
    return folder


@pytest.fixture
def text_flags(corpus, tmp_path):
    """Command-line flags of 4 steps on text, from scratch, on the CPU."""
    return [
        *("--data_path", str(corpus / "train.jsonl"), "--tokenizer_path", str(corpus / "tokenizer")),
        *("--out_dir", str(tmp_path / "out"), "--device", "cpu", "--num_workers", "0", "--batch_size", "8"),
        *SMALL,
    ]


# ---------------------------------------------------------------------------- learning


def test_it_learns_from_text_and_tells_the_perplexity(text_flags, corpus, tmp_path, capsys):
    rates = ["--learning_rate", "5e-3", "--epochs", "5", "--log_interval", "1"]
    run = train_llm.main([*text_flags, *rates, "--val_path", str(corpus / "val.jsonl")])
    printed = capsys.readouterr().out
    assert type(run.model) is MiniMindForCausalLM
    lines = read_metrics(tmp_path / "out" / "llm_64.metrics.jsonl")
    curve = [line["loss"] for line in lines if "loss" in line]
    assert len(curve) == run.state.step == 20
    untaught = math.log(400)  # at the start all words are about as likely
    assert curve[0] == pytest.approx(untaught, abs=0.1) and curve[-1] < curve[0] - 1.5

    total, labels = 0, 0
    model = run.model.eval()
    for row in range(len(run.val_loader.dataset)):
        single = run.val_loader.dataset[row]
        n = int((single["labels"][1:] != IGNORE).sum())
        with torch.no_grad():
            total += model(single["input_ids"][None], labels=single["labels"][None]).loss.item() * n
        labels += n
    assert run.val_loss == pytest.approx(total / labels, rel=1e-5)
    (perplexity,) = re.findall(r"perplexity (\S+) per answer token of .*val\.jsonl\n", printed)
    assert float(perplexity) == pytest.approx(math.exp(total / labels), abs=1e-3)


def test_without_held_out_rows_no_perplexity_is_told(text_flags, capsys):
    assert train_llm.main(text_flags).val_loss is None
    assert "perplexity" not in capsys.readouterr().out


def test_all_weights_learn_and_the_metrics_know_of_no_projector(text_flags, tmp_path):
    run = train_llm.main([*text_flags, "--log_interval", "1"])
    for name, weight in run.model.named_parameters():
        assert run.optimizer.state[weight]["exp_avg"].abs().max() > 0, name
    lines = read_metrics(tmp_path / "out" / "llm_64.metrics.jsonl")
    assert [line["lr"] for line in lines][0] == 4e-3  # of a narrow model
    assert all("projector_lr" not in line for line in lines)


# ---------------------------------------------------------------------------- what it writes, and for whom


@pytest.mark.parametrize("moe", [False, True])
def test_stage_1_takes_what_it_writes(text_flags, flags, corpus, tmp_path, capsys, moe):
    """llm_64.pth has no projector, so that stage 1 makes a new one and takes the rest as it is."""
    moe, name = (["--use_moe"], "llm_64_moe") if moe else ([], "llm_64")
    run = train_llm.main([*text_flags, *moe])
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        f"{name}.{end}" for end in ("pth", "json", "resume.pt", "metrics.jsonl", "metrics.png")
    }
    state = torch.load(out / f"{name}.pth", weights_only=True)
    assert not any("vision" in key for key in state)
    assert all(torch.equal(value, run.model.state_dict()[key].half()) for key, value in state.items())
    metadata = json.loads((out / f"{name}.json").read_text())
    assert (metadata["stage"], metadata["step"], metadata["vision_model"]) == ("llm", 4, {})
    assert metadata["config"]["vocab_size"] == 400 and "image_special_token" not in metadata["config"]

    capsys.readouterr()
    given = ["--from_weight", "llm", "--tokenizer_path", str(corpus / "tokenizer"), "--trainable", "projector", *moe]
    seeing = train_pretrain_vlm.main([*flags, *given])
    assert f"loaded {len(state)} tensors from {out / name}.pth; new: projector\n" in capsys.readouterr().out
    assert all(torch.equal(seeing.model.state_dict()[key], value.float()) for key, value in state.items())


def test_training_goes_on_from_a_language_model_but_not_from_one_that_sees(text_flags, flags, corpus, tmp_path):
    first = train_llm.main(text_flags)
    more = train_llm.main([*text_flags, "--from_weight", "llm", "--learning_rate", "1e-12"])
    assert first.state.step == more.state.step == 4
    for key, value in first.model.state_dict().items():
        torch.testing.assert_close(more.model.state_dict()[key], value, rtol=1e-3, atol=1e-5)  # fp16 in between
    train_pretrain_vlm.main([*flags, "--from_weight", "llm", "--tokenizer_path", str(corpus / "tokenizer")])
    with pytest.raises(ValueError, match="pretrain_vlm_64.pth does not fit .* first: vision_proj.vision_proj.0.weight"):
        train_llm.main([*text_flags, "--from_weight", "pretrain_vlm"])


# ---------------------------------------------------------------------------- rows with pictures


def test_rows_with_pictures_lose_them_and_their_tags(tokenizer_folder, tmp_path):
    """Without the folder of pictures, and even where there are none: only what is said is learned."""
    asked = [("What is this?\n<image>", "What is this?"), ("<image>\nWhat is this?", "What is this?"), ("<image>", "")]
    more = [turn("assistant", "red"), turn("user", "Sure?"), turn("assistant", "Yes.")]
    rows = [{"conversations": [turn("user", given), *more], "image": "gone.png"} for given, _ in asked]
    two = [turn("user", "<image>\n<image>\nWhich is red?"), turn("assistant", "Both.")]
    rows.append({"conversations": two, "image": "gone.png, gone.png"})
    tokenizer = load_tokenizer(tokenizer_folder)
    data = VLMDataset(write_rows(tmp_path / "rows.jsonl", rows), None, tokenizer, image_ids=[])
    start = "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\n"
    end = "<|im_end|>\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    for i, (_, left) in enumerate(asked):
        text = tokenizer.decode(data[i]["input_ids"])
        assert text == f"{start}{left}<|im_end|>\n<|im_start|>assistant\nred{end}"
        assert data[i]["pictures"] is None
        learned = data[i]["labels"][data[i]["labels"] != IGNORE]
        assert tokenizer.decode(learned) == "red<|im_end|>Yes.<|im_end|>"
    assert tokenizer.decode(data[3]["input_ids"]).startswith(f"{start}Which is red?<|im_end|>")


def test_what_looks_like_placeholders_is_text_to_a_model_without_eyes(tokenizer_folder, tmp_path):
    rows = [{"conversations": [turn("user", "@" * 300), turn("assistant", "@" * 200)]}]
    tokenizer = load_tokenizer(tokenizer_folder)
    data = VLMDataset(write_rows(tmp_path / "rows.jsonl", rows), None, tokenizer, image_ids=[])
    assert tokenizer.decode(data[0]["input_ids"]).count("@") == 500
    assert int((data[0]["labels"] != IGNORE).sum()) == 200 + 1


def test_the_rows_of_the_stages_serve_as_text(text_flags, world, tokenizer_folder):
    given = ["--data_path", str(world / "rows.jsonl"), "--tokenizer_path", str(tokenizer_folder)]
    run = train_llm.main([*text_flags, *given])
    assert run.state.rows == 14 and run.state.broken == 0


# ---------------------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize("step, extra", [(2, []), (5, ["--use_moe"])])
def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_never_stopped(
    text_flags, tmp_path, monkeypatch, capsys, step, extra
):
    given = [*text_flags, *LONG, *extra]
    whole = train_llm.main(into(tmp_path / "whole", given))
    stopped = into(tmp_path / "stopped", given)
    with monkeypatch.context() as patch:
        interrupt(patch, step, signal.SIGTERM)
        with pytest.raises(SystemExit) as stop:
            train_llm.main(stopped)
    assert stop.value.code == 130
    assert f"stopped at step {step} of 8" in capsys.readouterr().err
    resumed = train_llm.main([*stopped, "--from_resume"])
    same(whole, resumed)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    one, two = (next((tmp_path / name).glob("*.pth")).read_bytes() for name in ("whole", "stopped"))
    assert one == two


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one(text_flags, corpus, tmp_path):
    given = [*text_flags, "--batch_size", "4", "--log_interval", "1", "--val_path", str(corpus / "val.jsonl")]
    train_llm.main(into(tmp_path / "one", [*given, "--accumulation_steps", "2"]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "scripts.train_llm", *into(tmp_path / "two", given)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("perplexity") == 1
    one, two = (read_metrics(tmp_path / ranks / "llm_64.metrics.jsonl") for ranks in ("one", "two"))
    assert len(one) == len(two) == 5
    for line, other in zip(one, two):
        for key in {"step", "loss", "grad_norm", "val_loss"} & line.keys():
            assert other[key] == pytest.approx(line[key], rel=2e-4, abs=1e-5), (line["step"], key)


# ---------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "flag", ["images_path", "val_images_path", "vision_model_path", "trainable", "projector_learning_rate"]
)
def test_flags_about_pictures_are_unknown(text_flags, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        train_llm.main([*text_flags, f"--{flag}", "1"])
    assert stop.value.code == 2 and f"--{flag} is not a flag of train_llm.py" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--data_path", "--val_path"])
def test_data_that_is_not_there_is_answered_with_what_to_type(text_flags, tmp_path, capsys, flag):
    with pytest.raises(SystemExit) as stop:
        cli.run_main(lambda: train_llm.main([*text_flags, flag, "nowhere.jsonl"]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("error:") == 1
    assert f"error: {flag} nowhere.jsonl: no such file" in error
    assert not (tmp_path / "out").exists()


def test_the_first_thing_to_type_is_told_and_makes_the_data_of_the_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="To draw scenes: python -m dataset.scenes --form text --out_dir out/text$"
    ) as error:
        train_llm.main([])
    command = str(error.value).split("python -m dataset.scenes ")[1].split()
    scenes.main([*command, "--scenes", "3", "--val_scenes", "2"])
    given = train_llm.parse_args(["--val_path", "out/text/val.jsonl"])
    train_llm.check_paths(given)
    for path in ("out/text/train", "out/text/*.jsonl", "hf://datasets/me/mine/*.parquet"):
        train_llm.check_paths(train_llm.parse_args(["--data_path", path]))
    assert "python -m dataset.scenes " + " ".join(command) in train_llm.__doc__
