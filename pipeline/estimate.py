"""What the trainings and samplings of params.yaml will take: operations, memory, time and money, before they run."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.networks import Network
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
from pixelgen.objective import repa_projector

NETWORKS = Path("out/networks")


def networks(train: TrainParams, chosen: Mapping[str, Network]) -> Networks:
    """Those of a training, without weights."""
    import lpips
    from transformers import AutoConfig, AutoModel

    def described(role: str) -> dict[str, Any]:
        return chosen[role].config(NETWORKS / role)

    if strange := {*train.networks} - {"dino", "lpips", "text"}:
        raise ConfigError(f"what {', '.join(sorted(strange))} takes is not known: `networks` in pipeline/estimate.py "
                          "has to build it without weights")
    d, repa, projector = train.denoiser.resolve(), train.objective.repa, None
    frozen: dict[str, Any] = {}
    with torch.device("meta"), quiet():
        if "dino" in train.networks:
            frozen["dino"] = Dino(build_dino(described("dino"), d.grid), d.grid)
        if repa.weight:
            projector = repa_projector(d.width, frozen["dino"].width, repa.hidden or d.width)
        if "text" in train.networks:
            frozen["text"] = AutoModel.from_config(AutoConfig.for_model(**described("text")))
        denoiser = d.build()
    if "lpips" in train.networks:
        with quiet():
            frozen["lpips"] = Lpips(lpips.LPIPS(net=described("lpips")["net"], pnet_rand=True, verbose=False))
    return Networks(denoiser, projector, frozen)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without torchvision's warnings of arguments that lpips gives it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def report(params: Params, keys: Sequence[str], gpus: int, memory: MemoryConfig, room: float, rate: float, price: float
           ) -> Iterator[str]:
    """Lines about each training and sampling that `keys` names (none: all), on GPUs of which each has `room` bytes to
    use, does `rate` operations a second and costs `price` dollars an hour. ConfigError for a key that is not there."""
    known = {*(f"train.{key}" for key in params.train), *(f"sample.{key}" for key in params.sample)}
    if strange := sorted({*keys} - known):
        raise ConfigError(f"{strange[0]}: neither a training nor a sampling; there are {', '.join(sorted(known))}")
    for key, train in params.train.items():
        if not keys or f"train.{key}" in keys:
            found = networks(train, params.networks)
            yield from training(f"train.{key}", train, found, gpus, memory, room, rate, price)
    for key, sample in params.sample.items():
        if not keys or f"sample.{key}" in keys:
            train = params.train[sample.model]
            yield from sampling(f"sample.{key}", train, networks(train, params.networks), sample, gpus, rate, price)


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


def sampling(name: str, train: TrainParams, found: Networks, sample: SampleParams, gpus: int, rate: float, price: float
             ) -> Iterator[str]:
    forward = forward_operations(found)
    rows = sampling_rows(sample.sampler)
    operations = rows * forward["denoiser"] + forward["text"]
    s = sample.sampler
    yield (f"{name}: {s.kind}, {s.steps} steps, guidance {s.guidance:g}: the denoiser sees {rows} samples for each "
           "image")
    yield line("GFLOP an image", operations / 1e9)
    count = None
    if sample.prompts == NONE:
        count = (train.denoiser.num_classes or 0) * sample.per_prompt
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
