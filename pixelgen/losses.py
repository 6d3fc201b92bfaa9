"""The terms of the objective: each a function that returns one value per sample, and how they combine.

A new term is a class of options and a field of `ObjectiveConfig`, and here a function and a row of `TERMS`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pixelgen.path import velocity
from pixelgen.terms import LpipsConfig, PDinoConfig, RepaConfig

REFERENCE_PATCH = 16  # denoiser patch at which LPIPS sees the images at their own size


@dataclass(frozen=True)
class Seen:
    """What a term sees, of the samples that it counts."""

    prediction: Tensor  # of the clean images, (B, 3, H, W)
    images: Tensor  # the clean images themselves, in [-1, 1]
    projected: Tensor | None  # REPA's projected tokens (B, N, C), if it has a weight
    features: Mapping[int, Tensor]  # DINO's of the clean images, (B, N, C) by block: of the blocks asked for
    networks: Mapping[str, Any]  # the frozen ones, by name
    patch_size: int  # of the denoiser

    def of(self, rows: Tensor) -> "Seen":
        """Of these samples alone."""
        def some(values: Tensor) -> Tensor:
            return values.index_select(0, rows)

        return dataclasses.replace(
            self, prediction=some(self.prediction), images=some(self.images),
            projected=None if self.projected is None else some(self.projected),
            features={block: some(features) for block, features in self.features.items()})


@dataclass(frozen=True)
class Term:
    """What a term computes."""

    values: Callable[[Seen, Any], Tensor]  # of what it sees, and its options -> (B,)
    blocks: Callable[[Any, int], list[int]] | None = None  # of DINO, by its options and DINO's depth: see `Seen`
    passes: Mapping[str, int] = field(default_factory=dict)  # through frozen networks for a sample, forward or back
    side: Callable[[int, int], int] = lambda size, patch: size  # of the images that these see, in pixels


def lpips_side(size: int, patch: int) -> int:
    """Pixels on a side of what LPIPS sees: 16 for a patch."""
    return size * REFERENCE_PATCH // patch


def repa(seen: Seen, options: RepaConfig) -> Tensor:
    """1 - cos of the projected tokens and DINO's of the clean image, of its last block."""
    assert seen.projected is not None
    return feature_distance(seen.projected, seen.features[seen.networks["dino"].depth - 1])


def lpips(seen: Seen, options: LpipsConfig) -> Tensor:
    """LPIPS of prediction and clean image, at 16 pixels for a patch."""
    prediction, images = seen.prediction, seen.images
    if seen.patch_size != REFERENCE_PATCH:
        size = lpips_side(images.shape[-1], seen.patch_size)
        prediction, images = (F.interpolate(i, size, mode="bilinear", antialias=True) for i in (prediction, images))
    return seen.networks["lpips"](prediction, images)


def pdino(seen: Seen, options: PDinoConfig) -> Tensor:
    """1 - cos of DINO's tokens of prediction and clean image."""
    found = seen.networks["dino"](seen.prediction, [options.block])
    return feature_distance(found[options.block], seen.features[options.block])


TERMS = {
    "repa": Term(repa, lambda options, depth: [depth - 1]),
    "lpips": Term(lpips, passes={"lpips": 3}, side=lpips_side),
    "pdino": Term(pdino, lambda options, depth: [options.block], {"dino": 2}),
}


def flow_matching(prediction: Tensor, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """L_FM = (v̂ - v)², the velocities of predicted and true clean image; images (B, 3, H, W) -> (B,)."""
    return (velocity(prediction, x_t, t) - velocity(x, x_t, t)).square().flatten(1).mean(1)


def feature_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos, averaged over tokens: the form of both REPA and P-DINO. Tokens (B, N, C) -> (B,) in [0, 2]."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=-1).mean(-1)


def balance_weight(reconstruction: Tensor, perceptual: Tensor, weight: Tensor) -> Tensor:
    """clip(‖∇L_rec‖ / (‖∇L_perc‖ + 1e-4), 0, 100), gradients of two scalar losses at `weight`; a scalar."""
    def norm(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, weight, retain_graph=True)[0].norm()

    return (norm(reconstruction) / (norm(perceptual) + 1e-4)).clamp(0, 100).detach()
