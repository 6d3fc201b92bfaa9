"""The shard stage without Ray: dealing, writing, what goes into the manifest, and how it fails and goes on."""

import dataclasses
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin

from pipeline import runs
from pipeline.datasets import DatasetError, DatasetParams, Item, Sample, Source, Task, refuse
from pipeline.datasets.image_folder import ImageFolder
from pipeline.datasets.listed import deal
from pipeline.datasets.work import Job, read_report, write_job
from pipeline.demo import digits
from pipeline.stages import shard
from pipeline.storage import Storage
from pixelgen.config import ConfigError, load, require
from pixelgen.data.shards import SCHEMA, describe_pieces, read_images
from pixelgen.errors import StorageError
from pixelgen.images import adm_crop, plain_crop
from pixelgen.manifest import check_file, describe
from tests.pipeline.folders import (
    SIZE,
    folder_params,
    listing,
    load_item,
    make_bad,
    make_good,
    make_plain,
    make_run,
    only,
    params_of,
    picture,
    split_of,
)

DIGITS = params_of(digits.Digits(), image_sizes=(16,), rows_per_shard=200, max_megapixels=1.0, seed=3)


# ----------------------------------------------------------------------------------------------------- dealing


@settings(deadline=None)
@given(st.lists(st.sampled_from(["train", "heldout"]), max_size=60), st.integers(1, 20), st.integers(0, 3))
def test_every_item_is_dealt_once_and_tasks_are_even(splits, rows_per_shard, seed):
    items = [Item(f"k{n}", 0, split) for n, split in enumerate(splits)]
    tasks = deal(items, rows_per_shard, seed)
    assert sorted(i.key for task in tasks for i in task.items) == sorted(i.key for i in items)
    for split in ("train", "heldout"):
        sizes = [task.samples for task in tasks if task.items[0].split == split]
        assert len(sizes) == -(-splits.count(split) // rows_per_shard)
        assert not sizes or (max(sizes) <= rows_per_shard and max(sizes) - min(sizes) <= 1)
    assert all(len({i.split for i in t.items}) == 1 and len(t.items) == t.samples and not t.shuffle for t in tasks)
    assert tasks == deal(items, rows_per_shard, seed)


def test_each_task_is_a_random_sample_of_all_classes():
    items = [Item(f"{label}/{n}", label, "train") for label in range(4) for n in range(250)]
    tasks = deal(items, 100, seed=0)
    assert len(tasks) == 10
    for task in tasks:
        assert min(np.bincount([i.label for i in task.items], minlength=4)) >= 10  # 25 ± 4.1 expected
    assert tasks != deal(items, 100, seed=1)


# ----------------------------------------------------------------------------------------------------- writing


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    good = make_good(root / "data" / "good")
    bad = make_bad(root / "data" / "mixed", root / "outside")
    picture(7).save(root / "data" / "mixed" / "ok.png")
    return folder_params(root / "data"), good, bad


def job_of(params, items, number=0):
    return Job(next(iter(params.sources)), number, Task(items, len(items), shuffle=False))


def test_a_shard_holds_the_crops_and_the_report_the_rest(hostile, tmp_path):
    params, good, bad = hostile
    params = dataclasses.replace(params, rows_per_shard=100)
    items, run = listing(params)[1][::-1], make_run(tmp_path)
    assert write_job(job_of(params, items), params, Storage(None), run) == "image_folder-00000"
    (path,) = (run / "shards").iterdir()
    assert path.name == "image_folder-train-32-00000-0000.parquet"
    table = pq.read_table(path)
    assert table.schema.equals(SCHEMA)
    keys = [key.removeprefix("image_folder/") for key in table["key"].to_pylist()]
    assert keys == [i.key for i in items if i.key.removeprefix("good/") in good or i.key == "mixed/ok.png"]
    assert "good/naïve ☃\n\t'\".bmp" in keys and set(table["captions"].to_pylist()) == {None}
    for key, label, png in zip(keys, table["label"].to_pylist(), table["image"].to_pylist(), strict=True):
        item = next(i for i in items if i.key == key)
        image = Image.open(io.BytesIO(png))
        assert (image.format, image.mode, image.size, label) == ("PNG", "RGB", (SIZE, SIZE), item.label)
        assert np.array_equal(image, adm_crop(load_item(params, item).image, SIZE))
    report = read_report(Storage(None), run, "image_folder-00000")
    assert report["shards"] == [{"split": "train", "pixels": SIZE, "rows": len(good) + 1,
                                 "file": describe(path, path.name), "labels": table["label"].to_pylist(),
                                 "pieces": describe_pieces(path.read_bytes())}]
    assert report["enlarged"] == 1 and report["skipped"] == report["captions_cut"] == 0
    assert {key for key, _ in report["rejected"]} == {f"image_folder/mixed/{name}" for name in bad}


def test_a_shard_written_again_has_the_same_bytes(hostile, tmp_path):
    params, _, _ = hostile
    job = job_of(params, listing(params)[1])
    for name in ("a", "a", "b"):
        write_job(job, params, Storage(None),
                  tmp_path / name if (tmp_path / name).exists() else make_run(tmp_path / name))
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / n / "shards").iterdir()} for n in "ab")
    assert one == other and len(one) == 4  # 16 rows, 4 in each


