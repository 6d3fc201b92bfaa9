"""shard: the sources of a dataset -> shards (`pixelgen.data.shards`).

Images are decoded, cropped and encoded by Ray Data tasks (`pipeline.datasets.work`), one for each unit of work: some
listed images, or a container of many. What cannot be used is listed with its reason in quarantine.jsonl; what is
sound but too small is counted. Shards gather in the run directory, on a disk that all nodes see, with a report of
each task that is done: an interrupted stage goes on with the others when it is started again on unchanged inputs.
When all are there, the shards become the output. Equal inputs give equal bytes.
"""

import dataclasses
import json
import pickle
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.cluster import Cluster, attempt, connect, outcomes, ray_data
from pipeline.datasets import SPLITS, DatasetError, DatasetParams
from pipeline.datasets.work import Job, Report, read_report, write_job
from pipeline.runs import clear, working
from pipeline.stage import Stage
from pipeline.storage import Storage, fresh_directory
from pixelgen.data.shards import SCHEMA
from pixelgen.errors import StorageError
from pixelgen.store import write_atomic

SHARE = {"png": 0.75, "jpeg": 0.25}  # what an encoded photograph takes of its raw bytes
QUARANTINE = "quarantine.jsonl"
UNCOUNTED = 10_000  # samples from which on the share of unusable ones counts, where their number is not known before


def run(stage: Stage) -> None:
    config: DatasetParams = stage.own
    storage = stage.storage
    data = dataclasses.replace(config, sources={name: source.located() for name, source in config.sources.items()})
    classes, jobs = find_jobs(data)
    listed = [(job.source, [(i.key, i.size, i.mtime_ns) for item in job.task.items for i in (item, *item.texts) if i])
              for job in jobs]
    columns = [[*(source.captions or {})] for source in data.sources.values()]  # whose order a fingerprint does not see
    config_of_run = dataclasses.replace(data, max_quarantined=0.0)
    directory = stage.run_directory(config_of_run, columns, listed, str(SCHEMA)).absolute()
    with working(directory):
        shards = directory / "shards"
        reports = collect(jobs, data, stage.cluster, storage, directory)
        files = [shard["file"] for report in reports.values() for shard in report["shards"]]
        kept = {QUARANTINE, *(file["path"] for file in files)}
        for stray in shards.iterdir():
            if stray.name not in kept:  # what a killed run left half-written
                stray.unlink()
        parts = {name: summary([reports[job.name] for job in jobs if job.source == name], classes) | {
            "captions": config.sources[name].captions} for name in config.sources}
        check_training_images(parts, classes, shards / QUARANTINE)
        storage.publish(shards, "dataset", config, stored=files, image_sizes=config.image_sizes, classes=classes,
                        quarantined=sum(part["quarantined"] for part in parts.values()),
                        skipped=sum(part["skipped"] for part in parts.values()), sources=parts)
        fresh_directory(stage.out).rmdir()
        shutil.move(shards, stage.out)
        state = storage.run(directory)
        for name in state.sizes("reports/"):
            state.delete(name)
        clear(directory)


def find_jobs(data: DatasetParams) -> tuple[list[str] | None, list[Job]]:
    """Names of the classes, if it has any, and all that is to be done. DatasetError if a source cannot be used."""
    classes, jobs = None, []
    for name, source in data.sources.items():
        classes, tasks = source.tasks(data)
        jobs += [Job(name, number, task) for number, task in enumerate(tasks)]
    return classes, jobs


def collect(jobs: list[Job], data: DatasetParams, cluster: Cluster, storage: Storage, run: Path
            ) -> dict[str, Report]:
    """The reports of all jobs, by name, once all are done. DatasetError as soon as too much cannot be used."""
    (run / "shards").mkdir(exist_ok=True)
    known = sum(job.task.samples for job in jobs) or UNCOUNTED
    reports: dict[str, Report] = {}
    rejected: list[tuple[str, str]] = []
    seen, total = 0, known
    for name, report in write_missing(jobs, data, cluster, storage, run):
        reports[name] = report
        rejected += report["rejected"]
        seen += sum(shard["rows"] for shard in report["shards"]) + len(report["rejected"]) + report["skipped"]
        total = seen if len(reports) == len(jobs) else max(seen, known)
        if len(rejected) > data.max_quarantined * total:
            break
    lines = [json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in sorted(rejected)]
    path = run / "shards" / QUARANTINE
    write_atomic(path, "".join(lines).encode())
    if len(rejected) > data.max_quarantined * total:
        raise DatasetError(f"{len(rejected)} of {seen} images read cannot be used, more than max_quarantined "
                           f"{data.max_quarantined} of {total}; raise it, or {hint(path)}")
    return reports


