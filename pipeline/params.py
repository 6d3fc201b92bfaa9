"""The only reader of params.yaml: strict, typed, and quick to fail.

The file says what differs from the defaults, which stand here and in `pixelgen.config`. `python -m pipeline.params`,
the first stage of the DAG, checks it and writes the whole to out/params.json, which the other stages read. Each of them
depends on its own section. So a mistake stops `dvc repro` before any work, and only what has another value runs again.
Nothing heavy is imported here.
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

from pipeline.code import digest, digests
from pipeline.older import check_form, refuse_older_outputs
from pipeline.store import valid_root
from pixelgen.config import (
    ConfigError,
    SamplerConfig,
    choose,
    load,
    require,
)
from pixelgen.errors import UserError
from pixelgen.manifest import IDENTITY
from pixelgen.prompts import check_layout
from pixelgen.recipe import Recipe, read_yaml
from pixelgen.store import write_atomic

PARAMS, RESOLVED, CODE = Path("params.yaml"), Path("out/params.json"), Path("out/code.json")
NONE = "none"  # in a parameter that names the instance of another stage: there is none
NOTHING = [Path("out/train") / NONE / "model",  # and the report reads folders of sections that may be empty
           *(Path("out") / section / NONE for section in ("reference", "prompts", "sample", "evaluate"))]
T = TypeVar("T")


@dataclass(frozen=True)
class WeightsParams:
    """The frozen networks: of the losses and of the evaluation."""

    source: Literal["demo", "published"] = "published"  # demo: small stand-ins of the same classes, made here
    # published: dino, lpips, text, inception, mask2former, clip; demo: dino, lpips, text, digits
    networks: tuple[Literal["dino", "lpips", "text", "inception", "mask2former", "clip", "digits"], ...] = (
        "dino", "lpips", "inception")
    directory: str | None = None  # published: folder where the files lie, as dino/model.safetensors; null: download
    seed: int = 0  # demo: of the stand-ins' training

    def __post_init__(self) -> None:
        require(self.source == "published" or self.directory is None,
                "directory is for published weights; demo makes its own: set it to null")
        wrong = {"demo": ("inception", "mask2former", "clip"), "published": ("digits",)}[self.source]
        for name in self.networks:
            require(name not in wrong, f"networks: there is no {name} with source {self.source}")


@dataclass(frozen=True)
class StorageParams:
    """Where artifacts and resumable state lie."""

    root: str | None = None  # s3://bucket/prefix; null: in the workspace, under out/ and runs/

    def __post_init__(self) -> None:
        require(self.root is None or valid_root(self.root), f"root {self.root!r} must be s3://bucket/prefix (letters, "
                "digits, _, - and .), or null for the workspace")


LABELLED = ("digits", "image_folder")  # the other formats bring captions


@dataclass(frozen=True)
class SourceParams:
    """Where the images of a dataset come from, and which captions with them."""

    # labels: digits (scikit-learn's), image_folder (a folder for each class); captions: scenes (rendered), webdataset
    # (.tar), parquet, text_folder (.txt beside images)
    format: Literal["digits", "image_folder", "scenes", "webdataset", "parquet", "text_folder"]
    path: str | None = None  # folder of the images or containers; digits and scenes are made here
    captions: dict[str, float] | None = None  # {column: weight, …}: how often, relatively, each is drawn in training
    image: str | None = None  # column (parquet) or member (webdataset) of the image
    count: int | None = None  # scenes: how many are rendered
    clutter: float | None = None  # scenes: share of them that show one thing more than their captions say

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
        scenes = self.format == "scenes"
        require((self.count is not None) == scenes and (self.clutter is not None) == scenes,
                f"count and clutter: {self.format} " + ("needs both" if scenes else "has neither: set them to null"))
        require(not scenes or (self.count or 0) >= 1, f"count {self.count} must be at least 1")
        require(not scenes or 0 <= (self.clutter or 0) <= 1, f"clutter {self.clutter} must lie in [0, 1]")
        for column in (self.captions or {}) if scenes else ():
            choose(column, ["short", "long"], "captions: column of scenes")
        require((self.image is not None) == (self.format in ("webdataset", "parquet")),
                f"image: {self.format} " + ("has no columns: set it to null" if self.image is not None else
                                            "needs the name of the column or member that holds the image"))


@dataclass(frozen=True)
class DatasetParams:
    """Sources of images, all labelled or all captioned, and how they are cut into shards."""

    sources: dict[str, SourceParams]  # mixed in training; labelled data has exactly one
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
        formats = [source.format for source in self.sources.values()]
        if self.labelled:
            require(len(formats) == 1, "sources: labelled data has exactly one; labels of several would be mixed up")
            require(len(self.image_sizes) == 1, "image_sizes: labelled data has exactly one")
        require(0 <= self.heldout < 1, f"heldout {self.heldout} must lie in [0, 1)")
        require(self.heldout == 0 or formats != ["digits"], f"heldout {self.heldout}: digits come with their own "
                "split: leave it out")

    @property
    def labelled(self) -> bool:
        """Whether its images have labels; otherwise they have captions."""
        return any(source.format in LABELLED for source in self.sources.values())


@dataclass(frozen=True)
class ReferenceParams:
    """The statistics that samples are compared with: of a dataset's training split, or a published file."""

    dataset: str  # a key of datasets
    extractor: Literal["digits", "inception"] = "inception"  # digits: the demo's classifier; inception: FID's
    npz: str | None = None  # a reference batch in ADM's layout to use as it is; null: compute it from the shards
    images: int = 10_000  # kept for precision and recall (all, if there are fewer)
    batch_size: int = 128  # images at a time

    def __post_init__(self) -> None:
        require(self.images >= 4 and self.batch_size >= 1, "images must be at least 4 and batch_size at least 1")


