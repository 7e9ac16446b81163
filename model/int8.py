"""8-bit weights for answers on a CPU: a quarter of the memory to read per token, and faster matrix products.

Not for training, and not exact: some words of an answer may change.

Shapes: N tokens, I inputs, O outputs of a layer.
"""

import torch
from torch import nn

from model.packed import replace_linear


def quantize(x):
    """float (N, I) → int8 (N, I) and float scales (N, 1), with x ≈ int8 · scales: each row uses -127 to 127."""
    scales = x.abs().amax(dim=1, keepdim=True).clamp(min=1e-8) / 127
    return (x / scales).round().to(torch.int8), scales


class Int8Linear(nn.Module):
    """A frozen `nn.Linear` without bias: int8 weights, one scale per output, inputs quantized token by token."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scales = quantize(linear.weight.detach().float())
        self.register_buffer("weight", weight)  # (O, I)
        self.register_buffer("scales", scales.T)  # (1, O)

    def forward(self, x):
        """(..., I) → (..., O)"""
        flat, scales = quantize(x.flatten(0, -2).float())
        y = torch._int_mm(flat, self.weight.T) * scales * self.scales  # (N, O); int32 sums of products
        return y.type_as(x).view(*x.shape[:-1], len(self.weight))  # not -1: an expert may get no token


def to_int8(model):
    """Replaces the linear layers of the decoder in place and returns the model. Encoder, projector, embeddings and
    gates are not changed.

    Raises ValueError if the model is not on a CPU.
    """
    if model.device.type != "cpu":
        raise ValueError(f"--int8 is for CPUs, but the model is on {model.device}: omit it, or add --device cpu")
    replace_linear([model, *model.model.modules()], Int8Linear)
    return model
