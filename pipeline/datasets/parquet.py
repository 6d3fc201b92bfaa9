"""A folder of Parquet files, at any depth, with a column of encoded images and columns of captions.

Images are bytes, or a struct with `bytes` as Hugging Face's datasets writes them; captions are strings or bytes. A
file is read a few rows at a time, of which Parquet's own unit, a page, has to be in memory: writers often make one of
a thousand images. The key of a row is its number in the file.
"""

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, BinaryIO

from pipeline.datasets import DatasetError, DatasetParams, FolderSource, Load, Rejected, Sample, Task, refuse
from pipeline.datasets.captions import clean_captions
from pipeline.datasets.decoding import decode, rejecting
from pipeline.datasets.files import containers, open_item, split_of

ROWS = 16  # read at a time


@dataclass(frozen=True)
class Parquet(FolderSource):
    """Parquet files with columns of images and captions."""

    path: str  # folder of the Parquet files
    captions: dict[str, float]  # {column: share, …}: how often, relatively, each is drawn in training
    image: str  # column of the image

    def tasks(self, data: DatasetParams) -> tuple[None, list[Task]]:
        """A file is a task. DatasetError if it lacks a column of the right type; `read` tells of damaged files."""
        found = []
        for task in containers(self.path, ".parquet"):
            try:
                with rejecting(), open_item(self.path, task.items[0]) as file:
                    table = open_table(file)
            except Rejected:
                found.append(replace(task, samples=1))
                continue
            if table.metadata.num_rows:
                self.check_columns(f"{self.path}/{task.items[0].key}", table.schema_arrow)
                found.append(replace(task, samples=table.metadata.num_rows))
        if not found:
            raise DatasetError(f"{self.path}: none of its .parquet files has a row: correct path")
        return None, found

    def check_columns(self, path: str, schema: Any) -> None:
        from pyarrow import types  # type: ignore[import-untyped]

        for name in (self.image, *self.captions):
            if schema.names.count(name) != 1:
                raise DatasetError(f"{path} has {schema.names.count(name)} columns {name!r}; there are: "
                                   f"{', '.join(schema.names)}; correct image and captions")
        kind = schema.field(self.image).type
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            kind = kind.field("bytes").type
        if not (types.is_binary(kind) or types.is_large_binary(kind)):
            raise DatasetError(f"{path}: column {self.image!r} must hold bytes, or a struct with bytes, not {kind}")
        for name in self.captions:
            kind = schema.field(name).type
            if not any(fits(kind) for fits in (types.is_binary, types.is_large_binary, types.is_string,
                                               types.is_large_string)):
                raise DatasetError(f"{path}: column {name!r} must hold strings, not {kind}")

    def read(self, data: DatasetParams, task: Task) -> Iterator[tuple[str, Load]]:
        (listed,) = task.items
        with contextlib.ExitStack() as stack:
            try:
                with rejecting():
                    table = open_table(stack.enter_context(open_item(self.path, listed)))
            except Rejected as reason:
                yield listed.key, refuse(f"no Parquet file: {reason}")
                return
            row = 0
            for group in range(table.num_row_groups):
                end, batches = row + table.metadata.row_group(group).num_rows, self.rows(table, group)
                while row < end:
                    key = f"{listed.key}/{row}"
                    try:
                        with rejecting():
                            image, texts = next(batches)
                    except Rejected as reason:
                        for lost in range(row, end):
                            yield f"{listed.key}/{lost}", refuse(f"damaged row group: {reason}")
                        row = end
                    else:
                        yield key, partial(load, image, texts, split_of(key, data.heldout), data)
                        row += 1

    def rows(self, table: Any, group: int) -> Iterator[tuple[bytes | None, list[bytes | None]]]:
        """The image and the captions of each row of a row group, as bytes: strings may turn out not to be UTF-8."""
        import pyarrow as pa  # type: ignore[import-untyped]
        import pyarrow.compute as pc  # type: ignore[import-untyped]

        names = list(dict.fromkeys([self.image, *self.captions]))
        for batch in table.iter_batches(ROWS, row_groups=[group], columns=names, use_threads=False):
            images = batch.column(self.image)
            if pa.types.is_struct(images.type):
                images = pc.struct_field(images, "bytes")
            texts = [batch.column(name).cast(pa.large_binary()) for name in self.captions]
            for n, image in enumerate(images):
                yield image.as_py(), [column[n].as_py() for column in texts]


def open_table(file: BinaryIO) -> Any:
    """Column chunks are read piece by piece: one may hold gigabytes of images. Rejected if there cannot be so many
    rows in a file of this size."""
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    table = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
    rows = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
    size = file.seek(0, os.SEEK_END)
    if min(rows, default=0) < 0 or sum(rows) != table.metadata.num_rows or sum(rows) > size:
        raise Rejected(f"claims {table.metadata.num_rows:,} rows in {size:,} bytes")
    return table


def load(image: bytes | None, texts: list[bytes | None], split: str, data: DatasetParams) -> Sample:
    if image is None:
        raise Rejected("no image")
    captions, cut = clean_captions(texts)
    return Sample(decode(io.BytesIO(image), data), split, None, captions, cut)
