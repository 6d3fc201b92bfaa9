"""A workspace of its own for tests of the workflow: a copy of what the stages are made of, and ways to run them."""

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
from ruamel.yaml import YAML

from pixelgen.recorders import MEASURED

ROOT = Path(__file__).parents[2]
LOOPBACK = {"127.0.0.1", "::1"}
yaml = YAML()


def make(path, change):
    """A workspace in the folder `path`, its parameters changed by `change`."""
    for name in ("pixelgen", "pipeline", "clusters", "dvc.yaml", "params.yaml", ".dvcignore", ".gitignore",
                 ".dvc/config"):
        target = path / name
        target.parent.mkdir(exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, target)
    (path / "README.md").write_text("a readme\n")
    subprocess.run(["git", "init", "-q"], cwd=path, check=True)
    edit(path, change)
    return path


def join(workspace, name, address):
    """Add a cluster file `name` to a workspace: that of this machine, but for a Ray that runs at an address."""
    (workspace / f"clusters/{name}.yaml").write_text(
        (ROOT / "clusters/local.yaml").read_text().replace("address: null", f"address: {address}")
        .replace("workers: null", "workers: 2").replace("gpus_per_worker: null", "gpus_per_worker: 0")
        .replace("readers: null", "readers: tasks(2)"))


def edit(workspace, change):
    data = yaml.load(workspace / "params.yaml")
    change(data)
    yaml.dump(data, workspace / "params.yaml")


def resolve(workspace):
    """Run the first stage by hand, for stages that are run by hand."""
    subprocess.run([sys.executable, "-m", "pipeline.params"], cwd=workspace, env=environment(workspace), check=True)


def environment(workspace):
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    return {**os.environ, "PATH": os.pathsep.join(paths), "PYTHONPATH": str(workspace)}


def dvc(workspace, *arguments, check=True, cluster="local"):
    done = subprocess.run(["dvc", *arguments], cwd=workspace, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, env=environment(workspace) | {"PIXELGEN_CLUSTER": cluster})
    assert not check or done.returncode == 0, done.stdout
    return done.stdout


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def interfaces(processes):
    """The addresses on which processes listen."""
    found = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):  # it has ended
            found |= {c.laddr.ip.removeprefix("::ffff:") for c in process.net_connections("inet")
                      if c.status == psutil.CONN_LISTEN or c.type != socket.SOCK_STREAM}
    return found


def unmeasured(curve: str) -> list[str]:
    """The lines of a curve without the columns that no two runs have in common."""
    return [line.rsplit(",", len(MEASURED))[0] for line in curve.splitlines()]
