"""The terms of the objective: each a function of tensors that returns one value per sample, and how they combine."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pixelgen.path import velocity


def flow_matching(prediction: Tensor, x: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """L_FM = (v̂ - v)², the velocities of predicted and true clean image; images (B, 3, H, W) -> (B,)."""
    return (velocity(prediction, x_t, t) - velocity(x, x_t, t)).square().flatten(1).mean(1)


def feature_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 - cos, averaged over tokens: the form of both REPA and P-DINO. Tokens (B, N, C) -> (B,) in [0, 2]."""
    return 1 - F.cosine_similarity(a.float(), b.float(), dim=-1).mean(-1)


def balance_weight(reconstruction: Tensor, perceptual: Tensor, weight: Tensor) -> Tensor:
    """clip(‖∇L_rec‖ / (‖∇L_perc‖ + 1e-4), 0, 100), gradients of two scalar losses at `weight`; a scalar."""
    def norm(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, weight, retain_graph=True)[0].norm()

    return (norm(reconstruction) / (norm(perceptual) + 1e-4)).clamp(0, 100).detach()
