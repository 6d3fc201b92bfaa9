"""The objective: gates, weights and balance; and the two frozen networks, loaded from files."""

import contextlib
import copy
import functools
import json
import warnings
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

import lpips
import pytest
import torch
from safetensors.torch import load_file, save_file

from pixelgen.config import ConfigError, load
from pixelgen.encoders.dino import (
    MEAN,
    PATCH,
    STD,
    interpolate_positions,
    load_dino,
    resize_bicubic,
    resize_by_matrices,
)
from pixelgen.encoders.lpips import load_lpips, unit
from pixelgen.estimate import gate_share, training_operations
from pixelgen.losses import TERMS, Term, balance_weight, feature_distance
from pixelgen.objective import Draws, Losses, Objective, WithProjector, join, repa_projector
from pixelgen.precision import store_in_bf16
from pixelgen.terms import ObjectiveConfig, TermConfig
from tests.pixelgen.conftest import (
    StandInDino,
    objective_config,
    some_images,
    stand_in_lpips,
    tiny_denoiser,
)

X = some_images(4)
NULL = torch.tensor(-1)
NETWORKS = {"dino": StandInDino(), "lpips": stand_in_lpips}
TIMES = torch.tensor([0.1, 0.3, 0.6, 0.2])  # two pass the gate at 0.3


def run(t=TIMES, dino=None, lpips=stand_in_lpips, patch_size=16, percept_weight=1.0, **options):
    """The objective on a fixed prediction -> losses, and the gradient of the total at the prediction."""
    prediction = (X + some_images(4, seed=9) / 4).requires_grad_()
    config = objective_config(**{"pdino_block": 1, "balance_start": None} | options)
    objective = Objective(config, patch_size, NULL, {"dino": dino or StandInDino(), "lpips": lpips})
    draws = Draws(some_images(4, seed=7), t, torch.zeros(4, dtype=torch.long))
    projected = some_images(4, seed=8)[:, 0, :4, :6]
    losses = objective(lambda *_: (prediction, projected), X, draws, percept_weight)
    gradient, = torch.autograd.grad(losses.total[0], prediction)
    return of_lane(losses, 0), gradient


def of_lane(losses, lane):
    """The losses of one lane, as scalars."""
    terms = {name: values[lane] for name, values in losses.terms.items()}
    return Losses(losses.total[lane], losses.reconstruction[lane], losses.perceptual[lane], terms)


def test_the_total_is_the_weighted_sum_of_its_terms():
    losses, _ = run(repa_weight=0.5, lpips_weight=0.2, pdino_weight=0.3, percept_weight=1.7)
    terms = losses.terms
    assert list(terms) == ["fm", "repa", "lpips", "pdino"]
    perceptual = 0.2 * terms["lpips"] + 0.3 * terms["pdino"]
    torch.testing.assert_close(losses.perceptual, perceptual)
    torch.testing.assert_close(losses.total, terms["fm"] + 0.5 * terms["repa"] + 1.7 * perceptual)
    assert torch.equal(losses.reconstruction, terms["fm"])


@pytest.mark.parametrize("gated", [(), ("lpips",), ("lpips", "pdino")])
def test_lanes_that_share_a_pass_have_the_losses_of_lanes_alone(gated):
    """The first lane has two samples that pass the gate, the second none, the third one."""
    objective = Objective(objective_config(pdino_block=1, balance_start=None, gated=gated), 16, NULL, NETWORKS)
    x, model = some_images(9), tiny_denoiser(dropout=0.2)
    t = torch.tensor([0.4, 0.1, 0.9, 0.1, 0.2, 0.0, 0.1, 0.3, 0.2])
    projected = WithProjector(model, repa_projector(32, 6, 16), 1)
    alone = [Draws(some_images(3, seed=lane), t[lane:][:3], torch.tensor([0, 1, 4]), model.draw_dropout(3))
             for lane in (0, 3, 6)]
    together = objective(projected, x, join(alone), 1.7, lanes=3)
    for lane, draws in enumerate(alone):
        expected = of_lane(objective(projected, x[3 * lane:][:3], draws, 1.7), 0)
        torch.testing.assert_close(vars(of_lane(together, lane)), vars(expected))
    assert (together.terms["lpips"][1] == 0) == ("lpips" in gated)


