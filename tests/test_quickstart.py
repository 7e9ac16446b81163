"""Steps one after the other and what an interruption leaves; quickstart and bundle from end to end, in small."""

import argparse
import importlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from common import distributed
from common.display import duration, gigabytes, typed
from scripts import make_bundle
from scripts.quickstart import __main__ as quickstart
from scripts.quickstart import steps
from scripts.quickstart.steps import Step, open_folder, read_records, run, run_steps, variables

ROOT = Path(__file__).parent.parent


def python(name, code, **kwargs):
    return Step(name, f"{name} is run", ["python", "-c", code], **kwargs)


def note(path, text):
    """Code that appends to a file: which steps ran, in which order."""
    return f"import sys; open({str(path)!r}, 'a').write({text!r} + ' '.join(sys.argv[1:]) + ';')"


# ---------------------------------------------------------------------------- how a command is shown


def test_a_command_is_shown_as_it_can_be_pasted_into_a_shell():
    values = ["a b.jsonl", "$HOME/it's", "x" * 50]
    command = ["python", "-m", "dataset.scenes", "--data_path", *values, "--greedy", "--prompt", "What?", "--n", "-1"]
    shown = typed(command)
    assert shlex.split(shown.replace("\\\n", "")) == command
    shown = typed(["python", "train_sft_vlm.py", *(part for i in range(12) for part in (f"--flag_{i}", "some/value"))])
    assert max(map(len, shown.splitlines())) <= 78 and shown.count("\\\n") == shown.count("\n") > 2
    assert shown.startswith("python train_sft_vlm.py --flag_0 some/value")


def test_times_and_sizes_are_told_as_people_say_them():
    assert [duration(seconds) for seconds in (3.21, 59.96, 245, 3720)] == [
        "3.2 s",
        "1 min 00 s",
        "4 min 05 s",
        "1 h 02 min",
    ]
    assert [gigabytes(size) for size in (1.23, 0.04)] == ["1.2 GB", "40 MB"]


# ---------------------------------------------------------------------------- running steps


def test_steps_run_in_order_and_a_second_start_skips_what_is_done(tmp_path, capfd):
    log = tmp_path / "log"
    two = [python("one", note(log, "1")), python("two", note(log, "2") + "; print('from two')")]
    first = run_steps(two, tmp_path, "again")
    assert log.read_text() == "1;2;"
    printed = capfd.readouterr().out
    assert f"[1/2] one: one is run\n$ {typed(two[0].command)}\n" in printed
    assert printed.index("$ python") < printed.index("\nfrom two") < printed.index("\ntwo: ")  # shown before it runs
    assert [record["status"] for record in first] == ["done", "done"] and all(record["seconds"] > 0 for record in first)
    assert run_steps(two, tmp_path, "again") == first == read_records(tmp_path)
    assert log.read_text() == "1;2;"
    assert capfd.readouterr().out.splitlines() == [
        f"[1/2] one: done already, {duration(first[0]['seconds'])}",
        f"[2/2] two: done already, {duration(first[1]['seconds'])}",
    ]


def test_what_a_step_made_is_made_again_where_it_is_gone(tmp_path):
    log, made = tmp_path / "log", tmp_path / "chat.html"
    two = [python("one", note(log, "1")), python("page", note(log, "2") + f"; open({str(made)!r}, 'w')", makes=made)]
    run_steps(two, tmp_path, "again")
    made.unlink()
    run_steps(two, tmp_path, "again")
    run_steps(two, tmp_path, "again")
    assert made.is_file() and log.read_text() == "1;2;2;"


