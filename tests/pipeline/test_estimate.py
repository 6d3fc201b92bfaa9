"""`python -m pipeline estimate`."""

import re
import shutil
import subprocess
import sys

import pytest

from pipeline.__main__ import main
from tests.security.hostile import ROOT


@pytest.fixture
def preset(tmp_path, monkeypatch):
    """A directory with the parameters of a preset, and the clusters."""
    def chosen(name):
        shutil.copy(ROOT / name, tmp_path / "params.yaml")
        shutil.copytree(ROOT / "clusters", tmp_path / "clusters")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("PIXELGEN_CLUSTER", "node8")
    return chosen


def test_what_xl_takes(preset, capsys):
    """400,000 steps of 256 images of 988 GFLOP, on 4 GPUs of 989 TFLOP/s that do half of that, at 2 dollars."""
    preset("presets/imagenet256-xl.yaml")
    assert main(["estimate", "train.c2i", "--gpus", "4", "--utilisation", "0.5", "--price", "2"]) == 0
    said = capsys.readouterr().out
    assert "XL/16 at 256 pixels, 400,000 steps of 256 images, 64 of them together on each of 4 GPUs" in said
    found = {name: float(value.replace(",", "")) for name, value in re.findall(r"^  (\S.*?)  +([\d,.]+)", said, re.M)}
    images = 4 * 989e12 / 2 / 987.7e9
    assert found == pytest.approx({"GFLOP an image": 987.7, "GB a GPU": 47.5, "images/s": images,
                                   "hours": 102.4e6 / images / 3600, "dollars": 8 * 102.4e6 / images / 3600}, rel=5e-3)


def test_networks_that_the_demo_has_left_are_not_the_presets(preset, capsys, tmp_path):
    """Nobody may take their few operations for those of the published ones."""
    preset("presets/imagenet256-xl.yaml")
    assert main(["estimate", "train.c2i"]) == 0
    before = capsys.readouterr().out
    (folder := tmp_path / "out/networks/lpips").mkdir(parents=True)
    (folder / "config.json").write_text('{"net": "alex"}')
    assert main(["estimate", "train.c2i"]) == 0 and capsys.readouterr().out == before


def test_all_that_a_preset_runs_is_estimated(preset, capsys):
    preset("presets/t2i-xxl.yaml")
    assert main(["estimate", "--gpus", "32"]) == 0
    said = capsys.readouterr().out
    assert re.findall(r"^\S+:", said, re.M) == [f"{k}:" for k in (
        "train.t2i-256", "train.t2i-512", "train.sft", "sample.geneval")]
    assert re.findall(r"(\d+) of them together", said) == ["48", "16", "16"], "what fits into 80 GB"
    assert "the denoiser sees 49 samples for each image" in said


@pytest.mark.parametrize(("arguments", "says"), [
    (["train.xl"], "train.xl: neither a training nor a sampling; there are sample.c2i, train.c2i"),
    (["--gpus", "0"], "--gpus 0: must be more than 0"),
    (["--utilisation", "35"], "--utilisation 35.0: must be in (0, 1]"),
    (["--gpus", "3"], "train.c2i: fit.lanes 32 cannot be shared out evenly among 3 GPUs")])
def test_what_cannot_be_estimated_is_named(preset, capsys, arguments, says):
    preset("presets/imagenet256-xl.yaml")
    assert main(["estimate", *arguments]) == 1
    assert capsys.readouterr().err.startswith(f"estimate: {says}")


def test_the_demos_networks_have_to_be_there(preset, capsys):
    preset("params.yaml")
    assert main(["estimate"]) == 1
    assert "run `dvc repro networks` first" in capsys.readouterr().err


def test_the_module_can_be_run():
    done = subprocess.run([sys.executable, "-m", "pipeline", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "estimate" in done.stdout
