"""Weights on disk: `out/{llm,pretrain_vlm,sft_vlm}_{hidden}{_moe}.pth`, fp16, without the encoder.

Beside each stands a small JSON that says what it is: configuration, tokenizer, encoder, data, step. Everything is
written beside, flushed and renamed, so that a full disk or a lost power supply leaves the last good file.

`build_model` is how every script comes to its model. It reads these files, those of the public MiniMind-V without a
JSON, those from before April 2025 under their older names, and Transformers folders; what does not fit is refused.
"""

import glob
import hashlib
import json
import os
import re
import shlex
import sys
import time
from contextlib import suppress
from inspect import signature
from pathlib import Path

import psutil
import safetensors.torch
import torch
import transformers

from common.cli import disk_full
from common.start import script
from model import DEFAULT_VISION_MODEL
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM, VLMConfig, check_records, why_unreadable
from model.processing import check_number, impostor, load_tokenizer, read_json

# sha256 of tokenizer.json: of the public weights that this code reads, and of the generation after them
PUBLIC_TOKENIZER = "d98595c6aef70d95f72748582fb9b4f53d76dd58c1ae1dd702ad7c84e1caf5e4"
LATER_TOKENIZER = "71f32c68cf63a15355a8fc171b7594b3d41870fe0ddb54fc6aefa55f73a4a668"

ROOT = Path(__file__).parent.parent  # of the repository
ABOUT = "minimind.json"  # in a Transformers folder: the JSON of the weights it was made of
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")

