"""Converts a decoder to a stock language model of Transformers that computes the same, and back. Used by
scripts.convert_vlm.

The decoder of MiniMind2-V becomes a Llama or, with experts, a GraniteMoeShared: its softmax over the k best scores
equals our softmax over all scores, normalised over these k. The text half of a LLaVA is the same (llava.py). The
decoder of minimind-3v becomes a Qwen3 or Qwen3Moe, whose weights have the same names as ours.
"""

from dataclasses import replace
from pathlib import Path

from common.files import write_json
from model.build import build, plan_model, read_pretrained
from model.export import restore_tokenizer, token_ids, write_tokenizer, write_weights
from model.files import read_json
from model.model_minimind import MiniMindConfig
from model.stock import from_stock, to_stock
from model.weights import read_weights

SAME_FIELDS = (  # of the configurations of Llama, Granite, Qwen3 and ours
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("rms_norm_eps", "max_position_embeddings", "hidden_act"),
)
TYPES = {"Llama": "llama", "GraniteMoeShared": "granitemoeshared", "Qwen3": "qwen3", "Qwen3Moe": "qwen3_moe"}
OURS = {"made_by": "MiniMind-V"}  # in config.json; Transformers keeps it when it saves the model again


def build_decoder(args, weights: Path):
    """As `build_model`, but only the language model; the projector of a VLM is ignored."""
    saved = read_pretrained(weights, args.num_attention_heads)
    sees = [key for key in saved.state if key.startswith("vision_proj.")]
    state = {key: value for key, value in saved.state.items() if key not in sees}
    saved = replace(saved, state=state, ignored=[*saved.ignored, *sees])
    plan = plan_model(args, saved, sees=False, training=False)
    model, origin = build(plan, saved)
    return model, plan.tokenizer, origin


# ---------------------------------------------------------------------------- configuration


def text_config(config: MiniMindConfig, tokenizer, to: str) -> dict:
    """config.json for all Transformers since 4.51. Raises ValueError for experts that Granite cannot represent."""
    text = {key: getattr(config, key) for key in SAME_FIELDS} | token_ids(tokenizer)
    text |= {"vocab_size": config.vocab_size, "rope_theta": config.rope_theta, "tie_word_embeddings": True}
    k, kind = config.num_experts_per_tok, "Llama"
    if config.use_moe:
        text |= {"num_experts_per_tok": k, "router_aux_loss_coef": config.aux_loss_alpha}
    if config.qk_norm:
        kind = "Qwen3Moe" if config.use_moe else "Qwen3"
        text["head_dim"] = config.head_dim
        if config.use_moe:
            text |= {"num_experts": config.n_routed_experts, "moe_intermediate_size": config.intermediate_size}
            text |= {"norm_topk_prob": config.norm_topk_prob if k > 1 else config.norm_top1_prob}
            text |= {"decoder_sparse_step": 1, "mlp_only_layers": []}  # experts in every layer
    elif config.use_moe:
        if k == 1 or not config.norm_topk_prob:
            raise ValueError(
                f"--to {to} requires experts whose weights sum to 1, but this model has num_experts_per_tok={k} and "
                f"norm_topk_prob={config.norm_topk_prob}. Use --to transformers"
            )
        kind = "GraniteMoeShared"
        text |= {
            "num_local_experts": config.n_routed_experts,
            "shared_intermediate_size": config.n_shared_experts * config.intermediate_size,
            "attention_multiplier": (config.hidden_size // config.num_attention_heads) ** -0.5,
        }
    return {"model_type": TYPES[kind], "architectures": [f"{kind}ForCausalLM"]} | text


def own_config(text: dict) -> dict:
    """The inverse of `text_config`, for any version of Transformers that saved it."""
    config = {key: text[key] for key in ("vocab_size", *SAME_FIELDS)}
    config["rope_theta"] = text.get("rope_theta") or text["rope_parameters"]["rope_theta"]
    if (k := text.get("num_experts_per_tok")) is None:
        return config
    config |= {"use_moe": True, "num_experts_per_tok": k, "aux_loss_alpha": text["router_aux_loss_coef"]}
    config["n_routed_experts"] = text.get("num_experts") or text["num_local_experts"]
    config["n_shared_experts"] = text.get("shared_intermediate_size", 0) // text["intermediate_size"]
    if text["model_type"] == "qwen3_moe":
        config["norm_topk_prob" if k > 1 else "norm_top1_prob"] = text["norm_topk_prob"]
    return config


# ---------------------------------------------------------------------------- folders


def write_llm(folder: Path, model, tokenizer, tokenizer_path, sidecar: dict) -> None:
    """Writes a folder that stock Transformers loads. Raises ValueError, see `text_config`."""
    write_json(folder / "config.json", text_config(model.config, tokenizer, "llm") | OURS | {"dtype": "float32"})
    write_json(folder / "generation_config.json", token_ids(tokenizer) | {"max_new_tokens": 512})
    write_tokenizer(folder, tokenizer, tokenizer_path, "llm")
    write_weights(folder / "model.safetensors", to_stock(model.text_state_dict(), model.config))


def unpack_llm(folder: Path, to: Path) -> None:
    """Converts a folder of `write_llm` to our own architecture, without the code.

    Raises ValueError for any other language model.
    """
    text = read_json(folder / "config.json")
    if not OURS.items() <= text.items():
        raise ValueError(
            f"--weights {folder} is a {text['model_type']} that --to llm did not make, so it contains no MiniMind"
        )
    config = own_config(text)
    restore_tokenizer(folder, to, "tokenizer")
    write_json(to / "config.json", config | {"model_type": "minimind"})
    write_weights(to / "model.safetensors", from_stock(read_weights(folder), config))
