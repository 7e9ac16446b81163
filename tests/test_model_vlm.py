"""model/model_vlm.py: features land on their placeholders, batches equal single rows, the encoder never changes."""

import json
import os
import pickle
import shutil

import pytest
import torch
from conftest import lively
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPVisionModel, DynamicCache

from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing import ImageProcessor

P = 16  # placeholders of a picture, for the encoder of these tests
PICTURE = [34] * P
CLOSE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture
def vlm(make_vlm):
    return lively(make_vlm())


def pictures(*shape, seed=0):
    return torch.randn(*shape, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def batch(rows, side="right"):
    """Lists of tokens → input_ids and attention_mask."""
    T = max(map(len, rows))
    pad = [[0] * (T - len(row)) for row in rows]
    ids = [[*row, *fill] if side == "right" else [*fill, *row] for row, fill in zip(rows, pad)]
    mask = [[1] * len(row) + fill if side == "right" else fill + [1] * len(row) for row, fill in zip(rows, pad)]
    return torch.tensor(ids), torch.tensor(mask)


MIXED = [[5, *PICTURE, 6, 7], [8, 9, 10], [*PICTURE, *PICTURE, 11, *PICTURE, 12]]  # 1, 0 and 3 pictures


# ---------------------------------------------------------------------------- where features land


def merged_by_hand(model, ids, h, features):
    """Run by run, picture by picture, from left to right."""
    out, projected = h.clone(), iter(model.vision_proj(features))
    for b, row in enumerate(ids.tolist()):
        t = 0
        while t < len(row):
            run = 0
            while t + run < len(row) and row[t + run] == 34:
                run += 1
            for start in range(t, t + run // P * P, P):
                out[b, start : start + P] = next(projected)
            t += max(run, 1)
    assert next(projected, None) is None
    return out


@pytest.mark.parametrize(
    "rows, N",
    [
        ([[5, 6, *PICTURE, 7]], 1),
        ([[*PICTURE, 5], [5, *PICTURE]], 2),  # at either end
        ([[5, *PICTURE, *PICTURE, 6]], 2),  # trap 2: neighbours
        ([[*PICTURE * 3]], 3),
        ([[5, *PICTURE, 34, 34, 34, 6]], 1),  # 3 too many
        ([[5, *PICTURE[1:], 6, *PICTURE]], 1),  # 1 too few
        ([[34, 5, 34, 34, *[6], *PICTURE, 7, 34]], 1),  # trap 7: stray @
        (MIXED, 4),  # trap 6
    ],
)
def test_features_land_on_their_placeholders_in_reading_order_and_nowhere_else(vlm, rows, N):
    ids, _ = batch(rows)
    h, features = torch.randn(*ids.shape, 64), torch.randn(N, P, 32)
    merged = vlm.count_vision_proj(ids, h, features, ids.shape[1])
    assert torch.equal(merged, merged_by_hand(vlm, ids, h, features))
    assert (merged != h).any(dim=-1).sum() == N * P
    assert torch.equal(vlm.count_vision_proj(ids, h, features, 9), merged[:, :9])


def test_the_base_model_of_trainers_sees_too(make_vlm):
    """As TRL asks it, which computes logits and loss itself."""
    model = lively(make_vlm())
    ids = torch.tensor([[5, *model.config.image_ids, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 32, 32)}
    with torch.no_grad():
        found = model.lm_head(model.base_model(**inputs, use_cache=False).last_hidden_state)
        assert torch.equal(found, model(**inputs).logits)


@pytest.mark.parametrize("seed", range(10))
def test_features_land_right_for_any_runs_of_placeholders(vlm, seed):
    random = torch.Generator().manual_seed(seed)
    ids = torch.where(torch.rand(4, 120, generator=random) < 0.97, 34, 5)
    N = sum(len(run) // P for row in ids.tolist() for run in "".join("@" if i == 34 else " " for i in row).split())
    h, features = torch.randn(4, 120, 64), torch.randn(N, P, 32)
    assert N > 8
    assert torch.equal(vlm.count_vision_proj(ids, h, features), merged_by_hand(vlm, ids, h, features))


def test_of_two_adjacent_pictures_the_second_changes_nothing_before_it(vlm):
    ids, _ = batch([[5, *PICTURE, *PICTURE, 6]])
    both, other = pictures(1, 2), pictures(1, 2, seed=1)
    with torch.no_grad():
        logits = vlm(ids, pixel_values=both).logits
        second = vlm(ids, pixel_values=torch.stack([both[:, 0], other[:, 1]], dim=1)).logits
        first = vlm(ids, pixel_values=torch.stack([other[:, 0], both[:, 1]], dim=1)).logits
    torch.testing.assert_close(second[:, : P + 1], logits[:, : P + 1], **CLOSE)
    assert ((second - logits).abs().amax(dim=-1)[:, P + 1 :] > 0.01).all()
    torch.testing.assert_close(first[:, :1], logits[:, :1], **CLOSE)
    assert ((first - logits).abs().amax(dim=-1)[:, 1:] > 0.01).all()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("use_moe", [False, True])
def test_rows_with_no_one_and_three_pictures_are_in_a_batch_what_they_are_alone(make_vlm, side, use_moe):
    model = lively(make_vlm(use_moe=use_moe))
    ids, mask = batch(MIXED, side)
    pixels = pictures(4)
    with torch.no_grad():
        logits = model(ids, mask, pixel_values=pixels).logits
        alone = [
            model(batch([row])[0], pixel_values=own).logits[0]
            for row, own in zip(MIXED, (pixels[None, :1], None, pixels[None, 1:]))
        ]
        shuffled = model(ids, mask, pixel_values=pixels.flip(0)).logits
    for row in range(3):
        torch.testing.assert_close(logits[row][mask[row].bool()], alone[row], **CLOSE)
    assert (shuffled - logits)[0].abs().max() > 0.1  # that pictures matter


def test_all_forms_of_pixel_values_give_the_same_logits(vlm):
    ids, _ = batch([[*PICTURE, 5, *PICTURE], [*PICTURE, *PICTURE, 6]])
    bytes_ = torch.randint(0, 256, (2, 2, 3, 32, 32), dtype=torch.uint8)
    pixels = ImageProcessor(32, (32, 32)).normalize(bytes_)
    with torch.no_grad():
        expected = vlm(ids, pixel_values=pixels).logits
        for form in (pixels[:, :, None], pixels.flatten(0, 1), bytes_, bytes_[:, :, None], bytes_.flatten(0, 1)):
            torch.testing.assert_close(vlm(ids, pixel_values=form).logits, expected, **CLOSE)
        no_row_of_its_own = vlm(ids[:1], pixel_values=pixels[:1]).logits
    torch.testing.assert_close(no_row_of_its_own, expected[:1], **CLOSE)  # trap 5


ONE_AND_TWO = [[*PICTURE, 5], [*PICTURE, *PICTURE, 6]]


@pytest.mark.parametrize(
    "rows, pixels, message",
    [
        (ONE_AND_TWO, pictures(2, 1), "row 1 has placeholders for 2 pictures, pixel_values holds 1"),
        (ONE_AND_TWO, pictures(2, 2), "row 0 has placeholders for 1 pictures, pixel_values holds 2"),
        (ONE_AND_TWO, pictures(3, 1), "pixel_values has 3 rows, input_ids 2"),
        (ONE_AND_TWO, pictures(2), r"3 pictures of 16 each \(row 0: 1, row 1: 2\), pixel_values holds 2"),
        (ONE_AND_TWO, pictures(4), r"3 pictures of 16 each \(row 0: 1, row 1: 2\), pixel_values holds 4"),
        (ONE_AND_TWO, None, r"3 pictures of 16 each \(row 0: 1, row 1: 2\), pixel_values holds 0"),
        ([[5, *PICTURE[1:], 6]], pictures(1), r"0 pictures of 16 each \(no row has any\), pixel_values holds 1"),
        ([[5, 6]], pictures(1), r"0 pictures .* holds 1"),  # shorter than any picture
        ([[5, 6]], pictures(1, 1), "row 0 has placeholders for 0 pictures, pixel_values holds 1"),
    ],
)
@pytest.mark.parametrize("how", ["forward", "generate", "beams"])
def test_placeholders_without_pictures_and_pictures_without_placeholders_are_refused(vlm, rows, pixels, message, how):
    ids, mask = batch(rows, "left")
    if how == "beams" and pixels is None:  # found after the rows were repeated
        message = "6 pictures of 16 each .*, pixel_values holds 0"
    with pytest.raises(ValueError, match=message):
        if how == "forward":
            vlm(ids, mask, pixel_values=pixels)
        else:
            beams = 2 if how == "beams" else 1
            vlm.generate(ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=2, num_beams=beams)


# ---------------------------------------------------------------------------- generation


def generate(model, ids, mask, pixels, n=8, **options):
    options = {"min_new_tokens": n, "max_new_tokens": n, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=mask, pixel_values=pixels, **options)[:, ids.shape[1] :]


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}])
def test_pictures_are_encoded_once_and_live_on_in_the_cache(vlm, options):
    ids, mask = batch([[*PICTURE, 5], [6, *PICTURE, 7]], "left")
    calls = []
    vlm.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    cached = generate(vlm, ids, mask, pictures(2), **options)
    assert len(calls) == 1
    beams = {key: value for key, value in options.items() if key == "num_beams"}
    assert torch.equal(generate(vlm, ids, mask, pictures(2), use_cache=False, **beams), cached)
    assert len(calls) == 1 + 8  # without a cache once per token
    assert not torch.equal(generate(vlm, ids, mask, pictures(2, seed=1), **options), cached)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_rows_with_different_numbers_of_pictures_generate_what_they_generate_alone(vlm, options):
    ids, mask = batch(MIXED, "left")
    pixels = pictures(4)
    together = generate(vlm, ids, mask, pixels, **options)
    alone = [
        generate(vlm, *batch([row]), own, **options) for row, own in zip(MIXED, (pixels[:1], None, pixels[None, 1:]))
    ]
    assert together.tolist() == torch.cat(alone).tolist()
    assert len({tuple(row) for row in together.tolist()}) == len(together)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_loop_of_ones_own_may_pass_the_pictures_with_every_token(vlm, pairs):
    ids, _ = batch([[5, *PICTURE, 6, 7, 8, 9]])
    pixels, cache, logits, end = pictures(1), [] if pairs else DynamicCache(), [], 0
    with torch.no_grad():
        full = vlm(ids, pixel_values=pixels).logits
        for size in (18, 1, 2):
            start, end = end, end + size
            out = vlm(ids[:, start:end], past_key_values=cache, pixel_values=pixels, use_cache=True)
            logits.append(out.logits)
            cache = out.past_key_values
            if pairs:
                cache = [(layer.keys, layer.values) for layer in cache.layers]
    torch.testing.assert_close(torch.cat(logits, dim=1), full, **CLOSE)


def test_a_second_picture_may_come_when_the_cache_holds_the_first(vlm):
    ids, _ = batch([[5, *PICTURE, 6, *PICTURE, 7]])
    pixels = pictures(2)
    with torch.no_grad():
        full = vlm(ids, pixel_values=pixels).logits
        first = vlm(ids[:, :18], pixel_values=pixels[:1], use_cache=True)
        second = vlm(ids[:, 18:], pixel_values=pixels[1:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], dim=1), full, **CLOSE)


