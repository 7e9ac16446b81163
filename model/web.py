"""Writes a trained model as a page that answers in a browser, without a server: inference/web plus the weights.

Used by scripts.convert_vlm. This file writes the inputs of engine.js: config, tokenizer, weights as safetensors.
"""

import base64
import hashlib
import json
import re
from io import BytesIO
from pathlib import Path

import safetensors.torch
import torch
from PIL import Image

from common.files import write_safely, write_text
from model.export import exact
from model.families import FAMILIES, family_of, key_of
from model.files import read_json
from model.int8 import quantize
from model.processing import DEFAULT_SYSTEM, IMAGE_TAG, NO_THOUGHT
from model.rgb import to_rgb
from model.tokenizer import thinks

WEB = Path(__file__).parents[1] / "inference" / "web"
SOURCES = ("bpe.js", "resize.js", "layers.js", "engine.js", "worker.js")  # joined for the worker of the page
SCRIPTS = ("words.js", "pictures.js", "attention.js", "chat.js")  # scripts of the page itself
ACTIVATIONS = ("silu", "relu", "gelu", "quick_gelu", "gelu_pytorch_tanh")  # supported by layers.js
FILTERS = (2, 3)  # bilinear and bicubic, supported by resize.js
ONE_FILE = 50 * 10**6  # bytes; above this, the weights go into files next to the page
PIECE = 4 * 10**6  # bytes per file: the page shows progress after each; hosts reject files over 25 or 100 MB
BETWEEN = '</script>\n<script type="text/plain" class="weights">'  # between pieces; the page frees them one by one
SAMPLE = 448  # pixels of the longer edge of a sample picture
DTYPES = ("int8", "fp16")

ENCODERS = ("clip", "siglip", "vit", "dinov2", "dinov2_with_registers")
ENCODER_NAMES = (  # names in their files, and in Transformers 5, which renames some → names in the page
    (r"^(vision_model\.)?(encoder\.)?layers?\.", "layers."),
    (r"\.attention\.attention\.([qkv])[a-z]+\.", r".attention.\1_proj."),
    (r"\.(self_attn|attention)\.([qkv]_proj)\.", r".\2."),
    (r"\.(self_attn\.out_proj|attention\.o_proj|attention\.output\.dense)\.", ".o_proj."),
    (r"\.(layer_norm1|layernorm_before)\.", ".norm1."),
    (r"\.(layer_norm2|layernorm_after)\.", ".norm2."),
    (r"\.(mlp\.fc1|intermediate\.dense)\.", ".fc1."),
    (r"\.(mlp\.fc2|output\.dense)\.", ".fc2."),
    (r"\.lambda1$", ""),
    (r"^(vision_model\.)?pre_layrnorm\.", "pre_norm."),
    (r"^(vision_model\.)?(post_layernorm|layernorm)\.", "norm."),
)

# ---------------------------------------------------------------------------- limits of the engine


def check_web(model, tokenizer_path) -> None:
    """Raises ValueError, which names the part of the model that engine.js does not support."""
    encoder, path = model.vision_encoder.config, Path(tokenizer_path) / "tokenizer.json"
    kind = key_of(encoder.model_type)
    if kind not in ENCODERS or getattr(encoder, "use_swiglu_ffn", False):
        names = ", ".join(FAMILIES[name].name for name in ENCODERS)
        raise ValueError(
            f"--to web: the page does not support this {FAMILIES[kind].name} encoder. It supports\n{names}"
        )
    for act in (model.config.hidden_act, encoder.hidden_act):
        if act not in ACTIVATIONS:
            raise ValueError(f"--to web: the page does not support hidden_act {act!r}, only {', '.join(ACTIVATIONS)}")
    if model.processor.resample not in FILTERS:
        raise ValueError(
            f"--to web: the encoder of this {model.config.model_type} needs pictures resized with resample "
            f"{int(model.processor.resample)},\nbut the page supports only 2 (bilinear) and 3 (bicubic)"
        )
    known = read_json(path)
    split, bpe = known.get("pre_tokenizer") or {}, known["model"]
    plain = split.get("type") == "ByteLevel" and split.get("use_regex", True) and not split.get("add_prefix_space")
    plain &= bpe["type"] == "BPE" and not bpe.get("ignore_merges") and not known.get("normalizer")
    plain &= not any(token[key] for token in known["added_tokens"] for key in ("single_word", "lstrip", "rstrip"))
    if not plain:
        raise ValueError(f"--to web: {path} is not a plain byte-level BPE, which scripts.train_tokenizer makes")


# ---------------------------------------------------------------------------- parts of the page


def as_url(picture: Image.Image) -> str:
    """A picture as a small JPEG in a data: URL."""
    picture, file = to_rgb(picture), BytesIO()
    picture.thumbnail((SAMPLE, SAMPLE))
    picture.save(file, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def web_config(model, tokenizer, sidecar: dict, name: str, samples=()) -> dict:
    """The configuration for the page. sidecar: the JSON of the weights; samples: pictures to offer first."""
    config, thoughtful = model.config, thinks(tokenizer)
    fields = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"),
        *("max_position_embeddings", "rms_norm_eps", "rope_theta", "hidden_act", "eos_token_id"),
        *("use_moe", "num_experts_per_tok", "n_routed_experts", "n_shared_experts"),
        *("ve_hidden_size", "spatial_merge_size"),
    )
    decoder = {key: getattr(config, key) for key in fields} | {"P": len(config.image_ids)}
    decoder["head_dim"] = config.head_dim or config.hidden_size // config.num_attention_heads
    decoder["placeholder"] = config.image_ids[0]
    decoder["normed"] = config.norm_topk_prob if config.num_experts_per_tok > 1 else config.norm_top1_prob
    eyes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps", "patch_size")
    pixels = {key: getattr(model.processor, key) for key in ("size", "crop_size", "image_mean", "image_std")}
    chat = {
        "tag": IMAGE_TAG,
        "system": None if thoughtful else DEFAULT_SYSTEM,
        "no_thought": NO_THOUGHT if thoughtful else None,
    }
    return {
        "name": name,
        "decoder": decoder,
        "encoder": {key: getattr(model.vision_encoder.config, key) for key in eyes},
        "processor": pixels | {"resample": int(model.processor.resample)},
        "chat": chat | {"pictures_first": bool(sidecar.get("pictures_first"))},
        "needs_picture": sidecar.get("rows_without_picture") == 0,
        "prompts": sidecar.get("prompts", {}),
        "samples": [as_url(picture) for picture in samples],
    }


