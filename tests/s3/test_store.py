"""Storage under an S3 root, on a real server, through a network that fails."""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pipeline import storage as storage_module
from pipeline import store as store_module
from pipeline import verify as verify_module
from pipeline.runs import lease
from pipeline.storage import Storage, fresh_directory, read_sealed, write_sealed
from pipeline.store import S3Store, open_store, preflight, valid_root
from pixelgen.checkpoint import read_state
from pixelgen.data.feed import MixedSource, Plan, read_rows
from pixelgen.data.order import WINDOW
from pixelgen.data.shards import describe_pieces, encode_shard
from pixelgen.errors import StorageError, UserError
from pixelgen.manifest import IDENTITY, MANIFEST
from pixelgen.recipe import RunConfig
from pixelgen.saving import Checkpoints, writing
from pixelgen.store import LocalStore
from tests.s3.proxy import Answer, error, flip_bit, hold, lose_answer, reset, reset_in_body, truncate

MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def fresh_client(monkeypatch):
    """A client of this test's environment, that does not wait long between attempts."""
    store_module.client.cache_clear()
    monkeypatch.setattr(store_module, "PATIENCE", 1.0)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
    monkeypatch.setattr(store_module, "ATTEMPTS", 4)
    yield
    store_module.client.cache_clear()


@pytest.fixture
def root(s3, faults):
    """A storage root, behind the proxy `faults`."""
    return f"{s3.url}/team/run"


@pytest.fixture(params=["directory", "s3"])
def store(request, tmp_path):
    """Both kinds: what holds for one holds for the other."""
    return LocalStore(tmp_path / "store") if request.param == "directory" else open_store(
        request.getfixturevalue("root"))


def test_a_store_keeps_what_is_written(store, tmp_path):
    assert store.sizes() == {} and store.size("a") is None
    (tmp_path / "file").write_bytes(b"from a file")
    store.write("deep/b c/ü", tmp_path / "file")
    store.write("a", b"")
    store.write("a", b"second")
    assert store.read("deep/b c/ü") == b"from a file" and store.read("a") == b"second"
    assert store.sizes() == {"a": 6, "deep/b c/ü": 11} and store.sizes("deep/") == {"deep/b c/ü": 11}
    assert store.size("a") == 6 and store.size("deep") is None
    store.fetch("a", tmp_path / "fetched")
    assert (tmp_path / "fetched").read_bytes() == b"second"
    store.delete("a")
    store.delete("a")
    assert store.sizes() == {"deep/b c/ü": 11}
    with pytest.raises(FileNotFoundError):
        store.read("a")
    with pytest.raises(FileNotFoundError):
        store.fetch("a", tmp_path / "none")
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["fetched", "file"]


@pytest.mark.parametrize("fault", [error(503, "SlowDown"), error(500, "InternalError"), reset, lose_answer])
@pytest.mark.parametrize("method", ["PUT", "GET"])
def test_a_passing_failure_is_overcome(root, faults, method, fault):
    store = open_store(root)
    store.write("before", b"x" * 1000)
    faults.add(fault, method=method, times=3)
    store.write("name", b"content")
    assert store.read("name") == b"content" and store.sizes() == {"before": 1000, "name": 7}
    assert faults.count(method) >= 4


def test_a_part_is_read_and_nothing_else(store):
    store.write("name", bytes(range(100)))
    assert store.read("name", 20, 70) == bytes(range(20, 70)) and store.read("name", 90) == bytes(range(90, 100))
    assert store.read("name", 0, 1) == b"\0"


@pytest.mark.parametrize("fault", [truncate, reset_in_body])
@pytest.mark.parametrize("part", [(0, None), (MEGABYTE, None), (MEGABYTE, 2 * MEGABYTE)])
def test_a_broken_part_is_gone_on_with(root, faults, fault, part):
    store, content = open_store(root), os.urandom(3 * MEGABYTE)
    store.write("large", content)
    faults.add(fault, method="GET", path="/large", times=2)
    assert store.read("large", *part) == content[slice(*part)]
    assert faults.count("GET", "/large") == 3