@dataclass(frozen=True, kw_only=True)
class TrainParams(Recipe):
    """A recipe, and what it is used on."""

    dataset: str  # a key of datasets
    init: str  # a key of train, from whose weights and averaged weights training starts; none: fresh ones


@dataclass(frozen=True)
class PromptsParams:
    """A list of prompts to draw."""

    source: Literal["scenes", "file"]  # scenes: those that the demo's training leaves out
    path: str | None = None  # file: GenEval's metadata.jsonl, one prompt a line, or a folder of texts; or its URL

    def __post_init__(self) -> None:
        require((self.path is None) == (self.source == "scenes"),
                "path: a file needs the path or URL of the prompts, scenes bring their own (null)")


@dataclass(frozen=True)
class SampleParams:
    """Images to draw with a trained model."""

    model: str  # a key of train
    prompts: str  # a key of prompts; none: every class
    weights: Literal["ema", "raw"] = "ema"  # averaged, or as trained
    sampler: SamplerConfig = SamplerConfig()
    layout: Literal["npz", "geneval", "dpg"] = "npz"  # npz: of classes; the others: folders that the benchmarks read
    per_prompt: int = 50  # images of each prompt, or of each class
    negative: str = ""  # prompt that guidance leads away from
    seed: int = 0  # image i has the seed SEED + i
    part_size: int = 256  # images in one unit of work and of resumption; no result depends on it
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16: autocast
    compile: bool = True  # torch.compile

    def __post_init__(self) -> None:
        require(self.per_prompt >= 1 and self.part_size >= 1, "per_prompt and part_size must be at least 1")
        require((self.layout == "npz") == (self.prompts == NONE),
                f"layout {self.layout}: npz is for classes (prompts: none), geneval and dpg are for prompts")
        require(self.negative == "" or self.prompts != NONE, "negative: only prompts have a negative")
        if self.layout != "npz":
            check_layout(self.layout, self.per_prompt)


