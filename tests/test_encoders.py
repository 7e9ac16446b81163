"""model/families.py and encoders.py: training, answering and exporting with every encoder in the format of the hubs."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, SiglipImageProcessor, ViTImageProcessor

import eval_vlm
import train_pretrain_vlm
import train_sft_vlm
from model.build import build_model
from model.encoders import measure
from model.families import FAMILIES, vision_config
from model.model_vlm import MiniMindVLM, VisionProj, VLMConfig
from model.processing import ImageProcessor
from model.weights import fingerprint, read_sidecar
from scripts import inspect_data
from scripts.convert_vlm import __main__ as convert_vlm
from tests.test_loop import same, stopped_and_resumed
from tests.test_model_minimind import OTHER, needs_other

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
MLP = {"intermediate_size": 48, "image_size": 32}
DINOV2 = {"mlp_ratio": 2, "image_size": 56}  # trained on more pixels than it is given
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"height": 32, "width": 32}
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": SQUARE, "resample": 3, "do_center_crop": True}
NULLS = {"crop_size": None, "do_center_crop": None, "do_convert_rgb": None}
FOLDERS = {  # model_type: configuration, preprocessor_config.json as the public folders have it, their processor
    "clip": (MLP, {"size": 32, "crop_size": 32, "resample": 3}, CLIPImageProcessor),
    "siglip": (MLP, {"size": SQUARE, "resample": 3, **HALF}, SiglipImageProcessor),
    "dinov2": (DINOV2, CROPPED | IMAGENET, BitImageProcessor),
    "dinov2_with_registers": (DINOV2 | {"num_register_tokens": 4}, CROPPED | IMAGENET, BitImageProcessor),
    "dinov3_vit": (MLP | {"num_register_tokens": 4}, {"size": SQUARE, "resample": 2, **IMAGENET, **NULLS}, None),
    "vit": (MLP, {"size": 32, **HALF}, ViTImageProcessor),  # as of 2021, when the filter was left out
    "aimv2": (MLP, CROPPED, CLIPImageProcessor),
}
WHOLE = {"vit": "ViTForImageClassification", "dinov2": "Dinov2ForImageClassification"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{family: a folder of random weights, none of them 0 or 1}"""
    root = tmp_path_factory.mktemp("encoders")
    for kind, (config, pixels, _) in FOLDERS.items():
        torch.manual_seed(0)
        tower = getattr(transformers, FAMILIES[kind].tower)
        model = tower(tower.config_class(**SMALL, **config))
        for weight in model.parameters():
            weight.data += 0.2 * torch.randn_like(weight)
        model.save_pretrained(root / kind)
        (root / kind / "preprocessor_config.json").write_text(json.dumps(pixels))
    return root


EVERY = pytest.mark.parametrize("kind", list(FOLDERS))
APART = pytest.mark.parametrize("to, kind", [*(("llava", kind) for kind in FOLDERS), ("transformers", "dinov3_vit")])


@EVERY
def test_features_are_those_of_the_last_block_without_the_class_token(folders, kind):
    encoder, _ = MiniMindVLM.get_vision_model(folders / kind)
    pixels = torch.randn(2, 3, 32, 32)
    states = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
    features = MiniMindVLM.get_image_embeddings(pixels, encoder)
    registers = FOLDERS[kind][0].get("num_register_tokens", 0)
    assert features.shape == (2, 16 + registers, 32)
    assert torch.equal(features, states[:, states.shape[1] - 16 - registers :])
    assert measure(folders / kind) == (4, registers, 32)
    if not FAMILIES[kind].norm:
        return
    normed, _ = MiniMindVLM.get_vision_model(folders / kind, True)
    norm = getattr(normed, FAMILIES[kind].norm)
    expected = norm(states)[:, -features.shape[1] :]
    torch.testing.assert_close(MiniMindVLM.get_image_embeddings(pixels, normed), expected, atol=1e-6, rtol=0)


