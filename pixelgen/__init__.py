"""PixelGen: pixel-space image diffusion trained with perceptual losses (arXiv 2602.02493).

`from pixelgen import PixelGen` gives the trained model as images; everything else is imported from its module.
Importing this package loads nothing heavy: configuration can be checked before torch is.
"""

__version__ = "0.1.0"  # pyproject.toml reads it here: a checkout runs where it is not installed
__all__ = ["PixelGen", "__version__"]


def __getattr__(name: str) -> object:
    if name == "PixelGen":
        from pixelgen.generate import PixelGen

        return PixelGen
    raise AttributeError(f"module 'pixelgen' has no attribute {name!r}")
