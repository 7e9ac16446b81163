"""trainer/progress.py: what a run tells, in its metrics file, its picture and the trackers."""

import contextlib
import json
import re
import sqlite3
import struct
import sys

import pytest
from PIL import Image

import train_sft_vlm
from trainer.progress import draw, read_metrics

LINE = {
    "step",
    "epoch",
    "loss",
    "aux_loss",
    "lr",
    "projector_lr",
    "grad_norm",
    "samples_per_s",
    "tokens_per_s",
    "seconds",
}


@pytest.fixture
def train(flags, tmp_path, world):
    """train(...) → the lines of the metrics file after a run of 8 steps."""

    def train(*extra):
        train_sft_vlm.main([*flags, "--epochs", "2", *extra])
        return read_metrics(tmp_path / "out" / "sft_vlm_64.metrics.jsonl")

    return train


def test_a_line_holds_the_mean_loss_of_its_steps_and_a_picture_shows_the_curve(train, world, tmp_path):
    rates = ["--optimizer", "adamw", "--learning_rate", "2e-4"]
    single = train("--log_interval", "1", *rates)
    assert [line["step"] for line in single] == list(range(1, 9))
    assert [line["epoch"] for line in single] == [0] * 4 + [1] * 4
    assert single[0]["lr"] == 2e-4 and 2e-5 < single[-1]["lr"] < 4e-5
    ends = [line["seconds"] for line in single]
    rows = [line["samples_per_s"] * (end - start) for line, start, end in zip(single, [0, *ends], ends)]
    assert sum(rows) == pytest.approx(28, rel=0.01)  # 14 in each epoch

    lines = train("--log_interval", "3", "--val_path", str(world / "val.jsonl"), *rates)
    means, validations = ([line for line in lines if key in line] for key in ("loss", "val_loss"))
    assert [line["step"] for line in lines] == [3, 4, 6, 8, 8]
    assert [line["step"] for line in validations] == [4, 8]  # the end of each epoch
    assert all(set(line) == {"step", "val_loss"} for line in validations)
    for line, steps in zip(means, (slice(0, 3), slice(3, 6), slice(6, 8))):
        assert set(line) == LINE
        assert line["loss"] == pytest.approx(sum(x["loss"] for x in single[steps]) / len(single[steps]), abs=1e-5)
    with Image.open(tmp_path / "out" / "sft_vlm_64.metrics.png") as picture:
        assert picture.format == "PNG" and picture.width > 400 and len(picture.convert("L").getcolors(999)) > 9


def test_a_line_that_is_no_line_of_ours_is_left_out_and_the_rest_stays(tmp_path):
    path = tmp_path / "run.metrics.jsonl"
    path.write_bytes(
        b'{"step": 1, "loss": 2.0}\n[3]\n{"loss": 1.0}\n\xff\xfe\n{"step": "2"}\n\n{"step": 4, "loss": 1.5}\n'
    )
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 4, "loss": 1.5}]


def test_a_line_that_a_crash_cut_short_is_left_out(tmp_path):
    path = tmp_path / "run.metrics.jsonl"
    assert read_metrics(path) == [] and draw(path) is None
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    assert draw(path) == tmp_path / "run.metrics.png"


def test_trackio_gets_every_line_without_an_account(train, tmp_path, monkeypatch, world):
    import trackio  # noqa: F401  the trackers are part of requirements-dev.txt

    for name in list(sys.modules):
        if name.startswith("trackio") and hasattr(sys.modules[name], "TRACKIO_DIR"):  # read at its import
            monkeypatch.setattr(sys.modules[name], "TRACKIO_DIR", tmp_path)
    lines = train("--tracker", "trackio", "--wandb_project", "colours", "--val_path", str(world / "val.jsonl"))
    assert len(lines) == 3
    with contextlib.closing(sqlite3.connect(tmp_path / "colours.db")) as database:
        logged = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in logged} == {"sft_vlm_64"}
    logged = [{"step": step, **json.loads(metrics)} for _, step, metrics in logged]
    assert logged == [pytest.approx(line, rel=1e-5) for line in lines]


@pytest.fixture
def fresh_wandb(tmp_path, monkeypatch):
    """wandb as in a new process: without login, reading its settings anew."""
    import wandb

    wandb.teardown()  # as at the end of a process: everything is on disk
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    yield wandb
    wandb.teardown()


def test_wandb_gets_every_line_offline(train, fresh_wandb, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    lines = train("--use_wandb", "--wandb_project", "colours", "--log_interval", "4")
    assert fresh_wandb.run is None  # the run is finished
    fresh_wandb.teardown()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    logged = file.read_bytes()
    assert b"colours" in logged and b"sft_vlm_64" in logged
    numbers = [float(number) for number in re.findall(rb"\d+(?:\.\d+)?(?:e-\d+)?", logged)]
    for line in lines:
        for key, value in line.items():
            assert key == "step" or (key.encode() in logged and pytest.approx(value, rel=1e-5) in numbers), key


def test_swanlab_gets_every_line_offline(train, tmp_path, monkeypatch, world):
    import swanlab

    monkeypatch.setenv("SWANLAB_MODE", "offline")
    monkeypatch.setenv("SWANLAB_LOG_DIR", str(tmp_path / "swanlog"))
    lines = train("--tracker", "swanlab", "--wandb_project", "colours", "--val_path", str(world / "val.jsonl"))
    assert len(lines) == 3 and not swanlab.has_run()  # the run is finished
    (file,) = (tmp_path / "swanlog").glob("run-*/run-*.swanlab")
    logged = file.read_bytes()
    assert b"colours" in logged and b"sft_vlm_64" in logged
    numbers = [struct.unpack("<d", found)[0] for found in re.findall(rb"\t(?=(.{8}))", logged, re.DOTALL)]
    for line in lines:
        for key, value in line.items():
            assert key == "step" or (key.encode() in logged and pytest.approx(value, rel=1e-5) in numbers), key


def test_swanlab_without_a_login_says_how_to_do_without(train, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SWANLAB_MODE", raising=False)
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    with pytest.raises(ValueError, match=r"--tracker swanlab: .*\n.* SWANLAB_MODE=offline"):
        train("--tracker", "swanlab")


def test_wandb_without_a_login_says_so(train, fresh_wandb):
    with pytest.raises(ValueError, match="--tracker wandb: No API key configured. Use `wandb login`"):
        train("--tracker", "wandb")


def test_a_tracker_that_is_not_installed_says_what_to_type(train, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes `import wandb` fail
    with pytest.raises(ValueError, match="--tracker wandb: not installed. Type: pip install wandb"):
        train("--use_wandb")
