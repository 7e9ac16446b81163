DEFAULT_VISION_MODEL = "./model/vision_model/clip-vit-base-patch16"  # here, for flags that must not wait for PyTorch
