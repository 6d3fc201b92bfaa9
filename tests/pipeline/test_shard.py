"""The shard stage without Ray: dealing, writing, what goes into the manifest, and how it fails and goes on."""

import dataclasses
import io
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import runs
from pipeline.batches import SCHEMA, open_split, read_images
from pipeline.datasets import DatasetError, Item, digits, image_folder
from pipeline.params import DatasetParams
from pipeline.stages import shard
from pipeline.storage import StorageError, check_file, read_manifest
from pixelgen.config import ConfigError
from pixelgen.images import adm_crop
from tests.pipeline.folders import SIZE, folder_params, make_bad, make_good, make_plain, picture

DIGITS = DatasetParams("digits", None, 16, 200, None, 0.0, 1.0, 3)


# ----------------------------------------------------------------------------------------------------- dealing


@given(st.lists(st.sampled_from(["train", "heldout"]), max_size=60), st.integers(1, 20), st.integers(0, 3))
def test_every_item_is_dealt_once_and_shards_are_even(splits, rows_per_shard, seed):
    items = [Item(f"k{n}", 0, split) for n, split in enumerate(splits)]
    shards = shard.deal(items, rows_per_shard, seed)
    assert sorted(i.key for part in shards.values() for i in part) == sorted(i.key for i in items)
    assert list(shards) == sorted(shards, key=lambda name: (name.startswith("heldout"), name))
    for split in ("train", "heldout"):
        sizes = [len(part) for name, part in shards.items() if name.startswith(split)]
        assert len(sizes) == -(-splits.count(split) // rows_per_shard)
        assert not sizes or (max(sizes) <= rows_per_shard and max(sizes) - min(sizes) <= 1)
        assert all(i.split == split for name, part in shards.items() if name.startswith(split) for i in part)
    assert shards == shard.deal(items, rows_per_shard, seed)


def test_each_shard_is_a_random_sample_of_all_classes():
    items = [Item(f"{label}/{n}", label, "train") for label in range(4) for n in range(250)]
    shards = shard.deal(items, 100, seed=0)
    assert list(shards)[:2] == ["train-00000.parquet", "train-00001.parquet"] and len(shards) == 10
    for part in shards.values():
        assert min(np.bincount([i.label for i in part], minlength=4)) >= 10  # 25 ± 4.1 expected
    assert shards != shard.deal(items, 100, seed=1)


# ----------------------------------------------------------------------------------------------------- writing


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    good = make_good(root / "data" / "good")
    bad = make_bad(root / "data" / "mixed", root / "outside")
    picture(7).save(root / "data" / "mixed" / "ok.png")
    return folder_params(root / "data"), good, bad


def test_a_shard_holds_the_crops_and_its_report(hostile, tmp_path):
    params, good, bad = hostile
    items = image_folder.listing(params)[1][::-1]
    assert shard.write_shard("a.parquet", items, params, tmp_path) == {"name": "a.parquet"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.schema.equals(SCHEMA)
    keys = table["key"].to_pylist()
    assert keys == [i.key for i in items if i.key.removeprefix("good/") in good or i.key == "mixed/ok.png"]
    assert "good/naïve ☃\n\t'\".bmp" in keys
    for key, label, png in zip(keys, table["label"].to_pylist(), table["image"].to_pylist(), strict=True):
        item = next(i for i in items if i.key == key)
        image = Image.open(io.BytesIO(png))
        assert (image.format, image.mode, image.size, label) == ("PNG", "RGB", (SIZE, SIZE), item.label)
        assert np.array_equal(image, adm_crop(image_folder.load(params, item), SIZE))
    report = shard.read_report(tmp_path / "a.parquet")
    assert report["labels"] == table["label"].to_pylist() and report["enlarged"] == 1
    assert {key for key, _ in report["rejected"]} == {f"mixed/{name}" for name in bad}


def test_a_shard_written_again_has_the_same_bytes(hostile, tmp_path):
    params, _, _ = hostile
    items = image_folder.listing(params)[1]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shard.write_shard("s.parquet", items, params, tmp_path / name)
        shard.write_shard("s.parquet", items, params, tmp_path / name)
    assert (tmp_path / "a" / "s.parquet").read_bytes() == (tmp_path / "b" / "s.parquet").read_bytes()


def test_digits_are_sharded_as_they_are_given(tmp_path):
    items = [i for i in digits.listing(DIGITS)[1] if i.split == "heldout"]
    shard.write_shard("s.parquet", items, DIGITS, tmp_path)
    table = pq.read_table(tmp_path / "s.parquet")
    images, labels = digits.digits("heldout", 16)
    assert table["label"].to_pylist() == labels.tolist()
    assert all(np.array_equal(Image.open(io.BytesIO(png)), image)
               for png, image in zip(table["image"].to_pylist(), images, strict=True))


def test_only_a_whole_shard_has_a_report(hostile, tmp_path):
    params, _, _ = hostile
    path = tmp_path / "s.parquet"
    assert shard.read_report(path) is None
    items = [i for i in image_folder.listing(params)[1] if i.key.startswith("mixed/cut")]
    shard.write_shard(path.name, items, params, tmp_path)
    assert shard.read_report(path)["labels"] == [] and len(shard.read_report(path)["rejected"]) == 6
    whole = path.read_bytes()
    for content in (b"", whole[:4], whole[:len(whole) // 2], whole[:-1], b"not a parquet file at all"):
        path.write_bytes(content)
        assert shard.read_report(path) is None


# ------------------------------------------------------------------------------------------------- the stage


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Runs the stage on changed parameters in an empty working directory, its tasks one after another."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "argv", ["shard", "name"])
    monkeypatch.setattr(runs, "code_hash", lambda stage: "code")
    monkeypatch.setattr(shard, "read_params", lambda: dataclasses.make_dataclass("P", ["datasets"])(chosen))
    monkeypatch.setattr(shard, "read_cluster", lambda: None)
    chosen: dict[str, DatasetParams] = {}
    written: list[str] = []
    stop_after: list[int] = []

    def one_by_one(shards, params, cluster, directory):
        for name, items in shards.items():
            if shard.read_report(directory / name) is None:
                if stop_after and len(written) == stop_after[0]:
                    raise KeyboardInterrupt
                written.append(name)
                shard.write_shard(name, items, params, directory)
            yield name, shard.read_report(directory / name)

    monkeypatch.setattr(shard, "write_missing", one_by_one)

    def run(params, stop=None):
        chosen["name"] = params
        written.clear()
        stop_after[:] = [] if stop is None else [stop]
        shard.main()
        return read_manifest(Path("out/shard/name"), "dataset")

    run.written = written
    return run


def test_the_manifest_counts_and_the_quarantine_list(stage, hostile):
    params, good, bad = hostile
    manifest = stage(dataclasses.replace(params, max_quarantined=0.7, heldout=0.3, rows_per_shard=3))
    out = Path("out/shard/name")
    train, heldout = (manifest["splits"][name] for name in ("train", "heldout"))
    assert manifest["image_size"] == SIZE and manifest["classes"] == ["good", "mixed"]
    assert train["rows"] + heldout["rows"] == len(good) + 1 and heldout["rows"] > 0
    assert [sum(pair) for pair in zip(train["per_class"], heldout["per_class"], strict=True)] == [len(good), 1]
    assert manifest["quarantined"] == len(bad) and manifest["enlarged"] == 1
    assert manifest["config"]["path"] == params.path and manifest["config"]["max_quarantined"] == 0.7
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == sorted(f"mixed/{name}" for name in bad)
    assert all(line["reason"] for line in lines)
    names = {"quarantine.jsonl", *(s["path"] for split in (train, heldout) for s in split["shards"])}
    assert {f["path"] for f in manifest["files"]} == names == {p.name for p in out.iterdir()} - {"manifest.json"}
    assert all(check_file(out, entry) for entry in manifest["files"])
    for name, split in (("train", train), ("heldout", heldout)):
        assert [s["rows"] for s in split["shards"]] == [len(labels) for _, labels in read_images(open_split(out, name))]
        labels = np.concatenate([labels for _, labels in read_images(open_split(out, name))])
        assert np.bincount(labels, minlength=2).tolist() == split["per_class"]
    assert not Path("runs/shard@name").exists()


def test_too_much_quarantine_stops_the_stage_and_a_higher_limit_goes_on(stage, hostile):
    params, _, bad = hostile
    params = dataclasses.replace(params, rows_per_shard=4, max_quarantined=0.3)
    with pytest.raises(DatasetError, match=r"(?s)\d+ of 38 items .* max_quarantined 0.3; .*mixed/") as caught:
        stage(params)
    listed = Path(next(word for word in str(caught.value).split() if "quarantine.jsonl" in word).rstrip(":"))
    reasons = {json.loads(line)["key"] for line in listed.read_text().splitlines()}
    assert 0.3 * 38 < len(reasons) < len(bad) and reasons < {f"mixed/{name}" for name in bad}
    assert not Path("out").exists()
    first = list(stage.written)
    manifest = stage(dataclasses.replace(params, max_quarantined=0.9))
    assert manifest["quarantined"] == len(bad)
    assert first and not set(first) & set(stage.written)  # what was done is not done again


def test_a_class_without_any_usable_image_stops_the_stage(stage, tmp_path):
    make_plain(tmp_path / "data", classes=2, each=20)
    (tmp_path / "data" / "owl").mkdir()
    (tmp_path / "data" / "owl" / "a.jpg").write_text("no owl")
    with pytest.raises(DatasetError, match=r'(?s)no training image is left of class owl; replace .*"owl/a\.jpg"'):
        stage(folder_params(tmp_path / "data", max_quarantined=0.5))
    assert not Path("out").exists()


def test_an_interrupted_stage_goes_on_and_gives_the_same_bytes(stage, tmp_path):
    params = folder_params(make_plain(tmp_path / "data", classes=3, each=10), heldout=0.2)
    stage(params)
    whole = {path.name: path.read_bytes() for path in Path("out/shard/name").iterdir()}
    shutil.rmtree("out")
    with pytest.raises(KeyboardInterrupt):
        stage(params, stop=3)
    run = next(Path("runs/shard@name").glob("*/*.parquet")).parent
    (run / ".train-00004.parquet.123.partial").write_bytes(b"half")
    (run / stage.written[1]).write_bytes(whole[stage.written[1]][:1000])
    done = list(stage.written)
    stage(params)
    assert set(stage.written) == {name for name in whole if name.endswith(".parquet")} - {done[0], done[2]}
    assert {path.name: path.read_bytes() for path in Path("out/shard/name").iterdir()} == whole


@pytest.mark.parametrize("change", ["params", "content", "more", "code"])
def test_other_inputs_start_afresh(stage, tmp_path, monkeypatch, change):
    params = folder_params(make_plain(tmp_path / "data", classes=2, each=10))
    with pytest.raises(KeyboardInterrupt):
        stage(params, stop=3)
    if change == "params":
        params = dataclasses.replace(params, image_size=16)
    elif change == "content":
        os.utime(tmp_path / "data" / "class0" / "000.png", ns=(0, 0))
    elif change == "more":
        picture(99).save(tmp_path / "data" / "class0" / "999.png")
    else:
        monkeypatch.setattr(runs, "code_hash", lambda stage: "other code")
    stage(params)
    assert len(stage.written) == 5 + (change == "more")


def test_a_file_that_goes_while_sharding_is_quarantined(stage, tmp_path, monkeypatch):
    params = folder_params(make_plain(tmp_path / "data", classes=2, each=10), max_quarantined=0.1)
    deal = shard.deal

    def deal_and_lose(*arguments):
        (tmp_path / "data" / "class0" / "003.png").unlink()
        return deal(*arguments)

    monkeypatch.setattr(shard, "deal", deal_and_lose)
    manifest = stage(params)
    assert manifest["quarantined"] == 1 and manifest["splits"]["train"]["rows"] == 19
    assert "class0/003.png" in Path("out/shard/name/quarantine.jsonl").read_text()


def test_an_older_output_is_replaced(stage, tmp_path):
    params = folder_params(make_plain(tmp_path / "data"))
    Path("out/shard/name/deep").mkdir(parents=True)
    Path("out/shard/name/deep/old.parquet").touch()
    manifest = stage(params)
    assert {f["path"] for f in manifest["files"]} == {path.name for path in Path("out/shard/name").iterdir()} - {
        "manifest.json"}


def test_what_is_wrong_is_said_before_anything_is_made(stage, tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match="nowhere: No such file or directory"):
        stage(folder_params(tmp_path / "nowhere"))
    monkeypatch.setattr(sys, "argv", ["shard", "nmae"])
    with pytest.raises(ConfigError, match="'nmae' is not known .did you mean 'name'"):
        stage(folder_params(tmp_path / "nowhere"))
    assert not Path("runs").exists() and not Path("out").exists()


def test_a_mistake_ends_the_command_with_one_line(stage, tmp_path):
    with pytest.raises(SystemExit, match=f"^shard: {tmp_path}/nowhere: No such file or directory; [^\n]*$"):
        runs.run_stage(lambda: stage(folder_params(tmp_path / "nowhere")))


def test_a_full_disk_is_noticed_before_ray_starts(tmp_path, monkeypatch):
    params = folder_params(make_plain(tmp_path / "data"), image_size=1024)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**7))
    monkeypatch.setattr(shard, "connect", lambda cluster: pytest.fail("Ray was started"))
    items = shard.deal(image_folder.listing(params)[1], 4, 0)
    with pytest.raises(StorageError, match=r"make room on this disk; about 0.0 GB are needed, 0.0 GB are free"):
        list(shard.write_missing(items, params, None, tmp_path))
