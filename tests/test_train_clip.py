"""scripts/train_clip: it learns to tell pictures apart, and what it saves is an ordinary CLIP folder."""

import argparse
import json
import math
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import CLIPConfig, CLIPModel

from common.cli import run_main
from dataset.pictures import Folder
from model.model_vlm import MiniMindVLM
from model.processing import ImageProcessor, load_tokenizer
from scripts import train_tokenizer
from scripts.train_clip import __main__ as train_clip
from scripts.train_clip.captions import (
    END_OF_CAPTION,
    CaptionPictures,
    draw_captions,
    drop_tokens,
    encode_captions,
    load_split,
    read_captions,
)
from scripts.train_clip.towers import embed_patches
from trainer import optimizer
from trainer.augment import augment

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (230, 220, 30)}
SAYINGS = ("The {1} half is {0}.", "On the {1} there is {0}.", "{0}, {1}")
SMALL = ["--image_size", "32", "--hidden_size", "64", "--num_hidden_layers", "2", "--text_hidden_size", "64"]
SMALL += ["--text_num_hidden_layers", "1", "--projection_dim", "32", "--max_text_len", "24", "--device", "cpu"]


def write_rows(path, captions):
    rows = []
    for name, caption in captions:
        turns = [{"role": "user", "content": "What is it?\n<image>"}, {"role": "assistant", "content": caption}]
        rows.append(json.dumps({"image": name, "conversations": turns}))
    path.write_text("\n".join(rows), encoding="utf-8")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """8 pictures: 4 colours, on the left or on the right; three captions each, one of which to be found by."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "images").mkdir()
    train, val = [], []
    for colour, rgb in COLOURS.items():
        for side, at in (("left", 0), ("right", 20)):
            image = Image.new("RGB", (40, 40))
            image.paste(rgb, (at, 0, at + 20, 40))
            name = f"{colour}_{side}.png"
            image.save(folder / "images" / name)
            train += [(name, saying.format(colour, side)) for saying in SAYINGS]
            val.append((name, SAYINGS[0].format(colour, side)))
    write_rows(folder / "train.jsonl", train)
    write_rows(folder / "val.jsonl", val)
    data = ["--data_path", str(folder / "train.jsonl")]
    train_tokenizer.main([*data, "--out_dir", str(folder / "tokenizer"), "--vocab_size", "320"])
    return folder


def flags(world, out_dir, *more):
    paths = {
        "data_path": "train.jsonl",
        "val_path": "val.jsonl",
        "images_path": "images",
        "tokenizer_path": "tokenizer",
    }
    given = [part for flag, name in paths.items() for part in (f"--{flag}", str(world / name))]
    return [*given, "--out_dir", str(out_dir), *SMALL, "--batch_size", "8", "--warmup_iters", "5", *more]


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """The folder after training, and the model that was in memory when it was saved."""
    folder = tmp_path_factory.mktemp("clip") / "deep" / "clip"
    kept = []
    original, train_clip.save = train_clip.save, lambda model, *rest: (kept.append(model), original(model, *rest))
    try:
        train_clip.main(flags(world, folder, "--epochs", "400", "--val_interval", "1000", "--min_scale", "0.9"))
    finally:
        train_clip.save = original
    return folder, kept[-1].eval()


def pictures(world):
    return [Image.open(path).convert("RGB") for path in sorted((world / "images").iterdir())]


def test_it_learns_to_tell_colours_and_sides_apart(trained):
    metrics = json.loads((trained[0] / "metrics.json").read_text(encoding="utf-8"))
    (figures,) = metrics["retrieval"].values()
    for way in ("image_to_text", "text_to_image"):
        assert figures[f"{way}_recall@1"] >= 75  # chance is 12.5; colours alone, without sides, give 50
        assert figures[f"{way}_recall@5"] == 100
    assert metrics["steps"] == 400
    assert metrics["command"].startswith("python -m scripts.train_clip --data_path")
    assert metrics["seconds"] >= 0


def test_muon_moves_the_matrices_of_the_blocks_and_nothing_else(world, tmp_path):
    train_clip.main(flags(world, tmp_path / "clip", "--muon_learning_rate", "0.005", "--epochs", "2"))
    args = train_clip.parse_args(flags(world, tmp_path, "--muon_learning_rate", "0.005"))
    model = CLIPModel(CLIPConfig(**train_clip.build_config(args, 320)))
    names = {weight: name for name, weight in model.named_parameters()}
    optimizer = train_clip.make_optimizer(model, args)
    peaks = {names[weight]: group["peak"] for group in optimizer.param_groups for weight in group["params"]}
    assert peaks.keys() == set(names.values())
    moved = {name for name, peak in peaks.items() if peak == 0.005}
    assert moved == {name for name in peaks if ".layers." in name and name.endswith("weight") and "norm" not in name}
    assert {peaks[name] for name in peaks.keys() - moved} == {0.001}
    for weight in names:
        weight.grad = torch.randn_like(weight)
    matrix = model.vision_model.encoder.layers[0].mlp.fc1.weight
    before = matrix.detach().clone()
    for group in optimizer.param_groups:
        group.update(lr=group["peak"], weight_decay=0.0)
    optimizer.step()
    steps = torch.linalg.svdvals(matrix.detach() - before)
    assert steps.max() < 2 * steps.min()  # all directions alike: of AdamW's steps the longest is far longer


def test_the_folder_gives_the_vlm_the_features_of_the_trained_model(trained, world):
    folder, model = trained
    tower, processor = MiniMindVLM.get_vision_model(folder)
    pixels = processor(pictures(world))["pixel_values"]
    assert pixels.shape == (8, 3, 32, 32)
    features = MiniMindVLM.get_image_embeddings(pixels, tower)
    assert features.shape == (8, 4, 64)  # (32 / 16)² patches
    with torch.no_grad():
        expected = model.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)
    assert (features[0] - features[1]).abs().max() > 0.1


def test_the_whole_clip_loads_and_scores_like_the_trained_model(trained, world):
    folder, model = trained
    loaded, info = CLIPModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = encode_captions(load_tokenizer(world / "tokenizer"), ["There is red on the left.", "green"], 24)
    pixels = ImageProcessor.from_pretrained(folder)(pictures(world))["pixel_values"]
    with torch.no_grad():
        scores = loaded.eval()(input_ids=ids, pixel_values=pixels).logits_per_image
        expected = model(input_ids=ids, pixel_values=pixels).logits_per_image
        ours = train_clip.encode_pictures(model, pixels)[0][:, 0] @ train_clip.encode_texts(model, ids).T
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours * model.logit_scale.exp(), expected, rtol=0, atol=1e-4)


def test_the_folder_has_the_classic_names(trained):
    folder, _ = trained
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "metrics.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # the weights as readable as the rest
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "clip"
    assert (config["vision_config"]["image_size"], config["vision_config"]["patch_size"]) == (32, 16)
    with safe_open(folder / "model.safetensors", "pt") as weights:
        keys = set(weights.keys())
    assert {
        "logit_scale",
        "visual_projection.weight",
        "text_projection.weight",
        "vision_model.embeddings.class_embedding",
        "vision_model.pre_layrnorm.weight",
        "vision_model.encoder.layers.1.self_attn.q_proj.weight",
        "vision_model.post_layernorm.weight",
        "text_model.embeddings.token_embedding.weight",
        "text_model.final_layer_norm.weight",
    } <= keys
    prefixes = ("vision_model.", "text_model.", "logit_scale", "visual_projection.", "text_projection.")
    assert all(key.startswith(prefixes) for key in keys)


def test_captions_are_pooled_at_their_end_and_not_at_the_largest_id(trained, world):
    folder, model = trained
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["text_config"]
    assert config["eos_token_id"] == END_OF_CAPTION == 0
    tokenizer = load_tokenizer(world / "tokenizer")
    ids = encode_captions(tokenizer, ["The red part is on the left."], 24)
    length = int((ids != 0).sum())
    with torch.no_grad():
        out = model.text_model(input_ids=ids)
        torch.testing.assert_close(out.pooler_output[0], out.last_hidden_state[0, length])
        padding = model.text_model(input_ids=ids[:, : length + 1]).pooler_output
        torch.testing.assert_close(out.pooler_output, padding, rtol=0, atol=1e-5)
        other = ids.clone()
        other[0, length - 1] = 40  # another last word: pooling at the largest id might never see it
        assert (model.text_model(input_ids=other).pooler_output - out.pooler_output).abs().max() > 1e-3


def test_captions_too_long_are_cut_but_keep_their_end(world):
    tokenizer = load_tokenizer(world / "tokenizer")
    ids = encode_captions(tokenizer, ["red " * 50, "", "<|endoftext|> red"], 8)
    assert ids.shape == (3, 8)
    assert ids[0, -1] == 0 and (ids[0, :-1] != 0).all()
    assert (ids[1] == 0).all()
    assert ids[2, 0] != 0  # the words of a special token do not end a caption


def test_vision_only_saves_the_same_tower_and_nothing_else(trained, world, tmp_path):
    folder, model = trained
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    train_clip.save(model, config, ImageProcessor.from_pretrained(folder), tmp_path, True, {})
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert all(key.startswith("vision_model.") for key in weights.keys())  # noqa: SIM118 safe_open has no __iter__
    whole, part = (MiniMindVLM.get_vision_model(each)[0].state_dict() for each in (folder, tmp_path))
    assert whole.keys() == part.keys()
    assert all(torch.equal(whole[key], part[key]) for key in whole)


def test_the_last_layer_gives_the_patches_a_gradient(trained, world):
    _, model = trained
    pixels = ImageProcessor(32, (32, 32))(pictures(world))["pixel_values"]
    vision = model.vision_model
    for half, expected in ((0, False), (1, True)):
        seen = []
        hook = vision.encoder.layers[-1].mlp.register_full_backward_hook(lambda _, __, grad: seen.append(grad[0]))  # noqa: B023
        train_clip.encode_pictures(model, pixels)[half].sum().backward()
        hook.remove()
        assert bool(seen[0][:, 1:].abs().max() > 0) is expected


def test_masking_leaves_out_patches_and_never_the_class_token(trained, world, monkeypatch):
    _, model = trained
    pixels = ImageProcessor(32, (32, 32))(pictures(world))["pixel_values"]
    lengths = []
    hook = model.vision_model.encoder.register_forward_hook(
        lambda module, given, kwargs, out: lengths.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    whole, masked = (train_clip.encode_pictures(model, pixels, "max", ratio) for ratio in (0.0, 0.5))
    hook.remove()
    assert [h.shape[1] for h in lengths] == [5, 3]
    assert torch.equal(lengths[0][:, 0], lengths[1][:, 0])
    assert [vectors.shape for vectors in (*whole, *masked)] == [(8, 1, 32), (8, 4, 32), (8, 1, 32), (8, 2, 32)]


@pytest.mark.parametrize("kind, first", [("clip", 1), ("siglip", 0)])
def test_the_patches_that_are_kept_have_the_embeddings_that_transformers_computes(kind, first):
    paths = ["--data_path", "x", "--tokenizer_path", "x", "--out_dir", "x"]
    args = train_clip.parse_args([*paths, *SMALL, "--kind", kind, "--projection_dim", "64"])
    embeddings = train_clip.build_model(train_clip.build_config(args, 320)).vision_model.embeddings
    pixels, kept = torch.randn(2, 3, 32, 32), torch.tensor([[3, 0], [1, 2]])
    found, whole = embed_patches(embeddings, pixels, kept), embeddings(pixels)
    torch.testing.assert_close(found[:, :first], whole[:, :first])
    torch.testing.assert_close(found[:, first:], torch.stack([row[first + each] for row, each in zip(whole, kept)]))


def test_in_a_run_in_bfloat16_muon_multiplies_in_it_too(world, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(optimizer, "orthogonalize", lambda x, dtype: seen.append(dtype) or x)
    for name, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        seen.clear()
        muon = ["--muon_learning_rate", "0.005", "--epochs", "1", "--dtype", name]
        train_clip.main(flags(world, tmp_path / name, *muon))
        assert set(seen) == {dtype}


def test_the_pooled_patches_are_their_mean_or_each_of_them(trained, world):
    _, model = trained
    pixels = ImageProcessor(32, (32, 32))(pictures(world))["pixel_values"]
    with torch.no_grad():
        h = model.vision_model(pixel_values=pixels).last_hidden_state
        vision = model.vision_model
        mean = vision.post_layernorm(h[:, 1:].mean(dim=1))
        each = torch.stack([vision.post_layernorm(h[:, i]) for i in range(5)], dim=1)
        (one, pooled), (two, patches) = (train_clip.encode_pictures(model, pixels, pool) for pool in ("mean", "max"))
        for found, expected in (
            (pooled[:, 0], mean),
            (one[:, 0], each[:, 0]),
            (two, each[:, :1]),
            (patches, each[:, 1:]),
        ):
            expected = torch.nn.functional.normalize(model.visual_projection(expected), dim=-1)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def by_hand(pictures, texts, scale):
    """InfoNCE of captions that all differ, number by number, each picture as good as the best of its vectors."""
    fit = [[max(scale * float(vector @ text) for vector in own) for text in texts] for own in pictures]
    B = len(fit)
    total = 0.0
    for i in range(B):
        total -= math.log(math.exp(fit[i][i]) / sum(math.exp(fit[i][j]) for j in range(B)))
        total -= math.log(math.exp(fit[i][i]) / sum(math.exp(fit[j][i]) for j in range(B)))
    return total / (2 * B)


@pytest.mark.parametrize("P", [1, 3])
def test_the_loss_is_that_of_the_patch_which_fits_each_caption_best(P):
    torch.manual_seed(3)
    unit = torch.nn.functional.normalize(torch.randn(4, P + 1, 8), dim=-1)
    pictures, texts = unit[:, :P], unit[:, P]
    loss, _ = train_clip.contrastive_loss(pictures, texts, torch.eye(4, dtype=torch.bool), 4.0)
    assert loss.item() == pytest.approx(by_hand(pictures, texts, 4.0), rel=1e-5)
    if P == 1:  # with one vector per picture it is CLIP's own
        logits, right = 4 * pictures[:, 0] @ texts.T, torch.arange(4)
        own = [torch.nn.functional.cross_entropy(way, right) for way in (logits, logits.T)]
        assert loss.item() == pytest.approx(sum(own).item() / 2, rel=1e-5)
    else:  # and no mean over patches
        assert loss.item() != pytest.approx(by_hand(pictures.mean(dim=1, keepdim=True), texts, 4.0), rel=1e-2)


def test_a_caption_teaches_the_patch_that_fits_it_and_leaves_the_others_alone():
    """Two pictures of three patches; each caption, and each wrong one, fits another patch."""
    axes = torch.eye(8)
    pictures = torch.stack([axes[[0, 1, 2]], axes[[3, 4, 5]]]).requires_grad_()
    texts = torch.nn.functional.normalize(axes[[1, 3]] + 0.3 * axes[[5, 2]], dim=-1)  # each: its own, some of another
    loss, found = train_clip.contrastive_loss(pictures, texts, torch.eye(2, dtype=torch.bool), 5.0)
    loss.backward()
    assert found == 1
    taught = pictures.grad.abs().sum(dim=-1) > 0  # (2, 3)
    assert taught.tolist() == [[False, True, True], [True, False, True]]  # the fitting one; the one most confused
    assert (pictures.grad[0, 1] @ texts[0] < 0) and (pictures.grad[1, 0] @ texts[1] < 0)  # towards the right caption
    assert (pictures.grad[0, 2] @ texts[1] > 0) and (pictures.grad[1, 2] @ texts[0] > 0)  # and away from the wrong


def test_a_caption_of_another_picture_that_is_right_too_is_not_told_apart():
    unit, right = torch.eye(4), torch.eye(4, dtype=torch.bool)
    loss, found = train_clip.contrastive_loss(unit[:, None], unit, right, 10.0)
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(10 * unit, torch.arange(4)).item())
    assert found == 1
    twins = unit[[0, 0, 2, 3]]
    right[0, 1] = right[1, 0] = True
    loss, found = train_clip.contrastive_loss(twins[:, None], twins, right, 50.0)
    assert loss.item() == pytest.approx(math.log(2) / 2)  # two of four rows share their probability, rightly
    assert found == 1


def test_captions_are_drawn_from_those_of_each_picture_and_none_twice():
    theirs = torch.tensor([[0, 1, 2, 3], [4, 9, 9, 9], [5, 6, 9, 9]])  # of 9; filled up with 9
    drawn = [draw_captions(theirs, 9, 3).tolist() for _ in range(100)]
    for numbers in drawn:
        assert len(numbers) == len({*numbers}) == 3 + 1 + 2
        assert {*numbers[:3]} < {0, 1, 2, 3} and numbers[3] == 4 and {*numbers[4:]} == {5, 6}
    assert len({tuple(sorted(numbers[:3])) for numbers in drawn}) == 4
    assert sorted(draw_captions(theirs, 9, 7).tolist()) == list(range(7))
    ones = torch.stack([draw_captions(theirs, 9, 1) for _ in range(300)])
    assert [len({*column}) for column in ones.T.tolist()] == [4, 1, 2]


def test_a_share_of_the_tokens_of_a_caption_is_dropped_and_the_others_keep_their_order():
    ids = torch.tensor([[5, 6, 7, 8, 0, 0], [9, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 0]])  # 0: the end of a caption
    torch.manual_seed(0)
    drawn = torch.stack([drop_tokens(ids, 0.25) for _ in range(2000)])
    for some in drawn.tolist():
        for before, after in zip(ids.tolist(), some):
            left = after[: after.index(0)]
            assert left and left == [token for token in before if token in left]
            assert not any(after[len(left) :])
    kept = (drawn != 0).float().mean(dim=0)
    assert kept[:, 0].tolist() == pytest.approx([1, 1, 1], abs=0.01)  # none is empty
    assert (drawn[:, 2] != 0).sum(dim=1).float().mean() == pytest.approx(5 * 0.75, abs=0.05)
    assert {tuple(row) for row in drawn[:, 1].tolist()} == {(9, 0, 0, 0, 0, 0)}
    assert torch.equal(drop_tokens(ids, 0.0), ids)


def test_of_several_captions_of_a_picture_each_is_right():
    unit = torch.eye(3)
    texts, right = unit[[0, 0, 1, 2]], torch.tensor([[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]).bool()
    loss, found = train_clip.contrastive_loss(unit[:, None], texts, right, 50.0)
    assert loss.item() == pytest.approx(math.log(2) / 3 / 2)  # one of three pictures shares its probability
    assert found == 1
    loss, found = train_clip.contrastive_loss(unit[:, None], texts, right.roll(1, 0), 50.0)
    assert loss > 40 and found == 0


def test_several_captions_in_a_step_teach_too(world, tmp_path):
    for several in ("1", "2", "9"):  # three is what each picture has
        train_clip.main(flags(world, tmp_path / several, "--epochs", "150", "--captions_per_picture", several))
        (figures,) = json.loads((tmp_path / several / "metrics.json").read_text())["retrieval"].values()
        assert figures["text_to_image_recall@1"] >= 50


def test_an_encoder_that_sees_no_difference_finds_nothing(trained, world):
    ids = encode_captions(load_tokenizer(world / "tokenizer"), ["red"] * 8, 24)
    blind = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    figures = train_clip.retrieval(
        trained[1], ImageProcessor(32), blind, (ids, torch.arange(8)[:, None]), torch.device("cpu")
    )
    trained[1].eval()
    assert set(figures.values()) == {0.0}


def test_with_several_captions_a_picture_has_found_its_way_with_any(monkeypatch):
    """Hand-made scores: picture 0 finds its second caption first; picture 1, with one only, finds a wrong one first."""
    pictures = torch.eye(2)
    texts = torch.tensor([[0.1, 0.9], [1.0, 0.0], [0.9, 0.8]])
    monkeypatch.setattr(train_clip, "encode_pictures", lambda model, pixels: (pictures[:, None], None))
    monkeypatch.setattr(train_clip, "encode_texts", lambda model, ids: texts)
    blank = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    captions = (torch.zeros(3, 4), torch.tensor([[0, 1], [2, 3]]))  # 3: none
    figures = train_clip.retrieval(torch.nn.Identity(), ImageProcessor(32), blank, captions, torch.device("cpu"))
    assert figures["image_to_text_recall@1"] == 50
    assert figures["text_to_image_recall@1"] == pytest.approx(33.33)
    assert figures["image_to_text_recall@5"] == figures["text_to_image_recall@5"] == 100


def test_augmentation_of_the_whole_window_without_flip_keeps_left_and_right():
    torch.manual_seed(0)
    half = torch.zeros(16, 3, 32, 32)
    half[..., :16] = 1
    for flip, expected in ((False, {True}), (True, {True, False})):
        out = augment(half, 0.9, flip)
        assert out.shape == half.shape
        assert set((out[..., 4].mean((1, 2)) > out[..., 28].mean((1, 2))).tolist()) == expected


def test_without_a_cache_the_pictures_are_the_same(world, capsys):
    names = [path.name for path in sorted((world / "images").iterdir())]
    processor = ImageProcessor(32, (32, 32))
    places = [(Folder(world / "images"), name) for name in names]
    kept = CaptionPictures(places, processor, cache_gb=1.0)
    read = CaptionPictures(places, processor, cache_gb=0.0)
    assert "decoded on every use" in capsys.readouterr().out
    chosen = torch.tensor([3, 0, 5])
    assert kept[chosen].dtype == torch.uint8
    assert torch.equal(kept[chosen], read[chosen])


def test_the_same_seed_gives_the_same_weights_and_another_one_others(world, tmp_path):
    runs = ("one", "1"), ("again", "1", "--kind", "clip"), ("two", "2"), ("dropped", "1", "--text_mask_ratio", "0.5")
    for name, seed, *more in runs:
        train_clip.main(flags(world, tmp_path / name, "--epochs", "2", "--seed", seed, "--mask_ratio", "0.5", *more))
    one, again, two, dropped = ((tmp_path / name / "model.safetensors").read_bytes() for name, *_ in runs)
    assert one == again
    assert len({one, two, dropped}) == 3


def test_bfloat16_learns_as_float32_does_but_for_its_rounding(world, tmp_path):
    weights = {}
    for dtype in ("auto", "float32", "bfloat16"):
        train_clip.main(flags(world, tmp_path / dtype, "--epochs", "3", "--dtype", dtype))
        model = CLIPModel.from_pretrained(tmp_path / dtype)
        weights[dtype] = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    assert torch.equal(weights["auto"], weights["float32"])  # on a CPU
    difference = (weights["bfloat16"] - weights["float32"]).norm() / weights["float32"].norm()
    assert 1e-6 < difference < 0.02


def test_the_patch_that_fits_best_can_be_asked_for_and_teaches_something_else(world, tmp_path):
    states = {}
    for pool, more in (("default", []), ("mean", ["--patch_pool", "mean"]), ("max", ["--patch_pool", "max"])):
        train_clip.main(flags(world, tmp_path / pool, "--epochs", "2", *more))
        states[pool] = (tmp_path / pool / "model.safetensors").read_bytes()
    assert states["default"] == states["mean"] != states["max"]
    assert len(states["mean"]) == len(states["max"])
    metrics = json.loads((tmp_path / "max" / "metrics.json").read_text(encoding="utf-8"))
    assert 0 < metrics["loss"] < 10 and "words_loss" not in metrics


def test_max_minutes_stops_and_saves(world, tmp_path):
    train_clip.main(flags(world, tmp_path / "clip", "--max_minutes", "0.01", "--vision_only", "--flip"))
    MiniMindVLM.get_vision_model(tmp_path / "clip")
    assert json.loads((tmp_path / "clip" / "metrics.json").read_text(encoding="utf-8"))["steps"] >= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--image_size", "30"], "--image_size 30 is not a multiple of --patch_size 16"),
        (["--hidden_size", "200"], "--hidden_size 200 .* multiple of 64"),
        (["--batch_size", "1"], "--batch_size 1"),
        (["--batch_size", "9"], "--batch_size 9: there are only 8 pictures"),
        (["--mask_ratio", "1"], "--mask_ratio 1"),
        (["--text_mask_ratio", "1"], "--text_mask_ratio 1"),
        (["--min_scale", "0"], "--min_scale 0"),
        (["--max_text_len", "1"], "--max_text_len 1"),
        (["--patch_weight", "1.5"], "--patch_weight 1.5"),
        (["--device", "quantum"], "--device quantum"),
        (["--data_path", "nowhere.jsonl"], "--data_path nowhere.jsonl: no such file"),
        (["--val_path", "nowhere.jsonl"], "--val_path nowhere.jsonl: no such file"),
        (["--images_path", "nowhere"], "--images_path nowhere"),
        (["--tokenizer_path", "nowhere"], "--tokenizer_path nowhere"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(world, tmp_path, change, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_clip.main([*flags(world, tmp_path / "clip"), *change])
    assert not (tmp_path / "clip").exists()


@pytest.mark.parametrize(
    "change",
    [
        ["--epochs", "0"],
        ["--max_minutes", "-1"],
        ["--patch_pool", "sum"],
        ["--kind", "dino"],
        ["--words_weight", "1"],
        ["--images_path", "nowhere"],
    ],
)
def test_a_typo_on_the_command_line_is_one_message_and_no_traceback(world, tmp_path, capsys, change):
    with pytest.raises(SystemExit) as stop:
        run_main(lambda: train_clip.main([*flags(world, tmp_path / "clip"), *change]))
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert change[0] in told and "Traceback" not in told


def test_a_missing_and_a_broken_picture_are_named(world, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [("red_left.png", "red"), ("gone.png", "gone")])
    rows = ["--data_path", str(tmp_path / "rows.jsonl")]
    with pytest.raises(FileNotFoundError, match="--images_path .*1 of 2 pictures .* first gone.png"):
        train_clip.main([*flags(world, tmp_path / "clip"), *rows])
    (tmp_path / "gone.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 40)).save(tmp_path / "red_left.png")
    again = [*flags(world, tmp_path / "clip"), *rows, "--images_path", str(tmp_path)]
    with pytest.raises(ValueError, match="--images_path: .*gone.png cannot be read"):
        train_clip.main(again)
    png = (tmp_path / "red_left.png").read_bytes()
    (tmp_path / "gone.png").write_bytes(png[: len(png) // 2] + bytes(200))  # as an interrupted copy leaves it
    with pytest.raises(ValueError, match="--images_path: .*gone.png cannot be read"):
        train_clip.main(again)


def test_rows_without_exactly_one_picture_are_counted_and_left_out(tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", [("a.png", "one"), ("a.png, b.png", "two"), ("", "none"), ("a.png", "three")])
    captions, places = read_captions([tmp_path / "rows.jsonl"], tmp_path, "--data_path")
    assert captions == {str(tmp_path / "a.png"): ["one", "three"]} and [name for _, name in places] == ["a.png"]
    assert "skipped 2 rows without exactly one picture and an answer" in capsys.readouterr().out
    lines = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    lines = [line | {"image": image} for line, image in zip(lines, (["a.png"], None, [], ["a.png", "b.png"]))]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    captions, _ = read_captions([tmp_path / "rows.jsonl"], tmp_path, "--data_path")
    assert captions == {str(tmp_path / "a.png"): ["one"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(lines[0] | {"image": 5}))
    with pytest.raises(ValueError, match=r'--data_path .*rows.jsonl:1 .*\("image" must be text'):
        read_captions([tmp_path / "rows.jsonl"], tmp_path, "--data_path")


@pytest.mark.parametrize("cache_gb", ["1", "0"])
def test_a_zip_and_parquet_give_the_weights_of_a_folder(world, tmp_path, cache_gb):
    shutil.make_archive(tmp_path / "images", "zip", world / "images")
    for split in ("train", "val"):
        rows = [json.loads(line) for line in (world / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        columns = {
            "conversations": [json.dumps(row["conversations"]) for row in rows],
            "image_bytes": [(world / "images" / row["image"]).read_bytes() for row in rows],
        }
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / f"{split}.parquet")
    parquet = ["--data_path", str(tmp_path / "train.parquet"), "--val_path", str(tmp_path / "val.parquet")]
    weights, figures = [], []
    for name, more in (("folder", []), ("zip", ["--images_path", str(tmp_path / "images.zip")]), ("parquet", parquet)):
        out = tmp_path / name
        train_clip.main(flags(world, out, "--epochs", "2", "--vision_only", "--cache_gb", cache_gb, *more))
        weights.append((out / "model.safetensors").read_bytes())
        figures.append(list(json.loads((out / "metrics.json").read_text(encoding="utf-8"))["retrieval"].values()))
    assert weights[0] == weights[1] == weights[2] and figures[0] == figures[1] == figures[2]


def test_a_broken_picture_of_parquet_is_named_by_its_row(world, tmp_path):
    turns = json.dumps([{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "red"}])
    png = (world / "images" / "red_left.png").read_bytes()
    rows = {"conversations": [turns] * 2, "image_bytes": [png, png[: len(png) // 2]]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "rows.parquet")
    given = [*flags(world, tmp_path / "clip"), "--data_path", str(tmp_path / "rows.parquet")]
    with pytest.raises(ValueError, match="--data_path: picture 1 of .*rows.parquet:2 cannot be read"):
        train_clip.main(given)


def test_without_images_path_the_pictures_lie_beside_the_rows_or_it_is_asked_for(world, tmp_path):
    given = flags(world, tmp_path / "clip", "--epochs", "1")
    at = given.index("--images_path")
    del given[at : at + 2]
    train_clip.main(given)
    write_rows(tmp_path / "rows.jsonl", [("red_left.png", "red")])
    with pytest.raises(ValueError, match="--images_path is needed: there are no pictures next to .*rows.jsonl"):
        train_clip.main([*given, "--data_path", str(tmp_path / "rows.jsonl"), "--out_dir", str(tmp_path / "new")])


def test_an_encoder_that_weights_may_depend_on_is_not_overwritten(trained, world):
    with pytest.raises(ValueError, match="--out_dir .* contains an encoder already"):
        train_clip.main(flags(world, trained[0]))


def test_a_caption_is_right_for_every_picture_that_has_it(world, tmp_path):
    rows = [("a.png", "red"), ("a.png", "green left"), ("b.png", "red"), ("c.png", "blue")]
    lines = [{"conversations": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": text}],
              "image": name} for name, text in rows]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    for name in "abc":
        Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.png")
    args = argparse.Namespace(images_path=tmp_path, cache_gb=1, max_text_len=8, allow_urls=False)
    tokenizer = load_tokenizer(world / "tokenizer")
    pictures, (texts, numbers) = load_split(
        args, [tmp_path / "rows.jsonl"], "--data_path", tokenizer, ImageProcessor(32)
    )
    said = encode_captions(tokenizer, [text for _, text in rows], 8)
    assert len(pictures) == 3 and len(texts) == 3
    assert numbers[1, 1] == numbers[2, 1] == 3  # filled up
    for number, text in zip((numbers[0, 0], numbers[0, 1], numbers[1, 0], numbers[2, 0]), said):
        assert texts[number].equal(text)


def test_a_loss_that_is_no_number_stops_the_training_within_ten_steps(world, tmp_path, monkeypatch):
    real, steps = train_clip.contrastive_loss, []

    def diverged(*args):
        loss, found = real(*args)
        steps.append(loss)
        return (loss * torch.nan if len(steps) > 2 * 12 else loss), found

    monkeypatch.setattr(train_clip, "contrastive_loss", diverged)
    with pytest.raises(ValueError, match="step 20: the loss is nan. Use a smaller --learning_rate"):
        train_clip.main(flags(world, tmp_path / "clip", "--epochs", "100", "--val_interval", "50"))
    assert not (tmp_path / "clip").exists()
