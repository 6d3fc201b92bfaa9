"""Text: the encoder from files, prompts to images, and a training stage that starts from an earlier one."""

import json

import numpy as np
import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

from pixelgen import PixelGen
from pixelgen.checkpoint import CheckpointError, export, start_from
from pixelgen.cli import main
from pixelgen.conditioning import Prompts
from pixelgen.config import ConfigError, OptimizerConfig
from pixelgen.encoders.text import load_text_encoder
from pixelgen.models.jit_t2i import JiTText
from pixelgen.objective import Objective
from pixelgen.samplers.euler import Euler
from pixelgen.samplers.heun import Heun
from pixelgen.speed import compile_blocks
from pixelgen.train import LaneBatch, create_state, train
from tests.pixelgen.conftest import (
    TINY_TEXT,
    StandInDino,
    fit_config,
    objective_config,
    randomised,
    stand_in_lpips,
    tiny_text,
)

LENGTH, WIDTH = TINY_TEXT["text_length"], TINY_TEXT["text_width"]
SAMPLER = Euler(3, 2.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Qwen3 with random weights, as `save_pretrained` writes one."""
    path = tmp_path_factory.mktemp("text")
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(["a red circle left of a blue square"], vocab_size=300,
                               special_tokens=["<|endoftext|>"])
    pieces.save_model(str(path))
    tokenizer = Qwen2Tokenizer.from_pretrained(path)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2,
                           num_attention_heads=2, num_key_value_heads=1, head_dim=8)).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return load_text_encoder(folder, LENGTH)


def test_features_are_the_last_hidden_states_of_exactly_so_many_tokens(encoder, folder):
    features = encoder(["a red", "", "a red circle left of a blue square and so on and on"])
    assert features.shape == (3, LENGTH, WIDTH) and features.dtype == torch.float32 and features.isfinite().all()
    network = Qwen3Model.from_pretrained(folder)
    tokens = encoder.tokenizer("a red", return_tensors="pt").input_ids
    with torch.no_grad():
        alone = network(tokens).last_hidden_state
    torch.testing.assert_close(features[:1, :tokens.shape[1]], alone, rtol=1e-5, atol=1e-5)
    padded = encoder.tokenizer("a red", padding="max_length", max_length=LENGTH, return_tensors="pt")
    assert padded.attention_mask.sum() < LENGTH
    with torch.no_grad():
        whole = network(**padded).last_hidden_state
    torch.testing.assert_close(features[:1], whole, rtol=1e-5, atol=1e-5, msg="the padding is masked")
    assert not any(p.requires_grad for p in encoder.network.parameters()) and not encoder.network.training


def test_padding_is_on_the_right_and_no_token_sees_it(encoder):
    together = encoder(["a red", "a red circle left"])
    torch.testing.assert_close(together[0], encoder(["a red"])[0], rtol=1e-5, atol=1e-5)
    longer = load_text_encoder(encoder.network.config.name_or_path, LENGTH + 3)
    torch.testing.assert_close(longer(["a red"])[0, :LENGTH], together[0], rtol=1e-5, atol=1e-5)


def test_half_precision(folder):
    low = load_text_encoder(folder, LENGTH, precision="bf16")
    assert low.network.dtype == torch.bfloat16 and low(["a"]).dtype == torch.float32


def test_attention_to_nothing_gives_zero_on_every_device(encoder):
    """Of the kernels that may run, every one gives 0 for a token that may look at none. cuDNN's does not."""
    allowed = []
    with encoder.network.register_forward_pre_hook(lambda *_: allowed.append(_cur_sdpa_kernel_backends())):
        encoder([""])
    assert set(allowed[0]) == {SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH}
    q = torch.ones(1, 1, 4, 8)
    nothing = torch.nn.functional.scaled_dot_product_attention(q, q, q, torch.zeros(4, 4, dtype=torch.bool))
    assert not nothing.any()


def test_no_keys_and_values_are_kept(encoder):
    """Nothing comes after these tokens, and each layer would be compiled by itself, for its place in what is kept."""
    kept = []
    with encoder.network.register_forward_hook(lambda network, given, output: kept.append(output.past_key_values)):
        encoder(["a red"])
    assert kept == [None]


def test_what_runs_is_what_was_compiled(folder, encoder, monkeypatch):
    """Without torch's compiler: it would start threads, which the tests that fork could not do with."""
    called = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: lambda *a, **k: called.append(1) or function(*a, **k))
    compiled = load_text_encoder(folder, LENGTH)
    compile_blocks(compiled.network)
    assert torch.equal(compiled(["a red", ""]), encoder(["a red", ""]))
    assert len(called) == len(compiled.network.layers) == 2


