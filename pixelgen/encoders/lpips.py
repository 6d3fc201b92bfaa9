"""LPIPS (arXiv 1801.03924), loaded from files without network.

The trunk is torchvision's VGG-16 or AlexNet; the linear layers ship inside the `lpips` package.
"""

import contextlib
import io
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixelgen.tensors import read_safetensors, run_bare

TINY = 1e-10


def load_lpips(directory: str | Path, grid: int = 0) -> "Lpips":
    """The frozen metric of `directory`: `config.json` names the trunk (`vgg` or `alex`), `trunk.safetensors` holds
    torchvision's `features.N.*`, every one of which must be there and fit (`classifier.*` is not used)."""
    import lpips

    directory = Path(directory)
    net = json.loads((directory / "config.json").read_text())["net"]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # torchvision's old-argument warnings
        warnings.simplefilter("ignore")
        metric = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    layers = {name.split(".", 1)[1]: name for name in metric.net.state_dict()}  # "N.weight" -> "sliceK.N.weight"
    trunk = {k.removeprefix("features."): v for k, v in read_safetensors(directory / "trunk.safetensors").items()
             if k.startswith("features.")}
    metric.net.load_state_dict({layers.get(k, k): v for k, v in trunk.items()})
    return Lpips(metric)


class Lpips(nn.Module):
    """Distance of two batches of images (B, 3, H, W) in [-1, 1] -> (B,). The second batch takes no gradient.

    Equal to `lpips.LPIPS` in value and gradient; the second batch's features are computed without a graph.
    """

    def __init__(self, metric: nn.Module):
        super().__init__()
        self.metric = metric.eval().requires_grad_(False)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        with torch.no_grad():
            compared = self.features(targets)
        distance = images.new_zeros(len(images))
        for a, b, linear in zip(self.features(images), compared, self.metric.lins, strict=True):  # type: ignore
            distance = distance + linear((a - b).square()).mean(dim=(1, 2, 3))
        return distance

    def compiled(self) -> None:
        """Have it compiled when it is first run, for any number of images."""
        self.to(memory_format=torch.channels_last).compile()  # type: ignore[call-overload]

    def example(self, image: Tensor) -> tuple[tuple[Any, ...], int]:
        """Inputs of a forward pass over an image (1, 3, H, W), and how many passes it counts for."""
        return (image, image), 2

    def kept(self, image: Tensor, blocks: Sequence[int]) -> float:
        """Bytes for the backward pass of an image: what the trunk's convolutions give, in bf16, and, in float32, what
        of it is compared, before and after it is brought to unit length."""
        trunk, compared = 0, 0

        def seen(module: nn.Conv2d, _: object, out: Tensor) -> None:
            nonlocal trunk, compared
            if module.out_channels == 1:  # one of the layers that weigh the squared differences of all channels
                compared += out.numel() * module.in_channels
            else:
                trunk += out.numel()

        hooks = [module.register_forward_hook(seen) for module in self.modules() if isinstance(module, nn.Conv2d)]
        run_bare(self, image, image)
        for hook in hooks:
            hook.remove()
        return 2 * trunk / 2 + 4 * 2 * compared  # the trunk has also seen the targets, which take no gradient

    def features(self, images: Tensor) -> list[Tensor]:
        """What each of the trunk's layers says of images (B, 3, H, W), as (B, C, h, w) with channels of unit length."""
        layers = self.metric.net(self.metric.scaling_layer(images))  # type: ignore[operator]
        return [unit(f.float()) for f in layers]


def unit(x: Tensor) -> Tensor:
    """Scale channels to unit length; a zero vector stays zero, with a finite gradient (which ReLU then masks)."""
    return x / (x.square().sum(1, keepdim=True).clamp_min(TINY**2).sqrt() + TINY)
