"""evaluate: the ADM suite of a sample set against its reference -> metrics/NAME.json, with all that it depends on."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from pipeline.batches import open_split, read_images
from pipeline.cluster import read_cluster
from pipeline.judges import load_extractor
from pipeline.params import EvaluateParams, Params, read_params, stage_params
from pipeline.runs import run_stage
from pipeline.storage import check_file, read_manifest, write_json
from pixelgen.generate import PixelGen
from pixelgen.metrics.fid import (
    Extractor,
    Features,
    adm_suite,
    extract,
    frechet_distance,
    load_reference,
    load_samples,
    mean_and_covariance,
    reference_pool,
)
from pixelgen.models.jit import JiT

METRICS = Path("metrics")
WEIGHTS, DATA, REFERENCES, SAMPLES = (Path("out") / n for n in ("weights", "shard", "reference", "sample"))


def main() -> None:
    key = sys.argv[1]
    whole, cluster = read_params(), read_cluster()
    params = stage_params(whole.evaluate, key, "evaluate")
    torch.set_num_threads(cluster.threads_per_worker)
    folder = SAMPLES / params.sample
    for directory, kind in ((folder, "samples"), (REFERENCES / params.reference, "reference")):
        for entry in read_manifest(directory, kind)["files"]:
            check_file(directory, entry)
    device = torch.device(cluster.device)
    extractor = load_extractor(whole.reference[params.reference].extractor, WEIGHTS, device)
    reference = load_reference(REFERENCES / params.reference / "reference.npz")
    images, labels = load_samples(folder / "samples.npz"), np.load(folder / "labels.npy", allow_pickle=False)
    features = extract(extractor, images, params.batch_size)
    pool = None if reference.images is None else reference_pool(extractor, reference, params.batch_size)
    metrics = adm_suite(reference, pool, features, extractor.name, device)
    if extractor.name == "digits":
        metrics["class_accuracy"] = accuracy(features, labels)

    def distance(other: Features) -> float:
        return frechet_distance(reference.mu, reference.sigma, *mean_and_covariance(other.pool))

    if params.baselines:
        metrics |= baselines(whole, params, extractor, device, distance(features), distance)
    sampling = whole.sample[params.sample]
    METRICS.mkdir(exist_ok=True)
    write_json(METRICS / f"{key}.json", {
        **{name: round(value, 6) for name, value in metrics.items()},
        "extractor": extractor.name,
        "reference": {"dataset": whole.reference[params.reference].dataset,
                      "npz": whole.reference[params.reference].npz or "computed from the training split"},
        "samples": {"count": len(images), "weights": sampling.weights, "precision": sampling.precision,
                    "seed": sampling.seed},
        "sampler": dataclasses.asdict(sampling.sampler),
    })


def accuracy(features: Features, labels: np.ndarray) -> float:
    """Share of images that the extractor's own classifier takes for the class they were drawn as."""
    return float((features.logits.argmax(1) == labels).mean())


def baselines(whole: Params, params: EvaluateParams, extractor: Extractor, device: torch.device, reached: float,
              distance: Callable[[Features], float]) -> dict[str, float]:
    """The range of the Fréchet distance: its floor from held-out real images, its ceiling from the untrained model,
    sampled as the trained one was; and the share of the way down from ceiling to floor that was `reached`."""
    sampling = whole.sample[params.sample]
    train = whole.train[sampling.model]
    batches = list(read_images(open_split(DATA / train.dataset, "heldout")))
    real = extract(extractor, (images for images, _ in batches), params.batch_size)
    torch.manual_seed(train.fit.seed)
    untrained = PixelGen(JiT(train.denoiser.resolve()).to(device).eval())
    classes = train.denoiser.num_classes
    drawn = untrained.generate([i % classes for i in range(len(real.pool))], range(len(real.pool)), sampling.sampler)
    floor, ceiling = distance(real), distance(extract(extractor, drawn, params.batch_size))
    found = {f"fd_{extractor.name}_floor": floor, f"fd_{extractor.name}_ceiling": ceiling,
             "share_of_way_to_floor": (ceiling - reached) / (ceiling - floor)}
    if extractor.name == "digits":
        found["class_accuracy_heldout"] = accuracy(real, np.concatenate([labels for _, labels in batches]))
    return found


if __name__ == "__main__":
    run_stage(main)
