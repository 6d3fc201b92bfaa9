"""The reference stage with an extractor that can be checked by hand."""

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.cluster import Cluster, work_through
from pipeline.datasets import work
from pipeline.networks import Network
from pipeline.params import ReferenceParams
from pipeline.stage import Stage
from pipeline.stages import reference
from pipeline.storage import Artifact, Storage
from pixelgen.config import ConfigError
from pixelgen.data.shards import LocalFile, Shard, ShardError, Split, read_images
from pixelgen.errors import StorageError
from pixelgen.manifest import read_manifest
from pixelgen.metrics import fid
from tests.pipeline.folders import SIZE, folder_params, make_plain, make_run, split_of, tasks_of

ONE = Cluster(None, 1, 0.5, 0, 1, 0, 1, None)
PARAMS = ReferenceParams("plain", "means", None, 7, 4)


class Means:
    """Pool: mean of each channel. Spatial: two pixels."""

    name = "means"

    def __call__(self, images):
        x = images.double()
        return {"pool": x.mean((2, 3)), "spatial": x[:, 0, :2, 0], "logits": x[:, :, 0, 0]}


@dataclasses.dataclass(frozen=True)
class MeansNetwork(Network):
    def extractor(self, folder, device):
        assert (folder, device) == (Path("out/networks/means").absolute(), torch.device("cpu"))
        return Means()


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A working directory with out/shard/plain of 20 training images, and the stage to run in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(Network.kinds, "means", f"{__name__}:MeansNetwork")
    params = folder_params(make_plain(tmp_path / "data", classes=2, each=10), rows_per_shard=6)
    networks = tmp_path / "out" / "networks"
    networks.mkdir(parents=True)
    Storage(None).publish(networks, "networks", {})
    out = tmp_path / "out" / "shard" / "plain"
    out.parent.mkdir(parents=True)
    run = make_run(tmp_path / "run")
    shards = []
    for number, task in enumerate(tasks_of(params)):
        work.write_job(work.Job("image_folder", number, task), params, Storage(None), run)
        shards += [{"path": s["file"]["path"], "rows": s["rows"], "size": s["pixels"]}
                   for s in work.read_report(Storage(None), run, f"image_folder-{number:05}")["shards"]]
    shutil.move(run / "shards", out)
    splits = {"train": {"shards": shards}, "heldout": {"shards": []}}
    Storage(None).publish(out, "dataset", params, sources={"image_folder": {"splits": splits}})

    def run(params, cluster=ONE):
        whole = SimpleNamespace(reference={"name": params}, networks={"means": MeansNetwork()})
        reference.run(Stage("reference", "name", whole, cluster, Storage(None)))
        return fid.load_reference("out/reference/name/reference.npz")

    return run


def every_image():
    return np.concatenate([images for images, _ in read_images(split_of(Path("out/shard/plain"), "train"))])


