"""The report of a quickstart: report.json, a table for the terminal, and a page for the browser.

    python -m scripts.report --out_dir out/quickstart      # writes report.html and report_zh.html again

The page is one file per language: it contains its pictures, curves and styles, loads nothing and runs no script. Its
examples are picked at random, right or wrong, the same ones on every call; wrong answers have a section of their own.
Its texts are in scripts/quickstart/report_words.py, its layout in scripts/templates/report.html.
"""

if __spec__ is None:  # started by its path: Python would not find the other folders
    raise SystemExit("type -m scripts.report instead of scripts/report.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

import io
import platform
import random
import re
import shlex
import subprocess
import textwrap
from importlib import metadata
from pathlib import Path

from markupsafe import Markup, escape

from common.cli import Parser
from common.display import WIDTH, duration, gigabytes, typed
from common.files import write_text
from common.machine import usable_cores
from common.metrics import points, read_metrics
from model.files import read_json
from scripts.quickstart.report_words import PAGE, WORDS
from scripts.templates import data_url, render

PAGES = {"en": "report.html", "zh": "report_zh.html"}
LANGUAGES = tuple(PAGES)
WRONG = 12  # wrong answers shown, at most
SWAPPED = 6  # questions shown with another picture, at most

# ---------------------------------------------------------------------------- figures


def read_scores(folder: Path) -> dict[str, dict]:
    """Returns {split: the scores that eval_vlm.py wrote}: val.json first, then the others that exist."""
    scores = {path.stem: read_json(path) for path in folder.glob("val*.json")}
    known = [split for split in WORDS["en"]["splits"] if split in scores]
    return {split: scores[split] for split in [*known, *sorted(scores.keys() - known)]}


def share(answers: list[dict], key: str) -> float | None:
    """Returns the share of answers that are "right" (or "right_shuffled"), 0 to 1; None if there are no answers."""
    return round(sum(answer[key] for answer in answers) / len(answers), 4) if answers else None


def shares(answers: list[dict], key: str) -> dict:
    """Returns {"en", "zh", "all", "by_kind": {kind: share}} for the answers of a scores file."""
    by_language = {lang: [answer for answer in answers if answer["language"] == lang] for lang in LANGUAGES}
    kinds = sorted({answer["kind"] for answer in answers})
    return {
        **{lang: share(group, key) for lang, group in by_language.items()},
        "all": share(answers, key),
        "by_kind": {kind: share([answer for answer in answers if answer["kind"] == kind], key) for kind in kinds},
    }


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file() and (match := re.search(r"model name\s*: (.+)", info.read_text())):
        return match[1]
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return platform.processor() or platform.machine()


def machine() -> dict:
    return {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": metadata.version("torch"),
    }


def run_summary(records: list[dict], scores: dict, next_commands: list) -> dict:
    """Returns the part of report.json that all recipes share, in seconds and GB. scores: from eval_vlm.py."""
    return {
        "wall_s": None,
        "peak_gb": max(record["peak_gb"] for record in records),
        "steps": [
            {
                "name": record["name"],
                "command": shlex.join(record["command"]),
                "seconds": record["seconds"],
                "peak_gb": record["peak_gb"],
            }
            for record in records
        ],
        "machine": machine() | {"device": scores["device"]},
        "weights": scores["weights"],
        "parameters": scores["parameters"],
        "prompts": first_prompts(Path(scores["weights"])),
        "next": next_commands,
    }


def summary(folder: Path, records: list[dict], next_commands: list) -> dict:
    """Returns the content of report.json except "wall_s": shares from 0 to 1. folder: of a finished run."""
    scores = read_scores(folder)
    answers = {split: result["answers"] for split, result in scores.items()}
    return {
        **run_summary(records, scores["val"], next_commands),
        **{split: shares(given, "right") for split, given in answers.items()},
        **{split.replace("val", "shuffled"): shares(given, "right_shuffled") for split, given in answers.items()},
        "questions": {split: len(given) for split, given in answers.items()},
    }


def first_prompts(weights: Path) -> dict[str, str]:
    """Returns {"en": a question from the training of the weights, "zh": ...}, from their JSON."""
    path = weights.with_suffix(".json")
    known = read_json(path).get("prompts", {}) if path.is_file() else {}
    usual = {"en": "What is in the picture?", "zh": "图片里有什么？"}
    return usual | {language: prompts[0] for language, prompts in known.items()}


def file_size(path: Path) -> str:
    """Returns the size of a file in MB, or "" if there is none."""
    return f"{path.stat().st_size / 1e6:.1f} MB" if path.is_file() else ""


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def cells(folder: Path) -> dict:
    """Returns {kind: {split: {language: (share, share with shuffled pictures)}}}; the last kind is "all"."""
    answers = {split: scores["answers"] for split, scores in read_scores(folder).items()}
    kinds = sorted({answer["kind"] for given in answers.values() for answer in given})
    shares_of = {}
    for kind in [*kinds, "all"]:
        shares_of[kind] = {split: {} for split in answers}
        for split in answers:
            for language in LANGUAGES:
                group = [answer for answer in answers[split] if answer["language"] == language]
                group = [answer for answer in group if kind in ("all", answer["kind"])]
                shares_of[kind][split][language] = (share(group, "right"), share(group, "right_shuffled"))
    return shares_of


def table(folder: Path) -> str:
    """Formats exact match by kind and language, next to that with shuffled pictures; three splits fit 80 columns."""
    rows, titles = cells(folder), WORDS["en"]["splits"]
    splits = list(rows["all"])
    lines = [
        "right answers ".ljust(14) + "".join(f"{split:^22}" for split in splits),
        " " * 14 + "".join(f"{titles.get(split, ''):^22}" for split in splits),
        " " * 14 + f"{'true':>11}{'shuffled':>11}" * len(splits),
        " " * 14 + (" " + "".join(f"{language:>5}" for language in LANGUAGES)) * 2 * len(splits),
    ]
    for kind, row in rows.items():
        line = f"{kind:14}"
        for split in splits:
            for which in (0, 1):
                line += " " + "".join(f"{percent(row[split][language][which]):>5}" for language in LANGUAGES)
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------------------- examples


def choose(answers: list[dict], per_group: int, seed: str, groups=("kind", "language")) -> list[dict]:
    """Picks so many answers of each kind and language at random, in this order; the same ones on every call."""
    by_group = {}
    for answer in answers:
        by_group.setdefault(tuple(answer[key] for key in groups), []).append(answer)
    rng = random.Random(seed)
    return [answer for _, group in sorted(by_group.items()) for answer in rng.sample(group, min(per_group, len(group)))]


def some(answers: list[dict], count: int, seed: str) -> list[dict]:
    """Picks so many answers at random, from as many kinds as possible."""
    rng = random.Random(seed)
    by_kind = {}
    for answer in rng.sample(answers, len(answers)):
        by_kind.setdefault(answer["kind"], []).append(answer)
    rounds = [given[i] for i in range(count) for given in by_kind.values() if i < len(given)]
    return rounds[:count]


def plain(question: str) -> str:
    return question.replace("<image>", "").strip()


def examples(folder: Path, count: int = 5) -> str:
    """Formats a few questions and answers of all splits for a terminal."""
    lines, scores = [], read_scores(folder)
    for i, (split, result) in enumerate(scores.items()):
        many = (count - len(lines)) // (len(scores) - i)
        for answer in some(result["answers"], many, split):
            verdict = "right" if answer["right"] else f"wrong, expected: {answer['references'][0]}"
            asked = textwrap.fill(f"[{', '.join(answer['images'])}] {plain(answer['question'])}", WIDTH)
            answered = textwrap.fill(f"{answer['answer']}  ({verdict})", WIDTH - 2)
            lines.append(f"{asked}\n{textwrap.indent(answered, '  ')}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------- curves

COLOURS = {"accent": "#0000ff", "second": "#ffa500", "line": "#c0c0c0", "soft": "#808080"}  # of the page: of matplotlib


def curve(lines: list[dict], label: str) -> Markup:
    """Draws the losses of a metrics file as inline SVG in the colours of the page, light or dark. label: for readers
    who cannot see it."""
    import matplotlib  # imported here: it takes half a second, and only the page needs it
    from matplotlib.figure import Figure

    # Text uses the fonts of the page, ids are the same on every call, and every step is a point.
    settings = {"svg.fonttype": "none", "svg.hashsalt": "report", "path.simplify": False}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained", facecolor="none")
        axes = figure.subplots()
        for key, colour, style in (("loss", "accent", "-"), ("reward", "accent", "-"), ("val_loss", "second", "o:")):
            if values := points(lines, key):
                axes.plot(*zip(*values), style, color=COLOURS[colour], linewidth=2, markersize=8, clip_on=False)
        axes.margins(x=0)
        axes.set(xlim=0, ylim=0, frame_on=False)
        axes.locator_params(nbins=5, min_n_ticks=4)
        axes.tick_params(length=0, pad=8, labelsize=12, labelcolor=COLOURS["soft"])
        axes.grid(axis="y", color=COLOURS["line"], clip_on=False)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1))