def test_a_folder_without_an_encoder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"not a text encoder: there is no config\.json"):
        load_text_encoder(tmp_path, LENGTH)


# ------------------------------------------------------------------------------------------------------- drawing


@pytest.fixture(scope="module")
def model(encoder):
    torch.manual_seed(0)
    return PixelGen(randomised(JiTText(tiny_text())).eval(), "fp32", Prompts(encoder))


def test_a_prompt_has_its_own_image_whatever_is_drawn_beside_it(model):
    prompts = ["a red circle", "a blue square", "a red circle"]
    images = model.generate(prompts, [0, 1, 2], SAMPLER, batch_size=2)
    assert images.shape == (3, 16, 16, 3)
    assert np.array_equal(model.generate(prompts[1:2], [1], SAMPLER, batch_size=2)[0], images[1])
    assert not np.array_equal(model.generate(["a red circle"], [1], SAMPLER, batch_size=2)[0], images[1])


def test_guidance_leads_away_from_the_negative_prompt(model):
    plain, empty, other = (model.generate(["a red circle"], [0], SAMPLER, negative=n)
                           for n in ("", "", "a blue square"))
    assert np.array_equal(plain, empty) and not np.array_equal(plain, other)
    same = model.generate(["a red circle"], [0], SAMPLER, negative="a red circle")
    assert np.array_equal(same, model.generate(["a red circle"], [0], Euler(3)))


def test_labels_are_not_prompts(model):
    with pytest.raises(ConfigError, match="draws prompts, not labels such as 3"):
        model.generate([3], [0])


def test_a_text_model_needs_the_encoder_it_was_trained_with(tmp_path, model, folder):
    weights = model.denoiser.state_dict()
    export(tmp_path / "a", tiny_text(), weights, weights, {})
    with pytest.raises(ConfigError, match="name the folder of its text encoder"):
        PixelGen.from_pretrained(tmp_path / "a")
    again = PixelGen.from_pretrained(tmp_path / "a", text_encoder=folder)
    assert np.array_equal(again.generate(["a red"], [0], SAMPLER), model.generate(["a red"], [0], SAMPLER))
    other = JiTText(tiny_text(text_width=24))
    export(tmp_path / "b", tiny_text(text_width=24), other.state_dict(), other.state_dict(), {})
    with pytest.raises(ConfigError, match="gives features of width 16, .*/b takes 24: it is another text encoder"):
        PixelGen.from_pretrained(tmp_path / "b", text_encoder=folder)


