"""The order of samples: its invariants for any shards, lanes and ranks, and that reading follows it."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pipeline.batches import (
    PREFIXES,
    SCHEMA,
    WINDOW,
    Plan,
    Source,
    Split,
    load_window,
    prompt,
    read_images,
)
from pipeline.params import TextParams
from pipeline.storage import MANIFEST, Storage
from pipeline.store import StorageError
from pixelgen.config import ConfigError
from pixelgen.images import adm_crop
from tests.pipeline.folders import picture, split_of


def plan_of(*rows, seed=0, batch_size=4, lanes=2, weights=None, text=None):
    """A plan of sources whose shards have so many rows; their weights, if not given, are their sizes."""
    splits = [Split(tuple(f"{n}.parquet" for n in range(len(r))), tuple(r), ("",) * len(r)) for r in rows]
    sources = [Source(split, split.total) for split in splits]
    sources = [dataclasses.replace(s, weight=w) for s, w in zip(sources, weights or [s.weight for s in sources],
                                                               strict=True)]
    return Plan(tuple(sources), 8, seed, batch_size, lanes, text)


@st.composite
def plans(draw):
    lanes, lane_size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows = draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))  # ragged, some smaller than a window, some empty
    assume(sum(rows) >= lanes * lane_size)
    return plan_of(rows, seed=draw(st.integers(0, 3)), batch_size=lanes * lane_size, lanes=lanes)


def windows(plan, lane, start, stop):
    """What a lane sees in windows from one number to another: (n, 3), source, shard and row."""
    return np.concatenate([plan.rows(n, lane).reshape(-1, 3) for n in range(start, stop)])


def sequence(plan, lane, start, stop):
    """What a lane sees from one step to another: (stop - start, lane_size, 3)."""
    whole = windows(plan, lane, start // WINDOW, -(-stop // WINDOW)).reshape(-1, plan.lane_size, 3)
    return whole[start % WINDOW:][:stop - start]


@settings(deadline=None)
@given(plans())
def test_an_epoch_has_every_row_at_most_once_and_lanes_share_none(plan):
    """As many windows as a lane has rows are as many epochs as a window has rows."""
    epochs, segment = WINDOW * plan.lane_size, plan.sources[0].split.total // plan.lanes
    seen = Counter(tuple(row) for lane in range(plan.lanes) for row in windows(plan, lane, 0, segment).tolist())
    assert seen.total() == epochs * segment * plan.lanes
    assert max(seen.values()) <= epochs
    assert all(0 <= row < plan.sources[0].split.rows[shard] for _, shard, row in seen)
    left_out = plan.sources[0].split.total - segment * plan.lanes
    assert 0 <= left_out < plan.lanes


def test_an_epoch_ends_where_it_should():
    """Two lanes with a segment of exactly three windows: all rows in these, and again in the next three."""
    plan = plan_of([40, 150, 2], batch_size=4, lanes=2)
    for epoch in range(3):
        seen = Counter(tuple(row) for lane in (0, 1) for row in windows(plan, lane, 3 * epoch, 3 * epoch + 3).tolist())
        assert len(seen) == 192 and set(seen.values()) == {1}


def test_a_mixture_has_its_weights_in_every_window():
    plan = plan_of([50, 50], [7], [900], batch_size=12, lanes=4, weights=[1, 1, 2])  # 48 rows a window of a lane
    assert plan.quotas == [12, 12, 24]
    for lane in range(4):
        for number in range(5):
            assert np.bincount(plan.rows(number, lane)[..., 0].ravel()).tolist() == [12, 12, 24]
    small = Counter(tuple(row[1:]) for lane in range(4) for row in windows(plan, lane, 0, 1).tolist() if row[0] == 1)
    assert small.total() == 48 and {row for _, row in small} == set(range(7)), "again and again, but all of them"
    steps = [np.bincount(step[:, 0], minlength=3).tolist() for step in plan.rows(0, 0)]
    assert len({tuple(s) for s in steps}) > 3, "sources are mixed inside a window, not in blocks"


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=5), st.integers(1, 40))
def test_quotas_are_the_nearest_whole_rows(weights, lane_size):
    plan = plan_of(*([[100]] * len(weights)), batch_size=lane_size, lanes=1, weights=weights)
    exact = np.array(weights) / sum(weights) * WINDOW * lane_size
    assert sum(plan.quotas) == WINDOW * lane_size
    over = np.sort(np.array(plan.quotas) - exact)  # largest remainders: no two sources would rather swap a row
    assert over[-1] - over[0] <= 1 + 1e-9


@settings(deadline=None)
@given(st.integers(0, 200), st.integers(0, 200))
def test_windows_tile_the_steps(start, stop):
    firsts = [*plan_of([400]).windows(start, stop)]
    assert firsts == [s for s in range(start, stop) if s == start or s % WINDOW == 0]


def test_a_window_is_shuffled_but_holds_the_same_neighbours():
    arcs = []
    for seed, number, lane in ((0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 15, 0), (1, 0, 0)):
        window = plan_of([400], seed=seed).rows(number, lane)[..., 2].ravel().tolist()
        first, = (row for row in window if (row - 1) % 400 not in window)  # one arc of the ring, so one beginning
        arc = [(row - first) % 400 for row in window]
        assert sorted(arc) == list(range(2 * WINDOW)) and arc != sorted(arc) and arc not in arcs
        arcs.append(arc)


def test_seed_and_epoch_change_the_order():
    orders = [plan_of([384], seed=seed).rows(6 * epoch, 0).tolist() for seed in range(3) for epoch in range(3)]
    assert all(one != other for n, one in enumerate(orders) for other in orders[:n])
    assert orders[4] == plan_of([384], seed=1).rows(6, 0).tolist()


@pytest.mark.parametrize("rows", [[103], [40, 40, 23], [1] * 103])
def test_every_row_is_seen_sooner_or_later(rows):
    """Rows beyond the last segment sit out, but not the same ones in every epoch, not even in a single shard."""
    plan = plan_of(rows, batch_size=8, lanes=4)  # segments of 25 rows, 3 left out
    seen = {tuple(row) for lane in range(4) for row in windows(plan, lane, 0, 25).tolist()}
    assert len(seen) == sum(rows)


def test_shards_come_in_another_order_every_epoch():
    plan = plan_of([64] * 8, batch_size=2, lanes=1)
    epochs = [windows(plan, 0, first, first + 16)[:, 1].tolist() for first in range(0, 5 * 16, 16)]
    orders = {tuple(dict.fromkeys(shards)) for shards in epochs}
    assert len(orders) == 5


def test_too_few_images_for_a_batch_is_an_error_that_says_so():
    with pytest.raises(ConfigError, match="7 training images are fewer than one batch of 8: lower"):
        plan_of([7], batch_size=8, lanes=1).check()
    with pytest.raises(ConfigError, match="source 1 of the mixture has weight 0.001, less than one image in 64"):
        plan_of([900], [900], batch_size=8, lanes=2, weights=[1, 0.001]).check()
    plan_of([8], batch_size=8, lanes=1).check()


# ----------------------------------------------------------------------------------------------------- captions


def test_a_caption_is_drawn_by_weight_and_prefixed_by_chance():
    text = TextParams(prefix_probability=0.5, short_words=3)
    dice = np.random.default_rng(0).random((4000, 3))
    drawn = Counter(prompt(["a red dog", "one two three four", None], (1.0, 3.0, 9.0), text, die) for die in dice)
    assert set(drawn) == {"a red dog", "one two three four", *(p + "a red dog" for p in PREFIXES)}
    assert len(PREFIXES) == 7
    assert drawn["one two three four"] / 4000 == pytest.approx(0.75, abs=0.03)
    assert drawn["a red dog"] / 4000 == pytest.approx(0.125, abs=0.02)
    assert all(drawn[p + "a red dog"] / 4000 == pytest.approx(0.125 / 7, abs=0.01) for p in PREFIXES)
    never = TextParams(prefix_probability=0.0, short_words=3)
    assert {prompt(["a"], (1.0,), never, die) for die in dice} == {"a"}
    assert prompt([None, "b"], (1.0, 0.0), never, dice[0]) == "b", "the only one it has, whatever its weight"


# ------------------------------------------------------------------------------------------------------ reading


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Shards of 5, 9 and 23 rows; the picture, the label and the key of a row tell which row it is."""
    directory, shards, number = tmp_path_factory.mktemp("dataset"), [], 0
    for n, rows in enumerate((5, 9, 23)):
        table = []
        for _ in range(rows):
            picture(number, 8, 8).save(directory / "one.png")
            table.append({"key": f"k{number}", "image": (directory / "one.png").read_bytes(), "label": number,
                          "captions": [f"picture {number}"]})
            number += 1
        pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), directory / f"train-{n}.parquet")
        shards.append({"path": f"train-{n}.parquet", "rows": rows, "size": 8})
    (directory / "one.png").unlink()
    Storage(None).publish(directory, "dataset", {}, sources={"all": {"splits": {"train": {"shards": shards}}}})
    return directory


