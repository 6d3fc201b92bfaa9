"""params.yaml: strict, quick, and every preset is a run that could start."""

import copy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import params
from pipeline.params import CODE, NOTHING, RESOLVED, Params, fingerprint, read_params, resolved_params
from pixelgen.config import ConfigError, load
from pixelgen.models import build_denoiser
from pixelgen.recipe import read_yaml

ROOT = Path(__file__).parents[2]
PRESETS = sorted(ROOT.glob("presets/**/*.yaml"))
PLAIN = read_yaml(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def demo():
    return read_yaml(ROOT / "params.yaml")


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_loads_and_builds_its_model(path):
    whole = read_params(path)
    assert whole.train
    for train in whole.train.values():
        with torch.device("meta"):
            build_denoiser(train.denoiser.resolve())
        assert train.fit.lanes % 2 == 0


def test_the_committed_params_are_the_demo_preset():
    assert (ROOT / "params.yaml").read_text() == (ROOT / "presets/demo.yaml").read_text()
    assert {p.stem for p in PRESETS} == {"demo", "imagenet256-l", "imagenet256-xl", "imagenet256-xl-cfg", "t2i-xxl",
                                         "repa", "lpips", "pdino"}


def test_the_presets_hold_the_papers_settings():
    ladder = {name: read_params(ROOT / f"presets/{name}.yaml").train["c2i"]
              for name in ("ablations/repa", "ablations/lpips", "ablations/pdino", "imagenet256-l", "imagenet256-xl")}
    terms = [(t.objective.lpips_weight, t.objective.pdino_weight, t.objective.gate_threshold) for t in ladder.values()]
    assert terms == [(0, 0, 0), (0.1, 0, 0), (0.1, 0.01, 0), (0.1, 0.01, 0.3), (0.1, 0.01, 0.3)]
    assert [t.fit.steps for t in ladder.values()] == [200_000] * 4 + [400_000]
    assert all(t.fit.batch_size == 256 and t.optimizer.lr == 1e-4 for t in ladder.values())
    assert all(t.objective.repa_hidden is None for t in ladder.values()), "as wide as the denoiser"


def test_the_presets_of_xl_are_one_run():
    """The longer goes on where the shorter ends, and a checkpoint of that is kept."""
    short, long = (read_params(ROOT / f"presets/imagenet256-xl{name}.yaml").train["c2i"] for name in ("", "-cfg"))
    assert short.trajectory == long.trajectory and short.dataset == long.dataset
    assert (short.fit.steps, long.fit.steps) == (400_000, 800_000)
    assert short.run.keep_every == long.run.keep_every == short.fit.steps


def test_the_text_preset_holds_the_papers_settings():
    whole = read_params(ROOT / "presets/t2i-xxl.yaml")
    chain = [whole.train[key] for key in ("t2i-256", "t2i-512", "sft")]
    assert [t.init for t in chain] == ["none", "t2i-256", "t2i-512"]
    assert [(t.denoiser.image_size, t.fit.batch_size, t.optimizer.lr, t.optimizer.betas) for t in chain] == [
        (256, 1536, 2e-4, (0.9, 0.95)), (512, 512, 1e-4, (0.9, 0.95)), (512, 512, 1e-5, (0.9, 0.999))]
    assert np.cumsum([t.fit.steps for t in chain]).tolist() == [200_000, 300_000, 360_000]
    assert all(t.optimizer.clip == 1.0 and t.fit.ema_decay == 0.9999 and t.denoiser.size == "XXL/16" for t in chain)
    assert [t.fit.batch_size // t.fit.lanes for t in chain] == [8, 8, 8]
    assert all(t.objective.repa_hidden is None for t in chain), "as wide as the denoiser"
    sampler = whole.sample["geneval"].sampler
    assert (sampler.name, sampler.order, sampler.steps, sampler.guidance, sampler.timeshift) == (
        "adams_bashforth", 2, 25, 4.0, 3.0)


def replaced(data, dotted, value):
    data = copy.deepcopy(data)
    *path, last = dotted.split(".")
    node = data
    for key in path:
        node = node[key]
    node[last] = value
    return data


@pytest.mark.parametrize(("dotted", "value", "says"), [
    ("trian", {}, "'trian' is not known (did you mean 'train'?)"),
    ("train.c2i.fit.stepz", 3, "train.c2i.fit: key: 'stepz' is not known (did you mean 'steps'?)"),
    ("train.c2i.fit.steps", "many", "train.c2i.fit.steps: expected int, got 'many'"),
    ("train.c2i.fit.compile", 1, "train.c2i.fit.compile: expected bool, got 1"),
    ("train.c2i.fit.lanes", 3, "batch_size 64 is not a multiple of lanes 3"),
    ("train.c2i.denoiser.size", "XXL", "denoiser: size: 'XXL' is not known"),
    ("train.c2i.denoiser.image_size", 64, "denoiser.image_size 64 is none of datasets.digits.image_sizes [32]"),
    ("train.c2i.denoiser.image_size", 40, "image_size 40 is not a multiple of patch_size 16"),
    ("train.c2i.dataset", "digit", "train.c2i.dataset: 'digit' is not known (did you mean 'digits'?)"),
    ("train.c2i.objective.repa_block", 6, "objective.repa_block 6: the denoiser has blocks 0 to 5"),
    ("train.c2i.objective.lpips_weight", 0, "gated names 'lpips', but lpips_weight is 0"),
    ("train.c2i.objective.gated", ["fm"], "train.c2i.objective.gated[0]: 'fm' is not known"),
    ("sample.c2i.model", "c2j", "sample.c2i.model: 'c2j' is not known (did you mean 'c2i'?)"),
    ("sample.c2i.sampler.interval", [0.9, 0.1], "interval [0.9, 0.1] must satisfy"),
    ("sample.c2i.sampler.order", 2, "order 2: only adams_bashforth has one"),
    ("evaluate.fid.reference", "imagenet", "evaluate.fid.reference: 'imagenet' is not known"),
    ("reference.digits.extractor", "inception", "extractor needs the network inception: add it to weights.networks"),
    ("weights.networks", ["dino", "lpips", "text", "digits", "clip"], "there is no clip with source demo"),
    ("weights.networks", ["lpips", "text", "digits"], "train.c2i needs the network dino: add it"),
    ("weights.networks", ["dino", "lpips", "digits"], "train.t2i-256 needs the network text: add it"),
    ("train.t2i-512.init", "t2i-25", "train.t2i-512.init: 't2i-25' is not known (did you mean 't2i-256'?)"),
    ("train.t2i-256.init", "sft", "train.t2i-256.init: t2i-256 <- sft <- t2i-512 <- t2i-256 goes round in a circle"),
    ("train.sft.init", "c2i", "train.sft.init: c2i trains demo/16, not demo-text/16"),
    ("train.sft.text", None, "train.sft.text: scenes-sft has captions: it is needed"),
    ("train.sft.text.prefix_probability", 1.5, "prefix_probability 1.5 must lie in [0, 1]"),
    ("train.sft.mixture", {"scene": 1}, "train.sft.mixture: source: 'scene' is not known"),
    ("train.sft.mixture", {"scenes": 0}, "train.sft.mixture: every weight must be positive"),
    ("train.sft.denoiser.image_size", 32, "denoiser.image_size 32 is none of datasets.scenes-sft.image_sizes [64]"),
    ("train.sft.denoiser.num_classes", 10, "num_classes 10: demo-text/16 is text-conditional: null"),
    ("train.c2i.denoiser.num_classes", None, "num_classes: demo/16 is class-conditional and needs a number"),
    ("train.c2i.denoiser.size", "demo-text/16", "num_classes 10: demo-text/16 is text-conditional"),
    ("prompts.none", {"source": "scenes", "path": None}, "prompts: a key cannot be called 'none'"),
    ("sample.none", PLAIN["sample"]["c2i"], "sample: a key cannot be called 'none'"),
    ("evaluate.none", PLAIN["evaluate"]["fid"], "evaluate: a key cannot be called 'none'"),
    ("prompts.geneval.path", "x", "path: a file needs the path or URL of the prompts"),
    ("sample.geneval.prompts", "none", "layout geneval: npz is for classes (prompts: none)"),
    ("sample.geneval.layout", "dpg", "10 images per prompt: the layout of DPG-Bench shows 4"),
    ("sample.c2i.model", "sft", "sample.c2i.prompts: sft draws prompts: name a key of prompts"),
    ("sample.c2i.negative", "x", "negative: only prompts have a negative"),
    ("evaluate.geneval.detector", "mask2former", "detector mask2former: geometric is for the demo's scenes"),
    ("evaluate.geneval.detector", None, "detector None: geneval needs one"),
    ("evaluate.geneval.reference", "digits", "reference digits: fid needs a key of reference, geneval has none"),
    ("evaluate.geneval.sample", "c2i", "evaluate.geneval: c2i has layout npz, not geneval"),
    ("evaluate.fid.sample", "geneval", "evaluate.fid: geneval has layout geneval, not npz"),
    ("datasets.scenes-sft.sources.scenes.count", None, "count and clutter: scenes needs both"),
    ("datasets.scenes-sft.sources.scenes.captions", {"txt": 1}, "captions: column of scenes: 'txt' is not known"),
    ("datasets.digits.sources.digits.path", "x", "path: digits are made here: set it to null"),
    ("datasets.digits.sources.digits.format", "image_folder", "path: image_folder needs the folder"),
    ("datasets.digits.sources.digits.format", "tar", "sources.digits.format: 'tar' is not known"),
    ("datasets.digits.sources.digits.captions", {"txt": 1}, "captions: digits has labels instead: set it to null"),
    ("datasets.digits.sources.digits.image", "jpg", "image: digits has no columns: set it to null"),
    ("datasets.digits.sources.digits", {"format": "parquet", "path": "x", "captions": None, "image": "image",
                                        "count": None, "clutter": None},
     "captions: parquet needs the columns"),
    ("datasets.digits.sources.digits", {"format": "parquet", "path": "x", "captions": {"a": 1, "b": -1}, "image": "i",
                                        "count": None, "clutter": None},
     "captions: of the weights [1.0, -1.0] none may be negative and one must be positive"),
    ("datasets.digits.sources.digits", {"format": "webdataset", "path": "x", "captions": {"txt": 0.5}, "image": None,
                                        "count": None, "clutter": None},
     "image: webdataset needs the name of the column or member"),
    ("datasets.digits.sources.more", {"format": "image_folder", "path": "x", "captions": None, "image": None,
                                      "count": None, "clutter": None},
     "sources: labelled data has exactly one"),
    ("datasets.digits.sources", {}, "sources: at least one is needed"),
    ("datasets.digits.sources", {"../x": {"format": "digits", "path": None, "captions": None, "image": None,
                                        "count": None, "clutter": None}},
     "sources: '../x' names files: use letters"),
    ("datasets.digits.image_sizes", [], "image_sizes [] must be ascending, and at least one"),
    ("datasets.digits.image_sizes", [64, 32], "image_sizes [64, 32] must be ascending"),
    ("datasets.digits.image_sizes", [32, 64], "image_sizes: labelled data has exactly one"),
    ("datasets.digits.image_sizes", [4], "image_sizes: 4 must be at least 8"),
    ("datasets.digits.heldout", 0.1, "heldout 0.1: digits come with their own split: leave it out"),
    ("datasets.scenes-sft.heldout", 1.0, "heldout 1.0 must lie in [0, 1)"),
    ("train.c2i.run.log_evry", 3, "train.c2i.run: key: 'log_evry' is not known (did you mean 'log_every'?)"),
    ("train.c2i.run.grid_sampler.order", 2, "train.c2i.run.grid_sampler: order 2: only adams_bashforth has one"),
    ("weights.directory", "x", "directory is for published weights"),
])
def test_a_mistake_names_the_key_and_the_choices(demo, dotted, value, says):
    with pytest.raises(ConfigError) as error:
        load(Params, replaced(demo, dotted, value))
    assert says in str(error.value)


def test_what_the_first_stage_writes_is_in_the_workflow():
    outs = read_yaml(ROOT / "dvc.yaml")["stages"]["params"]["outs"]
    assert outs == [path.as_posix() for path in (RESOLVED, CODE, *NOTHING)]


def test_a_missing_key_is_a_mistake(demo):
    data = copy.deepcopy(demo)
    del data["train"]["c2i"]["dataset"]
    with pytest.raises(ConfigError, match=r"train\.c2i: missing key dataset; needed: denoiser, dataset, init"):
        load(Params, data)


def test_what_is_not_said_is_as_by_default(demo):
    """A section that is given in part keeps what its default has of the rest, not what its class has."""
    data = copy.deepcopy(demo)
    data["train"]["c2i"]["run"] = {"grid_sampler": {"steps": 3}}
    run = load(Params, data).train["c2i"].run
    assert (run.grid_sampler.steps, run.grid_sampler.name, run.grid_sampler.guidance) == (3, "euler", 2.25)
    assert run.checkpoint_every == 5000
    said = copy.deepcopy(demo)
    said["train"]["c2i"]["objective"]["balance_every"] = 50
    said["train"] = dict(reversed(said["train"].items()))
    assert load(Params, said) == load(Params, demo)


@pytest.fixture
def resolved(tmp_path, monkeypatch):
    """A workspace where the first stage has run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    assert params.main() == 0
    return tmp_path


def test_stages_read_what_the_first_one_has_resolved(resolved, capsys):
    assert resolved_params("train") == read_params()
    text = (resolved / "params.yaml").read_text()
    (resolved / "params.yaml").write_text(text.replace("seed: 1", "seed: 1  # a comment"))
    assert resolved_params("train") == read_params() and capsys.readouterr().err == ""
    for other in text.replace("steps: 500", "steps: 600"), "train: [":
        (resolved / "params.yaml").write_text(other)
        assert resolved_params("train").train["c2i"].fit.steps == 500
        assert "params.yaml has changed since this run began, which keeps to out/params.json" in capsys.readouterr().err
    (resolved / "out/code.json").write_text('{"train": "another"}')
    with pytest.raises(ConfigError, match="the code of train has changed since out/code.json was written: run `dvc"):
        resolved_params("train")
    (resolved / "out/params.json").unlink()
    with pytest.raises(ConfigError, match=r"out/params.json or out/code.json is missing: run `dvc repro params` first"):
        resolved_params("train")


def test_a_mistake_leaves_what_was_resolved_before(resolved, capsys):
    before = {path: (resolved / path).read_bytes() for path in (RESOLVED, CODE)}
    (resolved / "params.yaml").write_text((ROOT / "params.yaml").read_text().replace("betas: ", "beta: "))
    assert params.main() == 1
    assert "train.c2i.optimizer: key: 'beta' is not known (did you mean 'betas'?)" in capsys.readouterr().err
    assert {path: (resolved / path).read_bytes() for path in before} == before


@pytest.mark.parametrize(("text", "says"), [
    ("a: 1\na: 2\n", "duplicate key"), ("a: [", "not valid YAML"), ("a: !!python/object/apply:os.system [x]", "YAML"),
])
def test_hostile_yaml(tmp_path, text, says):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(ConfigError, match=says):
        read_yaml(tmp_path / "params.yaml")


def test_yaml_numbers_without_a_dot_are_numbers(tmp_path):
    (tmp_path / "p.yaml").write_text("lr: 1e-4\non: off\n")
    assert read_yaml(tmp_path / "p.yaml") == {"lr": 1e-4, "on": "off"}


def test_the_check_loads_nothing_heavy():
    program = ("import sys; import pipeline.params as p; p.read_params(); "
               "assert not {'torch', 'ray', 'dvc', 'numpy'} & set(sys.modules), sys.modules.keys()")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_fingerprint_tells_parameters_apart(demo):
    one, two = (load(Params, replaced(demo, "train.c2i.fit.seed", s)).train["c2i"] for s in (0, 1))
    assert fingerprint([one]) == fingerprint([one]) != fingerprint([two])
