"""Shards: Parquet files of the columns `SCHEMA`, images as PNG or JPEG bytes, read a row group at a time.

A shard's description (in its dataset's manifest) cuts the file into pieces, one a row group and the footer last, and
has the sha256 of each: no byte is used before it has been checked, and no more bytes are read than rows need.
"""

import hashlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
from PIL import Image

from pixelgen.errors import UserError
from pixelgen.files import read_range

# label is null in captioned data, captions in labelled; captions have one entry, or null, per column of the source
SCHEMA = pa.schema([("key", pa.string()), ("image", pa.binary()), ("label", pa.int32()),
                    ("captions", pa.list_(pa.string()))])
GROUP = 64  # rows of a row group: the least that is read

Piece = tuple[int, int, str]  # of a shard's file: rows (the footer has none), where its bytes end, their sha256
PIECE = re.compile("([0-9]{1,18}):([0-9]{1,18}):([0-9a-f]{64})")


class ShardError(UserError):
    """A shard is not there, or not what its dataset's manifest describes. The message names it and the remedy."""


class File(Protocol):
    """Where the bytes of a shard lie; as a string, its name for messages."""

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from `start` to `stop` (None: the end). FileNotFoundError if there is no such file."""


@dataclass(frozen=True)
class LocalFile:
    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        return read_range(self.path, start, stop)


@dataclass(frozen=True)
class Shard:
    """A file, and what its manifest says of it."""

    file: File
    rows: int
    sha256: str  # of the whole file
    described: str = ""  # the text form of `pieces`; empty for a shard from before row groups, which is read whole

    @property
    def pieces(self) -> list[Piece]:
        return [(int(rows), int(end), digest) for rows, end, digest in PIECE.findall(self.described)]


@dataclass(frozen=True)
class Split:
    """One split of a sharded dataset, or of one of its sources."""

    shards: tuple[Shard, ...]
    remedy: str = "copy the dataset here again"  # for a shard that is damaged or missing

    @property
    def total(self) -> int:
        return sum(self.rows)

    @property
    def rows(self) -> tuple[int, ...]:
        return tuple(shard.rows for shard in self.shards)

    def starts(self, shard: int) -> np.ndarray:
        """The first row of each row group of a shard."""
        return np.cumsum([0, *(rows for rows, _, _ in self.shards[shard].pieces[:-2])])

    def footer(self, shard: int) -> Any:
        """The Parquet metadata of a shard, by which its row groups are read; None if it has a single piece."""
        pieces = self.shards[shard].pieces
        if not pieces:
            return None
        return pq.read_metadata(pa.BufferReader(self._piece(shard, len(pieces) - 1)))

    def read_group(self, shard: int, group: int, footer: Any) -> pa.Table:
        """A row group of a shard, by the shard's `footer`. ShardError if it is not what the manifest describes."""
        if footer is None:
            return self.read(shard)
        pieces = self.shards[shard].pieces
        start = pieces[group - 1][1] if group else 0
        file = pq.ParquetFile(_Piece(self._piece(shard, group), start, pieces[-1][1]), metadata=footer)
        return file.read_row_group(group, use_threads=False)

    def read(self, shard: int, columns: Sequence[str] = SCHEMA.names) -> pa.Table:
        """Columns of a whole shard. ShardError if it is not what the manifest describes."""
        data = self._checked(shard, 0, None, self.shards[shard].sha256, "")
        # pq.read_table would import pandas, a second for each process
        return pq.ParquetFile(io.BytesIO(data)).read(columns=list(columns))

    def _piece(self, shard: int, number: int) -> bytes:
        pieces = self.shards[shard].pieces
        _, stop, digest = pieces[number]
        name = "the footer" if number == len(pieces) - 1 else f"row group {number}"
        return self._checked(shard, pieces[number - 1][1] if number else 0, stop, digest, f"{name} of ")

    def _checked(self, shard: int, start: int, stop: int | None, digest: str, name: str) -> bytes:
        file = self.shards[shard].file
        try:
            data = file.read(start, stop)
        except FileNotFoundError:
            raise ShardError(f"{file} is in the manifest but not there: {self.remedy}") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise ShardError(f"{name}{file} is not what the manifest describes (sha256 differs): {self.remedy}")
        return data