def test_images_are_read_in_order_and_up_to_a_limit(dataset):
    split = split_of(dataset, "train")
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
        split_of(tmp_path, "train")


def reading(dataset, **options):
    """A plan that reads the dataset, at its own size unless another is asked for."""
    values = {"image_size": 8, "seed": 5, "batch_size": 8, "lanes": 4, "text": None} | options
    return Plan((Source(split_of(dataset, "train"), captions=(1.0,)),), **values)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_reading_follows_the_plan_for_any_split_of_lanes_to_ranks(dataset, ranks):
    plan, stop, seen = reading(dataset), 40, {}
    for rank in range(ranks):
        lanes = range(rank * 4 // ranks, (rank + 1) * 4 // ranks)
        for step in plan.windows(0, stop):
            columns = load_window(plan, lanes, step, stop)
            order = list(zip(columns["step"].tolist(), columns["lane"].tolist(), strict=True))
            end = min(step + WINDOW, stop)
            assert order == [(s, lane) for s in range(step, end) for lane in lanes for _ in range(plan.lane_size)]
            for n, (place, label) in enumerate(zip(order, columns["condition"].tolist(), strict=True)):
                assert columns["key"][n] == f"k{label}"
                assert np.array_equal(columns["image"][n], picture(label, 8, 8))
                seen.setdefault(place, []).append(label)
    starts = np.cumsum([0, 5, 9])
    assert seen == {(step, lane): [int(starts[shard] + row) for _, shard, row in
                                   sequence(plan, lane, step, step + 1)[0]]
                    for step in range(stop) for lane in range(4)}


@pytest.mark.parametrize("text", [None, TextParams(0.5, 3)])
def test_reading_may_begin_and_end_inside_a_window(dataset, text):
    plan = reading(dataset, batch_size=1, lanes=1, text=text)
    whole = load_window(plan, [0], 16, 64)
    assert whole["step"].tolist() == list(range(16, 32))
    part = load_window(plan, [0], 21, 27)
    for name in whole:
        assert np.array_equal(part[name], whole[name][5:11])
    if text:
        assert {c.removeprefix(p) for c in whole["condition"].tolist() for p in ("", *PREFIXES) if c.startswith(p)} >= {
            f"picture {key[1:]}" for key in whole["key"].tolist()}
        assert any(c.startswith(PREFIXES) for c in whole["condition"]) and not all(
            c.startswith(PREFIXES) for c in whole["condition"])


def test_larger_images_are_resized_as_adm_does(dataset):
    columns = load_window(reading(dataset, image_size=4), [0], 0, 4)
    for key, image in zip(columns["key"].tolist(), columns["image"], strict=True):
        assert np.array_equal(image, adm_crop(picture(int(key[1:]), 8, 8), 4))
