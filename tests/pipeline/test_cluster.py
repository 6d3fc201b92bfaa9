"""Which Ray a stage uses, and how what fails in its tasks comes back."""

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from pipeline import cluster, session
from pipeline.cluster import Cluster, attempt, check, connect, read_cluster, work_through
from pixelgen.config import ConfigError
from pixelgen.errors import StorageError, UserError
from pixelgen.store import LocalStore


@pytest.mark.parametrize(("address", "given"), [(None, "ours:1"), ("auto", "auto"), ("10.0.0.1:6379", "10.0.0.1:6379")])
def test_without_an_address_no_other_ray_is_joined(monkeypatch, address, given):
    """Left to itself, ray.init joins whatever was last started on the machine."""
    seen = []
    monkeypatch.setattr(ray, "init", lambda address, **options: seen.append(address) or contextlib.nullcontext())
    monkeypatch.setattr(session, "joined", lambda: contextlib.nullcontext("ours:1"))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with connect(Cluster(address, 1, 1.0, 0.0, 1, 0, 1, "self")):
        assert seen == [given]


@pytest.mark.parametrize(("gpus", "lanes", "ranks", "device"), [
    (0, 2, 2, "cpu"), (0, 3, 1, "cpu"), (1, 2, 1, "cuda"), (8, 32, 8, "cuda"), (8, 4, 4, "cuda"), (6, 8, 4, "cuda")])
def test_the_local_cluster_is_what_the_machine_has(monkeypatch, gpus, lanes, ranks, device):
    monkeypatch.setattr(cluster, "visible_gpus", lambda: gpus)
    monkeypatch.delenv("PIXELGEN_CLUSTER", raising=False)
    local = read_cluster()
    assert (local.ranks(lanes), local.device, local.actors) == (ranks, device, gpus or 2)
    assert local.resources == {"CPU": 0.5} | ({"GPU": 1.0} if gpus else {})


def test_what_a_cluster_file_states_is_taken_at_its_word(monkeypatch):
    monkeypatch.setattr(cluster, "visible_gpus", lambda: 8)
    stated = Cluster(None, 3, 1.0, 0.0, 1, 0, 1, None)
    assert (stated.ranks(6), stated.device, stated.actors) == (3, "cpu", 3)
    with pytest.raises(ConfigError, match="fit.lanes 8 cannot be shared out evenly among 3 workers"):
        stated.ranks(8)
    for workers, gpus in ((None, 1.0), (1, None)):
        with pytest.raises(ConfigError, match="null means those of this machine"):
            Cluster("auto", workers, 1.0, gpus, 1, 0, 1, "self")


@pytest.mark.parametrize(("readers", "gpus", "cpus", "reading"), [
    ("self", 8, 16, ("self", 0)), ("processes(3)", 0, 16, ("processes", 3)), ("tasks(12)", 0, 16, ("tasks", 12)),
    (None, 0, 16, ("self", 0)), (None, 2, 16, ("processes", 16 // 2 - 3)), (None, 16, 16, ("processes", 1)),
    (None, 1, 192, ("processes", 16))])
def test_who_decodes(monkeypatch, readers, gpus, cpus, reading):
    monkeypatch.setattr(cluster, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cpus))
    assert Cluster(None, None, 1.0, None, 3, 0, 1, readers).reading == reading


@pytest.mark.parametrize(("address", "readers", "told"), [
    (None, "ray(3)", r"readers 'ray.3.': expected self, processes.N. or tasks.N."),
    (None, "tasks(0)", "whole number N of at least 1"),
    ("auto", None, "readers: null means this machine's processors")])
def test_readers_are_what_they_can_be(address, readers, told):
    with pytest.raises(ConfigError, match=told):
        Cluster(address, 1, 1.0, 1.0, 1, 0, 1, readers)


def passed_on(work):
    """What the driver sees of some work in a task, which tells of it by plain data."""
    return check(json.loads(json.dumps(attempt(work))))


@pytest.mark.parametrize("error", [StorageError("the disk is full"), ConfigError("too large")])
def test_what_the_user_can_mend_comes_back_in_its_own_words(error, capsys):
    def work():
        raise error

    with pytest.raises(UserError) as raised:
        passed_on(work)
    assert str(raised.value) == str(error)
    assert isinstance(raised.value, StorageError) is isinstance(error, StorageError)
    assert "Traceback" in capsys.readouterr().err
    passed_on(lambda: None)


def test_a_bug_in_a_task_comes_back_with_its_traceback():
    def work():
        return [*zip([1], [], strict=True)]

    with pytest.raises(RuntimeError) as raised:
        passed_on(work)
    assert "in work\n" in str(raised.value)
    assert str(raised.value).endswith("ValueError: zip() argument 2 is shorter than argument 1\n")


class Refuse:
    """Does no part."""

    def __call__(self, part):
        raise StorageError(f"no room for {part['name']}")


def stop_early():
    """Parts that fail, while the thread that fetches their outcomes is slow to fetch the second one."""
    from ray.data._internal.block_batching import util

    ask, asked, end, left = util._calculate_ref_hits, [], ray.shutdown, []

    def ask_slowly(refs):
        asked.append(refs)
        time.sleep(3 if len(asked) > 1 else 0)
        return ask(refs)

    def shutdown():
        left.extend(thread.name for thread in threading.enumerate() if thread.name == "iter_threaded")
        end()

    util._calculate_ref_hits, ray.shutdown = ask_slowly, shutdown
    try:
        work_through([{"name": f"part {i}"} for i in range(6)], Refuse, (), Cluster(None, 2, 1.0, 0.0, 1, 0, 1, None),
                     "test", LocalStore(Path("none")))
    except StorageError as error:
        print(f"{error}; fetched {len(asked)}; left behind: {left}")


def test_the_first_part_that_fails_ends_what_ray_data_is_at():
    """A thread of it that finds Ray gone may end the process before a word is said."""
    done = subprocess.run([sys.executable, "-c", "from tests.pipeline.test_cluster import stop_early; stop_early()"],
                          capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("no room")]  # Ray may have a word, too
    assert [re.sub("part [01]", "part", line) for line in said] == ["no room for part; fetched 2; left behind: []"], \
        done.stdout + done.stderr
