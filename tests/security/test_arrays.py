"""Files of arrays and tensors that claim to be larger than they are: an error before memory is taken."""

import contextlib
import json
import struct
import tracemalloc
import zipfile
from dataclasses import asdict

import numpy as np
import pytest
import torch

from pixelgen import npz
from pixelgen.checkpoint import CheckpointError, export, load_denoiser, read_published, read_state
from pixelgen.config import ConfigError
from pixelgen.encoders.dino import load_dino
from pixelgen.encoders.inception import load_inception
from pixelgen.encoders.lpips import load_lpips
from pixelgen.errors import FileError
from pixelgen.metrics import fid
from pixelgen.metrics.detector import load_detector
from pixelgen.metrics.pretrained import read_weights
from tests.pixelgen.conftest import tiny_config, tiny_denoiser
from tests.security.hostile import rewrite


def npy(shape, descr="'|u1'", content=b"", version=1) -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return (b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header)) + header
            + content)


@contextlib.contextmanager
def little(limit: int = 50 * 2**20):
    """Python and numpy take no more than `limit` bytes inside."""
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < limit


@pytest.mark.parametrize(("content", "says"), [
    (npy((10**12,)), "claims to be"), (npy((10**9, 1, 1, 3)), "claims to be"), (npy((2**62, 4, 4, 3)), "claims to be"),
    (npy((2, 4, 4, 3), content=bytes(95)), "claims to be"), (npy((2, 4, 4, 3), content=bytes(97)), "claims to be"),
    (npy((2, 4, 4, 3), "'<f8'", bytes(96)), "claims to be"), (npy((10**9, 10**9, 0, 3)), "images"),
    (npy((-2, -48), content=bytes(96)), "claims"), (npy((10**12,), "'V0'"), "images|claims"),
    (npy((10**9, 4, 4, 3), version=2), "claims to be"), (npy((2,), content=bytes(2), version=3), "version"),
    (npy("(" * 9000), ""), (npy((1,) * 64, content=b"x"), "images"), (npy((True, 1), content=b"x"), "claims")])
def test_an_array_is_as_large_as_its_header_says(tmp_path, content, says):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("arr_0.npy", content)
    with little(), pytest.raises(FileError, match=rf"x\.npz: .*({says})"):
        fid.load_samples(tmp_path / "x.npz")


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_bomb_is_not_unpacked(tmp_path, monkeypatch, compression):
    monkeypatch.setattr(npz, "LARGE", 2**20)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", compression) as archive:
        archive.writestr("arr_0.npy", npy((5, 1024, 1024, 3), content=bytes(15 << 20)))
    with little(2**21), pytest.raises(FileError, match=r"x\.npz: arr_0 claims .* bytes, more than 50 times the whole"):
        fid.load_samples(tmp_path / "x.npz")


def test_honest_archives_are_read(tmp_path):
    black = np.zeros((64, 64, 64, 3), np.uint8)
    np.savez_compressed(tmp_path / "x.npz", black)  # hundreds of times its file, but small
    assert np.array_equal(fid.load_samples(tmp_path / "x.npz"), black)


# ------------------------------------------------------------------------------------------------ safetensors


