"""The encoders that a folder may hold: what sets each family apart, in one table. Shipped with exported folders."""

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
    """What config.json and preprocessor_config.json do not say, or leave out where it is the usual."""

    name: str
    tower: str  # its class in Transformers
    norm: str  # its last norm, before which the linear projector takes its features; "": they never go through one
    pixels: dict  # of its processor: mean, spread, filter; size where it is not that of config.json
    squash: bool = False  # pictures to a square, in place of the shortest edge to a size, and a crop
    class_token: bool = True  # a summary of the picture before the patches
    any_size: bool = False  # of pictures: its positions are computed for it
    renamed: bool = True  # Transformers 4 and 5 sort its weights differently, as their names in memory differ


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
    """Of FAMILIES, if it is one. model_type: of a config.json, of the whole model or of its vision half."""
    return model_type.removesuffix("_vision_model")


def family_of(model_type: str) -> Family | None:
    return FAMILIES.get(key_of(model_type))


def vision_config(folder) -> dict:
    """The vision half of an encoder's config.json: `model_type`, `image_size`, `patch_size` (pixels), `hidden_size`
    (width), `num_register_tokens` (vectors of no place, between class token and patches).

    Raises FileNotFoundError or ValueError if the folder holds no encoder of the table.
    """
    path = Path(folder) / "config.json"
    if not path.exists():
        raise FileNotFoundError(
            f"--vision_model_path {folder}: no config.json there, as an encoder's folder has.\n"
            "For the public CLIP: python -m scripts.download --what clip"
        )
    config = read_json(path)
    kind = str(config.get("model_type"))
    family = family_of(kind)
    if family is None:
        naflex = ", a SigLIP2 of any proportions, not of a fixed size" if kind.startswith("siglip2") else ""
        raise ValueError(
            f"{path}: model_type {config.get('model_type')!r}{naflex}.\n"
            f"Encoders that are read: {', '.join(family.name for family in FAMILIES.values())}"
        )
    vision = config.get("vision_config") or config
    usual = getattr(transformers, family.tower.replace("Model", "Config"))()
    fields = {key: getattr(usual, key) for key in ("image_size", "patch_size", "hidden_size")}
    fields |= {"num_register_tokens": getattr(usual, "num_register_tokens", 0)}
    fields = {key: vision.get(key, value) for key, value in fields.items()}
    for key, value in fields.items():
        check_number(path, key, value, 0 if key == "num_register_tokens" else 1, 100_000)
    return {"model_type": key_of(kind)} | fields
