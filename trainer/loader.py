"""Supplies the batches of a run, from a data set on disk or from one that is streamed shard by shard."""

import math
import os
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from torch.utils.data import DataLoader
from tqdm import tqdm

from common.distributed import main_first, rank, say, world_size
from dataset.batches import StepSampler, collate
from dataset.lm_dataset import NoUsableRow, VLMDataset
from dataset.rows import MENDED
from dataset.shapes import ReadOptions
from dataset.sources import Shard
from dataset.streaming import Fetcher, Stream, is_streamed

# tqdm's monitor thread must not exist when worker processes are forked: they would wait forever for locks it holds.
tqdm.monitor_interval = 0


def check_data(args, model, tokenizer, paths, images_path=None, weights=None) -> VLMDataset:
    """Reads and checks rows; their text only if the model has no encoder. Raises ValueError for unusable rows."""
    with main_first():
        return VLMDataset(
            paths,
            images_path,
            tokenizer,
            getattr(model, "processor", None),
            args.max_seq_len,
            getattr(model.config, "image_ids", []),
            args.on_bad_row,
            weights,
            ReadOptions(tuple(args.prompt or ()), args.captions_per_epoch, getattr(args, "allow_urls", False)),
        )


def val_images(args) -> list[str] | None:
    """Returns --val_images_path, else --images_path if it has one path or as many as --val_path, else None: pictures
    are then next to the rows. Raises ValueError if --val_images_path has any other number of paths."""
    fits = (1, len(args.val_path))
    if args.val_images_path and len(args.val_images_path) not in fits:
        counts = f"has {len(args.val_images_path)} paths, --val_path has {len(args.val_path)}"
        raise ValueError(f"--val_images_path {counts}: give one for each, in the same order, or one for all")
    return args.val_images_path or (args.images_path if len(args.images_path or []) in fits else None)


def load_data(args, model, tokenizer, paths, images_path=None, weights=None) -> VLMDataset | Stream:
    """Loads the rows of --data_path; prints how many there are and how many were skipped, repaired or shortened.

    Raises ValueError for flags that do not work with streamed rows.
    """
    if any(map(is_streamed, paths)):
        if getattr(args, "cache_features", None):
            why = "streamed rows (hf://...) are not kept on disk; leave the flag out, or download the files"
            raise ValueError(f"--cache_features: {why}")
        if weights or images_path or not all(map(is_streamed, paths)):
            rest = "rows on disk, --images_path or --data_weights"
            raise ValueError(f"--data_path: streamed rows contain their pictures and cannot be combined with {rest}")
        if getattr(args, "captions_per_epoch", "one") == "all":
            raise ValueError("--captions_per_epoch all: the captions of streamed rows cannot be counted in advance")
        say(f"looking at {', '.join(paths)} ...")
        stream = Stream(paths)
        say(f"  {stream.rows:,} rows in {len(stream.row_groups):,} row groups, streamed {args.stream_rows:,} at a time")
        most = max(row_group.end for row_group in stream.row_groups)
        if most > args.stream_rows:
            say(f"  row groups of {most:,} rows are fetched whole: each must fit in memory, and its rows stay together")
        return stream
    say(f"checking {', '.join(map(str, paths))} ...")  # the first time this takes minutes for a million rows
    data = check_data(args, model, tokenizer, paths, images_path, weights)
    say(f"  {len(data):,} rows, {int(data.lengths.mean())} tokens on average")
    report_data(data, args)
    return data


def report_data(data: VLMDataset, args) -> None:
    """Prints how the rows were read, and how many were repaired, shortened or skipped."""
    for shape, count in data.shapes.items():
        say(f"  {count:,} rows read as {shape}")
    if data.not_read:
        say(f"  ignored columns: {', '.join(data.not_read)}")
    if getattr(args, "prompt", None) and not data.captioned:
        say("  --prompt is not used here: no row is a picture with only captions")
    if data.groups is not None:
        say(f"  {len(data.groups):,} rows per epoch: one caption of each picture")
    for kind, count in data.mended.items():
        say(f"  {count:,} rows {MENDED[kind]}")
    if data.shortened:
        say(f"  {data.shortened:,} rows exceed --max_seq_len {args.max_seq_len} and lose the end of their answers")
    if data.bad:
        say(f"  {data.report()}")


