"""scripts/benchmark_learning.py: which recipe reached the original, and a run of each in small."""

import json
from pathlib import Path

import pytest

from dataset import scenes
from scripts import benchmark_learning

TINY = Path(__file__).parents[1] / "model/tiny"


@pytest.fixture
def flags(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.jsonl", "train_zh.jsonl"):
        (data / name).write_text("".join(f"{name} {i}\n" for i in range(50)))
    paths = ["--data_path", data, "--out_dir", tmp_path / "out", "--results", tmp_path / "results/table"]
    return [*map(str, paths), "--rows", "80", "--batch_size", "4", "--rates", "0.001", "0.002"]


def test_a_recipe_that_reaches_the_original_is_tried_with_fewer_rows(flags, tmp_path, monkeypatch):
    """Muon needs half of the rows on all seeds, warmup 60% of them on two of three, the others more than all."""
    ran = []

    def train(job, args):
        ran.append((job["recipe"], job["share"], job["seed"], job["rate"]))
        loss = 1 + job["seed"] + abs(job["rate"] - 0.002) * 100
        if job["recipe"].startswith("Muon for"):
            loss += 0.5 - job["share"]
        elif job["recipe"].startswith("warmup"):
            loss += 0.1 if job["share"] < 0.6 or job["seed"] == 3 else -0.2
        elif not job["recipe"].startswith("original") or job["share"] < 1:
            loss += 0.1
        return job | {"val_loss": loss}

    monkeypatch.setattr(benchmark_learning, "train", train)
    benchmark_learning.main(flags)
    shares = {name: {share for recipe, share, *_ in ran if recipe == name} for name, *_ in ran}
    original, warmup, *_ = shares
    muon, faster = "Muon for the matrices of the blocks", "Muon, its rate doubled"
    assert shares[original] == {1.0, 0.6} and {rate for name, *_, rate in ran if name != original} == {0.002}
    assert shares[muon] == shares[warmup] == {0.6, 0.4} and shares[faster] == {0.6}
    table = (tmp_path / "results/table.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith(f"| {warmup} | 60%"))
    assert line.endswith("| -0.1000 (-0.2000 to +0.1000) | 2 of 3 |")
    assert "| Muon for the matrices of the blocks | 40% | 3.1000 | 2.1000 to 4.1000 | +0.1000 (" in table
    assert "0.001: 2.1000, 0.002: 2.0000" in table
    assert len(json.loads((tmp_path / "results/table.json").read_text())) == len(ran) - 1  # the best rate ran twice
    rows = (tmp_path / "out/train_32.jsonl").read_text().splitlines()
    assert len(rows) == 32 and rows == (tmp_path / "out/train_80.jsonl").read_text().splitlines()[:32]
    assert {row.split()[0] for row in rows} == {"train.jsonl", "train_zh.jsonl"}


def test_too_few_rows_are_refused_before_anything_runs(flags):
    with pytest.raises(ValueError, match="--rows 8000: .* has 100"):
        benchmark_learning.main([*flags, "--rows", "8000"])


def test_a_run_is_one_of_the_training_script_and_is_not_made_twice(tmp_path, monkeypatch):
    monkeypatch.chdir(TINY.parents[1])  # from where the scripts run
    scenes.write_world(tmp_path / "data", scenes=6, val_scenes=2)
    parts = ["--tokenizer_path", TINY, "--vision_model_path", TINY / "clip", "--from_weight", TINY / "llm_128.pth"]
    flags = ["--data_path", tmp_path / "data", "--out_dir", tmp_path, "--results", tmp_path / "table", "--rows", 16]
    args = benchmark_learning.parse_args([*map(str, flags), "--batch_size", "8", "--", *map(str, parts)])
    job = {"recipe": "Muon, a line to zero", "rate": 1e-3, "share": 0.5, "seed": 3}
    benchmark_learning.subset(args.data_path, 8, benchmark_learning.rows_file(args, 0.5))
    first = benchmark_learning.train(dict(job), args)
    (folder,) = (path for path in tmp_path.iterdir() if path.name.startswith("recipeMuon"))
    command = json.loads((folder / "sft_vlm_128.json").read_text())["command"]
    assert "--optimizer muon" in command and "--schedule linear" in command and "--seed 3" in command
    assert 0 < first["val_loss"] < 10 and not list(folder.glob("*.pth"))
    (folder / "log").unlink()
    assert benchmark_learning.train(dict(job), args) == first and not (folder / "log").exists()
    args.flags += ["--max_seq_len", "300"]
    with pytest.raises(ValueError, match="result.json is of another run, train_sft_vlm.py .*Choose another --out_dir"):
        benchmark_learning.train(dict(job), args)


def test_files_without_a_last_line_feed_are_read_line_by_line(tmp_path):
    for name in ("train.jsonl", "train_zh.jsonl"):
        (tmp_path / name).write_text("one\u2028still one\ntwo", encoding="utf-8")
    benchmark_learning.subset(tmp_path, 4, tmp_path / "all.jsonl")
    lines = (tmp_path / "all.jsonl").read_text(encoding="utf-8").split("\n")
    assert sorted(lines) == ["", "one\u2028still one", "one\u2028still one", "two", "two"]
