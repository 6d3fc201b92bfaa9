"""Training: reproducible, resumable, the same on any number of ranks, and never past a number that is not finite."""

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from pixelgen.checkpoint import load_state, save_state
from pixelgen.config import ObjectiveConfig, OptimizerConfig
from pixelgen.ema import ema_copy, ema_update
from pixelgen.objective import Objective
from pixelgen.train import (
    LaneBatch,
    NonFiniteError,
    create_state,
    fit,
    lane_seed,
    train_step,
)
from tests.pixelgen.conftest import (
    TINY,
    StandInDino,
    fit_config,
    lane_batch,
    randomised,
    stand_in_lpips,
    tiny_config,
)

OPTIMIZER = OptimizerConfig(lr=2e-4, clip=1.0)


def objective(lpips=stand_in_lpips, **options):
    """Every term on, and the balance refreshed before steps 2, 4, …"""
    options = {"repa_block": 2, "repa_hidden": 16, "pdino_block": 1, "gated": ("lpips", "pdino"), "balance_start": 1,
               "balance_every": 2, **options}
    return Objective(ObjectiveConfig(**options), 8, torch.tensor(TINY["num_classes"]), StandInDino(), lpips)


def fresh_state(seed=0):
    """Random weights everywhere, so that all gradients differ from zero at the first step."""
    state = create_state(tiny_config(dropout=0.1), objective(), OPTIMIZER, seed, torch.device("cpu"))
    randomised(state.model.denoiser)
    state.ema.load_state_dict(state.model.denoiser.state_dict())
    return state


def ignore(_):
    pass


def batches(start=0, lanes=range(4)):
    return ([lane_batch(step, lane) for lane in lanes] for step in itertools.count(start))


def train(state, steps, lanes=range(4), goal=None, **options):
    """`fit` up to a step number -> what it logged."""
    log = []
    config = fit_config(**{"steps": steps, "log_every": 1, **options})
    fit(state, batches(state.step, lanes), goal or objective(), OPTIMIZER, config, log.append, ignore, ignore)
    return [{k: v for k, v in entry.items() if k != "images_per_second"} for entry in log]


def assert_same_state(a, b, **tolerance):
    torch.testing.assert_close(a.state_dict(), b.state_dict(), **{"rtol": 0, "atol": 0} | tolerance)


