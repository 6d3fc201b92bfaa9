"""Ray's dashboard and job interface, as the README starts them: on loopback, and closed without the token."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from pipeline.session import ENVIRONMENT
from pixelgen.manifest import read_manifest
from tests.e2e.workspace import join
from tests.faults.workspace import build_empty

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
PORTS = ("port", "ray-client-server-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
         "metrics-export-port", "runtime-env-agent-port")  # each has one of its own, which another Ray may hold


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def head():
    """A head node with a dashboard: its address, and the environment of those who know the token."""
    with tempfile.TemporaryDirectory() as folder:
        token = secrets.token_hex(32)
        (Path(folder) / "token").write_text(token)
        environment = {**os.environ, **ENVIRONMENT, "RAY_AUTH_MODE": "token", "RAY_TMPDIR": folder,
                       "RAY_AUTH_TOKEN_PATH": f"{folder}/token"}
        dashboard = free_port()
        free = [f"--{name}={free_port()}" for name in PORTS]
        process = subprocess.Popen(
            [RAY, "start", "--head", "--block", f"--dashboard-port={dashboard}", "--num-cpus=2", *free,
             "--node-ip-address=127.0.0.1"], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            started = next((line for line in process.stdout if "Ray runtime started" in line), None)
            assert started, "the head did not start"
            yield process, f"http://127.0.0.1:{dashboard}", environment, token
        finally:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGTERM)
            process.communicate()
            psutil.wait_procs(children, 30)


def test_nothing_listens_beyond_this_machine(head):
    process, *_ = head
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    bound = {(c.laddr.ip, p.name()) for p in tree for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert len(bound) > 3 and {ip.removeprefix("::ffff:") for ip, _ in bound} <= {"127.0.0.1", "::1"}, bound


@pytest.mark.parametrize("path", ["/api/jobs/", "/api/version", "/api/actors/kill"])
def test_without_the_token_there_is_no_answer(head, path):
    _, address, _, token = head
    for header in ({}, {"Authorization": "Bearer " + "0" * 64}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(address + path, headers=header), timeout=30)
        assert refused.value.code in (401, 403)
    if path == "/api/version":
        known = urllib.request.Request(address + path, headers={"Authorization": f"Bearer {token}"})
        assert urllib.request.urlopen(known, timeout=30).status == 200


def test_a_job_needs_the_token(head, tmp_path):
    _, address, environment, _ = head
    job = [RAY, "job", "submit", "--address", address, "--", sys.executable, "-c", "print('it ran')"]
    (tmp_path / "token").write_text("0" * 64)
    stranger = environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    refused = subprocess.run(job, env=stranger, cwd=ROOT, text=True, capture_output=True)
    assert refused.returncode != 0 and "it ran\n" not in refused.stdout
    for _ in range(60):  # the node's agent, which starts jobs, is up some seconds after the head
        done = subprocess.run(job, env=environment, cwd=ROOT, text=True, capture_output=True)
        if "No available agent" not in done.stderr:
            break
        time.sleep(1)
    assert done.returncode == 0 and "it ran\n" in done.stdout, done.stdout + done.stderr


def test_a_stage_runs_as_a_job(head, tmp_path):
    """As the README submits it: in a checkout that the cluster sees, on the Ray that is there."""
    _, address, environment, _ = head
    workspace = build_empty(tmp_path / "work")
    join(workspace, "joined", "auto")
    stage = f"cd {workspace} && PIXELGEN_CLUSTER=joined {sys.executable} -m pipeline shard digits"
    done = subprocess.run([RAY, "job", "submit", "--address", address, "--", "bash", "-c", stage],
                          env=environment, cwd=tmp_path, text=True, capture_output=True)
    assert done.returncode == 0 and "part 1 of " in done.stdout, done.stdout + done.stderr
    assert read_manifest(workspace / "out/shard/digits", "dataset")["quarantined"] == 0
