"""The only reader of params.yaml: strict, typed, and quick to fail.

The file says what differs from the defaults, which stand here and in `pixelgen.config`. `python -m pipeline.params`,
the first stage of the DAG, checks it and writes the whole to out/params.json, which the other stages read. Each of them
depends on its own section. So a mistake stops `dvc repro` before any work, and only what has another value runs again.
Nothing heavy is imported here.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.code import digest
from pipeline.datasets import DatasetParams
from pipeline.metrics import Metric
from pipeline.networks import Network, default_networks
from pipeline.older import check_form, refuse_older_outputs
from pipeline.prompts import PromptSource
from pipeline.store import valid_root
from pixelgen.config import ConfigError, choose, load, plain, require, variants
from pixelgen.encoders import PERCEPTUAL
from pixelgen.errors import UserError
from pixelgen.manifest import IDENTITY
from pixelgen.prompts import check_layout
from pixelgen.recipe import Recipe, read_yaml
from pixelgen.samplers import Sampler
from pixelgen.samplers.heun import Heun
from pixelgen.store import write_atomic

PARAMS, RESOLVED, CODE = Path("params.yaml"), Path("out/params.json"), Path("out/code.json")
SECTIONS = {"networks": "", "shard": "datasets", "reference": "reference", "train": "train", "prompts": "prompts",
            "sample": "sample", "evaluate": "evaluate", "report": ""}  # of params.yaml, by stage; empty: one instance
NONE = "none"  # in a parameter that names the instance of another stage: there is none
NOTHING = [Path("out/train") / NONE / "model",  # and the report reads folders of sections that may be empty
           *(Path("out") / section / NONE for section in ("reference", "prompts", "sample", "evaluate"))]


@dataclass(frozen=True)
class StorageParams:
    """Where artifacts and resumable state lie."""

    root: str | None = None  # s3://bucket/prefix; null: in the workspace, under out/ and runs/

    def __post_init__(self) -> None:
        require(self.root is None or valid_root(self.root), f"root {self.root!r} must be s3://bucket/prefix (letters, "
                "digits, _, - and .), or null for the workspace")


@dataclass(frozen=True)
class ReferenceParams:
    """The statistics that samples are compared with: of a dataset's training split, or a published file."""

    dataset: str  # a key of datasets
    extractor: str = "inception"  # a key of networks: whose features are compared; inception: FID's
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
class SampleParams:
    """Images to draw with a trained model."""

    model: str  # a key of train
    prompts: str  # a key of prompts; none: every class
    weights: Literal["ema", "raw"] = "ema"  # averaged, or as trained
    sampler: Sampler = Heun()
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

    metric: Metric
    sample: str  # a key of sample
    reference: str  # a key of reference; none: the metric takes none


@dataclass(frozen=True)
class Params:
    """params.yaml as a whole."""

    datasets: dict[str, DatasetParams]  # images in shards
    reference: dict[str, ReferenceParams]  # what samples are compared with
    train: dict[str, TrainParams]
    prompts: dict[str, PromptSource]  # what to draw, where it is not every class
    sample: dict[str, SampleParams]
    evaluate: dict[str, EvaluateParams]
    networks: dict[str, Network] = field(default_factory=default_networks)  # the frozen ones, by what asks for them
    storage: StorageParams = StorageParams()

    def __post_init__(self) -> None:
        for role, network in self.networks.items():
            require(role == network.role, f"networks.{role}: {network.kind} is for {network.role}: put it there")
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
            self.need(reference.extractor, f"{where}.extractor")
            network = self.networks[reference.extractor]
            require(type(network).extractor is not Network.extractor, f"{where}.extractor: {network.kind} gives no "
                    "features to compare")
        for key, sample in self.sample.items():
            choose(sample.model, list(self.train), f"sample.{key}.model")
            choose(sample.prompts, [NONE, *self.prompts], f"sample.{key}.prompts")
            text = self.train[sample.model].denoiser.takes == "prompts"
            require((sample.prompts != NONE) == text, f"sample.{key}.prompts: {sample.model} draws "
                    + ("prompts: name a key of prompts" if text else f"classes: set it to {NONE}"))
        for key, evaluate in self.evaluate.items():
            choose(evaluate.sample, list(self.sample), f"evaluate.{key}.sample")
            evaluate.metric.check(self, f"evaluate.{key}", evaluate)

    def _check_train(self, where: str, train: TrainParams) -> None:
        choose(train.dataset, list(self.datasets), f"{where}.dataset")
        data = self.datasets[train.dataset]
        train.check_condition(data.labelled, train.dataset, f"{where}.denoiser")
        size, sizes = train.denoiser.image_size, list(data.image_sizes)
        require(size in sizes, f"{where}.denoiser.image_size {size} is none of datasets.{train.dataset}.image_sizes "
                f"{sizes}")
        for source in train.mixture or {}:
            choose(source, list(data.sources), f"{where}.mixture: source")
        require(train.mixture is None or min(train.mixture.values(), default=0) > 0,
                f"{where}.mixture: every share must be positive; leave a source out instead")
        choose(train.init, [NONE, *self.train], f"{where}.init")
        earlier, seen = train.init, [where.removeprefix("train.")]
        while earlier != NONE:
            require(earlier not in seen, f"{where}.init: {' <- '.join([*seen, earlier])} goes round in a circle")
            there, here = self.train[earlier].denoiser, train.denoiser
            require((there.kind, there.size) == (here.kind, here.size), f"{where}.init: {earlier} trains {there.size}, "
                    f"not {here.size}")
            seen, earlier = [*seen, earlier], self.train[earlier].init
        for network in train.networks:
            self.need(network, where)

    def need(self, role: str, where: str) -> None:
        """ConfigError unless a frozen network plays a role."""
        require(role in self.networks, f"{where} needs a network for {role}: add {role} to networks")


