"""--cache_features: the cache is complete, found again, and does not change training."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import numpy as np
import pytest
import torch
from PIL import Image

import train_pretrain_vlm
import train_sft_vlm
import trainer.guard
from dataset.features import FeatureCache, hash_of
from dataset.lm_dataset import VLMDataset
from model.model_vlm import MiniMindVLM
from tests.conftest import no_space, turn, write_rows
from tests.test_distributed import assert_same_weights
from tests.test_loop import LONG, interrupt, into, losses, same
from tests.test_sources import chat, picture, write_parquet
from trainer import feature_cache


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
    same = ["--optimizer", "adamw", "--learning_rate", "2e-4", "--projector_learning_rate", "2e-4"]
    cached += ["--val_path", str(folder / "val.jsonl"), "--cache_dtype", dtype, *same]
    plain = weights(train_sft_vlm.main([*flags, "--epochs", "2", *same]))
    seen.clear()
    own = weights(train_sft_vlm.main([*cached, "--out_dir", str(tmp_path / "a")]))
    assert sum(seen) == 6  # each picture once, though 14 rows and 4 of validation show them, twice over
    assert {name.split(".")[0] for name in plain} - {name.split(".")[0] for name in own} == {
        "vision_encoder"
    }  # is freed
    for name, weight in own.items():
        assert (plain[name] - weight).norm() <= tolerance * weight.norm(), name
    again = weights(train_sft_vlm.main([*cached, "--out_dir", str(tmp_path / "b")]))
    assert sum(seen) == 6 and all(torch.equal(again[name], own[name]) for name in own)


# AdamW: steps of Muon are of one length, so where there is hardly a gradient it follows the rounding.
RATES = ["--optimizer", "adamw", "--learning_rate", "3e-3", "--projector_learning_rate", "3e-3", "--log_interval", "1"]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-4), ("int8", 1e-2)])
@pytest.mark.parametrize("extra", [["--batch_size", "1"], ["--use_moe", "--batch_size", "5"]])
def test_losses_are_those_without_the_cache_up_to_rounding(flags, cached, tmp_path, dtype, tolerance, extra):
    """Batches of 1: one of two pictures, one of none. Measured, relative: float16 2e-5, int8 8e-4."""
    train_sft_vlm.main([*into(tmp_path / "plain", flags), "--epochs", "2", *RATES, *extra])
    train_sft_vlm.main([*into(tmp_path / "cached", cached), *RATES, *extra, "--cache_dtype", dtype])
    plain, own = ([loss for *_, loss in losses(tmp_path / name)] for name in ("plain", "cached"))
    assert own == pytest.approx(plain, rel=tolerance) and len(own) >= 6
    assert own != plain  # or these were not the rounded ones


def test_with_everything_cached_the_encoder_is_not_called_and_the_folder_only_read(cached, monkeypatch):
    def never(*args):
        raise AssertionError

    validate = ["--val_path", cached[cached.index("--data_path") + 1]]
    train_sft_vlm.main(cached)
    for owner, name in ((MiniMindVLM, "get_image_embeddings"), (FeatureCache, "begin")):
        monkeypatch.setattr(owner, name, never)
    monkeypatch.setattr("dataset.features.write_safely", never)
    train_sft_vlm.main([*cached, *validate])


def test_a_resumed_run_equals_an_uninterrupted_one_with_the_same_rounding(flags, cached, tmp_path, monkeypatch):
    cached = [*cached, *LONG]
    whole = train_sft_vlm.main(into(tmp_path / "whole", cached))
    stopped = into(tmp_path / "stopped", cached)
    with monkeypatch.context() as patch:
        interrupt(patch, 5, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train_sft_vlm.main(stopped)
    resume = [*stopped, "--from_resume"]
    for change, said in ((["--cache_dtype", "int8"], "int8"), (["--cache_features", ""], "None")):
        with pytest.raises(ValueError, match=f"other flags: features kept as was float16, is {said}$"):
            train_sft_vlm.main([*resume, *change])
    moved = shutil.move(tmp_path / "cache", tmp_path / "moved")
    same(whole, train_sft_vlm.main([*resume, "--cache_features", str(moved)]))

    train_sft_vlm.main(into(tmp_path / "plain", flags))
    path = tmp_path / "plain" / "sft_vlm_64.resume.pt"
    before = torch.load(path)  # as a run before this flag left it
    del before["flags"]["features kept as"]
    torch.save(before, path)
    train_sft_vlm.main([*into(tmp_path / "plain", flags), "--from_resume"])


def test_stage_1_and_experts_take_it_too(cached, pictures, tmp_path):
    folder, seen = pictures
    cached = data_flags(cached, folder)
    train_pretrain_vlm.main([*cached, "--out_dir", str(tmp_path / "a")])
    train_sft_vlm.main([*cached, "--use_moe", "--out_dir", str(tmp_path / "b")])
    assert sum(seen) == 6


def test_a_changed_picture_is_encoded_again_and_other_settings_are_kept_apart(cached, pictures, tmp_path, clip_folder):
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
    config = (other / "config.json").read_text()
    (other / "config.json").write_text(config.replace('"num_attention_heads": 2', '"num_attention_heads": 4'))
    assert encoded("--vision_model_path", str(other)) == 5  # the same weights, but they compute something else
    assert encoded("--dtype", "bfloat16") == 5
    assert len([path for path in (tmp_path / "cache").iterdir() if (path / "about.json").exists()]) == 5
    assert encoded() == 0


def test_a_broken_picture_is_reported_as_without_the_cache(cached, pictures, tmp_path, monkeypatch, capsys):
    folder, _ = pictures
    (folder / "pictures/red.png").write_bytes(b"no picture")
    (folder / "pictures/blue.png").write_bytes(b"no picture")  # the same content, under another name
    flags = data_flags(cached, folder)
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: .*red\.png cannot be read: .*\nFix it, or .* skip"):
        train_sft_vlm.main(flags)
    assert not list((tmp_path / "out").glob("*"))  # before the first step

    monkeypatch.setattr(trainer.guard, "MAX_BROKEN_SHARE", 1)
    skip = [*flags, "--on_bad_row", "skip"]
    told = []
    for extra in ([], ["--cache_features", ""], ["--num_workers", "2"]):
        capsys.readouterr()
        run = train_sft_vlm.main([*skip, *extra])
        assert (run.state.rows, run.state.broken) == (2 * 9, 2 * 5)
        told.append(sorted(line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped: ")))
    assert told[0] == told[1] == told[2] and len(told[0]) == 10

    Image.new("RGB", (9, 9), "red").save(folder / "pictures/red.png")
    Image.new("RGB", (9, 9), "blue").save(folder / "pictures/blue.png")
    (folder / "pictures/green.png").write_bytes(b"no picture")
    write_rows(folder / "rows.jsonl", [json.loads(line) for line in (folder / "rows.jsonl").open() if "red" in line])
    run = train_sft_vlm.main([*flags, "--val_path", str(folder / "val.jsonl")])
    assert f"skipped in the validation: {folder / 'val.jsonl'}:3: " in capsys.readouterr().out


def test_a_picture_that_changes_while_features_are_computed_gets_no_stale_features(
    cached, pictures, tmp_path, monkeypatch
):
    folder, _ = pictures
    real = feature_cache.check_room

    def then_change(*args):
        real(*args)
        Image.new("RGB", (9, 9), "pink").save(folder / "pictures/red.png")

    flags = data_flags(cached, folder)
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache, "check_room", then_change)
        with pytest.raises(ValueError, match=r"the picture of .*rows\.jsonl:1 changed while features were computed"):
            train_sft_vlm.main(flags)
    train_sft_vlm.main([*flags, *RATES])
    train_sft_vlm.main([*into(tmp_path / "plain", flags), *RATES, "--cache_features", ""])
    own, plain = ([loss for *_, loss in losses(tmp_path / name)] for name in ("out", "plain"))
    assert own == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("zipped", [False, True])
def test_a_start_reads_only_pictures_whose_files_have_changed(cached, pictures, tmp_path, monkeypatch, zipped):
    folder, seen = pictures
    red, flags = folder / "pictures/red.png", data_flags(cached, folder)
    archive = str(tmp_path / "pictures")

    def draw(colour):
        Image.new("RGB", (40, 36), colour).save(red, compress_level=0)  # so that all colours take as many bytes

    draw("red")
    if zipped:
        flags += ["--images_path", shutil.make_archive(archive, "zip", folder / "pictures")]
    read, use = [], VLMDataset.use_picture
    monkeypatch.setattr(VLMDataset, "use_picture", lambda self, row, *more: read.append(row) or use(self, row, *more))

    def reads_and_encodes():
        read.clear()
        seen.clear()
        train_sft_vlm.main([*flags, "--epochs", "1", "--out_dir", str(tmp_path / str(time.time_ns()))])
        return len(read), sum(seen)

    monkeypatch.setattr("dataset.features.SETTLED", 10**15)  # however long a start takes here
    assert reads_and_encodes() == (12, 6)
    assert reads_and_encodes() == (6, 0)  # files that came a moment ago may change again unseen
    monkeypatch.setattr("dataset.features.SETTLED", 0)
    assert reads_and_encodes() == (6, 0) and reads_and_encodes() == (0, 0)

    before = red.stat()
    draw("pink")
    assert red.stat().st_size == before.st_size
    os.utime(red, ns=(before.st_atime_ns, before.st_mtime_ns))  # as `cp -p` leaves it
    if zipped:
        shutil.make_archive(archive, "zip", folder / "pictures")
    assert reads_and_encodes() == (7 if zipped else 2, 1) and reads_and_encodes() == (0, 0)
    (tmp_path / "cache/hashes.npy").write_bytes(b"damaged")
    assert reads_and_encodes() == (6, 0) and reads_and_encodes() == (0, 0)


def test_parquet_and_jsonl_together(cached, pictures, tmp_path):
    """Several sources: a picture is found by its row's own file, and the same content is one picture."""
    folder, seen = pictures
    rows = [
        (chat("<image><image>", "Both."), [picture("red"), picture("pink")]),
        (chat("Hello.", "Hello."), None),
        (chat("<image>", "Pink."), [picture("pink")]),
    ]
    parquet = write_parquet(tmp_path / "more.parquet", rows)
    flags = [*data_flags(cached, folder), *RATES]
    flags[flags.index("--data_path") + 1 : flags.index("--images_path")] = [
        *(str(parquet), str(folder / "rows.jsonl"), str(parquet))
    ]
    train_sft_vlm.main(flags)
    assert sum(seen) == 6 + len({picture("red"), picture("pink")})
    train_sft_vlm.main([*into(tmp_path / "plain", flags), "--cache_features", ""])
    own, plain = ([loss for *_, loss in losses(tmp_path / name)] for name in ("out", "plain"))
    assert own == pytest.approx(plain, rel=1e-5)


