"""What each rank of a training does: build the networks, go on from the newest checkpoint, train, record."""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from pipeline.checkpoints import Checkpoints, writing
from pipeline.cluster import Cluster
from pipeline.params import TrainParams
from pipeline.readers import readers
from pipeline.recorders import Curve, Grids, Saves
from pipeline.runs import lease, whole_tracebacks
from pipeline.storage import Artifact
from pipeline.store import FAR_SECONDS, StorageError, Store, on_disk
from pixelgen.checkpoint import load_state, start_from
from pixelgen.config import DenoiserConfig, FitConfig, ObjectiveConfig, require
from pixelgen.data.feed import Plan, Source, lane_batches
from pixelgen.data.shards import first_captions
from pixelgen.encoders.dino import load_dino
from pixelgen.encoders.lpips import load_lpips
from pixelgen.encoders.text import TextEncoder, load_text_encoder
from pixelgen.errors import UserError
from pixelgen.generate import PixelGen
from pixelgen.models.speed import store_in_bf16
from pixelgen.objective import Objective
from pixelgen.train import NonFiniteError, Recorder, TrainState, create_state, train

GRID_IMAGES = 50
FAILURE, STOP = "failure.txt", "stop"  # in the run's store


@dataclass(frozen=True)
class Run:
    """What a rank needs to know, passed to every worker."""

    params: TrainParams
    data: Artifact
    weights: Artifact
    start: Artifact | None  # the exported model that training starts from
    directory: Path  # of the run on this machine
    store: Store  # what of it is kept, where every machine sees it
    cluster: Cluster

    @property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.directory, self.store)

    @property
    def done(self) -> bool:
        return self.params.fit.steps in self.checkpoints.steps()


def plan_of(params: TrainParams, data: Artifact) -> Plan:
    """The order of training: of the sources in the mixture, those shards whose images are large enough."""
    described, size = data["sources"], params.denoiser.image_size
    splits = {name: data.split("train", name, size) for name in params.mixture or described}
    weights = params.mixture or {name: split.total for name, split in splits.items()}
    sources = tuple(Source(split, weights[name], tuple((described[name]["captions"] or {}).values()))
                    for name, split in splits.items())
    return Plan(sources, size, params.fit.seed, params.fit.batch_size, params.fit.lanes, params.text)


@whole_tracebacks()
def ray_rank(config: dict[str, Run]) -> None:
    """A rank under Ray Train."""
    from ray.train import get_context
    from ray.train.torch import get_device

    run, device = config["run"], get_device()
    require(device.type == run.cluster.device, f"gpus_per_worker {run.cluster.gpus} of the cluster file "
            f"promises {run.cluster.device}, but this worker has {device}: correct it")
    train_rank(run, get_context().get_world_rank(), get_context().get_world_size(), device)


