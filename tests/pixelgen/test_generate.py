"""From an exported model to images."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from pixelgen import PixelGen, cli
from pixelgen.checkpoint import CheckpointError, export
from pixelgen.cli import main
from pixelgen.config import ConfigError
from pixelgen.models.jit_t2i import JiTText
from pixelgen.precision import store_in_bf16
from pixelgen.samplers import Sampler
from pixelgen.samplers.adams_bashforth import AdamsBashforth
from pixelgen.samplers.euler import Euler
from pixelgen.samplers.heun import Heun
from tests.pixelgen.conftest import CLASSES, TINY_TEXT, randomised, some_images, tiny_config, tiny_denoiser, tiny_text

LABELS, SEEDS = [i % 4 for i in range(16)], list(range(100, 116))
SAMPLERS: list[Sampler] = [Euler(3), Heun(4, 2.5, (0.1, 0.9), 2.0), AdamsBashforth(4, 3.0)]


@pytest.fixture(scope="module")
def model():
    return PixelGen(tiny_denoiser().eval(), "fp32", CLASSES)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: s.kind)
@pytest.mark.parametrize("size", [1, 2, 7, 16])
def test_an_image_depends_on_its_own_label_and_seed_alone(model, sampler, size):
    """To the byte, if the network always sees as many samples as now; else up to the rounding of a few pixels."""
    for batch_size in (4, None):
        whole = model.generate(LABELS, SEEDS, sampler, batch_size)
        assert whole.shape == (16, 16, 16, 3) and whole.dtype == np.uint8
        parts = [model.generate(LABELS[i:i + size], SEEDS[i:i + size], sampler, batch_size) for i in range(0, 16, size)]
        order = [5, 0, 11]
        chosen = model.generate([LABELS[i] for i in order], [SEEDS[i] for i in order], sampler, batch_size)
        apart = np.concatenate([*parts, chosen]).astype(int) - np.concatenate([whole, whole[order]])
        if batch_size:
            assert not apart.any()
        else:
            assert np.abs(apart).max() <= 1 and np.count_nonzero(apart) < 1e-3 * apart.size


def test_label_and_seed_both_count(model):
    images = model.generate([0, 0, 1], [1, 2, 1], SAMPLERS[0])
    assert not np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])


def test_images_are_those_that_the_sampler_ends_with(model):
    """With a denoiser that always predicts the same grey, that grey."""
    grey = tiny_denoiser()
    torch.nn.init.zeros_(grey.final_layer.linear.weight)
    torch.nn.init.constant_(grey.final_layer.linear.bias, 0.5)
    images = PixelGen(grey.eval(), "fp32", CLASSES).generate([0, 1], [0, 1], SAMPLERS[1])
    assert (images == 191).all()  # (0.5 + 1)·127.5 = 191.25


def test_noise_of_a_seed_is_its_own(model):
    noise = model.noise([3, 4, 3])
    assert noise.shape == (3, 3, 16, 16)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(model.noise([3])[0], noise[0])
    assert torch.equal(torch.get_rng_state(), state), "the generator of everyone else is left alone"


@pytest.mark.parametrize(("labels", "seeds", "error", "message"), [
    ([0, 4, 9], [0, 1, 2], ConfigError, r"labels \[4, 9\] are outside 0 to 3"),
    ([-1], [0], ConfigError, r"labels \[-1\]"),
    ([0, 1], [0], ValueError, "2 labels or prompts, but 1 seeds"),
    ([], [], ValueError, "no labels"),
])
def test_wrong_labels_and_seeds_are_refused(model, labels, seeds, error, message):
    with pytest.raises(error, match=message):
        model.generate(labels, seeds)


def test_from_pretrained(tmp_path, model):
    other = tiny_denoiser(1)
    export(tmp_path, tiny_config(), model.denoiser.state_dict(), other.state_dict(), {})
    expected = model.generate([0, 1], [0, 1], SAMPLERS[1])
    for source in (tmp_path, str(tmp_path)):
        assert np.array_equal(PixelGen.from_pretrained(source).generate([0, 1], [0, 1], SAMPLERS[1]), expected)
    raw = PixelGen.from_pretrained(tmp_path, weights="raw").generate([0, 1], [0, 1], SAMPLERS[1])
    assert not np.array_equal(raw, expected)
    low = PixelGen.from_pretrained(tmp_path, precision="bf16").generate([0, 1], [0, 1], SAMPLERS[1])
    assert not np.array_equal(low, expected)
    assert np.abs(low.astype(int) - expected).mean() < 8


def test_from_pretrained_errors(tmp_path):
    for source in (tmp_path, str(tmp_path / "nowhere"), "nowhere", "./nowhere/model"):
        with pytest.raises(CheckpointError, match=r"there is no config\.json"):
            PixelGen.from_pretrained(source)
    with pytest.raises(ConfigError, match="precision"):
        PixelGen(tiny_denoiser(), "fp16", CLASSES)


def test_a_repository_that_cannot_be_had_is_named(monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise FileNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match="^owner/name: no such directory, .* the Hub: no connection$"):
        PixelGen.from_pretrained("owner/name")


def test_command_line(tmp_path, capsys, model):
    export(tmp_path / "m", tiny_config(), model.denoiser.state_dict(), model.denoiser.state_dict(), {})
    arguments = ["sample", str(tmp_path / "m"), str(tmp_path / "out.png"), "--steps", "2", "--labels"]
    assert main([*arguments, "0", "3", "--device", "cpu"]) == 0
    assert capsys.readouterr().err == "drawing in fp32 on cpu\n"
    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "out.png"))
    assert picture.shape == (16, 34, 3)
    expected = model.generate([0, 3], [0, 1], Heun(2))
    assert np.array_equal(picture[:, :16], expected[0]) and np.array_equal(picture[:, 18:], expected[1])
    assert main([*arguments, "4"]) == 1
    assert "labels [4] are outside 0 to 3" in capsys.readouterr().err
    assert main([*arguments, "0", "--sampler", "adams_bashforth", "--order", "5"]) == 1
    assert "--sampler.adams_bashforth: order 5 must be 1, 2, 3 or 4" in capsys.readouterr().err
    assert main([*arguments, "0", "--interval", "0.9", "0.1"]) == 1
    assert "--sampler.heun: interval [0.9, 0.1] must satisfy" in capsys.readouterr().err
    arguments[2] = str(tmp_path / "none" / "out.png")
    assert main([*arguments, "0"]) == 1
    assert "No such file or directory" in capsys.readouterr().err
    arguments[2] = str(tmp_path / "out")
    assert main([*arguments, "0"]) == 1
    assert "out: images of --labels go into one picture: name a .png" in capsys.readouterr().err


@pytest.mark.parametrize(("gpus", "given", "says"), [
    (0, [], "drawing in fp32 on cpu"), (2, [], "drawing in bf16 on cuda"),
    (2, ["--device", "cpu"], "drawing in fp32 on cpu"), (2, ["--device", "cuda:1"], "drawing in bf16 on cuda:1"),
    (1, ["--precision", "fp32"], "drawing in fp32 on cuda"),
    (0, ["--precision", "bf16"], "drawing in bf16 on cpu"),
    (2, ["--device", "cuda:2"], "--device cuda:2: torch sees 2 GPUs here"),
    (0, ["--device", "cuda"], "--device cuda: torch sees 0 GPUs here"),
    (1, ["--device", "gpu"], "--device 'gpu': cpu, cuda or cuda:N")])
@pytest.mark.parametrize("command", [["sample", "m", "x.png", "--labels", "0"], ["app", "m"]])
def test_what_is_drawn_on_and_in(monkeypatch, capsys, command, gpus, given, says):
    """What the command line says is what is loaded."""
    loaded = []

    def load(source, device, precision, **_):
        loaded.append(f"drawing in {precision} on {device}")
        raise ConfigError("enough")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(PixelGen, "from_pretrained", load)
    assert main([*command, *given]) == 1
    assert says in capsys.readouterr().err
    assert loaded == [says] * says.startswith("drawing")


@pytest.mark.parametrize("bug", [lambda args: [*zip([1], [], strict=True)], lambda args: Path("of ours").read_text()])
def test_the_command_line_keeps_the_traceback_of_a_bug(tmp_path, monkeypatch, bug):
    monkeypatch.setitem(cli.COMMANDS, "convert", bug)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match="argument 2 is shorter|of ours"):
        main(["convert", "x.ckpt", "out"])


@pytest.mark.parametrize("text", [False, True])
def test_weights_stored_in_half_precision_give_the_bits_that_autocast_gives(text):
    torch.manual_seed(0)
    model = randomised(JiTText(tiny_text())) if text else tiny_denoiser()
    condition = torch.randn(2, TINY_TEXT["text_length"], TINY_TEXT["text_width"]) if text else torch.tensor([0, 3])
    half = store_in_bf16(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found, wanted = (m(some_images(2), torch.tensor([0.3, 0.7]), condition)[0] for m in (half, model))
    assert torch.equal(found, wanted)
    assert sum(p.nbytes for p in half.parameters()) < 0.7 * sum(p.nbytes for p in model.parameters())


def test_a_model_loaded_in_half_precision_is_stored_in_it(tmp_path):
    plain = tiny_denoiser()
    export(tmp_path, plain.config, plain.state_dict(), plain.state_dict(), {})
    loaded = PixelGen.from_pretrained(tmp_path, precision="bf16")
    assert loaded.denoiser.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert loaded.denoiser.y_embedder.embedding_table.weight.dtype == torch.float32
    images = PixelGen(plain.eval(), "bf16", CLASSES).generate([0, 1], [0, 1], SAMPLERS[0])
    assert np.array_equal(loaded.generate([0, 1], [0, 1], SAMPLERS[0]), images)
