"""Strict loading: what is not exactly right is refused, and the message says where and what is valid."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import pytest

from pixelgen.config import ConfigError, FitConfig, OptimizerConfig, Variant, choose, load, plain, require, variants
from pixelgen.denoisers.jit import JiTConfig
from pixelgen.denoisers.jit_t2i import JiTTextConfig
from pixelgen.recipe import RunConfig
from pixelgen.samplers.adams_bashforth import AdamsBashforth
from pixelgen.terms import ObjectiveConfig
from tests.pixelgen.conftest import FIT, TINY, TINY_TEXT


@dataclass(frozen=True)
class Everything:
    count: int
    rate: float
    name: Literal["red", "green"]
    flag: bool
    pair: tuple[float, float]
    names: tuple[Literal["red", "green"], ...]
    table: dict[str, int]
    inner: OptimizerConfig | None


GOOD = {"count": 3, "rate": 0.5, "name": "red", "flag": True, "pair": [0, 0.5], "names": ["red"], "table": {"a": 1},
        "inner": {"lr": 1, "betas": [0.9, 0.99], "weight_decay": 0, "clip": None}}


def test_load_converts_to_the_declared_types():
    loaded = load(Everything, GOOD)
    assert loaded == Everything(3, 0.5, "red", True, (0.0, 0.5), ("red",), {"a": 1}, OptimizerConfig(1.0, (0.9, 0.99)))
    assert type(loaded.inner.lr) is float and type(loaded.pair[0]) is float, "a whole number will do for a float"
    assert load(Everything, GOOD | {"inner": None, "names": []}).inner is None


@pytest.mark.parametrize(("change", "message"), [
    ({"coumt": 1}, r"top level: key: 'coumt' is not known \(did you mean 'count'\?\); valid: count, flag, inner"),
    ({1: 1}, "top level: key: 1 is not known"),
    ({"count": "3"}, "count: expected int, got '3'"),
    ({"count": 3.0}, "count: expected int, got 3.0"),
    ({"count": True}, "count: expected int, got True"),
    ({"count": None}, "count: expected int, got None"),
    ({"rate": True}, "rate: expected float, got True"),
    ({"rate": "0.5"}, "rate: expected float"),
    ({"rate": math.nan}, "rate: expected a finite number, got nan"),
    ({"rate": -math.inf}, "rate: expected a finite number, got -inf"),
    ({"flag": 1}, "flag: expected bool, got 1"),
    ({"name": "gren"}, r"name: 'gren' is not known \(did you mean 'green'\?\); valid: green, red"),
    ({"name": None}, "name: None is not known"),
    ({"name": ["red"]}, r"name: \['red'\] is not known"),
    ({"pair": [1]}, "pair: expected a list of 2"),
    ({"pair": "ab"}, "pair: expected a list of 2"),
    ({"pair": 1.0}, "pair: expected a list of 2"),
    ({"pair": [0, "x"]}, r"pair\[1\]: expected float"),
    ({"names": "red"}, "names: expected a list, got 'red'"),
    ({"names": ["red", "blue"]}, r"names\[1\]: 'blue' is not known"),
    ({"table": [1]}, "table: expected a mapping"),
    ({"table": {"a": 1, "b": "x"}}, r"table\.b: expected int"),
    ({"inner": 3}, "inner: expected a mapping, got 3"),
    ({"inner": {"lr": 0}}, "inner: lr 0.0 must be positive"),
    ({"inner": GOOD["inner"] | {"momentum": 1}}, "inner: key: 'momentum' is not known"),
    ({"inner": GOOD["inner"] | {"lr": "x"}}, r"inner\.lr: expected float"),
    ({"inner": GOOD["inner"] | {"betas": [0.9, 1.0]}}, r"inner: betas \(0\.9, 1\.0\) must lie in"),
])
def test_what_is_not_right_is_refused_with_its_place(change, message):
    with pytest.raises(ConfigError, match=message):
        load(Everything, GOOD | change)
    with pytest.raises(ConfigError, match=r"stage\.x"):  # the path begins where the caller says
        load(Everything, GOOD | change, "stage.x")


@dataclass(frozen=True)
class Outer:
    inner: OptimizerConfig = OptimizerConfig(0.5, weight_decay=0.25)
    other: OptimizerConfig | None = None


def test_what_is_missing_is_as_by_default():
    """The default of a field may be other than that of its class: it is what the field's values differ from."""
    assert load(OptimizerConfig, {"lr": 3}) == OptimizerConfig(lr=3.0)
    assert load(Outer, {}) == Outer()
    assert load(Outer, {"inner": {"clip": 2}, "other": {"clip": 4}}) == Outer(
        OptimizerConfig(0.5, weight_decay=0.25, clip=2.0), OptimizerConfig(clip=4.0))
    for nothing in None, []:
        with pytest.raises(ConfigError, match="inner: expected a mapping"):
            load(Outer, {"inner": nothing})


