"""common/start.py: a script that is stopped, or that misses a package, ends with one message at any time."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common import start
from scripts.quickstart.steps import read_records

ROOT = Path(__file__).parent.parent
SCRIPTS = [
    path.relative_to(ROOT)
    for folder in (".", "scripts", "scripts/benchmark", "scripts/quickstart", "scripts/convert_vlm", "dataset")
    for path in sorted((ROOT / folder).glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text(encoding="utf-8") and path.stem != "check_export"
]  # check_export.py is started by its path, where nothing of this repository can be seen


def as_typed(path, *flags):
    """python eval_vlm.py or python -m scripts.quickstart"""
    if path.parent == Path():
        return [str(path)]
    return ["-m", ".".join(path.with_suffix("").parts).removesuffix(".__main__")]


def run(*command, **options):
    return subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


# ---------------------------------------------------------------------------- how they start


def test_the_scripts_that_users_start_are_found():
    names = set(map(str, SCRIPTS))
    assert {"train_sft_vlm.py", "eval_vlm.py", "scripts/quickstart/__main__.py", "dataset/scenes.py"} <= names
    assert len(names) >= 17


@pytest.mark.parametrize("path", SCRIPTS, ids=str)
def test_without_its_packages_every_script_says_what_to_type(path):
    done = run("-S", *as_typed(path))  # -S: no site-packages
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and done.stdout == ""
    assert line.startswith("error: No module named '") and line.endswith("'. Type: pip install -r requirements.txt")


@pytest.mark.parametrize("path", [path for path in SCRIPTS if path.parent != Path()], ids=str)
def test_a_script_that_is_started_by_its_path_says_how_to_start_it(path):
    done, name = run(str(path), "--help"), path.as_posix().removesuffix("/__main__.py")
    assert (done.returncode, done.stderr) == (1, f"type {' '.join(as_typed(path))} instead of {name}\n")


def test_a_package_of_another_version_is_reported_like_a_missing_one(tmp_path):
    (tmp_path / "tokenizers.py").touch()  # it comes before the installed one
    script, old = ["-m", "scripts.train_tokenizer"], os.environ | {"PYTHONPATH": str(tmp_path)}
    done = run(*script, env=old)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot import name ")
    assert done.stderr.count("\n") == 1 and done.stderr.endswith("Type: pip install -r requirements.txt\n")
    assert "Traceback" in run(*script, env=old | {"MINIMIND_TRACEBACK": "1"}).stderr


def test_an_environment_that_is_not_active_is_named(tmp_path, monkeypatch):
    (tmp_path / ".venv").mkdir()
    monkeypatch.chdir(tmp_path)
    for prefix, what in (("/usr", ". .venv/bin/activate"), ("/usr/venv", "pip install -r requirements.txt")):
        monkeypatch.setattr(sys, "prefix", prefix)
        monkeypatch.setattr(sys, "base_prefix", "/usr")
        assert start.missing_package(ImportError("No module named 'torch'")) == f"No module named 'torch'. Type: {what}"


# ---------------------------------------------------------------------------- closed pipes


def head(last: str, *command, **options):
    """(status, stderr) of a script of whose output the lines up to this one are read before the pipe is closed."""
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen([sys.executable, *command], **options) as process:
        while last and process.stdout.readline().strip() != last:
            assert process.poll() is None
        process.stdout.close()
        return process.wait(timeout=300), process.stderr.read()


def test_help_into_a_closed_pipe_ends_silently():
    for path in ("train_sft_vlm.py", "scripts/quickstart/__main__.py", "dataset/toys.py"):
        status, stderr = head("", *as_typed(Path(path)), "--help")
        assert status in (0, start.BROKEN_PIPE) and stderr == "", path


@pytest.mark.parametrize("rest", ["print('last')", "[print(i) for i in range(10**5)]"])
def test_a_closed_pipe_ends_a_script_silently(rest):
    """One line is written by Python itself at the very end; many fill the pipe before."""
    code = f"from common.start import begin\nbegin()\nprint('first', flush=True)\ninput()\n{rest}"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, stdin=-1, stdout=-1, stderr=-1) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait() in (0, start.BROKEN_PIPE) and process.stderr.read() == ""


def test_another_broken_pipe_is_reported():
    done = run("-c", "from common.start import begin\nbegin()\nraise BrokenPipeError(32, 'of a worker')")
    assert done.returncode == 1 and "of a worker" in done.stderr


@pytest.mark.slow
def test_a_training_with_a_closed_pipe_has_saved(flags, tmp_path):
    (tmp_path / "held.py").write_text(HELD)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    status, stderr = head("ready", str(tmp_path / "held.py"), "step", *flags, env=env)
    assert status == start.BROKEN_PIPE and "Traceback" not in stderr and "Broken" not in stderr
    assert (tmp_path / "out/sft_vlm_64.json").is_file()


# ---------------------------------------------------------------------------- the command to resume


def test_the_command_to_resume_is_the_one_that_was_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/train_sft_vlm.py", "--epochs", "2", "--from_resume"])
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert start.command() == "python train_sft_vlm.py --epochs 2 --from_resume"
    for given in ([], ["--from_resume"], ["--from_resume", "0"], ["--from_resume=1"]):
        monkeypatch.setattr(sys, "argv", ["train_sft_vlm.py", *given, "--epochs", "2"])
        assert start.command("--from_resume") == "python train_sft_vlm.py --epochs 2 --from_resume"
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--restart", "--out_dir", "my out"])
    assert start.command() == "python quickstart.py --out_dir 'my out'"  # resumes instead of removing the saved state


def test_on_several_machines_the_command_to_resume_has_the_processes_of_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_sft_vlm.py", "--epochs", "2"])
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert start.command().startswith("torchrun --nnodes 2 --nproc_per_node 4 --master_addr ... train_sft_vlm.py")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert start.command("--from_resume") == "torchrun --nproc_per_node 8 train_sft_vlm.py --epochs 2 --from_resume"


# ---------------------------------------------------------------------------- how they are stopped

# Trains, but says "ready" and holds at one place, so that the signal comes there.
HELD = """
import os, sys, time
from common.start import begin

