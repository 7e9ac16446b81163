"""trainer/loop.py and checkpoint.py: what a step learns; that a run may stop anywhere and go on as if it had not."""

import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import common.devices
import train_sft_vlm
import trainer.guard
import trainer.loop
import trainer.run
from common.devices import autocast
from dataset.batches import collate
from model.model_vlm import MiniMindVLM
from model.processing import IGNORE
from model.weights import fingerprint, read_weights
from tests.conftest import turn, write_rows
from trainer.acceleration import attention_in_blocks, cast_frozen, choose_attention
from trainer.loop import train_step
from trainer.progress import read_metrics
from trainer.run import fit_accumulation

main = train_sft_vlm.main


@pytest.fixture
def make_run(flags, monkeypatch):
    """make_run(...) → a `Run` that has not made a step."""

    def make(*extra):
        with monkeypatch.context() as patch:
            patch.setattr("trainer.loop.train_epoch", lambda run, epoch: None)
            return main([*flags, *extra])

    return make


def batch(run, *rows):
    return collate([run.loader.data[row] for row in rows])


def count(batches):
    """Labels and rows of a step, as `train_epoch` counts them over all ranks."""
    return sum(map(trainer.loop.count_labels, batches)), sum(len(batch["rows"]) for batch in batches)


def gradients(run):
    return {name: weight.grad.clone() for name, weight in run.model.named_parameters() if weight.grad is not None}


def assert_close(one: dict, other: dict, atol=1e-6):
    assert one.keys() == other.keys() and one
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=1e-4, atol=atol, msg=lambda text: f"{key}: {text}")  # noqa: B023


# ---------------------------------------------------------------------------- a step

SPLITS = [  # of rows 0..7 and 12 (two pictures), 13 (none), in whatever way a step may come by them
    [(0, 1, 2, 3, 4, 5, 6, 7, 12, 13)],
    [(0, 1, 2, 3, 4), (5, 6, 7, 12, 13)],
    [(0,), (13,), (1, 2, 3, 4, 5, 6, 7, 12)],
    [(0, 1, 2, 3), (), (4, 5, 6, 7, 12, 13)],  # at the end of an epoch a rank may have none
]


@pytest.mark.parametrize("moe", [False, True])
def test_a_step_learns_the_mean_over_all_labelled_tokens_however_it_is_split(make_run, moe):
    """Against the definition, row by row: mean cross entropy of all labels, plus mean auxiliary loss of all rows."""
    run = make_run("--grad_clip", "1000", *["--use_moe"] * moe)
    model, rows = run.model, SPLITS[0][0]
    total, labels, aux = 0, 0, 0
    for row in rows:
        single = run.loader.data[row]
        pictures = single["pictures"]
        out = model(single["input_ids"][None], pixel_values=pictures)
        targets = single["labels"][1:]
        total = total + F.cross_entropy(out.logits[0, :-1], targets, ignore_index=IGNORE, reduction="sum")
        labels, aux = labels + int((targets != IGNORE).sum()), aux + out.aux_loss / len(rows)
    (total / labels + aux).backward()
    expected = gradients(run)
    assert (float(aux.detach()) > 0.1) == moe

    start = {key: value.clone() for key, value in model.text_state_dict().items()}
    for split in SPLITS:
        model.load_state_dict(start, strict=False)
        batches = [batch(run, *part) for part in split]
        assert count(batches) == (labels, len(rows))
        loss, aux_loss, norm = train_step(run, batches, *count(batches))
        assert loss == pytest.approx(float(total.detach()) / labels, rel=1e-5)
        assert aux_loss == pytest.approx(float(aux.detach()), rel=1e-5)
        assert norm == pytest.approx(float(torch.stack([g.norm() for g in expected.values()]).norm()), rel=1e-4)
        assert_close(gradients(run), expected)


def test_the_gradient_is_clipped_as_a_whole(make_run):
    run = make_run("--grad_clip", "0.5")
    batches = [batch(run, 0, 1)]
    _, _, norm = train_step(run, batches, *count(batches))
    assert norm > 0.6  # what it was before
    assert torch.stack([g.norm() for g in gradients(run).values()]).norm() == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("moe", [False, True])
