"""reference: the statistics of a dataset that samples are compared with, as an npz in ADM's layout.

Mean and covariance are of the whole training split; a random part of its images is kept for precision and
recall. A published npz can stand in for all that: it is checked, and taken over as it is.
"""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from pipeline.cluster import read_cluster
from pipeline.judges import load_extractor
from pipeline.params import read_params, stage_params
from pipeline.runs import run_stage
from pipeline.storage import Storage, fresh_directory
from pixelgen.config import ConfigError, require
from pixelgen.data.shards import Split, read_images
from pixelgen.errors import UserError
from pixelgen.metrics import fid

OUT, SHARDS, WEIGHTS = Path("out/reference"), Path("out/shard"), Path("out/weights")


def main() -> None:
    key = sys.argv[1]
    whole, cluster = read_params(), read_cluster()
    params, storage = stage_params(whole.reference, key, "reference"), Storage(whole.storage.root)
    torch.set_num_threads(cluster.threads)
    storage.check()
    weights = storage.open(WEIGHTS, "weights").local()
    extractor = load_extractor(params.extractor, weights, torch.device(cluster.device))
    if params.npz is None:
        dataset = storage.open(SHARDS / params.dataset, "dataset")
        split = dataset.split("train")
        require(split.total > 1, f"dataset {params.dataset} has {split.total} training image: no covariance is of one")
        reference = statistics(extractor, split, params.images, params.batch_size)
    else:
        reference = published(extractor, params.npz)
    out = fresh_directory(OUT / key)
    fid.save_reference(out / "reference.npz", reference)
    storage.publish(out, "reference", params, extractor=extractor.name, dataset=params.dataset,
                    images=0 if reference.images is None else len(reference.images))


def statistics(extractor: fid.Extractor, split: Split, kept: int, batch_size: int) -> fid.Reference:
    """Statistics of all images of a split, with `kept` of them (all, if there are fewer), always the same."""
    chosen = np.zeros(split.total, bool)
    chosen[np.random.RandomState(0).permutation(split.total)[:kept]] = True  # its stream never changes
    parts: list[np.ndarray] = []

    def stream() -> Iterator[np.ndarray]:
        left = chosen
        for images, _ in read_images(split):
            here, left = left[:len(images)], left[len(images):]
            parts.append(images[here])
            yield images

    reference = fid.build_reference(extractor, stream(), batch_size, None)
    return dataclasses.replace(reference, images=np.concatenate(parts))


def published(extractor: fid.Extractor, npz: str) -> fid.Reference:
    """The reference in `npz`. ConfigError if it cannot be read or holds another extractor's features."""
    try:
        reference = fid.load_reference(npz)
    except (OSError, UserError) as error:
        raise ConfigError(f"{error}; set npz of this reference to a file in ADM's layout or null") from error
    probe = fid.extract(extractor, np.zeros((1, 32, 32, 3), np.uint8), 1)
    found, expected = (len(reference.mu), len(reference.mu_s)), (probe.pool.shape[1], probe.spatial.shape[1])
    if found != expected:
        raise ConfigError(f"{npz}: {found} pool and spatial features, but {extractor.name} makes {expected}: "
                          "it is of another extractor")
    return reference


if __name__ == "__main__":
    run_stage(main)
