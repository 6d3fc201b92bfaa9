"""From an x-prediction denoiser to images: its guided velocity field, which a sampler integrates over the times."""

from collections.abc import Callable

import torch
from torch import Tensor

from pixelgen.path import shift_time, velocity
from pixelgen.samplers import Callback, Sampler, Velocity

Denoise = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_t, t (B,), condition) -> predicted clean x


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


def sample(denoise: Denoise, noise: Tensor, condition: Tensor, null: Tensor | None, sampler: Sampler,
           callback: Callback | None = None) -> Tensor:
    """Images in about [-1, 1] from `noise` (B, 3, H, W). `condition` and `null` have B rows."""
    v = guided_velocity(denoise, condition, null, sampler.guidance, sampler.interval, sampler.includes_high)
    return sampler.integrate(v, noise, sampling_times(sampler.steps, sampler.timeshift), callback)
