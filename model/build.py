"""How every script comes to its model, in three steps that change nothing but what they return.

Read the weights and what they know of themselves, plan the model that flags and weights make together, build it.
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

ROOT = Path(__file__).parent.parent  # of the repository
PARTS = {"tokenizer": "tokenizer.json", "vision_model": "config.json"}  # beside weights; what tells such a folder
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
FOLLOWS = ("image_special_token", "image_ids", "ve_hidden_size", "projector", "spatial_merge_size", "dropout")
FIRST_OF_PROJECTOR = ("vision_proj.vision_proj.0.weight", "vision_proj.mlp.1.weight")
CAUSES = (  # what a misfit is likely to come from
    (r"embed_tokens\.weight is", "another hidden_size or vocabulary"),
    (r"mlp\.(gate\.|experts|shared_experts)", "one is a mixture of experts, the other dense"),
    (r"first: vision_proj", "another --vision_model_path, or weights that see for a model of text alone"),
    (r"(missing|unknown), first: model\.layers\.[1-9]", "another number of layers, or an incomplete file"),
    (r"", "an incomplete file, or weights of something else"),
)


@dataclass(frozen=True)
class Pretrained:
    """Weights on the disk and what is known of them; without arguments: nothing, as a new model starts from."""

    path: Path | None = None
    name: str = ""  # the path, and whether the naming was an older one
    state: dict[str, torch.Tensor] = field(default_factory=dict)  # under the names of now
    config: dict = field(default_factory=dict)  # what shapes and JSON say
    sidecar: dict = field(default_factory=dict)  # the JSON, as `read_sidecar` returns it
    ignored: list[str] = field(default_factory=list)  # names in the file that are no weights of ours
    generation: Generation = MINIMIND_2


@dataclass(frozen=True)
class Plan:
    """What flags and weights make together."""

    config: MiniMindConfig | VLMConfig
    tokenizer: object
    tokenizer_path: str
    vision_model_path: str | None  # None: a language model alone
    warning: str


@dataclass(frozen=True)
class Origin:
    """What a model was made of, for whoever writes it down."""

    tokenizer_path: str
    vision_model_path: str | None
    encoder: torch.nn.Module | None
    prompts: dict = field(default_factory=dict)  # {language: questions that the weights know}
    note: str = ""  # a line for the user

    @cached_property
    def encoder_sha256(self) -> str | None:
        """Takes a second, so it is computed once, when first needed; that must be before the encoder is cast."""
        return None if self.encoder is None else fingerprint(self.encoder)


def build_model(args, weights: Path | None, *, sees: bool = True, training: bool = False):
    """The model and its tokenizer from the shared flags: from weights, or from nothing.

    sees: with an encoder, rather than a language model alone. training: with --dropout, and --use_moe makes experts of
    dense weights. Returns (model in fp32 on the CPU, tokenizer, its Origin). Raises ValueError when flags, weights,
    tokenizer and encoder do not belong together.
    """
    saved = read_pretrained(weights, args.num_attention_heads)
    plan = plan_model(args, saved, sees, training)
    model, origin = build(plan, saved)
    return model, plan.tokenizer, origin


# ---------------------------------------------------------------------------- 1. what is on the disk


def read_pretrained(path: Path | None, heads: int | None = None) -> Pretrained:
    """heads: --num_attention_heads, which no shape tells, for weights without JSON."""
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
    """The folder of "tokenizer" or "vision_model": that of the flag, that in a Transformers folder, the one that the
    JSON of the weights names, or the usual one. Whether it still holds the same is checked later.

    What the JSON names is looked for as it is named, in the repository, and beside the weights. FileNotFoundError says
    where was looked, unless the usual place has one: that is tried.
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
                f"{sidecar_path(weights)} names the {part} {named}, and there is none\n"
                f"(looked in {', '.join(map(str, places))}). Pass it with --{part}_path"
            )
    if not folders and generation.hub and not Path(usual, file).is_file():
        raise FileNotFoundError(
            f"{weights} is a {generation.name}, whose {part} is not in {usual}.\n"
            f"Fetch it: {generation.hub[part]}, or pass --{part}_path"
        )
    return str(folders[0]) if folders else usual


def inside(weights: Path, part: str) -> list[Path]:
    """Where a Transformers folder has its tokenizer or encoder; a file has none in it."""
    if part == "tokenizer":
        return [weights] if (weights / "tokenizer.json").is_file() else []
    found = [(path.parent, str(read_json(path).get("model_type"))) for path in weights.glob("*/config.json")]
    return [folder for folder, kind in found if family_of(kind)]


