"""What a run of the quickstart tells: report.json, a table for the terminal, and a page for the browser.

    python -m scripts.report --out_dir out/quickstart      # writes report.html and report_zh.html anew

The page is one file for each language: pictures, curves and style are in it, nothing is fetched and no script runs. Its
examples are drawn by chance, the same on every call, and not for being right; those that are wrong come again by
themselves. Its sentences are in scripts/quickstart/report_words.py.
"""

if __spec__ is None:  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.report instead of scripts/report.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

import base64
import json
import math
import platform
import random
import re
import shlex
import subprocess
import textwrap
from html import escape
from importlib import metadata
from pathlib import Path

from common.cli import Parser
from common.display import WIDTH, duration, gigabytes, typed
from common.files import write_text
from common.machine import usable_cores
from scripts.quickstart.report_words import WORDS

PAGES = {"en": "report.html", "zh": "report_zh.html"}
LANGUAGES = tuple(PAGES)
WRONG = 12  # wrong answers shown, at most
SWAPPED = 6  # questions shown with another picture, at most

# ---------------------------------------------------------------------------- figures


def read_json(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_scores(folder: Path) -> dict[str, dict]:
    """{split: what eval_vlm.py wrote about it}: val.json first, then the others that are there."""
    found = {path.stem: read_json(path) for path in folder.glob("val*.json")}
    order = list(WORDS["en"]["splits"])
    known = [split for split in order if split in found]
    return {split: found[split] for split in [*known, *sorted(found.keys() - known)]}


def share(answers: list[dict], key: str) -> float | None:
    """How many are "right" (or "right_shuffled"), 0 to 1; None if there are no answers."""
    return round(sum(answer[key] for answer in answers) / len(answers), 4) if answers else None


def shares(answers: list[dict], key: str) -> dict:
    """{"en", "zh", "all", "by_kind": {kind: share}} of the answers of a scores file."""
    by_language = {lang: [answer for answer in answers if answer["language"] == lang] for lang in LANGUAGES}
    kinds = sorted({answer["kind"] for answer in answers})
    return {
        **{lang: share(own, key) for lang, own in by_language.items()},
        "all": share(answers, key),
        "by_kind": {kind: share([answer for answer in answers if answer["kind"] == kind], key) for kind in kinds},
    }


def cpu_name() -> str:
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1]
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


def summary(folder: Path, records: list[dict], next_commands: list) -> dict:
    """What stands in report.json but for "wall_s": shares from 0 to 1, seconds, GB. folder: of a finished run."""
    scores = read_scores(folder)
    answers = {split: found["answers"] for split, found in scores.items()}
    return {
        "wall_s": None,
        "peak_gb": max(record["peak_gb"] for record in records),
        **{split: shares(found, "right") for split, found in answers.items()},
        **{split.replace("val", "shuffled"): shares(found, "right_shuffled") for split, found in answers.items()},
        "questions": {split: len(found) for split, found in answers.items()},
        "steps": [
            {
                "name": record["name"],
                "command": shlex.join(record["command"]),
                "seconds": record["seconds"],
                "peak_gb": record["peak_gb"],
            }
            for record in records
        ],
        "machine": machine() | {"device": scores["val"]["device"]},
        "weights": scores["val"]["weights"],
        "parameters": scores["val"]["parameters"],
        "prompts": first_prompts(Path(scores["val"]["weights"])),
        "next": next_commands,
    }


def first_prompts(weights: Path) -> dict[str, str]:
    """{"en": a question that the weights know, "zh": ...}, of their JSON."""
    path = weights.with_suffix(".json")
    known = read_json(path).get("prompts", {}) if path.is_file() else {}
    return {"en": "What is in the picture?", "zh": "图片里有什么？"} | {key: found[0] for key, found in known.items()}


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def cells(folder: Path) -> dict:
    """{kind: {split: {language: (share, share with shuffled pictures)}}}, and "all" for all kinds, at the end."""
    answers = {split: scores["answers"] for split, scores in read_scores(folder).items()}
    kinds = sorted({answer["kind"] for found in answers.values() for answer in found})
    found = {}
    for kind in [*kinds, "all"]:
        found[kind] = {split: {} for split in answers}
        for split in answers:
            for language in LANGUAGES:
                own = [answer for answer in answers[split] if answer["language"] == language]
                own = [answer for answer in own if kind in ("all", answer["kind"])]
                found[kind][split][language] = (share(own, "right"), share(own, "right_shuffled"))
    return found


