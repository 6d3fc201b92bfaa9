"""The only reader of params.yaml: strict, typed, and quick to fail.

`python -m pipeline.params` checks the file; the first stage of the DAG does just that, so that a mistake stops
`dvc repro` before any work. Nothing heavy is imported here.
"""

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pixelgen.config import (
    ConfigError,
    DenoiserConfig,
    FitConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplerConfig,
    choose,
    load,
    require,
)
from pixelgen.models import denoiser_config

PARAMS, OK = Path("params.yaml"), Path("out/params.ok")
T = TypeVar("T")


@dataclass(frozen=True)
class WeightsParams:
    """The frozen networks: of the losses and of the evaluation."""

    source: Literal["demo", "published"]  # demo: small stand-ins of the same classes, made here
    directory: str | None  # published: folder that already holds the files; null: download them
    seed: int  # demo: of the stand-ins' training

    def __post_init__(self) -> None:
        require(self.source == "published" or self.directory is None,
                "directory is for published weights; demo makes its own: set it to null")


LABELLED = ("digits", "image_folder")  # the other formats bring captions


@dataclass(frozen=True)
class SourceParams:
    """Where the images of a dataset come from, and which captions with them."""

    format: Literal["digits", "image_folder", "scenes", "webdataset", "parquet", "text_folder"]
    path: str | None  # folder of the images or containers; digits and scenes are made here
    captions: dict[str, float] | None  # columns of captions -> how often, relatively, each is drawn in training
    image: str | None  # column (parquet) or member (webdataset) of the image

    def __post_init__(self) -> None:
        made = self.format in ("digits", "scenes")
        require(not made or self.path is None, f"path: {self.format} are made here: set it to null")
        require(made or self.path is not None, f"path: {self.format} needs the folder of the images")
        if self.format in LABELLED:
            require(self.captions is None, f"captions: {self.format} has labels instead: set it to null")
        else:
            require(bool(self.captions), f"captions: {self.format} needs the columns of captions and their weights")
            weights = list((self.captions or {}).values())
            require(min(weights) >= 0 and max(weights) > 0, f"captions: of the weights {weights} none may be negative "
                    "and one must be positive")
        require((self.image is not None) == (self.format in ("webdataset", "parquet")),
                f"image: {self.format} " + ("has no columns: set it to null" if self.image is not None else
                                            "needs the name of the column or member that holds the image"))


@dataclass(frozen=True)
class DatasetParams:
    """Sources of images, all labelled or all captioned, and how they are cut into shards."""

    sources: dict[str, SourceParams]  # mixed in training; labelled data has exactly one
    image_sizes: tuple[int, ...]  # pixels on a side, ascending: each image is stored at the largest that it reaches
    crop: Literal["adm", "plain"]  # adm: ADM's resize and centre crop; plain: bilinear to the short side, centre crop
    encoding: Literal["png", "jpeg"]  # jpeg: quality 95, 4:4:4, for what would take many terabytes as PNG
    rows_per_shard: int  # at most; a task also holds about one shard of each size in memory
    heldout: float | None  # share of the images kept from training; digits brings its own split
    max_quarantined: float  # largest share of unusable images; more of them stop the stage
    max_megapixels: float  # images of more pixels are quarantined unread (decompression bombs)
    seed: int  # of the order of images in the shards

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
        formats = [source.format for source in self.sources.values()]
        if self.labelled:
            require(len(formats) == 1, "sources: labelled data has exactly one; labels of several would be mixed up")
            require(len(self.image_sizes) == 1, "image_sizes: labelled data has exactly one")
        if formats == ["digits"]:
            require(self.heldout is None, "heldout: digits come with their own split: set it to null")
        else:
            require(self.heldout is not None and 0 <= self.heldout < 1, f"heldout {self.heldout} must lie in [0, 1): "
                    f"{formats[0]} needs the share of held-out images")

    @property
    def labelled(self) -> bool:
        """Whether its images have labels; otherwise they have captions."""
        return any(source.format in LABELLED for source in self.sources.values())


@dataclass(frozen=True)
class ReferenceParams:
    """The statistics that samples are compared with: of a dataset's training split, or a published file."""

    dataset: str
    extractor: Literal["digits", "inception"]
    npz: str | None  # a reference batch in ADM's layout to use as it is; null: compute it from the shards
    images: int  # how many images to keep for precision and recall
    batch_size: int

    def __post_init__(self) -> None:
        require(self.images >= 4 and self.batch_size >= 1, "images must be at least 4 and batch_size at least 1")


