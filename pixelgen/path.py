"""The probability path between noise and image, and the conversions of x-prediction.

t runs from 0 (noise) to 1 (image): x_t = t·x + (1-t)·n (arXiv 2602.02493, section 3). Shapes: images (B, 3, H, W)
in [-1, 1], times (B,).
"""

import torch
from torch import Tensor

FLOOR = 0.05  # of 1-t wherever a velocity divides by it; without it the velocity target is unbounded near t = 1


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """View times (B,) so that they broadcast over `like` (B, ...)."""
    return t.view(-1, *([1] * (like.ndim - 1)))


def interpolate(x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = t·x + (1-t)·n, the noisy image at time t."""
    t = per_sample(t, x)
    return t * x + (1 - t) * noise


def velocity(x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """dx_t/dt on the straight line from x_t to the clean image `x` (true or predicted): (x - x_t) / max(1-t, 0.05)."""
    return (x - x_t) / (1 - per_sample(t, x)).clamp_min(FLOOR)


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t / (t + (1-t)·shift): shift > 1 moves times towards the noise; 0 and 1 stay where they are."""
    return t / (t + (1 - t) * shift)


def draw_time(normal: Tensor, mean: float, std: float, shift: float) -> Tensor:
    """Training times (B,) in (0, 1) from standard normal draws: sigmoid(mean + std·z), shifted."""
    return shift_time(torch.sigmoid(mean + std * normal), shift)
