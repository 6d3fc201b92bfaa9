"""Output directories: a manifest in each, written last, and the files it vouches for.

A directory without a manifest is not finished. The manifest lists every file with size and sha256, the counts, the
resolved configuration, and where it was made; it holds no time or host name, so that equal work gives equal bytes.
Beside it lies the file `identity`, a hash of its kind, files and facts: stages depend on that of what they read, so
that none runs again because its input was made again, the same, under other versions or from another configuration.

With `storage.root: null` the files lie beside the manifest, where DVC looks after them. With `s3://bucket/prefix` they
lie there under their sha256, `objects/12/12ab…`, whoever wrote them, and only the manifest is left in the directory: no
manifest can name a file outside the root, and what has arrived is never sent again.
"""

import contextlib
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.checkout import runs
from pipeline.store import open_store, preflight
from pixelgen.config import plain
from pixelgen.errors import StorageError
from pixelgen.files import read_range
from pixelgen.manifest import (
    IDENTITY,
    MANIFEST,
    Entry,
    check_file,
    describe,
    identity,
    intact,
    one_at_a_time,
    read_manifest,
    sha256,
)
from pixelgen.store import LocalStore, Store, write_atomic

if TYPE_CHECKING:
    from pixelgen.data.shards import Split

MANIFESTS, OBJECTS = "manifests", "objects"  # under the root
CACHE = "cache"  # in the folder of runs: files of artifacts that lie under a root; may be deleted at any time
TRANSFERS = 8  # at a time
LEAST_FREE = 0.5e9  # bytes of the working directory's disk; stages that know what they need ask for that
LISTED = 100  # files from which on one listing of what is there takes the place of a question for each
VERSIONS = ("pixelgen", "torch", "ray", "numpy", "pillow", "timm", "lpips", "torch-fidelity")


def write_json(path: Path, data: Any) -> None:
    write_atomic(path, (json.dumps(data, indent=2) + "\n").encode())


