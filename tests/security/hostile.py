"""What the tests of hostile input share: pickles that leave a trace, reproducible fuzzing, a process with a limit."""

import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[2]
FIXED = settings(derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))


class Trace:
    """Unpickling one makes the folder `path`: whoever unpickles runs what the pickle says."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def write_pickle(path: Path, trace: Path, kind: str) -> Path:
    """A file that makes `trace` when it is unpickled, in one of the formats in which torch and numpy hold pickles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"state_dict": {"weight": torch.zeros(1)}, "extra": Trace(trace)}
    if kind == "plain":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind == "archive")
    return path


def peak_memory(program: str, *arguments: str, before: str = "") -> tuple[str, int]:
    """Run a program in a process of its own -> what it prints, and by how many MiB its memory grew over that of the
    program `before`, which comes first and should import what is needed."""
    measure = "import resource as r; rss = lambda: r.getrusage(r.RUSAGE_SELF).ru_maxrss // 1024"
    done = subprocess.run([sys.executable, "-c", f"{measure}\n{before}\nstart = rss()\n{program}\nprint(rss() - start)",
                           *arguments], cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    *said, grown = done.stdout.splitlines()
    return "\n".join(said), int(grown)


def rewrite(source: Path, target: Path, compression: int = zipfile.ZIP_STORED, **changed: bytes) -> Path:
    """A copy of an archive with the ends of some members' names -> their new content."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            content = next((data for end, data in changed.items() if name.endswith(end)), old.read(name))
            new.writestr(name, content)
    return target
