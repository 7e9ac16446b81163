"""Figures: those of both READMEs and of the results pages are those of the JSON files in docs/results."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs/results"
READMES = ["README.md", "README_zh.md"]
PAGES = sorted(path.name for path in RESULTS.glob("*.md"))
SPLITS = {"val": "shuffled", "val_wording": "shuffled_wording", "val_new": "shuffled_new"}
UNIT = r"%|[GM]B\b|minutes\b|min\b|s\b|h\b|times\b|分钟|分|秒|小时|倍|×"
VERSION = r"(?:Python|PyTorch|Transformers|Apache)[ -][\d.]+(?: (?:to|至|到) [\d.]+)?"


def read(path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def result(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def prose(text: str) -> str:
    """Without blocks of code, code in a line, HTML, and the targets of links."""
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    return re.sub(rf"`[^`\n]*`|<[^>]*>|\]\([^)]*\)|{VERSION}", " ", text)


def numbers(text: str) -> list[tuple[str, str]]:
    """(number, its unit or ""), with Chinese 59.5 万 as 595,000."""
    text = re.sub(r"(\d[\d.]*) ?万", lambda match: f"{float(match[1]) * 10_000:,.0f} ", prose(text))
    return re.findall(rf"(?<![\w.-])(\d[\d,]*\d(?:\.\d+)?|\d(?:\.\d+)?)(?![\d-]) ?({UNIT})?", text)


def measured(text: str) -> set[str]:
    """Shares and decimals."""
    return {number for number, unit in numbers(text) if unit == "%" or "." in number}


def rows(text: str, key: str) -> list[list[str]]:
    """The cells of each table row that names a key in backticks in its first cell."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.split("\n") if line[:1] == "|"]
    return [cells for cells in lines if re.search(rf"`{key}`", cells[0])]


def percent(share: float) -> str:
    return f"{share:.0%}"


def leaves(value) -> list[float]:
    if isinstance(value, dict | list):
        return [leaf for part in (value.values() if isinstance(value, dict) else value) for leaf in leaves(part)]
    return [value] if isinstance(value, int | float) else []


# ---------------------------------------------------------------------------- READMEs


@pytest.mark.parametrize("readme", READMES)
@pytest.mark.parametrize("split", SPLITS)
def test_the_score_table_is_that_of_the_json(readme, split):
    scores = result("quickstart.json")
    (cells,) = rows(read(readme), split)
    shares = [scores[split]["en"], scores[split]["zh"], scores[SPLITS[split]]["all"]]
    assert re.findall(r"[\d.]+%", " ".join(cells[1:])) == list(map(percent, shares))


@pytest.mark.parametrize("readme", READMES)
def test_time_and_memory_of_the_quickstart_are_those_of_the_json(readme):
    scores, text = result("quickstart.json"), prose(read(readme))
    minutes, seconds = divmod(round(scores["wall_s"]), 60)
    exactly = rf"{minutes} (?:min|分) ?{seconds} (?:s|秒)"
    roughly = rf"(?<!\d){round(scores['wall_s'] / 60)}(?: ?(?:to|至|到|~|–|-) ?\d+)? ?(?:min|分)"
    assert re.search(f"{exactly}|{roughly}", text)
    assert f"{scores['peak_gb']:.1f} GB" in text


def test_both_readmes_quote_the_same_figures():
    """Small numbers without a unit may be words in one language, and 100 万 is a million."""
    english, chinese = (
        {number for number, unit in numbers(read(readme)) if unit or len(number) > 1} for readme in READMES
    )
    assert english ^ chinese <= {"1,000,000"}


@pytest.mark.parametrize("readme", READMES)
def test_every_share_and_decimal_of_a_readme_is_in_the_results(readme):
    """Estimates, in italics, are none."""
    known = set().union(*(measured(path.read_text(encoding="utf-8")) for path in RESULTS.rglob("*.md")))
    for value in [leaf for path in RESULTS.glob("*.json") for leaf in leaves(result(path.name))]:
        known |= {f"{value:.1f}", percent(value)[:-1] if 0 <= value <= 1 else ""}
    assert measured(re.sub(r"(?<!\*)\*(?!\*)[^*\n]+\*", " ", read(readme))) - known == set()


# ---------------------------------------------------------------------------- results pages


@pytest.mark.parametrize("page", PAGES)
def test_a_page_begins_with_a_summary_of_at_most_ten_lines(page):
    title, _, rest = read(RESULTS / page).partition("\n\n")
    summary = rest.split("\n\n")[0].split("\n")
    assert title.startswith("# ") and "\n" not in title
    assert len(summary) <= 10 and all(line.startswith(("- ", "  ")) for line in summary)
    assert "**Repeat**" in rest.split("\n\n")[0]


@pytest.mark.parametrize("kind", result("quickstart.json")["val"]["by_kind"])
def test_the_kinds_of_the_quickstarts_page_are_those_of_the_json(kind):
    scores = result("quickstart.json")
    (cells,) = rows(read(RESULTS / "quickstart.md"), kind)
    shares = [scores[split]["by_kind"].get(kind) for split in (*SPLITS, "shuffled")]
    assert cells[1:] == ["–" if share is None else percent(share) for share in shares]


@pytest.mark.parametrize("name", [page[:-3] for page in PAGES if page.startswith("benchmark_")])
def test_a_benchmarks_summary_has_the_ratios_of_its_json(name):
    scores, (_, summary, *_) = result(f"{name}.json"), read(RESULTS / f"{name}.md").split("\n\n")
    for stage in ("pretrain", "sft"):
        for row in scores[stage][-2:]:  # with all improvements, then with cached features
            assert re.search(rf"(?<![\d.]){row['ratio']:.1f}(?![\d.])", summary), (stage, row["name"])


def test_links_between_results_lead_somewhere():
    for path in [*RESULTS.rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
