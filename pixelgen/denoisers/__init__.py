"""Denoisers: their options in files, their architectures and named sizes. Importing this does not import torch.

A denoiser is a module here, a network in `pixelgen.models`, and an entry of `Denoiser.kinds`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Self

from pixelgen.config import CaptionConfig, ConfigError, Variant, choose, require
from pixelgen.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from pixelgen.conditioning import Conditioning
    from pixelgen.models import DenoiserNetwork


@dataclass(frozen=True)
class Architecture:
    """What a denoiser's network is built from; exported models hold it in full."""

    mark: ClassVar[str]  # a weight that no other architecture has

    image_size: int  # pixels on a side
    patch_size: int  # pixels on a side for which there is one token
    width: int  # of the tokens
    depth: int  # blocks over the image

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "width", "depth"):
            require(getattr(self, name) >= 1, f"{name} {getattr(self, name)} must be at least 1")
        require(self.image_size % self.patch_size == 0,
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")

    @property
    def grid(self) -> int:
        """Patches on a side."""
        return self.image_size // self.patch_size

    def build(self) -> DenoiserNetwork:
        """A freshly initialised network."""
        raise NotImplementedError

    @classmethod
    def infer(cls, shapes: Shapes, in_context_start: int | None) -> Self:
        """The architecture whose weights have these shapes. `in_context_start`: of a JiT, if its size has no name."""
        raise NotImplementedError

    def load_conditioning(self, text_encoder: str | Path | None, device: str | torch.device, precision: str,
                          told: str) -> Conditioning:
        """What turns labels or prompts into what the network is given. `told`: what messages call the model."""
        raise NotImplementedError

    @property
    def least_weights(self) -> int:
        """A number that the network has no fewer weights than."""
        return self.width * self.depth

    def kept(self, recomputed: int) -> float:
        """Bytes for the backward pass, an image's, in bf16; the first `recomputed` blocks are computed again in it."""
        raise NotImplementedError


class TakesLabels:
    """Of an architecture with `num_classes`."""

    num_classes: int

    def load_conditioning(self, text_encoder: str | Path | None, device: str | torch.device, precision: str,
                          told: str) -> Conditioning:
        from pixelgen.conditioning import Labels

        return Labels(self.num_classes, device)


class TakesPrompts:
    """Of an architecture with the size of the text encoder's features."""

    text_width: int
    text_length: int  # tokens

    def load_conditioning(self, text_encoder: str | Path | None, device: str | torch.device, precision: str,
                          told: str) -> Conditioning:
        from pixelgen.conditioning import Prompts
        from pixelgen.encoders.text import load_text_encoder

        if text_encoder is None:
            raise ConfigError(f"{told} draws prompts: name the folder of its text encoder in text_encoder")
        encoder = load_text_encoder(text_encoder, self.text_length, device, precision)
        require(encoder.width == self.text_width, f"{text_encoder} gives features of width {encoder.width}, {told} "
                f"takes {self.text_width}: it is another text encoder")
        return Prompts(encoder)


class Transformer(Architecture):
    """Blocks of attention, with 2-D rotary positions, and SwiGLU."""

    swiglu: ClassVar = Fraction(1)  # hidden width of a block's SwiGLU, in an MLP's

    heads: int
    mlp_ratio: float  # hidden width of an MLP, in widths

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.heads >= 1, f"heads {self.heads} must be at least 1")
        require(0 < self.mlp_ratio <= 100 and self.hidden_width >= 1,
                f"mlp_ratio {self.mlp_ratio} must lie in (0, 100] and leave a width of {self.width} a hidden unit")
        require(self.width % self.heads == 0 and self.width // self.heads % 4 == 0,
                f"width {self.width} over {self.heads} heads: the head size must be a multiple of 4 (2-D rotary)")

    @property
    def hidden_width(self) -> int:
        """Of the blocks' SwiGLU."""
        return int(self.mlp_ratio * self.width * self.swiglu.numerator / self.swiglu.denominator)

    def with_hidden(self, hidden: int) -> Self:
        """The same with the mlp_ratio that gives this hidden width: of many, as widths are rounded down, the one with
        the smallest denominator, as 4, 3 or 2.5. ConfigError if `hidden` is 0."""
        least = Fraction(hidden, self.width) / self.swiglu
        ratios = (math.ceil(least * q) / q for q in itertools.count(1))
        found = (dataclasses.replace(self, mlp_ratio=ratio) for ratio in ratios)  # type: ignore[call-arg]
        return next(other for other in found if other.hidden_width == hidden)

    @property
    def least_weights(self) -> int:
        """Of blocks, positions, and tables of other sizes."""
        sizes = [size for size in vars(self).values() if isinstance(size, int)]
        inside = (self.width + self.hidden_width) * self.depth
        return self.width * (self.grid**2 + inside + sum(sizes) - self.image_size)

    @property
    def tokens(self) -> list[int]:
        """Of an image, in each block."""
        return [self.grid**2] * self.depth

    def kept(self, recomputed: int) -> float:
        """Blocks that are computed again keep what enters them; one of these at a time keeps as much as the others."""
        blocks = [tokens * self.kept_by_token for tokens in self.tokens]
        again, keeping = blocks[:recomputed], blocks[recomputed:]
        entering = 4 * self.width / self.kept_by_token
        return sum(keeping) + sum(size * entering for size in again) + max(again, default=0)

    @property
    def kept_by_token(self) -> float:
        """Bytes of a block: the stream twice, in float32; in bf16 two norms, queries, keys and values before and after
        norm and rotation, what attention and the two projections give, and three times the hidden width."""
        return self.width * (2 * 4 + 2 * (2 + 3 + 2 + 3)) + self.hidden_width * 2 * 3


class Denoiser(Variant):
    """A denoiser as files name it: a size that is known by its name, and what is free. The base of dataclasses."""

    kinds: ClassVar = {
        "jit": "pixelgen.denoisers.jit:JiTOptions",
        "jit_t2i": "pixelgen.denoisers.jit_t2i:JiTTextOptions",
    }
    architecture: ClassVar[type[Architecture]]
    sizes: ClassVar[dict[str, dict]]  # fields of the architecture, by the size's name
    networks: ClassVar[tuple[str, ...]] = ()  # frozen ones, of its conditioning

    size: str
    image_size: int  # pixels on a side
    num_classes: int | None  # None: it takes prompts
    captions: CaptionConfig | None  # None: it takes labels

    @property
    def takes(self) -> str:
        """labels or prompts."""
        return "labels" if self.captions is None else "prompts"

    def __post_init__(self) -> None:
        choose(self.size, [*self.sizes], "size")
        self.resolve()

    def resolve(self) -> Architecture:
        """Of the size, with what is free. ConfigError for an impossible fit."""
        names = {field.name for field in dataclasses.fields(self.architecture)}
        free = {name: value for name, value in vars(self).items() if name in names}
        return self.architecture(**self.sizes[self.size], **free)


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of weights by name."""

    def __missing__(self, name: str) -> tuple[int, ...]:
        raise CheckpointError(f"not a denoiser: {name} is missing")

    def count(self, prefix: str) -> int:
        """How many modules a list of them has."""
        return len({name.split(".")[1] for name in self if name.startswith(f"{prefix}.")})


def kind_of(architecture: Architecture) -> str:
    """The kind of denoiser that has an architecture."""
    return next(kind for kind in Denoiser.kinds if Denoiser.of(kind).architecture is type(architecture))