def test_a_step_that_fails_is_named_with_its_command_and_a_second_start_tries_it_again(tmp_path, capfd):
    mended, log = tmp_path / "mended", tmp_path / "log"
    code = f"import pathlib, sys; sys.exit(0 if pathlib.Path({str(mended)!r}).exists() else 7)"
    two = [python("one", note(log, "1")), python("two", code)]
    message = r"step 2, 'two', ended with status 7\. .*\n\$ python -c .*\nWhen .* fixed, resume with\n\$ type this"
    with pytest.raises(ValueError, match=message):
        run_steps(two, tmp_path, "type this")
    assert [record["status"] for record in read_records(tmp_path)] == ["done", "failed"]
    mended.touch()
    assert [record["status"] for record in run_steps(two, tmp_path, "again")] == ["done", "done"]
    assert log.read_text() == "1;"


def test_a_step_that_is_killed_says_so(tmp_path):
    with pytest.raises(ValueError, match="'one', was killed by SIGKILL, perhaps because memory ran out"):
        run_steps([python("one", "import os; os.kill(os.getpid(), 9)")], tmp_path, "again")


def test_what_was_begun_goes_on_with_from_resume_or_begins_anew(tmp_path):
    """Whatever ended it: only the record before it ran is left, as after kill -9."""
    log, made = tmp_path / "log", tmp_path / "made"
    two = [
        python("resumable", note(log, "1"), resumable=True),
        python("other", note(log, "2") + f"; import os; os.mkdir({str(made)!r})", makes=made),
    ]
    begun = {"status": "begun", "seconds": 100, "peak_gb": 50}
    records = [{"name": step.name, "command": step.command} | begun for step in two]
    (tmp_path / "steps.json").write_text(json.dumps(records))
    (made / "half").mkdir(parents=True)
    records = run_steps(two, tmp_path, "again")
    assert log.read_text() == "1--from_resume;2;" and list(made.iterdir()) == []
    assert all(record["seconds"] > 100 and record["peak_gb"] == 50 for record in records)  # attempts add up


def test_other_settings_are_refused_and_restart_begins_anew(tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    open_folder(folder, restart=False)
    run_steps([python("one", note(log, "1"))], folder, "again")
    other = [python("one", note(log, "other"))]
    with pytest.raises(ValueError, match=r"other settings. Its step 'one' was\n\$ python(.*\n)+.*delete .* --restart"):
        run_steps(other, folder, "again")
    open_folder(folder, restart=True)
    run_steps(other, folder, "again")
    assert log.read_text() == "1;other;"


def test_files_of_somebody_else_are_never_removed(tmp_path):
    (tmp_path / "thesis.txt").touch()
    for restart in (False, True):
        with pytest.raises(ValueError, match="--out_dir .* contains files that are not from a run"):
            open_folder(tmp_path, restart)
    with pytest.raises(ValueError, match="--work_dir .*thesis.txt is a file"):
        open_folder(tmp_path / "thesis.txt", False, flag="--work_dir")
    assert (tmp_path / "thesis.txt").exists()


def test_the_memory_of_a_command_and_its_children_is_measured():
    take = "import time; held = bytearray(150_000_000); time.sleep(1.5)"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {take!r}]); {take}; time.sleep(1)"
    status, interrupted, seconds, peak_gb = run(["python", "-c", child])
    assert (status, interrupted) == (0, False) and seconds > 2
    assert 0.3 < peak_gb < 0.4


def test_torchrun_starts_processes_of_this_python(tmp_path, capfd):
    script = tmp_path / "ranks.py"
    script.write_text("import os, sys; open(sys.argv[1] + os.environ['RANK'], 'w').write(sys.executable)")
    status, interrupted, _, _ = run(["torchrun", "--nproc_per_node", "2", str(script), str(tmp_path / "rank")])
    assert (status, interrupted) == (0, False)
    assert [(tmp_path / f"rank{i}").read_text() for i in (0, 1)] == [sys.executable] * 2
    assert "OMP_NUM_THREADS" not in capfd.readouterr().err