def test_the_same_seed_gives_the_same_training():
    first, second, other = fresh_state(), fresh_state(), fresh_state()
    assert train(first, 4) == train(second, 4)
    assert_same_state(first, second)
    assert train(other, 4, seed=4)[0] != train(fresh_state(), 1)[0], "the seed of the draws counts"
    assert not torch.equal(fresh_state(1).model.denoiser.output_weight, fresh_state(0).model.denoiser.output_weight)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, half, resumed = fresh_state(), fresh_state(), fresh_state(seed=9)
    log = train(whole, 6)
    assert whole.percept_weight != 1, "the balance is active"
    first = train(half, 3)
    save_state(half.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(77)
    load_state(resumed, tmp_path / "state.pt")
    assert resumed.step == 3 and resumed.percept_weight == half.percept_weight != 1
    assert first + train(resumed, 6) == log
    assert_same_state(resumed, whole)


def rank(index, world, steps, directory):
    """One rank of a run: trains on its share of the lanes; the first one writes the state."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/rendezvous-{world}", rank=index, world_size=world)
    state = fresh_state()
    log = train(state, steps, range(index * 4 // world, (index + 1) * 4 // world))
    torch.save({"state": state.state_dict(), "log": log}, directory / f"world{world}-rank{index}.pt")
    dist.destroy_process_group()


def test_the_number_of_ranks_changes_nothing(tmp_path):
    torch.multiprocessing.start_processes(rank, (2, 3, tmp_path), nprocs=2, start_method="fork")  # nothing to import
    first, second = (torch.load(tmp_path / f"world2-rank{i}.pt") for i in range(2))
    alone = fresh_state()
    log = train(alone, 3)
    assert first["state"]["percept_weight"] == second["state"]["percept_weight"] != 1
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, {"state": alone.state_dict(), "log": log}, rtol=1e-5, atol=1e-6)


def test_lanes_are_seeded_apart():
    seeds = {lane_seed(*key) for key in itertools.product(range(3), range(5), range(4))}
    assert len(seeds) == 60 and all(0 <= s < 2**63 for s in seeds)
    assert lane_seed(0, 1, 2) == lane_seed(0, 1, 2)


@pytest.mark.parametrize("balance_start", [None, 0])
def test_a_number_that_is_not_finite_stops_before_the_update(balance_start):
    """Whatever the state holds is as before the step, and the message says which term of which samples it was."""
    bad = objective(lambda a, b: stand_in_lpips(a, b) * math.nan, balance_start=balance_start)
    state = fresh_state()
    train(state, 2)
    before = copy.deepcopy(state.state_dict())
    with pytest.raises(NonFiniteError, match=r"step 2: loss, lpips, grad_norm not finite.*3: \['s2-3-0', 's2-3-1'\]"):
        train(state, 4, goal=bad)
    torch.testing.assert_close(state.state_dict(), before, rtol=0, atol=0)
    assert train(state, 3), "it can go on from there"


def test_ema_is_the_weighted_mean_of_the_weights():
    """e_k = dᵏ·e_0 + (1-d)·Σ dᵏ⁻ⁱ·w_i."""
    model = torch.nn.Linear(2, 2).bfloat16()
    average = ema_copy(model)
    assert average.weight.dtype == torch.float32 and not average.weight.requires_grad and not average.training
    torch.testing.assert_close(average.weight, model.weight.float())
    model, decay = model.float(), 0.8
    expected = decay**3 * average.weight.double()
    for i in (1, 2, 3):
        torch.nn.init.constant_(model.weight, 10.0**i)
        ema_update(average, model, decay)
        expected += (1 - decay) * decay ** (3 - i) * 10.0**i
    torch.testing.assert_close(average.weight.double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(model.weight, torch.full((2, 2), 1000.0))


def test_a_step_updates_the_average_and_leaves_its_tables(tmp_path):
    state = fresh_state()
    before, table = copy.deepcopy(state.ema), state.ema.pos_embed.clone()
    train(state, 1)
    expected = [0.9 * e + 0.1 * w for e, w in zip(before.parameters(), state.model.denoiser.parameters(), strict=True)]
    torch.testing.assert_close(list(state.ema.parameters()), expected)
    assert torch.equal(state.ema.pos_embed, table)


def test_gradients_are_means_over_the_lanes():
    """The gradient of two lanes is the mean of the gradients of each."""
    gradients, config = [], fit_config(lanes=2, batch_size=4)
    for lanes in ([0], [1], [0, 1]):
        state = fresh_state()
        train_step(state, state.model, [lane_batch(0, lane) for lane in lanes], objective(balance_start=None),
                   OptimizerConfig(), config)
        gradients.append(state.model.denoiser.output_weight.grad)
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2)


def test_gradient_norm_is_clipped():
    state = fresh_state()
    before = state.model.denoiser.output_weight.detach().clone()
    sgd = torch.optim.SGD(state.model.parameters(), lr=1.0)
    state.optimizer = sgd
    metrics = train_step(state, state.model, [lane_batch(0, 0)], objective(), OptimizerConfig(clip=1e-3), fit_config())
    norm = torch.cat([p.grad.flatten() for p in state.model.parameters()]).norm().item()
    assert metrics["grad_norm"] > 1e-2 and norm == pytest.approx(1e-3, rel=1e-3)
    assert 0 < (state.model.denoiser.output_weight - before).norm() < 1e-3


def test_the_loss_falls_when_eight_images_are_learned_by_heart():
    images = torch.randint(0, 256, (8, 3, 1, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = images.expand(8, 3, 16, 16)
    goal = objective(repa_weight=0.0, condition_dropout=0.0, balance_start=None)
    state = create_state(tiny_config(num_classes=8), goal, OptimizerConfig(lr=5e-3), 0, torch.device("cpu"))
    lanes = ([LaneBatch(step, 0, ["a"] * 8, images, torch.arange(8))] for step in itertools.count())
    config, log = fit_config(steps=60, lanes=1, log_every=1), []
    fit(state, lanes, goal, OptimizerConfig(lr=5e-3), config, log.append, ignore, ignore)
    for name in ("loss", "fm", "lpips", "pdino"):
        first, last = (sum(entry[name] for entry in part) for part in (log[:10], log[-10:]))
        assert last < 0.2 * first, name


def test_what_happens_when():
    """Logs, grids and checkpoints come every so many steps, and each once more at the end."""
    seen = {"log": [], "grid": [], "checkpoint": []}
    config = fit_config(steps=7, log_every=2, grid_every=3, checkpoint_every=5)
    state = fresh_state()
    fit(state, batches(), objective(), OPTIMIZER, config, lambda entry: seen["log"].append(entry["step"]),
        lambda s: seen["checkpoint"].append(s.step), lambda s: seen["grid"].append(s.step))
    assert seen == {"log": [2, 4, 6, 7], "grid": [3, 6, 7], "checkpoint": [5, 7]}


def test_batches_have_to_be_those_of_the_step():
    with pytest.raises(AssertionError, match="batches out of step 0: "):
        fit(fresh_state(), batches(1), objective(), OPTIMIZER, fit_config(), ignore, ignore, ignore)
    with pytest.raises(RuntimeError, match="the data ended at step 2 of 6"):
        fit(fresh_state(), itertools.islice(batches(), 2), objective(), OPTIMIZER, fit_config(), ignore, ignore, ignore)


def test_a_finished_run_takes_no_further_step():
    state = fresh_state()
    train(state, 2)
    before = copy.deepcopy(state.state_dict())
    fit(state, itertools.islice(batches(2), 1), objective(), OPTIMIZER, fit_config(steps=2), ignore, ignore, ignore)
    torch.testing.assert_close(state.state_dict(), before, rtol=0, atol=0)


def test_a_balance_without_a_sample_past_the_gate_stays():
    state, goal = fresh_state(), objective(gate_threshold=1.0, balance_start=0)
    train(state, 1, goal=goal)
    assert state.percept_weight == 1


def test_balance_moves_a_fifth_of_the_way():
    state, seen = fresh_state(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pixelgen.train.balance_weight", lambda *_: seen.append(1) or torch.tensor(11.0))
        train(state, 3)
    assert state.percept_weight == pytest.approx(0.8 + 0.2 * 11) and 1 <= len(seen) <= 4
