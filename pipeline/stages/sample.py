"""sample: images of every class from a trained model, by Ray Data actors; finished parts survive an interruption."""

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pipeline.cluster import Cluster, connect, ray_data, read_cluster
from pipeline.params import SampleParams, read_params, stage_params
from pipeline.runs import lease, run_directory, run_stage
from pipeline.storage import MANIFEST, fresh_directory, publish, read_manifest, sha256, write_atomic
from pixelgen.generate import PixelGen
from pixelgen.images import grid

MODELS, OUT = Path("out/train"), Path("out/sample")
SHUFFLE_SEED = 0  # of the order in samples.npz; sorted by class, a split of the Inception Score would see few
GRID_COLUMNS, GRID_ROWS = 10, 10
COMPUTED = 32  # samples that the network always sees at once: no byte depends on the size of a part


@dataclass(frozen=True)
class Part:
    """Some images, the unit of work and of resumption."""

    path: str
    labels: list[int]
    seeds: list[int]


def main() -> None:
    key = sys.argv[1]
    params, cluster = stage_params(read_params().sample, key, "sample"), read_cluster()
    model = MODELS / params.model / "model"
    read_manifest(model, "model")
    classes = read_params().train[params.model].denoiser.num_classes
    directory = run_directory("sample", key, params, sha256(model / MANIFEST)).resolve()
    parts = plan_parts(params, classes, directory)
    with lease(directory / "driver.lease", patience=5):
        missing = [p for p in parts if not Path(p.path).exists()]
        if missing:
            draw(missing, params, model.resolve(), cluster)
        write_outputs(OUT / key, parts, params)


def plan_parts(params: SampleParams, classes: int, directory: Path) -> list[Part]:
    """Image i has class i modulo the number of classes and seed SEED + i, whatever the size of the parts."""
    total = params.per_class * classes
    numbers = [range(i, min(i + params.part_size, total)) for i in range(0, total, params.part_size)]
    return [Part(str(directory / f"part-{n:06d}.npy"), [i % classes for i in r], [params.seed + i for i in r])
            for n, r in enumerate(numbers)]


def draw(parts: list[Part], params: SampleParams, model: Path, cluster: Cluster) -> None:
    """Let every actor draw the parts it is given, each written atomically."""
    with connect(cluster):
        data = ray_data()
        work = data.from_items([vars(p) for p in parts], override_num_blocks=len(parts))
        done = work.map_batches(
            Artist, fn_constructor_args=(params, model, cluster), batch_size=1,
            compute=data.ActorPoolStrategy(size=cluster.workers),
            num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)
        for _ in tqdm(done.iter_rows(), desc="sample", unit="part", total=len(parts)):
            pass


class Artist:
    """A Ray Data actor that holds the model."""

    def __init__(self, params: SampleParams, model: Path, cluster: Cluster):
        torch.set_num_threads(cluster.threads_per_worker)
        self.sampler = params.sampler
        self.model = PixelGen.from_pretrained(model, params.weights, cluster.device, params.precision, params.compile)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        (path,), (labels,), (seeds,) = batch["path"], batch["labels"], batch["seeds"]
        images = self.model.generate([int(y) for y in labels], [int(s) for s in seeds], self.sampler, COMPUTED)
        data = io.BytesIO()
        np.save(data, images)
        write_atomic(Path(path), data.getvalue())
        return {"path": batch["path"]}


def write_outputs(out: Path, parts: list[Part], params: SampleParams) -> None:
    """samples.npz (`arr_0`, NHWC uint8, shuffled), labels.npy in the same order, and a grid, one class a column."""
    images = np.concatenate([np.load(p.path, allow_pickle=False) for p in parts])
    labels = np.concatenate([p.labels for p in parts])
    fresh_directory(out)
    columns = min(GRID_COLUMNS, int(labels.max()) + 1)
    shown = [i for i in range(len(labels)) if labels[i] < columns][:columns * GRID_ROWS]
    grid(images[shown], columns).save(out / "grid.png")
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(images))
    np.savez(out / "samples.npz", arr_0=images[order])
    np.save(out / "labels.npy", labels[order])
    publish(out, "samples", params, images=len(images))


if __name__ == "__main__":
    from pipeline.stages.sample import main as imported  # by name, so that Ray's workers import what they run

    run_stage(imported)
