"""The published files: how they are fetched, checked, and loaded; a server on loopback stands in for their hosts."""

import dataclasses
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torchvision.models import vgg16

from pipeline import session
from pipeline.cluster import Cluster
from pipeline.demo.networks import DemoText
from pipeline.download import download
from pipeline.networks import Network, default_networks
from pipeline.networks.inception import InceptionV3
from pipeline.networks.mask2former import Mask2FormerSwinS
from pipeline.networks.published import File, Published
from pipeline.networks.vgg16 import LpipsVgg16
from pipeline.stage import Stage
from pipeline.stages import networks
from pipeline.storage import Storage
from pixelgen.encoders import inception as inception_module
from pixelgen.encoders.dino import load_dino
from pixelgen.encoders.lpips import load_lpips
from pixelgen.encoders.text import load_text_encoder
from pixelgen.errors import StorageError
from pixelgen.manifest import read_manifest
from pixelgen.metrics import detector

VGG = LpipsVgg16.files[0]
CONTENT = b"some published weights" * 1000
HASH = hashlib.sha256(CONTENT).hexdigest()
BLOB = hashlib.sha1(b"blob %d\0" % len(CONTENT) + CONTENT).hexdigest()  # as `git hash-object` has it


def obtain(file, target, directory=None):
    return LpipsVgg16(directory).obtain(file, target)


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
    assert obtain(File(f"{host}/model-{HASH[:8]}.pth", HASH[:8]), tmp_path / "a") == HASH
    assert (tmp_path / "a").read_bytes() == CONTENT
    with pytest.raises(StorageError, match="has hash .* but deadbeef"):
        obtain(File(f"{host}/model.pth", "deadbeef"), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_file_of_the_hub_is_checked_against_the_hash_its_host_states(host, tmp_path):
    for size in ("large", "small", "moved"):
        assert obtain(File(f"{host}/hub/{size}/model.safetensors"), tmp_path / "a") == HASH
    with pytest.raises(StorageError, match=f"has hash {BLOB}, but {BLOB[::-1]}"):
        obtain(File(f"{host}/hub/other/config.json"), tmp_path / "a")
    with pytest.raises(StorageError, match="states no hash"):
        obtain(File(f"{host}/model.safetensors", None), tmp_path / "b")


@pytest.mark.parametrize(("path", "says"), [("missing", "cannot be downloaded"), ("cut", "ended after 100 of")])
def test_a_failed_download_says_what_to_do(host, tmp_path, path, says):
    with pytest.raises(StorageError, match=says):
        obtain(File(f"{host}/{path}/model.pth", HASH), tmp_path / "a")


def test_a_full_disk_is_not_the_host_s_fault(host, tmp_path):
    with pytest.raises(StorageError, match=r"^/dev/full: No space left on device: make room"):
        download(f"{host}/model.pth", Path("/dev/full"), "a remedy")


def test_a_missing_local_file_is_named(tmp_path):
    with pytest.raises(StorageError, match=r"vgg16-397923af\.pth is missing: put the file from https.* there, or set "
                                           r"networks\.lpips\.lpips_vgg16\.directory to null"):
        obtain(VGG, tmp_path / "a", str(tmp_path))


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
    for role, network in default_networks().items():
        monkeypatch.setattr(type(network), "files", [dataclasses.replace(f, sha256=None) for f in network.files])
        (tmp_path / role).mkdir()
        facts = dataclasses.replace(network, directory=str(folder / role)).make(tmp_path / role)
        (digest,) = facts["sources"].values()
        assert [*facts["sources"]] == [network.files[0].url] and len(digest) == 64
    assert (tmp_path / "inception/model.pth").is_file()
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
        obtain(VGG, tmp_path / "lpips" / "vgg.pth", str(folder / "lpips"))
    (inception,), (mask2former,) = InceptionV3.files, Mask2FormerSwinS.files
    assert (inception.name, inception.sha256) == (inception_module.FILE, inception_module.SHA256)
    assert (mask2former.name, mask2former.sha256) == (detector.FILE, detector.SHA256)
    assert "/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco/" in mask2former.url, (
        "where mmdet 2 has put it; its successor has other weights there")


@pytest.mark.parametrize("kind", Network.kinds)
def test_every_network_is_published_or_made_here_for_a_role(kind):
    network = Network.of(kind)()
    assert network.kind == kind and network.role.isidentifier()
    assert isinstance(network, Published) == (not kind.startswith("demo_"))
    for file in network.files if isinstance(network, Published) else ():
        assert file.url.startswith("https://") and (file.sha256 or len(file.url.split("/resolve/")[1][:40]) == 40)


@dataclasses.dataclass(frozen=True)
class Toy(Network):
    role = "toy"

    accuracy: float = 1.0

    def make(self, folder):
        (folder / "file").write_text("here")
        return {"accuracy": self.accuracy}


def test_the_stage_fills_a_folder_for_each_role(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(Network.kinds, "toy", f"{__name__}:Toy")
    monkeypatch.setattr(session, "begin", lambda: None)
    cluster = Cluster(None, 1, 0.5, 0, 1, 0, 1, None)
    networks.run(Stage("networks", "", SimpleNamespace(networks={"toy": Toy()}), cluster, Storage(None)))
    manifest = read_manifest(tmp_path / "out/networks", "networks")
    assert manifest["config"] == {"toy": {"toy": {"accuracy": 1.0}}}
    assert manifest["made"] == {"toy": {"kind": "toy", "accuracy": 1.0}}
    assert [f["path"] for f in manifest["files"]] == ["toy/file"]


def test_the_demo_s_text_encoder_is_loaded_by_the_code_of_the_real_one(tmp_path):
    DemoText(0).make(tmp_path)
    encoder = load_text_encoder(tmp_path, 16)
    features = encoder(["a photo of a red circle left of a blue square", "A photo of two crosses", ""])
    assert features.shape == (3, 16, encoder.width) and features.isfinite().all()
    assert encoder.tokenizer.tokenize("a photo of a red circle") == ["a", "Ġphoto", "Ġof", "Ġa", "Ġred", "Ġcircle"]
    (tmp_path / "again").mkdir()
    DemoText(0).make(tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
