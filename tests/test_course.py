"""The course: each block runs and prints what is written below it, and both languages run the same code.

`python -m pytest tests/test_course.py --update-examples` writes what the blocks print into the pages.
"""

import ast
import os
import re
from difflib import SequenceMatcher
from pathlib import Path

import jupytext
import pytest
from pytest_examples import EvalExample, find_examples

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("docs/course/[1-7]_*.md"))
LESSONS = [page for page in PAGES if not page.stem.endswith("_zh")]
QUICKSTART = os.environ.get("MINIMIND_QUICKSTART")


def stem(page: Path) -> str:
    return page.stem


def needs_quickstart(page: Path) -> bool:
    return any("out/quickstart" in example.source for example in find_examples(page))


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """The working folder: this repository as links, with an out/ of its own for what the blocks write."""
    for path in ROOT.iterdir():
        if path.name not in (".git", "out"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "out").mkdir()
    if QUICKSTART:
        (tmp_path / "out/quickstart").symlink_to(Path(QUICKSTART).resolve())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(source: str) -> str:
    """What stands below the prints of a block."""
    lines = re.findall(r'^ *#> (.*)|^ *"""\n((?s:.*?))^ *"""', source, re.MULTILINE)
    return "\n".join(line or lines for line, lines in lines)


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_every_block_prints_what_is_written_below_it(page, checkout, eval_example: EvalExample, capsys):
    quickstart = needs_quickstart(page)
    if quickstart and not QUICKSTART:
        pytest.skip("MINIMIND_QUICKSTART names no folder of a quickstart")
    eval_example.set_config(line_length=100, target_version="py310")
    # Training on another processor gives a slightly different model, which words some answers otherwise.
    roughly = quickstart or ".backward()" in page.read_text(encoding="utf-8")
    check = eval_example.run if roughly else eval_example.run_print_check
    run = eval_example.run_print_update if eval_example.update_examples else check
    names, expected = {}, ""
    for example in find_examples(page):
        failure = None
        try:
            names |= run(example, module_globals=names)
        except Exception as error:
            failure = f"{example}: {error!r}"
        if failure:  # not from the except clause: pytest itself fails on the traceback of a block with watched prints
            pytest.fail(failure, pytrace=False)
        expected += written(example.source) + "\n"
    if run == eval_example.run:
        printed = capsys.readouterr().out.split()
        assert SequenceMatcher(None, printed, expected.split(), autojunk=False).ratio() > 0.8


class WithoutWords(ast.NodeTransformer):
    """Code without its texts, which differ between the languages; in an f-string only the values remain, sorted."""

    def visit_Constant(self, node):
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node):
        values = [self.visit(value) for value in node.values if isinstance(value, ast.FormattedValue)]
        return ast.JoinedStr(sorted(values, key=ast.dump))

    def visit_Expr(self, node):  # output of several lines stands as a text below its print
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)


def skeletons(page: Path) -> list[str]:
    return [ast.unparse(WithoutWords().visit(ast.parse(example.source))) for example in find_examples(page)]


@pytest.mark.parametrize("page", LESSONS, ids=stem)
def test_both_languages_run_the_same_code(page):
    blocks, translated = skeletons(page), skeletons(page.with_stem(f"{page.stem}_zh"))
    assert translated == blocks and len(blocks) >= 3


@pytest.mark.parametrize("page", PAGES, ids=stem)
def test_a_lesson_has_three_exercises_with_answers_and_opens_as_a_notebook(page):
    text = page.read_text(encoding="utf-8")
    assert text.count("<details>") == text.count("</details>") == 3
    cells = [cell for cell in jupytext.read(page).cells if cell.cell_type == "code"]
    python = [cell.source for cell in cells if not cell.source.startswith("%%")]
    assert python == [example.source.rstrip("\n") for example in find_examples(page)]


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("docs/course/README*.md")], ids=stem)
def test_every_link_leads_to_a_file(page):
    text = re.sub(r"(?s)```.*?```", "", page.read_text(encoding="utf-8"))
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert [target for target in targets if target and not (page.parent / target).exists()] == []
