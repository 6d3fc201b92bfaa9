"""train: a denoiser on a sharded dataset, under Ray Train; resumes from the last checkpoint of the same run."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline.cluster import connect, work_through
from pipeline.older import refuse_older_runs
from pipeline.params import NONE, TrainParams
from pipeline.rank import Run, ray_rank, run_rank
from pipeline.runs import Stopped, working
from pipeline.stage import Stage
from pipeline.storage import Storage, fresh_directory, run_name
from pixelgen.progress import Progress
from pixelgen.rank import check_data, stopping
from pixelgen.recorders import CURVE, grids_upto, upto

EXPORTED = "exported.json"  # in the run's store: which files make up the model


def run(stage: Stage) -> None:
    training = prepare(stage)
    with working(training.directory):
        training.begin()
        if not training.done:
            train(training)
        write_outputs(training, stage.storage, stage.out)


def prepare(stage: Stage) -> Run:
    """Everything that can be wrong before work starts is found here."""
    params: TrainParams = stage.own
    data, networks = stage.open("shard", params.dataset), stage.open("networks")
    stage.cluster.ranks(params.fit.lanes)  # raises if the lanes cannot be shared out
    start = None if params.init == NONE else stage.open("train", params.init)
    for artifact in (networks, start):
        if artifact and artifact["root"] is None:
            artifact.local()  # or every rank would find what is damaged, and Ray Train start it again
    made_of = [params.trajectory, data.identity, networks.part(*params.networks), start and start.identity]
    directory = stage.run_directory(*made_of)
    refuse_older_runs(stage.key, directory, stage.storage.root)
    training = Run(params, directory.absolute(), stage.storage.run(directory), data, networks, start, stage.cluster)
    check_data(params, data.manifest, training.plan, params.dataset)
    return training


def train(run: Run) -> None:
    """Train until the last step is in a checkpoint: on every worker of the cluster, under Ray Train; in this process if
    there is one worker, on this machine, that needs no tasks of Ray."""
    cluster = run.cluster
    with Progress(run.store, run.recipe.fit.steps), stopping(run.store):
        if cluster.here(cluster.ranks(run.recipe.fit.lanes)) and cluster.reading[0] != "tasks":
            run_rank(run, 0, 1, torch.device(cluster.device))
        else:
            train_on_workers(run)
    if told := run.unfinished():
        raise Stopped(told)


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
            scaling_config=ScalingConfig(num_workers=cluster.ranks(run.recipe.fit.lanes),
                                         use_gpu=cluster.device == "cuda", resources_per_worker=cluster.resources),
            run_config=RunConfig(name="train", storage_path=run.store.uri("ray"),
                                 failure_config=FailureConfig(max_failures=cluster.max_failures))).fit()


def write_outputs(run: Run, storage: Storage, out: Path) -> None:
    """The trained model, its curve and its grids, as DVC outs."""
    model = fresh_directory(out) / "model"
    model.mkdir()
    run.store.delete(EXPORTED)  # what it tells of has just been deleted
    work_through([{"name": EXPORTED}], ExportWorker, (run, storage, model.absolute()), run.cluster, "export", run.store)
    exported = json.loads(run.store.read(EXPORTED))
    storage.publish(model, "model", run.recipe, exported["files"], steps=exported["step"],
                    run=run_name(run.directory))
    last = run.recipe.fit.steps  # the run may have gone further before
    (out / CURVE).write_text(upto(run.store.read(CURVE).decode(), last))
    (out / "grids").mkdir()
    for name in grids_upto(run.store, last):
        run.store.fetch(name, out / name)


class ExportWorker:
    """What one worker does at the end: a checkpoint may be larger than the memory of the machine that the stage runs
    on."""

    def __init__(self, run: Run, storage: Storage, model: Path):
        self.run, self.storage, self.model = run, storage, model

    def __call__(self, part: dict[str, Any]) -> None:
        steps: list[int] = []
        files = self.storage.keep_files(self.model, lambda folder: steps.append(self.run.export(folder)))
        self.run.store.write(part["name"], json.dumps({"step": steps[0], "files": files}).encode())

