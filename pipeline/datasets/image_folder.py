"""A folder with one sub-folder of images per class, as ImageNet is unpacked.

Classes are the sub-folders in order of name, but for those whose names begin with a dot. Everything in a class
folder that is not a folder is an item, at any depth: what is no image is rejected with its reason, and nothing is
passed over in silence.
"""

import os
from pathlib import Path

from pipeline.datasets import DatasetError, Item, Sample
from pipeline.datasets.decoding import decode, rejecting
from pipeline.datasets.files import files_below, make_item, open_item, split_of
from pipeline.params import DatasetParams, SourceParams


def listing(data: DatasetParams, source: SourceParams) -> tuple[list[str], list[Item]]:
    assert source.path is not None
    try:
        folders = sorted(f for f in Path(source.path).iterdir() if f.is_dir() and not f.name.startswith("."))
        refuse([f for f in folders if f.is_symlink()], "classes must not be links: move or copy the folders here")
        items = [make_item(entry, source.path, label, split_of(os.path.relpath(entry.path, source.path), data.heldout))
                 for label, folder in enumerate(folders) for entry in files_below(folder)]
    except OSError as error:
        raise DatasetError(f"{error.filename}: {error.strerror}; the dataset's path must be a readable folder "
                           "with one sub-folder of images per class") from error
    if not folders:
        raise DatasetError(f"{source.path} has no sub-folders: put the images of each class into one of their own")
    trained = {item.label for item in items if item.split == "train"}
    refuse([f for label, f in enumerate(folders) if label not in trained],
           f"empty, or all held out at heldout {data.heldout}: add images, lower heldout or remove the folder")
    return [f.name for f in folders], items


def refuse(folders: list[Path], problem: str) -> None:
    if folders:
        more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
        raise DatasetError(f"{', '.join(map(str, folders[:3]))}{more}: {problem}")


def load(data: DatasetParams, source: SourceParams, item: Item) -> Sample:
    assert source.path is not None
    with rejecting(), open_item(source.path, item) as file:
        return Sample(decode(file, data), item.split, item.label)