@dataclass(frozen=True)
class EvaluateParams:
    """Samples to score."""

    metric: Literal["fid", "geneval"]  # fid: the ADM suite
    sample: str  # a key of sample
    reference: str  # fid: a key of reference; geneval: none
    detector: Literal["mask2former", "geometric"] | None = None  # geneval: what finds objects; geometric: the demo's
    batch_size: int = 128  # images at a time; of geneval: in one unit of work and of resumption
    baselines: bool = False  # also score real images and an untrained model

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size must be at least 1")
        require((self.metric == "fid") == (self.reference != NONE), f"reference {self.reference}: fid needs a key of "
                "reference, geneval has none")
        require((self.metric == "geneval") == (self.detector is not None),
                f"detector {self.detector}: geneval needs one, fid has null")


@dataclass(frozen=True)
class Params:
    """params.yaml as a whole."""

    datasets: dict[str, DatasetParams]  # images in shards
    reference: dict[str, ReferenceParams]  # what samples are compared with
    train: dict[str, TrainParams]
    prompts: dict[str, PromptsParams]  # what to draw, where it is not every class
    sample: dict[str, SampleParams]
    evaluate: dict[str, EvaluateParams]
    weights: WeightsParams = WeightsParams()
    storage: StorageParams = StorageParams()

    def __post_init__(self) -> None:
        for section in ("reference", "train", "prompts", "sample", "evaluate"):
            require(NONE not in getattr(self, section), f"{section}: a key cannot be called {NONE!r}, which means "
                    "that there is none")
        for key, train in self.train.items():
            self._check_train(f"train.{key}", train)
        for key, reference in self.reference.items():
            where = f"reference.{key}"
            choose(reference.dataset, list(self.datasets), f"{where}.dataset")
            require(self.datasets[reference.dataset].labelled, f"{where}.dataset: statistics are of labelled images, "
                    f"{reference.dataset} has captions")
            self._need(reference.extractor, f"{where}.extractor")
        for key, sample in self.sample.items():
            choose(sample.model, list(self.train), f"sample.{key}.model")
            choose(sample.prompts, [NONE, *self.prompts], f"sample.{key}.prompts")
            text = self.train[sample.model].text is not None
            require((sample.prompts != NONE) == text, f"sample.{key}.prompts: {sample.model} draws "
                    + ("prompts: name a key of prompts" if text else f"classes: set it to {NONE}"))
        for key, evaluate in self.evaluate.items():
            self._check_evaluate(f"evaluate.{key}", evaluate)

    def _check_train(self, where: str, train: TrainParams) -> None:
        choose(train.dataset, list(self.datasets), f"{where}.dataset")
        data = self.datasets[train.dataset]
        size, sizes = train.denoiser.image_size, list(data.image_sizes)
        require(size in sizes, f"{where}.denoiser.image_size {size} is none of datasets.{train.dataset}.image_sizes "
                f"{sizes}")
        for kind, given in (("text", train.text), ("denoiser.num_classes", train.denoiser.num_classes)):
            wanted = data.labelled == (kind != "text")
            require((given is not None) == wanted, f"{where}.{kind}: {train.dataset} has "
                    f"{'labels' if data.labelled else 'captions'}: " + ("it is needed" if wanted else "set it to null"))
        for source in train.mixture or {}:
            choose(source, list(data.sources), f"{where}.mixture: source")
        require(train.mixture is None or min(train.mixture.values(), default=0) > 0,
                f"{where}.mixture: every weight must be positive; leave a source out instead")
        choose(train.init, [NONE, *self.train], f"{where}.init")
        earlier, seen = train.init, [where.removeprefix("train.")]
        while earlier != NONE:
            require(earlier not in seen, f"{where}.init: {' <- '.join([*seen, earlier])} goes round in a circle")
            require(self.train[earlier].denoiser.size == train.denoiser.size, f"{where}.init: {earlier} trains "
                    f"{self.train[earlier].denoiser.size}, not {train.denoiser.size}")
            seen, earlier = [*seen, earlier], self.train[earlier].init
        for network in train.networks:
            self._need(network, where)

    def _check_evaluate(self, where: str, evaluate: EvaluateParams) -> None:
        choose(evaluate.sample, list(self.sample), f"{where}.sample")
        sample = self.sample[evaluate.sample]
        if evaluate.metric == "geneval":
            require(sample.layout == "geneval", f"{where}: {evaluate.sample} has layout {sample.layout}, not geneval")
            demo = self.prompts[sample.prompts].source == "scenes"
            require(demo == (evaluate.detector == "geometric"), f"{where}.detector {evaluate.detector}: geometric is "
                    "for the demo's scenes, mask2former for everything else")
            require(demo or not evaluate.baselines, f"{where}.baselines: only scenes can be drawn from their prompts")
            for network in () if demo else ("mask2former", "clip"):
                self._need(network, f"{where}.detector")
            return
        choose(evaluate.reference, list(self.reference), f"{where}.reference")
        require(sample.layout == "npz", f"{where}: {evaluate.sample} has layout {sample.layout}, not npz")
        trained_on = self.train[sample.model].dataset
        require(self.reference[evaluate.reference].dataset == trained_on,
                f"{where}: the samples imitate {trained_on!r}, but reference {evaluate.reference!r} is of "
                f"{self.reference[evaluate.reference].dataset!r}")

    def _need(self, network: str, where: str) -> None:
        require(network in self.weights.networks, f"{where} needs the network {network}: add it to weights.networks "
                f"(source {self.weights.source})")


