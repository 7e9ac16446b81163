"""Builds the model for every script, in three steps without side effects:

read the weights and their JSON, plan the model from flags and weights, build it.
"""

import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from model.encoders import count_tokens, measure
from model.families import FAMILIES, family_of, vision_config
from model.files import read_json
from model.generations import (
    LATER_TOKENIZER,
    MINIMIND_2,
    MINIMIND_3,
    PUBLIC_TOKENIZER,
    Generation,
    generation_of,
)
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig
from model.processing import load_tokenizer
from model.weights import (
    check_values,
    config_of,
    fingerprint,
    half_split,
    known_names,
    read_sidecar,
    read_weights,
    sidecar_path,
    tokenizer_hash,
)

ROOT = Path(__file__).parent.parent  # root of the repository
PARTS = {
    "tokenizer": "tokenizer.json",
    "vision_model": "config.json",
}  # next to weights → the file that identifies its folder
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
FOLLOWS = ("image_special_token", "image_ids", "ve_hidden_size", "projector", "spatial_merge_size", "dropout")
FIRST_OF_PROJECTOR = ("vision_proj.vision_proj.0.weight", "vision_proj.mlp.1.weight")
CAUSES = (  # pattern of a mismatch → its likely cause
    (r"embed_tokens\.weight is", "another hidden_size or vocabulary"),
    (r"mlp\.(gate\.|experts|shared_experts)", "one is a mixture of experts, the other dense"),
    (r"first: vision_proj", "another --vision_model_path, or weights of a VLM in a text-only model"),
    (r"(missing|unknown), first: model\.layers\.[1-9]", "another number of layers, or an incomplete file"),
    (r"", "an incomplete file, or weights of another kind of model"),
)


@dataclass(frozen=True)
class Pretrained:
    """Weights from disk and what is known about them; without arguments: a model from scratch."""

    path: Path | None = None
    name: str = ""  # the path, and a note on older names of tensors
    state: dict[str, torch.Tensor] = field(default_factory=dict)  # under today's names
    config: dict = field(default_factory=dict)  # from shapes and JSON
    sidecar: dict = field(default_factory=dict)  # the JSON, as `read_sidecar` returns it
    ignored: list[str] = field(default_factory=list)  # names in the file that are not weights of ours
    generation: Generation = MINIMIND_2


@dataclass(frozen=True)
class Plan:
    """The model that flags and weights describe."""

    config: MiniMindConfig | VLMConfig
    tokenizer: object
    tokenizer_path: str
    vision_model_path: str | None  # None: a language model without encoder
    warning: str


@dataclass
class Origin:
    """The sources of a model, to record them next to its weights."""

    tokenizer_path: str
    vision_model_path: str | None
    encoder: torch.nn.Module | None
    prompts: dict = field(default_factory=dict)  # {language: questions that the model was trained on}
    note: str = ""  # a line for the user

    @cached_property
    def encoder_sha256(self) -> str | None:
        """Computed on first use because it takes a second; use it before the encoder is cast to another dtype. Then
        the encoder is released: with --cache_features nothing else needs its memory."""
        encoder, self.encoder = self.encoder, None
        return None if encoder is None else fingerprint(encoder)


def build_model(args, weights: Path | None, *, sees: bool = True, training: bool = False):
    """The model and its tokenizer from the shared flags: from weights, or from scratch if `weights` is None.

    sees: with an encoder; False: a language model only. training: use --dropout, and let --use_moe convert dense
    weights to experts. Returns (model in fp32 on the CPU, tokenizer, Origin). Raises ValueError if flags, weights,
    tokenizer and encoder do not fit together, FileNotFoundError for missing parts.
    """
    saved = read_pretrained(weights, args.num_attention_heads)
    plan = plan_model(args, saved, sees, training)
    model, origin = build(plan, saved)
    return model, plan.tokenizer, origin


# ---------------------------------------------------------------------------- 1. read from disk


def read_pretrained(path: Path | None, heads: int | None = None) -> Pretrained:
    """Reads weights and their JSON. heads: --num_attention_heads, for weights without JSON: no shape contains it."""
    if path is None:
        return Pretrained()
    state, older, ignored = known_names(read_weights(path))
    check_values(state, path)
    generation = generation_of(state, path, older and not heads)
    sidecar = read_sidecar(path)
    config = config_of(state, path, ({"num_attention_heads": heads} if heads else {}) | sidecar["config"], generation)
    name = str(path)
    if older:
        state = half_split(state, config["num_attention_heads"])
        name += " (older naming: renamed, rotary rows reordered)"
    return Pretrained(path, name, state, config, sidecar, ignored, generation)


