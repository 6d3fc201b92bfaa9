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
from pixelgen.recipe import read_yaml

ROOT = Path(__file__).parents[2]
PRESETS = sorted(ROOT.glob("presets/**/*.yaml"))
PLAIN = read_yaml(ROOT / "params.yaml")
CAPTIONED = {"webdataset": {"path": "x", "image": "jpg"}, "parquet": {"path": "x", "image": "image"},
             "text_folder": {"path": "x"}, "scenes": {"count": 1, "clutter": 0.0}}  # without their captions


@pytest.fixture(scope="module")
def demo():
    return read_yaml(ROOT / "params.yaml")


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: p.stem)
def test_every_preset_loads_and_builds_its_model(path):
    whole = read_params(path)
    assert whole.train
    for train in whole.train.values():
        with torch.device("meta"):
            train.denoiser.resolve().build()
        assert train.fit.lanes % 2 == 0


def test_the_committed_params_are_the_demo_preset():
    assert (ROOT / "params.yaml").read_text() == (ROOT / "presets/demo.yaml").read_text()
    assert {p.stem for p in PRESETS} == {"demo", "imagenet256-l", "imagenet256-xl", "imagenet256-xl-cfg", "t2i-xxl",
                                         "repa", "lpips", "pdino"}


def test_the_presets_hold_the_papers_settings():
    ladder = {name: read_params(ROOT / f"presets/{name}.yaml").train["c2i"]
              for name in ("ablations/repa", "ablations/lpips", "ablations/pdino", "imagenet256-l", "imagenet256-xl")}
    terms = [(t.objective.lpips.weight, t.objective.pdino.weight, t.objective.gate_threshold) for t in ladder.values()]
    assert terms == [(0, 0, 0), (0.1, 0, 0), (0.1, 0.01, 0), (0.1, 0.01, 0.3), (0.1, 0.01, 0.3)]
    assert [t.fit.steps for t in ladder.values()] == [200_000] * 4 + [400_000]
    assert all(t.fit.batch_size == 256 and t.optimizer.lr == 1e-4 for t in ladder.values())
    assert all(t.objective.repa.hidden is None for t in ladder.values()), "as wide as the denoiser"


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
    assert all(t.objective.repa.hidden is None for t in chain), "as wide as the denoiser"
    sampler = whole.sample["geneval"].sampler
    assert (sampler.kind, sampler.order, sampler.steps, sampler.guidance, sampler.timeshift) == (
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
    ("train.c2i.denoiser.jit.size", "XXL", "train.c2i.denoiser.jit: size: 'XXL' is not known"),
    ("train.c2i.denoiser.jit.image_size", 64, "denoiser.image_size 64 is none of datasets.digits.image_sizes [32]"),
    ("train.c2i.denoiser.jit.image_size", 40, "image_size 40 is not a multiple of patch_size 16"),
    ("train.c2i.dataset", "digit", "train.c2i.dataset: 'digit' is not known (did you mean 'digits'?)"),
    ("train.c2i.objective.repa.block", 6, "objective.repa.block 6: the denoiser has blocks 0 to 5"),
    ("train.c2i.objective.lpips.weight", -1, "train.c2i.objective.lpips: weight -1.0 must not be negative"),
    ("train.c2i.objective.gated", ["lpips"], "train.c2i.objective: key: 'gated' is not known"),
    ("sample.c2i.model", "c2j", "sample.c2i.model: 'c2j' is not known (did you mean 'c2i'?)"),
    ("sample.c2i.sampler.heun.interval", [0.9, 0.1], "sample.c2i.sampler.heun: interval [0.9, 0.1] must satisfy"),
    ("sample.c2i.sampler.heun.order", 2, "sample.c2i.sampler.heun: key: 'order' is not known; valid: guidance"),
    ("evaluate.fid.reference", "imagenet", "evaluate.fid.reference: 'imagenet' is not known"),
    ("reference.digits.extractor", "inception",
     "reference.digits.extractor needs a network for inception: add inception to networks"),
    ("reference.digits.extractor", "dino", "reference.digits.extractor: demo_dino gives no features to compare"),
    ("networks.dino", {"clip_vit_l14": {}}, "networks.dino: clip_vit_l14 is for clip: put it there"),
    ("networks.dino", {"dinov2_b": {}}, "networks.dino: 'dinov2_b' is not known (did you mean 'dinov2_b14'"),
    ("networks", {"lpips": {"demo_lpips": {}}, "text": {"demo_text": {}}, "digits": {"demo_digits": {}}},
     "train.c2i needs a network for dino: add dino to networks"),
    ("networks", {"lpips": {"demo_lpips": {}}, "dino": {"demo_dino": {}}, "digits": {"demo_digits": {}}},
     "train.t2i-256 needs a network for text: add text to networks"),
    ("train.t2i-512.init", "t2i-25", "train.t2i-512.init: 't2i-25' is not known (did you mean 't2i-256'?)"),
    ("train.t2i-256.init", "sft", "train.t2i-256.init: t2i-256 <- sft <- t2i-512 <- t2i-256 goes round in a circle"),
    ("train.sft.init", "c2i", "train.sft.init: c2i trains demo/16, not demo-text/16"),
    ("train.sft.denoiser", PLAIN["train"]["c2i"]["denoiser"], "train.sft.denoiser: jit takes labels, but "
     "scenes-sft has captions: choose another denoiser or dataset"),
    ("train.c2i.denoiser", PLAIN["train"]["sft"]["denoiser"], "train.c2i.denoiser: jit_t2i takes prompts, but "
     "digits has labels: choose another denoiser or dataset"),
    ("train.sft.denoiser.jit_t2i.captions", {"prefix_probability": 1.5}, "sft.denoiser.jit_t2i.captions: "
     "prefix_probability 1.5 must lie in [0, 1]"),
    ("train.sft.mixture", {"scene": 1}, "train.sft.mixture: source: 'scene' is not known"),
    ("train.sft.mixture", {"scenes": 0}, "train.sft.mixture: every share must be positive"),
    ("train.sft.denoiser.jit_t2i.image_size", 32, "image_size 32 is none of datasets.scenes-sft.image_sizes [64]"),
    ("train.sft.denoiser.jit_t2i.num_classes", 10, "train.sft.denoiser.jit_t2i: key: 'num_classes' is not known"),
    ("train.c2i.denoiser", {"jit": {"size": "demo/16", "image_size": 32}}, "missing key num_classes; needed: size"),
    ("train.c2i.denoiser.jit.size", "demo-text/16", "size: 'demo-text/16' is not known"),
    ("prompts.none", {"scenes": {}}, "prompts: a key cannot be called 'none'"),
    ("sample.none", PLAIN["sample"]["c2i"], "sample: a key cannot be called 'none'"),
    ("evaluate.none", PLAIN["evaluate"]["fid"], "evaluate: a key cannot be called 'none'"),
    ("prompts.geneval", {"file": {}}, "prompts.geneval.file: missing key path; needed: path"),
    ("prompts.geneval", {"url": {}}, "prompts.geneval: 'url' is not known; valid: file, scenes"),
    ("sample.geneval.prompts", "none", "layout geneval: npz is for classes (prompts: none)"),
    ("sample.geneval.layout", "dpg", "10 images per prompt: the layout of DPG-Bench shows 4"),
    ("sample.c2i.model", "sft", "sample.c2i.prompts: sft draws prompts: name a key of prompts"),
    ("sample.c2i.negative", "x", "negative: only prompts have a negative"),
    ("evaluate.geneval.metric", {"geneval": {}}, "evaluate.geneval.metric.geneval needs a network for mask2former"),
    ("prompts.geneval", {"file": {"path": "p.txt"}},
     "evaluate.geneval.metric demo_geneval: prompts of the kind file are for geneval"),
    ("evaluate.geneval.metric", {"geneval": {"baselines": True}}, "metric.geneval: key: 'baselines' is not known"),
    ("evaluate.geneval.reference", "digits", "reference digits: demo_geneval has no reference: set it to none"),
    ("train.c2i.objective.pdino.block", -1, "train.c2i.objective.pdino: block -1 must not be negative"),
    ("train.c2i.objective.repa.block", -3, "train.c2i.objective.repa: block -3 must not be negative"),
    ("evaluate.fid.reference", "none", "reference none: adm needs a key of reference"),
    ("evaluate.geneval.sample", "c2i", "evaluate.geneval: c2i has layout npz, not geneval, which demo_geneval scores"),
    ("evaluate.fid.sample", "geneval", "evaluate.fid: geneval has layout geneval, not npz, which adm scores"),
    ("datasets.scenes-sft.sources.scenes.scenes.count", None, "scenes.scenes.count: expected int, got None"),
    ("datasets.scenes-sft.sources.scenes.scenes.count", 0, "scenes.scenes: count 0 must be at least 1"),
    ("datasets.scenes-sft.sources.scenes.scenes.clutter", 1.5, "scenes.scenes: clutter 1.5 must lie in [0, 1]"),
    ("datasets.scenes-sft.sources.scenes.scenes.captions", {"txt": 1},
     "captions: column of scenes: 'txt' is not known; valid: long, short"),
    ("datasets.digits.sources.digits", {"digits": {"path": "x"}}, "digits.digits: key: 'path' is not known"),
    ("datasets.digits.sources.digits", {"image_folder": {}}, "image_folder: missing key path; needed: path"),
    ("datasets.digits.sources.digits", {"tar": {}}, "sources.digits: 'tar' is not known; valid: digits, image_folder, "
     "parquet, scenes, text_folder, webdataset"),
    ("datasets.digits.sources.digits", {"image_folder": {"path": "x", "captoins": {"txt": 1}}},
     "sources.digits.image_folder: key: 'captoins' is not known; valid: path"),
    ("datasets.digits.sources.digits", {"webdataset": {"path": "x", "caption": {"txt": 1}, "image": "jpg"}},
     "key: 'caption' is not known (did you mean 'captions'?); valid: captions, image, path"),
    ("datasets.digits.sources.digits", {"webdataset": {"path": "x", "captions": {"txt": 0.5}}},
     "webdataset: missing key image; needed: path, captions, image"),
    *[("datasets.digits.sources.digits", {kind: options | {"captions": {}}}, "captions: name the columns of captions")
      for kind, options in CAPTIONED.items()],
    *[("datasets.digits.sources.digits", {kind: options | {"captions": {"a": 1, "b": -1}}},
       "captions: of the shares [1.0, -1.0] none may be negative and one must be positive")
      for kind, options in CAPTIONED.items()],
    ("datasets.digits.sources.more", {"image_folder": {"path": "x"}}, "sources: labelled data has exactly one"),
    ("datasets.digits.sources.more", {"text_folder": {"path": "x", "captions": {"txt": 1}}},
     "sources: labelled data has exactly one"),
    ("datasets.digits.sources", {}, "sources: at least one is needed"),
    ("datasets.digits.sources", {"../x": {"digits": {}}}, "sources: '../x' names files: use letters"),
    ("datasets.digits.image_sizes", [], "image_sizes [] must be ascending, and at least one"),
    ("datasets.digits.image_sizes", [64, 32], "image_sizes [64, 32] must be ascending"),
    ("datasets.digits.image_sizes", [32, 64], "image_sizes: labelled data has exactly one"),
    ("datasets.digits.image_sizes", [4], "image_sizes: 4 must be at least 8"),
    ("datasets.digits.heldout", 0.1, "heldout 0.1: digits come with their own split: leave it out"),
    ("datasets.scenes-sft.heldout", 1.0, "heldout 1.0 must lie in [0, 1)"),
    ("train.c2i.run.log_evry", 3, "train.c2i.run: key: 'log_evry' is not known (did you mean 'log_every'?)"),
    ("train.c2i.run.grid_sampler", {"eulr": {}}, "grid_sampler: 'eulr' is not known (did you mean 'euler'?)"),
    ("networks.dino.demo_dino.directory", "x", "networks.dino.demo_dino: key: 'directory' is not known; valid: seed"),
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
    data["train"]["c2i"]["run"] = {"grid_sampler": {"euler": {"steps": 3}}}
    run = load(Params, data).train["c2i"].run
    assert (run.grid_sampler.steps, run.grid_sampler.kind, run.grid_sampler.guidance) == (3, "euler", 2.25)
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
    assert resolved_params("train", "c2i") == read_params()
    text = (resolved / "params.yaml").read_text()
    (resolved / "params.yaml").write_text(text.replace("seed: 1", "seed: 1  # a comment"))
    assert resolved_params("train", "c2i") == read_params() and capsys.readouterr().err == ""
    for other in text.replace("steps: 500", "steps: 600"), "train: [":
        (resolved / "params.yaml").write_text(other)
        assert resolved_params("train", "c2i").train["c2i"].fit.steps == 500
        assert "params.yaml has changed since this run began, which keeps to out/params.json" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="train: key: 'c2j' is not known .did you mean 'c2i'"):
        resolved_params("train", "c2j")
    for text in '{"train": {"c2i": "another"}}', '{"train": {}}', '{"train": "of all instances"}', "{}":
        (resolved / "out/code.json").write_text(text)
        with pytest.raises(ConfigError, match="the code of train has changed since out/code.json was written: run"):
            resolved_params("train", "c2i")
    whole = (resolved / "out/params.json").read_text()
    (resolved / "out/params.json").write_text(whole.replace('"networks"', '"weights"'))
    with pytest.raises(ConfigError, match="out/params.json is of another version, run `dvc repro params` first: top"):
        resolved_params("train", "c2i")
    (resolved / "out/params.json").write_text(whole)
    with pytest.raises(ConfigError, match="the code of train has changed since out/code.json was written: run `dvc"):
        resolved_params("train", "c2i")
    (resolved / "out/params.json").unlink()
    with pytest.raises(ConfigError, match=r"out/params.json or out/code.json is missing: run `dvc repro params` first"):
        resolved_params("train", "c2i")


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
    """Nor does any kind of a variant, when it is chosen."""
    program = ("import sys; import pipeline.params as p; from pixelgen.config import Variant; p.read_params(); "
               "chosen = [base.of(kind) for base in Variant.__subclasses__() for kind in base.kinds]; assert chosen; "
               "assert not {'torch', 'ray', 'dvc', 'numpy', 'pyarrow', 'sklearn'} & set(sys.modules), sys.modules")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_samples_are_compared_with_what_their_model_was_trained_on(demo):
    data = replaced(demo, "datasets.other", demo["datasets"]["digits"])
    data["reference"] = data["reference"] | {"other": data["reference"]["digits"] | {"dataset": "other"}}
    assert load(Params, data).reference["other"].dataset == "other"
    with pytest.raises(ConfigError, match="evaluate.fid: the samples imitate 'digits', but reference 'other' is of"):
        load(Params, replaced(data, "evaluate.fid.reference", "other"))


def test_fingerprint_tells_parameters_apart(demo):
    one, two = (load(Params, replaced(demo, "train.c2i.fit.seed", s)).train["c2i"] for s in (0, 1))
    assert fingerprint([one]) == fingerprint([one]) != fingerprint([two])
