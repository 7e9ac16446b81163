"""Streamed rows: their order, use of the disk, resuming, ranks, and errors of a hub."""

import json
import os
import re
import shutil
import signal
import tempfile
import threading
import time
from collections import Counter
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

import trainer.loader
from dataset import streaming
from dataset.lm_dataset import VLMDataset
from dataset.streaming import Fetcher, Stream
from model.processing import ImageProcessor
from scripts import inspect_data
from tests.conftest import no_space
from tests.test_loop import interrupt, losses
from tests.test_shapes import CAPTIONS, LAYOUTS, files_of, same
from tests.test_sources import chat, picture, write_parquet
from train_sft_vlm import main, parse_args
from trainer.loader import StreamLoader


@pytest.fixture
def files(tmp_path):
    """Two Parquet files of 41 rows in row groups of 6, each row with its own word."""
    folder = tmp_path / "far"
    folder.mkdir()
    rows = [(chat(f"What is {i}?\n<image>", f"row {i}."), [picture("red")]) for i in range(41)]
    write_parquet(folder / "sft_0.parquet", rows[:25], row_group_size=6)
    write_parquet(folder / "sft_1.parquet", rows[25:], row_group_size=6)
    return folder


@pytest.fixture
def url(files):
    return f"file://{files}/sft_*.parquet"


@pytest.fixture
def streamed(flags, url):
    flags = flags[flags.index("--tokenizer_path") :]  # without --images_path
    return [*flags, "--data_path", url, "--batch_size", "3", "--stream_rows", "12", "--max_seq_len", "120"]


def rows_of(plan):
    return [
        (row_group.file, row_group.offset + row)
        for shard in plan
        for row_group in shard
        for row in range(row_group.first, row_group.end)
    ]


# ---------------------------------------------------------------------------- which rows when


@pytest.mark.parametrize("shard_rows", [1, 5, 12, 1000])
def test_every_row_is_in_one_shard_of_an_epoch(url, files, shard_rows):
    stream = Stream([url])
    assert stream.rows == 41 and len(stream.row_groups) == 8
    plan = stream.plan(shard_rows, seed=1, epoch=0)
    everyone = [(f"file://{files}/sft_{i}.parquet", row) for i, rows in ((0, 25), (1, 16)) for row in range(rows)]
    assert sorted(rows_of(plan)) == everyone
    sizes = [len(rows_of([shard])) for shard in plan]
    assert sizes[:-1] == [shard_rows] * (len(plan) - 1) and 0 < sizes[-1] <= shard_rows


