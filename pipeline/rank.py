"""A training of the workflow, as it is passed to every worker."""

import contextlib
from dataclasses import dataclass

import torch

from pipeline.cluster import Cluster
from pipeline.params import TrainParams
from pipeline.readers import readers
from pipeline.runs import lease, whole_tracebacks
from pipeline.storage import Artifact
from pixelgen.config import require
from pixelgen.data.feed import Plan
from pixelgen.rank import Place, Training, plan_of, train_rank


@dataclass(frozen=True)
class Run(Place):
    """What a rank needs to know, before anything has been fetched to its machine."""

    recipe: TrainParams
    data: Artifact
    networks: Artifact
    start: Artifact | None  # the exported model that training starts from
    cluster: Cluster

    @property
    def plan(self) -> Plan:
        return plan_of(self.recipe, self.data["sources"], lambda name, size: self.data.split("train", name, size))

    def here(self) -> Training:
        """The training on this machine, where what it needs is fetched to."""
        start = self.start.local() if self.start else None
        return Training(self.recipe, self.directory, self.store, self.plan, self.networks.local(), start,
                        self.cluster.memory)


@whole_tracebacks()
def ray_rank(config: dict[str, Run]) -> None:
    """A rank under Ray Train."""
    from ray.train import get_context
    from ray.train.torch import get_device

    run, device = config["run"], get_device()
    require(device.type == run.cluster.device, f"gpus_per_worker {run.cluster.gpus} of the cluster file "
            f"promises {run.cluster.device}, but this worker has {device}: correct it")
    run_rank(run, get_context().get_world_rank(), get_context().get_world_size(), device)


def run_rank(run: Run, rank: int, world: int, device: torch.device) -> None:
    """A rank of the run, on a thread for each of the cluster file's. Rank 0 alone writes."""
    torch.set_num_threads(run.cluster.threads_per_worker)
    training = run.here()
    run.directory.mkdir(parents=True, exist_ok=True)
    # a killed run's rank 0 may take seconds to die
    alone = lease(run.directory / "writer.lease", patience=120) if rank == 0 else contextlib.nullcontext()
    with alone:
        train_rank(training, rank, world, device, readers(run.cluster))