def curves(folder: Path, suffix: str, words: dict) -> list[tuple[str, str, Markup]]:
    """Returns (title, last losses, SVG) of each stage with losses. suffix: of its files; words: texts of a language."""
    drawn = []
    for stage, title in words["stages"].items():
        lines = read_metrics(folder / f"{stage}{suffix}.metrics.jsonl")
        keys = {"training": "loss", "reward": "reward", "validation": "val_loss"}
        shown = {words[name]: points(lines, key) for name, key in keys.items()}
        last = ", ".join(f"{name} {values[-1][1]:.3f}" for name, values in shown.items() if values)
        if last:
            drawn.append((title, last, curve(lines, words["curve"].format(title=title, last=last))))
    return drawn


# ---------------------------------------------------------------------------- the page


def run_values(folder: Path, report: dict, words: dict, language: str) -> dict:
    """Returns the values for the template that the pages of all recipes share."""
    weights, parameters = Path(report["weights"]), report["parameters"]
    whole, memory = duration(report["wall_s"]), gigabytes(report["peak_gb"])
    other = next(each for each in LANGUAGES if each != language)
    prompts = report.get("prompts", {})
    following = [
        (what, typed([prompts[language] if part == prompts.get("en") else part for part in command]))
        for what, command in report["next"]
    ]
    times = [[step["name"], duration(step["seconds"]), gigabytes(step["peak_gb"])] for step in report["steps"]]
    sizes = [[words["parts"].get(name, name), f"{count:,}"] for name, count in parameters.items()]

    def picture(name: str) -> str:
        path = folder / "data/images" / name
        return data_url(path.read_bytes(), "png" if path.suffix == ".png" else "jpeg")

    return {
        "language": language,
        "languages": LANGUAGES,
        "words": words,
        "other": other,
        "other_page": PAGES[other],
        "report": report,
        "chat": PAGE,
        "chat_size": file_size(folder / PAGE),
        "whole": whole,
        "memory": memory,
        "curves": curves(folder, re.search(r"_\d+(_moe)?$", weights.stem)[0], words),
        "times": [*times, [words["in all"], whole, memory]],
        "commands": [typed(shlex.split(step["command"])) for step in report["steps"]],
        "weights": weights.name,
        "size": file_size(weights) or words["gone"],
        "parameters": parameters,
        "sizes": [*sizes, [words["in all"], f"{sum(parameters.values()):,}"]],
        "following": following,
        "picture": picture,
    }


