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

from pipeline.batches import open_split, read_images
from pipeline.cluster import Cluster, read_cluster, work_through
from pipeline.datasets import scenes
from pipeline.judges import GeometricDetector, load_extractor, load_judges
from pipeline.params import EvaluateParams, Params, TrainParams, read_params, stage_params
from pipeline.runs import lease, run_directory, run_stage
from pipeline.storage import (
    MANIFEST,
    fresh_directory,
    publish,
    read_checked,
    read_manifest,
    sha256,
    write_atomic,
    write_json,
)
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

METRICS, OUT = Path("metrics"), Path("out/evaluate")
JUDGES = "judges.json"
WEIGHTS, DATA, REFERENCES, SAMPLES = (Path("out") / n for n in ("weights", "shard", "reference", "sample"))


def main() -> None:
    key = sys.argv[1]
    whole, cluster = read_params(), read_cluster()
    params = stage_params(whole.evaluate, key, "evaluate")
    torch.set_num_threads(cluster.threads_per_worker)
    samples = read_checked(SAMPLES / params.sample, "samples")
    out = fresh_directory(OUT / key)
    metrics = (fid if params.metric == "fid" else geneval)(key, whole, cluster, out)
    sampling = whole.sample[params.sample]
    facts = {"weights": sampling.weights, "precision": sampling.precision, "seed": sampling.seed}
    METRICS.mkdir(exist_ok=True)
    write_json(METRICS / f"{key}.json", {
        **{name: round(value, 6) if isinstance(value, float) else value for name, value in metrics.items()},
        "samples": {"count": samples["images"], **facts},
        "sampler": dataclasses.asdict(sampling.sampler),
    })
    publish(out, "evaluation", params)


# --------------------------------------------------------------------------------------------------- the ADM suite


def fid(key: str, whole: Params, cluster: Cluster, out: Path) -> dict[str, Any]:
    """Figures by the names of their extractor, and what they are of."""
    params = whole.evaluate[key]
    folder = SAMPLES / params.sample
    read_checked(REFERENCES / params.reference, "reference")
    device = torch.device(cluster.device)
    extractor = load_extractor(whole.reference[params.reference].extractor, WEIGHTS, device)
    reference = load_reference(REFERENCES / params.reference / "reference.npz")
    images, labels = load_samples(folder / "samples.npz"), np.load(folder / "labels.npy", allow_pickle=False)
    features = extract(extractor, images, params.batch_size)
    pool = None if reference.images is None else reference_pool(extractor, reference, params.batch_size)
    metrics: dict[str, Any] = adm_suite(reference, pool, features, extractor.name, device)
    if extractor.name == "digits":
        metrics["class_accuracy"] = accuracy(features, labels)

    def distance(other: Features) -> float:
        return frechet_distance(reference.mu, reference.sigma, *mean_and_covariance(other.pool))

    if params.baselines:
        metrics |= baselines(whole, params, extractor, device, distance(features), distance)
    reference_params = whole.reference[params.reference]
    return metrics | {"extractor": extractor.name, "reference": {
        "dataset": reference_params.dataset, "npz": reference_params.npz or "computed from the training split"}}


def accuracy(features: Features, labels: np.ndarray) -> float:
    """Share of images that the extractor's own classifier takes for the class they were drawn as."""
    return float((features.logits.argmax(1) == labels).mean())


def untrained(train: TrainParams, device: torch.device) -> PixelGen:
    """The model that training starts from, before its first step."""
    torch.manual_seed(train.fit.seed)
    denoiser = build_denoiser(train.denoiser.resolve()).to(device).eval()
    text = None
    if isinstance(denoiser, JiTText):
        text = load_text_encoder(WEIGHTS / "text", denoiser.config.text_length, device)
    return PixelGen(denoiser, text=text)


def baselines(whole: Params, params: EvaluateParams, extractor: Extractor, device: torch.device, reached: float,
              distance: Callable[[Features], float]) -> dict[str, float]:
    """The range of the Fréchet distance: its floor from held-out real images, its ceiling from the untrained model,
    sampled as the trained one was; and the share of the way down from ceiling to floor that was `reached`."""
    sampling = whole.sample[params.sample]
    train = whole.train[sampling.model]
    batches = list(read_images(open_split(DATA / train.dataset, "heldout")))
    real = extract(extractor, (images for images, _ in batches), params.batch_size)
    classes = train.denoiser.num_classes
    assert classes is not None
    numbers = range(len(real.pool))
    drawn = untrained(train, device).generate([i % classes for i in numbers], numbers, sampling.sampler)
    floor, ceiling = distance(real), distance(extract(extractor, drawn, params.batch_size))
    found = {f"fd_{extractor.name}_floor": floor, f"fd_{extractor.name}_ceiling": ceiling,
             "share_of_way_to_floor": (ceiling - reached) / (ceiling - floor)}
    if extractor.name == "digits":
        found["class_accuracy_heldout"] = accuracy(real, np.concatenate([labels for _, labels in batches]))
    return found


