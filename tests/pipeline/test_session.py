"""The Ray of this machine that stages share: who joins it, what its workers are, where it listens, and how it ends."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline import session
from tests.e2e.workspace import LOOPBACK, interfaces

IDLE = 4.0  # seconds, instead of the usual ones
KEEPER = f"""
from pipeline import session
session.prepare()
session.IDLE = {IDLE}
place = session.folder()
keeper = open(place / "keeper", "a")
assert session.try_lock(keeper)
print(place, flush=True)
session.keep(place, keeper)
"""
STAGE = """
import json, os, sys
from pipeline.cluster import Cluster, connect

def look():
    before = [name in sys.modules for name in ("torch", "pipeline")]
    import pipeline
    return [*before, pipeline.__file__, os.environ["SECRET"]]

with connect(Cluster(None, 1, 1.0, 0.0, 1, 0, 1, None)) as context:
    import ray
    print(json.dumps([context.address_info["address"], *ray.get(ray.remote(num_cpus=0)(look).remote())]), flush=True)
    sys.stdin.read()
"""
PATIENCE = 200  # seconds that a busy machine may take for anything


@pytest.fixture
def start(tmp_path):
    """Starts a program in a folder and an environment that no other session has."""
    started = []

    def start(program):
        path = [os.getcwd(), os.environ.get("PYTHONPATH", "")]
        started.append(psutil.Popen(
            [sys.executable, "-c", program], cwd=tmp_path, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env=os.environ | {"SECRET": "told to workers", "PYTHONPATH": os.pathsep.join(filter(None, path))}))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def whole(process):
    return [process, *process.children(recursive=True)]


def living(processes):
    """Those that do not end."""
    return [(process.name(), process.cmdline(), process.status())
            for process in psutil.wait_procs(processes, PATIENCE)[1] if process.is_running()]


def address(keeper):
    """Wait until Ray's address is there."""
    path, deadline = Path(keeper.stdout.readline().strip()) / "address", time.monotonic() + PATIENCE
    while not path.exists():
        assert keeper.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_stages_share_a_ray_that_ends_by_itself(start):
    keeper = start(KEEPER)
    address(keeper)
    stages = [start(STAGE), start(STAGE)]
    told = [json.loads(stage.stdout.readline()) for stage in stages]
    assert told[0] == told[1], "one Ray for both"
    _, torch, ours, code, secret = told[0]
    assert torch and not ours, "a worker begins with torch, and with none of our code"
    assert code.startswith(os.getcwd()) and secret == "told to workers"
    assert "127.0.0.1" in (found := interfaces([*whole(keeper), *stages])) and found <= LOOPBACK
    stages[0].communicate()
    time.sleep(2 * IDLE)
    assert keeper.poll() is None, "it was in use"
    left = whole(keeper)
    assert len(left) > 4
    stages[1].kill()  # however a stage ends
    assert not living(left)


def test_nothing_outlives_a_keeper_that_is_killed(start):
    keeper = start(KEEPER)
    address(keeper)
    stage = start(STAGE)
    stage.stdout.readline()
    left = whole(keeper)
    assert {"raylet", "gcs_server"} < {process.name() for process in left} and len(left) > 6
    stage.kill()
    keeper.kill()
    assert not living(left)


def test_without_a_server_of_forks_a_worker_imports_what_it_needs(start):
    address(start("import contextlib\n" + KEEPER.replace("place =", "session.forks = contextlib.nullcontext; place =")))
    stage = start(STAGE)
    _, torch, *_, secret = json.loads(stage.stdout.readline())
    assert not torch and secret == "told to workers"


def test_a_keeper_whose_starter_was_killed_is_waited_for(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "environment", dict(os.environ) | {"RAY_TMPDIR": str(tmp_path)})
    keeper = tmp_path / "keeper"
    keeper.write_text("#!/bin/sh\nsleep 2\necho an address > $3/address\nsleep 2\n")
    keeper.chmod(0o700)
    monkeypatch.setattr(session, "sys", type("other", (), {"executable": str(keeper)}))
    place = session.folder()
    with open(place / "keeper", "a") as lock:
        assert session.try_lock(lock)
        session.start_keeper(place, lock)
    with session.joined() as address:
        assert address == "an address\n"


def test_who_comes_when_a_session_ends_waits_until_nobody_keeps_it(monkeypatch, tmp_path):
    class Keeper(contextlib.ExitStack):
        def __exit__(self, *_):
            with open(tmp_path / "users", "a") as users:
                ended.append(session.try_lock(users))

    ended = []
    monkeypatch.setattr(session, "forks", contextlib.nullcontext)
    monkeypatch.setattr(session, "start_ray", lambda: "an address")
    monkeypatch.setattr(session, "IDLE", 0.1)
    monkeypatch.setenv("PIXELGEN_FORKS", "")  # what it sets goes with the test
    session.keep(tmp_path, Keeper())
    assert ended == [False], "the lock of the users is held until the keeper's is free"


def test_what_differs_from_stage_to_stage_makes_no_other_session(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))

    def folder(**variables):
        monkeypatch.setattr(session, "environment", dict(os.environ) | variables)
        return session.folder()

    first = folder(DVC_STAGE="train@c2i")
    assert folder(DVC_STAGE="train@sft") == first and first.parent == tmp_path
    assert first.stat().st_mode & 0o777 == 0o700
    assert folder(AWS_ACCESS_KEY_ID="renewed") != first, "workers have the environment of their keeper"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert folder() != first


def test_every_stage_would_join_the_same_session(tmp_path):
    """Whatever the modules that it imports set in the environment."""
    stages = [path.stem for path in Path("pipeline/stages").glob("[a-z]*.py")]
    programs = [f"import pipeline.stage, pipeline.stages.{stage}; from pipeline import session; session.prepare(); "
                "print(session.folder().name)" for stage in stages]
    places = [subprocess.check_output([sys.executable, "-c", program], env=os.environ | {"RAY_TMPDIR": str(tmp_path)})
              for program in programs]
    assert len(stages) == 8 and len({*places}) == 1, dict(zip(stages, places, strict=True))


def test_what_keeps_ray_from_starting_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(session, "environment", dict(os.environ) | {"RAY_TMPDIR": str(tmp_path)})
    monkeypatch.setattr(session, "sys", type("other", (), {"executable": "false"}))
    with pytest.raises(session.StorageError, match="Ray did not start on this machine"), session.joined():
        pass


def test_a_ray_that_was_imported_too_early_is_noticed():
    """It would look for the session at another address than loopback, for ever."""
    program = "import ray; from pipeline import session; session.prepare()"
    environment = {name: value for name, value in os.environ.items() if name not in session.ENVIRONMENT}
    done = subprocess.run([sys.executable, "-c", program], env=environment, text=True, capture_output=True)
    assert "RuntimeError: ray was imported before the cluster was read" in done.stderr
