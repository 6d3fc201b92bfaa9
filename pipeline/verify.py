"""Compare every manifest with what lies in storage; list what nothing refers to, and delete it if asked.

`python -m pipeline.verify` reads every file of every manifest, in `out/` and under the storage root, and says what is
missing or changed. It also lists orphans: run states and objects that no manifest refers to, and uploads that were
broken off. `--prune` shows those of them that have not been touched for a while, `--prune --yes` deletes them.
"""

import argparse
import datetime
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.params import read_params
from pipeline.runs import RUNS, in_use
from pipeline.storage import MANIFEST, MANIFESTS, OBJECTS, Storage, object_name, read_bytes
from pipeline.store import LocalStore, S3Store, StorageError, open_store
from pixelgen.config import ConfigError

OUT = Path("out")
DAYS = 7.0  # without a change, before something may be pruned: an interrupted run is not in any manifest


@dataclass
class Found:
    """What was compared, and what is wrong or left over."""

    files: int = 0
    problems: list[str] = field(default_factory=list)
    orphans: dict[str, datetime.datetime] = field(default_factory=dict)  # by location: when last touched


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline.verify", description=__doc__)
    parser.add_argument("--sizes", action="store_true", help="compare sizes only, and read nothing")
    parser.add_argument("--prune", action="store_true", help=f"show what is orphaned and {DAYS:g} days old")
    parser.add_argument("--yes", action="store_true", help="with --prune: delete it")
    arguments = parser.parse_args()
    try:
        storage = Storage(read_params().storage.root)
        found = verify(storage, arguments.sizes)
        for problem in found.problems:
            print(problem)
        for location, touched in sorted(found.orphans.items()):
            print(f"orphaned since {touched:%Y-%m-%d %H:%M}: {location}")
        print(f"{found.files} files compared, {len(found.problems)} missing or changed, {len(found.orphans)} orphans")
        if arguments.prune:
            prune(storage.root, found.orphans, delete=arguments.yes)
    except (ConfigError, StorageError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return 2
    return 1 if found.problems else 0


def verify(storage: Storage, sizes: bool = False) -> Found:
    """Compare all manifests, each file once, and look for what none of them refers to."""
    found, manifests = Found(), dict[str, dict[str, Any]]()
    for path in sorted(OUT.rglob(MANIFEST)):
        try:
            artifact = storage.open(path.parent, None)
        except StorageError as error:
            found.problems.append(f"changed: {error}")
            continue
        manifests[str(path)] = artifact.manifest
        files = LocalStore(path.parent)
        if artifact["root"] is None:
            for entry in tqdm(artifact["files"], desc=str(path.parent), leave=False):
                compare(found, str(path.parent / entry["path"]), entry, sizes, files.size(entry["path"]))
    if storage.root:
        remote(storage.root, manifests, found, sizes)
    runs = named_runs(manifests)
    for folder in sorted(RUNS.glob("*@*/*")):
        if folder.as_posix() not in runs and not in_use(folder):
            found.orphans[str(folder)] = latest(p.stat().st_mtime for p in [folder, *folder.rglob("*")])
    return found


def remote(root: str, manifests: dict[str, dict[str, Any]], found: Found, sizes: bool) -> None:
    """The same under a storage root, whose own list of manifests covers every version and every workspace."""
    store = open_store(root)
    assert isinstance(store, S3Store)
    for name in store.sizes(f"{MANIFESTS}/"):
        content = store.read(name)
        if hashlib.sha256(content).hexdigest() not in name:
            found.problems.append(f"changed: {root}/{name}")
        else:
            manifests[f"{root}/{name}"] = json.loads(content)
    objects = store.listing(f"{OBJECTS}/")
    wanted = {object_name(entry["sha256"]): entry for manifest in manifests.values() if manifest["root"] == root
              for entry in manifest["files"]}
    for name, entry in tqdm(sorted(wanted.items()), desc=root, leave=False):
        compare(found, f"{root}/{name}", entry, sizes, objects[name][0] if name in objects else None)
    runs = named_runs(manifests)
    states: dict[str, list[datetime.datetime]] = {}
    reported: set[str] = set()  # of unfinished shard stages: their shards have arrived, their manifest has not
    for name, (_, touched) in store.listing("runs/").items():
        if run := re.match(r"runs/[^/]+@[^/]+/[0-9a-f]{16}(?=/)", name):  # others make markers of folders, like runs/
            states.setdefault(run[0], []).append(touched)
        if "/reports/" in name:
            reported |= {object_name(h) for h in re.findall(r"\b[0-9a-f]{64}\b", store.read(name).decode())}
    found.orphans |= {f"{root}/{run}": max(touched) for run, touched in states.items() if run not in runs}
    found.orphans |= {f"{root}/{name}": touched for name, (_, touched) in objects.items()
                      if name not in wanted and name not in reported}


def compare(found: Found, location: str, entry: dict[str, Any], sizes: bool, size: int | None) -> None:
    """One file against its manifest, from the size that was found (None: missing) to its content."""
    found.files += 1
    if size is None:
        found.problems.append(f"missing: {location} ({entry['path']}, {entry['size']} bytes)")
    elif size != entry["size"]:
        found.problems.append(f"changed: {location} ({entry['path']}) has {size} bytes instead of {entry['size']}")
    elif not sizes:
        try:
            read_bytes(location, entry["sha256"])
        except StorageError:
            found.problems.append(f"changed: {location} ({entry['path']}) has other content")


def prune(root: str | None, orphans: dict[str, datetime.datetime], delete: bool) -> None:
    """Show what has been orphaned for long enough, or delete it."""
    now = datetime.datetime.now(datetime.UTC)
    old = [where for where, touched in sorted(orphans.items()) if now - touched > datetime.timedelta(days=DAYS)]
    for where in old:
        print(f"{'deleting' if delete else 'would delete'} {where}")
        if not delete:
            continue
        if not where.startswith("s3://"):
            shutil.rmtree(where)
            continue
        store = open_store(str(root))
        for name in store.sizes(where.removeprefix(f"{root}/")):  # of a run its files, of an object itself
            store.delete(name)
    print(f"{len(old)} of {len(orphans)} orphans are older than {DAYS:g} days"
          + ("" if delete or not old else "; --prune --yes deletes them"))


def named_runs(manifests: dict[str, dict[str, Any]]) -> set[str]:
    """The run directories from which the models of these manifests come."""
    return {m["run"] for m in manifests.values() if m.get("run")}


def latest(times: Iterable[float]) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(max(times), datetime.UTC)


if __name__ == "__main__":
    sys.exit(main())
