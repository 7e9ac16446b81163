"""Clocks: how long, how much memory, how many floating-point operations, and a race of variants in turns."""

import statistics
import time
from functools import cache
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from model.processing import IGNORE
from trainer import advice


def now(device) -> float:
    """Seconds of a clock, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(device, work, *args) -> float:
    """How long work(*args) takes, with all that it leaves the device to do."""
    started = now(device)
    work(*args)
    return now(device) - started


def rate(amount: float, row: dict) -> float:
    return amount / statistics.median(row["seconds"])


def race(variants: dict, rounds: int, once) -> list[dict]:
    """[{"name", "seconds", "ratio", "ratio_range"}] of {name: variant}, measured in turn, round after round.

    once(row, variant) → seconds, and may note more in the row. The ratio is to the first variant in the same round.
    """
    rows = [{"name": name, "seconds": []} for name in variants]
    for _ in range(rounds):
        for row, variant in zip(rows, variants.values()):
            row["seconds"].append(once(row, variant))
    for row in rows:
        ratios = [first / this for first, this in zip(rows[0]["seconds"], row["seconds"])]
        row |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
    return rows


def reset_peak(device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device) -> float:
    """Most GB since `reset_peak`, of the GPU or of this process; not on Linux: since it started."""
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else advice.peak_memory()
    return peak / 1e9


@cache
def matrix_rate(device, dtype) -> float:
    """FLOP/s of large matrix products, the best of several."""
    n = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    timer = Timer("a @ b", globals={"a": a, "b": b}, num_threads=torch.get_num_threads())
    return 2 * n**3 / min(timer.blocked_autorange(min_run_time=1).times)


def matrix_weights(module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)


def useful_flops(model, examples: list[dict], kind: str, cached: bool) -> float:
    """Of a pass over these rows without any waste: no padding, causal attention, logits where there are labels.

    A multiply-add is two. Weights that learn take three times the forward pass, frozen ones between them two.
    """
    blocks, width, stage_1 = model.model.layers, model.config.hidden_size, kind == "pretrain"
    passes = 2 * len(blocks) + (1 if stage_1 else len(blocks))  # forward, back to activations, back to the weights
    per_token = 2 * matrix_weights(blocks[0]) * passes
    per_label = 2 * model.lm_head.weight.numel() * (2 if stage_1 else 3)
    total = 0 if cached else len(examples) * 2 * matrix_weights(model.vision_encoder) * 197
    for row in examples:
        tokens, labels = len(row["input_ids"]), int((row["labels"] != IGNORE).sum())
        total += per_token * tokens + per_label * labels
        total += 2 * tokens**2 * width * 3 * len(blocks)  # q·kᵀ and ·v, over half of T×T, forward and back
    return total
