"""Weights on disk: `out/{llm,pretrain_vlm,sft_vlm}_{hidden}{_moe}.pth`, fp16, without the encoder.

Beside each stands a small JSON that says what it is: configuration, tokenizer, encoder, data, step. Everything is
written beside, flushed and renamed, so that a full disk or a lost power supply leaves the last good file.
"""

import hashlib
import json
import os
import shlex
import sys
from inspect import signature
from pathlib import Path

import torch
import transformers

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing import load_tokenizer, read_json


def write_safely(path, write) -> None:
    """Calls write(temporary file) and renames it to `path`, so that there is a whole file at any moment."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        raise OSError(f"could not write {path} ({error}); what stood there is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value: dict) -> None:
    write_safely(path, lambda file: file.write(json.dumps(value, indent=1, ensure_ascii=False).encode()))


def read_weights(path) -> dict[str, torch.Tensor]:
    """A state dict. Only tensors are unpickled: a file that would run code is refused."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weights")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a zip, pickle or value error, by what is wrong with it
        raise ValueError(f"{path} is not a file of weights that can be read safely: {error}".split("\n")[0]) from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict: names and tensors")
    return state


def read_sidecar(weights: Path) -> dict:
    """The JSON beside weights, with objects under "config", "tokenizer", "vision_model"; empty ones if it is absent."""
    path = weights.with_suffix(".json")
    about = read_json(path) if path.is_file() else {}
    for key in ("config", "tokenizer", "vision_model"):
        if not isinstance(about.setdefault(key, {}), dict):
            raise ValueError(f"{path}: {key!r} must be an object. Without the file, shapes alone tell what they are")
    return about


def weights_name(stage: str, config: MiniMindConfig) -> str:
    return f"{stage}_{config.hidden_size}{'_moe' if config.use_moe else ''}.pth"


def find_weights(name: str, out_dir, hidden_size: int | None, use_moe: bool) -> Path | None:
    """--from_weight or --weights: "none", a path, or a stage, whose file is looked for in `out_dir`."""
    if name == "none":
        return None
    if name.endswith(".pth"):
        return Path(name)
    path = Path(out_dir) / f"{name}_{hidden_size or 512}{'_moe' if use_moe else ''}.pth"
    if not path.is_file():
        there = ", ".join(sorted(file.name for file in Path(out_dir).glob("*.pth"))) or "no .pth file"
        raise FileNotFoundError(
            f"{path} is not there ({out_dir} holds {there}). Give the --hidden_size that it has or a .pth file; to "
            "train from nothing: --from_weight none"
        )
    return path


