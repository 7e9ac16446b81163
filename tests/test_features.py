"""--cache_features: what is kept, when it is found again, and that training does not notice."""

import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train_pretrain_vlm
import train_sft_vlm
from dataset import features
from dataset.features import FeatureCache, hash_of
from model.model_vlm import MiniMindVLM
from tests.conftest import turn, write_rows
from trainer import caching


@pytest.fixture
def cached(flags, tmp_path):
    return [*flags, "--cache_features", str(tmp_path / "cache"), "--epochs", "2"]


@pytest.fixture
def pictures(world, tmp_path, monkeypatch):
    """A copy of the world whose pictures may be changed, and a count of those that the encoder sees."""
    folder = shutil.copytree(world, tmp_path / "world")
    seen, encode = [], MiniMindVLM.get_image_embeddings

    def counted(image_tensors, vision_model):
        seen.append(len(image_tensors))
        return encode(image_tensors, vision_model)

    monkeypatch.setattr(MiniMindVLM, "get_image_embeddings", staticmethod(counted))
    return folder, seen


def data_flags(flags, folder):
    flags = list(flags)
    flags[flags.index("--data_path") + 1] = str(folder / "rows.jsonl")
    flags[flags.index("--images_path") + 1] = str(folder / "pictures")
    return flags


def weights(run):
    return {name: weight.detach().clone() for name, weight in run.model.named_parameters()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("int8", 2e-2)])
def test_training_learns_the_same_and_never_opens_a_picture(cached, flags, pictures, tmp_path, dtype, tolerance):
    folder, seen = pictures
    flags, cached = data_flags(flags, folder), data_flags(cached, folder)
    cached += ["--val_path", str(folder / "val.jsonl"), "--cache_dtype", dtype]
    plain = weights(train_sft_vlm.main([*flags, "--epochs", "2"]))
    seen.clear()
    own = weights(train_sft_vlm.main([*cached, "--out_dir", str(tmp_path / "a")]))
    assert sum(seen) == 6  # each picture once, though 14 rows and 4 of validation show them, twice over
    for name, weight in plain.items():
        assert (weight - own[name]).norm() <= tolerance * weight.norm(), name
    again = weights(train_sft_vlm.main([*cached, "--out_dir", str(tmp_path / "b")]))
    assert sum(seen) == 6 and all(torch.equal(again[name], own[name]) for name in own)


def test_stage_1_and_experts_take_it_too(cached, pictures, tmp_path):
    folder, seen = pictures
    cached = data_flags(cached, folder)
    train_pretrain_vlm.main([*cached, "--out_dir", str(tmp_path / "a")])
    train_sft_vlm.main([*cached, "--use_moe", "--out_dir", str(tmp_path / "b")])
    assert sum(seen) == 6


def test_a_picture_that_changed_is_encoded_anew_and_other_settings_are_kept_apart(
    cached, pictures, tmp_path, clip_folder
):
    folder, seen = pictures
    cached = data_flags(cached, folder)

    def encoded(*more):
        seen.clear()
        train_sft_vlm.main([*cached, *more, "--out_dir", str(tmp_path / str(len(list(tmp_path.iterdir()))))])
        return sum(seen)

    assert encoded() == 6 and encoded() == 0
    Image.new("RGB", (40, 36), "pink").save(folder / "pictures/red.png")
    assert encoded() == 1 and encoded() == 0
    shutil.copy(folder / "pictures/blue.png", folder / "pictures/green.png")
    assert encoded() == 0  # the same content is the same picture
    assert encoded("--cache_dtype", "int8") == 5
    other = shutil.copytree(clip_folder, tmp_path / "clip")
    config = (other / "preprocessor_config.json").read_text()
    (other / "preprocessor_config.json").write_text(config.replace("0.48145466", "0.5"))
    assert encoded("--vision_model_path", str(other)) == 5
    assert len([path for path in (tmp_path / "cache").iterdir() if (path / "about.json").exists()]) == 3


def test_a_broken_picture_is_told_like_without_the_cache(cached, pictures, capsys):
    folder, _ = pictures
    (folder / "pictures/red.png").write_bytes(b"no picture")
    flags = data_flags(cached, folder)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*red\.png cannot be read"):
        train_sft_vlm.main(flags)
    (folder / "pictures/red.png").unlink()


def test_rows_in_a_zip_and_streamed_rows(cached, pictures, tmp_path):
    folder, seen = pictures
    shutil.make_archive(str(tmp_path / "pictures"), "zip", folder / "pictures")
    flags = data_flags(cached, folder)
    train_sft_vlm.main([*flags, "--images_path", str(tmp_path / "pictures.zip")])
    train_sft_vlm.main([*flags, "--out_dir", str(tmp_path / "b")])
    assert sum(seen) == 6  # by content, wherever it lies


