"""What training and sampling take, known before they run: operations, memory, time.

Operations are counted by torch on networks without weights (the meta device): those of matrix products, convolutions
and attention, two for a multiplication and an addition. Memory is by formulas, which `benchmarks/README.md` compares
with what was measured.
"""

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pixelgen.config import MemoryConfig
from pixelgen.denoisers import Architecture, TakesPrompts
from pixelgen.losses import TERMS
from pixelgen.models import DenoiserNetwork
from pixelgen.path import draw_time
from pixelgen.samplers import Sampler
from pixelgen.sampling import sample
from pixelgen.tensors import run_bare
from pixelgen.terms import ObjectiveConfig, TermConfig

# bf16 matrix products without sparsity, operations a second, as the makers state them
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "4090": 165e12}
USABLE = 0.8  # of a GPU's memory; the rest is for libraries, for what the allocator cannot join, and for errors here
PARTS = ("denoiser", "repa", "dino", "lpips", "text")


def peak(gpu: str) -> float | None:
    """Operations a second of a GPU, by the name that torch gives it; None if it is none of `PEAKS`."""
    return next((rate for name, rate in PEAKS.items() if name in gpu), None)


@dataclass(frozen=True)
class Networks:
    """All that a training runs. Only shapes count: the networks may have weights anywhere, or none."""

    denoiser: DenoiserNetwork
    projector: nn.Module | None = None
    frozen: Mapping[str, Any] = field(default_factory=dict)  # dino, lpips, and text, a network of transformers


def operations(network: nn.Module, *inputs: object, **named: object) -> int:
    """Of one forward pass over inputs on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with FlopCounterMode(display=False) as counter:
        run_bare(network, *inputs, **named)
    return counter.get_total_flops()


def forward_operations(networks: Networks) -> dict[str, float]:
    """Of each network for one image; LPIPS: of its trunk."""
    c = networks.denoiser.config
    image = empty(1, 3, c.image_size, c.image_size)
    condition = (empty(1, c.text_length, c.text_width) if isinstance(c, TakesPrompts) else
                 torch.zeros(1, dtype=torch.long, device="meta"))
    found = dict.fromkeys((*PARTS, *networks.frozen), 0.0)
    found["denoiser"] = operations(networks.denoiser, image, empty(1), condition)
    if networks.projector is not None:
        found["repa"] = operations(networks.projector, empty(1, c.grid**2, c.width))
    for role, network in networks.frozen.items():
        if role == "text":
            length = condition.shape[1]
            found[role] = operations(network, inputs_embeds=empty(*condition.shape), use_cache=False,
                                     attention_mask=empty(1, 1, length, length))  # its values are not looked at
        else:
            inputs, passes = network.example(seen_through(role, c))
            found[role] = operations(network, *inputs) / passes
    return found


def seen_through(role: str, c: Architecture) -> Tensor:
    """An image of the size at which terms look through a frozen network."""
    side = next((row.side(c.image_size, c.patch_size) for row in TERMS.values() if role in row.passes), c.image_size)
    return empty(1, 3, side, side)


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def share_counted(objective: ObjectiveConfig, term: TermConfig) -> float:
    """Share of the samples that a term counts."""
    return gate_share(objective) if term.gated else 1.0


def gate_share(objective: ObjectiveConfig) -> float:
    """Share of the training times at which a gated term counts."""
    normal = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    times = draw_time(normal, objective.time_mean, objective.time_std, objective.timeshift)
    return (times >= objective.gate_threshold).double().mean().item()


def training_operations(objective: ObjectiveConfig, forward: Mapping[str, float]) -> dict[str, float]:
    """Of a training step by network, an image's share, given `forward_operations`. What is trained takes as much again
    twice in the backward pass, a frozen network that passes a gradient on once."""
    times = dict.fromkeys(forward, 0.0) | {"denoiser": 3.0, "text": 1.0}
    if objective.repa.weight:
        times["repa"] = 3.0
    if any(TERMS[name].blocks for name in objective.terms):
        times["dino"] = 1.0  # features of the images themselves
    for name, term in objective.terms.items():
        for network, passes in TERMS[name].passes.items():
            times[network] += passes * share_counted(objective, term)
    return {name: times[name] * forward[name] for name in forward}


def sampling_rows(sampler: Sampler) -> int:
    """How many samples the denoiser sees for each image that is drawn."""
    rows = 0

    def denoise(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return x

    noise, condition = torch.zeros(1, 1, 1, 1), torch.zeros(1)
    sample(denoise, noise, condition, condition, sampler)
    return rows


def training_memory(networks: Networks, objective: ObjectiveConfig, images: int, memory: MemoryConfig
                    ) -> dict[str, float]:
    """Bytes on a GPU by part, in bf16 and compiled, with `images` in a forward pass: the largest sum at any time, as
    torch counts what it has allocated."""
    c = networks.denoiser.config
    trained = count(networks.denoiser) + (count(networks.projector) if networks.projector is not None else 0)
    found = {
        "weights": 4 * trained,
        "gradients": 4 * trained,
        "AdamW's moments": 8 * trained,
        "averages": 0 if memory.averages_on_cpu else 4 * count(networks.denoiser),
        "weights in bf16": 2 * trained,
        "frozen networks": sum(2 * count(network) for network in networks.frozen.values()),
        "kept by the denoiser": images * c.kept(memory.recomputed_blocks),
    }
    for name, term in objective.terms.items():
        for network in TERMS[name].passes:
            part = f"kept by {network}"
            frozen, asked = networks.frozen[network], TERMS[name].blocks
            blocks = asked(term, frozen.depth) if asked else []
            kept = images * share_counted(objective, term) * frozen.kept(seen_through(network, c), blocks)
            found[part] = found.get(part, 0) + kept
    return {name: float(size) for name, size in found.items()}


def fitting_lanes(networks: Networks, objective: ObjectiveConfig, lane: int, lanes: int, memory: MemoryConfig,
                  room: float) -> int:
    """How many of a rank's `lanes` of `lane` images may share a forward pass in `room` bytes: at least one, whatever
    that takes."""
    fit = bisect.bisect_right(range(1, lanes + 1), room, key=lambda n: sum(
        training_memory(networks, objective, n * lane, memory).values()))
    return max(fit, 1)


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())