def config_of(state: dict, path: Path, known: dict) -> dict:
    """The architecture of a state dict: what shapes tell, and the rest from `known`, the "config" of its JSON."""
    for key in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight"):
        if key not in state:
            raise ValueError(f"{path} has no {key}: these are not MiniMind weights of a known naming")
    vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
    layers = 1 + max((int(key.split(".")[2]) for key in state if key.startswith("model.layers.")), default=-1)
    use_moe = "model.layers.0.mlp.gate.weight" in state
    heads = known.get("num_attention_heads", 8)
    read = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": layers, "use_moe": use_moe}
    read["num_attention_heads"] = heads
    keys = state["model.layers.0.self_attn.k_proj.weight"].shape[0]
    if hidden_size % heads or keys % (hidden_size // heads):
        raise ValueError(
            f"num_attention_heads={heads} does not fit {path}: {hidden_size} wide, its keys {keys}. Give the "
            "--num_attention_heads that it was trained with"
        )
    read["num_key_value_heads"] = keys // (hidden_size // heads)
    up = "experts.0.up_proj" if use_moe else "up_proj"
    read["intermediate_size"] = state[f"model.layers.0.mlp.{up}.weight"].shape[0]
    if use_moe:
        read["n_routed_experts"] = state["model.layers.0.mlp.gate.weight"].shape[0]
        read["n_shared_experts"] = sum("layers.0.mlp.shared_experts." in key and "up_proj" in key for key in state)
    for key, value in read.items():
        if key in known and known[key] != value:
            raise ValueError(
                f"{path.with_suffix('.json')} says {key}={known[key]}, {path.name} holds {value}: they do not belong "
                "together"
            )
    return known | read


def refuse_other_architecture(path: Path, config: VLMConfig) -> None:
    """The name of a file tells the width, not the depth: ValueError if another model would be overwritten."""
    there = config_of(read_weights(path), path, read_sidecar(path)["config"]) if path.is_file() else {}
    other = [
        f"{key} {value}, not {getattr(config, key)}"
        for key, value in there.items()
        if key not in ("dropout", "flash_attn", "image_special_token") and value != getattr(config, key)
    ]
    if other:
        raise ValueError(f"{path} holds another model ({', '.join(other)}), keep it: choose another --out_dir")


def load_weights(model, state: dict, path) -> str:
    """Fills the model from a state dict and returns a line that says with what.

    Everything must fit by name and shape but the encoder, which is never in a file, and the projector, which
    is not in the file of a language model. Raises ValueError with the first misfits otherwise.
    """
    own = model.text_state_dict()
    state = {key: value for key, value in state.items() if not key.startswith("vision_encoder.")}
    if "lm_head.weight" not in state and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]  # one matrix under two names
    new = [key for key in own if key not in state]
    projector = [key for key in own if key.startswith("vision_proj.")]
    missing = [key for key in new if key not in projector or not set(projector) <= set(new)]
    unknown = [key for key in state if key not in own]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    if missing or unknown or shapes:
        problems = [f"{len(found)} {what}, first: {found[0]}" for found, what in
                    ((missing, "missing"), (unknown, "unknown"), (shapes, "of another shape")) if found]  # fmt: skip
        raise ValueError(f"{path} does not fit this model: {'; '.join(problems)}")
    model.load_state_dict(state, strict=False)  # checked above: absent are the encoder and perhaps the projector
    loaded = f"loaded {len(own) - len(new)} tensors from {path}"
    return f"{loaded}, initialised anew: the projector" if new else loaded


