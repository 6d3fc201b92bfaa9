"""What rank 0 records of a training: the loss curve, grids of images, checkpoints.

All of it is of the run, which may go further one time than another: what was recorded beyond `fit.steps` stays.
"""

import copy
import csv
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pixelgen.conditioning import Conditioning
from pixelgen.generate import PixelGen
from pixelgen.images import grid
from pixelgen.recipe import Recipe, RunConfig
from pixelgen.saving import Writer
from pixelgen.store import Store, write_atomic
from pixelgen.train import Step, TrainState

CURVE = "curve.csv"  # in the run's directory, and in its store
MEASURED = ("waiting", "images_per_second", "memory_gb", "mfu")  # its last columns, which no two runs have in common
GRID_COLUMNS = 10


class Curve:
    """The losses as CSV. From `step` on: what was written of later ones, up to the last step, is cut out, so that no
    step is in it twice.

    The last columns are measurements, of the time since the line before but for the memory: the share of it that was
    spent waiting for batches, images a second, the most gigabytes that rank 0 has taken so far (of its GPU; of the
    machine, on a CPU), and, given `busiest`, the images a second of GPUs that did nothing but the training's matrix
    products, the share of that which is reached (MFU).
    """

    def __init__(self, directory: Path, store: Store, recipe: Recipe, step: int, busiest: float | None = None):
        self.path, self.fit, self.busiest = directory / CURVE, recipe.fit, busiest
        self.every, self.beyond = recipe.run.log_every, list[str]()
        self.step, self.began, self.waited = step, time.perf_counter(), 0.0
        try:
            header, *lines = store.read(CURVE).decode(errors="replace").splitlines() or [""]
        except FileNotFoundError:  # of a run that did not come to its first checkpoint
            header, lines = "", []
        if not header.startswith("step,"):  # nothing, or what a full disk or a power cut has left of it
            self.path.unlink(missing_ok=True)
            return
        whole = [line for line in lines if line.count(",") == header.count(",") and line.partition(",")[0].isdigit()]
        self.beyond = [line for line in whole if step_of(line) > self.fit.steps]
        self.write([header, *(line for line in whole if step_of(line) <= step), *self.beyond])

    def write(self, lines: list[str]) -> None:
        write_atomic(self.path, ("\n".join(lines) + "\n").encode())

    def record(self, step: Step) -> None:
        self.waited += step.waited
        number = step.state.step
        if number % self.every and number != self.fit.steps:
            return
        now = time.perf_counter()
        seconds, images = now - self.began, (number - self.step) * self.fit.batch_size
        rate = images / seconds
        row: dict[str, float | str] = {"step": number, **step.metrics, "skipped": step.state.skipped}
        measured = (self.waited / seconds, rate, memory_gb(), rate / self.busiest if self.busiest else "")
        self.append(row | dict(zip(MEASURED, measured, strict=True)))
        self.step, self.began, self.waited = number, now, 0.0

    def append(self, row: dict[str, float | str]) -> None:
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(row)
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row.values()])
            file.flush()
            os.fsync(file.fileno())
        if self.beyond:
            *lines, last = self.path.read_text().splitlines()
            self.write([*lines[:-len(self.beyond)], last, *self.beyond])


def upto(curve: str, step: int) -> str:
    """The lines of a curve until `step`."""
    header, *lines = curve.splitlines()
    return "\n".join([header, *(line for line in lines if step_of(line) <= step)]) + "\n"


def step_of(line: str) -> int:
    return int(line.partition(",")[0])


def memory_gb() -> float:
    """What this process has taken at most: of its GPU as torch reserves it, or, if it uses none, of the machine."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class Grids:
    """A few images of the averaged weights, always of the same classes or captions and seeds, so that one can watch it
    learn."""

    def __init__(self, directory: Path, recipe: Recipe, conditioning: Conditioning, shown: list[Any],
                 device: torch.device):
        self.directory, self.recipe, self.run = directory / "grids", recipe, recipe.run
        self.conditioning, self.shown, self.device = conditioning, shown, device

    def record(self, step: Step) -> None:
        number, every = step.state.step, self.run.grid_every
        if every and (number % every == 0 or number == self.recipe.fit.steps):
            averages: Any = step.state.ema
            if averages.output_weight.device != self.device:
                averages = copy.deepcopy(averages).to(self.device)
            model = PixelGen(averages, self.recipe.fit.precision, self.conditioning)
            images = model.generate(self.shown, range(len(self.shown)), self.run.grid_sampler)
            self.directory.mkdir(exist_ok=True)
            grid(images, GRID_COLUMNS).save(self.directory / f"step-{number:08d}.png")


def grids_upto(store: Store, step: int) -> Iterator[str]:
    """Names of the grids until `step` in the store of a run."""
    return (name for name in store.sizes("grids/") if int(Path(name).stem.removeprefix("step-")) <= step)


class Saves:
    """A checkpoint every so many steps and after the last, with the curve and the grids until then."""

    def __init__(self, directory: Path, run: RunConfig, writer: Writer):
        self.directory, self.run, self.writer = directory, run, writer

    def record(self, step: Step) -> None:
        if step.state.step % self.run.checkpoint_every == 0 or step.last:
            self.save(step.state)

    def save(self, state: TrainState) -> None:
        extras = [*self.directory.glob(CURVE), *self.directory.glob("grids/*.png")]  # there may be none yet
        self.writer.save(state, {path.relative_to(self.directory).as_posix(): path for path in extras})
