"""The path by its identities."""

import math

import pytest
import torch

from pixelgen.losses import flow_matching
from pixelgen.path import (
    FLOOR,
    draw_time,
    interpolate,
    per_sample,
    shift_time,
    velocity,
)
from pixelgen.terms import ObjectiveConfig
from tests.pixelgen.conftest import some_images

X, NOISE = some_images(5, seed=1).double(), some_images(5, seed=2).double()
T = torch.tensor([0.0, 0.2, 0.5, 0.9, 0.95], dtype=torch.float64)  # 1-t is at least the floor


def test_ends_of_the_path():
    zeros, ones = torch.zeros(5), torch.ones(5)
    assert torch.equal(interpolate(X, NOISE, zeros), NOISE)
    assert torch.equal(interpolate(X, NOISE, ones), X)


def test_velocity_is_the_derivative_along_the_path():
    x_t = interpolate(X, NOISE, T)
    torch.testing.assert_close(velocity(X, x_t, T), X - NOISE)
    torch.testing.assert_close(x_t + per_sample(1 - T, x_t) * velocity(X, x_t, T), X)


def test_velocity_has_a_floor():
    assert FLOOR == 0.05
    for t in (0.96, 1.0):
        times = torch.full((5,), t, dtype=torch.float64)
        torch.testing.assert_close(velocity(X, NOISE, times), (X - NOISE) / 0.05)


def test_flow_matching_is_the_weighted_error_of_the_image():
    x_t = interpolate(X, NOISE, T)
    error = (NOISE - X).square().flatten(1).mean(1)
    torch.testing.assert_close(flow_matching(NOISE, X, x_t, T), error / (1 - T).clamp_min(0.05) ** 2)
    assert not flow_matching(X, X, x_t, T).any()


def test_shift_of_time():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    for shift in (0.5, 1.0, 3.0):
        shifted = shift_time(t, shift)
        assert shifted[0] == 0 and shifted[-1] == 1 and bool((shifted.diff() > 0).all())
        torch.testing.assert_close(shift_time(shifted, 1 / shift), t)
    torch.testing.assert_close(shift_time(t, 1.0), t)
    torch.testing.assert_close(shift_time(shift_time(t, 2.0), 3.0), shift_time(t, 6.0))
    assert bool((shift_time(t, 2.0)[1:-1] < t[1:-1]).all())
    assert shift_time(torch.tensor(0.5), 3.0) == 0.25


def test_training_times():
    c = ObjectiveConfig()
    t = draw_time(torch.tensor([0.0, 1.0]), c.time_mean, c.time_std, 1.0)
    torch.testing.assert_close(t, torch.tensor([1 / (1 + math.exp(0.8)), 0.5]))
    assert draw_time(torch.zeros(1), 0.0, 1.0, 3.0) == 0.25


def test_about_half_of_the_training_times_pass_the_gate():
    """P(sigmoid(m + s·z) >= g) = Φ((m - logit g) / s) = 0.5235 with the published numbers."""
    c = ObjectiveConfig()
    quantiles = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    t = draw_time(torch.special.ndtri(quantiles), c.time_mean, c.time_std, c.timeshift)
    expected = torch.special.ndtr(torch.tensor((c.time_mean - math.log(0.3 / 0.7)) / c.time_std))
    assert (t >= c.gate_threshold).double().mean().item() == pytest.approx(expected.item(), abs=2e-4)
    assert expected.item() == pytest.approx(0.5235, abs=1e-3)
