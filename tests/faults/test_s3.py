"""Packing, training and drawing with storage on S3 that fails in between; tests/s3 has what each kind of failure does
to a single object, a server that hangs too."""

import json
import shutil

import pytest

from pipeline import store
from pipeline.storage import Storage
from pixelgen.manifest import read_manifest
from tests.e2e.workspace import edit, resolve
from tests.faults.table import fault
from tests.faults.test_sample import PARTS
from tests.faults.workspace import Workspace, build_empty
from tests.s3.proxy import error, reset, truncate

TOLD_ELSEWHERE = {"kind", "root", "files", "config", "versions", "hardware"}  # what `publish` writes by itself


@pytest.fixture
def remote(workspace, s3, faults, tmp_path):
    """A workspace whose weights have gone to the bucket."""
    remote = Workspace(build_empty(tmp_path / "work"), workspace.kept)
    root = f"{s3.url}/store"

    def change(params):
        params["storage"] = {"root": root}
        params["train"]["c2i"]["run"] |= {"checkpoint_every": 12, "keep_every": None}  # each is sent: few

    edit(remote.path, change)
    resolve(remote.path)
    store.client.cache_clear()
    shutil.copytree(workspace.kept / "out/networks", remote.out("networks"))
    manifest = read_manifest(remote.out("networks"), None)
    facts = {name: value for name, value in manifest.items() if name not in TOLD_ELSEWHERE}
    Storage(root).publish(remote.out("networks"), manifest["kind"], manifest["config"], **facts)
    yield remote
    store.client.cache_clear()


def same(workspace, output):
    """The number of files that the manifest of an output lists: those of the undisturbed run's."""
    here, kept = (json.loads((root / output / "manifest.json").read_text())["files"]
                  for root in (workspace.path, workspace.kept))
    assert here == kept
    return len(here)


@fault("S3: 503 SlowDown, broken connections, answers cut short", "shard, train, sample",
       "asked again; the stage goes on")
@fault("S3: the credentials expire", "train", "one line says to renew them; started again, it goes on")
def test_s3(remote, faults, identical):
    faults.add(error(503, "SlowDown"), "PUT", "/objects/", times=2)
    faults.add(reset, "PUT", "/reports/", times=2, after=3)
    faults.add(truncate, "GET", "/reports/", times=2)
    remote.finish("shard")
    packed = same(remote, "out/shard/digits")
    assert faults.count("PUT", "/reports/") > 2
    faults.clear()
    faults.add(error(503, "SlowDown"), "PUT", "/checkpoints/", times=2)
    faults.add(reset, "PUT", "/checkpoints/", times=2, after=3)
    faults.add(truncate, "GET", "/objects/", times=4)
    faults.add(error(403, "ExpiredToken"), path="step-00000036.pt")
    line = remote.refused("train", cluster="frail")
    assert "step-00000036.pt" in line and "the credentials have expired: renew them and run again" in line
    assert faults.count("PUT", "/checkpoints/") > 7
    faults.clear()
    remote.finish("train")
    assert faults.count("GET", "step-00000024.pt"), "it went on from the checkpoint before"
    expired = same(remote, "out/train/c2i/model")
    faults.add(error(503, "SlowDown"), "PUT", "/part-", times=2)
    faults.add(reset, "PUT", "/part-", times=2, after=3)
    faults.add(truncate, "GET", "/part-", times=2)
    remote.finish("sample")
    assert faults.count("PUT", "/part-") == PARTS + 4 and faults.count("GET", "/part-") == PARTS + 2
    identical(f"{packed + expired + same(remote, 'out/sample/c2i')} files")
    identical(f"{expired} files")
