"""A MiniMind-V as a stock LLaVA of Transformers, and back, computing the same. Used by scripts.convert_vlm.

LLaVA is ours in other words: a vision tower, a projector, a language model. Dense, that is a Llama; with experts a
GraniteMoeShared, whose softmax over the k best scores is our softmax over all, made to sum to 1 over these.

Shapes: D hidden_size, I intermediate_size, E experts, S shared experts.
"""

import json
import re
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
    token_ids,
    write_encoder,
    write_tokenizer_config,
    write_weights,
)
from model.families import family_of
from model.files import read_json
from model.model_minimind import MiniMindConfig
from model.processing import IMAGE_TAG
from model.processor import HIDE
from model.weights import SIDECAR, read_weights, tokenizer_hash

SAME_FIELDS = (  # of the configuration of a Llama, a Granite and ours
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("rms_norm_eps", "max_position_embeddings", "hidden_act"),
)


def llava_config(model, tokenizer) -> dict:
    """config.json as all Transformers since 4.48 read it. Raises ValueError for experts that Granite does not have."""
    config = model.config
    if config.qk_norm or config.projector == "mlp":
        raise ValueError(
            "--to llava: no stock LLaVA is a minimind-3v, with its norms and projector.\nUse --to transformers"
        )
    if config.spatial_merge_size > 1:
        raise ValueError("--to llava: no stock LLaVA merges patches as this model does.\nUse --to transformers")
    text = {key: getattr(config, key) for key in SAME_FIELDS} | token_ids(tokenizer)
    text |= {"vocab_size": config.vocab_size + 1, "rope_theta": config.rope_theta, "tie_word_embeddings": True}
    if not config.use_moe:
        text |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    elif config.num_experts_per_tok > 1 and config.norm_topk_prob:
        text |= {
            "model_type": "granitemoeshared",
            "architectures": ["GraniteMoeSharedForCausalLM"],
            "num_local_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "shared_intermediate_size": config.n_shared_experts * config.intermediate_size,
            "attention_multiplier": (config.hidden_size // config.num_attention_heads) ** -0.5,
            "router_aux_loss_coef": config.aux_loss_alpha,
        }
    else:
        raise ValueError(
            "--to llava wants experts whose weights sum to 1, which num_experts_per_tok="
            f"{config.num_experts_per_tok} and norm_topk_prob={config.norm_topk_prob} do not give. "
            "Use --to transformers"
        )
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": "float32",
        "text_config": text,
        "vision_config": encoder_config(model.vision_encoder),
        "image_token_index": config.vocab_size,  # <image>, a token more than we have, so that @ stays text
        "image_seq_length": len(config.image_ids),
        "projector_hidden_act": "linear",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": strategy(model.vision_encoder),
        "tie_word_embeddings": True,
        **token_ids(tokenizer),
    }


def strategy(encoder) -> str:
    """LLaVA's word for which features it takes: all but the first, or all."""
    return "default" if family_of(encoder.config.model_type).class_token else "full"


# ---------------------------------------------------------------------------- weights


def to_llava(state: dict, config: MiniMindConfig) -> dict[str, torch.Tensor]:
    """Our weights under LLaVA's names, in the layout before Transformers 5, which all versions read."""
    experts = re.compile(r"\.mlp\.(gate|experts|shared_experts)\.")
    llava = {f"language_model.{k}": v for k, v in state.items() if k.startswith("model.") and not experts.search(k)}
    # The row of <image>, which the picture overwrites. As the head, it gives <image> a logit of 0: the
    # generation_config.json sees to it that it is never said.
    embed = F.pad(state["model.embed_tokens.weight"], (0, 0, 0, 1))
    llava |= {"language_model.model.embed_tokens.weight": embed, "language_model.lm_head.weight": embed.clone()}
    first = [state[f"vision_proj.vision_proj.0.{name}"] for name in ("weight", "bias")]
    second = [torch.eye(config.hidden_size), torch.zeros(config.hidden_size)]  # LLaVA has two layers, here of no effect
    for layer, weights in (("linear_1", first), ("linear_2", second)):
        llava |= {f"multi_modal_projector.{layer}.{name}": w for name, w in zip(("weight", "bias"), weights)}
    if not config.use_moe:
        return llava
    for i in range(config.num_hidden_layers):

        def stack(kind, matrix, count, i=i):  # (count, I, D), or (count, D, I) of "down"
            return torch.stack([state[f"model.layers.{i}.mlp.{kind}.{e}.{matrix}_proj.weight"] for e in range(count)])

        layer, E, S = f"language_model.model.layers.{i}.", config.n_routed_experts, config.n_shared_experts
        gate, up, down = (stack("experts", matrix, E) for matrix in ("gate", "up", "down"))
        llava[f"{layer}block_sparse_moe.router.layer.weight"] = state[f"model.layers.{i}.mlp.gate.weight"]  # (E, D)
        llava[f"{layer}block_sparse_moe.input_linear.weight"] = torch.cat([gate, up], dim=1)  # (E, 2·I, D)
        llava[f"{layer}block_sparse_moe.output_linear.weight"] = down  # (E, D, I)
        if S:  # several are one, S times as wide
            gate, up, down = (stack("shared_experts", matrix, S) for matrix in ("gate", "up", "down"))
            llava[f"{layer}shared_mlp.input_linear.weight"] = torch.cat([gate, up]).flatten(0, 1)  # (2·S·I, D)
            llava[f"{layer}shared_mlp.output_linear.weight"] = down.transpose(0, 1).flatten(1)  # (D, S·I)
    return llava