@dataclass(frozen=True)
class DenoiserParams:
    size: str  # a key of pixelgen.models.SIZES
    image_size: int
    num_classes: int
    dropout: float

    def __post_init__(self) -> None:
        self.resolve()

    def resolve(self) -> DenoiserConfig:
        return denoiser_config(self.size, self.image_size, self.num_classes, self.dropout)


@dataclass(frozen=True)
class TrainParams:
    dataset: str
    denoiser: DenoiserParams
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    fit: FitConfig
    grid_sampler: SamplerConfig  # of the sample grids drawn while training

    def __post_init__(self) -> None:
        depth = self.denoiser.resolve().depth
        require(self.objective.repa_weight == 0 or self.objective.repa_block < depth,
                f"objective.repa_block {self.objective.repa_block}: the denoiser has blocks 0 to {depth - 1}")


@dataclass(frozen=True)
class SampleParams:
    model: str  # a key of train
    weights: Literal["ema", "raw"]
    sampler: SamplerConfig
    per_class: int
    seed: int  # image i has the seed SEED + i
    part_size: int  # images in one unit of work and of resumption; no result depends on it
    precision: Literal["fp32", "bf16"]
    compile: bool

    def __post_init__(self) -> None:
        require(self.per_class >= 1 and self.part_size >= 1, "per_class and part_size must be at least 1")


@dataclass(frozen=True)
class EvaluateParams:
    sample: str  # a key of sample
    reference: str  # a key of reference
    batch_size: int
    baselines: bool  # also score held-out real images (the floor) and an untrained model (the ceiling)


@dataclass(frozen=True)
class Params:
    """params.yaml as a whole."""

    weights: WeightsParams
    datasets: dict[str, DatasetParams]
    reference: dict[str, ReferenceParams]
    train: dict[str, TrainParams]
    sample: dict[str, SampleParams]
    evaluate: dict[str, EvaluateParams]

    def __post_init__(self) -> None:
        for key, train in self.train.items():
            choose(train.dataset, list(self.datasets), f"train.{key}.dataset")
            sizes = list(self.datasets[train.dataset].image_sizes)
            require(train.denoiser.image_size in sizes, f"train.{key}.denoiser.image_size {train.denoiser.image_size} "
                    f"is none of datasets.{train.dataset}.image_sizes {sizes}")
        for key, reference in self.reference.items():
            choose(reference.dataset, list(self.datasets), f"reference.{key}.dataset")
            require(reference.extractor != "digits" or self.weights.source == "demo",
                    f"reference.{key}.extractor: only weights.source demo makes the digits classifier; use inception")
            require(reference.extractor != "inception" or self.weights.source == "published",
                    f"reference.{key}.extractor: inception comes with weights.source published; the demo has digits")
        for key, sample in self.sample.items():
            choose(sample.model, list(self.train), f"sample.{key}.model")
        for key, evaluate in self.evaluate.items():
            choose(evaluate.sample, list(self.sample), f"evaluate.{key}.sample")
            choose(evaluate.reference, list(self.reference), f"evaluate.{key}.reference")
            trained_on = self.train[self.sample[evaluate.sample].model].dataset
            require(self.reference[evaluate.reference].dataset == trained_on,
                    f"evaluate.{key}: the samples imitate {trained_on!r}, but reference {evaluate.reference!r} is of "
                    f"{self.reference[evaluate.reference].dataset!r}")


def read_params(path: Path = PARAMS) -> Params:
    """The whole of params.yaml, checked. ConfigError names the key, the value and the valid choices."""
    return load(Params, read_yaml(path))


def read_yaml(path: Path) -> Any:
    """Plain data from YAML 1.2 (1e-4 is a number, on is text); a duplicate key or a tag is an error."""
    try:
        return YAML(typ="safe", pure=True).load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run from the top of the repository") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None


def stage_params(section: dict[str, T], key: str, stage: str) -> T:
    """The parameters of one instance of a stage, `stage@key`."""
    return section[choose(key, list(section), f"{stage}: key")]


def fingerprint(parts: Iterable[Any]) -> str:
    """A short stable hash of configuration and content hashes, for naming what they determine."""
    text = json.dumps([_plain(p) for p in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def main() -> int:
    try:
        read_params()
    except ConfigError as error:
        print(f"{PARAMS}: {error}", file=sys.stderr)
        return 1
    OK.parent.mkdir(exist_ok=True)
    OK.write_text("params.yaml is valid\n")  # always the same, so that what depends on it is not rerun
    return 0


if __name__ == "__main__":
    sys.exit(main())
