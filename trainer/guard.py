"""What may go wrong in a training: a signal to stop, broken pictures, a loss that is not finite."""

import contextlib
import math
import signal
import threading

from common.distributed import gather, say
from common.start import STOPS, leave, set_handler

# What --on_bad_row skip puts up with while training: so many rows with broken pictures, or this share, if it is more.
MAX_BROKEN, MAX_BROKEN_SHARE = 10, 0.01


class StopSignal:
    """Notes what asks to stop, so that the step in hand can be finished. A second Ctrl-C stops at once; a terminal that
    is closed may send its signal twice."""

    def __enter__(self):
        self.requested, self.old = False, {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self.old = {number: set_handler(number, self.note) for number in STOPS}
        return self

    def note(self, number, frame) -> None:
        if self.requested and number != getattr(signal, "SIGHUP", None):
            leave(number, frame, "--from_resume")
        self.requested = True
        with contextlib.suppress(RuntimeError, OSError):  # in the middle of a print(); or nobody reads any more
            say("\nstopping after this step ...")

    def __exit__(self, *exception) -> None:
        for number, handler in self.old.items():
            set_handler(number, handler)


def check_broken(run, batches: list[dict], rows: int, broken: int) -> None:
    """Counts pictures that could not be read. Raises ValueError at the first, under `skip` when they are too many."""
    if not broken:
        return
    messages = [message for batch in batches for message in batch["broken"]]
    messages = [message for of_rank in gather(messages) for message in of_rank]
    if run.args.on_bad_row == "error":
        raise ValueError(f"{messages[0]}\nMend it, or leave such rows out with --on_bad_row skip")
    run.state.broken += broken
    for message in messages:
        say(f"left out: {message}")
    seen = run.state.rows + rows + run.state.broken
    if run.state.broken > max(MAX_BROKEN, MAX_BROKEN_SHARE * max(seen, run.loader.rows)):
        raise ValueError(
            f"{run.state.broken} of {seen} rows have broken pictures, more than {MAX_BROKEN} and "
            f"{MAX_BROKEN_SHARE:.0%}: the folder itself\nseems damaged. The last one: {messages[-1]}"
        )


def check_finite(run, batches: list[dict], losses, aux_losses, loss, aux_loss, grad_norm) -> None:
    """ValueError names the rows of a step whose loss or gradient is not finite. losses, aux_losses: of this rank's
    batches; the other numbers are of all ranks.

    In fp16 a gradient may overflow: the scaler then skips the step and goes on with a smaller scale, above 1.
    """
    finite = math.isfinite(loss + aux_loss)
    if finite and (math.isfinite(grad_norm) or run.scaler.get_scale() > 1):
        return
    culprits = [batch for batch, a, b in zip(batches, losses, aux_losses) if not math.isfinite(a + b)]
    if finite:
        culprits = batches  # the gradient alone, and it is a sum over all
    places = [run.loader.data.where(row) for batch in culprits for row in batch["rows"]]
    places = [place for of_rank in gather(places) for place in of_rank]
    rows = ", ".join(places[:64]) + ", ..." * (len(places) > 64)
    raise ValueError(
        f"step {run.state.step + 1}: loss {loss}, gradient norm {grad_norm}; not taken, the last checkpoint is good.\n"
        f"Its rows: {rows}. Look at them, or try a lower --learning_rate or --dtype float32"
    )
