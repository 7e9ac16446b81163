"""trainer/optimizer.py: what learns, with which decay, and how fast at which step."""

import math

import pytest
import torch

import train_pretrain_vlm
import train_sft_vlm
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from scripts import train_llm
from trainer import optimizer
from trainer.optimizer import (
    choose_trainable,
    follow_width,
    make_optimizer,
    orthogonalize,
    orthogonalize_on_all_ranks,
    schedule,
    set_learning_rate,
)

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
    "first_last_layer": block(0) | block(1),
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


def test_the_first_and_the_last_layer_are_not_those_between(make_vlm):
    model = make_vlm(num_hidden_layers=4)
    choose_trainable(model, "first_last_layer")
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learning == PROJECTOR | block(0) | block(3)


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
    groups = {names[weight]: group for group in optimizer.param_groups for weight in group["params"]}
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(groups)
    assert set(groups) == PROJECTOR | LEARNS[choice]
    for name, group in groups.items():
        plain = "norm" in name or name.endswith("bias")
        assert group["weight_decay"] == (0.0 if plain else 0.2), name
        assert group["peak"] == (1e-3 if name in PROJECTOR else 1e-4), name


FITTING = {  # stage, width: optimizer, rate, projector's rate, rows a batch
    ("sft_vlm", 64): ("muon", 3e-3, 2e-3, 16),
    ("sft_vlm", 128): ("muon", 3e-3, 2e-3, 16),
    ("sft_vlm", 256): ("muon", 1.5e-3, 1e-3, 16),
    ("sft_vlm", 384): ("muon", 1e-3, 6.7e-4, 16),
    ("sft_vlm", 512): ("adamw", 2e-4, 2e-4, 32),
    ("sft_vlm", 768): ("adamw", 2e-4, 2e-4, 32),
    ("pretrain_vlm", 128): ("muon", 2e-3, 4e-3, 16),
    ("pretrain_vlm", 512): ("adamw", 4e-4, 1e-3, 32),
    ("llm", 128): ("muon", 4e-3, None, 16),
    ("llm", 512): ("adamw", 1e-3, None, 32),
}


def settings_of(stage, width, *flags, choice="all"):
    """What a stage's flags come to for a model so wide, as (optimizer, rate, projector's rate, rows a batch)."""
    with torch.device("meta"):  # no memory
        model = MiniMindForCausalLM(MiniMindConfig(hidden_size=width, num_hidden_layers=1))
    choose_trainable(model, choice)
    args = {module.STAGE: module for module in (train_llm, train_pretrain_vlm, train_sft_vlm)}[stage].parse_args(flags)
    follow_width(args, model, stage)
    return args.optimizer, args.learning_rate, getattr(args, "projector_learning_rate", None), args.batch_size


@pytest.mark.parametrize("stage, width", FITTING)
def test_optimizer_rates_and_batch_follow_from_the_width(stage, width, capsys):
    optimizer, rate, projector, rows = FITTING[stage, width]
    assert settings_of(stage, width) == FITTING[stage, width]
    flags = f"--optimizer {optimizer} --learning_rate {rate} "
    flags += f"--projector_learning_rate {projector} " if projector else ""
    assert capsys.readouterr().out == f"settings for hidden_size {width}: {flags}--batch_size {rows}\n"


def test_what_was_given_stays_and_is_not_told_again(capsys):
    given = ["--optimizer", "muon", "--learning_rate", "1e-5", "--batch_size", "7"]
    assert settings_of("sft_vlm", 512, *given) == ("muon", 1e-5, 2e-4, 7)
    assert capsys.readouterr().out == "settings for hidden_size 512: --projector_learning_rate 0.0002\n"
    assert settings_of("sft_vlm", 128, *given, "--projector_learning_rate", "1") == ("muon", 1e-5, 1, 7)
    assert capsys.readouterr().out == ""


def test_adamw_has_a_rate_of_its_own_and_serves_where_no_block_learns():
    assert settings_of("sft_vlm", 128, "--optimizer", "adamw")[:2] == ("adamw", 1e-3)
    assert settings_of("sft_vlm", 128, choice="projector") == ("adamw", 1e-3, 2e-3, 16)


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine_to_a_tenth():
    shares = [schedule(step, total=1000, warmup=100) for step in range(1000)]
    assert shares[:100] == pytest.approx([(step + 1) / 100 for step in range(100)])
    assert shares[100] == max(shares) == 1
    assert shares[550] == pytest.approx(0.55)  # half way down
    assert shares[325] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert 0.1 < shares[-1] < 0.1001
    assert all(a > b for a, b in zip(shares[100:], shares[101:]))


