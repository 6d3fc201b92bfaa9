"""Exponential moving average of the denoiser's weights, the weights that are sampled from."""

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def ema_copy(model: M) -> M:
    """An averaged model that starts as a copy of `model`, in fp32, in eval mode and without gradients."""
    return copy.deepcopy(model).float().eval().requires_grad_(False)


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay·average + (1 - decay)·model, parameter by parameter, on the device of the average."""
    averages: list[Tensor] = list(average.parameters())
    weights = [p.to(a.device) for a, p in zip(averages, model.parameters(), strict=True)]
    torch._foreach_lerp_(averages, weights, 1 - decay)