# ---------------------------------------------------------------------------- training


def trained_step(model, **pixels):
    rows = MIXED if pixels.get("pixel_values") is not None and len(pixels["pixel_values"]) else [[5, 6, 7], [8, 9]]
    ids, mask = batch(rows)
    out = model.train()(ids, mask, labels=ids.masked_fill(mask == 0, -100), **pixels)
    (out.loss + out.aux_loss).backward()
    return out


def test_the_encoder_is_frozen_in_eval_mode_and_the_same_after_an_optimizer_step(vlm):
    before = {name: weight.clone() for name, weight in vlm.state_dict().items()}
    optimizer = torch.optim.AdamW(vlm.parameters(), lr=0.1, weight_decay=0.5)
    trained_step(vlm, pixel_values=pictures(4))
    optimizer.step()
    assert vlm.training and vlm.model.layers[0].training
    assert not any(module.training for module in vlm.vision_encoder.modules())
    assert not any(weight.requires_grad or weight.grad is not None for weight in vlm.vision_encoder.parameters())
    changed = {name for name, weight in vlm.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == set(vlm.text_state_dict())
    assert {name for name in before if name not in changed} == {
        f"vision_encoder.{name}" for name in vlm.vision_encoder.state_dict()
    }


@pytest.mark.parametrize("pixels", [None, pictures(0)])
def test_training_rows_without_pictures_give_the_projector_a_gradient_of_zero(vlm, pixels):
    trained_step(vlm, pixel_values=pixels)
    assert all(weight.grad is not None and (weight.grad == 0).all() for weight in vlm.vision_proj.parameters())
    trained_step(vlm, pixel_values=pictures(4))
    assert all((weight.grad != 0).any() for weight in vlm.vision_proj.parameters())


def test_the_projector_learns_from_its_placeholders_alone(vlm):
    ids, _ = batch([[5, *PICTURE, 6, 7]])
    taken = []

    def keep(_, args):
        args[0].retain_grad()
        taken.append(args[0])

    vlm.model.register_forward_pre_hook(keep)
    vlm.train()(ids, labels=ids.masked_fill(ids == 34, -100), pixel_values=pictures(1)).loss.backward()
    (h,) = taken  # (1, T, D), what the decoder reads
    assert (h.grad[0] != 0).any(dim=-1)[:-1].all()
    torch.testing.assert_close(vlm.vision_proj.vision_proj[0].bias.grad, h.grad[0, 1 : 1 + P].sum(dim=0))


# ---------------------------------------------------------------------------- the encoder and files


def test_only_the_vision_tower_is_in_memory(vlm, clip_folder):
    whole = CLIPModel.from_pretrained(clip_folder)
    count = sum(weight.numel() for weight in whole.vision_model.parameters())
    assert sum(weight.numel() for weight in vlm.vision_encoder.parameters()) == count
    assert not any("text" in name for name, _ in vlm.named_parameters())


@pytest.fixture
def clip_copy(clip_folder, tmp_path):
    return shutil.copytree(clip_folder, tmp_path / "clip")


@pytest.mark.parametrize("kind", ["safetensors", "bin", "tower"])
def test_every_kind_of_clip_folder_gives_the_features_of_clips_own_tower(clip_folder, clip_copy, kind):
    pixels = pictures(3)
    whole = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        expected = whole.vision_model(pixel_values=pixels).last_hidden_state[:, 1:]
    if kind == "bin":  # as openai/clip-vit-base-patch16 is, buffers included
        state = load_file(clip_copy / "model.safetensors")
        state |= {f"{tower}_model.embeddings.position_ids": torch.arange(17)[None] for tower in ("text", "vision")}
        torch.save(state, clip_copy / "pytorch_model.bin")
        (clip_copy / "model.safetensors").unlink()
    elif kind == "tower":
        (clip_copy / "model.safetensors").unlink()
        CLIPVisionModel.from_pretrained(clip_folder).save_pretrained(clip_copy)
    encoder, processor = MiniMindVLM.get_vision_model(clip_copy)
    features = MiniMindVLM.get_image_embeddings(pixels.requires_grad_(), encoder)
    assert features.shape == (3, P, 32) and not features.requires_grad
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    assert not any(weight.requires_grad for weight in encoder.parameters())
    assert (processor.size, processor.crop_size) == (32, (32, 32))


def test_the_embeddings_of_a_single_picture_keep_their_batch_axis(vlm):
    one, many = pictures(1), pictures(3)
    assert vlm.get_image_embeddings(one, vlm.vision_encoder).shape == (1, P, 32)
    features = vlm.get_image_embeddings(many, vlm.vision_encoder)
    torch.testing.assert_close(vlm.get_image_embeddings(many[1:2], vlm.vision_encoder), features[1:2], **CLOSE)


def test_a_folder_that_lacks_tensors_of_the_tower_is_refused(clip_copy):
    state = load_file(clip_copy / "model.safetensors")
    gone = [name for name in state if name.startswith("vision_model.encoder.layers.1.mlp")]
    assert len(gone) == 4
    save_file({name: state[name] for name in state if name not in gone}, clip_copy / "model.safetensors")
    with pytest.raises(ValueError, match=r"clip: the weights leave 4 tensors .*encoder\.layers\.1\.mlp"):
        MiniMindVLM.get_vision_model(clip_copy)


def test_no_clip_folder_and_one_without_weights_name_the_flag(tmp_path, clip_copy):
    with pytest.raises(FileNotFoundError, match="--vision_model_path .*nowhere: no config.json there"):
        MiniMindVLM.get_vision_model(tmp_path / "nowhere")
    (clip_copy / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match="--vision_model_path .*clip: no model.safetensors or pytorch_model.bin"
    ):
        MiniMindVLM.get_vision_model(clip_copy)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_damaged_file_of_weights_is_named(clip_copy, name):
    whole = (clip_copy / "model.safetensors").read_bytes()
    (clip_copy / "model.safetensors").unlink()
    (clip_copy / name).write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="clip: the weights cannot be read, download them anew"):
        MiniMindVLM.get_vision_model(clip_copy)