class Shape(Variant):
    kinds: ClassVar = {"disc": f"{__name__}:Disc", "bar": f"{__name__}:Bar", "gone": "pixelgen.gone:Gone"}


@dataclass(frozen=True)
class Disc(Shape):
    radius: float
    filled: bool = True


@dataclass(frozen=True)
class Bar(Shape):
    inner: tuple[OptimizerConfig, ...] = ()

    def __post_init__(self):
        require(len(self.inner) < 2, "inner: one is enough")


@dataclass(frozen=True)
class Picture:
    shapes: dict[str, Shape]
    frame: Shape = Disc(1.0, False)
    more: Shape | None = None
    names: dict[str, Shape] = field(default_factory=lambda: {"a": Bar()})


def test_a_variant_is_its_kind_with_its_options():
    data = {"shapes": {"a": {"disc": {"radius": 2}}, "b": {"bar": {"inner": [{"lr": 0.5}]}}}}
    picture = load(Picture, data)
    assert picture == Picture({"a": Disc(2.0), "b": Bar((OptimizerConfig(0.5),))}, Disc(1.0, False), None,
                              {"a": Bar()})
    assert load(Picture, plain(picture)) == picture, "plain data holds the kind"
    assert plain(picture)["shapes"]["a"] == {"disc": {"radius": 2.0, "filled": True}}
    assert [v.kind for v in variants(picture)] == ["disc", "bar", "disc", "bar"]
    assert load(Picture, data | {"frame": {"disc": {"radius": 3}}}).frame == Disc(3.0, False), "the field's default"
    assert load(Picture, data | {"more": {"disc": {"radius": 3}}}).more == Disc(3.0, True), "the class's default"


@dataclass(frozen=True)
class Unlisted(Disc):
    pass


def test_a_class_that_no_list_has_is_named():
    with pytest.raises(ConfigError, match=r"test_config:Unlisted is in no list of kinds: .*:Disc"):
        plain(Unlisted(1.0))


