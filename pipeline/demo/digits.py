"""Handwritten digits that come with scikit-learn: 1,797 real grey images of 8×8 pixels in 10 classes.

Three disjoint splits, fixed, with like numbers of each class. `train` is for the generator and the networks in
its loss, `heldout` for what real images score, `judge` only for the classifier that scores, and in no shard.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline.datasets import SPLITS, DatasetParams, Item, Sample
from pipeline.datasets.listed import ListedSource
from pixelgen.config import require

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

CLASSES = [str(digit) for digit in range(10)]
PARTS = {"train": slice(95), "judge": slice(95, 150), "heldout": slice(150, None)}  # of each class, shuffled


@dataclass(frozen=True)
class Digits(ListedSource):
    """Digits to train on and to hold out."""

    captions = None

    def check(self, data: DatasetParams) -> None:
        require(data.heldout == 0, f"heldout {data.heldout}: digits come with their own split: leave it out")

    def listing(self, data: DatasetParams) -> tuple[list[str], list[Item]]:
        return CLASSES, [Item(f"{index:04}", int(bundled()[1][index]), split)
                         for split in SPLITS for index in members(split)]

    def load(self, data: DatasetParams, item: Item) -> Sample:
        return Sample(image(int(item.key)), item.split, item.label)


def digits(split: Literal["train", "judge", "heldout"], size: int) -> tuple[np.ndarray, np.ndarray]:
    """A split as images (N, size, size, 3) uint8 and labels (N,): the very pixels that its shards hold."""
    import numpy as np

    from pixelgen.images import adm_crop

    chosen = members(split)
    return np.stack([adm_crop(image(index), size) for index in chosen]), bundled()[1][chosen]


def image(index: int) -> Image.Image:
    """One digit, 8×8, RGB."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.round(bundled()[0][index] * (255 / 16)).astype(np.uint8)).convert("RGB")


def members(split: str) -> np.ndarray:
    """The indices of a split, ascending."""
    import numpy as np

    random = np.random.RandomState(0)  # its stream never changes
    shuffled = [random.permutation(np.flatnonzero(bundled()[1] == label)) for label in range(len(CLASSES))]
    return np.sort(np.concatenate([indices[PARTS[split]] for indices in shuffled]))


@functools.cache
def bundled() -> tuple[np.ndarray, np.ndarray]:
    """Images (1797, 8, 8) with values 0 to 16, labels (1797,)."""
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    return data.images, data.target
