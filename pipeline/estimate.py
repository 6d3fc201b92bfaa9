"""What the trainings and samplings of params.yaml will take: operations, memory, time and money, before they run."""

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.params import NONE, Params, SampleParams, TrainParams
from pixelgen.config import ConfigError, MemoryConfig, require
from pixelgen.encoders.dino import Dino, build_dino
from pixelgen.encoders.lpips import Lpips
from pixelgen.estimate import (
    Networks,
    fitting_lanes,
    forward_operations,
    sampling_rows,
    training_memory,
    training_operations,
)
from pixelgen.manifest import MANIFEST
from pixelgen.models import build_denoiser
from pixelgen.objective import repa_projector

WEIGHTS = Path("out/weights")
DINO: dict[str, Any] = {"architecture": "vit_base_patch14_dinov2", "arguments": {}}
QWEN = {"model_type": "qwen3", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}


def networks(train: TrainParams, demo: bool = False) -> Networks:
    """Those of a training, without weights. The frozen ones are the published ones, or the demo's, as the weights stage
    has described them."""
    import lpips
    from transformers import AutoConfig, AutoModel

    d, o = train.denoiser.resolve(), train.objective
    dino = metric = text = projector = None
    with torch.device("meta"), quiet():
        if o.uses_dino:
            grid = d.image_size // d.patch_size
            dino = Dino(build_dino(described("dino") if demo else DINO, grid), grid)
        if o.repa_weight and dino:
            projector = repa_projector(d.width, dino.width, o.repa_hidden or d.width)
        if train.text:
            text = AutoModel.from_config(AutoConfig.for_model(**(described("text") if demo else QWEN)))
        denoiser = build_denoiser(d)
    if o.lpips_weight:
        with quiet():
            net = described("lpips")["net"] if demo else "vgg"
            metric = Lpips(lpips.LPIPS(net=net, pnet_rand=True, verbose=False))
    return Networks(denoiser, projector, dino, metric, text)


def described(name: str) -> dict[str, Any]:
    """What the configuration of a frozen network of the weights stage says."""
    return json.loads((WEIGHTS / name / "config.json").read_text())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torchvision's warnings of arguments that lpips gives it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def report(whole: Params, keys: Sequence[str], gpus: int, memory: MemoryConfig, room: float, rate: float, price: float
           ) -> Iterator[str]:
    """Lines about each training and sampling that `keys` names (none: all), on GPUs of which each has `room` bytes to
    use, does `rate` operations a second and costs `price` dollars an hour. ConfigError for a key that is not there."""
    demo = whole.weights.source == "demo"
    require(not demo or (WEIGHTS / MANIFEST).exists(), "the demo's small frozen networks are not there yet: run `dvc "
            "repro weights` first")
    known = {*(f"train.{key}" for key in whole.train), *(f"sample.{key}" for key in whole.sample)}
    if strange := sorted({*keys} - known):
        raise ConfigError(f"{strange[0]}: neither a training nor a sampling; there are {', '.join(sorted(known))}")
    for key, train in whole.train.items():
        if not keys or f"train.{key}" in keys:
            yield from training(f"train.{key}", train, networks(train, demo), gpus, memory, room, rate, price)
    for key, sampling in whole.sample.items():
        if not keys or f"sample.{key}" in keys:
            train = whole.train[sampling.model]
            yield from drawing(f"sample.{key}", train, networks(train, demo), sampling, gpus, rate, price)


def training(name: str, train: TrainParams, found: Networks, gpus: int, memory: MemoryConfig, room: float, rate: float,
             price: float) -> Iterator[str]:
    fit, d = train.fit, train.denoiser
    require(fit.lanes % gpus == 0, f"{name}: fit.lanes {fit.lanes} cannot be shared out evenly among {gpus} GPUs")
    forward = forward_operations(found)
    counted = training_operations(train.objective, forward)
    lane, lanes = fit.batch_size // fit.lanes, fit.lanes // gpus
    together = min(memory.lanes_per_pass or fitting_lanes(found, train.objective, lane, lanes, memory, room), lanes)
    together = -(-lanes // -(-lanes // together))  # shared out evenly
    parts = training_memory(found, train.objective, together * lane, memory)
    again = forward["denoiser"] * min(memory.recomputed_blocks / found.denoiser.config.depth, 1)
    images = rate / (sum(counted.values()) + again)
    yield (f"{name}: {d.size} at {d.image_size} pixels, {fit.steps:,} steps of {fit.batch_size} images, "
           f"{together * lane} of them together on each of {gpus} GPUs")
    yield line("GFLOP an image", sum(counted.values()) / 1e9, "", shares(counted, 1e9))
    yield line("GB a GPU", sum(parts.values()) / 1e9, "in bf16, compiled", shares(parts, 1e9))
    yield from time_and_money(images, fit.steps * fit.batch_size, gpus, price)


def drawing(name: str, train: TrainParams, found: Networks, sampling: SampleParams, gpus: int, rate: float, price: float
            ) -> Iterator[str]:
    forward = forward_operations(found)
    rows = sampling_rows(sampling.sampler)
    operations = rows * forward["denoiser"] + forward["text"]
    s = sampling.sampler
    yield (f"{name}: {s.name}, {s.steps} steps, guidance {s.guidance:g}: the denoiser sees {rows} samples for each "
           "image")
    yield line("GFLOP an image", operations / 1e9)
    count = None
    if sampling.prompts == NONE:
        count = (train.denoiser.num_classes or 0) * sampling.per_prompt
    yield from time_and_money(rate / operations, count, gpus, price)


def time_and_money(rate: float, images: int | None, gpus: int, price: float) -> Iterator[str]:
    """Lines about so many images (None: nobody knows how many) at a rate of each GPU."""
    yield line("images/s", rate * gpus, f"{rate:,.1f} a GPU")
    if images is not None:
        hours = images / (rate * gpus) / 3600
        yield line("hours", hours, f"{images:,} images")
        yield line("dollars", hours * gpus * price, f"{hours * gpus:,.1f} GPU-hours of {price:g}")


def line(name: str, value: float, *remarks: str) -> str:
    return f"  {name:<15}{value:>12,.1f}   {'; '.join(filter(None, remarks))}".rstrip()


def shares(parts: dict[str, float], unit: float) -> str:
    return ", ".join(f"{name} {value / unit:,.1f}" for name, value in parts.items() if value)
