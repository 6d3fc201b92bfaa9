"""Images of a few lanes -> the total loss of each and its named terms (arXiv 2602.02493, the full objective).

L = L_FM + w_repa·L_REPA + w·(w_lpips·L_LPIPS + w_pdino·L_PDINO), where w is the adaptive balance kept in the
training state. L_FM and L_REPA count every sample; the gated terms count the samples with t >= threshold only. Every
term is a mean over the samples of its lane that count, so it does not matter which lanes are computed together.
"""

from collections.abc import Callable, Sequence
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
from pixelgen.models.layers import Masks
from pixelgen.models.speed import compile_blocks
from pixelgen.path import draw_time, interpolate

REFERENCE_PATCH = 16  # denoiser patch at which LPIPS sees the images at their own size


@dataclass(frozen=True)
class Draws:
    """Everything random of some samples: noise (B, 3, H, W), times (B,), conditions after they were dropped (B, ...),
    and the masks of the denoiser's dropout, of every block (B, ...). Times are on the CPU: which samples pass the gate
    is known there without waiting for the device."""

    noise: Tensor
    t: Tensor
    condition: Tensor
    dropout: Sequence[Masks] = ()


def join(draws: Sequence[Draws]) -> Draws:
    """The draws of several lanes as those of one batch."""
    if len(draws) == 1:
        return draws[0]
    dropout = [tuple(None if masks[0] is None else torch.cat(masks) for masks in zip(*of_block, strict=True))
               for of_block in zip(*(d.dropout for d in draws), strict=True)]
    return Draws(torch.cat([d.noise for d in draws]), torch.cat([d.t for d in draws]),
                 torch.cat([d.condition for d in draws]), dropout)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Losses:
    """Each of them (lanes,)."""

    total: Tensor
    reconstruction: Tensor  # L_FM, the numerator of the balance
    perceptual: Tensor  # w_lpips·L_LPIPS + w_pdino·L_PDINO before the balance
    terms: dict[str, Tensor]  # unweighted, by name
    gate_share: float = 1.0  # of the samples, those at times at which gated terms count


class Objective:
    """The losses of some lanes. Networks that no term with weight needs may be None, and are never run."""

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

    def draw(self, x: Tensor, condition: Tensor, draw_dropout: Callable[[int], Sequence[Masks]] = lambda _: ()
             ) -> Draws:
        """All that is random from the default generators, which the training step has seeded for a lane."""
        c = self.config
        noise = torch.randn_like(x)
        t = draw_time(torch.randn(len(x)), c.time_mean, c.time_std, c.timeshift)
        drop = (torch.rand(len(x)) < c.condition_dropout).to(x.device, non_blocking=True)
        drop = drop.view(-1, *([1] * (condition.ndim - 1)))
        return Draws(noise, t, torch.where(drop, self.null, condition), draw_dropout(len(x)))

    def __call__(self, model: Callable[..., tuple[Tensor, Tensor | None]], x: Tensor, draws: Draws,
                 percept_weight: float, lanes: int = 1) -> Losses:
        """`model(x_t, t, condition, dropout)` gives the predicted clean image and REPA's projected tokens (or None);
        `x` are the clean images (B, 3, H, W) in [-1, 1], those of one lane after those of another."""
        c, t = self.config, draws.t.to(x.device, non_blocking=True)
        x_t = interpolate(x, draws.noise, t)
        prediction, projected = model(x_t, t, draws.condition, draws.dropout)
        prediction = prediction.float()
        terms = {"fm": lane_means(flow_matching(prediction, x, x_t, t), lanes)}
        perceptual = torch.zeros(lanes, device=x.device)
        features: dict[int, Tensor] = {}
        if c.repa_weight or c.pdino_weight:
            assert self.dino is not None
            last = self.dino.depth - 1
            blocks = [last] * (c.repa_weight > 0) + [c.pdino_block] * (c.pdino_weight > 0)
            with torch.no_grad():
                features = self.dino(x, blocks)
        if c.repa_weight:
            assert projected is not None
            terms["repa"] = lane_means(feature_distance(projected, features[last]), lanes)
        if c.lpips_weight:
            counted = self._counted("lpips", draws.t, lanes, x.device)
            terms["lpips"] = counted.means(self._lpips(counted.of(prediction), counted.of(x)))
            perceptual = perceptual + c.lpips_weight * terms["lpips"]
        if c.pdino_weight:
            counted = self._counted("pdino", draws.t, lanes, x.device)
            terms["pdino"] = counted.means(self._pdino(counted.of(prediction), counted.of(features[c.pdino_block])))
            perceptual = perceptual + c.pdino_weight * terms["pdino"]

        total = terms["fm"] + percept_weight * perceptual
        if c.repa_weight:
            total = total + c.repa_weight * terms["repa"]
        passed = (draws.t >= c.gate_threshold).float().mean().item() if c.gated else 1.0
        return Losses(total, terms["fm"], perceptual, terms, passed)

    def compile(self) -> None:
        """Have the frozen networks compiled when they are first run, for any number of samples that pass the gate."""
        if self.dino is not None:
            compile_blocks(self.dino.network, dynamic=None)
        if self.lpips is not None:
            self.lpips.to(memory_format=torch.channels_last).compile()  # type: ignore[call-overload]

    def _counted(self, term: str, t: Tensor, lanes: int, device: torch.device) -> "Counted":
        """The samples that `term` counts, by their times on the CPU; a perceptual network is run on these only."""
        if term not in self.config.gated:
            return Counted(None, [len(t) // lanes] * lanes)
        passes = t >= self.config.gate_threshold
        rows = passes.nonzero().squeeze(1).to(device, non_blocking=True)
        return Counted(rows, passes.view(lanes, -1).sum(1).tolist())

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


def lane_means(values: Tensor, lanes: int) -> Tensor:
    """(B,) -> (lanes,): the mean of each lane, taken by itself, so that it does not depend on the other lanes."""
    return torch.stack([of_lane.mean() for of_lane in values.chunk(lanes)])


@dataclass(frozen=True)
class Counted:
    """The samples that a term counts."""

    rows: Tensor | None  # their indices; None: all
    of_lane: list[int]  # how many of them are in each lane

    def of(self, values: Tensor) -> Tensor:
        return values if self.rows is None else values.index_select(0, self.rows)

    def means(self, values: Tensor) -> Tensor:
        """Values of these samples -> (lanes,): the mean of each lane, 0 where it has none: a gate that no sample passes
        contributes nothing, and no NaN."""
        return torch.stack([of_lane.sum() / max(len(of_lane), 1) for of_lane in values.split(self.of_lane)])


class WithProjector(nn.Module):
    """Denoiser and REPA head as the one module that is trained: (x_t, t, condition, dropout) -> (clean image,
    projected).

    The head is three linear layers with SiLU on the tokens that enter block `feature_block`.
    """

    def __init__(self, denoiser: JiT | JiTText, projector: nn.Module | None, feature_block: int | None):
        super().__init__()
        self.denoiser, self.projector, self.feature_block = denoiser, projector, feature_block

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor, dropout: Sequence[Masks] = ()
                ) -> tuple[Tensor, Tensor | None]:
        x, features = self.denoiser(x_t, t, condition, self.feature_block, dropout)
        return x, None if self.projector is None else self.projector(features)


def repa_projector(width: int, target: int, hidden: int) -> nn.Module:
    """The REPA head (arXiv 2410.06940): denoiser width -> hidden -> hidden -> DINO's width."""
    return nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                         nn.Linear(hidden, target))