def test_the_learning_rate_falls_linearly_to_zero():
    shares = [schedule(step, total=1000, warmup=100, shape="linear") for step in range(1000)]
    assert shares[:101] == pytest.approx([*((step + 1) / 100 for step in range(100)), 1])
    assert shares[100:] == pytest.approx([(1000 - step) / 900 for step in range(100, 1000)])


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


def test_embeddings_have_their_own_rate_if_there_is_one(make_vlm):
    model = make_vlm()
    for rate, expected in ((None, 1e-4), (5e-3, 5e-3)):
        optimizer = make_optimizer(model, 1e-4, 1e-3, 0.1, embedding_learning_rate=rate)
        names = {weight: name for name, weight in model.named_parameters()}
        peaks = {names[weight]: group["peak"] for group in optimizer.param_groups for weight in group["params"]}
        assert peaks.pop("model.embed_tokens.weight") == expected
        assert set(peaks.values()) == {1e-4, 1e-3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_makes_all_directions_about_equally_long(dtype):
    for rows, columns in ((16, 16), (8, 40), (40, 8)):
        matrices = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))
        result = orthogonalize(matrices, dtype)
        assert result.shape == matrices.shape and result.dtype == torch.float32
        singular = torch.linalg.svdvals(result)
        assert singular.min() > 0.5 and singular.max() < 1.3
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(result.flatten(1), (u @ v).flatten(1)).min() > 0.95


@pytest.mark.parametrize("count", [1, 3, 4])
def test_ranks_share_the_matrices_and_all_get_all(monkeypatch, count):
    matrices = torch.randn(count, 8, 12, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(optimizer, "world_size", lambda: 2)
    sent = []
    monkeypatch.setattr(optimizer.dist, "all_gather", lambda places, mine: sent.append((places, mine)))
    for number in (0, 1):
        monkeypatch.setattr(optimizer, "rank", lambda: number)  # noqa: B023
        result = orthogonalize_on_all_ranks(matrices, torch.float32)
    places, shares = sent[1][0], [mine for _, mine in sent]
    for place, share in zip(places, shares, strict=True):
        place.copy_(share)
    torch.testing.assert_close(result, orthogonalize(matrices))
    assert {len(share) for share in shares} == {-(-count // 2)}


def test_in_a_run_in_bfloat16_muon_multiplies_in_it_too(flags, monkeypatch):
    seen = set()

    def spy(x, dtype, real=optimizer.orthogonalize):
        seen.add(dtype)
        return real(x, dtype)

    monkeypatch.setattr(optimizer, "orthogonalize", spy)
    for name, dtype in (("auto", torch.float32), ("bfloat16", torch.bfloat16)):
        seen.clear()
        train_sft_vlm.main([*flags, "--optimizer", "muon", "--dtype", name])
        assert seen == {dtype}


def test_muon_moves_the_matrices_of_the_blocks_as_far_as_adamw_would_and_all_else_as_adamw_does(make_vlm):
    def step_of(muon):
        torch.manual_seed(0)
        model = make_vlm(hidden_size=64)
        choose_trainable(model, "all")
        optimizer = make_optimizer(model, 1e-2, 1e-3, 0.0, muon=muon)
        before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
        learning = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        for weight in learning.values():
            weight.grad = torch.randn_like(weight)
        optimizer.step()
        return {name: weight.detach() - before[name] for name, weight in learning.items()}

    muon, adamw = step_of(True), step_of(False)
    assert muon.keys() == adamw.keys()
    for name, moved in muon.items():
        if ".layers." in name and moved.ndim == 2:
            assert moved.square().mean().sqrt() == pytest.approx(0.2 * 1e-2, rel=0.35), name
        else:
            torch.testing.assert_close(moved, adamw[name], rtol=1e-4, atol=1e-7)


def test_muon_goes_on_from_its_state_as_if_it_had_not_stopped(make_vlm):
    def steps(optimizer, model, seeds):
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            for group in optimizer.param_groups:
                for weight in group["params"]:
                    weight.grad = torch.randn(weight.shape, generator=generator)
            optimizer.step()

    whole, first, second = make_vlm(), make_vlm(), make_vlm()
    for model in (whole, first, second):
        model.load_state_dict(whole.state_dict())
    optimizers = [make_optimizer(model, 1e-2, 1e-3, 0.1, muon=True) for model in (whole, first, second)]
    steps(optimizers[0], whole, (1, 2, 3))
    steps(optimizers[1], first, (1, 2))
    second.load_state_dict(first.state_dict())
    optimizers[2].load_state_dict(optimizers[1].state_dict())
    steps(optimizers[2], second, (3,))
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, second.state_dict()[name]), name
