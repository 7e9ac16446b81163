"""scripts.train_clip --kind siglip: the sigmoid loss, and a folder that is an ordinary SigLIP's."""

import json
import math

import pytest
import torch
from transformers import SiglipImageProcessor, SiglipModel, SiglipVisionModel

from model.model_vlm import MiniMindVLM
from model.processing import ImageProcessor, load_tokenizer
from scripts.train_clip import __main__ as train_clip
from scripts.train_clip.captions import encode_captions
from scripts.train_clip.towers import build_model
from tests.test_model_minimind import needs_other, other_transformers
from tests.test_train_clip import flags, pictures, world  # noqa: F401 (a fixture)


def siglip(world, out_dir, *more):  # noqa: F811
    return flags(world, out_dir, "--kind", "siglip", "--projection_dim", "64", *more)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):  # noqa: F811
    """The folder after training, and the model that was in memory when it was saved."""
    folder, kept, original = tmp_path_factory.mktemp("siglip") / "siglip", [], train_clip.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_clip, "save", lambda model, *rest: (kept.append(model), original(model, *rest)))
        train_clip.main(siglip(world, folder, "--epochs", "60", "--val_interval", "1000", "--min_scale", "0.9"))
    return folder, kept[-1].eval()


@pytest.fixture(scope="module")
def seeing(world, tmp_path_factory):  # noqa: F811
    """The folder after two steps with --vision_only, the best patch and half of the patches."""
    folder = tmp_path_factory.mktemp("siglip") / "vision"
    more = ["--vision_only", "--epochs", "2", "--patch_pool", "max", "--mask_ratio", "0.5"]
    train_clip.main(siglip(world, folder, *more, "--muon_learning_rate", "0.005"))
    return folder


@pytest.mark.parametrize("P", [1, 3])
def test_the_loss_asks_of_each_pair_whether_it_is_one(P):
    torch.manual_seed(3)
    unit = torch.nn.functional.normalize(torch.randn(4, P + 1, 8), dim=-1)
    pictures, texts, right = unit[:, :P], unit[:, P], torch.eye(4, dtype=torch.bool)
    right[0, 2] = right[3, 1] = True  # a caption of two pictures, a picture with two captions
    loss, _ = train_clip.contrastive_loss(pictures, texts, right, 4.0, -2.0)
    by_hand = 0.0
    for i in range(4):
        for j in range(4):
            fit = 4.0 * max(float(each @ texts[j]) for each in pictures[i]) - 2.0
            by_hand -= math.log(1 / (1 + math.exp(-fit if right[i, j] else fit)))
    assert loss.item() == pytest.approx(by_hand / 4, rel=1e-5)


def test_it_starts_as_the_paper_says_and_its_loss_is_that_of_transformers(world):  # noqa: F811
    args = train_clip.parse_args(siglip(world, "nowhere"))
    torch.manual_seed(0)
    model = build_model(train_clip.build_config(args, 320)).eval()
    assert model.logit_scale.item() == pytest.approx(math.log(10)) and model.logit_bias.item() == -10
    ids, pixels = torch.randint(1, 320, (4, 24)), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels, return_loss=True).loss
        whole, texts = train_clip.encode_pictures(model, pixels)[0], train_clip.encode_texts(model, ids)
        eye = torch.eye(4, dtype=torch.bool)
        loss, _ = train_clip.contrastive_loss(whole, texts, eye, model.logit_scale.exp(), model.logit_bias)
    torch.testing.assert_close(loss, expected)


def test_a_patch_alone_says_what_a_picture_of_it_alone_would(world):  # noqa: F811
    """So that a patch and a caption meet in the space in which pictures and captions do."""
    args = train_clip.parse_args(siglip(world, "nowhere", "--image_size", "16"))
    model = build_model(train_clip.build_config(args, 320))
    whole, patches = train_clip.encode_pictures(model, torch.randn(3, 3, 16, 16), "max")
    assert whole.shape == patches.shape == (3, 1, 64)
    torch.testing.assert_close(whole, patches)