def test_digits_are_sharded_as_they_are_given(tmp_path):
    items = [i for i in digits.Digits().listing(None)[1] if i.split == "heldout"]
    params = dataclasses.replace(DIGITS, rows_per_shard=500)
    write_job(job_of(params, items), params, Storage(None), make_run(tmp_path))
    table = pq.read_table(tmp_path / "shards" / "digits-heldout-16-00000-0000.parquet")
    images, labels = digits.digits("heldout", 16)
    assert table["label"].to_pylist() == labels.tolist()
    assert all(np.array_equal(Image.open(io.BytesIO(png)), image)
               for png, image in zip(table["image"].to_pylist(), images, strict=True))


def test_jpeg_is_smaller_and_close_and_keeps_all_its_colour(hostile, tmp_path):
    params = dataclasses.replace(hostile[0], encoding="jpeg", crop="plain")
    items = [i for i in listing(params)[1] if i.key == "good/plain.jpg"]
    write_job(job_of(params, items), params, Storage(None), make_run(tmp_path))
    (path,) = (tmp_path / "shards").iterdir()
    image = Image.open(io.BytesIO(pq.read_table(path)["image"][0].as_py()))
    exact = plain_crop(load_item(params, items[0]).image, SIZE)
    assert image.format == "JPEG" and JpegImagePlugin.get_sampling(image) == 0  # 4:4:4
    assert 0 < np.abs(np.asarray(image).astype(int) - exact).max() < 30


