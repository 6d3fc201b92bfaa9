"""reference: the statistics of a dataset that samples are compared with, as an npz in ADM's layout.

Mean and covariance are of the whole training split; a random part of its images is kept for precision and recall.
Ray Data actors look at a part of the images each and leave its moments, so that finished parts survive an interruption
and this process neither needs a GPU nor holds more than a part. A published npz can stand in for all that: it is
checked, and taken over as it is.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.checkout import data_path
from pipeline.cluster import Cluster, work_through
from pipeline.networks import Network
from pipeline.params import ReferenceParams
from pipeline.parts import read_part, write_array, write_arrays
from pipeline.runs import clear, working
from pipeline.stage import Stage
from pipeline.storage import Artifact, fresh_directory
from pixelgen.config import ConfigError, require
from pixelgen.data.shards import read_images
from pixelgen.errors import StorageError, UserError
from pixelgen.metrics import fid
from pixelgen.metrics.fid import Moments, Reference
from pixelgen.npz import Stream
from pixelgen.store import Store

PART = 20_000  # images in one unit of work and of resumption; with Inception its moments take 66 MB
HELD = 256  # images in a file of kept ones


def run(stage: Stage) -> None:
    params: ReferenceParams = stage.own
    cluster = stage.cluster
    torch.set_num_threads(cluster.threads)
    networks, dataset = stage.open("networks"), stage.open("shard", params.dataset)
    network = stage.params.networks[params.extractor]
    if params.npz is None:
        require((total := dataset.split("train").total) > 1,
                f"dataset {params.dataset} has {total} training image: no covariance is of one")
        directory = stage.run_directory(params, network.meaning, dataset.identity, networks.part(params.extractor))
        state = stage.storage.run(directory)
        parts: list[dict[str, Any]] = [{"name": f"part-{start:09d}.npz", "start": start, "stop": start + PART}
                                       for start in range(0, total, PART)]
        with working(directory):
            work_through(parts, MomentWorker, (params, network, dataset, networks, state, cluster), cluster,
                         "reference", state)
            extractor, reference = merged(state, [part["name"] for part in parts])
            write(stage, dataset, extractor, reference, kept_images(state, min(params.images, total)))
            if stage.storage.root:
                for name in state.sizes():  # moments of ImageNet take gigabytes
                    state.delete(name)
            clear(directory)
    else:
        write(stage, dataset, *published(params, network, networks.local() / params.extractor), None)


def write(stage: Stage, dataset: Artifact, extractor: str, reference: Reference, images: Stream | None) -> None:
    """The output; `images`: those of the reference, where they come a few at a time. It is also of another identity if
    the dataset is, so that what is compared with both is done again, whatever the reference was made of."""
    out, kept = fresh_directory(stage.out), images or reference.images
    fid.save_reference(out / "reference.npz", reference, images)
    stage.storage.publish(out, "reference", stage.own, extractor=extractor, dataset=dataset.identity,
                          npz=stage.own.npz, images=0 if kept is None else kept.shape[0])


class MomentWorker:
    """What an actor does: it holds the extractor, and leaves the moments of the features of a part, and those of its
    images that are kept: all of them in a small dataset, so they go into files of a few before the moments."""

    def __init__(self, params: ReferenceParams, network: Network, dataset: Artifact, networks: Artifact, state: Store,
                 cluster: Cluster):
        self.params, self.state, self.split = params, state, dataset.split("train")
        self.extractor = network.extractor(networks.local() / params.extractor, torch.device(cluster.device))
        self.chosen = np.zeros(self.split.total, bool)
        order = np.random.RandomState(0).permutation(self.split.total)  # its stream never changes
        self.chosen[order[:params.images]] = True

    def __call__(self, part: dict[str, Any]) -> None:
        pool, spatial = fid.survey(self.extractor, self.images(part["start"], part["stop"]), self.params.batch_size)
        arrays = {"extractor": np.array(self.extractor.name)}
        for name, moments in (("pool", pool), ("spatial", spatial)):
            arrays |= {f"{name}_{field}": np.asarray(value) for field, value in vars(moments).items()}
        write_arrays(self.state, part["name"], arrays)

    def images(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Those of a part, a batch at a time; the chosen ones are kept on the way."""
        held: list[np.ndarray] = []
        files, at = itertools.count(), start
        for images, _ in read_images(self.split, start, stop, self.params.batch_size):
            held += [image.copy() for image in images[self.chosen[at:at + len(images)]]]
            at += len(images)
            while len(held) >= HELD or (held and at == min(stop, self.split.total)):
                write_array(self.state, f"kept-{start:09d}-{next(files):06d}.npy", np.stack(held[:HELD]))
                held = held[HELD:]
            yield images


def merged(state: Store, names: list[str]) -> tuple[str, Reference]:
    """The extractor's name, and the statistics of all parts together, always merged in the same order."""
    totals: dict[str, Moments] = {}
    extractor = ""
    for name in names:
        with read_part(state, name) as part:
            extractor = str(part["extractor"])
            for kind in ("pool", "spatial"):
                moments = Moments(int(part[f"{kind}_count"]), part[f"{kind}_mean"], part[f"{kind}_scatter"])
                if kind in totals:
                    totals[kind].merge(moments)
                else:
                    totals[kind] = moments
    pool, spatial = totals["pool"], totals["spatial"]
    return extractor, Reference(pool.mean, pool.covariance(), spatial.mean, spatial.covariance(), None)


def kept_images(state: Store, count: int) -> Stream:
    """The images that the actors have kept, in the order of the dataset."""
    def read(name: str) -> np.ndarray:
        try:
            return read_part(state, name)
        except StorageError:  # the part that has written it is to be done again
            state.delete(f"part-{name.split('-')[1]}.npz")
            raise

    rows = map(read, sorted(state.sizes("kept-")))
    first = next(rows)
    return Stream((count, *first.shape[1:]), first.dtype, itertools.chain([first], rows))


def published(params: ReferenceParams, network: Network, folder: Path) -> tuple[str, Reference]:
    """The extractor's name, and the reference in the params' npz. ConfigError if it cannot be read or holds another
    extractor's features."""
    npz = str(data_path(str(params.npz)))
    try:
        reference = fid.load_reference(npz)
    except (OSError, UserError) as error:
        raise ConfigError(f"{error}; set npz of this reference to a file in ADM's layout or null") from error
    extractor = network.extractor(folder, torch.device("cpu"))  # one image: no GPU is worth it
    probe = fid.extract(extractor, np.zeros((1, 32, 32, 3), np.uint8), 1)
    found, expected = (len(reference.mu), len(reference.mu_s)), (probe.pool.shape[1], probe.spatial.shape[1])
    if found != expected:
        raise ConfigError(f"{npz}: {found} pool and spatial features, but {extractor.name} makes {expected}: "
                          "it is of another extractor")
    return extractor.name, reference