OLDER_NAMES = (  # before April 2025 → now
    (r"^tok_embeddings\.", "model.embed_tokens."),
    (r"^output\.", "lm_head."),
    (r"^norm\.", "model.norm."),
    (r"^layers\.", "model.layers."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.w([qkvo])\.", r".self_attn.\1_proj."),
    (r"\.feed_forward\.", ".mlp."),
    (r"\.shared_experts\.w", ".shared_experts.0.w"),  # there was one
    (r"\.w1\.", ".gate_proj."),
    (r"\.w2\.", ".down_proj."),
    (r"\.w3\.", ".up_proj."),
)

CAUSES = (  # what a misfit is likely to come from
    (r"embed_tokens\.weight is", "another hidden_size or vocabulary"),
    (r"mlp\.(gate\.|experts|shared_experts)", "one is a mixture of experts, the other dense"),
    (r"first: vision_proj", "another --vision_model_path, or weights that see for a model of text alone"),
    (r"(missing|unknown), first: model\.layers\.[1-9]", "another number of layers, or an incomplete file"),
    (r"", "an incomplete file, or weights of something else"),
)


def write_safely(path, write) -> None:
    """Calls write(temporary file) and renames it to `path`, so that there is a whole file at any moment."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # as by `kill -9`
        pid = left.name.split(".")[-2]
        with suppress(OSError):  # another process was faster
            old = time.time() - left.stat().st_mtime > 60  # a younger one may be another machine's
            if old and pid.isdigit() and not psutil.pid_exists(int(pid)):
                left.unlink()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError, "unexpected pos"
        full = disk_full(error) or "unexpected pos" in str(error)
        reason = "the disk is full" if full else error
        raise OSError(f"could not write {path} ({reason}); what stood there is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value: dict) -> None:
    write_safely(path, lambda file: file.write(json.dumps(value, indent=1, ensure_ascii=False).encode()))


def files_of(folder: Path) -> list[Path]:
    """The files of weights of a Transformers folder: one, or the shards that an index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            shards = read_json(folder / f"{name}.index.json").get("weight_map")
            names = sorted(set(map(str, shards.values()))) if isinstance(shards, dict) else []
            if not names or any(Path(shard).name != shard for shard in names):
                raise ValueError(f'{folder / name}.index.json: expected "weight_map": {{tensor: file in this folder}}')
            return [folder / shard for shard in names]
    raise FileNotFoundError(f"{folder}: neither model.safetensors nor pytorch_model.bin there, nor an index of shards")


def read_weights(path) -> dict[str, torch.Tensor]:
    """What a .safetensors file, a pickle of PyTorch or a Transformers folder holds, under the names it has there.

    Only tensors are unpickled: a file that would run code is refused, and so is one that is damaged.
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
    except Exception as error:  # a zip, pickle or value error, by what is wrong with it
        if what := impostor(path):
            raise ValueError(f"{path} {what}") from None
        reason = why_unreadable(error)
        raise ValueError(f"{path} is not a file of weights that can be read safely: {reason}") from None
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds a {type(state).__name__}, expected a state dict: names and tensors")
    return state


def check_values(state: dict[str, torch.Tensor], path) -> None:
    """ValueError names the first tensor of a state dict that cannot be weights: not of floats, sparse, not finite."""
    for key, value in state.items():
        if not value.is_floating_point() or value.layout != torch.strided:
            kind = str(value.layout if value.layout != torch.strided else value.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {key} is {kind}, expected floats. Fetch or convert the weights again")
        if not value.isfinite().all():
            raise ValueError(
                f"{path}: {key} holds NaN or infinite values, with which no answer makes sense.\n"
                "Take an earlier checkpoint, or fetch the weights again"
            )


def bare_name(weights: Path) -> str:
    """Without .pth; a folder's name may hold dots of its own, as in mine-v0.1."""
    return weights.name if weights.is_dir() else weights.stem


def sidecar_path(weights: Path) -> Path:
    return weights / "config.json" if weights.is_dir() else weights.with_suffix(".json")


def read_sidecar(weights: Path) -> dict:
    """The JSON beside weights; "config", "tokenizer", "vision_model" and "prompts" are objects, empty if it is absent.

    In a Transformers folder config.json is the "config", of which only what our configuration knows is taken; the
    others, where ABOUT is there, are the folder's own.
    """
    path = sidecar_path(weights)
    about = read_json(path) if path.is_file() else {}
    if weights.is_dir():
        if about.get("model_type") not in ("minimind", "minimind-v"):
            kind = about.get("model_type")
            back = f". Make one of it: python -m scripts.convert_vlm --to pth --weights {weights}" * (kind == "llava")
            raise ValueError(f"{path}: expected a MiniMind with model_type minimind-v, got {kind}{back}")
        fields = [*signature(MiniMindConfig).parameters, "image_ids", "image_special_token"]
        config = {key: about[key] for key in fields if about.get(key) is not None}
        about = (read_json(weights / ABOUT) if (weights / ABOUT).is_file() else {}) | {"config": config}
        for key, own in (("tokenizer", weights), ("vision_model", weights / "vision_encoder")):
            if about.get(key):
                about[key]["path"] = str(own)
    for key in ("config", "tokenizer", "vision_model", "prompts"):
        if not isinstance(about.setdefault(key, {}), dict):
            raise ValueError(f"{path}: {key!r} must be an object. Without the file, shapes alone tell what they are")
    check_config(about["config"], path)
    for found in about["prompts"].values():
        if not isinstance(found, list) or not found or not all(isinstance(prompt, str) for prompt in found):
            raise ValueError(
                f'{path}: "prompts" holds {found!r}, expected lists of questions, {{"en": ["What is this?"]}}'
            )
    return about


def known_names(state: dict) -> tuple[dict[str, torch.Tensor], bool, list[str]]:
    """A state dict of any generation under the names of now.

    Prefixes of wrappers go; buffers, the encoder and what is no tensor are left out; the one matrix that is embedding
    and head stands under both names. Returns (state, is it an older one that needs `half_split` too, what is left out).
    """
    found, ignored = {}, []
    for key, value in state.items():
        key = re.sub(r"^((module|_orig_mod)\.)+", "", str(key))
        if not isinstance(value, torch.Tensor) or re.search(r"^vision_encoder\.|mask|pos_cis|freqs_", key):
            ignored.append(key)
        else:
            found[key] = value
    older = "layers.0.attention.wq.weight" in found
    if older:
        for pattern, name in OLDER_NAMES:
            found = {re.sub(pattern, name, key): value for key, value in found.items()}
    embed, head = "model.embed_tokens.weight", "lm_head.weight"
    if embed in found or head in found:
        found = {embed: found.get(head), head: found.get(embed)} | found
    return found, older, ignored


def half_split(state: dict[str, torch.Tensor], heads: int) -> dict[str, torch.Tensor]:
    """Older q and k for the rotary positions of now.

    RoPE turned neighbours together, entries 2i and 2i + 1 of a head; now it turns i and i + d/2. So the even rows of
    each head come first, then the odd ones. Scores are sums over a head, and stay.
    """

    def reorder(weight):
        D = weight.shape[1]
        return weight.reshape(-1, D // heads // 2, 2, D).transpose(1, 2).reshape(weight.shape)

    turned = (".self_attn.q_proj.weight", ".self_attn.k_proj.weight")
    return {key: reorder(value) if key.endswith(turned) else value for key, value in state.items()}


def weights_name(stage: str, config: MiniMindConfig) -> str:
    return f"{stage}_{config.hidden_size}{'_moe' if config.use_moe else ''}.pth"


def find_weights(name: str, out_dir, hidden_size: int | None, use_moe: bool) -> Path | None:
    """--from_weight: "none", a file, a Transformers folder, or a stage, looked for in `out_dir`.

    Of a stage the file of the width and kind asked for (512 and dense if nothing is said) comes first, else the only
    one that does not contradict what was said.
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
    found = list(filter(fits.fullmatch, there))
    if len(found) == 1:
        return out_dir / found[0]
    if found:
        raise ValueError(
            f"--from_weight {name}: {out_dir} holds {', '.join(found)}\n"
            f"Say which by its path: --from_weight {out_dir / found[0]}"
        )
    how = {
        "pretrain_vlm": "make it: python train_pretrain_vlm.py",
        "sft_vlm": "fetch it: python -m scripts.download --what vlm",
        "llm": "fetch it: python -m scripts.download --what llm",
    }
    raise FileNotFoundError(
        f"--from_weight {name}: no {exact[0]} ({out_dir} holds {', '.join(there) or 'no .pth file'})\n"
        f"Name another, or none, or {how.get(name, 'a stage: ' + ', '.join(how))}"
    )


INTEGERS = {  # of a configuration: least, most
    **dict.fromkeys(("hidden_size", "intermediate_size", "vocab_size", "max_position_embeddings"), (1, 10**7)),
    **dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), (1, 10**4)),
    **dict.fromkeys(("n_routed_experts", "num_experts_per_tok"), (1, 10**4)),
    **dict.fromkeys(("n_shared_experts", "bos_token_id", "eos_token_id"), (0, 10**7)),
    "ve_hidden_size": (1, 10**6),
}
NUMBERS = {"dropout": (0, 0.99), "rms_norm_eps": (1e-12, 0.1), "rope_theta": (1, 1e12), "aux_loss_alpha": (0, 1e3)}
SWITCHES = ("flash_attn", "use_moe", "seq_aux", "norm_topk_prob")
TEXTS = ("hidden_act", "scoring_func", "image_special_token")


def check_config(config: dict, path: Path) -> None:
    """ValueError names the first value of a configuration, as it was read from a file, that no model can have."""
    for key, value in config.items():
        if key in INTEGERS:
            public = key == "n_shared_experts" and value is True  # which says so, and means 1
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
            raise ValueError(f"{path}: {key!r} is nothing that this model knows. Is the file of a later version?")


def config_of(state: dict, path: Path, known: dict) -> dict:
    """The architecture of a state dict of `known_names`: what shapes tell, and the rest from `known`, the "config" of
    its JSON. Raises ValueError for weights that are not of this architecture, or not those that `known` describes."""
    if any(".q_norm." in key or ".k_norm." in key for key in state):
        raise ValueError(
            f"{path} holds q_norm: weights of a later generation (MiniMind-3),\n"
            "another architecture. For this one: python -m scripts.download --what llm"
        )
    use_moe = "model.layers.0.mlp.gate.weight" in state
    up = f"model.layers.0.mlp.{'experts.0.' if use_moe else ''}up_proj.weight"
    for key in ("model.embed_tokens.weight", "model.layers.0.self_attn.k_proj.weight", up):
        if key not in state:
            clip = any(key.startswith("vision_model.") for key in state)
            what = "a CLIP, whose folder belongs to --vision_model_path" if clip else "not MiniMind of a known naming"
            raise ValueError(f"{path} has no {key}, but {next(iter(state), 'no tensor')}: this is {what}")
    vocab_size, hidden_size = state["model.embed_tokens.weight"].shape
    layers = 1 + max(int(found[1]) for key in state if (found := re.match(r"model\.layers\.(\d+)\.", key)))
    heads = known.get("num_attention_heads", 8)
    read = {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": layers, "use_moe": use_moe}
    read["num_attention_heads"] = heads
    keys = state["model.layers.0.self_attn.k_proj.weight"].shape[0]
    public = "num_attention_heads" in known or keys * 4 == hidden_size  # 2 heads for keys beside 8 for queries
    if not public or hidden_size % heads or keys % (hidden_size // heads):
        raise ValueError(
            f"num_attention_heads={heads} does not fit {path}: {hidden_size} wide, its keys {keys}. Give the "
            "--num_attention_heads that it was trained with"
        )
    read["num_key_value_heads"] = keys // (hidden_size // heads)
    read["intermediate_size"] = state[up].shape[0]
    if use_moe:
        read["n_routed_experts"] = state["model.layers.0.mlp.gate.weight"].shape[0]
        read["n_shared_experts"] = sum("layers.0.mlp.shared_experts." in key and "up_proj" in key for key in state)
    for key, value in read.items():
        if key in known and known[key] != value:
            raise ValueError(
                f"{sidecar_path(path)} says {key}={known[key]}, {path.name} holds {value}: they do not belong together"
            )
    return known | read


def refuse_other_architecture(path: Path, config: VLMConfig, resumable: bool = False) -> str:
    """The name of a file tells the width, not the depth: ValueError if another model would be overwritten, or a file
    that cannot be read. With a checkpoint to resume from, the latter is no loss: then a line that says so."""
    there = {}
    if path.is_file():
        try:
            state, _, _ = known_names(read_weights(path))
            known = {"num_attention_heads": config.num_attention_heads} | read_sidecar(path)["config"]
            there = config_of(state, path, known)
        except ValueError as error:
            if not resumable:
                raise
            return f"{error}\nIt will be written anew from the checkpoint, which is whole"
    other = [
        f"{key} {value}, not {getattr(config, key)}"
        for key, value in there.items()
        if key not in ("dropout", "flash_attn", "image_special_token") and value != getattr(config, key)
    ]
    if other:
        raise ValueError(f"{path} holds another model ({', '.join(other)}), keep it: choose another --out_dir")
    return ""


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
