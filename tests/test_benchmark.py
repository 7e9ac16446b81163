"""scripts/benchmark in small: every kind runs, and the ways to make a step agree on the loss."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from scripts.benchmark import __main__ as benchmark
from scripts.benchmark.inputs import batches_of, example, examples_of, length
from scripts.benchmark.peers import PACK, TRAINER, packed
from scripts.benchmark.variants import ladder


@pytest.mark.slow
def test_all_kinds_run_and_improvements_that_change_nothing_have_the_same_loss(tmp_path, capsys):
    flags = ["--size", "tiny", "--rows", "4", "--batch_size", "2", "--rounds", "2", "--new_tokens", "3"]
    flags += ["--device", "cpu", "--threads", "1", "--out_dir", str(tmp_path)]
    results = benchmark.main([*flags, "--kinds", *(kind for kind in benchmark.TABLES if kind != "peers")])
    for kind in ("pretrain", "sft"):
        first, *others = results[kind]
        assert first["ratio"] == 1 and first["ratio_range"] == [1, 1] and first["padding"] > others[0]["padding"]
        for row in others:
            tolerance = 1e-3 if any(part in row["name"] for part in ("bfloat16", "in blocks", "cached")) else 1e-5
            assert abs(row["loss"] / first["loss"] - 1) < tolerance, row
    assert [row["batch"] for row in results["generation"]] == [1] * 5 + [16] * 5
    assert results["ranks"][1]["ratio"] > 0 and len(results["startup"]) == 2
    text = (tmp_path / "benchmark_cpu.md").read_text()
    assert "## Stage 1: a step of pretrain" in text and "## Answers" in text and text in capsys.readouterr().out
    assert json.loads((tmp_path / "benchmark_cpu.json").read_text()) == results


@pytest.mark.slow
def test_peers_train_the_same_weights_on_the_same_rows(tmp_path):
    pytest.importorskip("accelerate")
    flags = ["--size", "tiny", "--rows", "4", "--batch_size", "2", "--rounds", "1", "--device", "cpu", "--threads", "1"]
    results = benchmark.main([*flags, "--kinds", "peers", "--out_dir", str(tmp_path)])
    for stage in "12":
        stock, packed, ours, cached, fewer = (row for row in results["peers"] if row["stage"] == stage)
        assert stock["name"] == TRAINER and stock["ratio"] == 1 and "packed" in packed["name"]
        assert stock["loss"] == pytest.approx(cached["loss"], rel=1e-3) and stock["padding"] == ours["padding"]
        assert fewer["loss"] != cached["loss"] and 0 <= fewer["padding"] < 0.5
    assert "## Beside today's peers" in (tmp_path / "benchmark_cpu.md").read_text()


def test_packs_hold_every_token_once_and_no_more_than_fit():
    args = SimpleNamespace(rows=8, batch_size=8, size="26m", max_seq_len=640)
    examples = examples_of("sft", args)
    packs = packed(examples[::-1])
    assert len(packs) < 8 and max(map(length, packs)) <= PACK
    assert sum(map(length, packs)) == sum(map(length, examples))
    assert sum(len(pack["pictures"]) for pack in packs) == 8
    assert torch.cat([pack["labels"] for pack in packs]).sum() == torch.cat([row["labels"] for row in examples]).sum()


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_a_few_rows_have_the_length_and_padding_of_many(kind):
    args = SimpleNamespace(rows=16, batch_size=8, size="26m", max_seq_len=640)
    examples = examples_of(kind, args)
    lengths = [len(row["input_ids"]) for row in examples]
    random = np.random.default_rng(0)
    many = [len(example(kind, row, random, 6400, 640)["input_ids"]) for row in range(32 * 8)]
    assert len(examples) == 16 and np.mean(lengths) == pytest.approx(np.mean(many), rel=0.02)
    batches = batches_of(examples, args.batch_size)
    assert sum(lengths) / sum(batch["input_ids"].numel() for batch in batches) > 0.95


def test_only_what_compiles_asks_for_a_compiler(monkeypatch):
    monkeypatch.setattr("common.devices.shutil.which", lambda name: None)
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="--compile: needs a C"):
        ladder(cpu, compile=True)
    assert not any("compiled" in has for has in ladder(cpu, compile=False).values())
