"""Manifests: what a finished directory holds, every file with its size and sha256. They are written last: a directory
without one is not finished. Beside it lies its `identity`, a hash, on which the stages depend that read it."""

import contextlib
import fcntl
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pixelgen.errors import StorageError

MANIFEST, IDENTITY = "manifest.json", "identity"

PROVENANCE = ("root", "config", "versions", "hardware", "run")  # of a manifest: where and how it was made

Entry = dict[str, Any]  # of a file: path in its directory, size, sha256


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe(path: Path, name: str) -> Entry:
    return {"path": name, "size": path.stat().st_size, "sha256": sha256(path)}


def intact(path: Path, entry: Mapping[str, Any]) -> bool:
    """Whether a file is there and has the size and sha256 of a manifest's entry."""
    return path.is_file() and path.stat().st_size == entry["size"] and sha256(path) == entry["sha256"]


@contextlib.contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Let one of this machine's processes after the other work on `path`: the first fetches for all."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def identity(manifest: Mapping[str, Any]) -> str:
    """What tells a finished output from others: a hash of its kind, its files and its facts, wherever it was made, and
    under whichever versions."""
    told = {name: value for name, value in manifest.items() if name not in PROVENANCE}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path, kind: str | None) -> dict[str, Any]:
    """The manifest of a finished directory, of any kind if that is None. StorageError if there is none, or not that."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StorageError(f"{directory} is missing or unfinished (no {MANIFEST}): run `dvc repro`") from None
    except (ValueError, RecursionError) as error:
        raise StorageError(f"{path} is damaged ({error}): delete {directory} and run `dvc repro`") from None
    if not isinstance(manifest, dict) or not valid(manifest) or kind not in (None, manifest["kind"]):
        raise StorageError(f"{path} does not describe a {kind or 'finished output'}: delete {directory} and run "
                           "`dvc repro`")
    names = [entry["path"] for entry in manifest["files"]]
    for name in names:
        inside = PurePosixPath(name)
        if inside.as_posix() != name or inside.is_absolute() or {"", ".", ".."} & {name, *inside.parts} or \
                {*name} & {"\\", "\0"}:
            raise StorageError(f"{path} names a file outside its directory: {name!r}")
    if len({*names}) < len(names):
        raise StorageError(f"{path} names a file twice: {max(names, key=names.count)!r}")
    return manifest


def valid(manifest: dict[str, Any]) -> bool:
    """Whether kind, root and files are there and of the right form."""
    files, root = manifest.get("files"), manifest.get("root", "")
    return (isinstance(manifest.get("kind"), str) and (root is None or (isinstance(root, str) and root != ""))
            and isinstance(files, list) and all(
                isinstance(f, dict) and isinstance(f.get("path"), str)
                and type(f.get("size")) is int and f["size"] >= 0 and isinstance(f.get("sha256"), str)
                and re.fullmatch(r"[0-9a-f]{64}", f["sha256"]) for f in files))


def check_file(directory: Path, entry: Mapping[str, Any]) -> Path:
    """The path of a manifest's file, after its size and sha256 have been compared."""
    path = directory / entry["path"]
    if not path.is_file():
        raise StorageError(f"{path} is in the manifest but not there: delete {directory} and run `dvc repro`")
    if not intact(path, entry):
        raise StorageError(f"{path} is not the file that the manifest describes (size or sha256 differs): "
                           f"delete {directory} and run `dvc repro`")
    return path
