"""train_scst_vlm.py: what a step learns from rewards, how answers are sampled, and a run from start to end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import train_scst_vlm
import train_sft_vlm
import trainer.scst
from dataset.batches import collate
from tests.conftest import lively, turn, write_rows
from tests.test_distributed import assert_same_weights
from tests.test_loop import LONG, assert_close, gradients, interrupt, into, same
from trainer.progress import read_metrics
from trainer.scst import Rewards, advantages, read_prompts, sample

ROOT = Path(__file__).parent.parent
MIXED = [0, 1, 12, 13]  # English, Chinese with two turns, two pictures, none


@pytest.fixture
def prepared(flags, monkeypatch):
    """A `Run` that has not made a step, with lively weights, and its rewards and tokenizer."""
    learns = []
    with monkeypatch.context() as patch:
        patch.setattr("trainer.loop.train_epoch", lambda run, epoch, learn: learns.append(learn))
        run = train_scst_vlm.main(flags)
    lively(run.model)
    return run, learns[0].keywords["rewards"], learns[0].keywords["tokenizer"]


def test_an_advantage_is_over_the_other_answers_to_the_same_row():
    rewards = torch.tensor([1.0, 2.0, 3.0, 8.0, 8.0, 8.0, 0.0, 0.0, 6.0])
    expected = torch.tensor([-1.5, 0, 1.5, 0, 0, 0, -3, -3, 6])  # 1 - (2 + 3) / 2, ...
    torch.testing.assert_close(advantages(rewards, 3) * rewards.std(), expected)
    assert not advantages(torch.zeros(6), 3).any()  # no answer ended: nothing to learn, and no NaN


def test_a_step_is_that_of_whole_rows_weighted_by_their_advantages(prepared, monkeypatch):
    """The prompts are read once, padded on the left; samples are sorted by length, and continue from the cache."""
    run, rewards, tokenizer = prepared
    run.args.samples = K = 3
    torch.manual_seed(0)
    tokens, lengths = torch.randint(5, 300, (len(MIXED) * K, 6)), torch.arange(12) % 6 + 1
    tokens[torch.arange(6) >= lengths[:, None]] = tokenizer.pad_token_id
    given = torch.rand(12)
    monkeypatch.setattr(trainer.scst, "sample", lambda *args: (tokens, lengths))
    monkeypatch.setattr(trainer.scst, "advantages", lambda rewards, each: given)
    batch = collate([run.loader.data[row] for row in MIXED], tokenizer.pad_token_id)
    trainer.scst.learn_rewarded(run, batch, True, 10, len(MIXED), rewards, tokenizer)
    ours = gradients(run)

    run.model.zero_grad(set_to_none=True)
    for i, (answer, n) in enumerate(zip(tokens, lengths.tolist())):
        row = run.loader.data[MIXED[i // K]]
        prompt = rewards.prompts[MIXED[i // K]]
        ids = torch.tensor([*prompt, *answer[:n].tolist()])
        assert row["input_ids"][: len(prompt)].tolist() == prompt and row["labels"][len(prompt)] >= 0
        logits = run.model(ids[None, :-1], pixel_values=row["pictures"]).logits[0, -n:] / run.args.temperature
        (F.cross_entropy(logits, answer[:n], reduction="sum") * given[i] / (10 * K)).backward()
    assert_close(ours, gradients(run), atol=1e-5)


def test_samples_follow_the_temperature_and_end(prepared):
    run, rewards, tokenizer = prepared
    batch = collate([run.loader.data[row] for row in MIXED], tokenizer.pad_token_id)
    prompts = [rewards.prompts[row] for row in MIXED]
    run.args.max_new_tokens, run.args.temperature = 8, 1e-4  # the likeliest token each time
    read = read_prompts(run.model, batch, prompts, tokenizer.pad_token_id)[:3]
    rows = torch.tensor([3, 0, 1, 2, 2])
    alone = []
    for row in MIXED:
        ids, pictures = torch.tensor([rewards.prompts[row]]), run.loader.data[row]["pictures"]
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        out = run.model.generate(input_ids=ids, attention_mask=ids * 0 + 1, pixel_values=pictures, **settings)
        alone.append(out[0, ids.shape[1] :].tolist())
    end = alone[0][2]  # a token that ends the first answer before the others
    tokens, lengths = sample(run.model, *read, rows, run.args, end, tokenizer.pad_token_id)
    for row, answer, n in zip(rows, tokens.tolist(), lengths.tolist()):
        expected = alone[row][: alone[row].index(end) + 1] if end in alone[row] else alone[row]
        assert answer[:n] == expected and set(answer[n:]) <= {tokenizer.pad_token_id}
    assert lengths.min() < lengths.max() == 8

    run.args.max_new_tokens, run.args.temperature = 1, 0.5
    torch.manual_seed(0)
    many, _ = sample(run.model, *read, torch.zeros(20_000, dtype=torch.long), run.args, end, tokenizer.pad_token_id)
    ids = torch.tensor([prompts[0]])
    logits = run.model(ids, pixel_values=run.loader.data[0]["pictures"]).logits[0, -1]
    shares = many[:, 0].bincount(minlength=300) / len(many)
    assert (shares - (logits / 0.5).softmax(dim=-1)).abs().max() < 0.015 and (shares > 0.02).sum() > 2


@pytest.mark.slow
@pytest.mark.parametrize("moe", [False, True])
def test_answers_become_those_that_are_rewarded(flags, world, tmp_path, moe):
    """The model has learned two ways to say a colour; the references are all of one of them."""
    colours = ("red", "green", "blue", "yellow")
    captions = {name: [f"a picture in {name}", f"this is all of it {name} here"] for name in colours}
    rows = [
        {"image": f"{name}.png", "conversations": [turn("user", "<image>\nWhat is it?"), turn("assistant", text)]}
        for name, texts in captions.items()
        for text in texts
    ]
    data = ["--data_path", str(write_rows(tmp_path / "rows.jsonl", rows))]
    extra = ["--use_moe"] if moe else []
    rates = ["--learning_rate", "5e-3", "--projector_learning_rate", "5e-3", "--epochs", "60"]
    train_sft_vlm.main([*flags, *data, *extra, *rates])
    refs = tmp_path / "refs.json"
    refs.write_text(json.dumps({f"{name}.png": [texts[0], *texts[:1] * 9] for name, texts in captions.items()}))
    start = flags.index("--from_weight")
    given = [*flags[:start], *flags[start + 2 :], *data, *extra, "--refs_path", str(refs), "--log_interval", "4"]
    short = write_rows(tmp_path / "short.jsonl", rows[::2])
    run = train_scst_vlm.main([*given, "--data_path", str(short), "--epochs", "60", "--temperature", "1"])
    lines = read_metrics(tmp_path / "out" / f"scst_vlm_64{'_moe' * moe}.metrics.jsonl")
    first, last = (sum(line["reward"] for line in part) / 4 for part in (lines[:4], lines[-4:]))
    assert run.state.step == 60 and last > first + 1, lines
    saved = json.loads((tmp_path / "out" / f"scst_vlm_64{'_moe' * moe}.json").read_text())
    assert saved["stage"] == "scst_vlm"


def test_a_stopped_run_goes_on_as_if_it_had_not(flags, tmp_path, monkeypatch):
    flags = [*flags, *LONG, "--min_scale", "0.5", "--max_new_tokens", "6"]
    whole = train_scst_vlm.main(into(tmp_path / "whole", flags))
    stopped = into(tmp_path / "stopped", flags)
    with monkeypatch.context() as patch:
        interrupt(patch, 5, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_scst_vlm.main(stopped)
    same(whole, train_scst_vlm.main([*stopped, "--from_resume"]))


@pytest.mark.slow
def test_two_ranks_make_the_steps_of_one(flags, tmp_path):
    """With 14 rows, batches of 3 leave the second rank without a row in the last step."""
    flags = [*flags, "--batch_size", "3", "--max_new_tokens", "6", "--learning_rate", "1e-3"]
    train_scst_vlm.main([*into(tmp_path / "one", flags), "--accumulation_steps", "2"])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two = [*torchrun, "train_scst_vlm.py", *into(tmp_path / "two", flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(two, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same_weights(tmp_path / "one/scst_vlm_64.pth", tmp_path / "two/scst_vlm_64.pth")


def test_flags_that_cannot_work_are_refused(flags, tmp_path, capsys):
    for extra, message in (
        (["--samples", "1"], "--samples 1: an answer is compared with the others to its row, so it takes at least 2"),
        (["--temperature", "0.001"], "--temperature 0.001: must be 0.01 or more"),
        (["--compile"], "--compile does not work here"),
        (["--gradient_checkpointing"], "--gradient_checkpointing does not work here"),
    ):
        with pytest.raises(SystemExit):
            train_scst_vlm.main([*flags, *extra])
        assert message in capsys.readouterr().err
    for refs, error, message in (
        (None, FileNotFoundError, "--refs_path .*refs.json: no such file"),
        ({"else.png": ["a"]}, ValueError, "--refs_path names none of the pictures of --data_path"),
    ):
        if refs:
            (tmp_path / "refs.json").write_text(json.dumps(refs))
        with pytest.raises(error, match=message):
            train_scst_vlm.main([*flags, "--refs_path", str(tmp_path / "refs.json")])
    row = {"image": "red.png", "conversations": [turn("user", "<image>"), turn("assistant", "Red.")]}
    data = write_rows(tmp_path / "same.jsonl", [row] * 4)
    with pytest.raises(ValueError, match="all rows have the same references"):
        train_scst_vlm.main([*flags, "--data_path", str(data)])


def test_captions_of_a_record_are_references_of_each_other_in_their_language(flags, tmp_path, monkeypatch, capsys):
    captions = ["a red one", "all of it is red", "红色的图片", "一片红色"]
    rows = [{"image": f"{name}.png", "captions": [*captions, f"it is {name}"]} for name in ("red", "green", "blue")]
    learns = []
    real = trainer.scst.learn_rewarded
    monkeypatch.setattr(
        trainer.scst,
        "learn_rewarded",
        lambda run, batch, *args, **more: learns.append((batch["rows"], more)) or real(run, batch, *args, **more),
    )
    data = ["--data_path", str(write_rows(tmp_path / "rows.jsonl", rows)), "--max_new_tokens", "1", "--epochs", "8"]
    train_scst_vlm.main([*flags, *data])  # one caption of each picture per epoch, by default
    assert len({row for rows, _ in learns for row in rows}) > 3  # others than the first of each
    rewards = learns[0][1]["rewards"]
    assert len(rewards.lengths) == 15
    assert rewards(1, "a red one") > 1 and rewards(2, "一片红色") > 1 > rewards(2, "a red one")
    assert "All rewards were 0: no answer ended and agreed with a reference" in capsys.readouterr().out


def test_rows_of_a_picture_have_the_same_references_in_one_language():
    class Question:
        prompt = [1, 2]

        def __init__(self, row, *references):
            self.row, self.references = row, list(references)

    rewards = Rewards([Question(0, "a", "b"), Question(1, "b", "a"), Question(2, "c d e f")])
    assert len(rewards.cider.references) == 2  # counted once, for the rarity of words
    assert rewards(2, "c d e f") == pytest.approx(10) and rewards(0, "c d e f") == 0