def find_part(part: str, flag: str | None, weights: Path | None, sidecar: dict, generation=MINIMIND_2) -> str:
    """The folder of "tokenizer" or "vision_model": from the flag, inside a Transformers folder, from the JSON of the
    weights, or the default. Later steps check that its content is the right one.

    A path from the JSON is tried as it is, relative to the repository, and next to the weights; then the default.
    Raises FileNotFoundError, which lists these places.
    """
    usual, file = getattr(generation, part), PARTS[part]
    if flag or weights is None:
        return flag or usual
    folders, named = inside(weights, part), sidecar[part].get("path")
    if named and not folders:
        places = dict.fromkeys(base / named for base in (Path(), ROOT, weights.parent))
        places |= dict.fromkeys([weights.parent / Path(named).name])
        folders = [place for place in places if (place / file).is_file()]
        if not folders and not Path(usual, file).is_file():
            raise FileNotFoundError(
                f"{sidecar_path(weights)} names the {part} {named}, which does not exist\n"
                f"(looked in {', '.join(map(str, places))}). Pass it with --{part}_path"
            )
    if not folders and generation.hub and not Path(usual, file).is_file():
        raise FileNotFoundError(
            f"{weights} is a {generation.name}, but its {part} is not in {usual}.\n"
            f"Download it: {generation.hub[part]}, or pass --{part}_path"
        )
    return str(folders[0]) if folders else usual


def inside(weights: Path, part: str) -> list[Path]:
    """The folders inside a Transformers folder that contain its tokenizer or encoder; [] for a file of weights."""
    if part == "tokenizer":
        return [weights] if (weights / "tokenizer.json").is_file() else []
    configs = [(path.parent, str(read_json(path).get("model_type"))) for path in weights.glob("*/config.json")]
    return [folder for folder, kind in configs if family_of(kind)]


# ---------------------------------------------------------------------------- 2. plan from flags and weights


def plan_model(args, saved: Pretrained, sees: bool, training: bool) -> Plan:
    """Reads tokenizer and encoder configuration; see `build_model`."""
    folder = find_part("tokenizer", args.tokenizer_path, saved.path, saved.sidecar, saved.generation)
    encoder = None
    if sees:
        encoder = find_part("vision_model", args.vision_model_path, saved.path, saved.sidecar, saved.generation)
    config = plan_config(args, saved, encoder, training)
    tokenizer = load_tokenizer(folder, *([config.image_special_token] if sees else []))
    warning = check_tokenizer(tokenizer, folder, saved) if saved.path else ""
    config.vocab_size = len(tokenizer)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])  # tokens that start and end a turn
    config.bos_token_id, config.eos_token_id, config.pad_token_id = start, end, tokenizer.pad_token_id
    if sees:
        config.image_ids = [tokenizer.convert_tokens_to_ids(config.image_token)] * len(config.image_ids)
    return Plan(config, tokenizer, folder, encoder, warning)


def plan_config(args, saved: Pretrained, encoder: str | None, training: bool) -> MiniMindConfig | VLMConfig:
    """The configuration, except for fields that depend on the tokenizer. encoder: its folder, or None.

    Raises ValueError if the encoder's number of patches differs from the one that the weights were trained with.
    """
    architecture = plan_architecture(args, saved, training) | {"dropout": args.dropout if training else 0.0}
    if encoder is None:
        return MiniMindConfig(**architecture)
    check_family(saved, encoder)
    merge = plan_merge(args, saved, encoder, training)
    config = VLMConfig.for_encoder(encoder, spatial_merge_size=merge, **architecture, **saved.generation.eyes)
    patches, expected = len(config.image_ids), saved.config.get("image_special_token", "").count(config.image_token)
    if expected and patches != expected:
        raise ValueError(
            f"{encoder} gives {patches} patches, {saved.path} was trained with {expected}: "
            "pass the --vision_model_path that belongs to the weights"
        )
    return config


