"""The training stage and its ranks: what is recorded, what ends a run, and how it goes on."""

import dataclasses
import itertools
import json
import math
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline import runs
from pipeline.cluster import Cluster
from pipeline.params import read_params
from pipeline.rank import Run
from pipeline.stage import Stage
from pipeline.stages import train as stage
from pipeline.storage import Storage, fresh_directory
from pixelgen import rank, recorders
from pixelgen.checkpoint import read_state
from pixelgen.config import ConfigError, MemoryConfig
from pixelgen.denoisers.jit import SIZES
from pixelgen.errors import StorageError, UserError
from pixelgen.objective import Objective
from pixelgen.recorders import Curve, Grids, Saves, grids_upto, upto
from pixelgen.samplers.heun import Heun
from pixelgen.saving import NOTES, Checkpoints, writing
from pixelgen.store import LocalStore
from pixelgen.train import NonFiniteError, Step, create_state
from tests.pixelgen.conftest import (
    CLASSES,
    NO_TERMS,
    StandInDino,
    lane_batch,
    objective_config,
    tiny_config,
    tiny_denoiser,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def params():
    train = read_params(ROOT / "params.yaml").train["c2i"]
    return changed(train, steps=4, batch_size=4, checkpoint_every=2, grid_every=None, log_every=1)


def changed(params, **change):
    """With other values of fields of fit and run."""
    parts = {part: {name: value for name, value in change.items() if hasattr(getattr(params, part), name)}
             for part in ("fit", "run")}
    return dataclasses.replace(params, **{part: dataclasses.replace(getattr(params, part), **values)
                                          for part, values in parts.items()})


def training(recipe, directory):
    """Without data and networks."""
    return rank.Training(recipe, directory, LocalStore(directory), None, None, None, MemoryConfig())


@pytest.fixture
def directory_of(params, monkeypatch, tmp_path):
    """The run directory that `prepare` gives parameters; its inputs are always the same."""
    monkeypatch.setattr(Run, "plan", SimpleNamespace(order=SimpleNamespace(check=lambda: None)))
    storage = Storage(None)
    for name in ("networks", "shard/digits"):
        directory = fresh_directory(tmp_path / "out" / name)
        storage.publish(directory, "networks" if name == "networks" else "dataset", {}, classes=[*range(10)])
    monkeypatch.chdir(tmp_path)
    cluster = Cluster(None, 1, 1.0, 0.0, 1, 0, 1, None)
    return lambda params, key="c2i": stage.prepare(
        Stage("train", key, SimpleNamespace(train={key: params}), cluster, storage)).directory


def test_a_training_of_an_earlier_version_is_not_begun_anew_beside_it(directory_of, params, tmp_path):
    old = tmp_path / "runs/train@c2i/0123456789abcdef"
    (old / "checkpoints").mkdir(parents=True)
    with pytest.raises(StorageError, match="an earlier version: .* move it to") as refused:
        directory_of(params)
    new = tmp_path / re.search("move it to ([^ ,]+)", str(refused.value))[1]
    assert not new.exists() and str(old.relative_to(tmp_path)) in str(refused.value)
    old.rename(new)
    assert directory_of(params) == new


def test_a_run_may_be_shortened_and_lengthened(params, monkeypatch, tmp_path):
    """Steps 0 to 8 are one run, however far it is to go each time: it ends where an undisturbed one of so many steps
    ends, and what lies beyond is kept."""
    def lane_batches(plan, lanes, start, *_):
        for step in itertools.count(start):
            steps.append(step)
            yield [lane_batch(step, lane) for lane in lanes]

    def run_rank(directory, count):
        directory.mkdir(exist_ok=True)
        recipe = changed(params, steps=count, checkpoint_every=3, keep_checkpoints=1)
        goal = Objective(objective_config(**NO_TERMS), 8, torch.tensor(4), {})
        state = create_state(tiny_config(), goal, params.optimizer, 0, torch.device("cpu"))
        run = training(recipe, directory)
        steps.clear()
        if not run.done:
            rank.fit_rank(run, state, goal, CLASSES, range(2), torch.device("cpu"), nullcontext(), writes=True)
        assert run.unfinished() is None and run.done
        return run, read_state(run.checkpoints.local(count))

    monkeypatch.setattr(rank, "lane_batches", lane_batches)
    steps: list = []
    ends = {count: run_rank(tmp_path / f"undisturbed-{count}", count)[1] for count in (2, 5, 8)}
    for count, trained in (5, [0, 1, 2, 3, 4]), (8, [5, 6, 7]), (2, [0, 1]), (5, [2, 3, 4]), (8, []):
        run, end = run_rank(tmp_path / "run", count)
        assert steps == trained
        for name, tensor in ends[count]["model"].items():
            assert torch.equal(tensor, end["model"][name])
        curve = upto((tmp_path / "run/curve.csv").read_text(), count)
        assert [line.split(",")[0] for line in curve.splitlines()] == ["step", *map(str, range(1, count + 1))]
    assert run.checkpoints.steps() == [5, 8]
    assert [line.split(",")[0] for line in (tmp_path / "run/curve.csv").read_text().splitlines()[1:]] == [*"12345678"]


def test_checkpoints_that_will_not_fit_are_noticed_before_training(params, monkeypatch, tmp_path):
    """12 bytes for each parameter that is trained, 4 for each averaged."""
    config = objective_config(repa_block=0, pdino_block=1, lpips_weight=0, balance_start=None)
    goal = Objective(config, 8, torch.tensor(4), {"dino": StandInDino()})
    state = create_state(tiny_config(), goal, params.optimizer, 0, torch.device("cpu"))
    free = [0.0]
    monkeypatch.setattr(rank.shutil, "disk_usage", lambda _: SimpleNamespace(free=free[0]))

    def check(**change):
        rank.check_room(state, changed(params, **change), tmp_path)

    one = 12 * rank.count(state.model) + 4 * rank.count(state.model.denoiser)
    assert state.model.projector and 12 * rank.count(state.model.projector) < one
    free[0] = 3 * one - 1
    with pytest.raises(StorageError, match=r"make room .*3 checkpoints of 0\.0 GB are to lie here.*0\.\d GB are free"):
        check(keep_checkpoints=2)
    run = training(changed(params, keep_checkpoints=2), tmp_path)
    with pytest.raises(StorageError, match="make room"):
        rank.fit_rank(run, state, goal, CLASSES, range(2), torch.device("cpu"), nullcontext(), writes=True)
    free[0] = 3 * one
    check(keep_checkpoints=2)
    with pytest.raises(StorageError, match="5 checkpoints"):
        check(keep_checkpoints=2, keep_every=2, steps=4)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.pt").write_bytes(b"." * 1000)
    free[0] = 3 * one - 1000
    check(keep_checkpoints=2)
    (tmp_path / "checkpoints" / "step-00000001.pt").rename(tmp_path / "checkpoints" / "step-00000005.pt")
    with pytest.raises(StorageError, match="make room"):  # of a longer run: it stays
        check(keep_checkpoints=2, steps=4)
    check(keep_checkpoints=2, steps=5)


@pytest.mark.parametrize("change", [
    {"checkpoint_every": 1}, {"keep_checkpoints": 9}, {"keep_every": 9}, {"log_every": 2}, {"grid_every": 2},
    {"on_nonfinite": "skip(10)"}, {"grid_sampler": Heun(3)}, {"steps": 5},
], ids=str)
def test_a_run_goes_on_when_what_no_update_depends_on_is_changed(directory_of, params, change):
    assert directory_of(changed(params, **change)) == directory_of(params)


def test_a_run_is_known_by_its_meaning(directory_of, params, tmp_path, monkeypatch):
    """Not by the names that its key, its dataset and the model it starts from have in params.yaml."""
    shutil.copytree(tmp_path / "out/shard/digits", tmp_path / "out/shard/renamed")
    renamed = dataclasses.replace(params, dataset="renamed")
    assert directory_of(renamed) == directory_of(params, key="another")
    manifest = json.loads((tmp_path / "out/shard/renamed/manifest.json").read_text())
    monkeypatch.setitem(SIZES, "mine", SIZES["demo/16"])
    mine = dataclasses.replace(params, denoiser=dataclasses.replace(params.denoiser, size="mine"))
    assert directory_of(mine) == directory_of(params), "an architecture counts, not its name"
    monkeypatch.setitem(SIZES, "mine", SIZES["demo/16"] | {"mlp_ratio": 3.0})
    assert directory_of(mine) != directory_of(params)
    for change, same in ({"versions": {"torch": "3.0"}}, True), ({"classes": [*range(9)]}, False):
        (tmp_path / "out/shard/renamed/manifest.json").write_text(json.dumps(manifest | change))
        assert (directory_of(renamed) == directory_of(params)) == same


def test_data_has_at_most_the_classes_of_the_denoiser(params):
    plan = SimpleNamespace(order=SimpleNamespace(check=lambda: None))
    text = read_params(ROOT / "params.yaml").train["sft"]
    rank.check_data(params, {"classes": [*range(10)]}, plan, "digits")
    rank.check_data(text, {"classes": None}, plan, "scenes")
    with pytest.raises(ConfigError, match="denoiser.num_classes 10: dataset digits has 11 classes"):
        rank.check_data(params, {"classes": [*range(11)]}, plan, "digits")


def test_the_order_in_which_sources_stand_is_no_part_of_the_order_of_images(params):
    sources = {name: {"captions": {"txt": 1.0}} for name in "bca"}
    for mixture in None, {"c": 1.0, "a": 2.0}:
        plans = [rank.plan_of(dataclasses.replace(params, mixture=given), dict(reversed(sources.items())) if given else
                              listed, lambda name, size: SimpleNamespace(total=ord(name)))
                 for given, listed in ((mixture, sources),
                                       (mixture and dict(reversed(mixture.items())), dict(sorted(sources.items()))))]
        assert [source.share for source in plans[0].sources] == [source.share for source in plans[1].sources]
        assert [source.split.total for source in plans[0].sources] == [ord(c) for c in ("ac" if mixture else "abc")]


def test_a_network_for_the_evaluation_alone_retrains_nothing(directory_of, params, tmp_path):
    """Training is known by those of the frozen networks that its objective has."""
    networks, before = tmp_path / "out/networks", directory_of(params)

    def with_files(*names):
        for name in names:
            (networks / name).mkdir(exist_ok=True)
            (networks / name / "model.safetensors").write_bytes(b"weights")
        Storage(None).publish(networks, "networks", {})
        return directory_of(params)

    assert with_files("clip", "text") == before
    assert with_files("dino") != before


def test_a_run_that_goes_on_under_other_versions_says_so(directory_of, params, capsys):
    directory = directory_of(params)
    for _ in range(2):
        with runs.working(directory):
            assert capsys.readouterr().err == ""
    versions = json.loads((directory / "versions.json").read_text())
    (directory / "versions.json").write_text(json.dumps(versions | {"torch": "2.0"}))
    with runs.working(directory):
        assert f"{directory.name} was begun under torch 2.0, now {versions['torch']}: " in capsys.readouterr().err


@pytest.mark.parametrize("change", [
    {"batch_size": 8}, {"lanes": 4}, {"seed": 1}, {"ema_decay": 0.5}, {"precision": "bf16"},
    {"compile": True},
], ids=str)
def test_a_run_starts_afresh_when_its_updates_change(directory_of, params, change):
    assert directory_of(changed(params, **change)) != directory_of(params)
    other = dataclasses.replace(params, optimizer=dataclasses.replace(params.optimizer, lr=1e-5))
    assert directory_of(other) != directory_of(params)


def test_what_a_bad_number_stopped_goes_on_from_the_state_before_it(params, monkeypatch, tmp_path):
    """Step 3 has no checkpoint by `checkpoint_every`; the loss of its batches is NaN."""
    def lane_batches(plan, lanes, start, *_):
        for step in itertools.count(start):
            images = [lane_batch(step, lane) for lane in lanes]
            yield [dataclasses.replace(b, images=b.images.fill_(255)) if step == 3 else b for b in images]

    def lpips(images, targets):
        return (images - targets).square().mean((1, 2, 3)) * (math.nan if (targets == 1).all() else 1)

    def run_rank(params):
        goal = Objective(objective_config((), repa_weight=0, pdino_block=1, balance_start=None), 8, torch.tensor(4),
                         {"dino": StandInDino(), "lpips": lpips})
        state = create_state(tiny_config(), goal, params.optimizer, 0, torch.device("cpu"))
        run = training(params, tmp_path)
        rank.fit_rank(run, state, goal, CLASSES, range(2), torch.device("cpu"), nullcontext(), writes=True)
        return run.checkpoints.steps()

    monkeypatch.setattr(rank, "lane_batches", lane_batches)
    assert run_rank(params) == [2, 3]
    said = (tmp_path / "failure.txt").read_text()
    assert "step 3: loss, lpips, grad_norm not finite" in said and "'s3-1-0'" in said
    assert f"{tmp_path}/checkpoints/step-00000003.pt" in said and "run.on_nonfinite to skip(N)" in said
    assert run_rank(changed(params, on_nonfinite="skip(1)"))[-1] == 4
    last = read_state(tmp_path / "checkpoints/step-00000004.pt")
    assert (last["step"], last["skipped"]) == (4, 1)
    with pytest.raises(NonFiniteError, match=r"passed over 1 steps .*more than run.on_nonfinite stop allows"):
        training(params, tmp_path).export(tmp_path / "model")
    rows = [line.split(",") for line in (tmp_path / "curve.csv").read_text().splitlines()]
    assert [row[rows[0].index("skipped")] for row in rows] == ["skipped", "0", "0", "0", "1"]


@pytest.mark.parametrize(("left", "kept"), [
    ("", ""), ("\0" * 40, ""), ("ste", ""),
    ("step,loss,rate\n2,0.5,9\n4,0.4,9\n6,0.3,9\n", "step,loss,rate\n2,0.5,9\n4,0.4,9\n"),
    ("step,loss,rate\n2,0.5,9\n4,0.", "step,loss,rate\n2,0.5,9\n"),
    ("step,loss,rate\n2,0.5,9\n\0\0\0\0", "step,loss,rate\n2,0.5,9\n"),
], ids=["empty", "zeros", "cut header", "whole", "cut line", "zeros at the end"])
def test_a_curve_that_a_full_disk_or_a_power_cut_has_left_is_gone_on_with(params, tmp_path, left, kept):
    (tmp_path / "curve.csv").write_text(left)
    curve = Curve(tmp_path, LocalStore(tmp_path), changed(params, steps=9), 4)
    assert (curve.path.read_text() if curve.path.exists() else "") == kept
    curve.append({"step": 5, "loss": 0.25, "rate": 9})
    assert curve.path.read_text() == (kept or "step,loss,rate\n") + "5,0.25,9\n"


def test_too_little_memory_of_a_gpu_names_the_remedy():
    with (pytest.raises(UserError, match="lower lanes_per_pass 4, raise recomputed_blocks 2.*Tried to allocate 9 GiB"),
          rank.enough_memory(MemoryConfig(4, 2))):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")


def test_lanes_of_a_pass_are_those_of_the_file_or_as_many_as_fit(params, tmp_path, monkeypatch):
    run, networks = training(params, tmp_path), object()
    asked = []

    def fitting(*given):
        asked.append(given)
        return 3

    monkeypatch.setattr(rank, "fitting_lanes", fitting)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=100))
    assert rank.settled(run, networks, 8, torch.device("cpu")).lanes_per_pass == 1 and not asked
    assert rank.settled(run, networks, 8, torch.device("cuda")).lanes_per_pass == 3
    lane = params.fit.batch_size // params.fit.lanes
    assert asked == [(networks, params.objective, lane, 8, MemoryConfig(), 80)]
    stated = dataclasses.replace(run, memory=MemoryConfig(5, 2))
    assert rank.settled(stated, networks, 8, torch.device("cuda")) == MemoryConfig(5, 2)


