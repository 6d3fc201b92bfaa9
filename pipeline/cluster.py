"""Where stages run: `clusters/*.yaml`, chosen by the environment, never by params.yaml.

`PIXELGEN_CLUSTER` names the file (default: local). Changing it changes no command and no parameter of a stage, so it
reruns nothing.
"""

import contextlib
import functools
import json
import logging
import os
import re
import signal
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline import session
from pixelgen.config import ConfigError, MemoryConfig, choose, load, require
from pixelgen.data.executors import processors_left
from pixelgen.errors import StorageError, UserError
from pixelgen.recipe import read_yaml
from pixelgen.store import Store

CLUSTERS = Path("clusters")
LONGEST_PART = 6 * 3600.0  # seconds: a part may be many images, a container large, a network still to be compiled
ON_CPU = 2  # workers where the cluster file leaves it open and there is no GPU
READERS = r"self|(processes|tasks)\([1-9][0-9]*\)"
LONGEST_END = 10.0  # seconds for a thread that has been told to end
THREADS = ("iter_threaded", "StreamingExecutor")  # of Ray Data, by their names


@dataclass(frozen=True)
class Cluster:
    """Resources only: nothing here may change a result."""

    address: str | None  # of a running Ray cluster, or auto; null: this machine's own, which stages share
    workers: int | None  # ranks in training, actors in sampling; null: one for each GPU of this machine, or `ON_CPU`
    cpus_per_worker: float
    gpus_per_worker: float | None  # null: 1 where this machine has GPUs
    threads_per_worker: int  # of torch; part of bit-exactness on the CPU
    max_failures: int  # worker failures that training recovers from by itself
    lanes_per_pass: int | None  # of a rank's lanes, how many share a forward pass; null: as many as fit into a GPU
    # Who decodes images for each rank: itself (self), processes(N) beside it, or tasks(N) of Ray anywhere; null: itself
    # on a CPU, and beside a GPU of this machine its share of the CPUs
    readers: str | None
    recomputed_blocks: int = 0  # of the denoiser's blocks, how many are computed again in the backward pass
    averages_on_cpu: bool = False

    def __post_init__(self) -> None:
        require(self.address is None or None not in (self.workers, self.gpus_per_worker), "workers and "
                "gpus_per_worker: null means those of this machine; state them for the cluster at an address")
        require(self.workers is None or self.workers >= 1, f"workers {self.workers} must be at least 1, or null")
        require(self.threads_per_worker >= 1, f"threads_per_worker {self.threads_per_worker} must be at least 1")
        require(self.cpus_per_worker >= 0 and (self.gpus_per_worker or 0) >= 0, "resources must not be negative")
        require(self.max_failures >= 0, "max_failures must not be negative")
        MemoryConfig(self.lanes_per_pass, self.recomputed_blocks, self.averages_on_cpu)  # checks them
        require(self.readers is None or re.fullmatch(READERS, self.readers) is not None, f"readers {self.readers!r}: "
                "expected self, processes(N) or tasks(N) with a whole number N of at least 1, or null")
        require(self.address is None or self.readers is not None, "readers: null means this machine's processors; "
                "state them for the cluster at an address")

    @property
    def memory(self) -> MemoryConfig:
        """How training is to fit into a GPU."""
        return MemoryConfig(self.lanes_per_pass, self.recomputed_blocks, self.averages_on_cpu)

    @property
    def gpus(self) -> float:
        """Of each worker."""
        return float(visible_gpus() > 0) if self.gpus_per_worker is None else self.gpus_per_worker

    @property
    def device(self) -> str:
        return "cuda" if self.gpus > 0 else "cpu"

    @property
    def resources(self) -> dict[str, float]:
        """Of each worker, by Ray's names."""
        return {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus} if self.gpus else {})

    @property
    def reading(self) -> tuple[str, int]:
        """Who decodes images for each rank, and how many of them."""
        if self.readers is None:
            return ("processes", processors_left(self.actors, self.threads_per_worker)) if self.gpus else ("self", 0)
        kind, _, count = self.readers.rstrip(")").partition("(")
        return kind, int(count or 0)

    @property
    def actors(self) -> int:
        """Workers that draw or judge, at most."""
        return self.workers or visible_gpus() or ON_CPU

    @property
    def threads(self) -> int:
        """Of torch, where one process does what the workers would."""
        return self.threads_per_worker * self.actors

    def here(self, workers: int) -> bool:
        """Whether so many workers are this process: no Ray is worth starting for one on this machine."""
        return self.address is None and workers == 1

    def ranks(self, lanes: int) -> int:
        """Workers that train: those of the file, which have to share out `lanes` evenly (ConfigError), or as many of
        this machine's as do."""
        if self.workers is None:
            return max(n for n in range(1, self.actors + 1) if lanes % n == 0)
        require(lanes % self.workers == 0, f"fit.lanes {lanes} cannot be shared out evenly among {self.workers} "
                "workers (clusters/*.yaml)")
        return self.workers


