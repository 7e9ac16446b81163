"""train_pretrain_vlm.py and train_sft_vlm.py as their users meet them: the way through both, mistakes, and kill -9."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train_pretrain_vlm
import train_sft_vlm
from common import cli, devices
from dataset.batches import collate
from model import build
from model.build import build_model
from model.weights import save_weights
from scripts import train_llm
from scripts.train_clip import __main__ as train_clip
from tests.conftest import turn, write_rows
from tests.test_loop import LONG, into, losses, same

ROOT = Path(__file__).parent.parent
BOTH = pytest.mark.parametrize("script", [train_pretrain_vlm, train_sft_vlm], ids=lambda script: script.__name__)


def without(flags, *names):
    """The flags but these, whose defaults are to be seen."""
    kept = []
    for name, value in zip(flags[::2], flags[1::2]):
        if name not in names:
            kept += [name, value]
    return kept


# ---------------------------------------------------------------------------- the way through both stages


def test_a_language_model_goes_through_both_stages_by_their_defaults(flags, tmp_path, capsys):
    out = tmp_path / "out"
    language_model, _, _ = build_model(train_sft_vlm.parse_args(flags), None)
    save_weights(out / "llm_64.pth", language_model, {})
    (out / "llm_64.json").unlink()
    state = torch.load(out / "llm_64.pth")
    torch.save({key: value for key, value in state.items() if "vision" not in key}, out / "llm_64.pth")

    flags = without(flags, "--from_weight", "--num_hidden_layers")
    first = train_pretrain_vlm.main(flags)
    printed = capsys.readouterr().out
    assert f"loaded 21 tensors from {out / 'llm_64.pth'}; new: projector" in printed
    pretrained = torch.load(out / "pretrain_vlm_64.pth")
    changed = {key for key in state if "vision" not in key and not torch.equal(pretrained[key], state[key])}
    assert changed == {key for key in state if key.startswith("model.layers.1.")}  # the last of two
    assert first.state.step == 4

    second = train_sft_vlm.main(flags)
    assert f"loaded 23 tensors from {out / 'pretrain_vlm_64.pth'}\n" in capsys.readouterr().out
    assert all(
        not torch.equal(weight.half(), pretrained[key]) for key, weight in second.model.text_state_dict().items()
    )
    metadata = json.loads((out / "sft_vlm_64.json").read_text())
    assert (metadata["stage"], metadata["step"], metadata["rows"], metadata["seed"]) == ("sft_vlm", 4, 14, 42)
    assert {path.name for path in out.iterdir()} == {"llm_64.pth"} | {
        f"{stage}_vlm_64.{end}"
        for stage in ("pretrain", "sft")
        for end in ("pth", "json", "resume.pt", "metrics.jsonl", "metrics.png")
    }


def test_the_encoder_is_hashed_once_per_start(flags, tmp_path, monkeypatch):
    """For the weights that name it, for the cache of features, and for the weights that come out."""
    hashed, real = [], build.fingerprint
    monkeypatch.setattr(build, "fingerprint", lambda encoder: hashed.append(encoder) or real(encoder))
    train_pretrain_vlm.main(flags)
    assert len(hashed) == 1
    given = [*without(flags, "--from_weight"), "--cache_features", str(tmp_path / "cache"), "--dtype", "bfloat16"]
    train_sft_vlm.main(given)
    assert len(hashed) == 2
    stages = [json.loads((tmp_path / f"out/{stage}_vlm_64.json").read_text()) for stage in ("pretrain", "sft")]
    assert stages[0]["vision_model"] == stages[1]["vision_model"]


def test_stage_1_makes_experts_of_dense_weights_and_says_so(flags, tmp_path, capsys):
    out = tmp_path / "out"
    dense, _, _ = build_model(train_sft_vlm.parse_args(flags), None)
    save_weights(out / "llm_64.pth", dense, {})
    capsys.readouterr()
    with pytest.raises(FileNotFoundError, match=r"no .*llm_64_moe.pth .*has llm_64.pth\)\nName another"):
        train_pretrain_vlm.main([*flags, "--use_moe", "--from_weight", "llm"])
    given = [*flags, "--use_moe", "--from_weight", str(out / "llm_64.pth"), "--log_interval", "1"]
    run = train_pretrain_vlm.main(given)
    assert f"from {out / 'llm_64.pth'}; each expert starts as its dense feed-forward, the gates at random\n" in (
        capsys.readouterr().out
    )
    state = torch.load(out / "pretrain_vlm_64_moe.pth")
    assert run.model.config.use_moe and json.loads((out / "pretrain_vlm_64_moe.json").read_text())["config"]["use_moe"]
    first = torch.load(out / "llm_64.pth")["model.layers.0.mlp.down_proj.weight"] / 2
    experts = [state[f"model.layers.{i}.mlp.experts.{k}.down_proj.weight"] for i in range(2) for k in range(4)]
    assert all(torch.equal(weight, first) for weight in experts[:4])  # frozen in stage 1
    assert all(not torch.equal(weight, experts[4]) for weight in experts[5:])  # the last layer's have parted

    train_pretrain_vlm.main([*given, "--epochs", "2", "--out_dir", str(tmp_path / "again"), "--save_interval", "3"])
    again = train_pretrain_vlm.main(
        [*given, "--epochs", "2", "--out_dir", str(tmp_path / "again"), "--save_interval", "3", "--from_resume"]
    )
    assert again.state.step == 8  # a run that made experts is resumed as one that has them
    second = train_sft_vlm.main([*without(flags, "--from_weight"), "--use_moe"])
    assert second.model.config.use_moe


def test_two_stages_learn_to_look(flags, world):
    """By heart, but from the pictures: with the pictures of other rows the same answers are far from likely."""
    flags = [*without(flags, "--from_weight", "--batch_size"), "--batch_size", "7", "--trainable", "all"]
    rates = ["--learning_rate", "5e-3", "--projector_learning_rate", "5e-3"]
    train_pretrain_vlm.main([*flags, *rates, "--from_weight", "none", "--epochs", "20"])
    run = train_sft_vlm.main([*flags, *rates, "--epochs", "40"])
    model = run.model.eval()
    examples = [run.loader.data[row] for row in range(12)]  # two about each colour
    loss = {}
    for kind, shift in (("true", 0), ("shuffled", 2)):
        shown = [other | {"pictures": examples[(i + shift) % 12]["pictures"]} for i, other in enumerate(examples)]
        batch = collate(shown)
        with torch.no_grad():
            loss[kind] = model(
                **{key: batch[key] for key in ("input_ids", "labels", "attention_mask", "pixel_values")}
            ).loss.item()
    assert loss["true"] < 0.1 and loss["shuffled"] > loss["true"] + 1, loss


def test_held_out_rows_need_not_be_as_many_files_as_the_others(flags, world, tmp_path):
    """Pictures of two data sets, and one validation file whose pictures are beside it."""
    shutil.copytree(world / "pictures", tmp_path / "images")
    shutil.copy(world / "val.jsonl", tmp_path / "val.jsonl")
    flags = without(flags, "--data_path", "--images_path")
    rows, pictures = [str(world / "rows.jsonl")] * 2, [str(world / "pictures")] * 2
    run = train_sft_vlm.main(
        [*flags, "--data_path", *rows, "--images_path", *pictures, "--val_path", str(tmp_path / "val.jsonl")]
    )
    assert run.val_loss > 0


def test_pictures_without_a_tag_are_told_before_training(flags, world, tmp_path, capsys):
    rows = [{"conversations": [turn("user", "Which?"), turn("assistant", "Red.")], "image": "red.png"}] * 2
    train_sft_vlm.main([*flags, "--data_path", str(write_rows(tmp_path / "rows.jsonl", rows))])
    line = "  2 rows had pictures and no <image>: it was put before the first question\n"
    assert line in capsys.readouterr().out


# ---------------------------------------------------------------------------- mistakes

MISTAKES = [
    (["--device", "bogus"], "--device bogus: expected auto, cuda, cuda:1, mps or cpu"),
    (["--device", "xpu"], "--device xpu: expected auto"),
    (["--device", "cuda"], "--device cuda: PyTorch sees no CUDA device; try --device auto"),
    (["--device", "mps"], "--device mps: PyTorch sees no Apple GPU; try --device auto"),
    (["--data_path", "nowhere.jsonl"], "--data_path nowhere.jsonl: no such file"),
    (["--images_path", "nowhere"], "--images_path nowhere: no such folder"),
    (["--tokenizer_path", "nowhere"], "--tokenizer_path nowhere: no tokenizer.json there"),
    (["--vision_model_path", "nowhere"], "--vision_model_path nowhere: no config.json there"),
    (["--val_path", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    (["--from_weight", "llm"], "llm_64.pth ("),
    (["--from_weight", "nowhere.pth"], "--from_weight nowhere.pth: no such file or folder"),
    (["--max_seq_len", "20"], "--max_seq_len allows 20"),
    (["--hidden_size", "60"], "hidden_size=60 must be a multiple of num_attention_heads=8"),
    (["--dropout", "1.5"], "dropout probability has to be between 0 and 1"),
    (["--weight_decay", "-1"], "weight_decay value: -1.0"),
    (["--batch_size", "0"], "--batch_size: must be above 0, got 0"),
    (["--learning_rate", "nan"], "--learning_rate: must be above 0, got nan"),
    (["--epochs", "two"], "--epochs: invalid positive int value: 'two'"),
    (["--seed", "-1"], "--seed: must not be below 0, got -1"),
    (["--num_workers", "-1"], "--num_workers: must not be below 0, got -1"),
    (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
    (["--val_interval", "5"], "--val_interval has no effect without --val_path"),
    (["--val_images_path", "a"], "--val_images_path has no effect without --val_path"),
    (["--val_path", "v.jsonl", "--val_images_path", "a", "b"], "--val_images_path has 2 paths, --val_path has 1"),
    (["--cache_dtype", "int8"], "--cache_dtype has no effect without --cache_features"),
    (["--min_scale", "0"], "--min_scale 0.0: must be 0.01 to 1"),
    (["--flip", "--cache_features", "features"], "--flip changes pictures in each step, --cache_features keeps them"),
    (["--trainable", "projector", "--optimizer", "muon"], "--optimizer muon is for the blocks, which do not learn"),
    (["--trainable", "attention", "--embedding_learning_rate", "0.1"], "with --trainable attention the embeddings do"),
    (["--from_weight", "sft_vlm_multi"], "or a stage: pretrain_vlm, sft_vlm, scst_vlm, llm"),
    (["--use_moe", "maybe"], "--use_moe: expected nothing, 1 or 0, got maybe"),
    (["--bach_size", "3"], "_vlm.py; did you mean --batch_size?"),
]


@BOTH
@pytest.mark.parametrize(
    "extra, message", MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_a_mistake_ends_with_status_2_and_one_message(script, flags, tmp_path, monkeypatch, capsys, extra, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        cli.run_main(lambda: script.main([*flags, *extra]))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    assert error.count("error:") == 1 and message in error
    assert not (tmp_path / "out").exists()  # before the first step


def test_a_device_that_is_one_too_many_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert devices.pick_device("cuda:0") == devices.pick_device("auto") == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="--device cuda:1: no cuda:1 here, PyTorch sees 1 devices"):
        devices.pick_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "1")  # more ranks than devices
    with pytest.raises(ValueError, match="--device cuda: no cuda:1 here"):
        devices.pick_device("cuda")


RANKS = [
    (
        "auto",
        {"gpus": 1},
        "--nproc_per_node 2: each process needs a CUDA device, and PyTorch sees 1.\\nType python",
    ),
    ("cuda", {"gpus": 3, "ranks": 4}, "--nproc_per_node 4: .* sees 3.\\nType --nproc_per_node 3, or add --device cpu"),
    ("cuda:1", {"gpus": 2}, "--device cuda:1: 2 processes cannot share it; type --device cuda"),
    (
        "auto",
        {"mps": True},
        r"--nproc_per_node 2: .* \(mps\) trains in one process.\nType .* or add --device cpu",
    ),
]


@pytest.mark.parametrize("device, machine, message", RANKS, ids=lambda value: str(value)[:20])
@pytest.mark.parametrize("script", [train_pretrain_vlm, train_sft_vlm, train_llm], ids=lambda script: script.__name__)
def test_more_ranks_than_a_machine_has_devices_for_are_refused_by_each(
    script, flags, tmp_path, world, monkeypatch, device, machine, message
):
    """By the first too: it would wait for the others."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "gpus" in machine)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: machine.get("gpus", 0))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in machine)
    ranks = machine.get("ranks", 2)
    for rank in range(ranks):
        for name, value in (("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", ranks), ("LOCAL_RANK", rank)):
            monkeypatch.setenv(name, str(value))
        with pytest.raises(ValueError, match=message):
            script.main(["--data_path", str(world / "rows.jsonl"), "--device", device])


