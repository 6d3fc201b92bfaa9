"""A folder of images, each with text files of the same name beside it, at any depth: a/1.jpg, a/1.txt.

The columns of captions are endings of text files. An image is whatever has the ending of one. Of two images for one
text all but the first in order of name are refused, as is a text without an image; other files are passed over.
"""

import os
from collections.abc import Iterator
from dataclasses import replace

from pipeline.datasets import DatasetError, Item, Sample
from pipeline.datasets.captions import LARGEST_TEXT, clean_captions
from pipeline.datasets.decoding import IMAGE_ENDINGS, decode, rejecting
from pipeline.datasets.files import files_below, make_item, open_item, split_of
from pipeline.params import DatasetParams, SourceParams


def listing(data: DatasetParams, source: SourceParams) -> tuple[None, list[Item]]:
    assert source.path is not None and source.captions is not None
    images: dict[str, list[os.DirEntry]] = {}  # by path without ending
    texts: dict[str, dict[str, os.DirEntry]] = {}
    try:
        for entry in files_below(source.path):
            stem, ending = os.path.splitext(entry.path)
            if ending[1:].lower() in IMAGE_ENDINGS:
                images.setdefault(stem, []).append(entry)
            elif column := max((c for c in source.captions if entry.name.endswith(f".{c}")), key=len, default=None):
                texts.setdefault(entry.path.removesuffix(f".{column}"), {})[column] = entry
    except OSError as error:
        raise DatasetError(f"{error.filename}: {error.strerror}; path must be a readable folder of images and their "
                           "texts") from error
    columns = ", ".join(f".{column}" for column in source.captions)
    if not images.keys() & texts.keys():
        raise DatasetError(f"{source.path} has no image with a text beside it ({columns}): correct path or captions")
    return None, list(items(source.path, images, texts, list(source.captions), data.heldout))


def items(root: str, images: dict[str, list[os.DirEntry]], texts: dict[str, dict[str, os.DirEntry]],
          columns: list[str], heldout: float | None) -> Iterator[Item]:
    """An item for each image, and for each image that is missing."""
    def item(entry: os.DirEntry) -> Item:
        return make_item(entry, root, None, split_of(os.path.relpath(entry.path, root), heldout))

    for stem in sorted(images.keys() | texts.keys()):
        found = texts.get(stem, {})
        beside = tuple(item(found[column]) if column in found else None for column in columns)
        if stem not in images:
            first = next(text for text in beside if text)
            yield replace(first, refused="no image")
        for number, entry in enumerate(images.get(stem, [])):
            yield replace(item(entry), texts=beside, refused="duplicate key" if number else None)


def load(data: DatasetParams, source: SourceParams, item: Item) -> Sample:
    assert source.path is not None
    with rejecting():
        raw: list[bytes | None] = []
        for text in item.texts:
            if text is None:
                raw.append(None)
            else:
                with open_item(source.path, text) as file:
                    raw.append(file.read(LARGEST_TEXT + 1))
        captions, cut = clean_captions(raw)
        with open_item(source.path, item) as file:
            return Sample(decode(file, data), item.split, None, captions, cut)
