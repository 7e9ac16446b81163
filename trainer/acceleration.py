"""Makes training steps faster without changing what they compute."""

import torch

from common.devices import cpu_has
from model.attention import Attention, visible_keys
from model.model_minimind import MiniMindBlock


def cast_frozen(model, dtype: torch.dtype):
    """Casts the frozen matrices to `dtype` once. Autocast would cast them in every step, to the same numbers.

    This saves time where the arithmetic itself is fast, as on CPUs with AMX. Norms keep their dtype. Returns the model.
    """
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not module.weight.requires_grad:
            module.to(dtype)
    return model


def better_in_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `attention_in_blocks` is faster here: in bfloat16 on a CPU with instructions for it."""
    return device.type == "cpu" and dtype == torch.bfloat16 and cpu_has("amx_bf16", "avx512_bf16")


def choose_attention(model, device: torch.device, dtype: torch.dtype) -> None:
    """Uses `attention_in_blocks` where it is faster."""
    if better_in_blocks(device, dtype):
        for module in model.modules():
            if isinstance(module, Attention):
                module.kernel = attention_in_blocks


def compile_layers(model) -> None:
    """Applies torch.compile to the layers of decoder and encoder one by one, for rows of any length.

    All layers of a kind share the code compiled for the first one. This takes half a minute; compiling the whole model
    takes several.
    """
    layers = [module for module in model.modules() if isinstance(module, MiniMindBlock)]
    encoder = getattr(model, "vision_encoder", None)
    for module in encoder.modules() if encoder else ():
        if isinstance(module, torch.nn.ModuleList):  # the encoder's blocks; each family has its own name for them
            layers += module
    for layer in layers:
        layer.compile(dynamic=True)


@torch.compiler.disable  # compiled for rows of any length, this function is slower
def attention_in_blocks(q, k, v, mask=None, dropout: float = 0.0, is_causal: bool = True, blocks: int = 3):
    """Attention in plain operations, for CPUs that multiply bfloat16 (AMX, AVX512-BF16). The backward pass of PyTorch's
    own attention hardly uses these instructions. q (B, H, T, d), k and v (B, K, S, d) → (B, H, T, d).

    mask: bool, True = visible, broadcastable to (B, 1, T, S); None: no later token. Each block of queries skips the
    keys after its last position. In bfloat16 the scores are rounded before the softmax;
    `scaled_dot_product_attention` does not round them.
    """
    B, H, T, d = q.shape
    K, S = k.shape[1:3]
    past = S - T  # tokens in the cache
    visible = visible_keys(None, T, S, past, q.device) if mask is None else mask
    hidden = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill(~visible, float("-inf"))
    q, out = q * d**-0.5, []
    for i in range(blocks):
        start, end = i * T // blocks, (i + 1) * T // blocks  # the last of these queries sees past + end keys
        t, seen = end - start, past + end
        # Query heads that share a key head become rows of one matrix.
        scores = q[:, :, start:end].reshape(B, K, H // K * t, d) @ k[:, :, :seen].transpose(-2, -1)
        scores = scores.view(B, K, H // K, t, seen) + hidden[:, :, None, start:end, :seen]
        weights = torch.nn.functional.dropout(scores.softmax(dim=-1), dropout)
        out.append((weights.view(B, K, H // K * t, seen) @ v[:, :, :seen]).view(B, H, t, d))
    return torch.cat(out, dim=2)