@pytest.mark.parametrize(
    "allowed, physical, threads", [(1, 1, 1), (2, 2, 1), (4, 2, 1), (8, 4, 2), (16, 16, 8), (2, 16, 1), (64, None, 8)]
)
def test_two_processes_share_the_physical_cores(monkeypatch, tmp_path, allowed, physical, threads):
    monkeypatch.setattr("common.machine.CGROUP", tmp_path)  # no container
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: physical)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert variables(["torchrun", "--nproc_per_node", "2"]) == {"OMP_NUM_THREADS": str(threads)}
    assert variables(["python", "eval_vlm.py"]) == {}  # PyTorch takes them all
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert variables(["torchrun", "--nproc_per_node", "2"]) == {"OMP_NUM_THREADS": "3"}


def test_torchrun_of_windows_does_without_libuv(monkeypatch):
    monkeypatch.setattr(steps.os, "name", "nt")
    assert variables(["torchrun", "--nproc_per_node", "2"])["USE_LIBUV"] == "0"


def test_threads_are_shown_where_torchrun_would_take_one_and_are_no_other_setting(tmp_path, monkeypatch, capfd):
    train = Step("train", "two processes", ["torchrun", "--nproc_per_node", "2", "train_sft_vlm.py"])
    monkeypatch.setattr(steps, "run", lambda command: (0, False, 1.0, 0.5))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    shown = []
    for cores in (2, 8):
        monkeypatch.setattr(steps, "physical_cores", lambda cores=cores: cores)
        (tmp_path / "steps.json").unlink(missing_ok=True)
        run_steps([train], tmp_path, "again")
        shown += [line for line in capfd.readouterr().out.splitlines() if line.startswith("$")]
    command = "torchrun --nproc_per_node 2 train_sft_vlm.py"
    assert shown == [f"$ {command}", f"$ OMP_NUM_THREADS=4 {command}"]
    assert read_records(tmp_path)[0]["command"] == train.command


LIVE = """
import sys
from pathlib import Path
from scripts.quickstart.steps import Step, run_steps
folder = Path(sys.argv[1])
code = '''
import signal, sys, time
def stop(*_):
    open(sys.argv[1], "a").write("saved;")
    sys.exit(130)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGTERM, stop)
if "--from_resume" not in sys.argv:
    print("ready", flush=True)
    time.sleep(60)
open(sys.argv[1], "a").write("finished;")
'''
step = Step("training", "it takes long", ["python", "-c", code, str(folder / "log")], resumable=True)
run_steps([step], folder, "the command that goes on")
"""


@pytest.mark.parametrize("how", ["Ctrl-C", "kill"])
def test_an_interruption_lets_the_step_save_and_the_next_start_resumes_it(tmp_path, how):
    start = [sys.executable, "-c", LIVE, str(tmp_path)]
    both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(start, cwd=ROOT, **both, text=True, start_new_session=True)
    for line in process.stdout:
        if line.strip() == "ready":
            break
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
    else:
        process.terminate()  # to the parent alone
    printed = process.communicate(timeout=20)[0]
    assert process.returncode == 130
    assert printed.endswith("stopped. To resume, type:\n  the command that goes on\n") and "Traceback" not in printed
    assert (tmp_path / "log").read_text() == "saved;"
    (record,) = read_records(tmp_path)
    assert record["status"] == "begun" and record["seconds"] > 0
    again = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=20)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "log").read_text() == "saved;finished;"
    (done,) = read_records(tmp_path)
    assert done["status"] == "done" and done["seconds"] > record["seconds"]


# ---------------------------------------------------------------------------- the quickstart, in small


class Parsed(Exception):
    pass


def parse_and_stop(parser, argv=None, parse=argparse.ArgumentParser.parse_args):
    """In place of ArgumentParser.parse_args."""
    parse(parser, argv)
    raise Parsed


SMALL = {"--scenes": "40", "--val_scenes": "20", "--max_new_tokens": "12", "--batch_size": "32", "--epochs": "1"}


