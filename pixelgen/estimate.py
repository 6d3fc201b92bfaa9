"""What training and sampling take, known before they run: operations, memory, time.

Operations are counted by torch on networks without weights (the meta device): those of matrix products, convolutions
and attention, two for a multiplication and an addition. Memory is by formulas, which `benchmarks/README.md` compares
with what was measured.
"""

import bisect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pixelgen.config import MemoryConfig, ObjectiveConfig, SamplerConfig
from pixelgen.encoders.dino import Dino
from pixelgen.encoders.lpips import Lpips
from pixelgen.models import hidden_width
from pixelgen.models.jit import JiT
from pixelgen.models.jit_t2i import JiTText
from pixelgen.objective import REFERENCE_PATCH
from pixelgen.path import draw_time
from pixelgen.samplers import sample

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

    denoiser: JiT | JiTText
    projector: nn.Module | None = None
    dino: Dino | None = None
    lpips: Lpips | None = None
    text: nn.Module | None = None  # of transformers


def operations(network: nn.Module, *inputs: object, **named: object) -> int:
    """Of one forward pass over inputs on the meta device."""
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    with FlopCounterMode(display=False) as counter:
        run_bare(network, *inputs, **named)
    return counter.get_total_flops()


def run_bare(network: nn.Module, *inputs: object, **named: object) -> None:
    """A forward pass without weights, over inputs on the meta device."""
    tensors = itertools.chain(network.named_parameters(), network.named_buffers())
    bare = {name: torch.empty_like(tensor, device="meta", dtype=torch.float32 if tensor.is_floating_point() else None)
            for name, tensor in tensors}
    with torch.no_grad():
        functional_call(network, bare, inputs, named)