def test_an_encoder_with_a_flipped_bit_or_a_nan_is_refused(clip_copy):
    state = load_file(clip_copy / "model.safetensors")
    (clip_copy / "model.safetensors").unlink()
    path = clip_copy / "pytorch_model.bin"
    torch.save(state, path)
    content, name = bytearray(path.read_bytes()), "vision_model.post_layernorm.weight"
    largest = max(state.values(), key=lambda tensor: tensor.numel()).numpy().tobytes()
    content[content.index(largest) + 2] ^= 64
    path.write_bytes(content)
    with pytest.raises(ValueError, match="clip: the weights cannot be read, download them anew .*is damaged"):
        MiniMindVLM.get_vision_model(clip_copy)
    torch.save(state | {name: state[name] * torch.nan}, path)
    with pytest.raises(ValueError, match=r"clip: \S*post_layernorm.weight holds NaN or infinite values"):
        MiniMindVLM.get_vision_model(clip_copy)


class Payload:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))])
def test_a_clip_that_would_run_code_is_refused_and_runs_nothing(clip_copy, tmp_path, write):
    victim, state = tmp_path / "it_ran", load_file(clip_copy / "model.safetensors")
    (clip_copy / "model.safetensors").unlink()
    write({"evil": Payload(f"touch {victim}"), **state}, clip_copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match="clip: the weights cannot be read, .*it would call posix.system"):
        MiniMindVLM.get_vision_model(clip_copy)
    assert not victim.exists()


