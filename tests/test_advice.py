"""trainer/advice.py: what a run says before it begins and after its end, and that it can be typed."""

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

import eval_vlm
import train_pretrain_vlm
import train_sft_vlm
import trainer.advice
from scripts import train_llm
from tests.conftest import turn, write_rows
from tests.test_loop import losses
from trainer.advice import describe_memory, peak_memory, sizes

SCRIPTS = [train_pretrain_vlm, train_sft_vlm, train_llm]
ALL = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)


@pytest.fixture
def flags_of(flags):
    """flags_of(script) → command-line flags of 4 steps on 14 rows."""

    def of(script):
        if script is not train_llm:
            return flags
        return [
            part
            for flag, value in zip(flags[::2], flags[1::2])
            if flag not in ("--images_path", "--vision_model_path")
            for part in (flag, value)
        ]

    return of


def pasted(out: str) -> list[str]:
    """The last command that was printed, as a shell takes it."""
    return shlex.split(out[out.rindex("\n$ ") + 3 :].replace("\\\n", " "))


# ---------------------------------------------------------------------------- before


def test_epochs_and_batch_make_enough_steps_and_no_more_than_plenty():
    for rows, batch_size, ranks in itertools.product((1, 7, 30, 101, 999, 10_000, 10**6), (4, 16, 32, 100), (1, 2, 8)):
        epochs, size = sizes(rows, batch_size, ranks)
        steps = -(-rows // (size * ranks))  # of an epoch
        assert epochs * steps >= 250 and (epochs == 1 or epochs * steps <= 5000)
        assert epochs <= 20 or (epochs - 1) * steps < 250  # more passes only where it takes them
        assert size == batch_size or 6 <= size < batch_size and 20 * rows < 250 * 2 * (size + 1) * ranks


def test_a_hundred_rows_want_the_settings_that_were_measured_and_many_rows_fewer_passes():
    assert sizes(100, 16) == sizes(100, 32) == (20, 8)
    assert [sizes(rows, 16) for rows in (1000, 10_000, 40_000, 200_000)] == [(20, 16), (8, 16), (2, 16), (1, 16)]


@ALL
def test_a_run_of_few_steps_says_so_with_flags_that_make_enough(script, flags_of, monkeypatch, capsys):
    given = flags_of(script)
    script.main(given)
    out = capsys.readouterr().out
    assert "only 4 steps, too few to learn much: 14 rows, 4 per batch.\n" in out
    assert out.index("only 4 steps") < out.index("steps done")
    (suggested,) = re.findall(r"For this many rows try (.+)\n", out)
    monkeypatch.setattr("trainer.loop.train_epoch", lambda run, epoch: None)
    run = script.main([*given, *suggested.split()])
    assert 240 <= run.total_steps <= 260 and "too few" not in capsys.readouterr().out


def test_the_flags_count_rows_as_often_as_an_epoch_passes_over_them(flags, monkeypatch, capsys):
    monkeypatch.setattr("trainer.loop.train_epoch", lambda run, epoch: None)
    train_sft_vlm.main([*flags, "--data_weights", "3.5", "--accumulation_steps", "2"])
    out = capsys.readouterr().out
    assert "only 7 steps, too few to learn much: 49 rows, 4 per batch.\n" in out
    assert "For this many rows try --epochs 20 --batch_size 4 --accumulation_steps 1\n" in out
    train_sft_vlm.main([*flags, "--epochs", "13"])  # 52 steps
    assert "too few" not in capsys.readouterr().out


# ---------------------------------------------------------------------------- after


@ALL
def test_a_run_that_ends_worse_than_guessing_is_said_to_have_diverged(script, flags_of, capsys):
    everything = [] if script is train_llm else ["--trainable", "all"]
    script.main([*flags_of(script), *everything, "--epochs", "5", "--learning_rate", "3", "--grad_clip", "100"])
    out = capsys.readouterr().out
    text = r"It diverged: a loss of (\S+) is worse than guessing, (\S+)\. Start again from\nthe previous weights with "
    ((loss, guessing, rates),) = re.findall(text + "(.+)", out)
    assert float(loss) > 6 and guessing == "5.70"  # ln 300
    assert rates.startswith("--learning_rate 0.6") and "eval_vlm.py" not in out
    script.parse_args(rates.split())


def test_divergence_is_judged_by_the_end_not_by_where_a_run_began(flags, trained, world, tmp_path, capsys):
    """Weights that know other words begin worse than guessing, and a short run has but one line of metrics."""
    rows = [{"conversations": [turn("user", "Say it."), turn("assistant", "Zzzz qqqq xxxx!")]}] * 8
    path = write_rows(tmp_path / "rows.jsonl", rows)
    given = [*trained, "--from_weight", "sft_vlm", "--data_path", str(path), "--epochs", "20"]
    rates = ["--optimizer", "adamw", "--learning_rate", "3e-3", "--projector_learning_rate", "3e-3"]
    folder = ["--out_dir", str(tmp_path / "out")]
    shutil.copytree(trained[trained.index("--out_dir") + 1], tmp_path / "out")
    train_sft_vlm.main([*given, *rates, *folder, "--log_interval", "1"])
    first, *_, last = losses(tmp_path / "out")
    assert first[2] > 7 > 5 > last[2] and "diverged" not in capsys.readouterr().out
    train_sft_vlm.main([*flags, "--batch_size", "14", "--epochs", "1"])  # from scratch, one step, about ln 300
    assert "diverged" not in capsys.readouterr().out


@ALL
def test_it_ends_with_what_it_took_an_answer_and_the_next_command(script, flags_of, world, tmp_path, capsys):
    run = script.main([*flags_of(script), "--val_path", str(world / "val.jsonl")])
    out = capsys.readouterr().out
    assert re.search(r"4 steps done.*\nIt took [\d.]+ s and at most [\d.]+ GB of memory\n", out)
    shown = (
        f"Example answer, {world / 'val.jsonl'}:1:\n  question  What colour is this?\n  expected  It is red.\n  answer"
    )
    assert shown in out and max(len(line) for line in out[out.index("  question") :].splitlines()[:3]) <= 80
    command = pasted(out)
    if script is train_llm:
        assert out.count("stage 1") == 1 and command[:2] == ["python", "train_pretrain_vlm.py"]
        args = train_pretrain_vlm.parse_args(command[2:])
        assert args.from_weight == str(run.checkpoint.path) and args.trainable == "all"
        return
    assert command[:2] == ["python", "eval_vlm.py"] and f"--image {world / 'pictures' / 'red.png'}" in " ".join(command)
    eval_vlm.main([*command[2:], "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "What colour is this?" in printed
    assert trainer.advice.answer(run, run.val_loader.dataset.tokenizer, run.val_loader.dataset, 0).strip() in printed


@pytest.mark.parametrize("extra", [[], ["--dtype", "bfloat16", "--gradient_checkpointing", "--use_moe"]])
def test_the_answer_is_what_the_model_gives_and_changes_nothing(trained, world, tmp_path, capsys, extra):
    shutil.copytree(trained[trained.index("--out_dir") + 1], tmp_path / "out")
    weights = str(tmp_path / "out" / "sft_vlm_64.pth")
    given = [*trained, "--out_dir", str(tmp_path / "out"), "--from_weight", weights, "--learning_rate", "1e-9"]
    given += ["--optimizer", "adamw", "--projector_learning_rate", "1e-9", "--data_path", str(world / "rows.jsonl")]
    given += ["--images_path", str(world / "pictures"), *extra]
    rows = [  # the question after which the picture is shown, and one more turn, which is not asked
        {
            "conversations": [
                turn("user", "<image>\n<image>\nWhich colours are these?"),
                turn("assistant", "They are red and blue."),
                turn("user", "确定吗？"),
                turn("assistant", "是的。"),
            ],
            "image": "red.png, blue.png",
        }
    ]
    run = train_sft_vlm.main([*given, "--val_path", str(write_rows(tmp_path / "val.jsonl", rows))])
    out = capsys.readouterr().out
    assert (
        "  question  Which colours are these?\n  expected  They are red and blue.\n  answer    They are red and" in out
    )
    assert run.model.training and not run.model.vision_encoder.training
    data, state = run.val_loader.dataset, torch.random.get_rng_state()
    trainer.advice.answer(run, data.tokenizer, data, 0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_long_answers_are_cut_and_broken_pictures_left_out(flags, world, tmp_path, capsys):
    shutil.copytree(world / "pictures", tmp_path / "pictures")
    asked = {
        "conversations": [turn("user", "长" * 200 + "\n<image>"), turn("assistant", "b" * 200)],
        "image": "red.png",
    }
    path = write_rows(tmp_path / "val.jsonl", [asked])
    given = [*flags, "--images_path", str(tmp_path / "pictures"), "--val_path", str(path)]
    train_sft_vlm.main(given)
    out = capsys.readouterr().out
    assert f"  question  {'长' * 65}...\n  expected  {'b' * 65}...\n" in out and "--prompt" not in out
    (tmp_path / "pictures/red.png").write_bytes(b"broken")
    train_sft_vlm.main([*flags, "--val_path", str(path), "--val_images_path", str(tmp_path / "pictures")])
    out = capsys.readouterr().out
    assert "skipped in the validation" in out and "Example answer" not in out and "eval_vlm.py" in out


def test_where_pictures_lie_in_a_zip_the_command_takes_one_of_ours(flags, world, tmp_path, capsys):
    archive = shutil.make_archive(str(tmp_path / "pictures"), "zip", world / "pictures")
    train_sft_vlm.main([*flags, "--images_path", archive])
    command = pasted(capsys.readouterr().out)
    assert command[command.index("--image") + 1] == "dataset/eval_images/scene_1.png"
    eval_vlm.main([*command[2:], "--device", "cpu", "--max_new_tokens", "2"])


def test_other_ranks_say_nothing_and_answer_nothing(flags, world, monkeypatch):
    run = train_sft_vlm.main([*flags, "--val_path", str(world / "val.jsonl")])
    monkeypatch.setattr(trainer.advice, "is_main", lambda: False)
    monkeypatch.setattr(trainer.advice, "answer", None)
    trainer.advice.report_end(run, None, 1)


# ---------------------------------------------------------------------------- memory


def test_the_memory_is_the_most_there_was():
    code = "from trainer.advice import peak_memory as p; a = p(); bytearray(300_000_000); print(p() - a)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 200e6 < float(done.stdout) < 320e6
    assert peak_memory() >= 0.9 * psutil.Process().memory_info().rss


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what the starting process had")
def test_the_memory_of_the_starting_process_is_not_counted():
    code = """
import subprocess, sys
filled = b"x" * 1_000_000_000
subprocess.run([sys.executable, "-c", "from trainer.advice import peak_memory; print(peak_memory())"], check=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 900e6


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such file")
def test_a_sandbox_that_does_not_report_a_peak_costs_no_run(monkeypatch):
    monkeypatch.setattr(trainer.advice.Path, "read_text", lambda path: "Name:\tpython\nVmRSS:\t  100 kB\n")
    assert peak_memory() >= 0.9 * psutil.Process().memory_info().rss


def test_on_windows_and_macs_memory_is_what_they_report(monkeypatch):
    usage = pytest.importorskip("resource").getrusage(0).ru_maxrss
    monkeypatch.setattr(trainer.advice.sys, "platform", "darwin")
    assert 1024 * usage > peak_memory() >= usage  # bytes, where Linux has kilobytes
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory() == 123


def test_the_memory_of_the_gpu_is_told_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 3_400_000_000 if device.index == 1 else 0)
    gpu = torch.device("cuda", 1)
    assert describe_memory(1_200_000_000, gpu, 2) == "1.2 GB of memory, on the GPU 3.4 GB, in each of 2 processes"
    assert describe_memory(1_200_000_000, torch.device("cpu"), 1) == "1.2 GB of memory"


# ---------------------------------------------------------------------------- going on from what is finished


@ALL
def test_a_finished_run_says_that_it_is_and_how_to_train_on(script, flags_of, capsys):
    given = flags_of(script)
    path = script.main(given).checkpoint.path
    before = {file.name: file.read_bytes() for file in path.parent.iterdir() if file.suffix != ".png"}
    capsys.readouterr()
    assert script.main([*given, "--from_resume"]).state.step == 4
    out = capsys.readouterr().out
    assert "this run is finished, 4 of 4 steps are done. To train further from its weights,\n" in out
    assert f",\nreplace --from_resume by --from_weight {path} --epochs 1\n" in out
    assert "It took" not in out and "only 4 steps" not in out
    with pytest.raises(
        ValueError,
        match=f"finished run. To train further .*\nreplace --from_resume by --from_weight {path} --epochs 3$",
    ):
        script.main([*given, "--from_resume", "--epochs", "3"])
    assert {file.name: file.read_bytes() for file in path.parent.iterdir() if file.suffix != ".png"} == before
    assert script.main([*given, "--from_weight", str(path), "--epochs", "3"]).state.step == 12


def test_a_run_that_is_not_finished_keeps_its_epochs(flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr("trainer.loop.validate", lambda *_: 1 / 0)
        train_sft_vlm.main([*flags, "--val_path", flags[1], "--val_interval", "2", "--save_interval", "2"])
    with pytest.raises(ValueError, match="was made with other flags: epochs was 1, is 3"):
        train_sft_vlm.main([*flags, "--from_resume", "--epochs", "3"])