def test_gated_terms_count_the_samples_that_pass():
    prediction = X + some_images(4, seed=9) / 4
    distances = stand_in_lpips(prediction, X)
    losses, _ = run(gated=("lpips",))
    torch.testing.assert_close(losses.terms["lpips"], distances[1:3].mean())
    everyone, _ = run(gated=())
    torch.testing.assert_close(everyone.terms["lpips"], distances.mean())
    assert torch.equal(losses.terms["pdino"], everyone.terms["pdino"])
    both, _ = run(gated=("lpips", "pdino"))
    assert torch.equal(both.terms["lpips"], losses.terms["lpips"])
    assert not torch.equal(both.terms["pdino"], everyone.terms["pdino"])
    off, _ = run(gated=("lpips", "pdino"), gate_threshold=0.0)
    assert torch.equal(off.total, everyone.total)


def test_a_gate_that_no_sample_passes_contributes_nothing():
    losses, gradient = run(torch.full((4,), 0.1), gated=("lpips", "pdino"))
    assert losses.terms["lpips"] == losses.terms["pdino"] == losses.perceptual == 0
    assert gradient.isfinite().all() and gradient.any()
    plain, expected = run(torch.full((4,), 0.1), gated=(), lpips_weight=0.0, pdino_weight=0.0)
    assert torch.equal(losses.total, plain.total) and torch.equal(gradient, expected)


@dataclass(frozen=True)
class EdgesConfig(TermConfig):
    """What a developer adds to `pixelgen.config`: a class like this and a field of `ObjectiveConfig`."""

    networks: ClassVar = ("lpips",)

    weight: float = 2.0
    gated: bool = True
    shift: int = 1  # pixels


@dataclass(frozen=True)
class WithEdges(ObjectiveConfig):
    edges: EdgesConfig = EdgesConfig()


def edges(seen, options):
    """… and to `pixelgen.losses`, beside a row."""
    assert len(seen.prediction) == len(seen.images) == len(seen.projected) == len(seen.features[0]) == 2
    shifted = (images.roll(options.shift, -1) for images in (seen.prediction, seen.images))
    return seen.networks["lpips"](*shifted)


@pytest.mark.parametrize("perceptual", [False, True])
def test_a_term_is_a_class_of_options_and_a_row(monkeypatch, perceptual):
    """Weight, gate, balance, metrics, networks and operations follow from these."""
    monkeypatch.setitem(TERMS, "edges", Term(edges, lambda options, depth: [0], {"lpips": 3}))
    monkeypatch.setattr(EdgesConfig, "perceptual", perceptual)
    config = load(WithEdges, {"pdino": {"block": 1}, "lpips": {"weight": 0}, "edges": {"shift": 3}})
    assert config.networks == ["dino", "lpips"]
    prediction = X + some_images(4, seed=9) / 4
    objective = Objective(config, 16, NULL, NETWORKS)
    draws = Draws(some_images(4, seed=7), TIMES, torch.zeros(4, dtype=torch.long))
    losses = of_lane(objective(lambda *_: (prediction, some_images(4, seed=8)[:, 0, :4, :6]), X, draws, 3.0), 0)
    terms = losses.terms
    assert list(terms) == ["fm", "repa", "pdino", "edges"] and objective.blocks == [1, 1, 0]
    torch.testing.assert_close(terms["edges"], stand_in_lpips(prediction, X)[1:3].mean())
    expected = terms["fm"] + 0.5 * terms["repa"] + 3 * 0.01 * terms["pdino"] + (6 if perceptual else 2) * terms["edges"]
    torch.testing.assert_close(losses.total, expected)
    forward = dict.fromkeys(("denoiser", "repa", "dino", "lpips", "text"), 1.0)
    assert training_operations(config, forward)["lpips"] == 3 * gate_share(config)
    off = {"pdino": {"weight": 0}, "lpips": {"weight": 0}}
    with contextlib.nullcontext() if perceptual else pytest.raises(ConfigError, match="no perceptual term to balance"):
        assert load(WithEdges, off).terms.keys() == {"repa", "edges"}