def read_params(path: Path = PARAMS) -> Params:
    """The whole of a params.yaml, checked. ConfigError names the key, the value and the valid choices."""
    data = read_yaml(path)
    check_form(data, path)
    return load(Params, data)


def resolved_params(stage: str) -> Params:
    """What the first stage has written: the parameters of this run, whatever params.yaml says by now, of which the user
    is told. ConfigError if there are none yet, or if the code of the stage, as DVC will note it, is not that of now."""
    if not (RESOLVED.is_file() and CODE.is_file()):
        raise ConfigError(f"{RESOLVED} or {CODE} is missing: run `dvc repro params` first")
    require(json.loads(CODE.read_bytes()).get(stage) == digest(stage), f"the code of {stage} has changed since {CODE} "
            "was written: run `dvc repro` again, or `python -m pipeline.params` and then this stage")
    resolved = load(Params, json.loads(RESOLVED.read_bytes()))
    try:
        changed = read_params() != resolved
    except ConfigError:
        changed = True
    if changed:
        print(f"{PARAMS} has changed since this run began, which keeps to {RESOLVED}; `dvc repro` takes up the change "
              "afterwards", file=sys.stderr)
    return resolved


def stage_params(section: dict[str, T], key: str, stage: str) -> T:
    """The parameters of one instance of a stage, `stage@key`."""
    return section[choose(key, list(section), f"{stage}: key")]


def fingerprint(parts: Iterable[Any]) -> str:
    """A short stable hash of configuration and content hashes, for naming what they determine."""
    text = json.dumps([_plain(p) for p in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value


def write_nothing() -> None:
    """The instance `none` of other stages: what a dependency in dvc.yaml leads to where a parameter says so, and what
    the report finds where there is no other."""
    for path in NOTHING:
        path.mkdir(parents=True, exist_ok=True)
        (path / IDENTITY).write_text("nothing: the instance that a parameter of `none` names\n")


def resolve() -> None:
    """Check params.yaml and write what the other stages depend on. ConfigError, before anything is written."""
    whole = dataclasses.asdict(read_params())
    write_nothing()
    for path, found in (RESOLVED, whole), (CODE, digests()):
        write_atomic(path, (json.dumps(found, indent=1) + "\n").encode())


def main() -> int:
    try:
        refuse_older_outputs()
        resolve()
    except UserError as error:
        print(f"{PARAMS}: {error}" if isinstance(error, ConfigError) else f"params: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
