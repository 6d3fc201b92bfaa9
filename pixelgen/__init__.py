"""PixelGen: pixel-space image diffusion trained with perceptual losses (arXiv 2602.02493).

`from pixelgen import PixelGen` gives the trained model as images; everything else is imported from its module.
Importing this package loads nothing heavy: configuration can be checked before torch is.
"""

from importlib.metadata import version

__version__ = version("pixelgen")
__all__ = ["PixelGen", "__version__"]


def __getattr__(name: str) -> object:
    if name == "PixelGen":
        from pixelgen.generate import PixelGen

        return PixelGen
    raise AttributeError(f"module 'pixelgen' has no attribute {name!r}")
