"""Sources of labelled images: each lists its items, cheaply and in a fixed order, and reads one at a time.

A source is a module with the two functions of `Source`. What is wrong with it as a whole is a DatasetError before
any image is read; what is wrong with one item is a Rejected with the reason, and costs that item only.
"""

from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from pipeline.params import DatasetParams


class DatasetError(ValueError):
    """A source, or too much of it, cannot be used; the message names the path and the remedy."""


class Rejected(Exception):
    """One item cannot be used; the message says why."""


@dataclass(frozen=True, slots=True)
class Item:
    """One image before it is read. Equal `size` and `mtime_ns` stand for equal content."""

    key: str  # unique in its dataset and the same on every machine
    label: int
    split: str  # train or heldout
    size: int = 0  # bytes
    mtime_ns: int = 0


class Source(Protocol):
    def listing(self, params: DatasetParams, /) -> tuple[list[str], list[Item]]:
        """Names of the classes, which labels count, and all items: in `train` at least one of each class."""

    def load(self, params: DatasetParams, item: Item, /) -> Image.Image:
        """The decoded RGB image of an item, of any size."""