def small(recipe, values=SMALL):
    """The same commands with numbers of seconds."""
    for step in recipe:
        for flag, value in values.items():
            if flag in step.command:
                step.command[step.command.index(flag) + 1] = value
    return recipe


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, clip_folder, tokenizer_folder):
    """A bundle whose language model is random."""
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
    from model.processing import load_tokenizer

    folder = tmp_path_factory.mktemp("bundle")
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    shutil.copytree(clip_folder, folder / "clip")
    size = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": len(load_tokenizer(folder, "@" * 16))}
    model = MiniMindForCausalLM(MiniMindConfig(**size))
    torch.save({key: value.half() for key, value in model.state_dict().items()}, folder / "llm_64.pth")
    return folder


def script_of(command):
    """(name of the module, its flags)"""
    command = command[2:] if command[0] == "torchrun" else command  # --nproc_per_node 2, or what follows python
    name, *flags = command[2 if command[1] == "-m" else 1 :]
    is_package = (ROOT / name.replace(".", "/")).is_dir()
    return name + ".__main__" if is_package else name.removesuffix(".py"), flags


def run_here(command):
    """As `steps.run`, in this process: a process for each would spend all its time on importing torch."""
    started = time.perf_counter()
    name, flags = script_of(command)
    importlib.import_module(name).main(flags)
    return 0, False, time.perf_counter() - started, 0.5


@pytest.fixture(scope="module")
def finished(tmp_path_factory, bundle):
    """(folder of a quickstart that has run through, what its main returned)."""
    folder, patch = tmp_path_factory.mktemp("run") / "quickstart", pytest.MonkeyPatch()
    real = quickstart.recipe
    patch.setattr(quickstart, "recipe", lambda *args: small(real(*args)))
    patch.setattr(steps, "run", run_here)
    try:
        return folder, quickstart.main(["--out_dir", str(folder), "--bundle", str(bundle)])
    finally:
        patch.undo()


def test_the_quickstart_goes_from_a_bundle_to_a_report(finished):
    folder, result = finished
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(result))
    assert {
        "report.html",
        "report_zh.html",
        "chat.html",
        "val_wording.json",
        "sft_vlm_64.pth",
        "pretrain_vlm_64.pth",
        "val.json",
        "val_new.json",
        "data",
    } <= {path.name for path in folder.iterdir()}
    assert [step["name"] for step in result["steps"]] == [
        *("data 1", "data 2", "stage 1", "stage 2", "score val", "score val_wording", "score val_new", "page")
    ]
    assert result["wall_s"] >= sum(step["seconds"] for step in result["steps"]) - 1
    assert result["peak_gb"] == 0.5
    for split in ("val", "val_wording", "val_new", "shuffled", "shuffled_wording", "shuffled_new"):
        shares = result[split]
        assert set(shares) == {"en", "zh", "all", "by_kind"} and {"relation", "count"} <= set(shares["by_kind"])
        assert all(
            0 <= share <= 1 for share in (shares["en"], shares["zh"], shares["all"], *shares["by_kind"].values())
        )
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["cores"] >= 1
    assert result["parameters"]["projector"] == 32 * 64 + 64
    answers = json.loads((folder / "val.json").read_text())["answers"]
    assert result["val"]["all"] == pytest.approx(sum(a["right"] for a in answers) / len(answers), abs=1e-4)
    assert len(result["next"]) == 4