@pytest.mark.parametrize("layout", ["geneval", "dpg"])
def test_the_command_line_draws_files_of_prompts(tmp_path, model, folder, layout, capsys):
    weights = model.denoiser.state_dict()
    export(tmp_path / "m", tiny_text(), weights, weights, {})
    (tmp_path / "prompts").mkdir()
    for name in ("7", "b"):
        (tmp_path / "prompts" / f"{name}.txt").write_text(f"a red {name}\n")
    arguments = ["sample", str(tmp_path / "m"), str(tmp_path / "out"), "--prompts", str(tmp_path / "prompts"),
                 "--steps", "2", "--text-encoder", str(folder), "--layout", layout]
    assert main(arguments) == 0
    expected = model.generate(["a red b"] * 4, range(4, 8), Heun(2))
    from PIL import Image

    def pixels(path):
        return np.asarray(Image.open(tmp_path / "out" / path))

    if layout == "dpg":
        assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["7.png", "b.png"]
        assert np.array_equal(pixels("b.png"), np.block([[[expected[0]], [expected[1]]], [[expected[2]], [expected[3]]]]
                                                        ).reshape(32, 32, 3)) or np.array_equal(
            pixels("b.png"), np.concatenate([np.concatenate(expected[:2], 1), np.concatenate(expected[2:], 1)]))
    else:
        assert json.loads((tmp_path / "out/b/metadata.jsonl").read_text()) == {"prompt": "a red b"}
        assert all(np.array_equal(pixels(f"b/samples/{n:04}.png"), expected[n]) for n in range(4))
    assert main(arguments) == 1 and "exists" in capsys.readouterr().err
    if layout == "geneval":
        assert main([*arguments, "--per-prompt", "0"]) == 1 and "--per-prompt 0: at least 1" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ training


def objective(encoder, **options):
    config = objective_config(repa_block=1, repa_hidden=16, pdino_block=1, balance_start=None, **options)
    return Objective(config, 8, encoder([""])[0], {"dino": StandInDino(), "lpips": stand_in_lpips})


def begun(encoder, size, start=None, **changes):
    config = tiny_text(image_size=size, **changes)
    state = create_state(config, objective(encoder), OptimizerConfig(lr=1e-3), 0, torch.device("cpu"))
    if start:
        start_from(state, start)
    return state


def trained(encoder, size, start=None, steps=2):
    goal, state = objective(encoder), begun(encoder, size, start)
    generator = torch.Generator().manual_seed(0)
    batches = ([LaneBatch(step, 0, ["a", "b"], torch.randint(0, 256, (2, 3, size, size), generator=generator,
                                                             dtype=torch.uint8), encoder(["a red", "a blue"]))]
               for step in range(steps))
    for _ in train(state, batches, goal, OptimizerConfig(lr=1e-3), fit_config(steps=steps, batch_size=2, lanes=1)):
        pass
    return state


def write(state, directory):
    export(directory, state.model.denoiser.config, state.ema.state_dict(), state.model.denoiser.state_dict(),
           state.model.projector.state_dict())
    return directory


def test_a_stage_starts_from_weights_and_ema_and_rebuilds_only_the_position_table(encoder, tmp_path):
    early = trained(encoder, 16)
    late = begun(encoder, 32, write(early, tmp_path / "early"))
    for new, old in ((late.model, early.model), (late.ema, early.ema)):
        fresh = {k: v for k, v in new.state_dict().items() if not k.endswith("pos_embed")}
        assert all(torch.equal(v, old.state_dict()[k]) for k, v in fresh.items())
    assert torch.equal(late.ema.pos_embed, JiTText(tiny_text(image_size=32)).pos_embed)
    assert late.optimizer.state == {} and late.step == 0
    assert not torch.equal(late.ema.output_weight, late.model.denoiser.output_weight)
    assert trained(encoder, 32, tmp_path / "early").step == 2


def test_anything_else_that_does_not_fit_is_listed(encoder, tmp_path):
    early = write(trained(encoder, 16), tmp_path / "early")
    with pytest.raises(CheckpointError, match=r"raw\.safetensors: .* missing \(12\): blocks\.2\."):
        begun(encoder, 32, early, depth=3)
    (early / "projector.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"projector\.safetensors: not a readable file of plain tensors"):
        begun(encoder, 32, early)


def test_the_block_of_repa_has_to_be_there(encoder):
    with pytest.raises(ConfigError, match="repa.block 1: the denoiser has blocks 0 to 0"):
        create_state(tiny_text(depth=1), objective(encoder), OptimizerConfig(), 0, torch.device("cpu"))
