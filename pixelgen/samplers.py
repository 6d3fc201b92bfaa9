"""Samplers: integrate dx/dt = v(x, t) from noise (t = 0) to an image (t = 1).

Each sampler is a function of a velocity field, the noise and the times, which are on the CPU, so that nothing waits for
the device. The field is called as `v(x, t, at)`: `t` is where it is evaluated, `at` the start of the step, which alone
decides whether guidance acts. `guided_velocity` makes such a field from an x-prediction denoiser, and `sample` puts the
two together.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from pixelgen.config import SamplerConfig
from pixelgen.path import shift_time, velocity

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t (B,), condition) -> predicted clean x
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, t, start of the step), both times scalars
Callback = Callable[[int, Tensor, Tensor], None]  # (step, x before it, velocity it used)


def sampling_times(steps: int, shift: float = 1.0, last_step: float | None = None) -> Tensor:
    """(steps+1,) times from 0 to 1: equidistant up to 1 - last_step (default 1/steps), then 1; all shifted."""
    last = 1 / steps if last_step is None else last_step
    return shift_time(torch.cat([torch.linspace(0, 1 - last, steps), torch.ones(1)]), shift)


def guided_velocity(denoise: Denoise, condition: Tensor, null: Tensor | None, guidance: float = 1.0,
                    interval: tuple[float, float] = (0.0, 1.0), include_high: bool = True) -> Velocity:
    """Classifier-free guidance on the velocity: v = v_null + g·(v_condition - v_null) inside the interval.

    The interval is low < t <= high (t < high without `include_high`). Outside it, and where g = 1, the guided
    velocity is the conditional one, and the null condition is never evaluated: `null` may then be None.
    """

    def field(x: Tensor, t: Tensor, at: Tensor) -> Tensor:
        low, high = at.new_tensor(interval)
        inside = bool(low < at) and bool(at <= high if include_high else at < high)
        t = t.to(x.device, non_blocking=True)
        if guidance == 1 or not inside:
            times = t.expand(len(x))
            return velocity(denoise(x, times, condition), x, times)
        assert null is not None, "guidance needs the null condition"
        twice, times = torch.cat([x, x]), t.expand(2 * len(x))
        v = velocity(denoise(twice, times, torch.cat([null, condition])), twice, times)
        v_null, v_condition = v.chunk(2)
        return v_null + guidance * (v_condition - v_null)

    return field


def euler(v: Velocity, noise: Tensor, times: Tensor, callback: Callback | None = None) -> Tensor:
    """First order: x ← x + Δt·v(x, t). One evaluation a step."""
    x = noise
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        slope = v(x, t, t)
        if callback:
            callback(i, x, slope)
        x = x + (t_next - t) * slope
    return x


def heun(v: Velocity, noise: Tensor, times: Tensor, callback: Callback | None = None, exact: bool = True) -> Tensor:
    """Second order: the mean slope of the step's start and its Euler end; the last step is an Euler step.

    Two evaluations a step; without `exact`, a step starts from the slope found at the end of the one before (at its
    Euler point, not at the corrected x), which costs one.
    """
    x, carried = noise, None
    last = len(times) - 2
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        slope = v(x, t, t) if exact or carried is None else carried
        if i < last:
            carried = v(x + (t_next - t) * slope, t_next, t)
            slope = (slope + carried) / 2
        if callback:
            callback(i, x, slope)
        x = x + (t_next - t) * slope
    return x


def adams_bashforth(v: Velocity, noise: Tensor, times: Tensor, callback: Callback | None = None,
                    order: int = 2) -> Tensor:
    """Order k: integrate the polynomial through the last k velocities over the step. One evaluation a step."""
    x = noise
    past: list[Tensor] = []
    for i, (t, t_next) in enumerate(itertools.pairwise(times)):
        past = [*past, v(x, t, t)][-order:]
        weights = adams_weights(times[i + 1 - len(past): i + 1], t, t_next).to(x.dtype)
        slope = torch.stack([w * p for w, p in zip(weights, past, strict=True)]).sum(0)
        if callback:
            callback(i, x, slope)
        x = x + (t_next - t) * slope
    return x


def adams_weights(nodes: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Weights (k,) of velocities at `nodes`: means over [start, end] of their Lagrange polynomials. float64."""
    nodes, start, end = nodes.double(), start.double(), end.double()
    # In s = (t - start)/(end - start) the mean of s^j is 1/(j+1), so that Vᵀ·w = (1, 1/2, …, 1/k) with V the
    # Vandermonde matrix of the nodes: the weights integrate every polynomial of degree below k exactly.
    s = (nodes - start) / (end - start)
    powers = torch.arange(len(nodes), dtype=torch.float64)
    return torch.linalg.solve(s[None] ** powers[:, None], 1 / (powers + 1))


def sample(denoise: Denoise, noise: Tensor, condition: Tensor, null: Tensor | None, config: SamplerConfig,
           callback: Callback | None = None) -> Tensor:
    """Images in about [-1, 1] from `noise` (B, 3, H, W), as `config` says. `condition` and `null` have B rows."""
    v = guided_velocity(denoise, condition, null, config.guidance, config.interval,
                        include_high=config.name != "adams_bashforth")
    times = sampling_times(config.steps, config.timeshift)
    if config.name == "euler":
        return euler(v, noise, times, callback)
    if config.name == "heun":
        return heun(v, noise, times, callback)
    assert config.order is not None
    return adams_bashforth(v, noise, times, callback, config.order)
