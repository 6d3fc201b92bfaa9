"""The published files: how they are fetched, checked, and loaded; a server on loopback stands in for their hosts."""

import dataclasses
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import vgg16

from pipeline.stages import weights
from pipeline.storage import StorageError
from pixelgen.encoders import inception as inception_module
from pixelgen.encoders.dino import load_dino
from pixelgen.encoders.lpips import load_lpips

CONTENT = b"some published weights" * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()


class Host(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/missing"):
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        if self.path.startswith("/hub"):
            self.send_header("ETag", f'"{HASH}"')
        self.end_headers()
        self.wfile.write(CONTENT[:100] if self.path.startswith("/cut") else CONTENT)

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
    with pytest.raises(StorageError, match="has sha256 .* but deadbeef"):
        weights.obtain(weights.File(f"{host}/model.pth", "deadbeef"), None, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_file_of_the_hub_is_checked_against_the_hash_its_host_states(host, tmp_path):
    assert weights.obtain(weights.File(f"{host}/hub/model.safetensors", None), None, tmp_path / "a") == HASH
    with pytest.raises(StorageError, match="states no sha256"):
        weights.obtain(weights.File(f"{host}/model.safetensors", None), None, tmp_path / "b")


@pytest.mark.parametrize(("path", "says"), [("missing", "cannot be downloaded"), ("cut", "ended after 100 of")])
def test_a_failed_download_says_what_to_do(host, tmp_path, path, says):
    with pytest.raises(StorageError, match=says):
        weights.obtain(weights.File(f"{host}/{path}/model.pth", HASH), None, tmp_path / "a")


def test_a_missing_local_file_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"vgg16-397923af\.pth is missing: put the file from https"):
        weights.obtain(weights.VGG, str(tmp_path), tmp_path / "a")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files of the published names and formats, with random weights."""
    path = tmp_path_factory.mktemp("published")
    torch.manual_seed(0)
    dino = timm.create_model("vit_base_patch14_dinov2", num_classes=0)
    save_file({k: v.contiguous() for k, v in dino.state_dict().items()}, path / weights.DINO.name)
    torch.save(vgg16(weights=None).state_dict(), path / weights.VGG.name)
    (path / weights.INCEPTION.name).write_bytes(b"loaded by tests/pixelgen/test_inception.py")
    return path


def test_published_files_become_what_the_encoders_load(folder, tmp_path, monkeypatch):
    for name in ("VGG", "INCEPTION"):
        monkeypatch.setattr(weights, name, dataclasses.replace(getattr(weights, name), sha256=None))
    facts = weights.write_published(tmp_path, str(folder))
    assert len(facts["sources"]) == 3 and all(len(h) == 64 for h in facts["sources"].values())
    assert json.loads((tmp_path / "lpips/config.json").read_text()) == {"net": "vgg"}
    dino = load_dino(tmp_path / "dino", grid=16)
    assert (dino.width, dino.depth) == (768, 12)
    stored = torch.load(folder / weights.VGG.name, weights_only=True)
    trunk = load_file(tmp_path / "lpips/trunk.safetensors")
    assert trunk and all(torch.equal(trunk[k], stored[k]) for k in trunk)
    metric = load_lpips(tmp_path / "lpips").metric
    assert torch.equal(metric.net.slice5[-2].weight, stored["features.28.weight"])


def test_a_file_with_the_right_name_and_other_content_is_refused(folder, tmp_path):
    with pytest.raises(StorageError, match=r"vgg16-397923af\.pth has sha256"):
        weights.obtain(weights.VGG, str(folder), tmp_path / "vgg.pth")
    assert weights.INCEPTION.sha256 == inception_module.SHA256
