import pytest
import torch
from torch import nn

from model.int8 import Int8Linear, to_int8
from tests.conftest import lively
from tests.test_model_minimind import decoder, tokens


def test_a_layer_gives_nearly_the_same_and_for_each_token_alone():
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48, bias=False), torch.randn(2, 5, 64) * torch.tensor([1.0, 100.0]).view(2, 1, 1)
    layer = Int8Linear(linear)
    assert layer.weight.dtype == torch.int8 and not list(layer.parameters())
    out, exact = layer(x), linear(x)
    assert ((out - exact).norm(dim=-1) < 0.02 * exact.norm(dim=-1)).all()
    torch.testing.assert_close(layer(x[:1, 2:3]), out[:1, 2:3], atol=0, rtol=0)  # whatever shares the batch
    assert layer(torch.zeros(0, 64)).shape == (0, 48)  # as of an expert that no token chose
    assert layer(torch.zeros(1, 1, 64)).eq(0).all() and layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_decoder_in_int8_keeps_its_likeliest_tokens_and_its_size_shrinks(use_moe):
    model, ids = lively(decoder(use_moe=use_moe)), tokens(2, 30)
    exact = model(ids).logits
    to_int8(model)
    assert not [name for name, part in model.named_modules() if type(part) is nn.Linear]
    logits = model(ids).logits
    assert (logits.argmax(-1) == exact.argmax(-1)).float().mean() > 0.9
    assert torch.corrcoef(torch.stack([logits.flatten(), exact.flatten()]))[0, 1] > 0.99
    assert model.model.embed_tokens.weight.dtype == torch.float32


def test_it_is_refused_where_it_would_not_be_faster():
    with pytest.raises(ValueError, match="--int8 is for CPUs, but the model is on meta"):
        to_int8(decoder().to("meta"))
