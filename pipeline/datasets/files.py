"""Files of a source: what lies below a folder, in a fixed order, and opening just what was listed.

Links to files are followed inside the folder; links to folders, and out of it, are not. Whether something is held
out depends on its path alone.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pipeline.datasets import DatasetError, Item, Rejected, Task


@contextlib.contextmanager
def listing(needed: str) -> Iterator[None]:
    """DatasetError, which says what is needed, where a folder cannot be listed."""
    try:
        yield
    except OSError as error:
        raise DatasetError(f"{error.filename}: {error.strerror}; {needed}") from error


def files_below(folder: str | Path) -> Iterator[os.DirEntry]:
    """Everything below `folder` but folders, in order of name."""
    waiting = entries_of(folder)
    while waiting:
        entry = waiting.pop()
        if entry.is_dir(follow_symlinks=False):
            waiting += entries_of(entry.path)
        else:
            yield entry


def entries_of(folder: str | Path) -> list[os.DirEntry]:
    """In reverse order of name."""
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name, reverse=True)


def make_item(entry: os.DirEntry, root: str, heldout: float, label: int | None = None) -> Item:
    """An image or text below `root`, of which a share is held out by their paths."""
    try:
        stat = entry.stat()
        stamp = stat.st_size, stat.st_mtime_ns
    except OSError:  # a broken link, or gone already: `open_item` will say so
        stamp = 0, 0
    key = os.path.relpath(entry.path, root)
    return Item(key, label, split_of(key, heldout), *stamp)


def containers(root: str, ending: str) -> list[Task]:
    """A unit of work for each file of this ending below `root`. DatasetError if there is none."""
    with listing(f"path must be a readable folder of {ending} files"):
        found = [make_item(entry, root, 0) for entry in files_below(root) if entry.name.endswith(ending)]
    if not found:
        raise DatasetError(f"{root} has no {ending} files at any depth: correct path or put them there")
    return [Task([item], 0, shuffle=True) for item in found]


def split_of(key: str, heldout: float) -> str:
    """train or heldout, by the key alone: the same however many others there are, and stable as the share grows."""
    draw = int.from_bytes(hashlib.sha256(os.fsencode(key)).digest()[:8]) / 2**64  # uniform in [0, 1)
    return "heldout" if draw < heldout else "train"


@contextlib.contextmanager
def open_item(root: str, item: Item) -> Iterator[BinaryIO]:
    """The file of an item, to read. Rejected if it lies outside the folder, is gone, or is not what was listed."""
    item.key.encode()  # fails if the file name is not UTF-8
    folder = Path(root).resolve()
    path = (folder / item.key).resolve()
    if not path.is_relative_to(folder):
        raise Rejected("a link that leaves the folder")
    if not path.is_file():
        raise Rejected("no file: a broken link, a link to a folder, a device, or gone by now")
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        if (stat.st_size, stat.st_mtime_ns) != (item.size, item.mtime_ns):
            raise Rejected("changed after it was listed")
        yield file
