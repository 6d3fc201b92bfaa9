"""Images of a few lanes -> the total loss of each and its named terms (arXiv 2602.02493, the full objective).

L = L_FM + w_repa·L_REPA + w·(w_lpips·L_LPIPS + w_pdino·L_PDINO), where w is the adaptive balance kept in the
training state. L_FM counts every sample; the gated terms count the samples with t >= threshold only. Every term is a
mean over the samples of its lane that count, so it does not matter which lanes are computed together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pixelgen.config import require
from pixelgen.losses import TERMS, Seen, flow_matching
from pixelgen.models import DenoiserNetwork
from pixelgen.models.layers import Masks
from pixelgen.path import draw_time, interpolate
from pixelgen.terms import ObjectiveConfig


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
    """The losses of some lanes. Networks that no term with weight needs may be left out, and are never run."""

    def __init__(self, config: ObjectiveConfig, patch_size: int, null: Tensor, networks: Mapping[str, Any]):
        """`null`: what a dropped condition becomes, a label () or the text features (L, C) of the empty prompt.
        `networks`: the frozen ones, by name."""
        for name, term in config.terms.items():
            for network in term.networks:
                require(network in networks, f"{name}.weight is set, but there is no network {network}")
        # An empty prompt is nothing but padding, and attention to nothing was NaN before torch 2.5.
        require(bool(null.isfinite().all()), "the text features of the empty prompt, which dropped conditions become, "
                "are not finite: get the text encoder's files anew, or another version of torch")
        self.config, self.patch_size, self.null, self.networks = config, patch_size, null, networks
        self.blocks: list[int] = []  # of DINO, whose features of the clean images terms compare with
        for name, term in config.terms.items():
            if asked := TERMS[name].blocks:
                self.blocks += asked(term, depth := networks["dino"].depth)
                require(max(self.blocks) < depth, f"{name}.block {max(self.blocks)}: this DINO has blocks 0 to "
                        f"{depth - 1}")

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
        with torch.no_grad():
            features = self.networks["dino"](x, self.blocks) if self.blocks else {}
        seen = Seen(prediction, x, projected, features, self.networks, self.patch_size)
        passes = draws.t >= c.gate_threshold  # on the CPU
        rows = passes.nonzero().squeeze(1).to(x.device, non_blocking=True)
        for name, term in c.terms.items():
            of_lane = passes.view(lanes, -1).sum(1).tolist() if term.gated else [len(x) // lanes] * lanes
            # a frozen network takes no empty batch; what is trained takes part even in one, since DDP waits for it
            nothing = bool(TERMS[name].passes) and not any(of_lane)
            values = prediction.new_zeros(0) if nothing else TERMS[name].values(
                seen.of(rows) if term.gated else seen, term)
            # a gate that no sample of a lane passes contributes nothing, and no NaN
            terms[name] = torch.stack([lane.sum() / max(len(lane), 1) for lane in values.split(of_lane)])
            if term.perceptual:
                perceptual = perceptual + term.weight * terms[name]

        total = terms["fm"] + percept_weight * perceptual
        for name, term in c.terms.items():
            if not term.perceptual:
                total = total + term.weight * terms[name]
        gated = any(term.gated for term in c.terms.values())
        passed = passes.float().mean().item() if gated else 1.0
        return Losses(total, terms["fm"], perceptual, terms, passed)

    def compile(self) -> None:
        """Have the frozen networks compiled when they are first run, for any number of samples that pass the gate."""
        for network in self.networks.values():
            network.compiled()


def lane_means(values: Tensor, lanes: int) -> Tensor:
    """(B,) -> (lanes,): the mean of each lane, taken by itself, so that it does not depend on the other lanes."""
    return torch.stack([of_lane.mean() for of_lane in values.chunk(lanes)])


class WithProjector(nn.Module):
    """Denoiser and REPA head as the one module that is trained: (x_t, t, condition, dropout) -> (clean image,
    projected).

    The head is three linear layers with SiLU on the tokens that enter block `feature_block`.
    """

    def __init__(self, denoiser: DenoiserNetwork, projector: nn.Module | None, feature_block: int | None):
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
