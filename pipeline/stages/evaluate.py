"""evaluate: samples -> metrics/NAME.json, with all that the figures depend on.

fid: the ADM suite of images of classes, against a reference. geneval: the share of images that show their prompt,
judged in parts by Ray Data actors; finished parts survive an interruption.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cluster import Cluster, read_cluster, work_through
from pipeline.datasets import scenes
from pipeline.judges import GeometricDetector, load_extractor, load_judges
from pipeline.params import EvaluateParams, Params, TrainParams, read_params, stage_params
from pipeline.runs import lease, run_directory, run_stage
from pipeline.storage import Artifact, Storage, fresh_directory, read_sealed, write_json, write_sealed
from pixelgen.config import require
from pixelgen.data.shards import Split, read_images
from pixelgen.encoders.text import load_text_encoder
from pixelgen.generate import PixelGen
from pixelgen.metrics.colors import NAME as CLIP_NAME
from pixelgen.metrics.detector import NAME as DETECTOR_NAME
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
from pixelgen.metrics.geneval import (
    TAGS,
    Rules,
    Sample,
    evaluate_image,
    judge_image,
    list_images,
    score,
)
from pixelgen.models import build_denoiser
from pixelgen.models.jit_t2i import JiTText
from pixelgen.store import Store

METRICS, OUT = Path("metrics"), Path("out/evaluate")
JUDGES = "judges.json"
LEAST = 4  # images: each has to have a third neighbour
WEIGHTS, DATA, REFERENCES, SAMPLES = (Path("out") / n for n in ("weights", "shard", "reference", "sample"))


def main() -> None:
    key = sys.argv[1]
    whole, cluster = read_params(), read_cluster()
    params, storage = stage_params(whole.evaluate, key, "evaluate"), Storage(whole.storage.root)
    torch.set_num_threads(cluster.threads)
    storage.check()
    samples, weights = storage.open(SAMPLES / params.sample, "samples"), storage.open(WEIGHTS, "weights")
    out = fresh_directory(OUT / key)
    run = None
    if params.metric == "fid":
        metrics = fid(whole, params, storage, samples, weights.local(), torch.device(cluster.device))
    else:
        run = run_directory("evaluate", key, params, samples.identity, weights.identity)
        records, judges = judge(params, storage.run(run), run, samples, weights, cluster)
        (out / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        metrics = geneval(whole, params, records, judges, weights.local(), torch.device(cluster.device))
    sampling = whole.sample[params.sample]
    facts = {"weights": sampling.weights, "precision": sampling.precision, "seed": sampling.seed}
    figures = {
        **{name: round(value, 6) if isinstance(value, float) else value for name, value in metrics.items()},
        "samples": {"count": samples["images"], **facts},
        "sampler": dataclasses.asdict(sampling.sampler),
    }
    METRICS.mkdir(exist_ok=True)
    write_json(METRICS / f"{key}.json", figures)
    Storage(None).publish(out, "evaluation", params, run=run and run.as_posix(), figures=figures)


# --------------------------------------------------------------------------------------------------- the ADM suite


def fid(whole: Params, params: EvaluateParams, storage: Storage, samples: Artifact, weights: Path,
        device: torch.device) -> dict[str, Any]:
    """Figures by the names of their extractor, and what they are of."""
    extractor = load_extractor(whole.reference[params.reference].extractor, weights, device)
    reference = load_reference(storage.open(REFERENCES / params.reference, "reference").local() / "reference.npz")
    folder = samples.local()
    images, labels = load_samples(folder / "samples.npz"), np.load(folder / "labels.npy", allow_pickle=False)
    train = whole.train[whole.sample[params.sample].model]
    heldout = storage.open(DATA / train.dataset, "dataset").split("heldout") if params.baselines else None
    counts = {f"sample {params.sample}": len(images)}
    if reference.images is not None:
        counts[f"reference {params.reference}"] = len(reference.images)
    if heldout:
        counts[f"the held-out split of {train.dataset}, for baselines,"] = heldout.total
    for what, count in counts.items():
        require(count >= LEAST, f"{what} has {count} images, too few to score: at least {LEAST} are needed")
    features = extract(extractor, images, params.batch_size)
    pool = None if reference.images is None else reference_pool(extractor, reference, params.batch_size)
    metrics: dict[str, Any] = adm_suite(reference, pool, features, extractor.name, device)
    if extractor.name == "digits":
        metrics["class_accuracy"] = accuracy(features, labels)

    def distance(other: Features) -> float:
        return frechet_distance(reference.mu, reference.sigma, *mean_and_covariance(other.pool))

    if heldout:
        metrics |= baselines(whole, params, extractor, heldout, untrained(train, weights, device), distance(features),
                             distance)
    reference_params = whole.reference[params.reference]
    return metrics | {"extractor": extractor.name, "reference": {
        "dataset": reference_params.dataset, "npz": reference_params.npz or "computed from the training split"}}


def accuracy(features: Features, labels: np.ndarray) -> float:
    """Share of images that the extractor's own classifier takes for the class they were drawn as."""
    return float((features.logits.argmax(1) == labels).mean())