def test_the_encoder_refuses_several_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--nproc_per_node: the encoder trains in one process. Use python instead"):
        train_clip.main(["--data_path", "a", "--images_path", "b", "--tokenizer_path", "c", "--out_dir", "d"])


def test_the_traceback_is_there_for_who_asks_for_it(monkeypatch, capsys):
    def fail():
        raise ValueError("what is wrong")

    with pytest.raises(SystemExit):
        cli.run_main(fail)
    assert capsys.readouterr().err == "\nerror: what is wrong\n(MINIMIND_TRACEBACK=1 shows where)\n"
    monkeypatch.setenv("MINIMIND_TRACEBACK", "1")
    with pytest.raises(ValueError, match="what is wrong"):
        cli.run_main(fail)


def test_a_mistake_of_ours_is_not_made_to_look_like_one_of_theirs():
    with pytest.raises(ZeroDivisionError):
        cli.run_main(lambda: 1 / 0)


@BOTH
def test_weights_of_another_depth_under_the_same_name_are_kept(script, flags, tmp_path):
    script.main(flags)
    path = tmp_path / "out" / f"{script.STAGE}_64.pth"
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    for resume in ([], ["--from_resume"]):
        with pytest.raises(
            ValueError, match=f"{path.name} contains another model .num_hidden_layers 2, not 3.*--out_dir"
        ):
            script.main([*flags, *resume, "--num_hidden_layers", "3"])
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    script.main([*flags, "--num_hidden_layers", "3", "--out_dir", str(tmp_path / "deeper")])


