"""Manifests: what a finished directory says, and how a damaged one is refused."""

import json
import os
import shutil
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from pipeline import storage
from pipeline.storage import Storage, fresh_directory
from pixelgen.errors import StorageError
from pixelgen.manifest import MANIFEST, check_file, read_manifest


@dataclass(frozen=True)
class Config:
    path: str | None
    size: int


@pytest.fixture
def finished(tmp_path):
    directory = fresh_directory(tmp_path / "out")
    (directory / "deep").mkdir()
    (directory / "deep" / MANIFEST).write_text("a file like any other")
    (directory / "a.bin").write_bytes(b"0123456789")
    Storage(None).publish(directory, "dataset", Config(None, 3), classes=["ä", "b"], rows=7)
    return directory


def test_a_manifest_holds_files_facts_and_config(finished):
    manifest = read_manifest(finished, "dataset")
    assert manifest["classes"] == ["ä", "b"] and manifest["rows"] == 7
    assert manifest["config"] == {"path": None, "size": 3}
    assert [(f["path"], f["size"]) for f in manifest["files"]] == [("a.bin", 10), ("deep/manifest.json", 21)]
    assert manifest["files"][0]["sha256"] == "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882"
    assert {"torch", "python", "pillow"} <= manifest["versions"].keys()
    assert [check_file(finished, f).name for f in manifest["files"]] == ["a.bin", "manifest.json"]


def test_equal_work_gives_an_equal_manifest(finished):
    before = (finished / MANIFEST).read_bytes()
    os.utime(finished / "a.bin", (0, 0))
    Storage(None).publish(finished, "dataset", Config(None, 3), classes=["ä", "b"], rows=7)
    assert (finished / MANIFEST).read_bytes() == before


def test_a_flipped_byte_a_shorter_and_a_missing_file_are_noticed(finished):
    entry = read_manifest(finished, "dataset")["files"][0]
    for content in (b"0123456780", b"012345678"):
        (finished / "a.bin").write_bytes(content)
        with pytest.raises(StorageError, match=r"a\.bin is not the file .*dvc repro"):
            check_file(finished, entry)
    (finished / "a.bin").unlink()
    with pytest.raises(StorageError, match=r"a\.bin is in the manifest but not there.*dvc repro"):
        check_file(finished, entry)


def test_a_directory_without_a_manifest_is_unfinished(tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StorageError, match="missing or unfinished .*dvc repro"):
            read_manifest(directory, "dataset")


@pytest.mark.parametrize("content", [b"", b"{", b'{"kind": "dataset", "files": [', b"\xff\xfe", b"\0" * 100])
def test_damaged_json_is_refused(finished, content):
    (finished / MANIFEST).write_bytes(content)
    with pytest.raises(StorageError, match=r"manifest\.json is damaged .*delete"):
        read_manifest(finished, "dataset")


@pytest.mark.parametrize("content", ["[]", "null", "3", '{"kind": "model", "files": []}', '{"kind": "dataset"}'])
def test_a_manifest_of_another_kind_is_refused(finished, content):
    (finished / MANIFEST).write_text(content)
    with pytest.raises(StorageError, match="does not describe a dataset"):
        read_manifest(finished, "dataset")


@pytest.mark.parametrize("path", ["../a.bin", "/etc/passwd", "deep/../../a.bin", ".."])
def test_a_manifest_cannot_point_out_of_its_directory(finished, path):
    manifest = json.loads((finished / MANIFEST).read_text())
    manifest["files"].append({"path": path, "size": 1, "sha256": "0" * 64})
    (finished / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match="names a file outside"):
        read_manifest(finished, "dataset")


def test_too_little_room_is_noticed_before_any_work(monkeypatch):
    Storage(None).check()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0.4e9))
    with pytest.raises(StorageError, match=r"0\.40 GB are free on this disk.*make room for 0\.5 GB"):
        Storage(None).check()


def test_a_fresh_directory_is_empty(finished):
    assert list(fresh_directory(finished).iterdir()) == []
    assert fresh_directory(finished / "x" / "y").is_dir()


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    storage.write_json(tmp_path / "a.json", [1])

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="a.json: No space left on device: make room on this disk"):
        storage.write_json(tmp_path / "a.json", [2])
    assert json.loads((tmp_path / "a.json").read_text()) == [1]