def test_statistics_are_of_every_training_image(stage):
    found, images = stage(PARAMS), every_image()
    assert images.shape == (20, SIZE, SIZE, 3)
    pool, spatial = images.astype(float).mean((1, 2)), images[:, :2, 0, 0].astype(float)
    np.testing.assert_allclose(found.mu, pool.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.sigma, np.cov(pool.T), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(found.mu_s, spatial.mean(0), rtol=1e-6)
    np.testing.assert_allclose(found.sigma_s, np.cov(spatial.T), rtol=1e-5, atol=1e-4)
    manifest = read_manifest(Path("out/reference/name"), "reference")
    assert {k: manifest[k] for k in ("extractor", "dataset", "images")} == {
        "extractor": "means", "dataset": Path("out/shard/plain/identity").read_text().strip(), "images": 7}
    assert [f["path"] for f in manifest["files"]] == ["reference.npz"]


def test_kept_images_are_a_random_part_always_the_same(stage):
    images = every_image()
    kept = np.asarray(stage(PARAMS).images)
    places = [int(np.flatnonzero((images == one).all((1, 2, 3)))[0]) for one in kept]
    assert len(kept) == 7 and places == sorted(set(places)) and places[-1] > 7 and places != list(range(7))
    first = Path("out/reference/name/reference.npz").read_bytes()
    assert not [*Path("runs").rglob("*-*")], "parts of what is finished are deleted"
    stage(PARAMS)
    assert Path("out/reference/name/reference.npz").read_bytes() == first


@pytest.mark.parametrize("kept", [20, 1000])
def test_a_small_split_is_kept_whole(stage, kept):
    assert np.array_equal(stage(dataclasses.replace(PARAMS, images=kept)).images, every_image())


def test_batch_size_changes_nothing_but_rounding(stage):
    one, other = (stage(dataclasses.replace(PARAMS, batch_size=size)) for size in (1, 100))
    np.testing.assert_allclose(one.sigma, other.sigma, rtol=1e-10)
    assert np.array_equal(one.images, other.images)


def test_parts_change_nothing_but_rounding_and_are_done_once(stage, monkeypatch):
    whole = stage(PARAMS)
    monkeypatch.setattr(reference, "PART", 7)
    monkeypatch.setattr(reference, "HELD", 2)
    with monkeypatch.context() as patched:
        patched.setattr(reference, "merged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stage(PARAMS)
    run, = Path("runs/reference").iterdir()
    assert [p.name for p in sorted(run.glob("part-*"))] == [f"part-{n:09d}.npz" for n in (0, 7, 14)]
    assert len([*run.glob("kept-*")]) > 3  # of two images at most
    (run / "part-000000007.npz").unlink()
    monkeypatch.setattr(reference, "read_images", lambda split, start, *rest: read_images(split, start, *rest)
                        if start == 7 else pytest.fail("a finished part was done again"))
    in_parts = stage(PARAMS)
    for name in ("mu", "sigma", "mu_s", "sigma_s"):
        np.testing.assert_allclose(getattr(in_parts, name), getattr(whole, name), rtol=1e-10, atol=1e-10)
    assert np.array_equal(in_parts.images, whole.images)


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_damaged_file_of_kept_images_is_made_again(stage, monkeypatch):
    first = np.asarray(stage(PARAMS).images)
    with monkeypatch.context() as patched:
        patched.setattr(reference, "merged", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stage(PARAMS)
    damaged, = Path("runs").rglob("kept-*")
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(StorageError, match=f"{damaged.name} .* was damaged and is deleted: run `dvc repro` again"):
        stage(PARAMS)
    assert np.array_equal(stage(PARAMS).images, first)


def test_the_driver_needs_no_gpu(stage, monkeypatch):
    """Workers elsewhere have one; here, whatever asks for it fails."""
    def elsewhere(parts, make, arguments, cluster, *rest):
        *before, told = arguments
        assert told.device == "cuda"
        here = dataclasses.replace(cluster, gpus_per_worker=0)
        work_through(parts, make, (*before, here), here, *rest)

    monkeypatch.setattr(reference, "work_through", elsewhere)
    remote = dataclasses.replace(ONE, gpus_per_worker=1, readers="self")
    assert len(stage(PARAMS, remote).images) == 7
    fid.save_reference("theirs.npz", fid.Reference(np.arange(3.0), np.eye(3), np.ones(2), np.eye(2), None))
    assert stage(dataclasses.replace(PARAMS, npz="theirs.npz"), remote).images is None


def test_a_single_image_has_no_statistics(stage, monkeypatch):
    monkeypatch.setattr(Artifact, "split", lambda *_: Split((Shard(LocalFile("a"), 1, ""),)))
    with pytest.raises(ConfigError, match="dataset plain has 1 training image"):
        stage(PARAMS)


@pytest.mark.parametrize("images", [None, np.zeros((5, 8, 8, 3), np.uint8)])
def test_a_published_reference_is_taken_over(stage, images):
    given = fid.Reference(np.arange(3.0), np.eye(3), np.ones(2), 2 * np.eye(2), images)
    fid.save_reference("theirs.npz", given)
    found = stage(dataclasses.replace(PARAMS, npz="theirs.npz"))
    for name, array in vars(given).items():
        assert np.array_equal(getattr(found, name), array)  # of None with None, too
    assert read_manifest(Path("out/reference/name"), "reference")["images"] == (0 if images is None else 5)


def test_a_published_reference_of_another_extractor_is_refused(stage):
    fid.save_reference("theirs.npz", fid.Reference(np.ones(4), np.eye(4), np.ones(2), np.eye(2), None))
    with pytest.raises(ConfigError, match=r"theirs.npz: \(4, 2\) .* means makes \(3, 2\): .* another extractor"):
        stage(dataclasses.replace(PARAMS, npz="theirs.npz"))
    assert not Path("out/reference").exists()


@pytest.mark.parametrize(("content", "message"), [
    (None, "No such file or directory: 'theirs.npz'; set npz"), (b"", "theirs.npz: .*; set npz"),
    (b"PK\3\4 no archive", "theirs.npz: .*; set npz")])
def test_a_published_reference_that_cannot_be_read_is_refused(stage, content, message):
    if content is not None:
        Path("theirs.npz").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        stage(dataclasses.replace(PARAMS, npz="theirs.npz"))


def test_altered_or_missing_shards_are_refused(stage):
    path = Path(str(split_of(Path("out/shard/plain"), "train").shards[1].file))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=f"{path.name} is not what the manifest describes"):
        stage(PARAMS)
    path.unlink()
    with pytest.raises(ShardError, match=f"{path.name} is in the manifest but not there"):
        stage(PARAMS)
    Path("out/shard/plain/manifest.json").unlink()
    with pytest.raises(StorageError, match=r"plain is missing or unfinished .*dvc repro"):
        stage(PARAMS)
    assert not Path("out/reference").exists()