def train_rank(run: Run, rank: int, world: int, device: torch.device) -> None:
    """One rank: create the state, then train on this rank's lanes."""
    params = run.params
    torch.set_num_threads(run.cluster.threads_per_worker)
    lanes = range(rank * params.fit.lanes // world, (rank + 1) * params.fit.lanes // world)
    weights = run.weights.local()
    text = build_text(params, weights, device)
    objective = build_objective(params, weights, text, device)
    if params.fit.compile and text:
        text.compile()
    state = create_state(params.denoiser.resolve(), objective, params.optimizer, params.fit.seed, device)
    run.directory.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        # a killed run's rank 0 may take seconds to die
        with lease(run.directory / "writer.lease", patience=120), on_disk(run.directory):
            fit_rank(run, state, objective, text, lanes, device, writes=True)
    else:
        fit_rank(run, state, objective, text, lanes, device, writes=False)


def fit_rank(run: Run, state: TrainState, objective: Objective, text: TextEncoder | None, lanes: range,
             device: torch.device, writes: bool) -> None:
    """Train from the newest checkpoint on, to the end or to the step after which the driver asks for a stop."""
    params = run.params
    if writes:
        check_room(state, params.fit, run.directory)
    newest = [run.checkpoints.recover() if writes else None]
    if dist.is_initialized():
        dist.broadcast_object_list(newest)  # rank 0 decides, once it holds the lease
    if newest[0] is not None:
        load_state(state, run.checkpoints.path(newest[0]) if writes else run.checkpoints.local(newest[0]))
    elif run.start is not None:
        start_from(state, run.start.local())
    plan, stop = plan_of(params, run.data), stop_requested(run) if writes else lambda: False
    with (enough_memory(run.cluster), readers(run.cluster) as executor,
          (recording(run, state, text) if writes else silence()) as recorders,
          contextlib.closing(lane_batches(plan, lanes, state.step, params.fit.steps, device, text, executor)) as data):
        for step in train(state, data, objective, params.optimizer, params.fit, stop, run.cluster.lanes_per_pass):
            for recorder in recorders:
                recorder.record(step)


@contextlib.contextmanager
def enough_memory(cluster: Cluster) -> Iterator[None]:
    """UserError, with the remedy, where a GPU's memory is too small."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU has too little memory: lower lanes_per_pass {cluster.lanes_per_pass} in the cluster "
                        f"file, or use a smaller denoiser ({error})") from error


@contextlib.contextmanager
def recording(run: Run, state: TrainState, text: TextEncoder | None) -> Iterator[list[Recorder]]:
    """What rank 0 records. A number that is not finite would come back after every restart: it ends the run for good,
    with the state before it saved."""
    params = run.params
    wanted: list = []
    if params.fit.grid_every:
        labels = params.denoiser.num_classes
        wanted = ([i % labels for i in range(GRID_IMAGES)] if labels else
                  first_captions(plan_of(params, run.data).sources[0].split, GRID_IMAGES))
    grids = Grids(run.directory, params.fit, lambda ema: PixelGen(ema, params.fit.precision, text), wanted,
                  params.grid_sampler)
    with writing(run.checkpoints, params.fit.keep_checkpoints, params.fit.keep_every) as writer:
        saves = Saves(run.directory, params.fit, writer)
        try:
            yield [Curve(run.directory, run.store, params.fit, state.step), grids, saves]
        except NonFiniteError as error:
            saves.save(state)
            run.store.write(FAILURE, f"{error}. The state before it is kept in {run.checkpoints.path(state.step)}: to "
                            "go on from there without such steps, set fit.on_nonfinite to skip(N) and repeat; a lower "
                            "optimizer.lr starts afresh".encode())


@contextlib.contextmanager
def silence() -> Iterator[list[Recorder]]:
    """Recorders of the other ranks: none. They stop at the same non-finite step as rank 0, which reports it, so their
    own error is dropped."""
    with contextlib.suppress(NonFiniteError):
        yield []


def stop_requested(run: Run) -> Callable[[], bool]:
    """Whether the driver has asked for an end; asked again only after a while where asking costs something."""
    pause, asked = (FAR_SECONDS if run.store.far else 0.0), 0.0

    def requested() -> bool:
        nonlocal asked
        if time.monotonic() - asked < pause:
            return False
        asked = time.monotonic()
        return run.store.size(STOP) is not None

    return requested


def check_room(state: TrainState, config: FitConfig, directory: Path) -> None:
    """StorageError if the checkpoints that are to be kept, and one more, will not fit on the disk: each has weights,
    averaged weights and AdamW's two moments in float32."""
    size = 4 * (3 * count(state.model) + count(state.ema))
    kept = config.keep_checkpoints + (config.steps // config.keep_every if config.keep_every else 0)
    need, free = size * (kept + 1), shutil.disk_usage(directory).free + sum(
        path.stat().st_size for path in directory.glob("checkpoints/*"))
    if need > free:
        raise StorageError(f"{directory}: make room on this disk; {kept + 1} checkpoints of {size / 1e9:.1f} GB are to "
                           f"lie here (fit.keep_checkpoints, fit.keep_every), {free / 1e9:.1f} GB are free")


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def build_text(params: TrainParams, weights: Path, device: torch.device) -> TextEncoder | None:
    """The text encoder, which has to give features of the width that the denoiser expects; None for labels."""
    d = params.denoiser.resolve()
    if isinstance(d, DenoiserConfig):
        return None
    text = load_text_encoder(weights / "text", d.text_length, device, params.fit.precision)
    require(text.width == d.text_width, f"denoiser.size {params.denoiser.size} expects text features of width "
            f"{d.text_width}, the text encoder gives {text.width}")
    return text


def build_objective(params: TrainParams, weights: Path, text: TextEncoder | None, device: torch.device) -> Objective:
    """The objective with the frozen networks that its weights call for."""
    o, d = params.objective, params.denoiser.resolve()
    null = text([""])[0] if text else torch.tensor(params.denoiser.num_classes, device=device)
    dino = load_dino(weights / "dino", d.image_size // d.patch_size).to(device) if uses_dino(o) else None
    lpips = load_lpips(weights / "lpips").to(device) if o.lpips_weight else None
    if params.fit.precision == "bf16":
        for network in filter(None, (dino, lpips)):
            store_in_bf16(network)
    return Objective(o, d.patch_size, null, dino, lpips)


def uses_dino(objective: ObjectiveConfig) -> bool:
    return objective.repa_weight > 0 or objective.pdino_weight > 0
