"""A folder with one sub-folder of images per class, as ImageNet is unpacked.

Classes are the sub-folders in order of name, but for those whose names begin with a dot. Everything in a class
folder that is not a folder is an item, at any depth: what is no image is rejected with its reason, and nothing is
passed over in silence. Whether an item is held out depends on its path alone. Links to files are followed inside
the folder; links to folders, and out of it, are not.

Pixels are those of ADM's preprocessing, PIL's `convert("RGB")`: no colour profiles, no EXIF orientation. They
differ where ADM's are an accident: transparency is laid on white instead of uncovering what lies beneath, and
16-bit grey keeps its upper byte, as 16-bit colour does, instead of being clipped. Animations give one frame.
"""

import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.datasets import DatasetError, Item, Rejected
from pipeline.params import DatasetParams

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # some others are decoded by outside programs
LARGEST_ENLARGEMENT = 4  # a smaller image would be little but blur


def listing(params: DatasetParams) -> tuple[list[str], list[Item]]:
    assert params.path is not None and params.heldout is not None
    try:
        folders = sorted(f for f in Path(params.path).iterdir() if f.is_dir() and not f.name.startswith("."))
        refuse([f for f in folders if f.is_symlink()], "classes must not be links: move or copy the folders here")
        items = [make_item(entry, params.path, label, params.heldout)
                 for label, folder in enumerate(folders) for entry in files_below(folder)]
    except OSError as error:
        raise DatasetError(f"{error.filename}: {error.strerror}; the dataset's path must be a readable folder "
                           "with one sub-folder of images per class") from error
    if not folders:
        raise DatasetError(f"{params.path} has no sub-folders: put the images of each class into one of their own")
    trained = {item.label for item in items if item.split == "train"}
    refuse([f for label, f in enumerate(folders) if label not in trained],
           f"empty, or all held out at heldout {params.heldout}: add images, lower heldout or remove the folder")
    return [f.name for f in folders], items


def refuse(folders: list[Path], problem: str) -> None:
    if folders:
        more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
        raise DatasetError(f"{', '.join(map(str, folders[:3]))}{more}: {problem}")


def files_below(folder: str | Path) -> Iterator[os.DirEntry]:
    """Everything below `folder` but folders, in order of name."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir(follow_symlinks=False):
            yield from files_below(entry.path)
        else:
            yield entry


def make_item(entry: os.DirEntry, root: str, label: int, heldout: float) -> Item:
    key = os.path.relpath(entry.path, root)
    draw = int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8]) / 2**64  # uniform in [0, 1)
    try:
        stat = entry.stat()
        stamp = stat.st_size, stat.st_mtime_ns
    except OSError:  # a broken link, or gone already: `load` will say so
        stamp = 0, 0
    return Item(key, label, "heldout" if draw < heldout else "train", *stamp)


def load(params: DatasetParams, item: Item) -> Image.Image:
    assert params.path is not None
    try:
        item.key.encode()  # fails if the file name is not UTF-8
        root = Path(params.path).resolve()
        path = (root / item.key).resolve()
        if not path.is_relative_to(root):
            raise Rejected("a link that leaves the folder")
        if not path.is_file():
            raise Rejected("no file: a broken link, a link to a folder, a device, or gone by now")
        with open(path, "rb") as file, warnings.catch_warnings():
            stat = os.fstat(file.fileno())
            if (stat.st_size, stat.st_mtime_ns) != (item.size, item.mtime_ns):
                raise Rejected("changed after it was listed")
            warnings.simplefilter("ignore")  # remarks on metadata, and on sizes within our own limit
            with Image.open(file, formats=FORMATS) as image:
                check_size(image.width, image.height, params)
                return to_rgb(image)
    except Rejected:
        raise
    except UnidentifiedImageError:
        raise Rejected(f"not an image, or none of {', '.join(FORMATS)}") from None
    except Exception as error:  # a decoder given a damaged file may raise anything
        raise Rejected(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}") from error


def check_size(width: int, height: int, params: DatasetParams) -> None:
    """By the header alone, before a pixel is decoded. Pillow's own limit of 179 megapixels holds as well."""
    enlargement = max(1.0, params.image_size / max(1, min(width, height)))
    if enlargement > LARGEST_ENLARGEMENT:
        raise Rejected(f"too small: {width}×{height} pixels for image_size {params.image_size}")
    if width * height * enlargement**2 > params.max_megapixels * 1e6:
        raise Rejected(f"too large: {width}×{height}, enlarged {enlargement:.3g}×, for {params.max_megapixels} Mpx")


def to_rgb(image: Image.Image) -> Image.Image:
    """The module's docstring says what becomes of each kind of pixel."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise Rejected(f"pixels of mode {image.mode} (32 bits) have no agreed range")
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
    return image.convert("RGB")