def test_every_term_has_options_and_a_row():
    """In the order in which they are added up and recorded."""
    assert [*ObjectiveConfig().terms] == [*TERMS] == ["repa", "lpips", "pdino"]
    for name, term in ObjectiveConfig().terms.items():
        assert {*TERMS[name].passes, *(["dino"] if TERMS[name].blocks else [])} == {*term.networks}


def test_a_head_takes_part_where_no_sample_passes_its_gate():
    """Ranks wait for the gradients of all that is trained."""
    projected = some_images(4, seed=8)[:, 0, :4, :6].requires_grad_()
    objective = Objective(objective_config(("repa", "lpips"), pdino_block=1), 16, NULL, NETWORKS)
    draws = Draws(some_images(4, seed=7), torch.full((4,), 0.1), torch.zeros(4, dtype=torch.long))
    losses = objective(lambda *_: (X, projected), X, draws, 1.0)
    losses.total.sum().backward()
    assert losses.terms["repa"] == 0 and projected.grad is not None and not projected.grad.any()


def never(*_):
    raise AssertionError("this network has no weight and must not be run")


def test_a_term_without_weight_never_calls_its_network():
    off = {"repa_weight": 0.0, "lpips_weight": 0.0, "pdino_weight": 0.0, "gated": ()}
    unused = type("Unused", (StandInDino,), {"__call__": never})()
    losses, _ = run(dino=unused, lpips=never, **off)
    assert list(losses.terms) == ["fm"] and torch.equal(losses.total, losses.terms["fm"])
    assert list(run(lpips=never, **off | {"repa_weight": 1.0})[0].terms) == ["fm", "repa"]
    assert list(run(lpips=never, **off | {"pdino_weight": 1.0})[0].terms) == ["fm", "pdino"]
    assert list(run(dino=unused, **off | {"lpips_weight": 1.0})[0].terms) == ["fm", "lpips"]


@pytest.mark.parametrize("gated", [(), ("lpips",), ("lpips", "pdino")])
def test_nothing_waits_for_the_device(gated):
    """On a device without numbers: to ask for one is an error. The gate is known from times on the CPU."""
    dino, x = StandInDino(), X.to("meta")
    dino.weights = dino.weights.to("meta")
    networks = {"dino": dino, "lpips": stand_in_lpips}
    objective = Objective(objective_config(gated, pdino_block=1), 16, NULL, networks)
    objective.null = NULL.to("meta")
    draws = objective.draw(x, torch.zeros(4, dtype=torch.long, device="meta"))
    assert draws.t.device.type == "cpu" and draws.condition.device.type == "meta"
    losses = objective(lambda x_t, *_: (x_t, x_t[:, 0, :4, :6]), x, draws, 1.0, 2)
    assert losses.total.shape == (2,) and losses.total.device.type == "meta"


def test_dino_runs_once_on_the_clean_images():
    calls = []

    class Counting(StandInDino):
        def __call__(self, images, blocks):
            calls.append((images.requires_grad, len(images), list(blocks)))
            return super().__call__(images, blocks)

    run(dino=Counting(), pdino_block=0, gated=("lpips", "pdino"))
    assert calls == [(False, 4, [1, 0]), (True, 2, [0])]


