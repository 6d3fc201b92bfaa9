"""Files that are written whole or not at all, and files that are read in parts."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO


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
