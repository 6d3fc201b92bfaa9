"""A folder of images, each with text files of the same name beside it, at any depth: a/1.jpg, a/1.txt.

The columns of captions are endings of text files. An image is whatever has the ending of one. Of two images for one
text all but the first in order of name are refused, as is a text without an image; other files are passed over.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pipeline.datasets import DatasetError, DatasetParams, FolderSource, Item, Sample
from pipeline.datasets.captions import LARGEST_TEXT, clean_captions
from pipeline.datasets.decoding import IMAGE_ENDINGS, decode, rejecting
from pipeline.datasets.files import files_below, listing, make_item, open_item
from pipeline.datasets.listed import ListedSource


@dataclass(frozen=True)
class TextFolder(FolderSource, ListedSource):
    """Images with text files beside them."""

    path: str  # folder of the images and their texts
    captions: dict[str, float]  # {ending of text files: share, …}: how often, relatively, each is drawn in training

    def listing(self, data: DatasetParams) -> tuple[None, list[Item]]:
        images: dict[str, list[os.DirEntry]] = {}  # by path without ending
        texts: dict[str, dict[str, os.DirEntry]] = {}
        with listing("path must be a readable folder of images and their texts"):
            for entry in files_below(self.path):
                stem, ending = os.path.splitext(entry.path)
                if ending[1:].lower() in IMAGE_ENDINGS:
                    images.setdefault(stem, []).append(entry)
                elif column := max((c for c in self.captions if entry.name.endswith(f".{c}")), key=len, default=None):
                    texts.setdefault(entry.path.removesuffix(f".{column}"), {})[column] = entry
        columns = ", ".join(f".{column}" for column in self.captions)
        if not images.keys() & texts.keys():
            raise DatasetError(f"{self.path} has no image with a text beside it ({columns}): correct path or captions")
        return None, list(self.items(images, texts, data.heldout))

    def items(self, images: dict[str, list[os.DirEntry]], texts: dict[str, dict[str, os.DirEntry]], heldout: float
              ) -> Iterator[Item]:
        """An item for each image, and for each image that is missing."""
        def item(entry: os.DirEntry) -> Item:
            return make_item(entry, self.path, heldout)

        for stem in sorted(images.keys() | texts.keys()):
            found = texts.get(stem, {})
            beside = tuple(item(found[column]) if column in found else None for column in self.captions)
            if stem not in images:
                yield replace(next(text for text in beside if text), refused="no image")
            for number, entry in enumerate(images.get(stem, [])):
                yield replace(item(entry), texts=beside, refused="duplicate key" if number else None)

    def load(self, data: DatasetParams, item: Item) -> Sample:
        with rejecting():
            captions, cut = clean_captions([self.text(text) if text else None for text in item.texts])
            with open_item(self.path, item) as file:
                return Sample(decode(file, data), item.split, None, captions, cut)

    def text(self, item: Item) -> bytes:
        with open_item(self.path, item) as file:
            return file.read(LARGEST_TEXT + 1)