def test_repa_looks_at_the_last_block_and_pdino_at_its_own():
    prediction, projected = X + some_images(4, seed=9) / 4, some_images(4, seed=8)[:, 0, :4, :6]
    for block in (0, 1):
        terms = run(pdino_block=block)[0].terms
        real, drawn = (StandInDino()(images, [0, 1]) for images in (X, prediction))
        torch.testing.assert_close(terms["repa"], feature_distance(projected, real[1]).mean())
        torch.testing.assert_close(terms["pdino"], feature_distance(drawn[block], real[block]).mean())


def test_lpips_sees_a_patch_as_16_pixels():
    sizes = []

    def record(a, b):
        sizes.append((a.shape[-1], b.shape[-1]))
        return stand_in_lpips(a, b)

    for patch in (16, 8, 32):
        run(lpips=record, patch_size=patch)
    assert sizes == [(16, 16), (32, 32), (8, 8)]


def test_lpips_sees_large_patches_through_a_triangle_filter():
    """At half the size a pixel is (a + 3b + 3c + d) / 8 of four neighbours in a row and in a column, so that it has
    seen them all; without antialiasing it would be (b + c) / 2. Over an edge there is no neighbour to count."""
    seen = []
    run(lpips=lambda *images: seen.extend(images) or stand_in_lpips(*images), patch_size=32, gated=())
    halve = torch.zeros(8, 18)
    for i in range(8):
        halve[i, 2 * i:2 * i + 4] = torch.tensor([1.0, 3.0, 3.0, 1.0])
    halve = halve[:, 1:-1] / halve[:, 1:-1].sum(1, keepdim=True)
    for image, full in zip(seen, (X + some_images(4, seed=9) / 4, X), strict=True):
        torch.testing.assert_close(image, halve @ full @ halve.T)


@pytest.mark.parametrize(("networks", "options", "message"), [
    (["lpips"], {}, "repa.weight is set, but there is no network dino"),
    (["lpips"], {"repa_weight": 0.0}, "pdino.weight is set, but there is no network dino"),
    (["dino"], {}, "lpips.weight is set, but there is no network lpips"),
    ([*NETWORKS], {"pdino_block": 2}, "pdino.block 2: this DINO has blocks 0 to 1"),
])
def test_a_network_that_is_needed_has_to_be_there(networks, options, message):
    given = {name: NETWORKS[name] for name in networks}
    with pytest.raises(ConfigError, match=message):
        Objective(objective_config(**{"pdino_block": 1} | options), 16, NULL, given)


def test_a_dropped_condition_has_to_be_finite():
    empty = torch.zeros(3, 6)
    empty[1, 2] = torch.nan
    with pytest.raises(ConfigError, match="features of the empty prompt, .* are not finite"):
        Objective(objective_config(pdino_block=1), 16, empty, NETWORKS)


def test_draws():
    config = objective_config(pdino_block=1, condition_dropout=0.25)
    objective = Objective(config, 16, NULL, NETWORKS)
    torch.manual_seed(0)
    x, labels = torch.zeros(4000, 3, 2, 2), torch.arange(4000)
    draws = objective.draw(x, labels)
    dropped = draws.condition == -1
    assert torch.equal(draws.condition[~dropped], labels[~dropped])
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert draws.noise.std().item() == pytest.approx(1, abs=0.03)
    assert (draws.t >= 0.3).float().mean().item() == pytest.approx(0.5235, abs=0.04)


def test_a_dropped_prompt_becomes_the_empty_one():
    null = torch.full((3, 2), -1.0)
    objective = Objective(objective_config(pdino_block=1, condition_dropout=0.5), 16, null, NETWORKS)
    torch.manual_seed(0)
    features = torch.rand(400, 3, 2)
    condition = objective.draw(torch.zeros(400, 3, 2, 2), features).condition
    dropped = (condition == -1).flatten(1)
    assert torch.equal(dropped.all(1), dropped.any(1)), "a prompt is dropped whole or not at all"
    assert torch.equal(condition[~dropped.all(1)], features[~dropped.all(1)])
    assert dropped.all(1).float().mean().item() == pytest.approx(0.5, abs=0.08)


