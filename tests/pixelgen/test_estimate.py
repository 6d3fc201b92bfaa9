"""Estimates against counted steps, against the roofline's figures, and against what a GPU has taken."""

from pathlib import Path

import lpips
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.estimate import quiet
from pipeline.networks.qwen3 import Qwen3
from pixelgen.config import MemoryConfig
from pixelgen.denoisers.jit import JiTOptions
from pixelgen.denoisers.jit_t2i import JiTTextOptions
from pixelgen.encoders.dino import PATCH, Dino
from pixelgen.encoders.lpips import Lpips
from pixelgen.estimate import (
    USABLE,
    Networks,
    fitting_lanes,
    forward_operations,
    gate_share,
    operations,
    peak,
    sampling_rows,
    training_memory,
    training_operations,
)
from pixelgen.objective import Objective, WithProjector, repa_projector
from pixelgen.precision import store_in_bf16
from pixelgen.samplers.adams_bashforth import AdamsBashforth
from pixelgen.samplers.euler import Euler
from pixelgen.samplers.heun import Heun
from pixelgen.terms import ObjectiveConfig
from tests.pixelgen.conftest import NO_TERMS, objective_config, some_images, tiny_config


def networks(config, dino, net="vgg"):
    with quiet():
        metric = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    denoiser = config.build()
    grid = config.image_size // config.patch_size
    seeing = Dino(timm.create_model(dino, pretrained=False, num_classes=0, img_size=grid * PATCH), grid)
    projector = repa_projector(config.width, seeing.width, config.width)
    return Networks(denoiser, projector, {"dino": seeing, "lpips": Lpips(metric)})


@pytest.fixture(scope="module")
def published():
    """Of the paper's sizes, without weights."""
    from transformers import AutoConfig, AutoModel

    def make(size, image_size):
        with torch.device("meta"):
            text = AutoModel.from_config(AutoConfig.for_model(**Qwen3().config(Path()))) if size == "XXL/16" else None
        config = (JiTTextOptions(size, image_size) if text else JiTOptions(size, image_size, 1000)).resolve()
        with quiet():
            metric = Lpips(lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False))
        with torch.device("meta"):
            grid = image_size // 16
            dino = Dino(timm.create_model("vit_base_patch14_dinov2", pretrained=False, num_classes=0,
                                          img_size=grid * PATCH), grid)
            return Networks(config.build(), repa_projector(config.width, 768, config.width),
                            {"dino": dino, "lpips": metric} | ({"text": text} if text else {}))

    return {key: make(*key) for key in (("L/16", 256), ("XL/16", 256), ("XXL/16", 256), ("XXL/16", 512))}


@pytest.mark.parametrize(("size", "image_size", "gflop"), [  # an image; LPIPS gated, and P-DINO too
    ("L/16", 256, (744, 699)), ("XL/16", 256, (997, 952)), ("XXL/16", 256, (1721, 1676)),
    ("XXL/16", 512, (5600, 5378))])
def test_operations_are_those_of_the_roofline(published, size, image_size, gflop):
    """By another count, made by hand from the published shapes."""
    forward = forward_operations(published[size, image_size])
    for gated, expected in zip((("lpips",), ("lpips", "pdino")), gflop, strict=True):
        counted = training_operations(objective_config(gated), forward)
        assert sum(counted.values()) / 1e9 == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("size", "images", "gigabytes"), [("XL/16", 32, 30.6), ("XXL/16", 64, 60.1)])
def test_memory_is_what_a_gpu_has_taken(published, size, images, gigabytes):
    """Most gigabytes allocated in training on an H200, 2026-11-27 (benchmarks/README.md)."""
    found = training_memory(published[size, 256], ObjectiveConfig(), images, MemoryConfig())
    assert sum(found.values()) / 1e9 == pytest.approx(gigabytes, rel=0.05)


