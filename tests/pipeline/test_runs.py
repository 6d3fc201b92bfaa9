"""Run directories: what names them, and who may write to them."""

import contextlib
import dataclasses
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ray.exceptions import ActorDiedError, RayTaskError, UserCodeException
from ray.train import WorkerGroupError

from pipeline import fetch, runs, verify
from pipeline.datasets import DatasetError
from pipeline.stage import Stage
from pixelgen.config import ConfigError
from pixelgen.errors import StorageError
from pixelgen.store import on_disk

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.runs import lease
with lease(Path(sys.argv[1]), patience=0):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_is_named_by_parameters_inputs_and_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipeline.stage.code_digest", lambda params, name, key: f"code of {name}")
    stage = Stage("many", "a", None, None, None)
    first = stage.run_directory({"lr": 1}, "hash")
    assert first.parent == Path("runs/many")
    assert stage.run_directory({"lr": 1}, "hash") == first
    assert dataclasses.replace(stage, key="b").run_directory({"lr": 1}, "hash") == first, "whatever it is called"
    assert stage.run_directory({"lr": 2}, "hash") != first
    assert stage.run_directory({"lr": 1}, "other") != first
    monkeypatch.setattr("pipeline.stage.code_digest", lambda params, name, key: f"other code of {name}")
    assert stage.run_directory({"lr": 1}, "hash") != first


def start_holder(path):
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)


def test_a_lease_keeps_others_out_and_ends_with_its_process(tmp_path):
    holder = start_holder(tmp_path / "lease")
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(StorageError, match=f"in use by process {holder.pid}"), runs.lease(tmp_path / "lease", 0.3):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with runs.lease(tmp_path / "lease", patience=5):
            assert (tmp_path / "lease").read_text().split()[0] == str(os.getpid())
    finally:
        holder.kill()
        holder.wait()


WORKER = """
import sys
from pathlib import Path
from pipeline.runs import clear, working
run = Path(sys.argv[1])
for _ in range(40):
    with working(run):
        assert [p.name for p in run.iterdir() if p.suffix == ".part"] == [], "another's work"
        for n in range(3):
            (run / f"{n}.part").write_text("x")
        clear(run)
"""


def test_who_clears_a_finished_run_away_disturbs_nobody_who_waits_for_it(tmp_path):
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, tmp_path / "run"], stderr=subprocess.PIPE, text=True)
               for _ in range(3)]
    assert [(worker.communicate()[1], worker.returncode) for worker in workers] == [("", 0)] * 3
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    """As Python finds it where another process clears it away just then."""
    made, asked = Path.mkdir, []

    def mkdir(path, *arguments, **named):
        asked.append(path)
        if len(asked) == 1:
            raise FileExistsError(17, "File exists", str(path))
        made(path, *arguments, **named)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    runs.opened(tmp_path / "run" / "lease").close()
    assert asked == [tmp_path / "run"] * 2 and (tmp_path / "run/lease").exists()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        runs.opened(tmp_path / "file" / "lease")


def test_a_finished_run_is_out_of_the_way_before_any_of_it_is_deleted(tmp_path, monkeypatch):
    """Its lease among it, without which somebody else could begin in the folder that is being deleted."""
    run, delete, there = tmp_path / "run", shutil.rmtree, []
    monkeypatch.setattr(runs.shutil, "rmtree", lambda path: (there.append(run.exists()), delete(path)))
    with runs.working(run):
        runs.clear(run)
    assert there == [False] and [*tmp_path.iterdir()] == []


def test_who_has_time_waits_for_the_lease_and_says_so(tmp_path, monkeypatch, capsys):
    """The holder clears its folder away when it has finished: what comes next begins in a new one."""
    path = tmp_path / "run/lease"
    path.parent.mkdir()
    holder = start_holder(path)
    try:
        assert holder.stdout.readline() == "held\n"
        clock = iter([0.0, *[6.0] * 50])
        monkeypatch.setattr(runs.time, "monotonic", lambda: next(clock, 7.0))

        def sleep(_):
            shutil.rmtree(path.parent, ignore_errors=True)
            holder.kill()
            holder.wait()

        monkeypatch.setattr(runs.time, "sleep", sleep)
        with runs.lease(path):
            assert path.read_text().split()[0] == str(os.getpid())
    finally:
        holder.kill()
        holder.wait()
    assert capsys.readouterr().err == (f"waiting for process {holder.pid}, which is at the same work in "
                                       f"{path.parent}\n")


@pytest.mark.parametrize(("holder_started", "dvc_started", "stopped"), [
    (0, None, True), (0, -1, True), (0, 0, False), (-1, None, False)],
    ids=["its dvc is gone", "its dvc's number is another's", "its dvc runs", "its own number is another's"])
def test_a_stage_whose_dvc_was_killed_is_stopped(tmp_path, holder_started, dvc_started, stopped):
    """It must neither be joined by a second writer nor keep the next one waiting; nobody else is to be stopped."""
    ended, this, path = subprocess.Popen(["true"]), psutil.Process(), tmp_path / "lease"
    ended.wait()
    holder = start_holder(path)
    try:
        assert holder.stdout.readline() == "held\n"
        started = psutil.Process(holder.pid).create_time() + holder_started
        dvc = [ended.pid, time.time()] if dvc_started is None else [this.pid, this.create_time() + dvc_started]
        path.write_text(" ".join(map(str, [holder.pid, started, *dvc])))
        refused = contextlib.nullcontext() if stopped else pytest.raises(StorageError, match=f"process {holder.pid}:")
        with refused, runs.lease(path, patience=0):
            assert not psutil.pid_exists(holder.pid)
        assert psutil.pid_exists(holder.pid) is not stopped
    finally:
        holder.kill()
        holder.wait()


