"""The report of a quickstart, from files made by hand: what it says, and that it is one file that loads nothing."""

import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from scripts import report
from scripts.steps import read_records, write_json

EVIL = '<script>alert("&")</script>'


def answer(kind, language, number, right, right_shuffled=False, **changes):
    """An answer as in a scores file; question and answers tell each other apart by their number."""
    expected = ("green", "绿色")[language == "zh"]
    images = [f"{number % 3}.jpg"]
    found = {
        "kind": kind,
        "language": language,
        "images": images,
        "question": f"<image>\nquestion {number}?",
        "references": [f"{expected} {number}"],
        "answer": f"{expected} {number}" if right else f"wrong {number}",
        "right": right,
        "images_shuffled": [f"{(number + 1) % 3}.jpg"],
        "answer_shuffled": f"{expected} {number}" if right_shuffled else f"blind {number}",
        "right_shuffled": right_shuffled,
    }
    return found | changes


@pytest.fixture
def folder(tmp_path):
    """As a finished quickstart leaves it."""
    (tmp_path / "data/images").mkdir(parents=True)
    for number, colour in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"data/images/{number}.jpg")
    val = [answer("colour", "en", i, right=i < 3, right_shuffled=i == 0) for i in range(4)]
    val += [answer("colour", "zh", 10 + i, right=i < 1) for i in range(2)]
    val += [answer("compare", "en", 20, True, images=["0.jpg", "1.jpg"], images_shuffled=["1.jpg", "2.jpg"])]
    new = [answer("colour", "en", 30, False, question=EVIL, answer=EVIL, references=[EVIL])]
    weights, about = tmp_path / "sft_vlm_64.pth", {"device": "cpu"}
    weights.write_bytes(bytes(1_500_000))
    about |= {"weights": str(weights), "parameters": {"llm": 2_000_000, "projector": 1000, "encoder": 500_000}}
    for split, answers in (("val", val), ("val_new", new)):
        write_json(tmp_path / f"{split}.json", about | {"answers": answers})
    for stage in ("pretrain_vlm", "sft_vlm"):
        lines = [{"step": step, "loss": 4 - step / 100, "lr": 0.1} for step in range(20, 201, 20)]
        lines += [{"step": 200, "val_loss": 2.125}]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{stage}_64.metrics.jsonl").write_text(text)
    names = ["data", "stage 1"]
    records = [{"name": name, "command": ["python", f"{i}.py", EVIL], "status": "done"} for i, name in enumerate(names)]
    write_json(tmp_path / "steps.json", [record | {"seconds": 60.5, "peak_gb": 0.75} for record in records])
    commands = [("try this", ["python", "eval_vlm.py", "--prompt", EVIL])]
    result = report.summary(tmp_path, read_records(tmp_path), commands)
    write_json(tmp_path / "report.json", result | {"wall_s": 121.0})
    return tmp_path