def test_a_batch_without_any_label_teaches_nothing_and_spoils_nothing(make_run, moe):
    run = make_run(*["--use_moe"] * moe)
    masked, good = batch(run, 0, 13), batch(run, 2, 12)
    masked["labels"].fill_(IGNORE)
    if not moe:
        train_step(run, [good], *count([good]))
        alone = gradients(run)
        run = make_run()
        loss, _, _ = train_step(run, [masked, good], *count([good]))
        assert loss > 5
        assert_close(gradients(run), alone)
    loss, aux_loss, norm = train_step(run, [masked], *count([masked]))  # nothing but
    assert loss == 0 and (aux_loss > 0) == moe and (norm > 0) == moe
    empty = collate([])
    assert train_step(run, [empty], *count([empty])) == (0, 0, 0)
    assert all(weight.isfinite().all() for weight in run.model.parameters())


@pytest.mark.parametrize("choice", ["projector", "last_layer", "first_last_layer", "attention", "all"])
def test_what_is_frozen_stays_as_it_was(make_run, choice):
    run = make_run("--trainable", choice)
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    batches = [batch(run, 0, 1, 12, 13)]
    train_step(run, batches, *count(batches))
    for name, weight in run.model.named_parameters():
        assert torch.equal(weight, before[name]) == (not weight.requires_grad), name
        assert (weight.grad is None) == (not weight.requires_grad), name
    assert not run.model.vision_encoder.training and run.model.training


@pytest.mark.parametrize("flag", ["--dropout 0.5", "--min_scale 0.5", "--flip"])
def test_what_is_random_differs_from_step_to_step_and_is_the_same_in_the_same(make_run, flag):
    run = make_run(*flag.split())
    batches = [batch(run, 0, 1)]

    def loss(step):
        run.state.step = step
        start = {key: value.clone() for key, value in run.model.text_state_dict().items()}
        value = train_step(run, batches, *count(batches))[0]
        run.model.load_state_dict(start, strict=False)
        return value

    assert loss(3) == loss(3) != loss(4)


# ---------------------------------------------------------------------------- losses that are not finite


