"""Faults while images are drawn, one after another in the life of one run."""

import contextlib
import re

import psutil
import pytest

from tests.faults.table import fault
from tests.faults.workspace import PATIENCE, UNFILLED, fill, flip, make_room, mounted

STAGE = "sample"
PARTS = 30
DVC = ["dvc", "repro", "--single-item", "sample@c2i"]


@fault("two `dvc repro` at once", "sample", "the second names the first, and ends")
@fault("kill -9 of `dvc repro`", "sample", "the next one stops the stage that was left over, and goes on")
@fault("the disk is full", "sample", "one line names the file and says to make room; started again, it goes on")
@fault("SIGTERM, as before a machine is taken away", "sample", "exit status 143; started again, it goes on")
@fault("kill -9 of the stage", "sample", "started again, it goes on with the images that are not drawn")
@fault("kill -9 of an actor", "sample", "Ray Data does its part again")
@fault("a flipped bit in a finished part", "sample", "one line names it; started again, it alone is redone")
def test_sample(workspace, fillable, identical):
    runs = workspace.path / "runs/sample"
    with contextlib.ExitStack() as stack:
        if fillable:
            stack.enter_context(mounted(runs, "size=2g"))
        first = stack.enter_context(workspace.started(DVC))
        first.until(workspace.more_parts("sample"))
        first.until(lambda: len(first.ray("MapWorker")) == 2)  # one that is not there yet would do all of the work
        actors = first.ray("MapWorker")
        for actor in actors:
            actor.suspend()  # so that the first is still at work when the others come
        assert len(workspace.parts("sample")) < PARTS, "too late to show anything"
        with workspace.started(DVC) as second:
            assert second.wait() != 0
            assert f"(PID {first.popen.pid})" in second.printed()
        left = first.tree()
        first.popen.kill()
        first.popen.wait()
        with workspace.started(DVC) as third:
            third.until(lambda: "left over from an interrupted run" in third.printed())
            for actor in actors:
                with contextlib.suppress(psutil.NoSuchProcess):
                    actor.kill()  # suspended, it could not see that its Ray ends
            assert not psutil.wait_procs(left, PATIENCE)[1]
            if fillable:
                fill(runs)
                assert third.wait() != 0
                told = rf"sample: {runs}/.*No space left on device: make room"
                assert re.search(told, third.printed())
                make_room(runs)
    with workspace.started(workspace.call("sample")) as process:
        process.until(workspace.more_parts("sample"))
        assert process.terminate() == "finished work is kept"
    with workspace.started(workspace.call("sample")) as process:
        process.until(workspace.more_parts("sample"))
        process.kill()
    finished = workspace.written("sample")
    assert len(finished) < PARTS, "killed too late to show anything"
    with workspace.started(workspace.call("sample")) as process:
        process.until(workspace.more_parts("sample"))
        process.ray("MapWorker")[0].kill()
        assert process.wait() == 0, process.printed()
    assert finished < workspace.written("sample"), "finished parts are not redone"
    files = workspace.same("sample")
    flip(workspace.parts("sample")[3])
    assert "part-000003.npy of" in (line := workspace.refused("sample")) and "redo it alone" in line
    assert len(workspace.parts("sample")) == PARTS - 1
    workspace.finish("sample")
    assert workspace.same("sample") == files
    if not fillable:
        pytest.skip(UNFILLED)
    for _ in range(7):
        identical(f"{files} files")
