"""One micro-batch -> the total loss and its named terms (arXiv 2602.02493, equation of the full objective).

L = L_FM + w_repa·L_REPA + w·(w_lpips·L_LPIPS + w_pdino·L_PDINO), where w is the adaptive balance kept in the
training state. L_FM and L_REPA count every sample; the gated terms count the samples with t >= threshold only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixelgen.config import ObjectiveConfig, require
from pixelgen.encoders.dino import Dino
from pixelgen.encoders.lpips import Lpips
from pixelgen.losses import feature_distance, flow_matching
from pixelgen.models.jit import JiT
from pixelgen.models.jit_t2i import JiTText
from pixelgen.path import draw_time, interpolate

REFERENCE_PATCH = 16  # denoiser patch at which LPIPS sees the images at their own size


@dataclass(frozen=True)
class Draws:
    """Everything random of one micro-batch: noise (B, 3, H, W), times (B,), conditions after dropout (B, ...)."""

    noise: Tensor
    t: Tensor
    condition: Tensor


@dataclass(frozen=True)
class Losses:
    total: Tensor
    reconstruction: Tensor  # L_FM, the numerator of the balance
    perceptual: Tensor  # w_lpips·L_LPIPS + w_pdino·L_PDINO before the balance
    terms: dict[str, Tensor]  # unweighted, by name


class Objective:
    """The loss of one micro-batch. Networks that no term with weight needs may be None, and are never run."""

    def __init__(self, config: ObjectiveConfig, patch_size: int, null: Tensor, dino: Dino | None,
                 lpips: Lpips | None):
        """`null`: what a dropped condition becomes, a label () or the text features (L, C) of the empty prompt."""
        needs_dino = config.repa_weight > 0 or config.pdino_weight > 0
        require(not needs_dino or dino is not None, "repa_weight or pdino_weight is set, but there is no DINO network")
        require(config.lpips_weight == 0 or lpips is not None, "lpips_weight is set, but there is no LPIPS network")
        # An empty prompt is nothing but padding, and attention to nothing was NaN before torch 2.5.
        require(bool(null.isfinite().all()), "the text features of the empty prompt, which dropped conditions become, "
                "are not finite: get the text encoder's files anew, or another version of torch")
        if dino is not None:
            require(config.pdino_block < dino.depth,
                    f"pdino_block {config.pdino_block}: this DINO has blocks 0 to {dino.depth - 1}")
        self.config, self.patch_size, self.null, self.dino, self.lpips = config, patch_size, null, dino, lpips

    def balances_at(self, step: int) -> bool:
        """Whether the perceptual weight is refreshed before optimizer step `step` (counted from 0)."""
        start = self.config.balance_start
        return start is not None and step >= start and step % self.config.balance_every == 0

    def draw(self, x: Tensor, condition: Tensor) -> Draws:
        """Noise, times and dropped conditions from the default generators, which the training step has seeded."""
        c = self.config
        noise = torch.randn_like(x)
        t = draw_time(torch.randn(len(x), device=x.device), c.time_mean, c.time_std, c.timeshift)
        drop = torch.rand(len(x), device=x.device) < c.condition_dropout
        drop = drop.view(-1, *([1] * (condition.ndim - 1)))
        return Draws(noise, t, torch.where(drop, self.null, condition))

    def __call__(self, model: Callable[..., tuple[Tensor, Tensor | None]], x: Tensor, draws: Draws,
                 percept_weight: float) -> Losses:
        """`model(x_t, t, condition)` gives the predicted clean image and REPA's projected tokens (or None); `x` are
        the clean images (B, 3, H, W) in [-1, 1]."""
        c, t = self.config, draws.t
        x_t = interpolate(x, draws.noise, t)
        prediction, projected = model(x_t, t, draws.condition)
        prediction = prediction.float()
        terms = {"fm": flow_matching(prediction, x, x_t, t).mean()}
        passes = t >= c.gate_threshold

        perceptual = torch.zeros((), device=x.device)
        features: dict[int, Tensor] = {}
        if c.repa_weight or c.pdino_weight:
            assert self.dino is not None
            last = self.dino.depth - 1
            blocks = [last] * (c.repa_weight > 0) + [c.pdino_block] * (c.pdino_weight > 0)
            with torch.no_grad():
                features = self.dino(x, blocks)
        if c.repa_weight:
            assert projected is not None
            terms["repa"] = feature_distance(projected, features[last]).mean()
        if c.lpips_weight:
            chosen = self._chosen("lpips", passes)
            terms["lpips"] = mean_or_zero(self._lpips(prediction[chosen], x[chosen]))
            perceptual = perceptual + c.lpips_weight * terms["lpips"]
        if c.pdino_weight:
            chosen = self._chosen("pdino", passes)
            terms["pdino"] = mean_or_zero(self._pdino(prediction[chosen], features[c.pdino_block][chosen]))
            perceptual = perceptual + c.pdino_weight * terms["pdino"]

        total = terms["fm"] + percept_weight * perceptual
        if c.repa_weight:
            total = total + c.repa_weight * terms["repa"]
        return Losses(total, terms["fm"], perceptual, terms)

    def _chosen(self, term: str, passes: Tensor) -> Tensor:
        """Indices of the samples that `term` counts; a perceptual network is run on these only."""
        counted = passes if term in self.config.gated else torch.ones_like(passes)
        return counted.nonzero().squeeze(1)

    def _lpips(self, prediction: Tensor, x: Tensor) -> Tensor:
        if not len(x):
            return prediction.new_zeros(0)
        if self.patch_size != REFERENCE_PATCH:
            size = x.shape[-1] * REFERENCE_PATCH // self.patch_size
            prediction, x = (F.interpolate(i, size, mode="bilinear", antialias=True) for i in (prediction, x))
        assert self.lpips is not None
        return self.lpips(prediction, x)

    def _pdino(self, prediction: Tensor, target: Tensor) -> Tensor:
        if not len(target):
            return prediction.new_zeros(0)
        assert self.dino is not None
        block = self.config.pdino_block
        return feature_distance(self.dino(prediction, [block])[block], target)


def mean_or_zero(values: Tensor) -> Tensor:
    """Mean of (B,), 0 of none: a gate that no sample passes contributes nothing, and no NaN."""
    return values.sum() / max(len(values), 1)


class WithProjector(nn.Module):
    """Denoiser and REPA head as the one module that is trained: (x_t, t, condition) -> (clean image, projected).

    The head is three linear layers with SiLU on the tokens that enter block `feature_block`.
    """

    def __init__(self, denoiser: JiT | JiTText, projector: nn.Module | None, feature_block: int | None):
        super().__init__()
        self.denoiser, self.projector, self.feature_block = denoiser, projector, feature_block

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> tuple[Tensor, Tensor | None]:
        x, features = self.denoiser(x_t, t, condition, self.feature_block)
        return x, None if self.projector is None else self.projector(features)


def repa_projector(width: int, target: int, hidden: int) -> nn.Module:
    """The REPA head (arXiv 2410.06940): denoiser width -> hidden -> hidden -> DINO's width."""
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                         nn.Linear(hidden, target))
