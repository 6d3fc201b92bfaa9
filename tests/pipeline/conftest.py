"""The shard stage without Ray."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline.datasets.work import read_report, write_job
from pipeline.stage import Stage
from pipeline.stages import shard
from pipeline.storage import Storage
from pixelgen.manifest import read_manifest


@pytest.fixture
def shard_stage(tmp_path, monkeypatch):
    """Runs the stage on changed parameters in an empty working directory, its tasks one after another."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
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
        written.clear()
        stop_after[:] = [] if stop is None else [stop]
        shard.run(Stage("shard", "name", SimpleNamespace(datasets={"name": params}), None, Storage(None)))
        return read_manifest(Path("out/shard/name"), "dataset")

    run.written = written
    return run
