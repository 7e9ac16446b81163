"""What learns, and how fast."""

import math

import torch

from model.model_vlm import MiniMindVLM

ATTENTION = (".q_proj.", ".k_proj.", ".v_proj.", ".o_proj.")


def choose_trainable(model: MiniMindVLM, choice: str) -> None:
    """Sets requires_grad: the projector always learns, the encoder never, and of the LLM what `choice` says.

    "projector": nothing; "last_layer": the last block; "attention": q/k/v/o projections of all blocks; "all": all.
    """
    last = f"model.layers.{model.config.num_hidden_layers - 1}."
    learns = {
        "projector": lambda name: False,
        "last_layer": lambda name: name.startswith(last),
        "attention": lambda name: any(part in name for part in ATTENTION),
        "all": lambda name: True,
    }[choice]
    for name, weight in model.named_parameters():
        if not name.startswith("vision_encoder."):
            weight.requires_grad_(name.startswith("vision_proj.") or learns(name))


def make_optimizer(model, learning_rate: float, projector_learning_rate: float | None, weight_decay: float):
    """AdamW over what learns: matrices decay, norms and biases do not, the projector has its own learning rate.

    Each group keeps its peak in "peak"; `set_learning_rate` scales from it.
    """
    groups = []
    learning = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    for projector, peak in ((True, projector_learning_rate), (False, learning_rate)):
        for matrices in (True, False):
            weights = [
                weight
                for name, weight in learning
                if name.startswith("vision_proj.") == projector and (weight.ndim >= 2) == matrices
            ]
            if weights:
                decay = weight_decay if matrices else 0.0
                groups.append({"params": weights, "lr": peak, "peak": peak, "weight_decay": decay})
    # Every group has its own weight_decay; AdamW checks only the one it is given.
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True)


def schedule(step: int, total: int, warmup: int) -> float:
    """Share of the peak learning rate at a step: linear warmup, then a cosine down to a tenth."""
    warmup = min(warmup, total // 10)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(total - warmup, 1)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def set_learning_rate(optimizer, share: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
