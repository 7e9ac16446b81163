"""Pages in a browser as pictures: those that the quickstart and inspect_data write, and answers of trained models."""

import io
import json
import random
import re
from pathlib import Path
from tempfile import TemporaryDirectory

from scripts.make_figures.drawing import TINY, draws, example_scene

LOCALES = {"en": "en-US", "zh": "zh-CN"}
# What is asked in six scenes: kind, language, and whether the answer is right, as five of six or so are.
SIX = [
    ("describe", "en", True),
    ("colour", "zh", True),
    ("relation", "en", True),
    ("describe", "zh", True),
    ("count", "en", False),
    ("where", "zh", True),
]


def file_url(path: Path) -> str:
    from scripts.templates import data_url

    return data_url(path.read_bytes(), "jpeg")


@draws("six_scenes.png", trained=True, browser=True)
def six_scenes(say, quickstart: Path, shoot):
    """Six questions in two languages, with the answers of the quickstart's model; one of them is wrong."""
    from model.files import read_json
    from scripts.report import plain
    from scripts.templates import render

    answers = [answer for answer in read_json(quickstart / "val.json")["answers"] if len(answer["images"]) == 1]
    random.Random(1).shuffle(answers)
    scenes, used = [], set()
    for kind, language, right in SIX:
        wanted = {"kind": kind, "language": language, "right": right}
        # Texts of a line or two fit the card.
        chosen = next(
            answer
            for answer in answers
            if wanted.items() <= answer.items()
            and answer["images"][0] not in used
            and len(answer["answer"]) < (80 if language == "en" else 40)
        )
        used.add(chosen["images"][0])
        scenes.append(
            {
                "picture": file_url(quickstart / "data/images" / chosen["images"][0]),
                "question": plain(chosen["question"]),
                "answer": chosen["answer"],
                "reference": chosen["references"][0],
                **wanted,
            }
        )
    return shoot(
        html=render(
            "figures.html",
            language=say("en", "zh"),
            heading=say("Six scenes, and what the quickstart’s model answers", "六个场景，以及快速上手模型的回答"),
            expected=say("right would be: ", "正确答案："),
            scenes=scenes,
        )
    )


@draws("report_top.png", trained=True, browser=True)
def report_top(say, quickstart: Path, shoot):
    """The top of the quickstart's report."""
    page = quickstart / say("report.html", "report_zh.html")
    return shoot(page.resolve().as_uri(), width=860, height=930, scale=1.5)


@draws("chat_page.png", languages=("en",), trained=True, browser=True)
def chat_page(say, quickstart: Path, shoot):
    """The one-file page on two phones, in English, light, and in Chinese, dark, each asked about a sample picture."""
    from PIL import Image

    def ask(question: str, word: str):
        def act(page):
            page.wait_for_selector("#send:enabled")
            page.locator("#adjust").click()
            page.locator("#temperature").fill("0")
            page.locator("#adjust").click()
            page.locator("#offers .picture").nth(1).tap()
            page.locator("#waiting canvas").wait_for()
            page.locator("#text").fill(question)
            page.keyboard.press("Enter")
            page.locator(".turn .retry").wait_for()  # it has answered
            page.locator(".answer span").get_by_text(word, exact=True).tap()
            page.locator("figure canvas").wait_for()
            page.wait_for_timeout(400)  # where it was tapped is coloured for a while

        return act

    phone = {"width": 390, "height": 900, "scale": 1.5, "is_mobile": True, "has_touch": True}
    address = (quickstart / "chat.html").resolve().as_uri()
    shots = [
        shoot(address, act=ask(question, word), locale=LOCALES[language], color_scheme=scheme, **phone)
        for language, scheme, question, word in (
            ("en", "light", "Describe this picture.", "black"),
            ("zh", "dark", "描述这张图片。", "黑"),
        )
    ]
    width, height = shots[0].size
    both = Image.new("RGB", (2 * width, height))
    for i, shot in enumerate(shots):
        both.paste(shot, (i * width, 0))
    return both


