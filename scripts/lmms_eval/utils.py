"""The functions of minimind_rows.yaml. lmms-eval imports this file by its path, so it must not import our code."""

from pathlib import Path

from PIL import Image

IMAGES = Path("out/quickstart/data/images")


def with_picture(rows):
    return rows.filter(lambda row: bool(row["image"]))  # lmms-eval's llava_hf cannot ask without one


def pictures(row: dict) -> list[Image.Image]:
    return [Image.open(IMAGES / name.strip()).convert("RGB") for name in row["image"].split(",")]


def question(row: dict) -> str:
    return row["conversations"][0]["content"].replace("<image>", "").strip()  # lmms-eval puts pictures before it


def answer(row: dict) -> str:
    return row["conversations"][1]["content"]


def score(row: dict, answers: list[str]) -> dict:
    return {"exact_match": float(answers[0].strip() == answer(row).strip())}
