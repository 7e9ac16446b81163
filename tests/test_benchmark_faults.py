"""scripts/benchmark_faults.py in small: it finds nothing here, and would find what it looks for."""

import argparse
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import benchmark_faults
from scripts.benchmark import faults_files
from scripts.benchmark.faults_files import RESUME, WEIGHTS, Bench, flips, same
from scripts.benchmark.faults_rows import mutate


@pytest.fixture
def bench(tmp_path):
    """With two files of weights in place of those of a training."""
    (tmp_path / "base").mkdir()
    state = {"weights": {"a": torch.arange(5000.0)}}
    torch.save(state["weights"], tmp_path / "base" / WEIGHTS)
    torch.save(state, tmp_path / "base" / RESUME)
    return Bench(argparse.Namespace(flips=20, seed=0), tmp_path, random.Random(0))


def test_flips_that_load_are_faults_where_nothing_checks_the_file(bench, monkeypatch):
    flips(bench)
    assert not bench.faults
    monkeypatch.setattr(faults_files, "read_weights", lambda path: torch.load(path, weights_only=True))
    flips(bench)
    assert any("other values were loaded" in fault for fault in bench.faults)


def test_same_is_equal_to_the_last_bit():
    state = {"weights": {"a": torch.tensor([1.0, 2.0])}, "steps": [1, (2, "x")]}
    assert same(state, {"weights": {"a": torch.tensor([1.0, 2.0])}, "steps": [1, (2, "x")]})
    assert not same(state, {"weights": {"a": torch.tensor([1.0, 2.0000002])}, "steps": [1, (2, "x")]})
    assert not same(state, {"weights": {"a": torch.tensor([1, 2])}, "steps": [1, (2, "x")]})
    assert not same(state, {"weights": {"a": torch.tensor([1.0, 2.0])}, "steps": [1, (2,)]})


def test_a_seed_makes_the_same_mutations_and_leaves_the_row_as_it_was(world, tmp_path):
    row = {"conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red."}]}
    row["image"] = "red.png"
    (tmp_path / "red.png").write_bytes((world / "pictures/red.png").read_bytes())
    made = []
    for _ in range(2):
        rng = random.Random(1)
        made.append([mutate(row, [world / "rows.jsonl"], tmp_path, number, rng) for number in range(200)])
    assert made[0] == made[1] and len(set(made[0])) > 100
    assert row["image"] == "red.png" and len(row["conversations"]) == 2 and len(list(tmp_path.glob("damaged*"))) > 20


def test_a_fault_ends_the_program_with_status_1_after_the_table(monkeypatch, capsys):
    for name in ("HF_DATASETS_CACHE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # put back at the end
    monkeypatch.setattr(benchmark_faults, "prepare", lambda bench: None)
    monkeypatch.setattr(benchmark_faults, "unwind", lambda: None)
    monkeypatch.setitem(benchmark_faults.PARTS, "rows", lambda bench: bench.fault("rows: lost") or ("10", "9"))
    monkeypatch.setitem(benchmark_faults.PARTS, "flips", lambda bench: ("2", "2"))
    with pytest.raises(SystemExit) as end:
        benchmark_faults.main(["--only", "flips", "rows"])
    out = capsys.readouterr().out
    assert end.value.code == 1 and "FAULT: rows: lost" in out
    assert "| flips | 2 | 2 | 0 | 0.0 |\n| rows | 10 | 9 | 1 | 0.0 |" in out


@pytest.mark.slow
def test_all_parts_find_nothing_wrong():
    few = ["--scenes", "8", "--kills", "2", "--flips", "4", "--rows", "60", "--clients", "2", "--seconds", "3"]
    command = [sys.executable, "-m", "scripts.benchmark_faults", *few]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[-2] for line in lines[1:]] == ["0"] * len(benchmark_faults.PARTS)
    assert "2 × `kill -9`" in done.stdout and "4 refused, 0 the same" in done.stdout
