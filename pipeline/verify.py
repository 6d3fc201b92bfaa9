"""Compare every manifest with what lies in storage; list what nothing refers to, and delete it if asked.

`python -m pipeline.verify` reads every file of every manifest, in `out/` and under the storage root, and says what is
missing or changed. It also lists orphans: run states and objects that no manifest refers to, and uploads that were
broken off. `--prune` shows those of them that have not been touched for a while, `--prune --yes` deletes them.
Do not do that while a stage starts: it might find an old object there, and not send it again.
"""

import argparse
import contextlib
import datetime
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.checkout import runs
from pipeline.params import read_params
from pipeline.runs import in_use
from pipeline.storage import CACHE, MANIFESTS, OBJECTS, Storage, StoredFile, object_name
from pipeline.store import S3Store, open_store
from pixelgen.errors import StorageError, UserError
from pixelgen.manifest import MANIFEST
from pixelgen.store import LocalStore, on_disk

OUT = Path("out")
DAYS = 7.0  # without a change, before something may be pruned: an interrupted run is not in any manifest


@dataclass
class Found:
    """What was compared, and what is wrong."""

    files: int = 0
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Orphan:
    """What nothing refers to: when it was last touched, and how it is deleted."""

    touched: datetime.datetime
    delete: Callable[[], Any]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.verify", description=__doc__)
    parser.add_argument("--sizes", action="store_true", help="compare sizes only, and read nothing")
    parser.add_argument("--prune", action="store_true", help=f"show what is orphaned and {DAYS:g} days old")
    parser.add_argument("--yes", action="store_true", help="with --prune: delete it")
    arguments = parser.parse_args()
    try:
        with on_disk(OUT):
            storage = Storage(read_params().storage.root)
            found, left = verify(storage, arguments.sizes), orphans(storage)
            for problem in found.problems:
                print(problem)
            for location, orphan in sorted(left.items()):
                print(f"orphaned since {orphan.touched:%Y-%m-%d %H:%M}: {location}")
            print(f"{found.files} files compared, {len(found.problems)} missing or changed, {len(left)} orphans")
            if arguments.prune:
                prune(storage, left, delete=arguments.yes)
    except UserError as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    return 1 if found.problems else 0


def read_manifests(storage: Storage) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """All manifests by where they are, and what is wrong with others. A storage root has a list of its own, which
    covers every version and every workspace."""
    manifests, problems = dict[str, dict[str, Any]](), list[str]()
    for path in sorted(OUT.rglob(MANIFEST)):
        try:
            manifests[path.parent.as_posix()] = storage.open(path.parent, None).manifest
        except StorageError as error:
            problems.append(f"changed: {error}")
    if storage.root:
        store = open_store(storage.root)
        for name in store.sizes(f"{MANIFESTS}/"):
            content = store.read(name)
            if hashlib.sha256(content).hexdigest() in name:
                manifests[f"{storage.root}/{name}"] = json.loads(content)
            else:
                problems.append(f"changed: {storage.root}/{name}")
    return manifests, problems


def verify(storage: Storage, sizes: bool = False) -> Found:
    """Compare all manifests, each file once."""
    manifests, problems = read_manifests(storage)
    found = Found(problems=problems)
    for place, manifest in manifests.items():
        if manifest["root"] is None:
            files = LocalStore(Path(place))
            for entry in tqdm(manifest["files"], desc=place, leave=False):
                compare(found, f"{place}/{entry['path']}", entry, sizes, files.size(entry["path"]))
    if storage.root:
        there = open_store(storage.root).sizes(f"{OBJECTS}/")
        named = {object_name(entry["sha256"]): entry for manifest in manifests.values()
                  if manifest["root"] == storage.root for entry in manifest["files"]}
        for name, entry in tqdm(sorted(named.items()), desc=storage.root, leave=False):
            compare(found, f"{storage.root}/{name}", entry, sizes, there.get(name))
    return found