def test_the_supervisor_is_the_dvc_above(tmp_path):
    """Through the shell in which dvc starts a stage."""
    program = "from pipeline.runs import _supervisor; print(*_supervisor())"
    (tmp_path / "dvc").write_text(
        "import os, subprocess, sys\nprint(os.getpid(), flush=True)\n"
        f"subprocess.run(['sh', '-c', '{sys.executable} -c \"{program}\"; true'], check=True)\n")
    done = subprocess.run([sys.executable, str(tmp_path / "dvc")], stdout=subprocess.PIPE, text=True, check=True)
    dvc, found = done.stdout.splitlines()
    assert found.split()[0] == dvc


def task_error(cause):
    return RayTaskError("decode_images", "Traceback ...", cause).as_instanceof_cause()


@pytest.mark.parametrize(("error", "line"), [
    (StorageError("no bucket"), "stage: no bucket"),
    (task_error(ConfigError("no such key")), "stage: no such key"),
    (task_error(StorageError("no bucket")), "stage: no bucket"),
    (WorkerGroupError("...", {0: RuntimeError("connection closed by peer"), 1: task_error(StorageError("no bucket"))}),
     "stage: no bucket"),
    (WorkerGroupError("...", {0: RuntimeError("closed by peer"), 1: ActorDiedError()}),
     "stage: Ray has failed: The actor died unexpectedly before finishing this task. Run `dvc repro` again: finished "
     "work is kept"),
    (OSError(28, "No space left on device", "shard.parquet"),
     "stage: shard.parquet: No space left on device: make room on this disk, then run it again: finished work "
     "is kept"),
])
def test_a_stage_ends_with_one_line_whatever_ray_has_wrapped_it_in(error, line):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        runs.run_main("stage", main)
    assert ended.value.code == line


@pytest.mark.parametrize("error", [RuntimeError("a bug"), WorkerGroupError("...", {0: RuntimeError("a bug")}),
                                   task_error(UserCodeException("a bug")), FileNotFoundError(2, "not there", "x"),
                                   ValueError("a bug"), task_error(ValueError("a bug"))])
def test_a_bug_keeps_its_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)) as raised:
        runs.run_main("stage", main)
    assert raised.value is error


@pytest.mark.parametrize(("end", "status", "last"), [
    ("pass", 0, ""),
    ("raise ConfigError('no such key')", 1, "stage: no such key"),
    ("raise ValueError('a bug')", 1, "ValueError: a bug"),
    ("os.kill(os.getpid(), signal.SIGTERM)", 143, "stopped: finished work is kept, `dvc repro` goes on from there"),
])
def test_a_stage_ends_with_its_own_last_line(end, status, last):
    program = f"""import atexit, os, signal
from pipeline.runs import run_stage
from pixelgen.config import ConfigError
def main():
    atexit.register(print, "what Ray finds when it is taken apart")
    {end}
run_stage("stage", main)"""
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True)
    assert (done.returncode, done.stderr.strip().rpartition("\n")[2], done.stdout) == (status, last, "")
    assert ("Traceback" in done.stderr) == ("bug" in end)


@runs.whole_tracebacks()
def rank(error=None):
    if error:
        raise error
    return [*zip([1], [], strict=True)]


def test_a_bug_in_a_worker_is_shown_once_with_its_whole_traceback(capsys):
    """Ray Train cuts the text of its own exception."""
    with pytest.raises(RuntimeError) as bug:
        rank()
    failures = {number: pickle.loads(pickle.dumps(bug.value)) for number in range(2)}

    def main():
        raise WorkerGroupError("cut short", failures)

    with pytest.raises(WorkerGroupError):
        runs.run_main("stage", main)
    printed = capsys.readouterr().err
    assert printed.count("in rank\n") == printed.count("ValueError: zip() argument 2 is shorter than argument 1") == 1


@pytest.mark.parametrize("error", [ConfigError("no such key"), task_error(StorageError("no bucket")), ActorDiedError()])
def test_what_is_no_bug_leaves_a_worker_as_it_is(error):
    with pytest.raises(type(error)) as raised:
        rank(error)
    assert raised.value is error


def test_a_mistake_is_not_taken_for_the_error_of_the_disk_that_showed_it(tmp_path):
    def read():
        try:
            raise PermissionError(13, "Permission denied", "data")
        except OSError as error:
            raise DatasetError("data: correct path") from error

    with pytest.raises(DatasetError, match="data: correct path"), on_disk(tmp_path):
        read()


@pytest.mark.parametrize(("tool", "status"), [(fetch, 1), (verify, 2)])
def test_tools_tell_mistakes_from_bugs(tool, status, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr(tool, "read_params", fail)
    monkeypatch.setattr(sys, "argv", ["tool", *(["out/networks"] if tool is fetch else [])])
    error = ConfigError("no such key")
    assert tool.main() == status and capsys.readouterr().err.endswith(": no such key\n")
    error = ValueError("a bug")
    with pytest.raises(ValueError, match="a bug"):
        tool.main()


def test_fetch_does_not_mix_files_into_a_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fetch", "out/networks", "--to", str(tmp_path)])
    assert fetch.main() == 1
    assert f"{tmp_path} exists already: name a new directory" in capsys.readouterr().err
