"""The public generations of MiniMind-V: their differences in one table, and how to detect the generation of weights.

weights.py reads the rest from shapes. Unsupported generations are rejected with an error that names them.
"""

import re
from dataclasses import dataclass, field

from .defaults import DEFAULT_VISION_MODEL

# sha256 of the public tokenizer.json: of MINIMIND_2 and of MINIMIND_3
PUBLIC_TOKENIZER = "d98595c6aef70d95f72748582fb9b4f53d76dd58c1ae1dd702ad7c84e1caf5e4"
LATER_TOKENIZER = "71f32c68cf63a15355a8fc171b7594b3d41870fe0ddb54fc6aefa55f73a4a668"


@dataclass(frozen=True)
class Generation:
    """Facts about a generation that cannot be read from its weights."""

    name: str
    decoder: dict = field(default_factory=dict)  # arguments of `MiniMindConfig` that differ from its defaults
    eyes: dict = field(default_factory=dict)  # arguments of `VLMConfig.for_encoder`, likewise
    family: str = "clip"  # family of its encoder, see families.py
    placeholder: int = 34  # the id of its placeholder in its public tokenizer
    tokenizer: str = "./model"  # default folders of its parts
    vision_model: str = DEFAULT_VISION_MODEL
    hub: dict = field(default_factory=dict)  # commands to download them, if they are not the ones of a new model


MINIMIND_2 = Generation("MiniMind2-V")  # February 2025 to February 2026; also a model from scratch
MINIMIND_3 = Generation(  # since 2026-04-20
    "minimind-3v",
    decoder={
        "qk_norm": True,
        "norm_in_fp32": True,
        "rms_norm_eps": 1e-6,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 1,
        "n_shared_experts": 0,
        "norm_top1_prob": True,
        "aux_loss_alpha": 5e-4,
        "seq_aux": False,
    },
    eyes={"projector": "mlp", "image_token": "<|image_pad|>"},
    family="siglip",
    placeholder=12,
    tokenizer="./model/minimind-3v",
    vision_model="./model/vision_model/siglip2-base-p32-256-ve",
    hub={
        "tokenizer": "python -m scripts.download --generation 3v --what llm",
        "vision_model": "python -m scripts.download --generation 3v --what encoder",
    },
)

# Fields of the configuration that came with MINIMIND_3; the JSON of other weights omits them.
LATER_FIELDS = ("norm_top1_prob", "head_dim", "qk_norm", "norm_in_fp32", "projector")

PUBLIC_NAMES = {  # in the config.json of MINIMIND_3 → ours
    "num_experts": "n_routed_experts",
    "router_aux_loss_coef": "aux_loss_alpha",
    "image_hidden_size": "ve_hidden_size",
}


def generation_of(state: dict, path, older: bool = False) -> Generation:
    """The generation of a state dict under today's names. older: the file used the names from before April 2025.

    Raises ValueError for the unsupported generations v1, v3-alpha and v3-beta.
    """
    embed, keys = (state.get(f"model.{key}.weight") for key in ("embed_tokens", "layers.0.self_attn.k_proj"))
    if older and None not in (embed, keys) and 2 * keys.shape[0] == embed.shape[1]:
        raise ValueError(
            f"{path} is of the first MiniMind-V (2024), which has another architecture.\n"
            "Use MiniMind2-V: python -m scripts.download --what vlm"
        )
    first = state.get("vision_proj.mlp.0.weight")
    beta = first is not None and first.shape == (4 * 768,)
    if beta or (first is not None and first.ndim == 2):
        which = "v3-beta (2026-04-19)" if beta else "v3-alpha (until 2026-04-18)"
        raise ValueError(
            f"{path} is of {which}, which was trained with another encoder.\n"
            "Use minimind-3v of 2026-04-20: python -m scripts.download --generation 3v --what encoder vlm"
        )
    return MINIMIND_3 if any(".q_norm." in key for key in state) else MINIMIND_2


def own_names(config: dict) -> dict:
    """Renames the fields of a public config.json to ours; keeps other fields."""
    config = {PUBLIC_NAMES.get(key, key): value for key, value in config.items()}
    if patches := config.pop("image_token_len", None):
        config["image_special_token"] = MINIMIND_3.eyes["image_token"] * patches
        config["image_ids"] = [MINIMIND_3.placeholder] * patches
    return config


def without_thoughts(text: str) -> str:
    """An answer without the thought in <think> that MINIMIND_3 may write first, also if the thought is unfinished."""
    return re.sub(r"<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL).strip()
