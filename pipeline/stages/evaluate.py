"""evaluate: samples -> metrics/NAME.json, with all that the figures depend on.

fid: the ADM suite of images of classes, against a reference. geneval: the share of images that show their prompt.
Ray Data actors look at the images in parts, and finished parts survive an interruption; this process only collects
what they have found.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cluster import Cluster, read_cluster, work_through
from pipeline.datasets import scenes
from pipeline.judges import GeometricDetector, load_extractor, load_judges
from pipeline.params import EvaluateParams, Params, SampleParams, TrainParams, resolved_params, stage_params
from pipeline.parts import read_part, write_arrays
from pipeline.runs import run_directory, run_stage, working
from pipeline.storage import Artifact, Storage, fresh_directory, read_sealed, run_name, write_json, write_sealed
from pixelgen.config import require
from pixelgen.data.shards import Split, read_images
from pixelgen.encoders.text import load_text_encoder
from pixelgen.generate import BATCH, PixelGen
from pixelgen.metrics.colors import NAME as CLIP_NAME
from pixelgen.metrics.detector import NAME as DETECTOR_NAME
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
from pixelgen.npz import Rows
from pixelgen.store import Store

METRICS, OUT = Path("metrics"), Path("out/evaluate")
FIGURES, JUDGES, BASELINES = "figures.json", "judges.json", "baselines.json"
LEAST = 4  # images: each has to have a third neighbour
PART = 4000  # images whose features are one unit of work and of resumption
WEIGHTS, DATA, REFERENCES, SAMPLES = (Path("out") / n for n in ("weights", "shard", "reference", "sample"))


def main() -> None:
    key = sys.argv[1]
    whole, cluster = resolved_params("evaluate"), read_cluster()
    params, storage = stage_params(whole.evaluate, key, "evaluate"), Storage(whole.storage.root)
    torch.set_num_threads(cluster.threads)
    storage.check()
    samples, weights = storage.open(SAMPLES / params.sample, "samples"), storage.open(WEIGHTS, "weights")
    if params.metric == "fid":
        dataset = whole.train[whole.sample[params.sample].model].dataset
        task = Task(whole, params, samples, weights, storage.open(REFERENCES / params.reference, "reference"),
                    storage.open(DATA / dataset, "dataset") if params.baselines else None)
    else:
        task = Task(whole, params, samples, weights)
    directory = run_directory("evaluate", *task.inputs)
    out = fresh_directory(OUT / key)
    with working(directory):
        state = storage.run(directory)
        if params.metric == "fid":
            metrics = fid(task, state, cluster)
        else:
            records, metrics = geneval(task, state, cluster)
            (out / "results.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    sampling = whole.sample[params.sample]
    facts = {"weights": sampling.weights, "precision": sampling.precision, "seed": sampling.seed}
    figures = {
        **{name: round(value, 6) if isinstance(value, float) else value for name, value in metrics.items()},
        "samples": {"count": samples["images"], **facts},
        "sampler": dataclasses.asdict(sampling.sampler),
    }
    METRICS.mkdir(exist_ok=True)
    write_json(METRICS / f"{key}.json", figures)
    Storage(None).publish(out, "evaluation", params, run=run_name(directory), figures=figures)


@dataclass(frozen=True)
class Task:
    """What is to be scored, as each worker sees it."""

    whole: Params
    params: EvaluateParams
    samples: Artifact
    weights: Artifact
    reference: Artifact | None = None  # fid
    dataset: Artifact | None = None  # fid with baselines: what the model was trained on

    @property
    def inputs(self) -> list[Any]:
        """What the figures depend on."""
        artifacts = (self.samples, self.weights, self.reference, self.dataset)
        return [self.params, self.sampling, self.train.denoiser, self.train.fit.seed,
                *(artifact and artifact.identity for artifact in artifacts)]

    @property
    def sampling(self) -> SampleParams:
        return self.whole.sample[self.params.sample]

    @property
    def train(self) -> TrainParams:
        return self.whole.train[self.sampling.model]

    @property
    def heldout(self) -> Split | None:
        return self.dataset.split("heldout") if self.dataset else None


def untrained(task: Task, device: str) -> PixelGen:
    """The model that training starts from, before its first step, to be sampled as the trained one was."""
    torch.manual_seed(task.train.fit.seed)
    denoiser = build_denoiser(task.train.denoiser.resolve()).to(device).eval()
    text = None
    if isinstance(denoiser, JiTText):
        text = load_text_encoder(task.weights.local() / "text", denoiser.config.text_length, device,
                                 task.sampling.precision)
    return PixelGen(denoiser, task.sampling.precision, text)


# --------------------------------------------------------------------------------------------------- the ADM suite


def fid(task: Task, state: Store, cluster: Cluster) -> dict[str, Any]:
    """Figures by the names of their extractor, and what they are of."""
    params, dataset = task.params, task.train.dataset
    counts = {"samples": task.samples["images"]}
    if task.reference and task.reference["images"]:  # without, there are no precision and recall
        counts["reference"] = task.reference["images"]
    if heldout := task.heldout:
        counts |= {"heldout": heldout.total, "untrained": heldout.total}
    told = {"samples": f"sample {params.sample}", "reference": f"reference {params.reference}",
            "heldout": f"the held-out split of {dataset}, for baselines,"}
    for source, count in counts.items():
        require(count >= LEAST, f"{told.get(source, source)} has {count} images, too few to score: at least {LEAST} "
                "are needed")
    parts = plan_parts(counts)
    work_through(parts, FeatureWorker, (task, state, cluster), cluster, "features", state)
    work_through([{"name": FIGURES, "parts": parts}], FigureWorker, (task, state, cluster), cluster, "figures", state)
    reference = task.whole.reference[params.reference]
    return json.loads(read_sealed(state, FIGURES)) | {"reference": {
        "dataset": reference.dataset, "npz": reference.npz or "computed from the training split"}}


def plan_parts(counts: dict[str, int]) -> list[dict[str, Any]]:
    """All images of all sources in a row, cut into parts of PART: each has some pieces (source, start, stop)."""
    parts: list[dict[str, Any]] = []
    room = 0
    for source, count in counts.items():
        start = 0
        while start < count:
            if room == 0:
                parts.append({"name": f"part-{len(parts):06d}.npz", "pieces": []})
                room = PART
            stop = min(start + room, count)
            parts[-1]["pieces"].append((source, start, stop))
            room, start = room - (stop - start), stop
    return parts


class FeatureWorker:
    """What an actor does: it holds the extractor, and leaves the features of a part, 20 kB an image with Inception."""

    def __init__(self, task: Task, state: Store, cluster: Cluster):
        self.task, self.state, self.device = task, state, cluster.device
        extractor = task.whole.reference[task.params.reference].extractor
        self.extractor = load_extractor(extractor, task.weights.local(), torch.device(cluster.device))
        self.sources = {"samples": self.samples, "reference": self.kept, "heldout": self.real,
                        "untrained": self.drawn}

    def __call__(self, part: dict[str, Any]) -> None:
        arrays = {"extractor": np.array(self.extractor.name)}
        for source, start, stop in part["pieces"]:
            features = extract(self.extractor, self.sources[source](start, stop), self.task.params.batch_size)
            arrays |= {f"{source}_{name}": array for name, array in vars(features).items()}
        write_arrays(self.state, part["name"], arrays)

    @functools.cached_property
    def drawn_images(self) -> Rows:
        return load_samples(self.task.samples.local() / "samples.npz")

    @functools.cached_property
    def kept_images(self) -> Rows:
        images = reference_of(self.task).images
        assert isinstance(images, Rows)
        return images

    def samples(self, start: int, stop: int) -> Iterator[np.ndarray]:
        return self.drawn_images.chunks(self.task.params.batch_size, start, stop)

    def kept(self, start: int, stop: int) -> Iterator[np.ndarray]:
        return self.kept_images.chunks(self.task.params.batch_size, start, stop)

    def real(self, start: int, stop: int) -> Iterator[np.ndarray]:
        assert self.task.heldout
        return (images for images, _ in read_images(self.task.heldout, start, stop, self.task.params.batch_size))

    def drawn(self, start: int, stop: int) -> Iterator[np.ndarray]:
        classes, model = self.task.train.denoiser.num_classes, untrained(self.task, self.device)
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
        if extractor == "digits":
            labels = np.load(self.task.samples.local() / "labels.npy", allow_pickle=False)
            metrics["class_accuracy"] = accuracy(sample, labels)
        if self.task.heldout:
            metrics |= baselines(extractor, reference, features, self.task.heldout)
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


def reference_of(task: Task) -> Reference:
    assert task.reference
    return load_reference(task.reference.local() / "reference.npz")


def accuracy(features: Features, labels: np.ndarray) -> float:
    """Share of images that the extractor's own classifier takes for the class they were drawn as."""
    return float((features.logits.argmax(1) == labels).mean())


