"""Faults while images are packed, one after another in the life of one run."""

import pytest

from tests.faults.table import fault
from tests.faults.workspace import UNFILLED, flip, mounted

STAGE = "shard"


def reports(workspace):
    return sorted(workspace.path.glob("runs/shard/*/reports/*.json"))


@fault("SIGTERM, as before a machine is taken away", "shard", "exit status 143; started again, it goes on")
@fault("kill -9 of the stage", "shard", "started again, it goes on with the images that are not packed")
@fault("a flipped bit in a report of finished work", "shard", "one line names it; started again, it alone is redone")
@fault("a flipped bit in a shard before the end", "shard", "started again, it is redone")
@fault("the disk is full", "shard", "one line names the file and says to make room; started again, it goes on")
def test_shard(workspace, fillable, identical):
    with workspace.started(workspace.call("shard")) as process:
        process.until(lambda: reports(workspace))
        assert process.terminate() == "finished work is kept"
    before = len(reports(workspace))
    with workspace.started(workspace.call("shard")) as process:
        process.until(lambda: len(reports(workspace)) > before)
        process.kill()
    before, kept = reports(workspace), len(workspace.outputs(workspace.kept, "shard"))
    assert 0 < len(before) < 20, "killed too late to show anything"
    flip(before[0])
    assert f"{before[0].name} of" in (line := workspace.refused("shard")) and "redo it alone" in line
    assert not before[0].exists() and reports(workspace) == before[1:]
    shards = sorted(workspace.path.glob("runs/shard/*/shards/*.parquet"))
    flip(shards[0])
    if fillable:
        runs = workspace.path / "runs/shard"
        inodes = sum(1 for _ in runs.rglob("*")) + 4
        with mounted(runs, f"size=1g,nr_inodes={inodes}"):  # bytes enough for what it asks first, but not for files
            line = workspace.refused("shard")
        assert f"{runs}/" in line and "No space left on device: make room" in line
    workspace.finish("shard")
    assert workspace.same("shard") == kept
    if not fillable:
        pytest.skip(UNFILLED)
    for _ in range(5):
        identical(f"{kept} files")
