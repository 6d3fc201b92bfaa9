"""A folder of Parquet files, at any depth, with a column of encoded images and columns of captions.

Images are bytes, or a struct with `bytes` as Hugging Face's datasets writes them; captions are strings or bytes. A
file is read a few rows at a time, of which Parquet's own unit, a page, has to be in memory: writers often make one of
a thousand images. The key of a row is its number in the file.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from pipeline.datasets import DatasetError, Load, Rejected, Sample, Task, refuse
from pipeline.datasets.captions import clean_captions
from pipeline.datasets.decoding import decode_bytes, rejecting
from pipeline.datasets.files import containers, open_item, split_of
from pipeline.params import DatasetParams, SourceParams

ROWS = 16  # read at a time


def tasks(data: DatasetParams, source: SourceParams) -> tuple[None, list[Task]]:
    """A file is a task. DatasetError if it lacks a column, or if a column is of another type; one that is no Parquet
    file is left to `read`."""
    assert source.path is not None
    found = []
    for task in containers(source.path, ".parquet"):
        try:
            with rejecting(), open_item(source.path, task.items[0]) as file:
                table = open_table(file)
        except Rejected:
            found.append(replace(task, samples=1))
            continue
        if table.metadata.num_rows:
            check_columns(f"{source.path}/{task.items[0].key}", table.schema_arrow, source)
            found.append(replace(task, samples=table.metadata.num_rows))
    if not found:
        raise DatasetError(f"{source.path}: none of its .parquet files has a row: correct path")
    return None, found


def open_table(file: BinaryIO) -> Any:
    """Column chunks are read piece by piece: one may hold gigabytes of images. Rejected if there cannot be so many
    rows in a file of this size."""
    table = pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
    rows = [table.metadata.row_group(n).num_rows for n in range(table.num_row_groups)]
    size = file.seek(0, os.SEEK_END)
    if min(rows, default=0) < 0 or sum(rows) != table.metadata.num_rows or sum(rows) > size:
        raise Rejected(f"claims {table.metadata.num_rows:,} rows in {size:,} bytes")
    return table


def check_columns(path: str, schema: Any, source: SourceParams) -> None:
    assert source.captions is not None and source.image is not None
    for name in (source.image, *source.captions):
        if schema.names.count(name) != 1:
            raise DatasetError(f"{path} has {schema.names.count(name)} columns {name!r}; there are: "
                               f"{', '.join(schema.names)}; correct image and captions")
    kind = schema.field(source.image).type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    if not is_binary(kind):
        raise DatasetError(f"{path}: column {source.image!r} must hold bytes, or a struct with bytes, not {kind}")
    for name in source.captions:
        kind = schema.field(name).type
        if not (is_binary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DatasetError(f"{path}: column {name!r} must hold strings, not {kind}")


def is_binary(kind: Any) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def read(data: DatasetParams, source: SourceParams, task: Task) -> Iterator[tuple[str, Load]]:
    assert source.path is not None
    (listed,) = task.items
    with contextlib.ExitStack() as stack:
        try:
            with rejecting():
                table = open_table(stack.enter_context(open_item(source.path, listed)))
        except Rejected as reason:
            yield listed.key, refuse(f"no Parquet file: {reason}")
            return
        row = 0
        for group in range(table.num_row_groups):
            end, batches = row + table.metadata.row_group(group).num_rows, rows(table, group, source)
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


def rows(table: Any, group: int, source: SourceParams) -> Iterator[tuple[bytes | None, list[bytes | None]]]:
    """The image and the captions of each row of a row group, as bytes: strings may turn out not to be UTF-8."""
    assert source.captions is not None and source.image is not None
    names = list(dict.fromkeys([source.image, *source.captions]))
    for batch in table.iter_batches(ROWS, row_groups=[group], columns=names, use_threads=False):
        images = batch.column(source.image)
        if pa.types.is_struct(images.type):
            images = pc.struct_field(images, "bytes")
        texts = [batch.column(name).cast(pa.large_binary()) for name in source.captions]
        for n, image in enumerate(images):
            yield image.as_py(), [column[n].as_py() for column in texts]


def load(image: bytes | None, texts: list[bytes | None], split: str, data: DatasetParams) -> Sample:
    if image is None:
        raise Rejected("no image")
    captions, cut = clean_captions(texts)
    return Sample(decode_bytes(image, data), split, None, captions, cut)
