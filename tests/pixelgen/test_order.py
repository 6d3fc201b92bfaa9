"""The order of samples: its invariants for any shards and lanes."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pixelgen.config import ConfigError
from pixelgen.data import order
from pixelgen.data.order import WINDOW, Order


def plan_of(*rows, seed=0, batch_size=4, lanes=2, weights=None):
    """The order of sources whose shards have so many rows; their weights, if not given, are their sizes."""
    return Order(tuple(map(tuple, rows)), tuple(weights or map(sum, rows)), seed, batch_size, lanes)


@st.composite
def plans(draw):
    lanes, lane_size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows = draw(st.lists(st.integers(0, 60), min_size=1, max_size=6))  # ragged, some smaller than a window, some empty
    assume(sum(rows) >= lanes * lane_size)
    return plan_of(rows, seed=draw(st.integers(0, 3)), batch_size=lanes * lane_size, lanes=lanes)


def windows(plan, lane, start, stop):
    """What a lane sees in windows from one number to another: (n, 3), source, shard and row."""
    return np.concatenate([plan.window(n, lane).reshape(-1, 3) for n in range(start, stop)])


def sequence(plan, lane, start, stop):
    """What a lane sees from one step to another: (stop - start, lane_size, 3)."""
    whole = windows(plan, lane, start // WINDOW, -(-stop // WINDOW)).reshape(-1, plan.lane_size, 3)
    return whole[start % WINDOW:][:stop - start]


@settings(deadline=None)
@given(plans())
def test_an_epoch_has_every_row_at_most_once_and_lanes_share_none(plan):
    """As many windows as a lane has rows are as many epochs as a window has rows."""
    epochs, segment = WINDOW * plan.lane_size, sum(plan.rows[0]) // plan.lanes
    seen = Counter(tuple(row) for lane in range(plan.lanes) for row in windows(plan, lane, 0, segment).tolist())
    assert seen.total() == epochs * segment * plan.lanes
    assert max(seen.values()) <= epochs
    assert all(0 <= row < plan.rows[0][shard] for _, shard, row in seen)
    left_out = sum(plan.rows[0]) - segment * plan.lanes
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
            assert np.bincount(plan.window(number, lane)[..., 0].ravel()).tolist() == [12, 12, 24]
    small = Counter(tuple(row[1:]) for lane in range(4) for row in windows(plan, lane, 0, 1).tolist() if row[0] == 1)
    assert small.total() == 48 and {row for _, row in small} == set(range(7)), "again and again, but all of them"
    steps = [np.bincount(step[:, 0], minlength=3).tolist() for step in plan.window(0, 0)]
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
    tiles = [[number * WINDOW + step for step in steps] for number, steps in order.windows(start, stop)]
    assert [step for tile in tiles for step in tile] == [*range(start, stop)] and all(tiles)
    assert all(len({step // WINDOW for step in tile}) == 1 for tile in tiles)


def test_a_window_is_shuffled_but_holds_the_same_neighbours():
    arcs = []
    for seed, number, lane in ((0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 15, 0), (1, 0, 0)):
        window = plan_of([400], seed=seed).window(number, lane)[..., 2].ravel().tolist()
        first, = (row for row in window if (row - 1) % 400 not in window)  # one arc of the ring, so one beginning
        arc = [(row - first) % 400 for row in window]
        assert sorted(arc) == list(range(2 * WINDOW)) and arc != sorted(arc) and arc not in arcs
        arcs.append(arc)


def test_seed_and_epoch_change_the_order():
    orders = [plan_of([384], seed=seed).window(6 * epoch, 0).tolist() for seed in range(3) for epoch in range(3)]
    assert all(one != other for n, one in enumerate(orders) for other in orders[:n])
    assert orders[4] == plan_of([384], seed=1).window(6, 0).tolist()


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
    with pytest.raises(ConfigError, match="source 1 of the mixture has the share 0.001, less than one image in 64"):
        plan_of([900], [900], batch_size=8, lanes=2, weights=[1, 0.001]).check()
    with pytest.raises(ConfigError, match="source 1 of the mixture has 12 training images, fewer than fit.lanes 192"):
        plan_of([9000], [12], batch_size=1536, lanes=192, weights=[127, 1]).check()
    plan_of([8], batch_size=8, lanes=1).check()