def test_what_it_suggests_next_can_be_typed(finished, capfd, tmp_path, monkeypatch):
    import eval_vlm
    import train_sft_vlm
    from scripts import inspect_data
    from scripts.download import __main__ as download

    folder, result = finished
    (_, ask), (_, look), _, (photos, fetch) = result["next"]
    assert ask[:2] == ["python", "eval_vlm.py"]
    eval_vlm.main([*ask[2:], "--device", "cpu", "--max_new_tokens", "3"])
    prompt = json.loads((folder / "sft_vlm_64.json").read_text(encoding="utf-8"))["prompts"]["en"][0]
    assert ask[ask.index("--prompt") + 1] == prompt == result["prompts"]["en"]
    assert f"[val_00000.jpg] {prompt}" in capfd.readouterr().out
    assert look[:3] == ["python", "-m", "scripts.inspect_data"]
    monkeypatch.chdir(tmp_path)  # where a visitor has rows.jsonl and pictures
    shutil.copytree(folder / "data/images", "pictures")
    rows = (folder / "data/val.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    Path("rows.jsonl").write_text("".join(rows[:20]), encoding="utf-8")
    inspect_data.main(look[3:])
    train = shlex.split(capfd.readouterr().out.split("To train on it:\n$ ")[1].replace("\\\n", ""))
    assert train[:2] == ["python", "train_sft_vlm.py"]
    run = train_sft_vlm.main([*train[2:], "--device", "cpu", "--num_workers", "0", "--epochs", "1"])
    assert run.state.rows == 20 and not run.checkpoint.path.is_relative_to(folder)
    assert "shapes" in photos and "photos" in photos and fetch[:3] == ["python", "-m", "scripts.download"]
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        download.main(fetch[3:])


def test_a_second_start_runs_nothing_and_shows_the_report_again(finished, bundle, monkeypatch, capfd):
    folder, first = finished
    real = quickstart.recipe
    monkeypatch.setattr(quickstart, "recipe", lambda *args: small(real(*args)))
    monkeypatch.setattr(steps, "run", None)  # would be called
    again = quickstart.main(["--out_dir", str(folder), "--bundle", str(bundle)])
    printed = capfd.readouterr().out
    assert printed.count("done already") == 8 and "What to try next" in printed
    assert max(map(len, printed.splitlines())) <= 80 + len(str(folder))
    assert again["steps"] == first["steps"]


def test_a_folder_that_is_no_bundle_is_refused(bundle, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(bundle, other)
    (other / "llm_64.pth").rename(other / "llm.pth")
    with pytest.raises(SystemExit, match=r"0 llm_{hidden}\.pth, expected 1(.|\n)*quickstart --from_zero"):
        quickstart.main(["--out_dir", str(tmp_path / "out"), "--bundle", str(other)])
    with pytest.raises(SystemExit, match=r"has no tokenizer\.json(.|\n)*--from_zero"):
        quickstart.main(["--out_dir", str(tmp_path / "out"), "--bundle", str(tmp_path)])
    assert not (tmp_path / "out").exists()


def test_nothing_heavy_is_imported():
    """It should say what it does at once, and take no memory beside that of its steps."""
    code = "import scripts.quickstart, sys; print({'torch', 'transformers', 'matplotlib'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_a_second_quickstart_in_the_same_folder_is_told_and_restart_removes_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    (out / "data").mkdir(parents=True)
    (out / "steps.json").write_text("[]")
    told = {"pid": os.getppid(), "started": psutil.Process(os.getppid()).create_time(), "machine": socket.gethostname()}
    (tmp_path / ".out.lock").write_text(json.dumps(told))
    with pytest.raises(SystemExit, match=rf"error: --out_dir: process {os.getppid()} is writing {out}"):
        quickstart.main(["--out_dir", str(out), "--restart"])
    assert (out / "data").is_dir()


@pytest.mark.slow
def test_two_runs_of_a_recipe_at_once_take_two_ports(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, time, torch.distributed as d; d.init_process_group('gloo'); d.barrier(); time.sleep(3)"
    )
    command = [sys.executable, "-m", "scripts.torchrun", "--nproc_per_node", "2", str(script)]
    both = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=200) for process in both] == [0, 0]


def test_from_zero_with_a_bundle_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        quickstart.main(["--out_dir", str(tmp_path / "out"), "--from_zero", "--bundle", "model/tiny"])
    assert "error: --bundle: --from_zero trains its own bundle" in capsys.readouterr().err


