"""Training: reproducible, resumable, the same on any number of ranks, and never past a number that is not finite."""

import contextlib
import copy
import dataclasses
import functools
import io
import itertools
import math
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from pixelgen.checkpoint import load_state, save_state
from pixelgen.config import MemoryConfig, OptimizerConfig
from pixelgen.ema import ema_copy, ema_update
from pixelgen.models.jit import Block
from pixelgen.objective import Objective
from pixelgen.train import (
    LaneBatch,
    NonFiniteError,
    create_state,
    lane_seed,
    shared_out,
    train_step,
)
from pixelgen.train import train as take_steps
from tests.pixelgen.conftest import (
    TINY,
    StandInDino,
    fit_config,
    lane_batch,
    objective_config,
    randomised,
    stand_in_lpips,
    tiny_config,
)

OPTIMIZER = OptimizerConfig(lr=2e-4, clip=1.0)


def objective(lpips=stand_in_lpips, **options):
    """Every term on, and the balance refreshed before steps 2, 4, …"""
    options = {"repa_block": 2, "repa_hidden": 16, "pdino_block": 1, "gated": ("lpips", "pdino"), "balance_start": 1,
               "balance_every": 2, **options}
    return Objective(objective_config(**options), 8, torch.tensor(TINY["num_classes"]),
                     {"dino": StandInDino(), "lpips": lpips})


@pytest.mark.parametrize(("hidden", "width"), [(None, TINY["width"]), (16, 16)])
def test_the_repa_head_is_as_wide_as_the_denoiser_or_as_asked_for(hidden, width):
    goal = objective(repa_hidden=hidden)
    state = create_state(tiny_config(), goal, OPTIMIZER, 0, torch.device("cpu"))
    layers = [m for m in state.model.projector if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in layers] == [width, width, goal.networks["dino"].width]


def fresh_state(seed=0):
    """Random weights everywhere, so that all gradients differ from zero at the first step."""
    state = create_state(tiny_config(dropout=0.1), objective(), OPTIMIZER, seed, torch.device("cpu"))
    randomised(state.model.denoiser)
    state.ema.load_state_dict(state.model.denoiser.state_dict())
    return state


def batches(start=0, lanes=range(4), white=()):
    """Batches of a rank from step `start`; those of the (step, lane) in `white` are white images."""
    for step in itertools.count(start):
        found = [lane_batch(step, lane) for lane in lanes]
        yield [dataclasses.replace(b, images=b.images.fill_(255)) if (step, b.lane) in white else b for b in found]


def train(state, steps, lanes=range(4), goal=None, white=(), memory=MemoryConfig(), may_skip=0, **options):
    """Train up to a step number -> the metrics of each step."""
    taken = take_steps(state, batches(state.step, lanes, white), goal or objective(), OPTIMIZER,
                       fit_config(steps=steps, **options), memory=memory, may_skip=may_skip)
    return [{"step": state.step, **step.metrics, "skipped": state.skipped} for step in taken]


def spoiled(damage, **options):
    """An objective whose LPIPS of white images is damaged: its `value` is NaN, or only its `gradient` infinite."""
    def lpips(images, targets):
        distance, white = stand_in_lpips(images, targets), (targets == 1).flatten(1).all(1)
        if damage == "value":
            return distance * torch.where(white, math.nan, 1.0)
        if distance.requires_grad and white.any():
            distance.register_hook(lambda gradient: torch.where(white, gradient * math.inf, gradient))
        return distance

    return objective(lpips, **{"gated": (), "gate_threshold": 0.0, **options})


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


