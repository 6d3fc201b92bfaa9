"""The shard stage without Ray."""

import dataclasses
import sys
from pathlib import Path

import pytest

from pipeline.datasets.work import read_report, write_job
from pipeline.params import DatasetParams, StorageParams
from pipeline.stages import shard
from pixelgen.manifest import read_manifest


@pytest.fixture
def shard_stage(tmp_path, monkeypatch):
    """Runs the stage on changed parameters in an empty working directory, its tasks one after another."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["shard", "name"])
    whole = dataclasses.make_dataclass("P", ["datasets", "storage"])
    monkeypatch.setattr(shard, "resolved_params", lambda stage: whole(chosen, StorageParams(None)))
    monkeypatch.setattr(shard, "read_cluster", lambda: None)
    chosen: dict[str, DatasetParams] = {}
    written: list[str] = []
    stop_after: list[int] = []

    def one_by_one(jobs, params, cluster, storage, run):
        for job in jobs:
            if read_report(storage, run, job.name) is None:
                if stop_after and len(written) == stop_after[0]:
                    raise KeyboardInterrupt
                written.append(job.name)
                write_job(job, params, storage, run)
            yield job.name, read_report(storage, run, job.name)

    monkeypatch.setattr(shard, "write_missing", one_by_one)

    def run(params, stop=None):
        chosen["name"] = params
        written.clear()
        stop_after[:] = [] if stop is None else [stop]
        shard.main()
        return read_manifest(Path("out/shard/name"), "dataset")

    run.written = written
    return run
