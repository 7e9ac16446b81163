"""The supported families of encoders and their differences, in one table. Copied into exported folders."""

from dataclasses import dataclass
from pathlib import Path

import transformers

from .files import check_number, read_json

OPENAI = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
BILINEAR, BICUBIC = 2, 3  # as Pillow numbers them


@dataclass(frozen=True)
class Family:
    """Facts that config.json and preprocessor_config.json do not contain, or omit if they have the default value."""

    name: str
    tower: str  # its class in Transformers
    norm: str  # name of its last norm; the linear projector takes the features before it; "" if there is none
    pixels: dict  # defaults of its processor: mean, std, filter; size if it differs from config.json
    squash: bool = False  # resize to a square instead of resizing the shorter edge and cropping
    class_token: bool = True  # a summary of the picture before the patches
    any_size: bool = False  # accepts any picture size, because it interpolates its positions
    renamed: bool = True  # Transformers 4 and 5 use different names for its weights in memory


PART = {"size": 256, "crop_size": 224}
DINOV2 = {"norm": "layernorm", "pixels": OPENAI | PART | {"resample": BICUBIC}, "any_size": True}
FAMILIES = {
    "clip": Family("CLIP", "CLIPVisionModel", "", OPENAI | {"resample": BICUBIC}, renamed=False),
    "siglip": Family(
        name="SigLIP",
        tower="SiglipVisionModel",
        norm="post_layernorm",
        pixels=HALF | {"resample": BICUBIC},
        squash=True,
        class_token=False,
        renamed=False,
    ),
    "dinov2": Family("DINOv2", "Dinov2Model", **DINOV2),
    "dinov2_with_registers": Family("DINOv2 with registers", "Dinov2WithRegistersModel", **DINOV2),
    "dinov3_vit": Family(
        "DINOv3", "DINOv3ViTModel", "norm", IMAGENET | {"resample": BILINEAR}, squash=True, any_size=True
    ),
    "vit": Family("ViT", "ViTModel", "layernorm", HALF | {"resample": BILINEAR}, squash=True),
    "aimv2": Family("AIMv2", "Aimv2VisionModel", "rms_norm", OPENAI | {"resample": BICUBIC}, class_token=False),
}


def key_of(model_type: str) -> str:
    """The key in FAMILIES for a model_type of a config.json, of a complete model or of its vision half."""
    return model_type.removesuffix("_vision_model")


def family_of(model_type: str) -> Family | None:
    """The family of a model_type; None if it is not supported."""
    return FAMILIES.get(key_of(model_type))


def vision_config(folder) -> dict:
    """The vision half of an encoder's config.json: `model_type`, `image_size`, `patch_size` (pixels), `hidden_size`
    (width), `num_register_tokens` (vectors without a position, between class token and patches).

    Raises FileNotFoundError or ValueError if the folder contains no supported encoder.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"--vision_model_path {folder}: no config.json there; pass the folder of an encoder.\n"
            "For the public CLIP: python -m scripts.download --what clip"
        )
    config = read_json(path)
    kind = str(config.get("model_type"))
    family = family_of(kind)
    if family is None:
        naflex = ", a SigLIP2 for any aspect ratio, not for a fixed size" if kind.startswith("siglip2") else ""
        raise ValueError(
            f"{path}: model_type {config.get('model_type')!r}{naflex}.\n"
            f"Supported encoders: {', '.join(family.name for family in FAMILIES.values())}"
        )
    vision = config.get("vision_config") or config
    usual = getattr(transformers, family.tower.replace("Model", "Config"))()
    fields = {key: getattr(usual, key) for key in ("image_size", "patch_size", "hidden_size")}
    fields |= {"num_register_tokens": getattr(usual, "num_register_tokens", 0)}
    fields = {key: vision.get(key, value) for key, value in fields.items()}
    for key, value in fields.items():
        check_number(path, key, value, 0 if key == "num_register_tokens" else 1, 100_000)
    return {"model_type": key_of(kind)} | fields
