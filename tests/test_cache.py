import pytest
import torch
from torch import nn
from transformers import DynamicCache

from model.cache import ROOM, growing_cache
from model.packed import PackedLinear, pack
from tests.conftest import lively
from tests.test_model_minimind import decoder, tokens

packs = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@packs
@pytest.mark.parametrize("rows", [0, 1, 5, 300])
def test_a_packed_layer_gives_what_the_layer_gave(rows):
    torch.manual_seed(0)
    for linear in (nn.Linear(64, 48), nn.Linear(48, 200, bias=False)):
        x = torch.randn(rows, 3, linear.in_features)
        torch.testing.assert_close(PackedLinear(linear, torch.float32)(x), linear(x), atol=1e-5, rtol=1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            out = PackedLinear(linear, torch.bfloat16)(x)
            torch.testing.assert_close(out, linear(x), atol=0.02, rtol=0.02)  # the dtype too


@packs
@pytest.mark.parametrize("use_moe", [False, True])
def test_a_packed_decoder_gives_the_same_logits(use_moe):
    model, ids = lively(decoder(use_moe=use_moe)), tokens(2, 30)
    exact = model(ids).logits
    assert pack(model, torch.float32) is model
    assert not [name for name, part in model.named_modules() if type(part) is nn.Linear]
    torch.testing.assert_close(model(ids).logits, exact, atol=1e-5, rtol=1e-5)


def test_nothing_is_packed_where_there_is_no_onednn(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert isinstance(pack(decoder(), torch.float32).lm_head, nn.Linear)
    assert isinstance(pack(decoder().to("meta"), torch.float32).lm_head, nn.Linear)


def test_a_growing_cache_holds_what_a_dynamic_one_holds_and_writes_in_place():
    torch.manual_seed(0)
    ours, theirs, moved = growing_cache(), DynamicCache(), set()
    for T in (40, *[1] * (ROOM + 10), 3):
        k, v = torch.randn(2, 2, 2, T, 8)
        for layer in range(2):
            kept = ours.update(k, v + layer, layer)
            for ours_, theirs_ in zip(kept, theirs.update(k, v + layer, layer)):
                torch.testing.assert_close(ours_, theirs_, atol=0, rtol=0)
            moved.add(kept[0].data_ptr())
        assert ours.get_seq_length() == theirs.get_seq_length()
    assert len(moved) == 4  # two layers that moved once
    for cache in (ours, theirs):
        cache.reorder_cache(torch.tensor([1, 1]))
    k, v = torch.randn(2, 2, 2, 1, 8)
    for ours_, theirs_ in zip(ours.update(k, v, 1), theirs.update(k, v, 1)):
        torch.testing.assert_close(ours_, theirs_, atol=0, rtol=0)


def test_answers_are_those_of_the_model_as_it_was():
    model, ids = lively(decoder()), tokens(3, 12)
    how = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    mask[1, :5] = 0  # a shorter prompt
    exact = model.generate(ids, attention_mask=mask, **how)
    pack(model, torch.float32)
    torch.testing.assert_close(model.generate(ids, attention_mask=mask, past_key_values=growing_cache(), **how), exact)
