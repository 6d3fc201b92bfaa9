"""Checkpoints of a training run: written and uploaded while training goes on, and checked when they are read.

`checkpoints/step-*.pt` is a training state; the `.json` of the same name, written last, vouches for it with size and
sha256. They gather in the run directory, and under a storage root (where a rank on any machine finds them) too.
"""

import contextlib
import json
import math
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pixelgen.checkpoint import save_state
from pixelgen.errors import StorageError
from pixelgen.manifest import describe, intact, one_at_a_time
from pixelgen.recipe import RunConfig
from pixelgen.store import Store
from pixelgen.train import TrainState

FOLDER = "checkpoints"
NOTES = "notes.txt"  # in the run's store: which checkpoint training goes on from, and why, for the driver to tell


class Damaged(StorageError):
    """A checkpoint is not what was written; a disk that is full or storage that fails is something else."""


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one run as any process sees them."""

    directory: Path  # the run directory on this machine
    store: Store

    def path(self, step: int) -> Path:
        return self.directory / name_of(step)

    def steps(self, last: float = math.inf) -> list[int]:
        """Steps of the finished checkpoints until `last`, ascending."""
        names = (re.fullmatch(rf"{FOLDER}/step-(\d+)\.pt\.json", name) for name in self.store.sizes(f"{FOLDER}/"))
        return sorted(step for name in names if name and (step := int(name[1])) <= last)

    def recover(self, last: int) -> int | None:
        """Clear away what cannot be used -> the newest step until `last` whose checkpoint is intact; None if there is
        none. For rank 0, before others read any. The step is noted, and so are damaged checkpoints, which are put
        aside: training ends at the same bits, a little later."""
        self.sweep()
        notes, found = "", None
        for step in reversed(self.steps(last)):
            try:
                self.local(step)
            except Damaged as error:
                notes += f"{error}: put aside\n"
                self.store.delete(f"{name_of(step)}.json")
                with contextlib.suppress(FileNotFoundError):
                    self.path(step).rename(self.path(step).with_suffix(".damaged"))
            else:
                found = step
                break
        if notes or found is not None:
            notes += f"training goes on from step {found or 0}\n"
            self.store.write(NOTES, notes.encode())
        return found

    def local(self, step: int) -> Path:
        """The file of a step on this machine, fetched if need be. Damaged if it is not what was written."""
        name, path = name_of(step), self.path(step)
        try:
            entry = json.loads(self.store.read(f"{name}.json"))
            entry = {"size": entry["size"], "sha256": entry["sha256"]}
        except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
            raise Damaged(f"{name}.json of {self.directory} is damaged or missing ({error})") from None
        path.parent.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(path):
            if intact(path, entry):
                return path
            if self.store.remote:
                with contextlib.suppress(FileNotFoundError):
                    self.store.fetch(name, path)
                    if intact(path, entry):
                        return path
        raise Damaged(f"{path} is not the checkpoint that was written (size or sha256 differs)")

    def sweep(self) -> None:
        """Delete what a writer that was killed has left: files that nothing vouches for."""
        vouched, folder = {name_of(step) for step in self.steps()}, self.path(0).parent
        for path in [*folder.glob(".*.partial"), *folder.glob("step-*.pt")]:
            if f"{FOLDER}/{path.name}" not in vouched:
                path.unlink()
        for name in self.store.sizes(f"{FOLDER}/step-"):
            if name.endswith(".pt") and name not in vouched:
                self.store.delete(name)

    def prune(self, run: RunConfig, last: int) -> list[str]:
        """Delete what a run does not keep of the checkpoints until step `last` -> why some cannot be. Later ones are of
        a time when the run was to go further."""
        left = []
        for step in self.steps(last)[:-run.keep_checkpoints]:
            if run.keep_every is None or step % run.keep_every:
                try:
                    self.store.delete(f"{name_of(step)}.json")
                    self.store.delete(name_of(step))
                    self.path(step).unlink(missing_ok=True)
                except (OSError, StorageError) as error:
                    left.append(str(error))
        return left


class Writer:
    """What rank 0 saves with: a thread writes, uploads and prunes, while training goes on with the next step."""

    def __init__(self, checkpoints: Checkpoints, run: RunConfig):
        self.checkpoints, self.run = checkpoints, run
        self.thread = threading.Thread()
        self.error: BaseException | None = None
        self.buffers: dict[str, torch.Tensor] = {}  # on the CPU, as large as the state, for one copy after the other

    def save(self, state: TrainState, extras: Mapping[str, Path]) -> None:
        """Copy the state and let it be written, after the one before. `extras`: files by the names under which they
        are uploaded before the checkpoint."""
        self.wait()
        copied = snapshot(state.state_dict(), self.buffers)
        arrived = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if arrived:
            arrived.record()
        contents = {name: path.read_bytes() for name, path in extras.items()}
        self.thread = threading.Thread(target=self._write, args=(state.step, copied, arrived, contents))
        self.thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is where it has to be. Raises what went wrong with it."""
        if self.thread.ident is not None:
            self.thread.join()
        if self.error:
            raise self.error

    def _write(self, step: int, state: dict[str, Any], arrived: Any, extras: Mapping[str, bytes]) -> None:
        try:
            if arrived:
                arrived.synchronize()
            name, path, store = name_of(step), self.checkpoints.path(step), self.checkpoints.store
            path.parent.mkdir(parents=True, exist_ok=True)
            save_state(state, path)
            if store.remote:
                for extra, content in extras.items():
                    store.write(extra, content)
                store.write(name, path)
            store.write(f"{name}.json", json.dumps(describe(path, name)).encode())
            self._prune(step)
        except BaseException as error:
            self.error = error

    def _prune(self, last: int) -> None:
        """What cannot be deleted now may be after the next checkpoint: no reason to stop a training."""
        if left := self.checkpoints.prune(self.run, last):
            store = self.checkpoints.store
            with contextlib.suppress(OSError, StorageError):
                before = store.read(NOTES) if store.size(NOTES) is not None else b""
                note = f"old checkpoints stay that cannot be deleted: {'; '.join(left)}\n"
                store.write(NOTES, before + note.encode())


@contextlib.contextmanager
def writing(checkpoints: Checkpoints, run: RunConfig) -> Iterator[Writer]:
    """A `Writer`, which has finished at the end."""
    writer = Writer(checkpoints, run)
    try:
        yield writer
    finally:
        writer.wait()


def name_of(step: int) -> str:
    return f"{FOLDER}/step-{step:08d}.pt"


def snapshot(value: Any, buffers: dict[str, torch.Tensor], name: str = "") -> Any:
    """A copy on the CPU, which the next step does not change, in `buffers` that the one before has used. A GPU fills
    them on its own, before it begins with whatever it is told next."""
    if isinstance(value, torch.Tensor):
        buffer = buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = buffers[name] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return buffer.copy_(value.detach(), non_blocking=True)
    if isinstance(value, Mapping):
        return {key: snapshot(v, buffers, f"{name}/{key}") for key, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(snapshot(v, buffers, f"{name}/{i}") for i, v in enumerate(value))
    return value
