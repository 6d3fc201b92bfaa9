"""A training without the workflow: in this process, or as one of torchrun's.

It takes the steps that the train stage would take on the same shards, to the bit, and writes into one folder.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pixelgen.config import MemoryConfig, choose, dotted, require
from pixelgen.data.executors import Executor, InProcess, processes, processors_left
from pixelgen.data.shards import LocalFile, open_split
from pixelgen.errors import UserError
from pixelgen.files import try_lock
from pixelgen.manifest import IDENTITY, MANIFEST, check_file, identity, read_manifest, sha256
from pixelgen.progress import Progress
from pixelgen.rank import Training, check_data, plan_of, stopping, train_rank
from pixelgen.recipe import Recipe
from pixelgen.store import LocalStore

MADE_OF = "made_of.json"  # in the folder of a training: what its weights depend on


def train_here(recipe: Recipe, shards: Path, out: Path, networks: Path, start: Path | None, readers: int | None,
               memory: MemoryConfig) -> str | None:
    """Train into the folder `out`, from its newest checkpoint on -> None when the last step is taken and `out/model` is
    written, else where it stopped.

    `shards`: a dataset of the shard stage; `networks`: the folder of the frozen ones; `start`: an exported model to
    begin with; `readers`: processes that decode images for each rank, None for none on a CPU and this machine's
    processors beside a GPU.
    """
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    require(recipe.fit.lanes % world == 0, f"fit.lanes {recipe.fit.lanes} cannot be shared out evenly among {world} "
            "processes")
    manifest = read_manifest(shards, "dataset")
    require(manifest["root"] is None, f"{shards}: its files lie under {manifest['root']}, which the workflow alone "
            "reads")
    sources = manifest["sources"]
    for name in recipe.mixture or {}:
        choose(name, list(sources), "mixture: source")
    labelled = any(source["captions"] is None for source in sources.values())
    recipe.check_condition(labelled, str(shards), "denoiser")
    plan = plan_of(recipe, sources, lambda name, size: open_split(
        manifest, lambda entry: LocalFile(shards / entry["path"]), "train", name, size))
    check_data(recipe, manifest, plan, str(shards))
    for name in recipe.networks:
        require((networks / name).is_dir(), f"{networks} has no folder {name}, which the recipe needs: name the folder "
                "of the frozen networks (--networks)")
    made_of = {"recipe": recipe.trajectory, "shards": identity(manifest),
               "networks": folder_hash(networks, recipe.networks), "init": start and folder_hash(start)}
    out.mkdir(parents=True, exist_ok=True)
    out = out.absolute()
    run = Training(recipe, out, LocalStore(out), plan, networks, start, memory)
    with group(world) as device, stopping(run.store):
        with alone(out) if rank == 0 else contextlib.nullcontext():
            if rank == 0:
                claim(out, made_of)
                run.begin()
            if world > 1:
                dist.barrier()
            with Progress(run.store, recipe.fit.steps) if rank == 0 else contextlib.nullcontext():
                train_rank(run, rank, world, device, reading(readers, device))
        told = run.unfinished() if rank == 0 else None
        if rank == 0 and told is None:
            run.export(out / "model")
    return told


@contextlib.contextmanager
def group(world: int) -> Iterator[torch.device]:
    """The processes that torchrun has started, if there are several -> this one's device."""
    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    require(not gpus or local < gpus, f"LOCAL_RANK {local}: this machine has {gpus} GPUs: start as many processes")
    device = torch.device("cuda", local) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
    if world == 1:
        yield device
        return
    dist.init_process_group("nccl" if gpus else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the folder for this process; the kernel lets go when it dies. UserError if another one holds it."""
    with open(out / "writer.lease", "a") as file:
        if not try_lock(file):
            raise UserError(f"{out} is in use by another training: wait for it, or name another folder")
        yield


def claim(out: Path, made_of: dict[str, Any]) -> None:
    """Note what the training in `out` is made of. UserError, with the difference, if it holds one of something else."""
    path, new = out / MADE_OF, json.loads(json.dumps(made_of))
    old = json.loads(path.read_text()) if path.is_file() else new
    if old["recipe"].keys() != new["recipe"].keys():
        raise UserError(f"{out} holds a training of an earlier version: name another folder, or finish it with that")
    before, now = flat(old), flat(new)
    if changed := [name for name in sorted(before | now) if before.get(name) != now.get(name)]:
        raise UserError(f"{out} holds another training: {changed[0]} was {before.get(changed[0])!r} and is "
                        f"{now.get(changed[0])!r}: name another folder, or delete that one")
    path.write_text(json.dumps(new, indent=2) + "\n")


def flat(values: Any, name: str = "") -> dict[str, Any]:
    """Nested values by their dotted names."""
    if not isinstance(values, dict):
        return {name: values}
    return {k: v for key, value in values.items() for k, v in flat(value, dotted(name, key)).items()}


def folder_hash(folder: Path, parts: Sequence[str] = (".",)) -> str:
    """A hash that tells some parts of a folder from others: of all files, which have to be as its manifest says, if it
    has one."""
    if (folder / MANIFEST).is_file():
        for entry in read_manifest(folder, None)["files"]:
            check_file(folder, entry)
    files = sorted(path for part in parts for path in (folder / part).rglob("*") if path.is_file())
    told = "".join(f"{path.relative_to(folder)} {sha256(path)} " for path in files
                   if path.name not in (MANIFEST, IDENTITY))
    return hashlib.sha256(told.encode()).hexdigest()


def reading(count: int | None, device: torch.device) -> contextlib.AbstractContextManager[Executor]:
    """Who decodes images: so many processes, or this one if that is 0."""
    if count is None:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        count = processors_left(ranks, 1) if device.type == "cuda" else 0
    return processes(count) if count else contextlib.nullcontext(InProcess())
