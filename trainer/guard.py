"""Handles what can go wrong during training: a signal to stop, broken pictures, a loss that is not finite."""

import contextlib
import math
import signal
import threading

from common.distributed import gather, say
from common.start import STOPS, leave, set_handler

# How many rows with broken pictures --on_bad_row skip tolerates during training: this many, or this share if larger.
MAX_BROKEN, MAX_BROKEN_SHARE = 10, 0.01


class StopSignal:
    """Records a request to stop, so that the current step can finish. A second Ctrl-C stops at once. A second SIGHUP
    does not: a terminal that closes may send two."""

    def __enter__(self):
        self.requested, self.old = False, {}
        if threading.current_thread() is threading.main_thread():  # Python allows signal handlers only there
            self.old = {number: set_handler(number, self.note) for number in STOPS}
        return self

    def note(self, number, frame) -> None:
        if self.requested and number != getattr(signal, "SIGHUP", None):
            leave(number, frame, "--from_resume")
        self.requested = True
        with contextlib.suppress(RuntimeError, OSError):  # it interrupted a print(), or the output is closed
            say("\nstopping after this step ...")

    def __exit__(self, *exception) -> None:
        for number, handler in self.old.items():
            set_handler(number, handler)


def check_broken(run, batches: list[dict], rows: int, broken: int) -> None:
    """Counts rows with broken pictures. Raises ValueError at the first one; with `skip`, when there are too many."""
    if not broken:
        return
    messages = [message for batch in batches for message in batch["broken"]]
    messages = [message for of_rank in gather(messages) for message in of_rank]
    if run.args.on_bad_row == "error":
        raise ValueError(f"{messages[0]}\nFix it, or skip such rows with --on_bad_row skip")
    run.state.broken += broken
    for message in messages:
        say(f"skipped: {message}")
    seen = run.state.rows + rows + run.state.broken
    if run.state.broken > max(MAX_BROKEN, MAX_BROKEN_SHARE * max(seen, run.loader.rows)):
        raise ValueError(
            f"{run.state.broken} of {seen} rows have broken pictures, more than {MAX_BROKEN} and "
            f"{MAX_BROKEN_SHARE:.0%}: the folder\nseems to be damaged. Last broken picture: {messages[-1]}"
        )


def check_finite(run, batches: list[dict], losses, aux_losses, loss, aux_loss, grad_norm) -> None:
    """Raises ValueError, naming the rows, if the loss or the gradient of a step is not finite. losses, aux_losses: of
    this rank's batches; the other numbers are over all ranks.

    In fp16 a gradient may overflow. As long as its scale is above 1, the scaler skips such a step and lowers the scale.
    """
    finite = math.isfinite(loss + aux_loss)
    if finite and (math.isfinite(grad_norm) or run.scaler.get_scale() > 1):
        return
    culprits = [batch for batch, a, b in zip(batches, losses, aux_losses) if not math.isfinite(a + b)]
    if finite:
        culprits = batches  # only the gradient is bad, and it is a sum over all of them
    places = [run.loader.data.where(row) for batch in culprits for row in batch["rows"]]
    places = [place for of_rank in gather(places) for place in of_rank]
    rows = ", ".join(places[:64]) + ", ..." * (len(places) > 64)
    raise ValueError(
        f"step {run.state.step + 1}: loss {loss}, gradient norm {grad_norm}. The step was not applied, and the last "
        f"checkpoint is good.\nIts rows: {rows}. Check them, or try a lower --learning_rate or --dtype float32"
    )
