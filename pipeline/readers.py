"""Who decodes images for a rank, as `readers` of the cluster file says: itself, processes beside it, or Ray tasks."""

import contextlib
from collections.abc import Callable
from typing import Any

from pipeline.cluster import Cluster
from pixelgen.data.executors import Executor, InProcess, Result, processes


class RayTasks:
    """Calls in tasks of Ray, on any machine of the cluster that has room.

    Plain tasks rather than a Ray Data pipeline: its executor would run inside the training process, and take the
    interpreter from the training thread.
    """

    def __init__(self, ahead: int):
        self.ahead = ahead
        self.remote: dict[Callable[..., Any], Any] = {}

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Result:
        import ray

        if function not in self.remote:
            # no processor of its own, or it would wait for ever where the ranks take every one; Ray by itself would
            # keep it on the node of its arguments
            self.remote[function] = ray.remote(num_cpus=0, scheduling_strategy="SPREAD")(function)
        return Task(self.remote[function].remote(*arguments))


class Task:
    def __init__(self, reference: Any):
        self.reference = reference

    def result(self) -> Any:
        import ray

        return ray.get(self.reference)


def readers(cluster: Cluster) -> contextlib.AbstractContextManager[Executor]:
    kind, count = cluster.reading
    if kind == "processes":
        return processes(count)
    return contextlib.nullcontext(RayTasks(count) if kind == "tasks" else InProcess())
