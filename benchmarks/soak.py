"""Train, kill, resume, over and over: does anything grow?

`python -m benchmarks.soak --minutes 30` in a workspace where `make repro` has run. In a temporary workspace of its own,
on the demo's digits, it starts the train stage, kills its driver with SIGKILL every `--life` seconds, and starts it
again. Every second it notes memory (resident, anonymous) and open files of the driver and of the training workers, and
what Ray holds in shared memory; it prints their slopes, by least squares over the second half of each life.
"""

import argparse
import contextlib
import csv
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil

from pixelgen.recipe import read_yaml

COPIED = ("pixelgen", "pipeline", "clusters", "dvc.yaml")
ENDLESS, CHECKPOINT_EVERY = 1_000_000, 50  # steps
Series = dict[tuple[str, str], list[tuple[float, float]]]  # (process, quantity) -> (seconds, value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--life", type=float, default=180, help="seconds from start to kill")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        workspace = prepare(Path(folder))
        end, lives, steps = time.monotonic() + 60 * arguments.minutes, list[Series](), list[int]()
        while time.monotonic() < end:
            lives.append(live(workspace, arguments.life))
            steps.append(reached(workspace))
            print(f"life {len(lives)}: step {steps[-1]}", flush=True)
            assert steps[-1] > (steps[-2] if len(steps) > 1 else 0), "a life without progress"
        report(lives, steps)


def prepare(workspace: Path) -> Path:
    for name in COPIED:
        copy = shutil.copytree if Path(name).is_dir() else shutil.copyfile
        copy(name, workspace / name)
    for name in ("networks", "shard"):
        (workspace / "out").mkdir(exist_ok=True)
        (workspace / "out" / name).symlink_to(Path("out", name).absolute())
    params = read_yaml(Path("params.yaml"))
    params["train"]["c2i"]["fit"]["steps"] = ENDLESS
    params["train"]["c2i"]["run"] |= {"checkpoint_every": CHECKPOINT_EVERY, "log_every": 5,
                                      "grid_every": CHECKPOINT_EVERY}
    (workspace / "params.yaml").write_text(json.dumps(params))  # which is YAML too
    subprocess.run([sys.executable, "-m", "pipeline.params"], cwd=workspace, check=True)
    return workspace


def live(workspace: Path, seconds: float) -> Series:
    """One run of the stage, from its start to its end by SIGKILL, and what was noted."""
    series: Series = defaultdict(list)
    stage = subprocess.Popen([sys.executable, "-m", "pipeline", "train", "c2i"], cwd=workspace,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    start, workers = time.monotonic(), dict[int, str]()
    while (age := time.monotonic() - start) < seconds:
        assert stage.poll() is None, f"the stage ended by itself: {stage.returncode}"
        for process in [*in_workspace(workspace)]:
            try:
                name = "driver" if process.pid == stage.pid else process.cmdline()[0]
                memory = process.memory_info()
                if name.endswith("/raylet"):
                    series["object store", "MB"].append((age, memory.shared / 1e6))
                if name == "driver" or "RayTrainWorker" in name:
                    role = "driver" if name == "driver" else workers.setdefault(process.pid, f"worker {len(workers)}")
                    series[role, "MB"].append((age, (memory.rss - memory.shared) / 1e6))
                    series[role, "files"].append((age, process.num_fds()))
            except (psutil.Error, IndexError):
                continue
        time.sleep(1)
    stage.send_signal(signal.SIGKILL)
    stage.wait()
    psutil.wait_procs([p for p in in_workspace(workspace) if "RayTrainWorker" in p.cmdline()[0]], timeout=60)
    return series


def in_workspace(workspace: Path) -> Iterator[psutil.Process]:
    """The stage and the processes of Ray that run the workspace's code."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, IndexError):
            if workspace == Path(process.cwd()) or str(workspace) in process.environ().get("PYTHONPATH", ""):
                yield process


def reached(workspace: Path) -> int:
    (path,) = workspace.glob("runs/train/*/curve.csv")
    return int(list(csv.DictReader(path.open()))[-1]["step"])


def report(lives: list[Series], steps: list[int]) -> None:
    print(f"{len(lives)} lives, {steps[-1]} steps")
    print("| | first life, end | last life, end | slope per minute, median of lives |\n|---|---|---|---|")
    for role, quantity in lives[0]:
        ends, slopes = [], []
        for life in lives:
            points = np.array([p for p in life[role, quantity] if p[0] > life[role, quantity][-1][0] / 2])
            ends.append(float(np.median(points[-10:, 1])))
            slopes.append(60 * float(np.polyfit(points[:, 0], points[:, 1], 1)[0]))
        print(f"| {role}, {quantity} | {ends[0]:.1f} | {ends[-1]:.1f} | {np.median(slopes):+.2f} |")


if __name__ == "__main__":
    main()
