"""Reports a run: a progress bar, a metrics file, a plot of the loss, and an experiment tracker if asked for."""

import contextlib
import json
import math
import sys
import time
from collections import deque
from pathlib import Path

from tqdm import tqdm

from common.distributed import is_main
from common.metrics import points, read_metrics
from trainer.optimizer import learning_rates


class Progress:
    """Reports the steps of a run, on the first rank. The metrics file has one JSON object per line:

    {"step", "epoch", "loss", "aux_loss", "lr", "projector_lr", "grad_norm", "samples_per_s", "tokens_per_s",
    "seconds"} for each log interval (loss: mean over the interval) and {"step", "val_loss"} for each validation. For a
    language model there is no "projector_lr"; where answers are rewarded, "reward" takes the place of "loss".
    """

    measures = "loss"

    def __init__(self, path, args, total_steps: int, first_step: int):
        """path: of the metrics file. When a run is resumed, its lines up to first_step are kept."""
        self.path, self.args, self.total_steps = Path(path), args, total_steps
        self.recent, self.samples, self.tokens = [], 0, 0
        self.started = self.since = time.perf_counter()
        self.tracker = self.bar = None
        self.last = deque(maxlen=min(max(total_steps // 10, 1), 100))  # the most recent losses
        if not is_main():
            return
        kept = [line for line in read_metrics(self.path) if line["step"] <= first_step] if first_step else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.tracker = start_tracker(args, self.path.name.split(".")[0])
        interactive = sys.stderr.isatty()
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            unit="step",
            dynamic_ncols=interactive,
            ncols=None if interactive else 120,
            mininterval=0.2 if interactive else 30,  # a log file gets a line every 30 s, not thousands
            bar_format="{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}",
        )

    def step(self, step, epoch, loss, aux_loss, grad_norm, optimizer, samples, tokens) -> None:
        """Called after each step. samples, tokens: of the step, over all ranks; loss: None without labels."""
        if self.bar is None:
            return
        if loss is not None:
            self.recent.append((loss, aux_loss))
            self.last.append(loss)
        self.samples, self.tokens = self.samples + samples, self.tokens + tokens
        self.bar.update()
        if step % self.args.log_interval and step != self.total_steps:
            return
        now = time.perf_counter()
        seconds, steps = now - self.since, len(self.recent) or math.nan
        rates = learning_rates(optimizer)
        line = {
            "step": step,
            "epoch": epoch,
            self.measures: sum(loss for loss, _ in self.recent) / steps,
            "aux_loss": sum(aux for _, aux in self.recent) / steps,
            "lr": rates.get("blocks", rates.get("embeddings", rates.get("projector"))),
            **({"projector_lr": rates["projector"]} if hasattr(self.args, "projector_learning_rate") else {}),
            "grad_norm": grad_norm,
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "seconds": now - self.started,
        }
        self.recent, self.samples, self.tokens, self.since = [], 0, 0, now
        self.bar.set_postfix_str(
            f"{self.measures} {line[self.measures]:.3f} lr {line['lr']:.1e} {line['samples_per_s']:.0f} rows/s "
            f"{line['tokens_per_s']:.0f} tok/s",
            refresh=False,
        )
        self.write(line)

    def validation(self, step: int, loss: float, seconds: float) -> None:
        """Called after each validation. seconds: its duration, which does not count as training time."""
        if self.bar is not None:
            self.bar.write(f"step {step}: validation loss {loss:.4f}", file=sys.stderr)
            self.write({"step": step, "val_loss": loss})
            self.since += seconds

    def write(self, line: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({key: shorten(value) for key, value in line.items()}) + "\n")
        if self.tracker is not None:
            self.tracker.log({key: value for key, value in line.items() if key != "step"}, step=line["step"])

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            with contextlib.suppress(OSError):  # e.g. a full disk; it must not hide the error that stopped the run
                draw(self.path)
        if self.tracker is not None:
            self.tracker.finish()


def shorten(value):
    """Rounds a number to six digits; returns None for NaN and infinity, which JSON cannot represent."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def start_tracker(args, run: str):
    """Starts wandb, trackio or swanlab, which share an interface; returns None if no tracker is asked for.

    Raises ValueError if the package is not installed or cannot start.
    """
    name = "wandb" if args.use_wandb else args.tracker
    if name == "none":
        return None
    try:
        tracker = __import__(name)
        tracker.init(project=args.wandb_project, name=run, config={key: str(x) for key, x in vars(args).items()})
    except ImportError:
        raise ValueError(f"--tracker {name}: not installed. Type: pip install {name}") from None
    except Exception as error:  # wandb raises a dozen types, most often for a missing login
        without = "" if name == "trackio" else f"\nTo log without an account, to disk only: {name.upper()}_MODE=offline"
        raise ValueError(f"--tracker {name}: {error}{without}") from None
    return tracker


def draw(metrics) -> Path | None:
    """Plots the losses of a metrics file as a PNG next to it. Returns its path, or None if the file has no lines."""
    lines = read_metrics(metrics)
    if not lines:
        return None
    from matplotlib.figure import Figure  # imported here: it takes half a second, and only the end of a run needs it

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, style, label in (("loss", "-", "training"), ("reward", "-", "reward"), ("val_loss", "o-", "validation")):
        if values := points(lines, key):
            axes.plot(*zip(*values), style, label=label)
    unit = "reward: CIDEr; " * bool(points(lines, "reward")) + "loss per answer token (nats)"
    axes.set(xlabel="step", ylabel=unit, title=Path(metrics).name.split(".")[0])
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(metrics).with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path
