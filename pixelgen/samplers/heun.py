"""Heun's method, of second order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pixelgen.samplers import Sampler, Velocity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Heun(Sampler):
    """The mean slope of the step's start and its Euler end; the last step is an Euler step. Two evaluations a step."""

    # without, a step starts from the slope found at the end of the one before (at its Euler point, not at the corrected
    # x), which saves an evaluation
    exact: ClassVar = True

    def slope(self, v: Velocity, x: Tensor, times: Tensor, step: int, past: list[Tensor]) -> Tensor:
        t, t_next = times[step], times[step + 1]
        slope = v(x, t, t) if self.exact or not past else past.pop()
        if step < len(times) - 2:
            end = v(x + (t_next - t) * slope, t_next, t)
            past[:] = [end]
            slope = (slope + end) / 2
        return slope
