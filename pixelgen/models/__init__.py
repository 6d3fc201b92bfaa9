"""The denoisers and their named sizes."""

from pixelgen.config import DenoiserConfig, choose

SIZES: dict[str, dict] = {
    "L/16": dict(patch_size=16, width=1024, depth=24, heads=16, bottleneck=128, in_context_start=8,
                 in_context_len=32),
    "XL/16": dict(patch_size=16, width=1152, depth=28, heads=16, bottleneck=None, in_context_start=8,
                  in_context_len=32),
    "demo/16": dict(patch_size=16, width=192, depth=6, heads=6, bottleneck=64, in_context_start=2,
                    in_context_len=4),
}


def denoiser_config(size: str, image_size: int, num_classes: int, dropout: float) -> DenoiserConfig:
    """The architecture of a named size at an image size. ConfigError for an unknown name or an impossible fit."""
    choose(size, list(SIZES), "denoiser size")
    return DenoiserConfig(image_size=image_size, num_classes=num_classes, dropout=dropout, **SIZES[size])
