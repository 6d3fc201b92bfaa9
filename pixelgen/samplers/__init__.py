"""Samplers: integrate dx/dt = v(x, t) from noise (t = 0) to an image (t = 1).

A velocity field, which `pixelgen.sampling` makes of a denoiser, is called as `v(x, t, at)`: `t` is where it is
evaluated, `at` the start of the step, which alone decides whether guidance acts. Times are on the CPU, so that nothing
waits for the device. Importing this does not import torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pixelgen.config import Variant, require

if TYPE_CHECKING:
    from torch import Tensor

Velocity = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]  # (x, t, start of the step), both times scalars
Callback = Callable[[int, "Tensor", "Tensor"], None]  # (step, x before it, velocity it used)


@dataclass(frozen=True)
class Sampler(Variant):
    """How an image is integrated from noise."""

    kinds: ClassVar = {
        "euler": "pixelgen.samplers.euler:Euler",
        "heun": "pixelgen.samplers.heun:Heun",
        "adams_bashforth": "pixelgen.samplers.adams_bashforth:AdamsBashforth",
    }
    includes_high: ClassVar = True  # whether guidance acts at interval[1] itself

    steps: int = 50  # of the integration; heun calls the denoiser twice in each
    guidance: float = 1.0  # 1: conditional only
    interval: tuple[float, float] = (0.0, 1.0)  # guidance acts where interval[0] < t <= interval[1]
    timeshift: float = 1.0  # above 1: more of the steps close to the noise

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps {self.steps} must be at least 1")
        require(self.guidance >= 0, f"guidance {self.guidance} must not be negative")
        low, high = self.interval
        require(0 <= low < high <= 1, f"interval [{low}, {high}] must satisfy 0 <= low < high <= 1")
        require(self.timeshift > 0, "timeshift must be positive")

    def slope(self, v: Velocity, x: Tensor, times: Tensor, step: int, past: list[Tensor]) -> Tensor:
        """The direction of `x` (B, ...) from `times[step]` to the next. `past`, at first empty, keeps what later steps
        need."""
        raise NotImplementedError

    def integrate(self, v: Velocity, noise: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
        """The image (B, ...) at the last of the `times` (steps + 1,), from `noise` (B, ...) at the first."""
        x, past = noise, list[Any]()
        for step, (t, t_next) in enumerate(itertools.pairwise(times)):
            slope = self.slope(v, x, times, step, past)
            if callback:
                callback(step, x, slope)
            x = x + (t_next - t) * slope
        return x