def safetensors(header: dict | bytes, content: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + content


def entry(shape=(2,), start=0, end=8, dtype="F32"):
    return {"x": {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}}


LYING = {
    "beyond the file": safetensors(entry((10**9,), 0, 4 * 10**9), bytes(8)),
    "backwards": safetensors(entry((2,), 8, 0), bytes(8)),
    "a hole": safetensors(entry((2,), 8, 16), bytes(16)), "more than it says": safetensors(entry(), bytes(80)),
    "another shape": safetensors(entry((10**12,)), bytes(8)), "overflow": safetensors(entry((2**32, 2**32)), bytes(8)),
    "negative": safetensors(entry((-2,)), bytes(8)), "another type": safetensors(entry(dtype="F128"), bytes(8)),
    "overlap": safetensors(entry() | {"y": entry()["x"]}, bytes(8)), "a huge header": safetensors({}, b"", 2**60),
    "no header": b"", "no JSON": safetensors(b"{" * 1000), "no object": safetensors(b"[]"),
}


@pytest.mark.parametrize("name", LYING)
def test_safetensors_that_lie_are_refused(tmp_path, name):
    described = {"denoiser": "jit", "config": asdict(tiny_config(width=4, heads=1, image_size=8, num_classes=1)),
                 "net": "alex", "architecture": "vit_small_patch14_dinov2",
                 "arguments": {"embed_dim": 16, "depth": 1, "num_heads": 1}}
    (tmp_path / "config.json").write_text(json.dumps(described))
    for file, load in {"ema": load_denoiser, "model": lambda path: load_dino(path, 2), "trunk": load_lpips,
                       "x": lambda path: read_weights(path / "x.safetensors")}.items():
        (tmp_path / f"{file}.safetensors").write_bytes(LYING[name])
        with pytest.raises(CheckpointError, match=rf"{file}\.safetensors: (not a readable file|too small)"):
            load(tmp_path)


# ------------------------------------------------------------------------------------------------ torch.save


def test_a_compressed_archive_of_tensors_is_refused(tmp_path):
    torch.save({"state_dict": {"x": torch.zeros(1 << 20)}}, tmp_path / "a.pth")
    rewrite(tmp_path / "a.pth", tmp_path / "b.pth", zipfile.ZIP_DEFLATED)
    assert torch.load(tmp_path / "b.pth")["state_dict"]["x"].numel() == 1 << 20, "torch reads it"
    for load in (read_state, read_published, load_inception, read_weights, lambda path: load_detector(path, "cpu")):
        with pytest.raises(CheckpointError, match=r"b\.pth: .*an archive of [\d,]+ bytes in a file of [\d,]+"):
            load(tmp_path / "b.pth")


def checkpoint(**changed) -> dict:
    state = tiny_denoiser(image_size=16).state_dict()
    return {f"{name}.{k}": v for name in ("denoiser", "ema_denoiser") for k, v in (state | changed).items()}


@pytest.mark.parametrize(("tensor", "says"), [
    (torch.zeros(1).expand(1, 10**12, 32), "claim [\\d,]+ bytes, but the file has"),
    (torch.zeros(1, 4, 32).to_sparse(), "not dense"), (torch.zeros(1, 4, 32, device="meta"), "not dense"),
    (torch.quantize_per_tensor(torch.zeros(1, 4, 32), 1.0, 0, torch.quint8), "not dense|not a readable"),
    (torch.nested.nested_tensor([torch.zeros(4, 32)]), "not dense|not a readable")], ids=lambda x: "")
def test_a_tensor_is_what_it_claims_to_be(tmp_path, tensor, says):
    torch.save({"state_dict": checkpoint()}, tmp_path / "good.ckpt")
    read_published(tmp_path / "good.ckpt", 1)
    torch.save({"state_dict": checkpoint(pos_embed=tensor)}, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=rf"x\.ckpt: .*({says})"):
        read_published(tmp_path / "x.ckpt", 1)


@pytest.mark.parametrize("claimed", [
    {"depth": 10**9}, {"width": 2**30}, {"image_size": 2**40}, {"num_classes": 10**10}, {"in_context_len": 10**10},
    {"bottleneck": 10**10}, {"mlp_ratio": 100.0}])
def test_a_model_is_no_larger_than_its_file(tmp_path, claimed):
    weights = tiny_denoiser().state_dict()
    export(tmp_path, tiny_config(), weights, weights, {})
    load_denoiser(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    described["config"] |= claimed
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: too small for the model that .*config\.json"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize("text", [
    "[" * 10**5, "", "\ud800", "null", "[]", "{}", '{"denoiser": "jit", "config": 3}', "9" * 5000, *(
        json.dumps({"denoiser": "jit", "config": asdict(tiny_config()) | {name: value}})
        for name in ("image_size", "patch_size", "width", "depth", "heads") for value in (0, -1, 10**30, None, "1"))])
def test_a_description_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises((CheckpointError, ConfigError), match=r"config\.json"):
        load_denoiser(tmp_path)
