"""A training without the workflow: alone or by torchrun, stopped and gone on with, and what it refuses."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pixelgen.cli import main
from pixelgen.data.shards import describe_pieces, encode_shard
from pixelgen.recipe import read_recipe
from tests.pipeline.folders import encoded

ROOT = Path(__file__).parents[2]
MODEL = [f"model/{name}.safetensors" for name in ("raw", "ema", "projector")]
RECIPE = """
mixture: null
denoiser: {jit: {size: demo/16, image_size: 32, num_classes: 4, dropout: 0.1}}
objective: {repa: {weight: 0.0}, lpips: {weight: 0.0}, pdino: {weight: 0.0}, balance_start: null}
optimizer: {lr: 1e-3, betas: [0.9, 0.95], clip: 1.0}
fit: {steps: 6, batch_size: 8, lanes: 2, seed: 0, ema_decay: 0.9, precision: fp32, compile: false}
run: {checkpoint_every: 4, keep_checkpoints: 2, log_every: 1, grid_every: 6, grid_sampler: {euler: {steps: 2}}}
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of labelled images, with their manifest."""
    folder, random, described, files = tmp_path_factory.mktemp("shards"), np.random.default_rng(0), [], []
    for number in range(2):
        images = random.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
        data = encode_shard([{"key": f"{number}-{n}", "image": encoded(Image.fromarray(image)), "label": n % 4}
                             for n, image in enumerate(images)])
        name = f"train-{number}.parquet"
        (folder / name).write_bytes(data)
        described.append({"path": name, "rows": 20, "size": 32, "pieces": describe_pieces(data)})
        files.append({"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    source = {"captions": None, "splits": {"train": {"shards": described}}}
    manifest = {"kind": "dataset", "root": None, "files": files, "classes": ["a", "b", "c", "d"],
                "sources": {"noise": source}}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path / "recipe.yaml"


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """An undisturbed training in one process."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "recipe.yaml").write_text(RECIPE)
    assert run(folder / "recipe.yaml", shards, folder / "out") == 0
    return folder / "out"


def run(recipe, shards, out, *options):
    return main(["train", *map(str, (recipe, shards, out)), "--networks", str(out.parent), *options])


def digests(folder, names):
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_two_processes_of_torchrun_are_one(whole, recipe, shards, tmp_path):
    out = tmp_path / "out"
    told = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "pixelgen",
                           "train", recipe, shards, out, "--networks", tmp_path, "--threads", "1"], env=environment(),
                          capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    kept = [f"checkpoints/step-{n:08}.pt" for n in (4, 6)]
    names = [*MODEL, *kept, "grids/step-00000006.png"]
    assert digests(out, names) == digests(whole, names)
    steps = [line.split(",")[0] for line in (out / "curve.csv").read_text().splitlines()]
    assert steps == ["step", *"123456"]


def test_a_stopped_training_goes_on_from_the_step_it_saved(whole, recipe, shards, tmp_path):
    """SIGTERM comes after the first steps; what is left is as long as the undisturbed training then has to be."""
    out, long = tmp_path / "out", RECIPE.replace("checkpoint_every: 4", "checkpoint_every: 3000")
    recipe.write_text(long.replace("steps: 6", "steps: 3000"))
    command = [sys.executable, "-m", "pixelgen", "train", recipe, shards, out, "--networks", tmp_path, "--threads", "1"]
    child = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    while not (out / "curve.csv").is_file() and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=120)
    step, = (int(path.stem.removeprefix("step-")) for path in (out / "checkpoints").glob("*.pt"))
    assert child.returncode == 128 + signal.SIGTERM
    assert f"stopped: step {step} is saved, the same command goes on from there" in said
    assert 0 < step < 3000 and not (out / "model").exists()
    steps = step + 3
    recipe.write_text(long.replace("steps: 6", f"steps: {steps}"))
    assert run(recipe, shards, out) == 0 == run(recipe, shards, tmp_path / "undisturbed")
    assert digests(out, MODEL) == digests(tmp_path / "undisturbed", MODEL)


def test_a_finished_training_is_finished(whole, shards, capsys):
    before = digests(whole, MODEL)
    assert run(whole.parent / "recipe.yaml", shards, whole) == 0
    assert digests(whole, MODEL) == before
    assert "training goes on from step 6" in capsys.readouterr().err


