"""Samplers by closed-form solutions, guidance by its identities."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch

from pixelgen.cli import main
from pixelgen.config import load
from pixelgen.path import shift_time
from pixelgen.samplers import Sampler
from pixelgen.samplers.adams_bashforth import AdamsBashforth, adams_weights
from pixelgen.samplers.euler import Euler
from pixelgen.samplers.heun import Heun
from pixelgen.sampling import guided_velocity, sample, sampling_times
from tests.pixelgen.conftest import some_images

NOISE = some_images(2, size=4).double()


class Inexact(Heun):
    exact = False


SAMPLERS = {"euler": Euler(), "heun": Heun(), "heun-inexact": Inexact()} | {
    f"adams-{k}": AdamsBashforth(order=k) for k in (1, 2, 3, 4)}
CONFIGS: list[Sampler] = [Euler(7, 3.0), Heun(6, 2.0, (0.1, 0.9), 2.0), AdamsBashforth(5, 4.0, timeshift=3.0)]
IDS = [c.kind for c in CONFIGS]


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("heun-inexact", 2), ("adams-1", 1),
                                             ("adams-2", 2), ("adams-3", 3), ("adams-4", 4)])
@pytest.mark.parametrize("shift", [1.0, 2.0])
def test_order_of_convergence(name, order, shift):
    """dx/dt = 5t⁴·x has x(1) = e·x(0), and starts so gently that the first, lower-order steps cost nothing."""

    def error(steps):
        times = shift_time(torch.linspace(0, 1, steps + 1, dtype=torch.float64), shift)
        x = SAMPLERS[name].integrate(lambda x, t, at: 5 * t**4 * x, NOISE, times)
        return (x - math.e * NOISE).abs().max().item()

    assert math.log2(error(256) / error(512)) == pytest.approx(order, abs=0.25)


def test_adams_weights_integrate_polynomials_exactly():
    generator = torch.Generator().manual_seed(0)
    for k in (1, 2, 3, 4):
        nodes = torch.rand(k, generator=generator, dtype=torch.float64).cumsum(0)
        start, end = nodes[-1], nodes[-1] + 0.3
        weights = adams_weights(nodes, start, end)
        for degree in range(k):
            mean = (end ** (degree + 1) - start ** (degree + 1)) / ((degree + 1) * (end - start))
            torch.testing.assert_close(weights @ nodes**degree, mean)


@pytest.mark.parametrize(("k", "classical"), [(1, [1]), (2, [-1 / 2, 3 / 2]), (3, [5 / 12, -16 / 12, 23 / 12]),
                                              (4, [-9 / 24, 37 / 24, -59 / 24, 55 / 24])])
def test_adams_weights_of_equal_steps_are_the_classical_ones(k, classical):
    nodes = torch.arange(k) / 8
    torch.testing.assert_close(adams_weights(nodes, nodes[-1], nodes[-1] + 1 / 8),
                               torch.tensor(classical, dtype=torch.float64))


def test_sampling_times():
    torch.testing.assert_close(sampling_times(4), torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    torch.testing.assert_close(sampling_times(3, last_step=0.1), torch.tensor([0, 0.45, 0.9, 1]))
    assert torch.equal(sampling_times(1), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(sampling_times(4, 3.0), shift_time(sampling_times(4), 3.0))


# ------------------------------------------------------------------------------------------------------- guidance


class Denoiser:
    """Predicts the condition everywhere; counts the rows that it is asked for."""

    def __init__(self):
        self.rows = 0

    def __call__(self, x, t, condition):
        self.rows += len(x)
        return condition.view(-1, 1, 1, 1).expand_as(x)


CONDITION, NULL = torch.tensor([1.0, 2.0]), torch.tensor([-1.0, -1.0])


def at(value):
    return torch.tensor(value)


def guided(guidance, t=0.5, null=NULL, **options):
    denoise = Denoiser()
    v = guided_velocity(denoise, CONDITION, null, guidance, **options)(NOISE.float(), at(t), at(t))
    return v, denoise.rows


def test_guidance_is_linear_between_the_conditions():
    conditional, null = guided(1.0)[0], guided_velocity(Denoiser(), NULL, None)(NOISE.float(), at(0.5), at(0.5))
    for g in (0.0, 0.5, 2.0, 4.0):
        torch.testing.assert_close(guided(g)[0], null + g * (conditional - null))
    torch.testing.assert_close(guided(3.0, null=CONDITION)[0], conditional)


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_nothing_waits_for_the_device(config):
    """On a device without numbers: to ask for one is an error."""
    noise, condition = torch.empty(2, 3, 4, 4, device="meta"), torch.empty(2, 1, device="meta")
    x = sample(lambda x, t, y: x * t.view(-1, 1, 1, 1), noise, condition, condition, config)
    assert x.device.type == "meta" and x.shape == noise.shape


def test_guidance_acts_above_the_low_end_and_up_to_the_high_one():
    def acts(t, **options):
        return guided(3.0, t, interval=(0.25, 0.75), **options)[1] == 4

    assert [acts(t) for t in (0.0, 0.25, 0.26, 0.75, 0.76, 1.0)] == [False, False, True, True, False, False]
    assert not acts(0.75, include_high=False) and acts(0.74, include_high=False)


def test_the_null_condition_is_evaluated_only_where_it_counts():
    assert guided(1.0, null=None)[1] == 2
    assert guided(3.0, 0.1, null=None, interval=(0.25, 0.75))[1] == 2
    assert guided(3.0, 0.5)[1] == 4
    with pytest.raises(AssertionError, match="null"):
        guided(3.0, null=None)


def test_the_start_of_the_step_alone_decides_on_guidance():
    denoise = Denoiser()
    v = guided_velocity(denoise, CONDITION, NULL, 3.0, (0.25, 0.75))
    v(NOISE.float(), at(0.9), at(0.5))
    assert denoise.rows == 4
    v(NOISE.float(), at(0.5), at(0.9))
    assert denoise.rows == 4 + 2


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_a_sure_denoiser_is_believed(config):
    """Whatever the noise and the steps, a prediction that never changes is where the path ends."""
    x = sample(Denoiser(), NOISE.float(), CONDITION, CONDITION, config)
    torch.testing.assert_close(x, CONDITION.view(-1, 1, 1, 1).expand_as(x))


@pytest.mark.parametrize("config", CONFIGS, ids=IDS)
def test_callback_sees_every_step(config):
    seen = []
    times = sampling_times(config.steps, config.timeshift)
    x = sample(Denoiser(), NOISE.float(), CONDITION, NULL, config, lambda *step: seen.append(step))
    assert [i for i, _, _ in seen] == list(range(config.steps))
    assert torch.equal(seen[0][1], NOISE.float())
    for (i, before, slope), after in zip(seen, [s[1] for s in seen[1:]] + [x], strict=True):
        torch.testing.assert_close(before + (times[i + 1] - times[i]) * slope, after)


@pytest.mark.parametrize(("config", "calls"), list(zip(CONFIGS, (7, 11, 5), strict=True)), ids=IDS)
def test_number_of_evaluations(config, calls):
    denoise = Denoiser()
    sample(denoise, NOISE.float(), CONDITION, None, dataclasses.replace(config, guidance=1.0))
    assert denoise.rows == calls * len(NOISE)


# ---------------------------------------------------------------------------------------------------- one more kind


@dataclass(frozen=True)
class Leap(Sampler):
    """One step, whatever is asked for, and from `skew` beside the noise."""

    skew: float = 0.0  # added to the noise

    def integrate(self, v, noise, times, callback=None):
        return Euler().integrate(v, noise + self.skew, times[[0, -1]], callback)


def test_a_sampler_is_a_class_and_an_entry(monkeypatch, capsys):
    """Files, the command line and its help know it by that; an option of another one is an error that says which there
    are."""
    monkeypatch.setitem(Sampler.kinds, "leap", f"{__name__}:Leap")
    leap = load(Sampler, {"leap": {"steps": 3, "skew": 1}})
    assert leap == Leap(3, skew=1.0) and leap.kind == "leap"
    denoise = Denoiser()
    sample(denoise, NOISE.float(), CONDITION, None, leap)
    assert denoise.rows == len(NOISE)
    with pytest.raises(SystemExit):
        main(["sample", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "{euler,heun,adams_bashforth,leap}" in said and "--skew SKEW added to the noise (of leap)" in said
    assert "--interval LOW HIGH guidance acts where interval[0] < t <= interval[1] --" in said
    assert main(["sample", "m", "x.png", "--labels", "0", "--sampler", "leap", "--order", "2"]) == 1
    assert "--sampler.leap: key: 'order' is not known; valid: guidance, interval, skew," in capsys.readouterr().err
    assert main(["sample", "m", "x.png", "--labels", "0", "--sampler", "leap", "--skew", "2"]) == 1
    assert "no config.json" in capsys.readouterr().err, "the sampler is right, the model is not there"
