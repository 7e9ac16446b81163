"""The MiniMind decoder: a small Llama-like language model, dense or with a mixture of experts.

It knows nothing of pictures; `model_vlm.py` adds those. Read from top to bottom: configuration, norm, rotary
positions, attention, feed-forward, experts, block, stack, language model.

Shapes: B batch, T tokens of this call, S tokens seen so far (cache included), D hidden_size, H query heads,
K key/value heads, d width of a head, E experts, k experts per token, V vocabulary.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import ModelOutput


class MiniMindConfig(PretrainedConfig):
    """Architecture of the decoder. `intermediate_size=None` means 8/3 of `hidden_size`, rounded up to 64."""

    model_type = "minimind"

    def __init__(
        self,
        dropout: float = 0.0,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        hidden_act: str = "silu",
        hidden_size: int = 512,
        intermediate_size: int | None = None,
        max_position_embeddings: int = 32768,
        num_attention_heads: int = 8,
        num_hidden_layers: int = 8,
        num_key_value_heads: int = 2,
        vocab_size: int = 6400,
        rms_norm_eps: float = 1e-5,
        rope_theta: float = 1e6,
        flash_attn: bool = True,
        use_moe: bool = False,
        num_experts_per_tok: int = 2,
        n_routed_experts: int = 4,
        n_shared_experts: int = 1,
        scoring_func: str = "softmax",
        aux_loss_alpha: float = 0.1,
        seq_aux: bool = True,
        norm_topk_prob: bool = True,
        **kwargs,
    ):
        if hidden_size % num_attention_heads or num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_attention_heads}, "
                f"and that a multiple of num_key_value_heads={num_key_value_heads}"
            )
        if hidden_size // num_attention_heads % 2:
            raise ValueError(f"the width of a head, {hidden_size}/{num_attention_heads}, must be even for RoPE")
        if scoring_func != "softmax":
            raise ValueError(f"scoring_func={scoring_func!r} is not known; the MoE gate knows 'softmax'")
        self.dropout = dropout
        self.hidden_act = hidden_act
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size or 64 * -(-int(hidden_size * 8 / 3) // 64)
        self.max_position_embeddings = max_position_embeddings
        self.num_attention_heads = num_attention_heads
        self.num_hidden_layers = num_hidden_layers
        self.num_key_value_heads = num_key_value_heads
        self.vocab_size = vocab_size
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.flash_attn = flash_attn
        self.use_moe = use_moe
        self.num_experts_per_tok = num_experts_per_tok
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = n_shared_experts
        self.scoring_func = scoring_func
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        self.norm_topk_prob = norm_topk_prob
        kwargs.setdefault("tie_word_embeddings", True)  # Transformers 5 has no default of its own
        kwargs.setdefault("pad_token_id", 0)
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)
        self.tie_word_embeddings = kwargs["tie_word_embeddings"]


@dataclass
class MiniMindOutput(ModelOutput):
    """What a forward pass returns. `loss` is the cross entropy alone: add `aux_loss` to it to train a MoE."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: object | None = None
    last_hidden_state: torch.Tensor | None = None
    aux_loss: torch.Tensor | None = None
    hidden_states: tuple | None = None
    attentions: tuple | None = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight (Zhang & Sennrich 2019); the division in fp32, the scaling in x's dtype."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).type_as(x)


def precompute_freqs_cis(dim: int, end: int, theta: float):
    """Tables of RoPE (Su et al. 2021): cos and sin of position · theta^(-2i/dim), each float32 (end, dim).

    The half-split layout: entry i is paired with i + dim/2, so the dim/2 frequencies stand twice.
    """
    freqs = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    angles = torch.outer(torch.arange(end, dtype=torch.float32), freqs).repeat(1, 2)
    return angles.cos(), angles.sin()


def apply_rotary_pos_emb(q, k, cos, sin):
    """Rotates q (B, H, T, d) and k (B, K, T, d) by their positions; cos and sin are (T, d)."""

    def rotate(x):
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    return rotate(q).type_as(q), rotate(k).type_as(k)