def read_params(path: Path = PARAMS) -> Params:
    """The whole of a params.yaml, checked. ConfigError names the key, the value and the valid choices."""
    data = read_yaml(path)
    check_form(data, path)
    return load(Params, data)


def instances(params: Params, stage: str) -> dict[str, Any]:
    """The parameters of each instance of a stage by its key, which is empty where there is one."""
    if section := SECTIONS[stage]:
        return getattr(params, section)
    return {"": params.networks if stage == "networks" else None}


def code_digest(params: Params, stage: str, key: str) -> str:
    """What stands for the code of an instance: that of its stage, and of the kinds that its parameters choose."""
    chosen: list[Any] = [instances(params, stage)[key]]
    if stage == "reference":
        chosen = [params.networks[chosen[0].extractor]]
    elif stage == "train":
        chosen = [chosen[0].denoiser]  # the sampler of its grids changes no weight
    elif stage == "sample":
        chosen += [params.train[chosen[0].model].denoiser]
    elif stage == "evaluate":
        sample, reference = params.sample[chosen[0].sample], chosen[0].reference
        chosen += [sample.sampler, params.train[sample.model].denoiser]
        chosen += [params.networks[params.reference[reference].extractor]] if reference != NONE else []
    elif stage == "report":
        chosen = [params.evaluate]
    kinds = {f"{type(variant).__module__}:{type(variant).__qualname__}" for variant in variants(chosen)}
    if stage == "train":
        kinds |= {PERCEPTUAL[choose(role, list(PERCEPTUAL), "network of a term")]
                  for role in params.train[key].objective.networks}
    return digest(stage, frozenset(kinds))


def code_digests(params: Params) -> dict[str, Any]:
    """The digest of each instance of each stage."""
    found = {stage: {key: code_digest(params, stage, key) for key in instances(params, stage)} for stage in SECTIONS}
    return {stage: keyed if SECTIONS[stage] else keyed[""] for stage, keyed in found.items()}


def resolved_params(stage: str, key: str) -> Params:
    """The parameters of this run, as the first stage has written them; the user is told if params.yaml says otherwise
    by now. ConfigError if there are none, or none of this instance, or if its code has changed since."""
    if not (RESOLVED.is_file() and CODE.is_file()):
        raise ConfigError(f"{RESOLVED} or {CODE} is missing: run `dvc repro params` first")
    try:
        resolved = load(Params, json.loads(RESOLVED.read_bytes()))
    except ConfigError as error:
        raise ConfigError(f"{RESOLVED} is of another version, run `dvc repro params` first: {error}") from error
    choose(key, list(instances(resolved, stage)), f"{stage}: key")
    noted = json.loads(CODE.read_bytes()).get(stage)
    if SECTIONS[stage] and isinstance(noted, dict):
        noted = noted.get(key)
    require(noted == code_digest(resolved, stage, key), f"the code of {stage} has changed since {CODE} was written: "
            "run `dvc repro` again, or `python -m pipeline.params` and then this stage")
    try:
        changed = read_params() != resolved
    except ConfigError:
        changed = True
    if changed:
        print(f"{PARAMS} has changed since this run began, which keeps to {RESOLVED}; `dvc repro` takes up the change "
              "afterwards", file=sys.stderr)
    return resolved


def fingerprint(parts: Iterable[Any]) -> str:
    """A short stable hash of configuration and content hashes, for naming what they determine."""
    return hashlib.sha256(json.dumps(plain(list(parts)), sort_keys=True).encode()).hexdigest()[:16]


def write_nothing() -> None:
    """The instance `none` of other stages: what a dependency in dvc.yaml leads to where a parameter says so, and what
    the report finds where there is no other."""
    for path in NOTHING:
        path.mkdir(parents=True, exist_ok=True)
        (path / IDENTITY).write_text("nothing: the instance that a parameter of `none` names\n")


def resolve() -> None:
    """Check params.yaml and write what the other stages depend on. ConfigError, before anything is written."""
    params = read_params()
    write_nothing()
    for path, found in (RESOLVED, plain(params)), (CODE, code_digests(params)):
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
