"""Which Ray a stage uses, and how what fails in its tasks comes back."""

import os

import pytest
import ray

from pipeline import cluster
from pipeline.cluster import Cluster, attempt, check, connect
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
