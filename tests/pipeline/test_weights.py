"""The published files: how they are fetched, checked, and loaded; a server on loopback stands in for their hosts."""

import dataclasses
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import vgg16

from pipeline.download import download
from pipeline.params import WeightsParams
from pipeline.stages import weights
from pixelgen.encoders import inception as inception_module
from pixelgen.encoders.dino import load_dino
from pixelgen.encoders.lpips import load_lpips
from pixelgen.encoders.text import load_text_encoder
from pixelgen.errors import StorageError

VGG = weights.FILES["lpips"][0]
CONTENT = b"some published weights" * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()  # as `git hash-object` has it


class Host(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        self.answer()
        self.wfile.write(CONTENT[:100] if self.path.startswith("/cut") else CONTENT)

    def do_HEAD(self):
        self.answer()

    def answer(self):
        redirected = self.path.startswith(("/hub/large", "/hub/moved"))
        self.send_response(307 if redirected else 200)
        if self.path.startswith("/hub/large"):  # to a storage that names the file otherwise
            self.send_header("X-Linked-Etag", f'"{HASH}"')
            self.send_header("Location", "/storage")
        elif redirected:
            self.send_header("Location", "/hub/small")
        elif self.path.startswith("/hub/small"):
            self.send_header("ETag", f'"{BLOB}"')
        elif self.path.startswith("/hub/other"):
            self.send_header("ETag", f'"{BLOB[::-1]}"')
        self.send_header("Content-Length", "0" if redirected else str(len(CONTENT)))
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def host():
    server = HTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_download_is_checked_against_the_published_hash(host, tmp_path):
    assert weights.obtain(weights.File(f"{host}/model-{HASH[:8]}.pth", HASH[:8]), None, tmp_path / "a") == HASH
    assert (tmp_path / "a").read_bytes() == CONTENT
    with pytest.raises(StorageError, match="has hash .* but deadbeef"):
        weights.obtain(weights.File(f"{host}/model.pth", "deadbeef"), None, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_file_of_the_hub_is_checked_against_the_hash_its_host_states(host, tmp_path):
    for size in ("large", "small", "moved"):
        assert weights.obtain(weights.File(f"{host}/hub/{size}/model.safetensors"), None, tmp_path / "a") == HASH
    with pytest.raises(StorageError, match=f"has hash {BLOB}, but {BLOB[::-1]}"):
        weights.obtain(weights.File(f"{host}/hub/other/config.json"), None, tmp_path / "a")
    with pytest.raises(StorageError, match="states no hash"):
        weights.obtain(weights.File(f"{host}/model.safetensors", None), None, tmp_path / "b")


@pytest.mark.parametrize(("path", "says"), [("missing", "cannot be downloaded"), ("cut", "ended after 100 of")])
def test_a_failed_download_says_what_to_do(host, tmp_path, path, says):
    with pytest.raises(StorageError, match=says):
        weights.obtain(weights.File(f"{host}/{path}/model.pth", HASH), None, tmp_path / "a")


def test_a_full_disk_is_not_the_host_s_fault(host, tmp_path):
    with pytest.raises(StorageError, match=r"^/dev/full: No space left on device: make room"):
        download(f"{host}/model.pth", Path("/dev/full"), "a remedy")


def test_a_missing_local_file_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"lpips/vgg16-397923af\.pth is missing: put the file from https"):
        weights.obtain(VGG, str(tmp_path), tmp_path / "lpips" / "a")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of the published names and formats, with random weights."""
    path = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    for name in ("dino", "lpips", "inception"):
        (path / name).mkdir()
    dino = timm.create_model("vit_base_patch14_dinov2", num_classes=0)
    save_file({k: v.contiguous() for k, v in dino.state_dict().items()}, path / "dino/model.safetensors")
    torch.save(vgg16(weights=None).state_dict(), path / "lpips" / VGG.name)
    (path / "inception" / inception_module.FILE).write_bytes(b"loaded by tests/pixelgen/test_inception.py")
    return path


def test_published_files_become_what_the_encoders_load(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FILES", {name: [dataclasses.replace(f, sha256=None) for f in files]
                                            for name, files in weights.FILES.items()})
    networks = ("dino", "lpips", "inception")
    facts = weights.write_networks(tmp_path, WeightsParams("published", networks, str(folder), 0))
    assert len(facts["sources"]) == 3 and all(len(h) == 64 for h in facts["sources"].values())
    assert {p.name for p in tmp_path.iterdir()} == set(networks)
    assert json.loads((tmp_path / "lpips/config.json").read_text()) == {"net": "vgg"}
    dino = load_dino(tmp_path / "dino", grid=16)
    assert (dino.width, dino.depth) == (768, 12)
    stored = torch.load(folder / "lpips" / VGG.name, weights_only=True)
    trunk = load_file(tmp_path / "lpips/trunk.safetensors")
    assert trunk and all(torch.equal(trunk[k], stored[k]) for k in trunk)
    metric = load_lpips(tmp_path / "lpips").metric
    assert torch.equal(metric.net.slice5[-2].weight, stored["features.28.weight"])


def test_a_file_with_the_right_name_and_other_content_is_refused(folder, tmp_path):
    (tmp_path / "lpips").mkdir()
    with pytest.raises(StorageError, match=r"vgg16-397923af\.pth has hash"):
        weights.obtain(VGG, str(folder), tmp_path / "lpips" / "vgg.pth")
    assert weights.FILES["inception"][0].sha256 == inception_module.SHA256
    assert weights.FILES["mask2former"][0].sha256 == "743b7d99"
    assert "/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/" in weights.FILES[
        "mask2former"][0].url, "where mmdet 2 has put it; its successor has other weights there"


def test_every_network_has_files_and_the_demo_its_own():
    networks = set(get_args(get_args(get_type_hints(WeightsParams)["networks"])[0]))
    assert {*weights.FILES} == {*weights.PREPARE} == networks - {"digits"}
    assert {*weights.DEMO} == networks - {"inception", "mask2former", "clip"}
    for files in weights.FILES.values():
        for file in files:
            assert file.url.startswith("https://") and (file.sha256 or len(file.url.split("/resolve/")[1][:40]) == 40)


def test_the_demo_s_text_encoder_is_loaded_by_the_code_of_the_real_one(tmp_path):
    weights.write_text(tmp_path, seed=0)
    encoder = load_text_encoder(tmp_path, 16)
    features = encoder(["a photo of a red circle left of a blue square", "A photo of two crosses", ""])
    assert features.shape == (3, 16, encoder.width) and features.isfinite().all()
    assert encoder.tokenizer.tokenize("a photo of a red circle") == ["a", "Ġphoto", "Ġof", "Ġa", "Ġred", "Ġcircle"]
    weights.write_text(tmp_path / "again", seed=0)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
