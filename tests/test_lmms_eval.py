"""scripts/lmms_eval: the task's functions exist and take our rows. lmms-eval itself was run by hand (README.md)."""

import importlib.util
import json
import re

import pytest
from datasets import Dataset

from tests.test_flags import ROOT

FOLDER = ROOT / "scripts/lmms_eval"


@pytest.fixture
def utils(world):
    """As lmms-eval imports it: by its path, without this repository."""
    spec = importlib.util.spec_from_file_location("utils", FOLDER / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.IMAGES = world / "pictures"
    return module


def test_the_task_asks_the_first_question_of_rows_with_pictures(utils, world):
    task = (FOLDER / "minimind_rows.yaml").read_text(encoding="utf-8")
    named = re.findall(r"!function utils\.(\w+)", task)
    assert len(named) == 5 and all(callable(getattr(utils, name)) for name in named)

    rows = [json.loads(line) for line in (world / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    kept = utils.with_picture(Dataset.from_list(rows))
    assert len(kept) == len(rows) - 1
    assert utils.question(kept[0]) == "What colour is this?" and utils.answer(kept[0]) == "It is red."
    assert [picture.size for picture in utils.pictures(kept[-1])] == [(40, 36)] * 2
    assert utils.score(kept[0], [" It is red.\n"]) == {"exact_match": 1.0}
    assert utils.score(kept[0], ["It is blue."]) == {"exact_match": 0.0}
