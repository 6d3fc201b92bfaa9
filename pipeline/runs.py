"""Run directories: state that outlives a crash, outside DVC's outs (which DVC deletes before every run).

`runs/<stage>/<fingerprint>`: the fingerprint covers parameters, inputs and code by their meaning, so that a run that
means something else starts afresh, and an interrupted one, or one under another name, goes on where it was.
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

import psutil

from pipeline.storage import other_versions, versions, write_json
from pixelgen.errors import StorageError, UserError
from pixelgen.files import try_lock
from pixelgen.store import on_disk

VERSIONS = "versions.json"  # in a run directory: those that it was begun under


@contextlib.contextmanager
def working(directory: Path) -> Iterator[None]:
    """Hold a run directory, which is made if need be, for the driver of its stage. Where it was begun under other
    versions, the user is told."""
    with lease(directory / "driver.lease"):
        path = directory / VERSIONS
        if not path.exists():
            write_json(path, versions())
        elif changed := other_versions(json.loads(path.read_bytes())):
            print(f"{directory} was begun under {changed}: what comes may differ by rounding", file=sys.stderr)
        yield


def clear(directory: Path) -> None:
    """Delete the directory of a finished run, whose lease is held: who waits for it begins in a new one."""
    aside = directory.with_name(f".{directory.name}-{os.getpid()}")
    directory.rename(aside)
    shutil.rmtree(aside)


@contextlib.contextmanager
def lease(path: Path, patience: float = math.inf) -> Iterator[None]:
    """Hold `path` for this process alone; the kernel lets go when the process dies, however it dies.

    A stage whose dvc was killed runs on as an orphan: it is stopped, and this one takes over. For anyone else who holds
    it, an experiment in the queue for one, this process waits, and says so; after `patience` seconds that is a
    StorageError.
    """
    began, told = time.monotonic(), False
    with opened(path) as file:
        while not try_lock(file):
            file.seek(0)
            noted = file.read().split()
            holder, supervisor = _alive(noted[:2]), noted[2:]
            if holder and supervisor and not _alive(supervisor):
                print(f"stopping process {holder.pid}, left over from an interrupted run", file=sys.stderr)
                _stop(holder)
            elif time.monotonic() > began + patience:
                raise StorageError(f"{path.parent} is in use by process {' '.join(noted[:1])}: wait for it, or stop "
                                   "it, and try again")
            elif not told and time.monotonic() > began + 5:
                print(f"waiting for process {' '.join(noted[:1])}, which is at the same work in {path.parent}",
                      file=sys.stderr, flush=True)
                told = True
            time.sleep(0.2)
        if not _lies_at(path, file):  # whoever held it has finished, and cleared the folder away
            with lease(path, patience):
                yield
            return
        file.truncate(0)
        file.write(" ".join([*_named(psutil.Process()), *_supervisor()]))
        file.flush()
        yield


def opened(path: Path) -> IO[str]:
    """A file, in a folder that may be cleared away at any moment."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except FileExistsError:  # also where it was there, and is cleared away before Python has looked at it
                if path.parent.exists():
                    raise
            return open(path, "a+")


def _lies_at(path: Path, file: IO[str]) -> bool:
    """Whether an open file is still the one of that name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def in_use(directory: Path) -> bool:
    """Whether a living process holds a lease in a run directory."""
    for path in directory.glob("*.lease"):
        with open(path, "a+") as file:
            if not try_lock(file):
                return True
    return False


def _supervisor() -> list[str]:
    """The dvc that runs this stage; nothing if there is none: a stage that was started by hand is never left over."""
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if any(Path(argument).name == "dvc" for argument in process.cmdline()[:4]):
                return _named(process)
    return []


def _named(process: psutil.Process) -> list[str]:
    """Process id and start time: ids are given again."""
    return [str(process.pid), str(process.create_time())]


def _alive(name: list[str]) -> psutil.Process | None:
    """The process of that name, if it still runs."""
    with contextlib.suppress(psutil.NoSuchProcess, ValueError):
        pid, _ = name
        process = psutil.Process(int(pid))
        if _named(process) == name and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _stop(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except psutil.TimeoutExpired:
            process.kill()
            process.wait(20)


class Stopped(SystemExit):
    """A stage ends because of SIGTERM, which comes before a machine is taken away; the message says what is kept."""


def run_stage(name: str, main: Callable[[], None]) -> NoReturn:
    """Run what a stage does, and end the process at once: to take torch and Ray apart would cost each stage another
    second, and a thread of Ray Data may print what it makes of Ray's end after the stage's last line."""
    status: Any = 0
    try:
        run_main(name, main)
    except SystemExit as end:
        status = end.code or 0
        if isinstance(status, str):
            print(status, file=sys.stderr)
            status = 1
    except Exception:
        if sys.gettrace():  # a debugger wants to see it
            raise
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_main(name: str, main: Callable[[], None]) -> None:
    """Run what a stage does. What the user can mend, or Ray that fails, becomes a SystemExit of one clear line, also
    where a worker of Ray Train has met it. A bug keeps its traceback, and the worker's is printed."""
    signal.signal(signal.SIGTERM, _end)
    try:
        with on_disk(Path.cwd()):
            main()
    except Stopped as end:
        print(f"stopped: {end}, `dvc repro` goes on from there", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except Exception as error:
        found = [*origins(error)]
        for origin in found:
            if isinstance(origin, UserError):
                sys.exit(f"{name}: {origin}")
        for origin in found:
            if ray_failed(origin):
                summary = str(origin).partition("\n")[0]
                sys.exit(f"{name}: Ray has failed: {summary} Run `dvc repro` again: finished work is kept")
        for told in dict.fromkeys(str(origin) for origin in found if origin is not error):
            print(told, file=sys.stderr)  # the whole of what Ray has cut short in its own exception
        raise


def _end(*_: Any) -> None:
    raise Stopped("finished work is kept")


def ray_failed(origin: BaseException) -> bool:
    """Whether it was Ray that failed. Its UserCodeException stands for a bug of ours."""
    return type(origin).__module__.startswith("ray.") and type(origin).__name__ != "UserCodeException"


@contextlib.contextmanager
def whole_tracebacks() -> Iterator[None]:
    """What a worker of Ray Train does; a bug leaves it as a RuntimeError that holds its traceback. Ray Train passes on
    the exception without one, and 1,000 characters of text."""
    try:
        yield
    except Exception as error:
        if any(isinstance(origin, UserError) or ray_failed(origin) for origin in origins(error)):
            raise
        raise RuntimeError(f"a bug in a worker of Ray Train:\n\n{traceback.format_exc()}") from None


def origins(error: BaseException) -> Iterator[BaseException]:
    """What an exception was where it was raised: Ray wraps it in some of its own on the way, one for all workers."""
    inner = [*getattr(error, "worker_failures", {}).values(), getattr(error, "controller_failure", None),
             getattr(error, "cause", None)]
    wrapped = [e for e in inner if isinstance(e, BaseException)]
    for e in wrapped:
        yield from origins(e)
    if not wrapped:
        yield error