begin()
import torch
import train_sft_vlm as script, trainer.feature_cache, trainer.loader, trainer.loop
from common import cli

where, first = sys.argv.pop(1), os.environ.get("RANK", "0") == "0"

def hold(real, seconds):
    def held(*args, **kwargs):
        print("ready", flush=True)
        time.sleep(seconds)
        return real(*args, **kwargs)
    return held

if where == "data" or where == "rank 0" and first:
    trainer.loader.VLMDataset = hold(trainer.loader.VLMDataset, 60)
if where == "features":
    trainer.feature_cache.encode = hold(trainer.feature_cache.encode, 60)
if where == "step":
    trainer.loop.train_step = hold(trainer.loop.train_step, 0.3)
if where == "validation":
    trainer.loop.validate = hold(trainer.loop.validate, 0.3)
cli.run_main(lambda: script.main(sys.argv[1:]))
"""
# The same as the step of a recipe.
RECIPE = """
import sys
from pathlib import Path
from common.start import begin

begin()
from scripts.quickstart.steps import Step, run_steps

step = Step("training", "of two ranks", ["torchrun", "--nproc_per_node", "2", *sys.argv[2:]], resumable=True)
run_steps([step], Path(sys.argv[1]), "the command that goes on")
"""


def stop(command, number, marker="ready", ranks=1, whole_group=True, again=False):
    """Starts it, sends the signal when all ranks have said the marker, and returns (status, all that it printed)."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=env, start_new_session=True, **pipes)
    printed = ""
    for line in process.stdout:
        printed += line
        if printed.count(marker) == ranks:
            break
    for _ in range(1 + again):
        os.killpg(process.pid, number) if whole_group else process.send_signal(number)
        if again:
            printed += process.stdout.readline() + process.stdout.readline()  # "stopping after this step ..."
    return process.wait(timeout=300), printed + process.stdout.read()


def last_words(printed, what="stopped"):
    """The command at the end of the output, after the message; no error may be printed."""
    assert "Traceback" not in printed and "Error" not in printed and "death signal" not in printed, printed
    before, words, after = printed.partition(f"\n{what}. To resume, type:\n  ")
    assert words and after.count("\n") == 1 and "To resume" not in before, printed
    return after.strip()


def test_ctrl_c_while_packages_are_imported_is_one_message(tmp_path):
    """Also if the package catches KeyboardInterrupt."""
    code = "import time\ntry:\n    print('ready', flush=True)\n    time.sleep(60)\nexcept BaseException:\n    pass\n"
    (tmp_path / "psutil.py").write_text(code)
    run = "import os, runpy, sys; sys.path.insert(0, sys.argv.pop(1)); sys.argv[0] = 'scripts/quickstart'; "
    run += "runpy.run_module('scripts.quickstart', run_name='__main__', alter_sys=True)"
    for number in (signal.SIGINT, signal.SIGTERM):
        status, printed = stop(["-c", run, str(tmp_path), "--out_dir", str(tmp_path / "out")], number)
        assert status == 130 and last_words(printed).endswith(f"--out_dir {tmp_path}/out")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "kill"])