@pytest.mark.parametrize(("change", "says"), [
    (("seed: 0", "seed: 1"), "holds another training: recipe.fit.seed was 0 and is 1: name another folder"),
    (("lr: 1e-3", "lr: 2e-3"), "holds another training: recipe.optimizer.lr was 0.001 and is 0.002"),
    (("num_classes: 4", "num_classes: 3"), "denoiser.num_classes 3: dataset .* has 4 classes"),
    (("lpips: {weight: 0.0}", "lpips: {weight: 0.1}"), "has no folder lpips, which the recipe needs: .*--networks"),
    (("mixture: null", "mixture: {nois: 1.0}"), r"mixture: source: 'nois' is not known \(did you mean 'noise'\?\)"),
    (("mixture: null", "init: earlier\nmixture: null"), "recipe.yaml.init is earlier: name the folder .* with --init"),
    (("{jit: {size: demo/16, image_size: 32, num_classes: 4, dropout: 0.1}}",
      "{jit_t2i: {size: demo-text/16, image_size: 32}}"), "denoiser: jit_t2i takes prompts, but .* has labels: choose"),
    (("seed: 0", "sed: 0"), r"recipe.yaml: fit: key: 'sed' is not known \(did you mean 'seed'\?\)"),
])
def test_what_does_not_fit_is_refused_before_any_step(whole, recipe, shards, capsys, change, says):
    before = digests(whole, ["made_of.json", "curve.csv"])
    recipe.write_text(RECIPE.replace(*change))
    assert run(recipe, shards, whole) == 1
    assert re.search(says, capsys.readouterr().err)
    assert digests(whole, ["made_of.json", "curve.csv"]) == before


def test_what_no_update_depends_on_may_change(whole, recipe, shards):
    recipe.write_text(RECIPE.replace("log_every: 1", "log_every: 2"))
    assert run(recipe, shards, whole) == 0


def test_a_longer_training_goes_on_from_a_shorter_one(whole, recipe, shards, tmp_path):
    shutil.copytree(whole, tmp_path / "on")
    recipe.write_text(RECIPE.replace("steps: 6", "steps: 9"))
    assert run(recipe, shards, tmp_path / "on") == 0 == run(recipe, shards, tmp_path / "undisturbed")
    assert digests(tmp_path / "on", MODEL) == digests(tmp_path / "undisturbed", MODEL)
    steps = [line.split(",")[0] for line in (tmp_path / "on/curve.csv").read_text().splitlines()]
    assert steps == ["step", *"123456789"]


def test_a_folder_of_an_earlier_version_is_refused(whole, recipe, shards, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "old")
    made_of = json.loads((whole / "made_of.json").read_text())
    made_of["recipe"]["grid_sampler"] = {}
    (tmp_path / "old/made_of.json").write_text(json.dumps(made_of))
    assert run(recipe, shards, tmp_path / "old") == 1
    assert "old holds a training of an earlier version: name another folder" in capsys.readouterr().err


def test_a_folder_is_for_one_training_at_a_time(recipe, shards, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with open(out / "writer.lease", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run(recipe, shards, out) == 1
    assert f"{out} is in use by another training" in capsys.readouterr().err


def test_lanes_have_to_be_shared_out_evenly(recipe, shards, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(recipe, shards, tmp_path / "out") == 1
    assert "fit.lanes 2 cannot be shared out evenly among 3 processes" in capsys.readouterr().err
    assert run(recipe, shards, tmp_path / "out", "--readers", "-1") == 1
    assert "--readers -1: at least 0" in capsys.readouterr().err


def test_a_recipe_is_a_file_or_a_part_of_params(recipe, tmp_path):
    alone = read_recipe(recipe)
    nested = "\n".join(f"    {line}" for line in ["dataset: d", "init: none", *RECIPE.splitlines()])
    (tmp_path / "params.yaml").write_text(f"train:\n  mine:\n{nested}\n")
    assert read_recipe(tmp_path / "params.yaml", "mine") == alone
    assert read_recipe(ROOT / "params.yaml", "c2i").fit.lanes == 2
    assert alone.denoiser.size == "demo/16"
