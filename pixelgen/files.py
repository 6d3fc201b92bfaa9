"""Files that are written whole or not at all, that are read in parts, and that are held by one process."""

import contextlib
import fcntl
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which becomes `path` at the end: a reader sees the old file or the whole new one, and the new
    one survives a power cut. After an error, nothing of it is left."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")  # no other writer has the same
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)  # on a full disk it would take the room that is left
        raise


def read_range(path: Path, start: int = 0, stop: int | None = None) -> bytes:
    """The bytes of a file from `start` to `stop` (None: its end)."""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(-1 if stop is None else stop - start)


def try_lock(file: IO[Any]) -> bool:
    """Take the lock of an open file, if no other process holds it -> whether it is taken."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
