"""How the captions of an image become the prompt that it is trained with this time."""

from collections.abc import Sequence

import numpy as np

from pixelgen.config import CaptionConfig

PREFIXES = ("A photo of ", "A picture of ", "An image of ", "A photograph of ", "A photo showing ",
            "A picture showing ", "An image showing ")


def prompt(captions: Sequence[str | None], shares: Sequence[float], config: CaptionConfig, dice: np.ndarray) -> str:
    """One of the captions by share, and before a short one, with a probability, one of `PREFIXES`. `dice`: three
    uniform draws."""
    held = [(c, s) for c, s in zip(captions, shares, strict=True) if c is not None]
    sums = np.cumsum([s for _, s in held]) + np.finfo(float).tiny  # all shares 0: the first caption
    caption = held[int(np.searchsorted(sums, dice[0] * sums[-1], side="right"))][0]
    if len(caption.split()) <= config.short_words and dice[1] < config.prefix_probability:
        return PREFIXES[int(dice[2] * len(PREFIXES))] + caption
    return caption
