"""Batches for training: rows are read in their order, decoded ahead by an executor, and dealt to their lanes.

A rank reads for its lanes alone, a window at a time. A row group that the next window needs as well is kept, so that
hardly a byte is read twice however few rows a lane takes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from PIL import Image

from pixelgen.config import CaptionConfig
from pixelgen.data.captions import prompt
from pixelgen.data.executors import Executor, InProcess, Result
from pixelgen.data.order import WINDOW, Order, windows
from pixelgen.data.shards import SCHEMA, Split, decode
from pixelgen.images import adm_crop
from pixelgen.threads import in_background

if TYPE_CHECKING:  # torch is not for the processes that only decode: importing it takes them seconds
    import torch

    from pixelgen.train import LaneBatch

PIECE = 64  # images that are decoded in one task
READS = 8  # lanes that are read for at the same time


@dataclass(frozen=True)
class MixedSource:
    """A part of the mixture: its split, its share of every window, and how often each column of captions is drawn."""

    split: Split
    share: float = 1.0
    captions: tuple[float, ...] = ()


@dataclass(frozen=True)
class Plan:
    """What one training run reads, and in which order."""

    sources: tuple[MixedSource, ...]
    image_size: int  # larger stored images are resized to it
    seed: int
    batch_size: int
    lanes: int
    text: CaptionConfig | None = None  # how captions become prompts; None: the conditions are labels

    @functools.cached_property
    def order(self) -> Order:
        return Order(tuple(source.split.rows for source in self.sources),
                     tuple(source.share for source in self.sources), self.seed, self.batch_size, self.lanes)


@dataclass(frozen=True)
class Row:
    """A sample before it is decoded."""

    step: int
    lane: int
    key: str
    image: bytes
    condition: int | str  # label or prompt


class Lane:
    """Reads what one lane sees, window after window."""

    def __init__(self, plan: Plan, lane: int):
        self.plan, self.lane = plan, lane
        self.groups: dict[tuple[int, int, int], list[pa.Array]] = {}  # columns, by source, shard and row group
        self.footers: dict[tuple[int, int], Any] = {}  # by source and shard

    def window(self, number: int, steps: range) -> list[list[Row]]:
        """The rows of some steps of a window, step by step. ShardError if a shard is not what it should be."""
        places, dice = self.places(number), self.plan.order.dice(number, self.lane)
        self.fetch(places[steps.start:steps.stop])
        rows = [[self.row(number * WINDOW + step, *sample) for sample in zip(places[step].tolist(), dice[step],
                                                                              strict=True)] for step in steps]
        self.keep(self.places(number + 1))
        return rows

    def places(self, number: int) -> np.ndarray:
        """(WINDOW, lane_size, 4) source, shard, row group and row in the group of every sample of a window."""
        places = self.plan.order.window(number, self.lane)
        found = np.insert(places, 2, 0, axis=-1)
        for source, shard in np.unique(places[..., :2].reshape(-1, 2), axis=0).tolist():
            here = (places[..., :2] == (source, shard)).all(-1)
            starts, rows = self.plan.sources[source].split.starts(shard), places[here][:, 2]
            group = np.searchsorted(starts, rows, side="right") - 1
            found[here, 2:] = np.stack([group, rows - starts[group]], axis=-1)
        return found

    def fetch(self, places: np.ndarray) -> None:
        """Read what is not there yet of what these samples need."""
        for source, shard, group in np.unique(places[..., :3].reshape(-1, 3), axis=0).tolist():
            split = self.plan.sources[source].split
            if (source, shard) not in self.footers:
                self.footers[source, shard] = split.footer(shard)
            if (source, shard, group) not in self.groups:
                table = split.read_group(shard, group, self.footers[source, shard])
                self.groups[source, shard, group] = [table[name].combine_chunks() for name in SCHEMA.names]

    def keep(self, places: np.ndarray) -> None:
        """Let go of what none of these samples needs."""
        groups = {*map(tuple, places[..., :3].reshape(-1, 3).tolist())}
        self.groups = {key: group for key, group in self.groups.items() if key in groups}
        shards = {key[:2] for key in groups}
        self.footers = {key: footer for key, footer in self.footers.items() if key in shards}

    def row(self, step: int, place: tuple[int, int, int, int], dice: np.ndarray) -> Row:
        source, shard, group, number = place
        key, image, label, captions = (column[number].as_py() for column in self.groups[source, shard, group])
        text = self.plan.text
        return Row(step, self.lane, key, image, label if text is None else
                   prompt(captions, self.plan.sources[source].captions, text, dice))


def lane_batches(plan: Plan, lanes: Sequence[int], start: int, stop: int, device: torch.device,
                 encode: Callable[[Sequence[Any]], torch.Tensor], executor: Executor = InProcess()
                 ) -> Generator[list[LaneBatch], None, None]:
    """This rank's `lanes` for every step from `start` to `stop`. `encode` turns the labels or prompts of a step into
    conditions (`Conditioning.encode`). An executor that works beside this process is kept busy with the steps that come
    next."""
    from pixelgen.train import LaneBatch

    lane_size = plan.order.lane_size
    whole = lane_size * len(lanes)
    ahead = executor.ahead + -(-whole // PIECE) if executor.ahead else 0
    with contextlib.closing(read_rows(plan, lanes, start, stop, threads=READS if ahead else 0)) as rows:
        steps = gathered(decoded(rows, plan.image_size, executor, ahead), whole, pinned=device.type == "cuda")
        with contextlib.closing(in_background(steps) if ahead else steps) as coming:
            for chosen, pixels in coming:
                condition = encode([row.condition for row in chosen]).to(device, non_blocking=True)
                images = pixels.to(device, non_blocking=True).permute(0, 3, 1, 2)
                yield [LaneBatch(of_lane[0].step, of_lane[0].lane, [row.key for row in of_lane],
                                 images[i:i + lane_size].contiguous(), condition[i:i + lane_size])
                       for i in range(0, whole, lane_size) for of_lane in [chosen[i:i + lane_size]]]


def gathered(samples: Iterator[tuple[Row, np.ndarray]], count: int, pinned: bool
             ) -> Generator[tuple[list[Row], torch.Tensor], None, None]:
    """The rows of each step with their images (count, size, size, 3), `pinned` so that a GPU takes them beside its
    work."""
    import torch

    while step := [*itertools.islice(samples, count)]:
        images = torch.from_numpy(np.stack([image for _, image in step]))
        yield [row for row, _ in step], images.pin_memory() if pinned else images


def read_rows(plan: Plan, lanes: Sequence[int], start: int, stop: int, threads: int
              ) -> Generator[Row, None, None]:
    """The rows in the order of training: steps, within them lanes, within them samples. If `threads` is not 0, the
    next window is read in the background, for up to `threads` lanes at once."""
    readers = [Lane(plan, lane) for lane in lanes]
    with contextlib.ExitStack() as stack:
        each = stack.enter_context(ThreadPoolExecutor(threads, "lanes")).map if threads else map
        whole = (zip(*each(lambda lane: lane.window(number, steps), readers), strict=True)  # noqa: B023
                 for number, steps in windows(start, stop))
        for window in stack.enter_context(contextlib.closing(in_background(whole))) if threads else whole:
            for step in window:
                yield from itertools.chain.from_iterable(step)


def decoded(rows: Iterator[Row], size: int, executor: Executor, ahead: int) -> Iterator[tuple[Row, np.ndarray]]:
    """Each row with its decoded image (size, size, 3). Up to `ahead` more tasks are submitted before a result is waited
    for."""
    pending: deque[tuple[list[Row], Result]] = deque()
    while True:
        while len(pending) <= ahead and (piece := [*itertools.islice(rows, PIECE)]):
            pending.append((piece, executor.submit(decode_images, [row.image for row in piece], size)))
        if not pending:
            return
        piece, result = pending.popleft()
        yield from zip(piece, result.result(), strict=True)


def decode_images(encoded: Sequence[bytes], size: int) -> np.ndarray:
    """(N, size, size, 3) uint8."""
    return np.stack([resized(decode(one), size) for one in encoded])


def resized(image: np.ndarray, size: int) -> np.ndarray:
    """A stored image (S, S, 3) at the size of the training, S being that or larger."""
    return image if len(image) == size else adm_crop(Image.fromarray(image), size)