def rank(index, work, directory, world):
    """One of the ranks: writes what `work` makes of its share of the lanes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=index, world_size=world)
    share = 4 // world
    torch.save(work(range(index * share, (index + 1) * share)), directory / f"rank{index}.pt")
    dist.destroy_process_group()


def on_ranks(world, work, directory):
    """What `work` makes of the lanes of each rank."""
    torch.multiprocessing.start_processes(rank, (work, directory, world), world, start_method="fork")  # no imports
    return [torch.load(directory / f"rank{i}.pt") for i in range(world)]


def train_three_steps(lanes):
    state = fresh_state()
    return {"log": train(state, 3, lanes), "state": state.state_dict()}


def test_the_number_of_ranks_changes_nothing(tmp_path):
    first, second = on_ranks(2, train_three_steps, tmp_path)
    assert first["state"]["percept_weight"] == second["state"]["percept_weight"] != 1
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, train_three_steps(range(4)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("together", [2, 3, 4, 9])
def test_lanes_that_share_a_pass_change_nothing_but_rounding(together):
    alone, shared, again = fresh_state(), fresh_state(), fresh_state()
    log = train(alone, 3)
    assert alone.percept_weight != 1
    found = train(shared, 3, memory=MemoryConfig(together))
    torch.testing.assert_close(found, log, rtol=1e-5, atol=1e-6)
    assert_same_state(shared, alone, rtol=1e-4, atol=1e-5)
    assert train(again, 3, memory=MemoryConfig(together)) == found, "equal groups, equal bits"
    assert_same_state(again, shared)


def test_lanes_are_shared_out_evenly():
    lanes = [lane_batch(0, lane) for lane in range(7)]
    for at_most, sizes in ((1, [1] * 7), (2, [1, 2, 2, 2]), (3, [2, 2, 3]), (4, [3, 4]), (7, [7]), (8, [7])):
        groups = shared_out(lanes, at_most)
        assert [len(group) for group in groups] == sizes
        assert [batch.lane for group in groups for batch in group] == [*range(7)]


@pytest.mark.parametrize("together", [2, 4])
def test_a_sample_that_is_not_finite_is_named_whoever_is_computed_with_it(together):
    with pytest.raises(NonFiniteError, match=r"loss, lpips, .* lane: {1: \['s2-1-0', 's2-1-1'\]}"):
        train(fresh_state(), 4, goal=spoiled("value", balance_start=None), white=[(2, 1)],
              memory=MemoryConfig(together))


def resume_after_two_steps(lanes):
    whole, half, resumed = fresh_state(), fresh_state(), fresh_state(seed=9)
    train(whole, 5, lanes)
    train(half, 2, lanes)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    train(resumed, 5, lanes)
    return {"whole": whole.state_dict(), "resumed": resumed.state_dict()}


def test_three_ranks_go_on_with_the_same_bits(tmp_path):
    """Three numbers have several sums: gradients have to be added in the same order before and after."""
    for found in on_ranks(3, resume_after_two_steps, tmp_path):
        torch.testing.assert_close(found["resumed"], found["whole"], rtol=0, atol=0)


def test_a_compiled_model_gives_the_balance_too(monkeypatch):
    """The balance needs a graph twice, after steps whose backward pass was compiled to use it once."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(Objective, "compile", lambda self: None)  # the stand-ins are no networks
    compiled, plain = fresh_state(), fresh_state()
    goal = objective(balance_start=2)
    train(compiled, 4, goal=goal, compile=True)
    train(plain, 4, goal=goal)
    assert compiled.percept_weight == pytest.approx(plain.percept_weight, rel=1e-4) != 1
    assert all(block._compiled_call_impl for block in compiled.model.denoiser.blocks)


@pytest.mark.parametrize(("blocks", "compiled"), [(1, False), (9, False), (1, True)])
def test_blocks_that_are_computed_again_change_nothing(monkeypatch, blocks, compiled):
    """With dropout, two lanes in a pass and the balance: the bits of a training that keeps everything, on a CPU."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(Objective, "compile", lambda self: None)  # the stand-ins are no networks
    calls = []
    forward = Block.forward
    monkeypatch.setattr(Block, "forward", lambda block, *given: calls.append(block) or forward(block, *given))
    saving, plain = fresh_state(), fresh_state()
    options = {"goal": objective(balance_start=2), "compile": compiled}
    expected = train(plain, 4, memory=MemoryConfig(2), **options)
    assert train(saving, 4, memory=MemoryConfig(2, blocks), **options) == expected
    assert_same_state(saving, plain)
    if not compiled:
        again = {block for block in saving.model.denoiser.blocks if calls.count(block) > calls.count(
            plain.model.denoiser.blocks[0])}
        assert again == {*saving.model.denoiser.blocks[:blocks]}


def test_lanes_are_seeded_apart():
    seeds = {lane_seed(*key) for key in itertools.product(range(3), range(5), range(4))}
    assert len(seeds) == 60 and all(0 <= s < 2**63 for s in seeds)
    assert lane_seed(0, 1, 2) == lane_seed(0, 1, 2)


@pytest.mark.parametrize(("damage", "balance_start", "says"), [
    ("value", None, r"loss, lpips, grad_norm not finite; no update was made.* lane: {1: \['s2-1-0', 's2-1-1'\]}"),
    ("value", 0, "loss, lpips, grad_norm, percept_weight not finite"),
    ("gradient", None, r"grad_norm not finite.* {0: \['s2-0-0'.* 1: .* 2: .* 3: \['s2-3-0', 's2-3-1'\]}"),
    ("gradient", 0, "loss, grad_norm, percept_weight not finite"),
])
def test_a_number_that_is_not_finite_stops_before_the_update(damage, balance_start, says):
    """Whatever the state holds is as before the step, and the message says which term of which samples it was."""
    state = fresh_state()
    train(state, 2)
    before = copy.deepcopy(state.state_dict())
    with pytest.raises(NonFiniteError, match=f"step 2: {says}"):
        train(state, 4, goal=spoiled(damage, balance_start=balance_start), white=[(2, 1)])
    torch.testing.assert_close(state.state_dict(), before, rtol=0, atol=0)
    assert train(state, 3), "it can go on from there"


def test_a_balance_that_is_not_finite_stops_too(monkeypatch):
    monkeypatch.setattr("pixelgen.train.balance_weight", lambda *_: torch.tensor(math.nan))
    with pytest.raises(NonFiniteError, match="step 2: loss, grad_norm, percept_weight not finite"):
        train(fresh_state(), 3)


@pytest.mark.parametrize("damage", ["value", "gradient"])
def test_a_skipped_step_leaves_no_trace_but_its_number(damage, capsys):
    """The run ends where it would have ended if the step had not been there."""
    skipping, without = fresh_state(), fresh_state()
    log = train(skipping, 5, goal=spoiled(damage), white=[(2, 1)], may_skip=1)
    assert [entry["skipped"] for entry in log] == [0, 0, 1, 1, 1] and not math.isfinite(log[2]["grad_norm"])
    assert "skipped 1 of 1: step 2: " in (said := capsys.readouterr().err) and "1: ['s2-1-0', 's2-1-1']" in said
    train(without, 2, goal=spoiled(damage))
    without.step, without.skipped = 3, 1
    train(without, 5, goal=spoiled(damage))
    assert_same_state(skipping, without)


def test_one_more_than_may_be_skipped_stops(tmp_path):
    """They are counted over the whole run, across restarts."""
    state, resumed = fresh_state(), fresh_state(seed=9)
    options = {"goal": spoiled("value"), "white": [(0, 0), (2, 1), (4, 2)], "may_skip": 2}
    train(state, 3, **options)
    save_state(state.state_dict(), tmp_path / "state.pt")
    load_state(resumed, tmp_path / "state.pt")
    with pytest.raises(NonFiniteError, match=r"step 4: .*on_nonfinite allows 2 such steps, 2 were skipped before"):
        train(resumed, 6, **options)
    assert (resumed.step, resumed.skipped) == (4, 2)


def skip_one_and_stop_at_the_next(lanes):
    """Step 1 is bad on the second rank alone, step 3 on the first one."""
    state = fresh_state()
    with pytest.raises(NonFiniteError) as error, contextlib.redirect_stderr(io.StringIO()) as said:
        train(state, 6, lanes, spoiled("value"), white=[(1, 3), (3, 0)], may_skip=1)
    return {"state": state.state_dict(), "error": str(error.value), "said": said.getvalue()}


def test_ranks_skip_and_stop_together(tmp_path):
    first, second = on_ranks(2, skip_one_and_stop_at_the_next, tmp_path)
    assert first["error"] == second["error"] == (
        "step 3: loss, lpips, grad_norm not finite; no update was made. Samples by lane: {0: ['s3-0-0', 's3-0-1']} "
        "(on_nonfinite allows 1 such steps, 1 were skipped before)")
    assert "skipped 1 of 1: step 1: loss, lpips, grad_norm" in first["said"] and "{3: ['s1-3-0'," in first["said"]
    assert second["said"] == "", "one rank speaks for all"
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert (first["state"]["step"], first["state"]["skipped"]) == (3, 1)
    torch.testing.assert_close(first["state"], skip_one_and_stop_at_the_next(range(4))["state"], rtol=1e-5, atol=1e-6)


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


@pytest.mark.parametrize("options", [{"gate_threshold": 0.0}, {"gate_threshold": 1.0}, {"gate_threshold": 0.3},
                                     {"gate_threshold": 0.3, "gated": ()}])
def test_the_share_that_passes_the_gate_is_told(options):
    """Of all samples of all lanes, however many lanes share a pass."""
    goal, shares = objective(balance_start=None, **options), []
    draw = goal.draw

    def noted(*given):
        found = draw(*given)
        shares.append((found.t >= options["gate_threshold"]).float().mean().item())
        return found

    goal.draw = noted
    step, = train(fresh_state(), 1, goal=goal, memory=MemoryConfig(3))
    expected = 1 if options.get("gated") == () else sum(shares) / 4
    assert step["gate_share"] == pytest.approx(expected)
    assert len(shares) == 4 and (options != {"gate_threshold": 0.3} or 0 < expected < 1)


def test_gradient_norm_is_clipped():
    state = fresh_state()
    before = state.model.denoiser.output_weight.detach().clone()
    state.optimizer = torch.optim.SGD(state.model.parameters(), lr=1.0, fused=True)
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
    taken = take_steps(state, lanes, goal, OptimizerConfig(lr=5e-3), fit_config(steps=60, lanes=1))
    log = [step.metrics for step in taken]
    for name in ("loss", "fm", "lpips", "pdino"):
        first, last = (sum(entry[name] for entry in part) for part in (log[:10], log[-10:]))
        assert last < 0.2 * first, name


def taken(state, batches, stop=lambda: False, **options):
    return list(take_steps(state, batches, objective(), OPTIMIZER, fit_config(**options), stop))


def test_batches_have_to_be_those_of_the_step():
    with pytest.raises(AssertionError, match="batches out of step 0: "):
        taken(fresh_state(), batches(1))
    with pytest.raises(RuntimeError, match="the data ended at step 2 of 6"):
        taken(fresh_state(), itertools.islice(batches(), 2))


def test_a_finished_run_takes_no_further_step():
    state = fresh_state()
    train(state, 2)
    before = copy.deepcopy(state.state_dict())
    assert taken(state, iter([]), steps=2) == []
    torch.testing.assert_close(state.state_dict(), before, rtol=0, atol=0)


def test_the_last_step_is_told_and_how_long_each_waited_for_its_batches():
    def slow():
        for lanes in batches():
            time.sleep(0.1 if lanes[0].step == 1 else 0)
            yield lanes

    steps = taken(fresh_state(), slow(), steps=3)
    assert [step.last for step in steps] == [False, False, True]
    assert steps[1].waited >= 0.1
    asked = iter([False, True])
    assert [step.last for step in taken(fresh_state(), batches(), lambda: next(asked), steps=9)] == [False, True]


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
