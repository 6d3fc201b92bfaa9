"""train: a denoiser on a sharded dataset, under Ray Train; resumes from the last checkpoint of the same run."""

import contextlib
import dataclasses
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from pipeline.checkpoints import NOTES
from pipeline.cluster import Cluster, connect, read_cluster
from pipeline.params import NONE, TrainParams, read_params, stage_params
from pipeline.progress import Progress
from pipeline.rank import FAILURE, STOP, Run, plan_of, ray_rank, train_rank
from pipeline.recorders import CURVE
from pipeline.runs import Stopped, lease, run_directory, run_stage
from pipeline.storage import Storage, fresh_directory
from pixelgen.checkpoint import export, read_state
from pixelgen.config import CHANGEABLE, require
from pixelgen.train import NonFiniteError

WEIGHTS, DATA, OUT = Path("out/weights"), Path("out/shard"), Path("out/train")


def main() -> None:
    key = sys.argv[1]
    whole = read_params()
    params, storage = stage_params(whole.train, key, "train"), Storage(whole.storage.root)
    run = prepare(key, params, storage, read_cluster())
    with lease(run.directory / "driver.lease", patience=5):
        for name in (FAILURE, NOTES, STOP):  # before the newest is looked for, which may have to be told of
            run.store.delete(name)
        if not run.done or run.checkpoints.recover() != run.params.fit.steps:  # the last one may be damaged
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


def train(run: Run) -> None:
    """Train until the last step is in a checkpoint: on every worker of the cluster, under Ray Train; in this process if
    there is one worker, on this machine, that needs no tasks of Ray."""
    cluster = run.cluster
    with Progress(run.store, run.params.fit.steps), stopping(run):
        if cluster.here(cluster.ranks(run.params.fit.lanes)) and cluster.reading[0] != "tasks":
            train_rank(run, 0, 1, torch.device(cluster.device))
        else:
            train_on_workers(run)
    with contextlib.suppress(FileNotFoundError):
        raise NonFiniteError(run.store.read(FAILURE).decode())
    if not run.done:
        raise Stopped(f"step {run.checkpoints.steps()[-1]} is saved")


def train_on_workers(run: Run) -> None:
    """Let Ray Train run `ray_rank` on every worker, and start all anew, from the newest checkpoint, if one fails."""
    shutil.rmtree(run.directory / "ray", ignore_errors=True)
    cluster = run.cluster
    with connect(cluster):
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        from pipeline.loopback import LoopbackConfig

        config = TorchConfig if cluster.address else LoopbackConfig
        TorchTrainer(
            ray_rank, train_loop_config={"run": run},
            torch_config=config(backend="nccl" if cluster.device == "cuda" else "gloo"),
            scaling_config=ScalingConfig(num_workers=cluster.ranks(run.params.fit.lanes),
                                         use_gpu=cluster.device == "cuda", resources_per_worker=cluster.resources),
            run_config=RunConfig(name="train", storage_path=run.store.uri("ray"),
                                 failure_config=FailureConfig(max_failures=cluster.max_failures))).fit()


@contextlib.contextmanager
def stopping(run: Run) -> Iterator[None]:
    """Let SIGTERM, which comes before a machine is taken away, be a request to the ranks to save and end. A thread
    makes it: the one that the signal interrupts may itself be at the store, with a lock in hand."""
    def request(*_: Any) -> None:
        threading.Thread(target=run.store.write, args=(STOP, b"")).start()

    before = signal.signal(signal.SIGTERM, request)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
    run_stage(main)
