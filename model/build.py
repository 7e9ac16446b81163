"""How every script comes to its model: from weights and flags, or from nothing."""

import re
from pathlib import Path

import torch

from model import DEFAULT_VISION_MODEL
from model.files import read_json
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

# sha256 of tokenizer.json: of the public weights that this code reads, and of the generation after them
PUBLIC_TOKENIZER = "d98595c6aef70d95f72748582fb9b4f53d76dd58c1ae1dd702ad7c84e1caf5e4"
LATER_TOKENIZER = "71f32c68cf63a15355a8fc171b7594b3d41870fe0ddb54fc6aefa55f73a4a668"


ROOT = Path(__file__).parent.parent  # of the repository
CAUSES = (  # what a misfit is likely to come from
    (r"embed_tokens\.weight is", "another hidden_size or vocabulary"),
    (r"mlp\.(gate\.|experts|shared_experts)", "one is a mixture of experts, the other dense"),
    (r"first: vision_proj", "another --vision_model_path, or weights that see for a model of text alone"),
    (r"(missing|unknown), first: model\.layers\.[1-9]", "another number of layers, or an incomplete file"),
    (r"", "an incomplete file, or weights of something else"),
)


def load_weights(model, state: dict, path) -> str:
    """Fills the model from a state dict of `known_names` and returns a line that says with what.

    Everything must fit by name and shape but the projector, which is not in the file of a language model. Raises
    ValueError with the first misfits and their likely cause otherwise.
    """
    own = model.text_state_dict()
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
        kinds = {"missing": missing, "unknown": unknown, "of another shape": shapes}
        problems = "; ".join(f"{len(found)} {kind}, first: {found[0]}" for kind, found in kinds.items() if found)
        cause = next(cause for pattern, cause in CAUSES if re.search(pattern, problems))
        raise ValueError(f"{path} does not fit this model: {problems}. Likely: {cause}")
    if not torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]):
        raise ValueError(f"{path} does not fit this model: lm_head and embed_tokens differ, here they are one matrix")
    model.load_state_dict(state, strict=False)  # checked above: absent are the encoder and perhaps the projector
    return f"loaded {len(own) - len(new)} tensors from {path}{'; new: projector' if new else ''}"


def check_tokenizer(tokenizer, folder, weights: Path, vocab_size: int, known: dict, placeholder: int) -> str:
    """ValueError if the weights were trained with another tokenizer: the same ids would mean other words.

    known: its "path" and "sha256" in the JSON of the weights. Without these, size and the id of '@' must fit, and the
    fingerprints of the public tokenizers decide; returns a warning if it is none of them, else "".
    """
    sha256 = tokenizer_hash(folder)
    told = known.get("sha256")
    if not told and sha256 == LATER_TOKENIZER:
        raise ValueError(
            f"{folder} holds the tokenizer of a later generation (MiniMind-3),\n"
            f"not that of {weights}. For that: python -m scripts.download --what llm"
        )
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"{folder} has {len(tokenizer)} tokens, {weights} was trained with {vocab_size}: pass the --tokenizer_path "
            "that belongs to the weights"
        )
    if told and told != sha256:
        raise ValueError(
            f"{folder} is not the tokenizer of {weights}, which is {known.get('path')}: the same ids mean other words. "
            "Pass that one with --tokenizer_path"
        )
    at = tokenizer.convert_tokens_to_ids("@")
    if not told and at != placeholder:
        raise ValueError(
            f"{folder} has '@' as {at}: {weights} was trained with a tokenizer in which it is {placeholder}. Pass that "
            "one with --tokenizer_path"
        )
    if told or sha256 == PUBLIC_TOKENIZER or Path(folder) == weights:
        return ""
    return (
        f"warning: {weights} does not say which tokenizer it was trained with, and {folder} is not the public one; if "
        "answers make no sense, this is why\n"
    )


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


def folders_of(weights: Path, sidecar: dict, args) -> tuple[str | None, str | None]:
    """The folders of tokenizer and encoder in a Transformers folder, else those that the JSON of the weights names: as
    it is named there, in the repository, or beside the weights. Whether they still hold the same is checked later.

    None where nothing is named, or a flag in `args` does. FileNotFoundError says where was looked, unless the usual
    place has one: that is tried.
    """
    words = [weights] if (weights / "tokenizer.json").is_file() else []
    eyes = [path.parent for path in weights.glob("*/config.json") if "clip" in str(read_json(path).get("model_type"))]
    found = []
    for own, key, usual in (
        (words, "tokenizer", Path("model/tokenizer.json")),
        (eyes, "vision_model", Path(DEFAULT_VISION_MODEL, "config.json")),
    ):
        named, flag = sidecar[key].get("path"), f"{key}_path"
        if named and not own and getattr(args, flag, "") is None:
            places = dict.fromkeys(base / named for base in (Path(), ROOT, weights.parent))
            places |= dict.fromkeys([weights.parent / Path(named).name])
            own = [place for place in places if (place / usual.name).is_file()]
            if not own and not usual.is_file():
                raise FileNotFoundError(
                    f"{sidecar_path(weights)} names the {key} {named}, and there is none\n"
                    f"(looked in {', '.join(map(str, places))}). Pass it with --{flag}"
                )
        found.append(str(own[0]) if own else None)
    return tuple(found)