def untrained(train: TrainParams, weights: Path, device: torch.device) -> PixelGen:
    """The model that training starts from, before its first step."""
    torch.manual_seed(train.fit.seed)
    denoiser = build_denoiser(train.denoiser.resolve()).to(device).eval()
    text = None
    if isinstance(denoiser, JiTText):
        text = load_text_encoder(weights / "text", denoiser.config.text_length, device)
    return PixelGen(denoiser, text=text)


def baselines(whole: Params, params: EvaluateParams, extractor: Extractor, heldout: Split, model: PixelGen,
              reached: float, distance: Callable[[Features], float]) -> dict[str, float]:
    """The range of the Fréchet distance: its floor from held-out real images, its ceiling from the untrained `model`,
    sampled as the trained one was; and the share of the way down from ceiling to floor that was `reached`."""
    sampling = whole.sample[params.sample]
    batches = list(read_images(heldout))
    real = extract(extractor, (images for images, _ in batches), params.batch_size)
    classes = whole.train[sampling.model].denoiser.num_classes
    assert classes is not None
    numbers = range(len(real.pool))
    drawn = model.generate([i % classes for i in numbers], numbers, sampling.sampler)
    floor, ceiling = distance(real), distance(extract(extractor, drawn, params.batch_size))
    found = {f"fd_{extractor.name}_floor": floor, f"fd_{extractor.name}_ceiling": ceiling,
             "share_of_way_to_floor": (ceiling - reached) / (ceiling - floor)}
    if extractor.name == "digits":
        found["class_accuracy_heldout"] = accuracy(real, np.concatenate([labels for _, labels in batches]))
    return found


# --------------------------------------------------------------------------------------------------------- GenEval


def judge(params: EvaluateParams, state: Store, run: Path, samples: Artifact, weights: Artifact, cluster: Cluster
          ) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Each image's verdict, in the order of the folder, and the names of the judges. Actors judge parts, each of
    which is kept when it is done."""
    images = list_images(samples.local() / "images")
    parts: list[dict[str, Any]] = [
        {"name": f"part-{i:06d}.jsonl", "images": [(m.filename, m.prompt) for m in images[i:i + params.batch_size]]}
        for i in range(0, len(images), params.batch_size)]
    with lease(run / "driver.lease", patience=5):
        done = state.sizes("part-")
        if missing := [part for part in parts if part["name"] not in done]:
            work_through(missing, Judge, (params, state, samples, weights, cluster), cluster, "judge")
        lines = [line for part in parts for line in read_sealed(state, part["name"]).decode().splitlines()]
        return [json.loads(line) for line in lines], json.loads(read_sealed(state, JUDGES))


def geneval(whole: Params, params: EvaluateParams, records: list[dict[str, Any]], judges: dict[str, str],
            weights: Path, device: torch.device) -> dict[str, Any]:
    """GenEval's score of the verdicts, under the name of who judged."""
    name = geneval_name(**judges)

    def figures(records: list[dict[str, Any]], suffix: str = "") -> dict[str, float]:
        found = score(records)
        return {f"{name}{suffix}": found["overall"]} | {f"{name}{suffix}_{tag}": found[tag] for tag in TAGS
                                                        if tag in found}

    metrics: dict[str, Any] = figures(records)
    if params.baselines:
        detector, colors = load_judges(str(params.detector), weights, device)
        prompts = [json.loads(record["metadata"]) for record in records]
        for which, (wanted, pictures) in scene_baselines(whole, params, prompts, weights, device).items():
            judged = [{"tag": prompt["tag"], "metadata": prompt["prompt"],
                       "correct": judge_image(picture, prompt, detector, colors).correct}
                      for prompt, picture in zip(wanted, pictures, strict=True)]
            metrics |= figures(judged, f"_{which}")
    return metrics | judges | {"prompts": len({record["filename"].split("/")[0] for record in records})}


