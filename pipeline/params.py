"""The only reader of params.yaml: strict, typed, and quick to fail.

`python -m pipeline.params` checks the file; the first stage of the DAG does just that, so that a mistake stops
`dvc repro` before any work. Nothing heavy is imported here.
"""

import dataclasses
import hashlib
import json
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


@dataclass(frozen=True)
class DatasetParams:
    """One source of labelled images and how it is cut into shards."""

    source: Literal["digits", "image_folder"]
    path: str | None  # image_folder: a folder with one sub-folder of images per class
    image_size: int  # pixels on a side after ADM's resize and centre crop
    rows_per_shard: int
    heldout: float | None  # image_folder: share of the images kept from training; digits brings its own split
    max_quarantined: float  # largest share of unreadable files; more of them stop the stage
    max_megapixels: float  # images of more pixels are quarantined unread (decompression bombs)
    seed: int  # of the order in which images are dealt to shards

    def __post_init__(self) -> None:
        require(self.image_size >= 8, f"image_size {self.image_size} must be at least 8")
        require(self.rows_per_shard >= 1, "rows_per_shard must be at least 1")
        require(0 <= self.max_quarantined < 1, f"max_quarantined {self.max_quarantined} must lie in [0, 1)")
        require(self.max_megapixels > 0, "max_megapixels must be positive")
        if self.source == "digits":
            require(self.path is None and self.heldout is None,
                    "digits come with scikit-learn and their own split: set path and heldout to null")
        else:
            require(self.path is not None, f"path: {self.source} needs the folder of the images")
            require(self.heldout is not None and 0 <= self.heldout < 1,
                    f"heldout {self.heldout} must lie in [0, 1): {self.source} needs the share of held-out images")


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
            size = self.datasets[train.dataset].image_size
            require(train.denoiser.image_size == size, f"train.{key}.denoiser.image_size {train.denoiser.image_size} "
                    f"differs from datasets.{train.dataset}.image_size {size}")
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
