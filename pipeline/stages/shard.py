"""shard: a source of images -> Parquet shards of `batches.SCHEMA`, each a random sample of all classes.

Images are decoded, cropped as ADM does and stored as PNG by Ray Data tasks, each of which writes one shard.
What cannot be used is listed with its reason in quarantine.jsonl. Shards gather in the run directory, on a disk
that all nodes see: an interrupted stage goes on when it is started again on unchanged inputs. When all are
there, that directory becomes the output. Equal inputs give equal bytes.
"""

import dataclasses
import io
import json
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from pipeline.batches import SCHEMA
from pipeline.cluster import Cluster, connect, ray_data, read_cluster
from pipeline.datasets import DatasetError, Item, Rejected, Source, digits, image_folder
from pipeline.params import DatasetParams, read_params, stage_params
from pipeline.runs import lease, run_directory, run_stage
from pipeline.storage import StorageError, fresh_directory, publish, write_atomic
from pixelgen.images import adm_crop

OUT = Path("out/shard")
SOURCES: dict[str, Source] = {"digits": digits, "image_folder": image_folder}
SPLITS = ("train", "heldout")
QUARANTINE = "quarantine.jsonl"
REPORT = b"report"  # key in the footer of a shard: what became of the items that were dealt to it
PNG_SHARE = 0.75  # what the PNG of a photograph takes of its raw bytes

Report = dict[str, Any]  # labels of the rows, number of images enlarged, rejected keys with reasons


def main() -> None:
    key = sys.argv[1]
    config = stage_params(read_params().datasets, key, "shard")
    params = dataclasses.replace(config, path=config.path and str(Path(config.path).absolute()))
    cluster = read_cluster()
    classes, items = SOURCES[params.source].listing(params)
    inputs = [dataclasses.replace(params, max_quarantined=0.0), [(i.key, i.size, i.mtime_ns) for i in items],
              str(SCHEMA), [version(name) for name in ("pillow", "pyarrow", "numpy", "scikit-learn")]]
    run = run_directory("shard", key, *inputs).absolute()
    with lease(run.parent / "driver.lease", patience=5):
        reports: dict[str, Report] = {}
        rejected: list[tuple[str, str]] = []
        for name, report in write_missing(deal(items, params.rows_per_shard, params.seed), params, cluster, run):
            reports[name] = report
            rejected += report["rejected"]
            if len(rejected) > params.max_quarantined * len(items):
                break
        lines = [json.dumps({"key": k, "reason": reason}) + "\n" for k, reason in sorted(rejected)]
        write_atomic(run / QUARANTINE, "".join(lines).encode())
        hint = f"replace or remove these files, more in {run / QUARANTINE}:\n{''.join(lines[:3])}"
        if len(rejected) > params.max_quarantined * len(items):
            raise DatasetError(f"{len(rejected)} of {len(items)} items cannot be used, a larger share than "
                               f"max_quarantined {params.max_quarantined}; raise it, or {hint}")
        splits = {split: summary(split, reports, len(classes)) for split in SPLITS}
        if lost := [c for c, n in zip(classes, splits["train"]["per_class"], strict=True) if n == 0]:
            raise DatasetError(f"no training image is left of class {', '.join(lost[:3])}; {hint}")
        wanted = {run / QUARANTINE, *(run / shard["path"] for split in SPLITS for shard in splits[split]["shards"])}
        for stray in set(run.iterdir()) - wanted:  # shards without a row, what a killed run left half-written
            stray.unlink()
        publish(run, "dataset", config, image_size=params.image_size, classes=classes, splits=splits,
                quarantined=len(rejected), enlarged=sum(report["enlarged"] for report in reports.values()))
        fresh_directory(OUT / key).rmdir()
        shutil.move(run, OUT / key)
        shutil.rmtree(run.parent)


def deal(items: list[Item], rows_per_shard: int, seed: int) -> dict[str, list[Item]]:
    """Deal the items of each split to as few files as possible, at random, and evenly to within one."""
    shards: dict[str, list[Item]] = {}
    for number, split in enumerate(SPLITS):
        members = [item for item in items if item.split == split]
        order = np.random.default_rng([seed, number]).permutation(len(members))
        parts = np.array_split(order, -(-len(members) // rows_per_shard)) if members else []
        shards |= {f"{split}-{n:05}.parquet": [members[i] for i in part] for n, part in enumerate(parts)}
    return shards


def write_missing(shards: dict[str, list[Item]], params: DatasetParams, cluster: Cluster, directory: Path
                  ) -> Iterator[tuple[str, Report]]:
    """Name and report of each shard: first of those that are there, then of others as they get written."""
    tasks: list[dict[str, Any]] = []
    for name, items in shards.items():
        if report := read_report(directory / name):
            yield name, report
        else:
            tasks.append({"name": name, "items": pickle.dumps(items)})
    if not tasks:
        return
    need = sum(len(shards[task["name"]]) for task in tasks) * params.image_size**2 * 3 * PNG_SHARE
    if need > (free := shutil.disk_usage(directory).free):
        raise StorageError(f"{directory}: make room on this disk; about {need / 1e9:.1f} GB are needed, "
                           f"{free / 1e9:.1f} GB are free")
    with connect(cluster):
        written = ray_data().from_items(tasks, override_num_blocks=len(tasks)).map(
            lambda row: write_shard(row["name"], pickle.loads(row["items"]), params, directory))
        for done, row in enumerate(written.iter_rows(), 1):
            print(f"shard {done} of {len(tasks)}: {row['name']}", flush=True)
            report = read_report(directory / row["name"])
            if report is None:
                raise StorageError(f"{directory} is not the same on all nodes: run on one, or on a shared disk")
            yield row["name"], report


def write_shard(name: str, items: list[Item], params: DatasetParams, directory: Path) -> dict[str, str]:
    """Write one shard whole, with the report on it in its footer -> its name, as Ray Data hands it on."""
    rows: list[dict[str, Any]] = []
    rejected, enlarged = [], 0
    for item in items:
        try:
            image = SOURCES[params.source].load(params, item)
        except Rejected as reason:
            rejected.append((item.key, str(reason)))
            continue
        enlarged += min(image.size) < params.image_size
        png = io.BytesIO()
        Image.fromarray(adm_crop(image, params.image_size)).save(png, "PNG")
        rows.append({"key": item.key, "image": png.getvalue(), "label": item.label})
    report = {"labels": [row["label"] for row in rows], "enlarged": enlarged, "rejected": rejected}
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata({REPORT: json.dumps(report)}))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="none", use_dictionary=False)
    write_atomic(directory / name, sink.getvalue().to_pybytes())
    return {"name": name}


def read_report(path: Path) -> Report | None:
    """What `write_shard` put into the footer; None if there is no whole shard."""
    try:
        return json.loads(pq.read_schema(path).metadata[REPORT])
    except (FileNotFoundError, pa.ArrowInvalid):
        return None


def summary(split: str, reports: dict[str, Report], classes: int) -> dict[str, Any]:
    """What the manifest says of a split."""
    labels = {name: reports[name]["labels"] for name in sorted(reports) if name.startswith(split)}
    counts = Counter(label for part in labels.values() for label in part)
    return {"shards": [{"path": name, "rows": len(part)} for name, part in labels.items() if part],
            "rows": counts.total(), "per_class": [counts[label] for label in range(classes)]}


if __name__ == "__main__":
    run_stage(main)
