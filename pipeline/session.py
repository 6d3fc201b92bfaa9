"""The Ray of this machine that the stages of a run share: the first that needs it starts it, and it ends by itself.

Starting Ray, and importing torch in each of its workers, costs more than the work of a small stage. So a keeper, a
process of its own, starts Ray and a server of forks (`pipeline.forks`), and ends both when no stage has used them for
`IDLE` seconds. Stages share one if they run in the same folder with the same environment, since Ray's workers see what
the keeper saw. All is on loopback, and in a folder that belongs to the user alone.

Locks of the kernel tell who lives, however a process ends: a stage holds `users` shared, the keeper `keeper`.
"""

import contextlib
import faulthandler
import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import psutil

from pixelgen.errors import StorageError
from pixelgen.files import try_lock
from pixelgen.store import write_atomic

IDLE = 30.0  # seconds without a stage after which Ray ends
LONGEST_START = 300.0  # seconds, on a busy machine, after which a keeper gives up
STARTS = 3  # attempts to start Ray, which gives up after a fixed time however busy the machine is
FORKS = Path(__file__).with_name("forks.py")
OWN = ("DVC_STAGE", "PIXELGEN_CLUSTER", "_", "SHLVL", "OLDPWD")  # variables that differ between stages, for no worker

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0" is what makes Ray bind the loopback address only
# Ray and ranks on one machine: loopback only, quiet, quick to notice a dead worker. A value already in the environment
# stays.
ENVIRONMENT = {
    LOOPBACK: "0",
    "RAY_AUTH_MODE": "disabled",  # whoever may use the loopback of this machine may use this Ray
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "600000",  # or every task that reads ahead starts a process anew
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "180",  # a busy machine takes its time
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    # as pixelgen.rank sets it, which not every stage imports
    "PYTORCH_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
}
environment: dict[str, str] = {}  # what `prepare` found


def prepare() -> None:
    """Set Ray's environment, some of which it reads when it is imported, and note all of it the first time: what
    libraries add to it later differs from stage to stage."""
    if "ray" in sys.modules and LOOPBACK not in os.environ:
        raise RuntimeError(f"ray was imported before the cluster was read, without {LOOPBACK}: it would look elsewhere")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if not environment:
        environment.update(os.environ)


def folder() -> Path:
    """Where the session of this working directory and environment has its locks and its address."""
    seen = {name: value for name, value in environment.items() if name not in OWN}
    name = hashlib.sha256(json.dumps([sys.executable, os.getcwd(), seen], sort_keys=True).encode()).hexdigest()[:12]
    path = Path(environment.get("RAY_TMPDIR", tempfile.gettempdir())) / f"pixelgen-{os.getuid()}-{name}"
    path.mkdir(mode=0o700, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise StorageError(f"{path} belongs to another user: set RAY_TMPDIR to a folder of your own")
    return path


@contextlib.contextmanager
def joined() -> Iterator[str]:
    """The address of the session, which is started if there is none, and stays for at least as long as the block, or
    this process, lasts. StorageError, with what it printed, if it does not start."""
    place = folder()
    with open(place / "users", "a") as users:
        fcntl.flock(users, fcntl.LOCK_SH)
        with open(place / "start", "a") as start:
            fcntl.flock(start, fcntl.LOCK_EX)
            with open(place / "keeper", "a") as keeper:
                if try_lock(keeper):
                    start_keeper(place, keeper)
            address = wait_for_address(place)
        yield address


def begin() -> None:
    """Let the session start meanwhile, for the stages that come next: it takes as long as a small stage."""
    subprocess.Popen([sys.executable, "-m", "pipeline.session"], env=environment, stdin=subprocess.DEVNULL,
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def start_keeper(place: Path, keeper: IO[str]) -> None:
    """Start a keeper, which inherits its lock: for others it lives from now on, even if this process is killed."""
    (place / "address").unlink(missing_ok=True)
    paths = [os.getcwd(), environment.get("PYTHONPATH", "")]  # the code of the stages lies here
    with open(place / "log", "wb") as log:
        subprocess.Popen([sys.executable, "-m", "pipeline.session", place, str(keeper.fileno())],
                         stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[keeper.fileno()],
                         start_new_session=True,
                         env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))})


def wait_for_address(place: Path) -> str:
    """What the keeper leaves, whoever started it, once Ray is up."""
    while not (place / "address").exists():
        with open(place / "keeper", "a") as keeper:
            if try_lock(keeper):
                log = (place / "log").read_text(errors="replace")
                raise StorageError(f"Ray did not start on this machine:\n{log}")
        time.sleep(0.05)
    return (place / "address").read_text()


def keep(place: Path, keeper: IO[str]) -> None:
    """Start Ray, leave its address, and end it after `IDLE` seconds in which nobody has held `users`; then let go of
    the keeper's lock, before that of `users`."""
    import ray

    faulthandler.dump_traceback_later(LONGEST_START, exit=True)  # Ray itself may wait for a worker forever
    for left in place.glob("ranks-*"):  # by ranks that were killed
        left.unlink()
    with open(place / "users", "a") as users, keeper, forks(place):
        os.environ["PIXELGEN_FORKS"] = str(place / "forks")
        write_atomic(place / "address", start_ray().encode())
        faulthandler.cancel_dump_traceback_later()
        servers = [p for p in psutil.Process().children() if p.name() in ("gcs_server", "raylet")]
        used = time.monotonic()
        while all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in servers):
            time.sleep(0.5)
            if not try_lock(users):
                used = time.monotonic()
            elif time.monotonic() - used > IDLE:
                break  # with the lock held: who comes now waits for the end, and starts another
            else:
                fcntl.flock(users, fcntl.LOCK_UN)
        ray.shutdown()


@contextlib.contextmanager
def forks(place: Path) -> Iterator[None]:
    """A server of forks at `place`, which ends with the block, or with this process."""
    address = place / "forks"
    address.unlink(missing_ok=True)
    server = subprocess.Popen([sys.executable, "-I", FORKS, "serve", address], stdin=subprocess.PIPE,
                              env=os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"})  # no fork could use CUDA
    try:
        yield
    finally:
        server.communicate()


def start_ray() -> str:
    """Start Ray without a dashboard, which is ten more processes, and with forks for workers -> its address."""
    import ray
    from ray._private import ray_constants

    ray_constants.SETUP_WORKER_FILENAME = str(FORKS)  # what the raylet starts, with a worker's command as arguments
    for attempt in range(STARTS):
        try:
            # without "local", it would join the cluster that was last started on this machine, whoever's it is
            session: Any = ray.init("local", include_dashboard=False, log_to_driver=False,
                               logging_level=logging.ERROR)
            return session.address_info["address"]
        except Exception as error:  # Ray raises nothing more special than that
            if "timed out during startup" not in str(error) or attempt == STARTS - 1:
                raise
            ray.shutdown()
    raise AssertionError("unreachable")


if __name__ == "__main__":
    if sys.argv[1:]:
        with open(int(sys.argv[2])) as lock:
            os.set_inheritable(lock.fileno(), False)  # it is held by this process alone
            keep(Path(sys.argv[1]), lock)
    else:
        prepare()
        with joined():
            pass