def test_what_saves_memory(published):
    given = published["XXL/16", 512]

    def total(**options):
        return sum(training_memory(given, ObjectiveConfig(), 16, MemoryConfig(**options)).values())

    averages = 4 * sum(p.numel() for p in given.denoiser.parameters())
    assert total() - total(averages_on_cpu=True) == averages
    assert total(recomputed_blocks=1) > total(), "one block keeps no less while it is computed again"
    assert total() > total(recomputed_blocks=8) > total(recomputed_blocks=16) == total(recomputed_blocks=99)
    assert total(recomputed_blocks=16) < 0.75 * total()


@pytest.mark.parametrize("gated", [(), ("lpips", "pdino")])
def test_operations_are_those_of_a_step_that_is_counted(gated):
    """Every image passes the gate, so that the shares are 1."""
    given = networks(tiny_config(dropout=0.0), "vit_tiny_patch16_224", "alex")
    config = objective_config(gated, repa_block=1, pdino_block=11, gate_threshold=0.0)
    model = WithProjector(given.denoiser, given.projector, 1)
    goal = Objective(config, 8, torch.tensor(4), given.frozen)
    images = some_images(4)
    draws = goal.draw(images, torch.tensor([0, 1, 2, 3]))
    with FlopCounterMode(display=False) as counter:
        goal(model, images, draws, 1.0).total.sum().backward()
    expected = training_operations(config, forward_operations(given))
    assert counter.get_total_flops() / 4 == pytest.approx(sum(expected.values()), rel=0.08)
    assert expected["text"] == 0 < min(expected[name] for name in ("denoiser", "repa", "dino", "lpips"))
    for network in given.frozen.values():
        store_in_bf16(network)
    assert training_operations(config, forward_operations(given)) == expected, "whatever weights are stored in"


def test_terms_without_weight_take_nothing():
    forward = dict.fromkeys(("denoiser", "repa", "dino", "lpips", "text"), 1.0)
    config = objective_config(**NO_TERMS)
    assert training_operations(config, forward) == {"denoiser": 3, "repa": 0, "dino": 0, "lpips": 0, "text": 1}
    assert training_operations(objective_config(**NO_TERMS | {"repa_weight": 1}), forward)["dino"] == 1
    assert training_operations(objective_config(**NO_TERMS | {"pdino_weight": 1}), forward)["dino"] == 3


def test_a_product_of_matrices_is_counted_by_hand():
    assert operations(torch.nn.Linear(5, 7), torch.empty(3, 5, device="meta")) == 2 * 3 * 5 * 7


def test_the_gate_lets_half_of_the_papers_times_pass():
    assert gate_share(ObjectiveConfig()) == pytest.approx(0.524, abs=5e-4)  # P(z >= (logit 0.3 + 0.8) / 0.8)
    assert gate_share(ObjectiveConfig(gate_threshold=0.0)) == 1


@pytest.mark.parametrize(("sampler", "rows"), [
    (Euler(10), 10), (Euler(10, guidance=2.0), 19), (Heun(50), 99),
    (Heun(50, 2.25, (0.1, 0.9), timeshift=2.0), 175), (AdamsBashforth(25, 4.0, timeshift=3.0), 49)])
def test_samples_the_denoiser_sees_for_an_image(sampler, rows):
    assert sampling_rows(sampler) == rows


def test_as_many_lanes_as_fit(published):
    given = published["XXL/16", 512], ObjectiveConfig(), 8, 8, MemoryConfig()
    needs = [sum(training_memory(*given[:2], 8 * n, MemoryConfig()).values()) for n in range(1, 9)]
    assert fitting_lanes(*given, room=needs[2]) == 3 and fitting_lanes(*given, room=needs[2] - 1) == 2
    assert fitting_lanes(*given, room=1e12) == 8 and fitting_lanes(*given, room=1.0) == 1
    assert fitting_lanes(*given, room=USABLE * 85e9) == 2, "the paper's 16 images on an H100"


def test_gpus_are_known_by_their_names():
    assert peak("NVIDIA H100 80GB HBM3") == 989e12 and peak("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak("a toaster") is None
