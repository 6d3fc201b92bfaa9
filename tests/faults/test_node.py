"""A cluster of several nodes, each a raylet of its own on this machine, that loses one in the middle of training."""

import tempfile

import psutil
import pytest

from pipeline.cluster import LOCAL_ENVIRONMENT
from tests.faults.checkpoints import newer, newest, rank_0, same_checkpoints
from tests.faults.table import fault


@pytest.fixture
def cluster(workspace, monkeypatch):
    """A head, which has no processor for a rank, and two nodes, each of which has enough for all."""
    folder = tempfile.TemporaryDirectory()  # Ray notes there which cluster was started last; short: it holds sockets
    for name, value in (LOCAL_ENVIRONMENT | {"PYTHONPATH": str(workspace.path), "RAY_TMPDIR": folder.name}).items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=2)
    local = (workspace.path / "clusters/local.yaml").read_text()
    (workspace.path / "clusters/three.yaml").write_text(
        local.replace("address: null", f"address: {cluster.address}"))
    yield cluster
    cluster.shutdown()
    folder.cleanup()
    workspace.restore("train")


@fault("loss of a node with all its ranks", "train",
       "Ray Train starts the ranks on another, from the newest checkpoint")
def test_a_node_is_lost(workspace, cluster, identical):
    workspace.forget("train")
    with workspace.started(workspace.call("train"), "three") as process:
        process.until(newer(workspace, than=0))
        writer = rank_0(workspace)
        above = {parent.pid for parent in psutil.Process(writer).parents()}
        (node,) = (n for n in cluster.worker_nodes if n.all_processes["raylet"][0].process.pid in above)
        cluster.remove_node(node, allow_graceful=False)
        process.until(lambda: not psutil.pid_exists(writer))  # it outlives its raylet a little
        process.until(newer(workspace, than=newest(workspace)))
        assert rank_0(workspace) != writer
        assert process.wait() == 0, process.printed()
    same_checkpoints(workspace)
    identical(f"{workspace.same('train')} files")
