"""Captions as they are found -> plain text to train on."""

import unicodedata
from collections.abc import Sequence

from pipeline.datasets import Rejected

LONGEST_CAPTION = 4000  # characters; text encoders read far less
LARGEST_TEXT = 10**6  # bytes; more is no caption. Readers need not read more than one byte beyond it
JOINERS = "\u200c\u200d"  # invisible, but they make letters of some scripts, and emoji


def clean_captions(raw: Sequence[bytes | None]) -> tuple[list[str | None], int]:
    """The captions of one image, None for one that is empty, and how many were cut. Rejected if none is left."""
    cleaned = [(None, False) if text is None else clean_caption(text) for text in raw]
    captions = [text for text, _ in cleaned]
    if not any(captions):
        raise Rejected("no caption")
    return captions, sum(cut for _, cut in cleaned)


def clean_caption(raw: bytes) -> tuple[str | None, bool]:
    """UTF-8 -> words with one space between them, and whether it was too long and cut; None if nothing is left.

    Every kind of white space, line separators too, counts as space; control and format characters, which cannot be
    seen, are removed. Rejected if it is not UTF-8, or too large to be a caption.
    """
    if len(raw) > LARGEST_TEXT:
        raise Rejected(f"caption of more than {LARGEST_TEXT:,} bytes")
    try:
        decoded = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Rejected("caption is not UTF-8") from None
    seen = (c for c in decoded if c.isspace() or c in JOINERS or unicodedata.category(c) not in ("Cc", "Cf"))
    text = " ".join("".join(seen).split())
    if not text.strip(JOINERS):
        return None, False
    if len(text) <= LONGEST_CAPTION:
        return text, False
    return text[:LONGEST_CAPTION + 1].rpartition(" ")[0] or text[:LONGEST_CAPTION], True
