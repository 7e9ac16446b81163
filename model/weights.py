"""Weights on disk: `out/{llm,pretrain_vlm,sft_vlm,scst_vlm}_{hidden}{_moe}.pth`, fp16, without the encoder.

A small JSON next to each file describes it: configuration, tokenizer, encoder, data, step. All files are written under
a temporary name, flushed and renamed, so a full disk or a power failure leaves the last good file.

This module also reads weights of the public MiniMind-V without a JSON, weights with the names from before April 2025,
and Transformers folders. Other files raise an error. build.py makes models from the weights.
"""

import hashlib
import re
import shlex
import sys
from inspect import signature
from pathlib import Path

import safetensors.torch
import torch
import transformers

from common.files import write_json, write_safely
from common.start import script
from model.families import family_of
from model.files import check_number, check_records, impostor, read_json, why_unreadable
from model.generations import LATER_FIELDS, MINIMIND_2, MINIMIND_3, Generation, generation_of, own_names
from model.model_minimind import MiniMindConfig
from model.model_vlm import VLMConfig

SIDECAR = "minimind.json"  # in a Transformers folder: the JSON of the original weights
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")

OLDER_NAMES = (  # name before April 2025 → name today
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^layers\.", "model.layers."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.feed_forward\.", ".mlp."),
    (r"\.shared_experts\.w", ".shared_experts.0.w"),  # there was only one
    (r"\.w1\.", ".gate_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.w3\.", ".up_proj."),
)


