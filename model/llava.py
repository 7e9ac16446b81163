"""Converts a MiniMind-V to a stock LLaVA of Transformers that computes the same, and back. Used by scripts.convert_vlm.

LLaVA has the same structure: a vision tower, a projector, and a language model, which llm.py converts.
"""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from common.files import write_json
from model.export import (
    encoder_config,
    encoder_state,
    prefixed,
    restore_tokenizer,
    token_ids,
    write_encoder,
    write_tokenizer,
    write_weights,
)
from model.families import family_of
from model.files import read_json
from model.llm import TYPES, own_config, text_config, unpack_llm
from model.model_minimind import MiniMindConfig
from model.processing import IMAGE_TAG
from model.stock import from_stock, to_stock
from model.weights import read_weights


def llava_config(model, tokenizer) -> dict:
    """config.json for all Transformers since 4.48. Raises ValueError for a model that a stock LLaVA cannot express."""
    config = model.config
    if config.qk_norm or config.projector == "mlp":
        raise ValueError(
            "--to llava: a stock LLaVA does not have the norms and projector of minimind-3v.\nUse --to transformers"
        )
    if config.spatial_merge_size > 1:
        raise ValueError("--to llava: a stock LLaVA does not merge patches as this model does.\nUse --to transformers")
    text = text_config(config, tokenizer, "llava") | {"vocab_size": config.vocab_size + 1}
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": "float32",
        "text_config": text,
        "vision_config": encoder_config(model.vision_encoder),
        "image_token_index": config.vocab_size,  # <image>, an additional token, so that @ stays text
        "image_seq_length": len(config.image_ids),
        "projector_hidden_act": "linear",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": strategy(model.vision_encoder),
        "tie_word_embeddings": True,
        **token_ids(tokenizer),
    }


def strategy(encoder) -> str:
    """LLaVA's name for the features to use: "default" is all but the first, "full" is all."""
    return "default" if family_of(encoder.config.model_type).class_token else "full"


# ---------------------------------------------------------------------------- weights


def to_llava(state: dict, config: MiniMindConfig) -> dict[str, torch.Tensor]:
    """Our weights under LLaVA's names, in the layout from before Transformers 5, which all versions read."""
    llava = {f"language_model.{key}": value for key, value in to_stock(state, config).items()}
    # The row of <image>, whose embedding the picture replaces. In the head, it gives <image> a logit of 0, so
    # generation_config.json suppresses the token.
    embed = F.pad(state["model.embed_tokens.weight"], (0, 0, 0, 1))
    llava |= {"language_model.model.embed_tokens.weight": embed, "language_model.lm_head.weight": embed.clone()}
    first = [state[f"vision_proj.vision_proj.0.{name}"] for name in ("weight", "bias")]
    second = [
        torch.eye(config.hidden_size),
        torch.zeros(config.hidden_size),
    ]  # LLaVA has two layers; the second one is the identity
    for layer, weights in (("linear_1", first), ("linear_2", second)):
        llava |= {f"multi_modal_projector.{layer}.{name}": w for name, w in zip(("weight", "bias"), weights)}
    return llava


def from_llava(state: dict, config: dict) -> dict[str, torch.Tensor]:
    """The inverse of `to_llava`; config: our fields. Multiplies the two layers of the projector into one."""
    text = {key: value for key, value in state.items() if key.startswith("language_model.")}
    ours = from_stock({key.removeprefix("language_model."): value for key, value in text.items()}, config)
    ours["model.embed_tokens.weight"] = ours["model.embed_tokens.weight"][:-1]
    first, bias, second, shift = (
        state[f"multi_modal_projector.linear_{i}.{name}"].double() for i in (1, 2) for name in ("weight", "bias")
    )
    ours["vision_proj.vision_proj.0.weight"] = (second @ first).float()
    ours["vision_proj.vision_proj.0.bias"] = (second @ bias + shift).float()
    return ours


# ---------------------------------------------------------------------------- folders


