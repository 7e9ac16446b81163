"""Constants that flags and models share. Imports nothing, because flags must not wait for PyTorch."""

DEFAULT_VISION_MODEL = "./model/vision_model/clip-vit-base-patch16"
