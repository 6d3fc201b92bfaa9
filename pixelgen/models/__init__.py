"""Networks: of the denoisers (`pixelgen.denoisers` has what they are built from), and their parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pixelgen.models.layers import Masks

if TYPE_CHECKING:
    from pixelgen.denoisers import Architecture


class DenoiserNetwork(nn.Module):
    """The base of denoisers' networks: a noisy image, its time and a condition -> the predicted clean image.

    `blocks` are those over the image. The buffer `pos_embed`, a table, is all that depends on the image's size.
    """

    config: Architecture
    blocks: nn.ModuleList

    @property
    def output_weight(self) -> Tensor:
        """The last linear layer's weight, at which the loss terms' gradients are balanced."""
        raise NotImplementedError

    def draw_dropout(self, count: int) -> Sequence[Masks]:
        """Masks of every block for `count` samples, from the default generator; empty without dropout."""
        return []

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, feature_block: int | None = None,
                dropout: Sequence[Masks] = ()) -> tuple[Tensor, Tensor | None]:
        """Noisy images (B, 3, H, W), times (B,), conditions (B, ...) -> clean images (B, 3, H, W) and features.

        The features are the image tokens (B, N, D) that enter block `feature_block`, or None. `dropout`: what
        `draw_dropout` gave; empty: no dropout.
        """
        raise NotImplementedError
