"""What flags and models share; imports nothing, for flags must not wait for PyTorch."""

DEFAULT_VISION_MODEL = "./model/vision_model/clip-vit-base-patch16"
