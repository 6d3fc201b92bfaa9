"""Denoisers as kinds: what one more of them takes, and what each is conditioned on."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from torch import nn

from pixelgen import PixelGen
from pixelgen.checkpoint import export, infer_config, load_denoiser
from pixelgen.conditioning import Labels, Prompts
from pixelgen.config import ConfigError, MemoryConfig, OptimizerConfig, load
from pixelgen.denoisers import Architecture, Denoiser, TakesLabels
from pixelgen.errors import CheckpointError
from pixelgen.estimate import Networks, forward_operations, training_memory
from pixelgen.models import DenoiserNetwork
from pixelgen.objective import Objective
from pixelgen.recipe import Recipe
from pixelgen.samplers.euler import Euler
from pixelgen.train import create_state, train
from tests.pixelgen.conftest import NO_TERMS, fit_config, lane_batch, objective_config, tiny_denoiser


@dataclass(frozen=True)
class PixelConfig(TakesLabels, Architecture):
    """What a developer adds to `pixelgen.denoisers`, in a module of its own …"""

    mark: ClassVar = "to_channels.weight"

    num_classes: int

    def build(self):
        return Pixelwise(self)

    @classmethod
    def infer(cls, shapes, in_context_start):
        return cls(round(shapes["pos_embed"][0] ** 0.5), 1, shapes["to_channels.weight"][1], shapes.count("blocks"),
                   shapes["classes.weight"][0] - 1)

    def kept(self, recomputed):
        return 2 * self.grid**2 * self.width * (self.depth - recomputed)


@dataclass(frozen=True)
class PixelOptions(Denoiser):
    """… with its named sizes …"""

    architecture: ClassVar = PixelConfig
    sizes: ClassVar = {"S": dict(patch_size=1, width=8, depth=2)}
    captions = None

    size: str
    image_size: int
    num_classes: int


class Pixelwise(DenoiserNetwork):
    """… and to `pixelgen.models`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.from_channels, self.to_channels = nn.Linear(4, config.width), nn.Linear(config.width, 3)
        self.classes = nn.Embedding(config.num_classes + 1, config.width)
        self.blocks = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.depth))
        self.register_buffer("pos_embed", torch.linspace(0, 1, config.image_size**2)[:, None])

    @property
    def output_weight(self):
        return self.to_channels.weight

    def forward(self, x_t, t, y, feature_block=None, dropout=()):
        pixels = x_t.flatten(2).transpose(1, 2)
        tokens = self.from_channels(torch.cat([pixels, t.view(-1, 1, 1).expand_as(pixels[..., :1])], -1))
        tokens, features = tokens + self.pos_embed + self.classes(y)[:, None], None
        for i, block in enumerate(self.blocks):
            features = tokens if i == feature_block else features
            tokens = torch.tanh(block(tokens))
        return self.to_channels(tokens).transpose(1, 2).reshape_as(x_t), features


@pytest.fixture
def pixelwise(monkeypatch):
    monkeypatch.setitem(Denoiser.kinds, "pixelwise", f"{__name__}:PixelOptions")


