"""Two ranks under torchrun learn the same as one rank with twice the accumulation, also with bad rows and failures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train_sft_vlm
import trainer.loop
from common import distributed
from tests.test_shapes import LAYOUTS, SEVERAL, coco, write_json
from tests.test_sources import chat, picture, write_parquet
from trainer.progress import read_metrics

ROOT = Path(__file__).parent.parent
ONE_ROW = ["--batch_size", "1"]  # then the row without a picture is one rank's whole batch
RUNS = {  # name: flags; with 14 rows, batches of 3 leave the second rank without a row in the last step
    "dense": ["--batch_size", "3", "--log_interval", "1", "--epochs", "2"],
    "moe": [*ONE_ROW, "--use_moe", "--log_interval", "1"],
    "attention": [*ONE_ROW, "--trainable", "attention", "--gradient_checkpointing", "--log_interval", "1"],
}
ACCUMULATION = {"dense": 1, "moe": 1, "attention": 2, "shapes": 1}  # of two ranks; one rank has twice as much

# What each of the two ranks does: all runs in one process group, for it takes long to start one.
RANK = """
import json, os, sys
import torch
import trainer.loop, train_sft_vlm
from model.model_vlm import MiniMindVLM
from common import distributed

cases = json.loads(sys.argv[1])
report = {}
real_step, real_forward = trainer.loop.train_step, MiniMindVLM.forward

def on_rank_1(run, *args):
    if distributed.rank() == 1 and run.state.step == 1:
        os.kill(os.getpid(), 15)
    return real_step(run, *args)

def nan_on_rank_1(self, *args, **kwargs):
    out = real_forward(self, *args, **kwargs)
    if distributed.rank() == 1 and self.training:
        out.loss = out.loss * float("nan")
    return out

for name, flags in cases.items():
    trainer.loop.train_step = on_rank_1 if name == "stopped" else real_step
    MiniMindVLM.forward = nan_on_rank_1 if name == "nan" else real_forward
    try:
        run = train_sft_vlm.main(flags)
        report[name] = [run.state.step, run.state.rows, run.val_loss]
    except SystemExit as stop:
        report[name] = stop.code
    except ValueError as error:
        report[name] = str(error)
everything = distributed.gather(report)
if distributed.is_main():
    print("REPORT" + json.dumps(everything))
distributed.stop()
"""


def into(folder, flags, *extra):
    return [*flags, "--out_dir", str(folder), *extra]


def accumulate(batches):
    return ["--accumulation_steps", str(batches)]


def assert_same_weights(one, other):
    """Up to the order of sums: fp16 weights that differ by a rounding, and few of them."""
    one, other = torch.load(one), torch.load(other)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-3, atol=2e-5, msg=lambda text: f"{key}: {text}")  # noqa: B023
    moved = [(one[key] != other[key]).float().mean() for key in one]
    assert max(moved) < 0.05


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one(flags, world, tmp_path, monkeypatch):
    validate = ["--val_path", str(world / "val.jsonl")]
    shapes = [write_json(tmp_path / "coco.json", coco(SEVERAL)), LAYOUTS["trl.json"](tmp_path / "trl.json")]
    runs = RUNS | {"shapes": [*RUNS["dense"], "--batch_size", "2", "--data_path", *map(str, shapes)]}
    for name, extra in runs.items():
        train_sft_vlm.main(into(tmp_path / "one" / name, flags, *extra, *validate, *accumulate(2 * ACCUMULATION[name])))

    # stopped on one rank, to go on with two
    real = trainer.loop.train_step
    with monkeypatch.context() as patch:
        patch.setattr(trainer.loop, "train_step", lambda run, *n: real(run, *n) if run.state.step < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            resumed = into(tmp_path / "two" / "resumed", flags, *RUNS["dense"], "--save_interval", "1")
            train_sft_vlm.main([*resumed, *accumulate(2)])

    broken = tmp_path / "broken"
    broken.mkdir()
    for path in (world / "pictures").iterdir():
        (broken / path.name).write_bytes(path.read_bytes() if path.stem != "red" else b"broken")
    cases = {
        name: into(tmp_path / "two" / name, flags, *extra, *validate, *accumulate(ACCUMULATION[name]))
        for name, extra in runs.items()
    }
    cases["resumed"] = [*resumed, "--from_resume"]
    for name in ("stopped", "nan", "broken"):
        cases[name] = into(tmp_path / "two" / name, flags, *ONE_ROW)
    cases["broken"] += ["--images_path", str(broken)]
    write_parquet(tmp_path / "0.parquet", [("not a chat", [])] * 8)  # a shard without a usable row
    write_parquet(tmp_path / "1.parquet", [(chat("<image>", f"{i}"), [picture("red")]) for i in range(8)])
    stream = ["--data_path", f"file://{tmp_path}/*.parquet", "--stream_rows", "8", "--on_bad_row", "skip", *ONE_ROW]
    cases["stream"] = into(tmp_path / "two/stream", flags[flags.index("--tokenizer_path") :], *stream)

    script = tmp_path / "rank.py"
    script.write_text(RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), json.dumps(cases)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = json.loads(done.stdout.split("REPORT")[1].splitlines()[0])
    assert first == second  # all ranks agree on everything, also on how it went wrong

    for name, steps, rows in (("dense", 6, 28), ("moe", 7, 14), ("attention", 4, 14), ("shapes", 4, 14)):
        (one,) = (tmp_path / "one" / name).glob("*.pth")
        assert_same_weights(one, tmp_path / "two" / name / one.name)
        lines = [
            read_metrics((tmp_path / ranks / name / one.name).with_suffix(".metrics.jsonl")) for ranks in ("one", "two")
        ]
        assert len(lines[0]) == len(lines[1]) > 1
        for line, other in zip(*lines):
            for key in {"step", "loss", "aux_loss", "grad_norm", "val_loss"} & line.keys():
                assert other[key] == pytest.approx(line[key], rel=2e-4, abs=1e-5), (name, line["step"], key)
        assert first[name][:2] == [steps, rows]
    (one,) = (tmp_path / "one" / "dense").glob("*.pth")
    assert_same_weights(one, tmp_path / "two" / "resumed" / one.name)

    assert first["stream"][:2] == [8, 8]
    assert first["stopped"] == 130
    assert json.loads((tmp_path / "two" / "stopped" / "sft_vlm_64.json").read_text())["step"] == 2
    assert first["nan"].startswith("step 1: loss nan") and first["nan"].count("rows.jsonl:") == 1
    assert "red.png cannot be read" in first["broken"]


def test_one_process_alone_is_the_main_rank_of_one():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.all_sum(1, 2.5, True) == [1, 2.5, 1]
    assert distributed.gather({"a": 1}) == [{"a": 1}]
    with distributed.main_first():
        pass