def test_the_most_images_of_gpus_that_are_known(params, monkeypatch):
    monkeypatch.setattr(rank, "forward_operations", lambda networks: None)
    monkeypatch.setattr(rank, "training_operations", lambda objective, forward: {"a": 1e9, "b": 2e9})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    name = "NVIDIA H100 80GB HBM3"
    assert rank.most_images(params, None, torch.device("cuda"), 4) == pytest.approx(4 * 989e12 / 3e9)
    assert rank.most_images(params, None, torch.device("cpu"), 4) is None
    name = "a toaster"
    assert rank.most_images(params, None, torch.device("cuda"), 4) is None


def test_what_is_recorded_when(params, tmp_path, monkeypatch):
    """Lines, grids and checkpoints come every so many steps and after the last; a stop saves, and adds nothing else."""
    seen: dict = {"grid": [], "saved": []}

    def generate(self, wanted, seeds, sampler):
        seen["grid"].append((wanted, [*seeds], sampler))
        return np.zeros((len(wanted), 8, 8, 3), np.uint8)

    class Writer:
        def save(self, state, extras):
            seen["saved"].append((state.step, sorted(extras)))

    monkeypatch.setattr(recorders.PixelGen, "generate", generate)
    recipe = changed(params, steps=7, batch_size=6, log_every=2, grid_every=4, checkpoint_every=5)
    averages = tiny_denoiser()
    curve = Curve(tmp_path, LocalStore(tmp_path), recipe, 0, busiest=1e6)
    grids = Grids(tmp_path, recipe, CLASSES, [3, 1], torch.device("cpu"))
    listening = [curve, grids, Saves(tmp_path, recipe.run, Writer())]
    for number in range(1, 8):
        state = SimpleNamespace(step=number, skipped=0, ema=averages)
        for recorder in listening:
            recorder.record(Step(state, {"loss": 0.5}, 0.01, last=number in (3, 7)))
    rows = [line.split(",") for line in curve.path.read_text().splitlines()]
    assert rows[0] == ["step", "loss", "skipped", "waiting", "images_per_second", "memory_gb", "mfu"]
    assert [row[:3] for row in rows[1:]] == [[n, "0.5", "0"] for n in "2467"]
    assert all(float(value) > 0 for row in rows[1:] for value in row[3:])
    assert all(float(row[6]) == pytest.approx(float(row[4]) / 1e6, rel=1e-4) for row in rows[1:])
    drawn = [f"grids/step-{n:08}.png" for n in (4, 7)]
    assert seen["grid"] == [([3, 1], [0, 1], params.run.grid_sampler)] * 2
    assert seen["saved"] == [(3, ["curve.csv"]), (5, ["curve.csv", drawn[0]]), (7, ["curve.csv", *drawn])]
    assert [*grids_upto(LocalStore(tmp_path), 6)] == drawn[:1]


