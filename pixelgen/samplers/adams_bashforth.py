"""The Adams-Bashforth methods, for times that need not be equidistant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pixelgen.config import require
from pixelgen.samplers import Sampler, Velocity

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AdamsBashforth(Sampler):
    """The polynomial through the last `order` velocities, integrated over the step: one evaluation a step."""

    includes_high: ClassVar = False  # as in the reference implementation

    order: int = 2  # 1 to 4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(1 <= self.order <= 4, f"order {self.order} must be 1, 2, 3 or 4")

    def slope(self, v: Velocity, x: Tensor, times: Tensor, step: int, past: list[Tensor]) -> Tensor:
        import torch

        past[:] = [*past, v(x, times[step], times[step])][-self.order:]
        weights = adams_weights(times[step + 1 - len(past): step + 1], times[step], times[step + 1]).to(x.dtype)
        return torch.stack([w * p for w, p in zip(weights, past, strict=True)]).sum(0)


def adams_weights(nodes: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Weights (k,) of velocities at `nodes`: means over [start, end] of their Lagrange polynomials. float64."""
    import torch

    nodes, start, end = nodes.double(), start.double(), end.double()
    # In s = (t - start)/(end - start) the mean of s^j is 1/(j+1), so that Vᵀ·w = (1, 1/2, …, 1/k) with V the
    # Vandermonde matrix of the nodes: the weights integrate every polynomial of degree below k exactly.
    s = (nodes - start) / (end - start)
    powers = torch.arange(len(nodes), dtype=torch.float64)
    return torch.linalg.solve(s[None] ** powers[:, None], 1 / (powers + 1))
