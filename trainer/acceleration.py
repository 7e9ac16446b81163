"""What makes a step faster and computes the same."""

import torch

from common.devices import cpu_has
from model.attention import Attention
from model.model_minimind import MiniMindBlock


def cast_frozen(model, dtype: torch.dtype):
    """Matrices that do not learn, in the dtype to which autocast would cast them anew in each step: the same numbers.

    A quarter of the time of CLIP ViT-B/16 on a CPU with AMX. Returns the model, whose norms stay as they are.
    """
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not module.weight.requires_grad:
            module.to(dtype)
    return model


def better_in_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Is `attention_in_blocks` faster here? In bfloat16 on a CPU that computes in it."""
    return device.type == "cpu" and dtype == torch.bfloat16 and cpu_has("amx_bf16", "avx512_bf16")


def choose_attention(model, device: torch.device, dtype: torch.dtype) -> None:
    """`attention_in_blocks` where it is faster. Experts, whose rows have a mask, do without."""
    if better_in_blocks(device, dtype):
        for module in model.modules():
            if isinstance(module, Attention):
                module.kernel = attention_in_blocks


def compile_layers(model) -> None:
    """torch.compile for the layers of decoder and encoder, each for itself and for rows of any length.

    All layers of a kind share what is compiled for the first, so it takes half a minute where the whole model takes
    several.
    """
    layers = [module for module in model.modules() if isinstance(module, MiniMindBlock)]
    encoder = getattr(model, "vision_encoder", None)
    for module in encoder.modules() if encoder else ():
        if isinstance(module, torch.nn.ModuleList):  # of the encoder's blocks, whatever its family calls them
            layers += module
    for layer in layers:
        layer.compile(dynamic=True)


@torch.compiler.disable  # what it makes of this for rows of any length is slower
def attention_in_blocks(q, k, v, mask=None, dropout: float = 0.0, is_causal: bool = True, blocks: int = 3):
    """Causal attention in the open, for CPUs that multiply bfloat16 (AMX, AVX512-BF16), of which the backward pass of
    PyTorch's own makes little use. q (B, H, T, d), k and v (B, K, T, d) → (B, H, T, d).

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
        weights = torch.nn.functional.dropout((scores.view(B, K, H // K, t, S) + later).softmax(dim=-1), dropout)
        out.append((weights.view(B, K, H // K * t, S) @ v[:, :, :S]).view(B, H, t, d))
    return torch.cat(out, dim=2)
