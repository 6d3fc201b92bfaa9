"""Faults in the middle of training. Each test goes on from a checkpoint of the undisturbed run; whatever checkpoint it
leaves has to be the one of that run."""

import contextlib

import pytest

from tests.e2e.workspace import LOOPBACK, interfaces
from tests.faults.checkpoints import checkpoints, newer, newest, rank_0, same_checkpoints
from tests.faults.table import fault
from tests.faults.workspace import UNFILLED, fill, flip, make_room, mounted

STAGE = "train"


def goes_on(process, workspace, step):
    """Wait until training has gone on from a step, and saved more."""
    process.until(lambda: f"training goes on from step {step}\n" in process.printed())
    process.until(newer(workspace, than=step))


@fault("the stage is started twice", "train", "the second says which process holds the run, and waits")
@fault("kill -9 of rank 1", "train", "Ray Train starts the ranks anew, from the newest checkpoint")
@fault("kill -9 of rank 0, which writes", "train", "the same")
@fault("the disk is full", "train", "one line names the file and says to make room; started again, it goes on")
@fault("kill -9 of the stage", "train", "started again, it goes on from the newest checkpoint")
@fault("a flipped bit in the newest checkpoint", "train", "it is put aside, training goes on from the one before")
def test_what_ranks_the_disk_and_the_stage_may_suffer(workspace, fillable, identical):
    workspace.begin(STAGE, 6)
    runs = workspace.path / "runs"
    with (mounted(runs, "size=2g") if fillable else contextlib.nullcontext(),
          workspace.started(workspace.call(STAGE)) as process):
        process.until(lambda: (workspace.run_directory(STAGE) / "driver.lease").read_text().startswith(
            f"{process.popen.pid} "))
        with workspace.started(workspace.call(STAGE)) as second:
            second.until(lambda: f"waiting for process {process.popen.pid}, " in second.printed())
        goes_on(process, workspace, 6)
        assert process.ray("RayTrainWorker") and interfaces(one for one, _ in process.others()) <= LOOPBACK
        for victim in (False, True):
            before, writer = newest(workspace), rank_0(workspace)
            (killed,) = (p for p in process.ray("RayTrainWorker") if (p.pid == writer) == victim)
            killed.kill()
            # until then the one before may still finish a checkpoint
            process.until(lambda writer=writer: rank_0(workspace) not in (writer, None))
            process.until(newer(workspace, than=newest(workspace)))
        if fillable:
            fill(runs)
            assert process.wait() == 1, process.printed()
            line = process.last_line(STAGE)
            assert f"{workspace.run_directory(STAGE)}" in line and "No space left on device: make room" in line
            make_room(runs)
    before = newest(workspace)
    with workspace.started(workspace.call(STAGE)) as process:
        goes_on(process, workspace, before)
        process.kill()
    same_checkpoints(workspace)  # now that the run stands still: comparing takes as long as many steps
    *_, before, last = checkpoints(workspace)
    assert last < 48, "killed too late to show anything"
    damaged = workspace.run_directory(STAGE) / f"checkpoints/step-{last:08}.pt"
    flip(damaged)
    printed = workspace.finish(STAGE)
    assert f"{damaged} is not the checkpoint that was written (size or sha256 differs): put aside\n" in printed
    assert f"training goes on from step {before}\n" in printed
    assert damaged.with_suffix(".damaged").exists()
    files = f"{same_checkpoints(workspace)}, {workspace.same(STAGE)} files"
    if not fillable:
        pytest.skip(UNFILLED)
    for _ in range(6):
        identical(files)


@fault("SIGTERM, as before a machine is taken away", "train", "the step is saved; exit status 143, one line says so")
@fault("kill -9 of Ray Train's controller", "train", "one line says that Ray has failed; started again, it goes on")
@fault("kill -9 of Ray as a whole", "train", "the same, with a new one")
def test_what_ray_may_suffer(workspace, identical):
    workspace.begin(STAGE, 12)
    with workspace.started(workspace.call(STAGE)) as process:
        goes_on(process, workspace, 12)
        assert process.terminate() == f"step {newest(workspace)} is saved"
    for victim in ("controller", "keeper"):
        before = newest(workspace)
        with workspace.started(workspace.call(STAGE)) as process:
            goes_on(process, workspace, before)
            (killed,) = process.ray("TrainController") if victim == "controller" else process.keeper()
            killed.kill()
            assert process.wait() == 1, process.printed()
            assert "Ray has failed" in process.last_line(STAGE)
    assert newest(workspace) < 48, "killed too late to show anything"
    workspace.finish(STAGE)
    files = f"{same_checkpoints(workspace)}, {workspace.same(STAGE)} files"
    for _ in range(3):
        identical(files)