def open_split(manifest: Mapping[str, Any], locate: Callable[[Mapping[str, Any]], File], name: str,
               source: str | None = None, size: int | None = None, remedy: str = Split.remedy) -> Split:
    """The split `name` of the dataset that a manifest describes: of all its sources or of one, and of images of all
    stored sizes or of those with at least `size` pixels on a side. `locate` finds the file of an entry of the manifest.
    KeyError if there is no such split, ShardError if the manifest contradicts itself."""
    chosen = manifest["sources"] if source is None else {source: manifest["sources"][source]}
    shards = [s for of in chosen.values() for s in of["splits"][name]["shards"] if size is None or s["size"] >= size]
    files = {f["path"]: f for f in manifest["files"]}
    if strangers := {s["path"] for s in shards} - files.keys():
        raise ShardError(f"the manifest has no checksum of {', '.join(sorted(strangers))}: {remedy}")
    return Split(tuple(_shard(locate, files[s["path"]], s, remedy) for s in shards), remedy)


def _shard(locate: Callable[[Mapping[str, Any]], File], file: Mapping[str, Any], described: Mapping[str, Any],
           remedy: str) -> Shard:
    shard = Shard(locate(file), described["rows"], file["sha256"], described.get("pieces", ""))
    pieces = shard.pieces
    ends = [0, *(end for _, end, _ in pieces)]
    if shard.described and (
            len(pieces) != len(shard.described.split(" ")) or ends != sorted({*ends}) or ends[-1] != file["size"] or
            pieces[-1][0] != 0 or sum(rows for rows, _, _ in pieces) != shard.rows):
        raise ShardError(f"the manifest's pieces of {file['path']} do not make up the file: {remedy}")
    return shard


class _Piece(io.RawIOBase):
    """Stands for a whole file but holds the bytes of one piece: enough for a Parquet reader that has the footer."""

    def __init__(self, data: bytes, start: int, size: int):
        self.data, self.start, self.size, self.place = data, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def read(self, size: int = -1) -> bytes:
        first = self.place - self.start
        data = self.data[first:first + size]
        assert first >= 0 and len(data) == size, f"{size} bytes at {self.place} are not in this piece"
        self.place += size
        return data


def encode_shard(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """The file of a shard of these rows, columns of `SCHEMA` by name."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), sink, row_group_size=GROUP, compression="none",
                   use_dictionary=False, write_statistics=False)
    return bytes(sink.getvalue().to_pybytes())


def describe_pieces(data: bytes) -> str:
    """A shard's row groups and footer, from the bytes of its file: rows:end:sha256 of each piece. A dataset of millions
    has hundreds of thousands of them, so they are a text and no list."""
    footer = pq.read_metadata(pa.BufferReader(data))
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    starts = [min(group.column(i).data_page_offset for i in range(group.num_columns)) for group in groups]
    ends = [*starts[1:], len(data) - 8 - footer.serialized_size, len(data)]
    begins = [0, *ends[:-1]]
    return " ".join(f"{rows}:{end}:{hashlib.sha256(data[begin:end]).hexdigest()}" for rows, begin, end in
                    zip([*(group.num_rows for group in groups), 0], begins, ends, strict=True))


def decode(encoded: bytes) -> np.ndarray:
    """PNG or JPEG bytes of a shard -> (H, W, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))


def first_captions(split: Split, count: int) -> list[str]:
    """The first caption of each of the first images of a split, at most `count` and a row group's, to draw while
    training."""
    rows = split.read_group(0, 0, split.footer(0))["captions"].slice(0, count).to_pylist()
    return [next(caption for caption in row if caption is not None) for row in rows]


def read_images(split: Split, start: int = 0, stop: int | None = None, count: int | None = None
                ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images (n, H, W, 3) uint8 and labels (n,) of the rows from `start` to `stop` (None: the end) of labelled data, at
    most `count` at a time and a shard's."""
    stop, first = split.total if stop is None else min(stop, split.total), 0
    for shard, rows in enumerate(split.rows):
        low, high = max(start - first, 0), min(stop - first, rows)
        first += rows
        if low >= high:
            continue
        table = split.read(shard, ["image", "label"])
        for at in range(low, high, count or rows):
            here = table.slice(at, min(count or rows, high - at))
            yield np.stack([decode(b) for b in here["image"].to_pylist()]), here["label"].to_numpy()
