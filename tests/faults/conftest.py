import json

import pytest

from tests.faults import workspace as module
from tests.faults.table import RESULTS
from tests.faults.workspace import may_mount


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    return module.build(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def fillable(workspace):
    """Whether disks can be made full here."""
    return may_mount(workspace.path)


@pytest.fixture(scope="module", autouse=True)
def from_nothing(request, workspace):
    """A module that has a `STAGE` begins without what the undisturbed run has made there, and gives it back."""
    stage = getattr(request.module, "STAGE", None)
    if stage is None:
        yield
        return
    workspace.forget(stage)
    yield
    workspace.restore(stage)


@pytest.fixture
def identical(request):
    """Tells the table, for each row of the test, what was found to be the same as without the fault."""
    found, told = RESULTS / request.node.originalname, []
    found.unlink(missing_ok=True)
    yield told.append
    found.parent.mkdir(parents=True, exist_ok=True)
    found.write_text(json.dumps(told))