def encoder_weights(model) -> dict[str, torch.Tensor]:
    """The encoder's weights under the page's names. "encoder.positions" (T, V) is its embedding of a picture of zeros:
    it contains everything that is added to patches or comes before them."""
    tower = model.vision_encoder
    embeddings = getattr(tower, "vision_model", tower).embeddings
    weights = {"encoder.positions": embeddings(torch.zeros(1, 3, *model.processor.crop_size))[0]}
    for key, value in tower.named_parameters():
        for pattern, name in ENCODER_NAMES:
            key = re.sub(pattern, name, key)
        if key.startswith(("layers.", "pre_norm.", "norm.")):
            weights[f"encoder.{key}"] = value
        elif value.ndim == 4:
            weights["encoder.patches.weight"] = value
    return weights


def web_state(model, dtype: str) -> dict[str, torch.Tensor]:
    """All weights that answers need, in the stored dtype: matrices as fp16, or as int8 with a scale per row
    ("NAME.scale"), other tensors as fp16 if that is lossless. Raises ValueError for values beyond fp16."""
    tower, normed = model.vision_encoder, model.config.projector == "mlp"
    skip = r"lm_head\." if normed and family_of(tower.config.model_type).norm else r"lm_head\.|encoder\.norm\."
    state = encoder_weights(model) | model.text_state_dict()  # head and embedding are one matrix
    state = {key: value for key, value in state.items() if not re.match(skip, key)}
    stored = {}
    for key, value in state.items():
        value = value.detach().cpu().float()
        if (
            value.ndim == 1 or key == "encoder.positions" or ".mlp.gate." in key
        ):  # the choice of experts needs full precision
            stored[key] = exact(value)
        elif dtype == "int8":
            rows, scales = quantize(value.flatten(1))  # (O, I), (O, 1)
            stored[key], stored[f"{key}.scale"] = rows.view(value.shape), scales[:, 0].contiguous()
        else:
            stored[key] = value.half().contiguous()
            if not stored[key].isfinite().all():
                raise ValueError(f"--dtype fp16: {key} contains values that are not finite in fp16. Use --dtype int8")
    return stored


def as_floats(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The stored weights converted to fp32."""

    def widen(key, value):
        scales = stored.get(f"{key}.scale")
        return value.float() if scales is None else (value.flatten(1) * scales[:, None]).view(value.shape)

    return {key: widen(key, value) for key, value in stored.items() if not key.endswith(".scale")}


# ---------------------------------------------------------------------------- the page


def inside(text: str) -> str:
    """Escapes text for a <script> in HTML, which "</script" or "<!--" would end or change."""
    return text.replace("<", "\\u003c")


def page_of(parts: dict[str, str]) -> str:
    """chat.html with style and scripts filled in. parts: {name of another comment: its replacement}."""

    def joined(*names):
        return "\n".join((WEB / name).read_text(encoding="utf-8") for name in names)

    parts = {"STYLE": joined("chat.css"), "PAGE": joined(*SCRIPTS), "ENGINE": joined(*SOURCES)} | parts
    return re.sub(rf"/\*({'|'.join(parts)})\*/", lambda match: parts[match[1]], joined("chat.html"))


def write_web(
    folder: Path,
    model,
    tokenizer,
    tokenizer_path,
    sidecar: dict,
    name="MiniMind-V",
    dtype="int8",
    split=False,
    samples=(),
) -> dict:
    """Writes chat.html into `folder`, and separate files of weights if they exceed ONE_FILE or with `split`.

    dtype: one of DTYPES. samples: pictures to offer first. Returns the stored weights, see `web_state`. Raises
    ValueError for models that the page cannot run, OSError if writing fails.
    """
    check_web(model, tokenizer_path)
    stored = web_state(model, dtype)
    weights = safetensors.torch.save(stored)
    config = web_config(model, tokenizer, sidecar, name, samples) | {"bytes": len(weights)}
    pieces, text = [weights[at : at + PIECE] for at in range(0, len(weights), PIECE)], ""
    if split or len(weights) * 4 / 3 > ONE_FILE:  # base64 stores 6 bits in a byte
        mark = hashlib.sha256(weights).hexdigest()[:12]  # new names, so a browser does not use cached weights
        config["files"] = [{"name": f"weights_{mark}_{i}.bin", "bytes": len(piece)} for i, piece in enumerate(pieces)]
        for file, piece in zip(config["files"], pieces):
            write_safely(folder / file["name"], lambda out, piece=piece: out.write(piece))
    else:
        text = BETWEEN.join(base64.b64encode(piece).decode() for piece in pieces)
    parts = {
        "CONFIG": inside(json.dumps(config, ensure_ascii=False)),
        "TOKENIZER": inside((Path(tokenizer_path) / "tokenizer.json").read_text(encoding="utf-8")),
        "KERNEL": base64.b64encode((WEB / "matmul.wasm").read_bytes()).decode(),
        "WEIGHTS": text,
    }
    write_text(folder / "chat.html", page_of(parts))
    return stored