def test_when_the_balance_is_refreshed():
    objective = Objective(objective_config(pdino_block=1), 16, NULL, NETWORKS)
    assert [s for s in range(399_900, 400_101) if objective.balances_at(s)] == [400_000, 400_050, 400_100]
    never = Objective(objective_config(pdino_block=1, balance_start=None), 16, NULL, NETWORKS)
    assert not never.balances_at(400_000)


def test_balance_weight_is_the_clipped_ratio_of_gradient_norms():
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    torch.testing.assert_close(balance_weight((w**2).sum(), w.sum(), w), torch.tensor(10 / (2**0.5 + 1e-4)))
    assert balance_weight((w**2).sum(), 0 * w.sum(), w) == 100
    assert balance_weight(0 * w.sum(), w.sum(), w) == 0


def test_feature_distance():
    a = torch.randn(3, 4, 8)
    torch.testing.assert_close(feature_distance(a, 7 * a), torch.zeros(3))
    torch.testing.assert_close(feature_distance(a, -a), torch.full((3,), 2.0))
    angle = torch.tensor(0.3)
    b, c = torch.tensor([1.0, 0]).expand(1, 5, 2), torch.stack([angle.cos(), angle.sin()]).expand(1, 5, 2)
    torch.testing.assert_close(feature_distance(b, c), 1 - angle.cos()[None])


def test_the_projected_tokens_are_those_that_enter_the_block():
    denoiser, projector = tiny_denoiser(), repa_projector(32, 6, hidden=5)
    out, projected = WithProjector(denoiser, projector, 2)(X, TIMES, torch.arange(4))
    expected, features = denoiser(X, TIMES, torch.arange(4), 2)
    assert torch.equal(out, expected) and torch.equal(projected, projector(features))
    assert WithProjector(denoiser, None, None)(X, TIMES, torch.arange(4))[1] is None


# ---------------------------------------------------------------------------------------------------------- LPIPS


@pytest.fixture(scope="module")
def metric():
    """The lpips package's own, with a random AlexNet."""
    with no_initial_weights(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False).eval().requires_grad_(False)
    torch.manual_seed(0)
    metric.net.load_state_dict({k: torch.randn_like(v) / v[0].numel() ** 0.5
                                for k, v in metric.net.state_dict().items()})
    return metric


def no_initial_weights():
    """Random numbers for the weights of a trunk, which are overwritten at once, are most of the time."""
    return mock.patch.multiple(torch.nn.init, kaiming_uniform_=mock.DEFAULT, uniform_=mock.DEFAULT)


def torchvision_names(metric):
    return {f"features.{k.split('.', 1)[1]}": v for k, v in metric.net.state_dict().items()}


def write_lpips(directory, weights):
    (directory / "config.json").write_text(json.dumps({"net": "alex"}))
    save_file(weights, directory / "trunk.safetensors")
    with no_initial_weights():
        return load_lpips(directory)


def test_lpips_agrees_with_the_lpips_package(metric, tmp_path):
    weights = torchvision_names(metric) | {"classifier.1.bias": torch.zeros(3)}  # the classifier is not used
    ours = write_lpips(tmp_path, weights)
    assert not ours.metric.training and not any(p.requires_grad for p in ours.parameters())
    a, b = some_images(3, 64, seed=1), some_images(3, 64, seed=2)
    assert (ours(a, b) > 0).all() and not ours(a, a).any()
    assert_same_distances(ours, metric, a, b)


def assert_same_distances(ours, metric, a, b):
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    distances = ours(a, b), metric(a, b).flatten()
    torch.testing.assert_close(*distances)
    ours_gradient, gradient = (torch.autograd.grad(d.sum(), a)[0] for d in distances)
    assert gradient.isfinite().all() and gradient.any()
    torch.testing.assert_close(ours_gradient, gradient)
    distances = ours(a, b)
    assert torch.autograd.grad(distances.sum(), b, allow_unused=True) == (None,), "targets take no gradient"