def visible_keys(attention_mask, T: int, S: int, past, device):
    """Which of S keys each of T queries may see: bool, broadcastable to (B, H, T, S).

    Query t stands at position past + t and sees what is not after it and not padding. It always sees itself: a
    padding query with nothing to look at would be 0/0 = NaN, and NaN keys spoil the rest of the row through 0·NaN.
    """
    query, key = past + torch.arange(T, device=device)[:, None], torch.arange(S, device=device)
    visible = (key <= query)[None]
    if attention_mask is not None:
        padded = F.pad(attention_mask.bool(), (0, S - attention_mask.shape[1]))  # a static cache is longer
        visible = visible & padded[:, None, :] | (key == query)
    return visible[:, None]


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): H query heads share K key/value heads."""

    def __init__(self, config: MiniMindConfig, layer_idx: int = 0):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.dropout = config.dropout
        self.flash_attn = config.flash_attn
        self.in_blocks = False  # True: while training, attention as in `attention_in_blocks`

    def forward(self, x, position_embeddings, past_key_values=None, attention_mask=None, past=0, attentions=None):
        """x (B, T, D) → (B, T, D). `attention_mask`: None, (B, S) with 1 = real token, or bool (B, 1, T, S).

        attentions: a list that gets the weights (B, H, T, S), which only the slower way in the open has.
        """
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k = self.k_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)  # (B, K, T, d)
        v = self.v_proj(x).view(B, T, self.num_kv_heads, self.head_dim).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        v = v.type_as(k)
        if past_key_values is not None:
            where = {"cache_position": past + torch.arange(T, device=x.device)}  # static caches of Transformers 4 ask
            k, v = past_key_values.update(k, v, self.layer_idx, where)  # (B, K, S, d)
        S = k.shape[2]

        growing = past_key_values is None or not past_key_values.is_compileable  # a static cache has an empty tail
        if attention_mask is not None and attention_mask.ndim == 2 and growing and attention_mask.shape[1] != S:
            raise ValueError(f"attention_mask covers {attention_mask.shape[1]} tokens, cache and input_ids hold {S}")
        mask, is_causal = None, False  # as is, for one new token of a growing cache: it sees everything
        if attention_mask is None and S == T:
            is_causal = True  # by branch, as torch.compile makes S == T a symbol, which attention does not take
        elif attention_mask is not None and attention_mask.ndim == 4:
            mask = attention_mask
        elif attention_mask is not None or T > 1 or not growing:
            mask = visible_keys(attention_mask, T, S, past, x.device)

        dropout = self.dropout if self.training else 0.0
        if attentions is not None or not self.flash_attn:
            out = plain_attention(q, k, v, mask, dropout, is_causal, attentions)
        elif T == 1:
            # All heads that share a key see the same: as queries of one head they need no copies of it.
            q = q.view(B, self.num_kv_heads, -1, self.head_dim)  # (B, K, H/K, d)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
            out = out.view(B, self.num_heads, 1, self.head_dim)
        elif self.in_blocks and self.training and is_causal and T <= 1024:
            # Not for longer rows, whose (B, H, T, T) weights, kept for the backward pass, would take too much memory.
            out = attention_in_blocks(q, k, v, dropout)
        else:
            if mask is not None:  # most CUDA kernels take a mask only with as many key heads as query heads
                k, v = (x.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for x in (k, v))
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=is_causal, enable_gqa=mask is None
            )
        return self.resid_dropout(self.o_proj(out.transpose(1, 2).reshape(B, T, -1)))


def plain_attention(q, k, v, mask, dropout: float, is_causal: bool, attentions: list | None = None):
    """The same as `scaled_dot_product_attention`, in the open: softmax(q·kᵀ/√d)·v, (B, H, T, d) → (B, H, T, d).

    attentions: gets the softmax, (B, H, T, S).
    """
    T, S = q.shape[2], k.shape[2]
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5  # (B, H, T, S)
    if is_causal:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        scores = scores + mask
    weights = scores.float().softmax(dim=-1).type_as(q)
    if attentions is not None:
        attentions.append(weights)
    return F.dropout(weights, dropout) @ v


@torch.compiler.disable  # what it makes of this for rows of any length is slower
def attention_in_blocks(q, k, v, dropout: float, blocks: int = 3):
    """Causal attention in the open, for CPUs with matrix units (AMX), of which the backward pass of PyTorch's own makes
    little use. q (B, H, T, d), k and v (B, K, T, d) → (B, H, T, d).

    Each block of queries leaves out the keys after its last one. In bfloat16 scores are rounded before the softmax,
    which `scaled_dot_product_attention` does not do.
    """
    B, H, T, d = q.shape
    K = k.shape[1]
    q, out = q * d**-0.5, []
    for i in range(blocks):
        start, S = i * T // blocks, (i + 1) * T // blocks  # queries from start on, the last of which sees S keys
        t = S - start
        # All heads that share a key are rows of one matrix.
        scores = q[:, :, start:S].reshape(B, K, H // K * t, d) @ k[:, :, :S].transpose(-2, -1)
        later = torch.full((t, S), float("-inf"), dtype=q.dtype, device=q.device).triu(1 + start)
        weights = F.dropout((scores.view(B, K, H // K, t, S) + later).softmax(dim=-1), dropout)
        out.append((weights.view(B, K, H // K * t, S) @ v[:, :, :S]).view(B, H, t, d))
    return torch.cat(out, dim=2)


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) · up(x))."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.dropout)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x):
        return self.dropout(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class MoEGate(nn.Module):
    """Chooses k of E experts for each token, and the loss that keeps the experts equally busy."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.top_k, self.n_experts = config.num_experts_per_tok, config.n_routed_experts
        self.alpha, self.seq_aux = config.aux_loss_alpha, config.seq_aux
        self.norm_topk_prob = config.norm_topk_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.hidden_size**-0.5)

    def forward(self, x, valid=None):
        """x (B, T, D), valid (B, T) with 1 = real token → experts (B, T, k), their weights (B, T, k), aux loss ()."""
        scores = F.linear(x, self.weight).float().softmax(dim=-1)  # (B, T, E)
        weights, experts = scores.topk(self.top_k, dim=-1, sorted=False)
        if self.top_k > 1 and self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if not (self.training and self.alpha > 0):
            return experts, weights, scores.new_zeros(())
        return experts, weights, self.alpha * self.balance(scores, experts, valid)

    def balance(self, scores, experts, valid):
        """sum over experts of (share of the picks · E) · (mean score), per row (`seq_aux`) or over the batch. ()

        Both means leave padding out. Equal use gives 1, everything to one expert up to E/k.
        """
        picks = (experts[..., None] == torch.arange(self.n_experts, device=experts.device)).sum(dim=2).float()
        real = torch.ones_like(scores[..., :1]) if valid is None else valid[..., None].float()  # (B, T, 1)
        over = 1 if self.seq_aux else (0, 1)
        tokens = real.sum(dim=over).clamp(min=1)
        share = (picks * real).sum(dim=over) / tokens * self.n_experts / self.top_k  # (B, E) or (E)
        mean_score = (scores * real).sum(dim=over) / tokens
        return (share * mean_score).sum(dim=-1).mean()