def plan_merge(args, saved: Pretrained, encoder: str, training: bool) -> int:
    """How many patches in each direction become one token: from the saved projector, or --image_tokens for a new one.

    Raises ValueError for an impossible number of tokens.
    """
    side, registers, width = measure(encoder)
    new = args.image_tokens if training else None
    # Not all patches in one token: that would be a single "@", which people type.
    merges = [merge for merge in range(1, max(side, 2)) if side % merge == 0]
    tokens = {merge: count_tokens(side, registers, merge) for merge in merges}
    if learned := [saved.state[key] for key in FIRST_OF_PROJECTOR if key in saved.state]:
        merge = max(math.isqrt(learned[0].shape[1] // width), 1)
        if new and tokens.get(merge) != new:
            raise ValueError(
                f"--image_tokens {new}: the projector of {saved.path} makes {tokens.get(merge)} tokens per\n"
                "picture. Omit the flag, or start from a language model"
            )
        return merge
    if new and new not in tokens.values():
        raise ValueError(
            f"--image_tokens {new}: {encoder} gives {side} x {side} patches, which can become\n"
            f"{', '.join(map(str, sorted(tokens.values())))} tokens"
        )
    return next(merge for merge, number in tokens.items() if number == (new or tokens[1]))


def check_family(saved: Pretrained, encoder: str) -> None:
    """Raises ValueError if public weights were trained with an encoder of another family; without a JSON there is no
    sha256 to compare."""
    given = vision_config(encoder)["model_type"]
    sees = any(key.startswith("vision_proj.") for key in saved.state)
    if sees and given != saved.generation.family and not saved.sidecar["vision_model"].get("sha256"):
        wanted, given = FAMILIES[saved.generation.family].name, FAMILIES[given].name
        raise ValueError(
            f"{encoder} contains a {given}, but the model was trained with a {wanted}: pass its --vision_model_path"
        )


def plan_architecture(args, saved: Pretrained, training: bool) -> dict:
    """The decoder's shape. Raises ValueError for a flag that contradicts the weights."""
    flags = {key: value for key in SHAPE if (value := getattr(args, key)) is not None}
    if saved.path is None:
        return {"hidden_size": 512, "num_hidden_layers": 8} | flags | {"use_moe": args.use_moe}
    for key, value in flags.items():
        if saved.config[key] != value:
            raise ValueError(f"--{key} {value}: {saved.path} has {saved.config[key]}; omit the flag")
    if args.use_moe and not saved.config["use_moe"] and not training:
        raise ValueError(f"--use_moe: {saved.path} is dense, and only training converts it to experts. Omit the flag")
    kept = {key: value for key, value in saved.config.items() if key not in FOLLOWS}
    return kept | {"use_moe": kept["use_moe"] or args.use_moe}


def check_tokenizer(tokenizer, folder: str, saved: Pretrained) -> str:
    """Raises ValueError if the weights were trained with another tokenizer: the same ids would mean other words.

    Without a sha256 in the JSON of the weights, the number of tokens and the id of '@' must match, and the hashes of
    the public tokenizers decide. Returns a warning if the tokenizer is not one of them, otherwise "".
    """
    weights, known, sha256 = saved.path, saved.sidecar["tokenizer"], tokenizer_hash(folder)
    expected, vocab_size = known.get("sha256"), saved.config["vocab_size"]
    right, wrong, its_generation = PUBLIC_TOKENIZER, LATER_TOKENIZER, "a later generation (MiniMind-3)"
    if saved.generation is MINIMIND_3:
        right, wrong, its_generation = wrong, right, "an earlier generation (MiniMind2)"
    if not expected and sha256 == wrong:
        where = saved.generation.hub.get("tokenizer", "python -m scripts.download --what llm")
        raise ValueError(
            f"{folder} contains the tokenizer of {its_generation},\nnot the one of {weights}. To download that: {where}"
        )
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"{folder} has {len(tokenizer)} tokens, {weights} was trained with {vocab_size}: pass the --tokenizer_path "
            "that belongs to the weights"
        )
    if expected and expected != sha256:
        raise ValueError(
            f"{folder} is not the tokenizer of {weights}, which is {known.get('path')}.\n"
            "The same ids mean other words: pass that one with --tokenizer_path"
        )
    sign = saved.generation.eyes.get("image_token", "@")
    at, placeholder = tokenizer.convert_tokens_to_ids(sign), saved.generation.placeholder
    placeholder = saved.config.get("image_ids", [placeholder])[0]
    if not expected and at != placeholder:
        raise ValueError(
            f"{folder} has the id {at} for {sign!r}, but {weights} was trained with the id {placeholder}. "
            "Pass that tokenizer with --tokenizer_path"
        )
    if expected or sha256 == right or Path(folder) == weights:
        return ""
    return (
        f"warning: {weights} does not record its tokenizer, and {folder} is not the public one. If answers make "
        "no sense, this is the reason\n"
    )


# ---------------------------------------------------------------------------- 3. build


def build(plan: Plan, saved: Pretrained):
    """Returns (model, Origin). Raises ValueError if the weights do not fit, or were trained with another encoder."""
    encoder = plan.vision_model_path
    model = MiniMindForCausalLM(plan.config) if encoder is None else MiniMindVLM(plan.config, encoder)
    note = plan.warning + fill_model(model, saved)
    prompts = saved.sidecar.get("prompts", {})
    origin = Origin(plan.tokenizer_path, encoder, getattr(model, "vision_encoder", None), prompts, note)
    known = saved.sidecar.get("vision_model", {})
    if encoder and known.get("sha256") and known["sha256"] != origin.encoder_sha256:
        raise ValueError(
            f"{encoder} is not the encoder of {saved.path}, which is {known.get('path')}. Pass that "
            "one with --vision_model_path"
        )
    return model, origin


def fill_model(model, saved: Pretrained) -> str:
    """Loads weights into the model, converts dense ones to experts if needed, and returns a line for the user."""
    if saved.path is None:
        return "started from scratch"
    if model.config.use_moe and not saved.config["use_moe"]:
        gates = {key: value for key, value in model.state_dict().items() if key.endswith("mlp.gate.weight")}
        line = load_weights(model, upcycle(saved.state, model.config) | gates, saved.name)
        line += "; each expert starts as its dense feed-forward, the gates at random"
    else:
        line = load_weights(model, saved.state, saved.name)
    return line + (f"; ignored: {len(saved.ignored)} (first: {saved.ignored[0]})" if saved.ignored else "")


def load_weights(model, state: dict, path) -> str:
    """Loads a state dict from `known_names` into the model and returns a line for the user.

    All names and shapes must match, except for the projector, which a language model does not have. Raises ValueError
    with the first mismatches and their likely cause.
    """
    wanted = model.text_state_dict()
    new = [key for key in wanted if key not in state]
    projector = [key for key in wanted if key.startswith("vision_proj.")]
    missing = [key for key in new if key not in projector or not set(projector) <= set(new)]
    unknown = [key for key in state if key not in wanted]
    shapes = [
        f"{key} is {tuple(state[key].shape)}, expected {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    if missing or unknown or shapes:
        kinds = {"missing": missing, "unknown": unknown, "of another shape": shapes}
        problems = "; ".join(f"{len(names)} {kind}, first: {names[0]}" for kind, names in kinds.items() if names)
        cause = next(cause for pattern, cause in CAUSES if re.search(pattern, problems))
        raise ValueError(f"{path} does not fit this model: {problems}. Likely: {cause}")
    if not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]):
        raise ValueError(f"{path} does not fit this model: lm_head and embed_tokens differ, but must be one matrix")
    model.load_state_dict(state, strict=False)  # checked above: only the encoder and perhaps the projector are missing
    return f"loaded {len(wanted) - len(new)} tensors from {path}{'; new: projector' if new else ''}"


