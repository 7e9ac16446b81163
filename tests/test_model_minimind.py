"""model/model_minimind.py: the decoder against independent references, alone and inside Transformers' generate()."""

import os
import subprocess
import sys
from inspect import signature
from pathlib import Path
from threading import Thread

import pytest
import torch
import transformers
from conftest import lively
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache, TextIteratorStreamer

from model.feed_forward import MOEFeedForward
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, RMSNorm
from model.model_vlm import MiniMindVLM, VLMConfig
from trainer.acceleration import attention_in_blocks

OTHER = os.environ.get("MINIMIND_OTHER_TRANSFORMERS")  # a folder with another Transformers, for PYTHONPATH
CLOSE = {"atol": 1e-4, "rtol": 0}  # logits here are about ±10


def decoder(seed=0, **kwargs):
    small = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 100, "max_position_embeddings": 128}
    return lively(MiniMindForCausalLM(MiniMindConfig(**(small | kwargs))), seed).eval()


def llama_of(model, **more):
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    same += ("vocab_size", "rms_norm_eps", "rope_theta", "max_position_embeddings", "hidden_act")
    config = {name: getattr(model.config, name) for name in same} | {"tie_word_embeddings": True}
    llama = LlamaForCausalLM(LlamaConfig(**config, **more)).eval()
    llama.load_state_dict(model.state_dict())
    return llama