@functools.cache
def visible_gpus() -> int:
    """GPUs of this machine that torch may use."""
    import torch  # by shards alone it is not needed

    return torch.cuda.device_count()


def read_cluster() -> Cluster:
    name = choose(os.environ.get("PIXELGEN_CLUSTER", "local"), sorted(p.stem for p in CLUSTERS.glob("*.yaml")),
                  "PIXELGEN_CLUSTER")
    path = CLUSTERS / f"{name}.yaml"
    try:
        cluster = load(Cluster, read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    if cluster.address is None:
        session.prepare()
    return cluster


@contextlib.contextmanager
def connect(cluster: Cluster) -> Iterator[Any]:
    """Join the cluster of the file, or the session of this machine where the file has no address, for a block.

    What workers print stays in Ray's own logs; what fails in them is raised here.
    """
    if cluster.address is None:
        session.prepare()
    import ray

    ends = signal.getsignal(signal.SIGTERM)
    with (contextlib.nullcontext(cluster.address) if cluster.address else session.joined() as address,
          ray.init(address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True) as context):
        signal.signal(signal.SIGTERM, ends)  # Ray's own way to end prints pages
        yield context


def ray_data() -> Any:
    """Ray Data without its running commentary."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # importing it has set another level
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = LONGEST_PART
    return ray.data


def work_through(parts: list[dict[str, Any]], make: Callable[..., Callable[[dict[str, Any]], None]], arguments: tuple,
                 cluster: Cluster, what: str, state: Store) -> None:
    """Let Ray Data actors, each a `make(*arguments)` on the cluster's device, be called with every part (plain data)
    whose name is not in `state` yet, with a progress bar. They leave what they find there. What one worker on this
    machine does, this process does itself."""
    done = state.sizes()
    missing = [part for part in parts if part["name"] not in done]
    workers = min(cluster.actors, len(missing))
    if workers == 0:
        return
    if cluster.here(workers):
        do = make(*arguments)
        for part in tqdm(missing, desc=what, unit="part"):
            do(part)
        return
    with connect(cluster):
        data = ray_data()
        rows = data.from_items([{"part": json.dumps(part)} for part in missing], override_num_blocks=len(missing))
        rows = rows.map(Worker, fn_constructor_args=(make, arguments, cluster.threads_per_worker),
                        compute=data.ActorPoolStrategy(size=workers),
                        num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus)
        with outcomes(rows) as done_with:
            for _ in tqdm(done_with, desc=what, unit="part", total=len(missing)):
                pass


class Worker:
    """A Ray Data actor of `work_through`."""

    def __init__(self, make: Callable[..., Callable[[dict[str, Any]], None]], arguments: tuple, threads: int):
        self.make = functools.cache(lambda: make(*arguments))  # with the first part, so that `attempt` covers it
        self.threads = threads

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        import torch

        torch.set_num_threads(self.threads)
        return attempt(lambda: self.make()(json.loads(row["part"])))


@contextlib.contextmanager
def outcomes(data: Any) -> Iterator[Iterator[dict[str, str]]]:
    """The rows of a Ray Data dataset as each `attempt` ends, up to one that was stopped. If the caller stops early,
    join Ray Data's threads: one that still asks Ray for something when Ray shuts down prints a traceback of its own, or
    kills the process before its error is printed."""
    try:
        with contextlib.closing(iter(data.iter_rows())) as rows:
            yield map(check, rows)
    finally:
        for thread in threading.enumerate():
            if thread.name.startswith(THREADS):
                thread.join(LONGEST_END)


# what an attempt was stopped by
STOPS: dict[str, type[Exception]] = {"storage": StorageError, "user": UserError, "bug": RuntimeError}


def attempt(work: Callable[[], object]) -> dict[str, str]:
    """Do some work for Ray Data -> a row that says what stopped it, for `check`: the message of a UserError, the
    traceback of a bug. As data, since out of an exception Ray Data makes pages, and loses what it was."""
    stopped, told = "", ""
    try:
        work()
    except UserError as error:
        traceback.print_exc()  # into Ray's logs
        stopped, told = "storage" if isinstance(error, StorageError) else "user", str(error)
    except Exception:
        stopped, told = "bug", f"a bug in a task of Ray Data:\n\n{traceback.format_exc()}"
    return {"stopped": stopped, "told": told}


def check(row: dict[str, str]) -> dict[str, str]:
    """The row, or the exception that tells how its `attempt` was stopped: see `STOPS`."""
    if row["stopped"]:
        raise STOPS[row["stopped"]](row["told"])
    return row