def table(folder: Path) -> str:
    """Exact match by kind and language on all splits, beside shuffled pictures; three fit a terminal of 80 columns."""
    found, titles = cells(folder), WORDS["en"]["splits"]
    splits = list(found["all"])
    lines = [
        "right answers ".ljust(14) + "".join(f"{split:^22}" for split in splits),
        " " * 14 + "".join(f"{titles.get(split, ''):^22}" for split in splits),
        " " * 14 + f"{'true':>11}{'shuffled':>11}" * len(splits),
        " " * 14 + (" " + "".join(f"{language:>5}" for language in LANGUAGES)) * 2 * len(splits),
    ]
    for kind in found:
        line = f"{kind:14}"
        for split in splits:
            for which in (0, 1):
                line += " " + "".join(f"{percent(found[kind][split][language][which]):>5}" for language in LANGUAGES)
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------------------- examples


def choose(answers: list[dict], per_group: int, seed: str, groups=("kind", "language")) -> list[dict]:
    """So many answers by chance of each kind and language, in this order; always the same ones."""
    found = {}
    for answer in answers:
        found.setdefault(tuple(answer[key] for key in groups), []).append(answer)
    rng = random.Random(seed)
    return [answer for key in sorted(found) for answer in rng.sample(found[key], min(per_group, len(found[key])))]


def some(answers: list[dict], count: int, seed: str) -> list[dict]:
    """So many answers by chance, from as many kinds as possible."""
    rng = random.Random(seed)
    by_kind = {}
    for answer in rng.sample(answers, len(answers)):
        by_kind.setdefault(answer["kind"], []).append(answer)
    rounds = [found[i] for i in range(count) for found in by_kind.values() if i < len(found)]
    return rounds[:count]


def plain(question: str) -> str:
    return question.replace("<image>", "").strip()