# ---------------------------------------------------------------------------- 2. what flags and weights make together


def plan_model(args, saved: Pretrained, sees: bool, training: bool) -> Plan:
    """Reads the tokenizer and what the encoder says of itself; see `build_model`."""
    folder = find_part("tokenizer", args.tokenizer_path, saved.path, saved.sidecar, saved.generation)
    encoder = None
    if sees:
        encoder = find_part("vision_model", args.vision_model_path, saved.path, saved.sidecar, saved.generation)
    config = plan_config(args, saved, encoder, training)
    tokenizer = load_tokenizer(folder, *([config.image_special_token] if sees else []))
    warning = check_tokenizer(tokenizer, folder, saved) if saved.path else ""
    config.vocab_size = len(tokenizer)
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])  # where answers stop
    config.bos_token_id, config.eos_token_id, config.pad_token_id = start, end, tokenizer.pad_token_id
    if sees:
        config.image_ids = [tokenizer.convert_tokens_to_ids(config.image_token)] * len(config.image_ids)
    return Plan(config, tokenizer, folder, encoder, warning)


def plan_config(args, saved: Pretrained, encoder: str | None, training: bool) -> MiniMindConfig | VLMConfig:
    """All but what the tokenizer decides. encoder: its folder. ValueError if it makes another number of patches than
    the one that the weights have learned to see with."""
    architecture = plan_architecture(args, saved, training) | {"dropout": args.dropout if training else 0.0}
    if encoder is None:
        return MiniMindConfig(**architecture)
    check_family(saved, encoder)
    merge = plan_merge(args, saved, encoder, training)
    config = VLMConfig.for_encoder(encoder, spatial_merge_size=merge, **architecture, **saved.generation.eyes)
    patches, expected = len(config.image_ids), saved.config.get("image_special_token", "").count(config.image_token)
    if expected and patches != expected:
        raise ValueError(
            f"{encoder} gives {patches} patches, {saved.path} was made for {expected}: "
            "pass the --vision_model_path that belongs to the weights"
        )
    return config


