import json
from random import Random

import pytest
from pycocoevalcap.cider.cider import Cider as CocoCider

from dataset import cider as cider_module
from dataset.cider import cider, most_typical, words
from dataset.lm_dataset import VLMDataset
from inference.scoring import (
    Prompts,
    ShuffledPictures,
    bleu,
    by_kind,
    compute_metrics,
    exact_match,
    language,
    questions_of,
    scores_table,
)
from model.model_vlm import MiniMindVLM
from tests.conftest import turn, write_rows


@pytest.fixture
def data(world, tokenizer, clip_folder):
    processor = MiniMindVLM.get_vision_model(clip_folder)[1]
    return VLMDataset(world / "rows.jsonl", world / "pictures", tokenizer, processor, 200, [34] * 16)


def test_words_are_lower_case_without_punctuation_and_chinese_by_character():
    assert words("The dog's ball, RED!") == ["the", "dog's", "ball", "red"]
    assert words("两只狗（dogs）在跑。") == ["两", "只", "狗", "dogs", "在", "跑"]
    assert language("这是 a dog") == "zh" and language("a dog") == "en"


def test_exact_match_ignores_case_and_punctuation_but_not_words():
    assert exact_match("it is red", ["It is red."])
    assert exact_match("是的", ["不是。", "是的。"])
    assert not exact_match("It is dark red.", ["It is red."])


def test_bleu_and_cider_prefer_the_right_captions_and_take_different_numbers_of_references():
    references = [["a dog runs on the grass", "a brown dog runs"], ["two men ride bikes in the city"]]
    right, swapped = ["a dog runs on the grass", "two men ride bikes in the city"], ["two men ride", "a dog runs"]
    assert bleu(right, references, zh=False) == pytest.approx(100)
    assert min(cider(right, references)) > 1 and cider(swapped, references) == [0, 0]
    chinese = [["一只狗在草地上奔跑。"], ["两个男人在骑自行车。"]]
    assert bleu(["一只狗在草地上奔跑。", "两个男人在骑自行车。"], chinese, zh=True) == pytest.approx(100)
    assert 0 < bleu(["一只狗在奔跑。", "两个女人在骑车。"], chinese, zh=True) < 60  # by character: parts of words count


@pytest.mark.parametrize("vocabulary", ["dogs run on the grass by a lake", "一 只 狗 在 草 地 上 跑"])
def test_cider_is_that_of_the_coco_evaluation(vocabulary):
    random, each = Random(0), vocabulary.split()
    texts = [[" ".join(random.choices(each, k=random.randint(1, 12))) for _ in range(n)] for n in (6, 2, 3, 5)]
    captions = [texts[0].pop(), texts[0].pop(), "", each[0]]
    given = (
        {i: [" ".join(words(text)) for text in group] for i, group in enumerate(each)}
        for each in (texts, zip(captions))
    )
    _, expected = CocoCider().compute_score(*given)
    assert cider(captions, texts) == pytest.approx(expected.tolist(), abs=1e-9) and max(expected) > 0.1


def test_typical_captions_are_those_that_agree_most_with_others_of_the_picture_in_their_language(monkeypatch):
    park = ["two dogs run in the park", "dogs run in the park", "what a day", "two dogs run", "a lovely place"]
    sea = ["a man by the sea", "an old friend", "a man stands by the sea"]
    chinese = ["一个男人站在海边", "好天气", "一个男人在海边"]
    captions = [("park", text) for text in park] + [("sea", text) for text in sea + chinese + ["!"]]
    captions += [
        ("one", "nobody knows"),
        ("one", "what it is"),
        ("two", "两只狗"),
        ("two", "两只小狗"),
        ("two", "下雨了"),
    ]
    chosen = [captions[number] for number in most_typical(captions)]
    assert chosen == [
        *(("park", text) for text in park[:2]),
        *(("sea", text) for text in (sea[0], sea[2], chinese[0], chinese[2])),
        ("one", "nobody knows"),
        ("one", "what it is"),
        ("two", "两只狗"),
        ("two", "两只小狗"),
    ]
    assert most_typical([("park", "dogs"), ("park", "一")]) == [0, 1]
    monkeypatch.setattr(cider_module, "TOGETHER", 2)  # pictures in parts
    again = [(f"again {picture}", text) for picture, text in captions]
    assert [(captions + again)[number] for number in most_typical(captions + again)][: len(chosen)] == chosen


def test_every_assistant_turn_is_a_question_with_all_turns_before_it(data, tokenizer):
    questions = questions_of(data, {})
    assert len(questions) == 6 + 2 * 6 + 1 + 1
    first, second = questions[1], questions[2]
    assert first.row == second.row and first.pictures == second.pictures == 1
    assert (second.text, second.references) == ("确定吗？", ["是的。"])
    prompt = tokenizer.decode(second.prompt)
    assert prompt.startswith(tokenizer.decode(first.prompt)) and "这是红色。<|im_end|>\n" in prompt
    assert prompt.endswith("<|im_start|>user\n确定吗？<|im_end|>\n<|im_start|>assistant\n")
    assert [question.pictures for question in questions[-2:]] == [2, 0]


def test_further_references_are_taken_in_the_language_of_the_answer(data):
    questions = questions_of(data, {"red.png": ["A red picture.", "红色的图片。"]})
    assert questions[0].references == ["It is red.", "A red picture."]
    assert questions[1].references == ["这是红色。"]  # a conversation, whose answers are no captions


