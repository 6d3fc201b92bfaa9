"""The order in which training sees the rows of its shards: a pure function of a seed and of the rows in each shard.

In each epoch of a source its shards are permuted, their rows laid end to end in a ring, and the ring is cut at a random
place and from there into equal segments, one a lane. A lane takes from every source of the mixture its share of each
window of `WINDOW` steps, and shuffles the window. Nothing depends on how many ranks there are or where a run was
interrupted. The few rows beyond the last segment sit out one epoch, other ones each time.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pixelgen.config import require

WINDOW = 16  # steps whose rows are shuffled together


@dataclass(frozen=True)
class Order:
    """Which row of which source is at (step, lane, position)."""

    rows: tuple[tuple[int, ...], ...]  # of each source, in each of its shards
    shares: tuple[float, ...]  # of each source in every window, relatively
    seed: int
    batch_size: int
    lanes: int

    def check(self) -> None:
        """ConfigError if a source is too small for its share of a batch, or its share too small for a row."""
        for number, (rows, share, quota) in enumerate(zip(self.rows, self.shares, self.quotas, strict=True)):
            require(quota > 0, f"source {number} of the mixture has the share {share:g}, less than one image in "
                    f"{WINDOW * self.lane_size}: raise it or leave the source out")
            require(sum(rows) >= self.lanes, f"source {number} of the mixture has {sum(rows)} training images, fewer "
                    f"than fit.lanes {self.lanes}: lower that, add data, or leave the source out")
            require(sum(rows) * WINDOW >= quota * self.lanes, f"{sum(rows)} training images are fewer than one batch "
                    f"of {-(-quota * self.lanes // WINDOW)}: lower fit.batch_size or add data")

    @property
    def lane_size(self) -> int:
        """Samples of a lane in each step."""
        return self.batch_size // self.lanes

    @property
    def quotas(self) -> list[int]:
        """Rows of each source in each window of a lane, in proportion to the shares by largest remainders."""
        total, rows = sum(self.shares), WINDOW * self.lane_size
        exact = [share / total * rows for share in self.shares]
        quotas = [int(e) for e in exact]
        for i in sorted(range(len(exact)), key=lambda i: quotas[i] - exact[i])[:rows - sum(quotas)]:
            quotas[i] += 1
        return quotas

    def window(self, number: int, lane: int) -> np.ndarray:
        """(WINDOW, lane_size, 3) source, shard and row of every sample that `lane` sees in window `number`."""
        parts = []
        for index, (rows, quota) in enumerate(zip(self.rows, self.quotas, strict=True)):
            places = number * quota + np.arange(quota)
            shards = _places(self.seed + index, rows, self.lanes, lane, places)
            parts.append(np.concatenate([np.full((quota, 1), index), shards], axis=1))
        # 1 + number: a seed that ends in zeros is the same seed without them, which orders the shards
        shuffled = np.random.default_rng([self.seed, 0, 1 + number, 1 + lane]).permutation(np.concatenate(parts))
        return shuffled.reshape(WINDOW, self.lane_size, 3)

    def dice(self, number: int, lane: int) -> np.ndarray:
        """(WINDOW, lane_size, 3) in [0, 1): what is left to chance in each of these samples."""
        return np.random.default_rng([self.seed, 1, 1 + number, 1 + lane]).random((WINDOW, self.lane_size, 3))


def windows(start: int, stop: int) -> Iterator[tuple[int, range]]:
    """The number of every window from step `start` to `stop`, and which of its steps these are."""
    for number in range(start // WINDOW, -(-stop // WINDOW)) if start < stop else ():
        first = number * WINDOW
        yield number, range(max(start - first, 0), min(stop - first, WINDOW))


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
