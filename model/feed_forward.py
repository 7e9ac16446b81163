"""The feed-forward network, applied to each token separately; or a mixture of several experts.

Shapes: B batch, T tokens, D hidden_size, E experts, k experts per token.

Reading path, 3 of 10; next: model/model_minimind.py
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN

from .config import MiniMindConfig


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
        # Attention moves information between tokens; this layer processes it, token by token. It contains two thirds of
        # the 26M weights. The gate controls how much of each entry of `up` passes.
        return self.dropout(self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)))


class MoEGate(nn.Module):
    """Chooses k of E experts for each token, and computes the loss that balances the use of the experts."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.top_k, self.n_experts = config.num_experts_per_tok, config.n_routed_experts
        self.alpha, self.seq_aux = config.aux_loss_alpha, config.seq_aux
        self.normed = config.norm_topk_prob if self.top_k > 1 else config.norm_top1_prob
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.hidden_size**-0.5)

    def forward(self, x, valid=None):
        """x (B, T, D), valid (B, T) with 1 = real token → experts (B, T, k), their weights (B, T, k), aux loss ()."""
        scores = F.linear(x, self.weight).float().softmax(dim=-1)  # (B, T, E)
        weights, experts = scores.topk(self.top_k, dim=-1, sorted=False)
        if self.normed:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        # Without this loss the gate sends most tokens to a few experts that are good early; the others never learn.
        if not (self.training and self.alpha > 0):
            return experts, weights, scores.new_zeros(())
        return experts, weights, self.alpha * self.balance(scores, experts, valid)

    def balance(self, scores, experts, valid):
        """sum over experts of (share of the picks · E) · (mean score), per row (`seq_aux`) or over the batch. ()

        Both means exclude padding. Equal use gives 1; one expert for all tokens gives up to E/k.
        """
        picks = (experts[..., None] == torch.arange(self.n_experts, device=experts.device)).sum(dim=2).float()
        real = torch.ones_like(scores[..., :1]) if valid is None else valid[..., None].float()  # (B, T, 1)
        over = 1 if self.seq_aux else (0, 1)
        tokens = real.sum(dim=over).clamp(min=1)
        share = (picks * real).sum(dim=over) / tokens * self.n_experts / self.top_k  # (B, E) or (E)
        mean_score = (scores * real).sum(dim=over) / tokens
        return (share * mean_score).sum(dim=-1).mean()


class MOEFeedForward(nn.Module):
    """E feed-forwards of which each token uses k, plus shared ones that every token uses (DeepSeekMoE, 2024)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate = MoEGate(config)  # a token uses k experts: many weights, little more work
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_routed_experts))
        self.shared_experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_shared_experts))

    def forward(self, x, valid=None):
        """x (B, T, D), valid (B, T) → (B, T, D) and the auxiliary loss ()."""
        B, T, D = x.shape
        experts, weights, aux_loss = self.gate(x, valid)
        k = experts.shape[-1]
        # Sort the B·T·k (token, expert) pairs by expert, so that each expert reads one slice. Only the sizes of the
        # slices must be known on the CPU. An expert without tokens gets an empty slice, which gives it gradients of
        # zero instead of None, as DistributedDataParallel requires.
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        sizes = (flat[:, None] == torch.arange(len(self.experts), device=x.device)).sum(dim=0).tolist()
        slices = x.view(B * T, D)[order // k].split(sizes)
        out = torch.cat([expert(piece) for expert, piece in zip(self.experts, slices)])
        out = out[order.argsort()].view(B, T, k, D)  # back to the order of the tokens
        y = (out * weights[..., None].type_as(out)).sum(dim=2)
        for expert in self.shared_experts:
            y = y + expert(x)
        return y, aux_loss
