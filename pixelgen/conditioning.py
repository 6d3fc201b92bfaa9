"""What a denoiser is conditioned on: from labels or prompts to what its network is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pixelgen.config import ConfigError, require

if TYPE_CHECKING:
    from pixelgen.encoders.text import TextEncoder


class Labels:
    """Class labels (N,) as they are; the null label is the one behind them."""

    network = None

    def __init__(self, num_classes: int, device: str | torch.device = "cpu"):
        self.classes, self.device = num_classes, device

    def null(self, negative: str = "") -> Tensor:
        """The null condition (1, ...), which guidance leads away from, and which dropped conditions become."""
        require(not negative, f"negative {negative!r}: a class-conditional model takes no negative prompt")
        return torch.tensor([self.classes], device=self.device)

    def encode(self, labels_or_prompts: Sequence[Any]) -> Tensor:
        """What the network is given for labels or prompts, (N, ...). ConfigError for what it cannot draw."""
        if strange := [label for label in labels_or_prompts if isinstance(label, str) or not 0 <= label < self.classes]:
            raise ConfigError(f"labels {sorted(set(strange), key=str)} are outside 0 to {self.classes - 1}")
        return torch.tensor(labels_or_prompts).to(self.device, non_blocking=True)  # nothing waits for the device


class Prompts:
    """Text features (N, L, C) of prompts; those of the empty one, or of a negative one, are the null condition."""

    classes = None

    def __init__(self, encoder: TextEncoder):
        self.encoder, self.network = encoder, encoder.network  # the frozen one

    def null(self, negative: str = "") -> Tensor:
        return self.encoder([negative])

    def encode(self, labels_or_prompts: Sequence[Any]) -> Tensor:
        if wrong := [prompt for prompt in labels_or_prompts if not isinstance(prompt, str)]:
            raise ConfigError(f"this model draws prompts, not labels such as {wrong[0]!r}")
        return self.encoder(labels_or_prompts)


Conditioning = Labels | Prompts
