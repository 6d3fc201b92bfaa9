"""No code that a file brings is run, whatever reads the file."""

import io
import json
import pickle

import numpy as np
import pytest
import torch

from pipeline.demo.judge import load_digits_judge
from pipeline.demo.stand_ins import write_text
from pipeline.networks.vgg16 import LpipsVgg16
from pixelgen import checkpoint
from pixelgen.encoders.dino import load_dino
from pixelgen.encoders.inception import load_inception
from pixelgen.encoders.lpips import load_lpips
from pixelgen.encoders.text import load_text_encoder
from pixelgen.errors import CheckpointError, FileError
from pixelgen.metrics import fid
from pixelgen.metrics.colors import load_colors
from pixelgen.metrics.detector import load_detector
from pixelgen.tensors import read_pickle
from tests.pixelgen.conftest import tiny_config
from tests.security.hostile import Trace, write_pickle

HUB = {"model_type": "mask2former"}, {"model_type": "clip"}
CONFIG = {"architecture": "vit_small_patch14_dinov2", "arguments": {}}
LOADERS = {  # what reads the file; the file in its folder; and the config.json beside it
    "checkpoint": (lambda f: checkpoint.read_state(f / "x.ckpt"), "x.ckpt", None),
    "published": (lambda f: checkpoint.read_published(f / "x.ckpt"), "x.ckpt", None),
    "model": (checkpoint.load_denoiser, "ema.safetensors", {"denoiser": "jit", "config": vars(tiny_config())}),
    "inception": (lambda f: load_inception(f / "x.pth"), "x.pth", None),
    "dino": (lambda f: load_dino(f, 2), "model.safetensors", CONFIG),
    "dino's arguments": (lambda f: load_dino(f, 2), "x.pth", CONFIG | {"arguments": {"checkpoint_path": "x.pth"}}),
    "lpips": (load_lpips, "trunk.safetensors", {"net": "alex"}),
    "vgg": (LpipsVgg16().prepare, LpipsVgg16.files[0].name, None),
    "digits": (lambda f: load_digits_judge(f, torch.device("cpu")), "model.safetensors", None),
    "mmdet": (lambda f: load_detector(f / "x.pth", "cpu"), "x.pth", None),
    "detector": (lambda f: load_detector(f, "cpu"), "pytorch_model.bin", HUB[0]),
    "safe detector": (lambda f: load_detector(f, "cpu"), "model.safetensors", HUB[0]),
    "clip": (lambda f: load_colors(f, "cpu"), "pytorch_model.bin", HUB[1]),
    "safe clip": (lambda f: load_colors(f, "cpu"), "model.safetensors", HUB[1]),
    "reference": (lambda f: fid.load_reference(f / "x.npz"), "x.npz", None),
    "samples": (lambda f: fid.load_samples(f / "x.npz"), "x.npz", None),
}


@pytest.mark.parametrize("kind", ["archive", "legacy", "plain"])
@pytest.mark.parametrize("name", LOADERS)
def test_no_pickle_is_run(tmp_path, monkeypatch, name, kind):
    load, file, config = LOADERS[name]
    folder, trace = tmp_path / "in", tmp_path / "trace"
    monkeypatch.chdir(tmp_path)
    path = write_pickle(folder / file, trace, kind)
    (folder / "tokenizer.json").write_text("{}")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
        write_pickle(tmp_path / "x.pth", trace, kind)
    with pytest.raises(FileError, match=file if "argument" not in name else "checkpoint_path"):
        load(folder)
    assert not trace.exists()
    if kind == "plain":  # the file is what it should be: it would have left a trace
        pickle.loads(path.read_bytes())
    else:
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert trace.is_dir()


@pytest.mark.parametrize("load", [fid.load_reference, fid.load_samples])
def test_no_array_of_objects_is_unpickled(tmp_path, load):
    arrays = dict.fromkeys(("mu", "sigma", "mu_s", "sigma_s", "arr_0"), np.array([Trace(tmp_path / "trace")]))
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(FileError, match=r"x\.npz: .*allow_pickle"):
        load(tmp_path / "x.npz")
    assert not (tmp_path / "trace").exists()


def test_the_pickle_that_torch_fidelity_runs_is_not_the_file(tmp_path, monkeypatch):
    """It is read once: whoever changes the file behind the check changes nothing."""
    path, trace = tmp_path / "x.pth", tmp_path / "trace"
    torch.save({"weight": torch.zeros(1)}, path)

    def read_and_change(file):
        content = read_pickle(file)
        write_pickle(file, trace, "archive")
        return content

    monkeypatch.setattr("pixelgen.encoders.inception.read_pickle", read_and_change)
    with pytest.raises(CheckpointError, match="not the weights of inception"):
        load_inception(path)
    assert not trace.exists()


# ---------------------------------------------------------------------------------------------- text encoders


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    write_text(folder, 0)
    return folder


@pytest.fixture
def copied(encoder, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for path in encoder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(("name", "says"), [("pytorch_model.bin", "no file named model.safetensors"),
                                            ("model.safetensors", "in: .*safetensors")])
def test_a_text_encoder_is_of_safetensors_alone(copied, tmp_path, name, says):
    (copied / "model.safetensors").unlink()
    write_pickle(copied / name, tmp_path / "trace", "archive")
    with pytest.raises(CheckpointError, match=says):
        load_text_encoder(copied, 8)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("known", [True, False])
def test_code_beside_a_text_encoder_is_not_run(copied, tmp_path, known):
    (copied / "its.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'trace')!r})\n")
    for name in ("config.json", "tokenizer_config.json"):
        described = json.loads((copied / name).read_text())
        described["auto_map"] = {"AutoConfig": "its.Config", "AutoModel": "its.Model",
                                 "AutoTokenizer": ["its.Tokenizer", "its.Tokenizer"]}
        if not known and name == "config.json":
            described["model_type"] = "its"
        (copied / name).write_text(json.dumps(described))
    if known:
        assert load_text_encoder(copied, 8)(["a red circle"]).shape == (1, 8, 64)
    else:
        with pytest.raises(CheckpointError, match="trust_remote_code"):
            load_text_encoder(copied, 8)
    assert not (tmp_path / "trace").exists()
