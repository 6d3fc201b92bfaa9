"""What workers do for the ADM suite: features of a part of the images, and figures from the features of all."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline.cluster import Cluster
from pipeline.metrics import Task
from pipeline.metrics.adm import AdmSuite
from pipeline.networks import Network
from pipeline.parts import read_part, write_arrays
from pipeline.storage import write_sealed
from pixelgen.data.shards import read_images
from pixelgen.generate import BATCH
from pixelgen.metrics.fid import (
    Features,
    Reference,
    adm_suite,
    extract,
    frechet_distance,
    load_reference,
    load_samples,
    mean_and_covariance,
)
from pixelgen.npz import Rows
from pixelgen.store import Store


class FeatureWorker:
    """What an actor does: it holds the extractor, and leaves the features of a part, 20 kB an image with Inception."""

    def __init__(self, task: Task, state: Store, cluster: Cluster):
        self.task, self.state, self.device = task, state, cluster.device
        metric = task.evaluate.metric
        assert isinstance(metric, AdmSuite)
        self.batch_size = metric.batch_size
        role, network = extractor_of(task)
        self.extractor = network.extractor(task.networks.local() / role, torch.device(cluster.device))

    def __call__(self, part: dict[str, Any]) -> None:
        arrays = {"extractor": np.array(self.extractor.name)}
        for source, start, stop in part["pieces"]:
            features = extract(self.extractor, self.images(source, start, stop), self.batch_size)
            arrays |= {f"{source}_{name}": array for name, array in vars(features).items()}
        write_arrays(self.state, part["name"], arrays)

    def images(self, source: str, start: int, stop: int) -> Iterator[np.ndarray]:
        """Some of a source, a batch at a time."""
        if source == "untrained":
            return self.untrained(start, stop)
        if source == "heldout":
            assert self.task.dataset
            split = self.task.dataset.split("heldout")
            return (images for images, _ in read_images(split, start, stop, self.batch_size))
        return (self.samples if source == "samples" else self.reference).chunks(self.batch_size, start, stop)

    @functools.cached_property
    def samples(self) -> Rows:
        return load_samples(self.task.samples.local() / "samples.npz")

    @functools.cached_property
    def reference(self) -> Rows:
        images = reference_of(self.task).images
        assert isinstance(images, Rows)
        return images

    def untrained(self, start: int, stop: int) -> Iterator[np.ndarray]:
        classes, model = self.task.train.denoiser.num_classes, self.task.untrained(self.device)
        assert classes is not None
        for first in range(start, stop, BATCH):
            numbers = range(first, min(first + BATCH, stop))
            yield model.generate([i % classes for i in numbers], numbers, self.task.sampling.sampler, BATCH)


class FigureWorker:
    """What one actor does at the end: figures from the features of all parts, 20 kB an image with Inception."""

    def __init__(self, task: Task, state: Store, cluster: Cluster):
        self.task, self.state, self.device = task, state, cluster.device

    def __call__(self, part: dict[str, Any]) -> None:
        extractor, features = self.collected(part["parts"])
        reference, sample = reference_of(self.task), features["samples"]
        real = features["reference"].pool if "reference" in features else None
        metrics: dict[str, Any] = adm_suite(reference, real, sample, extractor, self.device)
        classifies = extractor_of(self.task)[1].classifies
        if classifies:
            labels = np.load(self.task.samples.local() / "labels.npy", allow_pickle=False)
            metrics["class_accuracy"] = accuracy(sample, labels)
        if self.task.dataset:
            metrics |= baselines(extractor, reference, features)
            if classifies:
                split = self.task.dataset.split("heldout")
                shards = range(len(split.shards))
                labels = np.concatenate([split.read(n, ["label"])["label"].to_numpy() for n in shards])
                metrics["class_accuracy_heldout"] = accuracy(features["heldout"], labels)
        write_sealed(self.state, part["name"], json.dumps(metrics | {"extractor": extractor}).encode())

    def collected(self, parts: list[dict[str, Any]]) -> tuple[str, dict[str, Features]]:
        """The extractor's name, and the features of each source."""
        pieces: dict[str, dict[str, list[np.ndarray]]] = {}
        extractor = ""
        for part in parts:
            with read_part(self.state, part["name"]) as found:
                extractor = str(found["extractor"])
                for source, _, _ in part["pieces"]:
                    for name in ("pool", "spatial", "logits"):
                        pieces.setdefault(source, {}).setdefault(name, []).append(found[f"{source}_{name}"])
        return extractor, {source: Features(**{name: np.concatenate(arrays) for name, arrays in named.items()})
                           for source, named in pieces.items()}


def extractor_of(task: Task) -> tuple[str, Network]:
    """The role and the network of whose features the figures are."""
    role = task.params.reference[task.evaluate.reference].extractor
    return role, task.params.networks[role]


def reference_of(task: Task) -> Reference:
    assert task.reference
    return load_reference(task.reference.local() / "reference.npz")


def accuracy(features: Features, labels: np.ndarray) -> float:
    """Share of images that the extractor's own classifier takes for the class they were drawn as."""
    return float((features.logits.argmax(1) == labels).mean())


def baselines(extractor: str, reference: Reference, features: dict[str, Features]) -> dict[str, float]:
    """Floor and ceiling of the Fréchet distance, and how much of the way down to the floor the samples have come."""
    reached, floor, ceiling = (
        frechet_distance(reference.mu, reference.sigma, *mean_and_covariance(features[source].pool))
        for source in ("samples", "heldout", "untrained"))
    return {f"fd_{extractor}_floor": floor, f"fd_{extractor}_ceiling": ceiling,
            "share_of_way_to_floor": (ceiling - reached) / (ceiling - floor)}