def build_model(args, weights: Path | None, dropout: float = 0.0):
    """The model and its tokenizer from the shared flags: from weights, or from nothing.

    Where `args` has no vision_model_path it is the language model alone. A tokenizer_path or vision_model_path of None
    is what belongs to the weights, else what lies in ./model; `args` then names it.
    Returns (model in fp32 on the CPU, tokenizer, a line for the user). Raises ValueError when flags, weights,
    tokenizer and encoder do not belong together.
    """
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    asked = {key: value for key in shape if (value := getattr(args, key)) is not None}
    state, sidecar, source, words, encoder = None, {}, weights, None, None
    if weights is None:
        architecture = {"hidden_size": 512, "num_hidden_layers": 8} | asked | {"use_moe": args.use_moe}
    else:
        state, older, ignored = known_names(read_weights(weights))
        check_values(state, weights)
        sidecar = read_sidecar(weights)
        words, encoder = folders_of(weights, sidecar, args)
        heads = {key: value for key, value in asked.items() if key == "num_attention_heads"}  # no shape tells them
        architecture = config_of(state, weights, heads | sidecar["config"])
        for key, value in asked.items():
            if architecture[key] != value:
                raise ValueError(f"--{key} {value}: {weights} has {architecture[key]}; leave the flag out")
        dense = not architecture["use_moe"]
        if dense and args.use_moe and not hasattr(args, "from_weight"):
            raise ValueError(f"--use_moe: {weights} is dense; only training makes experts of it. Leave the flag out")
        architecture["use_moe"] |= args.use_moe
        if older:
            state = half_split(state, architecture["num_attention_heads"])
            source = f"{weights} (older naming: renamed, rotary rows reordered)"

    patches = len(architecture.get("image_special_token", ""))
    placeholder = architecture.get("image_ids", [34])[0]
    for key in ("image_special_token", "image_ids", "ve_hidden_size", "dropout"):
        architecture.pop(key, None)  # they follow from the encoder and the flags
    sees = hasattr(args, "vision_model_path")
    if sees:
        args.vision_model_path = args.vision_model_path or encoder or DEFAULT_VISION_MODEL
        config = VLMConfig.for_encoder(args.vision_model_path, dropout=dropout, **architecture)
        if patches and patches != len(config.image_ids):
            raise ValueError(
                f"{args.vision_model_path} gives {len(config.image_ids)} patches, {weights} was made for {patches}: "
                "pass the --vision_model_path that belongs to the weights"
            )
    else:
        config = MiniMindConfig(dropout=dropout, **architecture)
    args.tokenizer_path = args.tokenizer_path or words or "./model"
    tokenizer = load_tokenizer(args.tokenizer_path, *([config.image_special_token] if sees else []))
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])  # where answers stop
    config.bos_token_id, config.eos_token_id, config.pad_token_id = start, end, tokenizer.pad_token_id
    if sees:
        config.image_ids = [tokenizer.convert_tokens_to_ids("@")] * len(config.image_ids)
    warning = ""
    if weights is None:
        config.vocab_size = len(tokenizer)
    else:
        known = sidecar["tokenizer"]
        warning = check_tokenizer(tokenizer, args.tokenizer_path, weights, config.vocab_size, known, placeholder)

    model = MiniMindVLM(config, args.vision_model_path) if sees else MiniMindForCausalLM(config)
    line = "started from nothing"
    if state is not None and dense and args.use_moe:
        gates = {key: value for key, value in model.state_dict().items() if key.endswith("mlp.gate.weight")}
        line = load_weights(model, upcycle(state, config) | gates, source)
        line += "; each expert starts as its dense feed-forward, the gates at random"
    elif state is not None:
        line = load_weights(model, state, source)
    if state is not None and ignored:
        line += f"; ignored: {len(ignored)} (first: {ignored[0]})"
    known = sidecar.get("vision_model", {})
    if sees and known.get("sha256") and known["sha256"] != fingerprint(model):
        raise ValueError(
            f"{args.vision_model_path} is not the encoder of {weights}, which is {known.get('path')}. Pass that "
            "one with --vision_model_path"
        )
    return model, tokenizer, warning + line
