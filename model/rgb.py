"""Converts pictures of any mode to upright RGB on a white background. Copied into exported folders."""

from collections.abc import Iterator

import numpy as np
from PIL import ExifTags, Image, ImageOps

BAND = 2**22  # pixels of a large picture to process at a time


def upright(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation; returns the same object if there is none."""
    return image if image.getexif().get(ExifTags.Base.Orientation, 1) == 1 else ImageOps.exif_transpose(image)


def bands(image: Image.Image) -> Iterator[Image.Image]:
    """Yields a picture from top to bottom in parts of at most BAND pixels, at least one row each."""
    rows = max(BAND // image.width, 1)
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def numbers(image: Image.Image) -> np.ndarray:
    """A picture with 16-bit greys or floats → float64 (H, W)."""
    return np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)


def white_of(image: Image.Image) -> float | None:
    """The value of white in modes that do not define it: 1 for floats, or the maximum of 8, 10, 12, 14 or 16 bits. None
    for all other modes."""
    if image.mode[0] not in "IF":
        return None
    largest = max(numbers(band).max() for band in bands(image))
    whites = [1] * (image.mode == "F") + [255, 1023, 4095, 16383, 65535]
    return next((white for white in whites if largest <= white), largest)


def to_rgb(image: Image.Image, white: float | None = None) -> Image.Image:
    """Converts a picture to upright RGB: transparent parts on white, 16-bit greys and floats scaled to 8 bits, not
    clipped. white: `white_of` the whole picture, if this is a part of it."""
    image = upright(image)
    white = white or white_of(image)
    if white:  # convert() would clip everything above 255 to white, and floats up to 1 to black
        image = Image.fromarray((numbers(image) * (255 / white)).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:  # convert() would show the colour below, often black
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
