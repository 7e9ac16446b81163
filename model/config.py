"""The architecture of the decoder: all numbers that define a model of this family.

Reading path, 1 of 10; next: model/attention.py
"""

from transformers import PretrainedConfig


class MiniMindConfig(PretrainedConfig):
    """Architecture of the decoder. `intermediate_size=None` means 8/3 of `hidden_size`, rounded up to n · 64."""

    model_type = "minimind"

    def __init__(
        self,
        dropout: float = 0.0,
        bos_token_id: int = 1,
        eos_token_id: int = 2,  # <|im_end|> ends an answer
        hidden_act: str = "silu",
        hidden_size: int = 512,  # D: length of a token's vector, in every layer
        intermediate_size: int | None = None,  # width inside the feed-forward
        max_position_embeddings: int = 32768,  # maximum tokens of question and answer together
        num_attention_heads: int = 8,  # H: each head looks for something different
        num_hidden_layers: int = 8,  # blocks, one after another
        num_key_value_heads: int = 2,  # K: fewer than H for a small cache
        vocab_size: int = 6400,  # V: small, because each token costs D weights: 3.3M of 26M
        rms_norm_eps: float = 1e-5,  # keeps norms from dividing by 0
        rope_theta: float = 1e6,  # larger values distinguish positions in longer texts
        flash_attn: bool = True,  # attention with a kernel of PyTorch; False: in plain Python
        use_moe: bool = False,  # a mixture of experts replaces each feed-forward
        num_experts_per_tok: int = 2,  # k: experts per token
        n_routed_experts: int = 4,  # E: experts to choose from
        n_shared_experts: int = 1,  # additional experts, which compute every token
        scoring_func: str = "softmax",
        aux_loss_alpha: float = 0.1,  # weight of the loss for unevenly used experts
        seq_aux: bool = True,  # balance experts in each row, not only over the batch
        norm_topk_prob: bool = True,  # the weights of a token's k experts sum to 1, where k > 1
        norm_top1_prob: bool = False,  # also for k = 1; the gate then learns only from the auxiliary loss
        head_dim: int | None = None,  # d: width of a head; None: hidden_size / num_attention_heads
        qk_norm: bool = False,  # normalise queries and keys, head by head
        norm_in_fp32: bool = False,  # norms multiply by their weight before rounding to half precision
        **kwargs,
    ):
        if (head_dim is None and hidden_size % num_attention_heads) or num_attention_heads % num_key_value_heads:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of num_attention_heads={num_attention_heads}, "
                f"and that a multiple of num_key_value_heads={num_key_value_heads}"
            )
        if (head_dim or hidden_size // num_attention_heads) % 2:
            width = head_dim or f"{hidden_size}/{num_attention_heads}"
            raise ValueError(f"the width of a head, {width}, must be even for RoPE")
        if scoring_func != "softmax":
            raise ValueError(f"scoring_func={scoring_func!r} is unknown, expected 'softmax'")
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
        self.norm_top1_prob = norm_top1_prob
        self.head_dim = head_dim
        self.qk_norm = qk_norm
        self.norm_in_fp32 = norm_in_fp32
        kwargs.setdefault("tie_word_embeddings", True)  # Transformers 5 has no default
        kwargs.setdefault("pad_token_id", 0)
        super().__init__(bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)
        self.tie_word_embeddings = kwargs["tie_word_embeddings"]