@pytest.mark.parametrize("fault", [truncate, reset_in_body])
def test_a_broken_answer_is_gone_on_with(root, faults, fault, tmp_path):
    store, content = open_store(root), os.urandom(3 * MEGABYTE)
    store.write("large", content)
    faults.clear()
    faults.add(fault, method="GET", path="/large", times=2)
    store.fetch("large", tmp_path / "large")
    assert (tmp_path / "large").read_bytes() == content
    assert faults.count("GET", "/large") == 3
    faults.add(fault, method="GET", path="/large")
    with pytest.raises(StorageError, match=r"large: .*run again: finished work is kept"):
        for _ in range(10):  # every attempt brings half of the rest
            store.fetch("large", tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["large"]


def test_a_server_that_does_not_answer_is_given_up_on(root, faults):
    store = open_store(root)
    faults.add(hold, path="/name")
    with pytest.raises(StorageError, match=r"name: .*AWS_ENDPOINT_URL.*run again"):
        store.write("name", b"x")
    faults.release()
    assert faults.count("PUT") == store_module.ATTEMPTS


@pytest.mark.parametrize(("code", "remedy"), [
    ("ExpiredToken", "renew them and run again, finished work is kept"),
    ("InvalidAccessKeyId", "check AWS_ACCESS_KEY_ID"), ("AccessDenied", "allow s3:ListBucket"),
    ("RequestTimeTooSkewed", "synchronise it"), ("SignatureDoesNotMatch", "check AWS_SECRET_ACCESS_KEY")])
def test_what_time_does_not_heal_is_explained_at_once(root, faults, code, remedy):
    faults.add(error(403, code))
    with pytest.raises(StorageError, match=rf"{root}/name: .*{code}.*{remedy}"):
        open_store(root).write("name", b"x")
    assert faults.count() == 1


def test_a_server_that_stays_overloaded_is_named(root, faults):
    faults.add(error(503, "SlowDown"))
    with pytest.raises(StorageError, match=r"name: .*SlowDown.*overloaded"):
        open_store(root).read("name")
    assert faults.count("GET") == store_module.ATTEMPTS


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """A file of three parts, of which S3 wants all but the last to have 5 MiB."""
    monkeypatch.setattr(store_module, "PART", 5 * MEGABYTE)
    (tmp_path / "large").write_bytes(os.urandom(11 * MEGABYTE))
    return tmp_path / "large"


def test_an_interrupted_upload_goes_on_with_the_missing_parts(root, faults, parts):
    store = open_store(root)
    faults.add(error(403, "ExpiredToken"), method="PUT", path="partNumber=3")
    with pytest.raises(StorageError, match="ExpiredToken"):
        store.write("large", parts)
    assert store.sizes() == {}, "nothing may be seen of an unfinished upload"
    faults.__init__(faults.endpoint)
    store.write("large", parts)
    assert faults.count("PUT", "partNumber=3") == faults.count("PUT", "partNumber") == 1
    assert store.read("large") == parts.read_bytes()


def test_parts_of_another_content_are_sent_again(root, faults, parts):
    store = open_store(root)
    faults.add(error(403, "ExpiredToken"), method="POST", path="uploadId=", times=1)
    with pytest.raises(StorageError, match="ExpiredToken"):
        store.write("large", parts)
    content = bytearray(parts.read_bytes())
    content[7 * MEGABYTE] ^= 1
    parts.write_bytes(content)
    faults.clear()
    store.write("large", parts)
    assert faults.count("PUT", "partNumber") == faults.count("PUT", "partNumber=2") == 1
    assert store.read("large") == content


def test_the_preflight_tells_what_is_wrong(s3, root, faults, monkeypatch):
    assert preflight(root) == f"{root} is writable, versioning off"
    assert open_store(root).sizes() == {}
    with pytest.raises(StorageError, match=r"no-such-bucket.*create the bucket, or correct storage\.root"):
        preflight("s3://no-such-bucket/x")
    faults.add(error(403, "AccessDenied"), method="PUT")
    with pytest.raises(StorageError, match="allow s3:"):
        preflight(root)
    faults.clear()
    faults.add(flip_bit, method="GET", path="preflight/")
    with pytest.raises(StorageError, match="what was written is not what is read back"):
        preflight(root)
    faults.clear()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    store_module.client.cache_clear()
    with pytest.raises(StorageError, match="403|SignatureDoesNotMatch"):
        preflight(root)


def test_versioning_may_be_nobody_s_business(root, faults):
    faults.add(error(403, "AccessDenied"), path=r"\?versioning")
    assert preflight(root) == f"{root} is writable, versioning unknown"


def test_a_wrong_clock_is_noticed(root, monkeypatch):
    class Later(store_module.datetime.datetime):
        @classmethod
        def now(cls, zone=None):
            return super().now(zone) + store_module.datetime.timedelta(seconds=600)

    monkeypatch.setattr(store_module.datetime, "datetime", Later)
    with pytest.raises(StorageError, match=r"clock is (599|600|601) s off .*synchronise"):
        preflight(root)


def test_versions_that_will_pile_up_are_mentioned(root, faults):
    body = b"<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>"  # the server here has none
    faults.add(lambda exchange: exchange.answer(Answer(200, [("Content-Length", str(len(body)))], body)),
               path=r"\?versioning")
    assert "versioning enabled; old versions of deleted checkpoints are kept" in preflight(root)


@pytest.mark.parametrize(("location", "valid"), [
    ("s3://bucket", True), ("s3://my-bucket.eu/a/b_c.d", True), ("s3://", False), ("s3://Bucket/x", False),
    ("bucket/x", False), ("s3://bucket/../x", False), ("s3://bucket/a//b", False), ("s3://bucket/a/", False),
    ("s3://bucket/.", False), ("https://bucket/a", False), ("s3://bucket/a b", False)])
def test_roots(location, valid):
    assert valid_root(location) == valid


# ---------------------------------------------------------------------------------------------------- artifacts


@pytest.fixture
def published(root, tmp_path, monkeypatch):
    """out/model in a fresh working directory, published under the root."""
    monkeypatch.chdir(tmp_path)
    directory = fresh_directory(Path("out/model"))
    (directory / "deep").mkdir()
    (directory / "a.bin").write_bytes(b"first")
    (directory / "deep" / "b.bin").write_bytes(b"second")
    Storage(root).publish(directory, "model", {"size": 3}, run="runs/train/0123456789abcdef", steps=7)
    return directory


def test_only_the_manifest_comes_back(root, published):
    assert sorted(p.name for p in published.iterdir()) == [IDENTITY, MANIFEST]
    names = [*open_store(root).sizes()]
    artifact = Storage(root).open(published, "model")
    assert sorted(n for n in names if n.startswith("objects/")) == sorted(
        f"objects/{f['sha256'][:2]}/{f['sha256']}" for f in artifact["files"])
    assert [n for n in names if n.startswith("manifests/model-")] == names[:1] and len(names) == 3
    folder = artifact.local()
    assert (folder / "a.bin").read_bytes() == b"first" and (folder / "deep/b.bin").read_bytes() == b"second"
    assert artifact["steps"] == 7
    for entry in artifact["files"]:
        assert artifact.file(entry).read() == (folder / entry["path"]).read_bytes()


def test_what_is_there_is_neither_sent_nor_fetched_again(root, faults, published):
    folder = Storage(root).open(published, "model").local()
    manifest = (published / MANIFEST).read_bytes()
    shutil.copytree(folder, published, dirs_exist_ok=True)
    faults.clear()
    Storage(root).publish(published, "model", {"size": 3}, run="runs/train/0123456789abcdef", steps=7)
    assert (published / MANIFEST).read_bytes() == manifest
    assert faults.count("PUT", "objects/") == 0
    Storage(root).open(published, "model").local()
    assert faults.count("GET", "objects/[0-9a-f]{2}/") == 0
    (folder / "a.bin").write_bytes(b"fyrst")
    assert (Storage(root).open(published, "model").local() / "a.bin").read_bytes() == b"first"


def test_a_failed_publication_leaves_no_manifest_and_goes_on(root, faults, published):
    (published / MANIFEST).unlink()
    for name in ("c.bin", "d.bin"):
        (published / name).write_bytes(name.encode())
    faults.add(error(403, "ExpiredToken"), method="PUT", path="manifests/", times=1)
    with pytest.raises(StorageError, match="renew them"):
        Storage(root).publish(published, "model", {})
    with pytest.raises(StorageError, match="unfinished"):
        Storage(root).open(published, "model")
    faults.clear()
    Storage(root).publish(published, "model", {})
    assert faults.count("PUT", "objects/") == 0 and faults.count("PUT", "manifests/") == 1
    assert len(Storage(root).open(published, "model")["files"]) == 2


def test_a_manifest_leads_nowhere_but_to_the_root(root, published):
    for other in (None, "s3://elsewhere/x"):
        with pytest.raises(StorageError, match=r"storage\.root is .*set it to that, or delete"):
            Storage(other).open(published, "model")


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_missing_or_changed_object_is_named(s3, root, published, damage):
    artifact = Storage(root).open(published, "model")
    entry = artifact["files"][0]
    key = {"Bucket": s3.name, "Key": f"team/run/{storage_module.object_name(entry['sha256'])}"}
    if damage == "missing":
        s3.client().delete_object(**key)
    else:
        s3.client().put_object(**key, Body=b"fyrst")
    word = {"missing": "is not there, but a manifest's", "changed": "is not what its name says"}[damage]
    with pytest.raises(StorageError, match=rf"{word}.*pipeline\.verify"):
        artifact.local()
    problems = verify_module.verify(Storage(root)).problems
    assert len(problems) == 1 and problems[0].startswith(damage) and entry["path"] in problems[0]
    assert verify_module.verify(Storage(root), sizes=True).problems == (problems if damage == "missing" else [])


@pytest.fixture
def dataset(root, tmp_path, monkeypatch):
    """A dataset of 12 shards of 300 rows, under the root."""
    monkeypatch.chdir(tmp_path)
    folder, shards = fresh_directory(Path("out/shard/large")), []
    for number in range(12):
        data = encode_shard([{"key": f"{number}-{n}", "image": os.urandom(500), "label": n} for n in range(300)])
        (folder / f"{number}.parquet").write_bytes(data)
        shards.append({"path": f"{number}.parquet", "rows": 300, "size": 8, "pieces": describe_pieces(data)})
    Storage(root).publish(folder, "dataset", {}, sources={"all": {"splits": {"train": {"shards": shards}}}})
    return Storage(root).open(folder, "dataset")


@pytest.mark.parametrize("threads", [0, 4])
def test_the_server_sends_hardly_more_than_the_rows_that_are_used(dataset, faults, threads):
    """Each of 12 lanes has 300 rows, and takes 16 of them in each window."""
    sent, split = [], dataset.split("train")

    def count(exchange):
        answer = exchange.forward()
        sent.append(len(answer.body))
        exchange.answer(answer)

    faults.add(count, method="GET", path="objects/")
    rows = [*read_rows(Plan((MixedSource(split),), 8, 0, 12, 12), range(12), 0, 15 * WINDOW, threads)]
    assert len({row.key for row in rows}) == len(rows) == 12 * 15 * WINDOW
    of_a_row = sum(file["size"] for file in dataset["files"]) / split.total
    assert 1 <= sum(sent) / (len(rows) * of_a_row) < 2


@pytest.mark.parametrize(("fault", "told"), [
    (flip_bit, "row group 2 of {}.* is not what the manifest describes .sha256 differs.: delete that object and"),
    (error(404, "NoSuchKey"), "{}.* is in the manifest but not there.* `dvc repro --force --single-item shard@large`"),
    (error(416, "InvalidRange"), "{}.*; it is shorter than what was written: `python -m pipeline.verify`")])
def test_a_damaged_object_is_named_with_its_row_group(dataset, faults, fault, told, root):
    split = dataset.split("train")
    footer = split.footer(5)
    faults.add(fault, method="GET", path="objects/")
    with pytest.raises(UserError, match=told.format(root)):
        split.read_group(5, 2, footer)


def test_verify_finds_orphans_and_prunes_only_old_ones(root, published, monkeypatch, capsys):
    store, run = open_store(root), "0123456789abcdef"
    unsent = {"path": "x", "sha256": "ab" * 32}
    write_sealed(store, f"runs/shard/{run}/reports/d-0.json", json.dumps({"shards": [{"file": unsent}]}).encode())
    store.write(storage_module.object_name("ab" * 32), b"a shard whose stage goes on")
    store.write(storage_module.object_name("cd" * 32), b"nobody's")
    store.write(f"runs/train/{run}/curve.csv", b"of the model")
    store.write("runs/train/fedcba9876543210/curve.csv", b"of a run that was given up")
    for marker in ("runs/", "runs/train/"):  # which pyarrow leaves, and which must not stand for all below
        store.write(marker, b"")
    Path("runs/sample/fedcba9876543210").mkdir(parents=True)
    (Path("runs/shard/driver.lease")).parent.mkdir()
    Path("runs/shard/driver.lease").write_text("1 1.0")
    found = verify_module.verify(Storage(root))
    left = verify_module.orphans(Storage(root))
    gone = [f"{root}/runs/train/fedcba9876543210", f"{root}/objects/cd/{'cd' * 32}", f"{root}/runs/shard/{run}",
            "runs/sample/fedcba9876543210"]
    assert found.files == 2 and found.problems == [] and sorted(left) == sorted(gone)
    before = store.sizes()
    verify_module.prune(Storage(root), left, delete=True)
    assert store.sizes() == before and "0 of 4 orphans are older than 7 days" in capsys.readouterr().out
    monkeypatch.setattr(verify_module, "DAYS", -1.0)
    verify_module.prune(Storage(root), left, delete=False)
    assert store.sizes() == before and f"would delete {gone[0]}" in capsys.readouterr().out
    with lease(Path("runs/sample/fedcba9876543210/driver.lease"), patience=0):  # taken up again since
        verify_module.prune(Storage(root), left, delete=True)
    assert Path("runs/sample/fedcba9876543210").exists()
    assert before.keys() - store.sizes().keys() == {
        "runs/train/fedcba9876543210/curve.csv", storage_module.object_name("cd" * 32),
        f"runs/shard/{run}/reports/d-0.json"}
    verify_module.prune(Storage(root), verify_module.orphans(Storage(root)), delete=True)
    assert not Path("runs/sample/fedcba9876543210").exists()


def test_nothing_is_an_orphan_while_a_manifest_cannot_be_read(root, published, capsys):
    """It may refer to anything: here to the only objects that there are."""
    store = open_store(root)
    (name,) = store.sizes("manifests/")
    shutil.rmtree(published)
    assert verify_module.orphans(Storage(root)) == {}
    store.write(name, store.read(name).replace(b"model", b"modem"))
    found = verify_module.verify(Storage(root))
    assert found.problems == [f"changed: {root}/{name}"] and found.files == 0
    assert verify_module.orphans(Storage(root)) == {}
    assert "a manifest cannot be read" in capsys.readouterr().out


def test_uploads_that_were_broken_off_are_orphans(root, published, parts, faults, monkeypatch):
    store = open_store(root)
    faults.add(error(403, "AccessDenied"), method="PUT", path="partNumber=3")
    with pytest.raises(StorageError):
        store.write("large", parts)
    faults.clear()
    ((name, upload, _),) = store.uploads()
    left = verify_module.orphans(Storage(root))
    assert name == "large" and list(left) == [f"{root}/large, upload {upload}"]
    monkeypatch.setattr(verify_module, "DAYS", -1.0)
    verify_module.prune(Storage(root), left, delete=True)
    assert store.uploads() == []


def test_storage_that_fails_is_not_taken_for_damage(root, published, faults):
    faults.add(error(403, "ExpiredToken"), method="GET", path="/objects/")
    with pytest.raises(StorageError, match="the credentials have expired"):
        verify_module.verify(Storage(root))


def test_a_damaged_part_is_made_again(store):
    write_sealed(store, "part-1", b"content")
    assert read_sealed(store, "part-1") == b"content"
    data = bytearray(store.read("part-1"))
    data[-1] ^= 1
    store.write("part-1", bytes(data))
    with pytest.raises(StorageError, match=r"part-1 .*damaged and is deleted: run `dvc repro` again"):
        read_sealed(store, "part-1")
    assert store.sizes() == {}


# -------------------------------------------------------------------------------------------------- checkpoints


@dataclass
class State:
    step: int

    def state_dict(self):
        return {"step": self.step, "weight": torch.full((3,), float(self.step))}


def test_another_machine_goes_on_from_the_newest_checkpoint(root, faults, tmp_path):
    store = open_store(f"{root}/runs/train/0123456789abcdef")
    here, there = (Checkpoints(tmp_path / name, store) for name in ("here", "there"))
    (tmp_path / "curve.csv").write_text("step\n1\n")
    with writing(here, RunConfig(keep_checkpoints=2)) as writer:
        for step in (10, 20, 30):
            writer.save(State(step), {"curve.csv": tmp_path / "curve.csv"})
    assert here.steps() == there.steps() == [20, 30] and store.read("curve.csv") == b"step\n1\n"
    assert there.recover(99) == 30 and read_state(there.local(30))["weight"].tolist() == [30, 30, 30]
    faults.clear()
    there.local(30)
    assert faults.count("GET", r"30\.pt$") == 0, "it was there already"
    there.path(30).write_bytes(b"damaged")
    assert read_state(there.local(30))["step"] == 30
    store.write("checkpoints/step-00000030.pt", b"damaged")
    there.path(30).write_bytes(b"damaged")
    assert there.recover(99) == 20


def test_training_goes_on_while_a_checkpoint_is_on_its_way(root, faults, tmp_path):
    checkpoints = Checkpoints(tmp_path, open_store(root))
    faults.add(hold, "PUT", r"step-00000010\.pt$", times=1)
    with writing(checkpoints, RunConfig(keep_checkpoints=1)) as writer:
        writer.save(State(10), {})
        while not faults.count("PUT", r"step-00000010\.pt$"):
            time.sleep(0.01)
        assert writer.thread.is_alive() and checkpoints.steps() == []  # and here are the next steps
        faults.release()
    assert checkpoints.steps() == [10]


def test_an_upload_that_fails_stops_the_training_with_its_reason(root, faults, tmp_path):
    checkpoints = Checkpoints(tmp_path, open_store(root))
    faults.add(error(403, "ExpiredToken"), method="PUT", path=r"\.json")
    with pytest.raises(StorageError, match="renew them"), writing(checkpoints, RunConfig(keep_checkpoints=1)) as writer:
        writer.save(State(1), {})
    assert checkpoints.steps() == []
    assert isinstance(checkpoints.store, S3Store)
