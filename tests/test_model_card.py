"""scripts/convert_vlm/card.py: what the hub reads of an exported folder, and where each figure of it comes from."""

import json
import os
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from scripts.convert_vlm.card import base_models, data_of, scores_of
from scripts.download.tasks import MODELS
from tests.test_convert_vlm import convert, save  # noqa: F401 (fixtures)

TRUE = {"en": {"exact_match": 0.910714, "loss": 0.25}, "zh": {"exact_match": 0.5}}
SHUFFLED = {"en": {"exact_match": 0.2, "loss": 1.5}, "zh": {"exact_match": 0.125}}
CAPTIONS = {"en": {"exact_match": 0.0, "bleu": 8.7, "cider": 0.2311}}


def write_scores(weights: Path, name: str, data: str, true=TRUE, shuffled=SHUFFLED, more="", later=1) -> Path:
    """What eval_vlm.py leaves next to weights, so many seconds after them."""
    path = weights.with_name(name)
    command = f"eval_vlm.py --data_path {data} --images_path images{more}"
    counts = dict.fromkeys(true, 1200)
    parts = {"weights": f"elsewhere/{weights.name}", "command": command, "questions": counts}
    path.write_text(json.dumps(parts | {"true": true, "shuffled": shuffled, "answers": []}))
    time = weights.stat().st_mtime + later
    os.utime(path, (time, time))
    return path


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def test_the_hub_reads_what_is_known(save, convert):  # noqa: F811
    weights = save()
    path = weights.with_suffix(".json")
    known = {"prompts": {"zh": ["有几个？"], "en": ["How many?"], "zh several": ["？"]}, "pictures_first": True}
    known["data"] = ["hf://datasets/owner/name/*.parquet", "/home/me/rows.jsonl"]
    path.write_text(json.dumps(json.loads(path.read_text()) | known), encoding="utf-8")
    made = convert("llava", weights)
    data = card_of(made).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("apache-2.0", "transformers", "image-text-to-text")
    assert data.language == ["en", "zh"] and data.datasets == ["owner/name"] and data.tags == ["minimind-v"]
    assert data.base_model is None and data.eval_results is None  # nothing is known of either
    (example,) = data.to_dict()["widget"]
    assert example["text"] == "How many?" and Image.open(made / example["src"]).size == (40, 36)


def test_scores_next_to_the_weights_are_in_the_card(save, convert):  # noqa: F811
    weights = save()
    write_scores(weights, "val.json", "out/data/val.jsonl")
    write_scores(weights, "val_new.json", "/home/me/data/val_new.jsonl", CAPTIONS, CAPTIONS)
    made = convert("llava", weights)
    card = card_of(made)
    values = {(each.dataset_name, each.metric_type): each.metric_value for each in card.data.eval_results}
    assert values == {
        ("val.jsonl, English, 1,200 questions", "exact_match"): 0.9107,
        ("val.jsonl, English, 1,200 questions", "exact_match_shuffled"): 0.2,
        ("val.jsonl, English, 1,200 questions", "loss"): 0.25,
        ("val.jsonl, English, 1,200 questions", "loss_shuffled"): 1.5,
        ("val.jsonl, Chinese, 1,200 questions", "exact_match"): 0.5,
        ("val.jsonl, Chinese, 1,200 questions", "exact_match_shuffled"): 0.125,
        ("val_new.jsonl, English, 1,200 questions", "bleu"): 8.7,  # captions: nobody expects an exact match
        ("val_new.jsonl, English, 1,200 questions", "bleu_shuffled"): 8.7,
        ("val_new.jsonl, English, 1,200 questions", "cider"): 0.2311,
        ("val_new.jsonl, English, 1,200 questions", "cider_shuffled"): 0.2311,
    }
    assert card.data.model_name == made.name
    assert "| `out/data/val.jsonl` | English | 1,200 | Exact match | 91.1% | 20.0% |" in card.text
    assert "| `val_new.jsonl` | English | 1,200 | CIDEr | 0.231 | 0.231 |" in card.text  # without my folders


def test_scores_go_along_from_folder_to_folder_but_not_to_a_language_model(save, convert):  # noqa: F811
    weights = save()
    write_scores(weights, "val.json", "val.jsonl")
    back = convert("pth", convert("llava", weights))
    again = convert("transformers", back / weights.name, name="again")
    assert [each.metric_value for each in card_of(again).data.eval_results][:2] == [0.9107, 0.2]
    alone = convert("llm", weights)
    assert card_of(alone).data.eval_results is None and "scores" not in json.loads(
        (alone / "minimind.json").read_text()
    )
    assert card_of(alone).data.to_dict()["widget"] == [{"messages": [{"role": "user", "content": "Who are you?"}]}]
    assert card_of(alone).data.pipeline_tag == "text-generation" and not list(alone.glob("*.png"))


@pytest.mark.parametrize(
    "options, kept",
    [
        ({}, True),
        ({"later": -1}, False),  # the weights were trained on since
        ({"more": " --int8"}, False),  # other weights than those of the folder
        ({"data": ""}, False),
    ],
    ids=str,
)
def test_scores_that_are_not_about_these_weights_stay_out(tmp_path, capsys, options, kept):
    weights = tmp_path / "sft_vlm_64.pth"
    weights.touch()
    write_scores(weights, "val.json", **{"data": "val.jsonl"} | options)
    (tmp_path / "steps.json").write_text("[1, 2]")
    (tmp_path / "broken.json").write_text("{")
    assert bool(scores_of(weights, [])) == kept
    assert ("val.json is older than the weights" in capsys.readouterr().out) == (options == {"later": -1})


def test_of_two_scores_about_the_same_rows_the_newer_one_counts(tmp_path):
    weights = tmp_path / "sft_vlm_64.pth"
    weights.touch()
    write_scores(weights, "a.json", "val.jsonl", later=2)
    write_scores(weights, "b.json", "val.jsonl", true=SHUFFLED, later=1)
    write_scores(weights, "c.json", "new.jsonl", later=3)
    old = [{"data": ["val.jsonl"], "questions": {}, "true": {}, "shuffled": {}}]
    scores = {tuple(each["data"]): each["true"] for each in scores_of(weights, old)}
    assert scores == {("val.jsonl",): TRUE, ("new.jsonl",): TRUE}
    other = tmp_path / "sft_vlm_128.pth"
    other.touch()
    assert scores_of(other, []) == []


def test_the_data_of_a_command():
    assert data_of("eval_vlm.py --data_path 'a b.jsonl' c.jsonl --images_path i") == ["a b.jsonl", "c.jsonl"]
    assert data_of("eval_vlm.py --images_path i --data_path c.jsonl") == ["c.jsonl"]
    assert data_of("eval_vlm.py") == []


def test_the_base_model_is_named_where_it_is_known(make_vlm):
    model, public = make_vlm(), MODELS["26m"]
    known = {"tokenizer_sha256": "d98595c6aef70d95f72748582fb9b4f53d76dd58c1ae1dd702ad7c84e1caf5e4"}
    clip = "model/vision_model/clip-vit-base-patch16"
    assert base_models(model, **known, encoder_path=clip, known={}) == []  # as wide as neither
    model.config.hidden_size, model.config.ve_hidden_size = public.hidden, 768
    names = [public.weights, "openai/clip-vit-base-patch16"]
    assert base_models(model, **known, encoder_path=clip, known={"command": None}) == names
    assert base_models(model, **known, encoder_path="out/clip", known={"command": "train_sft_vlm.py"}) == []
    assert base_models(model, "other", encoder_path=None, known={"base_model": ["me/mine"]}) == ["me/mine"]
