"""What is each of the demo's three stages of text to image worth?

`python -m benchmarks.stages` in a workspace where `make repro` has run. From the averaged weights of every stage it
draws the workflow's prompts with other seeds, all stages with the same ones, by the sampler of `sample.geneval`; the
first stage's pictures are enlarged to the size of the others. It prints, for every stage, `geneval_demo`, the share of
right images, the edges (the steepest step between neighbouring pixels of an image, in grey levels, averaged over
images), and the Fréchet distance, on the stand-in AlexNet's features, to scenes rendered from the same prompts; and the
same of other rendered scenes, as they are, and brought down to the first stage's size and up again.
"""

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from pipeline.demo import scenes
from pipeline.demo.geneval import DemoGenEval
from pipeline.params import Params, read_params
from pixelgen.encoders.lpips import load_lpips
from pixelgen.generate import PixelGen
from pixelgen.images import to_float
from pixelgen.metrics.fid import frechet_distance, mean_and_covariance
from pixelgen.metrics.geneval import TAGS, judge_image, score

OUT, SEED, BATCH = Path("out"), 1_000_000, 50
ALEXNET = 224  # pixels on a side
STAGES = ("t2i-256", "t2i-512", "sft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=20, help="of each prompt")
    parser.add_argument("--stages", nargs="+", default=STAGES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    params, rng = read_params(), np.random.default_rng(SEED)
    lines = (OUT / "prompts/geneval/prompts.jsonl").read_text().splitlines()
    prompts = [json.loads(line) for line in lines for _ in range(arguments.images)]
    size = max(params.train[stage].denoiser.image_size for stage in arguments.stages)
    small = params.train[arguments.stages[0]].denoiser.image_size
    real, other = (rendered(prompts, size, rng) for _ in range(2))
    reference = features(real)
    print(f"{len(prompts)} images a stage\n| stage | overall | {' | '.join(TAGS)} | right | edge | distance |")
    print("|" + "---|" * (len(TAGS) + 5))
    for stage in arguments.stages:
        row(stage, resized(drawn(stage, params, prompts), size), prompts, reference)
    row("rendered", other, prompts, reference)
    shrunk = resized(other, small, Image.Resampling.BOX)
    row(f"rendered, {small} px", resized(shrunk, size), prompts, reference)


def rendered(prompts: list[scenes.Prompt], size: int, rng: np.random.Generator) -> np.ndarray:
    return np.stack([np.asarray(scenes.render(scenes.place(p, rng), size, rng)) for p in prompts])


def drawn(stage: str, params: Params, prompts: list[scenes.Prompt]) -> np.ndarray:
    """Images of a stage, (N, S, S, 3) uint8, by the sampler of the workflow with the time shift of its training."""
    sampler = dataclasses.replace(params.sample["geneval"].sampler, timeshift=params.train[stage].objective.timeshift)
    model = PixelGen.from_pretrained(OUT / "train" / stage / "model", text_encoder=OUT / "networks/text")
    return model.generate([p["prompt"] for p in prompts], range(SEED, SEED + len(prompts)), sampler, BATCH)


def resized(images: np.ndarray, size: int, how: Image.Resampling = Image.Resampling.BICUBIC) -> np.ndarray:
    return np.stack([np.asarray(Image.fromarray(i).resize((size, size), how)) for i in images])


def row(name: str, images: np.ndarray, prompts: list[scenes.Prompt], reference: np.ndarray) -> None:
    """Print a line of the table."""
    judges = DemoGenEval().judges(OUT / "networks", torch.device("cpu"))
    figures = score([{"tag": p["tag"], "metadata": p["prompt"], "correct": judge_image(i, p, *judges).correct}
                     for i, p in zip(images, prompts, strict=True)])
    grey = images.mean(-1)
    edge = np.mean([max(np.abs(np.diff(g, axis=axis)).max() for axis in (0, 1)) for g in grey])
    distance = frechet_distance(*mean_and_covariance(reference), *mean_and_covariance(features(images)))
    print(f"| {name} | {figures['overall']:.3f} | " + " | ".join(f"{figures[tag]:.2f}" for tag in TAGS)
          + f" | {figures['image_accuracy']:.3f} | {edge:.0f} | {distance:.4f} |", flush=True)


@torch.no_grad()
def features(images: np.ndarray) -> np.ndarray:
    """(N, C) means and deviations, over the image at AlexNet's own size, of every channel of the stand-in's layers."""
    metric, parts = load_lpips(OUT / "networks/lpips"), []
    for start in range(0, len(images), BATCH):
        x = to_float(torch.from_numpy(images[start:start + BATCH].copy()).permute(0, 3, 1, 2))
        x = F.interpolate(x, size=ALEXNET, mode="bicubic")  # it would not see edges at the size of the images
        layers = [layer.flatten(2) for layer in metric.features(x)]
        parts.append(torch.cat([f for layer in layers for f in (layer.mean(-1), layer.std(-1))], dim=1))
    return torch.cat(parts).numpy()


if __name__ == "__main__":
    main()
