"""trainer/optimizer.py: what learns, with which decay, and how fast at which step."""

import math

import pytest

from trainer.optimizer import choose_trainable, make_optimizer, schedule, set_learning_rate

PROJECTOR = {"vision_proj.vision_proj.0.weight", "vision_proj.vision_proj.0.bias"}
NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")


def layer(i, parts):
    return {f"model.layers.{i}.{part}" for part in parts}


def attention(i):
    return layer(i, [f"self_attn.{name}_proj.weight" for name in "qkvo"])


def block(i):
    return attention(i) | layer(i, [*NORMS, *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down"))])


LEARNS = {  # beside the projector, in a model of 2 layers
    "projector": set(),
    "last_layer": block(1),
    "attention": attention(0) | attention(1),
    "all": block(0) | block(1) | {"model.embed_tokens.weight", "model.norm.weight"},  # lm_head is embed_tokens
}


@pytest.mark.parametrize("choice", LEARNS)
def test_what_learns_is_exactly_what_was_chosen(make_vlm, choice):
    model = make_vlm()
    choose_trainable(model, choice)
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == PROJECTOR | LEARNS[choice]
    choose_trainable(model, "all")  # and a choice is not bound by the one before
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == PROJECTOR | LEARNS["all"]


def test_the_gate_and_the_experts_of_the_last_layer_learn_too(make_vlm):
    model = make_vlm(use_moe=True)
    choose_trainable(model, "last_layer")
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learning == PROJECTOR | {name for name, _ in model.named_parameters() if name.startswith("model.layers.1.")}
    assert "model.layers.1.mlp.gate.weight" in learning and "model.layers.1.mlp.experts.3.up_proj.weight" in learning


@pytest.mark.parametrize("choice", LEARNS)
def test_every_weight_that_learns_has_its_decay_and_its_peak(make_vlm, choice):
    model = make_vlm()
    choose_trainable(model, choice)
    optimizer = make_optimizer(model, learning_rate=1e-4, projector_learning_rate=1e-3, weight_decay=0.2)
    names = {weight: name for name, weight in model.named_parameters()}
    found = {names[weight]: group for group in optimizer.param_groups for weight in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(found)
    assert set(found) == PROJECTOR | LEARNS[choice]
    for name, group in found.items():
        plain = "norm" in name or name.endswith("bias")
        assert group["weight_decay"] == (0.0 if plain else 0.2), name
        assert group["peak"] == (1e-3 if name in PROJECTOR else 1e-4), name


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine_to_a_tenth():
    shares = [schedule(step, total=1000, warmup=100) for step in range(1000)]
    assert shares[:100] == pytest.approx([(step + 1) / 100 for step in range(100)])
    assert shares[100] == max(shares) == 1
    assert shares[550] == pytest.approx(0.55)  # half way down
    assert shares[325] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert 0.1 < shares[-1] < 0.1001
    assert all(a > b for a, b in zip(shares[100:], shares[101:]))


@pytest.mark.parametrize("total", [1, 2, 9, 10, 50])
def test_a_run_shorter_than_its_warmup_still_reaches_the_peak_and_comes_down(total):
    shares = [schedule(step, total, warmup=100) for step in range(total)]
    assert max(shares) == 1 and all(0.1 < share <= 1 for share in shares)
    assert shares.index(1) <= total // 10
    assert total < 3 or shares[-1] < 0.6


def test_each_group_keeps_its_own_peak(make_vlm):
    model = make_vlm()
    optimizer = make_optimizer(model, 1e-4, 1e-3, 0.1)
    for share in (0.25, 0.5):
        set_learning_rate(optimizer, share)
        assert {(group["peak"], group["lr"]) for group in optimizer.param_groups} == {
            (1e-3, share * 1e-3),
            (1e-4, share * 1e-4),
        }