@pytest.mark.parametrize("level", [-1.0, 0.0])
def test_lpips_of_images_without_any_feature(metric, tmp_path, level):
    """All channels of the last layer are 0 everywhere: the length of such a feature has no finite derivative."""
    weights = torchvision_names(metric)
    last = max((k for k in weights if k.endswith("bias")), key=lambda k: int(k.split(".")[1]))
    ours = write_lpips(tmp_path, weights | {last: torch.full_like(weights[last], -1e3)})
    dead = copy.deepcopy(metric)
    dead.net.load_state_dict(ours.metric.net.state_dict())
    assert_same_distances(ours, dead, torch.full((1, 3, 64, 64), level), some_images(1, 64))


def test_a_feature_without_length_has_a_finite_gradient():
    feature = torch.zeros(1, 3, 1, 1, requires_grad=True)
    scaled = unit(feature)
    scaled.sum().backward()
    assert not scaled.any() and feature.grad.isfinite().all()


def test_lpips_takes_no_other_weights(metric, tmp_path):
    weights = torchvision_names(metric)
    for wrong, message in ((lambda w: w.pop("features.0.bias"), "Missing"),
                           (lambda w: w.update({"features.99.bias": torch.zeros(1)}), "Unexpected"),
                           (lambda w: w.update({"features.0.bias": torch.zeros(1)}), "size mismatch")):
        changed = dict(weights)
        wrong(changed)
        with pytest.raises(RuntimeError, match=message):
            write_lpips(tmp_path, changed)


# ----------------------------------------------------------------------------------------------------------- DINO


@pytest.fixture(scope="module")
def dino_files(tmp_path_factory):
    """A small random network of DINOv2's architecture, for 4×4 patches."""
    import timm

    directory = tmp_path_factory.mktemp("dino")
    arguments = {"embed_dim": 48, "depth": 3, "num_heads": 3}
    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=4 * PATCH,
                                **arguments)
    described = {"architecture": "vit_small_patch14_dinov2", "arguments": arguments}
    (directory / "config.json").write_text(json.dumps(described))
    save_file(network.state_dict(), directory / "model.safetensors")
    return directory, network.eval()


def test_dino_gives_the_normalised_patch_tokens(dino_files):
    directory, network = dino_files
    dino = load_dino(directory, 4)
    assert (dino.width, dino.depth, dino.grid) == (48, 3, 4)
    assert not dino.network.training and not any(p.requires_grad for p in dino.parameters())
    images = some_images(2, 4 * PATCH)
    normalised = ((images + 1) / 2 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    features = dino(images, [2, 0, 2])
    assert list(features) == [0, 2]
    torch.testing.assert_close(features[2], network.forward_features(normalised)[:, 1:])
    torch.testing.assert_close(features[0], dino(images, [0])[0])
    assert not torch.allclose(features[0], features[2])


def test_dino_resizes_an_image_to_its_grid(dino_files):
    dino = load_dino(dino_files[0], 2)
    images = some_images(2, 32).requires_grad_()
    features = dino(images, [1])[1]
    assert features.shape == (2, 4, 48)
    features.square().sum().backward()
    assert images.grad.isfinite().all() and images.grad.any()


def test_positions_are_interpolated_to_the_grid():
    table = torch.randn(1, 1 + 16, 8)
    assert torch.equal(interpolate_positions(table, 4), table)
    for grid in (2, 3, 7):
        resized = interpolate_positions(table, grid)
        assert resized.shape == (1, 1 + grid**2, 8)
        assert torch.equal(resized[:, 0], table[:, 0])
        torch.testing.assert_close(interpolate_positions(torch.ones_like(table), grid), torch.ones_like(resized))


@pytest.mark.parametrize("size", [(16, 16, 14), (32, 24, 56)])
def test_matrices_resize_as_interpolation_does(size):
    """What GPUs do, in value and gradient."""
    height, width, target = size
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.randn(2, 3, target, target, generator=torch.Generator().manual_seed(1))
    found = []
    for way in (resize_bicubic, resize_by_matrices):
        resized = way(images, target)
        found.append((resized, *torch.autograd.grad((resized * weights).sum(), images)))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_positions_are_looked_up_as_dinov2_does():
    """Cubic convolution at the places that follow from the scale (16 + 0.1) / 8, not 16 / 8."""
    values = torch.randn(8, 8, dtype=torch.float64)
    table = torch.cat([torch.zeros(1, 1, 1), values.view(1, 64, 1)], dim=1)
    resized = interpolate_positions(table, 16)[0, 1:].view(16, 16)
    inside = torch.arange(4, 12, dtype=torch.float64)  # away from the edges
    d = ((inside + 0.5) * 8 / 16.1 - 0.5)[:, None] - torch.arange(8)
    d, a = d.abs(), -0.75
    near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
    weights = torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))
    torch.testing.assert_close(resized[4:12, 4:12], weights @ values @ weights.T)


