"""common/lock.py: two processes never write the same file, and the lock of an ended process does not count."""

import json
import socket
import subprocess
import sys

import psutil
import pytest

from common.lock import only_one

HOLD = """
import sys
from common.lock import only_one
with only_one(sys.argv[1], "--out_dir"):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def held(tmp_path):
    """A path that another process writes, and the process."""
    path = tmp_path / "out/model.pth"
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield path, process
    process.kill()
    process.wait()


def test_a_second_process_gets_an_error_until_the_first_has_ended(held):
    path, process = held
    with (
        pytest.raises(ValueError, match=f"--out_dir: process {process.pid} is writing {path}. Wait"),
        only_one(path, "--out_dir"),
    ):
        pass
    process.communicate("\n")
    with only_one(path, "--out_dir"):
        assert len(list(path.parent.iterdir())) == 1
    assert not list(path.parent.iterdir())


def test_a_process_that_was_killed_locks_nobody_out(held):
    path, process = held
    process.kill()
    process.wait()
    with only_one(path, "--out_dir"):
        pass


@pytest.mark.parametrize("change", [{"started": 5.0}, {"pid": "no"}, None])
def test_a_number_that_is_now_another_process_and_a_broken_lock_lock_nobody_out(tmp_path, change):
    other = psutil.Process(psutil.Process().ppid())
    record = {"pid": other.pid, "started": other.create_time(), "machine": socket.gethostname()}
    (tmp_path / ".a.lock").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="--captions: process"), only_one(tmp_path / "a", "--captions"):
        pass
    (tmp_path / ".a.lock").write_text(json.dumps(record | change) if change else '{"pid')
    with only_one(tmp_path / "a", "--captions"):
        pass


def test_a_lock_of_another_machine_is_left_to_the_user(tmp_path):
    (tmp_path / ".a.lock").write_text(json.dumps({"pid": 1, "started": 2.0, "machine": "elsewhere"}))
    with pytest.raises(ValueError, match="process 1 .*(?s:.)*remove .*.a.lock"), only_one(tmp_path / "a", "--out_dir"):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("what", ["training", "captions"])
def test_a_second_training_and_second_captions_get_an_error(flags, trained, world, tmp_path, what, monkeypatch, capsys):
    import eval_vlm
    import train_sft_vlm

    path = tmp_path / "out" / ("sft_vlm_64.pth" if what == "training" else "captions.jsonl")
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    captions = [*trained, "--captions", str(path), "--image_dir", str(world / "pictures"), "--prompt", "What?"]
    try:
        with pytest.raises(ValueError, match=f"process {process.pid} is writing .*{path.name}"):
            train_sft_vlm.main(flags) if what == "training" else eval_vlm.main(captions)
        assert not path.exists()
    finally:
        process.kill()
        process.wait()
    train_sft_vlm.main(flags) if what == "training" else eval_vlm.main(captions)
    assert path.exists() and not list(path.parent.glob(".*"))
