"""The class-conditional denoiser against golden numbers, from a state dict and through the checkpoint importer."""

import os
import pickle

import pytest
import torch

from pixelgen.checkpoint import CheckpointError, load_denoiser, read_published
from pixelgen.cli import main
from pixelgen.denoisers.jit import JiTConfig
from pixelgen.models.jit import JiT
from tests.parity.conftest import assert_close, models_of, read_arrays, tensors

ATOL = 2e-5


CASES = list(models_of("JiT"))


def test_cases_were_found():
    assert CASES


def denoiser_config(case) -> JiTConfig:
    c = case["constructor"]
    assert c["in_channels"] == 3, "the published denoisers have no other"
    return JiTConfig(
        image_size=c["input_size"], patch_size=c["patch_size"], width=c["hidden_size"], depth=c["depth"],
        heads=c["num_heads"], bottleneck=c["bottleneck_dim"] if c["use_bottleneck"] else None,
        in_context_start=c["in_context_start"], in_context_len=c["in_context_len"], dropout=c["proj_drop"],
        num_classes=c["num_classes"], mlp_ratio=c["mlp_ratio"])


def read_state(case):
    return tensors(read_arrays(case["key"] + "_state.npz"))


def read_io(case):
    return tensors(read_arrays(case["key"] + "_io.npz"))


@torch.no_grad()
def predict(model, io, block=None):
    return model(io["x"], io["t"], io["y"], block)


@pytest.fixture(params=CASES, ids=[c["key"] for c in CASES])
def case(request):
    return request.param


def test_outputs_and_features(case):
    model, state, io = JiT(denoiser_config(case)).eval(), read_state(case), read_io(case)
    assert len(state) == case["num_state_entries"]
    model.load_state_dict(state)
    last = []
    model.final_layer.register_forward_pre_hook(lambda module, inputs: last.append(inputs[0]))
    assert_close(predict(model, io)[0], io["out"], ATOL)
    assert_close(last[0], io["last"], ATOL)
    features = {f"feat_layer{block}": block for block in case["feature_layers"]}
    assert features.keys() == {name for name in io if name.startswith("feat_layer")}
    for name, block in features.items():
        out, tokens = predict(model, io, block)
        assert_close(out, io["out"], ATOL)
        assert_close(tokens, io[name], ATOL)
    assert io["y"].max() == model.config.num_classes, "the cases include the null label"


def test_embeddings(case):
    model, io = JiT(denoiser_config(case)), read_io(case)
    model.load_state_dict(read_state(case))
    assert_close(model.t_embedder(io["t"]), io["t_emb"], ATOL)
    assert_close(model.y_embedder(io["y"]), io["y_emb"], ATOL)
    assert_close(model.x_embedder(io["x"]), io["x_emb"], ATOL)


def test_dropout_of_every_block(case):
    blocks = JiT(denoiser_config(case)).blocks
    assert [b.attn.dropout.p for b in blocks] == case["per_block_proj_drop_p"]
    assert [b.mlp.dropout.p for b in blocks] == case["per_block_proj_drop_p"]


# ------------------------------------------------------------------------------------------ published checkpoints


def published(state) -> dict:
    """What Lightning writes. The raw weights differ from the EMA's in the output bias alone, so that the raw model's
    images are the EMA's plus one."""
    raw = state | {"final_layer.linear.bias": state["final_layer.linear.bias"] + 1}
    weights = {f"denoiser.{k}": v for k, v in raw.items()} | {f"ema_denoiser.{k}": v for k, v in state.items()}
    weights["diffusion_trainer.proj.0.0.weight"] = torch.ones(3, 2)
    return {"state_dict": weights, "epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.5.0",
            "optimizer_states": [{"state": {0: {"step": torch.tensor(12.0), "exp_avg": torch.zeros(2)}},
                                  "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "params": [0]}]}]}


def start(case) -> int:
    return case["constructor"]["in_context_start"]


def test_convert_and_load(case, tmp_path):
    torch.save(published(read_state(case)), tmp_path / "last.ckpt")
    options = ["--in-context-start", str(start(case))]
    assert main(["convert", str(tmp_path / "last.ckpt"), str(tmp_path / "model"), *options]) == 0
    io = read_io(case)
    for weights, shift in (("ema", 0), ("raw", 1)):
        model = load_denoiser(tmp_path / "model", weights)
        assert_close(predict(model, io)[0], io["out"] + shift, ATOL)
        assert not model.training and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("group", ["denoiser", "ema_denoiser"])
def test_every_key_that_does_not_fit_is_named(case, group, tmp_path):
    content = published(read_state(case))
    weights, depth = content["state_dict"], case["constructor"]["depth"]
    missing = [f"blocks.{depth - 1}.mlp.w3.bias", "t_embedder.mlp.0.bias"]
    for key in missing:
        del weights[f"{group}.{key}"]
    weights[f"{group}.blocks.0.surplus"] = torch.zeros(1)
    weights[f"{group}.final_layer.linear.bias"] = torch.zeros(7)
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError) as error:
        read_published(tmp_path / "bad.ckpt", start(case))
    for part in (f"{group}:", "missing (2)", *missing, "extra (1): blocks.0.surplus",
                 "misshaped (1): final_layer.linear.bias: (7,) instead of"):
        assert part in str(error.value)


def test_unknown_groups_of_weights_are_named(case, tmp_path):
    content = published(read_state(case))
    content["state_dict"] |= {"vae.weight": torch.zeros(1), "denoiserx.weight": torch.zeros(1)}
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match=r"extra \(2\): denoiserx.weight, vae.weight"):
        read_published(tmp_path / "bad.ckpt", start(case))


def test_the_ema_weights_have_to_be_there(case, tmp_path):
    content = published(read_state(case))
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if not k.startswith("ema_")}
    torch.save(content, tmp_path / "bad.ckpt")
    with pytest.raises(CheckpointError, match="without any entry: ema_denoiser"):
        read_published(tmp_path / "bad.ckpt", start(case))


def test_the_start_of_the_context_is_asked_for(case, tmp_path, capsys):
    torch.save(published(read_state(case)), tmp_path / "last.ckpt")
    assert main(["convert", str(tmp_path / "last.ckpt"), str(tmp_path / "model")]) == 1
    assert "give in_context_start" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, 2))],
                         ids=["zip", "pickle"])
def test_code_in_a_checkpoint_is_not_run(write, tmp_path):
    exploded = tmp_path / "exploded"
    content = {"state_dict": {"denoiser.weight": torch.zeros(1)}, "callbacks": Bomb(exploded)}
    write(content, tmp_path / "bomb.ckpt")
    with pytest.raises(CheckpointError, match=r"bomb\.ckpt: not a readable file"):
        read_published(tmp_path / "bomb.ckpt")
    assert not exploded.exists()
    torch.load(tmp_path / "bomb.ckpt", weights_only=False) if write is torch.save else pickle.loads(
        (tmp_path / "bomb.ckpt").read_bytes())
    assert exploded.exists(), "the bomb is a real one"
