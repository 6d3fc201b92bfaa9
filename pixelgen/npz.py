"""Archives of arrays (npz): read without trust in what they claim, written without a clock, large ones a few rows at a
time."""

import math
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from pixelgen.errors import FileError

Array = np.ndarray
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
LARGE, EXPANSION = 2**28, 50  # an array of more bytes than LARGE may be at most EXPANSION times as large as its file
CHUNK = 64  # rows copied at a time


@dataclass(frozen=True, eq=False)
class Rows:
    """An array (N, …) in an archive. Rows are read when they are asked for, so that it may be larger than memory."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.concatenate([*self.chunks(CHUNK)]).astype(dtype or self.dtype, copy=False)

    def chunks(self, count: int, start: int = 0, stop: int | None = None) -> Iterator[Array]:
        """The rows from `start` to `stop` (None: the end), at most `count` at a time. FileError if they cannot be
        read; damage inside the array shows only when its last row is read."""
        stop, size = len(self) if stop is None else stop, math.prod(self.shape[1:]) * self.dtype.itemsize
        with _opened(self.path) as archive, archive.open(f"{self.name}.npy") as entry:
            _read_header(entry, self.name)
            entry.seek(start * size, os.SEEK_CUR)
            for first in range(start, stop, count):
                here = min(count, stop - first)
                yield np.frombuffer(entry.read(here * size), self.dtype).reshape(here, *self.shape[1:])


@dataclass(frozen=True, eq=False)
class Stream:
    """An array of known shape whose rows come from somewhere in turn, to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    rows: Iterable[Array]


def read_npz(path: str | Path, required: Sequence[str], optional: Sequence[str] = (), lazy: Sequence[str] = ()
             ) -> dict[str, Any]:
    """The arrays of an archive by name; those in `lazy` as Rows. FileError names what is wrong with it, which may be
    anything if it is damaged."""
    arrays: dict[str, Any] = {}
    with _opened(path) as archive:
        held = [name.removesuffix(".npy") for name in archive.namelist()]
        if missing := [name for name in required if name not in held]:
            raise ValueError(f"lacks {', '.join(missing)}; it holds {', '.join(held) or 'nothing'}")
        for name in {*required, *optional}.intersection(held):
            member = archive.getinfo(f"{name}.npy")
            if member.file_size > max(LARGE, EXPANSION * os.path.getsize(path)):
                raise ValueError(f"{name} claims {member.file_size:,} bytes, more than {EXPANSION} times the "
                                 "whole file: an archive bomb")
            with archive.open(member) as entry:
                shape, dtype = _check_header(entry, name, member.file_size, rows=name in lazy)
            if name in lazy and not dtype.hasobject:  # read_array refuses objects
                arrays[name] = Rows(Path(path), name, shape, dtype)
                continue
            with archive.open(member) as entry:
                arrays[name] = np.lib.format.read_array(entry, allow_pickle=False)
    return arrays


def write_npz(path: str | Path | IO[bytes], arrays: Mapping[str, Array | Rows | Stream]) -> None:
    """Write an archive as numpy does. Equal arrays give equal bytes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            entry = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            with archive.open(entry, "w", force_zip64=True) as file:
                if isinstance(array, np.ndarray):
                    np.lib.format.write_array(file, np.asarray(array, order="C"), allow_pickle=False)
                else:
                    _write_rows(file, array)


def _write_rows(file: IO[bytes], array: Rows | Stream) -> None:
    described = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    np.lib.format.write_array_header_1_0(file, described)
    written = 0
    for rows in array.rows if isinstance(array, Stream) else array.chunks(CHUNK):
        if rows.shape[1:] != array.shape[1:] or rows.dtype != array.dtype:
            raise ValueError(f"rows {rows.shape} {rows.dtype} are none of an array {array.shape} {array.dtype}")
        file.write(np.ascontiguousarray(rows).data)
        written += len(rows)
    if written != array.shape[0]:
        raise ValueError(f"{written} rows came for an array {array.shape}")


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Whatever is found wrong with a file, as a FileError that names it."""
    try:
        yield
    except Exception as error:
        raise FileError(f"{path}: {error}") from error


@contextmanager
def _opened(path: str | Path) -> Iterator[zipfile.ZipFile]:
    with open(path, "rb") as file, naming(path), zipfile.ZipFile(file) as archive:
        yield archive


def _read_header(entry: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(entry)
    if version not in HEADERS:
        raise ValueError(f"{name} is in version {version} of numpy's format; expected 1.0 or 2.0")
    return HEADERS[version](entry)


def _check_header(entry: IO[bytes], name: str, size: int, rows: bool) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of the array in an npy file. ValueError unless the `size` bytes of the file are as many as its
    header says, since that is how much memory is taken; or, if its `rows` are to be read, unless these lie one after
    the other."""
    shape, fortran, dtype = _read_header(entry, name)
    as_said = all(type(side) is int and side >= 0 for side in shape) and (
        dtype.hasobject or entry.tell() + math.prod(shape) * dtype.itemsize == size)  # objects are refused later
    if not as_said:
        raise ValueError(f"{name} claims to be {shape} {dtype}, which is not what {size:,} bytes hold")
    if rows and (fortran or not shape):
        raise ValueError(f"{name} is {shape} {dtype}{' in Fortran order' * fortran}, which has no rows one after the "
                         "other: save np.ascontiguousarray of it")
    return shape, dtype
