"""A run: sets up everything that its steps need, and closes it whatever happens.

`training` is the context manager that a script opens around its loop (loop.py).
"""

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from common.cli import Stopped
from common.devices import autocast, bfloat16_would_help, pick_dtype
from common.distributed import gather, is_main, rank, say, world_size
from common.lock import only_one
from common.start import command, report_stopped
from dataset.batches import StepSampler
from dataset.lm_dataset import VLMDataset
from dataset.streaming import Stream
from model.build import Origin
from model.model_vlm import MiniMindVLM
from model.packed import pack
from model.weights import make_sidecar, refuse_other_architecture, weights_name
from trainer.acceleration import cast_frozen, choose_attention, compile_layers
from trainer.advice import report_end, report_start
from trainer.checkpoint import Checkpoint, State
from trainer.guard import StopSignal
from trainer.loader import StepLoader, StreamLoader, check_data, make_loader
from trainer.optimizer import SETTINGS
from trainer.progress import Progress


@dataclass
class Run:
    """Everything that a training step needs."""

    args: argparse.Namespace
    model: MiniMindVLM
    forward: torch.nn.Module  # the model, wrapped if there are several ranks
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: StepLoader | StreamLoader
    val_loader: DataLoader | None
    checkpoint: Checkpoint
    state: State
    progress: Progress
    stop: StopSignal
    device: torch.device
    dtype: torch.dtype
    val_loss: float | None = None
    between_steps: bool = True  # weights, optimizer and state belong to the same step
    saved: int = -1  # the step of the last checkpoint

    @property
    def total_steps(self) -> int:
        return self.state.total_steps

    def epochs_left(self) -> range:
        """Returns the epochs to do, beginning with one that was interrupted."""
        return range(self.state.step // self.loader.steps_per_epoch, self.args.epochs)

    def steps_left(self, epoch: int) -> Iterator[tuple[list[dict], bool]]:
        """Yields (batches of this rank, whether it is the epoch's last step) for each remaining step of an epoch."""
        steps = self.loader.steps_per_epoch
        first = self.state.step - epoch * steps
        batches = self.loader.batches(epoch, first)
        for step in range(first, steps):
            yield list(islice(batches, self.loader.batches_in_step(step))), step + 1 == steps
        next(batches, None)  # no batch is left; a stream now deletes its files

    @contextlib.contextmanager
    def context(self, batch: dict, last: bool) -> Iterator[None]:
        """Context for the forward and backward pass of one batch. last: it is the last batch of its step."""
        with contextlib.ExitStack() as stack:
            # For a smaller batch, such as the last one of an epoch, layers would often be recompiled: ten seconds.
            if len(batch["rows"]) != self.args.batch_size:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if not last and world_size() > 1:  # ranks exchange gradients once per step
                stack.enter_context(self.forward.no_sync())
            with autocast(self.device, self.dtype):
                yield

    def step_done(self, rows: int) -> None:
        self.state.step += 1
        self.state.rows += rows
        self.between_steps = True

    def save(self) -> None:
        if self.loader.data is not None:  # for a stream, the rows on disk stand for all rows
            metadata, new = self.checkpoint.metadata, self.loader.data.summary
            metadata |= new | {"prompts": metadata["prompts"] | new["prompts"]}
        self.checkpoint.save(self.model, self.optimizer, self.scaler, self.state)
        self.saved = self.state.step

    def rescue(self, first_step: int) -> None:
        """After an error, saves the steps since the last checkpoint if the weights are good."""
        if self.between_steps and self.state.step > max(self.saved, first_step):
            with contextlib.suppress(Exception):  # e.g. a full disk, which may be the original error
                self.save()
                say(f"\nsaved at step {self.state.step} of {self.total_steps}. When the error is fixed, resume with:")
                say(f"  {command('--from_resume')}")


@contextlib.contextmanager
def training(args, stage: str, origin: Origin, model, tokenizer, optimizer, data, val_data, device):
    """Sets up a `Run`, resumes it with --from_resume, and closes it at the end.

    model: built from `origin`, on `device`, with its trainable parameters chosen and in the optimizer. Raises
    ValueError if another process writes the same files, Stopped if the run was asked to stop.
    """
    path = Path(args.out_dir) / weights_name(stage, model.config)
    lock = only_one(path, "--out_dir") if is_main() else contextlib.nullcontext()
    with lock:
        dtype = choose_precision(args, model, device)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        checkpoint = open_checkpoint(path, args, stage, origin, model, data)
        if getattr(model, "vision_encoder", None) is not None:
            cast_frozen(model.vision_encoder, dtype)  # after its fingerprint has been taken
            # In bfloat16 packed weights give the same bits. In float32 they would move every figure, for little.
            # Not with --compile, whose compiler stumbles over packed products.
            if dtype == torch.bfloat16 and not args.compile:
                pack(model.vision_encoder, dtype)
        state = begin_or_resume(args, checkpoint, model, optimizer, scaler)
        loader = open_loader(args, state, model, tokenizer, data, device, path.stem)
        val_loader = open_val_loader(args, val_data, data, device, tokenizer)
        forward = prepare_model(args, model, device, dtype)
        state.total_steps, first_step, started = args.epochs * loader.steps_per_epoch, state.step, time.perf_counter()
        try:
            progress = Progress(path.with_suffix(".metrics.jsonl"), args, state.total_steps, first_step)
            with contextlib.closing(progress), StopSignal() as stop:
                tools = (args, model, forward, optimizer, scaler, loader, val_loader, checkpoint, state, progress, stop)
                run = Run(*tools, device, dtype)
                report_start(run)
                try:
                    yield run
                except Stopped:
                    raise
                except Exception:
                    run.rescue(first_step)
                    raise
        except Stopped:
            report_stopped(f"stopped at step {state.step} of {state.total_steps}", "--from_resume")
            raise
        if state.step > first_step:
            say(f"{checkpoint.path}: {state.step} steps done. Next to it: its JSON, metrics and loss curve")
            report_end(run, tokenizer, time.perf_counter() - started)


# ---------------------------------------------------------------------------- the parts of a run


def choose_precision(args, model, device) -> torch.dtype:
    """Returns the dtype for --dtype; prints a hint if another one would be faster."""
    if bfloat16_would_help(args.dtype, device, model.config.hidden_size):
        say("this CPU supports bfloat16: with --dtype bfloat16 a step of this model takes about half the time")
    return pick_dtype(args.dtype, device)


def open_checkpoint(path: Path, args, stage: str, origin: Origin, model, data) -> Checkpoint:
    """Returns the files that the run writes, with the content of their JSON. path: of the resulting weights."""
    resumable = args.from_resume and path.with_suffix(".resume.pt").is_file()
    if damaged := refuse_other_architecture(path, model.config, resumable):
        say(damaged)
    settings = {key: getattr(args, key) for key in SETTINGS if hasattr(args, key)}
    paths = list(map(str, args.data_path))
    metadata = make_sidecar(model, origin, stage=stage, data=paths, seed=args.seed, settings=settings)
    metadata["prompts"] = origin.prompts  # until the rows provide better ones
    return Checkpoint(path, args, metadata, data.rows if isinstance(data, Stream) else len(data))


def begin_or_resume(args, checkpoint: Checkpoint, model, optimizer, scaler) -> State:
    """Returns the state to begin with: step 0, or with --from_resume that of the checkpoint, whose weights and
    optimizer it loads. Raises ValueError if ranks find different checkpoints."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun --max-restarts
    if args.from_resume or restarted:
        state = checkpoint.load(model, optimizer, scaler)
    else:
        checkpoint.put_aside()
        state = State()
    if len({other.step for other in gather(state)}) > 1:
        raise ValueError("--from_resume: ranks find different checkpoints; --out_dir must be a folder that all share")
    return state


def open_loader(args, state: State, model, tokenizer, data: VLMDataset | Stream, device, name: str):
    """Returns the loader of the training batches. name: of the run's weights, without suffix."""
    accumulation = fit_accumulation(args, state)
    if isinstance(data, Stream):
        check = partial(check_data, args, model, tokenizer)
        return StreamLoader(data, args, accumulation, device, tokenizer, check, name)
    return StepLoader(data, args, accumulation, device, tokenizer)


def open_val_loader(args, val_data, data, device, tokenizer) -> DataLoader | None:
    if isinstance(val_data, Stream):
        raise ValueError("--val_path: held-out rows are read several times, so they must be on disk, not streamed")
    if val_data is None:
        return None
    sampler = StepSampler(val_data.lengths, args.batch_size, 1, 0, rank(), world_size(), shuffle=False)
    loader = make_loader(val_data, sampler, args, device, tokenizer)
    if isinstance(data, Stream):
        iter(loader)  # forks its workers before the thread that downloads exists
    return loader


def prepare_model(args, model, device, dtype) -> torch.nn.Module:
    """Puts the model into training mode and makes it fast. Returns the module to call for a forward pass."""
    model.model.gradient_checkpointing = args.gradient_checkpointing
    choose_attention(model, device, dtype)
    if args.compile:
        compile_layers(model)
    forward = DistributedDataParallel(model, forward_sync_buffers=False) if world_size() > 1 else model
    model.train()
    return forward


def fit_accumulation(args, state: State) -> int:
    """Returns accumulation_steps such that a resumed run makes the same steps on its present number of ranks.

    Raises ValueError if the ranks cannot share the batches of a step equally.
    """
    batches = world_size() * args.accumulation_steps
    if state.batches_per_step and state.batches_per_step != batches:
        if state.batches_per_step % world_size():
            raise ValueError(
                f"--from_resume: the run had {state.batches_per_step} batches of {args.batch_size} rows per step, "
                f"which {world_size()} ranks cannot share equally.\nUse a --nproc_per_node that divides this number"
            )
        batches = state.batches_per_step
        say(f"resumed with --accumulation_steps {batches // world_size()}, to keep {batches} batches per step")
    state.batches_per_step = batches
    return batches // world_size()