# ---------------------------------------------------------------------------- as processes


def start(command, **options):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True, **options
    )


@pytest.mark.slow
def test_a_mistake_on_the_command_line_shows_no_traceback(flags):
    run = start(["train_pretrain_vlm.py", *flags, "--device", "gpu"])
    out, error = run.communicate(timeout=300)
    assert run.returncode == 2 and out == ""
    assert (
        error == "\nerror: --device gpu: expected auto, cuda, cuda:1, mps or cpu\n(MINIMIND_TRACEBACK=1 shows where)\n"
    )


KILLED = """
import os, signal, sys
import train_sft_vlm, trainer.loop

real = trainer.loop.train_step

def train_step(run, *args):
    if run.state.step == 7:  # the last checkpoint is of step 6, in the middle of the second epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return real(run, *args)

trainer.loop.train_step = train_step
train_sft_vlm.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_as_one_that_was_not(flags, tmp_path):
    flags = [*flags, *LONG, "--use_moe", "--save_interval", "3"]
    run = start(["-c", KILLED, *into(tmp_path / "killed", flags)])
    whole = train_sft_vlm.main(into(tmp_path / "whole", flags))
    assert run.communicate(timeout=300) and run.returncode == -signal.SIGKILL
    assert json.loads((tmp_path / "killed" / "sft_vlm_64_moe.json").read_text())["step"] == 6
    assert [line[0] for line in losses(tmp_path / "killed")] == [1, 2, 3, 4, 5, 6, 7]
    resumed = train_sft_vlm.main([*into(tmp_path / "killed", flags), "--from_resume"])
    same(whole, resumed)
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_run_stops_it_after_its_step(flags, tmp_path):
    """As torchrun, timeout and a terminal send it: also to the processes that decode pictures."""
    flags = [*flags, "--num_workers", "1", "--epochs", "1000", "--log_interval", "1"]
    run = start(["train_sft_vlm.py", *flags], start_new_session=True)
    metrics = tmp_path / "out" / "sft_vlm_64.metrics.jsonl"
    while run.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.1)
    os.killpg(run.pid, signal.SIGTERM)
    out, error = run.communicate(timeout=300)
    assert run.returncode == 130, error
    assert "Traceback" not in error and "To resume, type:\n  python train_sft_vlm.py --data_path" in error
    step = json.loads((tmp_path / "out" / "sft_vlm_64.json").read_text())["step"]
    assert f"stopped at step {step} of 4000" in error


@pytest.mark.parametrize("flag", ["--out_dir", "--cache_features"])
@pytest.mark.parametrize("under", ["", "below/"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_else(flags, tmp_path, capsys, flag, under):
    (tmp_path / "a_file").touch()
    flags = [*flags, "--data_path", "nowhere.jsonl"]
    with pytest.raises(SystemExit):
        train_sft_vlm.main([*flags, flag, str(tmp_path / "a_file" / under)])
    assert f"{flag} {tmp_path / 'a_file' / under}: {tmp_path / 'a_file'} is a file, expected a folder" in " ".join(
        capsys.readouterr().err.split()
    )