@pytest.mark.parametrize("wrong", [{"image_size": 64}, {"patch_size": 4}, {"hidden_size": 64}])
def test_an_encoder_of_another_shape_than_the_models_is_refused(clip_folder, clip_copy, wrong):
    config = json.loads((clip_copy / "config.json").read_text())
    config["vision_config"] |= wrong
    (clip_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the model was made for 16 of width 32: pass its --vision_model_path"):
        MiniMindVLM(VLMConfig.for_encoder(clip_folder, hidden_size=64, num_hidden_layers=1), clip_copy)


def test_a_model_without_eyes_reads_text_and_refuses_pictures(make_vlm):
    model = MiniMindVLM(make_vlm().config, vision_model_path=None)
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 2, 300)
    with pytest.raises(ValueError, match="without a vision encoder: give vision_model_path"):
        model(torch.tensor([PICTURE]), pixel_values=pictures(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("use_moe", [False, True])
def test_a_saved_model_has_its_encoder_beside_it_and_comes_back_with_its_logits(make_vlm, tmp_path, dtype, use_moe):
    model = lively(make_vlm(use_moe=use_moe))
    model.save_pretrained(tmp_path, state_dict=None)  # as Trainer does
    saved = set(load_file(tmp_path / "model.safetensors"))
    assert saved == set(model.text_state_dict()) - {"lm_head.weight"}  # the tied half
    assert not any("vision_encoder" in name for name in saved)
    again = MiniMindVLM.from_pretrained(tmp_path, dtype=dtype)
    assert vars(again.processor) == vars(model.processor)
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    assert again.dtype == dtype and again.config.model_type == "minimind-v"
    assert again.config.image_ids == PICTURE and not again.training
    ids, mask = batch(MIXED)
    with torch.no_grad():
        expected, logits = (m(ids, mask, pixel_values=pictures(4)).logits for m in (model, again))
    assert logits.dtype == dtype
    if dtype == torch.float32:
        assert torch.equal(logits, expected)
    elif not use_moe:  # rounding may send a token to another expert
        torch.testing.assert_close(logits.float(), expected, atol=0.03 if dtype == torch.float16 else 0.3, rtol=0)


def test_weights_that_a_trainer_hands_over_are_saved_without_the_encoder(make_vlm, tmp_path):
    model = lively(make_vlm())
    model.save_pretrained(tmp_path / "all", state_dict={key: value + 1 for key, value in model.state_dict().items()})
    saved = load_file(tmp_path / "all/model.safetensors")
    assert set(saved) == set(model.text_state_dict())
    assert torch.equal(saved["model.norm.weight"], model.model.norm.weight + 1)
    model.save_pretrained(tmp_path / "rank_1", is_main_process=False)
    assert not (tmp_path / "rank_1/vision_encoder").exists()


# ---------------------------------------------------------------------------- configuration and pictures


def test_the_configuration_follows_from_the_encoder(clip_folder):
    default = VLMConfig()
    assert (default.model_type, default.image_special_token, default.image_ids) == ("minimind-v", "@" * 196, [34] * 196)
    config = VLMConfig.for_encoder(clip_folder, hidden_size=64)
    assert (config.image_special_token, config.image_ids, config.ve_hidden_size) == ("@" * 16, [34] * 16, 32)
    assert config.hidden_size == 64
    assert VLMConfig.for_encoder(clip_folder, placeholder_id=7).image_ids == [7] * 16


@pytest.mark.parametrize("ids, kinds", [([34] * 195 + [35], "196 ids of 2"), ([34] * 195, "195 ids of 1"), ([], "0")])
def test_placeholders_of_two_kinds_or_another_number_are_refused(ids, kinds):
    with pytest.raises(ValueError, match=f"got {kinds}.* kinds for 196 placeholders"):
        VLMConfig(image_ids=ids)


GREY = 100
COLOURED = {
    "RGB": (Image.new("RGB", (9, 20), (10, 20, 30)), (10, 20, 30)),
    "L": (Image.new("L", (9, 20), GREY), (GREY,) * 3),
    "LA": (Image.new("LA", (9, 20), (GREY, 255)), (GREY,) * 3),
    "RGBA": (Image.new("RGBA", (9, 20), (10, 20, 30, 255)), (10, 20, 30)),
    "transparent": (Image.new("RGBA", (9, 20), (10, 20, 30, 0)), (255,) * 3),
    "P": (Image.new("RGB", (9, 20), (10, 20, 30)).quantize(4), (10, 20, 30)),
    "CMYK": (Image.new("CMYK", (9, 20), (0, 255, 255, 0)), (255, 0, 0)),
    "1": (Image.new("1", (9, 20), 1), (255,) * 3),
    "I;16": (Image.new("I;16", (9, 20), GREY * 257), (GREY,) * 3),
    "I": (Image.new("I", (9, 20), GREY * 257), (GREY,) * 3),
    "one pixel wide": (Image.new("RGB", (1, 40), (10, 20, 30)), (10, 20, 30)),
    "one pixel high": (Image.new("RGB", (40, 1), (10, 20, 30)), (10, 20, 30)),
    "one pixel": (Image.new("RGB", (1, 1), (10, 20, 30)), (10, 20, 30)),
}


@pytest.mark.parametrize("kind", COLOURED)
def test_a_picture_of_any_mode_and_shape_becomes_a_tensor_of_its_colour(kind, clip_folder):
    image, colour = COLOURED[kind]
    processor = ImageProcessor.from_pretrained(clip_folder)
    tensor = MiniMindVLM.image2tensor(image, processor)
    assert tensor.shape == (1, 3, 32, 32) and tensor.dtype == torch.float32
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    expected = ((torch.tensor(colour) / 255 - mean) / std)[None, :, None, None]
    torch.testing.assert_close(tensor, expected.expand_as(tensor), atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------- torch.compile


def test_the_merge_compiles_to_one_graph_for_all_shapes(vlm):
    torch._dynamo.reset()
    merge = torch.compile(vlm.count_vision_proj, fullgraph=True, backend="eager")
    for rows, N in (([[5, *PICTURE, 6]], 1), (MIXED, 4), ([[*PICTURE * 2, 5]] * 2, 4)):
        ids, _ = batch(rows)
        h, features = torch.randn(*ids.shape, 64), torch.randn(N, P, 32)
        assert torch.equal(merge(ids, h, features), merged_by_hand(vlm, ids, h, features))


@pytest.mark.parametrize("masked", [False, True])
def test_the_whole_forward_compiles_to_one_graph_and_gives_the_same_logits(make_vlm, masked):
    vlm = lively(make_vlm(num_hidden_layers=1))
    torch._dynamo.reset()
    compiled = torch.compile(vlm, fullgraph=True, backend="eager")
    for rows, N in (([[5, *PICTURE, 6], [*PICTURE, 7, 8]], 2), (MIXED, 4)):
        ids, mask = batch(rows)
        mask = mask if masked else None
        with torch.no_grad():
            expected = vlm(ids, mask, pixel_values=pictures(N)).logits
            torch.testing.assert_close(compiled(ids, mask, pixel_values=pictures(N)).logits, expected, **CLOSE)
