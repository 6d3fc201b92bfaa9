"""Artifacts and resumable state on S3, and DVC's remote beside them: made in one workspace, used from another."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from pixelgen import PixelGen
from pixelgen.samplers.euler import Euler
from tests.e2e import workspace as at
from tests.s3.server import Bucket

MODEL = Path("out/train/c2i/model")


def tiny(bucket):
    """The class-conditional half of the demo, at sizes of seconds, kept under a root on S3."""
    def change(params):
        params["storage"] = {"root": f"{bucket.url}/store"}
        params["networks"] = {"digits": {"demo_digits": {}}}
        params["train"]["c2i"]["objective"] |= {"repa": {"weight": 0}, "lpips": {"weight": 0}, "pdino": {"weight": 0}}
        for section, kept in (("datasets", "digits"), ("train", "c2i"), ("sample", "c2i"), ("evaluate", "fid")):
            for key in [*params[section]]:
                if key != kept:
                    del params[section][key]
        params["train"]["c2i"]["fit"] |= {"steps": 12, "batch_size": 16}
        params["train"]["c2i"]["run"] |= {"checkpoint_every": 2, "log_every": 2, "grid_every": 6}
        params["train"]["c2i"]["run"]["grid_sampler"]["euler"]["steps"] = 1
        params["sample"]["c2i"] |= {"per_prompt": 2, "part_size": 7}
        params["sample"]["c2i"]["sampler"] = {"euler": {"steps": 2, "guidance": 2.5, "interval": [0.1, 1.0]}}
    return change


@pytest.fixture(scope="module")
def bucket(s3_endpoint):
    """A bucket that every process started from here finds by the environment."""
    bucket = Bucket(s3_endpoint, f"test-{secrets.token_hex(6)}")
    bucket.client().create_bucket(Bucket=bucket.name)
    before = dict(os.environ)
    os.environ.update(s3_endpoint.environment() | {"RAY_TMPDIR": tempfile.mkdtemp()})  # short: it holds sockets
    yield bucket
    shutil.rmtree(os.environ["RAY_TMPDIR"])
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def workspace(bucket, tmp_path_factory):
    path = at.make(tmp_path_factory.mktemp("remote") / "here", tiny(bucket))
    at.dvc(path, "remote", "add", "-d", "storage", f"{bucket.url}/dvc")
    commit(path, "parameters")
    return path


def commit(workspace, message):
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "add", "."], cwd=workspace, check=True)
    subprocess.run(["git", *identity, "commit", "-qm", message], cwd=workspace, check=True)


def python(workspace, *arguments):
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=workspace, env=at.environment(workspace), text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    return done.stdout


def names(bucket, prefix):
    pages = bucket.client().get_paginator("list_objects_v2").paginate(Bucket=bucket.name, Prefix=prefix)
    return [found["Key"] for page in pages for found in page.get("Contents", [])]


def test_the_workflow_leaves_manifests_here_and_the_rest_on_s3(workspace, bucket):
    at.dvc(workspace, "repro")
    for out in ("networks", "shard/digits", "reference/digits", "train/c2i/model", "sample/c2i"):
        assert sorted(p.name for p in (workspace / "out" / out).iterdir()) == ["identity", "manifest.json"]
    assert (workspace / "out/train/c2i/curve.csv").read_text().count("\n") == 7
    assert len([*(workspace / "out/train/c2i/grids").iterdir()]) == 2
    assert "data:image/png" in (workspace / "out/report/index.html").read_text()
    states = {name.split("/")[2] for name in names(bucket, "store/runs/")} - {""}  # of pyarrow's marker of a folder
    assert states == {"train", "sample", "evaluate"}, "finished shards and references leave nothing behind"
    assert "0 missing or changed, 0 orphans" in python(workspace, "pipeline.verify")


def test_the_secret_key_is_written_nowhere(workspace, bucket):
    """Neither into outputs, run states and manifests nor into what Ray notes down and logs."""
    secret, files = bucket.endpoint.secret_key.encode(), 0
    for folder in (workspace, Path(os.environ["RAY_TMPDIR"])):
        for path in folder.rglob("*"):
            if path.is_file():
                files += 1
                assert secret not in path.read_bytes(), path
    assert files > 100 and [*Path(os.environ["RAY_TMPDIR"]).rglob("raylet.out")]
    for name in names(bucket, "store/"):
        if name.endswith(".json"):
            body = bucket.client().get_object(Bucket=bucket.name, Key=name)["Body"].read()
            assert secret not in body, name


def test_another_machine_goes_on_where_a_killed_one_was(workspace, bucket):
    """The driver is killed, its directory lost; what another finds is on S3."""
    manifest = workspace / MODEL / "manifest.json"
    undisturbed = json.loads(manifest.read_text())["files"]
    curve = (workspace / "out/train/c2i/curve.csv").read_text()
    for key in names(bucket, "store/runs/train"):
        bucket.client().delete_object(Bucket=bucket.name, Key=key)
    shutil.rmtree(workspace / "runs")
    manifest.unlink()
    process = subprocess.Popen([sys.executable, "-m", "pipeline", "train", "c2i"], cwd=workspace,
                               env=at.environment(workspace), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not any(name.endswith(".json") for name in names(bucket, "store/runs/train")):
            assert process.poll() is None and time.monotonic() < deadline, "no checkpoint arrived"
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    (workspace / "runs").rename(workspace / "lost")  # its ranks may live on for a moment, on that machine
    found = [name for name in names(bucket, "store/runs/train") if name.endswith(".pt")]
    assert found and not any("00000012" in name for name in found), "killed too late to show anything"
    python(workspace, "pipeline", "train", "c2i")
    assert json.loads(manifest.read_text())["files"] == undisturbed
    assert at.unmeasured((workspace / "out/train/c2i/curve.csv").read_text()) == at.unmeasured(curve)


def test_a_clone_pulls_everything_and_has_nothing_to_run(workspace, bucket, tmp_path):
    at.dvc(workspace, "push")
    commit(workspace, "a run")
    clone = tmp_path / "there"
    subprocess.run(["git", "clone", "-q", workspace, clone], check=True)
    at.dvc(clone, "pull")
    assert "Data and pipelines are up to date." in at.dvc(clone, "repro")
    model = python(clone, "pipeline.fetch", str(MODEL), "--to", "model").split()[-1]
    drawn = PixelGen.from_pretrained(clone / model).generate([3, 7], [0, 1], Euler(2))
    assert drawn.shape == (2, 32, 32, 3) and drawn.dtype == np.uint8
    assert "0 missing or changed" in python(clone, "pipeline.verify")


def test_an_experiment_is_a_version_to_compare_with(workspace):
    at.dvc(workspace, "exp", "run", "-S", "sample.c2i.sampler.euler.guidance=1.0")
    changes = json.loads(at.dvc(workspace, "metrics", "diff", "--json"))
    figures = changes["metrics/fid.json"]
    assert "fd_digits" in figures and figures["sampler.euler.guidance"]["new"] == 1.0
    assert "train@c2i" not in at.dvc(workspace, "status")