def upcycle(state: dict[str, torch.Tensor], config: MiniMindConfig) -> dict[str, torch.Tensor]:
    """Converts the weights of a dense model to a mixture of experts that computes the same (Komatsuzaki et al. 2022).

    Every expert starts as a copy of the feed-forward that it replaces. The weights of a token's routed experts sum to
    1, and shared experts are added, so down_proj of each copy is divided by 1 + shared experts. The gate starts at
    random. Raises ValueError for a gate whose weights do not sum to 1.
    """
    if not (config.norm_topk_prob if config.num_experts_per_tok > 1 else config.norm_top1_prob):
        raise ValueError(
            "--use_moe: converting dense weights to experts requires num_experts_per_tok >= 2 and norm_topk_prob"
        )
    experts = {}
    for key, value in state.items():
        block, mlp, matrix = key.partition(".mlp.")
        if not mlp or not block.startswith("model.layers."):
            experts[key] = value
            continue
        copies = [f"experts.{i}" for i in range(config.n_routed_experts)]
        copies += [f"shared_experts.{i}" for i in range(config.n_shared_experts)]
        share = value / (1 + config.n_shared_experts) if matrix == "down_proj.weight" else value
        experts |= {f"{block}.mlp.{copy}.{matrix}": share for copy in copies}
    return experts
