"""What each rank of a training does: build the networks, go on from the newest checkpoint, train, record."""

import contextlib
import dataclasses
import gc
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pixelgen.checkpoint import export, load_state, read_state, start_from
from pixelgen.conditioning import Conditioning
from pixelgen.config import MemoryConfig, named, require
from pixelgen.data.executors import Executor
from pixelgen.data.feed import MixedSource, Plan, lane_batches
from pixelgen.data.shards import Split, first_captions
from pixelgen.encoders import PERCEPTUAL
from pixelgen.errors import StorageError, UserError
from pixelgen.estimate import USABLE, Networks, count, fitting_lanes, forward_operations, peak, training_operations
from pixelgen.objective import Objective
from pixelgen.precision import store_in_bf16
from pixelgen.recipe import Recipe
from pixelgen.recorders import Curve, Grids, Saves
from pixelgen.saving import NOTES, Checkpoints, name_of, writing
from pixelgen.speed import compile_blocks
from pixelgen.store import REMOTE_SECONDS, Store, on_disk
from pixelgen.train import NonFiniteError, Recorder, TrainState, create_state, train

# torch reads this when it first uses a GPU: pieces of freed memory, of whatever sizes, can then be used again
os.environ.setdefault("PYTORCH_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"))

GRID_IMAGES = 50
FAILURE, STOP = "failure.txt", "stop"  # in the store