def test_a_damaged_last_checkpoint_is_trained_again(params, monkeypatch, tmp_path):
    """Else every start would end with it. It is told of, and nothing that an earlier start was told."""
    checkpoints = Checkpoints(tmp_path, LocalStore(tmp_path))
    run = Run(params, tmp_path, checkpoints.store, None, None, None, SimpleNamespace())

    def train(_):
        found.update(checkpoints.store.sizes(""))
        with writing(checkpoints, params.run) as writer:
            for step in (2, 4):
                writer.save(SimpleNamespace(step=step, state_dict=lambda: {"weight": torch.ones(9)}), {})
        trained.append(checkpoints.steps())

    trained: list = []
    found: dict = {}
    monkeypatch.chdir(ROOT)
    given = Stage("train", "c2i", read_params(), None, Storage(None))
    monkeypatch.setattr(stage, "prepare", lambda *_: run)
    monkeypatch.setattr(stage, "train", train)
    monkeypatch.setattr(stage, "write_outputs", lambda run, *_: run.checkpoints.local(run.recipe.fit.steps))
    stage.run(given)
    stage.run(given)
    assert trained == [[2, 4]]
    checkpoints.path(4).write_bytes(b"damaged")
    for name in (NOTES, rank.FAILURE, rank.STOP):
        checkpoints.store.write(name, b"of an earlier start")
    found.clear()
    stage.run(given)
    assert trained == [[2, 4], [2, 4]]
    assert NOTES in found and not found.keys() & {rank.FAILURE, rank.STOP}
    assert b": put aside\n" in checkpoints.store.read(NOTES)