def test_every_patch_learns_and_masking_leaves_out_some(trained, world):  # noqa: F811
    _, model = trained
    pixels = ImageProcessor(32, (32, 32))(pictures(world))["pixel_values"]
    embedded = []
    hook = model.vision_model.encoder.register_forward_hook(
        lambda module, given, kwargs, out: embedded.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    for pool, ratio, kept, given in (("max", 0.0, 4, 4), ("max", 0.5, 2, 2), ("mean", 0.5, 2, 1)):
        for half in (0, 1):
            found = train_clip.encode_pictures(model, pixels, pool, ratio)
            assert (found[0].shape, found[1].shape) == ((8, 1, 64), (8, given, 64))
            embedded[-1].retain_grad()
            found[half].sum().backward()
            assert embedded[-1].grad.shape[1] == kept and (embedded[-1].grad.abs().amax(dim=-1) > 0).all()
    hook.remove()


def test_it_learns_to_tell_colours_apart(trained):
    metrics = json.loads((trained[0] / "metrics.json").read_text(encoding="utf-8"))
    (figures,) = metrics["retrieval"].values()
    for way in ("image_to_text", "text_to_image"):
        assert figures[f"{way}_recall@1"] >= 37.5  # chance is 12.5; colours alone, without sides, give 50


def test_the_whole_folder_loads_and_scores_like_the_trained_model(trained, world):  # noqa: F811
    folder, model = trained
    loaded, info = SiglipModel.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ids = encode_captions(load_tokenizer(world / "tokenizer"), ["There is red on the left.", "green"], 24)
    pixels = ImageProcessor.from_pretrained(folder)(pictures(world))["pixel_values"]
    with torch.no_grad():
        scores = loaded.eval()(input_ids=ids, pixel_values=pixels).logits_per_image
        ours = train_clip.encode_pictures(model, pixels)[0][:, 0] @ train_clip.encode_texts(model, ids).T
    torch.testing.assert_close(scores, ours * model.logit_scale.exp() + model.logit_bias, rtol=0, atol=1e-4)


def test_the_picture_half_loads_everywhere_with_the_same_features(seeing, world):  # noqa: F811
    config = json.loads((seeing / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "siglip_vision_model" and "text_config" not in config
    stock, info = SiglipVisionModel.from_pretrained(seeing, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tower, processor = MiniMindVLM.get_vision_model(seeing)
    pixels = processor(pictures(world))["pixel_values"]
    features = MiniMindVLM.get_image_embeddings(pixels, tower)
    assert features.shape == (8, 4, 64)  # (32 / 16)² patches and nothing else
    with torch.no_grad():
        expected = stock.eval()(pixels, output_hidden_states=True).hidden_states[-1]  # before the last norm
    assert torch.equal(features, expected)


def test_pictures_are_prepared_as_siglips_own_processor_does(seeing, world):  # noqa: F811
    written = json.loads((seeing / "preprocessor_config.json").read_text(encoding="utf-8"))
    assert written.keys() == SiglipImageProcessor().to_dict().keys()
    assert written["image_mean"] == written["image_std"] == [0.5] * 3
    own = SiglipImageProcessor.from_pretrained(seeing)
    wide = [image.resize((60, 40)) for image in pictures(world)]  # squashed, not cropped
    expected = own(wide, return_tensors="pt")["pixel_values"]
    ours = ImageProcessor.from_pretrained(seeing)(wide)["pixel_values"]
    assert (ours - expected).abs().max() <= 2 / 255 + 1e-6
    assert train_clip.build_processor("siglip", 32).to_dict() == ImageProcessor.from_pretrained(seeing).to_dict()


@needs_other
def test_the_folders_load_on_the_other_transformers(trained, seeing):
    other_transformers(
        "-c",
        "from transformers import SiglipModel as Whole, SiglipVisionModel as Half\n"
        f"for kind, folder in ((Whole, {str(trained[0])!r}), (Half, {str(seeing)!r}), (Half, {str(trained[0])!r})):\n"
        "    info = kind.from_pretrained(folder, output_loading_info=True)[1]\n"
        "    assert not info['missing_keys'] and not info['mismatched_keys'], info\n",
    )


def test_a_shared_space_of_another_width_is_refused(world, tmp_path):  # noqa: F811
    message = "--projection_dim 32: for SigLIP it is the width of the picture encoder: use --projection_dim 64"
    with pytest.raises(ValueError, match=message):
        train_clip.main(siglip(world, tmp_path / "siglip", "--projection_dim", "32"))
