"""Sources of images, labelled or captioned: each gives units of work, cheaply and in a fixed order, and reads one.

A source is an object or module with the two functions of `Source`; all run through the same loop in the shard stage.
What is wrong with it as a whole is a DatasetError before any image is read; what is wrong with one sample is a
Rejected with the reason, and costs that sample only. Those whose samples are worth listing one by one, before any
is read, are a `Listing` each, which `Listed` deals to units of work at random; the others read whole containers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from PIL import Image

from pipeline.params import DatasetParams, SourceParams
from pixelgen.errors import UserError

SPLITS = ("train", "heldout")


class DatasetError(UserError):
    """A source, or too much of it, cannot be used; the message names the path and the remedy."""


class Rejected(Exception):
    """One sample cannot be used; the message says why."""


class Skipped(Exception):
    """One sample is sound but smaller than the smallest size that is stored."""


@dataclass(frozen=True, slots=True)
class Item:
    """One file before it is read, an image or a container of many. Equal `size` and `mtime_ns`: equal content."""

    key: str  # path in its source: unique there, and the same on every machine
    label: int | None
    split: str  # one of SPLITS; of a container: empty, each of its samples has its own
    size: int = 0  # bytes
    mtime_ns: int = 0
    texts: tuple["Item | None", ...] = ()  # the files of its captions, in the order of the parameters
    refused: str | None = None  # why it cannot be used, if listing it was enough to see that


@dataclass(frozen=True, slots=True)
class Task:
    """One unit of work, for one Ray task: an interrupted one is done again as a whole."""

    items: list[Item]
    samples: int  # how many they hold; 0 if that takes reading them
    shuffle: bool  # whether the samples still have to be put into random order


@dataclass(frozen=True, slots=True)
class Sample:
    """What a row of a shard is made of."""

    image: Image.Image  # RGB, of any size
    split: str  # one of SPLITS
    label: int | None = None
    captions: list[str | None] | None = None  # in the order of the parameters, at least one of them not None
    captions_cut: int = 0


Load = Callable[[], Sample]  # raises Rejected or Skipped


class Source(Protocol):
    def tasks(self, data: DatasetParams, source: SourceParams, /) -> tuple[list[str] | None, list[Task]]:
        """Names of the classes, which labels count, or None for captioned images; and the units of work."""

    def read(self, data: DatasetParams, source: SourceParams, task: Task, /) -> Iterator[tuple[str, Load]]:
        """Key in the source and `load` of each sample of a task, to be called before the next is asked for."""


class Listing(Protocol):
    def listing(self, data: DatasetParams, source: SourceParams, /) -> tuple[list[str] | None, list[Item]]:
        """Names of the classes or None, and one item for each sample: in `train` at least one of each class."""

    def load(self, data: DatasetParams, source: SourceParams, item: Item, /) -> Sample:
        """Read one item. Rejected or Skipped if it cannot be used."""


@dataclass(frozen=True)
class Listed:
    """A source whose samples are listed one by one and dealt to the units of work at random."""

    of: Listing

    def tasks(self, data: DatasetParams, source: SourceParams) -> tuple[list[str] | None, list[Task]]:
        classes, items = self.of.listing(data, source)
        return classes, deal(items, data.rows_per_shard, data.seed)

    def read(self, data: DatasetParams, source: SourceParams, task: Task) -> Iterator[tuple[str, Load]]:
        for item in task.items:
            yield item.key, refuse(item.refused) if item.refused else partial(self.of.load, data, source, item)


def deal(items: list[Item], rows_per_shard: int, seed: int) -> list[Task]:
    """Deal the items of each split to as few tasks as possible, at random, and evenly to within one."""
    tasks: list[Task] = []
    for number, split in enumerate(SPLITS):
        members = [item for item in items if item.split == split]
        order = np.random.default_rng([seed, number]).permutation(len(members))
        parts = np.array_split(order, -(-len(members) // rows_per_shard)) if members else []
        tasks += [Task([members[i] for i in part], len(part), shuffle=False) for part in parts]
    return tasks


def refuse(reason: str) -> Load:
    """The `load` of a sample that cannot be used, as its container has shown already."""
    def load() -> Sample:
        raise Rejected(reason)

    return load
