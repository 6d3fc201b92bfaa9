"""The reader of batches: bytes read for each byte used, and images a second beside webdataset with a DataLoader.

`python -m benchmarks.reader bytes` reads windows of a large dataset, of which one shard stands for all, at several
numbers of lanes. `python -m benchmarks.reader speed` makes 256-pixel JPEG images, as shards and as tars, and reads
batches of 32 from both, in turn, in the process and with two others (needs `pip install webdataset`).
"""

import dataclasses
import hashlib
import io
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixelgen.data.executors import InProcess, processes
from pixelgen.data.feed import MixedSource, Plan, lane_batches, read_rows
from pixelgen.data.order import WINDOW
from pixelgen.data.shards import File, LocalFile, Shard, Split, describe_pieces, encode_shard

LANES = ((2, 32), (32, 8), (192, 8), (512, 8))  # how many, and images of each in a step
COUNT, SHARD, BATCH, SKIPPED, ROUNDS = 4000, 1000, 32, 20, 3


@dataclasses.dataclass(frozen=True)
class Counted:
    file: File
    sizes: list[int]

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        data = self.file.read(start, stop)
        self.sizes.append(len(data))
        return data


def measure_bytes(folder: Path) -> None:
    """By lanes: bytes read ÷ bytes of the rows used, of one source of 1.28 million rows, in eight windows."""
    shard = write_shard(folder / "one.parquet", [row(n, bytes(2000)) for n in range(SHARD)])
    for lanes, size in LANES:
        read: list[int] = []
        counted = dataclasses.replace(shard, file=Counted(shard.file, read))
        plan = Plan((MixedSource(Split((counted,) * 1280)),), 256, 0, lanes * size, lanes)
        chosen = range(0, lanes, max(lanes // 16, 1))
        used = len([*read_rows(plan, chosen, 0, 8 * WINDOW, threads=0)])
        print(f"{lanes} lanes of {size}: {sum(read) * SHARD / (used * shard.pieces[-1][1]):.2f}")


def row(number: int, image: bytes) -> dict[str, object]:
    return {"key": f"{number:06}", "image": image, "label": number % 1000}


def write_shard(path: Path, rows: list[dict[str, object]]) -> Shard:
    data = encode_shard(rows)
    path.write_bytes(data)
    return Shard(LocalFile(path), len(rows), hashlib.sha256(data).hexdigest(), describe_pieces(data))


def photograph(random: np.random.Generator) -> bytes:
    """Smooth, with grain: about as many bytes as a photograph of 256 pixels takes at quality 95."""
    coarse = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((256, 256))
    grain = np.asarray(coarse) + random.normal(0, 6, (256, 256, 1))
    file = io.BytesIO()
    Image.fromarray(grain.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95, subsampling=0)
    return file.getvalue()


def rate(batches: Iterator[object]) -> float:
    """Images a second, without what starts."""
    for _ in range(SKIPPED):
        next(batches)
    start, count = time.perf_counter(), 0
    for _ in range(3 * COUNT // BATCH - SKIPPED):
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - start)


def measure_speed(folder: Path) -> None:
    import webdataset

    random, shards, tars = np.random.default_rng(0), [], []
    for number in range(COUNT // SHARD):
        images = [photograph(random) for _ in range(SHARD)]
        shards.append(write_shard(folder / f"{number}.parquet", [row(n, image) for n, image in enumerate(images)]))
        tars.append(str(folder / f"{number}.tar"))
        with tarfile.open(tars[-1], "w") as tar:
            for n, image in enumerate(images):
                for ending, data in (("jpg", image), ("cls", str(n).encode())):
                    info = tarfile.TarInfo(f"{n:06}.{ending}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    print(f"{COUNT} images of {sum(shard.pieces[-1][1] for shard in shards) / COUNT / 1000:.0f} kB")
    plan = Plan((MixedSource(Split(tuple(shards))),), 256, 0, BATCH, 4)

    def ours(workers: int) -> float:
        stop = 3 * COUNT // BATCH + 1
        if not workers:
            return rate(lane_batches(plan, range(4), 0, stop, torch.device("cpu"), torch.tensor, InProcess()))
        with processes(workers) as executor:
            return rate(lane_batches(plan, range(4), 0, stop, torch.device("cpu"), torch.tensor, executor))

    def theirs(workers: int) -> float:
        dataset = (webdataset.WebDataset(tars, resampled=True).shuffle(1000).decode("pil")
                   .to_tuple("jpg", "cls").map_tuple(pixels, int).batched(BATCH))
        return rate(iter(webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)))

    ways: dict[str, Callable[[int], float]] = {"ours": ours, "webdataset": theirs}
    for workers in (0, 2):
        for _ in range(ROUNDS):
            print(f"{workers} processes:", *(f"{name} {way(workers):.0f} images/s" for name, way in ways.items()))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        {"bytes": measure_bytes, "speed": measure_speed}[sys.argv[1]](Path(place))
