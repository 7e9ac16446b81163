"""Where the batches of a run come from: a data set on the disk, or one that is streamed a shard at a time."""

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

# A bar's own thread would be there when worker processes are forked: what it holds then, they wait for in vain.
tqdm.monitor_interval = 0


def check_data(args, model, tokenizer, paths, images_path=None, weights=None) -> VLMDataset:
    """A checked data set, of text only for a model without eyes."""
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
    """The pictures of --val_path: --val_images_path, else --images_path where it fits, else None, beside the rows."""
    fits = (1, len(args.val_path))
    if args.val_images_path and len(args.val_images_path) not in fits:
        counts = f"names {len(args.val_images_path)}, --val_path {len(args.val_path)}"
        raise ValueError(f"--val_images_path {counts}: give as many, in this order, or one for all")
    return args.val_images_path or (args.images_path if len(args.images_path or []) in fits else None)


def load_data(args, model, tokenizer, paths, images_path=None, weights=None) -> VLMDataset | Stream:
    """The rows of --data_path; prints how many, and what was left out, mended and shortened."""
    if any(map(is_streamed, paths)):
        if getattr(args, "cache_features", None):
            raise ValueError("--cache_features: streamed rows (hf://...) do not stay; leave it out, or fetch the files")
        if weights or images_path or not all(map(is_streamed, paths)):
            rest = "rows on the disk, --images_path, --data_weights"
            raise ValueError(f"--data_path: streamed rows hold their pictures and go alone; leave out {rest}")
        if getattr(args, "captions_per_epoch", "one") == "all":
            raise ValueError("--captions_per_epoch all: of streamed rows it is not known how many captions they have")
        say(f"looking at {', '.join(paths)} ...")
        stream = Stream(paths)
        say(f"  {stream.rows:,} rows in {len(stream.row_groups):,} row groups, streamed {args.stream_rows:,} at a time")
        most = max(row_group.end for row_group in stream.row_groups)
        if most > args.stream_rows:
            say(f"  row groups of {most:,} rows are fetched whole: neighbours stay together, and memory must hold one")
        return stream
    say(f"checking {', '.join(map(str, paths))} ...")  # minutes for a million rows, the first time
    data = check_data(args, model, tokenizer, paths, images_path, weights)
    say(f"  {len(data):,} rows, {int(data.lengths.mean())} tokens on average")
    report_data(data, args)
    return data


def report_data(data: VLMDataset, args) -> None:
    """What was mended, shortened and left out, and what rows were taken for."""
    for shape, count in data.shapes.items():
        say(f"  {count:,} rows read as {shape}")
    if data.not_read:
        say(f"  columns that are not read: {', '.join(data.not_read)}")
    if getattr(args, "prompt", None) and not data.captioned:
        say("  --prompt is not asked here: no row has a picture with captions alone")
    if data.groups is not None:
        say(f"  {len(data.groups):,} in an epoch, as of several captions it takes one")
    for kind, count in data.mended.items():
        say(f"  {count:,} rows {MENDED[kind]}")
    if data.shortened:
        say(f"  {data.shortened:,} rows lose the end of their answers to --max_seq_len {args.max_seq_len}")
    if data.bad:
        say(f"  {data.report()}")


def ignore_interrupt(worker: int) -> None:
    """Ctrl-C and torchrun's SIGTERM go to the whole process group, which worker processes therefore leave; the main
    process ends them when its step is done, and must not take them for broken before."""
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
    """The batches of a data set on the disk, for this rank.

    Attributes:
        rows: how many rows the data set has.
        rows_per_epoch: how many an epoch passes over, with --data_weights.
        steps_per_epoch: optimizer steps.
        data: the rows that batches are made of now.
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
        """Those of an epoch, from this step of it on."""
        self.sampler.set_epoch(epoch, first_step)
        return iter(self.loader)


class StreamLoader:
    """The same of a stream. A shard that lacks rows ends with steps that have fewer, or none."""

    def __init__(self, stream: Stream, args, accumulation: int, device, tokenizer, check, name: str):
        """check: Shard → VLMDataset; name: of the run's weights, as others may have the same out_dir."""
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
        # Machines may share out_dir, but each fetches for itself.
        fetcher = Fetcher(self.stream, plan, Path(self.args.out_dir) / "stream" / f"{socket.gethostname()}_{self.name}")
        for number in range(first_step // self.shard_steps, len(plan)):
            steps = math.ceil(sum(row_group.end - row_group.first for row_group in plan[number]) / self.step_rows)
            done = max(first_step - number * self.shard_steps, 0)
            left = (steps - done) * self.accumulation  # batches of this rank
            self.data = None  # the shard before: Windows removes no file that is still mapped
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
            fetcher.ahead()  # workers are forked by now, and no thread was there to be forked with them
            for batch in batches:
                left -= 1
                yield batch
            batches = ()  # the workers of an iterator have the shard mapped too
            for _ in range(left):
                yield collate([], self.tokenizer.pad_token_id)
        self.data = None
        with main_first() as leads:  # a run that stops before leaves its shard for the one that goes on
            if leads:
                fetcher.remove()

    def shard(self, fetcher: Fetcher, number: int) -> VLMDataset | None:
        """Its rows, checked; None if all of them are bad and --on_bad_row skip."""
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