class MOEFeedForward(nn.Module):
    """E small feed-forwards of which each token uses k, plus shared ones that every token uses (DeepSeekMoE, 2024)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate = MoEGate(config)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_routed_experts))
        self.shared_experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_shared_experts))

    def forward(self, x, valid=None):
        """x (B, T, D), valid (B, T) → (B, T, D) and the auxiliary loss ()."""
        B, T, D = x.shape
        experts, weights, aux_loss = self.gate(x, valid)
        k = experts.shape[-1]
        # Sort the B·T·k (token, expert) pairs by expert, so that each expert reads one slice. The sizes of the
        # slices are the one thing the host must know. An expert without tokens gets an empty slice, and through
        # it gradients of zero rather than None, which DistributedDataParallel needs.
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        sizes = (flat[:, None] == torch.arange(len(self.experts), device=x.device)).sum(dim=0).tolist()
        slices = x.view(B * T, D)[order // k].split(sizes)
        out = torch.cat([expert(piece) for expert, piece in zip(self.experts, slices)])
        out = out[order.argsort()].view(B, T, k, D)  # back in the order of the tokens
        y = (out * weights[..., None].type_as(out)).sum(dim=2)
        for expert in self.shared_experts:
            y = y + expert(x)
        return y, aux_loss


class MiniMindBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, layer_id: int, config: MiniMindConfig):
        super().__init__()
        self.self_attn = Attention(config, layer_id)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MOEFeedForward(config) if config.use_moe else FeedForward(config)

    def forward(
        self,
        x,
        position_embeddings,
        past_key_values=None,
        attention_mask=None,
        past=0,
        valid=None,
        needed=None,
        attentions=None,
    ):
        """x (B, T, D) → (B, T, D) and the auxiliary loss (), 0 when dense.

        needed: int64 (n,), which of the B·T tokens the result is wanted for; it is then (n, D).
        """
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, position_embeddings, past_key_values, attention_mask, past, attentions)
        if needed is not None:
            x = x.flatten(0, 1)[needed]
        normed = self.post_attention_layernorm(x)
        if isinstance(self.mlp, MOEFeedForward):
            y, aux_loss = self.mlp(normed, valid)
            return x + y, aux_loss
        return x + self.mlp(normed), x.new_zeros((), dtype=torch.float32)


class MiniMindModel(nn.Module):
    """Embedding, blocks, final norm."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # True: keep one activation per block, compute the others again
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(MiniMindBlock(i, config) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        for name, table in self.rope_tables().items():
            self.register_buffer(name, table, persistent=False)

    def rope_tables(self) -> dict[str, torch.Tensor]:
        config = self.config
        cos, sin = precompute_freqs_cis(
            config.hidden_size // config.num_attention_heads, config.max_position_embeddings, config.rope_theta
        )
        return {"freqs_cos": cos, "freqs_sin": sin}

    def forward(
        self,
        inputs_embeds,
        attention_mask=None,
        past_key_values=None,
        needed=None,
        hidden_states=None,
        attentions=None,
    ):
        """inputs_embeds (B, T, D) → hidden states after the final norm (B, T, D), and the auxiliary loss ().

        needed: int64 (n,), which of the B·T tokens' hidden states are wanted; they are then (n, D). Attention has to
        know all tokens, the last feed-forward need not. Not with experts, whose balance counts all tokens.
        hidden_states, attentions: lists to fill, what goes into each layer and comes out of the norm, and the weights.
        """
        T = inputs_embeds.shape[1]
        # + 0 copies: a static cache hands out the very tensor in which its first layer will count on.
        past = 0 if past_key_values is None else past_key_values.get_seq_length() + 0
        if isinstance(past, int) and past + T > self.config.max_position_embeddings:
            raise ValueError(f"{past + T} tokens exceed max_position_embeddings={self.config.max_position_embeddings}")
        positions = past + torch.arange(T, device=inputs_embeds.device)
        position_embeddings = self.freqs_cos[positions], self.freqs_sin[positions]  # (T, d) each
        valid = None  # the real tokens among these T, for the balance of the experts
        if attention_mask is not None and attention_mask.ndim == 2:
            valid = attention_mask[:, -T:]

        h = self.dropout(inputs_embeds)
        aux_loss = h.new_zeros((), dtype=torch.float32)
        for layer in self.layers:
            last = needed if layer is self.layers[-1] else None
            args = (h, position_embeddings, past_key_values, attention_mask, past, valid, last, attentions)
            if hidden_states is not None:
                hidden_states.append(h)
            if self.gradient_checkpointing and self.training:
                h, layer_aux_loss = checkpoint(layer, *args, use_reentrant=False)
            else:
                h, layer_aux_loss = layer(*args)
            aux_loss = aux_loss + layer_aux_loss
        h = self.norm(h)
        if hidden_states is not None:
            hidden_states.append(h)
        return h, aux_loss


def as_cache(past_key_values):
    """A Transformers `Cache`, also for a list of (key, value), one per layer; None stays None."""
    if not isinstance(past_key_values, (list, tuple)):
        return past_key_values
    cache = DynamicCache()
    for layer, (key, value) in enumerate(past_key_values):
        cache.update(key, value, layer)
    return cache


class MiniMindForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. `lm_head` and `embed_tokens` are one matrix."""

    config_class = MiniMindConfig
    base_model_prefix = ""  # trainers call what it names with input_ids and pictures, which `model` does not know
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig | None = None):
        config = config or MiniMindConfig()
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # initialises, and ties the two matrices

    def _init_weights(self, module):
        # Only nn.init functions: Transformers 5 guards those against overwriting weights it has just loaded.
        if isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):  # one matrix
            # Small, as what a word has in common with others is learned on top of it. Began all words far apart, later
            # layers would learn each by heart, and what they learn of one would not hold for the next.
            nn.init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.Linear):
            # 0.088 at a width of 128. With the 0.02 of wide models, queries and keys of a narrow one are too small for
            # attention to choose, and it takes several times the steps to look anything up (docs/results).
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, MoEGate):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif isinstance(module, MiniMindModel):
            # Transformers 5 builds models on the meta device, from which buffers that no file holds come as garbage.
            for name, table in module.rope_tables().items():
                getattr(module, name).copy_(table)

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def set_input_embeddings(self, value):
        self.model.embed_tokens = value

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def text_state_dict(self) -> dict[str, torch.Tensor]:
        """The weights that are saved: here all of them."""
        return self.state_dict()

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        logits_to_keep=0,
        labels=None,
        **args,
    ) -> MiniMindOutput:
        """Args as in `decode`; input_ids is int64 (B, T)."""
        h = self.model.embed_tokens(input_ids)  # (B, T, D)
        return self.decode(h, attention_mask, past_key_values, use_cache, logits_to_keep, labels, **args)

    def decode(
        self,
        h,
        attention_mask=None,
        past_key_values=None,
        use_cache=False,
        logits_to_keep=0,
        labels=None,
        num_items_in_batch=None,
        return_logits=True,
        output_hidden_states=None,
        output_attentions=None,
        **args,
    ) -> MiniMindOutput:
        """From embeddings to logits and loss.

        Args:
            h: float (B, T, D), the embeddings of the tokens.
            attention_mask: (B, S), 1 = real token, over cache and tokens; or bool (B, 1, T, S), True = visible.
            past_key_values: a Transformers `Cache`, or a list of (key, value), one per layer, each (B, K, S, d).
            use_cache: create a cache if none is given, and return it.
            logits_to_keep: the last n positions, 0 for all; or int64 (n,), the positions to compute logits for.
            labels: int64 (B, T), -100 = no loss. Position t is scored against label t + 1.
            num_items_in_batch: divide the summed loss by this instead of by the number of labels of this call,
                as when one optimizer step is made of several calls.
            return_logits: False computes the loss, and what only the loss needs, at labelled positions, and returns
                no logits; `last_hidden_state` is then that of these positions, unless there are experts.
            output_hidden_states, output_attentions: return also those of each layer, (B, T, D) and (B, H, T, S).
        """
        past_key_values = as_cache(past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        learn = needed = None
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # (B·T): the token after each
            # Before the layers: the host must know how many there are, and waits for what is computed so far.
            learn = (targets != -100).nonzero().squeeze(1)  # (labels): where it is one to be learned
            needed = None if return_logits or self.config.use_moe else learn
        hidden_states = [] if output_hidden_states else None
        attentions = [] if output_attentions else None
        h, aux_loss = self.model(h, attention_mask, past_key_values, needed, hidden_states, attentions)

        logits = loss = None
        if return_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(h[:, keep])  # (B, kept, V); slice(-0, None) keeps all
        if labels is not None:
            scored = self.lm_head(h if needed is not None else h.flatten(0, 1)[learn])  # (labels, V)
            count = max(len(learn), 1) if num_items_in_batch is None else num_items_in_batch
            loss = F.cross_entropy(scored.float(), targets[learn], reduction="sum") / count  # no label: 0, not 0/0
        return MiniMindOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            last_hidden_state=h,
            aux_loss=aux_loss,
            hidden_states=hidden_states and tuple(hidden_states),
            attentions=attentions and tuple(attentions),
        )
