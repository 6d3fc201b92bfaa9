"""Typed configuration: frozen dataclasses and the strict loader that fills them from plain data.

The dataclasses of the whole library stand here, and this file imports nothing heavy, so that a mistake in a
parameter file is reported before torch is even loaded. Their defaults are the settings of XL/16 on ImageNet; a file
says what differs. `load` accepts no other keys than the fields of the dataclass: an unknown key, a missing one that has
no default, or a value of another type is a `ConfigError` that names the key and what is valid. Checks that involve
several fields are in `__post_init__`, next to the fields. The comment behind a field is its documentation: `comments`
reads it for those who print parameters.
"""

import dataclasses
import difflib
import functools
import inspect
import math
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pixelgen.errors import UserError

T = TypeVar("T")


class ConfigError(UserError):
    """A parameter is unknown, missing, of the wrong type, or in conflict with another."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError(message)` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def choose(value: str, valid: Sequence[str], what: str) -> str:
    """Return `value` if it is among `valid`; otherwise raise a `ConfigError` that lists the choices."""
    if value not in valid:
        near = difflib.get_close_matches(str(value), [str(v) for v in valid], n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"{what}: {value!r} is not known{hint}; valid: {', '.join(map(str, sorted(valid)))}")
    return value


def load(cls: type[T], data: Any, where: str = "") -> T:
    """Build dataclass `cls` from nested mappings, with its defaults where they say nothing. `where` is the dotted path
    used in error messages."""
    return _convert(cls, data, where)


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """What the source of a dataclass says of its fields: the comment behind each, or in the lines before it."""
    found, above = dict[str, str](), list[str]()
    for line in inspect.getsource(cls).splitlines():
        field = re.match(r"    (\w+): .*?(?:  # (.*))?$", line)
        if comment := re.match(r"    # (.*)$", line):
            above.append(comment[1])
            continue
        if field and (said := field[2] or " ".join(above)):
            found[field[1]] = said
        above = []
    inherited = [comments(base) for base in reversed(cls.__mro__[1:]) if dataclasses.is_dataclass(base)]
    return {name: said for known in (*inherited, found) for name, said in known.items()}


def _convert(hint: Any, value: Any, where: str, default: Any = dataclasses.MISSING) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{where}: the number does not fit into 64 bits")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where, default)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (inner,) = [a for a in args if a is not type(None)]
        return _convert(inner, value, where)
    if origin is Literal:
        return choose(value, args, where)
    if origin is tuple:
        inners = args[:1] * len(value) if isinstance(value, Sequence) and args[-1] is Ellipsis else args
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(inners):
            size = "" if args[-1] is Ellipsis else f" of {len(args)}"
            raise ConfigError(f"{where}: expected a list{size}, got {value!r}")
        return tuple(_convert(i, v, f"{where}[{n}]") for n, (i, v) in enumerate(zip(inners, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping of names, got {value!r}")
        return {str(k): _convert(args[1], v, dotted(where, str(k))) for k, v in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{where}: expected a finite number, got {value!r}")
    return value


def _build(cls: type[T], data: Any, where: str, default: Any) -> T:
    """`default`: an instance whose values stand for those that `data` does not give; MISSING: those of the class."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where or cls.__name__}: expected a mapping, got {data!r}")
    hints = get_type_hints(cls)
    defaults = defaults_of(cls, default)
    for key in data:
        choose(key, [*defaults], f"{where or 'top level'}: key")
    needed = [n for n, value in defaults.items() if value is dataclasses.MISSING]
    if missing := [n for n in needed if n not in data]:
        raise ConfigError(f"{where or 'top level'}: missing key {', '.join(missing)}; needed: {', '.join(needed)}")
    values = {n: _convert(hints[n], data[n], dotted(where, n), value) if n in data else value
              for n, value in defaults.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error)) from None


def defaults_of(cls: type, default: Any) -> dict[str, Any]:
    """What each field of a dataclass is if nobody says otherwise, or MISSING: as in the instance `default`; MISSING: as
    in the class."""
    return {field.name: field.default if default is dataclasses.MISSING else getattr(default, field.name)
            for field in dataclasses.fields(cls)}


def dotted(where: str, key: str) -> str:
    """The name of a key below another, which may be the top."""
    return f"{where}.{key}" if where else key


# ---------------------------------------------------------------------------------------------- the denoiser


def _check_sizes(config: "DenoiserConfig | TextDenoiserConfig") -> None:
    for name in ("image_size", "patch_size", "width", "depth", "heads"):
        require(getattr(config, name) >= 1, f"{name} {getattr(config, name)} must be at least 1")
    require(0 < config.mlp_ratio <= 100 and config.mlp_ratio * config.width >= 1,
            f"mlp_ratio {config.mlp_ratio} must lie in (0, 100] and leave a width of {config.width} a hidden unit")