def forward_operations(networks: Networks) -> dict[str, float]:
    """Of each network for one image; LPIPS: of its trunk."""
    c = networks.denoiser.config
    image, features = empty(1, 3, c.image_size, c.image_size), None
    if isinstance(networks.denoiser, JiTText):
        features = empty(1, networks.denoiser.config.text_length, networks.denoiser.config.text_width)
    condition = torch.zeros(1, dtype=torch.long, device="meta") if features is None else features
    found = dict.fromkeys(PARTS, 0.0)
    found["denoiser"] = operations(networks.denoiser, image, empty(1), condition)
    if networks.projector is not None:
        found["repa"] = operations(networks.projector, empty(1, (c.image_size // c.patch_size) ** 2, c.width))
    if networks.dino is not None:
        found["dino"] = operations(networks.dino, image, [networks.dino.depth - 1])
    if networks.lpips is not None:
        side = c.image_size * REFERENCE_PATCH // c.patch_size
        found["lpips"] = operations(networks.lpips, *[empty(1, 3, side, side)] * 2) / 2
    if networks.text is not None:
        assert isinstance(networks.denoiser, JiTText)
        length, width = networks.denoiser.config.text_length, networks.denoiser.config.text_width
        found["text"] = operations(networks.text, inputs_embeds=empty(1, length, width), use_cache=False,
                                   attention_mask=empty(1, 1, length, length))  # as it is: its values are not looked at
    return found


def empty(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def gate_share(objective: ObjectiveConfig) -> float:
    """Share of the training times at which a gated term counts."""
    normal = torch.special.ndtri((torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000)
    times = draw_time(normal, objective.time_mean, objective.time_std, objective.timeshift)
    return (times >= objective.gate_threshold).double().mean().item()


def training_operations(objective: ObjectiveConfig, forward: Mapping[str, float]) -> dict[str, float]:
    """Of a training step by network, an image's share, given `forward_operations`. What is trained takes as much again
    twice in the backward pass, a frozen network that passes a gradient on once."""
    gated = {term: gate_share(objective) if term in objective.gated else 1.0 for term in ("lpips", "pdino")}
    dino = float(objective.repa_weight > 0 or objective.pdino_weight > 0)  # features of the images themselves
    if objective.pdino_weight:
        dino += 2 * gated["pdino"]
    lpips = 3 * gated["lpips"] * (objective.lpips_weight > 0)
    times = {"denoiser": 3.0, "repa": 3.0 * (objective.repa_weight > 0), "dino": dino, "lpips": lpips, "text": 1.0}
    return {name: times[name] * forward[name] for name in PARTS}


def sampling_rows(config: SamplerConfig) -> int:
    """How many samples the denoiser sees for each image that is drawn."""
    rows = 0

    def denoise(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        nonlocal rows
        rows += len(x)
        return x

    noise, condition = torch.zeros(1, 1, 1, 1), torch.zeros(1)
    sample(denoise, noise, condition, condition, config)
    return rows


def training_memory(networks: Networks, objective: ObjectiveConfig, images: int, memory: MemoryConfig
                    ) -> dict[str, float]:
    """Bytes on a GPU by part, in bf16 and compiled, with `images` in a forward pass: the largest sum at any time, as
    torch counts what it has allocated."""
    trained = count(networks.denoiser) + (count(networks.projector) if networks.projector is not None else 0)
    found = {
        "weights": 4 * trained,
        "gradients": 4 * trained,
        "AdamW's moments": 8 * trained,
        "averages": 0 if memory.averages_on_cpu else 4 * count(networks.denoiser),
        "weights in bf16": 2 * trained,
        "frozen networks": sum(2 * count(n) for n in (networks.dino, networks.lpips, networks.text) if n is not None),
        "kept by the denoiser": images * kept_by_denoiser(networks.denoiser, memory.recomputed_blocks),
    }
    if networks.dino is not None and objective.pdino_weight:
        share = gate_share(objective) if "pdino" in objective.gated else 1.0
        tokens = networks.dino.grid**2 + 1
        # the stream twice in float32; queries, keys, values, what attention gives, and GELU's four times as wide input
        block = tokens * networks.dino.width * (2 * 4 + 2 * (3 + 1 + 4))
        found["kept by DINO"] = images * share * block * (objective.pdino_block + 1)
    if networks.lpips is not None and objective.lpips_weight:
        share = gate_share(objective) if "lpips" in objective.gated else 1.0
        c = networks.denoiser.config
        found["kept by LPIPS"] = images * share * kept_by_lpips(networks.lpips,
                                                                c.image_size * REFERENCE_PATCH // c.patch_size)
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


def kept_by_denoiser(denoiser: JiT | JiTText, recomputed: int) -> float:
    """Bytes for the backward pass, an image's: what blocks keep, and of those that are computed again what enters them;
    one of these at a time keeps as much as the others."""
    c = denoiser.config
    tokens = (c.image_size // c.patch_size) ** 2
    # the stream twice, in float32; in bf16 two norms, queries, keys and values before and after norm and rotation,
    # what attention and the two projections give, and three times the hidden width
    token = c.width * (2 * 4 + 2 * (2 + 3 + 2 + 3)) + hidden_width(c) * 2 * 3
    if isinstance(denoiser, JiTText):
        c_text = denoiser.config
        text = c_text.text_length * (token * c_text.text_depth + c.width * 2 * 3 * c.depth)  # keys and values in each
        blocks = [tokens * token] * c.depth
    else:
        text, context = 0, denoiser.config.in_context_len
        blocks = [(tokens + context * (i >= denoiser.config.in_context_start)) * token for i in range(c.depth)]
    again, keeping = blocks[:recomputed], blocks[recomputed:]
    entering = 4 * c.width / token
    return text + sum(keeping) + sum(size * entering for size in again) + max(again, default=0)


def kept_by_lpips(lpips: Lpips, side: int) -> float:
    """Bytes for the backward pass, an image's: what the trunk's convolutions give, in bf16, and, in float32, what of it
    is compared, before and after it is brought to unit length."""
    trunk, compared = 0, 0

    def seen(module: nn.Conv2d, _: object, out: Tensor) -> None:
        nonlocal trunk, compared
        if module.out_channels == 1:  # one of the layers that weigh the squared differences of all channels
            compared += out.numel() * module.in_channels
        else:
            trunk += out.numel()

    hooks = [module.register_forward_hook(seen) for module in lpips.modules() if isinstance(module, nn.Conv2d)]
    run_bare(lpips, empty(1, 3, side, side), empty(1, 3, side, side))
    for hook in hooks:
        hook.remove()
    return 2 * trunk / 2 + 4 * 2 * compared  # the trunk has also seen the targets, which take no gradient
