"""Parameters as people and editors read them."""

import dataclasses
import json
import re
from pathlib import Path

import jsonschema
import pytest

from pipeline import describe
from pipeline.__main__ import main
from pipeline.datasets import Source
from pipeline.metrics import Metric
from pipeline.networks import Network
from pipeline.params import Params
from pipeline.prompts import PromptSource
from pixelgen.config import ConfigError, FitConfig, comments, load
from pixelgen.denoisers import Denoiser
from pixelgen.recipe import RunConfig, read_yaml
from pixelgen.samplers import Sampler
from tests.pipeline.test_params import PRESETS, replaced

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "params.yaml"


@dataclasses.dataclass(frozen=True)
class Base:
    one: int  # the first
    two: int = 2


@dataclasses.dataclass(frozen=True)
class Derived(Base):
    """Described."""

    # three lines
    # before it
    three: tuple[str, ...] = (
        "a", "b")
    two: int = 3  # now described
    four: str = "# no comment"

    def method(self):
        five: int = 5  # not a field
        return five


def test_comments_are_those_behind_and_before_the_fields():
    assert comments(Derived) == {"one": "the first", "two": "now described", "three": "three lines before it"}
    assert comments(FitConfig)["batch_size"] == "images a step, of all ranks together"


def test_values_tell_where_they_come_from():
    found = {v.name: v for v in describe.values(DEMO)}
    assert found["train.c2i.fit.steps"][1:3] == (500, True)
    assert found["train.c2i.optimizer.weight_decay"][1:3] == (0.0, False)
    assert found["train.c2i.objective.balance_start"][1:3] == (None, True), "null is written, too"
    assert found["train.sft.run.grid_sampler.euler.timeshift"][1:3] == (2.0, True)
    assert found["train.c2i.run.grid_sampler.euler.timeshift"][1:3] == (1.0, False)
    assert found["datasets.scenes-sft.sources.scenes.scenes.captions"][1:3] == ({"short": 1.0}, True)
    assert found["storage.root"][1:] == (None, False, comments(type(describe.read_params(DEMO).storage))["root"])


def test_show(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["params", "show", "train.c2i.run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(dataclasses.fields(RunConfig)) + 3  # the sampler has four
    assert lines[0].split(None, 3) == ["train.c2i.run.checkpoint_every", "250", "params.yaml",
                                       "steps between checkpoints"]
    assert main(["params", "show", "train.c2i.fit.stepz"]) == 1
    assert "'train.c2i.fit.stepz' is not known (did you mean 'train.c2i.fit.steps'?)" in capsys.readouterr().err
    assert main(["params", "show", "--file", "presets/t2i-xxl.yaml", "train.sft.optimizer.lr"]) == 0
    assert capsys.readouterr().out.split()[:3] == ["train.sft.optimizer.lr", "1e-05", "t2i-xxl.yaml"]


def test_diff(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["params", "diff", "presets/imagenet256-xl.yaml", "presets/imagenet256-xl-cfg.yaml"]) == 0
    assert [line.split(None, 1) for line in capsys.readouterr().out.splitlines()] == [
        ["train.c2i.fit.steps", "400000 -> 800000"], ["sample.c2i.sampler.heun.guidance", "1.0 -> 2.25"],
        ["sample.c2i.sampler.heun.interval", "[0.0, 1.0] -> [0.1, 0.9]"]]
    assert [*describe.diff(DEMO, ROOT / "presets/demo.yaml")] == []
    assert "train.c2i.dataset  \"digits\" -> -" in "\n".join(
        " ".join(line.split()).replace(" ", "  ", 1) for line in describe.diff(DEMO, ROOT / "presets/t2i-xxl.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_is_valid_by_the_schema(path):
    jsonschema.validate(read_yaml(path), describe.schema(), jsonschema.Draft202012Validator)


@pytest.mark.parametrize(("dotted", "value"), [
    ("trian", {}), ("train.c2i.fit.stepz", 3), ("train.c2i.fit.steps", "many"), ("train.c2i.fit.compile", 1),
    ("train.c2i.objective.lpips.gated", 1), ("sample.c2i.sampler.heun.interval", [0.1]), ("train.c2i.dataset", None),
    ("sample.c2i.sampler.heun.interval", [0.1, 0.2, 0.3]), ("train.sft.denoiser", 3), ("datasets.digits.crop", "none"),
])
def test_the_schema_refuses_what_the_reader_refuses(dotted, value):
    data = replaced(read_yaml(DEMO), dotted, value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(data, describe.schema(), jsonschema.Draft202012Validator)
    with pytest.raises(ConfigError):
        load(Params, data)


def test_the_schema_says_what_a_key_means(capsys):
    assert main(["params", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    steps = schema["properties"]["train"]["additionalProperties"]["properties"]["fit"]["properties"]["steps"]
    assert steps == {"type": "integer", "default": 400000, "description": comments(FitConfig)["steps"]}


def test_kinds_are_listed_with_their_options(capsys):
    assert main(["params", "kinds"]) == 0
    said = capsys.readouterr().out
    for base in (Source, PromptSource, Network, Denoiser, Sampler, Metric):
        assert all(f"{base.__name__} {kind}: " in said for kind in base.kinds)
    assert re.search(r"^Sampler adams_bashforth: .*\n(  .*\n)*  order +2 +1 to 4$", said, re.M)
    assert re.search(r"^Source image_folder: A folder with .*\n  path +\(needed\) +folder with", said, re.M)