@dataclass(frozen=True)
class DenoiserConfig:
    """Architecture of the class-conditional denoiser (`pixelgen.models.jit.JiT`)."""

    image_size: int  # pixels on a side
    patch_size: int
    width: int
    depth: int
    heads: int
    bottleneck: int | None  # channels between the two patch-embedding convolutions; None: a single convolution
    in_context_start: int  # block from which the in-context class tokens are prepended
    in_context_len: int
    dropout: float  # in the middle half of the blocks
    num_classes: int
    mlp_ratio: float = 4.0  # hidden width of an MLP, in widths; SwiGLU, with a third matrix, has two thirds of it

    def __post_init__(self) -> None:
        _check_sizes(self)
        require(self.image_size % self.patch_size == 0,
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        require(self.width % self.heads == 0 and self.width // self.heads % 4 == 0,
                f"width {self.width} over {self.heads} heads: the head size must be a multiple of 4 (2-D rotary)")
        require(0 <= self.in_context_start < self.depth,
                f"in_context_start {self.in_context_start} must be a block index below depth {self.depth}")
        require(0 <= self.dropout < 1, f"dropout {self.dropout} must lie in [0, 1)")
        require(self.num_classes >= 1, f"num_classes {self.num_classes} must be at least 1")


@dataclass(frozen=True)
class TextDenoiserConfig:
    """Architecture of the text-conditional denoiser (`pixelgen.models.jit_t2i.JiTText`)."""

    image_size: int  # pixels on a side
    patch_size: int
    width: int
    depth: int  # image blocks
    text_depth: int  # text blocks
    heads: int
    bottleneck: int  # channels between the two linear layers of the patch embedding
    text_width: int  # of the text encoder's features
    text_length: int  # tokens
    mlp_ratio: float = 4.0  # hidden width of the blocks' SwiGLU, in widths; for its third matrix nothing is taken off

    def __post_init__(self) -> None:
        _check_sizes(self)
        require(self.image_size % self.patch_size == 0,
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        require(self.width % self.heads == 0 and self.width // self.heads % 4 == 0,
                f"width {self.width} over {self.heads} heads: the head size must be a multiple of 4 (2-D rotary)")


# --------------------------------------------------------------------------------------------- the objective


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights and switches of the training objective (`pixelgen.objective`). A weight of 0 turns a term off."""

    repa_weight: float = 0.5  # of the alignment of tokens with DINO's; 0: off, as for each weight
    repa_block: int = 8  # the tokens entering this block are aligned with DINO's
    repa_hidden: int | None = None  # width of the REPA head; null: the denoiser's
    lpips_weight: float = 0.1  # of LPIPS between prediction and image
    pdino_weight: float = 0.01  # of the distance of their DINO features
    pdino_block: int = 11  # DINO block whose normalised patch tokens are compared
    gate_threshold: float = 0.3  # gated terms count samples with t >= this; 0: no gate
    gated: tuple[Literal["lpips", "pdino"], ...] = ("lpips",)  # as released; the paper's text gates pdino as well
    balance_start: int | None = 400_000  # step from which the perceptual weight adapts; null: never
    balance_every: int = 50  # steps between its updates
    condition_dropout: float = 0.1  # share of samples trained without their class or prompt
    time_mean: float = -0.8  # t = sigmoid(normal(mean, std)), then shifted
    time_std: float = 0.8  # as time_mean
    timeshift: float = 1.0  # above 1: more of the times close to the noise

    @property
    def uses_dino(self) -> bool:
        return self.repa_weight > 0 or self.pdino_weight > 0

    def __post_init__(self) -> None:
        for name in ("repa_weight", "lpips_weight", "pdino_weight"):
            require(getattr(self, name) >= 0, f"{name} must not be negative")
        require(self.repa_hidden is None or self.repa_hidden >= 1, "repa_hidden must be at least 1, or null")
        require(0 <= self.gate_threshold <= 1, f"gate_threshold {self.gate_threshold} must lie in [0, 1]")
        require(len(set(self.gated)) == len(self.gated), f"gated names a term twice: {list(self.gated)}")
        for name in self.gated:
            require(getattr(self, f"{name}_weight") > 0, f"gated names {name!r}, but {name}_weight is 0")
        require(0 <= self.condition_dropout < 1, f"condition_dropout {self.condition_dropout} must lie in [0, 1)")
        require(self.time_std > 0, "time_std must be positive")
        require(self.timeshift > 0, "timeshift must be positive")
        require(self.balance_every > 0, "balance_every must be positive")
        require(self.balance_start is None or self.lpips_weight + self.pdino_weight > 0,
                "balance_start is set, but there is no perceptual term to balance: set it to null")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW."""

    lr: float = 1e-4  # learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # of the moments of the gradient
    weight_decay: float = 0.0  # of every parameter
    clip: float | None = None  # largest gradient norm; null: no clipping

    def __post_init__(self) -> None:
        require(self.lr > 0, f"lr {self.lr} must be positive")
        require(all(0 <= b < 1 for b in self.betas), f"betas {self.betas} must lie in [0, 1)")
        require(self.weight_decay >= 0, "weight_decay must not be negative")
        require(self.clip is None or self.clip > 0, "clip must be positive, or null for no clipping")


@dataclass(frozen=True)
class CaptionConfig:
    """How a caption becomes the prompt that an image is trained with (`pixelgen.data.captions`)."""

    prefix_probability: float = 0.5  # of putting "A photo of" or the like before a short caption
    short_words: int = 16  # a caption of at most this many words is short

    def __post_init__(self) -> None:
        require(0 <= self.prefix_probability <= 1, f"prefix_probability {self.prefix_probability} must lie in [0, 1]")
        require(self.short_words >= 0, f"short_words {self.short_words} must not be negative")


@dataclass(frozen=True)
class MemoryConfig:
    """How a training fits into the memory of a GPU. No result depends on it but for rounding."""

    lanes_per_pass: int | None = None  # of a rank's lanes, how many share a forward pass; None: as many as fit
    recomputed_blocks: int = 0  # of the denoiser's blocks, how many are computed again in the backward pass
    averages_on_cpu: bool = False  # keep the averaged weights there: slow, since all weights follow at each step

    def __post_init__(self) -> None:
        require(self.lanes_per_pass is None or self.lanes_per_pass >= 1, f"lanes_per_pass {self.lanes_per_pass} must "
                "be at least 1, or null")
        require(self.recomputed_blocks >= 0, f"recomputed_blocks {self.recomputed_blocks} must not be negative")


# ------------------------------------------------------------------------------------------------ the sampler


SamplerName = Literal["euler", "heun", "adams_bashforth"]


@dataclass(frozen=True)
class SamplerConfig:
    """How an image is integrated from noise (`pixelgen.samplers`)."""

    name: SamplerName = "heun"  # euler | heun | adams_bashforth
    steps: int = 50  # of the integration; heun calls the denoiser twice in each
    guidance: float = 1.0  # 1: conditional only
    interval: tuple[float, float] = (0.0, 1.0)  # guidance acts where interval[0] < t <= interval[1]
    timeshift: float = 1.0  # above 1: more of the steps close to the noise
    order: int | None = None  # of adams_bashforth: 1 to 4

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps {self.steps} must be at least 1")
        require(self.guidance >= 0, f"guidance {self.guidance} must not be negative")
        low, high = self.interval
        require(0 <= low < high <= 1, f"interval [{low}, {high}] must satisfy 0 <= low < high <= 1")
        require(self.timeshift > 0, "timeshift must be positive")
        if self.name == "adams_bashforth":
            require(self.order in (1, 2, 3, 4), f"order {self.order}: adams_bashforth takes 1, 2, 3 or 4")
        else:
            require(self.order is None, f"order {self.order}: only adams_bashforth has one; set it to null")


# ------------------------------------------------------------------------------------------------ the training


@dataclass(frozen=True)
class FitConfig:
    """The steps of a training (`pixelgen.train.train`): what its weights depend on.

    The global batch is cut into `lanes`. A lane is the unit of everything random: its samples, its noise, its times
    and what is dropped depend on (seed, step, lane) only, and gated losses are means over a lane. Ranks share the lanes
    out evenly and accumulate over theirs, so the same run can go on with another number of ranks.
    """

    steps: int = 400_000  # optimizer steps; raised later, the same run goes on to them
    batch_size: int = 256  # images a step, of all ranks together
    lanes: int = 32  # units of randomness in a step, shared out among the ranks
    seed: int = 0  # of weights, order, noise, times and dropout
    ema_decay: float = 0.9999  # of the averaged weights
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16: autocast
    compile: bool = True  # torch.compile

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "lanes"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(self.batch_size % self.lanes == 0,
                f"batch_size {self.batch_size} is not a multiple of lanes {self.lanes}")
        require(0 <= self.ema_decay < 1, f"ema_decay {self.ema_decay} must lie in [0, 1)")


@dataclass(frozen=True)
class RunConfig:
    """What is saved, logged and drawn while a training lasts, and what is done about numbers that are not finite. All
    of it may change meanwhile: no weight depends on it, but in a run that meets such a number."""

    checkpoint_every: int = 5000  # steps between checkpoints
    keep_checkpoints: int = 3  # the newest that are kept
    keep_every: int | None = None  # also keep every Nth step's checkpoint; null: no others
    log_every: int = 100  # steps between lines of the loss curve
    grid_every: int | None = 10_000  # steps between sample grids; null: none
    grid_sampler: SamplerConfig = SamplerConfig("euler", 25, 2.25, (0.1, 0.9))  # of those grids
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