def from_llava(state: dict, config: dict) -> dict[str, torch.Tensor]:
    """The inverse of `to_llava`; config: our fields. Both layers of the projector, if trained further, become one."""
    ours = {}
    for key, value in state.items():
        name = key.removeprefix("language_model.")
        layer, routed, matrix = name.partition(".block_sparse_moe.")
        if not routed:
            layer, _, matrix = name.partition(".shared_mlp.")
        if name == key or name.startswith("lm_head."):
            continue
        if matrix == "router.layer.weight":
            ours[f"{layer}.mlp.gate.weight"] = value
        elif matrix:
            into = "input" in matrix  # gate and up, else down
            if not routed:  # (2·S·I, D) → (S, 2·I, D), or (D, S·I) → (S, D, I)
                S = config["n_shared_experts"]
                value = value.unflatten(0, (2, S, -1)) if into else value.unflatten(1, (S, -1))
                value = value.transpose(0, 1).flatten(1, 2) if into else value.transpose(0, 1)
            kind = "experts" if routed else "shared_experts"
            for part, experts in zip(("gate", "up") if into else ("down",), value.chunk(1 + into, dim=1)):
                ours |= {f"{layer}.mlp.{kind}.{e}.{part}_proj.weight": expert for e, expert in enumerate(experts)}
        else:
            ours[name] = value
    ours["model.embed_tokens.weight"] = ours["model.embed_tokens.weight"][:-1]
    first, bias, second, shift = (
        state[f"multi_modal_projector.linear_{i}.{name}"].double() for i in (1, 2) for name in ("weight", "bias")
    )
    ours["vision_proj.vision_proj.0.weight"] = (second @ first).float()
    ours["vision_proj.vision_proj.0.bias"] = (second @ bias + shift).float()
    return ours


# ---------------------------------------------------------------------------- folders


def edit_tokenizer(source: Path, target: Path, change) -> None:
    """Writes change(tokenizer.json) as the library writes it: changed and changed back, it has the sha256 it had."""
    text = (source / "tokenizer.json").read_text(encoding="utf-8")
    changed = json.dumps(change(json.loads(text)), indent=2, ensure_ascii=False)
    (target / "tokenizer.json").write_text(changed + text[len(text.rstrip()) :], encoding="utf-8")


