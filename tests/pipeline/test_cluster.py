"""Which Ray a stage uses, and how what fails in its tasks comes back."""

import os
import subprocess
import sys
import threading
import time

import pytest
import ray

from pipeline import cluster
from pipeline.cluster import Cluster, attempt, check, connect, work_through
from pipeline.store import StorageError


@pytest.mark.parametrize(("address", "given"), [(None, "local"), ("auto", "auto"), ("10.0.0.1:6379", "10.0.0.1:6379")])
def test_without_an_address_no_other_ray_is_joined(monkeypatch, address, given):
    """Left to itself, ray.init joins whatever was last started on the machine."""
    seen = []
    monkeypatch.setattr(ray, "init", lambda **options: seen.append(options["address"]))
    monkeypatch.setattr(cluster.os, "environ", dict(os.environ))
    connect(Cluster(address, 1, 1.0, 0.0, 1, 0))
    assert seen == [given]


@pytest.mark.parametrize("error", [StorageError("the disk is full"), ValueError("the disk is full")])
def test_what_stops_a_task_comes_back_in_its_own_words(error, capsys):
    def work():
        raise error

    with pytest.raises(StorageError, match="^the disk is full$"):
        check(attempt(work))
    assert "Traceback" in capsys.readouterr().err
    check(attempt(lambda: None))


def test_a_bug_in_a_task_is_raised():
    with pytest.raises(ZeroDivisionError):
        attempt(lambda: 1 / 0)


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
        work_through([{"name": f"part {i}"} for i in range(6)], Refuse, (), Cluster(None, 1, 1.0, 0.0, 1, 0), "test")
    except StorageError as error:
        print(f"{error}; fetched {len(asked)}; left behind: {left}")


def test_the_first_part_that_fails_ends_what_ray_data_is_at():
    """A thread of it that finds Ray gone may end the process before a word is said."""
    done = subprocess.run([sys.executable, "-c", "from tests.pipeline.test_cluster import stop_early; stop_early()"],
                          capture_output=True, text=True)
    assert done.stdout == "no room for part 0; fetched 2; left behind: []\n", done.stdout + done.stderr
