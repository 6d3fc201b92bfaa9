"""What judges compute in, and what is drawn in."""

import numpy as np
import pytest
import torch

from pixelgen.metrics.colors import ClipColors
from pixelgen.metrics.detector import Mask2Former
from pixelgen.precision import ieee_fp32, preferred

SETTINGS = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)


@pytest.fixture
def tf32():
    """TF32 wherever torch offers it, as whoever wants speed would set it."""
    before = [setting.fp32_precision for setting in SETTINGS]
    for setting in SETTINGS:
        setting.fp32_precision = "tf32"
    yield
    for setting, precision in zip(SETTINGS, before, strict=True):
        setting.fp32_precision = precision


def found():
    return [setting.fp32_precision for setting in SETTINGS]


def test_products_are_in_full_precision_and_settings_come_back(tf32):
    with pytest.raises(KeyError), ieee_fp32():
        assert found() == ["ieee", "ieee"]
        raise KeyError
    assert found() == ["tf32", "tf32"]


class Seen(Exception):
    """A network was called."""


class Network(torch.nn.Module):
    def forward(self, *_, **__):
        raise Seen(found())


@pytest.mark.parametrize("judge", [
    lambda image: Mask2Former(Network(), "x", torch.device("cpu"))(image),
    lambda image: clip()(image, "dog", np.array([[0, 0, 8, 8, 1.0]]), np.ones((1, 8, 8), bool))])
def test_judges_compute_in_full_precision(tf32, judge):
    with pytest.raises(Seen, match="'ieee', 'ieee'"):
        judge(np.zeros((8, 8, 3), np.uint8))


def clip():
    network = Network()
    network.vision_model = Network()
    network.config = type("Config", (), {"vision_config": type("Vision", (), {"image_size": 8})})
    return ClipColors(network, None, "x", torch.device("cpu"))


def test_drawing_on_a_gpu_is_in_bf16():
    assert [preferred(device) for device in ("cuda:1", torch.device("cuda"), "cpu")] == ["bf16", "bf16", "fp32"]
