"""A cluster of several nodes, each a raylet of its own on this machine, that loses one in the middle of the work."""

import tempfile

import psutil
import pytest

from pipeline.session import ENVIRONMENT
from tests.e2e.workspace import join
from tests.faults.checkpoints import newer, newest, rank_0, same_checkpoints
from tests.faults.table import fault


@pytest.fixture(scope="module")
def cluster(workspace):
    """A head, which has no processor for a rank or an actor, and three nodes, each of which has enough for all."""
    # Ray notes in its folder which cluster was started last; a short name: it holds sockets
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in (ENVIRONMENT | {"PYTHONPATH": str(workspace.path), "RAY_TMPDIR": folder}).items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(3):
            cluster.add_node(num_cpus=2)
        join(workspace.path, "four", cluster.address)
        yield cluster
        cluster.shutdown()
        for stage in ("train", "sample"):
            workspace.restore(stage)


def raylet(node):
    return node.all_processes["raylet"][0].process.pid


@fault("loss of a node with all its ranks", "train",
       "Ray Train starts the ranks on another, from the newest checkpoint")
def test_a_node_is_lost_in_training(workspace, cluster, identical):
    workspace.forget("train")
    with workspace.started(workspace.call("train"), "four") as process:
        process.until(newer(workspace, than=0))
        writer = rank_0(workspace)
        above = {parent.pid for parent in psutil.Process(writer).parents()}
        (node,) = (n for n in cluster.worker_nodes if raylet(n) in above)
        cluster.remove_node(node, allow_graceful=False)
        process.until(lambda: not psutil.pid_exists(writer))  # it outlives its raylet a little
        process.until(newer(workspace, than=newest(workspace)))
        assert rank_0(workspace) != writer
        assert process.wait() == 0, process.printed()
    same_checkpoints(workspace)
    identical(f"{workspace.same('train')} files")


@fault("loss of a node with its actors", "sample", "Ray Data does their parts again on another")
def test_a_node_is_lost_in_sampling(workspace, cluster, identical):
    workspace.forget("sample")

    def actors(node):
        return [p for p in psutil.Process(raylet(node)).children() if p.cmdline()[0].startswith("ray::MapWorker")]

    with workspace.started(workspace.call("sample"), "four") as process:
        process.until(workspace.more_parts("sample"))
        lost = max(cluster.worker_nodes, key=lambda node: len(actors(node)))
        assert actors(lost), "too late to show anything"
        cluster.remove_node(lost, allow_graceful=False)
        assert process.wait() == 0, process.printed()
    identical(f"{workspace.same('sample')} files")
