"""What a run reports: a bar in the terminal, lines in a metrics file, a tracker if wanted, a picture of the loss."""

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
    """Reports the steps of a run, on the first rank. The metrics file has a JSON object per line:

    {"step", "epoch", "loss", "aux_loss", "lr", "projector_lr", "grad_norm", "samples_per_s", "tokens_per_s",
    "seconds"} for each log interval (loss: mean over it) and {"step", "val_loss"} for each validation. A language model
    has no "projector_lr".
    """

    def __init__(self, path, args, total_steps: int, first_step: int):
        """path: of the metrics file. Lines of a run that is resumed are kept up to first_step."""
        self.path, self.args, self.total_steps = Path(path), args, total_steps
        self.recent, self.samples, self.tokens = [], 0, 0
        self.started = self.since = time.perf_counter()
        self.tracker = self.bar = None
        self.last = deque(maxlen=min(max(total_steps // 10, 1), 100))  # losses at the end of the run
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
            mininterval=0.2 if interactive else 30,  # a log file gets a line now and then, not a thousand
            bar_format="{n_fmt}/{total_fmt} {bar} {elapsed}<{remaining}{postfix}",
        )

    def step(self, step, epoch, loss, aux_loss, grad_norm, optimizer, samples, tokens) -> None:
        """After each step. samples and tokens: of the step, over all ranks; loss: per labelled token, None without."""
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
            "loss": sum(loss for loss, _ in self.recent) / steps,
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
            f"loss {line['loss']:.3f} lr {line['lr']:.1e} {line['samples_per_s']:.0f} rows/s "
            f"{line['tokens_per_s']:.0f} tok/s",
            refresh=False,
        )
        self.write(line)

    def validation(self, step: int, loss: float, seconds: float) -> None:
        """seconds: how long it took, which is not counted as training."""
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
            with contextlib.suppress(OSError):  # of a full disk, say: what stopped the run must be what is reported
                draw(self.path)
        if self.tracker is not None:
            self.tracker.finish()


def shorten(value):
    """Six digits of a number; None for NaN and infinity, which JSON has not."""
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def start_tracker(args, run: str):
    """wandb, trackio or swanlab, which have the same calls, or None. Raises ValueError if it is not there or ready."""
    name = "wandb" if args.use_wandb else args.tracker
    if name == "none":
        return None
    try:
        tracker = __import__(name)
        tracker.init(project=args.wandb_project, name=run, config={key: str(x) for key, x in vars(args).items()})
    except ImportError:
        raise ValueError(f"--tracker {name}: not installed. Type: pip install {name}") from None
    except Exception as error:  # wandb has a dozen kinds, for a missing login first of all
        without = "" if name == "trackio" else f"\nWithout an account, on this disk alone: {name.upper()}_MODE=offline"
        raise ValueError(f"--tracker {name}: {error}{without}") from None
    return tracker


def draw(metrics) -> Path | None:
    """The curves of a metrics file as a PNG beside it."""
    lines = read_metrics(metrics)
    if not lines:
        return None
    from matplotlib.figure import Figure  # here: it takes half a second, and only the end of a run needs it

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, style in (("loss", "-"), ("val_loss", "o-")):
        if values := points(lines, key):
            axes.plot(*zip(*values), style, label={"loss": "training", "val_loss": "validation"}[key])
    axes.set(xlabel="step", ylabel="loss per answer token (nats)", title=Path(metrics).name.split(".")[0])
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(metrics).with_suffix(".png")
    figure.savefig(path, dpi=120)
    return path