@pytest.mark.parametrize("where", ["data", "features", "step", "validation"])
def test_a_training_that_is_stopped_anywhere_ends_with_one_message(flags, world, tmp_path, where, number):
    (tmp_path / "held.py").write_text(HELD)
    flags = [*flags, "--val_path", str(world / "val.jsonl"), "--num_workers", "1"]
    flags += ["--cache_features", str(tmp_path / "features")] if where == "features" else []
    command = [str(tmp_path / "held.py"), where, *flags]
    status, printed = stop(command, number, whole_group=number == signal.SIGINT)
    assert status == 130
    if where in ("step", "validation"):
        step = json.loads((tmp_path / "out/sft_vlm_64.json").read_text())["step"]
        assert step == {"step": 1, "validation": 4}[where]
        assert last_words(printed, f"stopped at step {step} of 4").endswith("--num_workers 1 --from_resume")
    else:
        assert last_words(printed).endswith(flags[-1])


# Asks or scores, and holds after a batch. Its worker processes get Ctrl-C first, as where this one is busy in C++.
ASKED = """
import signal, sys, time
import psutil
from common.start import begin

begin()
import eval_vlm, inference.asking, inference.captions, inference.scoring
from common.cli import run_main

real = inference.generate.answer_batches

def held(*args):
    for answers in real(*args):
        workers = psutil.Process().children()
        for worker in workers:
            worker.send_signal(signal.SIGINT)
        time.sleep(1)
        print("ready" * len(workers), flush=True)
        time.sleep(60)
        yield answers

inference.captions.answer_batches = inference.scoring.answer_batches = held
run_main(lambda: eval_vlm.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["captions", "scores"])
def test_asking_with_worker_processes_is_stopped_with_one_message(trained, world, tmp_path, what):
    (tmp_path / "asked.py").write_text(ASKED)
    rows = ["--data_path", str(world / "rows.jsonl"), "--images_path", str(world / "pictures")]
    many = ["--captions", str(tmp_path / "captions.jsonl"), "--image_dir", str(world / "pictures"), "--prompt", "What?"]
    flags = [*trained, *(many if what == "captions" else rows), "--num_workers", "2", "--batch_size", "1"]
    status, printed = stop([str(tmp_path / "asked.py"), *flags], signal.SIGINT, ranks=2)
    assert status == 130 and last_words(printed).endswith("--num_workers 2 --batch_size 1")


@pytest.mark.slow
def test_a_second_ctrl_c_ends_a_training_at_once_and_says_how_to_resume(flags, tmp_path):
    (tmp_path / "held.py").write_text(HELD.replace("0.3", "60"))
    status, printed = stop([str(tmp_path / "held.py"), "step", *flags], signal.SIGINT, again=True)
    assert status == 130 and last_words(printed).endswith("--from_resume")


@pytest.mark.slow
@pytest.mark.parametrize(
    "where, number", [("rank 0", signal.SIGINT), ("step", signal.SIGINT), ("step", signal.SIGTERM)]
)
def test_two_ranks_of_a_stopped_recipe_resume(flags, tmp_path, where, number):
    (tmp_path / "held.py").write_text(HELD)
    flags = [*flags, "--save_interval", "100"]
    command = ["-c", RECIPE, str(tmp_path / "run"), str(tmp_path / "held.py"), where, *flags]
    ranks = 1 if where == "rank 0" else 2  # the other waits for it, in C++
    status, printed = stop(command, number, ranks=ranks, whole_group=number == signal.SIGINT)
    assert status == 130 and last_words(printed) == "the command that goes on"
    (record,) = read_records(tmp_path / "run")
    assert record["status"] == "begun"
    if where == "step":
        assert json.loads((tmp_path / "out/sft_vlm_64.json").read_text())["step"] == 1  # of 2, each held for a moment
        assert run(*command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode == 0
        assert json.loads((tmp_path / "out/sft_vlm_64.json").read_text())["step"] == 2


@pytest.mark.slow
def test_an_error_of_all_ranks_is_reported_once(flags, tmp_path):
    torchrun = ["-m", "scripts.torchrun", "--nproc_per_node", "2", "train_sft_vlm.py"]
    done = run(*torchrun, *flags, "--device", "cuda", env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "\nerror: --device cuda: PyTorch sees no CUDA device; try --device auto\n(MINIMIND_TRACEBACK=1 shows where)\n"
    )


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_the_others_and_shows_as_killed(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text("import os, time\nos.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(60)\n")
    done = run("-m", "scripts.torchrun", "--nproc_per_node", "2", str(script))
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