def compare(found: Found, location: str, entry: dict[str, Any], sizes: bool, size: int | None) -> None:
    """One file against its manifest, from the size that was found (None: missing) to its content."""
    found.files += 1
    if size is None:
        found.problems.append(f"missing: {location} ({entry['path']}, {entry['size']} bytes)")
    elif size != entry["size"]:
        found.problems.append(f"changed: {location} ({entry['path']}) has {size} bytes instead of {entry['size']}")
    elif not sizes and hashlib.sha256(StoredFile(location).read()).hexdigest() != entry["sha256"]:
        found.problems.append(f"changed: {location} ({entry['path']}) has other content")


def orphans(storage: Storage) -> dict[str, Orphan]:
    """What no manifest refers to, by where it is: run states that are not in use, and under a root objects and uploads
    that were broken off. Nothing, if a manifest cannot be read: what it refers to would look like an orphan.

    Manifests are read last: what a stage finishes meanwhile is in one of them.
    """
    found, kept = dict[str, Orphan](), set[str]()
    for folder in sorted(runs().glob("*/*")):
        if folder.is_dir() and folder.parent.name != CACHE and not in_use(folder):
            touched = latest(p.stat().st_mtime for p in [folder, *folder.rglob("*")])
            found[folder.as_posix()] = Orphan(touched, partial(shutil.rmtree, folder))
    if storage.root:
        store = open_store(storage.root)
        assert isinstance(store, S3Store)
        states: dict[str, list[datetime.datetime]] = {}
        for name, (_, touched) in store.listing("runs/").items():
            if run := re.match(r"runs/[^/]+/[0-9a-f]{16}(?=/)", name):  # others make markers of folders: runs/
                states.setdefault(run[0], []).append(touched)
            if "/reports/" in name:  # of a shard stage at work: shards have arrived, their manifest has not
                with contextlib.suppress(FileNotFoundError):  # it ends just now
                    kept |= {f"{storage.root}/{object_name(digest)}"
                             for digest in re.findall(r"\b[0-9a-f]{64}\b", store.read(name).decode())}
        found |= {f"{storage.root}/{run}": Orphan(max(touched), partial(delete_all, store, f"{run}/"))
                  for run, touched in states.items()}
        found |= {f"{storage.root}/{name}": Orphan(touched, partial(store.delete, name))
                  for name, (_, touched) in store.listing(f"{OBJECTS}/").items()}
        found |= {f"{storage.root}/{name}, upload {upload}": Orphan(begun, partial(store.abort, name, upload))
                  for name, upload, begun in store.uploads()}
    manifests, problems = read_manifests(storage)
    if problems:
        print("orphans are not looked for: a manifest cannot be read, and nobody knows what it refers to")
        return {}
    for manifest in manifests.values():
        if run := manifest.get("run"):
            kept |= {run, f"{storage.root}/{run}"}
        if manifest["root"]:
            kept |= {f"{manifest['root']}/{object_name(entry['sha256'])}" for entry in manifest["files"]}
    return {where: orphan for where, orphan in found.items() if where not in kept}


def delete_all(store: S3Store, prefix: str) -> None:
    for name in store.sizes(prefix):
        store.delete(name)


def prune(storage: Storage, found: dict[str, Orphan], delete: bool) -> None:
    """Show what has been orphaned for long enough, or delete it, if it still is one: looking through everything may
    have taken hours."""
    if delete:
        found = {where: orphan for where, orphan in orphans(storage).items() if where in found}
    now = datetime.datetime.now(datetime.UTC)
    old = [where for where, orphan in sorted(found.items()) if now - orphan.touched > datetime.timedelta(days=DAYS)]
    for where in old:
        print(f"{'deleting' if delete else 'would delete'} {where}")
        if delete:
            found[where].delete()
    print(f"{len(old)} of {len(found)} orphans are older than {DAYS:g} days"
          + ("" if delete or not old else "; --prune --yes deletes them"))


def latest(times: Iterable[float]) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(max(times), datetime.UTC)


if __name__ == "__main__":
    sys.exit(main())