def test_rows_in_a_zip(cached, pictures, tmp_path):
    folder, seen = pictures
    shutil.make_archive(str(tmp_path / "pictures"), "zip", folder / "pictures")
    flags = data_flags(cached, folder)
    train_sft_vlm.main([*flags, "--images_path", str(tmp_path / "pictures.zip")])
    train_sft_vlm.main([*flags, "--out_dir", str(tmp_path / "b")])
    assert sum(seen) == 6  # by content, wherever it lies


def test_without_room_nothing_is_computed(cached, pictures, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 100, 100))
    folder, seen = pictures
    with pytest.raises(ValueError, match=r"(?s)--cache_features .* needs .* --cache_dtype int8"):
        train_sft_vlm.main(data_flags(cached, folder))
    assert not seen and not list((tmp_path / "cache").glob("*/*"))


def test_unsupported_uses_of_the_cache_are_refused_with_the_flag(cached):
    with pytest.raises(ValueError, match="--cache_features: streamed rows"):
        train_sft_vlm.main([*cached, "--data_path", "hf://datasets/nobody/nothing/*.parquet"])


def test_the_model_takes_features_in_place_of_pixels(make_vlm):
    model = make_vlm()
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    ids = torch.tensor([[5, *model.config.image_ids, 6, *model.config.image_ids, 7]])
    features = model.encode_pictures(pixels)
    assert torch.equal(model(ids, image_features=features).logits, model(ids, pixel_values=pixels).logits)
    for wrong in ({"pixel_values": pixels, "image_features": features}, {"image_features": features[..., :-1]}):
        with pytest.raises(ValueError, match=r"image_features must be \(pictures, 16, 32\), in place of pixel_values"):
            model(ids, **wrong)
    with pytest.raises(ValueError, match="placeholders for 2 pictures"):
        model(ids, image_features=features[:1])
    text = torch.tensor([[5, 6, 7]])
    assert torch.equal(model(text, image_features=features[:0]).logits, model(text).logits)