def write_llava(folder: Path, model, tokenizer, tokenizer_path, sidecar: dict) -> None:
    """Writes a folder that stock Transformers loads as LLaVA. Raises ValueError, see `llava_config`."""
    config = llava_config(model, tokenizer)
    image = {"id": config["image_token_index"], "content": IMAGE_TAG, "special": True, "normalized": False}
    image |= {"single_word": False, "lstrip": False, "rstrip": False}
    write_tokenizer(folder, tokenizer, tokenizer_path, "llava", image)
    state = to_llava(model.text_state_dict(), model.config)
    eyes = encoder_state(model.vision_encoder)
    if config["vision_config"]["model_type"] == "vit":  # Transformers expects a pooler, which LLaVA does not use
        width = config["vision_config"]["hidden_size"]
        eyes |= {"pooler.dense.weight": torch.zeros(width, width), "pooler.dense.bias": torch.zeros(width)}
    write_weights(folder / "model.safetensors", state | {f"vision_tower.{key}": value for key, value in eyes.items()})
    write_json(folder / "config.json", config)
    suppress = {"max_new_tokens": 512, "suppress_tokens": [image["id"]]}
    write_json(folder / "generation_config.json", token_ids(tokenizer) | suppress)
    kind = {"processor_class": "LlavaProcessor"}  # transformers.js reads it from this file
    write_json(folder / "preprocessor_config.json", kind | model.processor.to_dict())
    # The processor counts the patches; it needs the number of additional tokens. "full" as if there were no class
    # token: LLaVA would subtract it again, but transformers.js, which ignores the strategy, would count it.
    processor = {
        "image_token": IMAGE_TAG,
        "patch_size": config["vision_config"]["patch_size"],
        "num_additional_image_tokens": config["vision_config"].get("num_register_tokens", 0),
        "vision_feature_select_strategy": "full",
    }
    write_json(folder / "processor_config.json", kind | processor)


def unpack_llava(folder: Path, to: Path) -> None:
    """Converts a folder of `write_llava` to our own architecture, without the code.

    Raises ValueError for a LLaVA of another structure.
    """
    llava = read_json(folder / "config.json")
    text = llava["text_config"]
    if text["model_type"] not in ("llama", "granitemoeshared") or llava.get("projector_hidden_act") != "linear":
        raise ValueError(f"--weights {folder} is a LLaVA that --to llava did not make, so it contains no MiniMind")
    config = own_config(text) | {"vocab_size": text["vocab_size"] - 1}
    restore_tokenizer(folder, to, "processor")
    at = read_json(to / "tokenizer.json")["model"]["vocab"]["@"]
    patches = llava["image_seq_length"]
    config |= {"model_type": "minimind-v", "image_special_token": "@" * patches, "image_ids": [at] * patches}
    write_json(to / "config.json", config)
    state = read_weights(folder)
    write_weights(to / "model.safetensors", from_llava(state, config))
    tower = "vision_tower."
    eyes = {key.removeprefix(tower): value for key, value in state.items() if key.startswith(tower)}
    eyes = {key: value for key, value in eyes.items() if not key.startswith("pooler.")}
    path = folder / "preprocessor_config.json"  # Transformers 5 saves it in another file
    pixels = read_json(path) if path.is_file() else read_json(folder / "processor_config.json")["image_processor"]
    pixels.pop("processor_class", None)
    kind = llava["vision_config"]["model_type"]
    state = eyes if family_of(kind).renamed else prefixed(eyes)
    write_encoder(to / "vision_encoder", state, llava["vision_config"], pixels)


@contextmanager
def unpacked(weights: Path):
    """A path for `build_model`: for a stock model a temporary folder in our architecture, otherwise `weights`."""
    unpack = {"llava": unpack_llava} | dict.fromkeys(TYPES.values(), unpack_llm)
    config = weights / "config.json"
    kind = read_json(config).get("model_type") if config.is_file() else None
    if kind not in unpack:
        yield weights
        return
    with tempfile.TemporaryDirectory() as temporary:
        unpack[kind](weights, Path(temporary))
        yield Path(temporary)
