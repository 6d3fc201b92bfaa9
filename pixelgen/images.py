"""Images in and out: crops, resizes, and the only conversions between uint8 and [-1, 1].

Importing this does not import torch: the processes that only decode and crop start in a fraction of the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor


def resize(image: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """`image` at `size` (width, height), the width resized first, then the height.

    A pass rounds to whole levels, so the order shows. Pillow before 13, and with it the data that published models
    and figures come from, begins with the width; Pillow 13 with the height of some images (python-pillow/Pillow#9549).
    """
    return image.resize((size[0], image.height), resample).resize(size, resample)


def adm_resize(image: Image.Image, size: int) -> Image.Image:
    """Shrink or enlarge so that the shorter side is `size`: halvings by box filter while at least twice too large,
    then one bicubic step (the preprocessing of ADM, arXiv 2105.05233)."""
    while min(image.size) >= 2 * size:
        image = resize(image, (image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return resize(image, (round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central size×size square; where the margin is odd, the smaller half goes to the left and to the top."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    """ADM's resize and centre crop of an RGB image -> (size, size, 3) uint8."""
    return np.asarray(center_crop(adm_resize(image, size), size))


def plain_crop(image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BILINEAR) -> np.ndarray:
    """One antialiased step to a shorter side of `size`, then the centre crop, of an RGB image -> (size, size, 3) uint8:
    torchvision's Resize and CenterCrop with Pillow 12 to the pixel, with their way of rounding."""
    width, height = (size * side // min(image.size) for side in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = resize(image, (width, height), resample)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def to_float(images: Tensor) -> Tensor:
    """uint8 [0, 255] -> float32 [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float, nominally [-1, 1] -> uint8, rounding to nearest and clipping; a NaN is a ValueError."""
    if images.isnan().any():
        raise ValueError("the image holds NaN: refusing to turn it into pixels")
    return ((images.float() + 1) * 127.5 + 0.5).clamp(0, 255).byte()


def grid(images: np.ndarray, columns: int, gap: int = 2) -> Image.Image:
    """(N, H, W, 3) uint8 -> one picture, row by row, `gap` pixels of white between images."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * (height + gap), i % columns * (width + gap)
        canvas[y:y + height, x:x + width] = image
    return Image.fromarray(canvas)
