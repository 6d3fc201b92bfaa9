"""Rotary tables, timestep sinusoids, the position table and RMSNorm against golden numbers."""

from itertools import chain

import pytest
import torch

from pixelgen.denoisers.jit import JiTConfig
from pixelgen.models.jit import JiT
from pixelgen.models.layers import (
    RMSNorm,
    position_table,
    rotary_angles,
    rotate,
    sinusoids,
)
from tests.parity.conftest import (
    assert_close,
    each,
    read_arrays,
    read_json,
    tensors,
    unlisted,
)

LISTED, ARRAYS = read_json("embeddings.json"), read_arrays("embeddings.npz")
SECTIONS = ("cis", "vision_rope", "timestep", "sincos", "rmsnorm")
CASES = {section: LISTED.get(section, []) for section in SECTIONS}


@pytest.mark.parametrize("section", SECTIONS)
def test_cases_were_found(section):
    assert CASES[section]


def test_every_array_is_of_a_listed_case():
    pattern = r"(cis_d\d+_h\d+_w\d+|vis_d\d+_n\d+_cls\d+|t_\d+|sincos_d\d+_n\d+|rms_\d+)(?:_|$)"
    assert not unlisted(ARRAYS, pattern, chain(*CASES.values()))


@each(CASES["cis"])
def test_rotary_of_the_text_model(case):
    """Its positions include both ends, linspace(0, size, size), and x and y alternate along the frequencies. On a grid
    that is not square (no published model has one) the reference takes each axis' end from the other axis."""
    want = tensors(ARRAYS, case["key"] + "_")
    height, width = case["height"], case["width"]
    rows, columns = torch.linspace(0, width, height).double(), torch.linspace(0, height, width).double()
    y, x = rotary_angles(case["head_dim"], rows, columns)
    angles = torch.stack([x, y], dim=-1).flatten(-2)
    cos, sin = angles.cos().float(), angles.sin().float()
    assert_close(cos, want["real"], 1e-5)
    assert_close(sin, want["imag"], 1e-5)
    for name in "qk":
        assert_close(rotate(want[name], cos, sin), want[f"{name}_rot"], 1e-5)


@each(CASES["vision_rope"])
def test_rotary_of_the_class_model(case):
    """The tables inside a JiT; golden ones repeat each entry for both members of the pair that it rotates."""
    want = tensors(ARRAYS, case["key"] + "_")
    model = JiT(JiTConfig(image_size=case["grid"], patch_size=1, width=case["head_dim"], depth=1, heads=1,
                               bottleneck=None, in_context_start=0, in_context_len=case["num_cls_token"], dropout=0.0,
                               num_classes=1))
    tables = [(model.rotary_context_cos, model.rotary_context_sin)]
    if case["num_cls_token"] == 0:
        tables.append((model.rotary_cos, model.rotary_sin))
    for cos, sin in tables:
        assert_close(cos.repeat_interleave(2, dim=1), want["cos"], 1e-5)
        assert_close(sin.repeat_interleave(2, dim=1), want["sin"], 1e-5)
        assert_close(rotate(want["in"], cos, sin), want["out"], 1e-5)


@each(CASES["timestep"])
@pytest.mark.parametrize("period", [10000, 10])
def test_sinusoids(case, period):
    want = tensors(ARRAYS, case["key"])
    assert_close(sinusoids(want[""], case["dim"], period), want[f"_period{period}"], 1e-5)


@each(CASES["sincos"])
def test_position_table(case):
    assert_close(position_table(case["dim"], case["grid"]), ARRAYS[case["key"]], 1e-6)


@each(CASES["rmsnorm"])
def test_rms_norm(case):
    want = tensors(ARRAYS, case["key"] + "_")
    norm = RMSNorm(len(want["weight"]))
    assert norm.eps == case["eps"]
    norm.load_state_dict({"weight": want["weight"]})
    assert_close(norm(want["x"]), want["out"], 1e-5)