def plan_merge(args, saved: Pretrained, encoder: str, training: bool) -> int:
    """How many patches, in each direction, become one token: what a projector has learned, or --image_tokens of a new
    one. ValueError for a number of tokens that there is no way to."""
    side, registers, width = measure(encoder)
    new = args.image_tokens if training else None
    # Not all in one token: that would be one "@", which people type.
    merges = [merge for merge in range(1, max(side, 2)) if side % merge == 0]
    tokens = {merge: count_tokens(side, registers, merge) for merge in merges}
    if learned := [saved.state[key] for key in FIRST_OF_PROJECTOR if key in saved.state]:
        merge = max(math.isqrt(learned[0].shape[1] // width), 1)
        if new and tokens.get(merge) != new:
            raise ValueError(
                f"--image_tokens {new}: the projector of {saved.path} has learned to make {tokens.get(merge)} tokens\n"
                "of a picture. Leave the flag out, or start from a language model"
            )
        return merge
    if new and new not in tokens.values():
        raise ValueError(
            f"--image_tokens {new}: {encoder} sees {side} x {side} patches, which can become\n"
            f"{', '.join(map(str, sorted(tokens.values())))} tokens"
        )
    return next(merge for merge, number in tokens.items() if number == (new or tokens[1]))


def check_family(saved: Pretrained, encoder: str) -> None:
    """ValueError for an encoder of another family than public weights have learned to see with: of those without JSON
    no sha256 tells."""
    given = vision_config(encoder)["model_type"]
    sees = any(key.startswith("vision_proj.") for key in saved.state)
    if sees and given != saved.generation.family and not saved.sidecar["vision_model"].get("sha256"):
        wanted, given = FAMILIES[saved.generation.family].name, FAMILIES[given].name
        raise ValueError(f"{encoder} holds a {given}: the model was made for a {wanted}, pass its --vision_model_path")


def plan_architecture(args, saved: Pretrained, training: bool) -> dict:
    """The decoder's shape. ValueError for a flag that contradicts the weights."""
    flags = {key: value for key in SHAPE if (value := getattr(args, key)) is not None}
    if saved.path is None:
        return {"hidden_size": 512, "num_hidden_layers": 8} | flags | {"use_moe": args.use_moe}
    for key, value in flags.items():
        if saved.config[key] != value:
            raise ValueError(f"--{key} {value}: {saved.path} has {saved.config[key]}; leave the flag out")
    if args.use_moe and not saved.config["use_moe"] and not training:
        raise ValueError(f"--use_moe: {saved.path} is dense; only training makes experts of it. Leave the flag out")
    kept = {key: value for key, value in saved.config.items() if key not in FOLLOWS}
    return kept | {"use_moe": kept["use_moe"] or args.use_moe}


def check_tokenizer(tokenizer, folder: str, saved: Pretrained) -> str:
    """ValueError if the weights were trained with another tokenizer: the same ids would mean other words.

    Where their JSON does not tell its sha256, size and the id of '@' must fit, and the fingerprints of the public
    tokenizers decide; returns a warning if it is none of them, else "".
    """
    weights, known, sha256 = saved.path, saved.sidecar["tokenizer"], tokenizer_hash(folder)
    expected, vocab_size = known.get("sha256"), saved.config["vocab_size"]
    own, other, what = PUBLIC_TOKENIZER, LATER_TOKENIZER, "a later generation (MiniMind-3)"
    if saved.generation is MINIMIND_3:
        own, other, what = other, own, "an earlier generation (MiniMind2)"
    if not expected and sha256 == other:
        where = saved.generation.hub.get("tokenizer", "python -m scripts.download --what llm")
        raise ValueError(f"{folder} holds the tokenizer of {what},\nnot that of {weights}. For that: {where}")
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"{folder} has {len(tokenizer)} tokens, {weights} was trained with {vocab_size}: pass the --tokenizer_path "
            "that belongs to the weights"
        )
    if expected and expected != sha256:
        raise ValueError(
            f"{folder} is not the tokenizer of {weights}, which is {known.get('path')}:\n"
            "the same ids mean other words, so pass that one with --tokenizer_path"
        )
    sign = saved.generation.eyes.get("image_token", "@")
    at, placeholder = tokenizer.convert_tokens_to_ids(sign), saved.generation.placeholder
    placeholder = saved.config.get("image_ids", [placeholder])[0]
    if not expected and at != placeholder:
        raise ValueError(
            f"{folder} has {sign!r} as {at}: {weights} was trained with a tokenizer in which it is {placeholder}. "
            "Pass that one with --tokenizer_path"
        )
    if expected or sha256 == own or Path(folder) == weights:
        return ""
    return (
        f"warning: {weights} does not say which tokenizer it was trained with, and {folder} is not the public one; if "
        "answers make no sense, this is why\n"
    )


# ---------------------------------------------------------------------------- 3. the model


def build(plan: Plan, saved: Pretrained):
    """(model, its Origin). Raises ValueError if the weights do not fit, or have learned to see with another encoder."""
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
    """Puts weights into the model, as experts where it has them and they do not, and returns a line that says so."""
    if saved.path is None:
        return "started from nothing"
    if model.config.use_moe and not saved.config["use_moe"]:
        gates = {key: value for key, value in model.state_dict().items() if key.endswith("mlp.gate.weight")}
        line = load_weights(model, upcycle(saved.state, model.config) | gates, saved.name)
        line += "; each expert starts as its dense feed-forward, the gates at random"
    else:
        line = load_weights(model, saved.state, saved.name)
    return line + (f"; ignored: {len(saved.ignored)} (first: {saved.ignored[0]})" if saved.ignored else "")


def load_weights(model, state: dict, path) -> str:
    """Fills the model from a state dict of `known_names` and returns a line that says with what.

    Everything must fit by name and shape but the projector, which is not in the file of a language model. Raises
    ValueError with the first misfits and their likely cause otherwise.
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
        raise ValueError(f"{path} does not fit this model: lm_head and embed_tokens differ, here they are one matrix")
    model.load_state_dict(state, strict=False)  # checked above: absent are the encoder and perhaps the projector
    return f"loaded {len(wanted) - len(new)} tensors from {path}{'; new: projector' if new else ''}"


def upcycle(state: dict[str, torch.Tensor], config: MiniMindConfig) -> dict[str, torch.Tensor]:
    """The weights of a dense model as those of a mixture of experts that computes the same (Komatsuzaki et al. 2022).

    Every expert starts as a copy of the feed-forward it replaces. A token's routed experts count as one, since their
    weights sum to 1, and the shared ones are added, so each copy gives its share. The gate starts at random.
    Raises ValueError for a gate whose weights do not sum to 1.
    """
    if not (config.norm_topk_prob if config.num_experts_per_tok > 1 else config.norm_top1_prob):
        raise ValueError(
            "--use_moe: dense weights become experts only with num_experts_per_tok >= 2 and norm_topk_prob"
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
