"""Small models, stand-in networks and batches that the unit tests share."""

from typing import Any

import torch
from torch import Tensor

from pixelgen.conditioning import Labels
from pixelgen.config import FitConfig, load
from pixelgen.denoisers.jit import JiTConfig
from pixelgen.denoisers.jit_t2i import JiTTextConfig
from pixelgen.models import DenoiserNetwork
from pixelgen.models.jit import JiT
from pixelgen.terms import ObjectiveConfig
from pixelgen.train import LaneBatch

torch.set_num_threads(1)  # the models are tiny: more threads only get in each other's way

TINY: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "width": 32, "depth": 3, "heads": 2, "bottleneck": 8, "in_context_start": 1,
    "in_context_len": 2, "dropout": 0.0, "num_classes": 4, "mlp_ratio": 4.0}
TINY_TEXT: dict[str, Any] = {
    "image_size": 16, "patch_size": 8, "width": 32, "depth": 2, "text_depth": 1, "heads": 2, "bottleneck": 8,
    "text_width": 16, "text_length": 6, "mlp_ratio": 4.0}
FIT: dict[str, Any] = {
    "steps": 6, "batch_size": 8, "lanes": 4, "seed": 3, "ema_decay": 0.9, "precision": "fp32", "compile": False}


CLASSES = Labels(TINY["num_classes"])


def tiny_config(**changes: Any) -> JiTConfig:
    return JiTConfig(**TINY | changes)


def tiny_text(**changes: Any) -> JiTTextConfig:
    return JiTTextConfig(**TINY_TEXT | changes)


def fit_config(**changes: Any) -> FitConfig:
    return FitConfig(**FIT | changes)


def objective_config(gated: tuple[str, ...] = ("lpips",), **options: Any) -> ObjectiveConfig:
    """TERM_OPTION stands for an option of a term; `gated` names the terms with a gate."""
    data: dict[str, Any] = {term: {"gated": term in gated} for term in ("repa", "lpips", "pdino")}
    for name, value in options.items():
        term, _, option = name.partition("_")
        data.update({name: value} if term not in data else {term: data[term] | {option: value}})
    return load(ObjectiveConfig, data)


NO_TERMS: dict[str, Any] = {"repa_weight": 0, "lpips_weight": 0, "pdino_weight": 0, "balance_start": None}


def tiny_denoiser(seed: int = 0, **changes: Any) -> JiT:
    """A denoiser whose every weight is random: a fresh one returns zeros."""
    torch.manual_seed(seed)
    return randomised(JiT(tiny_config(**changes)))


def randomised(model: DenoiserNetwork) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def some_images(count: int, size: int = 16, seed: int = 0) -> Tensor:
    """(count, 3, size, size) in [-1, 1]."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class StandInDino:
    """A differentiable stand-in with DINO's interface: one token, never zero, for each 8×8 patch."""

    depth, width = 2, 6

    def __init__(self) -> None:
        self.weights = torch.randn(self.depth, 192, self.width, generator=torch.Generator().manual_seed(5)) / 8

    def __call__(self, images: Tensor, blocks: list[int]) -> dict[int, Tensor]:
        patches = torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2)
        return {block: torch.tanh(patches @ self.weights[block] + 0.5) for block in blocks}


def stand_in_lpips(images: Tensor, targets: Tensor) -> Tensor:
    return (images - targets).square().flatten(1).mean(1)


def lane_batch(step: int, lane: int, size: int = 2) -> LaneBatch:
    """The samples of a lane: always the same for the same step and lane."""
    generator = torch.Generator().manual_seed(1000 * step + lane)
    images = torch.randint(0, 256, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, TINY["num_classes"], (size,), generator=generator)
    return LaneBatch(step, lane, [f"s{step}-{lane}-{i}" for i in range(size)], images, labels)