class Page(HTMLParser):
    """Tags with attributes, and the text outside of style."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(html)
        assert self.open == []  # each that was opened is closed

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img", "path", "polyline", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style" and data.strip():
            self.text.append(data.strip())

    def find(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_shares_are_those_of_the_answers(folder):
    result = json.loads((folder / "report.json").read_text())
    assert result["val"] == {
        "en": 0.8,
        "zh": 0.5,
        "all": pytest.approx(5 / 7, abs=1e-4),
        "by_kind": {"colour": pytest.approx(4 / 6, abs=1e-4), "compare": 1.0},
    }
    assert result["shuffled"]["en"] == 0.2 and result["shuffled"]["zh"] == 0.0
    assert result["val_new"] == {"en": 0.0, "zh": None, "all": 0.0, "by_kind": {"colour": 0.0}}
    assert result["peak_gb"] == 0.75 and result["questions"] == {"val": 7, "val_new": 1}
    assert result["steps"][1]["name"] == "stage 1" and set(result["machine"]) >= {"cpu", "cores", "python", "torch"}


def test_the_table_fits_a_terminal(folder):
    lines = report.table(folder).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[3].split() == ["colour", "75%", "50%", "25%", "0%", "0%", "–", "0%", "–"]
    assert lines[4].split() == ["compare", "100%", "–", "0%", "–", "–", "–", "–", "–"]
    assert lines[5].split() == ["all", "80%", "50%", "20%", "0%", "0%", "–", "0%", "–"]


def test_the_page_is_one_file_that_loads_nothing(folder):
    html = report.page(folder)
    page = Page(html)
    assert not page.find("script") and not page.find("link") and "@import" not in html and "url(" not in html
    loads = [attributes[key] for _, attributes in page.tags for key in ("src", "href", "srcset") if key in attributes]
    assert loads and all(load.startswith("data:image/jpeg;base64,") for load in loads)
    assert page.find("html") == [{"lang": "en"}] and any("viewport" in found.values() for found in page.find("meta"))
    assert "prefers-color-scheme: dark" in html


def test_text_of_rows_and_answers_is_never_markup(folder):
    html = report.page(folder)
    assert "<script" not in html
    assert Page(html).text.count(EVIL) == 2 * 3  # question, answer and what is expected: by chance, and as wrong


def test_right_and_wrong_can_be_told_without_colour(folder):
    html = report.page(folder)
    assert re.search(r'class="answer right"><span role="img" aria-label="right">✓</span> <span lang="en">green ', html)
    wrong = r'class="answer wrong"><span role="img" aria-label="wrong">✗</span> <span lang="zh">wrong 11</span>'
    assert re.search(wrong + r'</span><div class="expected">expected: <span lang="zh">绿色 11</span>', html)
    page = Page(html)
    assert "3 of 8 answers are wrong; some of them:" in page.text
    assert all(image["alt"].startswith("drawn scene ") for image in page.find("img"))


def test_two_pictures_are_shown_with_their_question_and_another_one_beside(folder):
    html = report.page(folder)
    cards = html.split('class="card ')
    (compare,) = [card for card in cards if "question 20?" in card and card.startswith("example")]
    assert re.findall(r'alt="drawn scene (\d)\.jpg"', compare) == ["0", "1"]
    (swap,) = [card for card in cards if "question 20?" in card and card.startswith("swap")]
    assert re.findall(r'alt="drawn scene (\d)\.jpg"', swap) == ["0", "1", "1", "2"]
    assert swap.index("green 20") < swap.index("another picture") < swap.index("blind 20")


def test_both_curves_are_drawn_with_training_and_validation(folder):
    page = Page(report.page(folder))
    labels = [found["aria-label"] for found in page.find("svg")]
    assert labels == [
        f"Stage {stage}: loss against step, at the end training 2.000, validation 2.125"
        for stage in ("1: learn to see", "2: learn to answer")
    ]
    lines = [found["points"].split() for found in page.find("polyline") if found["class"] == "loss"]
    assert [len(points) for points in lines] == [10, 10]
    x, y = zip(*(map(float, point.split(",")) for point in lines[0]))
    assert list(x) == sorted(x) and list(y) == sorted(y)  # a loss that falls goes down, where y is larger


def test_a_run_without_metrics_has_no_curve_and_one_without_errors_says_so(folder):
    for path in folder.glob("*.metrics.jsonl"):
        path.unlink()
    for split in ("val", "val_new"):
        scores = json.loads((folder / f"{split}.json").read_text())
        scores["answers"] = [answer | {"right": True} for answer in scores["answers"]]
        write_json(folder / f"{split}.json", scores)
    page = Page(report.page(folder))
    assert not page.find("svg") and "0 of 8 answers are wrong." in page.text


def test_ticks_are_few_and_round():
    for most in (0.0123, 0.7, 1.0, 4.2, 9.99, 750, 30000):
        found = report.ticks(most)
        assert 3 <= len(found) <= 6 and found[0] == 0 and most * 0.6 < found[-1] <= most, (most, found)
    assert report.ticks(750) == [0, 200, 400, 600]


def test_examples_are_always_the_same_and_of_many_kinds():
    answers = [answer(kind, language, i, True) for i in range(20) for kind in "abc" for language in ("en", "zh")]
    chosen = report.choose(answers, 2, "seed")
    assert chosen == report.choose(answers, 2, "seed") != report.choose(answers, 2, "other")
    assert [(found["kind"], found["language"]) for found in chosen[::2]] == [
        (k, lang) for k in "abc" for lang in ("en", "zh")
    ]
    assert {found["kind"] for found in report.some(answers, 3, "seed")} == {"a", "b", "c"}
    assert len(report.some(answers[:4], 12, "seed")) == 4 and report.some([], 12, "seed") == []


def test_the_page_can_be_made_anew_from_the_files(folder, tmp_path, capsys):
    report.main(["--out_dir", str(folder)])
    assert (folder / "report.html").read_text(encoding="utf-8") == report.page(folder)
    assert "colour" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no report.json there. To make one: python -m scripts.quickstart"):
        report.main(["--out_dir", str(tmp_path / "nowhere")])