def fresh_directory(path: Path) -> Path:
    """An empty directory at `path`, whatever was there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def run_name(directory: Path) -> str:
    """What a run directory is called in manifests and under a root: runs/stage/fingerprint."""
    return "/".join(directory.parts[-3:])


def object_name(digest: str) -> str:
    return f"{OBJECTS}/{digest[:2]}/{digest}"


@dataclass(frozen=True)
class Storage:
    """Where artifacts go: into the workspace (root None), or under a prefix of a bucket."""

    root: str | None

    def publish(self, directory: Path, kind: str, config: Any, stored: Sequence[Entry] = (), **facts: Any) -> None:
        """Write the manifest of everything in `directory`; under a root, after the files have arrived there, and
        nothing but the manifest stays. `stored`: files that `keep` has stored already. `facts`: counts and other
        results worth keeping."""
        own = (directory / MANIFEST, directory / IDENTITY)
        here = [p for p in sorted(directory.rglob("*")) if p.is_file() and p not in own]
        files = {entry["path"]: entry for entry in stored}
        files |= {entry["path"]: entry for entry in (describe(p, p.relative_to(directory).as_posix()) for p in here)}
        if changed := [entry["path"] for entry in stored if files[entry["path"]] != entry]:
            raise StorageError(f"{directory / changed[0]} is no longer what was written to it: run `dvc repro` again")
        manifest = {
            "kind": kind, **facts, "root": self.root, "files": sorted(files.values(), key=lambda f: str(f["path"])),
            "config": plain(config),
            "versions": versions(),
            "hardware": hardware(),
        }
        if self.root:
            store = open_store(self.root)
            known = store.sizes(OBJECTS) if len(files) > LISTED else None
            with ThreadPoolExecutor(TRANSFERS) as pool:
                for _ in pool.map(lambda p: put(store, p, files[p.relative_to(directory).as_posix()], known), here):
                    pass
            text = json.dumps(manifest, indent=2).encode()
            store.write(f"{MANIFESTS}/{kind}-{hashlib.sha256(text).hexdigest()}.json", text)
            for path in directory.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        write_atomic(directory / IDENTITY, (identity(manifest) + "\n").encode())
        write_json(directory / MANIFEST, manifest)

    def keep(self, directory: Path, name: str, data: bytes) -> Entry:
        """Store a file of an output to be, from whatever machine this is: in `directory`, or under the root."""
        entry = {"path": name, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if self.root:
            put(open_store(self.root), data, entry)
        else:
            write_atomic(directory / name, data)
        return entry

    def keep_files(self, directory: Path, fill: Callable[[Path], None]) -> list[Entry]:
        """Store the files of an output to be that `fill` writes into the folder that it is given, from whatever machine
        this is: in `directory`, or under the root."""
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if self.root else directory
            fill(folder)
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            entries = [describe(path, path.relative_to(folder).as_posix()) for path in paths]
            if self.root:
                for path, entry in zip(paths, entries, strict=True):
                    put(open_store(self.root), path, entry)
        return entries

    def keeps(self, directory: Path, entry: Entry) -> bool:
        """Whether what `keep` has stored is still there as it was."""
        if self.root:
            return open_store(self.root).size(object_name(entry["sha256"])) == entry["size"]
        return intact(directory / entry["path"], entry)

    def open(self, directory: Path, kind: str | None) -> "Artifact":
        """The finished artifact of a directory, of any kind if that is None. StorageError if it is unfinished, or not
        of this kind, or points anywhere but to this root."""
        manifest = read_manifest(directory, kind)
        if manifest["root"] not in (None, self.root):
            raise StorageError(f"{directory / MANIFEST} says that its files are under {manifest['root']!r}, but "
                               f"storage.root is {self.root!r}: set it to that, or delete {directory} and run "
                               "`dvc repro`")
        return Artifact(directory.absolute(), manifest, identity(manifest))

    def run(self, directory: Path) -> Store:
        """Where what a run directory has to share between machines and to keep goes: into it, or under the root."""
        if self.root is None:
            return LocalStore(directory.absolute())
        return open_store(f"{self.root}/{run_name(directory)}")

    def check(self) -> None:
        """StorageError, before any work, if nothing can be stored: too little room here, or a root out of reach."""
        if (free := shutil.disk_usage(Path.cwd()).free) < LEAST_FREE:
            raise StorageError(f"{Path.cwd()}: {free / 1e9:.2f} GB are free on this disk, too little to work with: "
                               f"make room for {LEAST_FREE / 1e9:.1f} GB at least")
        if self.root:
            print(preflight(self.root), flush=True)


@dataclass(frozen=True)
class Artifact:
    """A finished output; goes to workers on other machines as it is."""

    directory: Path  # with the manifest, and without a root also the files
    manifest: dict[str, Any]
    identity: str  # see pixelgen.manifest.identity

    def __getitem__(self, fact: str) -> Any:
        return self.manifest[fact]

    def file(self, entry: Mapping[str, Any]) -> "StoredFile":
        root = self.manifest["root"]
        return StoredFile(f"{root}/{object_name(entry['sha256'])}" if root else str(self.directory / entry["path"]))

    def part(self, *folders: str) -> list[str]:
        """What identifies the files in some of its folders."""
        return [f"{f['path']} {f['sha256']}" for f in self.manifest["files"] if f["path"].split("/")[0] in folders]

    def split(self, name: str, source: str | None = None, size: int | None = None) -> "Split":
        """A split of a dataset, as `pixelgen.data.shards.open_split` finds it."""
        from pixelgen.data.shards import open_split  # pyarrow is for those stages that read shards

        remedy = f"delete {self.directory} and run `dvc repro`"
        if self.manifest["root"]:  # DVC would only bring back the manifest, and what is stored would be taken for good
            remedy = f"delete that object and run `dvc repro --force --single-item shard@{self.directory.name}`"
        return open_split(self.manifest, self.file, name, source, size, remedy)

    def local(self) -> Path:
        """A directory on this machine with all the files, every one of them checked; under a root, they are fetched
        once into `CACHE`."""
        files, root = self.manifest["files"], self.manifest["root"]
        if root is None:
            for entry in files:
                check_file(self.directory, entry)
            return self.directory
        folder = runs().absolute() / CACHE / self.identity
        folder.mkdir(parents=True, exist_ok=True)
        store = open_store(root)

        def get(entry: Entry) -> None:
            path = folder / entry["path"]
            if not intact(path, entry):
                path.parent.mkdir(parents=True, exist_ok=True)
                fetch_object(store, entry, path)

        with one_at_a_time(folder), ThreadPoolExecutor(TRANSFERS) as pool:
            for _ in pool.map(get, files):
                pass
        return folder


def put(store: Store, source: Path | bytes, entry: Mapping[str, Any], known: Mapping[str, int] | None = None) -> None:
    """Store a file under its sha256, unless it is there."""
    name = object_name(entry["sha256"])
    if (store.size(name) if known is None else known.get(name)) != entry["size"]:
        store.write(name, source)


def fetch_object(store: Store, entry: Mapping[str, Any], path: Path) -> None:
    try:
        store.fetch(object_name(entry["sha256"]), path)
    except FileNotFoundError as error:
        raise StorageError(f"{error}, but a manifest's {entry['path']} is that: `python -m pipeline.verify` lists what "
                           "is missing; delete the output and run `dvc repro`") from None
    if sha256(path) != entry["sha256"]:
        path.unlink()
        raise StorageError(f"{object_name(entry['sha256'])} in storage is not what its name says: `python -m "
                           "pipeline.verify` lists what is damaged; delete that object and the output, and run "
                           "`dvc repro`")


def write_sealed(store: Store, name: str, data: bytes) -> None:
    """Store a part of unfinished work together with its sha256."""
    store.write(name, hashlib.sha256(data).hexdigest().encode() + b"\n" + data)


def read_sealed(store: Store, name: str) -> bytes:
    """What `write_sealed` has stored. A damaged part is deleted, so that only it is made again: StorageError."""
    digest, _, data = store.read(name).partition(b"\n")
    if digest.decode(errors="replace") != hashlib.sha256(data).hexdigest():
        store.delete(name)
        raise StorageError(f"{name} of {store} was damaged and is deleted: run `dvc repro` again to redo it alone")
    return data


@dataclass(frozen=True)
class StoredFile:
    """A file of an artifact: a path, or the uri of an object."""

    location: str

    def __str__(self) -> str:
        return self.location

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes from `start` to `stop` (None: the end), whatever they are. FileNotFoundError if there is none."""
        if not self.location.startswith("s3://"):
            return read_range(Path(self.location), start, stop)
        root, _, name = self.location.rpartition(f"/{OBJECTS}/")
        return open_store(root).read(f"{OBJECTS}/{name}", start, stop)


def versions() -> dict[str, str]:
    """Of what computes here: recorded, and never a reason to make anything again."""
    return {name: version(name) for name in VERSIONS} | {"python": platform.python_version()}


def other_versions(then: Mapping[str, str]) -> str:
    """What is installed otherwise than it was: "torch 2.14, now 2.15"; empty if nothing is."""
    now = versions()
    return "; ".join(f"{name} {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name])


def hardware() -> dict[str, Any]:
    """What this process runs on, as far as it may matter to a number: GPUs to none that has done without torch, which
    is not imported for this alone."""
    torch = sys.modules.get("torch")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {"machine": platform.machine(), "cpus": os.cpu_count(), "gpus": gpus}
