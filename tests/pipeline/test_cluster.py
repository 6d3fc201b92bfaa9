"""Which Ray a stage uses, and how what fails in its tasks comes back."""

import json
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
from pixelgen.config import ConfigError
from pixelgen.errors import UserError


@pytest.mark.parametrize(("address", "given"), [(None, "local"), ("auto", "auto"), ("10.0.0.1:6379", "10.0.0.1:6379")])
def test_without_an_address_no_other_ray_is_joined(monkeypatch, address, given):
    """Left to itself, ray.init joins whatever was last started on the machine."""
    seen = []
    monkeypatch.setattr(ray, "init", lambda **options: seen.append(options["address"]))
    monkeypatch.setattr(cluster.os, "environ", dict(os.environ))
    connect(Cluster(address, 1, 1.0, 0.0, 1, 0))
    assert seen == [given]


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
        work_through([{"name": f"part {i}"} for i in range(6)], Refuse, (), Cluster(None, 1, 1.0, 0.0, 1, 0), "test")
    except StorageError as error:
        print(f"{error}; fetched {len(asked)}; left behind: {left}")


def test_the_first_part_that_fails_ends_what_ray_data_is_at():
    """A thread of it that finds Ray gone may end the process before a word is said."""
    done = subprocess.run([sys.executable, "-c", "from tests.pipeline.test_cluster import stop_early; stop_early()"],
                          capture_output=True, text=True)
    assert done.stdout == "no room for part 0; fetched 2; left behind: []\n", done.stdout + done.stderr
