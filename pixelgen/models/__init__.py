"""The denoisers and their named sizes. Importing this does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pixelgen.config import DenoiserConfig, TextDenoiserConfig, choose, require

if TYPE_CHECKING:
    from pixelgen.models.jit import JiT
    from pixelgen.models.jit_t2i import JiTText

SIZES: dict[str, dict] = {
    "L/16": dict(patch_size=16, width=1024, depth=24, heads=16, bottleneck=128, in_context_start=8,
                 in_context_len=32, mlp_ratio=4.0),
    "XL/16": dict(patch_size=16, width=1152, depth=28, heads=16, bottleneck=None, in_context_start=8,
                  in_context_len=32, mlp_ratio=4.0),
    "demo/16": dict(patch_size=16, width=192, depth=6, heads=6, bottleneck=64, in_context_start=2,
                    in_context_len=4, mlp_ratio=4.0),
}
TEXT_SIZES: dict[str, dict] = {
    "XXL/16": dict(patch_size=16, width=1536, depth=16, text_depth=4, heads=24, bottleneck=256, text_width=2048,
                   text_length=128, mlp_ratio=4.0),
    "demo-text/16": dict(patch_size=16, width=128, depth=4, text_depth=1, heads=4, bottleneck=64, text_width=64,
                         text_length=12, mlp_ratio=4.0),
}
KINDS: dict[str, type] = {"jit": DenoiserConfig, "jit_t2i": TextDenoiserConfig}  # as named in exported models


def denoiser_config(size: str, image_size: int, num_classes: int, dropout: float) -> DenoiserConfig:
    """The architecture of a named size at an image size. ConfigError for an unknown name or an impossible fit."""
    choose(size, list(SIZES), "denoiser size")
    return DenoiserConfig(image_size=image_size, num_classes=num_classes, dropout=dropout, **SIZES[size])


def text_denoiser_config(size: str, image_size: int) -> TextDenoiserConfig:
    """The text-conditional architecture of a named size at an image size."""
    choose(size, list(TEXT_SIZES), "denoiser size")
    return TextDenoiserConfig(image_size=image_size, **TEXT_SIZES[size])


def hidden_width(config: DenoiserConfig | TextDenoiserConfig) -> int:
    """Hidden width of the blocks' SwiGLU. That of classes has two thirds of an MLP's, since it has a third matrix; that
    of text has all of it. ConfigError if not one unit is left."""
    whole = config.mlp_ratio * config.width
    width = int(whole * 2 / 3 if isinstance(config, DenoiserConfig) else whole)
    require(width >= 1, f"mlp_ratio {config.mlp_ratio} leaves a width of {config.width} no hidden unit")
    return width


def build_denoiser(config: DenoiserConfig | TextDenoiserConfig) -> JiT | JiTText:
    """A freshly initialised denoiser of this architecture."""
    if isinstance(config, TextDenoiserConfig):
        from pixelgen.models.jit_t2i import JiTText

        return JiTText(config)
    from pixelgen.models.jit import JiT

    return JiT(config)
