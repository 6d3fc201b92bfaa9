"""Networks of published files: downloaded, or copied from a folder, and checked against their hashes."""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.checkout import data_path
from pipeline.download import download, stated_hash
from pipeline.networks import Network
from pixelgen.errors import StorageError
from pixelgen.manifest import sha256


@dataclass(frozen=True)
class File:
    """A published file."""

    url: str
    sha256: str | None = None  # as much as its publisher states in its name; None: the Hub states it in a header

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


def hub(repository: str, commit: str, *names: str) -> list[File]:
    return [File(f"https://huggingface.co/{repository}/resolve/{commit}/{name}") for name in names]


@dataclass(frozen=True)
class Published(Network):
    """A network of published files."""

    files: ClassVar[Sequence[File]]

    directory: str | None = None  # folder in which its files lie; null: download them

    def make(self, folder: Path) -> dict[str, Any]:
        sources = {item.url: self.obtain(item, folder / item.name) for item in self.files}
        self.prepare(folder)
        return {"sources": sources}

    def prepare(self, folder: Path) -> None:
        """Do what is still to be done with the files, and load them once, so that what is wrong shows now."""
        raise NotImplementedError

    def obtain(self, item: File, target: Path) -> str:
        """Copy or download a file to `target` and return its sha256. StorageError if it is not the published one."""
        expected, option = item.sha256, f"networks.{self.role}.{self.kind}.directory"
        if self.directory is None:
            remedy = f"fetch {item.name} on another machine, put it into a folder and set {option} to that"
            expected = expected or stated_hash(item.url, remedy)
            download(item.url, target, remedy)
        else:
            source = data_path(self.directory) / item.name
            if not source.is_file():
                raise StorageError(f"{source} is missing: put the file from {item.url} there, or set {option} to null "
                                   "to download it")
            shutil.copyfile(source, target)
        found = git_blob(target) if expected is not None and len(expected) == 40 else sha256(target)
        if expected is not None and not found.startswith(expected):
            target.unlink()
            raise StorageError(f"{item.name} has hash {found}, but {expected}… was published: it is damaged or another "
                               f"file; get it anew from {item.url}")
        return sha256(target)


def git_blob(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
