"""Euler's method, of first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pixelgen.samplers import Sampler, Velocity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Euler(Sampler):
    """x ← x + Δt·v(x, t): one evaluation a step."""

    def slope(self, v: Velocity, x: Tensor, times: Tensor, step: int, past: list[Tensor]) -> Tensor:
        return v(x, times[step], times[step])
