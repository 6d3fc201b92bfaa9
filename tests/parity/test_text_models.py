"""The text-conditional denoiser against golden numbers: at its own resolution, at the next, through the importer."""

import json
import os

import pytest
import torch

from pixelgen.checkpoint import load_denoiser
from pixelgen.cli import main
from pixelgen.denoisers.jit_t2i import JiTTextConfig
from pixelgen.models.jit_t2i import JiTText
from tests.parity.conftest import assert_close, golden_dir, read_arrays, tensors

ATOL = 2e-5


def discover():
    for path in sorted(golden_dir().glob("*_config.json")):
        described = json.loads(path.read_text())
        if described["class"] == "JiT_T2I":
            yield described | {"key": path.name.removesuffix("_config.json")}


CASES = list(discover())


@pytest.mark.skipif("PIXELGEN_GOLDEN" not in os.environ, reason="the copy kept with the tests has no room for these")
def test_cases_were_found():
    assert CASES


@pytest.fixture(params=CASES, ids=[c["key"] for c in CASES])
def case(request):
    return request.param


def config_of(c) -> JiTTextConfig:
    assert c["in_channels"] == 3
    return JiTTextConfig(
        image_size=c["input_size"], patch_size=c["patch_size"], width=c["hidden_size"], depth=c["num_blocks"],
        text_depth=c["num_text_blocks"], heads=c["num_groups"], bottleneck=c["bottleneck_dim"],
        text_width=c["txt_embed_dim"], text_length=c["txt_max_length"])


def read(case, part):
    return tensors(read_arrays(f"{case['key']}_{part}.npz"))


@torch.no_grad()
def check(model, io, case):
    features = {f"feat_layer{block}": block for block in case["feature_layers"]}
    assert features.keys() == {name for name in io if name.startswith("feat_layer")}
    for name, block in features.items():
        out, tokens = model(io["x"], io["t"], io["y"], block)
        assert_close(out, io["out"], ATOL)
        assert_close(tokens, io[name], ATOL)


def test_outputs_and_features(case):
    model, state = JiTText(config_of(case["constructor"])).eval(), read(case, "state")
    assert len(state) == case["num_state_entries"]
    model.load_state_dict(state)
    check(model, read(case, "io"), case)


def test_the_next_resolution_rebuilds_the_position_table_alone(case):
    model, state = JiTText(config_of(case["upscaled_constructor"])).eval(), read(case, "state")
    io = read(case, "upscaled_io")
    state["pos_embed"] = model.pos_embed
    assert_close(model.pos_embed, io["pos_embed"], 1e-6)
    model.load_state_dict(state)
    check(model, io, case)


def test_convert_and_load(case, tmp_path):
    """The raw weights differ from the EMA's in the output bias alone."""
    state, io = read(case, "state"), read(case, "io")
    raw = state | {"final_layer.linear.bias": state["final_layer.linear.bias"] + 1}
    weights = {f"denoiser.{k}": v for k, v in raw.items()} | {f"ema_denoiser.{k}": v for k, v in state.items()}
    torch.save({"state_dict": weights | {"diffusion_trainer.proj.0.0.weight": torch.ones(3, 2)}, "epoch": 1},
               tmp_path / "last.ckpt")
    assert main(["convert", str(tmp_path / "last.ckpt"), str(tmp_path / "model")]) == 0
    for kind, shift in (("ema", 0), ("raw", 1)):
        model = load_denoiser(tmp_path / "model", kind)
        assert model.config == config_of(case["constructor"])
        with torch.no_grad():
            assert_close(model(io["x"], io["t"], io["y"])[0], io["out"] + shift, ATOL)
