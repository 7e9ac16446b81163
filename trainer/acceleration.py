"""What makes a step faster and computes the same."""

import torch
from transformers.models.clip.modeling_clip import CLIPEncoderLayer

from common.devices import cpu_has
from model.model_minimind import Attention, MiniMindBlock


def cast_frozen(model, dtype: torch.dtype):
    """Matrices that do not learn, in the dtype to which autocast would cast them anew in each step: the same numbers.

    A quarter of the time of CLIP ViT-B/16 on a CPU with AMX. Returns the model, whose norms stay as they are.
    """
    for module in model.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and not module.weight.requires_grad:
            module.to(dtype)
    return model


def better_in_blocks(device: torch.device, dtype: torch.dtype) -> bool:
    """Is `attention_in_blocks` faster here? In bfloat16 on a CPU with AMX."""
    return device.type == "cpu" and dtype == torch.bfloat16 and cpu_has("amx_bf16")


def choose_attention(model, device: torch.device, dtype: torch.dtype) -> None:
    """`attention_in_blocks` where it is faster. Experts, whose rows have a mask, do without."""
    if better_in_blocks(device, dtype):
        for module in model.modules():
            if isinstance(module, Attention):
                module.in_blocks = True


def compile_layers(model) -> None:
    """torch.compile for the layers of decoder and encoder, each for itself and for rows of any length.

    All layers of a kind share what is compiled for the first, so it takes half a minute where the whole model takes
    several.
    """
    for module in model.modules():
        if isinstance(module, (MiniMindBlock, CLIPEncoderLayer)):
            module.compile(dynamic=True)
