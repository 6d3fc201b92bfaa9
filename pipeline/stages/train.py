"""train: a denoiser on a sharded dataset, under Ray Train; resumes from the last checkpoint of the same run."""

import contextlib
import csv
import dataclasses
import io
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm

from pipeline.checkpoints import NOTES, Checkpoints, writing
from pipeline.cluster import Cluster, connect, read_cluster
from pipeline.params import NONE, TrainParams, read_params, stage_params
from pipeline.readers import readers
from pipeline.runs import Stopped, lease, run_directory, run_stage, whole_tracebacks
from pipeline.storage import Artifact, Storage, fresh_directory
from pipeline.store import StorageError, Store, on_disk, write_atomic
from pixelgen.checkpoint import export, load_state, read_state, start_from
from pixelgen.config import CHANGEABLE, DenoiserConfig, FitConfig, ObjectiveConfig, require
from pixelgen.data.feed import Plan, Source, lane_batches
from pixelgen.data.shards import first_captions
from pixelgen.encoders.dino import load_dino
from pixelgen.encoders.lpips import load_lpips
from pixelgen.encoders.text import TextEncoder, load_text_encoder
from pixelgen.generate import PixelGen
from pixelgen.images import grid
from pixelgen.objective import Objective
from pixelgen.train import LaneBatch, NonFiniteError, TrainState, create_state, fit

WEIGHTS, DATA, OUT = Path("out/weights"), Path("out/shard"), Path("out/train")
GRID_COLUMNS, GRID_IMAGES = 10, 50
CURVE, FAILURE, STOP = "curve.csv", "failure.txt", "stop"  # in the run's store
STOP_SECONDS = 10.0  # between looks at a store that is far away


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


def main() -> None:
    key = sys.argv[1]
    whole = read_params()
    params, storage = stage_params(whole.train, key, "train"), Storage(whole.storage.root)
    run = prepare(key, params, storage, read_cluster())
    with lease(run.directory / "driver.lease", patience=5):
        for name in (FAILURE, NOTES, STOP):  # before the newest is looked for, which may have to be told of
            run.store.delete(name)
        if not run.done or run.checkpoints.newest() != run.params.fit.steps:  # the last one may be damaged
            train(run)
        write_outputs(run, storage, OUT / key)


def prepare(key: str, params: TrainParams, storage: Storage, cluster: Cluster) -> Run:
    """Everything that can be wrong before work starts is found here."""
    storage.check()
    data, weights = storage.open(DATA / params.dataset, "dataset"), storage.open(WEIGHTS, "weights")
    cluster.ranks(params.fit.lanes)  # raises if the lanes cannot be shared out
    if params.denoiser.num_classes is not None:
        require(len(data["classes"]) <= params.denoiser.num_classes, f"denoiser.num_classes "
                f"{params.denoiser.num_classes}: dataset {params.dataset} has {len(data['classes'])} classes")
    plan_of(params, data).order.check()
    start = None if params.init == NONE else storage.open(OUT / params.init / "model", "model")
    for artifact in (weights, start):
        if artifact and artifact["root"] is None:
            artifact.local()  # or every rank would find what is damaged, and Ray Train start it again
    made_of = [artifact.identity for artifact in (data, weights, start) if artifact]
    directory = run_directory("train", key, trajectory(params), *made_of)
    return Run(params, data, weights, start, directory.absolute(), storage.run(directory), cluster)


def trajectory(params: TrainParams) -> dict:
    """The parameters that the trained weights depend on: they name the run, any other may change while it lasts."""
    plain = dataclasses.asdict(params)
    plain["fit"] = {name: value for name, value in plain["fit"].items() if name not in CHANGEABLE}
    return plain


def plan_of(params: TrainParams, data: Artifact) -> Plan:
    """The order of training: of the sources in the mixture, those shards whose images are large enough."""
    described, size = data["sources"], params.denoiser.image_size
    splits = {name: data.split("train", name, size) for name in params.mixture or described}
    weights = params.mixture or {name: split.total for name, split in splits.items()}
    sources = tuple(Source(split, weights[name], tuple((described[name]["captions"] or {}).values()))
                    for name, split in splits.items())
    return Plan(sources, size, params.fit.seed, params.fit.batch_size, params.fit.lanes, params.text)


