"""Where stages run: `clusters/*.yaml`, chosen by the environment, never by params.yaml.

`PIXELGEN_CLUSTER` names the file (default: local). Changing it changes no command and no parameter of a stage, so it
reruns nothing.
"""

import contextlib
import functools
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.params import read_yaml
from pipeline.store import StorageError
from pixelgen.config import ConfigError, choose, load, require
from pixelgen.errors import UserError

CLUSTERS = Path("clusters")
LONGEST_PART = 6 * 3600.0  # seconds: a part may be many images, a container large, a network still to be compiled
LONGEST_END = 10.0  # seconds for a thread that has been told to end
STARTS = 3  # attempts to start Ray, which gives up after a fixed time however busy the machine is

# Ray on one machine: loopback only, quiet, quick to notice a dead worker. A value already in the environment stays.
LOCAL_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # what makes Ray bind the loopback address only
    "RAY_AUTH_MODE": "disabled",  # a private session that ends with the stage
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "600000",  # or every task that reads ahead starts a process anew
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",  # importing torch in every worker takes its time
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


@dataclass(frozen=True)
class Cluster:
    """Resources only: nothing here may change a result."""

    address: str | None  # of a running Ray cluster, or auto; null: a private one for each stage on this machine
    workers: int  # ranks in training, actors in sampling
    cpus_per_worker: float
    gpus_per_worker: float
    threads_per_worker: int  # of torch; part of bit-exactness on the CPU
    max_failures: int  # worker failures that training recovers from by itself

    def __post_init__(self) -> None:
        require(self.workers >= 1 and self.threads_per_worker >= 1, "workers and threads_per_worker: at least 1")
        require(self.cpus_per_worker >= 0 and self.gpus_per_worker >= 0, "resources must not be negative")
        require(self.max_failures >= 0, "max_failures must not be negative")

    @property
    def device(self) -> str:
        return "cuda" if self.gpus_per_worker > 0 else "cpu"

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus_per_worker} | ({"GPU": self.gpus_per_worker} if self.gpus_per_worker else {})


def read_cluster() -> Cluster:
    name = choose(os.environ.get("PIXELGEN_CLUSTER", "local"), sorted(p.stem for p in CLUSTERS.glob("*.yaml")),
                  "PIXELGEN_CLUSTER")
    path = CLUSTERS / f"{name}.yaml"
    try:
        return load(Cluster, read_yaml(path))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def connect(cluster: Cluster) -> Any:
    """Start or join Ray; returns a context manager that leaves it again.

    What workers print stays in Ray's own logs; what fails in them is raised here. A private Ray has no dashboard: it
    is ten more processes.
    """
    private = cluster.address is None
    if private:
        for name, value in LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
    import ray

    ends = signal.getsignal(signal.SIGTERM)
    for attempt in range(STARTS):
        try:
            # without "local", it would join the cluster that was last started on this machine, whoever's it is
            session = ray.init(
                address=cluster.address or "local", include_dashboard=False if private else None,
                log_to_driver=False, logging_level=logging.ERROR, configure_logging=True,
                runtime_env={"env_vars": {"PYTHONPATH": str(Path.cwd())}} if private else None)
            signal.signal(signal.SIGTERM, ends)  # Ray's own way to end prints pages
            return session
        except Exception as error:  # Ray raises nothing more special than that
            if "timed out during startup" not in str(error) or attempt == STARTS - 1:
                raise
            print("Ray did not start within its 30 s on this busy machine: trying again", file=sys.stderr)
            ray.shutdown()
    raise AssertionError("unreachable")


def ray_data() -> Any:
    """Ray Data without its running commentary."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)  # importing it has set another level
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_no_progress_timeout_s = LONGEST_PART
    return ray.data


def work_through(parts: list[dict[str, Any]], make: Callable[..., Callable[[dict[str, Any]], None]], arguments: tuple,
                 cluster: Cluster, what: str) -> None:
    """Let Ray Data actors, each a `make(*arguments)` on the cluster's device, be called with every part (plain data),
    with a progress bar. A single part on this machine is done right here: no Ray is worth starting for it."""
    if cluster.address is None and len(parts) == 1:
        make(*arguments)(parts[0])
        return
    with connect(cluster):
        data = ray_data()
        rows = data.from_items([{"part": json.dumps(part)} for part in parts], override_num_blocks=len(parts))
        rows = rows.map(Worker, fn_constructor_args=(make, arguments),
                        compute=data.ActorPoolStrategy(size=min(cluster.workers, len(parts))),
                        num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)
        with outcomes(rows) as done:
            for _ in tqdm(done, desc=what, unit="part", total=len(parts)):
                pass


class Worker:
    """A Ray Data actor of `work_through`."""

    def __init__(self, make: Callable[..., Callable[[dict[str, Any]], None]], arguments: tuple):
        self.make = functools.cache(lambda: make(*arguments))  # with the first part, so that `attempt` covers it

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        return attempt(lambda: self.make()(json.loads(row["part"])))


@contextlib.contextmanager
def outcomes(data: Any) -> Iterator[Iterator[dict[str, str]]]:
    """The rows of a Ray Data dataset as each `attempt` ends, up to one that was stopped. Where the caller breaks off,
    the threads that fetch them have ended too: one that asks Ray for more after Ray's end takes the process with it,
    before it has said why."""
    try:
        with contextlib.closing(iter(data.iter_rows())) as rows:
            yield map(check, rows)
    finally:
        for thread in threading.enumerate():
            if thread.name == "iter_threaded":
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
