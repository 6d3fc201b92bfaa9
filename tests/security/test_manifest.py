"""A manifest from elsewhere: whatever it says, a StorageError or files inside its directory."""

import json

import pytest

from pipeline.storage import Storage, fresh_directory
from pixelgen.errors import StorageError
from pixelgen.manifest import MANIFEST, read_manifest


@pytest.fixture
def finished(tmp_path):
    directory = fresh_directory(tmp_path / "out")
    (directory / "a.bin").write_bytes(b"0123456789")
    Storage(None).publish(directory, "dataset", {})
    return directory


def change(directory, **entry):
    """Another entry for the files of the manifest, otherwise as it would be for a.bin."""
    manifest = json.loads((directory / MANIFEST).read_text())
    manifest["files"].append({**manifest["files"][0], **entry})
    (directory / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("path", [
    "../a.bin", "/etc/passwd", "deep/../../a.bin", "..", "//host/a", "a/..", "./../a",
    "", ".", "..\\a.bin", "C:\\a.bin", "a\0b", "a//b", "./a.bin", "a/"])
def test_a_path_that_is_no_plain_relative_one_is_refused(finished, path):
    change(finished, path=path)
    with pytest.raises(StorageError, match="outside its directory"):
        read_manifest(finished, "dataset")


@pytest.mark.parametrize("entry", [
    {"path": 3}, {"path": None}, {"path": ["a"]}, {"size": "10"}, {"size": -1}, {"size": None}, {"sha256": 5},
    {"sha256": "x"}])
def test_an_entry_of_other_types_is_refused(finished, entry):
    change(finished, **entry)
    with pytest.raises(StorageError, match=r"manifest\.json"):
        read_manifest(finished, "dataset")


@pytest.mark.parametrize("files", [None, 3, "abc", {"path": "a"}, [3], ["a.bin"], [None], [[]], [{}], [{"size": 1}]])
def test_files_that_are_no_list_of_entries_are_refused(finished, files):
    (finished / MANIFEST).write_text(json.dumps({"kind": "dataset", "root": None, "files": files}))
    with pytest.raises(StorageError, match=r"manifest\.json"):
        read_manifest(finished, "dataset")


def test_a_file_that_is_listed_twice_is_refused(finished):
    change(finished)
    with pytest.raises(StorageError, match=r"a\.bin"):
        read_manifest(finished, "dataset")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"kind": "dataset", "files": [], "rows": ' + "9" * 5000 + "}"])
def test_json_that_python_cannot_hold_is_refused(finished, text):
    (finished / MANIFEST).write_text(text)
    with pytest.raises(StorageError, match=r"manifest\.json is damaged"):
        read_manifest(finished, "dataset")