def test_only_a_job_whose_shards_are_whole_has_a_report(hostile, tmp_path):
    params, run = hostile[0], make_run(tmp_path)
    assert read_report(Storage(None), run, "image_folder-00000") is None
    items = listing(params)[1]
    write_job(job_of(params, [i for i in items if i.key.startswith("mixed/cut")]), params, Storage(None), run)
    report = read_report(Storage(None), run, "image_folder-00000")
    assert report["shards"] == [] and len(report["rejected"]) == 6
    write_job(job_of(params, items), params, Storage(None), run)
    first = next((run / "shards").iterdir())
    whole = first.read_bytes()
    for content in (b"", whole[:4], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        first.write_bytes(content)
        assert read_report(Storage(None), run, "image_folder-00000") is None
    first.unlink()
    assert read_report(Storage(None), run, "image_folder-00000") is None


# ------------------------------------------------------------------------------------------------- the stage


@pytest.fixture
def stage(shard_stage):
    return shard_stage


def test_the_manifest_counts_and_the_quarantine_list(stage, hostile):
    params, good, bad = hostile
    manifest = stage(dataclasses.replace(params, max_quarantined=0.7, heldout=0.3, rows_per_shard=3))
    out = Path("out/shard/name")
    source = manifest["sources"]["image_folder"]
    train, heldout = (source["splits"][name] for name in ("train", "heldout"))
    assert manifest["image_sizes"] == [SIZE] and manifest["classes"] == ["good", "mixed"]
    assert train["rows"] + heldout["rows"] == len(good) + 1 and heldout["rows"] > 0
    assert [sum(pair) for pair in zip(train["per_class"], heldout["per_class"], strict=True)] == [len(good), 1]
    assert manifest["quarantined"] == source["quarantined"] == len(bad) and source["enlarged"] == 1
    assert manifest["skipped"] == source["skipped"] == source["captions_cut"] == 0 and source["captions"] is None
    assert {s["size"] for split in (train, heldout) for s in split["shards"]} == {SIZE}
    assert manifest["config"]["sources"]["image_folder"]["image_folder"]["path"] == only(params).path
    assert manifest["config"]["max_quarantined"] == 0.7
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == sorted(f"image_folder/mixed/{name}" for name in bad)
    assert all(line["reason"] for line in lines)
    names = {"quarantine.jsonl", *(s["path"] for split in (train, heldout) for s in split["shards"])}
    assert {f["path"] for f in manifest["files"]} == names == {p.name for p in out.iterdir()} - {
        "identity", "manifest.json"}
    assert all(check_file(out, entry) for entry in manifest["files"])
    for name, split in (("train", train), ("heldout", heldout)):
        assert [s["rows"] for s in split["shards"]] == [len(labels) for _, labels in read_images(split_of(out, name))]
        labels = np.concatenate([labels for _, labels in read_images(split_of(out, name))])
        assert np.bincount(labels, minlength=2).tolist() == split["per_class"]
    assert not os.listdir("runs/shard"), "a finished run leaves nothing behind"


def test_too_much_quarantine_stops_the_stage_and_a_higher_limit_goes_on(stage, hostile):
    params, _, bad = hostile
    params = dataclasses.replace(params, rows_per_shard=4, max_quarantined=0.3)
    with pytest.raises(DatasetError, match=r"(?s)\d+ of \d+ images .* max_quarantined 0.3 of 38; .*mixed/") as caught:
        stage(params)
    listed = Path(next(word for word in str(caught.value).split() if "quarantine.jsonl" in word).rstrip(":"))
    reasons = {json.loads(line)["key"] for line in listed.read_text().splitlines()}
    assert 0.3 * 38 < len(reasons) < len(bad) and reasons < {f"image_folder/mixed/{name}" for name in bad}
    assert not Path("out").exists()
    first = list(stage.written)
    manifest = stage(dataclasses.replace(params, max_quarantined=0.9))
    assert manifest["quarantined"] == len(bad)
    assert first and not set(first) & set(stage.written)  # what was done is not done again


def test_a_class_without_any_usable_image_stops_the_stage(stage, tmp_path):
    make_plain(tmp_path / "data", classes=2, each=20)
    (tmp_path / "data" / "owl").mkdir()
    (tmp_path / "data" / "owl" / "a.jpg").write_text("no owl")
    with pytest.raises(DatasetError, match=r'(?s)no training image is left of class owl; .*"image_folder/owl/a\.jpg'):
        stage(folder_params(tmp_path / "data", max_quarantined=0.5))
    assert not Path("out").exists()


def test_an_interrupted_stage_goes_on_and_gives_the_same_bytes(stage, tmp_path):
    params = folder_params(make_plain(tmp_path / "data", classes=3, each=10), heldout=0.2)
    stage(params)
    whole = {path.name: path.read_bytes() for path in Path("out/shard/name").iterdir()}
    shutil.rmtree("out")
    with pytest.raises(KeyboardInterrupt):
        stage(params, stop=3)
    (shards,) = Path("runs/shard").glob("*/shards")
    (shards / ".train-00004.parquet.123.partial").write_bytes(b"half")
    done = list(stage.written)
    cut = next(shards.glob(f"*{done[1].removeprefix('image_folder')}-0000.parquet"))
    cut.write_bytes(cut.read_bytes()[:1000])
    stage(params)
    assert not set(stage.written) & {done[0], done[2]} and len(stage.written) == len(whole) - 3 - 2
    assert {path.name: path.read_bytes() for path in Path("out/shard/name").iterdir()} == whole


@pytest.mark.parametrize("change", ["params", "content", "more", "code"])
def test_other_inputs_start_afresh(stage, tmp_path, monkeypatch, change):
    params = folder_params(make_plain(tmp_path / "data", classes=2, each=10))
    with pytest.raises(KeyboardInterrupt):
        stage(params, stop=3)
    if change == "params":
        params = dataclasses.replace(params, image_sizes=(16,))
    elif change == "content":
        os.utime(tmp_path / "data" / "class0" / "000.png", ns=(0, 0))
    elif change == "more":
        picture(99).save(tmp_path / "data" / "class0" / "999.png")
    else:
        monkeypatch.setattr("pipeline.stage.code_digest", lambda *_: "other code")
    stage(params)
    assert len(stage.written) == 5 + (change == "more")


def test_a_file_that_goes_while_sharding_is_quarantined(stage, tmp_path, monkeypatch):
    params = folder_params(make_plain(tmp_path / "data", classes=2, each=10), max_quarantined=0.1)
    find_jobs = shard.find_jobs

    def find_and_lose(data):
        found = find_jobs(data)
        (tmp_path / "data" / "class0" / "003.png").unlink()
        return found

    monkeypatch.setattr(shard, "find_jobs", find_and_lose)
    manifest = stage(params)
    assert manifest["quarantined"] == 1 and manifest["sources"]["image_folder"]["splits"]["train"]["rows"] == 19
    assert "image_folder/class0/003.png" in Path("out/shard/name/quarantine.jsonl").read_text()


@dataclasses.dataclass(frozen=True)
class Toy(Source):
    """A source from elsewhere: grey squares with captions, every third refused."""

    captions: dict[str, float]
    count: int  # of squares

    def check(self, data):
        require(data.image_sizes == (SIZE,), "toys have one size")

    def tasks(self, data):
        return None, [Task([Item(str(n), None, "")], 0, shuffle=False) for n in range(self.count)]

    def read(self, data, task):
        for item in task.items:
            number = int(item.key)
            square = Sample(Image.new("RGB", (SIZE, SIZE), (number,) * 3), "train", None, [f"toy {number}"])
            yield item.key, refuse("broken") if number % 3 == 2 else lambda square=square: square


def test_a_new_kind_of_source_takes_one_line_in_the_list(stage, monkeypatch):
    monkeypatch.setitem(Source.kinds, "toy", f"{__name__}:Toy")
    written = {"sources": {"toys": {"toy": {"captions": {"said": 1.0}, "count": 6}}}, "image_sizes": [SIZE],
               "max_quarantined": 0.5}
    manifest = stage(load(DatasetParams, written))
    assert manifest["classes"] is None and manifest["quarantined"] == 2
    assert manifest["config"]["sources"] == written["sources"]
    assert manifest["sources"]["toys"]["captions"] == {"said": 1.0}
    rows = [row for shard in split_of(Path("out/shard/name"), "train").shards
            for row in pq.read_table(str(shard.file)).select(["key", "captions"]).to_pylist()]
    assert rows == [{"key": f"toys/{n}", "captions": [f"toy {n}"]} for n in (0, 1, 3, 4)]
    with pytest.raises(ConfigError, match="^toys have one size$"):
        load(DatasetParams, written | {"image_sizes": [16]})
    with pytest.raises(ConfigError, match=r"^sources.toys.toy: key: 'cuont' .*mean 'count'.*; valid: captions, count$"):
        load(DatasetParams, {"sources": {"toys": {"toy": {"cuont": 6}}}})


def test_paths_lead_into_the_main_checkout_of_an_experiment(stage, tmp_path, monkeypatch):
    make_plain(tmp_path / "main/data")
    place = tmp_path / "main/.dvc/tmp/exps/one"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    assert only(folder_params("data")).located() == ImageFolder(str(tmp_path / "main/data"))
    manifest = stage(folder_params("data"))
    assert manifest["config"]["sources"] == {"image_folder": {"image_folder": {"path": "data"}}}, "as it was written"
    assert digits.Digits().located() == digits.Digits()


def test_an_older_output_is_replaced(stage, tmp_path):
    params = folder_params(make_plain(tmp_path / "data"))
    Path("out/shard/name/deep").mkdir(parents=True)
    Path("out/shard/name/deep/old.parquet").touch()
    manifest = stage(params)
    assert {f["path"] for f in manifest["files"]} == {path.name for path in Path("out/shard/name").iterdir()} - {
        "identity", "manifest.json"}


def test_what_is_wrong_is_said_before_anything_is_made(stage, tmp_path):
    with pytest.raises(DatasetError, match="nowhere: No such file or directory"):
        stage(folder_params(tmp_path / "nowhere"))
    assert not Path("runs").exists() and not Path("out").exists()


def test_a_mistake_ends_the_command_with_one_line(stage, tmp_path):
    with pytest.raises(SystemExit, match=f"^shard: {tmp_path}/nowhere: No such file or directory; [^\n]*$"):
        runs.run_main("shard", lambda: stage(folder_params(tmp_path / "nowhere")))


def test_a_full_disk_is_noticed_before_ray_starts(tmp_path, monkeypatch):
    params = folder_params(make_plain(tmp_path / "data"), image_sizes=(1024,))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**7))
    monkeypatch.setattr(shard, "connect", lambda cluster: pytest.fail("Ray was started"))
    with pytest.raises(StorageError, match=r"make room on this disk; about 0.0 GB are needed, 0.0 GB are free"):
        list(shard.write_missing(shard.find_jobs(params)[1], params, None, Storage(None), tmp_path))
