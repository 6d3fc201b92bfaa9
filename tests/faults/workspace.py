"""One small workspace in which every stage has run undisturbed, and ways to disturb a stage and compare what it makes.

Only the branch of digits: networks, shard, reference, train, sample, evaluate.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.e2e.workspace import digest, environment, make, resolve, unmeasured

STAGES = {"networks": [], "shard": ["digits"], "reference": ["digits"], "train": ["c2i"], "sample": ["c2i"],
          "evaluate": ["fid"]}  # with what they are called on, in the order of the workflow
UNFILLED = "the disk could not be made full: mounting a file system is not permitted here"
PATIENCE = 400  # seconds that a busy machine may take for anything


def tiny(params):
    for section in ("datasets", "train", "prompts", "sample", "evaluate"):
        params[section] = {k: v for k, v in params[section].items() if k in ("digits", "c2i", "fid")}
    del params["networks"]["text"]
    c2i = params["train"]["c2i"]
    c2i["fit"] |= {"steps": 48, "batch_size": 16}
    c2i["run"] |= {"checkpoint_every": 3, "keep_every": 3, "log_every": 2, "grid_every": 24}  # each can be compared
    c2i["run"]["grid_sampler"]["euler"]["steps"] = 2
    params["sample"]["c2i"] |= {"per_prompt": 6, "part_size": 2}
    params["sample"]["c2i"]["sampler"] = {"euler": {"steps": 3, "guidance": 2.5, "interval": [0.1, 1.0]}}


@dataclass(frozen=True)
class Workspace:
    """`path` is where faults happen; `kept` holds what the undisturbed stages made. `stages` as in `STAGES`."""

    path: Path
    kept: Path
    stages: Mapping[str, list[str]] = field(default_factory=lambda: STAGES)

    def run_directory(self, stage):
        """The one of a stage that has been started."""
        (found,) = self.path.glob(f"runs/{stage}/*/")
        return found

    def out(self, stage):
        return self.path / "out" / stage / "/".join(self.stages[stage])

    def parts(self, stage):
        """The finished parts of a stage's run."""
        return sorted(self.path.glob(f"runs/{stage}/*/part-*"))

    def written(self, stage):
        """When each of them was: (path, ns) pairs."""
        return {(path, path.stat().st_mtime_ns) for path in self.parts(stage)}

    def more_parts(self, stage):
        """Tells whether there are more of them than now."""
        before = len(self.parts(stage))
        return lambda: len(self.parts(stage)) > before

    def forget(self, stage):
        """Let a stage be as if it had never run."""
        for path in (self.out(stage), self.path / "runs" / stage):
            shutil.rmtree(path, ignore_errors=True)

    def begin(self, stage, step):
        """Let training be where the undisturbed run was after a step."""
        self.forget(stage)
        (kept,) = self.kept.glob(f"runs/{stage}/*")
        later = [p.name for p in kept.glob("*/step-*") if int(p.name[5:13]) > step]
        shutil.copytree(kept, self.path / kept.relative_to(self.kept), ignore=shutil.ignore_patterns("ray", *later))

    def restore(self, stage):
        """The undisturbed outputs of a stage and its run directory."""
        self.forget(stage)
        for path in (self.out(stage), *(self.path / p.relative_to(self.kept) for p in
                                        self.kept.glob(f"runs/{stage}"))):
            shutil.copytree(self.kept / path.relative_to(self.path), path)

    def call(self, stage):
        return [sys.executable, "-m", "pipeline", stage, *self.stages[stage]]

    def finish(self, stage):
        """Run a stage to its end -> what it printed."""
        with self.started(self.call(stage)) as process:
            assert process.wait() == 0, process.printed()
            return process.printed()

    def refused(self, stage, cluster="local"):
        """Run a stage that has to stop with one line of its own -> that line."""
        with self.started(self.call(stage), cluster) as process:
            assert process.wait() == 1, process.printed()
            return process.last_line(stage)

    @contextlib.contextmanager
    def started(self, command, cluster="local"):
        """A running command; whatever is left of it and its children at the end is killed."""
        log = self.path / f"printed-{time.monotonic_ns()}"
        before = psutil.pids()  # another stage may be at work
        with open(log, "wb") as file:
            popen = psutil.Popen(command, cwd=self.path, env=environment(self.path) | {"PIXELGEN_CLUSTER": cluster},
                                 stdout=file, stderr=subprocess.STDOUT)
        process = Process(popen, log, self.path)
        try:
            yield process
        finally:
            left = [*process.tree(), popen, *(one for one in process.at_work() if one.pid not in before)]
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(left, PATIENCE)

    def outputs(self, root, stage):
        """What a stage publishes: sha256 by path; of the curve, all but what is measured."""
        found = {}
        for path in sorted((root / self.out(stage).relative_to(self.path)).rglob("*")):
            if path.name == "curve.csv":
                found[path.name] = unmeasured(path.read_text())
            elif path.is_file():
                found[path.relative_to(root).as_posix()] = digest(path)
        if stage == "evaluate":
            found["metrics"] = (root / "metrics" / f"{self.stages[stage][0]}.json").read_text()
        return found

    def same(self, stage):
        """The number of files that a stage has published, all of them the undisturbed ones."""
        expected = self.outputs(self.kept, stage)
        assert self.outputs(self.path, stage) == expected
        return len(expected)


