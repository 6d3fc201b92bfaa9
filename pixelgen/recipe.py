"""Recipes of trainings, and the reader of the YAML files that hold them. Nothing heavy is imported here."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent

from pixelgen.config import (
    CaptionConfig,
    ConfigError,
    DenoiserConfig,
    FitConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    TextDenoiserConfig,
    choose,
    load,
    require,
)
from pixelgen.models import SIZES, TEXT_SIZES, denoiser_config, text_denoiser_config

TRAJECTORY = ("mixture", "text", "denoiser", "objective", "optimizer", "fit")  # the fields of Recipe but run
LARGEST, LONGEST, DEEPEST = 2**16, 3000, 20  # of a YAML file: characters, also of one value, and levels


@dataclass(frozen=True)
class DenoiserParams:
    """The architecture of a named size."""

    size: str  # L/16 | XL/16 | XXL/16 | demo/16 | demo-text/16: see pixelgen/models/__init__.py
    image_size: int  # pixels on a side
    num_classes: int | None = None  # null: a text-conditional size
    dropout: float = 0.0  # in the middle half of the blocks

    def __post_init__(self) -> None:
        choose(self.size, [*SIZES, *TEXT_SIZES], "size")
        if self.size in TEXT_SIZES:
            require(self.num_classes is None, f"num_classes {self.num_classes}: {self.size} is text-conditional: null")
            require(self.dropout == 0, f"dropout {self.dropout}: {self.size} has none: set it to 0")
        else:
            require(self.num_classes is not None, f"num_classes: {self.size} is class-conditional and needs a number")
        self.resolve()

    def resolve(self) -> DenoiserConfig | TextDenoiserConfig:
        if self.num_classes is None:
            return text_denoiser_config(self.size, self.image_size)
        return denoiser_config(self.size, self.image_size, self.num_classes, self.dropout)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a denoiser is trained: all that the weights depend on but data and frozen networks, and what is recorded."""

    mixture: dict[str, float] | None = None  # {source: weight, …}; null: all of the dataset's, by their images
    text: CaptionConfig | None = None  # how captions become prompts; null: the dataset has labels
    denoiser: DenoiserParams
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    fit: FitConfig = FitConfig()
    run: RunConfig = RunConfig()

    def __post_init__(self) -> None:
        depth = self.denoiser.resolve().depth
        require(self.objective.repa_weight == 0 or self.objective.repa_block < depth,
                f"objective.repa_block {self.objective.repa_block}: the denoiser has blocks 0 to {depth - 1}")

    @property
    def networks(self) -> list[str]:
        """The frozen networks that training needs."""
        used = {"dino": self.objective.uses_dino, "lpips": self.objective.lpips_weight, "text": self.text}
        return [name for name, use in used.items() if use]

    @property
    def trajectory(self) -> dict[str, Any]:
        """What names a training: all that the weights at one of its steps depend on. How far it goes is not part of
        that: to raise `fit.steps` is to go on."""
        plain = {name: value for name, value in dataclasses.asdict(self).items() if name in TRAJECTORY}
        del plain["fit"]["steps"]
        return plain | {"denoiser": dataclasses.asdict(self.denoiser.resolve())}  # not what its size is called


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
        require("grid_sampler" not in data, f"{where}: grid_sampler, and of fit what changes no weight, belong to run "
                "now (of a whole params.yaml, `python -m pipeline params migrate` makes one of today's form)")
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
