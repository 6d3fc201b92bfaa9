"""Typed configuration: frozen dataclasses and the strict loader that fills them from plain data.

Nothing heavy is imported here, so that a mistake in a parameter file is reported before torch is even loaded. Defaults
are the settings of XL/16 on ImageNet; a file says what differs. For `load`, an unknown key, a missing one without a
default, or a value of another type is a `ConfigError` that names the key and what is valid; `__post_init__` checks the
rest. The comment behind a field is its documentation, which `comments` reads.

A thing of several kinds, such as a sampler, is a `Variant`: a file holds {kind: {option: value, ...}}.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin, get_type_hints

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


def named(place: str) -> Any:
    """What "module:name" names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


class Variant:
    """One of several kinds of a thing: a dataclass of its options, their checks and what it does, in a module that is
    imported when the kind is first chosen."""

    kinds: ClassVar[dict[str, str]]  # of a base class: "module:Class" by the name that files use

    @classmethod
    def of(cls, kind: str, where: str = "kind") -> type[Self]:
        """The class of a kind. ConfigError if it is none."""
        return named(cls.kinds[choose(kind, [*cls.kinds], where)])

    @property
    def kind(self) -> str:
        """The name of this kind in files."""
        here = f"{type(self).__module__}:{type(self).__qualname__}"
        found = next((name for name, place in self.kinds.items() if place == here), None)
        require(found is not None, f"{here} is in no list of kinds: {', '.join(self.kinds.values())}")
        return str(found)


def plain(value: Any) -> Any:
    """Configuration as plain data: what `load` makes it of, with every default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        options = {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {value.kind: options} if isinstance(value, Variant) else options
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def variants(value: Any) -> Iterator[Variant]:
    """All variants in a configuration, those within others too."""
    if isinstance(value, Variant):
        yield value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = vars(value)
    for inner in value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ():
        yield from variants(inner)


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
    if is_base(hint):
        return _chosen(hint, value, where, default)
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


def is_base(hint: Any) -> bool:
    """Whether a type stands for any kind of a variant."""
    return isinstance(hint, type) and issubclass(hint, Variant) and "kinds" in vars(hint)


def _chosen(base: type[Variant], value: Any, where: str, default: Any) -> Any:
    if not isinstance(value, Mapping) or len(value) != 1:
        raise ConfigError(f"{where}: expected one kind with its options, as {{{next(iter(base.kinds))}: {{}}}}, got "
                          f"{value!r}; valid: {', '.join(sorted(base.kinds))}")
    (kind, options), = value.items()
    cls = base.of(str(kind), where)
    return _build(cls, options, dotted(where, kind), default if type(default) is cls else dataclasses.MISSING)


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
    if default is not dataclasses.MISSING:
        return {field.name: getattr(default, field.name) for field in dataclasses.fields(cls)}
    return {field.name: field.default_factory() if callable(field.default_factory) else field.default
            for field in dataclasses.fields(cls)}


def dotted(where: str, key: str) -> str:
    """The name of a key below another, which may be the top."""
    return f"{where}.{key}" if where else key


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
