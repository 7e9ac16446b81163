"""Attention and rotary positions: the only part of the decoder in which tokens exchange information.

Shapes: B batch, T tokens of this call, S tokens seen so far (cache included), D hidden_size, H query heads,
K key/value heads, d width of a head.

Reading path, 2 of 10; next: model/feed_forward.py
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

# Relative, because these files are also copied into exported folders, which have no package `model`.
from .config import MiniMindConfig


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019). The division runs in fp32. The scaling by `weight`
    runs in x's dtype, or in fp32 with `in_fp32`."""

    def __init__(self, dim: int, eps: float = 1e-5, in_fp32: bool = False):
        super().__init__()
        self.eps, self.in_fp32 = eps, in_fp32
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * normed).type_as(x) if self.in_fp32 else self.weight * normed.type_as(x)


def precompute_freqs_cis(dim: int, end: int, theta: float):
    """Tables of RoPE (Su et al. 2021): cos and sin of position · theta^(-2i/dim), each float32 (end, dim).

    The half-split layout: entry i is paired with i + dim/2, so each of the dim/2 frequencies appears twice.
    """
    # Attention is a sum over tokens and ignores their order. RoPE rotates queries and keys by an angle that grows with
    # the position, so their product depends on the distance between two tokens. Each pair of entries rotates at its own
    # speed: fast pairs distinguish neighbours, slow pairs distinguish the start of a long text from its end.
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.outer(torch.arange(end, dtype=torch.float32), freqs).repeat(1, 2)
    return angles.cos(), angles.sin()


def apply_rotary_pos_emb(q, k, cos, sin):
    """Rotates q (B, H, T, d) and k (B, K, T, d) by their positions and returns both; cos and sin are (T, d)."""

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return rotate(q).type_as(q), rotate(k).type_as(k)


def visible_keys(attention_mask, T: int, S: int, past, device):
    """Which of S keys each of T queries may see: bool, broadcastable to (B, H, T, S).

    Query t is at position past + t. It sees the real tokens before it and always itself: a padding query that sees
    nothing would give 0/0 = NaN, and NaN keys would spoil the rest of the row through 0·NaN.
    """
    query, key = past + torch.arange(T, device=device)[:, None], torch.arange(S, device=device)
    visible = (key <= query)[None]
    if attention_mask is not None:
        padded = F.pad(attention_mask.bool(), (0, S - attention_mask.shape[1]))  # a static cache is longer
        visible = visible & padded[:, None, :] | (key == query)
    return visible[:, None]


def what_is_seen(attention_mask, T: int, S: int, past, cache, device):
    """Returns `mask` and `is_causal` for T queries over S keys, as `plain_attention` takes them."""
    growing = cache is None or not cache.is_compileable  # a static cache has an empty tail
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask, False
    if attention_mask is not None and growing and attention_mask.shape[1] != S:
        raise ValueError(f"attention_mask covers {attention_mask.shape[1]} tokens, cache and input_ids hold {S}")
    if attention_mask is not None and device.type == "cpu" and not torch.compiler.is_compiling():
        attention_mask = None if attention_mask.all() else attention_mask  # on a GPU, all() would make the CPU wait
    if attention_mask is None and S == T:
        return None, True  # a branch: torch.compile turns S == T into a symbol, which attention rejects
    if attention_mask is not None or T > 1 or not growing:
        return visible_keys(attention_mask, T, S, past, device), False
    return None, False  # one new token of a growing cache: it sees everything


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H query heads share K key/value heads."""

    def __init__(self, config: MiniMindConfig, layer_idx: int = 0):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        # During generation the cache holds keys and values of all tokens. 8 query heads look for different things;
        # 2 heads of keys and values serve them nearly as well, and the cache takes a quarter of the memory.
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        norms = [RMSNorm(self.head_dim, config.rms_norm_eps, config.norm_in_fp32) for _ in range(2 * config.qk_norm)]
        self.q_norm, self.k_norm = norms or (nn.Identity(), nn.Identity())
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout
        self.flash_attn = config.flash_attn
        self.kernel = None  # training may set a function here that computes the same (trainer/acceleration.py)

    def forward(self, x, position_embeddings, past_key_values=None, attention_mask=None, past=0, attentions=None):
        """x (B, T, D) → (B, T, D). `attention_mask`: None, (B, S) with 1 = real token, or bool (B, 1, T, S).
        attentions: a list to which the weights (B, H, T, S) are appended; this selects `plain_attention`."""
        B, T, _ = x.shape
        # A query says what a token looks for, a key what it can be found by, a value what it passes on.
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), *position_embeddings)
        v = v.type_as(k)
        # The cache: during generation a call receives only the new token. Keys and values of all tokens before it,
        # pictures included, come from earlier calls.
        if past_key_values is not None:  # static caches of Transformers 4 need the positions
            where = past + torch.arange(T, device=x.device) if past_key_values.is_compileable else None
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": where})  # (B, K, S, d)
        # A token sees no later token, so one pass trains all T positions to predict the next token.
        mask, is_causal = what_is_seen(attention_mask, T, k.shape[2], past, past_key_values, x.device)
        dropout = self.dropout if self.training else 0.0
        attend = self.fastest(T) if attentions is None else partial(plain_attention, attentions=attentions)
        out = attend(q, k, v, mask, dropout, is_causal)  # softmax(q·kᵀ/√d)·v: (B, H, T, d)
        return self.resid_dropout(self.o_proj(out.transpose(1, 2).reshape(B, T, -1)))

    def fastest(self, T: int):
        """Selects one of four functions that compute the same result."""
        if not self.flash_attn:
            return plain_attention
        if T == 1:
            return attend_from_one_token
        # Only for short rows: the kernel keeps (B, H, T, T) weights for the backward pass, which takes memory.
        if self.kernel is not None and self.training and T <= 1024:
            return self.kernel
        return attend_by_pytorch


def plain_attention(q, k, v, mask, dropout: float, is_causal: bool, attentions: list | None = None):
    """A readable `scaled_dot_product_attention`: softmax(q·kᵀ/√d)·v. q (B, H, T, d), k and v (B, K, S, d) → as q.

    mask: bool, True = visible, or float, added to the scores; broadcastable to (B, H, T, S). None: all visible, or
    with `is_causal` no later token. attentions: a list to which the softmax (B, H, T, S) is appended.
    """
    T, S = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B, H, T, S); dividing by √d keeps their spread near 1
    if is_causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    weights = scores.float().softmax(dim=-1).type_as(q)  # the weights of a query sum to 1
    if attentions is not None:
        attentions.append(weights)
    return F.dropout(weights, dropout) @ v


def attend_by_pytorch(q, k, v, mask, dropout: float, is_causal: bool):
    """The same with the fastest kernel that PyTorch offers for this device."""
    if mask is not None:  # with a mask, most CUDA kernels require as many key heads as query heads
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=mask is None)


def attend_from_one_token(q, k, v, mask, dropout: float, is_causal: bool):
    """The same for T = 1: query heads that share a key head become queries of one head, so no key is copied."""
    B, H, _, d = q.shape
    q = q.view(B, k.shape[1], -1, d)  # (B, K, H/K, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout).view(B, H, 1, d)
