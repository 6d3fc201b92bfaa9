"""Exponential moving average of the denoiser's weights, the weights that are sampled from."""

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def ema_copy(model: M) -> M:
    """An averaged model that starts as a copy of `model`, in fp32, in eval mode and without gradients."""
    return copy.deepcopy(model).float().eval().requires_grad_(False)


@torch.no_grad()
def ema_update(average: nn.Module, model: nn.Module, decay: float) -> None:
    """average ← decay·average + (1 - decay)·model, parameter by parameter."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
