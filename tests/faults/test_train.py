"""Faults in the middle of training. The tests take one run from its first step to its last, each where the one before
has left it: whatever checkpoint they find has to be the one of the undisturbed run."""

import contextlib

import pytest

from tests.faults.checkpoints import checkpoints, newer, newest, rank_0, same_checkpoints
from tests.faults.table import fault
from tests.faults.workspace import UNFILLED, fill, flip, make_room, mounted

STAGE = "train"


def goes_on(process, workspace, step):
    """Wait until training has gone on from a step, and saved more."""
    process.until(lambda: f"training goes on from step {step}\n" in process.printed())
    process.until(newer(workspace, than=step))


@fault("the stage is started twice", "train", "the second says which process holds the run, and ends")
@fault("kill -9 of the stage", "train", "started again, it goes on from the newest checkpoint")
def test_the_stage_is_started_twice_and_killed(workspace, identical):
    with workspace.started(workspace.call("train")) as process:
        process.until(lambda: [*workspace.path.glob("runs/train@*/*/driver.lease")])
        process.until(lambda: (workspace.run_directory("train") / "driver.lease").read_text())
        assert f"in use by process {process.popen.pid}: wait for it" in workspace.refused("train")
        process.until(newer(workspace, than=0))
        process.kill()
    for _ in range(2):  # now that the run stands still: comparing takes as long as many steps
        identical(same_checkpoints(workspace))
    assert newest(workspace) < 48, "killed too late to show anything"


@fault("kill -9 of rank 1", "train", "Ray Train starts the ranks anew, from the newest checkpoint")
@fault("kill -9 of rank 0, which writes", "train", "the same")
@fault("the disk is full", "train", "one line names the file and says to make room; started again, it goes on")
def test_ranks_are_killed_and_the_disk_gets_full(workspace, fillable, identical):
    runs, before = workspace.path / "runs", newest(workspace)
    with (mounted(runs, "size=2g") if fillable else contextlib.nullcontext(),
          workspace.started(workspace.call("train")) as process):
        goes_on(process, workspace, before)
        for victim in (False, True):
            before, writer = newest(workspace), rank_0(workspace)
            (killed,) = (p for p in process.ray("RayTrainWorker") if (p.pid == writer) == victim)
            killed.kill()
            process.until(newer(workspace, than=before))
            assert rank_0(workspace) != writer
        if fillable:
            fill(runs)
            assert process.wait() == 1, process.printed()
            line = process.last_line("train")
            assert f"{workspace.run_directory('train')}" in line and "No space left on device: make room" in line
            make_room(runs)
        for _ in range(3 if fillable else 2):
            identical(same_checkpoints(workspace))
        if not fillable:
            pytest.skip(UNFILLED)


@fault("SIGTERM, as before a machine is taken away", "train", "the step is saved; exit status 143, one line says so")
def test_sigterm(workspace, identical):
    before = newest(workspace)
    with workspace.started(workspace.call("train")) as process:
        goes_on(process, workspace, before)
        assert process.terminate() == f"step {newest(workspace)} is saved"
    identical(same_checkpoints(workspace))


@fault("kill -9 of Ray Train's controller", "train", "one line says that Ray has failed; started again, it goes on")
@fault("a flipped bit in the newest checkpoint", "train", "it is put aside, training goes on from the one before")
def test_the_controller_is_killed_and_a_checkpoint_damaged(workspace, identical):
    before = newest(workspace)
    with workspace.started(workspace.call("train")) as process:
        goes_on(process, workspace, before)
        (controller,) = process.ray("TrainController")
        controller.kill()
        assert process.wait() == 1, process.printed()
        assert "Ray has failed" in process.last_line("train")
    identical(same_checkpoints(workspace))
    *_, before, last = checkpoints(workspace)
    damaged = workspace.run_directory("train") / f"checkpoints/step-{last:08}.pt"
    flip(damaged)
    printed = workspace.finish("train")
    assert f"{damaged} is not the checkpoint that was written (size or sha256 differs): put aside\n" in printed
    assert f"training goes on from step {before}\n" in printed
    assert damaged.with_suffix(".damaged").exists()
    same_checkpoints(workspace)
    identical(f"{workspace.same('train')} files")
