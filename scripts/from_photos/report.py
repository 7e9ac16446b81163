"""The report of `scripts.from_photos`: report.json, a table for the terminal, and a page for the browser.

It is like that of the quickstart (scripts/report.py), with scores of captions in place of right answers.
"""

import json
import random
from pathlib import Path

from common.files import write_text
from model.files import read_json
from scripts.from_photos.report_words import WORDS
from scripts.report import PAGES, run_summary, run_values
from scripts.templates import render

METRICS = {"cider": "{:.3f}", "bleu": "{:.1f}", "loss": "{:.3f}"}
SHOWN = 20  # photos on the page, picked at random


def count_photos(folder: Path) -> dict[str, int]:
    """Counts {"train": photos, "val": photos, "captions": those to train on}. folder: of a run that has its data."""
    lines = {split: (folder / f"data/{split}.jsonl").read_text("utf-8").splitlines() for split in ("train", "val")}
    photos = {split: len({json.loads(line)["image"] for line in each}) for split, each in lines.items()}
    return photos | {"captions": len(lines["train"])}


def summary(folder: Path, records: list[dict], next_commands: list) -> dict:
    """Returns the content of report.json except "wall_s". folder: of a finished run."""
    scores = read_json(folder / "val.json")
    return {
        **run_summary(records, scores, next_commands),
        "scores": {which: scores[which] for which in ("true", "shuffled")},
        "photos": count_photos(folder),
    }


def score_rows(result: dict, words: dict) -> list[list[str]]:
    """Returns a row for each language and metric: [name, with true photos, with shuffled ones]."""
    return [
        [
            f"{words['languages'][language]}, {words['metrics'][metric]}",
            *(show.format(result["scores"][which][language][metric]) for which in ("true", "shuffled")),
        ]
        for language, metrics in result["scores"]["true"].items()
        for metric, show in METRICS.items()
        if metric in metrics  # very short answers have neither CIDEr nor BLEU
    ]


def table(result: dict) -> str:
    """Formats the scores for a terminal."""
    words = WORDS["en"]
    rows = [[words["score"], words["true"], words["shuffled"]], *score_rows(result, words)]
    return "\n".join(f"{name:34}{true:>15}{shuffled:>12}" for name, true, shuffled in rows)


def draw(answers: list[dict]) -> list[list[dict]]:
    """Picks photos at random, the same ones on every call. Returns the answers of each, one per language."""
    by_photo = {}
    for answer in answers:
        by_photo.setdefault(answer["images"][0], []).append(answer)
    drawn = random.Random("photos").sample(sorted(by_photo), min(SHOWN, len(by_photo)))
    return [by_photo[name] for name in drawn]


def page(folder: Path, language: str) -> str:
    """Renders the whole page from the files of a finished run: report.json, val.json, metrics, photos."""
    result, words = read_json(folder / "report.json"), WORDS[language]
    return render(
        "photos.html",
        **run_values(folder, result, words, language),
        scores=score_rows(result, words),
        drawn=draw(read_json(folder / "val.json")["answers"]),
    )


def write_pages(folder: Path) -> list[Path]:
    """Writes the page in each language next to report.json, and returns the paths."""
    for language, name in PAGES.items():
        write_text(folder / name, page(folder, language))
    return [folder / name for name in PAGES.values()]
