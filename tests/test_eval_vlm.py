import json
import subprocess
import sys

import pytest
import torch

import eval_vlm
from tests.conftest import turn, write_rows
from trainer import asking


def test_it_answers_about_one_picture_in_a_stream(trained, world, capsys):
    eval_vlm.main(
        [*trained, "--image", str(world / "pictures/blue.png"), "--prompt", "What colour is this?", "--greedy"]
    )
    printed = capsys.readouterr().out
    assert "[blue.png] What colour is this?" in printed and "It is blue." in printed


def test_it_answers_about_two_pictures_in_one_question(trained, world, capsys):
    pictures = [str(world / "pictures/red.png"), str(world / "pictures/blue.png")]
    prompt = "<image>\n<image>\nWhich colours are these?"
    eval_vlm.main([*trained, "--image", *pictures, "--prompt", prompt, "--greedy"])
    assert "They are red and blue." in capsys.readouterr().out


def test_without_image_it_asks_about_every_picture_of_a_folder_alone_or_together(trained, world, capsys):
    folder = ["--image_dir", str(world / "pictures"), "--greedy", "--max_new_tokens", "3"]
    eval_vlm.main([*trained, *folder])
    assert capsys.readouterr().out.count(".png] Describe this picture.") == 6
    eval_vlm.main([*trained, *folder, "--use_multi", "2", "--weights", "sft_vlm"])
    assert "[black.png, blue.png, green.png, red.png, white.png, yellow.png]" in capsys.readouterr().out


def test_sampling_follows_the_seed(trained, world, capsys):
    ask = [*trained, "--image", str(world / "pictures/red.png"), "--prompt", "Tell me.", "--temperature", "5"]
    ask += ["--top_p", "1", "--max_new_tokens", "12"]

    def answer(seed):
        eval_vlm.main([*ask, "--seed", str(seed)])
        return capsys.readouterr().out

    assert answer(1) == answer(1) != answer(2)


def test_it_scores_rows_and_shuffled_pictures_score_less(trained, world, tmp_path, capsys):
    output = tmp_path / "scores.json"
    rows = ["--data_path", str(world / "rows.jsonl"), "--images_path", str(world / "pictures")]
    result = eval_vlm.main([*trained, *rows, "--max_new_tokens", "16", "--output", str(output)])
    assert result["true"]["en"]["exact_match"] == result["true"]["zh"]["exact_match"] == 1
    assert result["shuffled"]["en"]["exact_match"] <= 0.5
    assert result["shuffled"]["en"]["loss"] > result["true"]["en"]["loss"] + 0.5
    saved = json.loads(output.read_text(encoding="utf-8"))
    assert saved["true"] == result["true"] and len(saved["answers"]) == sum(saved["questions"].values()) == 20
    assert set(saved["answers"][0]) == {
        *("kind", "language", "images", "question", "references"),
        *("answer", "right", "images_shuffled", "answer_shuffled", "right_shuffled"),
    }
    parameters = saved["parameters"]  # of CLIP the vision half: positions, patches, 2 layers and 2 norms at least
    assert parameters["projector"] == 32 * 64 + 64 and parameters["llm"] > 300 * 64 and parameters["encoder"] > 17000
    assert saved["device"] == "cpu"
    assert all(found["right"] for found in saved["answers"]) and saved["by_kind"] == {}  # the rows name no kind
    assert all(found["images"] != found["images_shuffled"] for found in saved["answers"] if len(found["images"]) == 1)
    assert "exact match" in capsys.readouterr().out