def tokens(*shape, seed=0, vocab_size=100):
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows, side):
    """Rows of different lengths as one batch: input_ids and attention_mask."""
    T = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), T, dtype=torch.int64), torch.zeros(len(rows), T, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def other_transformers(*command):
    """Runs Python with the other Transformers in front of the installed one."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(Path(OTHER).resolve()), str(root), str(root / "tests")])
    env = {key: value for key, value in os.environ.items() if key != "MINIMIND_OTHER_TRANSFORMERS"}
    run = subprocess.run(
        [sys.executable, *command], cwd=root, env=env | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


needs_other = pytest.mark.skipif(
    OTHER is None, reason="MINIMIND_OTHER_TRANSFORMERS names no folder with another version"
)


# ---------------------------------------------------------------------------- the contract


def test_the_configuration_has_the_fields_and_defaults_that_users_know():
    defaults = {
        "dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 512,
        "intermediate_size": None,
        "max_position_embeddings": 32768,
        "num_attention_heads": 8,
        "num_hidden_layers": 8,
        "num_key_value_heads": 2,
        "vocab_size": 6400,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "flash_attn": True,
        "use_moe": False,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "scoring_func": "softmax",
        "aux_loss_alpha": 0.1,
        "seq_aux": True,
        "norm_topk_prob": True,
        "norm_top1_prob": False,
        "head_dim": None,
        "qk_norm": False,
        "norm_in_fp32": False,
    }
    given = {name: p.default for name, p in signature(MiniMindConfig).parameters.items() if name != "kwargs"}
    assert given == defaults
    config = MiniMindConfig()
    assert {name: getattr(config, name) for name in defaults} == defaults | {"intermediate_size": 1408}
    assert (config.model_type, config.tie_word_embeddings, config.pad_token_id) == ("minimind", True, 0)
    assert MiniMindConfig(hidden_size=768).intermediate_size == 2048
    assert MiniMindConfig(intermediate_size=100).intermediate_size == 100


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"hidden_size": 100}, "hidden_size=100 must be a multiple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
        ({"hidden_size": 72}, "width of a head, 72/8, must be even"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        MiniMindConfig(**wrong)


@pytest.mark.parametrize("use_moe", [False, True])
def test_weights_have_the_public_names_and_shapes(use_moe):
    layers = 2
    model = MiniMindVLM(VLMConfig(num_hidden_layers=layers, use_moe=use_moe), vision_model_path=None)
    expected = {
        "model.embed_tokens.weight": (6400, 512),
        "lm_head.weight": (6400, 512),
        "model.norm.weight": (512,),
        "vision_proj.vision_proj.0.weight": (512, 768),
        "vision_proj.vision_proj.0.bias": (512,),
    }
    for i in range(layers):
        block = f"model.layers.{i}."
        attention = {"q_proj": (512, 512), "k_proj": (128, 512), "v_proj": (128, 512), "o_proj": (512, 512)}
        expected |= {f"{block}self_attn.{name}.weight": shape for name, shape in attention.items()}
        expected |= {f"{block}{name}_layernorm.weight": (512,) for name in ("input", "post_attention")}
        swiglu = {"gate_proj": (1408, 512), "up_proj": (1408, 512), "down_proj": (512, 1408)}
        owners = [*(f"mlp.experts.{e}" for e in range(4)), "mlp.shared_experts.0"] if use_moe else ["mlp"]
        expected |= {f"{block}{owner}.{name}.weight": shape for owner in owners for name, shape in swiglu.items()}
        if use_moe:
            expected[f"{block}mlp.gate.weight"] = (4, 512)
    assert {name: tuple(weight.shape) for name, weight in model.state_dict().items()} == expected


def test_the_26m_model_has_26_224m_parameters():
    model = MiniMindVLM(VLMConfig(), vision_model_path=None)
    assert sum(weight.numel() for weight in model.vision_proj.parameters()) == 393_728
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6, 3) == 26.224


# ---------------------------------------------------------------------------- against references


@pytest.mark.parametrize(
    "seed, shape",
    [
        (0, {}),
        (1, {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 3}),
        (2, {"hidden_size": 128, "num_key_value_heads": 1, "intermediate_size": 50, "rope_theta": 1e4}),
        (3, {"hidden_size": 512, "rms_norm_eps": 1e-2}),
    ],
)
def test_the_dense_decoder_equals_llama_with_the_same_weights(seed, shape):
    model = decoder(seed, **shape)
    llama = llama_of(model)
    ids = tokens(2, 100, seed=seed)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, llama(ids).logits, **CLOSE)


def test_attentions_and_hidden_states_are_returned_as_llama_returns_them():
    model, ids = decoder(num_hidden_layers=3), tokens(2, 9)
    llama = llama_of(model, attn_implementation="eager")
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    asked = {"output_attentions": True, "output_hidden_states": True}
    ours, theirs = (one(ids, attention_mask=mask, **asked) for one in (model, llama))
    for kind, count in (("attentions", 3), ("hidden_states", 4)):
        found, expected = getattr(ours, kind), getattr(theirs, kind)
        assert len(found) == len(expected) == count
        for one, other in zip(found, expected):
            torch.testing.assert_close(one[0], other[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(one[1][..., 4:, :], other[1][..., 4:, :], atol=1e-5, rtol=1e-4)  # no padding
    assert model(ids).attentions is None and model(ids).hidden_states is None

    how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    out = model.generate(ids, **how, **asked, return_dict_in_generate=True)
    assert [step[0].shape[-2:] for step in out.attentions] == [(9, 9), (1, 10), (1, 11)]


def test_rms_norm_divides_in_fp32_and_scales_in_the_dtype_of_its_input():
    norm = RMSNorm(64)
    with torch.no_grad():
        norm.weight.normal_()
    x = torch.randn(5, 64) * 300  # its square leaves the range of fp16
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        half = x.to(dtype)
        exact = half.double() / (half.double() ** 2).mean(-1, keepdim=True).add(1e-5).sqrt()
        y = norm.to(dtype)(half)
        assert y.dtype == dtype
        torch.testing.assert_close(y, exact.to(dtype) * norm.weight, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def swiglu(expert, x):
    up, gate = expert.up_proj.weight @ x, expert.gate_proj.weight @ x
    return expert.down_proj.weight @ (gate * torch.sigmoid(gate) * up)


def ranking(moe, x, k):
    """Softmax scores of all experts for one token, and the k best."""
    scores = (moe.gate.weight @ x).softmax(dim=0)
    return scores, sorted(range(len(scores)), key=lambda e: -scores[e].item())[:k]


def dense_loop(moe, x, config):
    """The mixture token by token, expert by expert."""
    out = []
    for token in x.flatten(0, 1):
        scores, best = ranking(moe, token, config.num_experts_per_tok)
        total = sum(scores[e] for e in best) if config.norm_topk_prob and len(best) > 1 else 1.0
        routed = sum(scores[e] / total * swiglu(moe.experts[e], token) for e in best)
        out.append(routed + sum(swiglu(expert, token) for expert in moe.shared_experts))
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 1, "n_shared_experts": 0},
        {"num_experts_per_tok": 3, "n_routed_experts": 5, "n_shared_experts": 2},
    ],
)
def test_the_mixture_of_experts_equals_a_loop_over_tokens_and_so_do_its_gradients(shape):
    config = MiniMindConfig(hidden_size=64, intermediate_size=48, use_moe=True, **shape)
    moe = lively(MOEFeedForward(config)).eval()
    x, probe = torch.randn(2, 2, 7, 64).unbind()
    x.requires_grad_()
    wanted = [x, *moe.parameters()]
    y, expected = moe(x)[0], dense_loop(moe, x, config)
    torch.testing.assert_close(y, expected, **CLOSE)
    grads = torch.autograd.grad((y * probe).sum(), wanted)
    reference = torch.autograd.grad((expected * probe).sum(), wanted, allow_unused=True, materialize_grads=True)
    for grad, other in zip(grads, reference):
        torch.testing.assert_close(grad, other, atol=1e-3, rtol=1e-4)  # sums over tokens, up to ±100


@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize("lengths", [(9, 9, 9), (9, 4, 1)])
def test_the_auxiliary_loss_is_the_formula_and_leaves_padding_out(seq_aux, lengths):
    config = MiniMindConfig(hidden_size=64, intermediate_size=48, use_moe=True, seq_aux=seq_aux, aux_loss_alpha=0.3)
    moe = lively(MOEFeedForward(config)).train()
    x = torch.randn(3, 9, 64)
    valid = torch.arange(9) < torch.tensor(lengths)[:, None]
    groups = [x[b, :n] for b, n in enumerate(lengths)]
    groups = groups if seq_aux else [torch.cat(groups)]
    expected = 0.0
    for group in groups:
        picks, mean = [0] * 4, torch.zeros(4)
        for token in group:
            scores, best = ranking(moe, token, 2)
            mean = mean + scores / len(group)
            for e in best:
                picks[e] += 1
        expected += sum(picks[e] / (2 * len(group)) * 4 * mean[e] for e in range(4)) * 0.3 / len(groups)
    aux_loss = moe(x, valid.long())[1]
    torch.testing.assert_close(aux_loss, expected, rtol=1e-5, atol=0)
    if min(lengths) == 9:
        assert moe(x)[1] == aux_loss


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_auxiliary_loss_of_a_padded_batch_is_the_mean_of_its_rows(side):
    model = decoder(use_moe=True).train()
    rows = [tokens(n, seed=n) for n in (12, 5, 3)]
    ids, mask = padded(rows, side)
    alone = torch.stack([model(row[None]).aux_loss for row in rows])
    torch.testing.assert_close(model(ids, mask).aux_loss, alone.mean(), atol=1e-5, rtol=0)
    assert alone.min() > 0


def test_the_auxiliary_losses_of_all_layers_are_added():
    model, layers = decoder(use_moe=True).train(), []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _, args, out: layers.append(out[1]))
    aux_loss = model(tokens(2, 8)).aux_loss
    assert len(layers) == 2 and min(layers) > 0
    torch.testing.assert_close(aux_loss, sum(layers))


def test_the_auxiliary_loss_is_a_zero_tensor_when_dense_or_not_training():
    ids = tokens(2, 8)
    for model in (decoder().train(), decoder(use_moe=True).eval(), decoder(use_moe=True, aux_loss_alpha=0.0).train()):
        aux_loss = model(ids).aux_loss
        assert aux_loss.shape == () and aux_loss.dtype == torch.float32 and aux_loss == 0


# ---------------------------------------------------------------------------- experts in training


def test_the_mixture_gives_the_same_output_in_training_and_evaluation():
    model, ids = decoder(use_moe=True), tokens(2, 9)
    assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


def test_every_weight_of_the_mixture_gets_a_gradient_and_unused_experts_get_zeros():
    model, ids = decoder(use_moe=True).train(), tokens(2, 9)
    used = [set() for _ in model.model.layers]
    for seen, layer in zip(used, model.model.layers):
        direction, zero = torch.randn(64), torch.zeros(64)
        with torch.no_grad():  # whichever way x points, expert 0 or expert 2 is ahead of 1 and 3
            layer.mlp.gate.weight.copy_(torch.stack([direction, zero, -direction, zero]))
        layer.mlp.gate.top_k = 1
        layer.mlp.gate.register_forward_hook(lambda _, args, out, seen=seen: seen.update(out[0].flatten().tolist()))
    out = model(ids, labels=ids)
    grads = gradients(model, out.loss + out.aux_loss)
    assert used == [{0, 2}, {0, 2}]
    assert set(grads) == {name for name, _ in model.named_parameters()}
    for name, grad in grads.items():
        unused = ".experts.1." in name or ".experts.3." in name
        assert bool((grad == 0).all()) == unused, name


@pytest.mark.parametrize("use_moe", [True, False])
@pytest.mark.parametrize(
    "weights, autocast", [(torch.bfloat16, None), (torch.float16, None), (torch.float32, torch.bfloat16)]
)
def test_it_trains_in_half_precision(use_moe, weights, autocast):
    model, ids = decoder(use_moe=use_moe, num_hidden_layers=1).to(weights).train(), tokens(2, 16)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
            out = model(ids, labels=ids)
            loss = out.loss + out.aux_loss
        assert out.logits.dtype == (autocast or weights)
        assert out.loss.dtype == out.aux_loss.dtype == torch.float32
        optimizer.zero_grad()
        loss.backward()
        for name, weight in model.named_parameters():
            assert weight.grad.dtype == weights and weight.grad.isfinite().all(), name
        optimizer.step()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0] - 0.5


# ---------------------------------------------------------------------------- attention, masks, cache


@pytest.mark.parametrize("mask", ["none", "left", "right", "4d"])
@pytest.mark.parametrize("chunks", [((0, 12),), ((0, 5), (5, 12)), ((0, 11), (11, 12))])
def test_attention_in_the_open_equals_the_fused_one(mask, chunks):
    ids, padding = padded([tokens(n, seed=n) for n in (12, 7)], mask)
    outputs = []
    for flash_attn in (True, False):
        model, cache, logits = decoder(flash_attn=flash_attn), DynamicCache(), []
        for start, end in chunks:
            part = {"none": None, "4d": torch.ones(end - start, end).tril(start)[None, None].bool()}
            part |= {"left": padding[:, :end], "right": padding[:, :end]}
            with torch.no_grad():
                out = model(ids[:, start:end], part[mask], past_key_values=cache)
            logits.append(out.logits)
        outputs.append(torch.cat(logits, dim=1))
    assert outputs[0].isfinite().all()
    torch.testing.assert_close(*outputs, **CLOSE)


@pytest.mark.parametrize("T", [1, 2, 7, 30])
def test_attention_in_blocks_is_that_of_pytorch(T):
    found = []
    for attention in (
        lambda q, k, v: attention_in_blocks(q, k, v, dropout=0.0),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
    ):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, heads, T, 6, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2))
        out = attention(q, k, v)
        found.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs)


def test_layers_with_attention_in_blocks_are_compiled_once_for_all_lengths():
    graphs, model = [], decoder().train()

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    expected = {T: model(tokens(2, T)).logits for T in range(10, 90, 8)}
    for layer in model.model.layers:
        layer.self_attn.kernel = attention_in_blocks
        layer.compile(dynamic=True, backend=backend)
    for T, logits in expected.items():
        torch.testing.assert_close(model(tokens(2, T)).logits, logits, rtol=1e-4, atol=1e-4)
    assert 0 < len(graphs) <= 4  # what is before the attention and what is after it


def test_attention_is_in_blocks_while_training_alone():
    calls = []
    model, ids = decoder(), tokens(2, 9)
    expected = model.train()(ids).logits
    for layer in model.model.layers:
        layer.self_attn.kernel = lambda *args: calls.append(args) or attention_in_blocks(*args)
    assert not calls
    torch.testing.assert_close(model(ids).logits, expected)
    assert len(calls) == len(model.model.layers)
    model.eval()(ids)
    assert len(calls) == len(model.model.layers)


@pytest.mark.parametrize("flash_attn", [True, False])
def test_dropout_acts_in_training_only(flash_attn):
    model, ids = decoder(dropout=0.3, flash_attn=flash_attn), tokens(2, 8)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    for layer in model.model.layers:  # the attention weights alone
        layer.self_attn.resid_dropout.p = layer.mlp.dropout.p = 0.0
    model.model.dropout.p = 0.0
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["dynamic", "static", "pairs"])
@pytest.mark.parametrize("left_padding", [False, True])
@pytest.mark.parametrize("use_moe", [False, True])
def test_logits_with_a_cache_filled_in_chunks_equal_those_of_one_pass(kind, left_padding, use_moe):
    model, ids = decoder(use_moe=use_moe), tokens(2, 16)
    mask = None
    if left_padding:
        mask = torch.ones(2, 16, dtype=torch.int64)
        mask[1, :6] = 0
    cache = StaticCache(config=model.config, max_cache_len=24) if kind == "static" else None
    logits, end = [], 0
    with torch.no_grad():
        full = model(ids, mask).logits
        for size in (5, 1, 7, 1, 2):
            start, end = end, end + size
            part = None if mask is None else mask[:, :end]
            out = model(ids[:, start:end], part, past_key_values=cache, use_cache=True)
            logits.append(out.logits)
            cache = out.past_key_values
            if kind == "pairs":
                cache = [(layer.keys, layer.values) for layer in cache.layers]
    assert kind == "pairs" or cache.get_seq_length() == 16
    torch.testing.assert_close(torch.cat(logits, dim=1)[:, 6:], full[:, 6:], **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("use_moe", [False, True])
def test_rows_of_a_padded_batch_have_the_logits_they_have_alone(side, use_moe):
    model = decoder(use_moe=use_moe)
    rows = [tokens(n, seed=n) for n in (11, 4, 1)]
    ids, mask = padded(rows, side)
    with torch.no_grad():
        logits = model(ids, mask).logits
        for i, row in enumerate(rows):
            torch.testing.assert_close(logits[i][mask[i].bool()], model(row[None]).logits[0], **CLOSE)


def test_a_mask_without_padding_is_as_good_as_none():
    model, ids = decoder(), tokens(2, 6)
    expected = model(ids, use_cache=True)
    out = model(ids, attention_mask=torch.ones_like(ids), use_cache=True)
    assert torch.equal(out.logits, expected.logits)
    next_ids, longer = tokens(2, 1), torch.ones(2, 7, dtype=torch.int64)
    alone = model(next_ids, past_key_values=expected.past_key_values)
    assert torch.equal(model(next_ids, longer, out.past_key_values).logits, alone.logits)


@pytest.mark.parametrize("cached", [0, 5])
@pytest.mark.parametrize("wrong", [-1, 1])
def test_an_attention_mask_of_the_wrong_length_is_refused(cached, wrong):
    model, ids, cache = decoder(), tokens(1, 8), None
    if cached:
        cache = model(ids[:, :cached], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=f"attention_mask covers {8 + wrong} tokens, .* hold 8"):
        model(ids[:, cached:], torch.ones(1, 8 + wrong), past_key_values=cache)


def test_more_tokens_than_positions_are_refused_also_through_the_cache():
    model, ids = decoder(max_position_embeddings=16), tokens(1, 17)
    with pytest.raises(ValueError, match="17 tokens exceed max_position_embeddings=16"):
        model(ids)
    cache = model(ids[:, :16], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="17 tokens exceed max_position_embeddings=16"):
        model(ids[:, 16:], past_key_values=cache)


# ---------------------------------------------------------------------------- logits and loss


def test_logits_to_keep_takes_a_number_or_positions():
    model, ids = decoder(), tokens(2, 8)
    full = model(ids).logits
    assert full.shape == (2, 8, 100)
    torch.testing.assert_close(model(ids, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]])


def test_the_last_feed_forward_runs_for_the_last_token_of_a_prompt_only():
    model, ids, seen = decoder(), tokens(2, 9), []
    model.model.layers[-1].mlp.register_forward_hook(lambda module, args, out: seen.append(out.numel() // 64))
    full = model(ids).logits
    out = model(ids, logits_to_keep=1, use_cache=True)
    torch.testing.assert_close(out.logits, full[:, -1:])
    shown = model(ids, logits_to_keep=1, output_hidden_states=True)  # of all tokens, as they are asked for
    assert shown.hidden_states[-1].shape == (2, 9, 64) and shown.logits.shape == (2, 1, 100)
    model(ids[:, -1:], past_key_values=out.past_key_values, logits_to_keep=1)
    assert seen == [18, 2, 18, 2]


def some_labels(ids):
    labels = ids.clone()
    labels[0, :5] = labels[1, 3:6] = -100
    return labels


@pytest.mark.parametrize("options", [{}, {"logits_to_keep": 1}, {"return_logits": False}])
def test_the_loss_is_the_mean_cross_entropy_of_the_next_labelled_token(options):
    model, ids = decoder(), tokens(2, 8)
    labels = some_labels(ids)
    log_probs = model(ids).logits.log_softmax(dim=-1)
    terms = [-log_probs[b, t - 1, labels[b, t]] for b in range(2) for t in range(1, 8) if labels[b, t] != -100]
    assert len(terms) == 3 + 4
    out = model(ids, labels=labels, **options)
    torch.testing.assert_close(out.loss, sum(terms) / len(terms), atol=1e-5, rtol=0)
    assert (out.logits is None) == ("return_logits" in options)


@pytest.mark.parametrize("use_moe", [False, True])
def test_without_logits_loss_and_gradients_are_the_same(use_moe):
    model, ids = decoder(use_moe=use_moe).train(), tokens(2, 8)
    outs = [model(ids, labels=some_labels(ids), return_logits=keep) for keep in (True, False)]
    torch.testing.assert_close(outs[0].loss, outs[1].loss)
    grads = [gradients(model, out.loss + out.aux_loss) for out in outs]
    assert set(grads[0]) == set(grads[1]) == {name for name, _ in model.named_parameters()}
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("return_logits", [True, False])
def test_a_batch_without_labels_has_loss_zero_and_zero_gradients(return_logits):  # trap 8: not 0/0
    model, ids = decoder().train(), tokens(2, 8)
    out = model(ids, labels=torch.full_like(ids, -100), return_logits=return_logits)
    assert out.loss == 0
    grads = gradients(model, out.loss)
    assert len(grads) == len(list(model.parameters()))
    assert all((grad == 0).all() for grad in grads.values())


def test_micro_batches_that_share_num_items_in_batch_add_up_to_the_loss_of_all():
    model, ids = decoder(), tokens(2, 8)
    labels = some_labels(ids)
    parts = [model(ids[b : b + 1], labels=labels[b : b + 1], num_items_in_batch=7).loss for b in range(2)]
    torch.testing.assert_close(sum(parts), model(ids, labels=labels).loss)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*deprecated")
@pytest.mark.parametrize("use_moe", [False, True])
def test_gradient_checkpointing_computes_blocks_twice_and_gradients_alike(use_moe):
    model, ids = decoder(use_moe=use_moe).train(), tokens(2, 8)
    calls, results = [], []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for expected_calls in (1, 2):
        out = model(ids, labels=ids)
        results.append(gradients(model, out.loss + out.aux_loss))
        assert len(calls) == expected_calls
        calls.clear()
        model.gradient_checkpointing_enable()
    for name, grad in results[0].items():
        torch.testing.assert_close(results[1][name], grad)


# ---------------------------------------------------------------------------- generate()


def generate(model, ids, mask=None, n=12, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, min_new_tokens=n, max_new_tokens=n, pad_token_id=0, **options)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("use_moe", [False, True])
def test_greedy_generation_equals_taking_the_best_token_again_and_again(use_moe):
    model, ids = decoder(use_moe=use_moe), tokens(1, 6)
    row = ids
    for _ in range(12):
        logits = model(row).logits[:, -1]
        logits[:, 2] = float("-inf")  # as min_new_tokens forbids the end
        row = torch.cat([row, logits.argmax(dim=-1, keepdim=True)], dim=1)
    expected = row[:, 6:]
    assert len(set(expected[0].tolist())) > 3  # no stutter that any fault would give
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, ids, do_sample=False, **options), expected), options


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_a_left_padded_batch_generates_what_its_rows_generate_alone(options):
    model = decoder()
    rows = [tokens(n, seed=n) for n in (9, 4, 1)]
    together = generate(model, *padded(rows, "left"), do_sample=False, **options)
    alone = [generate(model, row[None], do_sample=False, **options)[0] for row in rows]
    assert together.tolist() == [row.tolist() for row in alone]
    assert len({tuple(row.tolist()) for row in alone}) == 3


@pytest.mark.parametrize("width", [64, 256])
def test_a_narrow_model_starts_with_wider_matrices_and_every_one_with_words_close_together(width):
    """With 0.02 everywhere, a width of 128 takes several times the steps to look things up (docs/results)."""
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=width, num_hidden_layers=1, vocab_size=300))
    assert model.model.layers[0].self_attn.q_proj.weight.std().item() == pytest.approx(width**-0.5, rel=0.05)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_generation_ends_at_the_end_token_of_the_configuration():
    ids = tokens(1, 6)
    free = generate(decoder(), ids, do_sample=False)[0].tolist()
    model = decoder(eos_token_id=free[4])
    ended = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert ended[0, 6:].tolist() == free[: free.index(free[4]) + 1]


def test_sampling_follows_the_seed():
    model, ids = decoder(), tokens(2, 6)
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(generate(model, ids, do_sample=True, top_p=0.95, temperature=0.8))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_as_many_beams_as_words_find_the_most_likely_text():
    model, ids = decoder(8, vocab_size=12), tokens(1, 6, vocab_size=12)
    every = torch.cartesian_prod(*[torch.tensor([i for i in range(12) if i != 2])] * 3)  # 1331 texts of 3 words
    logits = model(torch.cat([ids.expand(len(every), -1), every], dim=1)).logits[:, 5:8]
    logits[..., 2] = float("-inf")
    likely = logits.log_softmax(dim=-1).gather(2, every[..., None]).sum(dim=(1, 2))
    found = generate(model, ids, n=3, num_beams=121, do_sample=False)
    assert found[0].tolist() == every[likely.argmax()].tolist()
    assert found[0].tolist() != generate(model, ids, n=3, do_sample=False)[0].tolist()


def test_text_streams_out_of_generate_while_it_runs(tokenizer):
    model, ids = decoder(vocab_size=300), tokens(1, 6)
    letters = tokenizer.convert_tokens_to_ids([*"abc", "Ġ"])
    options = {"suppress_tokens": [i for i in range(300) if i not in letters], "do_sample": False}
    expected = tokenizer.decode(generate(model, ids, n=40, **options)[0])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = Thread(target=generate, args=(model, ids), kwargs={"n": 40, "streamer": streamer, **options})
    thread.start()
    pieces = [piece for piece in streamer if piece]
    thread.join()
    assert "".join(pieces) == expected
    assert len(pieces) > 3 and len(set(expected)) > 2


# ---------------------------------------------------------------------------- on disk


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_saved_model_comes_back_with_its_logits_its_tie_and_its_positions(use_moe, dtype, tmp_path):
    model, ids = decoder(use_moe=use_moe).to(dtype), tokens(2, 50)
    model.save_pretrained(tmp_path)
    again = MiniMindForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert not again.training and again.dtype == dtype
    assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
    expected, own = ({k: v for k, v in m.config.to_dict().items() if k != "architectures"} for m in (model, again))
    for key in ("dtype", "torch_dtype", "_name_or_path", "transformers_version"):
        expected.pop(key, None), own.pop(key, None)
    assert own == expected
    # the tables are in no file: computed here once more, position by position
    frequencies = [1e6 ** (-2 * i / 8) for i in range(4)] * 2
    for table, function in ((again.model.freqs_cos, torch.cos), (again.model.freqs_sin, torch.sin)):
        angles = torch.arange(128, dtype=torch.float64)[:, None] * torch.tensor(frequencies, dtype=torch.float64)
        torch.testing.assert_close(
            table.double(), function(angles), atol=1e-3 if dtype is torch.float16 else 2e-5, rtol=0
        )
    if dtype is torch.float32:
        assert torch.equal(again(ids).logits, model(ids).logits)
    else:
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=0.05, rtol=0)


ANSWER = """
import sys, torch
from model.model_minimind import MiniMindForCausalLM
model = MiniMindForCausalLM.from_pretrained(sys.argv[1])
assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
model.save_pretrained(sys.argv[4])
"""


@needs_other
def test_a_folder_goes_to_the_other_transformers_and_back(tmp_path):
    model, ids = decoder(use_moe=True), tokens(2, 20)
    model.save_pretrained(tmp_path / "here")
    torch.save(ids, tmp_path / "ids")
    other_transformers("-c", ANSWER, *(str(tmp_path / name) for name in ("here", "ids", "logits", "there")))
    torch.testing.assert_close(torch.load(tmp_path / "logits"), model(ids).logits, **CLOSE)
    again = MiniMindForCausalLM.from_pretrained(tmp_path / "there")
    assert torch.equal(again(ids).logits, model(ids).logits)


@needs_other
def test_the_tests_of_the_model_pass_on_the_other_transformers():
    version = other_transformers("-c", "import transformers; print(transformers.__version__)").strip()
    assert version != transformers.__version__
    files = [f"tests/test_{name}.py" for name in ("model_minimind", "model_vlm", "processing", "cache")]
    print(other_transformers("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not other_transformers", *files))
