"""Samplers and guidance against golden trajectories of a closed-form denoiser."""

import numpy as np
import torch

from pixelgen.samplers import Sampler
from pixelgen.samplers.adams_bashforth import AdamsBashforth, adams_weights
from pixelgen.samplers.euler import Euler
from pixelgen.samplers.heun import Heun
from pixelgen.sampling import guided_velocity, sample, sampling_times
from tests.parity.conftest import (
    assert_close,
    each,
    read_arrays,
    read_json,
    tensors,
    unlisted,
)

LISTED, ARRAYS = read_json("samplers.json"), read_arrays("samplers.npz")
CASES = LISTED.get("cases", [])
ADAMS = [c for c in CASES if c["sampler"] == "adam"]


def test_cases_were_found():
    assert CASES


def test_every_array_is_of_a_listed_case():
    assert not unlisted(ARRAYS, r"(case\d+)_", CASES)


class Denoiser:
    """The closed-form denoiser of the golden file; remembers the time and the number of rows of every call."""

    def __init__(self):
        self.times, self.rows = [], []

    def __call__(self, x, t, condition):
        assert t.shape == condition.shape == (len(x),) and bool((t == t[0]).all())
        self.times.append(t[0].item())
        self.rows.append(len(x))
        c = LISTED["net_coefficients"]
        t, condition = (v.view(-1, 1, 1, 1) for v in (t, condition))
        return torch.tanh(c["x"] * x + c["t"] * t + c["c"] * condition)


class Inexact(Heun):
    exact = False


def x_tolerance(case) -> float:
    """The reference's float32 table of Adams coefficients costs it accuracy at orders 3 and 4."""
    return 2e-4 if case.get("order", 0) > 2 else 1e-5


@each(CASES)
def test_sampler(case):
    shared, want = tensors(ARRAYS), tensors(ARRAYS, case["key"] + "_")
    denoise, xs, vs = Denoiser(), [], []
    v = guided_velocity(denoise, shared["cond"], shared["uncond"], case["guidance"], (case["gmin"], case["gmax"]),
                        include_high=case["sampler"] != "adam")
    times = sampling_times(case["num_steps"], case["timeshift"], case.get("last_step"))

    def callback(step, x, slope):
        assert step == len(xs)
        xs.append(x)
        vs.append(slope)

    heun = Heun() if case.get("exact_henu", True) else Inexact()
    sampler = {"euler": Euler(), "heun": heun, "adam": AdamsBashforth(order=case.get("order", 2))}[case["sampler"]]
    x = sampler.integrate(v, shared["noise"], times, callback)

    atol = x_tolerance(case)
    assert_close(times, want["timesteps"], 1e-6)
    assert_close(denoise.times, want["net_t"], 1e-6)
    assert len(denoise.times) == case["net_calls"]
    assert_close(x, want["x"], atol)
    assert_close(torch.stack([*xs, x]), want["x_traj"], atol)
    assert_close(torch.stack(vs), want["v_traj"][:-1], 20 * atol)  # a velocity divides by 1-t >= 1/20
    assert not want["v_traj"][-1].any()
    assert denoise.rows == expected_rows(case, want["timesteps"].numpy(), len(shared["noise"]))


def expected_rows(case, times: np.ndarray, batch: int) -> list[int]:
    """Rows of every call: twice the batch where guidance acts in the step that the call belongs to, else the batch."""
    steps = list(range(case["num_steps"]))
    if case["sampler"] == "heun":  # the second evaluation belongs to the step that it ends; the last step has none
        first = steps if case["exact_henu"] else steps[:1]
        steps = sorted(first + steps[:-1])
    low, high = np.float32(case["gmin"]), np.float32(case["gmax"])
    start = times[steps]
    inside = (low < start) & ((start < high) if case["sampler"] == "adam" else (start <= high))
    return [2 * batch if acts and case["guidance"] != 1 else batch for acts in inside]


@each([c for c in CASES if c.get("last_step") is None and c.get("exact_henu", True)])
def test_sample_takes_the_same_way(case):
    """The settings as options reach the same images through `sample`."""
    shared = tensors(ARRAYS)
    kind = {"adam": "adams_bashforth"}.get(case["sampler"], case["sampler"])
    options = {"order": case["order"]} if kind == "adams_bashforth" else {}
    sampler = Sampler.of(kind)(case["num_steps"], case["guidance"], (case["gmin"], case["gmax"]), case["timeshift"],
                               **options)
    x = sample(Denoiser(), shared["noise"], shared["cond"], shared["uncond"], sampler)
    assert_close(x, ARRAYS[case["key"] + "_x"], x_tolerance(case))


@each(ADAMS)
def test_adams_weights(case):
    want = tensors(ARRAYS, case["key"] + "_")
    times, coefficients = want["timesteps"], want["solver_coeffs"]
    atol = 3e-3 if case["order"] > 2 else 1e-5
    assert len(coefficients) == len(want["solver_order"]) == case["num_steps"]
    for i, (row, order) in enumerate(zip(coefficients, want["solver_order"].tolist(), strict=True)):
        assert order == min(i + 1, case["order"])
        assert_close(adams_weights(times[i + 1 - order: i + 1], times[i], times[i + 1]), row[:order], atol)
        assert not row[order:].any()
