"""Parts of unfinished work that are arrays, in the store of a run, each sealed with its sha256."""

import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from pipeline.storage import read_sealed, write_sealed
from pixelgen.npz import write_npz
from pixelgen.store import Store


def write_array(store: Store, name: str, array: np.ndarray) -> None:
    data = io.BytesIO()
    np.save(data, array)
    write_sealed(store, name, data.getvalue())


def write_arrays(store: Store, name: str, arrays: Mapping[str, np.ndarray]) -> None:
    data = io.BytesIO()
    write_npz(data, arrays)
    write_sealed(store, name, data.getvalue())


def read_part(store: Store, name: str) -> Any:
    """The array, or the arrays by name. A damaged part is deleted, so that only it is made again: StorageError."""
    return np.load(io.BytesIO(read_sealed(store, name)), allow_pickle=False)