def test_from_zero_trains_what_it_then_starts_from(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(quickstart, "run_steps", lambda steps, *_: ran.extend(steps) or [][0])
    with pytest.raises(IndexError):  # nothing has run, so there is nothing to report
        quickstart.main(["--out_dir", str(tmp_path / "out"), "--from_zero", "--use_moe"])
    tiny = tmp_path / "out/tiny"
    numbers = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
    lessons = [f"{number} lesson" for number in numbers]
    lists = ["colour", "shape", "size", "place", "object", "describe", "exists", "check", "count"]
    bundle = ["captions", "words", *lists, "talk", "text", "practice", "tokenizer", "encoder", *lessons]
    steps = {step.name: step.command for step in ran}
    for step in ran:  # what was drawn just before a crash, and not noted yet, is in nobody's way
        if "dataset.scenes" in step.command:
            assert str(step.makes) == step.command[step.command.index("--out_dir") + 1]
    assert list(steps) == [
        *bundle,
        "data 1",
        "data 2",
        "stage 1",
        "stage 2",
        "score val",
        "score val_wording",
        "score val_new",
        "page",
    ]
    llm, stage_1, stage_2 = steps["first lesson"], steps["stage 1"], steps["stage 2"]
    assert "--use_moe" not in llm and "--use_moe" in stage_1 and "--use_moe" in stage_2
    hidden_size = llm[llm.index("--hidden_size") + 1]
    ends = [steps[name][steps[name].index("--out_dir") + 1] for name in lessons]
    starts = [steps[name][steps[name].index("--from_weight") + 1] for name in lessons[1:]]
    assert starts == [f"{end}/llm_{hidden_size}.pth" for end in ends[:-1]] and ends[-1] == str(tiny)
    assert stage_1[stage_1.index("--from_weight") + 1] == str(tiny / f"llm_{hidden_size}.pth")
    assert stage_1[stage_1.index("--hidden_size") + 1] == hidden_size
    assert (
        stage_1[stage_1.index("--vision_model_path") + 1]
        == str(tiny / "clip")
        == steps["encoder"][steps["encoder"].index("--out_dir") + 1]
    )


# ---------------------------------------------------------------------------- the bundle, in small


def test_a_bundle_is_collected_from_what_its_steps_left(tmp_path, monkeypatch, capfd):
    """The steps are the scripts, which have tests of their own; here they have just run."""
    work, out = tmp_path / "work", tmp_path / "tiny"

    def made(steps, folder, again):
        assert again == f"python -m scripts.make_bundle --work_dir {work} --out_dir {out}"
        for name in make_bundle.files():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        (folder / f"llm_{make_bundle.HIDDEN_SIZE}.resume.pt").write_bytes(bytes(10**6))  # stays there
        metrics = {"retrieval": {"val.jsonl": {"image_to_text_recall@1": 97.5}}}
        (folder / "clip/metrics.json").write_text(json.dumps(metrics))
        lines = ['{"step": 5, "loss": 2.0}', '{"step": 9, "val_loss": 0.6931472}', '{"step": 10, "loss": 1.0}']
        (folder / f"llm_{make_bundle.HIDDEN_SIZE}.metrics.jsonl").write_text("\n".join(lines) + "\n")
        return [{"name": step.name, "seconds": 60, "peak_gb": 0.5} for step in steps]

    monkeypatch.setattr(make_bundle, "run_steps", made)
    make_bundle.main(["--work_dir", str(work), "--out_dir", str(out), "--restart"])
    there = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    assert there == sorted(make_bundle.files())
    printed = capfd.readouterr().out
    assert (
        "image to text recall@1 97.5%" in printed
        and "perplexity 2.000" in printed
        and f"{len(make_bundle.recipe(tmp_path))} min 00 s" in printed
    )
    assert "warning" not in printed
    monkeypatch.setattr(make_bundle, "LIMIT_MB", 1e-6)
    shutil.rmtree(work)
    make_bundle.main(["--work_dir", str(work), "--out_dir", str(out)])
    assert "warning: more than" in capfd.readouterr().out


# ---------------------------------------------------------------------------- on machines of all kinds


class Begun(Exception):
    pass


@pytest.fixture
def machine(monkeypatch):
    """machine(gpus=1) or machine(mps=True): what PyTorch then reports."""

    def pretend(gpus=0, mps=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return pretend


def begin(command, monkeypatch):
    """Runs each process of a training command until its ranks have met. Returns (device, backend or None) of each."""
    name, flags = script_of(command)
    script, found, backends = importlib.import_module(name), [], []
    ranks = int(command[2]) if command[0] == "torchrun" else 1
    real = distributed.start

    def start(device):
        real(device)
        found.append((str(device), backends.pop() if backends else None))
        raise Begun

    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "init_process_group", lambda backend, **_: backends.append(backend))
        patch.setattr(torch.distributed, "new_group", lambda **_: None)
        patch.setattr(distributed, "start", start)
        patch.setattr(script, "check_paths", lambda args: None, raising=False)  # nothing is drawn
        for rank in range(ranks):
            for variable, value in (("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", ranks), ("LOCAL_RANK", rank)):
                patch.setenv(variable, str(value))
            with pytest.raises(Begun):
                script.main(flags)
    return found


MACHINES = {
    "no GPU": ({}, {"cpu": "cpu", "auto": "cpu"}),
    "one GPU": ({"gpus": 1}, {"cpu": "cpu", "cuda": "cuda", "auto": "cuda"}),
    "four GPUs": ({"gpus": 4}, {"cpu": "cpu", "cuda": "cuda", "auto": "cuda"}),
    "Apple": ({"mps": True}, {"cpu": "cpu", "mps": "mps", "auto": "mps"}),
}


@pytest.mark.parametrize("name", MACHINES)
def test_every_command_of_the_recipes_begins_on_every_machine(name, machine, tmp_path, monkeypatch, capsys):
    has, flags = MACHINES[name]
    machine(**has)
    for flag, device in flags.items():
        assert steps.resolve(flag) == device
        assert flag == "cpu" or f"--device {flag}: everything is computed on {device}\n" == capsys.readouterr().out
        recipe = make_bundle.recipe(tmp_path, device)
        recipe += quickstart.recipe(tmp_path, tmp_path / "llm_8.pth", ["--hidden_size", 8], device)
        for step in recipe:
            if "--device" in step.command:
                assert step.command[step.command.index("--device") + 1] == device
            if step.resumable:
                begun = [("cpu", "gloo")] * 2 if device == "cpu" else [({"cuda": "cuda:0"}.get(device, device), None)]
                assert begin(step.command, monkeypatch) == begun, step.name
        computing = {step.name for step in recipe if "--device" in step.command}
        drawing = {step.name for step in recipe if "dataset.scenes" in step.command} | {"tokenizer"}
        assert computing == {step.name for step in recipe} - drawing - {"page"}


def test_a_device_that_is_not_there_is_refused_before_anything_is_drawn(machine, tmp_path):
    machine()
    for script, flag in ((quickstart, "--out_dir"), (make_bundle, "--work_dir")):
        with pytest.raises(SystemExit, match="--device cuda: PyTorch sees no CUDA device"):
            script.main([flag, str(tmp_path / "out"), "--device", "cuda"])
        assert not list((tmp_path / "out").glob("*"))


def test_every_script_of_the_recipes_takes_the_flags_that_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    recipes = make_bundle.recipe(tmp_path)
    recipes += quickstart.recipe(tmp_path, tmp_path / "llm_8.pth", ["--hidden_size", 8, "--use_moe"])
    for step in recipes:
        name, flags = script_of(step.command)
        with pytest.raises(Parsed):
            importlib.import_module(name).main(flags + ["--from_resume"] * step.resumable)