def baselines(extractor: str, reference: Reference, features: dict[str, Features], heldout: Split) -> dict[str, float]:
    """The range of the Fréchet distance: its floor from held-out real images, its ceiling from the untrained model; and
    the share of the way down from ceiling to floor that the samples have reached."""
    reached, floor, ceiling = (
        frechet_distance(reference.mu, reference.sigma, *mean_and_covariance(features[source].pool))
        for source in ("samples", "heldout", "untrained"))
    found = {f"fd_{extractor}_floor": floor, f"fd_{extractor}_ceiling": ceiling,
             "share_of_way_to_floor": (ceiling - reached) / (ceiling - floor)}
    if extractor == "digits":
        labels = [heldout.read(shard, ["label"])["label"].to_numpy() for shard in range(len(heldout.shards))]
        found["class_accuracy_heldout"] = accuracy(features["heldout"], np.concatenate(labels))
    return found


# --------------------------------------------------------------------------------------------------------- GenEval


def geneval(task: Task, state: Store, cluster: Cluster) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Each image's verdict, in the order of the folder, and GenEval's score of them under the name of who judged."""
    params = task.params
    images = list_images(task.samples.local() / "images")
    parts: list[dict[str, Any]] = [
        {"name": f"part-{i:06d}.jsonl", "images": [(m.filename, m.prompt) for m in images[i:i + params.batch_size]]}
        for i in range(0, len(images), params.batch_size)]
    baselines = {"name": BASELINES, "prompts": [dict(image.prompt) for image in images]}
    work_through([baselines, *parts] if params.baselines else parts, Judge, (task, state, cluster), cluster, "judge",
                 state)
    lines = [line for part in parts for line in read_sealed(state, part["name"]).decode().splitlines()]
    records, judges = [json.loads(line) for line in lines], json.loads(read_sealed(state, JUDGES))
    name = geneval_name(**judges)

    def figures(records: list[dict[str, Any]], suffix: str = "") -> dict[str, float]:
        found = score(records)
        return {f"{name}{suffix}": found["overall"]} | {f"{name}{suffix}_{tag}": found[tag] for tag in TAGS
                                                        if tag in found}

    metrics: dict[str, Any] = figures(records)
    if params.baselines:
        for which, judged in json.loads(read_sealed(state, BASELINES)).items():
            metrics |= figures(judged, f"_{which}")
    return records, metrics | judges | {"prompts": len({record["filename"].split("/")[0] for record in records})}


def geneval_name(detector: str, color_classifier: str) -> str:
    """`geneval` for the benchmark's own networks alone."""
    if detector == GeometricDetector.name:
        return "geneval_demo"
    official = (detector, color_classifier) == (DETECTOR_NAME, CLIP_NAME)
    return "geneval" if official else f"geneval_{detector}_{color_classifier}"


