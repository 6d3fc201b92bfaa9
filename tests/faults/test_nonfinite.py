"""A loss that is not finite, in training on two ranks: a learning rate that no model survives."""

import pytest

from pixelgen.checkpoint import read_state
from tests.e2e.workspace import edit, resolve
from tests.faults.checkpoints import newest
from tests.faults.table import fault


@pytest.fixture
def diverging(workspace):
    before = (workspace.path / "params.yaml").read_text()
    edit(workspace.path, lambda p: p["train"]["c2i"]["optimizer"].update(lr=1e8, clip=None))
    resolve(workspace.path)
    workspace.forget("train")
    yield
    (workspace.path / "params.yaml").write_text(before)
    resolve(workspace.path)
    workspace.restore("train")


@fault("a loss that is not finite", "train",
       "one line names step, terms and samples; with skip(N) the run goes on from the state before it")
def test_a_loss_that_is_not_finite(workspace, diverging, identical):
    line = workspace.refused("train")
    stopped = newest(workspace)
    assert line.startswith(f"train: step {stopped}: loss") and "not finite; no update was made" in line
    assert "digits/" in line and "set run.on_nonfinite to skip(N)" in line and 0 < stopped < 48
    kept = read_state(workspace.run_directory("train") / f"checkpoints/step-{stopped:08}.pt")
    edit(workspace.path, lambda p: p["train"]["c2i"]["run"].update(on_nonfinite="skip(48)"))
    resolve(workspace.path)
    printed = workspace.finish("train")
    assert "Traceback" not in printed
    last = read_state(workspace.run_directory("train") / "checkpoints/step-00000048.pt")
    assert last["step"] == 48 and last["skipped"] == 48 - stopped
    assert all(value.equal(last["model"][name]) for name, value in kept["model"].items())
    identical("the weights before it")