def geneval_name(detector: str, color_classifier: str) -> str:
    """`geneval` for the benchmark's own networks alone."""
    if detector == GeometricDetector.name:
        return "geneval_demo"
    official = (detector, color_classifier) == (DETECTOR_NAME, CLIP_NAME)
    return "geneval" if official else f"geneval_{detector}_{color_classifier}"


class Judge:
    """What an actor does: it holds the detector and the colour classifier, and judges parts. Their names, which only
    the loaded weights tell, it leaves beside these."""

    def __init__(self, params: EvaluateParams, state: Store, samples: Artifact, weights: Artifact, cluster: Cluster):
        torch.set_num_threads(cluster.threads_per_worker)
        self.state, self.images = state, samples.local() / "images"
        self.judges = load_judges(str(params.detector), weights.local(), torch.device(cluster.device))
        detector, colors = self.judges
        names = {"detector": detector.name, "color_classifier": colors.name}
        write_sealed(state, JUDGES, json.dumps(names).encode())

    def __call__(self, part: dict[str, Any]) -> None:
        lines = [json.dumps(evaluate_image(Sample(self.images / filename, filename, prompt), *self.judges, Rules()))
                 for filename, prompt in part["images"]]
        write_sealed(self.state, part["name"], "".join(f"{line}\n" for line in lines).encode())


def scene_baselines(whole: Params, params: EvaluateParams, prompts: list[dict[str, Any]], weights: Path,
                    device: torch.device) -> dict[str, tuple[list[dict[str, Any]], np.ndarray]]:
    """What shows that the score measures: prompts (N) and pictures (N, S, S, 3) of scenes rendered straight from the
    prompts, of scenes of the next prompt of the same tag instead, and of the untrained model, sampled as the trained
    one was, once for each prompt."""
    sampling = whole.sample[params.sample]
    train = whole.train[sampling.model]
    random, size = np.random.default_rng(0), train.denoiser.image_size
    different = {prompt["prompt"]: prompt for prompt in prompts}
    unlike: dict[str, dict[str, Any]] = {}
    for tag in TAGS:
        mine = [prompt for prompt in different.values() if prompt["tag"] == tag]
        unlike |= {prompt["prompt"]: other for prompt, other in zip(mine, mine[1:] + mine[:1], strict=True)}

    def rendered(prompts: list[dict[str, Any]]) -> np.ndarray:
        return np.stack([np.asarray(scenes.render(scenes.draw(p, random), size, random)) for p in prompts])

    drawn = untrained(train, weights, device).generate([*different], range(len(different)), sampling.sampler,
                                              negative=sampling.negative)
    return {"rendered": (prompts, rendered(prompts)),
            "shuffled": (prompts, rendered([unlike[prompt["prompt"]] for prompt in prompts])),
            "untrained": ([*different.values()], drawn)}


if __name__ == "__main__":
    from pipeline.stages.evaluate import main as imported  # by name, so that Ray's workers import what they run

    run_stage(imported)