def examples(folder: Path, count: int = 5) -> str:
    """A few questions and answers of all splits for a terminal."""
    lines, scores = [], read_scores(folder)
    for i, (split, found) in enumerate(scores.items()):
        many = (count - len(lines)) // (len(scores) - i)
        for answer in some(found["answers"], many, split):
            verdict = "right" if answer["right"] else f"wrong, it is: {answer['references'][0]}"
            asked = textwrap.fill(f"[{', '.join(answer['images'])}] {plain(answer['question'])}", WIDTH)
            answered = textwrap.fill(f"{answer['answer']}  ({verdict})", WIDTH - 2)
            lines.append(f"{asked}\n{textwrap.indent(answered, '  ')}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------- curves


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """{"loss": [(step, value), ...], "val_loss": ...} of a metrics file."""
    found = {"loss": [], "val_loss": []}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            line = json.loads(line)
            for key, points in found.items():
                if line.get(key) is not None:
                    points.append((line["step"], line[key]))
    return found


def ticks(most: float) -> list[float]:
    """Three to six round numbers from 0 to `most`."""
    step = 10 ** math.floor(math.log10(most))
    step *= next(factor for factor in (0.2, 0.25, 0.5, 1, 2) if most / (step * factor) < 6)
    return [i * step for i in range(int(most / step) + 1)]


def curve(metrics: dict, title: str, words: dict) -> str:
    """The losses of a stage as inline SVG; "" without any. words: of a language."""
    points = metrics["loss"] + metrics["val_loss"]
    if not points:
        return ""
    steps, top = max(step for step, _ in points), max(value for _, value in points) * 1.05
    left, right, upper, lower = 44, 500, 14, 236  # of the plot within 520 × 280

    def place(step, value):
        return f"{left + (right - left) * step / steps:.1f},{lower - (lower - upper) * value / top:.1f}"

    parts = []
    for tick in ticks(top):
        x, y = place(0, tick).split(",")
        parts.append(f'<path class="grid" d="M{left} {y}H{right}"/>')
        parts.append(f'<text x="{left - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in ticks(steps):
        x, y = place(tick, 0).split(",")
        parts.append(f'<text x="{x}" y="{lower + 18}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="274" text-anchor="middle">{words["step"]}</text>')
    last = []
    if metrics["loss"]:
        parts.append(f'<polyline class="loss" points="{" ".join(place(*point) for point in metrics["loss"])}"/>')
        last.append(f"{words['training']} {metrics['loss'][-1][1]:.3f}")
    if metrics["val_loss"]:
        dots = [place(*point) for point in metrics["val_loss"]]
        parts.append(f'<polyline class="val" points="{" ".join(dots)}"/>')
        parts += ['<circle class="val" cx="{}" cy="{}" r="4"/>'.format(*dot.split(",")) for dot in dots]
        last.append(f"{words['validation']} {metrics['val_loss'][-1][1]:.3f}")
    label = words["curve"].format(title=title, last=", ".join(last))
    return (
        f'<figure class="card curve"><figcaption><b>{escape(title)}</b><span>{escape(", ".join(last))}</span>'
        f'</figcaption><svg viewBox="0 0 520 280" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
        "</figure>"
    )


# ---------------------------------------------------------------------------- the page

STYLE = """
:root { color-scheme: light dark; --paper: #f6f6f3; --card: #fff; --ink: #1a1c20; --soft: #5b616b; --line: #e2e3e0;
  --accent: #2a5bd7; --pale: #ececea; --good: #0b6b41; --good-bg: #e3f4eb; --bad: #a8201a;
  --bad-bg: #fbe9e7; --second: #c2570c; }
@media (prefers-color-scheme: dark) { :root { --paper: #101216; --card: #191c22; --ink: #e8e9eb; --soft: #a2a8b3;
  --line: #2c3038; --accent: #8fb0ff; --pale: #262a31; --good: #67d8a4; --good-bg: #12301f;
  --bad: #ff9c94; --bad-bg: #3b1917; --second: #ffab5e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.5; -webkit-text-size-adjust: 100%;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "PingFang SC", "Noto Sans CJK SC",
  "Microsoft YaHei", "WenQuanYi Micro Hei", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: clamp(1.8rem, 5vw, 2.6rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 8px; }
h2 { font-size: 1.35rem; letter-spacing: -.01em; margin: 56px 0 4px; }
h3 { font-size: 1rem; margin: 24px 0 8px; }
h3::first-letter { text-transform: uppercase; }
p { margin: 0 0 16px; color: var(--soft); max-width: 68ch; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 14px; margin: 0; min-width: 0; }
.grid-2, .grid-3, .tiles { display: grid; gap: 16px; }
.grid-2 { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
.grid-3 { grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
.tiles { grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); margin: 28px 0 0; }
.tile { padding: 14px 16px; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.4; white-space: nowrap; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .875rem; }
.tile.accent b { color: var(--accent); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9375rem; }
caption { text-align: left; padding: 14px 16px 6px; font-weight: 600; }
caption span { color: var(--soft); font-weight: 400; display: block; }
th, td { padding: 7px 10px; text-align: right; border-top: 1px solid var(--line); white-space: nowrap; }
thead th, thead td { color: var(--soft); font-weight: 500; font-size: .8125rem; border-top: 0; }
th:first-child, td:first-child { text-align: left; padding-left: 16px; font-weight: 500; }
th:last-child, td:last-child { padding-right: 16px; }
.kinds { table-layout: fixed; min-width: 340px; }
.kinds th, .kinds td { padding-left: 5px; padding-right: 5px; }
.kinds th:last-child, .kinds td:last-child { padding-right: 14px; }
.kinds thead th { padding-bottom: 2px; }
.kinds tr > :first-child { width: 27%; padding-left: 14px; }
.kinds th[colspan] { text-align: center; }
.kinds .pale { color: var(--soft); }
.bar::after { content: ""; display: block; height: 4px; margin-top: 3px; border-radius: 2px; background:
  linear-gradient(to right, var(--accent) calc(var(--share) * 1%), var(--pale) 0); }
.bar.pale::after { background: linear-gradient(to right, var(--soft) calc(var(--share) * 1%), var(--pale) 0); }
tr.all th, tr.all td { border-top: 2px solid var(--line); font-weight: 700; }
.curve { padding: 14px 16px 6px; }
.curve figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 16px; }
.curve span { color: var(--soft); font-size: .875rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font-size: 12px; font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .loss { stroke: var(--accent); }
svg polyline.val { stroke: var(--second); stroke-dasharray: 3 4; }
svg circle.val { fill: var(--second); }
.key::before { content: ""; display: inline-block; width: 18px; height: 3px; margin: 0 6px 4px 0; border-radius: 2px;
  background: var(--accent); }
.key.second::before { background: var(--second); }
.example { display: flex; gap: 14px; padding: 14px; }
.pictures { display: flex; flex-direction: column; gap: 6px; flex: none; }
img { display: block; width: 128px; height: 128px; border-radius: 8px; background: var(--pale); }
.pictures.two img { width: 96px; height: 96px; }
.example > div:last-child { min-width: 0; overflow-wrap: anywhere; }
.question { font-weight: 600; line-height: 1.35; margin: 2px 0 8px; }
.tags { color: var(--soft); font-size: .8125rem; }
.tags span { white-space: nowrap; }
.answer { display: inline-block; border-radius: 8px; padding: 3px 9px; line-height: 1.4; }
.right { color: var(--good); background: var(--good-bg); }
.wrong { color: var(--bad); background: var(--bad-bg); }
.neutral { background: var(--pale); }
nav { text-align: right; margin-top: -16px; }
a { color: var(--accent); }
.expected { color: var(--soft); font-size: .9375rem; margin-top: 6px; }
.swap { padding: 14px; }
.swap .sides { display: grid; grid-template-columns: 1fr 1fr; gap: 14px; }
.swap .sides > div { min-width: 0; overflow-wrap: anywhere; }
.swap .tags { margin: 6px 0 2px; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px;
  margin: 6px 0 18px; overflow-x: auto; font: .84375rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
details pre { margin: 6px 16px 12px; }
summary { cursor: pointer; padding: 10px 16px; border-top: 1px solid var(--line); color: var(--soft); }
footer { margin-top: 56px; color: var(--soft); font-size: .875rem; }
@media (max-width: 480px) { main { padding: 24px 14px 40px; } .tiles { grid-template-columns: 1fr 1fr; gap: 10px; }
  .tile { padding: 12px 14px; } .tile b { font-size: 1.5rem; } th, td { padding: 7px 6px; font-size: .875rem; }
  .example img { width: 104px; height: 104px; } svg text { font-size: 17px; } }
"""


def tile(value: str, label: str, accent: bool = False) -> str:
    return (
        f'<div class="card tile{" accent" if accent else ""}"><b>{escape(value)}</b><span>{escape(label)}</span></div>'
    )


def bar(value: float | None, pale: bool) -> str:
    style = f' class="bar{" pale" if pale else ""}" style="--share:{100 * value:.0f}"' if value is not None else ""
    return f"<td{style}>{percent(value)}</td>"


def kinds_table(folder: Path, split: str, questions: int, words: dict) -> str:
    names = "".join(f'<th scope="col">{words["languages"][language]}</th>' for language in LANGUAGES)
    head = f'<tr><td></td><th colspan="2" scope="colgroup">{words["true"]}</th>'
    head += f'<th colspan="2" scope="colgroup">{words["shuffled"]}</th></tr>'
    head += f'<tr><th scope="col">{words["kind"]}</th>{names * 2}</tr>'
    rows = []
    for kind, splits in cells(folder).items():
        name = words["kinds"].get(kind, kind)
        row = "".join(bar(splits[split][language][0], False) for language in LANGUAGES)
        row += "".join(bar(splits[split][language][1], True) for language in LANGUAGES)
        rows.append(f'<tr{" class=all" if kind == "all" else ""}><th scope="row">{escape(name)}</th>{row}</tr>')
    caption = f"{split}: {words['splits'].get(split, split)} <span>{words['questions'].format(n=questions)}</span>"
    return (
        f'<div class="card scroll"><table class="kinds"><caption>{caption}</caption>'
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def picture(folder: Path, name: str, words: dict) -> str:
    path = folder / "data/images" / name
    data = base64.b64encode(path.read_bytes()).decode()
    kind, about = "png" if path.suffix == ".png" else "jpeg", escape(words["scene"].format(name=name))
    return f'<img src="data:image/{kind};base64,{data}" alt="{about}" width="128" height="128">'


def said(answer: str, right: bool | None, language: str, words: dict) -> str:
    """right: None where that is not judged."""
    text = f'<span lang="{language}">{escape(answer) or words["nothing"]}</span>'
    if right is None:
        return f'<span class="answer neutral">{text}</span>'
    mark, verdict = ("✓", "right") if right else ("✗", "wrong")
    mark = f'<span role="img" aria-label="{words["verdicts"][verdict]}">{mark}</span>'
    return f'<span class="answer {verdict}">{mark} {text}</span>'


def example(folder: Path, answer: dict, split: str, words: dict) -> str:
    pictures = "".join(picture(folder, name, words) for name in answer["images"])
    language, two = answer["language"], " two" if len(answer["images"]) > 1 else ""
    kind, expected = words["kinds"].get(answer["kind"], answer["kind"]), ""
    if not answer["right"]:
        reference = f'<span lang="{language}">{escape(answer["references"][0])}</span>'
        expected = f'<div class="expected">{words["expected"]} {reference}</div>'
    return (
        f'<div class="card example"><div class="pictures{two}">{pictures}</div><div>'
        f'<div class="tags">{escape(kind)} · {words["languages"][language]} · <span>{split}</span></div>'
        f'<div class="question" lang="{language}">{escape(plain(answer["question"]))}</div>'
        f"{said(answer['answer'], answer['right'], language, words)}{expected}</div></div>"
    )


def swapped(folder: Path, answer: dict, words: dict) -> str:
    """A question with its own picture and with another one, about which nobody said what is right: no mark there."""
    sides = []
    for title, images, key, right in (
        ("own picture", "images", "answer", answer["right"]),
        ("other picture", "images_shuffled", "answer_shuffled", None),
    ):
        shown = "".join(picture(folder, name, words) for name in answer[images])
        verdict = said(answer[key], right, answer["language"], words)
        sides.append(f'<div><div class="pictures">{shown}</div><div class="tags">{words[title]}</div>{verdict}</div>')
    question = f'<div class="question" lang="{answer["language"]}">{escape(plain(answer["question"]))}</div>'
    return f'<div class="card swap">{question}<div class="sides">{"".join(sides)}</div></div>'


def rows_table(title: str, head: list[str], rows: list[list[str]], below: str = "") -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="card"><div class="scroll"><table><caption>{escape(title)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>{below}</div>"
    )


def document(title: str, main: str, style: str = "", language: str = "en") -> str:
    """A page that is one file. main: HTML, all its text escaped; style: CSS beside the common one."""
    return f"""<!doctype html>
<html lang="{language}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}{style}</style>
</head>
<body>
<main>
{main}</main>
</body>
</html>
"""


def page(folder: Path, language: str = "en") -> str:
    """The whole page, of the files of a finished run: report.json, val.json and the other splits, metrics, pictures."""
    report, words = read_json(folder / "report.json"), WORDS[language]
    answers = {split: scores["answers"] for split, scores in read_scores(folder).items()}
    model, parameters = Path(report["weights"]), report["parameters"]
    whole, memory = duration(report["wall_s"]), gigabytes(report["peak_gb"])
    other = next(each for each in LANGUAGES if each != language)

    tiles = [tile(percent(report["val"][each]), words["right"][each], True) for each in LANGUAGES]
    for split in list(answers)[1:]:
        tiles.append(tile(percent(report[split]["all"]), words["right"].get(split, split), True))
    tiles += [
        tile(percent(report["shuffled"]["all"]), words["right shuffled"]),
        tile(whole, words["whole"].format(memory=memory)),
    ]
    suffix = model.stem.removeprefix("sft_vlm")
    curves = [
        curve(read_metrics(folder / f"{stage}{suffix}.metrics.jsonl"), title, words)
        for stage, title in words["stages"].items()
    ]
    wrong = {split: [answer for answer in found if not answer["right"]] for split, found in answers.items()}
    gallery, errors = [], []
    for i, split in enumerate(answers):
        groups = ("kind", "language") if split == "val" else ("kind",)
        gallery += [(answer, split) for answer in choose(answers[split], 1, split, groups)]
        many = (WRONG - len(errors)) // (len(answers) - i)
        errors += [(answer, split) for answer in some(wrong[split], many, "wrong")]
    swaps = some([answer for answer in answers["val"] if answer["images"]], SWAPPED, "swapped")
    counts = {"n": sum(map(len, wrong.values())), "total": sum(map(len, answers.values()))}

    sizes = [[words["parts"].get(name, name), f"{count:,}"] for name, count in parameters.items()]
    sizes.append([words["in all"], f"{sum(parameters.values()):,}"])
    times = [[step["name"], duration(step["seconds"]), gigabytes(step["peak_gb"])] for step in report["steps"]]
    times.append([words["in all"], whole, memory])
    commands = "".join(f"<pre>$ {escape(typed(shlex.split(step['command'])))}</pre>" for step in report["steps"])
    commands = f"<details><summary>{words['commands']}</summary>{commands}</details>"
    size = f"{model.stat().st_size / 1e6:.1f} MB" if model.is_file() else words["gone"]
    prompts = report.get("prompts", {})
    following = ""
    for what, command in report["next"]:
        asked = [prompts[language] if part == prompts.get("en") else part for part in command]
        following += f"<h3>{escape(words['tries'].get(what, what))}</h3><pre>{escape(typed(asked))}</pre>"

    def cards(draw, found):
        return f'<div class="grid-3">{"".join(draw(*each) for each in found)}</div>'

    splits = "".join(kinds_table(folder, split, len(found), words) for split, found in answers.items())
    return document(
        words["title"],
        f"""<header>
<nav><a href="{PAGES[other]}" hreflang="{other}" lang="{other}">{words["other"]}</a></nav>
<h1>{words["title"]}</h1>
<p>{words["intro"].format(size=sum(parameters.values()) / 1e6, time=whole)}</p>
<div class="tiles">{"".join(tiles)}</div>
</header>

<h2>{words["look"]}</h2>
<p>{words["look about"]}</p>
<div class="grid-{2 if len(answers) == 2 else 3}">{splits}</div>

<h2>{words["learned"]}</h2>
<p>{words["loss"]} <span class="key">{words["training"]}</span>,
<span class="key second">{words["validation"]}</span></p>
<div class="grid-2">{"".join(curves)}</div>

<h2>{words["gallery"]}</h2>
<p>{words["gallery about"]}</p>
{cards(lambda *each: example(folder, *each, words), gallery)}

<h2>{words["wrong"]}</h2>
<p>{words["some wrong" if errors else "none wrong"].format(**counts)}</p>
{cards(lambda *each: example(folder, *each, words), errors)}

<h2>{words["swap"]}</h2>
<p>{words["swap about"]}</p>
{cards(lambda answer: swapped(folder, answer, words), [[answer] for answer in swaps])}

<h2>{words["sizes"]}</h2>
<p>{escape(words["where"].format(**report["machine"]))}</p>
<div class="grid-2">
{rows_table(words["time and memory"], [words["step"], words["time"], words["memory"]], times, commands)}
{rows_table(words["parameters of"].format(name=model.name, size=size), [words["part"], words["parameters"]], sizes)}
</div>

<h2>{words["next"]}</h2>
{following}
<footer>{words["footer"]}</footer>
""",
        language=language,
    )


def write_pages(folder: Path) -> list[Path]:
    """The page in each language, as files beside report.json."""
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
        raise SystemExit(f"error: --out_dir {folder}: no report.json there. To make one: python -m scripts.quickstart")
    written = write_pages(folder)
    print(table(folder))
    print(f"\nwritten: {' and '.join(map(str, written))}")


if __name__ == "__main__":
    main()