@draws("tokens_loss.png", browser=True)
def tokens_loss(say, shoot):
    """The tokens of two rows, with those that carry loss underlined, on the page of scripts.inspect_data."""
    from contextlib import redirect_stdout

    from dataset.scene_pictures import draw
    from scripts import inspect_data

    conversations = [
        ["<image>\nWhat is in the top left?", "a white star", "What colour is the square?", "the square is black"],
        ["<image>\n左上角有什么？", "一个白色五角星"],
    ]
    heading = say("Which tokens carry loss", "哪些词元计算损失")
    legend = say(
        "Each box is a token. <mark class='box'>Underlined</mark> tokens carry loss: the model learns to predict them. "
        "It only reads the <span class='box'>others</span>. @×9 are the places of the picture’s 9 patches.",
        "每个方框是一个词元。<mark class='box'>带下划线</mark>的词元计算损失，模型要学会预测它们；"
        "<span class='box'>其余</span>词元只作为输入。@×9 是图片 9 个图块的位置。",
    )

    def act(page):
        page.evaluate(
            """([heading, legend]) => {
              const main = document.querySelector("main"), cards = [...main.querySelectorAll(".sample")];
              main.innerHTML = `<h3 style="font-size: 1.3rem; margin: 0 0 6px">${heading}</h3><p>${legend}</p>`;
              main.append(...cards);
              main.style.padding = "16px";
              main.querySelectorAll(".tags, figcaption").forEach((each) => each.remove());
            }""",
            [heading, legend],
        )

    with TemporaryDirectory() as folder:
        folder = Path(folder)
        draw(example_scene(), 224).save(folder / "scene.png")
        rows = [
            {
                "conversations": [
                    {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(conversation)
                ],
                "image": "scene.png",
            }
            for conversation in conversations
        ]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
        flags = {"--images_path": folder, "--html": folder / "page.html", "--tokenizer_path": TINY}
        flags["--vision_model_path"] = TINY / "clip"
        with redirect_stdout(io.StringIO()):
            command = [folder / "rows.jsonl", *(part for flag in flags.items() for part in flag)]
            inspect_data.main([str(part) for part in command])
        return shoot((folder / "page.html").as_uri(), act=act)


@draws("before_after.png", trained=True, browser=True)
def before_after(say, quickstart: Path, shoot):
    """What three models answer about toys and about scenes: the quickstart's, fine-tuned on toys alone, and on both.

    The other two are those of README's "your own pictures", in toys_only and toys_and_old beside the quickstart.
    """
    import eval_vlm
    from dataset.sources import read_rows
    from inference.generate import ask
    from inference.models import load_model
    from inference.scoring import exact_match
    from scripts.report import plain
    from scripts.templates import render

    folders = [quickstart, quickstart.parent / "toys_only", quickstart.parent / "toys_and_old"]
    toys = quickstart.parent / "toys"
    for folder in (toys, *folders):
        if not folder.is_dir():
            raise FileNotFoundError(f'no {folder}: run the commands of README.md\'s "your own pictures" first')
    groups = {
        say("toys: new", "玩具：新内容"): (toys, ("en", "zh", "en")),
        say("scenes: learned before", "图形：以前学过的"): (quickstart / "data", ("en", "zh")),
    }
    shown = {}
    for group, (data, languages) in groups.items():
        rows = [
            row for _, row in read_rows([data / "val.jsonl"]) if len(row.images) == 1 and len(row.conversations) == 2
        ]
        random.Random(5).shuffle(rows)
        shown[group] = []
        for language in languages:
            chinese = language == "zh"
            row = next(
                row
                for row in rows
                if bool(re.search("[\u3400-\u9fff]", row.conversations[0]["content"])) == chinese
                and len(row.conversations[1]["content"]) < 30
            )
            rows.remove(row)
            picture = data / "images" / row.images[0]
            question, answer = (turn["content"] for turn in row.conversations)
            entry = {"picture": file_url(picture), "path": picture, "asked": question, "question": plain(question)}
            shown[group].append(entry | {"language": language, "reference": answer, "answers": []})
    for folder in folders:
        args = eval_vlm.parse_args(["--out_dir", str(folder), "--greedy", "--device", "cpu", "--max_new_tokens", "60"])
        model, tokenizer, _ = load_model(args)
        for entry in (entry for entries in shown.values() for entry in entries):
            turns = [{"role": "user", "content": entry["asked"]}]
            answer = ask(model, tokenizer, turns, [model.processor.open(entry["path"])], args)
            right = exact_match(answer, [entry["reference"]])
            entry["answers"].append({"answer": answer, "right": right, "language": entry["language"]})
    models = [
        say("before", "微调前"),
        say("after new rows alone", "只用新数据微调"),
        say("after new and old rows", "新旧数据混合微调"),
    ]
    heading = say("Answers before and after a fine-tune on toys", "用玩具数据微调前后的回答")
    language = say("en", "zh")
    return shoot(
        html=render("figures.html", language=language, heading=heading, scenes=[], groups=shown, models=models)
    )