def train(run: Run) -> None:
    """Run `train_rank` on every worker of the cluster until the last step is in a checkpoint."""
    shutil.rmtree(run.directory / "ray", ignore_errors=True)
    cluster = run.cluster
    with connect(cluster), Progress(run), stopping(run):
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from pipeline.loopback import LoopbackConfig

        config = TorchConfig if cluster.address else LoopbackConfig
        TorchTrainer(
            train_rank, train_loop_config={"run": run},
            torch_config=config(backend="nccl" if cluster.device == "cuda" else "gloo"),
            scaling_config=ScalingConfig(num_workers=cluster.ranks(run.params.fit.lanes),
                                         use_gpu=cluster.device == "cuda", resources_per_worker=cluster.resources),
            run_config=RunConfig(name="train", storage_path=run.store.uri("ray"),
                                 failure_config=FailureConfig(max_failures=cluster.max_failures))).fit()
    with contextlib.suppress(FileNotFoundError):
        raise NonFiniteError(run.store.read(FAILURE).decode())
    if not run.done:
        raise Stopped(f"step {run.checkpoints.steps()[-1]} is saved")


@contextlib.contextmanager
def stopping(run: Run) -> Iterator[None]:
    """Let SIGTERM, which comes before a machine is taken away, be a request to the ranks to save and end."""
    before = signal.signal(signal.SIGTERM, lambda *_: run.store.write(STOP, b""))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@whole_tracebacks()
def train_rank(config: dict[str, Run]) -> None:
    """One rank: restore or create the state, then fit."""
    from ray.train import get_context
    from ray.train.torch import get_device

    run = config["run"]
    params, rank, world = run.params, get_context().get_world_rank(), get_context().get_world_size()
    torch.set_num_threads(run.cluster.threads_per_worker)
    device = get_device()
    require(device.type == run.cluster.device, f"gpus_per_worker {run.cluster.gpus} of the cluster file "
            f"promises {run.cluster.device}, but this worker has {device}: correct it")
    lanes = range(rank * params.fit.lanes // world, (rank + 1) * params.fit.lanes // world)
    weights = run.weights.local()
    text = build_text(params, weights, device)
    objective = build_objective(params, weights, text, device)
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
    params = run.params
    if writes:
        check_room(state, params.fit, run.directory)
    newest = [run.checkpoints.newest() if writes else None]
    if dist.is_initialized():
        dist.broadcast_object_list(newest)  # rank 0 decides, once it holds the lease
    if newest[0] is not None:
        load_state(state, run.checkpoints.path(newest[0]) if writes else run.checkpoints.local(newest[0]))
    elif run.start is not None:
        start_from(state, run.start.local())
    with readers(run.cluster) as executor:
        batches = lane_batches(plan_of(params, run.data), lanes, state.step, params.fit.steps, device, text, executor)
        fit_with(run, state, batches, objective, text, writes)


def fit_with(run: Run, state: TrainState, batches: Iterator[list[LaneBatch]], objective: Objective,
             text: TextEncoder | None, writes: bool) -> None:
    params = run.params
    if not writes:
        with contextlib.suppress(NonFiniteError):  # rank 0, which stops at the same step, tells of it
            fit(state, batches, objective, params.optimizer, params.fit, ignore, ignore, ignore,
                lanes_per_pass=run.cluster.lanes_per_pass)
        return
    curve = Curve(run, state.step)
    with writing(run.checkpoints, params.fit.keep_checkpoints, params.fit.keep_every) as writer:
        def checkpoint(state: TrainState) -> None:
            extras = [*run.directory.glob(CURVE), *run.directory.glob("grids/*.png")]  # there may be none yet
            writer.save(state, {path.relative_to(run.directory).as_posix(): path for path in extras})

        try:
            fit(state, batches, objective, params.optimizer, params.fit, curve.append, checkpoint,
                lambda state: draw_grid(run, state, text), stop_requested(run), run.cluster.lanes_per_pass)
        except NonFiniteError as error:  # would come back after every restart: stop for good
            checkpoint(state)
            run.store.write(FAILURE, f"{error}. The state before it is kept in {run.checkpoints.path(state.step)}: to "
                            "go on from there without such steps, set fit.on_nonfinite to skip(N) and repeat; a lower "
                            "optimizer.lr starts afresh".encode())


def ignore(_: object) -> None:
    """What ranks other than 0 do with results."""


def stop_requested(run: Run) -> Callable[[], bool]:
    """Whether the driver has asked for an end; asked again only after a while where asking costs something."""
    pause, asked = (STOP_SECONDS if run.store.far else 0.0), 0.0

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
    return Objective(o, d.patch_size, null, dino, lpips)


def uses_dino(objective: ObjectiveConfig) -> bool:
    return objective.repa_weight > 0 or objective.pdino_weight > 0


class Curve:
    """The loss curve as CSV, cut at the step from which training goes on, so that no step is in it twice."""

    def __init__(self, run: Run, step: int):
        self.path = run.directory / CURVE
        try:
            header, *lines = run.store.read(CURVE).decode(errors="replace").splitlines() or [""]
        except FileNotFoundError:  # of a run that did not come to its first checkpoint
            header, lines = "", []
        if not header.startswith("step,"):  # nothing, or what a full disk or a power cut has left of it
            self.path.unlink(missing_ok=True)
            return
        whole = (line for line in lines if line.count(",") == header.count(",") and line.partition(",")[0].isdigit())
        kept = [header, *(line for line in whole if int(line.partition(",")[0]) <= step)]
        write_atomic(self.path, ("\n".join(kept) + "\n").encode())

    def append(self, metrics: dict[str, float]) -> None:
        new = not self.path.exists()
        with open(self.path, "a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(metrics)
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in metrics.values()])
            file.flush()
            os.fsync(file.fileno())