def test_a_denoiser_is_options_an_architecture_and_a_network(pixelwise, tmp_path):
    """It is written in a recipe, trained, exported, drawn from, converted and estimated."""
    recipe = load(Recipe, {"denoiser": {"pixelwise": {"size": "S", "image_size": 16, "num_classes": 4}},
                           "objective": {"repa": {"weight": 0}, "pdino": {"weight": 0}}})
    assert recipe.networks == ["lpips"]
    assert recipe.trajectory["denoiser"]["pixelwise"]["width"] == 8 and recipe.trajectory["captions"] is None
    architecture, optimizer = recipe.denoiser.resolve(), OptimizerConfig(1e-3)
    conditioning = architecture.load_conditioning(None, "cpu", "fp32", "it")
    goal = Objective(objective_config(**NO_TERMS), 1, conditioning.null()[0], {})
    state = create_state(architecture, goal, optimizer, 0, torch.device("cpu"))
    batches = ([lane_batch(step, 0)] for step in range(3))
    *_, last = train(state, batches, goal, optimizer, fit_config(steps=3, batch_size=2, lanes=1))
    assert last.state.step == 3

    weights = state.ema.state_dict()
    export(tmp_path, architecture, weights, weights, {})
    assert json.loads((tmp_path / "config.json").read_text())["denoiser"] == "pixelwise"
    assert load_denoiser(tmp_path).config == architecture == infer_config(weights, "file")
    drawn = PixelGen.from_pretrained(tmp_path).generate([0, 3], [0, 1], Euler(2, guidance=2.0))
    assert np.array_equal(drawn, PixelGen(state.ema, "fp32", conditioning).generate([0, 3], [0, 1], Euler(2, 2.0)))
    networks = Networks(state.model.denoiser)
    assert forward_operations(networks)["denoiser"] == 2 * 256 * (4 * 8 + 2 * 8 * 8 + 8 * 3)
    assert training_memory(networks, objective_config(**NO_TERMS), 1, MemoryConfig())["kept by the denoiser"] > 0


def test_a_denoiser_that_is_none_of_the_kinds_is_refused(pixelwise):
    with pytest.raises(ConfigError, match=r"denoiser: 'git' is not known \(did you mean 'jit'\?\); valid: jit, jit_t"):
        load(Recipe, {"denoiser": {"git": {}}})
    with pytest.raises(ConfigError, match="denoiser.jit: key: 'captions' is not known; valid: dropout, image_size"):
        load(Recipe, {"denoiser": {"jit": {"captions": {}}}})
    with pytest.raises(CheckpointError, match="file: not a denoiser: there is none of in_context_posemb, y_pos_emb"):
        infer_config({"x": torch.zeros(1)}, "file")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_denoiser_that_is_there_is_prepared_as_a_loaded_one(tmp_path, precision):
    """So that a baseline is sampled exactly as the trained model is."""
    built, sampler = tiny_denoiser(), Euler(3, 2.0)
    export(tmp_path, built.config, built.state_dict(), built.state_dict(), {})
    loaded = PixelGen.from_pretrained(tmp_path, precision=precision)
    here = PixelGen.prepared(built.train(), precision=precision)
    assert not here.denoiser.training and not any(p.requires_grad for p in here.denoiser.parameters())
    assert [p.dtype for p in here.denoiser.parameters()] == [p.dtype for p in loaded.denoiser.parameters()]
    assert np.array_equal(here.generate([0, 3], [0, 1], sampler), loaded.generate([0, 3], [0, 1], sampler))


def test_labels():
    labels = Labels(4)
    assert labels.classes == 4 and labels.network is None
    assert torch.equal(labels.null(), torch.tensor([4])) and torch.equal(labels.encode([3, 0]), torch.tensor([3, 0]))
    with pytest.raises(ConfigError, match=r"labels \[4, 'a'\] are outside 0 to 3"):
        labels.encode([1, "a", 4])
    with pytest.raises(ConfigError, match="negative 'blurry': a class-conditional model takes no negative prompt"):
        labels.null("blurry")


def test_prompts():
    class Encoder:
        network = nn.Linear(1, 1)

        def __call__(self, prompts):
            return torch.tensor([[float(len(p))] for p in prompts])

    prompts = Prompts(Encoder())
    assert prompts.classes is None and prompts.network is Encoder.network
    assert prompts.null().item() == 0 and prompts.null("abc").item() == 3
    assert prompts.encode(["a", "bc"]).tolist() == [[1], [2]]
    with pytest.raises(ConfigError, match="this model draws prompts, not labels such as 3"):
        prompts.encode(["a", 3])


def test_options_are_read_without_torch():
    program = ("import sys; from pixelgen.recipe import Recipe; from pixelgen.config import load; "
               "load(Recipe, {'denoiser': {'jit_t2i': {'size': 'XXL/16', 'image_size': 512}}}); "
               "load(Recipe, {'denoiser': {'jit': {'size': 'L/16', 'image_size': 256, 'num_classes': 9}}}); "
               "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", program], check=True)
