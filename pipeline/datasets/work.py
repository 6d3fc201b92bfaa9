"""What a task of the shard stage does: one unit of work -> shards (`pixelgen.data.shards`), and a report on them.

Shards are apart for each split and each stored size. Memory is bounded by about one shard for each of these, however
large a container is; so its rows are shuffled within a shard, in the order of the container from shard to shard.
Equal inputs give equal bytes.
"""

import io
import json
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.datasets import DatasetParams, Rejected, Skipped, Task
from pipeline.storage import Storage, read_sealed, write_sealed
from pixelgen.data.shards import describe_pieces, encode_shard
from pixelgen.images import adm_crop, plain_crop

CROPS = {"adm": adm_crop, "plain": plain_crop}
ENCODINGS: dict[str, dict[str, Any]] = {"png": {"format": "PNG"},
                                        "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0}}

Report = dict[str, Any]  # what became of a task: its shards; counts; rejected keys with reasons


@dataclass(frozen=True)
class Job:
    """A task of a source, and its place among them."""

    source: str
    number: int
    task: Task

    @property
    def name(self) -> str:
        return f"{self.source}-{self.number:05}"


def write_job(job: Job, data: DatasetParams, storage: Storage, run: Path) -> str:
    """Write the shards of one job, and then the report that vouches for them -> the job's name."""
    rows, numbers = dict[tuple[str, int], list[dict[str, Any]]](), Counter[Any]()
    report: Report = {"shards": [], "rejected": [], "skipped": 0, "captions_cut": 0, "enlarged": 0}

    def flush(split: str, size: int) -> None:
        bucket = rows.pop((split, size))
        name = f"{job.source}-{split}-{size}-{job.number:05}-{numbers[split, size]:04}.parquet"
        numbers[split, size] += 1
        if job.task.shuffle:
            order = np.random.default_rng([data.seed, zlib.crc32(name.encode())]).permutation(len(bucket))
            bucket = [bucket[i] for i in order]
        written = encode_shard(bucket)
        kept = storage.keep(run / "shards", name, written)
        report["shards"].append({"split": split, "pixels": size, "rows": len(bucket), "file": kept,
                                 "pieces": describe_pieces(written),
                                 "labels": [row["label"] for row in bucket]})

    for key, load in data.sources[job.source].read(data, job.task):
        try:
            sample = load()
        except Skipped:
            report["skipped"] += 1
            continue
        except Rejected as reason:
            report["rejected"].append((f"{job.source}/{key}", str(reason)))
            continue
        side = min(sample.image.size)
        size = max((s for s in data.image_sizes if s <= side), default=data.image_sizes[0])
        report["enlarged"] += side < size
        report["captions_cut"] += sample.captions_cut
        image = io.BytesIO()
        Image.fromarray(CROPS[data.crop](sample.image, size)).save(image, **ENCODINGS[data.encoding])
        bucket = rows.setdefault((sample.split, size), [])
        bucket.append({"key": f"{job.source}/{key}", "image": image.getvalue(), "label": sample.label,
                       "captions": sample.captions})
        if len(bucket) == data.rows_per_shard:
            flush(sample.split, size)
    for split, size in sorted(rows):
        flush(split, size)
    write_sealed(storage.run(run), f"reports/{job.name}.json", json.dumps(report).encode())
    return job.name


def read_report(storage: Storage, run: Path, name: str) -> Report | None:
    """The report of a job that is done; None if it is not, or if a shard of it is not there as it was written."""
    try:
        report: Report = json.loads(read_sealed(storage.run(run), f"reports/{name}.json"))
    except FileNotFoundError:
        return None
    return report if all(storage.keeps(run / "shards", shard["file"]) for shard in report["shards"]) else None