def ignore_interrupt(worker: int) -> None:
    """Runs first in each worker process. Ctrl-C and torchrun's SIGTERM go to the whole process group, so workers leave
    it: the main process finishes its step, for which it needs them, and then ends them itself."""
    if hasattr(os, "setsid"):
        os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_loader(data: VLMDataset, sampler: StepSampler, args, device, tokenizer) -> DataLoader:
    return DataLoader(
        data,
        batch_sampler=sampler,
        collate_fn=partial(collate, pad_token_id=tokenizer.pad_token_id),
        num_workers=args.num_workers,
        persistent_workers=args.num_workers > 0,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_interrupt,
    )


class StepLoader:
    """The batches of a data set on disk, for this rank.

    Attributes:
        rows: number of rows in the data set.
        rows_per_epoch: number of rows per epoch, after --data_weights.
        steps_per_epoch: optimizer steps per epoch.
        data: the data set that the current batches come from.
    """

    def __init__(self, data: VLMDataset, args, accumulation: int, device, tokenizer):
        self.data, self.rows = data, len(data)
        self.sampler = StepSampler(
            data.lengths,
            args.batch_size,
            accumulation,
            args.seed,
            rank(),
            world_size(),
            parts=data.parts,
            groups=data.groups,
        )
        self.loader = make_loader(data, self.sampler, args, device, tokenizer)
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.rows_per_epoch = sum(rows for *_, rows in self.sampler.parts)

    def batches_in_step(self, step: int) -> int:
        return self.sampler.batches_in_step(step)

    def batches(self, epoch: int, first_step: int) -> Iterator[dict]:
        """Returns the batches of an epoch, starting at its step `first_step`."""
        self.sampler.set_epoch(epoch, first_step)
        return iter(self.loader)


class StreamLoader:
    """Like `StepLoader`, for streamed rows. If a shard lost rows, its last steps have fewer rows, or none."""

    def __init__(self, stream: Stream, args, accumulation: int, device, tokenizer, check, name: str):
        """check: Shard → VLMDataset; name: of the run's weights, since several runs may share an out_dir."""
        self.stream, self.rows, self.data = stream, stream.rows, None
        self.rows_per_epoch = stream.rows
        self.args, self.accumulation, self.check, self.name = args, accumulation, check, name
        self.device, self.tokenizer = device, tokenizer
        self.step_rows = args.batch_size * accumulation * world_size()
        self.shard_steps = max(args.stream_rows // self.step_rows, 1)
        self.steps_per_epoch = math.ceil(self.rows / self.step_rows)

    def batches_in_step(self, step: int) -> int:
        return self.accumulation

    def batches(self, epoch: int, first_step: int) -> Iterator[dict]:
        plan = self.stream.plan(self.shard_steps * self.step_rows, self.args.seed, epoch)
        # Machines may share out_dir, but each one downloads for itself.
        fetcher = Fetcher(self.stream, plan, Path(self.args.out_dir) / "stream" / f"{socket.gethostname()}_{self.name}")
        for number in range(first_step // self.shard_steps, len(plan)):
            steps = math.ceil(sum(row_group.end - row_group.first for row_group in plan[number]) / self.step_rows)
            done = max(first_step - number * self.shard_steps, 0)
            left = (steps - done) * self.accumulation  # batches of this rank
            self.data = None  # releases the previous shard: Windows cannot delete a file that is still mapped
            self.data, batches = self.shard(fetcher, number), ()
            if self.data:
                sampler = StepSampler(
                    self.data.lengths,
                    self.args.batch_size,
                    self.accumulation,
                    self.args.seed,
                    rank(),
                    world_size(),
                    groups=self.data.groups,
                )
                sampler.set_epoch(epoch, done)
                batches = iter(make_loader(self.data, sampler, self.args, self.device, self.tokenizer))
            fetcher.ahead()  # starts a thread, which must not exist while workers are forked: they exist by now
            for batch in batches:
                left -= 1
                yield batch
            batches = ()  # ends the workers, which keep the shard mapped too
            for _ in range(left):
                yield collate([], self.tokenizer.pad_token_id)
        self.data = None
        with main_first() as leads:  # a run that stops earlier leaves its shard for the run that resumes it
            if leads:
                fetcher.remove()

    def shard(self, fetcher: Fetcher, number: int) -> VLMDataset | None:
        """Fetches and checks a shard. Returns None if all its rows are bad and --on_bad_row is skip."""
        with main_first() as leads:
            path = fetcher.get(number) if leads else fetcher.path(number)
            try:
                data = self.check(Shard(path))
            except NoUsableRow as error:
                if self.args.on_bad_row == "error":
                    raise
                say(f"  {error}")
                return None
        report_data(data, self.args)
        return data
