"""The order of samples: its invariants for any shards, lanes and ranks, and that reading follows it."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.batches import SCHEMA, WINDOW, Plan, Split, load_window, open_split, read_images
from pipeline.storage import MANIFEST, StorageError, publish
from tests.pipeline.folders import picture


def plan_of(rows, seed=0, batch_size=4, lanes=2):
    return Plan(Split(tuple(f"{n}.parquet" for n in range(len(rows))), tuple(rows)), seed, batch_size, lanes)


@st.composite
def plans(draw):
    lanes, lane_size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows = draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))  # ragged, some smaller than a window, some empty
    assume(sum(rows) >= lanes * lane_size)
    return plan_of(rows, draw(st.integers(0, 3)), lanes * lane_size, lanes)


def sequence(plan, lane, start, stop):
    """What a lane sees from one step to another: (stop - start, lane_size, 2), read window by window."""
    parts, step = [], start
    while step < stop:
        epoch, number, steps = plan.window(step)
        assert step in steps
        parts.append(plan.rows(epoch, number, lane)[step - steps.start:min(steps.stop, stop) - steps.start])
        step = steps.stop
    return np.concatenate(parts)


@settings(deadline=None)
@given(plans(), st.integers(0, 3))
def test_every_row_comes_at_most_once_an_epoch_and_lanes_share_none(plan, epoch):
    first = epoch * plan.steps_per_epoch
    seen = np.concatenate([sequence(plan, lane, first, first + plan.steps_per_epoch).reshape(-1, 2)
                           for lane in range(plan.lanes)])
    assert len(seen) == plan.steps_per_epoch * plan.batch_size
    assert len({(shard, row) for shard, row in seen.tolist()}) == len(seen)
    assert all(0 <= row < plan.split.rows[shard] for shard, row in seen.tolist())
    left_out = plan.split.total - len(seen)
    assert 0 <= left_out < plan.batch_size + plan.lanes


@settings(deadline=None)
@given(plans(), st.data())
def test_a_run_resumed_anywhere_sees_the_tail_of_the_same_sequence(plan, data):
    stop = 2 * plan.steps_per_epoch + data.draw(st.integers(0, WINDOW))
    start, lane = data.draw(st.integers(0, stop - 1)), data.draw(st.integers(0, plan.lanes - 1))
    whole = sequence(plan, lane, 0, stop)
    assert whole.shape == (stop, plan.lane_size, 2)
    assert np.array_equal(sequence(plan, lane, start, stop), whole[start:])


@settings(deadline=None)
@given(plans(), st.integers(0, 500))
def test_windows_tile_every_epoch(plan, step):
    epoch, number, steps = plan.window(step)
    assert step in steps and 1 <= len(steps) <= WINDOW
    assert epoch == step // plan.steps_per_epoch
    assert plan.window(steps.stop)[:2] == ((epoch, number + 1) if steps.stop % plan.steps_per_epoch else (epoch + 1, 0))


def test_a_window_is_shuffled_but_holds_the_same_neighbours():
    arcs = []
    for seed, epoch, number, lane in ((0, 0, 0, 0), (0, 0, 1, 0), (0, 0, 1, 1), (0, 3, 1, 0), (1, 0, 0, 0)):
        window = plan_of([400], seed).rows(epoch, number, lane)[..., 1].ravel().tolist()
        first, = (row for row in window if (row - 1) % 400 not in window)  # one arc of the ring, so one beginning
        arc = [(row - first) % 400 for row in window]
        assert sorted(arc) == list(range(2 * WINDOW)) and arc != sorted(arc) and arc not in arcs
        arcs.append(arc)


def test_seed_and_epoch_change_the_order():
    orders = [plan_of([400], seed).rows(epoch, 1, 0).tolist() for seed in range(3) for epoch in range(3)]
    assert all(one != other for n, one in enumerate(orders) for other in orders[:n])
    assert orders[4] == plan_of([400], 1).rows(1, 1, 0).tolist()


@pytest.mark.parametrize("rows", [[103], [40, 40, 23], [1] * 103])
def test_every_row_is_seen_sooner_or_later(rows):
    """Rows that do not fill a step sit out, but not the same ones in every epoch, not even in a single shard."""
    plan = plan_of(rows, batch_size=8, lanes=4)
    seen, missed = set(), []
    for epoch in range(30):
        first = epoch * plan.steps_per_epoch
        now = {tuple(pair) for lane in range(4)
               for pair in sequence(plan, lane, first, first + plan.steps_per_epoch).reshape(-1, 2).tolist()}
        missed.append(sum(rows) - len(now))
        seen |= now
    assert set(missed) == {103 - 96}
    assert len(seen) == sum(rows)


def test_shards_come_in_another_order_every_epoch():
    plan = plan_of([64] * 8, batch_size=2, lanes=1)
    epochs = [sequence(plan, 0, first, first + 256)[..., 0].ravel().tolist() for first in range(0, 5 * 256, 256)]
    orders = {tuple(dict.fromkeys(shards)) for shards in epochs}
    assert len(orders) == 5


def test_too_few_images_for_a_batch_is_an_error_that_says_so():
    with pytest.raises(ValueError, match="7 training images are fewer than one batch of 8: lower"):
        plan_of([7], batch_size=8, lanes=1).check()


# ------------------------------------------------------------------------------------------------------ reading


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Shards of 5, 9 and 23 rows; the picture, the label and the key of a row tell which row it is."""
    directory, shards, number = tmp_path_factory.mktemp("dataset"), [], 0
    for n, rows in enumerate((5, 9, 23)):
        table = []
        for _ in range(rows):
            picture(number, 8, 8).save(directory / "one.png")
            table.append({"key": f"k{number}", "image": (directory / "one.png").read_bytes(), "label": number})
            number += 1
        pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), directory / f"train-{n}.parquet")
        shards.append({"path": f"train-{n}.parquet", "rows": rows, "size": 8})
    (directory / "one.png").unlink()
    publish(directory, "dataset", {}, sources={"all": {"splits": {"train": {"shards": shards}}}})
    return directory


