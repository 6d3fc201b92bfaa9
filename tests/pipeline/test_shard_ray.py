"""The shard stage and the reading of batches on a real Ray, on this machine: the only module that starts one for it."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline import stage
from pipeline.cluster import connect, read_cluster
from pipeline.datasets.work import write_job
from pipeline.params import read_params
from pipeline.readers import RayTasks
from pipeline.stages import shard
from pipeline.storage import Storage
from pixelgen.config import CaptionConfig
from pixelgen.data.executors import InProcess, processes
from pixelgen.data.feed import MixedSource, Plan, lane_batches
from pixelgen.manifest import read_manifest
from tests.e2e.workspace import join, resolve
from tests.pipeline.folders import SIZE, make_plain, make_run, make_tar, pairs, split_of

ROOT = Path(__file__).parents[2]
PARAMS = """
storage: {{root: null}}
networks: {{}}
datasets:
  plain:
    sources: {{folder: {{image_folder: {{path: {data}}}}}}}
    image_sizes: [{size}]
    crop: adm
    encoding: png
    rows_per_shard: 2
    heldout: 0.1
    max_quarantined: 0.05
    max_megapixels: 1
    seed: 0
  tars:
    sources: {{tars: {{webdataset: {{path: {data}/../tars, captions: {{txt: 1}}, image: jpg}}}}}}
    image_sizes: [16, 32]
    crop: plain
    encoding: jpeg
    rows_per_shard: 3
    heldout: 0.2
    max_quarantined: 0.1
    max_megapixels: 1
    seed: 0
reference: {{}}
train: {{}}
prompts: {{}}
sample: {{}}
evaluate: {{}}
"""


def working_directory(path, data):
    """What the stage needs around it: parameters, clusters and code."""
    (path / "clusters").mkdir(parents=True)
    shutil.copy(ROOT / "clusters" / "local.yaml", path / "clusters")
    (path / "params.yaml").write_text(PARAMS.format(data=data, size=SIZE))
    for name in ("pipeline", "pixelgen"):
        (path / name).symlink_to(ROOT / name)
    resolve(path)
    return path


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """A Ray session and its address, in a working directory where the stage has run undisturbed; and the folder
    that holds this and the images."""
    root = tmp_path_factory.mktemp("ray")
    make_plain(root / "data", classes=2, each=40)
    (root / "data" / "class1" / "text.png").write_text("no image")
    (root / "data" / "class1" / "cut.png").write_bytes((root / "data" / "class1" / "000.png").read_bytes()[:500])
    work = working_directory(root / "undisturbed", root / "data")
    with contextlib.chdir(work), connect(read_cluster()) as context:
        run_here()
        yield root, context.address_info["address"]


def run_here(key="plain"):
    """The stage in this process and in the session that is open."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "connect", lambda cluster: contextlib.nullcontext())
        stage.run("shard", key)


def finished(work):
    """The shards of the tasks that are done; each has one."""
    reports = [json.loads(path.read_bytes().partition(b"\n")[2]) for path in work.glob("runs/*/*/reports/*.json")]
    (shards,) = work.glob("runs/*/*/shards") if reports else [None]
    names = [s["file"]["path"] for report in reports for s in report["shards"]]
    return {name: stamp(shards / name) for name in names}


def stamp(path):
    return path.stat().st_ino, path.stat().st_mtime_ns


def test_every_image_is_in_one_shard(session):
    manifest = read_manifest(Path("out/shard/plain"), "dataset")
    train, heldout = (manifest["sources"]["folder"]["splits"][name] for name in ("train", "heldout"))
    assert train["rows"] + heldout["rows"] == 80 and manifest["quarantined"] == 2 and heldout["rows"] > 0
    assert np.add(train["per_class"], heldout["per_class"]).tolist() == [40, 40]
    assert len(train["shards"]) > 30 and {s["rows"] for s in train["shards"]} <= {1, 2}
    assert not [*Path("runs/shard").iterdir()], "a finished run leaves nothing behind"


def test_containers_give_the_same_with_ray_as_without(session, tmp_path):
    for n in range(3):
        make_tar(session[0] / "tars" / f"{n}.tar", pairs(*range(8)) if n != 1 else [*pairs(1), ("x.jpg", b"?")])
    run_here("tars")
    data, run = read_params().datasets["tars"], make_run(tmp_path)
    for job in shard.find_jobs(data)[1]:
        write_job(job, data, Storage(None), run)
    written = {path.name: path.read_bytes() for path in Path("out/shard/tars").glob("*.parquet")}
    assert written == {path.name: path.read_bytes() for path in (run / "shards").iterdir()} and len(written) > 6
    assert read_manifest(Path("out/shard/tars"), "dataset")["quarantined"] == 1


def test_a_run_killed_in_the_middle_goes_on_and_ends_as_an_undisturbed_one(session, capsys):
    root, address = session
    work = working_directory(root / "killed", root / "data")
    join(work, "local", address)
    process = subprocess.Popen([sys.executable, "-m", "pipeline", "shard", "plain"], cwd=work)
    deadline = time.monotonic() + 200
    while len(finished(work)) < 5:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept: dict[str, tuple[int, int]] = {}
    while kept != (kept := finished(work)):  # its tasks end a moment later
        time.sleep(3)
    undisturbed = {path.name: path.read_bytes() for path in Path("out/shard/plain").iterdir()}
    total = sum(name.endswith(".parquet") for name in undisturbed)
    assert 5 <= len(kept) < total and not (work / "out/shard").exists()

    with contextlib.chdir(work):
        run_here()
        after = {path.name: path for path in Path("out/shard/plain").iterdir()}
        assert {name: path.read_bytes() for name, path in after.items()} == undisturbed
        assert {name: stamp(after[name]) for name in kept} == kept
    assert f"part {total - len(kept)} of {total - len(kept)}: " in capsys.readouterr().out


@pytest.mark.parametrize("start", [0, 21])
@pytest.mark.parametrize("data", ["plain", "tars"])
def test_whoever_decodes_a_rank_gets_the_same(session, start, data):
    text = CaptionConfig(0.5, 5) if data == "tars" else None
    source = MixedSource(split_of(Path(f"out/shard/{data}"), "train"), captions=(1.0,))
    plan = Plan((source,), SIZE, seed=1, batch_size=4, lanes=4, text=text)

    def encode(prompts):
        return torch.tensor([[float(zlib.crc32(p.encode()))] for p in prompts])

    def found(executor):
        steps = lane_batches(plan, [2, 3], start, 40, torch.device("cpu"), encode if text else torch.tensor, executor)
        return [[(b.step, b.lane, b.keys, b.images.tolist(), b.condition.tolist()) for b in step] for step in steps]

    here = found(InProcess())
    assert [[batch[:2] for batch in step] for step in here] == [[(s, 2), (s, 3)] for s in range(start, 40)]
    assert found(RayTasks(2)) == here
    with processes(2) as executor:
        assert found(executor) == here