@dataclass(frozen=True)
class Process:
    """A started command in a workspace, and what it has printed."""

    popen: psutil.Popen
    log: Path
    workspace: Path

    def printed(self):
        return self.log.read_text(errors="replace").replace("\r", "\n")

    def wait(self):
        """The exit status."""
        return self.popen.wait(PATIENCE)

    def last_line(self, stage):
        """What a stage has ended with: a line of its own after no traceback."""
        printed = self.printed()
        line = printed.rstrip().splitlines()[-1]
        assert "Traceback" not in printed and line.startswith(f"{stage}: "), printed
        return line

    def tree(self):
        """Its children and theirs, without the keeper of Ray, which other stages use too."""
        try:
            children = self.popen.children()
        except psutil.NoSuchProcess:
            return []
        found = []
        for child in children:
            with contextlib.suppress(psutil.Error):
                if "pipeline.session" not in child.cmdline():
                    found += [child, *Process(child, self.log, self.workspace).tree()]
        return found

    def ray(self, *titles):
        """The workspace's processes of Ray whose title begins so."""
        titles = tuple(f"ray::{title}" for title in titles)
        return [one for one, command in self.others() if command.startswith(titles)]

    def keeper(self):
        """What keeps the workspace's Ray."""
        return [one for one, command in self.others() if " -m pipeline.session " in command]

    def others(self):
        """Processes of anyone that run the workspace's code, and their commands."""
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.workspace) in one.environ().get("PYTHONPATH", "").split(os.pathsep):
                    yield one, " ".join(one.cmdline())

    def at_work(self):
        """Ray's processes that belong to a stage, and end with it."""
        return self.ray("TrainController", "RayTrainWorker", "MapWorker")

    def until(self, condition):
        """Wait for what `condition` tells, and return it; the command has to be alive until then."""
        deadline = time.monotonic() + PATIENCE
        while not (found := condition()):
            assert self.popen.is_running() and self.popen.status() != psutil.STATUS_ZOMBIE, self.printed()
            assert time.monotonic() < deadline, self.printed()
            time.sleep(0.002)
        return found

    def terminate(self):
        """SIGTERM, of the process alone, which ends with its Ray -> what its last line says to be kept."""
        children = [*self.tree(), *self.at_work()]
        self.popen.send_signal(signal.SIGTERM)
        assert self.wait() == 128 + signal.SIGTERM, self.printed()
        line = self.printed().rstrip().splitlines()[-1]
        said = re.fullmatch("stopped: (.+), `dvc repro` goes on from there", line)
        assert said, line
        assert not psutil.wait_procs(children, PATIENCE)[1]
        return said[1]

    def kill(self):
        """kill -9, of the process alone; Ray, which notices, is given the time to end what works for it."""
        self.popen.suspend()  # finding the children takes longer than the end of a short stage
        children = [*self.tree(), *self.at_work()]
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait(PATIENCE)
        assert not psutil.wait_procs(children, PATIENCE)[1]


def build_empty(path, change=tiny):
    """A workspace in which nothing has run yet."""
    path.mkdir()
    make(path, change)
    local = (path / "clusters/local.yaml").read_text()
    (path / "clusters/frail.yaml").write_text(local.replace("max_failures: 2", "max_failures: 0"))
    resolve(path)
    return path


def build(path):
    """Make the workspace and run every stage once, undisturbed."""
    workspace = Workspace(build_empty(path / "work"), path / "kept")
    for stage in STAGES:
        workspace.finish(stage)
    keep(workspace)
    return workspace


def keep(workspace):
    """Take what is there for what undisturbed stages made."""
    for name in ("out", "runs", "metrics"):
        shutil.copytree(workspace.path / name, workspace.kept / name)


def flip(path):
    """Change one bit in the middle of a file, its size and times stay."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@contextlib.contextmanager
def mounted(path, options):
    """A file system of its own in memory over a folder, with what was in it, and back again. PermissionError."""
    aside = path.with_name(f"aside-{path.name}")
    path.mkdir(exist_ok=True)
    path.rename(aside)
    path.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], text=True, capture_output=True)
        if done.returncode:
            raise PermissionError(done.stderr.strip())
        try:
            shutil.copytree(aside, path, dirs_exist_ok=True)
            yield
            shutil.rmtree(aside)
            shutil.copytree(path, aside)
        finally:
            subprocess.run(["umount", "--lazy", path], check=True)
    finally:
        path.rmdir()
        aside.rename(path)


def fill(path):
    """Let a mounted file system have no room left."""
    for _ in range(100):  # it cannot become smaller than what has been written since one looked
        size = shutil.disk_usage(path).used
        done = subprocess.run(["mount", "-o", f"remount,size={size}", path], capture_output=True)
        if done.returncode == 0:
            return
    raise RuntimeError(f"{path} cannot be made full: {done.stderr!r}")


def make_room(path):
    subprocess.run(["mount", "-o", "remount,size=2g", path], check=True)


def may_mount(path):
    """Whether this user may mount file systems, as containers and ordinary users may not."""
    probe = path / "probe"
    try:
        with mounted(probe, "size=1m"):
            return True
    except PermissionError:
        return False
    finally:
        probe.rmdir()
