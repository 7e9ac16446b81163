"""What people expect of a project: forms, workflow, citation and pre-commit can be read and agree with the rest."""

import re
from pathlib import Path

import pytest
import yaml

from tests.test_commands import FLAG, TORCHRUN, commands_in, readme_text
from tests.test_flags import SCRIPTS, parsers  # noqa: F401 (a fixture)

ROOT = Path(__file__).parent.parent
FORMS = ROOT / ".github/ISSUE_TEMPLATE"


def read(path) -> dict:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize("form", ["bug.yml", "question.yml"])
def test_an_issue_form_asks_in_both_languages(form):
    fields = [field for field in read(FORMS / form)["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields) >= 3
    for field in fields:
        assert re.search(r"[A-Za-z].* · .*[\u4e00-\u9fff]", field["attributes"]["label"])
        assert isinstance(field["validations"]["required"], bool)


def test_the_workflow_calls_what_a_change_must_pass():
    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    assert ".ci/run" in [step.get("run") for step in job["steps"]] and (ROOT / ".ci/run").is_file()
    assert job["timeout-minutes"] == 60 and "python:3.11" in job["container"]["image"]


def test_pre_commit_formats_as_the_tests_do():
    (repo,) = read(".pre-commit-config.yaml")["repos"]
    pinned = re.search(r"^ruff==(\S+)", (ROOT / "requirements-dev.txt").read_text(), re.M)[1]
    assert repo["rev"] == f"v{pinned}" and [hook["id"] for hook in repo["hooks"]] == ["ruff-check", "ruff-format"]


def test_the_citation_names_the_project():
    citation = read("CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["license"] == "Apache-2.0" and citation["message"]
    assert citation["authors"] == [{"name": "MiniMind-V contributors"}]


@pytest.mark.parametrize("page", ["CHANGELOG.md", "CONTRIBUTING.md", "CONTRIBUTING_zh.md"])
def test_scripts_flags_and_files_in_a_page_exist(parsers, page):  # noqa: F811
    text = readme_text(page)
    for script, _ in commands_in(text):
        assert ROOT / script in SCRIPTS, script
    every = {flag for script in SCRIPTS for parser in parsers(script) for flag in parser._option_string_actions}
    text = re.sub(r"(pip install|ruff format) [^`]*", "", text)  # flags of others
    assert set(re.findall(FLAG, text)) <= every | TORCHRUN
    for name in re.findall(r"`((?:tests|docs|model|scripts|trainer|dataset)/[\w./]+)`", text):
        assert (ROOT / name).exists() or name == "tests/test_x.py", name


def test_the_changelog_has_the_newest_day_first():
    days = re.findall(r"^## .*(\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert days == sorted(set(days), reverse=True) and len(days) >= 7