def test_images_are_read_in_order_and_up_to_a_limit(dataset):
    split = open_split(dataset, "train")
    assert split.total == 37 and split.rows == (5, 9, 23)
    for limit in (None, 0, 3, 5, 6, 37, 100):
        batches = list(read_images(split, limit))
        count = 37 if limit is None else min(limit, 37)
        assert [label for _, labels in batches for label in labels] == list(range(count))
        for images, labels in batches:
            assert images.dtype == np.uint8 and images.shape == (len(labels), 8, 8, 3)
            assert np.array_equal(images[-1], picture(int(labels[-1]), 8, 8))


def test_a_manifest_cannot_name_shards_that_it_holds_no_checksum_of(dataset, tmp_path):
    manifest = json.loads((dataset / MANIFEST).read_text())
    manifest["sources"]["all"]["splits"]["train"]["shards"].append(
        {"path": "../elsewhere.parquet", "rows": 3, "size": 8})
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(StorageError, match=r"no checksum of \.\./elsewhere\.parquet: delete"):
        open_split(tmp_path, "train")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_reading_follows_the_plan_for_any_split_of_lanes_to_ranks(dataset, ranks):
    plan = Plan(open_split(dataset, "train"), seed=5, batch_size=8, lanes=4)
    stop = 3 * plan.steps_per_epoch - 1
    seen = {}
    for rank in range(ranks):
        lanes = range(rank * 4 // ranks, (rank + 1) * 4 // ranks)
        step = 0
        while step < stop:
            columns = load_window(plan, lanes, step, stop)
            order = list(zip(columns["step"].tolist(), columns["lane"].tolist(), strict=True))
            end = min(plan.window(step)[2].stop, stop)
            assert order == [(s, lane) for s in range(step, end) for lane in lanes for _ in range(plan.lane_size)]
            for n, (place, label) in enumerate(zip(order, columns["label"].tolist(), strict=True)):
                assert columns["key"][n] == f"k{label}"
                assert np.array_equal(columns["image"][n], picture(label, 8, 8))
                seen.setdefault(place, []).append(label)
            step = end
    starts = np.cumsum([0, 5, 9])
    assert seen == {(step, lane): [int(starts[shard] + row) for shard, row in sequence(plan, lane, step, step + 1)[0]]
                    for step in range(stop) for lane in range(4)}


def test_reading_may_begin_and_end_inside_a_window(dataset):
    plan = Plan(open_split(dataset, "train"), seed=5, batch_size=1, lanes=1)
    whole = load_window(plan, [0], 16, 32)  # the second window of the epoch
    first_of = np.cumsum([0, 5, 9])
    assert whole["label"].tolist() == [int(first_of[s] + row) for s, row in sequence(plan, 0, 16, 32)[:, 0]]
    assert whole["step"].tolist() == list(range(16, 32))
    assert list(plan.windows(16, 32)) == [16] and list(plan.windows(21, 40)) == [21, 32, 37]
    part = load_window(plan, [0], 21, 27)
    for name in whole:
        assert np.array_equal(part[name], whole[name][5:11])