@EVERY
def test_pixels_are_those_of_its_own_processor(folders, kind):
    """Within one of 256 levels. DINOv3's processor needs torchvision, so the test computes its formula."""
    ours, theirs = ImageProcessor.from_pretrained(folders / kind), FOLDERS[kind][2]
    std, mean = (torch.tensor(values).view(3, 1, 1) for values in (ours.image_std, ours.image_mean))
    rng = np.random.default_rng(0)
    for height, width in ((50, 41), (32, 70), (20, 20)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        if theirs is None:
            whole = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
            expected = (F.interpolate(whole, (32, 32), mode="bilinear", antialias=True) - mean) / std
        else:
            expected = theirs.from_pretrained(folders / kind)(image, return_tensors="pt")["pixel_values"]
        apart = (ours([image])["pixel_values"] - expected).abs() * std * 255
        assert expected.shape == (1, 3, 32, 32) and (apart < 1.01).float().mean() > 0.999


@pytest.mark.parametrize("kind", ["siglip", "aimv2", "vit", "dinov2"])
def test_of_a_whole_model_the_vision_half_is_taken(folders, kind, tmp_path):
    """Of the text too, or with a classifier, under the names that its file has."""
    tower = MiniMindVLM.get_vision_model(folders / kind)[0]
    if kind in WHOLE:
        whole = getattr(transformers, WHOLE[kind])(tower.config)
        getattr(whole, kind).load_state_dict(tower.state_dict(), strict=False)
    else:
        name = tower.config_class.__name__.replace("Vision", "")
        text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = getattr(transformers, name)(text_config=text, vision_config=tower.config.to_dict())
        whole = getattr(transformers, name.replace("Config", "Model"))(config)
        seeing = whole.vision_model
        (seeing if hasattr(seeing, "encoder") else seeing.vision_model).load_state_dict(tower.state_dict())
    whole.save_pretrained(tmp_path)
    assert vision_config(tmp_path)["model_type"] == kind
    again = MiniMindVLM.get_vision_model(tmp_path)[0]
    assert fingerprint(again) == fingerprint(tower)


def test_an_encoder_of_no_family_and_one_of_any_proportions_are_refused_with_those_that_are_read(tmp_path):
    for kind, more in (("resnet", ""), ("siglip2", ", a SigLIP2 for any aspect ratio, not for a fixed size")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(
            ValueError, match=f"config.json: model_type '{kind}'{more}.\nSupported encoders: .*CLIP, SigLIP, DINO"
        ):
            VLMConfig.for_encoder(tmp_path)


def test_pictures_of_another_size_than_the_encoders_are_refused(folders, tmp_path):
    shutil.copytree(folders / "vit", tmp_path / "vit")
    path = tmp_path / "vit/preprocessor_config.json"
    for pixels, message in (
        ({"size": 40}, r"gives pictures of 40 x 40 pixels, and\nits config.json wants 32 x 32"),
        ({"size": 32, "do_resize": False}, "do_resize is False, expected True"),
        ({"size": 32, "rescale_factor": 1 / 127.5}, "rescale_factor is 0.0078"),
    ):
        path.write_text(json.dumps(pixels))
        with pytest.raises(ValueError, match=message):
            MiniMindVLM.get_vision_model(tmp_path / "vit")


def test_missing_fields_of_a_preprocessor_file_come_from_its_family(folders, tmp_path):
    for kind, written, size, crop in (
        ("dinov2", None, 256, (224, 224)),
        ("vit", {"size": 32, "crop_size": 24}, (32, 32), (32, 32)),  # which does not crop unless it is said
        ("vit", {"size": 36, "crop_size": 32, "do_center_crop": True}, 36, (32, 32)),
    ):
        folder = shutil.copytree(folders / kind, tmp_path / kind, dirs_exist_ok=True)
        path = folder / "preprocessor_config.json"
        path.write_text(json.dumps(written)) if written else path.unlink()
        processor = ImageProcessor.from_pretrained(folder)
        assert (processor.size, processor.crop_size) == (size, crop)


def test_a_dino_with_pictures_that_are_not_square_is_refused(folders, tmp_path):
    folder = shutil.copytree(folders / "dinov3_vit", tmp_path / "dino")
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 48}}))
    with pytest.raises(ValueError, match="gives 32 x 48 pixels, expected a square"):
        VLMConfig.for_encoder(folder)


