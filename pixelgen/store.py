"""Where bytes lie: what every store can do, and the store that is a directory.

A name is a relative path. A reader sees the whole of what was written under a name, or nothing.
"""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from pixelgen.errors import StorageError, UserError
from pixelgen.files import atomic, read_range

REMOTE_SECONDS = 10.0  # between looks at a store that is far away
DISK_REMEDIES = {
    errno.ENOSPC: "make room on this disk",
    errno.EDQUOT: "make room within your quota on this disk",
    errno.EROFS: "make this file system writable",
    errno.EACCES: "let this user read and write there",
    errno.EIO: "the disk fails: look at the kernel's log",
}


class Store(Protocol):
    """A directory, or something that stands for one."""

    remote: ClassVar[bool]  # not on a disk of this machine: what is there has to be fetched, and each look at it costs

    def uri(self, name: str = "") -> str:
        """Where that is for others: an absolute path, or an s3://… of an object."""

    def write(self, name: str, source: bytes | Path) -> None:
        """Store bytes, or the content of a file, under a name."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes of a name, from `start` to `stop` (None: the end). FileNotFoundError if there is none."""

    def fetch(self, name: str, target: Path) -> None:
        """Write the bytes of a name to a local file. FileNotFoundError if there is none."""

    def size(self, name: str) -> int | None:
        """Bytes under a name; None if there is none."""

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Size in bytes of every name that begins with `prefix`."""

    def delete(self, name: str) -> None:
        """Remove a name; no error if there is none."""


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file as `atomic` does. StorageError if the disk refuses."""
    with on_disk(path), atomic(path) as file:
        file.write(data)


@contextlib.contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """What the disk refuses to whoever writes to `path`, as a StorageError that names it and the remedy."""
    try:
        yield
    except UserError:  # whoever raised it knows the place better
        raise
    except Exception as error:
        code = refusal(error)
        if code is None:
            raise
        raise StorageError(f"{getattr(error, 'filename', None) or path}: {os.strerror(code)}: {DISK_REMEDIES[code]}, "
                           "then run it again: finished work is kept") from error


def refusal(error: BaseException) -> int | None:
    """The error number with which a disk has refused; None if that is not what went wrong. torch's writer raises an
    error of its own after the system's, safetensors has the number in its text."""
    told = re.search(r"\(os error (\d+)\)", str(error))
    system = error if isinstance(error, OSError) else error.__context__
    code = int(told[1]) if told else system.errno if isinstance(system, OSError) else None
    return code if code in DISK_REMEDIES else None


@dataclass(frozen=True)
class LocalStore:
    """A directory; names with a dot in front are unfinished."""

    remote: ClassVar[bool] = False
    directory: Path

    def uri(self, name: str = "") -> str:
        return str((self.directory / name).absolute())

    def write(self, name: str, source: bytes | Path) -> None:
        path = self.directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, source if isinstance(source, bytes) else source.read_bytes())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        return read_range(self.directory / name, start, stop)

    def fetch(self, name: str, target: Path) -> None:
        write_atomic(target, self.read(name))

    def size(self, name: str) -> int | None:
        path = self.directory / name
        return path.stat().st_size if path.is_file() else None

    def sizes(self, prefix: str = "") -> dict[str, int]:
        files = [p for p in self.directory.rglob("*") if p.is_file() and not p.name.startswith(".")]
        named = {p.relative_to(self.directory).as_posix(): p.stat().st_size for p in files}
        return {name: size for name, size in sorted(named.items()) if name.startswith(prefix)}

    def delete(self, name: str) -> None:
        (self.directory / name).unlink(missing_ok=True)
