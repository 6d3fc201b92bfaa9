"""A folder with one sub-folder of images per class, as ImageNet is unpacked.

Classes are the sub-folders in order of name, but for those whose names begin with a dot. Everything in a class
folder that is not a folder is an item, at any depth: what is no image is rejected with its reason, and nothing is
passed over in silence.
"""

from dataclasses import dataclass
from pathlib import Path

from pipeline.datasets import DatasetError, DatasetParams, FolderSource, Item, Sample
from pipeline.datasets.decoding import decode, rejecting
from pipeline.datasets.files import files_below, listing, make_item, open_item
from pipeline.datasets.listed import ListedSource


@dataclass(frozen=True)
class ImageFolder(FolderSource, ListedSource):
    """A folder for each class."""

    path: str  # folder with one sub-folder of images per class
    captions = None

    def listing(self, data: DatasetParams) -> tuple[list[str], list[Item]]:
        with listing("the dataset's path must be a readable folder with one sub-folder of images per class"):
            folders = sorted(f for f in Path(self.path).iterdir() if f.is_dir() and not f.name.startswith("."))
            refuse([f for f in folders if f.is_symlink()], "classes must not be links: move or copy the folders here")
            items = [make_item(entry, self.path, data.heldout, label)
                     for label, folder in enumerate(folders) for entry in files_below(folder)]
        if not folders:
            raise DatasetError(f"{self.path} has no sub-folders: put the images of each class into one of their own")
        trained = {item.label for item in items if item.split == "train"}
        refuse([f for label, f in enumerate(folders) if label not in trained],
               f"empty, or all held out at heldout {data.heldout}: add images, lower heldout or remove the folder")
        return [f.name for f in folders], items

    def load(self, data: DatasetParams, item: Item) -> Sample:
        with rejecting(), open_item(self.path, item) as file:
            return Sample(decode(file, data), item.split, item.label)


def refuse(folders: list[Path], problem: str) -> None:
    if folders:
        more = f" and {len(folders) - 3} more" if len(folders) > 3 else ""
        raise DatasetError(f"{', '.join(map(str, folders[:3]))}{more}: {problem}")