def test_the_fingerprint_knows_layers_apart_and_a_file_that_is_not_needed_is_not_opened(folders, tmp_path):
    folder = shutil.copytree(folders / "dinov2", tmp_path / "dino")
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
    encoder = MiniMindVLM.get_vision_model(folder)[0]
    before = fingerprint(encoder)
    layers = next(module for module in encoder.modules() if isinstance(module, torch.nn.ModuleList))
    first, second = (layer.state_dict() for layer in layers)
    first = {key: value.clone() for key, value in first.items()}
    layers[0].load_state_dict(second)
    layers[1].load_state_dict(first)
    assert fingerprint(encoder) != before


# ---------------------------------------------------------------------------- from training to the programs of others


@pytest.fixture
def flags(folders, tokenizer_folder, world, tmp_path):
    """Of a training of two steps, with the encoder of a family."""

    def make(kind, *more):
        return [
            *("--data_path", str(world / "rows.jsonl"), "--images_path", str(world / "pictures")),
            *("--tokenizer_path", str(tokenizer_folder), "--vision_model_path", str(folders / kind)),
            *("--out_dir", str(tmp_path / "out"), "--num_workers", "0", "--batch_size", "7", "--device", "cpu"),
            *("--hidden_size", "64", "--num_hidden_layers", "1", *more),
        ]

    return make


def converted(to, weights, output, world, *more):
    pictures = [str(world / "pictures" / f"{colour}.png") for colour in ("red", "blue")]
    convert_vlm.main(["--to", to, "--weights", str(weights), "--output", str(output), "--images", *pictures, *more])
    return output


@EVERY
def test_both_stages_learn_with_it_resume_answer_and_become_a_llava_and_come_back(
    flags, kind, world, tmp_path, monkeypatch, capsys
):
    train_pretrain_vlm.main(flags(kind, "--from_weight", "none"))
    first = tmp_path / "out/pretrain_vlm_64.pth"
    common = flags(kind, "--cache_features", str(tmp_path / "features"))
    whole = train_sft_vlm.main(common)
    assert whole.state.step == 2
    other = [*common, "--out_dir", str(tmp_path / "other"), "--from_weight", str(first)]
    same(whole, stopped_and_resumed(monkeypatch, train_sft_vlm.main, other))

    weights = tmp_path / "out/sft_vlm_64.pth"
    ask = ["--image", str(world / "pictures/red.png"), "--max_new_tokens", "8", "--device", "cpu", "--greedy"]
    capsys.readouterr()
    eval_vlm.main(["--weights", str(weights), *ask])
    answer = capsys.readouterr().out.splitlines()[-1]
    eval_vlm.main(["--weights", str(weights), *ask, "--show_attention", str(tmp_path / "looked.png")])
    with monkeypatch.context() as patch:
        patch.setattr(convert_vlm, "check_folder", lambda made, ours: "not checked")
        for to in ("llava", "transformers"):
            made = converted(to, weights, tmp_path / to, world)
            back = converted("pth", made, tmp_path / f"from_{to}", world)
            ours, theirs = (torch.load(path) for path in (weights, back / weights.name))
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
            capsys.readouterr()
            eval_vlm.main(["--weights", str(back / weights.name), *ask])
            assert capsys.readouterr().out.splitlines()[-1] == answer


@pytest.mark.slow
@APART
def test_a_process_that_cannot_see_the_repo_loads_it(flags, kind, to, world, tmp_path, capsys):
    train_sft_vlm.main(flags(kind, "--from_weight", "none"))
    made = converted(to, tmp_path / "out/sft_vlm_64.pth", tmp_path / to, world)
    assert "3 questions, tokens and pixels as ours, logits within" in capsys.readouterr().out
    assert (made / "config.json").is_file()


@pytest.mark.slow
@needs_other
@APART
def test_another_version_of_transformers_loads_it(flags, kind, to, world, tmp_path, monkeypatch):
    train_sft_vlm.main(flags(kind, "--from_weight", "none"))
    lines, check = [], convert_vlm.check_folder
    monkeypatch.setattr(convert_vlm, "check_folder", lambda made, ours: lines.append(check(made, ours, OTHER)))
    converted(to, tmp_path / "out/sft_vlm_64.pth", tmp_path / to, world)
    assert lines[0].startswith("Transformers 4.57.6: 3 questions, tokens and pixels as ours, logits within")


