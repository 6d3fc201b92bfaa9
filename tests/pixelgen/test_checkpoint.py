"""Weights on disk: whole or not at all, exact, and refused with names where they do not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixelgen.checkpoint import (
    CheckpointError,
    export,
    infer_config,
    load_denoiser,
    load_state,
    read_published,
    save_state,
)
from pixelgen.config import ConfigError, OptimizerConfig
from pixelgen.denoisers.jit import SIZES
from pixelgen.models.jit_t2i import JiTText
from pixelgen.objective import Objective
from pixelgen.train import create_state
from tests.pixelgen.conftest import NO_TERMS, objective_config, tiny_config, tiny_denoiser, tiny_text


def weights(seed=0, **changes):
    return tiny_denoiser(seed, **changes).state_dict()


def exported(directory, **changes):
    export(directory, tiny_config(**changes), weights(1, **changes), weights(2, **changes), {})
    return directory


@pytest.mark.parametrize("changes", [{}, {"bottleneck": None}, {"mlp_ratio": 3.0}])
def test_an_exported_model_comes_back_exactly(tmp_path, changes):
    exported(tmp_path / "a" / "model", **changes)
    for name, seed in (("ema", 1), ("raw", 2)):
        model = load_denoiser(tmp_path / "a" / "model", name)
        assert model.config == tiny_config(**changes)
        torch.testing.assert_close(model.state_dict(), weights(seed, **changes), rtol=0, atol=0)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert all(v.dtype == torch.float32 for v in load_file(tmp_path / "a" / "model" / "ema.safetensors").values())


def test_a_model_exported_before_the_ratio_was_written_down(tmp_path):
    exported(tmp_path)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["config"].pop("mlp_ratio") == 4.0
    (tmp_path / "config.json").write_text(json.dumps(described))
    assert load_denoiser(tmp_path).config == tiny_config()


def test_export_keeps_full_precision_of_low_precision_weights(tmp_path):
    low = {k: v.bfloat16() for k, v in weights().items()}
    export(tmp_path, tiny_config(), low, low, {})
    torch.testing.assert_close(load_denoiser(tmp_path).state_dict(), {k: v.float() for k, v in low.items()},
                               rtol=0, atol=0)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"not an exported model: there is no config\.json"):
        load_denoiser(tmp_path)
    exported(tmp_path)
    with pytest.raises(CheckpointError, match="best"):
        load_denoiser(tmp_path, "best")
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(described | {"denoiser": "unet"}))
    with pytest.raises(ConfigError, match="denoiser: 'unet' is not known"):
        load_denoiser(tmp_path)
    described["config"]["widht"] = described["config"].pop("width")
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        load_denoiser(tmp_path)


def test_every_weight_that_does_not_fit_is_named(tmp_path):
    exported(tmp_path)
    state = load_file(tmp_path / "ema.safetensors")
    for key in ("final_layer.linear.bias", "blocks.0.norm1.weight"):
        del state[key]
    state |= {"pos_embed": torch.zeros(1, 9, 32), "x.y": torch.zeros(1), "x.z": torch.zeros(1)}
    save_file(state, tmp_path / "ema.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_denoiser(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'ema.safetensors'}: the weights do not fit the model. "
        "missing (2): blocks.0.norm1.weight, final_layer.linear.bias; extra (2): x.y, x.z; "
        "misshaped (1): pos_embed: (1, 9, 32) instead of (1, 4, 32)")


# -------------------------------------------------------------------------------------------- the training state


def state(**changes):
    off = Objective(objective_config(**NO_TERMS), 8, torch.tensor(0), {})
    return create_state(tiny_config(**changes), off, OptimizerConfig(), 0, torch.device("cpu"))


def test_a_state_comes_back_exactly(tmp_path):
    a, b = state(), state()
    for p in a.model.parameters():
        p.grad = torch.randn_like(p)
    a.optimizer.step()
    a.percept_weight, a.step = 1.25, 7
    save_state(a.state_dict(), tmp_path / "state.pt")
    load_state(b, tmp_path / "state.pt")
    assert (b.percept_weight, b.step) == (1.25, 7)
    torch.testing.assert_close(b.state_dict(), a.state_dict(), rtol=0, atol=0)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    a = state()
    save_state(a.state_dict(), tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()

    def fails(content, file):
        file.write(b"half of")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="no space"):
        save_state(a.state_dict(), tmp_path / "state.pt")
    assert (tmp_path / "state.pt").read_bytes() == before


@pytest.mark.parametrize("damaged", [None, b"", b"hello, world", b"\0" * 99, b"{}", b"\x80\x02N."])
def test_a_damaged_file_is_named(tmp_path, damaged):
    a = state()
    save_state(a.state_dict(), tmp_path / "state.pt")
    half = (tmp_path / "state.pt").read_bytes()[:100_000]
    (tmp_path / "state.pt").write_bytes(half if damaged is None else damaged)
    for read in (lambda path: load_state(a, path), read_published):
        with pytest.raises(CheckpointError, match=r"state\.pt"):
            read(tmp_path / "state.pt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.pt"):
        load_state(state(), tmp_path / "nowhere.pt")


@pytest.mark.parametrize("change", ["wider", "missing", "extra", "optimizer"])
def test_a_state_of_another_model_is_refused(tmp_path, change):
    a, b = state(), state(width=64) if change == "wider" else state()
    content = b.state_dict()
    if change == "missing":
        del content["percept_weight"]
    elif change == "extra":
        content["scaler"] = 1
    elif change == "optimizer":
        content["optimizer"]["param_groups"][0]["params"].pop()
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        load_state(a, tmp_path / "state.pt")


# ------------------------------------------------------------------------------------------ published checkpoints


@pytest.mark.parametrize("changes", [{}, {"bottleneck": None}, {"num_classes": 7, "heads": 4},
                                     {"image_size": 32, "patch_size": 4, "depth": 4, "in_context_len": 5},
                                     {"mlp_ratio": 3.0}, {"mlp_ratio": 2.5}])
def test_the_architecture_is_read_off_the_weights(changes):
    assert infer_config(weights(**changes), "file", in_context_start=1) == tiny_config(**changes)


@pytest.mark.parametrize("changes", [{}, {"image_size": 32, "depth": 3, "text_depth": 2}, {"mlp_ratio": 3.0}])
def test_the_architecture_is_read_off_the_weights_of_a_text_model(changes):
    assert infer_config(JiTText(tiny_text(**changes)).state_dict(), "file") == tiny_text(**changes)


@pytest.mark.parametrize("config", [tiny_config, tiny_text])
def test_the_ratio_of_the_hidden_width_is_found_again(config):
    for width in (32, 768, 1024, 1152, 1536):
        for ratio in (1.0, 8 / 3, 2.5, 3.0, 4.0, 6.0):
            whole = config(width=width, mlp_ratio=ratio)
            assert config(width=width).with_hidden(whole.hidden_width) == whole
    for hidden in range(1, 200):
        assert config().with_hidden(hidden).hidden_width == hidden
    with pytest.raises(ConfigError, match="mlp_ratio 0.0"):
        config().with_hidden(0)


def test_named_sizes_need_no_further_word(monkeypatch):
    tiny = tiny_config()
    monkeypatch.setitem(SIZES, "tiny", {name: getattr(tiny, name) for name in SIZES["L/16"]} | {"in_context_start": 2})
    assert infer_config(weights(), "file") == tiny_config(in_context_start=2)
    with pytest.raises(CheckpointError, match=r"width 64, depth 3, patch 8 is no named size.*in_context_start"):
        infer_config(weights(width=64), "file")


@pytest.mark.parametrize("key", ["x_embedder.proj1.weight", "pos_embed", "y_embedder.embedding_table.weight"])
def test_weights_of_something_else_are_refused(key):
    state = weights()
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        infer_config({k: v for k, v in state.items() if k != key}, "file", 1)
    with pytest.raises(CheckpointError, match="file: "):
        infer_config(state | {key: torch.zeros(())}, "file", 1)


@pytest.mark.parametrize("content", [{"state_dict": 3}, {"weights": {}}, [1], {"state_dict": {"denoiser.x": 1}},
                                     {"state_dict": {3: torch.zeros(1)}}])
def test_what_is_no_published_checkpoint_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError, match=r"x\.ckpt"):
        read_published(tmp_path / "x.ckpt")
