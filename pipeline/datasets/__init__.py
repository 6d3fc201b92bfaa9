"""Datasets and their sources of images, labelled or captioned.

A source cuts its work into units, cheaply and in a fixed order, and reads one at a time. What is wrong with the source
is a DatasetError before any image is read; what is wrong with a sample is a Rejected, and costs that sample only. A
`ListedSource` (`pipeline.datasets.listed`) lists samples and deals them to the units at random; others read whole
containers. Neither this nor the head of a source's module imports anything heavy.
"""

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pipeline.checkout import data_path
from pixelgen.config import Variant, require
from pixelgen.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

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
    split: str  # one of SPLITS; each sample of a container has its own
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

    image: "Image.Image"  # RGB, of any size
    split: str  # one of SPLITS
    label: int | None = None
    captions: list[str | None] | None = None  # in the order of the parameters, at least one of them not None
    captions_cut: int = 0


Load = Callable[[], Sample]  # raises Rejected or Skipped


# ------------------------------------------------------------------------------------------------------ sources


class Source(Variant, ABC):
    """Where the images of a dataset come from, and labels or captions with them."""

    kinds: ClassVar[dict[str, str]] = {
        "image_folder": "pipeline.datasets.image_folder:ImageFolder",
        "webdataset": "pipeline.datasets.webdataset:WebDataset",
        "parquet": "pipeline.datasets.parquet:Parquet",
        "text_folder": "pipeline.datasets.text_folder:TextFolder",
        "digits": "pipeline.demo.digits:Digits",
        "scenes": "pipeline.demo.scenes:Scenes",
    }
    captions: dict[str, float] | None  # {column: share}, an option of those with captions; None: with labels

    def __post_init__(self) -> None:
        if self.captions is not None:
            require(bool(self.captions), "captions: name the columns of captions, each with its share")
            shares = [*self.captions.values()]
            require(min(shares) >= 0 and max(shares) > 0, f"captions: of the shares {shares} none may be negative and "
                    "one must be positive")

    def check(self, data: "DatasetParams", /) -> None:
        """ConfigError if the dataset asks for what this source cannot give."""

    def located(self) -> Self:
        """The same source for a process in any working directory."""
        return self

    @abstractmethod
    def tasks(self, data: "DatasetParams", /) -> tuple[list[str] | None, list[Task]]:
        """Names of the classes, which labels count, or None for captioned images; and the units of work."""

    @abstractmethod
    def read(self, data: "DatasetParams", task: Task, /) -> Iterator[tuple[str, Load]]:
        """Key in the source and `load` of each sample of a task, to be called before the next is asked for."""


@dataclass(frozen=True)
class FolderSource(Source):
    """A source whose images lie in files below a folder."""

    path: str  # folder of the images or containers

    def located(self) -> Self:
        return dataclasses.replace(self, path=str(data_path(self.path).absolute()))


def refuse(reason: str) -> Load:
    """The `load` of a sample that cannot be used, as its container has shown already."""
    def load() -> Sample:
        raise Rejected(reason)

    return load


# ----------------------------------------------------------------------------------------------------- datasets


@dataclass(frozen=True)
class DatasetParams:
    """Sources of images, all labelled or all captioned, and how they are cut into shards."""

    sources: dict[str, Source]  # mixed in training; labelled data has exactly one
    image_sizes: tuple[int, ...] = (256,)  # pixels on a side, ascending: an image is stored at the largest it reaches
    crop: Literal["adm", "plain"] = "adm"  # ADM's resize and centre crop | bilinear to the short side, centre crop
    encoding: Literal["png", "jpeg"] = "png"  # jpeg: quality 95, 4:4:4, for what would take many terabytes as PNG
    rows_per_shard: int = 1024  # at most; a task also holds about one shard of each size in memory
    heldout: float = 0.0  # share of the images kept from training; digits have a split of their own
    max_quarantined: float = 0.001  # largest share of unusable images; more of them stop the stage
    max_megapixels: float = 64.0  # images of more pixels are quarantined unread (decompression bombs)
    seed: int = 0  # of the order of images in the shards

    def __post_init__(self) -> None:
        require(bool(self.sources), "sources: at least one is needed")
        for name in self.sources:
            require(re.fullmatch(r"[A-Za-z0-9][\w.-]*", name, re.ASCII) is not None,
                    f"sources: {name!r} names files: use letters, digits, _, - and .")
        require(self.image_sizes != () and list(self.image_sizes) == sorted(set(self.image_sizes)),
                f"image_sizes {list(self.image_sizes)} must be ascending, and at least one")
        require(self.image_sizes[0] >= 8, f"image_sizes: {self.image_sizes[0]} must be at least 8")
        require(self.rows_per_shard >= 1, "rows_per_shard must be at least 1")
        require(0 <= self.max_quarantined < 1, f"max_quarantined {self.max_quarantined} must lie in [0, 1)")
        require(self.max_megapixels > 0, "max_megapixels must be positive")
        if self.labelled:
            require(len(self.sources) == 1, "sources: labelled data has exactly one; labels of several would be mixed "
                    "up")
            require(len(self.image_sizes) == 1, "image_sizes: labelled data has exactly one")
        require(0 <= self.heldout < 1, f"heldout {self.heldout} must lie in [0, 1)")
        for source in self.sources.values():
            source.check(self)

    @property
    def labelled(self) -> bool:
        """Whether its images have labels; otherwise they have captions."""
        return any(source.captions is None for source in self.sources.values())
