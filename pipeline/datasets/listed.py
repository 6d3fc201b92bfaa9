"""Sources whose samples are listed one by one, before any is read, and dealt to the units of work at random."""

from abc import abstractmethod
from collections.abc import Iterator
from functools import partial

from pipeline.datasets import SPLITS, DatasetParams, Item, Load, Sample, Source, Task, refuse


class ListedSource(Source):
    """A source that lists its samples."""

    @abstractmethod
    def listing(self, data: DatasetParams, /) -> tuple[list[str] | None, list[Item]]:
        """Names of the classes or None, and one item for each sample: in `train` at least one of each class."""

    @abstractmethod
    def load(self, data: DatasetParams, item: Item, /) -> Sample:
        """Read one item. Rejected or Skipped if it cannot be used."""

    def tasks(self, data: DatasetParams) -> tuple[list[str] | None, list[Task]]:
        classes, items = self.listing(data)
        return classes, deal(items, data.rows_per_shard, data.seed)

    def read(self, data: DatasetParams, task: Task) -> Iterator[tuple[str, Load]]:
        for item in task.items:
            yield item.key, refuse(item.refused) if item.refused else partial(self.load, data, item)


def deal(items: list[Item], rows_per_shard: int, seed: int) -> list[Task]:
    """Deal the items of each split to as few tasks as possible, at random, and evenly to within one."""
    import numpy as np

    tasks: list[Task] = []
    for number, split in enumerate(SPLITS):
        members = [item for item in items if item.split == split]
        order = np.random.default_rng([seed, number]).permutation(len(members))
        parts = np.array_split(order, -(-len(members) // rows_per_shard)) if members else []
        tasks += [Task([members[i] for i in part], len(part), shuffle=False) for part in parts]
    return tasks