@dataclass(frozen=True)
class Place:
    """Where a training keeps what it has done."""

    recipe: Recipe
    directory: Path  # on this machine
    store: Store  # what of it is kept, where every rank sees it

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.directory, self.store)

    @property
    def done(self) -> bool:
        """Whether the last step is in an intact checkpoint."""
        last = self.recipe.fit.steps
        return last in self.checkpoints.steps() and self.checkpoints.recover(last) == last

    def begin(self) -> None:
        """Forget what was told of the run before; its checkpoints, which are looked at next, may have to be told of."""
        for name in (FAILURE, NOTES, STOP):
            self.store.delete(name)

    def unfinished(self) -> str | None:
        """After the ranks have ended: None if the last step is taken, else where they stopped. NonFiniteError if that
        was what ended them."""
        with contextlib.suppress(FileNotFoundError):
            raise NonFiniteError(self.store.read(FAILURE).decode())
        steps = self.checkpoints.steps(self.recipe.fit.steps)
        return None if self.recipe.fit.steps in steps else f"step {steps[-1]} is saved"

    def export(self, directory: Path) -> int:
        """Write the trained model -> the step it is of."""
        state = read_state(self.checkpoints.local(self.recipe.fit.steps))
        if state["skipped"] > self.recipe.run.may_skip:
            raise NonFiniteError(f"this run has passed over {state['skipped']} steps with numbers that are not finite, "
                                 f"more than run.on_nonfinite {self.recipe.run.on_nonfinite} allows: set it to skip("
                                 f"{state['skipped']}), or change fit.seed to train another one")
        raw, projector = ({k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
                          for prefix in ("denoiser.", "projector."))
        export(directory, self.recipe.denoiser.resolve(), state["ema"], raw, projector)
        return int(state["step"])


@dataclass(frozen=True)
class Training(Place):
    """A training as each of its ranks sees it."""

    plan: Plan
    networks: Path  # folder of the frozen networks, a folder each by role
    start: Path | None  # the exported model that training starts from
    memory: MemoryConfig


def plan_of(recipe: Recipe, sources: Mapping[str, Any], split: Callable[[str, int], Split]) -> Plan:
    """The order of training: of the sources in the mixture, those shards whose images are large enough.

    `sources` is what the dataset's manifest says of them; `split` finds the training split of one, by its name and the
    least size of an image.
    """
    size = recipe.denoiser.image_size
    splits = {name: split(name, size) for name in sorted(recipe.mixture or sources)}  # in whatever order they stand
    shares = recipe.mixture or {name: split.total for name, split in splits.items()}
    chosen = tuple(MixedSource(split, shares[name], tuple((sources[name]["captions"] or {}).values()))
                   for name, split in splits.items())
    return Plan(chosen, size, recipe.fit.seed, recipe.fit.batch_size, recipe.fit.lanes, recipe.denoiser.captions)


def check_data(recipe: Recipe, manifest: Mapping[str, Any], plan: Plan, name: str) -> None:
    """ConfigError if a dataset is not what the recipe needs."""
    if (classes := recipe.denoiser.num_classes) is not None:
        require(len(manifest["classes"]) <= classes, f"denoiser.num_classes {classes}: dataset {name} has "
                f"{len(manifest['classes'])} classes")
    plan.order.check()


def train_rank(run: Training, rank: int, world: int, device: torch.device,
               readers: contextlib.AbstractContextManager[Executor]) -> None:
    """One rank: create the state, then train on this rank's lanes. `readers` decode the images."""
    recipe, lanes = run.recipe, run.recipe.fit.lanes
    architecture = recipe.denoiser.resolve()
    conditioning = architecture.load_conditioning(run.networks / "text", device, recipe.fit.precision,
                                                  f"denoiser.size {recipe.denoiser.size}")
    objective = build_objective(recipe, run.networks, conditioning, device)
    state = create_state(architecture, objective, recipe.optimizer, recipe.fit.seed, device)
    text = {"text": conditioning.network} if conditioning.network else {}
    networks = Networks(state.model.denoiser, state.model.projector, {**objective.networks, **text})
    run = dataclasses.replace(run, memory=settled(run, networks, lanes // world, device))
    busiest = most_images(recipe, networks, device, world) if rank == 0 else None
    if recipe.fit.compile and conditioning.network:
        compile_blocks(conditioning.network)
    if run.memory.averages_on_cpu:
        state.ema.cpu()
    run.directory.mkdir(parents=True, exist_ok=True)
    with on_disk(run.directory) if rank == 0 else contextlib.nullcontext():
        fit_rank(run, state, objective, conditioning, range(rank * lanes // world, (rank + 1) * lanes // world), device,
                 readers, writes=rank == 0, busiest=busiest)


def fit_rank(run: Training, state: TrainState, objective: Objective, conditioning: Conditioning, lanes: range,
             device: torch.device, readers: contextlib.AbstractContextManager[Executor], writes: bool,
             busiest: float | None = None) -> None:
    """Train from the newest checkpoint on, to the end or to the step after which somebody asks for a stop. `busiest`:
    see `Curve`."""
    recipe = run.recipe
    if writes:
        check_room(state, recipe, run.directory)
    newest = [run.checkpoints.recover(recipe.fit.steps) if writes else None]
    if dist.is_initialized():
        dist.broadcast_object_list(newest)  # rank 0 decides, once nobody else writes
    if newest[0] is not None:
        load_state(state, run.checkpoints.path(newest[0]) if writes else run.checkpoints.local(newest[0]))
    elif run.start is not None:
        start_from(state, run.start)
    stop = stop_requested(run.store) if writes else lambda: False
    with (enough_memory(run.memory), readers as executor,
          (recording(run, state, conditioning, busiest) if writes else silence()) as recorders,
          contextlib.closing(lane_batches(run.plan, lanes, state.step, recipe.fit.steps, device, conditioning.encode,
                                          executor)) as data):
        steps = train(state, data, objective, recipe.optimizer, recipe.fit, stop, run.memory, recipe.run.may_skip)
        for number, step in enumerate(steps):
            for recorder in recorders:
                recorder.record(step)
            if number == 0:  # all that lasts is there now, and Python's collector need not go through it every so often
                gc.collect()
                gc.freeze()


def settled(run: Training, networks: Networks, lanes: int, device: torch.device) -> MemoryConfig:
    """How training is to fit into memory, with a number of lanes for each pass: one on a CPU, where no more are faster,
    and as many of a rank's `lanes` on a GPU as are estimated to fit."""
    if run.memory.lanes_per_pass is not None:
        return run.memory
    fit, together = run.recipe.fit, 1
    if device.type == "cuda":
        room = USABLE * torch.cuda.get_device_properties(device).total_memory
        together = fitting_lanes(networks, run.recipe.objective, fit.batch_size // fit.lanes, lanes, run.memory, room)
    return dataclasses.replace(run.memory, lanes_per_pass=together)


def most_images(recipe: Recipe, networks: Networks, device: torch.device, world: int) -> float | None:
    """Images a second of `world` GPUs of this kind that did nothing but the training's matrix products; None for a CPU,
    or a GPU that is not known."""
    rate = peak(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if rate is None:
        return None
    return world * rate / sum(training_operations(recipe.objective, forward_operations(networks)).values())


@contextlib.contextmanager
def enough_memory(memory: MemoryConfig) -> Iterator[None]:
    """UserError, with the remedies, where a GPU's memory is too small."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU has too little memory: lower lanes_per_pass {memory.lanes_per_pass}, raise "
                        f"recomputed_blocks {memory.recomputed_blocks}, which slows the step down, or turn on "
                        "averages_on_cpu, which does so more (in the cluster file, or as options); or use a smaller "
                        f"denoiser ({error})") from error


@contextlib.contextmanager
def recording(run: Training, state: TrainState, conditioning: Conditioning, busiest: float | None
              ) -> Iterator[list[Recorder]]:
    """What rank 0 records. A number that is not finite would come back after every restart: it ends the run for good,
    with the state before it saved."""
    recipe, classes, shown = run.recipe, conditioning.classes, list[Any]()
    if recipe.run.grid_every:
        shown = ([i % classes for i in range(GRID_IMAGES)] if classes else
                 first_captions(run.plan.sources[0].split, GRID_IMAGES))
    grids = Grids(run.directory, recipe, conditioning, shown, state.model.denoiser.output_weight.device)
    with writing(run.checkpoints, recipe.run) as writer:
        saves = Saves(run.directory, recipe.run, writer)
        try:
            yield [Curve(run.directory, run.store, recipe, state.step, busiest), grids, saves]
        except NonFiniteError as error:
            saves.save(state)
            run.store.write(FAILURE, f"{error}. The state before it is kept in {run.checkpoints.path(state.step)}: to "
                            "go on from there without such steps, set run.on_nonfinite to skip(N) and repeat; a lower "
                            "optimizer.lr starts afresh".encode())


@contextlib.contextmanager
def silence() -> Iterator[list[Recorder]]:
    """Recorders of the other ranks: none. They stop at the same non-finite step as rank 0, which reports it, so their
    own error is dropped."""
    with contextlib.suppress(NonFiniteError):
        yield []


@contextlib.contextmanager
def stopping(store: Store) -> Iterator[None]:
    """Let SIGTERM, which comes before a machine is taken away, be a request to the ranks to save and end. A thread
    makes it: the one that the signal interrupts may itself be at the store, with a lock in hand."""
    def request(*_: Any) -> None:
        threading.Thread(target=store.write, args=(STOP, b"")).start()

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_requested(store: Store) -> Callable[[], bool]:
    """Whether somebody has asked for an end; asked again only after a while where asking costs something."""
    pause, asked = (REMOTE_SECONDS if store.remote else 0.0), 0.0

    def requested() -> bool:
        nonlocal asked
        if time.monotonic() - asked < pause:
            return False
        asked = time.monotonic()
        return store.size(STOP) is not None

    return requested


def check_room(state: TrainState, recipe: Recipe, directory: Path) -> None:
    """StorageError if the checkpoints that are to be kept, and one more, will not fit on the disk: each has weights,
    averaged weights and AdamW's two moments in float32."""
    size = 4 * (3 * count(state.model) + count(state.ema))
    run = recipe.run
    kept = run.keep_checkpoints + (recipe.fit.steps // run.keep_every if run.keep_every else 0)
    last = name_of(recipe.fit.steps).rpartition("/")[2]  # what lies beyond stays
    need, free = size * (kept + 1), shutil.disk_usage(directory).free + sum(
        path.stat().st_size for path in directory.glob("checkpoints/*") if path.name <= last)
    if need > free:
        raise StorageError(f"{directory}: make room on this disk; {kept + 1} checkpoints of {size / 1e9:.1f} GB are to "
                           f"lie here (run.keep_checkpoints, run.keep_every), {free / 1e9:.1f} GB are free")


def build_objective(recipe: Recipe, folder: Path, conditioning: Conditioning, device: torch.device) -> Objective:
    """The objective with the frozen networks that its terms need."""
    o, d = recipe.objective, recipe.denoiser.resolve()
    networks = {name: named(PERCEPTUAL[name])(folder / name, d.grid).to(device) for name in o.networks}
    if recipe.fit.precision == "bf16":
        for network in networks.values():
            store_in_bf16(network)
    return Objective(o, d.patch_size, conditioning.null()[0], networks)
