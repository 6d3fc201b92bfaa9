"""Where things lie that git does not carry, in a checkout and in an experiment of DVC's queue."""

from pathlib import Path

import pytest

from pipeline.checkout import data_path, main_checkout, runs


@pytest.fixture(params=["tmp0abc", "standalone/tmp0abc"])
def experiment(tmp_path, request):
    """A main checkout with data, and the folder of an experiment in it."""
    (tmp_path / "data").mkdir()
    folder = tmp_path / ".dvc/tmp/exps" / request.param
    folder.mkdir(parents=True)
    return folder


def test_a_checkout_is_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (main_checkout(), runs(), data_path("data/x")) == (Path(), Path("runs"), Path("data/x"))


@pytest.mark.parametrize("below", ["", "deeper"])
def test_an_experiment_has_the_data_and_the_runs_of_its_main_checkout(experiment, tmp_path, monkeypatch, below):
    (experiment / below).mkdir(exist_ok=True)
    monkeypatch.chdir(experiment / below)
    assert (main_checkout(), runs(), data_path("data")) == (tmp_path, tmp_path / "runs", tmp_path / "data")
    assert data_path("/absolute") == Path("/absolute")
    Path("data").mkdir()
    assert data_path("data") == Path("data"), "what git carries is the experiment's own"