def files_of(folder: Path) -> list[Path]:
    """The files of weights in a Transformers folder: one, or the shards of an index. Raises FileNotFoundError."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            shards = read_json(folder / f"{name}.index.json").get("weight_map")
            names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
            if not names or any(Path(shard).name != shard for shard in names):
                raise ValueError(f'{folder / name}.index.json: expected "weight_map": {{tensor: file in this folder}}')
            return [folder / shard for shard in names]
    raise FileNotFoundError(f"{folder}: no model.safetensors, pytorch_model.bin or index of shards there")


def read_weights(path) -> dict[str, torch.Tensor]:
    """Reads a .safetensors file, a pickle of PyTorch or a Transformers folder: {name in the file: tensor}.

    Only tensors are unpickled. Raises ValueError for a file that would run code and for a damaged one,
    FileNotFoundError for a missing one.
    """
    path = Path(path)
    if path.is_dir():
        return {key: value for file in files_of(path) for key, value in read_weights(file).items()}
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        check_records(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip and pickle raise different errors
        if what := impostor(path):
            raise ValueError(f"{path} {what}") from None
        reason = why_unreadable(error)
        raise ValueError(f"{path} is not a file of weights that can be read safely: {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} contains a {type(state).__name__}, expected a state dict: names and tensors")
    return state


def check_values(state: dict[str, torch.Tensor], path) -> None:
    """Raises ValueError, which names the first tensor that is not dense, not of floats, or not finite."""
    for key, value in state.items():
        if not value.is_floating_point() or value.layout != torch.strided:
            kind = str(value.layout if value.layout != torch.strided else value.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {key} is {kind}, expected floats. Download or convert the weights again")
        if not value.isfinite().all():
            raise ValueError(
                f"{path}: {key} contains NaN or infinite values.\n"
                "Use an earlier checkpoint, or download the weights again"
            )


def bare_name(weights: Path) -> str:
    """The name of weights without .pth; the name of a folder may contain dots, such as mine-v0.1."""
    return weights.name if weights.is_dir() else weights.stem


def sidecar_path(weights: Path) -> Path:
    """The JSON of weights in a file or folder."""
    return weights / "config.json" if weights.is_dir() else weights.with_suffix(".json")


def read_sidecar(weights: Path) -> dict:
    """The JSON next to weights. "config", "tokenizer", "vision_model" and "prompts" are always objects, maybe empty.

    In a Transformers folder, config.json gives "config", reduced to our own fields; the rest comes from SIDECAR. Raises
    ValueError for invalid values.
    """
    path = sidecar_path(weights)
    sidecar = read_json(path) if path.is_file() else {}
    if weights.is_dir():
        if (kind := sidecar.get("model_type")) not in ("minimind", "minimind-v"):
            back = f". Convert it: python -m scripts.convert_vlm --to pth --weights {weights}"
            back *= kind == "llava" or "made_by" in sidecar  # of model/llm.py
            raise ValueError(f"{path}: expected a MiniMind with model_type minimind-v, got {kind}{back}")
        fields = [*signature(MiniMindConfig).parameters, "image_ids", "image_special_token", "projector"]
        fields.append("spatial_merge_size")
        sidecar = own_names(sidecar)
        config = {key: sidecar[key] for key in fields if sidecar.get(key) is not None}
        sidecar = (read_json(weights / SIDECAR) if (weights / SIDECAR).is_file() else {}) | {"config": config}
        for key, folder in (("tokenizer", weights), ("vision_model", weights / "vision_encoder")):
            if sidecar.get(key):
                sidecar[key]["path"] = str(folder)
    for key in ("config", "tokenizer", "vision_model", "prompts"):
        if not isinstance(sidecar.setdefault(key, {}), dict):
            raise ValueError(
                f"{path}: {key!r} must be an object. Fix or remove the file; the shapes of the weights give the rest"
            )
    check_config(sidecar["config"], path)
    for prompts in sidecar["prompts"].values():
        if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                f'{path}: "prompts" contains {prompts!r}, expected lists of questions, {{"en": ["What is this?"]}}'
            )
    return sidecar


def known_names(state: dict) -> tuple[dict[str, torch.Tensor], bool, list[str]]:
    """Renames a state dict of any generation to today's names.

    Removes prefixes of wrappers; drops buffers, the encoder and values that are not tensors; stores the shared matrix
    under both names, embedding and head. Returns (state, whether it is an older one that needs `half_split`, dropped
    names).
    """
    named, ignored = {}, []
    for key, value in state.items():
        key = re.sub(r"^((module|_orig_mod)\.)+", "", str(key))
        if not isinstance(value, torch.Tensor) or re.search(r"^vision_encoder\.|mask|pos_cis|freqs_", key):
            ignored.append(key)
        else:
            named[key] = value
    older = "layers.0.attention.wq.weight" in named
    if older:
        for pattern, name in OLDER_NAMES:
            named = {re.sub(pattern, name, key): value for key, value in named.items()}
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if embed in named or head in named:
        named = {embed: named.get(head), head: named.get(embed)} | named
    return named, older, ignored


def half_split(state: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    """Reorders older q and k weights for today's rotary positions.

    RoPE used to rotate entries 2i and 2i + 1 of a head together; today it rotates i and i + d/2. So the even rows of
    each head move before the odd ones. Attention scores are sums over a head and do not change.
    """

    def reorder(weight):
        D = weight.shape[1]
        return weight.reshape(-1, D // heads // 2, 2, D).transpose(1, 2).reshape(weight.shape)

    turned = (".self_attn.q_proj.weight", ".self_attn.k_proj.weight")
    return {key: reorder(value) if key.endswith(turned) else value for key, value in state.items()}


def weights_name(stage: str, config: MiniMindConfig) -> str:
    """The file name of weights, such as sft_vlm_512_moe.pth."""
    return f"{stage}_{config.hidden_size}{'_moe' if config.use_moe else ''}.pth"


def find_weights(name: str, out_dir, hidden_size: int | None, use_moe: bool) -> Path | None:
    """The weights for --from_weight: "none" (returns None), a file, a Transformers folder, or a stage in `out_dir`.

    For a stage, the file with the requested width and kind (default: 512, dense) comes first, otherwise the only file
    that does not contradict the flags. Raises FileNotFoundError, or ValueError if several files fit.
    """
    if name == "none":
        return None
    path, out_dir = Path(name), Path(out_dir)
    if path.suffix in SUFFIXES or name != path.name or (path / "config.json").is_file():
        if not path.exists():
            raise FileNotFoundError(f"--from_weight {name}: no such file or folder")
        return path
    stages = [name, "lm"] if name == "llm" else [name]  # lm_512.pth: before April 2025
    exact = [out_dir / f"{stage}_{hidden_size or 512}{'_moe' if use_moe else ''}.pth" for stage in stages]
    for path in exact:
        if path.is_file():
            return path
    width, moe = hidden_size or r"\d+", "_moe" if use_moe else "(_moe)?"
    fits = re.compile(rf"({'|'.join(map(re.escape, stages))})_{width}{moe}\.pth")
    there = sorted(path.name for path in out_dir.glob("*.pth"))
    matches = list(filter(fits.fullmatch, there))
    if len(matches) == 1:
        return out_dir / matches[0]
    if matches:
        raise ValueError(
            f"--from_weight {name}: {out_dir} contains {', '.join(matches)}\n"
            f"Choose one by its path: --from_weight {out_dir / matches[0]}"
        )
    commands = {
        "pretrain_vlm": "make it: python train_pretrain_vlm.py",
        "sft_vlm": "download it: python -m scripts.download --what vlm",
        "scst_vlm": "make it: python train_scst_vlm.py",
        "llm": "download it: python -m scripts.download --what llm",
    }
    raise FileNotFoundError(
        f"--from_weight {name}: no {exact[0]} ({out_dir} has {', '.join(there) or 'no .pth file'})\n"
        f"Name another, or none, or {commands.get(name, 'a stage: ' + ', '.join(commands))}"
    )


INTEGERS = {  # field of a configuration → minimum, maximum
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), (1, 10**7)),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), (1, 10**4)),
    **dict.fromkeys(("n_routed_experts", "num_experts_per_tok", "head_dim", "spatial_merge_size"), (1, 10**4)),
    **dict.fromkeys(("n_shared_experts", "bos_token_id", "eos_token_id"), (0, 10**7)),
    "ve_hidden_size": (1, 10**6),
}
NUMBERS = {"dropout": (0, 0.99), "rms_norm_eps": (1e-12, 0.1), "rope_theta": (1, 1e12), "aux_loss_alpha": (0, 1e3)}
SWITCHES = ("flash_attn", "use_moe", "seq_aux", "norm_topk_prob", "norm_top1_prob", "qk_norm", "norm_in_fp32")
TEXTS = ("hidden_act", "scoring_func", "image_special_token", "projector")


def check_config(config: dict, path: Path) -> None:
    """Raises ValueError, which names the first invalid value of a configuration from a file."""
    for key, value in config.items():
        if key in INTEGERS:
            public = key == "n_shared_experts" and value is True  # public files write true for 1
            check_number(path, key, int(value) if public else value, *INTEGERS[key])
        elif key in NUMBERS:
            check_number(path, key, value, *NUMBERS[key], float)
        elif key in SWITCHES and not isinstance(value, bool):
            raise ValueError(f"{path}: {key} is {value!r}, expected true or false")
        elif key in TEXTS and not isinstance(value, str):
            raise ValueError(f"{path}: {key} is {value!r}, expected a text")
        elif key == "image_ids" and not (isinstance(value, list) and value and all(type(i) is int for i in value)):
            raise ValueError(f"{path}: {key} is {str(value)[:50]}, expected a list of token ids")
        elif key not in (*INTEGERS, *NUMBERS, *SWITCHES, *TEXTS, "image_ids"):
            raise ValueError(f"{path}: {key!r} is unknown to this model. Is the file from a later version?")


def generation_at(path) -> Generation:
    """The generation of the weights in a file or folder. Raises ValueError for an unsupported one."""
    state, older, _ = known_names(read_weights(path))
    return generation_of(state, path, older)


def config_of(state: dict, path: Path, known: dict, generation: Generation = MINIMIND_2) -> dict:
    """The architecture of a state dict from `known_names`: from its shapes, then `known`, the "config" of its JSON,
    then its generation. Raises ValueError for weights of another architecture, or if `known` contradicts them."""
    use_moe = "model.layers.0.mlp.gate.weight" in state
    up = f"model.layers.0.mlp.{'experts.0.' if use_moe else ''}up_proj.weight"
    for key in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", up):
        if key not in state:
            sees = any(re.match(r"(vision_model|vit|dinov2\w*|embeddings)\.", key) for key in state)
            what = "an encoder; pass its folder with --vision_model_path" if sees else "not a known form of MiniMind"
            raise ValueError(f"{path} has no {key} (first tensor: {next(iter(state), 'none')}): this is {what}")
    vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
    layers = 1 + max(int(match[1]) for key in state if (match := re.match(r"model\.layers\.(\d+)\.", key)))
    heads = known.get("num_attention_heads", 8)
    read = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": layers, "use_moe": use_moe}
    read["num_attention_heads"] = heads
    keys = state["model.layers.0.self_attn.k_proj.weight"].shape[0]
    if generation is MINIMIND_3:
        read |= heads_of(state, path, keys)
    else:
        public = "num_attention_heads" in known or keys * 4 == hidden_size  # 2 key heads, 8 query heads
        if not public or hidden_size % heads or keys % (hidden_size // heads):
            raise ValueError(
                f"num_attention_heads={heads} does not fit {path}, with width {hidden_size} and keys of {keys}. Pass "
                "the --num_attention_heads that it was trained with"
            )
        read["num_key_value_heads"] = keys // (hidden_size // heads)
    read["intermediate_size"] = state[up].shape[0]
    if use_moe:
        read["n_routed_experts"] = state["model.layers.0.mlp.gate.weight"].shape[0]
        read["n_shared_experts"] = sum("layers.0.mlp.shared_experts." in key and "up_proj" in key for key in state)
    for key, value in read.items():
        if key in known and known[key] != value:
            raise ValueError(
                f"{sidecar_path(path)} says {key}={known[key]}, but {path.name} contains {value}: they do not fit"
            )
    return generation.decoder | known | read


def heads_of(state: dict, path: Path, keys: int) -> dict:
    """Width and number of heads in MiniMind-3, from the norm of its queries. keys: rows of k_proj."""
    norms = [state.get(f"model.layers.0.self_attn.{name}.weight") for name in ("q_norm", "q_proj")]
    width, queries = (0 if weight is None else len(weight) for weight in norms)
    if not width or queries % width or keys % width:
        raise ValueError(
            f"{path}: q_norm of {width} does not fit queries of {queries} and keys of {keys}. Download the file again"
        )
    return {"head_dim": width, "num_attention_heads": queries // width, "num_key_value_heads": keys // width}


def refuse_other_architecture(path: Path, config: VLMConfig, resumable: bool = False) -> str:
    """Raises ValueError if saving would overwrite another model: file names contain the width but not the depth.

    Also raises it for an unreadable file; but with a checkpoint to resume from, returns a line for the user instead.
    """
    there = {}
    if path.is_file():
        try:
            state, older, _ = known_names(read_weights(path))
            known = {"num_attention_heads": config.num_attention_heads} | read_sidecar(path)["config"]
            there = config_of(state, path, known, generation_of(state, path, older))
        except ValueError as error:
            if not resumable:
                raise
            return f"{error}\nIt will be written again from the checkpoint, which is complete"
    differences = [
        f"{key} {value}, not {getattr(config, key)}"
        for key, value in there.items()
        if key not in ("dropout", "flash_attn", "image_special_token") and value != getattr(config, key)
    ]
    if differences:
        raise ValueError(
            f"{path} contains another model ({', '.join(differences)}). To keep it, choose another --out_dir"
        )
    return ""


def fingerprint(encoder: torch.nn.Module) -> str:
    """sha256 of an encoder's weights, independent of the file format and the version of Transformers."""
    state = sorted(encoder.state_dict().items())
    # position_ids are a buffer that only some versions of Transformers keep.
    parts = ((key, value.cpu().float().contiguous().numpy()) for key, value in state if "position_ids" not in key)
    if family_of(encoder.config.model_type).renamed:  # in each version the first number in a name is the layer
        parts = sorted((re.findall(r"\.(\d+)\.", key)[:1], hashlib.sha256(part).digest()) for key, part in parts)
    digest = hashlib.sha256()
    for _, part in parts:
        digest.update(part)
    return digest.hexdigest()


