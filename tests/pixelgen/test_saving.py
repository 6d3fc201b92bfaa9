"""Checkpoints of a run: whole or not there, the right ones kept, none trusted unread."""

import json
from dataclasses import dataclass

import pytest
import torch

from pixelgen import saving as module
from pixelgen.checkpoint import read_state
from pixelgen.errors import StorageError
from pixelgen.recipe import RunConfig
from pixelgen.saving import Checkpoints, Writer, writing
from pixelgen.store import LocalStore


@dataclass
class State:
    """What a writer needs of a training state."""

    step: int
    weight: torch.Tensor

    def state_dict(self):
        return {"step": self.step, "optimizer": [{"weight": self.weight}, (1, "a")]}


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, LocalStore(tmp_path))


def save(checkpoints, *steps, keep=10, every=None):
    with writing(checkpoints, RunConfig(keep_checkpoints=keep, keep_every=every)) as writer:
        for step in steps:
            writer.save(State(step, torch.full((3,), float(step))), {})


def test_what_is_saved_is_what_was_there_at_the_time(checkpoints):
    state = State(5, torch.ones(3))
    writer = Writer(checkpoints, RunConfig(keep_checkpoints=1))
    writer.save(state, {})
    state.weight += 1  # the next step, before the file is written
    writer.wait()
    assert checkpoints.recover(100) == 5
    found = read_state(checkpoints.local(5))
    assert found["step"] == 5 and found["optimizer"][1] == (1, "a")
    assert found["optimizer"][0]["weight"].tolist() == [1, 1, 1]


def test_memory_of_one_copy_is_used_for_the_next(checkpoints):
    """And each file holds its own step, whatever becomes of the state and of the copy."""
    state, writer = State(1, torch.ones(3)), Writer(checkpoints, RunConfig(keep_checkpoints=9))
    places = []
    for step, weight in ((1, torch.ones(3)), (2, torch.full((3,), 2.0)), (3, torch.zeros(2, dtype=torch.bfloat16))):
        state.step, state.weight = step, weight
        writer.save(state, {})
        state.weight.fill_(9)
        writer.wait()
        places.append(writer.buffers["/optimizer/0/weight"].data_ptr())
    assert places[0] == places[1] and len(writer.buffers) == 1
    found = [read_state(checkpoints.local(step))["optimizer"][0]["weight"] for step in (1, 2, 3)]
    assert [w.tolist() for w in found] == [[1, 1, 1], [2, 2, 2], [0, 0]] and found[2].dtype == torch.bfloat16


@pytest.mark.parametrize(("keep", "every", "left"), [
    (1, None, [60]), (2, None, [50, 60]), (1, 20, [20, 40, 60]), (2, 25, [50, 60]),
    (9, None, [10, 20, 30, 40, 50, 60])])
def test_the_last_and_every_so_manieth_are_kept(checkpoints, keep, every, left):
    save(checkpoints, 10, 20, 30, 40, 50, 60, keep=keep, every=every)
    assert checkpoints.steps() == left
    assert [p.name for p in sorted(checkpoints.path(0).parent.glob("*.pt"))] == [f"step-{s:08}.pt" for s in left]


def test_a_shorter_run_leaves_what_lies_beyond(checkpoints):
    """And begins with what lies before its end."""
    save(checkpoints, 10, 20, 60, keep=10)
    assert (checkpoints.recover(59), checkpoints.recover(60), checkpoints.recover(9)) == (20, 60, None)
    save(checkpoints, 25, 30, keep=2)
    assert checkpoints.steps() == [25, 30, 60] and checkpoints.steps(30) == [25, 30]


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: b"", lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:]])
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_taken(checkpoints, damage):
    save(checkpoints, 10, 20)
    path = checkpoints.path(20)
    path.write_bytes(damage(path.read_bytes()))
    assert checkpoints.recover(100) == 10
    notes = checkpoints.store.read(module.NOTES).decode()
    assert "step-00000020.pt is not the checkpoint that was written" in notes
    assert notes.endswith("training goes on from step 10\n")
    assert checkpoints.steps() == [10] and path.with_suffix(".damaged").exists()


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"size": 3', b"\xff"])
def test_a_damaged_description_is_no_checkpoint(checkpoints, content):
    save(checkpoints, 10)
    checkpoints.path(10).with_name("step-00000010.pt.json").write_bytes(content)
    with pytest.raises(StorageError, match="damaged or missing"):
        checkpoints.local(10)
    assert checkpoints.recover(100) is None
    assert checkpoints.store.read(module.NOTES).endswith(b"training goes on from step 0\n")


def test_a_file_without_its_description_is_unfinished(checkpoints):
    save(checkpoints, 10, 20)
    description = checkpoints.path(20).with_name("step-00000020.pt.json")
    assert json.loads(description.read_text())["size"] == checkpoints.path(20).stat().st_size
    description.unlink()
    assert checkpoints.recover(100) == 10
    assert not checkpoints.path(20).exists(), "nothing would ever delete it"


class Far(LocalStore):
    """A store that is elsewhere."""

    remote = True


def test_what_an_earlier_life_has_left_on_another_machine_is_deleted(checkpoints, tmp_path):
    save(checkpoints, 10, 20)
    elsewhere = Checkpoints(tmp_path / "elsewhere", Far(tmp_path))
    assert elsewhere.recover(100) == 20 and elsewhere.path(20).exists()
    save(checkpoints, 30, 40, keep=2)
    assert elsewhere.recover(100) == 40 and not elsewhere.path(20).exists()


def test_a_full_disk_is_not_taken_for_damage(checkpoints, tmp_path, monkeypatch):
    def full(self, name, target):
        raise StorageError(f"{target}: No space left on device: make room on this disk")

    save(checkpoints, 10, 20)
    monkeypatch.setattr(Far, "fetch", full, raising=False)
    with pytest.raises(StorageError, match="No space left"):
        Checkpoints(tmp_path / "elsewhere", Far(tmp_path)).recover(100)
    assert checkpoints.steps() == [10, 20] and checkpoints.recover(100) == 20


def test_a_checkpoint_that_cannot_be_deleted_stops_nothing_and_is_told_of(checkpoints, monkeypatch):
    delete = LocalStore.delete

    def refuse(self, name):
        if "1.pt" in name:
            raise PermissionError(13, "Permission denied", name)
        delete(self, name)

    save(checkpoints, 1, 2, keep=2)
    checkpoints.store.write(module.NOTES, b"training goes on from step 0\n")
    monkeypatch.setattr(LocalStore, "delete", refuse)
    save(checkpoints, 3, keep=1)
    assert checkpoints.steps() == [1, 3]
    assert checkpoints.store.read(module.NOTES).decode() == (
        "training goes on from step 0\n"
        "old checkpoints stay that cannot be deleted: [Errno 13] Permission denied: "
        "'checkpoints/step-00000001.pt.json'\n")


def test_a_checkpoint_that_cannot_be_written_stops_the_training(checkpoints, monkeypatch):
    def full(content, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_state", full)
    writer = Writer(checkpoints, RunConfig(keep_checkpoints=1))
    writer.save(State(1, torch.ones(1)), {})
    with pytest.raises(OSError, match="No space left"):
        writer.save(State(2, torch.ones(1)), {})
    with pytest.raises(OSError, match="No space left"), writing(checkpoints, RunConfig(keep_checkpoints=1)) as writer:
        writer.save(State(1, torch.ones(1)), {})
    assert checkpoints.steps() == []
