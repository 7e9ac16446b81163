"""Random windows and mirror images of pictures: `scripts.train_clip`, and --min_scale and --flip of both stages."""

import math

import torch
import torch.nn.functional as F


def augment(pixels: torch.Tensor, min_scale: float, flip: bool) -> torch.Tensor:
    """Crops a random window of each picture and stretches it to full size: float (B, 3, S, S) → the same shape.

    pixels: normalised. A window has min_scale to 1 of the area and an aspect ratio from 3:4 to 4:3, as in Inception;
    brightness and contrast vary a little. flip: mirrors half of the pictures. Handles all at once, on their device.
    """
    B, device = len(pixels), pixels.device
    area = torch.empty(B, device=device).uniform_(min_scale, 1)
    ratio = torch.empty(B, device=device).uniform_(-math.log(4 / 3), math.log(4 / 3)).exp()
    size = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=1).clamp(max=1)  # (B, 2), 1 = the whole side
    shift = (torch.rand(B, 2, device=device) * 2 - 1) * (1 - size)
    if flip:
        size[:, 0] *= torch.where(torch.rand(B, device=device) < 0.5, -1.0, 1.0)
    window = torch.cat([torch.diag_embed(size), shift[:, :, None]], dim=2)  # (B, 2, 3)
    grid = F.affine_grid(window, list(pixels.shape), align_corners=False)
    pixels = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
    contrast = torch.empty(B, 1, 1, 1, device=device).uniform_(0.7, 1.3)
    return pixels.mul_(contrast).add_(torch.empty(B, 1, 1, 1, device=device).uniform_(-0.3, 0.3))


def augment_batch(inputs: dict, model, args) -> dict:
    """The arguments of `model.forward` for a training step, with other pixels if --min_scale or --flip was given."""
    wanted = getattr(args, "min_scale", None) or getattr(args, "flip", None)  # a language model alone has no such flags
    pixels = inputs["pixel_values"]  # uint8 (N, 3, H, W)
    if not wanted or pixels is None or not len(pixels):
        return inputs
    return inputs | {"pixel_values": augment(model.processor.normalize(pixels), args.min_scale or 1, bool(args.flip))}
