"""Archives of arrays that are read and written a few rows at a time."""

import io

import numpy as np
import pytest

from pixelgen.errors import FileError
from pixelgen.npz import Rows, Stream, read_npz, write_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (150, 4, 5, 3), np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_any_rows_of_a_file(tmp_path, save):
    save(tmp_path / "x.npz", other=np.arange(9.0), rows=IMAGES)
    found = read_npz(tmp_path / "x.npz", ("rows",), lazy=("rows",))["rows"]
    assert isinstance(found, Rows) and found.shape == IMAGES.shape and len(found) == 150
    assert np.array_equal(found, IMAGES)
    for start, stop, count in ((0, None, 64), (3, 149, 10), (149, 150, 7), (64, 64, 5)):
        chunks = [*found.chunks(count, start, stop)]
        assert np.array_equal(np.concatenate([IMAGES[:0], *chunks]), IMAGES[start:stop])
        assert all(len(chunk) <= count for chunk in chunks)


def test_streams_and_rows_are_written_as_the_arrays_that_they_are(tmp_path):
    write_npz(tmp_path / "whole.npz", {"a": np.eye(3), "rows": IMAGES})
    pieces = Stream(IMAGES.shape, IMAGES.dtype, iter(np.split(IMAGES, [1, 1, 90])))
    write_npz(tmp_path / "stream.npz", {"a": np.eye(3), "rows": pieces})
    rows = read_npz(tmp_path / "whole.npz", ("rows",), lazy=("rows",))["rows"]
    write_npz(tmp_path / "rows.npz", {"a": np.eye(3), "rows": rows})
    contents = {(tmp_path / f"{name}.npz").read_bytes() for name in ("whole", "stream", "rows")}
    assert len(contents) == 1
    assert np.array_equal(np.load(tmp_path / "rows.npz")["rows"], IMAGES)


@pytest.mark.parametrize(("rows", "says"), [
    ([IMAGES[:149]], "149 rows came for an array"), ([IMAGES, IMAGES[:1]], "151 rows came"),
    ([IMAGES[:, :3]], "are none of an array"), ([IMAGES.astype(float)], "are none of an array")])
def test_rows_that_do_not_make_up_the_array_are_refused(rows, says):
    with pytest.raises(ValueError, match=says):
        write_npz(io.BytesIO(), {"rows": Stream(IMAGES.shape, IMAGES.dtype, rows)})


def test_rows_that_do_not_lie_one_after_the_other_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", rows=np.asfortranarray(IMAGES))
    with pytest.raises(FileError, match=r"x\.npz: rows is .* in Fortran order, .* save np.ascontiguousarray of it"):
        read_npz(tmp_path / "x.npz", ("rows",), lazy=("rows",))
    assert np.array_equal(read_npz(tmp_path / "x.npz", ("rows",))["rows"], IMAGES), "whole, it can be read"
    np.savez(tmp_path / "x.npz", rows=np.array(3))
    with pytest.raises(FileError, match="no rows one after the other"):
        read_npz(tmp_path / "x.npz", ("rows",), lazy=("rows",))


def test_damage_shows_when_the_last_row_is_read(tmp_path):
    np.savez(tmp_path / "x.npz", rows=IMAGES)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    found = read_npz(tmp_path / "x.npz", ("rows",), lazy=("rows",))["rows"]
    with pytest.raises(FileError, match=r"x\.npz: Bad CRC-32"):
        np.asarray(found)
