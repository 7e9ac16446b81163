"""The training loop of all three stages: forward, loss, backward, clip, step, log, save, validate.

`train_epoch` goes over the steps of an epoch, `train_step` makes one, `validate` looks at held-out rows. How a run is
set up stands in run.py, what may go wrong in guard.py.

A step is `accumulation_steps` batches on each rank. Its loss is the mean over all labelled tokens of all of them, so
that neither the number of ranks nor the split into batches changes what is learned.

Shapes as in model_minimind.py: B rows of a batch, T tokens.

Reading path, 9 of 10; next: inference/generate.py
"""

import math
import time

import torch

from common.cli import Stopped
from common.devices import autocast
from common.distributed import all_sum, rank, world_size
from model.model_vlm import MiniMindVLM
from model.processing import IGNORE
from trainer.guard import StopSignal, check_broken, check_finite
from trainer.optimizer import schedule, set_learning_rate
from trainer.run import Run


def train_epoch(run: Run, epoch: int) -> None:
    """All steps of an epoch that are not done yet; validates and saves in between and at its end.

    Raises Stopped after Ctrl-C and the like, ValueError when a loss is not finite or pictures turn out broken; the last
    good checkpoint stays.
    """
    args, state = run.args, run.state
    for batches, end_of_epoch in run.steps_left(epoch):
        # Counted over all ranks: divided by all labels of the step, every answer token weighs the same. A mean of
        # batch means would give more weight to the tokens of batches that have few.
        labels, rows, broken, tokens, stop = all_sum(
            sum(map(count_labels, batches)),
            sum(len(batch["rows"]) for batch in batches),
            sum(len(batch["broken"]) for batch in batches),
            sum(int(batch["attention_mask"].sum()) for batch in batches),
            run.stop.requested,
        )
        if stop:
            run.save()
            raise Stopped
        check_broken(run, batches, int(rows), int(broken))

        # Without an answer to learn from there is no step: AdamW and Muon would move by momentum alone.
        loss, aux_loss, grad_norm = train_step(run, batches, labels, rows) if labels else (None, None, None)
        run.step_done(int(rows))
        run.progress.step(state.step, epoch, loss, aux_loss, grad_norm, run.optimizer, int(rows), int(tokens))

        # Saving comes first: should the validation fail, no step is lost.
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


def train_step(run: Run, batches: list[dict], labels: float, rows: float) -> tuple[float, float, float]:
    """One optimizer step over this rank's batches. labels, rows: their numbers in the step over all ranks.

    Returns (loss per labelled token, auxiliary loss, norm of the gradient), over all ranks. Raises ValueError if a
    loss or the gradient is not finite; the weights are then still those of the step before.
    """
    args, optimizer, scaler = run.args, run.optimizer, run.scaler
    # The rate rises while the first gradients are still wild, and then falls, for smaller and smaller corrections.
    set_learning_rate(optimizer, schedule(run.state.step, run.total_steps, args.warmup_iters, args.schedule))
    # Dropout draws from a stream of its own per step and rank, so that resuming needs no state of it.
    torch.manual_seed(((args.seed * 1_000_003 + run.state.step) * 4096 + rank()) % 2**63)
    optimizer.zero_grad(set_to_none=True)

    losses, aux_losses = [], []
    for i, batch in enumerate(batches):  # gradients of all add up: many small batches learn as a large one would
        with run.context(batch, last=i == len(batches) - 1):  # mixed precision; ranks exchange only the last gradient
            # Pictures overwrite their placeholders, the decoder reads all, and the answers' tokens are scored.
            out = run.forward(**to_device(batch, run.model), num_items_in_batch=max(labels, 1), return_logits=False)
            aux_loss = out.aux_loss * (len(batch["rows"]) / max(rows, 1))  # both: this batch's share of the step
            # The loss is divided by the labels of all ranks already, so gradients must add up, and DDP averages them.
            scaler.scale((out.loss + aux_loss) * world_size()).backward()
        losses.append(out.loss.detach())
        aux_losses.append(aux_loss.detach())

    scaler.unscale_(optimizer)  # in fp16 the loss was scaled up, so that small gradients do not become 0
    # One odd batch must not undo what many taught: a longer gradient is cut to this length.
    learning = [weight for group in optimizer.param_groups for weight in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(learning, args.grad_clip).item()
    losses, aux_losses = torch.stack(losses).tolist(), torch.stack(aux_losses).tolist()
    loss, aux_loss = all_sum(sum(losses), sum(aux_losses))
    check_finite(run, batches, losses, aux_losses, loss, aux_loss, grad_norm)

    run.between_steps = False  # until the step is counted, weights and state are not of the same one
    scaler.step(optimizer)
    scaler.update()
    return loss, aux_loss, grad_norm


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # compiling for it would take longer than most validations do
def validate(model: MiniMindVLM, loader, device, dtype, stop: StopSignal | None = None) -> float | None:
    """Loss per answer token (nats) over all rows of the loader, over all ranks. NaN if there is none.

    None, on all ranks, if `stop` was requested on one before the last row.
    """
    was_training = model.training
    model.eval()  # without dropout
    total, tokens = 0.0, 0
    for batch in loader:
        if stop is not None and stop.requested:
            break
        for message in batch["broken"]:
            print(f"left out of the validation: {message}", flush=True)
        with autocast(device, dtype):
            out = model(**to_device(batch, model), num_items_in_batch=1, return_logits=False)  # a sum, divided below
        total, tokens = total + out.loss.item(), tokens + count_labels(batch)
    model.train(was_training)
    total, tokens, stopped = all_sum(total, tokens, stop is not None and stop.requested)
    if stopped:
        return None
    return total / tokens if tokens else math.nan


def count_labels(batch: dict) -> int:
    """Tokens that are learned: position t predicts label t + 1, so the first label is none."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


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
