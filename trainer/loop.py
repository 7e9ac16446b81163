"""The training loop that all stages share: epochs, steps, checkpoints, validation, stopping.

A step is `accumulation_steps` batches on each rank. Its loss is the mean over all labelled tokens of all of them, so
that neither the number of ranks nor the split into batches changes what is learned.
"""

import argparse
import contextlib
import math
import os
import signal
import threading
import time
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from common.cli import Stopped
from common.devices import autocast, cpu_has, pick_dtype
from common.distributed import all_sum, gather, is_main, rank, say, world_size
from common.lock import only_one
from common.start import STOPS, command, handle, leave, tell_stopped
from dataset.lm_dataset import StepSampler, VLMDataset
from dataset.streaming import Stream
from model.model_vlm import MiniMindVLM
from model.processing import IGNORE
from model.weights import describe, read_sidecar, refuse_other_architecture, weights_name
from trainer.acceleration import cast_frozen, choose_attention, compile_layers
from trainer.advice import tell_end, tell_start
from trainer.checkpoint import Checkpoint, State
from trainer.loader import Feed, StreamFeed, check_data, make_loader
from trainer.optimizer import SETTINGS, schedule, set_learning_rate
from trainer.progress import Progress

# What --on_bad_row skip puts up with while training: so many rows with broken pictures, or this share, if it is more.
BEARABLE, BEARABLE_SHARE = 10, 0.01


# ---------------------------------------------------------------------------- a batch


def to_device(batch: dict, model: MiniMindVLM) -> dict:
    """The tensors that the model takes, on its device.

    Padding is on the right, where causal attention does not see it: a dense model needs no mask, and attention without
    one is faster. Experts need it, to leave padding out of their balance.
    """
    keys = ("input_ids", "pixel_values", "image_features", "labels")
    keys += ("attention_mask",) if model.config.use_moe else ()
    device = model.device
    behind = device.type == "cuda"  # elsewhere a copy that goes on in the background may be read half done
    return {key: batch[key].to(device, non_blocking=behind) if batch[key] is not None else None for key in keys}


def count_labels(batch: dict) -> int:
    return int((batch["labels"][:, 1:] != IGNORE).sum())


# ---------------------------------------------------------------------------- stopping


class StopSignal:
    """Notes what asks to stop, so that the step in hand can be finished. A second Ctrl-C stops at once; a terminal that
    is closed may send its signal twice."""

    def __enter__(self):
        self.asked, self.old = False, {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.old = {number: handle(number, self.note) for number in STOPS}
        return self

    def note(self, number, frame) -> None:
        if self.asked and number != getattr(signal, "SIGHUP", None):
            leave(number, frame, "--from_resume")
        self.asked = True
        with contextlib.suppress(RuntimeError, OSError):  # in the middle of a print(); or nobody reads any more
            say("\nstopping after this step ...")

    def __exit__(self, *exception) -> None:
        for number, handler in self.old.items():
            handle(number, handler)


# ---------------------------------------------------------------------------- training


@dataclass
class Run:
    """What a step of the run needs."""

    args: argparse.Namespace
    model: MiniMindVLM
    forward: torch.nn.Module  # the model, perhaps wrapped for several ranks
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    feed: Feed | StreamFeed
    val_loader: DataLoader | None
    checkpoint: Checkpoint
    state: State
    progress: Progress
    stop: "StopSignal"
    device: torch.device
    dtype: torch.dtype
    val_loss: float | None = None
    between_steps: bool = True  # weights, optimizer and state are those of the same step
    saved: int = -1  # the step of the last checkpoint

    @property
    def total_steps(self) -> int:
        return self.state.total_steps

    def epochs_left(self) -> range:
        """From the epoch that was interrupted, if any."""
        return range(self.state.step // self.feed.steps_per_epoch, self.args.epochs)

    def save(self) -> None:
        if self.feed.data is not None:  # a stream's: the rows on the disk now stand for all
            known, found = self.checkpoint.about, self.feed.data.about
            known |= found | {"prompts": known["prompts"] | found["prompts"]}
        self.checkpoint.save(self.model, self.optimizer, self.scaler, self.state)
        self.saved = self.state.step

    def rescue(self, first_step: int) -> None:
        """Saves what an error would lose: the steps done since the last checkpoint, where the weights are good."""
        if self.between_steps and self.state.step > max(self.saved, first_step):
            with contextlib.suppress(Exception):  # of a full disk, say, which may be the very error
                self.save()
                say(f"\nsaved at step {self.state.step} of {self.total_steps}. Once mended, type:")
                say(f"  {command('--from_resume')}")


@contextlib.contextmanager
def training(args, stage: str, weights: Path | None, model: MiniMindVLM, *rest):
    """Sets a `Run` up, where --from_resume says so at the point where it stopped, and closes it. See `set_up`.

    No two runs write the same files: ValueError names the process that does.
    """
    path = Path(args.out_dir) / weights_name(stage, model.config)
    alone = only_one(path, "--out_dir") if is_main() else contextlib.nullcontext()
    with alone, set_up(path, args, stage, weights, model, *rest) as run:
        yield run


@contextlib.contextmanager
def set_up(
    path: Path,
    args,
    stage: str,
    weights: Path | None,
    model: MiniMindVLM,
    tokenizer,
    optimizer,
    data: VLMDataset | Stream,
    val_data,
    device,
):
    """The model, made of `weights`, is on `device`, its trainable parameters are chosen and in the optimizer. path: of
    the weights that come out."""
    dtype = pick_dtype(args.dtype, device)
    large = device.type == "cpu" and model.config.hidden_size >= 256
    if args.dtype == "auto" and large and cpu_has("avx512_bf16", "amx_bf16"):
        say("this CPU computes in bfloat16: with --dtype bfloat16 a step of this model takes about half the time")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    model.model.gradient_checkpointing = args.gradient_checkpointing
    resumable = args.from_resume and path.with_suffix(".resume.pt").is_file()
    if damaged := refuse_other_architecture(path, model.config, resumable):
        say(damaged)
    settings = {key: getattr(args, key) for key in SETTINGS if hasattr(args, key)}
    about = describe(model, args, stage=stage, data=list(map(str, args.data_path)), seed=args.seed, settings=settings)
    about["prompts"] = read_sidecar(weights)["prompts"] if weights else {}  # until rows have better ones
    checkpoint = Checkpoint(path, args, about, data.rows if isinstance(data, Stream) else len(data))
    if getattr(model, "vision_encoder", None) is not None:
        cast_frozen(model.vision_encoder, dtype)  # after its fingerprint has been taken
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun --max-restarts
    if args.from_resume or restarted:
        state = checkpoint.load(model, optimizer, scaler)
    else:
        checkpoint.put_aside()
        state = State()
    if len({other.step for other in gather(state)}) > 1:
        raise ValueError("--from_resume: the ranks find different checkpoints; --out_dir must be one that all see")

    accumulation = fit_accumulation(args, state)
    if isinstance(data, Stream):
        check = partial(check_data, args, model, tokenizer)
        feed = StreamFeed(data, args, accumulation, device, tokenizer, check, path.stem)
    else:
        feed = Feed(data, args, accumulation, device, tokenizer)
    val_loader = None
    if isinstance(val_data, Stream):
        raise ValueError("--val_path: held-out rows are read again and again, so they must be on the disk")
    if val_data is not None:
        val_sampler = StepSampler(val_data.lengths, args.batch_size, 1, 0, rank(), world_size(), shuffle=False)
        val_loader = make_loader(val_data, val_sampler, args, device, tokenizer)
        if isinstance(data, Stream):
            iter(val_loader)  # forks its workers, before there is a thread that fetches

    choose_attention(model, device, dtype)
    if args.compile:
        compile_layers(model)
    forward = model
    if world_size() > 1:
        forward = DistributedDataParallel(model, forward_sync_buffers=False)
    model.train()
    state.total_steps, first_step, started = args.epochs * feed.steps_per_epoch, state.step, time.perf_counter()
    metrics = checkpoint.path.with_suffix(".metrics.jsonl")
    try:
        progress = Progress(metrics, args, state.total_steps, first_step)
        with contextlib.closing(progress), StopSignal() as stop:
            run = Run(
                args=args,
                model=model,
                forward=forward,
                optimizer=optimizer,
                scaler=scaler,
                feed=feed,
                val_loader=val_loader,
                checkpoint=checkpoint,
                state=state,
                progress=progress,
                stop=stop,
                device=device,
                dtype=dtype,
            )
            tell_start(run)
            try:
                yield run
            except Stopped:
                raise
            except Exception:
                run.rescue(first_step)
                raise
    except Stopped:
        tell_stopped(f"stopped at step {state.step} of {state.total_steps}", "--from_resume")
        raise
    if state.step > first_step:
        say(f"{checkpoint.path}: {state.step} steps done. Beside it: its JSON, metrics and loss curve")
        tell_end(run, tokenizer, time.perf_counter() - started)


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # compiling for it would take longer than most validations do
def validate(model: MiniMindVLM, loader: DataLoader, device, dtype, stop: StopSignal | None = None) -> float | None:
    """Loss per answer token (nats) over all rows of the loader, over all ranks. NaN if there is none.

    None, on all ranks, if `stop` was asked for on one before the last row.
    """
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    for batch in loader:
        if stop is not None and stop.asked:
            break
        for message in batch["broken"]:
            print(f"left out of the validation: {message}", flush=True)
        with autocast(device, dtype):
            out = model(**to_device(batch, model), num_items_in_batch=1, return_logits=False)
        total, tokens = total + out.loss.item(), tokens + count_labels(batch)
    model.train(was_training)
    total, tokens, stopped = all_sum(total, tokens, stop is not None and stop.asked)
    if stopped:
        return None
    return total / tokens if tokens else math.nan


def train_epoch(run: Run, epoch: int) -> None:
    """All steps of an epoch that are not done yet; validates and saves in between and at its end.

    Raises Stopped after Ctrl-C and the like, ValueError when a loss is not finite or pictures turn out broken; the last
    good checkpoint stays.
    """
    args, state, steps = run.args, run.state, run.feed.steps_per_epoch
    first = state.step - epoch * steps
    batches = run.feed.batches(epoch, first)
    for step_of_epoch in range(first, steps):
        step = list(islice(batches, run.feed.batches_in_step(step_of_epoch)))
        labels, rows, broken, tokens, stop = all_sum(
            sum(map(count_labels, step)),
            sum(len(batch["rows"]) for batch in step),
            sum(len(batch["broken"]) for batch in step),
            sum(int(batch["attention_mask"].sum()) for batch in step),
            run.stop.asked,
        )
        if stop:
            run.save()
            raise Stopped
        check_broken(run, step, int(rows), int(broken))
        # Without an answer to learn from there is no step: AdamW and Muon would move by momentum alone.
        loss, aux_loss, grad_norm = train_step(run, step, labels, rows) if labels else (None, None, None)
        state.step += 1
        state.rows += int(rows)
        run.between_steps = True
        run.progress.step(state.step, epoch, loss, aux_loss, grad_norm, run.optimizer, int(rows), int(tokens))

        end_of_epoch = step_of_epoch + 1 == steps
        if end_of_epoch or state.step % args.save_interval == 0:
            run.save()
        due = end_of_epoch if args.val_interval is None else state.step % args.val_interval == 0
        if run.val_loader is not None and (due or state.step == run.total_steps):
            started = time.perf_counter()
            run.val_loss = validate(run.model, run.val_loader, run.device, run.dtype, run.stop)
            if run.val_loss is None:
                run.save()
                raise Stopped
            run.progress.validation(state.step, run.val_loss, time.perf_counter() - started)
    next(batches, None)  # none is left; a stream now removes what it had on the disk


def train_step(run: Run, step: list[dict], labels: float, rows: float) -> tuple[float, float, float]:
    """One optimizer step over this rank's batches. labels, rows: their numbers in the step over all ranks.

    Returns (loss per labelled token, auxiliary loss, norm of the gradient), over all ranks. Raises ValueError if a
    loss or the gradient is not finite; the weights are then still those of the step before.
    """
    args, optimizer, scaler = run.args, run.optimizer, run.scaler
    set_learning_rate(optimizer, schedule(run.state.step, run.total_steps, args.warmup_iters, args.schedule))
    # Dropout draws from a stream of its own per step and rank, so that resuming needs no state of it.
    torch.manual_seed(((args.seed * 1_000_003 + run.state.step) * 4096 + rank()) % 2**63)
    optimizer.zero_grad(set_to_none=True)
    losses, aux_losses = [], []
    for i, batch in enumerate(step):
        last = i == len(step) - 1 or world_size() == 1
        # A smaller batch, the last of an epoch, would often be compiled for anew, which takes ten seconds.
        whole = len(batch["rows"]) == args.batch_size
        stance = contextlib.nullcontext() if whole else torch.compiler.set_stance("force_eager")
        with stance, contextlib.nullcontext() if last else run.forward.no_sync(), autocast(run.device, run.dtype):
            out = run.forward(**to_device(batch, run.model), num_items_in_batch=max(labels, 1), return_logits=False)
            aux_loss = out.aux_loss * (len(batch["rows"]) / max(rows, 1))  # both: this batch's share of the step
            # DistributedDataParallel averages gradients over ranks; a step wants their sum.
            scaler.scale((out.loss + aux_loss) * world_size()).backward()
        losses.append(out.loss.detach())
        aux_losses.append(aux_loss.detach())
    scaler.unscale_(optimizer)
    learning = [weight for group in optimizer.param_groups for weight in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(learning, args.grad_clip).item()
    losses, aux_losses = torch.stack(losses).tolist(), torch.stack(aux_losses).tolist()
    loss, aux_loss = all_sum(sum(losses), sum(aux_losses))

    # In fp16 a gradient may overflow: the scaler then leaves the step out and goes on with a smaller scale, above 1.
    if not math.isfinite(loss + aux_loss) or not (math.isfinite(grad_norm) or scaler.get_scale() > 1):
        culprits = [batch for batch, a, b in zip(step, losses, aux_losses) if not math.isfinite(a + b)]
        if math.isfinite(loss + aux_loss):
            culprits = step  # the gradient alone, and it is a sum over all
        named = [run.feed.data.where(row) for batch in culprits for row in batch["rows"]]
        named = [row for rank_rows in gather(named) for row in rank_rows]
        raise ValueError(
            f"step {run.state.step + 1}: loss {loss}, gradient norm {grad_norm}. The step was not taken; the last "
            f"checkpoint is good.\nIts rows: {', '.join(named[:64])}{', ...' if len(named) > 64 else ''}. Look at "
            "them, or try a lower --learning_rate or --dtype float32"
        )
    run.between_steps = False
    scaler.step(optimizer)
    scaler.update()
    return loss, aux_loss, grad_norm


def check_broken(run: Run, step: list[dict], rows: int, broken: int) -> None:
    """Counts pictures that could not be read. Raises ValueError at the first, under `skip` when they are too many."""
    if not broken:
        return
    found = [message for batch in step for message in batch["broken"]]
    found = [message for rank_found in gather(found) for message in rank_found]
    if run.args.on_bad_row == "error":
        raise ValueError(f"{found[0]}\nMend it, or leave such rows out with --on_bad_row skip")
    run.state.broken += broken
    for message in found:
        say(f"left out: {message}")
    seen = run.state.rows + rows + run.state.broken
    if run.state.broken > max(BEARABLE, BEARABLE_SHARE * max(seen, run.feed.rows)):
        raise ValueError(
            f"{run.state.broken} of {seen} rows have broken pictures, more than {BEARABLE} and {BEARABLE_SHARE:.0%}: "
            f"the folder itself\nseems damaged. The last one: {found[-1]}"
        )


def fit_accumulation(args, state: State) -> int:
    """accumulation_steps such that a resumed run makes the same steps on whatever number of ranks it has now."""
    batches = world_size() * args.accumulation_steps
    if state.batches_per_step and state.batches_per_step != batches:
        if state.batches_per_step % world_size():
            raise ValueError(
                f"--from_resume: the run had {state.batches_per_step} batches of {args.batch_size} rows per step, "
                f"which {world_size()} ranks cannot share equally"
            )
        batches = state.batches_per_step
        say(f"resumed with --accumulation_steps {batches // world_size()}, to keep {batches} batches per step")
    state.batches_per_step = batches
    return batches // world_size()