# --------------------------------------------------------------------------------------------------------- GenEval


def geneval(key: str, whole: Params, cluster: Cluster, out: Path) -> dict[str, Any]:
    """GenEval's score of the images, under the name of who judged; each image's verdict in results.jsonl."""
    params = whole.evaluate[key]
    folder = SAMPLES / params.sample
    read_manifest(WEIGHTS, "weights")
    run = run_directory("evaluate", key, params, sha256(folder / MANIFEST), sha256(WEIGHTS / MANIFEST)).resolve()
    images = list_images((folder / "images").resolve())
    parts: list[dict[str, Any]] = [
        {"path": str(run / f"part-{i:06d}.jsonl"),
         "images": [(str(m.path), m.filename, m.prompt) for m in images[i:i + params.batch_size]]}
        for i in range(0, len(images), params.batch_size)]
    with lease(run / "driver.lease", patience=5):
        if missing := [part for part in parts if not Path(part["path"]).exists()]:
            work_through(missing, Judge, (params, run, WEIGHTS.resolve(), cluster), cluster, "judge")
    (out / "results.jsonl").write_text("".join(Path(part["path"]).read_text() for part in parts))
    records = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    judges = json.loads((run / JUDGES).read_text())
    name = geneval_name(**judges)

    def figures(records: list[dict[str, Any]], suffix: str = "") -> dict[str, float]:
        found = score(records)
        return {f"{name}{suffix}": found["overall"]} | {f"{name}{suffix}_{tag}": found[tag] for tag in TAGS
                                                        if tag in found}

    metrics: dict[str, Any] = figures(records)
    if params.baselines:
        detector, colors = load_judges(str(params.detector), WEIGHTS, torch.device(cluster.device))
        for which, (prompts, pictures) in scene_baselines(whole, params, [image.prompt for image in images],
                                                          torch.device(cluster.device)).items():
            judged = [{"tag": prompt["tag"], "metadata": prompt["prompt"],
                       "correct": judge_image(picture, prompt, detector, colors).correct}
                      for prompt, picture in zip(prompts, pictures, strict=True)]
            metrics |= figures(judged, f"_{which}")
    return metrics | judges | {"prompts": len({image.path.parents[1] for image in images})}


def geneval_name(detector: str, color_classifier: str) -> str:
    """`geneval` for the benchmark's own networks alone."""
    if detector == GeometricDetector.name:
        return "geneval_demo"
    official = (detector, color_classifier) == (DETECTOR_NAME, CLIP_NAME)
    return "geneval" if official else f"geneval_{detector}_{color_classifier}"


class Judge:
    """What an actor does: it holds the detector and the colour classifier, and judges parts, each written whole.
    Their names, which only the loaded weights tell, it leaves in the run directory."""

    def __init__(self, params: EvaluateParams, run: Path, weights: Path, cluster: Cluster):
        torch.set_num_threads(cluster.threads_per_worker)
        self.judges = detector, colors = load_judges(str(params.detector), weights, torch.device(cluster.device))
        write_json(run / JUDGES, {"detector": detector.name, "color_classifier": colors.name})

    def __call__(self, part: dict[str, Any]) -> None:
        lines = [json.dumps(evaluate_image(Sample(Path(path), filename, prompt), *self.judges, Rules()))
                 for path, filename, prompt in part["images"]]
        write_atomic(Path(part["path"]), "".join(f"{line}\n" for line in lines).encode())


def scene_baselines(whole: Params, params: EvaluateParams, prompts: list[dict[str, Any]], device: torch.device
                    ) -> dict[str, tuple[list[dict[str, Any]], np.ndarray]]:
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

    drawn = untrained(train, device).generate([*different], range(len(different)), sampling.sampler,
                                              negative=sampling.negative)
    return {"rendered": (prompts, rendered(prompts)),
            "shuffled": (prompts, rendered([unlike[prompt["prompt"]] for prompt in prompts])),
            "untrained": ([*different.values()], drawn)}


if __name__ == "__main__":
    from pipeline.stages.evaluate import main as imported  # by name, so that Ray's workers import what they run

    run_stage(imported)
