"""DINOv2 patch features, the target of REPA and the space of P-DINO, loaded from files without network."""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixelgen.errors import CheckpointError
from pixelgen.speed import compile_blocks
from pixelgen.tensors import read_safetensors

PATCH = 14
ARGUMENTS = {"embed_dim", "depth", "num_heads"}  # timm takes others, such as a file to unpickle
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def load_dino(directory: str | Path, grid: int) -> "Dino":
    """The frozen network in `directory` for a grid of `grid`×`grid` patches.

    `config.json` names the timm architecture and its arguments, `model.safetensors` holds timm's state dict; it must
    fit exactly. The position embedding is interpolated to the grid once, here.
    """
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    network = build_dino(config, grid, str(directory / "config.json"))
    state = read_safetensors(directory / "model.safetensors")
    state["pos_embed"] = interpolate_positions(state["pos_embed"], grid)
    network.load_state_dict(state)
    return Dino(network, grid)


def build_dino(config: Mapping[str, Any], grid: int, source: str = "DINO") -> nn.Module:
    """The network that a `config.json` describes, with fresh weights. CheckpointError, which names the `source`, if it
    describes anything but an architecture of timm."""
    import timm  # slow to import; only training needs it

    if not timm.is_model(config["architecture"]) or not config["arguments"].keys() <= ARGUMENTS:
        raise CheckpointError(f"{source}: expected an architecture that is part of timm, with no other arguments than "
                              f"{', '.join(sorted(ARGUMENTS))}, not {config}")
    return timm.create_model(config["architecture"], pretrained=False, num_classes=0, img_size=grid * PATCH,
                             **config["arguments"])


def interpolate_positions(table: Tensor, grid: int) -> Tensor:
    """(1, 1 + M², C) -> (1, 1 + grid², C) as DINOv2's own code does it: bicubic without antialiasing, by the scale
    factor (grid + 0.1)/M instead of the target size; the class token's row is kept."""
    side = int((table.shape[1] - 1) ** 0.5)
    if side == grid:
        return table
    patches = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = (grid + 0.1) / side
    patches = F.interpolate(patches, scale_factor=(scale, scale), mode="bicubic")
    assert patches.shape[-1] == grid, "the scale factor rounds to the grid"
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


class Dino(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] -> normalised patch tokens (B, grid², width) of the blocks asked for.

    An image is resized so that it has exactly `grid` patches on a side: with a denoiser patch of 16 px, 256 px
    become 224, and every DINO token lies over one denoiser token. No parameter takes a gradient; images may.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, grid: int):
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.grid, self.width, self.depth = grid, int(network.embed_dim), len(network.blocks)  # type: ignore
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, blocks: Sequence[int]) -> dict[int, Tensor]:
        x = resize_bicubic(((images + 1) / 2 - self.mean) / self.std, self.grid * PATCH)
        chosen = sorted(set(blocks))
        tokens = self.network.forward_intermediates(  # type: ignore[operator]
            x, indices=chosen, norm=True, output_fmt="NLC", intermediates_only=True)
        return dict(zip(chosen, tokens, strict=True))

    def compiled(self) -> None:
        """Have it compiled when it is first run, for any number of images."""
        compile_blocks(self.network, dynamic=None)

    def example(self, image: Tensor) -> tuple[tuple[Any, ...], int]:
        """Inputs of a forward pass over an image (1, 3, H, W), and how many passes it counts for."""
        return (image, [self.depth - 1]), 1

    def kept(self, image: Tensor, blocks: Sequence[int]) -> float:
        """Bytes for the backward pass of an image, in bf16, where these blocks are asked for: the stream twice in
        float32; queries, keys, values, what attention gives, and GELU's four times as wide input."""
        return (self.grid**2 + 1) * self.width * (2 * 4 + 2 * (3 + 1 + 4)) * (max(blocks) + 1)


def resize_bicubic(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) -> (B, C, size, size), bicubic without antialiasing.

    On a GPU as matrix products: they round otherwise, but their gradient needs no atomic additions, and so is fast and
    always the same.
    """
    return resize_by_matrices(x, size) if x.is_cuda else F.interpolate(x, size=(size, size), mode="bicubic")


def resize_by_matrices(x: Tensor, size: int) -> Tensor:
    """The same as two matrix products, in float32."""
    with torch.autocast(x.device.type, enabled=False):
        rows, columns = (resizing(side, size, x.device) for side in x.shape[-2:])
        return rows @ x.float() @ columns.T


@functools.lru_cache(maxsize=8)
def resizing(source: int, target: int, device: torch.device) -> Tensor:
    """The matrix (target, source) that resizes a column of pixels."""
    return F.interpolate(torch.eye(source)[None, None], size=(target, source), mode="bicubic")[0, 0].to(device)
