"""Weights in the order in which a CPU reads them: the same products up to rounding, and faster. Not for training.

Shapes: I inputs, O outputs of a layer.
"""

from functools import partial

import torch
from torch import nn

ROWS = 16  # tokens at once for which weights are packed; products of 1 and of 1,000 tokens gain as well


class PackedLinear(nn.Module):
    """A frozen `nn.Linear` whose weights lie in memory in the order in which oneDNN reads them.

    PyTorch's own product packs float32 weights anew in each call. A chat multiplies one token at a time, a batch a few:
    for these, packing takes longer than the product.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        weight, bias = linear.weight.detach().to(dtype), linear.bias
        self.dtype = dtype
        # No parameters: DistributedDataParallel would send them to other ranks, which oneDNN's tensors do not allow.
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)  # (O, I)
        self.bias = None if bias is None else bias.detach().to(dtype)

    def forward(self, x):
        """(..., I) → (..., O) in the dtype of the weights, as autocast has it."""
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, "none", [], None)


def replace_linear(parents, make) -> None:
    """Puts make(layer) in the place of every linear layer that is a child of these modules."""
    for parent in parents:
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, make(child))


def can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(model, dtype: torch.dtype):
    """Replaces the linear layers of a model on a CPU, in place, where oneDNN multiplies this dtype. Not for training.

    dtype: in which products are computed. Returns the model.
    """
    if model.device.type == "cpu" and can_pack(dtype):
        replace_linear(list(model.modules()), partial(PackedLinear, dtype=dtype))
    return model