def test_the_order_follows_from_seed_and_epoch(url):
    stream = Stream([url])
    orders = {str(rows_of(stream.plan(12, seed, epoch))) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4 and str(rows_of(Stream([url]).plan(12, 0, 1))) in orders


def feed_rows(url, flags, tokenizer, clip_folder, epoch=0, first=0) -> list[Counter]:
    """The origins of the rows of each step, on the rank that this is."""
    args = parse_args(flags)
    processor = ImageProcessor.from_pretrained(clip_folder)
    stream = Stream([url])
    loader = StreamLoader(
        stream,
        args,
        2,
        torch.device("cpu"),
        tokenizer,
        lambda path: VLMDataset(path, None, tokenizer, processor, 120, [34] * 16),
        "sft_vlm_64",
    )
    steps, batches = [], loader.batches(epoch, first)
    for _ in range(first, loader.steps_per_epoch):
        step = [next(batches) for _ in range(loader.batches_in_step(0))]
        steps.append(Counter(loader.data.where(row) for batch in step for row in batch["rows"]))
    assert next(batches, None) is None
    return steps


def test_steps_cover_the_rows_on_any_number_of_ranks(url, streamed, tokenizer, clip_folder, monkeypatch, tmp_path):
    alone = feed_rows(url, streamed, tokenizer, clip_folder)
    assert [step.total() for step in alone] == [6] * 6 + [5]
    assert len(sum(alone, Counter())) == 41
    assert feed_rows(url, streamed, tokenizer, clip_folder, first=3) == alone[3:]
    assert feed_rows(url, streamed, tokenizer, clip_folder, epoch=1) != alone

    two = [*streamed, "--batch_size", "3"]
    monkeypatch.setattr(trainer.loader, "world_size", lambda: 2)
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(trainer.loader, "rank", lambda rank=rank: rank)
        ranks.append(feed_rows(url, [*two, "--out_dir", str(tmp_path / str(rank))], tokenizer, clip_folder))
    assert len(ranks[0]) == len(ranks[1]) == 4  # steps of 12
    assert len(sum(sum(ranks, []), Counter())) == sum(sum(ranks, []), Counter()).total() == 41


# ---------------------------------------------------------------------------- the disk


def test_two_shards_are_on_the_disk_at_a_time_and_none_in_the_end(url, tmp_path):
    stream = Stream([url])
    plan = stream.plan(12, 0, 0)
    fetcher = Fetcher(stream, plan, tmp_path / "stream")
    for number in range(len(plan)):
        assert fetcher.get(number).is_file()
        fetcher.ahead()
        for thread in fetcher.threads.values():
            thread.join()
        assert len(list((tmp_path / "stream").iterdir())) == min(2, len(plan) - number)
    fetcher.remove()
    assert not (tmp_path / "stream").exists()


def test_runs_with_one_out_dir_keep_apart(streamed, tmp_path, monkeypatch):
    folders, init = set(), Fetcher.__init__

    def note(self, stream, plan, folder):
        folders.add(folder)
        init(self, stream, plan, folder)

    monkeypatch.setattr(Fetcher, "__init__", note)
    main(streamed)
    main([*streamed, "--use_moe"])
    assert len(folders) == 2 and not any(folder.exists() for folder in folders)


def test_a_shard_that_was_left_behind_is_not_fetched_again(url, tmp_path, monkeypatch):
    stream = Stream([url])
    plan = stream.plan(41, 0, 0)
    path = Fetcher(stream, plan, tmp_path).get(0)
    monkeypatch.setattr(streaming, "open_parquet", lambda file: pytest.fail("fetched again"))
    assert Fetcher(stream, plan, tmp_path).get(0) == path
    assert Fetcher(stream, stream.plan(41, 1, 0), tmp_path).path(0) != path  # while another order is another shard


@pytest.fixture
def windows(monkeypatch):
    """No file is removed while a process of ours has it mapped; gives those for which it was tried."""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("what is mapped is looked up as on Linux")
    real, refused = os.unlink, []

    def unlink(path, *, dir_fd=None):
        path = Path("" if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink(), path)
        processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
        if any(area.path == str(path) for process in processes for area in process.memory_maps()):
            refused.append(path)
            raise PermissionError(13, "used by another process", str(path))
        real(path)

    monkeypatch.setattr(os, "unlink", unlink)
    return refused


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_shard_is_closed_before_it_is_removed(streamed, files, tmp_path, windows, workers):
    good, bad = (chat("<image>", "b"), [picture("red")]), ("not a chat", [])
    write_parquet(files / "sft_0.parquet", [good] * 11 + [bad], row_group_size=12)
    write_parquet(files / "sft_1.parquet", [bad] * 12 + [good] * 12, row_group_size=12)
    main([*streamed, "--num_workers", workers, "--on_bad_row", "skip"])
    assert windows == [] and not (tmp_path / "out/stream").exists()


# ---------------------------------------------------------------------------- training


def test_no_thread_of_ours_is_there_when_worker_processes_are_forked(streamed, world, monkeypatch):
    """What it holds at that moment, a lock of the allocator or of a library, the workers would wait for in vain."""
    before, found, fork, fetch = {*threading.enumerate()}, [], os.fork, Stream.fetch

    def note():
        found.append({thread.name for thread in {*threading.enumerate()} - before})
        return fork()

    monkeypatch.setattr(os, "fork", note)
    monkeypatch.setattr(Stream, "fetch", lambda *args: time.sleep(0.5) or fetch(*args))  # so it is seen under way
    rows = ["--val_path", str(world / "val.jsonl"), "--val_images_path", str(world / "pictures")]
    rows += ["--val_interval", "1", "--batch_size", "6", "--stream_rows", "24"]
    main([*streamed, *rows, "--num_workers", "1"])
    assert len(found) == 3  # for the validation and two shards
    assert set.union(*found) <= {"QueueFeederThread"}  # PyTorch's own, which hands out work to other workers


def test_a_resumed_streamed_run_equals_an_uninterrupted_one(streamed, tmp_path, monkeypatch, capsys):
    streamed = [*streamed, "--epochs", "2", "--log_interval", "1"]
    whole = main([*streamed, "--out_dir", str(tmp_path / "whole")])
    assert whole.state.step == 28 and whole.state.rows == 82  # 2 × 14 steps of 3 or fewer
    assert not (tmp_path / "whole/stream").exists()
    assert "41 rows in 8 row groups, streamed 12 at a time" in capsys.readouterr().out
    stopped = [*streamed, "--out_dir", str(tmp_path / "stopped")]
    for step, resume in ((6, []), (18, ["--from_resume"])):
        with monkeypatch.context() as patch:
            interrupt(patch, step, signal.SIGTERM)
            with pytest.raises(SystemExit):
                main([*stopped, *resume])
    main([*stopped, "--from_resume"])
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    one, two = (torch.load(tmp_path / name / "sft_vlm_64.pth") for name in ("whole", "stopped"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_a_bad_row_of_a_stream_is_named_by_its_place_there(streamed, files, capsys):
    rows = [(chat("What?\n<image>", "b"), [picture("red")])] * 8 + [("not a chat", [])]
    write_parquet(files / "sft_1.parquet", rows, row_group_size=4)
    with pytest.raises(ValueError, match=rf'file://{files}/sft_1.parquet:9: no "conversations" list'):
        main(streamed)
    run = main([*streamed, "--on_bad_row", "skip"])
    assert (run.state.step, run.state.rows) == (12, 33)  # 34 rows with the bad one
    assert re.search(r"1 of \d+ rows are not usable", capsys.readouterr().out)


def test_a_shard_of_bad_rows_is_left_out_of_a_run_that_skips_them(streamed, files, capsys):
    for name in ("sft_0.parquet", "sft_1.parquet"):
        write_parquet(files / name, [("not a chat", [])] * 12, row_group_size=12)
    write_parquet(files / "sft_2.parquet", [(chat("<image>", f"{i}"), [picture("red")]) for i in range(12)])
    run = main([*streamed, "--on_bad_row", "skip"])
    assert (run.state.step, run.state.rows) == (12, 12)
    assert capsys.readouterr().out.count("no usable row in a shard of the stream") == 2


def test_a_row_group_larger_than_a_shard_is_read_once(files, tmp_path, monkeypatch, streamed, capsys):
    write_parquet(files / "sft_0.parquet", [(chat("<image>", f"{i}"), [picture("red")]) for i in range(40)])
    stream = Stream([f"file://{files}/sft_0.parquet"])
    read, real = [], pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "read_row_group", lambda self, *a, **k: read.append(a) or real(self, *a, **k)
    )
    for number, shard in enumerate(stream.plan(6, 0, 0)):
        stream.fetch(shard, tmp_path / f"{number}/rows.arrow")
    assert len(read) == 1
    main([*streamed, "--data_path", f"file://{files}/sft_0.parquet"])
    assert "row groups of 40 rows are fetched whole" in capsys.readouterr().out


def test_a_network_that_is_gone_for_half_an_hour_does_not_end_the_run(url, tmp_path, monkeypatch, capsys):
    stream, real, waited = Stream([url]), streaming.open_parquet, []

    def away(file):
        if sum(waited) < 1800:
            raise OSError("connection reset")
        return real(file)

    monkeypatch.setattr(streaming, "open_parquet", away)
    monkeypatch.setattr(streaming.time, "sleep", waited.append)
    assert Fetcher(stream, stream.plan(41, 0, 0), tmp_path).get(0).is_file()
    assert sorted(waited) == waited and max(waited) <= 60
    assert capsys.readouterr().out.count("connection reset\nRetrying for an hour") == 1
    monkeypatch.setattr(streaming, "open_parquet", lambda file: 1 / 0)
    with pytest.raises(ValueError, match="division by zero"):
        Fetcher(stream, stream.plan(41, 1, 0), tmp_path).get(0)
    monkeypatch.setattr(stream, "fetch", no_space)
    with pytest.raises(ValueError, match="the disk is full; nothing was overwritten"):
        Fetcher(stream, stream.plan(41, 2, 0), tmp_path).get(0)
    assert 3300 < sum(streaming.PAUSES) < 3900


def test_a_file_that_is_gone_is_not_waited_for(url, tmp_path, monkeypatch):
    stream, waited, gone = Stream([url]), [], "file:///nowhere/x.parquet"
    monkeypatch.setattr(streaming.time, "sleep", waited.append)
    plan = [[replace(row_group, file=gone) for row_group in shard] for shard in stream.plan(41, 0, 0)]
    with pytest.raises(ValueError, match="x.parquet cannot be read"):
        Fetcher(stream, plan, tmp_path).get(0)
    assert waited == []


@pytest.mark.parametrize(
    "extra, reason",
    [
        (
            ["--data_path", "file:///nowhere/x.parquet"],
            "--data_path file:///nowhere/x.parquet: no such file. Found: ",
        ),
        (["--data_path", "URL", "ROWS"], "streamed rows contain their pictures and cannot be combined with"),
        (["--images_path", "x"], "streamed rows contain their pictures and cannot be combined with"),
        (["--data_weights", "2"], "streamed rows contain their pictures and cannot be combined with"),
        (["--val_path", "URL"], "--val_path: held-out rows are read several times, so they must be on disk"),
        (["--data_path", "file://OTHER"], 'other.parquet: the columns are image, and "image" has no text column'),
        (["--data_path", "file://BROKEN"], "broken.parquet cannot be read: "),
        (
            ["--data_path", "file://SINGLE", "URL"],
            "sft_0.parquet: its columns are\nconversations: string\nimage_bytes: list<element: binary>",
        ),
        (["--data_path", "file://EMPTY"], "empty.parquet has no rows"),
    ],
)
def test_unsupported_streams_are_refused(streamed, url, files, world, extra, reason):
    pyarrow.parquet.write_table(pa.table({"image": ["a"]}), files / "other.parquet")
    (files / "broken.parquet").write_bytes(b"PAR1")
    write_parquet(files / "single.parquet", [(chat("<image>", "b"), [picture("red")])], several=False)
    write_parquet(files / "empty.parquet", [])
    there = {"URL": url, "ROWS": str(world / "rows.jsonl"), "OTHER": f"{files}/other.parquet"}
    there |= {name: f"{files}/{name.lower()}.parquet" for name in ("BROKEN", "SINGLE", "EMPTY")}
    extra = [re.sub("URL|ROWS|OTHER|BROKEN|SINGLE|EMPTY", lambda match: there[match[0]], flag) for flag in extra]
    with pytest.raises((ValueError, OSError), match=re.escape(reason)):
        main([*streamed, *extra])


# ---------------------------------------------------------------------------- a hub


class Hub(BaseHTTPRequestHandler):
    """What huggingface.co answers about one data set repository, owner/name, whose files lie in server.folder."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", kind="application/json", **headers):
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(body)), "X-Repo-Commit": "a" * 40} | headers
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def entries(self):
        for path in sorted(self.server.folder.iterdir()):
            yield {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": "b" * 40}

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(self.path)
        names = json.loads(asked)["paths"] if asked[:1] == b"{" else re.findall("paths=([^&]+)", asked.decode())
        self.answer(
            200, json.dumps([entry for entry in self.entries() if entry["path"] in map(unquote, names)]).encode()
        )

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(path)
        if self.server.status != 200:
            return self.answer(self.server.status, b"{}", X_Error_Code="RepoNotFound")
        if "/tree/" in path:
            return self.answer(200, json.dumps(list(self.entries())).encode())
        if path.startswith("/api/"):
            names = [{"rfilename": entry["path"]} for entry in self.entries()]
            about = {
                "id": "owner/name",
                "sha": "a" * 40,
                "siblings": names,
                "private": False,
                "gated": False,
                "tags": [],
            }
            return self.answer(200, json.dumps(about).encode())
        file = self.server.folder / Path(path).name
        if not file.is_file():
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound")
        content = file.read_bytes()
        first, last = re.fullmatch(
            r"bytes=(\d+)-(\d+)", self.headers.get("Range", f"bytes=0-{len(content) - 1}")
        ).groups()
        part = content[int(first) : int(last) + 1]
        self.server.sent += len(part)
        return self.answer(
            206 if "Range" in self.headers else 200,
            part,
            "application/octet-stream",
            ETag='"b"',
            Last_Modified=formatdate(usegmt=True),
            Content_Range=f"bytes {first}-{last}/{len(content)}",
        )

    do_HEAD = do_GET


@pytest.fixture
def hub(files, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.status, server.asked, server.sent = files, 200, [], 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    yield server
    server.shutdown()
    server.server_close()


def test_a_data_set_on_a_hub_is_learned_from_without_being_downloaded(streamed, hub, tmp_path):
    far = [*streamed, "--data_path", "hf://datasets/owner/name/sft_*.parquet", "--out_dir", str(tmp_path / "far_run")]
    run = main(far)
    assert run.state.step == 14 and hub.sent > 0
    assert not (tmp_path / "far_run/stream").exists()
    with pytest.raises(FileNotFoundError, match="no such file. Found: sft_0.parquet, sft_1.parquet"):
        main([*far, "--data_path", "hf://datasets/owner/name/none_*.parquet"])


def test_inspect_data_reports_that_it_reads_one_shard_of_a_hub(
    hub, tmp_path, tokenizer_folder, clip_folder, monkeypatch, capsys
):
    far = "hf://datasets/owner/name/sft_*.parquet"
    flags = ["--tokenizer_path", str(tokenizer_folder), "--vision_model_path", str(clip_folder), "--max_seq_len", "120"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    inspect_data.main([far, *flags, "--stream_rows", "10", "--open_all"])
    out = " ".join(capsys.readouterr().out.split())
    assert "41 rows in 8 row groups" in out and "10 10 a shard of the stream" in out and "10 usable rows" in out
    assert "All 10 pictures were opened, 0 of them cannot be read" in out
    assert "These are 10 of 41 streamed rows, from row groups picked by --seed." in out
    assert f"--data_path '{far}'" in out.split("To train on it:")[1]
    assert "hf://datasets/owner/name/sft_" in (tmp_path / "out/inspect.html").read_text(encoding="utf-8")
    assert not list((tmp_path / "temporary").iterdir())
    with pytest.raises(ValueError, match="streamed rows contain their pictures and cannot be combined with"):
        inspect_data.main([far, "rows.jsonl", *flags])
    hub.status = 404
    with pytest.raises(OSError, match="(no such file|cannot be read: )"):
        inspect_data.main(["hf://datasets/owner/fourth/sft_*.parquet", *flags])


def test_a_missing_repository_or_network_is_reported_in_one_sentence(streamed, hub):
    hub.status = 404
    far = [*streamed, "--data_path", "hf://datasets/owner/other/sft_*.parquet"]
    with pytest.raises(OSError, match="(no such file|cannot be read: )"):
        main(far)
    hub.shutdown()
    hub.server_close()
    with pytest.raises(OSError, match="(?s)(no such file|cannot be read: .* the network, HF_TOKEN)"):
        main([*streamed, "--data_path", "hf://datasets/owner/third/sft_*.parquet"])


# ---------------------------------------------------------------------------- other shapes


def test_other_files_and_zips_of_pictures_are_downloaded_from_a_hub_once(hub, tokenizer, clip_folder, tmp_path):
    (tmp_path / "images").mkdir()
    for colour in ("red", "green", "blue"):
        (tmp_path / "images" / f"{colour}.png").write_bytes(picture(colour))
    for name in ("llava.json", "struct.parquet"):
        LAYOUTS[name](hub.folder / name)
    shutil.make_archive(hub.folder / "images", "zip", tmp_path / "images")

    def read(*paths):
        return VLMDataset(*paths, tokenizer, ImageProcessor.from_pretrained(clip_folder), 200, [34] * 16)

    expected, far = read(hub.folder / "llava.json", tmp_path / "images"), "hf://datasets/owner/name/"
    same(read(f"{far}llava.json", f"{far}images.zip"), expected)
    sent = hub.sent
    assert sent > 0
    same(read(f"{far}llava.json", f"{far}images.zip"), expected)
    assert hub.sent == sent
    same(read(f"{far}struct.parquet", None), expected)  # whole, as scores and tokenizers read it


def test_parquet_of_any_shape_is_streamed(files, streamed, capsys):
    rows = [
        {"image": files_of([colour])[0] | {"path": None}, "text": [text, "Another."]} for text, colour in CAPTIONS * 4
    ]
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), files / "captions.parquet", row_group_size=5)
    flags = [*streamed, "--data_path", f"file://{files}/captions.parquet", "--stream_rows", "6", "--epochs", "2"]
    assert main(flags).state.step == 8
    out = capsys.readouterr().out
    assert "12 rows read as caption (text), pictures (image)" in out and "6 rows per epoch: one caption of each" in out
    with pytest.raises(ValueError, match="--captions_per_epoch all: .* streamed rows"):
        main([*flags, "--captions_per_epoch", "all"])
