"""The training loop of all three stages: forward, loss, backward, clip, step, log, save, validate.

`train_epoch` runs the steps of an epoch, `train_step` does one of them, `learn_answers` learns a batch, `validate`
measures the loss on held-out rows. run.py sets a run up; guard.py handles signals, broken pictures and other faults.

A step is `accumulation_steps` batches on each rank. Its loss is the mean over all labelled tokens of all these batches.
Neither the number of ranks nor the split into batches changes what the model learns (stage 3 aside: scst.py).
Shapes as in model_minimind.py: B rows per batch, T tokens.

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
from trainer.augment import augment_batch
from trainer.guard import StopSignal, check_broken, check_finite
from trainer.optimizer import schedule, set_learning_rate
from trainer.run import Run


def train_epoch(run: Run, epoch: int, learn=None) -> None:
    """Runs the remaining steps of an epoch; validates and saves at the intervals of the flags and at the end.

    learn: in place of `learn_answers`. Raises Stopped after Ctrl-C or another signal to stop, ValueError if a loss is
    not finite or pictures are broken. The last good checkpoint is kept.
    """
    args, state = run.args, run.state
    for batches, end_of_epoch in run.steps_left(epoch):
        # Sums over all ranks. The loss is divided by the labels of the whole step: every answer token weighs the same.
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

        # A step without labels is skipped: AdamW and Muon would move the weights by momentum alone.
        loss, aux_loss, grad_norm = train_step(run, batches, labels, rows, learn) if labels else (None, None, None)
        run.step_done(int(rows))
        run.progress.step(state.step, epoch, loss, aux_loss, grad_norm, run.optimizer, int(rows), int(tokens))

        # Save before validating: if the validation fails, no step is lost.
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


def train_step(run: Run, batches: list[dict], labels, rows, learn=None) -> tuple[float, float, float]:
    """One optimizer step on this rank's batches. labels, rows: of the step, over all ranks. Returns (loss per labelled
    token, auxiliary loss, gradient norm). Raises ValueError, before the weights change, if one is not finite."""
    args, optimizer, scaler = run.args, run.optimizer, run.scaler
    # The learning rate rises during warmup, while the first gradients are large and noisy, and decays afterwards.
    set_learning_rate(optimizer, schedule(run.state.step, run.total_steps, args.warmup_iters, args.schedule))
    optimizer.zero_grad(set_to_none=True)

    shares = []
    for i, batch in enumerate(batches):  # gradients accumulate: several small batches act as one large batch
        # Dropout is seeded by the step and the batch's place in it, so a checkpoint needs no random state.
        torch.manual_seed(((args.seed * 1_000_003 + run.state.step) * 4096 + rank() + i * world_size()) % 2**63)
        shares.append((learn or learn_answers)(run, batch, i == len(batches) - 1, labels, rows))

    scaler.unscale_(optimizer)  # in fp16 the loss was scaled up so that small gradients do not underflow to 0
    # Clip the gradient norm: one unusual batch must not undo what many batches taught.
    learning = [weight for group in optimizer.param_groups for weight in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(learning, args.grad_clip).item()
    losses, aux_losses = torch.stack(shares).T.tolist()
    loss, aux_loss = all_sum(sum(losses), sum(aux_losses))
    check_finite(run, batches, losses, aux_losses, loss, aux_loss, grad_norm)

    run.between_steps = False  # until step_done(), weights and state belong to different steps
    scaler.step(optimizer)
    scaler.update()
    return loss, aux_loss, grad_norm


def learn_answers(run: Run, batch: dict, last: bool, labels: float, rows: float):
    """Forward and backward pass of a batch; last: of its step. Returns its (loss, auxiliary loss) of the step's."""
    with run.context(batch, last):  # mixed precision; ranks sync gradients on the last batch
        # Picture features overwrite the placeholders, the decoder reads the row, the loss scores the answer tokens.
        inputs = augment_batch(to_device(batch, run.model), run.model, run.args)  # --min_scale, --flip
        out = run.forward(**inputs, num_items_in_batch=max(labels, 1), return_logits=False)
        aux_loss = out.aux_loss * (len(batch["rows"]) / max(rows, 1))  # this batch's share of the step
        # The loss is divided by the labels of all ranks already, so gradients must be summed; DDP averages them.
        run.scaler.scale((out.loss + aux_loss) * world_size()).backward()
    return torch.stack([out.loss, aux_loss]).detach()


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # compiling would take longer than most validations
def validate(model: MiniMindVLM, loader, device, dtype, stop: StopSignal | None = None) -> float | None:
    """Loss per answer token (nats) over all rows of the loader and all ranks; NaN if there are no labels.

    Returns None on all ranks if `stop` was requested on any of them before the last row.
    """
    was_training = model.training
    model.eval()  # turns dropout off
    total, tokens = 0.0, 0
    for batch in loader:
        if stop is not None and stop.requested:
            break
        for message in batch["broken"]:
            print(f"skipped in the validation: {message}", flush=True)
        with autocast(device, dtype):
            out = model(**to_device(batch, model), num_items_in_batch=1, return_logits=False)  # a sum, divided below
        total, tokens = total + out.loss.item(), tokens + count_labels(batch)
    model.train(was_training)
    total, tokens, stopped = all_sum(total, tokens, stop is not None and stop.requested)
    if stopped:
        return None
    return total / tokens if tokens else math.nan


def count_labels(batch: dict) -> int:
    """Number of labels in the loss: position t predicts label t + 1, so the first label is not used."""
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def to_device(batch: dict, model: MiniMindVLM) -> dict:
    """The arguments of `model.forward`, moved to the model's device.

    Padding is on the right, where causal attention never sees it: a dense model needs no mask, and attention is faster
    without one. A model with experts needs the mask to keep padding out of the load balance.
    """
    keys = ("input_ids", "pixel_values", "image_features", "labels")
    keys += ("attention_mask",) if model.config.use_moe else ()
    behind = model.device.type == "cuda"  # on other devices the model may read the tensor before the copy has finished
    return {key: batch[key].to(model.device, non_blocking=behind) if batch[key] is not None else None for key in keys}
