"""Bytes of an image, whoever brings them, into RGB pixels, or a reason why not.

Pixels are those of ADM's preprocessing, PIL's `convert("RGB")`: no colour profiles, no EXIF orientation. They
differ where ADM's are an accident: transparency is laid on white instead of uncovering what lies beneath, and
16-bit grey keeps its upper byte, as 16-bit colour does, instead of being clipped. Animations give one frame.
"""

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import BinaryIO

from PIL import Image, UnidentifiedImageError

from pipeline.datasets import DatasetError, DatasetParams, Rejected, Skipped

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # some others are decoded by outside programs
IMAGE_ENDINGS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")  # of file names
LARGEST_ENLARGEMENT = 4  # of labelled images, all of which are wanted; a smaller one would be little but blur


def decode(file: BinaryIO, data: DatasetParams) -> Image.Image:
    """The RGB pixels of an encoded image, of any size that `check_size` allows. Rejected or Skipped."""
    with rejecting(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks on metadata, and on sizes within our own limit
        check_length(file.seek(0, os.SEEK_END), data)  # some decoders read all of it at once
        with Image.open(file, formats=FORMATS) as image:
            check_size(image.width, image.height, data)
            return to_rgb(image)


def check_length(length: int, data: DatasetParams) -> None:
    """Rejected if so many bytes are not worth reading: more than 8 a pixel of the largest image, uncompressed 16-bit
    RGBA, and some for metadata."""
    if length > int(data.max_megapixels * 8e6) + 2**20:
        raise Rejected(f"too large: an image of {length:,} bytes for {data.max_megapixels} Mpx")


@contextlib.contextmanager
def rejecting() -> Iterator[None]:
    """Whatever goes wrong inside costs one sample: a decoder given a damaged file may raise anything."""
    try:
        yield
    except (DatasetError, Rejected, Skipped):
        raise
    except UnidentifiedImageError:
        raise Rejected(f"not an image, or none of {', '.join(FORMATS)}") from None
    except Exception as error:
        raise Rejected(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}") from error


def check_size(width: int, height: int, data: DatasetParams) -> None:
    """By the header alone, before a pixel is decoded. Pillow's own limit of 179 megapixels holds as well."""
    smallest = data.image_sizes[0]
    enlargement = max(1.0, smallest / max(1, min(width, height)))
    if enlargement > 1 and not data.labelled:
        raise Skipped(f"{width}×{height}")
    if enlargement > LARGEST_ENLARGEMENT:
        raise Rejected(f"too small: {width}×{height} pixels for image_sizes {smallest}")
    if width * height * enlargement**2 > data.max_megapixels * 1e6:
        raise Rejected(f"too large: {width}×{height}, enlarged {enlargement:.3g}×, for {data.max_megapixels} Mpx")


def to_rgb(image: Image.Image) -> Image.Image:
    """The module's docstring says what becomes of each kind of pixel."""
    if image.mode.startswith("I;16"):
        import numpy as np

        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Rejected(f"pixels of mode {image.mode} (32 bits) have no agreed range")
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
    return image.convert("RGB")
