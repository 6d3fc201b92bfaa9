"""JiT_T2I: the text-conditional denoiser (network: `pixelgen.models.jit_t2i`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from pixelgen.config import CaptionConfig
from pixelgen.denoisers import Denoiser, Shapes, TakesPrompts, Transformer

if TYPE_CHECKING:
    from pixelgen.models import DenoiserNetwork

SIZES: dict[str, dict] = {
    "XXL/16": dict(patch_size=16, width=1536, depth=16, text_depth=4, heads=24, bottleneck=256, text_width=2048,
                   text_length=128, mlp_ratio=4.0),
    "demo-text/16": dict(patch_size=16, width=128, depth=4, text_depth=1, heads=4, bottleneck=64, text_width=64,
                         text_length=12, mlp_ratio=4.0),
}


@dataclass(frozen=True)
class JiTTextConfig(TakesPrompts, Transformer):
    """Architecture of JiT_T2I."""

    mark: ClassVar = "y_pos_embedding"

    text_depth: int  # text blocks
    heads: int
    bottleneck: int  # channels between the two linear layers of the patch embedding
    text_width: int  # of the text encoder's features
    text_length: int  # tokens
    mlp_ratio: float = 4.0  # hidden width of the blocks' SwiGLU, in widths; for its third matrix nothing is taken off

    def build(self) -> DenoiserNetwork:
        from pixelgen.models.jit_t2i import JiTText

        return JiTText(self)

    @classmethod
    def infer(cls, shapes: Shapes, in_context_start: int | None) -> Self:
        bottleneck, pixels = shapes["x_embedder.proj1.weight"]
        width, patch = shapes["blocks.0.norm1.weight"][0], round((pixels / 3) ** 0.5)
        return cls(
            image_size=round(shapes["pos_embed"][1] ** 0.5) * patch, patch_size=patch, width=width,
            depth=shapes.count("blocks"), text_depth=shapes.count("text_refine_blocks"),
            heads=width // shapes["blocks.0.attn.q_norm.weight"][0], bottleneck=bottleneck,
            text_width=shapes["y_embedder.proj.weight"][1], text_length=shapes["y_pos_embedding"][1],
        ).with_hidden(shapes["blocks.0.mlp.w3.weight"][1])

    def kept(self, recomputed: int) -> float:
        """And those of the text in its own blocks, and its keys and values in each of the image's."""
        text = self.text_length * (self.kept_by_token * self.text_depth + self.width * 2 * 3 * self.depth)
        return text + super().kept(recomputed)


@dataclass(frozen=True)
class JiTTextOptions(Denoiser):
    """A JiT_T2I of a named size, for prompts."""

    architecture: ClassVar = JiTTextConfig
    sizes: ClassVar = SIZES
    networks: ClassVar = ("text",)
    num_classes = None

    size: str  # XXL/16 | demo-text/16
    image_size: int  # pixels on a side
    captions: CaptionConfig = CaptionConfig()  # how captions become prompts in training
