"""Recipes of trainings, and the reader of the YAML files that hold them. Nothing heavy is imported here."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from pixelgen.config import ConfigError, FitConfig, OptimizerConfig, choose, load, plain, require
from pixelgen.denoisers import Denoiser
from pixelgen.samplers import Sampler
from pixelgen.samplers.euler import Euler
from pixelgen.terms import ObjectiveConfig

TRAJECTORY = ("mixture", "objective", "optimizer", "fit")  # the fields of Recipe but run and denoiser
LARGEST, LONGEST, DEEPEST = 2**16, 3000, 20  # of a YAML file: characters, also of one value, and levels


@dataclass(frozen=True)
class RunConfig:
    """What is saved, logged and drawn during a training, and what is done about numbers that are not finite. It may
    change meanwhile: no weight depends on it, but in a run that meets such a number."""

    checkpoint_every: int = 5000  # steps between checkpoints
    keep_checkpoints: int = 3  # the newest that are kept
    keep_every: int | None = None  # also keep every Nth step's checkpoint; null: no others
    log_every: int = 100  # steps between lines of the loss curve
    grid_every: int | None = 10_000  # steps between sample grids; null: none
    grid_sampler: Sampler = Euler(25, 2.25, (0.1, 0.9))  # of those grids
    on_nonfinite: str = "stop"  # stop | skip(N): pass over at most N steps of the run, stop at one more

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep_checkpoints", "log_every"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("keep_every", "grid_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, or null, got {value}")
        require(re.fullmatch(r"stop|skip\([1-9][0-9]*\)", self.on_nonfinite) is not None,
                f"on_nonfinite {self.on_nonfinite!r}: expected stop, or skip(N) with a whole number N of at least 1")

    @property
    def may_skip(self) -> int:
        """How many steps of the whole run may be skipped because a number is not finite."""
        return 0 if self.on_nonfinite == "stop" else int(self.on_nonfinite[len("skip("):-1])


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a denoiser is trained: all that the weights depend on but data and frozen networks, and what is recorded."""

    mixture: dict[str, float] | None = None  # {source: share, …}; null: all of the dataset's, by their images
    denoiser: Denoiser
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    fit: FitConfig = FitConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        repa, depth = self.objective.repa, self.denoiser.resolve().depth
        require(repa.weight == 0 or repa.block < depth,
                f"objective.repa.block {repa.block}: the denoiser has blocks 0 to {depth - 1}")

    @property
    def networks(self) -> list[str]:
        """The frozen networks that training needs."""
        return sorted({*self.objective.networks, *self.denoiser.networks})

    @property
    def trajectory(self) -> dict[str, Any]:
        """What names a training: all that the weights at one of its steps depend on. How far it goes is not part of
        that: to raise `fit.steps` is to go on."""
        told = {name: plain(getattr(self, name)) for name in TRAJECTORY}
        del told["fit"]["steps"]
        denoiser = {self.denoiser.kind: plain(self.denoiser.resolve())}  # not what its size is called
        return told | {"denoiser": denoiser, "captions": plain(self.denoiser.captions)}

    def check_condition(self, labelled: bool, dataset: str, where: str) -> None:
        """ConfigError if the denoiser is none for a dataset with labels, or with captions."""
        has = "labels" if labelled else "captions"
        require((self.denoiser.takes == "labels") == labelled, f"{where}: {self.denoiser.kind} takes "
                f"{self.denoiser.takes}, but {dataset} has {has}: choose another denoiser or dataset")


def read_recipe(path: Path, key: str | None = None, started: bool = False) -> Recipe:
    """The recipe that a file holds, or, with a `key`, the one that a params.yaml has under `train`. ConfigError names
    what is wrong with it, or the model that it starts from, unless that is known and training has `started`."""
    where, data = str(path), read_yaml(path)
    if key is not None:
        section = data.get("train") if isinstance(data, dict) else None
        if not isinstance(section, dict):
            raise ConfigError(f"{path}: there is no section train to take {key!r} from")
        where, data = f"{path}: train.{key}", section[choose(key, list(section), f"{path}: train: key")]
    if isinstance(data, dict):
        denoiser = data.get("denoiser")
        require(not {"grid_sampler", "text"} & data.keys() and not (isinstance(denoiser, dict) and "size" in denoiser),
                f"{where} has the form of an earlier version: `python -m pipeline params migrate` makes one of today's "
                "form of a whole params.yaml")
        init = data.get("init", "none")
        require(started or init == "none", f"{where}.init is {init}: name the folder of that model with --init")
        data = {name: value for name, value in data.items() if name not in ("dataset", "init")}  # for the workflow
    try:
        return load(Recipe, data)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def read_yaml(path: Path) -> Any:
    """Plain data from YAML 1.2 (1e-4 is a number, on is text); a duplicate key, a tag or an alias is an error."""
    try:
        text = path.read_text("utf-8")
        check_yaml(text)
        return YAML(typ="safe", pure=True).load(text)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; run from the top of the repository") from None
    except (YAMLError, ValueError) as error:  # ValueError: of a number or a date
        raise ConfigError(f"{path} is not valid YAML: {error}") from None


def check_yaml(text: str) -> None:
    """YAMLError if there is anything in a YAML text that makes more of it than is written there."""
    if len(text) > LARGEST:
        raise YAMLError(f"more than {LARGEST:,} characters are no file of parameters")
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        line = event.start_mark.line + 1
        depth += isinstance(event, CollectionStartEvent) - isinstance(event, CollectionEndEvent)
        if getattr(event, "anchor", None) or getattr(event, "ctag", None):
            raise YAMLError(f"line {line}: no tags (!), anchors (&) or aliases (*): write the value itself")
        if depth > DEEPEST or len(getattr(event, "value", "")) > LONGEST:
            raise YAMLError(f"line {line}: more than {DEEPEST} levels, or a value of more than {LONGEST:,} characters")