def write_missing(jobs: list[Job], data: DatasetParams, cluster: Cluster, storage: Storage, run: Path
                  ) -> Iterator[tuple[str, Report]]:
    """Name and report of each job: first of those that are done, then of others as they get done."""
    todo: list[Job] = []
    for job in jobs:
        if report := read_report(storage, run, job.name):
            yield job.name, report
        else:
            todo.append(job)
    if not todo:
        return
    each = data.image_sizes[-1]**2 * 3 * SHARE[data.encoding]
    need = sum(job.task.samples * each or sum(item.size for item in job.task.items) for job in todo)
    if storage.root is None and need > (free := shutil.disk_usage(run).free):
        raise StorageError(f"{run}: make room on this disk; about {need / 1e9:.1f} GB are needed, "
                           f"{free / 1e9:.1f} GB are free")
    for count, name in enumerate(do(todo, data, cluster, storage, run), 1):
        print(f"part {count} of {len(todo)}: {name}", flush=True)
        report = read_report(storage, run, name)
        if report is None:
            raise StorageError(f"{run} is not the same on all nodes: run on one, on a shared disk, or set storage.root")
        yield name, report


def do(jobs: list[Job], data: DatasetParams, cluster: Cluster, storage: Storage, run: Path) -> Iterator[str]:
    """Names of jobs as Ray Data tasks get them done; for a single one on this machine no Ray is worth starting."""
    if cluster.address is None and len(jobs) == 1:
        yield write_job(jobs[0], data, storage, run)
        return
    with connect(cluster):
        rows = ray_data().from_items(
                [{"name": job.name, "job": pickle.dumps(job)} for job in jobs], override_num_blocks=len(jobs)).map(
            lambda row: {"name": row["name"]} | attempt(
                lambda: write_job(pickle.loads(row["job"]), data, storage, run)))
        with outcomes(rows) as done:
            for row in done:
                yield row["name"]


def summary(reports: list[Report], classes: list[str] | None) -> dict[str, Any]:
    """What the manifest says of a source."""
    splits: dict[str, Any] = {}
    for split in SPLITS:
        shards = sorted((s for r in reports for s in r["shards"] if s["split"] == split),
                        key=lambda s: str(s["file"]["path"]))
        labels = Counter(label for shard in shards for label in shard["labels"])
        named = [{"path": s["file"]["path"], "rows": s["rows"], "size": s["pixels"], "pieces": s["pieces"]}
                 for s in shards]
        splits[split] = {"shards": named,
                         "rows": sum(shard["rows"] for shard in shards),
                         "per_class": classes and [labels[number] for number in range(len(classes))]}
    counts = {name: sum(report[name] for report in reports) for name in ("skipped", "captions_cut", "enlarged")}
    return {"quarantined": sum(len(report["rejected"]) for report in reports), **counts, "splits": splits}


def check_training_images(parts: dict[str, Any], classes: list[str] | None, quarantine: Path) -> None:
    """DatasetError if nothing is left to train on of a source, or of a class."""
    for name, part in parts.items():
        train = part["splits"]["train"]
        if lost := [c for c, n in zip(classes or [], train["per_class"] or [], strict=True) if n == 0]:
            raise DatasetError(f"no training image is left of class {', '.join(lost[:3])}; {hint(quarantine)}")
        if train["rows"] == 0:
            raise DatasetError(f"no training image is left of source {name}: {part['quarantined']} cannot be used, "
                               f"{part['skipped']} are smaller than image_sizes; {hint(quarantine)}")


def hint(quarantine: Path) -> str:
    lines = quarantine.read_text().splitlines(keepends=True)
    return f"replace or remove these files, more in {quarantine}:\n{''.join(lines[:3])}"

