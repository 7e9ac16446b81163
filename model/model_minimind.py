"""The MiniMind decoder: a small Llama-like language model, dense or with a mixture of experts.

This file handles text only; `model_vlm.py` adds pictures. It assembles the parts from config.py, attention.py and
feed_forward.py into blocks, a stack of blocks, and a language model.

Shapes: B batch, T tokens of this call, S tokens seen so far (cache included), D hidden_size, H query heads,
K key/value heads, d width of a head, V vocabulary.

Reading path, 4 of 10; next: model/model_vlm.py
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .attention import Attention, RMSNorm, precompute_freqs_cis, what_is_seen
from .config import MiniMindConfig
from .feed_forward import FeedForward, MOEFeedForward, MoEGate


@dataclass
class MiniMindOutput(ModelOutput):
    """Result of a forward pass. `loss` is the cross entropy only: add `aux_loss` to train a MoE."""

    loss: torch.Tensor | None = None  # ()
    logits: torch.Tensor | None = None  # (B, T, V): a score for each token that may come next
    past_key_values: object | None = None  # the cache
    last_hidden_state: torch.Tensor | None = None  # (B, T, D), or (n, D) if only n positions are needed
    aux_loss: torch.Tensor | None = None  # (): measures how unevenly the experts are used
    hidden_states: tuple | None = None  # layers + 1 times (B, T, D)
    attentions: tuple | None = None  # layers times (B, H, T, S)


class MiniMindBlock(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, layer_id: int, config: MiniMindConfig):
        super().__init__()
        self.self_attn = Attention(config, layer_id)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_in_fp32)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_in_fp32)
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

        needed: int64 (n,), indices into the B·T tokens; the result is then (n, D), for these tokens only.
        """
        # Each part adds its result to x: through these sums gradients reach the first block undiminished. The norms
        # bring the inputs of every part to the same scale.
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
        self.gradient_checkpointing = False  # True: keep one activation per block, recompute the others
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)  # a learned vector for each token
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(MiniMindBlock(i, config) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_in_fp32)
        for name, table in self.rope_tables().items():
            self.register_buffer(name, table, persistent=False)

    def rope_tables(self) -> dict[str, torch.Tensor]:
        config, d = self.config, self.layers[0].self_attn.head_dim
        cos, sin = precompute_freqs_cis(d, config.max_position_embeddings, config.rope_theta)
        return {"freqs_cos": cos, "freqs_sin": sin}

    def forward(
        self, inputs_embeds, attention_mask=None, past_key_values=None, needed=None, hidden_states=None, attentions=None
    ):
        """inputs_embeds (B, T, D) → hidden states after the final norm (B, T, D), and the auxiliary loss ().

        needed: int64 (n,), indices into the B·T tokens; returns (n, D). The last feed-forward runs only at these
            positions; attention still sees all tokens. Not allowed with experts, whose balance counts all tokens.
        hidden_states, attentions: lists to fill: inputs of the layers and the final norm's output; attention weights.
        """
        T = inputs_embeds.shape[1]
        # + 0 makes a copy: a static cache returns its own counter, which its first layer will increment.
        past = 0 if past_key_values is None else past_key_values.get_seq_length() + 0
        if isinstance(past, int) and past + T > self.config.max_position_embeddings:
            raise ValueError(f"{past + T} tokens exceed max_position_embeddings={self.config.max_position_embeddings}")
        positions = past + torch.arange(T, device=inputs_embeds.device)  # after the tokens in the cache
        position_embeddings = self.freqs_cos[positions], self.freqs_sin[positions]  # (T, d) each
        padded = attention_mask is not None and attention_mask.ndim == 2
        valid = attention_mask[:, -T:] if padded else None  # which of these T are real, for the experts' balance
        if past_key_values is None or not past_key_values.is_compileable:  # once, instead of in every layer
            attention_mask, _ = what_is_seen(attention_mask, T, past + T, past, past_key_values, inputs_embeds.device)

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
    """Converts a list of (key, value), one per layer, to a Transformers `Cache`; returns a cache or None unchanged."""
    if not isinstance(past_key_values, (list, tuple)):
        return past_key_values
    cache = DynamicCache()
    for layer, (key, value) in enumerate(past_key_values):
        cache.update(key, value, layer)
    return cache


class MiniMindForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model. `lm_head` and `embed_tokens` share one matrix."""

    config_class = MiniMindConfig
    base_model_prefix = ""  # trainers pass input_ids and pictures to the part named here; `model` takes neither
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig | None = None):
        config = config or MiniMindConfig()
        super().__init__(config)
        self.model = MiniMindModel(config)
        # The score of a token is the dot product of the last hidden state and the token's own embedding.
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()  # initialises the weights and ties the two matrices

    def _init_weights(self, module):
        # Only nn.init functions: Transformers 5 keeps those from overwriting weights that it has just loaded.
        if isinstance(module, nn.Embedding) or module is getattr(self, "lm_head", None):  # one matrix
            # Small, so that words start close together and later layers learn rules that hold for many of them. With
            # distant starting points, later layers would memorise each word separately.
            nn.init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.Linear):
            # 0.088 at a width of 128. With the 0.02 of wide models, queries and keys of a narrow model are too small
            # for attention to select a token, and learning to look things up takes several times the steps.
            nn.init.normal_(module.weight, std=self.config.hidden_size**-0.5)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, MoEGate):
            nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
        elif isinstance(module, MiniMindModel):
            # Transformers 5 builds models on the meta device; buffers that no file contains then hold garbage.
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
        """The weights to save: here all of them."""
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
        """input_ids: int64 (B, T); other arguments as in `decode`."""
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
        """Runs the decoder from embeddings to logits and loss.

        Args:
            h: float (B, T, D), the embeddings of the tokens.
            attention_mask: (B, S), 1 = real token, over cache and tokens; or bool (B, 1, T, S), True = visible.
            past_key_values: a Transformers `Cache`, or a list of (key, value), one per layer, each (B, K, S, d).
            use_cache: create a cache if none is given, and return it.
            logits_to_keep: compute logits for the last n positions, 0 for all; or int64 (n,), for these positions.
            labels: int64 (B, T), -100 = no loss. Position t is scored against label t + 1.
            num_items_in_batch: divides the summed loss, in place of the labels of this call: a step may have several.
            return_logits: False computes only the loss, at labelled positions, and returns no logits.
            output_hidden_states, output_attentions: also return those of each layer, (B, T, D) and (B, H, T, S).
        `last_hidden_state` lacks positions without logits, unless hidden states are asked for or there are experts.
        """
        past_key_values = as_cache(past_key_values)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        (B, T, D), learn, needed = h.shape, None, None
        lean = not (self.config.use_moe or output_hidden_states)  # the last feed-forward may skip positions
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100).flatten()  # (B·T): the next token of each
            # nonzero() makes the CPU wait for the GPU, so it runs before the layers, while little is queued.
            learn = (targets != -100).nonzero().squeeze(1)  # (labels): the positions with a label
            needed = learn if lean and not return_logits else None
        elif lean and isinstance(logits_to_keep, int) and 0 < logits_to_keep < T:  # a prompt: its last token decides
            needed = torch.arange(B * T, device=h.device).view(B, T)[:, -logits_to_keep:].flatten()
        hidden_states, attentions = ([] if asked else None for asked in (output_hidden_states, output_attentions))
        h, aux_loss = self.model(h, attention_mask, past_key_values, needed, hidden_states, attentions)

        logits = loss = None
        if return_logits:
            keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(h[:, keep] if needed is None else h.view(B, -1, D))  # slice(-0, None) keeps all
        if labels is not None:
            scored = self.lm_head(h if needed is not None else h.flatten(0, 1)[learn])  # (labels, V)
            count = max(len(learn), 1) if num_items_in_batch is None else num_items_in_batch
            # In nats: -log of the probability that the model gave to the right token.
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