def tokenizer_hash(folder) -> str:
    """sha256 of the tokenizer.json in a folder."""
    return hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()


def make_sidecar(model, origin, **facts) -> dict:
    """The content of the JSON next to weights. origin: from `build_model`; facts: further entries."""
    fields = [*signature(MiniMindConfig).parameters, "ve_hidden_size", "image_special_token", "projector"]
    fields = [key for key in fields if key not in LATER_FIELDS or model.config.qk_norm]
    fields += ["spatial_merge_size"] * (getattr(model.config, "spatial_merge_size", 1) > 1)
    eyes = origin.encoder_sha256
    return {
        "config": {key: getattr(model.config, key) for key in fields if hasattr(model.config, key)},
        "tokenizer": {"path": str(origin.tokenizer_path), "sha256": tokenizer_hash(origin.tokenizer_path)},
        "vision_model": {"path": str(origin.vision_model_path), "sha256": eyes} if eyes else {},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": shlex.join([*script(), *sys.argv[1:]]),
        **facts,
    }


def save_weights(path, model, sidecar: dict) -> None:
    """Saves fp16 weights without the encoder, and their JSON. Raises ValueError for NaN or infinity, OSError."""
    state = {key: value.detach().to("cpu", torch.float16) for key, value in model.text_state_dict().items()}
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} contains values that are not finite in fp16; {path} was not changed")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # stored once
    write_safely(path, lambda file: torch.save(state, file))
    write_json(Path(path).with_suffix(".json"), sidecar)


STAGES = {0: "pretrain_vlm", 1: "sft_vlm", 2: "sft_vlm_multi", 3: "scst_vlm"}  # numbers: of --model_mode