def page(folder: Path, language: str = "en") -> str:
    """Renders the page from the files of a finished run: report.json, val.json and other splits, metrics, pictures."""
    report = read_json(folder / "report.json")
    answers = {split: scores["answers"] for split, scores in read_scores(folder).items()}
    wrong = {split: [answer for answer in given if not answer["right"]] for split, given in answers.items()}
    gallery, errors = [], []
    for i, split in enumerate(answers):
        groups = ("kind", "language") if split == "val" else ("kind",)
        gallery += [(answer, split) for answer in choose(answers[split], 1, split, groups)]
        many = (WRONG - len(errors)) // (len(answers) - i)
        errors += [(answer, split) for answer in some(wrong[split], many, "wrong")]
    return render(
        "report.html",
        **run_values(folder, report, WORDS[language], language),
        cells=cells(folder),
        questions={split: len(given) for split, given in answers.items()},
        gallery=gallery,
        wrong=sum(map(len, wrong.values())),
        errors=errors,
        swaps=some([answer for answer in answers["val"] if answer["images"]], SWAPPED, "swapped"),
        percent=percent,
        plain=plain,
    )


def write_pages(folder: Path) -> list[Path]:
    """Writes the page in each language next to report.json, and returns the paths."""
    for language, name in PAGES.items():
        write_text(folder / name, page(folder, language))
    return [folder / name for name in PAGES.values()]


def main(argv=None):
    parser = Parser(__file__, __doc__)
    parser.start.add_argument(
        "--out_dir", type=Path, default=Path("out/quickstart"), help="folder of a finished quickstart"
    )
    folder = parser.parse_args(argv).out_dir
    if not (folder / "report.json").is_file():
        raise SystemExit(f"error: --out_dir {folder} has no report.json. To create one: python -m scripts.quickstart")
    if "questions" not in read_json(folder / "report.json"):  # one about photos; scripts.from_photos writes it again
        raise SystemExit(f"error: --out_dir {folder} is not from a quickstart: run the command that created it again")
    written = write_pages(folder)
    print(table(folder))
    print(f"\nwritten: {' and '.join(map(str, written))}")


if __name__ == "__main__":
    main()
