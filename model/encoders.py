"""Loads the frozen vision tower from a folder, for every family in families.py. Copied into exported folders."""

from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers.utils import logging

from .families import FAMILIES, vision_config
from .files import check_records, impostor, why_unreadable
from .processing import ImageProcessor


def measure(folder) -> tuple[int, int, int]:
    """Returns (patches per side, register tokens, width V) of the encoder in `folder`.

    Raises ValueError if its pictures are not square; also raises what `vision_config` raises.
    """
    vision = vision_config(folder)
    size = vision["image_size"]
    if FAMILIES[vision["model_type"]].any_size:  # DINOv2 was trained at 518 pixels, but its processor gives 224
        size, width = ImageProcessor.from_pretrained(folder).crop_size
        if size != width:
            raise ValueError(f"{folder}/preprocessor_config.json gives {size} x {width} pixels, expected a square")
    return size // vision["patch_size"], vision["num_register_tokens"], vision["hidden_size"]


def count_tokens(side: int, registers: int, merge: int = 1) -> int:
    """Number of tokens per picture if merge · merge patches become one; see `measure`. Merging drops registers."""
    return (side // merge) ** 2 + (registers if merge == 1 else 0)


@contextmanager
def quiet_transformers():
    """Silences Transformers: loading only the vision half of a CLIP would print a page about unused text weights."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def unnormed(module, inputs, output) -> torch.Tensor:
    return inputs[0]


def load_encoder(path, normed: bool = False):
    """The frozen vision tower in the folder `path`, in fp32 and eval mode.

    normed: apply the tower's last norm to last_hidden_state, as the projector "mlp" expects. Raises FileNotFoundError
    if the folder contains no encoder, ValueError if its weights are damaged or do not fill the tower.
    """
    vision, given = vision_config(path), ImageProcessor.from_pretrained(path).crop_size
    kind, edge = vision["model_type"], vision["image_size"]
    family = FAMILIES[kind]
    if given != (edge, edge) and not family.any_size:
        raise ValueError(
            f"{path}/preprocessor_config.json gives pictures of {' x '.join(map(str, given))} pixels, and\n"
            f"its config.json wants {edge} x {edge}: take both from the same place"
        )
    files = [*Path(path).glob("*.safetensors")] or [*Path(path).glob("*.bin")]
    if not files:
        raise FileNotFoundError(f"--vision_model_path {path}: no model.safetensors or pytorch_model.bin there")
    tower = getattr(transformers, family.tower)
    with quiet_transformers():
        try:
            for file in files:
                if what := impostor(file):
                    raise ValueError(f"{file.name} {what}")
                check_records(file)
            how = {"output_loading_info": True, "dtype": torch.float32}
            if kind == "vit":
                how["add_pooling_layer"] = False  # missing in some folders, and not needed here
            if kind == "aimv2":
                how["key_mapping"] = {r"^vision_model\.": ""}  # in a complete AIMv2
            if transformers.__version__.startswith("4.") and kind in ("clip", "siglip"):
                # Version 4 does not know the names under which version 5 saves these towers.
                how["key_mapping"] = {r"^(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.": r"vision_model.\1."}
            model, info = tower.from_pretrained(path, **how)
        except Exception as error:  # safetensors, zip and pickle raise different errors
            reason = why_unreadable(error)
            raise ValueError(f"{path}: the weights cannot be read, download them anew ({reason})") from None
    unfilled = [*info["missing_keys"], *info["mismatched_keys"]]
    if unfilled:
        raise ValueError(
            f"{path}: the weights leave {len(unfilled)} tensors of the vision tower at random, first {unfilled[0]}"
        )
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {key} holds NaN or infinite values. Download the encoder anew")
    if family.norm and not normed:
        # A stock LLaVA also takes the features of the last block, so the export computes the same.
        getattr(getattr(model, "vision_model", model), family.norm).register_forward_hook(unnormed)
    # Frozen: CLIP learned from 400 million pictures, and training on our few would damage it. Frozen weights need no
    # gradients, and their features never change, so --cache_features computes them once for all epochs.
    return model.requires_grad_(False).eval()
