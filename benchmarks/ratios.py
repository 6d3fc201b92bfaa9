"""On a CPU: what is saved against the arithmetic of the reference, as ratios within one run.

`python -m benchmarks.ratios [--batch N] [--rounds N]` prints a JSON line for each. `gate`: a training step of S/16
(width 384, depth 12, 6 heads) at 256 pixels with the full objective, DINOv2-B and VGG-16 with random weights, whose
perceptual networks see all images, or only those that pass the gate. `guidance`: sampling without guidance, with and
without the unconditional half that the reference computes all the same. The two sides of a ratio are timed in turn.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import networks
from pixelgen.config import FitConfig, OptimizerConfig
from pixelgen.denoisers.jit import JiTConfig
from pixelgen.objective import Objective
from pixelgen.path import velocity
from pixelgen.samplers.heun import Heun
from pixelgen.sampling import sampling_times
from pixelgen.terms import LpipsConfig, ObjectiveConfig, PDinoConfig
from pixelgen.train import LaneBatch, create_state, train_step

S16 = JiTConfig(image_size=256, patch_size=16, width=384, depth=12, heads=6, bottleneck=128, in_context_start=4,
                in_context_len=32, dropout=0.0, num_classes=1000)


def gate(batch: int) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]:
    """Steps of a training that looks at every image, and of one that looks at those that pass."""
    dino, lpips = networks(256)
    for network in (dino, lpips):
        network.float()
    null = torch.tensor(1000)
    config = FitConfig(steps=10**6, batch_size=batch, lanes=1, seed=0, ema_decay=0.9999, precision="fp32",
                       compile=False)
    shares: list[float] = []

    def steps(gated: bool) -> Callable[[], Any]:
        terms = ObjectiveConfig(lpips=LpipsConfig(gated=gated), pdino=PDinoConfig(gated=gated), balance_start=None)
        objective, optimizer = Objective(terms, 16, null, {"dino": dino, "lpips": lpips}), OptimizerConfig()
        state = create_state(S16, objective, optimizer, 0, torch.device("cpu"))
        images = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8)

        def step() -> None:
            lane = LaneBatch(state.step, 0, [""] * batch, images, torch.arange(batch))
            metrics = train_step(state, state.model, [lane], objective, optimizer, config)
            if gated:
                shares.append(metrics["gate_share"])
        return step

    return steps(False), steps(True), {"batch": batch, "shares": shares}


def guidance(batch: int) -> tuple[Callable[[], Any], Callable[[], Any], dict[str, Any]]:
    """Samplings that compute both halves, and those that compute the one that counts."""
    denoiser = S16.build().eval().requires_grad_(False)
    noise, labels, null = torch.randn(batch, 3, 256, 256), torch.arange(batch), torch.full((batch,), 1000)

    def one(x: Tensor, t: Tensor, at: Tensor) -> Tensor:
        times = t.expand(len(x))
        return velocity(denoiser(x, times, labels)[0], x, times)

    def both(x: Tensor, t: Tensor, at: Tensor) -> Tensor:
        twice, times = torch.cat([x, x]), t.expand(2 * len(x))
        v = velocity(denoiser(twice, times, torch.cat([null, labels]))[0], twice, times)
        return v.chunk(2)[1]

    times, heun = sampling_times(4), Heun().integrate
    return lambda: heun(both, noise, times), lambda: heun(one, noise, times), {"batch": batch, "steps": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    for name, make in (("gate", gate), ("guidance", guidance)):
        torch.manual_seed(0)
        *sides, facts = make(args.batch)
        for side in sides:
            side()
        seconds: list[list[float]] = [[], []]
        for _, (number, side) in itertools.product(range(args.rounds), enumerate(sides)):
            began = time.perf_counter()
            side()
            seconds[number].append(round(time.perf_counter() - began, 3))
        whole, saved = (statistics.median(of) for of in seconds)
        print(json.dumps({"ratio": name, "all": seconds[0], "saved": seconds[1],
                          "times_as_fast": round(whole / saved, 2), "threads": torch.get_num_threads()} | facts),
              flush=True)


if __name__ == "__main__":
    main()
