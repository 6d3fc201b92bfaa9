"""In which floating-point numbers networks compute."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


def preferred(device: str | torch.device) -> str:
    """The precision to draw in where nobody asks for another: bf16 on a GPU, which has units for it, else fp32."""
    return "bf16" if torch.device(device).type == "cuda" else "fp32"


def store_in_bf16(network: nn.Module) -> nn.Module:
    """Keep the weights in bfloat16 that autocast would cast at each use. For a network that is not trained: under
    autocast it gives the same bits, with half of the memory and without the casts."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.bfloat16)
    return network


@contextlib.contextmanager
def ieee_fp32() -> Iterator[None]:
    """Have float32 products on a GPU computed in float32 inside the block. By default convolutions use TF32, which
    keeps 10 bits of each factor's fraction; a judge's figures would depend on the kind of GPU."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision
