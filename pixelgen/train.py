"""The training step and the loop around it: everything about training but where it runs and what is kept of it.

A rank trains on its lanes (see `FitConfig`), a few in each forward pass, accumulates their gradients, and DDP averages
them over ranks. Whatever is random is drawn for a lane by (seed, step, lane), so no generator state has to be saved,
and a run that is stopped and resumed takes the very steps that an undisturbed run takes: to the bit if as many lanes
go together, else but for rounding.
"""

import contextlib
import hashlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pixelgen.config import FitConfig, MemoryConfig, OptimizerConfig, require
from pixelgen.denoisers import Architecture
from pixelgen.ema import ema_copy, ema_update
from pixelgen.errors import UserError
from pixelgen.images import to_float
from pixelgen.losses import balance_weight
from pixelgen.models import DenoiserNetwork
from pixelgen.objective import Losses, Objective, WithProjector, join, repa_projector
from pixelgen.speed import compile_blocks, recompute_blocks


class NonFiniteError(UserError):
    """A loss term, the gradient or the perceptual weight is NaN or infinite. Raised before the optimizer step: the
    state is still good."""


@dataclass(frozen=True)
class LaneBatch:
    """What one lane sees at one step: keys of the samples, images (B, 3, H, W) uint8, and their conditions, labels (B,)
    or text features (B, L, C)."""

    step: int
    lane: int
    keys: Sequence[str]
    images: Tensor
    condition: Tensor


@dataclass
class TrainState:
    """All that training carries from step to step; saved and restored whole (`pixelgen.checkpoint`)."""

    model: WithProjector
    ema: DenoiserNetwork
    optimizer: torch.optim.Optimizer
    percept_weight: float = 1.0
    step: int = 0
    skipped: int = 0  # of these steps, those that passed without an update

    def state_dict(self) -> dict:
        return {"model": self.model.state_dict(), "ema": self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(), "percept_weight": self.percept_weight, "step": self.step,
                "skipped": self.skipped}

    def load_state_dict(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.percept_weight, self.step, self.skipped = state["percept_weight"], state["step"], state["skipped"]


def create_state(denoiser: Architecture, objective: Objective, optimizer: OptimizerConfig,
                 seed: int, device: torch.device) -> TrainState:
    """A fresh state; its weights depend on `seed` alone, so that every rank starts from the same."""
    torch.manual_seed(seed)
    model = denoiser.build()
    projector, block = None, None
    repa = objective.config.repa
    if repa.weight:
        block = repa.block
        require(block < denoiser.depth, f"repa.block {block}: the denoiser has blocks 0 to {denoiser.depth - 1}")
        projector = repa_projector(denoiser.width, objective.networks["dino"].width, repa.hidden or denoiser.width)
    trained = WithProjector(model, projector, block).to(device)
    o = optimizer
    adamw = torch.optim.AdamW(trained.parameters(), o.lr, o.betas, weight_decay=o.weight_decay, fused=True)
    return TrainState(trained, ema_copy(trained.denoiser), adamw)


def train_step(state: TrainState, model: nn.Module, lanes: Sequence[LaneBatch], objective: Objective,
               optimizer: OptimizerConfig, config: FitConfig, lanes_per_pass: int = 1, stop: bool = False,
               may_skip: int = 0) -> dict[str, float]:
    """One optimizer step on this rank's lanes; `model` is `state.model`, wrapped for the world it runs in.

    Returns the mean of every loss term over all lanes of all ranks, the norm of the gradient, the perceptual weight,
    the share of the samples that gated terms count, and the share of the ranks that `stop`. If one of them is not
    finite, nothing is updated: the step is skipped, or raises NonFiniteError.
    """
    weight = state.percept_weight
    if objective.balances_at(state.step):
        weight = refreshed_balance(state, lanes, objective, config)
    state.optimizer.zero_grad(set_to_none=True)
    rows: list[Tensor] = []
    passed = 0.0  # the gate
    for together in shared_out(lanes, lanes_per_pass):
        with synchronised(model, last=together[-1] is lanes[-1]):
            losses = lane_losses(model, state, together, objective, config, weight)
            (losses.total.sum() / len(lanes)).backward()
        passed += losses.gate_share * len(together) / len(lanes)
        rows += torch.stack([losses.total, *losses.terms.values()], dim=1).detach()
    norm = gradient_norm(state.model, optimizer.clip)
    of_host = [norm.new_full((1,), value) for value in (passed, stop)]
    means = mean_over_ranks(torch.cat([torch.stack(rows).mean(0), norm[None], *of_host]))
    read = reading(means)
    # The device itself passes over an update with numbers that are not finite. So it is busy with this one by the time
    # that the numbers are here, and with the averages while the next step is made ready.
    state.optimizer.found_inf = means.isfinite().all().logical_not().float()  # type: ignore[attr-defined]
    state.optimizer.step()
    names = ["loss", *losses.terms, "grad_norm", "gate_share", "stop"]
    metrics = dict(zip(names, read(), strict=True)) | {"percept_weight": weight}

    if bad := [name for name, value in metrics.items() if not math.isfinite(value)]:
        skip_or_stop(state, f"{', '.join(bad)} not finite", suspects(lanes, rows), may_skip)
    else:
        ema_update(state.ema, state.model.denoiser, config.ema_decay)
        state.percept_weight = weight
    state.step += 1
    return metrics


def gradient_norm(model: nn.Module, clip: float | None) -> Tensor:
    """The norm () of all gradients together, which are then clipped to a norm of `clip` at most."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    if clip is not None:
        nn.utils.clip_grads_with_norm_(model.parameters(), clip, norm)
    return norm


def reading(values: Tensor) -> Callable[[], list[float]]:
    """Begin to copy values to the host. What is returned waits for them, but not for what the device does after."""
    if values.device.type != "cuda":
        return values.tolist
    copied, done = values.to("cpu", non_blocking=True), torch.cuda.Event()
    done.record()

    def read() -> list[float]:
        done.synchronize()
        return copied.tolist()

    return read


def shared_out(lanes: Sequence[LaneBatch], at_most: int) -> list[Sequence[LaneBatch]]:
    """Split the lanes into as few groups as possible of at most `at_most`, of sizes that differ by one at most."""
    count = -(-len(lanes) // at_most)
    return [lanes[len(lanes) * i // count:len(lanes) * (i + 1) // count] for i in range(count)]


def lane_losses(model: nn.Module, state: TrainState, lanes: Sequence[LaneBatch], objective: Objective,
                config: FitConfig, percept_weight: float) -> Losses:
    """The objective on some lanes in one forward pass. A lane's noise, times and dropout depend neither on the lanes it
    is grouped with nor on the rank."""
    images, draws = [to_float(batch.images) for batch in lanes], []
    for x, batch in zip(images, lanes, strict=True):
        torch.manual_seed(lane_seed(config.seed, batch.step, batch.lane))
        draws.append(objective.draw(x, batch.condition, state.model.denoiser.draw_dropout))
    joined = join(draws)
    del draws  # masks of dropout are large
    with torch.autocast(images[0].device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return objective(model, torch.cat(images), joined, percept_weight, len(lanes))


def lane_seed(seed: int, step: int, lane: int) -> int:
    digest = hashlib.sha256(f"{seed}/{step}/{lane}".encode()).digest()
    return int.from_bytes(digest[:8]) >> 1


def refreshed_balance(state: TrainState, lanes: Sequence[LaneBatch], objective: Objective, config: FitConfig
                      ) -> float:
    """0.8·w + 0.2·(mean over all lanes of the gradient balance at the output layer), the same on every rank.

    The balance is found in a forward pass of its own, before the step, since all lanes' steps need the new w.
    """
    weights = []
    for batch in lanes:
        losses = lane_losses(state.model, state, [batch], objective, config, state.percept_weight)
        if not losses.perceptual.requires_grad:  # no sample passed the gate: this lane has no say
            continue
        weights.append(balance_weight(losses.reconstruction[0], losses.perceptual[0],
                                      state.model.denoiser.output_weight))
    device = lanes[0].images.device
    total = torch.stack([*weights, torch.zeros((), device=device)]).sum()
    sums = mean_over_ranks(torch.stack([total, torch.tensor(float(len(weights)), device=device)]))
    if sums[1] == 0:
        return state.percept_weight
    return 0.8 * state.percept_weight + 0.2 * (sums[0] / sums[1]).item()


def skip_or_stop(state: TrainState, reason: str, samples: dict[int, list[str]], may_skip: int) -> None:
    """Count a step without an update, or raise NonFiniteError if no more of them are allowed.

    What this rests on is the same on every rank, and so is the outcome.
    """
    message = f"step {state.step}: {reason}; no update was made. Samples by lane: {samples}"
    if state.skipped >= may_skip:
        raise NonFiniteError(message + f" (on_nonfinite allows {may_skip} such steps, {state.skipped} were skipped "
                             "before)")
    state.skipped += 1
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(f"skipped {state.skipped} of {may_skip}: {message}", file=sys.stderr, flush=True)


def suspects(lanes: Sequence[LaneBatch], rows: Sequence[Tensor]) -> dict[int, list[str]]:
    """Keys of the samples by lane, from all ranks: of the lanes with a loss (their row) that is not finite; of every
    lane if only the gradient is not."""
    every = [(b.lane, list(b.keys), bool(row.isfinite().all())) for b, row in zip(lanes, rows, strict=True)]
    if world_size() > 1:
        parts: list[list] = [[]] * world_size()
        dist.all_gather_object(parts, every)
        every = [entry for part in parts for entry in part]
    return {lane: keys for lane, keys, finite in every if not finite} or {lane: keys for lane, keys, _ in every}


@dataclass(frozen=True)
class Step:
    """What a recorder learns of an optimizer step. The state is the one that trains on: who keeps it copies it."""

    state: TrainState  # after the step
    metrics: dict[str, float]
    waited: float  # seconds for the batches
    last: bool  # training ends with it: all steps are done, or somebody asked for a stop


class Recorder(Protocol):
    """Whatever is done about the steps beside taking them: curves, grids, checkpoints."""

    def record(self, step: Step) -> None:
        """Called after every step of its rank."""


def train(state: TrainState, batches: Iterator[Sequence[LaneBatch]], objective: Objective, optimizer: OptimizerConfig,
          config: FitConfig, stop: Callable[[], bool] = lambda: False, memory: MemoryConfig = MemoryConfig(),
          may_skip: int = 0) -> Iterator[Step]:
    """The steps to `config.steps`, each taken when it is asked for. Where `stop` is true on any rank, all end after the
    same step. `batches` yields this rank's lanes, beginning at `state.step`. Of the whole run, `may_skip` steps may
    pass without an update because a number is not finite; one more is a NonFiniteError."""
    if state.step >= config.steps:
        return
    model, last = wrapped(state, objective, config, memory.recomputed_blocks), False
    while not last:
        began = time.perf_counter()
        lanes = next(batches, None)
        if lanes is None:
            raise RuntimeError(f"the data ended at step {state.step} of {config.steps}")
        waited = time.perf_counter() - began
        assert all(b.step == state.step for b in lanes), f"batches out of step {state.step}: {[b.step for b in lanes]}"
        metrics = train_step(state, model, lanes, objective, optimizer, config, memory.lanes_per_pass or 1, stop(),
                             may_skip)
        last = metrics.pop("stop") > 0 or state.step == config.steps
        yield Step(state, metrics, waited, last)


def wrapped(state: TrainState, objective: Objective, config: FitConfig, recomputed_blocks: int = 0) -> nn.Module:
    """The model of a state, compiled if that is asked for, and for the world it runs in."""
    recompute_blocks(state.model.denoiser, recomputed_blocks)
    if config.compile:
        from torch._dynamo import config as dynamo  # which takes a second to import
        from torch._functorch import config as functorch

        # the balance of gradients keeps the graph of a backward pass, which must not have given its buffers away
        functorch.donated_buffer = objective.config.balance_start is None
        dynamo.optimize_ddp = False  # it would cut a block into pieces, and what is compiled is a block already
        compile_blocks(state.model.denoiser)
        objective.compile()
    if world_size() == 1:
        return state.model
    # Buffers are tables that never change. Gradients are put into other buckets after the first step, unless unused
    # parameters are looked for: three ranks or more would then round otherwise after a resume than without one.
    exact = state.model.denoiser.output_weight.device.type == "cpu"
    return DistributedDataParallel(state.model, broadcast_buffers=False, find_unused_parameters=exact,
                                   gradient_as_bucket_view=True)


def synchronised(model: nn.Module, last: bool) -> contextlib.AbstractContextManager:
    """DDP averages gradients over ranks in the backward pass of the last lane only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    return contextlib.nullcontext()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_over_ranks(values: Tensor) -> Tensor:
    if world_size() > 1:
        dist.all_reduce(values)
        values = values / world_size()
    return values