class Judge:
    """What an actor does: it holds the detector and the colour classifier, and judges parts. Their names, which only
    the loaded weights tell, it leaves beside these."""

    def __init__(self, task: Task, state: Store, cluster: Cluster):
        self.task, self.state, self.device = task, state, cluster.device
        self.images = task.samples.local() / "images"
        self.judges = load_judges(str(task.params.detector), task.weights.local(), torch.device(cluster.device))
        detector, colors = self.judges
        names = {"detector": detector.name, "color_classifier": colors.name}
        write_sealed(state, JUDGES, json.dumps(names).encode())

    def __call__(self, part: dict[str, Any]) -> None:
        found = self.baselines(part["prompts"]) if part["name"] == BASELINES else self.verdicts(part["images"])
        write_sealed(self.state, part["name"], found.encode())

    def verdicts(self, images: list[tuple[str, dict[str, Any]]]) -> str:
        """A line for each image, a file of the samples and its prompt."""
        return "".join(
            json.dumps(evaluate_image(Sample(self.images / filename, filename, prompt), *self.judges, Rules())) + "\n"
            for filename, prompt in images)

    def baselines(self, prompts: list[dict[str, Any]]) -> str:
        """Verdicts by baseline, on pictures that show whether the score measures."""
        drawn = scene_baselines(prompts, self.task, untrained(self.task, self.device))
        return json.dumps({which: [{"tag": prompt["tag"], "metadata": prompt["prompt"],
                                    "correct": judge_image(picture, prompt, *self.judges).correct}
                                   for prompt, picture in zip(wanted, pictures, strict=True)]
                           for which, (wanted, pictures) in drawn.items()})


def scene_baselines(prompts: list[dict[str, Any]], task: Task, model: PixelGen
                    ) -> dict[str, tuple[list[dict[str, Any]], np.ndarray]]:
    """Prompts (N) and pictures (N, S, S, 3) of scenes rendered straight from the prompts, of scenes of the next prompt
    of the same tag instead, and of the untrained `model`, once for each prompt."""
    random, size = np.random.default_rng(0), task.train.denoiser.image_size
    different = {prompt["prompt"]: prompt for prompt in prompts}
    unlike: dict[str, dict[str, Any]] = {}
    for tag in TAGS:
        mine = [prompt for prompt in different.values() if prompt["tag"] == tag]
        unlike |= {prompt["prompt"]: other for prompt, other in zip(mine, mine[1:] + mine[:1], strict=True)}

    def rendered(prompts: list[dict[str, Any]]) -> np.ndarray:
        return np.stack([np.asarray(scenes.render(scenes.draw(p, random), size, random)) for p in prompts])

    drawn = model.generate([*different], range(len(different)), task.sampling.sampler, BATCH,
                           task.sampling.negative)
    return {"rendered": (prompts, rendered(prompts)),
            "shuffled": (prompts, rendered([unlike[prompt["prompt"]] for prompt in prompts])),
            "untrained": ([*different.values()], drawn)}


if __name__ == "__main__":
    from pipeline.stages.evaluate import main as imported  # by name, so that Ray's workers import what they run

    run_stage(imported)
