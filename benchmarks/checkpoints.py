"""For how long does a checkpoint hold up training, and how long until it is stored?

`python -m benchmarks.checkpoints --megabytes 1000 --root s3://bucket/prefix` (or without a root: into a temporary
directory) saves a state of that size some times, and prints the median of both.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pipeline.store import open_store
from pixelgen.saving import Checkpoints, writing
from pixelgen.store import LocalStore


@dataclass
class State:
    """What a writer needs of a training state."""

    step: int
    weights: torch.Tensor

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "weights": self.weights}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--root", help="s3://bucket/prefix; objects below checkpoints/ there are deleted")
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    weights = torch.randn(arguments.megabytes * 250_000)
    held, stored = [], []
    with tempfile.TemporaryDirectory() as folder:
        store = open_store(arguments.root) if arguments.root else LocalStore(Path(folder))
        checkpoints = Checkpoints(Path(folder), store)
        with writing(checkpoints, keep=1, every=None) as writer:
            for step in range(1, arguments.times + 1):
                start = time.perf_counter()
                writer.save(State(step, weights), {})  # type: ignore[arg-type]
                held.append(time.perf_counter() - start)
                writer.wait()
                stored.append(time.perf_counter() - start)
        for name in store.sizes("checkpoints/"):
            store.delete(name)
    print(f"{arguments.megabytes} MB: training held up for {statistics.median(held):.2f} s, stored after "
          f"{statistics.median(stored):.2f} s ({arguments.root or 'a local directory'}, median of {arguments.times})")


if __name__ == "__main__":
    main()
