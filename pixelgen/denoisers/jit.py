"""JiT: the class-conditional denoiser (network: `pixelgen.models.jit`)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, ClassVar, Self

from pixelgen.config import require
from pixelgen.denoisers import Denoiser, Shapes, TakesLabels, Transformer
from pixelgen.errors import CheckpointError

if TYPE_CHECKING:
    from pixelgen.models import DenoiserNetwork

SIZES: dict[str, dict] = {
    "L/16": dict(patch_size=16, width=1024, depth=24, heads=16, bottleneck=128, in_context_start=8,
                 in_context_len=32, mlp_ratio=4.0),
    "XL/16": dict(patch_size=16, width=1152, depth=28, heads=16, bottleneck=None, in_context_start=8,
                  in_context_len=32, mlp_ratio=4.0),
    "demo/16": dict(patch_size=16, width=192, depth=6, heads=6, bottleneck=64, in_context_start=2,
                    in_context_len=4, mlp_ratio=4.0),
}


@dataclass(frozen=True)
class JiTConfig(TakesLabels, Transformer):
    """Architecture of JiT."""

    mark: ClassVar = "in_context_posemb"
    swiglu: ClassVar = Fraction(2, 3)  # it has a third matrix

    heads: int
    bottleneck: int | None  # channels between the two patch-embedding convolutions; None: a single convolution
    in_context_start: int  # block from which the in-context class tokens are prepended
    in_context_len: int
    dropout: float  # in the middle half of the blocks
    num_classes: int  # at least as many as the data has
    mlp_ratio: float = 4.0  # hidden width of an MLP, in widths; SwiGLU, with a third matrix, has two thirds of it

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.in_context_start < self.depth,
                f"in_context_start {self.in_context_start} must be a block index below depth {self.depth}")
        require(0 <= self.dropout < 1, f"dropout {self.dropout} must lie in [0, 1)")
        require(self.num_classes >= 1, f"num_classes {self.num_classes} must be at least 1")

    def build(self) -> DenoiserNetwork:
        from pixelgen.models.jit import JiT

        return JiT(self)

    @classmethod
    def infer(cls, shapes: Shapes, in_context_start: int | None) -> Self:
        proj, width = shapes["x_embedder.proj1.weight"], shapes["blocks.0.norm1.weight"][0]
        depth, patch = shapes.count("blocks"), proj[-1]
        if in_context_start is None:
            known = [s for s in SIZES.values() if (s["width"], s["depth"], s["patch_size"]) == (width, depth, patch)]
            if not known:
                raise CheckpointError(f"width {width}, depth {depth}, patch {patch} is no named size, so the block at "
                                      "which the in-context tokens enter is unknown: give in_context_start")
            in_context_start = int(known[0]["in_context_start"])
        return cls(
            image_size=round(shapes["pos_embed"][1] ** 0.5) * patch, patch_size=patch, width=width, depth=depth,
            heads=width // shapes["blocks.0.attn.q_norm.weight"][0],
            bottleneck=proj[0] if "x_embedder.proj2.weight" in shapes else None, in_context_start=in_context_start,
            in_context_len=shapes["in_context_posemb"][1], dropout=0.0,
            num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
        ).with_hidden(shapes["blocks.0.mlp.w3.weight"][1])

    @property
    def tokens(self) -> list[int]:
        return [self.grid**2 + self.in_context_len * (i >= self.in_context_start) for i in range(self.depth)]


@dataclass(frozen=True)
class JiTOptions(Denoiser):
    """A JiT of a named size, for classes."""

    architecture: ClassVar = JiTConfig
    sizes: ClassVar = SIZES
    captions = None

    size: str  # L/16 | XL/16 | demo/16
    image_size: int  # pixels on a side
    num_classes: int  # at least as many as the data has
    dropout: float = 0.0  # in the middle half of the blocks
