"""Shards on disk, and the deterministic order in which training reads them.

A shard is a Parquet file of the columns `SCHEMA`, images as PNG or JPEG bytes. The order is a plan, a pure function of
a seed and of the number of rows in each shard. In each epoch of a source its shards are permuted, their rows laid end
to end in a ring, and the ring is cut at a random place and from there into equal segments, one a lane. A lane takes
from every source of the mixture its share of each window of `WINDOW` steps, and shuffles the window. Nothing depends on
how many ranks there are or where a run was interrupted. The few rows beyond the last segment sit out one epoch, other
ones each time.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from pipeline.params import TextParams
from pipeline.storage import Artifact, read_bytes
from pipeline.store import StorageError
from pixelgen.config import require
from pixelgen.images import adm_crop

if TYPE_CHECKING:  # torch is not for the processes that only read shards: importing it takes them seconds
    import torch

    from pixelgen.train import LaneBatch

# label is null in captioned data, captions in labelled; captions have one entry, or null, per column of the source
SCHEMA = pa.schema([("key", pa.string()), ("image", pa.binary()), ("label", pa.int32()),
                    ("captions", pa.list_(pa.string()))])
WINDOW = 16  # steps whose rows are read and shuffled together
READ_AHEAD = 2  # windows that a rank keeps in preparation
PREFIXES = ("A photo of ", "A picture of ", "An image of ", "A photograph of ", "A photo showing ",
            "A picture showing ", "An image showing ")


@dataclass(frozen=True)
class Split:
    """One split of a sharded dataset: locations of its shards, the number of rows in each, and their sha256."""

    paths: tuple[str, ...]
    rows: tuple[int, ...]
    hashes: tuple[str, ...]

    @property
    def total(self) -> int:
        return sum(self.rows)

    def read(self, shard: int, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
        """Columns of a shard, once it has been found to be what the manifest describes."""
        file = pq.ParquetFile(io.BytesIO(read_bytes(self.paths[shard], self.hashes[shard])))
        return file.read(columns=list(columns))  # pq.read_table would import pandas, a second for each process


def open_split(dataset: Artifact, name: str, source: str | None = None, size: int | None = None) -> Split:
    """The split `name` of a dataset: of all its sources or of one, and of images of all stored sizes or of those with
    at least `size` pixels on a side. KeyError if there is no such."""
    chosen = dataset["sources"] if source is None else {source: dataset["sources"][source]}
    shards = [s for of in chosen.values() for s in of["splits"][name]["shards"] if size is None or s["size"] >= size]
    files = {f["path"]: f for f in dataset["files"]}
    if strangers := {s["path"] for s in shards} - files.keys():
        raise StorageError(f"{dataset.directory}: the manifest has no checksum of {', '.join(sorted(strangers))}: "
                           f"delete {dataset.directory} and run `dvc repro`")
    entries = [files[s["path"]] for s in shards]
    return Split(tuple(dataset.location(e) for e in entries), tuple(s["rows"] for s in shards),
                 tuple(e["sha256"] for e in entries))


def decode(encoded: bytes) -> np.ndarray:
    """PNG or JPEG bytes of a shard -> (H, W, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def read_images(split: Split, limit: int | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images (n, H, W, 3) uint8 and labels (n,) of each shard of labelled images in turn, at most `limit` in all."""
    left = split.total if limit is None else limit
    for shard in range(len(split.paths)):
        if left <= 0:
            return
        table = split.read(shard, ["image", "label"]).slice(0, left)
        left -= len(table)
        yield np.stack([decode(b) for b in table["image"].to_pylist()]), table["label"].to_numpy()


def first_captions(split: Split, count: int) -> list[str]:
    """The first caption of each of the first images of a split, at most `count`, to draw while training."""
    rows = split.read(0, ["captions"])["captions"].slice(0, count).to_pylist()
    return [next(caption for caption in row if caption is not None) for row in rows]


# ------------------------------------------------------------------------------------------------ the plan


@dataclass(frozen=True)
class Source:
    """A part of the mixture: its split, its share of every window, and how often each column of captions is drawn."""

    split: Split
    weight: float = 1.0
    captions: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The order of one training run: which row of which source is at (step, lane, position)."""

    sources: tuple[Source, ...]
    image_size: int  # larger stored images are resized to it
    seed: int
    batch_size: int
    lanes: int
    text: TextParams | None = None  # how captions become prompts

    def check(self) -> None:
        """ConfigError if a source is too small for its share of a batch, or its share too small for a row."""
        for number, (source, quota) in enumerate(zip(self.sources, self.quotas, strict=True)):
            require(quota > 0, f"source {number} of the mixture has weight {source.weight:g}, less than one image in "
                    f"{WINDOW * self.lane_size}: raise it or leave the source out")
            require(source.split.total * WINDOW >= quota * self.lanes, f"{source.split.total} training images are "
                    f"fewer than one batch of {-(-quota * self.lanes // WINDOW)}: lower fit.batch_size or add data")

    @property
    def lane_size(self) -> int:
        return self.batch_size // self.lanes

    @property
    def quotas(self) -> list[int]:
        """Rows of each source in each window of a lane, in proportion to the weights by largest remainders."""
        total, rows = sum(s.weight for s in self.sources), WINDOW * self.lane_size
        exact = [s.weight / total * rows for s in self.sources]
        quotas = [int(e) for e in exact]
        for i in sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])[:rows - sum(quotas)]:
            quotas[i] += 1
        return quotas

    def windows(self, start: int, stop: int) -> Iterator[int]:
        """The first step of every window from `start` to `stop`; the first may begin in the middle of one."""
        return iter([start, *range((start // WINDOW + 1) * WINDOW, stop, WINDOW)] if start < stop else [])

    def rows(self, number: int, lane: int) -> np.ndarray:
        """(WINDOW, lane_size, 3) source, shard and row of every sample that `lane` sees in window `number`."""
        parts = []
        for index, (source, quota) in enumerate(zip(self.sources, self.quotas, strict=True)):
            places = number * quota + np.arange(quota)
            shards = _places(self.seed + index, source.split.rows, self.lanes, lane, places)
            parts.append(np.concatenate([np.full((quota, 1), index), shards], axis=1))
        # 1 + number: a seed that ends in zeros is the same seed without them, which orders the shards
        shuffled = np.random.default_rng([self.seed, 0, 1 + number, 1 + lane]).permutation(np.concatenate(parts))
        return shuffled.reshape(WINDOW, self.lane_size, 3)


def _places(seed: int, rows: tuple[int, ...], lanes: int, lane: int, places: np.ndarray) -> np.ndarray:
    """(n, 2) shard and row at each of the places (n,) of a lane's endless walk through a source."""
    total = sum(rows)
    found = []
    for epoch in np.unique(places // (total // lanes)).tolist():
        order, starts, cut = _epoch_order(seed, epoch, rows)
        inside = places[places // (total // lanes) == epoch] - epoch * (total // lanes)
        ring = (cut + lane * (total // lanes) + inside) % total
        position = np.searchsorted(starts, ring, side="right") - 1
        found.append(np.stack([order[position], ring - starts[position]], axis=-1))
    return np.concatenate(found)


@functools.lru_cache(maxsize=8)
def _epoch_order(seed: int, epoch: int, rows: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, int]:
    """The permuted shards of an epoch, where each begins on the ring of rows, and where the ring is cut."""
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(len(rows))
    starts = np.concatenate([[0], np.cumsum(np.asarray(rows)[order])[:-1]])
    return order, starts, int(random.integers(sum(rows)))


def load_window(plan: Plan, lanes: Sequence[int], step: int, stop: int) -> dict[str, np.ndarray]:
    """Read and decode what `lanes` see from `step` to the end of its window (or `stop`), in training order: steps,
    within them lanes, within them samples. Columns step, lane, key, image (H, W, 3), condition (label or prompt)."""
    number, first = step // WINDOW, step % WINDOW
    tables: dict[tuple[int, int], pa.Table] = {}
    columns: dict[str, list] = {name: [] for name in ("step", "lane", "key", "image", "condition")}
    places = {lane: plan.rows(number, lane) for lane in lanes}
    dice = {lane: np.random.default_rng([plan.seed, 1, 1 + number, 1 + lane]).random((*places[lane].shape[:2], 3))
            for lane in lanes}
    for s in range(first, min(WINDOW, stop - number * WINDOW)):
        for lane in lanes:
            for (index, shard, row), die in zip(places[lane][s].tolist(), dice[lane][s], strict=True):
                source = plan.sources[index]
                if (index, shard) not in tables:
                    tables[index, shard] = source.split.read(shard)
                sample = {name: column[row].as_py() for name, column in
                          zip(SCHEMA.names, tables[index, shard].columns, strict=True)}
                columns["step"].append(number * WINDOW + s)
                columns["lane"].append(lane)
                columns["key"].append(sample["key"])
                columns["image"].append(resized(decode(sample["image"]), plan.image_size))
                columns["condition"].append(sample["label"] if plan.text is None else
                                            prompt(sample["captions"], source.captions, plan.text, die))
    return {name: np.asarray(values) for name, values in columns.items()}


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """A stored image (S, S, 3) at the size of the training, S being that or larger."""
    return image if len(image) == size else adm_crop(Image.fromarray(image), size)


def prompt(captions: Sequence[str | None], weights: Sequence[float], text: TextParams, die: np.ndarray) -> str:
    """The prompt that an image is trained with this time: one of its captions by weight, and before a short one,
    with a probability, one of `PREFIXES`. `die`: three uniform draws."""
    held = [(c, w) for c, w in zip(captions, weights, strict=True) if c is not None]
    sums = np.cumsum([w for _, w in held]) + np.finfo(float).tiny  # all weights 0: the first caption
    caption = held[int(np.searchsorted(sums, die[0] * sums[-1], side="right"))][0]
    if len(caption.split()) <= text.short_words and die[1] < text.prefix_probability:
        return PREFIXES[int(die[2] * len(PREFIXES))] + caption
    return caption


# ------------------------------------------------------------------------------------ execution by Ray tasks


def lane_batches(plan: Plan, lanes: Sequence[int], start: int, stop: int, device: torch.device,
                 encode: Callable[[Sequence[str]], torch.Tensor] | None = None) -> Iterator[list[LaneBatch]]:
    """This rank's `lanes` for every step from `start` to `stop`; windows are read and decoded ahead by Ray tasks.
    `encode` turns prompts into text features; None: the conditions are labels.

    Plain tasks rather than a Ray Data pipeline: its executor would run inside the training process, and take the
    interpreter from the training thread.
    """
    import ray

    task = ray.remote(num_cpus=0)(load_window)  # or it would wait for ever where the ranks take every processor
    todo, shared = plan.windows(start, stop), ray.put(plan)  # sent once: a large dataset has a long plan
    first = [*itertools.islice(todo, 1)]  # read right here: nothing else is to do yet
    ahead = deque(task.remote(shared, lanes, step, stop) for step in itertools.islice(todo, READ_AHEAD))
    while first or ahead:
        columns = load_window(plan, lanes, first.pop(), stop) if first else ray.get(ahead.popleft())
        ahead.extend(task.remote(shared, lanes, step, stop)
                     for step in itertools.islice(todo, READ_AHEAD - len(ahead)))
        for i in range(0, len(columns["step"]), plan.lane_size * len(lanes)):
            yield [_lane_batch({name: column[j:j + plan.lane_size] for name, column in columns.items()}, device, encode)
                   for j in range(i, i + plan.lane_size * len(lanes), plan.lane_size)]


def _lane_batch(columns: dict[str, np.ndarray], device: torch.device,
                encode: Callable[[Sequence[str]], torch.Tensor] | None) -> LaneBatch:
    import torch

    from pixelgen.train import LaneBatch

    images = torch.from_numpy(columns["image"].copy()).permute(0, 3, 1, 2).contiguous().to(device)
    condition = (torch.from_numpy(columns["condition"].copy()).long() if encode is None
                 else encode(columns["condition"].tolist()))
    return LaneBatch(int(columns["step"][0]), int(columns["lane"][0]), columns["key"].tolist(), images,
                     condition.to(device))