@pytest.mark.parametrize(("frame", "message"), [
    ({"dist": {}}, r"frame: 'dist' is not known \(did you mean 'disc'\?\); valid: bar, disc, gone"),
    ({}, r"frame: expected one kind with its options, as \{disc: \{\}\}, got \{\}; valid: bar, disc, gone"),
    ({"disc": {"radius": 1}, "bar": {}}, "frame: expected one kind with its options"),
    ("disc", "frame: expected one kind with its options, as .*, got 'disc'"),
    ({"disc": None}, "frame.disc: expected a mapping, got None"),
    ({"disc": {"radios": 1}}, r"frame.disc: key: 'radios' is not known \(did you mean 'radius'\?\)"),
    ({"disc": {"radius": "x"}}, "frame.disc.radius: expected float, got 'x'"),
    ({"bar": {"inner": [{}, {}]}}, "frame.bar: inner: one is enough"),
])
def test_a_variant_that_is_none_of_the_kinds_is_refused(frame, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        load(Picture, {"shapes": {}, "frame": frame})


def test_choose():
    assert choose("a", ["a", "b"], "letter") == "a"
    with pytest.raises(ConfigError, match="letter: 'c' is not known; valid: a, b"):
        choose("c", ["b", "a"], "letter")


VALID = {
    JiTConfig: TINY,
    JiTTextConfig: TINY_TEXT,
    ObjectiveConfig: dataclasses.asdict(ObjectiveConfig()),
    OptimizerConfig: dataclasses.asdict(OptimizerConfig()),
    FitConfig: FIT,
    RunConfig: plain(RunConfig()),
    AdamsBashforth: dataclasses.asdict(AdamsBashforth()),
}


@pytest.mark.parametrize("cls", VALID)
def test_dump_and_load_is_the_identity(cls):
    config = load(cls, VALID[cls])
    assert load(cls, plain(config)[config.kind] if isinstance(config, Variant) else plain(config)) == config


@pytest.mark.parametrize(("cls", "change", "message"), [
    (JiTConfig, {"image_size": 20}, "image_size 20 is not a multiple of patch_size 8"),
    (JiTConfig, {"heads": 3}, "width 32 over 3 heads"),
    (JiTConfig, {"heads": 16}, "width 32 over 16 heads: the head size must be a multiple of 4"),
    (JiTConfig, {"in_context_start": 3}, "in_context_start 3 must be a block index below depth 3"),
    (JiTConfig, {"in_context_start": -1}, "in_context_start -1"),
    (JiTConfig, {"dropout": 1.0}, "dropout 1.0"),
    (JiTConfig, {"dropout": -0.1}, "dropout -0.1"),
    (JiTConfig, {"num_classes": 0}, "num_classes 0"),
    *((cls, {"mlp_ratio": ratio}, r"mlp_ratio .* must lie in \(0, 100\] and leave a width of 32 a hidden unit")
      for cls in (JiTConfig, JiTTextConfig) for ratio in (-1.0, 0.0, 0.03, 1e308)),
    *((ObjectiveConfig, {name: {"weight": -1.0}}, f"{name}: weight -1.0 must not be negative")
      for name in ("repa", "lpips", "pdino")),
    (ObjectiveConfig, {"repa": {"hidden": 0}}, "repa: hidden must be at least 1"),
    (ObjectiveConfig, {"gate_threshold": 1.1}, "gate_threshold 1.1"),
    (ObjectiveConfig, {"gate_threshold": -0.1}, "gate_threshold -0.1"),
    (ObjectiveConfig, {"condition_dropout": 1.0}, "condition_dropout 1.0"),
    (ObjectiveConfig, {"condition_dropout": -0.1}, "condition_dropout -0.1"),
    (ObjectiveConfig, {"time_std": 0.0}, "time_std must be positive"),
    (ObjectiveConfig, {"timeshift": 0.0}, "timeshift must be positive"),
    (ObjectiveConfig, {"balance_every": 0}, "balance_every must be positive"),
    (ObjectiveConfig, {"lpips": {"weight": 0}, "pdino": {"weight": 0}}, "no perceptual term to balance"),
    (OptimizerConfig, {"lr": 0.0}, "lr 0.0 must be positive"),
    (OptimizerConfig, {"betas": [-0.1, 0.9]}, "betas"),
    (OptimizerConfig, {"weight_decay": -1.0}, "weight_decay must not be negative"),
    (OptimizerConfig, {"clip": 0.0}, "clip must be positive"),
    *((FitConfig, {name: 0}, f"{name} must be at least 1, got 0")
      for name in ("steps", "batch_size", "lanes")),
    *((RunConfig, {name: 0}, f"{name} must be at least 1, got 0")
      for name in ("checkpoint_every", "keep_checkpoints", "log_every")),
    (FitConfig, {"lanes": 3}, "batch_size 8 is not a multiple of lanes 3"),
    (FitConfig, {"ema_decay": 1.0}, "ema_decay 1.0"),
    (FitConfig, {"ema_decay": -0.1}, "ema_decay -0.1"),
    (RunConfig, {"grid_every": 0}, "grid_every must be at least 1, or null, got 0"),
    (RunConfig, {"keep_every": -1}, "keep_every must be at least 1, or null, got -1"),
    *((RunConfig, {"on_nonfinite": value}, "expected stop, or skip\\(N\\) with a whole number N of at least 1")
      for value in ("skip", "skip(0)", "skip(-1)", "skip(1.5)", "skip(3) ", "Skip(3)", "stop(3)", "")),
    (FitConfig, {"precision": "fp16"}, "precision: 'fp16' is not known"),
    (AdamsBashforth, {"steps": 0}, "steps 0"),
    (AdamsBashforth, {"guidance": -1.0}, "guidance -1.0"),
    (AdamsBashforth, {"interval": [0.5, 0.5]}, "interval"),
    (AdamsBashforth, {"interval": [-0.1, 0.5]}, "interval"),
    (AdamsBashforth, {"interval": [0.1, 1.5]}, "interval"),
    (AdamsBashforth, {"timeshift": 0.0}, "timeshift must be positive"),
    (AdamsBashforth, {"order": 0}, "order 0 must be 1, 2, 3 or 4"),
    (AdamsBashforth, {"order": 5}, "order 5 must be 1, 2, 3 or 4"),
])
def test_conflicts_between_fields(cls, change, message):
    with pytest.raises(ConfigError, match=message):
        load(cls, VALID[cls] | change)


def test_terms_that_are_off_need_no_balance():
    off = {"lpips": {"weight": 0.0}, "pdino": {"weight": 0.0}, "balance_start": None}
    assert load(ObjectiveConfig, VALID[ObjectiveConfig] | off).balance_start is None


def test_how_many_steps_may_be_skipped():
    assert [RunConfig(on_nonfinite=v).may_skip for v in ("stop", "skip(1)", "skip(20)")] == [0, 1, 20]
