"""Output directories: a manifest in each, written last, and the files it vouches for.

A directory without a manifest is not finished. The manifest lists every file with size and sha256, the counts, the
resolved configuration, and where it was made; it holds no time or host name, so that equal work gives equal bytes.
"""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Any

MANIFEST = "manifest.json"
VERSIONS = ("pixelgen", "torch", "ray", "numpy", "pillow", "timm", "lpips", "torch-fidelity")


class StorageError(RuntimeError):
    """An artifact is missing, unfinished or altered; the message names the file and the remedy."""


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, data: bytes) -> None:
    """A reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # no orphaned writer has the same
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, data: Any) -> None:
    write_atomic(path, (json.dumps(data, indent=2) + "\n").encode())


def fresh_directory(path: Path) -> Path:
    """An empty directory at `path`, whatever was there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def publish(directory: Path, kind: str, config: Any, **facts: Any) -> dict[str, Any]:
    """Write the manifest of everything in `directory`. `facts`: counts and other results worth keeping."""
    files = [{"path": p.relative_to(directory).as_posix(), "size": p.stat().st_size, "sha256": sha256(p)}
             for p in sorted(directory.rglob("*")) if p.is_file() and p != directory / MANIFEST]
    manifest = {
        "kind": kind, **facts, "files": files,
        "config": dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config,  # type: ignore
        "versions": {name: version(name) for name in VERSIONS} | {"python": platform.python_version()},
        "hardware": hardware(),
    }
    write_json(directory / MANIFEST, manifest)
    return manifest


def read_manifest(directory: Path, kind: str) -> dict[str, Any]:
    """The manifest of a finished directory. StorageError if there is none, or if it is not of this kind."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise StorageError(f"{directory} is missing or unfinished (no {MANIFEST}): run `dvc repro`") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise StorageError(f"{path} is damaged ({error}): delete {directory} and run `dvc repro`") from None
    if not isinstance(manifest, Mapping) or manifest.get("kind") != kind or "files" not in manifest:
        raise StorageError(f"{path} does not describe a {kind}: delete {directory} and run `dvc repro`")
    for entry in manifest["files"]:
        inside = PurePosixPath(entry["path"])
        if inside.is_absolute() or ".." in inside.parts:
            raise StorageError(f"{path} names a file outside its directory: {entry['path']!r}")
    return dict(manifest)


def read_checked(directory: Path, kind: str) -> dict[str, Any]:
    """`read_manifest`, after every file of the directory has been compared with it."""
    manifest = read_manifest(directory, kind)
    for entry in manifest["files"]:
        check_file(directory, entry)
    return manifest


def check_file(directory: Path, entry: Mapping[str, Any]) -> Path:
    """The path of a manifest's file, after its size and sha256 have been compared."""
    path = directory / entry["path"]
    if not path.is_file():
        raise StorageError(f"{path} is in the manifest but not there: delete {directory} and run `dvc repro`")
    if path.stat().st_size != entry["size"] or sha256(path) != entry["sha256"]:
        raise StorageError(f"{path} is not the file that the manifest describes (size or sha256 differs): "
                           f"delete {directory} and run `dvc repro`")
    return path


def hardware() -> dict[str, Any]:
    """What this process runs on, as far as it may matter to a number."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus}