def fingerprint(model) -> str | None:
    """sha256 of the encoder's weights, whatever the format of their file; None without encoder."""
    if getattr(model, "vision_encoder", None) is None:
        return None
    digest = hashlib.sha256()
    for key, value in sorted(model.vision_encoder.state_dict().items()):
        if "position_ids" not in key:  # a buffer that only some versions of Transformers keep
            digest.update(value.cpu().float().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_hash(folder) -> str:
    return hashlib.sha256((Path(folder) / "tokenizer.json").read_bytes()).hexdigest()


def upcycle(state: dict[str, torch.Tensor], config: MiniMindConfig) -> dict[str, torch.Tensor]:
    """The weights of a dense model as those of a mixture of experts that computes the same (Komatsuzaki et al. 2022).

    Every expert starts as a copy of the feed-forward it replaces. A token's routed experts count as one, since their
    weights sum to 1, and the shared ones are added, so each copy gives its share. The gate starts at random.
    Raises ValueError for a gate whose weights do not sum to 1.
    """
    if config.num_experts_per_tok < 2 or not config.norm_topk_prob:
        raise ValueError(
            "--use_moe: dense weights become experts only with num_experts_per_tok >= 2 and norm_topk_prob"
        )
    found = {}
    for key, value in state.items():
        block, mlp, matrix = key.partition(".mlp.")
        if not mlp:
            found[key] = value
            continue
        copies = [f"experts.{i}" for i in range(config.n_routed_experts)]
        copies += [f"shared_experts.{i}" for i in range(config.n_shared_experts)]
        share = value / (1 + config.n_shared_experts) if matrix == "down_proj.weight" else value
        found |= {f"{block}.mlp.{copy}.{matrix}": share for copy in copies}
    return found


def build_model(args, weights: Path | None, dropout: float = 0.0):
    """The model and its tokenizer from the shared flags: from weights, or from nothing.

    Without --vision_model_path among the flags it is the language model alone.
    Returns (model in fp32 on the CPU, tokenizer, a line for the user). Raises ValueError when flags, weights,
    tokenizer and encoder do not belong together.
    """
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    asked = {key: value for key in shape if (value := getattr(args, key)) is not None}
    state, sidecar = None, {}
    if weights is None:
        architecture = {"hidden_size": 512, "num_hidden_layers": 8} | asked | {"use_moe": args.use_moe}
    else:
        state = read_weights(weights)
        sidecar = read_sidecar(weights)
        heads = {key: value for key, value in asked.items() if key == "num_attention_heads"}  # no shape tells them
        architecture = config_of(state, weights, heads | sidecar["config"])
        for key, value in asked.items():
            if architecture[key] != value:
                raise ValueError(f"--{key} {value}: {weights} has {architecture[key]}; leave the flag out")
        dense = not architecture["use_moe"]
        if dense and args.use_moe and not hasattr(args, "from_weight"):
            raise ValueError(f"--use_moe: {weights} is dense; only training makes experts of it. Leave the flag out")
        architecture["use_moe"] |= args.use_moe

    for key in ("image_special_token", "image_ids", "ve_hidden_size", "dropout"):
        architecture.pop(key, None)  # they follow from the encoder and the flags
    sees = hasattr(args, "vision_model_path")
    if sees:
        config = VLMConfig.for_encoder(args.vision_model_path, dropout=dropout, **architecture)
    else:
        config = MiniMindConfig(dropout=dropout, **architecture)
    tokenizer = load_tokenizer(args.tokenizer_path, *([config.image_special_token] if sees else []))
    placeholder = tokenizer.convert_tokens_to_ids("@")
    if sees:
        config.image_ids = [placeholder] * len(config.image_ids)
    if weights is None:
        config.vocab_size = len(tokenizer)
    elif len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"{args.tokenizer_path} has {len(tokenizer)} tokens, {weights} was trained with {config.vocab_size}: pass "
            "the --tokenizer_path that belongs to the weights"
        )
    known = sidecar.get("tokenizer", {})
    if weights is not None and not known and placeholder != 34:
        raise ValueError(
            f"{args.tokenizer_path} has '@' as {placeholder}: weights without a JSON, as {weights}, "
            "were trained with a tokenizer in which it is 34. Pass that one with --tokenizer_path"
        )
    if known.get("sha256", "") not in ("", tokenizer_hash(args.tokenizer_path)):
        raise ValueError(
            f"{args.tokenizer_path} is not the tokenizer of {weights}, which is {known.get('path')}: the same "
            "ids mean other words. Pass that one with --tokenizer_path"
        )

    model = MiniMindVLM(config, args.vision_model_path) if sees else MiniMindForCausalLM(config)
    line = "started from nothing"
    if state is not None and dense and args.use_moe:
        gates = {key: value for key, value in model.state_dict().items() if key.endswith("mlp.gate.weight")}
        line = load_weights(model, upcycle(state, config) | gates, weights)
        line += "; each expert starts as its dense feed-forward, the gates at random"
    elif state is not None:
        line = load_weights(model, state, weights)
    known = sidecar.get("vision_model", {})
    if sees and known.get("sha256") and known["sha256"] != fingerprint(model):
        raise ValueError(
            f"{args.vision_model_path} is not the encoder of {weights}, which is {known.get('path')}. Pass that "
            "one with --vision_model_path"
        )
    return model, tokenizer, line


def script() -> list[str]:
    """What was typed between `python` and the flags: train_sft_vlm.py, or -m scripts.train_llm."""
    spec = sys.modules["__main__"].__spec__
    as_module = spec is not None and spec.origin == sys.argv[0]
    return ["-m", spec.name] if as_module else [Path(sys.argv[0]).name]


def describe(model, args, **facts) -> dict:
    """What stands in the JSON beside the weights."""
    fields = [*signature(MiniMindConfig).parameters, "ve_hidden_size", "image_special_token"]
    eyes = fingerprint(model)
    return {
        "config": {key: getattr(model.config, key) for key in fields if hasattr(model.config, key)},
        "tokenizer": {"path": str(args.tokenizer_path), "sha256": tokenizer_hash(args.tokenizer_path)},
        "vision_model": {"path": str(args.vision_model_path), "sha256": eyes} if eyes else {},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "command": shlex.join([*script(), *sys.argv[1:]]),
        **facts,
    }


def save_weights(path, model, about: dict) -> None:
    """fp16 weights without the encoder, and their JSON. Raises ValueError rather than save a NaN or infinity."""
    state = {key: value.detach().to("cpu", torch.float16) for key, value in model.text_state_dict().items()}
    for key, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{key} holds values that are not finite in fp16; {path} was left as it is")
    state["lm_head.weight"] = state["model.embed_tokens.weight"]  # stored once
    write_safely(path, lambda file: torch.save(state, file))
    write_json(Path(path).with_suffix(".json"), about)