def poison(monkeypatch, at_call, spoil):
    """From the `at_call`-th training forward on, `spoil(output)` changes what the model returns."""
    forward, calls = MiniMindVLM.forward, []

    def poisoned(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        calls.append(1)
        if len(calls) >= at_call:
            spoil(out)
        return out

    monkeypatch.setattr(MiniMindVLM, "forward", poisoned)


def nan_loss(out):
    out.loss = out.loss * float("nan")


def infinite_gradient(out):
    out.loss.register_hook(lambda gradient: gradient * float("inf"))


@pytest.mark.parametrize("spoil, dtype", [(nan_loss, "float32"), (nan_loss, "float16"), (infinite_gradient, "float32")])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_anything(
    flags, world, tmp_path, monkeypatch, spoil, dtype
):
    poison(monkeypatch, 4, spoil)
    batches, step = [], trainer.loop.train_step
    monkeypatch.setattr(
        trainer.loop, "train_step", lambda run, batch, *n: batches.append((run, batch)) or step(run, batch, *n)
    )
    with pytest.raises(ValueError) as error:
        main([*flags, "--dtype", dtype, "--save_interval", "3"])
    assert re.match(f"step 4: loss {'nan' if spoil is nan_loss else '[56][.]'}", str(error.value))
    run, culprits = batches[-1]
    for row in culprits[0]["rows"]:
        assert f"{world / 'rows.jsonl'}:{row + 1}" in str(error.value)
    assert str(error.value).count("rows.jsonl:") == len(culprits[0]["rows"]) == 4
    saved = torch.load(tmp_path / "out" / "sft_vlm_64.pth")
    assert json.loads((tmp_path / "out" / "sft_vlm_64.json").read_text())["step"] == 3
    for key, weight in run.model.text_state_dict().items():
        assert torch.equal(weight.half(), saved[key])  # neither the file nor the weights in memory took the step


def test_only_the_batch_whose_loss_is_not_finite_is_named(flags, world, monkeypatch):
    forward, spoilt = MiniMindVLM.forward, []

    def poisoned(self, input_ids, **kwargs):
        out = forward(self, input_ids, **kwargs)
        if kwargs["pixel_values"] is None:  # only row 14, in a batch of its own
            spoilt.append(1)
            nan_loss(out)
        return out

    monkeypatch.setattr(MiniMindVLM, "forward", poisoned)
    with pytest.raises(ValueError, match=r"Its rows: \S*rows.jsonl:14\. Check them"):
        main([*flags, "--batch_size", "1", "--accumulation_steps", "4"])
    assert spoilt


def test_a_gradient_that_overflows_in_fp16_is_left_out_and_the_scale_lowered(make_run, monkeypatch):
    run = make_run("--dtype", "float16")
    before = {name: weight.clone() for name, weight in run.model.named_parameters()}
    batches = [batch(run, 0, 1)]
    with monkeypatch.context() as patch:
        poison(patch, 1, infinite_gradient)
        scale = run.scaler.get_scale()
        train_step(run, batches, *count(batches))
        assert run.scaler.get_scale() == scale / 2
        assert all(torch.equal(weight, before[name]) for name, weight in run.model.named_parameters())
        with pytest.raises(ValueError, match="gradient norm (nan|inf)"):  # but not for ever
            for _ in range(40):
                train_step(run, batches, *count(batches))


# ---------------------------------------------------------------------------- broken pictures


@pytest.fixture
def many(world, tmp_path, flags):
    """Flags for 150 short rows about pictures, of which the last `broken` ones are broken."""

    def make(broken):
        folder = tmp_path / "many"
        shutil.copytree(world / "pictures", folder)
        rows = [
            {"conversations": [turn("user", "<image>"), turn("assistant", "red")], "image": "red.png"}
            for _ in range(150)
        ]
        for i in range(broken):
            (folder / f"broken{i}.jpg").write_bytes(b"\xff\xd8 no picture")
            rows[-1 - i]["image"] = f"broken{i}.jpg"
        data = write_rows(tmp_path / "many.jsonl", rows)
        return [*flags, "--data_path", str(data), "--images_path", str(folder), "--batch_size", "50"]

    return make


def test_under_error_a_broken_picture_stops_the_run_with_its_name(many):
    with pytest.raises(ValueError, match=r"many.jsonl:150: .*broken0.jpg cannot be read: .*\nFix it, or .*skip"):
        main(many(1))


def test_under_skip_a_broken_picture_is_left_out_and_counted(many, tmp_path, capsys):
    run = main([*many(1), "--on_bad_row", "skip", "--epochs", "2"])
    printed = capsys.readouterr().out
    assert printed.count("skipped: ") == 2 and "many.jsonl:150: " in printed
    metadata = json.loads((tmp_path / "out" / "sft_vlm_64.json").read_text())
    assert (metadata["rows"], metadata["broken"]) == (run.state.rows, run.state.broken) == (298, 2)


@pytest.mark.parametrize("broken", [10, 11])
def test_under_skip_ten_broken_pictures_are_borne_and_above_that_a_hundredth(many, broken):
    flags = [*many(broken), "--on_bad_row", "skip"]
    if broken == 10:
        run = main(flags)
        assert (run.state.rows, run.state.broken) == (140, 10)
        return
    with pytest.raises(
        ValueError, match=r"11 of \d+ rows have broken pictures, more than 10 and 1%: the folder\nseems"
    ):
        main(flags)


def test_a_broken_picture_costs_no_step_that_was_done(many, tmp_path, capsys):
    """The last good step is saved with the command that goes on; mended, the run ends as one without the mishap."""
    flags = [*many(1), "--epochs", "2", "--save_interval", "100"]
    with pytest.raises(ValueError, match="broken0.jpg cannot be read"):
        main(flags)
    at = json.loads((tmp_path / "out/sft_vlm_64.json").read_text())["step"]
    printed = capsys.readouterr().out
    assert 0 < at < 3 and f"saved at step {at} of 6. When the error is fixed, resume with:" in printed
    assert "--from_resume" in printed
    shutil.copy(tmp_path / "many/red.png", tmp_path / "many/broken0.jpg")
    resumed = main([*flags, "--from_resume"])
    same(main(into(tmp_path / "whole", flags)), resumed)


def test_what_an_error_in_the_middle_of_an_update_leaves_is_not_saved(flags, tmp_path, monkeypatch):
    def broken(self, optimizer):
        with torch.no_grad():
            next(iter(optimizer.param_groups[0]["params"])).add_(1)
        raise RuntimeError("in the middle")

    monkeypatch.setattr(torch.amp.GradScaler, "step", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        main(flags)
    assert not list((tmp_path / "out").glob("*.pt*"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_without_a_label_moves_nothing_and_is_not_in_the_loss(flags, tmp_path, monkeypatch, optimizer):
    """As when all pictures of a step are broken: AdamW would go on by momentum, Muon by a step of full size."""
    real, seen = trainer.loop.train_step, []

    def count_labels(batch):
        return 0 if len(seen) in (2, 3) else int((batch["labels"][:, 1:] != IGNORE).sum())

    def step(run, *args):
        seen.append(run.state.step)
        return real(run, *args)

    weights = []
    monkeypatch.setattr(trainer.run.Progress, "step", lambda self, *args: weights.append((args, run_weights(args[5]))))

    def run_weights(optimizer):
        return [weight.detach().clone() for group in optimizer.param_groups for weight in group["params"]]

    monkeypatch.setattr(trainer.loop, "train_step", step)
    monkeypatch.setattr(trainer.loop, "count_labels", count_labels)
    monkeypatch.setattr(trainer.run, "report_end", lambda *args: None)
    main([*flags, *LONG, "--batch_size", "2", "--optimizer", optimizer])
    nothing = [i for i, (args, _) in enumerate(weights) if args[2] is None]
    assert nothing and nothing[0] >= 2
    for i in nothing:
        assert all(torch.equal(one, other) for one, other in zip(weights[i - 1][1], weights[i][1]))


# ---------------------------------------------------------------------------- validation


def test_the_validation_loss_is_the_mean_over_all_labels_of_the_held_out_rows(flags, world, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(world / "pictures", elsewhere)
    validate = ["--val_path", str(world / "val.jsonl"), "--val_images_path", str(elsewhere), "--val_interval", "3"]
    flags = [*flags, "--epochs", "2", "--batch_size", "3", "--log_interval", "1"]
    flags += ["--dropout", "0.3", "--min_scale", "0.5", "--flip"]  # of training alone
    run = main([*flags, *validate])
    total, labels = 0, 0
    model = run.model.eval()
    for row in range(4):
        single = run.val_loader.dataset[row]
        with torch.no_grad():
            out = model(single["input_ids"][None], pixel_values=single["pictures"], labels=single["labels"][None])
        n = int((single["labels"][1:] != IGNORE).sum())
        total, labels = total + out.loss.item() * n, labels + n
    assert run.val_loss == pytest.approx(total / labels, rel=1e-5)
    lines = read_metrics(tmp_path / "out" / "sft_vlm_64.metrics.jsonl")
    assert [line["step"] for line in lines if "val_loss" in line] == [3, 6, 9, 10]
    main(into(tmp_path / "not_validated", flags))  # what validates learns no other thing
    assert [line["loss"] for line in lines if "loss" in line] == [
        loss for _, _, loss in losses(tmp_path / "not_validated")
    ]
    assert lines[-1]["val_loss"] == pytest.approx(run.val_loss, rel=1e-5)

    Image.new("RGB", (9, 9), "red").save(elsewhere / "red.png")
    (elsewhere / "green.png").write_bytes(b"broken")
    main([*flags, *validate])
    assert f"skipped in the validation: {world / 'val.jsonl'}:3: " in capsys.readouterr().out


# ---------------------------------------------------------------------------- stopping and going on

LONG = ["--epochs", "2", "--dropout", "0.2", "--log_interval", "1", "--save_interval", "3"]  # 8 steps


def same(run, other) -> None:
    """Weights, optimizer, scaler, position: all tensors equal bit for bit."""
    one, two = run.model.text_state_dict(), other.model.text_state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = run.optimizer.state_dict()["state"], other.optimizer.state_dict()["state"]
    assert one.keys() == two.keys() and len(one) > 10
    assert all(torch.equal(one[i][key], two[i][key]) for i in one for key in one[i])
    assert (run.state, run.scaler.state_dict()) == (other.state, other.scaler.state_dict())


def losses(out_dir):
    (path,) = Path(out_dir).glob("*.metrics.jsonl")
    return [(line["step"], line["epoch"], line["loss"]) for line in read_metrics(path)]


def into(folder, flags):
    return [*flags, "--out_dir", str(folder)]


def interrupt(monkeypatch, step, *signals):
    """Sends this process signals in the middle of a step."""
    real = trainer.loop.train_step

    def train_step(run, *args):
        if run.state.step == step - 1:
            for number in signals:
                os.kill(os.getpid(), number)
        return real(run, *args)

    monkeypatch.setattr(trainer.loop, "train_step", train_step)


def stopped_and_resumed(monkeypatch, train, flags):
    """The run of a training that is stopped after its first step, and goes on."""
    with monkeypatch.context() as patch:
        interrupt(patch, 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train(flags)
    return train([*flags, "--from_resume"])


@pytest.mark.parametrize(
    "number, step, extra",
    [
        (signal.SIGTERM, 2, []),  # in the middle of an epoch
        (signal.SIGHUP, 2, []),  # the terminal was closed
        (signal.SIGINT, 4, ["--use_moe"]),  # in its last step
        (signal.SIGTERM, 5, ["--dtype", "float16", "--accumulation_steps", "1", "--num_workers", "1"]),
    ],
)
def test_a_run_that_is_stopped_and_resumed_ends_as_one_that_never_stopped(
    flags, tmp_path, monkeypatch, capsys, number, step, extra
):
    flags = [*flags, *LONG, "--min_scale", "0.5", *extra]
    whole = main(into(tmp_path / "whole", flags))
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stopped = into(tmp_path / "stopped", flags)
    monkeypatch.setattr("sys.argv", ["/some/where/train_sft_vlm.py", *stopped])
    with monkeypatch.context() as patch:
        interrupt(patch, step, number)
        with pytest.raises(SystemExit) as stop:
            main(stopped)
    assert stop.value.code == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    printed = capsys.readouterr().err
    assert f"stopped at step {step} of 8. To resume, type:\n  python train_sft_vlm.py " in printed
    assert [line[0] for line in losses(tmp_path / "stopped")] == list(range(1, step + 1))

    (last,) = printed.split("To resume, type:\n")[1].splitlines()
    command = shlex.split(last)
    resumed = main(command[2:])
    same(whole, resumed)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    (path,) = (tmp_path / "whole").glob("*.pth")
    one, two = torch.load(path), torch.load(tmp_path / "stopped" / path.name)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_stop_in_the_very_last_step_just_ends_the_run(flags, tmp_path, monkeypatch):
    interrupt(monkeypatch, 4, signal.SIGTERM)
    assert main(flags).state.step == 4
    again = main([*flags, "--from_resume"])  # nothing is left to do, and nothing is done
    assert again.state.step == 4 and again.val_loss is None


@pytest.mark.parametrize("at", [2, 4], ids=["between steps", "after the last"])
def test_a_validation_stops_when_asked_and_the_steps_before_it_are_kept(
    flags, world, tmp_path, monkeypatch, capsys, at
):
    flags = [*flags, "--val_path", str(world / "val.jsonl"), "--val_interval", str(at), "--save_interval", "100"]
    with monkeypatch.context() as patch:
        seen, real = [], trainer.loop.count_labels

        def count_labels(batch):  # of two batches of rows to validate on
            if len(batch["rows"]) == 2 and "validating" in seen:
                seen.append(batch)
                os.kill(os.getpid(), signal.SIGINT)
            return real(batch)

        def validate(*args):
            seen.append("validating")
            return real_validate(*args)

        real_validate = trainer.loop.validate
        patch.setattr(trainer.loop, "count_labels", count_labels)
        patch.setattr(trainer.loop, "validate", validate)
        with pytest.raises(SystemExit) as stop:
            main([*flags, "--batch_size", "2"])
    assert stop.value.code == 130 and len(seen) == 2  # the second batch was not looked at
    assert f"stopped at step {at} of 7. To resume" in capsys.readouterr().err
    assert json.loads((tmp_path / "out/sft_vlm_64.json").read_text())["step"] == at
    assert all("val_loss" not in line for line in read_metrics(tmp_path / "out/sft_vlm_64.metrics.jsonl"))


def test_a_second_ctrl_c_stops_at_once(flags, tmp_path, monkeypatch):
    def leave(number, frame, *more):
        assert (number, more) == (signal.SIGINT, ("--from_resume",))
        raise KeyboardInterrupt  # in place of os._exit, which would end the test too

    monkeypatch.setattr(trainer.guard, "leave", leave)
    interrupt(monkeypatch, 3, signal.SIGINT, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        main([*flags, "--save_interval", "1"])
    assert json.loads((tmp_path / "out" / "sft_vlm_64.json").read_text())["step"] == 2


@pytest.mark.parametrize("suffix", [".pth", ".json"])
def test_a_whole_checkpoint_resumes_beside_weights_that_are_damaged(flags, tmp_path, monkeypatch, capsys, suffix):
    flags = [*flags, *LONG]
    whole = main(into(tmp_path / "whole", flags))
    with monkeypatch.context() as patch:
        interrupt(patch, 3, signal.SIGTERM)
        with pytest.raises(SystemExit):
            main(flags)
    path = (tmp_path / "out/sft_vlm_64.pth").with_suffix(suffix)
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=path.name):
        main(flags)
    capsys.readouterr()
    same(whole, main([*flags, "--from_resume"]))
    assert "It will be written again from the checkpoint, which is complete" in capsys.readouterr().out
    assert read_weights(tmp_path / "out/sft_vlm_64.pth").keys() == whole.model.text_state_dict().keys()


def test_a_terminal_that_is_closed_may_say_so_twice_and_nohup_keeps_it_from_saying_so(flags, tmp_path, monkeypatch):
    interrupt(monkeypatch, 3, signal.SIGHUP, signal.SIGHUP)
    with pytest.raises(SystemExit):
        main([*flags, "--save_interval", "100"])
    assert json.loads((tmp_path / "out" / "sft_vlm_64.json").read_text())["step"] == 3
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        main(flags)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert json.loads((tmp_path / "out" / "sft_vlm_64.json").read_text())["step"] > 3


def test_a_resumed_run_keeps_the_batches_of_its_steps(flags, tmp_path, monkeypatch, capsys):
    flags = [*flags, *LONG, "--batch_size", "2"]
    whole = main(into(tmp_path / "whole", [*flags, "--accumulation_steps", "2"]))
    stopped = into(tmp_path / "stopped", flags)
    with monkeypatch.context() as patch:
        interrupt(patch, 3, signal.SIGINT)
        with pytest.raises(SystemExit):
            main([*stopped, "--accumulation_steps", "2"])
    resumed = main([*stopped, "--accumulation_steps", "1", "--from_resume"])
    assert "resumed with --accumulation_steps 2, to keep 2 batches per step" in capsys.readouterr().out
    same(whole, resumed)

    monkeypatch.setattr(trainer.run, "world_size", lambda: 3)
    with pytest.raises(
        ValueError, match="the run had 2 batches of 2 rows per step, which 3 ranks cannot share equally"
    ):
        fit_accumulation(resumed.args, resumed.state)


def test_settings_that_follow_from_the_width_are_kept_and_may_be_given_when_the_run_is_resumed(flags, tmp_path):
    """As an older checkpoint, all of whose flags were explicit, is resumed."""
    flags = [flag for flag in flags if flag not in ("--batch_size", "4")]
    run = main([*flags, *LONG])
    settings = {"optimizer": "muon", "learning_rate": 3e-3, "projector_learning_rate": 2e-3, "batch_size": 16}
    kept = json.loads((tmp_path / "out" / "sft_vlm_64.json").read_text())["settings"]
    saved = torch.load(tmp_path / "out" / "sft_vlm_64.resume.pt")["flags"]
    assert kept == settings == {key: saved[key] for key in settings} and run.total_steps == 2
    for given in ([], [part for key, value in settings.items() for part in (f"--{key}", str(value))]):
        same(run, main([*flags, *LONG, *given, "--from_resume"]))


def test_other_flags_other_data_or_another_tokenizer_are_refused_by_name(flags, tmp_path, world, tokenizer_folder):
    main(flags)
    resume = [*flags, "--from_resume"]
    with pytest.raises(ValueError) as error:
        main([*resume, "--learning_rate", "1e-5", "--batch_size", "2", "--trainable", "attention"])
    assert "sft_vlm_64.resume.pt was made with other flags: " in str(error.value)
    for change in ("learning_rate was 0.003, is 1e-05", "batch_size was 4, is 2", "trainable was all, is attention"):
        assert change in str(error.value)
    assert str(error.value).count(" was ") == 1 + 3

    longer = tmp_path / "rows.jsonl"
    shutil.copy(world / "rows.jsonl", longer)
    with longer.open("a") as file:
        file.write((world / "val.jsonl").read_text())
    with pytest.raises(ValueError, match="data_path was .* rows of data was 14, is 18"):
        main([*resume, "--data_path", str(longer)])

    other = tmp_path / "tokenizer"
    shutil.copytree(tokenizer_folder, other)
    (other / "tokenizer.json").write_text((tokenizer_folder / "tokenizer.json").read_text() + "\n")
    with pytest.raises(ValueError, match="sha256 of tokenizer was [0-9a-f]{64}, is [0-9a-f]{64}$"):
        main([*resume, "--tokenizer_path", str(other)])

    shutil.move(tmp_path / "out", tmp_path / "moved")  # what does not change what is learned may change
    free = ["--out_dir", str(tmp_path / "moved"), "--save_interval", "7", "--log_interval", "1", "--on_bad_row", "skip"]
    assert main([*resume, *free]).state.step == 4


def test_nothing_to_resume_is_said_and_starts_at_the_beginning(flags, capsys):
    run = main([*flags, "--from_resume"])
    printed = capsys.readouterr().out
    assert "nothing to resume at " in printed and "sft_vlm_64.resume.pt: starting at step 0" in printed
    assert run.state.step == 4


def test_a_run_without_resume_starts_anew_and_so_does_its_metrics_file(flags, tmp_path):
    main([*flags, "--epochs", "2", "--log_interval", "1"])
    assert len(losses(tmp_path / "out")) == 8
    main([*flags, "--log_interval", "1"])
    assert [line[0] for line in losses(tmp_path / "out")] == [1, 2, 3, 4]


def test_a_run_that_stops_before_it_saves_is_not_resumed_from_an_earlier_one(flags, tmp_path, monkeypatch, capsys):
    main([*flags, "--learning_rate", "1e-3"])
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(trainer.loop, "train_step", lambda *_: 1 / 0)
        main(flags)
    kept = tmp_path / "out/sft_vlm_64.resume.old.pt"
    assert kept.is_file() and f"an earlier run's checkpoint is now {kept}" in capsys.readouterr().out
    run = main([*flags, "--from_resume"])  # other flags than those of the earlier run, and from its first step
    assert "nothing to resume" in capsys.readouterr().out and run.state.step == 4


@pytest.mark.parametrize("seed", [202601011200, 2**70])
def test_a_seed_may_be_as_large_as_a_date(flags, seed):
    assert main([*flags, "--seed", str(seed)]).state.step == 4


# ---------------------------------------------------------------------------- precision and memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_precision_learns_and_keeps_fp32_weights(flags, tmp_path, dtype, make_vlm):
    rates = ["--learning_rate", "3e-3", "--projector_learning_rate", "3e-3"]
    run = main([*flags, *rates, "--dtype", dtype, "--epochs", "8", "--batch_size", "8", "--log_interval", "1"])
    curve = [loss for _, _, loss in losses(tmp_path / "out")]
    assert curve[-1] < curve[0] - 1.5
    assert {weight.dtype for weight in run.model.text_state_dict().values()} == {torch.float32}
    sidecar = json.loads(run.checkpoint.path.with_suffix(".json").read_text(encoding="utf-8"))
    assert sidecar["vision_model"]["sha256"] == fingerprint(make_vlm().vision_encoder)  # of the encoder on the disk
    assert run.scaler.is_enabled() == (dtype == "float16")
    assert (run.dtype == torch.float32) == (dtype == "float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_frozen_encoder_cast_once_sees_the_same_as_one_cast_in_each_step(make_vlm, dtype):
    model = make_vlm()
    pictures = torch.randn(3, 3, 32, 32)
    with autocast(torch.device("cpu"), dtype):
        expected = model.encode_pictures(pictures)
        cast_frozen(model.vision_encoder, dtype)
        assert torch.equal(model.encode_pictures(pictures), expected)
    kinds = {weight.dtype for name, weight in model.vision_encoder.named_parameters() if name.endswith("fc1.weight")}
    assert kinds == {dtype}
    learning = torch.nn.Linear(2, 2)
    assert cast_frozen(learning, dtype).weight.dtype == torch.float32


@pytest.mark.parametrize(
    "dtype, has, expected",
    [
        ("bfloat16", "amx_bf16", True),
        ("bfloat16", "avx512_bf16", True),
        ("bfloat16", "avx512_vnni", False),
        ("float32", "amx_bf16", False),
    ],
)
def test_attention_is_in_blocks_in_bfloat16_on_cpus_that_compute_in_it(make_vlm, monkeypatch, dtype, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True})
    model = make_vlm()
    choose_attention(model, torch.device("cpu"), getattr(torch, dtype))
    assert sum(layer.self_attn.kernel is attention_in_blocks for layer in model.model.layers) == expected * len(
        model.model.layers
    )


def test_compiling_without_a_compiler_is_refused_at_once(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(common.devices.shutil, "which", lambda name: None)
    monkeypatch.setenv("CXX", "mycc")
    with pytest.raises(ValueError, match=r"--compile: needs a C\+\+ compiler on a CPU, but mycc was not found"):
        main([*flags, "--compile"])
    assert not (tmp_path / "out").exists()


def test_gradient_checkpointing_changes_memory_alone(flags, tmp_path):
    flags = [*flags, "--dropout", "0.2", "--use_moe", "--log_interval", "1"]
    plain = main(into(tmp_path / "plain", flags))
    checkpointed = main(into(tmp_path / "checkpointed", [*flags, "--gradient_checkpointing"]))
    assert checkpointed.model.model.gradient_checkpointing and not plain.model.model.gradient_checkpointing
    assert sum(losses(tmp_path / "checkpointed"), ()) == pytest.approx(sum(losses(tmp_path / "plain"), ()), abs=1e-5)


@pytest.mark.slow
def test_compiled_training_makes_the_same_losses(flags, tmp_path, monkeypatch):
    """As captured by torch.compile; what C++ or Triton then make of it would take minutes on a CPU."""
    compiled, batches, compile = [], set(), torch.compile

    def backend(graph, inputs):
        def run(*inputs):
            batches.update(
                len(x) for x in inputs if torch.is_tensor(x) and x.ndim == 3 and x.shape[2] == 64
            )  # (B, T, D)
            return graph(*inputs)

        return run

    def captured(forward, **how):
        compiled.append(type(forward.__self__).__name__)
        return compile(forward, **how | {"backend": backend})

    monkeypatch.setattr(torch, "compile", captured)
    monkeypatch.setattr(common.devices.shutil, "which", lambda name: name)  # none is needed here
    flags = [*flags, "--log_interval", "1", "--batch_size", "3"]
    main(into(tmp_path / "plain", flags))
    assert not compiled
    run = main(into(tmp_path / "compiled", [*flags, "--compile"]))
    layers = run.model.config.num_hidden_layers, run.model.vision_encoder.config.num_hidden_layers
    assert compiled == ["MiniMindBlock"] * layers[0] + ["CLIPEncoderLayer"] * layers[1]
    assert len(run.loader.data) % 3 == 2 and batches == {3}  # nothing is compiled for a last batch of 2
    assert sum(losses(tmp_path / "compiled"), ()) == pytest.approx(sum(losses(tmp_path / "plain"), ()), rel=1e-5)
    plain, saved = (torch.load(tmp_path / folder / "sft_vlm_64.pth") for folder in ("plain", "compiled"))
    assert plain.keys() == saved.keys()  # no _orig_mod in the names


# ---------------------------------------------------------------------------- what the JSON of weights says of the data


def test_the_json_names_questions_of_the_rows_and_else_those_of_the_weights_before(flags, world, tmp_path):
    out = tmp_path / "out"

    def train_and_read(*more):
        main([*flags, "--hidden_size", "64", *more])
        return json.loads((out / "sft_vlm_64.json").read_text(encoding="utf-8"))

    metadata = train_and_read()
    assert metadata["prompts"] == {"en": ["What colour is this?"], "zh": ["这是什么颜色？"]}
    assert metadata["rows_without_picture"] == 1 and metadata["pictures_first"] is False
    before = shutil.copytree(out, tmp_path / "before") / "sft_vlm_64.pth"
    start = ["--from_weight", str(before), "--data_path"]
    text = write_rows(tmp_path / "text.jsonl", [{"conversations": [turn("user", "Hello"), turn("assistant", "Hi.")]}])
    metadata = train_and_read(*start, str(text))
    assert metadata["rows_without_picture"] == 1 and metadata["prompts"]["zh"] == ["这是什么颜色？"]
    chat = {"conversations": [turn("user", "<image>\nWhat?"), turn("assistant", "That.")], "image": "red.png"}
    metadata = train_and_read(*start, str(write_rows(tmp_path / "own.jsonl", [chat, chat])))
    assert metadata["prompts"] == {"en": ["What?"], "zh": ["这是什么颜色？"]}
    assert metadata["rows_without_picture"] == 0 and metadata["pictures_first"] is True
