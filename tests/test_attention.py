import re

import numpy as np
import pytest
import torch
from PIL import Image

import eval_vlm
from inference.attention import as_seen, attention_to_pictures, spotlight, words_of
from model.attention import Attention
from model.processing import ImageProcessor
from tests.conftest import lively


@pytest.mark.parametrize("config", [{}, {"use_moe": True}, {"num_attention_heads": 4, "num_key_value_heads": 4}])
def test_it_is_the_attention_that_the_model_pays_read_off_its_own_softmax(make_vlm, monkeypatch, config):
    model = lively(make_vlm(**config))
    P = len(model.config.image_ids)
    ids = torch.tensor([[5, *model.config.image_ids, 6, *model.config.image_ids, 7, 8, 9, 10]])
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    start = ids.shape[1] - 3  # the answer is 8 9 10
    found = attention_to_pictures(model, ids, start, pixels)

    for layer in model.model.layers:
        layer.self_attn.flash_attn = False
    seen, inside, softmax, forward = [], [], torch.Tensor.softmax, Attention.forward

    def watched(self, *args, **kwargs):
        out = softmax(self, *args, **kwargs)
        if inside:
            seen.append(out)
        return out

    def entered(self, *args, **kwargs):
        inside.append(self)
        out = forward(self, *args, **kwargs)
        inside.clear()
        return out

    monkeypatch.setattr(torch.Tensor, "softmax", watched)
    monkeypatch.setattr(Attention, "forward", entered)
    with torch.no_grad():
        model(ids, pixel_values=pixels)
    assert len(seen) == 2  # layers
    weights = torch.stack(seen).mean(dim=(0, 1, 2))  # (T, T)
    for token in range(3):
        position = start + token - 1  # where it was chosen
        first, second = weights[position, 1 : 1 + P], weights[position, 2 + P : 2 + 2 * P]
        assert torch.allclose(found[token], torch.stack([first, second]), atol=1e-6)
    assert found.std() > 1e-3


def test_words_are_whole_and_know_their_tokens(tokenizer):
    def words(text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        found = words_of(tokenizer, ids)
        places = [place for _, own in found for place in own]
        assert places == list(range(len(places))) and len(places) >= len(ids) - 1  # each token once, in order
        for word, own in found:
            assert tokenizer.decode([ids[place] for place in own], skip_special_tokens=True).strip() == word
        return [word for word, _ in found]

    assert words("It is extraordinarily red.") == ["It", "is", "extraordinarily", "red."]
    assert words("一匹 马，dog 跑!") == ["一", "匹", "马，", "dog", "跑!"]  # bytes of rare characters, joined
    assert words("") == []


def test_it_shows_the_part_of_a_picture_that_the_model_sees():
    picture = Image.new("RGB", (96, 32), "red")
    picture.paste("blue", (32, 0, 64, 32))  # a square in the middle: all that is left by the crop
    seen = as_seen(picture, ImageProcessor(32, (32, 32)))
    assert seen.shape == (224, 224, 3) and (seen[:, 10:-10] == (0, 0, 255)).all()
    squashed = as_seen(picture, ImageProcessor((16, 16), (16, 16)))
    assert squashed.shape == (224, 224, 3) and tuple(squashed[100, 10]) == (255, 0, 0)


def test_the_light_falls_on_the_patch_that_is_hot():
    picture = np.full((60, 60, 3), (200, 0, 0), dtype=np.uint8)
    heat = torch.zeros(3, 3)
    heat[0, 2] = 1  # first row, last column
    lit = spotlight(picture, heat)
    assert torch.allclose(lit[5, 55], torch.tensor([200 / 255, 0, 0]), atol=0.05)
    assert lit[55, 5].max() < 0.15 and lit.min() >= 0 and lit.max() <= 1
    assert len(lit[55, 5].unique()) == 1  # grey


def test_a_figure_has_the_words_of_the_answer_for_each_question(trained, world, tmp_path, capsys):
    questions = tmp_path / "questions.txt"
    questions.write_text("What colour is this?\n这是什么颜色？\n", encoding="utf-8")
    ask = [*trained, "--prompts_path", str(questions), "--greedy", "--max_new_tokens", "30"]
    blue = str(world / "pictures/blue.png")
    eval_vlm.main([*ask, "--image", blue, "--show_attention", str(tmp_path / "looked.svg")])
    assert "attention for each word: " in capsys.readouterr().out

    def texts(path):
        return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text(encoding="utf-8"))

    english = texts(tmp_path / "looked.svg")
    assert english[0] == "It" and english[1].endswith("%") and english[2::2][:2] == ["is", "blue."]
    chinese = [word for word in texts(tmp_path / "looked_2.svg") if "%" not in word]
    assert "".join(chinese[:-1]) == "这是蓝色。" and len(chinese) > 3 and chinese[-1] == "这是什么颜色？"
    eval_vlm.main([*ask, "--image", blue, blue, "--json", "--show_attention", str(tmp_path / "looked.png")])
    assert len(capsys.readouterr().out.splitlines()) == 2  # JSON and nothing else
    with Image.open(tmp_path / "looked.png") as figure:
        assert figure.format == "PNG" and figure.width > 500
    eval_vlm.main([*ask, "--image", blue, "--show_attention", str(tmp_path / "new/bare")])
    assert f"attention for each word: {tmp_path / 'new/bare_2.png'}\n" in capsys.readouterr().out
    assert (tmp_path / "new/bare.png").is_file() and (tmp_path / "new/bare_2.png").is_file()
    with pytest.raises(ValueError, match=r"--show_attention .*looked.xyz cannot be written: .*png"):
        eval_vlm.main([*ask, "--image", blue, "--show_attention", str(tmp_path / "looked.xyz")])