def test_shuffled_pictures_are_always_others_and_as_many(data):
    shuffled = ShuffledPictures(data, seed=0)
    for row in range(len(data)):
        own, other = data[row]["pictures"], shuffled[row]["pictures"]
        if own is None:
            assert other is None
        elif len(own) == 1:
            assert own.shape == other.shape and not own.equal(other)


def test_shuffling_needs_two_different_pictures(world, tokenizer, clip_folder, tmp_path):
    row = {"conversations": [turn("user", "<image>"), turn("assistant", "Red.")], "image": "red.png"}
    processor = MiniMindVLM.get_vision_model(clip_folder)[1]
    path = write_rows(tmp_path / "rows.jsonl", [row, row])
    one = VLMDataset(path, world / "pictures", tokenizer, processor, 200, [34] * 16)
    with pytest.raises(ValueError, match="no two different pictures"):
        ShuffledPictures(one, seed=0)


def test_captions_get_bleu_and_cider_short_answers_do_not(data):
    questions = questions_of(data, {})
    english = [question for question in questions if question.language == "en"][:6]  # "It is red."
    scores = compute_metrics(english, ["It is red."] * 6)
    assert scores == {"exact_match": pytest.approx(1 / 6)}
    for question in english:
        question.references = [f"This is a picture that shows {question.references[0]}"]
    assert set(compute_metrics(english, ["a"] * 6)) == {"exact_match", "bleu", "cider"}


def test_results_are_json(data):
    assert json.loads(json.dumps(compute_metrics(questions_of(data, {})[:1], ["It is red."]))) == {"exact_match": 1.0}


# ---------------------------------------------------------------------------- by kind of question


def test_a_question_has_the_kind_of_its_row_and_the_length_of_its_answer(world, tokenizer, clip_folder, tmp_path):
    chat = [turn("user", "<image>\nWhich colour?"), turn("assistant", "Red."), turn("user", "Sure?")]
    rows = [
        {"conversations": [*chat, turn("assistant", "Yes, I am.")], "image": "red.png", "kind": "colour"},
        {"conversations": [turn("user", "Hello."), turn("assistant", "Hi.")], "kind": None},
    ]
    processor = MiniMindVLM.get_vision_model(clip_folder)[1]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    questions = questions_of(VLMDataset(path, world / "pictures", tokenizer, processor, 200, [34] * 16), {})
    assert [question.kind for question in questions] == ["colour", "colour", ""]
    assert questions[1].tokens == len(tokenizer("Yes, I am.")["input_ids"]) + 1  # <|im_end|>


def test_prompts_show_as_many_pictures_as_the_question_and_shuffled_ones_those_of_others(data):
    questions = questions_of(data, {})
    own, other = Prompts(questions, data), Prompts(questions, ShuffledPictures(data, seed=0))
    for i, question in enumerate(questions):
        assert own.images(i) == question.images
        assert len(other.images(i)) == question.pictures == len(own[i]["pictures"] if question.pictures else [])
        if question.pictures == 1:
            assert other.images(i) != own.images(i)
            assert other[i]["pictures"].equal(data.load_picture(other.questions[i].row, other.images(i)[0])[None])
            assert other[i]["ids"] == own[i]["ids"]


def test_the_turns_of_a_row_may_each_have_a_kind(world, tokenizer, clip_folder, tmp_path):
    chat = [turn("user", "How many?"), turn("assistant", "Two."), turn("user", "Which?"), turn("assistant", "All.")]
    write_rows(
        tmp_path / "rows.jsonl", [{"conversations": chat, "kind": kinds} for kinds in (["count", "what"], ["count"])]
    )
    data = VLMDataset(tmp_path / "rows.jsonl", None, tokenizer, None, image_ids=[])
    assert [question.kind for question in questions_of(data, {})] == ["count", "what", "count", ""]


def answer(kind, language, right, right_shuffled=False):
    return {"kind": kind, "language": language, "right": right, "right_shuffled": right_shuffled}


ANSWERS = [
    *(answer("what", "en", True), answer("what", "en", False), answer("what", "zh", True, True)),
    *(answer("count", "en", True, True), answer("count", "en", False), answer("count", "en", True)),
    answer("", "en", True),
]


def test_shares_by_kind_and_language_are_those_of_answers_made_by_hand():
    kinds = by_kind(ANSWERS)
    assert list(kinds) == ["count", "what"]  # a row that names no kind counts in none
    assert kinds["what"] == {
        "en": {"questions": 2, "true": 0.5, "shuffled": 0.0},
        "zh": {"questions": 1, "true": 1.0, "shuffled": 1.0},
    }
    assert kinds["count"] == {"en": {"questions": 3, "true": pytest.approx(2 / 3), "shuffled": pytest.approx(1 / 3)}}


def test_the_table_by_kind_fits_a_terminal_and_is_there_only_if_rows_name_kinds():
    figure = {"en": {"exact_match": 0.5}, "zh": {"exact_match": 1.0}}
    result = {"questions": {"en": 6, "zh": 1}, "true": figure, "shuffled": figure, "by_kind": by_kind(ANSWERS)}
    lines = scores_table(result).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[-3].split() == ["exact", "match", "questions", "en", "zh", *("shuffled", "en", "shuffled", "zh")]
    assert lines[-2].split() == ["count", "3", "66.7%", "-", "33.3%", "-"]
    assert lines[-1].split() == ["what", "3", "50.0%", "100.0%", "0.0%", "100.0%"]
    assert "questions" not in scores_table(result | {"by_kind": {}})