def test_it_scores_by_kind_of_question_and_without_the_loss(trained, world, tmp_path, capsys):
    lines = (world / "rows.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) | {"kind": "multi" if "确定" in line else "colour"} for line in lines[:4]]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    flags = ["--data_path", str(path), "--images_path", str(world / "pictures"), "--max_new_tokens", "16", "--no_loss"]
    result = eval_vlm.main([*trained, *flags, "--output", str(tmp_path / "scores.json")])
    assert result["by_kind"] == {
        "colour": {"en": {"questions": 2, "true": 1.0, "shuffled": 0.0}},
        "multi": {"zh": {"questions": 4, "true": 1.0, "shuffled": 0.5}},  # "Sure?" is "yes" about any picture
    }
    assert result["true"]["en"] == {"exact_match": 1.0}
    assert "colour" in capsys.readouterr().out


def test_batches_answer_as_single_questions_do(trained, world, tmp_path):
    rows = [
        "--data_path",
        str(world / "rows.jsonl"),
        "--images_path",
        str(world / "pictures"),
        "--max_new_tokens",
        "16",
    ]
    rows += ["--output", str(tmp_path / "scores.json")]
    alone = eval_vlm.main([*trained, *rows, "--batch_size", "1"])
    together = eval_vlm.main([*trained, *rows, "--batch_size", "20"])
    assert alone["answers"] == together["answers"]


def test_a_transformers_folder_answers_as_the_weights_do(trained, world, tokenizer, tmp_path, capsys):
    model, _, _ = asking.load(eval_vlm.parse_args(trained))
    model.save_pretrained(tmp_path / "folder")
    tokenizer.save_pretrained(tmp_path / "folder")
    ask = ["--image", str(world / "pictures/green.png"), "--prompt", "What colour is this?", "--greedy"]
    eval_vlm.main([*trained, *ask, "--load", "1", "--weights", str(tmp_path / "folder")])
    assert "It is green." in capsys.readouterr().out


def test_model_mode_names_the_weights(trained, world):
    with pytest.raises(FileNotFoundError, match=r"pretrain_vlm_64\.pth is not there .* holds sft_vlm_64\.pth"):
        eval_vlm.main([*trained, "--model_mode", "0", "--image", str(world / "pictures/red.png")])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "nowhere.jpg"], "--image nowhere.jpg: no such file"),
        (["--image_dir", "."], "no pictures in"),
        (["--image", "PICTURE", "--prompt", "<image> <image>?"], "--prompt has 2 <image>, but there are 1 pictures"),
        (["--data_path", "nowhere.jsonl"], "--data_path nowhere.jsonl: no such file"),
        (["--data_path", "ROWS", "--images_path", "PICTURES", "--refs_path", "nowhere.json"], "--refs_path nowhere"),
    ],
)
def test_mistakes_name_the_flag(trained, world, flags, message):
    here = {"PICTURE": world / "pictures/red.png", "ROWS": world / "rows.jsonl", "PICTURES": world / "pictures"}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        eval_vlm.main([*trained, *(str(here.get(flag, flag)) for flag in flags)])


def test_a_text_file_is_no_picture(trained, tmp_path):
    path = tmp_path / "note.jpg"
    path.write_text("no picture")
    with pytest.raises(ValueError, match=r"--image .*note\.jpg is not a picture"):
        eval_vlm.main([*trained, "--image", str(path)])


def test_asking_and_scoring_exclude_each_other(capsys):
    with pytest.raises(SystemExit):
        eval_vlm.parse_args(["--image", "a.jpg", "--data_path", "rows.jsonl"])
    assert "give either" in capsys.readouterr().err


def test_a_question_asks_with_the_tokens_of_training(trained, world, tokenizer):
    seen = []
    model, _, _ = asking.load(eval_vlm.parse_args(trained))
    model.generate = lambda input_ids, **kwargs: seen.append(input_ids) or torch.cat([input_ids, input_ids[:, :1]], 1)
    args = eval_vlm.parse_args([*trained, "--greedy"])
    image = asking.open_image(world / "pictures/red.png")
    asking.ask(model, tokenizer, [turn("user", "What?\n<image>")], [image], args)
    assert tokenizer.decode(seen[0][0]) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nWhat?\n"
        + "@" * 16
        + "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_help_and_a_mistyped_flag_do_not_wait_for_pytorch():
    code = "import sys, eval_vlm; eval_vlm.parse_args(['--greedy']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
