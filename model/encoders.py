"""The frozen vision tower of a folder, CLIP's or SigLIP's. Shipped with exported folders."""

from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from transformers import CLIPVisionModel, SiglipVisionModel
from transformers.utils import logging

from .files import check_records, impostor, read_json, vision_config, why_unreadable


def is_siglip(folder) -> bool:
    return "siglip" in str(read_json(Path(folder) / "config.json").get("model_type"))


@contextmanager
def quiet_transformers():
    """A whole CLIP is loaded for its vision half: the page of unexpected text weights is expected."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_encoder(path):
    """The frozen vision tower of a CLIP or SigLIP folder in fp32.

    Raises FileNotFoundError if the folder is none, ValueError if its weights do not fill the tower.
    """
    vision_config(path)
    files = [*Path(path).glob("*.safetensors"), *Path(path).glob("*.bin")]
    if not files:
        raise FileNotFoundError(f"--vision_model_path {path}: no model.safetensors or pytorch_model.bin there")
    tower = SiglipVisionModel if is_siglip(path) else CLIPVisionModel
    with quiet_transformers():
        try:
            for file in files:
                if what := impostor(file):
                    raise ValueError(f"{file.name} {what}")
                check_records(file)
            how = {"output_loading_info": True, "dtype": torch.float32}
            if transformers.__version__.startswith("4."):  # which does not know the names that 5 saves towers under
                how["key_mapping"] = {r"^(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.": r"vision_model.\1."}
            model, info = tower.from_pretrained(path, **how)
        except Exception as error:  # safetensors, zip files and pickles each break in their own way
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
    # Frozen: CLIP learned from 400 million pictures, and our few would sooner spoil that. Frozen weights need no
    # gradients, and their features never change, so --cache_features computes them once for all epochs.
    return model.requires_grad_(False).eval()
