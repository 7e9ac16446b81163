"""The report of a quickstart, from files made by hand: what it says, and that it is one file that loads nothing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from common.files import write_json
from dataset.scenes import KINDS
from model.processing import language as language_of
from scripts import report
from scripts.quickstart import __main__ as quickstart
from scripts.quickstart.report_words import WORDS
from scripts.quickstart.steps import read_records

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
    write_json(tmp_path / "sft_vlm_64.json", {"prompts": {"en": ["Asked?", "Or?"], "zh": ["问？"]}})
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
    commands += [("ask about a picture", ["python", "eval_vlm.py", "--prompt", "Asked?"])]
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


@pytest.fixture
def with_wordings(folder):
    """The same with a third split."""
    scores = json.loads((folder / "val.json").read_text())
    scores["answers"] = [answer("colour", "zh", 40 + i, right=i < 1, question="怎么问？") for i in range(4)]
    write_json(folder / "val_wording.json", scores)
    earlier = json.loads((folder / "report.json").read_text())
    result = report.summary(folder, read_records(folder), earlier["next"])
    write_json(folder / "report.json", result | {"wall_s": 121.0})
    return folder


def test_the_table_fits_a_terminal(folder):
    lines = report.table(folder).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["right", "answers", "val", "val_new"]
    assert lines[1].split() == ["new", "scenes", "new", "combinations"]
    assert lines[4].split() == ["colour", "75%", "50%", "25%", "0%", "0%", "–", "0%", "–"]
    assert lines[5].split() == ["compare", "100%", "–", "0%", "–", "–", "–", "–", "–"]
    assert lines[6].split() == ["all", "80%", "50%", "20%", "0%", "0%", "–", "0%", "–"]


def test_a_third_split_is_in_the_table_the_examples_the_figures_and_the_page(with_wordings):
    lines = report.table(with_wordings).splitlines()
    assert max(map(len, lines)) <= 80 and lines[0].split()[2:] == ["val", "val_wording", "val_new"]
    assert lines[4].split()[1:] == ["75%", "50%", "25%", "0%", "–", "25%", "–", "0%", "0%", "–", "0%", "–"]
    assert re.search(r"true {2,}shuffled {2,}true", lines[2]) and lines[3].split() == ["en", "zh"] * 6
    assert "怎么问？" in report.examples(with_wordings)
    result = json.loads((with_wordings / "report.json").read_text())
    assert result["val_wording"]["all"] == 0.25 and result["shuffled_wording"]["zh"] == 0.0
    assert result["questions"] == {"val": 7, "val_wording": 4, "val_new": 1}
    for language, caption, tile in (
        ("en", "val_wording: new wordings", "right in new wordings"),
        ("zh", "val_wording: 新的问法", "新问法正确率"),
    ):
        text = Page(report.page(with_wordings, language)).text
        assert caption in text and text[text.index(tile) - 1] == "25%" and "怎么问？" in text


def test_long_examples_are_broken_into_lines_of_a_terminal(folder):
    scores = json.loads((folder / "val.json").read_text())
    long = {"question": "<image>\nWhy?\n" * 20, "answer": "since " * 30, "references": ["because " * 30]}
    write_json(folder / "val.json", scores | {"answers": [answer | long for answer in scores["answers"]]})
    assert 70 < max(map(len, report.examples(folder).splitlines())) <= 80


def test_a_split_of_a_name_of_its_own_is_shown_by_that(with_wordings):
    (with_wordings / "val_wording.json").rename(with_wordings / "val_mine.json")
    assert report.table(with_wordings).splitlines()[0].split()[2:] == ["val", "val_new", "val_mine"]


@pytest.mark.parametrize(("language", "other"), [("en", "zh"), ("zh", "en")])
def test_the_page_is_one_file_that_loads_nothing_and_leads_to_the_other_language(folder, language, other):
    html = report.page(folder, language)
    page = Page(html)
    assert not page.find("script") and not page.find("link") and "@import" not in html and "url(" not in html
    assert [link["href"] for link in page.find("a")] == [report.PAGES[other]]
    loads = [
        attributes[key]
        for name, attributes in page.tags
        for key in ("src", "href", "srcset")
        if key in attributes and name != "a"
    ]
    assert loads and all(load.startswith("data:image/jpeg;base64,") for load in loads)
    assert page.find("html") == [{"lang": language}] and any(
        "viewport" in found.values() for found in page.find("meta")
    )
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_page_leads_to_the_model_in_a_page_of_its_own_where_that_is_there(folder, language):
    (folder / "chat.html").write_bytes(b"x" * 3_300_000)
    page = Page(report.page(folder, language))
    assert page.find("a")[1] == {"href": "chat.html"}
    assert "chat.html" in page.text and "3.3 MB" in "".join(page.text)


def test_both_languages_say_the_same_things():
    english, chinese = WORDS["en"], WORDS["zh"]

    def gaps(text):
        return sorted(re.findall(r"{(\w+)", text))

    assert english.keys() == chinese.keys()
    for key, text in english.items():
        if isinstance(text, str):
            assert gaps(text) == gaps(chinese[key]), key
            assert key in ("other", "title", "memory") or language_of(chinese[key]) == "zh", key
            assert key == "other" or language_of(text) == "en", key
        elif text:
            assert text.keys() == chinese[key].keys(), key
    assert chinese["kinds"].keys() >= {*KINDS} - {"multi", "each"}
    for flags in ([], ["--from_zero"], ["--from_zero", "--use_moe"]):
        args = quickstart.parse_args(flags)
        for what, _ in quickstart.next_commands(args.out_dir, Path("out/sft_vlm_8.pth"), args):
            assert what in chinese["tries"], f"report_words.py has no Chinese for {what!r}"


def test_the_chinese_page_speaks_chinese_but_for_names_and_commands(folder):
    page = Page(report.page(folder, "zh"))
    for text in ("它真的在看图吗？", "颜色", "比较", "同一个问题，换一张图片", "语言模型", "就一张图片提问"):
        assert text in page.text
    for text in ("Does it look?", "colour", "wrong", "total", "training", "ask about a picture"):
        assert text not in page.text
    assert "8 个回答中有 3 个答错，下面是其中一部分：" in page.text
    labels = [found["aria-label"] for found in page.find("svg")]
    assert labels == [
        f"{stage}：损失随步数的变化，最后训练 2.000, 验证 2.125" for stage in ("阶段一：学习看图", "阶段二：学习回答")
    ]
    assert all(image["alt"].startswith("绘制的场景 ") for image in page.find("img"))


def test_what_to_try_next_asks_in_the_language_of_the_page(folder):
    result = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert result["prompts"] == {"en": "Asked?", "zh": "问？"}
    assert "eval_vlm.py --prompt &#39;Asked?&#39;" in report.page(folder)
    chinese = report.page(folder, "zh")
    assert "--prompt &#39;问？&#39;" in chinese and "Asked?" not in chinese
    (folder / "sft_vlm_64.json").unlink()
    assert report.first_prompts(folder / "sft_vlm_64.pth") == {"en": "What is in the picture?", "zh": "图片里有什么？"}
    del result["prompts"]  # of an earlier version
    write_json(folder / "report.json", result)
    assert "Asked?" in report.page(folder, "zh")


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


def test_an_answer_about_another_picture_is_neither_right_nor_wrong(folder):
    cards = [card for card in report.page(folder).split('class="card ') if card.startswith("swap")]
    assert len(cards) == 6
    for card in cards:
        own, other = card.split("another picture")
        assert re.search(r'class="answer (right|wrong)"', own) and "neutral" not in own
        assert 'class="answer neutral"><span lang=' in other and not re.search(r"answer (right|wrong)|[✓✗]", other)


def test_both_curves_are_drawn_with_training_and_validation(folder):
    page = Page(report.page(folder))
    labels = [found["aria-label"] for found in page.find("svg")]
    assert labels == [
        f"Stage {stage}: loss by step, at the end training 2.000, validation 2.125"
        for stage in ("1: learn to see", "2: learn to answer")
    ]
    drawn = [path for path in page.find("path") if "stroke: var(--accent)" in path["style"]]
    lines = [re.findall(r"[ML] (\S+) (\S+)", path["d"]) for path in drawn]
    assert [len(points) for points in lines] == [10, 10]
    x, y = zip(*(map(float, point) for point in lines[0]))
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
        svg = report.curve([{"step": step, "loss": most * step / 750} for step in range(50, 751, 50)], "")
        steps, losses = (
            [float(text) for text in re.findall(r">([\d.]+)</text>", axis)] for axis in svg.split('"matplotlib.axis_2"')
        )
        assert steps == [0, 200, 400, 600]
        assert 3 <= len(losses) <= 6 and losses[0] == 0 and most * 0.6 < losses[-1] <= most * 1.05, (most, losses)


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
    for language, name in (("en", "report.html"), ("zh", "report_zh.html")):
        assert (folder / name).read_text(encoding="utf-8") == report.page(folder, language)
    assert "colour" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no report.json. To create one: python -m scripts.quickstart"):
        report.main(["--out_dir", str(tmp_path / "nowhere")])
