"""Reads the metrics file that `trainer.progress.Progress` writes. Does not import PyTorch."""

import contextlib
import json
from pathlib import Path


def read_metrics(path) -> list[dict]:
    """The lines of a metrics file, as dicts. Skips a line that a crash cut short; a missing file gives no lines."""
    lines = []
    if Path(path).is_file():
        for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and isinstance(record.get("step"), int):
                    lines.append(record)
    return lines


def points(lines: list[dict], key: str) -> list[tuple[int, float]]:
    """(step, value) of each line that has a value for `key`, such as "loss" or "val_loss"."""
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]
