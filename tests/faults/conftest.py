import pytest

from tests.faults import workspace as module
from tests.faults.workspace import may_mount


@pytest.fixture(scope="session")
def workspace(tmp_path_factory):
    return module.build(tmp_path_factory.mktemp("faults"))


@pytest.fixture(scope="session")
def fillable(workspace):
    """Whether disks can be made full here."""
    return may_mount(workspace.path)


@pytest.fixture
def identical(request):
    """Tells the table, for each row of the test, what was found to be the same as without the fault."""
    name, told = f"faults/{request.node.originalname}", []
    request.config.cache.set(name, None)
    yield told.append
    request.config.cache.set(name, told)