def write_llava(folder: Path, model, tokenizer, tokenizer_path, sidecar: dict) -> None:
    config = llava_config(model, tokenizer)
    image = {"id": config["image_token_index"], "content": IMAGE_TAG, "special": True, "normalized": False}
    image |= {"single_word": False, "lstrip": False, "rstrip": False}

    def change(ours):
        if ours.get("normalizer"):
            raise ValueError(f"--to llava: {tokenizer_path}/tokenizer.json has a normalizer, MiniMind's have none")
        added = [token | {"normalized": False} for token in ours["added_tokens"]]  # found before HIDE is taken out
        without = {"type": "Replace", "pattern": {"String": HIDE}, "content": ""}
        return ours | {"added_tokens": [*added, image], "normalizer": without}

    edit_tokenizer(Path(tokenizer_path), folder, change)
    write_tokenizer_config(folder, tokenizer.pad_token)
    state = to_llava(model.text_state_dict(), model.config)
    eyes = encoder_state(model.vision_encoder)
    if config["vision_config"]["model_type"] == "vit":  # LLaVA's has a pooler, which it does not use
        width = config["vision_config"]["hidden_size"]
        eyes |= {"pooler.dense.weight": torch.zeros(width, width), "pooler.dense.bias": torch.zeros(width)}
    write_weights(folder / "model.safetensors", state | {f"vision_tower.{key}": value for key, value in eyes.items()})
    write_json(folder / "config.json", config)
    suppress = {"max_new_tokens": 512, "suppress_tokens": [image["id"]]}
    write_json(folder / "generation_config.json", token_ids(tokenizer) | suppress)
    write_json(folder / "preprocessor_config.json", model.processor.to_dict())
    # It counts the patches itself; what else its tower gives, it is told.
    extra = family_of(config["vision_config"]["model_type"]).class_token
    extra += config["vision_config"].get("num_register_tokens", 0)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": IMAGE_TAG,
        "patch_size": config["vision_config"]["patch_size"],
        "num_additional_image_tokens": extra,
        "vision_feature_select_strategy": strategy(model.vision_encoder),
    }
    write_json(folder / "processor_config.json", processor)


def unpack_llava(folder: Path, to: Path) -> None:
    """A folder of `write_llava` as one of our own architecture, without the code.

    Raises ValueError for a LLaVA of another structure.
    """
    llava = read_json(folder / "config.json")
    text = llava["text_config"]
    if text["model_type"] not in ("llama", "granitemoeshared") or llava.get("projector_hidden_act") != "linear":
        raise ValueError(f"--weights {folder} is a LLaVA that --to llava did not make: there is no MiniMind in it")
    config = {key: text[key] for key in SAME_FIELDS} | {"vocab_size": text["vocab_size"] - 1}
    config["rope_theta"] = text.get("rope_theta") or text["rope_parameters"]["rope_theta"]  # as the version writes it
    if text["model_type"] == "granitemoeshared":
        config |= {
            "use_moe": True,
            "n_routed_experts": text["num_local_experts"],
            "num_experts_per_tok": text["num_experts_per_tok"],
            "n_shared_experts": text["shared_intermediate_size"] // text["intermediate_size"],
            "aux_loss_alpha": text["router_aux_loss_coef"],
        }

    def change(theirs):
        added = [token for token in theirs["added_tokens"] if token["content"] != IMAGE_TAG]
        return theirs | {"added_tokens": added, "normalizer": None}

    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"--weights {folder}: no tokenizer.json there\nSave it too: processor.save_pretrained(FOLDER)"
        )
    edit_tokenizer(folder, to, change)
    write_tokenizer_config(to, read_json(folder / "tokenizer_config.json")["pad_token"])
    at = read_json(to / "tokenizer.json")["model"]["vocab"]["@"]
    patches = llava["image_seq_length"]
    config |= {"model_type": "minimind-v", "image_special_token": "@" * patches, "image_ids": [at] * patches}
    write_json(to / "config.json", config)
    state = read_weights(folder)
    write_weights(to / "model.safetensors", from_llava(state, config))
    tower = "vision_tower."
    eyes = {key.removeprefix(tower): value for key, value in state.items() if key.startswith(tower)}
    eyes = {key: value for key, value in eyes.items() if not key.startswith("pooler.")}
    path = folder / "preprocessor_config.json"  # Transformers 5, saving again, has it in another file
    pixels = read_json(path) if path.is_file() else read_json(folder / "processor_config.json")["image_processor"]
    kind = llava["vision_config"]["model_type"]
    write_encoder(
        to / "vision_encoder", eyes if family_of(kind).renamed else prefixed(eyes), llava["vision_config"], pixels
    )
    if (folder / SIDECAR).is_file():
        write_json(to / SIDECAR, read_json(folder / SIDECAR) | {"tokenizer": {"sha256": tokenizer_hash(to)}})


@contextmanager
def unpacked(weights: Path):
    """A path that `build_model` takes: of a LLaVA a temporary folder of our architecture, of all else itself."""
    config = weights / "config.json"
    if not config.is_file() or read_json(config).get("model_type") != "llava":
        yield weights
        return
    with tempfile.TemporaryDirectory() as temporary:
        unpack_llava(weights, Path(temporary))
        yield Path(temporary)