def test_dino_takes_no_other_weights(dino_files, tmp_path):
    directory, _ = dino_files
    weights = load_file(directory / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    for wrong, message in ((lambda w: w.pop("norm.bias"), "Missing"),
                           (lambda w: w.update({"head.bias": torch.zeros(1)}), "Unexpected"),
                           (lambda w: w.update({"norm.bias": torch.zeros(1)}), "size mismatch")):
        changed = dict(weights)
        wrong(changed)
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(RuntimeError, match=message):
            load_dino(tmp_path, 4)


# ------------------------------------------------------------------------------------------ for speed, the same losses


@pytest.fixture
def objectives(dino_files, metric, tmp_path):
    """A function that makes the objective with both networks."""
    write_lpips(tmp_path, torchvision_names(metric))

    def make():
        config = objective_config(repa_weight=0.5, pdino_block=1, gated=("lpips", "pdino"))
        return Objective(config, 16, NULL, {"dino": load_dino(dino_files[0], 4),
                                                   "lpips": load_lpips(tmp_path)})

    return make


def losses_and_gradient(objective, t, half=False):
    x = some_images(len(t), 64)
    prediction = (x + some_images(len(t), 64, seed=9) / 4).requires_grad_()
    draws = Draws(some_images(len(t), 64, seed=7), t, torch.zeros(len(t), dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        losses = objective(lambda *_: (prediction, torch.ones(len(t), 16, 48)), x, draws, 1.0)
    return losses.terms, torch.autograd.grad(losses.total.sum(), prediction)[0]


def test_compiled_networks_give_the_same_losses(objectives, monkeypatch):
    """For several numbers of samples that pass the gate, none and one among them."""
    plain, compiled = objectives(), objectives()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled.compile()
    assert compiled.networks["lpips"]._compiled_call_impl
    assert all(block._compiled_call_impl for block in compiled.networks["dino"].network.blocks)
    for passing in (4, 2, 3, 1, 0):
        t = torch.tensor([0.6] * passing + [0.1] * (4 - passing))
        torch.testing.assert_close(losses_and_gradient(compiled, t), losses_and_gradient(plain, t),
                                   rtol=1e-4, atol=1e-6)


def test_networks_stored_in_half_precision_give_the_bits_that_autocast_gives(objectives):
    cast, stored = objectives(), objectives()
    for network in stored.networks.values():
        store_in_bf16(network)
    size = [sum(p.nbytes for p in objective.networks["lpips"].parameters()) for objective in (stored, cast)]
    assert size[0] == size[1] / 2
    found, wanted = (losses_and_gradient(objective, TIMES, half=True) for objective in (stored, cast))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