# ---------------------------------------------------------------------------- the store itself


def cache_at(path, dtype="float16"):
    cache = FeatureCache(path, {"encoder": "x"}, 4, 8, dtype)
    cache.begin()
    return cache


def keys_of(*names):
    return [hash_of(name.encode()) for name in names]


def add(cache, *names, value=1.0):
    for name in names:
        cache.add([hash_of(name.encode())], torch.full((1, 4, 8), value))
    cache.flush()


def test_a_full_disk_is_reported_and_keeps_earlier_segments(tmp_path, monkeypatch):
    cache = cache_at(tmp_path)
    add(cache, "a")
    before = sorted(path.name for path in cache.path.iterdir())
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="--cache_features .*: the disk is full; nothing was overwritten"):
        add(cache, "b")
    assert sorted(path.name for path in cache.path.iterdir()) == before


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
    sent = pickle.dumps(cache)  # to a worker process, which maps the files again
    assert not pickle.loads(sent).open and torch.equal(pickle.loads(sent).read(numbers[[0, 2]].tolist()), found)


def test_large_sets_are_cut_into_segments(tmp_path, monkeypatch):
    cache = cache_at(tmp_path)
    monkeypatch.setattr("dataset.features.SEGMENT", 3 * cache.picture_bytes)
    exact = torch.arange(20.0)[:, None, None].expand(20, 4, 8)
    for i in range(0, 20, 2):
        cache.add([hash_of(bytes([n])) for n in (i, i + 1)], exact[i : i + 2])
    assert len(list(cache.path.glob("*.keys.npy"))) == 5  # a run that is killed keeps them
    cache.refresh()
    assert torch.equal(cache.read(range(20)).float(), exact)


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
    half = cache.path / f".{left.name}.1.tmp"  # as when it is killed while it writes
    half.touch()
    for path in (left, half):
        os.utime(path, (0, 0))
    cache_at(tmp_path)
    assert not left.exists() and not half.exists() and cache_at(tmp_path).pictures == 1


def test_a_damaged_segment_is_named(tmp_path):
    cache = cache_at(tmp_path)
    add(cache, "a", "b")
    path = next(cache.path.glob("*.features.npy"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=rf"a segment is damaged .* rm {path.parent}/\S+\.\*"):
        cache_at(tmp_path)


def test_features_too_large_for_float16_are_refused(tmp_path):
    with pytest.raises(ValueError, match="exceed the range of float16"):
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
    flags += ["--epochs", "1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch.append("train_sft_vlm.py")
    process = subprocess.Popen([*launch, *flags], stdout=subprocess.PIPE, text=True, start_new_session=True)
    for line in process.stdout:
        if "are missing" in line:
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    out = subprocess.run([*launch, *flags], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    cache = next(path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    keys = [key.tobytes() for path in cache.glob("*.keys.npy") for key in np.load(path)]
    assert len(set(keys)) == 40
    assert json.loads((cache / "about.json").read_text())["kept as"] == "float16"
    train_sft_vlm.main([*into(tmp_path / "one", flags), "--accumulation_steps", "2"])
    assert_same_weights(tmp_path / "out" / "sft_vlm_64.pth", tmp_path / "one" / "sft_vlm_64.pth")
