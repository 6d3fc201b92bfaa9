"""Shards on disk, and the deterministic order in which training reads them.

A shard is a Parquet file of the columns `SCHEMA`, images as PNG or JPEG bytes. The order is a plan, a pure function of
(seed, epoch) and of the number of rows in each shard: shards are permuted, their rows laid end to end in a ring,
the ring is cut at a random place and from there into equal segments, one a lane, and rows are shuffled inside
windows of `WINDOW` steps. Nothing depends on how many ranks there are or where a run was interrupted. The few rows
beyond the last whole step sit out one epoch, other ones each time.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from pipeline.storage import StorageError, read_manifest

if TYPE_CHECKING:  # torch is not for the processes that only read shards: importing it takes them seconds
    import torch

    from pixelgen.train import LaneBatch

# label is null in captioned data, captions in labelled; captions have one entry, or null, per column of the source
SCHEMA = pa.schema([("key", pa.string()), ("image", pa.binary()), ("label", pa.int32()),
                    ("captions", pa.list_(pa.string()))])
WINDOW = 16  # steps whose rows are read and shuffled together
READ_AHEAD = 2  # windows that a rank keeps in preparation


@dataclass(frozen=True)
class Split:
    """One split of a sharded dataset: paths of its shards and the number of rows in each."""

    paths: tuple[str, ...]
    rows: tuple[int, ...]

    @property
    def total(self) -> int:
        return sum(self.rows)


def open_split(directory: Path, name: str, source: str | None = None, size: int | None = None) -> Split:
    """The split `name` of a dataset directory: of all its sources or of one, and of images of all stored sizes or
    of those with at least `size` pixels on a side. StorageError if the directory is unfinished, KeyError if no such."""
    manifest = read_manifest(directory, "dataset")
    chosen = manifest["sources"] if source is None else {source: manifest["sources"][source]}
    shards = [s for of in chosen.values() for s in of["splits"][name]["shards"] if size is None or s["size"] >= size]
    if strangers := {s["path"] for s in shards} - {f["path"] for f in manifest["files"]}:
        raise StorageError(f"{directory}: the manifest has no checksum of {', '.join(sorted(strangers))}: "
                           f"delete {directory} and run `dvc repro`")
    return Split(tuple(str(directory / s["path"]) for s in shards), tuple(s["rows"] for s in shards))


def decode(encoded: bytes) -> np.ndarray:
    """PNG or JPEG bytes of a shard -> (H, W, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def read_images(split: Split, limit: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images (n, H, W, 3) uint8 and labels (n,) of each shard of labelled images in turn, at most `limit` in all."""
    left = split.total if limit is None else limit
    for path in split.paths:
        if left <= 0:
            return
        table = pq.read_table(path, columns=["image", "label"]).slice(0, left)
        left -= len(table)
        yield np.stack([decode(b) for b in table["image"].to_pylist()]), table["label"].to_numpy()


# ------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Plan:
    """The order of one training run: which row is at (step, lane, position)."""

    split: Split
    seed: int
    batch_size: int
    lanes: int

    def check(self) -> None:
        """ValueError if an epoch has not a single step."""
        if self.steps_per_epoch == 0:
            raise ValueError(f"{self.split.total} training images are fewer than one batch of {self.batch_size}: "
                             "lower fit.batch_size or add data")

    @property
    def steps_per_epoch(self) -> int:
        return self.split.total // self.lanes // self.lane_size

    @property
    def lane_size(self) -> int:
        return self.batch_size // self.lanes

    def window(self, step: int) -> tuple[int, int, range]:
        """(epoch, window of that epoch, steps of the run that it covers) of the window that holds `step`."""
        epoch, inside = divmod(step, self.steps_per_epoch)
        number = inside // WINDOW
        start = epoch * self.steps_per_epoch + number * WINDOW
        return epoch, number, range(start, min(start + WINDOW, (epoch + 1) * self.steps_per_epoch))

    def windows(self, start: int, stop: int) -> Iterator[int]:
        """The first step of every window from `start` to `stop`; the first may begin in the middle of one."""
        while start < stop:
            yield start
            start = self.window(start)[2].stop

    def rows(self, epoch: int, number: int, lane: int) -> np.ndarray:
        """(steps of the window, lane_size, 2) shard and row of every sample that `lane` sees in this window."""
        order, starts, cut = _epoch_order(self.seed, epoch, self.split.rows)
        steps = min(WINDOW, self.steps_per_epoch - number * WINDOW)
        first = cut + lane * (self.split.total // self.lanes) + number * WINDOW * self.lane_size
        ring = (first + np.arange(steps * self.lane_size)) % self.split.total  # places on the ring of this epoch
        # 1 + number: a seed that ends in zeros is the same seed without them, which orders the shards
        ring = np.random.default_rng([self.seed, epoch, 1 + number, lane]).permutation(ring)
        position = np.searchsorted(starts, ring, side="right") - 1
        pairs = np.stack([order[position], ring - starts[position]], axis=-1)
        return pairs.reshape(steps, self.lane_size, 2)


@functools.lru_cache(maxsize=2)
def _epoch_order(seed: int, epoch: int, rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int]:
    """The permuted shards of an epoch, where each begins on the ring of rows, and where the ring is cut."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(rows))
    starts = np.concatenate([[0], np.cumsum(np.asarray(rows)[order])[:-1]])
    return order, starts, int(random.integers(sum(rows)))


def load_window(plan: Plan, lanes: Sequence[int], step: int, stop: int) -> dict[str, np.ndarray]:
    """Read and decode what `lanes` see from `step` to the end of its window (or `stop`), in training order: steps,
    within them lanes, within them samples. Columns step, lane, key, image (H, W, 3) and label."""
    epoch, number, steps = plan.window(step)
    tables: dict[int, pa.Table] = {}
    columns: dict[str, list] = {name: [] for name in ("step", "lane", "key", "image", "label")}
    pairs = {lane: plan.rows(epoch, number, lane) for lane in lanes}
    for s in range(step, min(steps.stop, stop)):
        for lane in lanes:
            for shard, row in pairs[lane][s - steps.start].tolist():
                if shard not in tables:
                    tables[shard] = pq.read_table(plan.split.paths[shard])
                table = tables[shard]
                columns["step"].append(s)
                columns["lane"].append(lane)
                columns["key"].append(table["key"][row].as_py())
                columns["image"].append(decode(table["image"][row].as_py()))
                columns["label"].append(table["label"][row].as_py())
    return {name: np.asarray(values) for name, values in columns.items()}


# ------------------------------------------------------------------------------------ execution by Ray tasks


def lane_batches(plan: Plan, lanes: Sequence[int], start: int, stop: int, device: torch.device
                 ) -> Iterator[list[LaneBatch]]:
    """This rank's `lanes` for every step from `start` to `stop`; windows are read and decoded ahead by Ray tasks.

    Plain tasks rather than a Ray Data pipeline: its executor would run inside the training process, and take the
    interpreter from the training thread.
    """
    import ray

    task = ray.remote(num_cpus=0.25)(load_window)
    todo = plan.windows(start, stop)
    ahead = deque(task.remote(plan, lanes, step, stop) for step in itertools.islice(todo, READ_AHEAD))
    while ahead:
        columns = ray.get(ahead.popleft())
        ahead.extend(task.remote(plan, lanes, step, stop) for step in itertools.islice(todo, 1))
        parts = np.split(np.arange(len(columns["step"])), len(columns["step"]) // plan.lane_size)
        batches = [_lane_batch({name: column[p[0]:p[-1] + 1] for name, column in columns.items()}, device)
                   for p in parts]
        for i in range(0, len(batches), len(lanes)):
            yield batches[i:i + len(lanes)]


def _lane_batch(columns: dict[str, np.ndarray], device: torch.device) -> LaneBatch:
    import torch

    from pixelgen.train import LaneBatch

    images = torch.from_numpy(columns["image"].copy()).permute(0, 3, 1, 2).contiguous().to(device)
    labels = torch.from_numpy(columns["label"].copy()).long().to(device)
    return LaneBatch(int(columns["step"][0]), int(columns["lane"][0]), columns["key"].tolist(), images, labels)