def draw_grid(run: Run, state: TrainState, text: TextEncoder | None) -> None:
    """A few images of the averaged weights, always of the same classes or captions and seeds, so that one can watch
    it learn. The captions are the first of the first shard."""
    params = run.params
    if params.denoiser.num_classes is None:
        wanted: list = first_captions(plan_of(params, run.data).sources[0].split, GRID_IMAGES)
    else:
        wanted = [i % params.denoiser.num_classes for i in range(GRID_IMAGES)]
    images = PixelGen(state.ema, params.fit.precision, text).generate(wanted, range(len(wanted)), params.grid_sampler)
    (run.directory / "grids").mkdir(exist_ok=True)
    grid(images, GRID_COLUMNS).save(run.directory / "grids" / f"step-{state.step:08d}.png")


class Progress:
    """What the driver shows of rank 0: a progress bar, read from the loss curve (which comes with each checkpoint, if
    the run is kept under a storage root), and its notes."""

    def __init__(self, run: Run):
        self.run, self.done, self.told = run, threading.Event(), ""
        self.thread = threading.Thread(target=self.follow, daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()

    def follow(self) -> None:
        total, pause = self.run.params.fit.steps, STOP_SECONDS if self.run.store.far else 1
        with tqdm(total=total, desc="train", unit="step", mininterval=1) as bar:
            while not self.done.wait(pause):
                self.show(bar)
            self.show(bar)

    def show(self, bar: tqdm) -> None:
        with contextlib.suppress(FileNotFoundError, StorageError):
            if (notes := self.run.store.read(NOTES).decode()) != self.told:
                bar.write(notes.removeprefix(self.told), file=sys.stderr, end="")
                self.told = notes
        try:
            rows = list(csv.DictReader(io.StringIO(self.run.store.read(CURVE).decode())))
        except (FileNotFoundError, StorageError):  # not yet; what is wrong with the storage stops the ranks
            return
        if rows and None not in rows[-1].values() and int(rows[-1]["step"]) > bar.n:
            last = rows[-1]
            if bar.n == 0:
                bar.initial, bar.start_t = int(last["step"]), time.time()
            bar.set_postfix(loss=last["loss"], img_s=last["images_per_second"], refresh=False)
            bar.update(int(last["step"]) - bar.n)


def write_outputs(run: Run, storage: Storage, out: Path) -> None:
    """The trained model, its curve and its grids, as DVC outs."""
    state = read_state(run.checkpoints.local(run.params.fit.steps))
    raw, projector = ({k.removeprefix(prefix): v for k, v in state["model"].items() if k.startswith(prefix)}
                      for prefix in ("denoiser.", "projector."))
    model = fresh_directory(out) / "model"
    export(model, run.params.denoiser.resolve(), state["ema"], raw, projector)
    storage.publish(model, "model", run.params, steps=state["step"], run="/".join(run.directory.parts[-3:]))
    run.store.fetch(CURVE, out / CURVE)
    (out / "grids").mkdir()
    for name in run.store.sizes("grids/"):
        run.store.fetch(name, out / name)


if __name__ == "__main__":
    from pipeline.stages.train import main as imported  # by name, so that Ray's workers import what they run

    run_stage(imported)