def test_without_room_nothing_is_computed(cached, pictures, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    folder, seen = pictures
    with pytest.raises(ValueError, match=r"--cache_features .* do not fit .* --cache_dtype int8"):
        train_sft_vlm.main(data_flags(cached, folder))
    assert not seen


# ---------------------------------------------------------------------------- the store itself


def cache_at(path, dtype="float16"):
    cache = FeatureCache(path, {"encoder": "x"}, 4, 8, dtype)
    cache.begin()
    return cache


def keys_of(*names):
    return np.frombuffer(b"".join(hash_of(name.encode()) for name in names), np.uint8).reshape(-1, 16)


def add(cache, *names, value=1.0):
    for name in names:
        cache.add([hash_of(name.encode())], torch.full((1, 4, 8), value))
    cache.flush()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_features_come_back_by_the_hash_of_their_picture(tmp_path, dtype):
    cache, torch_random = cache_at(tmp_path, dtype), torch.Generator().manual_seed(0)
    exact = torch.randn(3, 4, 8, generator=torch_random)
    cache.add([hash_of(b"a"), hash_of(b"b")], exact[:2])
    cache.flush()
    cache.add([hash_of(b"c")], exact[2:])
    cache.flush()
    cache.refresh()
    numbers = cache.find(keys_of("c", "nowhere", "a"))
    assert numbers[1] == -1
    found = cache.read(numbers[[0, 2]].tolist())
    assert found.dtype == torch.float16
    error = (found.float() - exact[[2, 0]]).abs().amax(dim=-1) / exact[[2, 0]].abs().amax(dim=-1)
    assert error.max() < (1e-3 if dtype == "float16" else 1 / 200)


def test_two_that_build_at_once_lose_nothing_and_the_earlier_result_counts(tmp_path):
    one, two = cache_at(tmp_path), cache_at(tmp_path)
    add(one, "a", "b", value=1.0)
    add(two, "b", "c", value=2.0)
    for cache in (one, two):
        cache.refresh()
        found = cache.read(cache.find(keys_of("a", "b", "c")).tolist())
        assert found[:, 0, 0].tolist() == [1, 1, 2]


def test_features_without_keys_do_not_count_and_go_after_an_hour(tmp_path):
    cache = cache_at(tmp_path)
    add(cache, "a")
    add(cache, "b")
    lost = sorted(cache.path.glob("*.keys.npy"))[-1]
    lost.unlink()  # as when the run is killed between the two files
    cache = cache_at(tmp_path)
    assert cache.find(keys_of("a", "b")).tolist() == [0, -1]
    left = cache.path / lost.name.replace(".keys.", ".features.")
    os.utime(left, (0, 0))
    cache_at(tmp_path)
    assert not left.exists() and cache_at(tmp_path).pictures == 1


def test_a_damaged_segment_is_named(tmp_path):
    cache = cache_at(tmp_path)
    add(cache, "a", "b")
    path = next(cache.path.glob("*.features.npy"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"a segment is damaged .* rm {path.parent}/\S+\.\*"):
        cache_at(tmp_path)


def test_features_too_large_for_float16_are_refused(tmp_path):
    with pytest.raises(ValueError, match="float16 cannot hold"):
        add(cache_at(tmp_path), "a", value=1e6)


@pytest.mark.slow
def test_two_ranks_share_the_work_and_a_killed_run_leaves_a_cache_that_works(cached, pictures, tmp_path):
    folder, _ = pictures
    flags = data_flags(cached, folder)
    for step in range(40):  # more pictures, so that there is something to interrupt
        Image.new("RGB", (40, 36), (step, 0, 0)).save(folder / f"pictures/more_{step}.png")
    rows = [
        {"conversations": [turn("user", "What?\n<image>"), turn("assistant", "Red.")], "image": f"more_{step}.png"}
        for step in range(40)
    ]
    write_rows(folder / "rows.jsonl", rows)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train_sft_vlm.py"]
    process = subprocess.Popen([*launch, *flags], stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if "are missing" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    out = subprocess.run([*launch, *flags], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    cache = next(path for path in (tmp_path / "cache").iterdir())
    keys = [key.tobytes() for path in cache.glob("*.keys.npy") for key in np.load(path)]
    assert len(set(keys)) == 40
    assert features.SEGMENT > 1e8 and Path(cache / "about.json").exists()