def test_weights_without_json_are_not_given_another_family_of_the_same_shape(flags, folders, tmp_path):
    train_sft_vlm.main(flags("clip", "--from_weight", "none"))
    path = tmp_path / "out/sft_vlm_64.pth"
    with pytest.raises(ValueError, match="siglip is not the encoder of .*sft_vlm_64.pth, which is .*clip"):
        build_model(train_sft_vlm.parse_args(flags("siglip")), path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="siglip contains a SigLIP, but the model was trained with a CLIP: pass its"):
        build_model(train_sft_vlm.parse_args(flags("siglip")), path)


# ---------------------------------------------------------------------------- a picture in fewer tokens


def test_neighbouring_patches_are_merged_block_by_block():
    features = torch.arange(2 * 16 * 3.0).view(2, 16, 3)
    merged = VisionProj(3, 5, S=2).merge(features)
    assert merged.shape == (2, 4, 12)
    for row in range(2):
        for column in range(2):
            first = 2 * row * 4 + 2 * column
            block = features[:, [first, first + 1, first + 4, first + 5]].flatten(1)
            assert torch.equal(merged[:, 2 * row + column], block)
    registered = torch.cat([torch.full((2, 4, 3), -1.0), features], dim=1)
    assert torch.equal(VisionProj(3, 5, S=2).merge(registered), merged)


@pytest.mark.parametrize("kind", ["clip", "dinov3_vit"])
def test_a_model_of_fewer_image_tokens_learns_answers_and_is_exported(
    flags, kind, world, tmp_path, monkeypatch, capsys
):
    train_pretrain_vlm.main(flags(kind, "--from_weight", "none", "--image_tokens", "4"))
    more = ["--cache_features", str(tmp_path / "features")]
    train_sft_vlm.main(flags(kind, *more))  # read from the projector of stage 1
    weights = tmp_path / "out/sft_vlm_64.pth"
    sidecar = json.loads(weights.with_suffix(".json").read_text())
    assert sidecar["config"]["spatial_merge_size"] == 2 and sidecar["config"]["image_special_token"] == "@@@@"
    assert torch.load(weights)["vision_proj.vision_proj.0.weight"].shape == (64, 128)
    made = converted("transformers", weights, tmp_path / "made", world)
    assert "tokens and pixels as ours" in capsys.readouterr().out
    assert read_sidecar(made)["config"]["spatial_merge_size"] == 2  # by which inspect_data counts tokens
    back = converted("pth", made, tmp_path / "back", world)
    ask = ["--image", str(world / "pictures/red.png"), "--max_new_tokens", "8", "--device", "cpu", "--greedy"]
    answers = []
    for path in (weights, made, back / weights.name):
        capsys.readouterr()
        eval_vlm.main(["--weights", str(path), "--load", str(int(path == made)), *ask])
        answers.append(capsys.readouterr().out.splitlines()[-1])
    assert len(set(answers)) == 1
    look = [str(world / "rows.jsonl"), "--images_path", str(world / "pictures"), "--from_weight", str(weights)]
    inspect_data.main([*look, "--html", str(tmp_path / "rows.html")])
    assert "@×4<" in (tmp_path / "rows.html").read_text()
    with pytest.raises(ValueError, match="a stock LLaVA does not merge patches .*\nUse --to transformers"):
        converted("llava", weights, tmp_path / "no", world)
    if kind != "clip":  # without JSON weights are taken for public ones
        return
    weights.with_suffix(".json").unlink()  # shapes suffice
    model, _, _ = build_model(train_sft_vlm.parse_args(flags(kind)), weights)
    assert (model.config.spatial_merge_size, len(model.config.image_ids)) == (2, 4)


def test_tokens_that_patches_do_not_merge_into_are_refused_with_those_that_they_do(flags, tmp_path):
    with pytest.raises(
        ValueError, match=r"--image_tokens 5: .*clip gives 4 x 4 patches, which can become\n4, 16 tokens"
    ):
        train_pretrain_vlm.main(flags("clip", "--from_weight", "none", "--image_tokens", "5"))
    train_pretrain_vlm.main(flags("clip", "--from_weight", "none"))
    with pytest.raises(ValueError, match="--image_tokens 4: .*pretrain_vlm_64.pth makes 16 tokens"):
        train_sft_vlm.main(flags("clip", "--image_tokens", "4"))
