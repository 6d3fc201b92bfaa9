"""How long the paper's trainings take on 1 to 1,024 GPUs, and what they cost: predictions from what was measured.

`python -m benchmarks.scaling` prints the tables of `docs/scaling.md`, which says what the model leaves out. The
constants below are measured where they name a figure of this repository, and assumed where they say so.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.estimate import networks
from pipeline.params import TrainParams
from pixelgen.estimate import count, forward_operations, training_operations
from pixelgen.recipe import read_recipe
from pixelgen.terms import LpipsConfig, ObjectiveConfig

H100 = 989e12  # operations a second, as the maker states it
NODE = 8  # GPUs
WORKING = 0.36  # of that, what an H200 reached while it was at work: 22 % in 62 % of the time, 35 % in 91 %
HOST = 0.149 / 28  # seconds a block of the denoiser that the host takes for a pass, all else included: XL's step
INSIDE, BETWEEN = 350e9, 40e9  # bytes a second of a GPU's all-reduce in a node and across nodes: assumed
HIDDEN = 2 / 3  # of a step, its backward pass, beside which gradients are averaged
DECODED = 700.0  # images of 256 px a second and core: docs/log.md, two cores of a Xeon, in two processes, 1,400
BYTES = 52e3  # of such an image
COPIED = 5.0  # seconds for which a checkpoint of XL holds up training: read off the code before, not measured on a GPU
STARTED = 150.0  # seconds from a failure to the next step, compilation of blocks (75 s) included: assumed
MTBF = 50_000.0  # hours of a GPU between failures that end a run: assumed (about what Llama 3's report gives)
PRICE = 2.5  # dollars an hour and GPU: assumed
RUNS = (("L/16, 200k steps", "imagenet256-l", ("c2i",)),
        ("XL/16, 800k steps", "imagenet256-xl-cfg", ("c2i",)),
        ("XXL/16 of prompts, 360k steps", "t2i-xxl", ("t2i-256", "t2i-512", "sft")))


@dataclass(frozen=True)
class Prediction:
    gpus: int
    step: float  # seconds, of which
    exposed: float  # gradients are averaged while nothing else is done
    hours: float  # with checkpoints and restarts
    lost: float  # share of them that went into these
    cores: float  # for each GPU, to decode
    read: float  # bytes a second, of all GPUs together


def predict(train: TrainParams, operations: float, parameters: int, gpus: int) -> Prediction:
    """A training on so many GPUs. Lanes that cannot be shared out evenly are no matter here."""
    fit = train.fit
    images = fit.batch_size / gpus
    compute = max(images * operations / (WORKING * H100), HOST * train.denoiser.resolve().depth)
    speed = INSIDE if gpus <= NODE else BETWEEN
    averaged = 2 * (gpus - 1) / gpus * 4 * parameters / speed
    exposed = max(0.0, averaged - HIDDEN * compute)
    step = compute + exposed
    every = train.run.checkpoint_every * step
    overhead = COPIED / every  # of the time, for checkpoints
    failures = gpus / (MTBF * 3600)  # a second; each costs half of the time between checkpoints, and a start
    lost = overhead + failures * (every / 2 + STARTED)
    pixels = (train.denoiser.image_size / 256) ** 2
    rate = fit.batch_size / step
    return Prediction(gpus, step, exposed, fit.steps * step * (1 + lost) / 3600, lost / (1 + lost),
                      rate / gpus * pixels / DECODED, rate * BYTES * pixels)


def tables() -> Iterator[str]:
    for title, preset, keys in RUNS:
        yield f"\n{title}:\n"
        yield "| stage | GPUs | s/step | of which averaging | hours | days | lost | dollars | cores a GPU | MB/s read |"
        yield "|---|---|---|---|---|---|---|---|---|---|"
        for key in keys:
            train = load(preset, key)
            found = networks(train)
            operations = sum(training_operations(train.objective, forward_operations(found)).values())
            assert found.projector is not None
            parameters = count(found.denoiser) + count(found.projector)
            for gpus in (8, 32, 64, 192, 1024):
                if gpus <= train.fit.batch_size:
                    p = predict(train, operations, parameters, gpus)
                    mark = "" if gpus <= train.fit.lanes else "*"
                    yield (f"| {key} | {p.gpus:,}{mark} | {p.step:.3f} | {p.exposed:.3f} | {p.hours:,.1f} | "
                           f"{p.hours / 24:.2f} | {p.lost:.1%} | {p.hours * p.gpus * PRICE:,.0f} | {p.cores:.1f} | "
                           f"{p.read / 1e6:,.0f} |")


def load(preset: str, key: str) -> TrainParams:
    """A recipe of a preset. What it is used on does not matter here."""
    recipe = read_recipe(Path(f"presets/{preset}.yaml"), key, started=True)
    return TrainParams(**vars(recipe), dataset="", init="none")


def paper() -> Iterator[str]:
    """What the paper's own times on eight H800 mean: the share of their operations that was reached."""
    yield "\nThe paper's times, 8 H800, by the operations of its own arithmetic (perceptual networks on all images):\n"
    yield "| stage | time | share of 989 TFLOP/s |\n|---|---|---|"
    ungated = ObjectiveConfig(lpips=LpipsConfig(gated=False))
    train = load("imagenet256-l", "c2i")
    operations = sum(training_operations(ungated, forward_operations(networks(train))).values())
    yield f"| L/16 | 0.20 s a step | {32 * operations / 0.20 / H100:.0%} |"
    total = 0.0
    for key in ("t2i-256", "t2i-512", "sft"):
        train = load("t2i-xxl", key)
        total += train.fit.steps * train.fit.batch_size * sum(
            training_operations(ungated, forward_operations(networks(train))).values())
    yield f"| XXL/16, all three stages | six days | {total / (8 * 6 * 86400) / H100:.0%} |"


if __name__ == "__main__":
    for row in (*paper(), *tables()):
        print(row)
