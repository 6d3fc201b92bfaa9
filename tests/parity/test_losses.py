"""The training objective, its gate and its balance against golden numbers.

The product's `Objective` and `train_step` are run; the networks around them are stand-ins that answer with the golden
values of those samples they are asked about.
"""

import re

import torch
from torch import nn

from pixelgen import path
from pixelgen.config import FitConfig, OptimizerConfig
from pixelgen.ema import ema_copy
from pixelgen.losses import balance_weight
from pixelgen.objective import Draws, Losses, Objective, repa_projector
from pixelgen.terms import LpipsConfig, ObjectiveConfig, PDinoConfig, RepaConfig
from pixelgen.train import LaneBatch, TrainState, train_step
from tests.parity.conftest import (
    assert_close,
    each,
    read_arrays,
    read_json,
    tensors,
    unlisted,
)

LISTED, ARRAYS = read_json("loss.json"), read_arrays("loss.npz")
CASES, ADAPTIVE = LISTED.get("cases", []), LISTED.get("adaptive_cases", [])
TOY = LISTED.get("toy_train_step", {"rows": []})
SCALAR = 1e-5  # relative
GRADIENT = 1e-6  # absolute
TOY_RTOL = 1e-4
LEAVES = ("pred_img", "src_feat", "pred_dino_feat", "lpips_per_sample")


def test_cases_were_found():
    assert CASES
    assert ADAPTIVE
    assert TOY["rows"]


def test_every_array_is_of_a_listed_case():
    assert not unlisted(ARRAYS, r"(case\d+|adaptive\d+)_", CASES + ADAPTIVE)
    steps = {int(m[1]) for name in ARRAYS if (m := re.match(r"toystep_(\d+)_", name))}
    assert steps == {row["global_step"] for row in TOY["rows"]}


# ------------------------------------------------------------------------------------------------- the fixed cases


@each(CASES)
def test_times_and_noisy_images(case):
    a, s = tensors(ARRAYS, case["key"] + "_"), case["settings"]
    if s["lognorm_t"]:
        std, mean = map(float, re.search(r"sigmoid\(([\d.]+)\*z([+-][\d.]+)\)", case["base_draw"]).groups())
        t = path.draw_time(a["base_draw"], mean, std, s["timeshift"])
    else:
        t = path.shift_time(a["base_draw"], s["timeshift"])
    assert_close(t, a["t"], 1e-6)
    assert_close(path.interpolate(a["x"], a["noise_draw"] * s["noise_scale"], t), a["x_t"], 1e-5)


class Recorded:
    """The networks of one case: they know samples by their images, and answer with the golden values of those.

    `model` is the denoiser with its REPA head, the object itself is DINO. What they answer are leaves of the graph, so
    that after `backward` each holds the total's gradient.
    """

    depth, width = 12, 768

    def __init__(self, arrays, block):
        self.a, self.block = arrays, block
        self.asked = {}  # the samples that each perceptual network was run on
        self.leaves = {name: arrays[name].clone().requires_grad_() for name in LEAVES}
        self.projector = None
        head = re.compile(r"param__diffusion_trainer\.proj\.\d+\.")
        if state := {head.sub("", k): v for k, v in arrays.items() if head.match(k)}:
            self.projector = repa_projector(state["0.weight"].shape[1], len(state["4.bias"]), len(state["0.bias"]))
            self.projector.load_state_dict(state)

    def model(self, x_t, t, condition, dropout):
        assert_close(x_t, self.a["x_t"], 1e-5)
        projected = self.leaves["src_feat"]
        return self.leaves["pred_img"], projected if self.projector is None else self.projector(projected)

    def __call__(self, images, blocks):
        if not images.requires_grad:
            assert_close((images + 1) / 2, self.a["raw_image"], 1e-6)
            return dict.fromkeys(blocks, self.a["dst_feat"])
        assert list(blocks) == [self.block]
        rows = self.rows("pdino", images, self.a["pred_img"])
        return {self.block: self.leaves["pred_dino_feat"][rows]}

    def lpips(self, prediction, x):
        rows = self.rows("lpips", prediction, self.a.get("lpips_input_pred", self.a["pred_img"]))
        assert_close(x, self.a.get("lpips_input_x", self.a["x"])[rows], 1e-5)
        return self.leaves["lpips_per_sample"][rows]

    def rows(self, term, images, among):
        assert images.shape[1:] == among.shape[1:], "the images have another size"
        apart = (images[:, None].detach() - among[None]).abs().flatten(2).amax(2)
        assert bool((apart.min(1).values < 1e-5).all()), "an image is none of those in the golden file"
        self.asked[term] = apart.argmin(1).tolist()
        return self.asked[term]

    def gradients(self):
        return {k: torch.zeros_like(v) if v.grad is None else v.grad for k, v in self.leaves.items()}


def run(case, gated, monkeypatch):
    """One micro-batch through the product -> its losses, the networks that answered, the golden arrays."""
    a, s, r = tensors(ARRAYS, case["key"] + "_"), case["settings"], case["result"]
    monkeypatch.setattr(path, "FLOOR", s["t_eps"])
    weights = {name: s[f"{key}_weight"] * s["percept_ratio"] for name, key in (("lpips", "lpips"), ("pdino", "dino"))}
    config = ObjectiveConfig(
        RepaConfig(s["feat_loss_weight"], block=0), LpipsConfig(weights["lpips"], "lpips" in gated),
        PDinoConfig(weights["pdino"], "pdino" in gated), gate_threshold=s["percept_t_threshold"], timeshift=1.0,
        balance_start=None)
    networks = Recorded(a, config.pdino.block)
    objective = Objective(config, s["patch_size"], torch.tensor(0), {"dino": networks, "lpips": networks.lpips})
    draws = Draws(a["noise_draw"] * s["noise_scale"], a["t"], torch.zeros(len(a["t"]), dtype=torch.long))
    losses = objective(networks.model, a["x"], draws, r["percept_weight"])
    losses.total[0].backward()
    samples = range(len(a["t"]))
    counted = {name: [i for i in samples if a["passes_gate"][i] or name not in gated] for name in weights}
    assert networks.asked == {name: rows for name, rows in counted.items() if rows and weights[name]}
    return Losses(losses.total[0], losses.reconstruction[0], losses.perceptual[0],
                  {name: values[0] for name, values in losses.terms.items()}), networks, a


@each(CASES)
def test_objective_as_released(case, monkeypatch):
    """LPIPS gated, P-DINO not. Where no sample passes we differ from the reference on purpose: there its P-DINO turns
    into the constant 1 without a gradient, ours stays the mean over the whole batch: not gated is not gated."""
    losses, networks, a = run(case, ("lpips",), monkeypatch)
    r, passing = case["result"], int(a["passes_gate"].sum())
    assert (networks.projector is not None) == case["real_projection"]
    assert case["num_pass"] == passing == (a["t"] >= case["settings"]["percept_t_threshold"]).sum()
    gradients = networks.gradients()
    expected = {name: a[f"grad_{name}"] for name in LEAVES}
    weight = case["settings"]["dino_weight"] * case["settings"]["percept_ratio"] * r["percept_weight"]
    pdino = {key: r[key] for key in ("inter_cos_0", "dino_percept_loss")}
    total = r["loss"]
    if not passing:
        assert pdino == dict.fromkeys(pdino, 1.0) and not expected.pop("pred_dino_feat").any()
        leaf = a["pred_dino_feat"].clone().requires_grad_()
        mean = (1 - (unit(leaf) * unit(a["dst_feat"])).sum(-1)).mean()
        expected["pred_dino_feat"] = weight * torch.autograd.grad(mean, leaf)[0]
        pdino, total = dict.fromkeys(pdino, mean.item()), total + weight * (mean.item() - 1)
    assert_close(losses.total, total, rtol=SCALAR)
    assert_close(losses.terms["fm"], r["fm_loss"], rtol=SCALAR)
    if case["settings"]["feat_loss_weight"]:
        assert_close(losses.terms["repa"], r["cos_loss"], rtol=SCALAR)
    if case["settings"]["lpips_weight"]:
        assert_close(losses.terms["lpips"], r["lpips_loss"], rtol=SCALAR)
    if case["settings"]["dino_weight"]:
        for value in pdino.values():
            assert_close(losses.terms["pdino"], value, rtol=SCALAR)
    for name, value in expected.items():
        assert_close(gradients[name], value, GRADIENT)


@each(CASES)
def test_objective_as_published(case, monkeypatch):
    """Both perceptual terms gated; the golden results are null where no sample passes, ours are 0 there."""
    losses, networks, a = run(case, ("lpips", "pdino"), monkeypatch)
    r, passing = case["result"], int(a["passes_gate"].sum())
    pdino, total = r["dino_percept_loss_if_gated_per_sample"], r["loss_if_dino_gated_per_sample"]
    if not passing:
        assert pdino is None and total is None
        pdino, total = 0.0, r["fm_loss"] + case["settings"]["feat_loss_weight"] * r["cos_loss"]
    if case["settings"]["dino_weight"]:
        assert_close(losses.terms["pdino"], pdino, rtol=SCALAR)
    assert_close(losses.total, total, rtol=SCALAR)
    gradients = networks.gradients()
    for name in ("pred_img", "src_feat", "lpips_per_sample"):  # the terms that both readings of the gate share
        assert_close(gradients[name], a[f"grad_{name}"], GRADIENT)
    if passing:  # each sample that counts weighs more than in the mean over the whole batch
        counted = a["passes_gate"].view(-1, 1, 1) * len(a["t"]) / passing
        assert_close(gradients["pred_dino_feat"], a["grad_pred_dino_feat"] * counted, GRADIENT)


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


# ---------------------------------------------------------------------------------------------------- the balance


@each(ADAPTIVE)
def test_balance_weight(case):
    a = tensors(ARRAYS, case["key"] + "_")
    weight = a["weight"].requires_grad_()
    o = a["h"] @ weight.T
    reconstruction = case["rec_scale"] * (o - a["target"]).square().mean()
    perceptual = case["percept_scale"] * (o * a["q"]).mean()
    assert_close(reconstruction, case["rec_loss"], rtol=SCALAR)
    assert_close(perceptual, case["percept_loss"], rtol=SCALAR)
    assert_close(balance_weight(reconstruction, perceptual, weight), case["adaptive_weight"], rtol=1e-4)


class ToyDenoiser(nn.Module):
    """Fixed tokens and a trained last layer, in the shape of a denoiser."""

    def draw_dropout(self, count):
        return ()

    def __init__(self, a, patch):
        super().__init__()
        self.hidden, self.bias, self.patch = a["hidden"], a["final_bias"], patch
        self.output_weight = nn.Parameter(a["final_weight"].clone())

    def forward(self, x_t, t, condition):
        return unpatchify(self.hidden @ self.output_weight.T + self.bias, self.patch)


class ToyModel(nn.Module):
    def __init__(self, denoiser, a):
        super().__init__()
        self.denoiser, self.a = denoiser, a

    def forward(self, x_t, t, condition, dropout):
        prediction = self.denoiser(x_t, t, condition)
        assert_close(t, self.a["t"], 1e-6)
        assert_close(x_t, self.a["x_t"], 1e-5)
        assert_close(prediction, self.a["pred_img"], 1e-5)
        return prediction, self.a["src_feat"]


class ToyDino:
    depth = 12

    def __init__(self, a, patch):
        self.a, self.patch, self.width = a, patch, a["A"].shape[1]

    def __call__(self, images, blocks):
        if not images.requires_grad:
            assert_close((images + 1) / 2, self.a["raw_image"], 1e-6)
        return dict.fromkeys(blocks, torch.tanh(patchify((images + 1) / 2, self.patch) @ self.a["A"]))


def toy_lpips(prediction, x):
    return 20 * (prediction - x).pow(4).flatten(1).mean(1)


class FixedDraws(Objective):
    def draw(self, x, condition, draw_dropout):
        return self.draws


def patchify(images, p):
    return nn.functional.unfold(images, p, stride=p).transpose(1, 2)


def unpatchify(tokens, p):
    size = int(tokens.shape[1] ** 0.5) * p
    return nn.functional.fold(tokens.transpose(1, 2), (size, size), p, stride=p)


def test_toy_training_steps():
    """Real training steps, one after another at the listed step numbers; the learning rate is 0."""
    a, s = tensors(ARRAYS, "toystep_"), TOY["settings"]
    assert s["t_eps"] == path.FLOOR
    assert len(a["x"]) == TOY["batch"] and a["x"].shape[-1] == TOY["image"]
    assert bool((a["t"] >= s["threshold"]).all()), "the numbers hold for either reading of the gate"
    config = ObjectiveConfig(RepaConfig(s["feat_loss_weight"]), LpipsConfig(s["lpips_weight"]),
                             PDinoConfig(s["dino_weight"]), gate_threshold=s["threshold"])
    networks = {"dino": ToyDino(a, TOY["patch"]), "lpips": toy_lpips}
    objective = FixedDraws(config, 16, torch.tensor(0), networks)
    objective.draws = Draws(a["noise"], a["t"], torch.zeros(TOY["batch"], dtype=torch.long))
    model = ToyModel(ToyDenoiser(a, TOY["patch"]), a)
    state = TrainState(model, ema_copy(model.denoiser), torch.optim.SGD(model.parameters(), lr=0.0, fused=True))
    fit = FitConfig(1, TOY["batch"], 1, 0, 0.9, "fp32", False)
    for row in TOY["rows"]:
        state.step = row["global_step"]
        images = (a["x"] + 1) * 127.5  # as the loop's own conversion expects them, though not whole numbers
        lane = LaneBatch(state.step, 0, ["a"] * len(images), images, objective.draws.condition)
        metrics = train_step(state, model, [lane], objective, OptimizerConfig(), fit)
        assert_close(state.percept_weight, row["percept_weight"], rtol=TOY_RTOL)
        for name, key in (("loss", "loss"), ("fm", "fm_loss"), ("repa", "cos_loss"), ("lpips", "lpips_loss"),
                          ("pdino", "dino_percept_loss"), ("pdino", "inter_cos_0")):
            assert_close(metrics[name], row[key], rtol=SCALAR if name != "loss" else TOY_RTOL)
        want = a[f"{row['global_step']}_grad_final_weight"]
        assert_close(model.denoiser.output_weight.grad, want, atol=TOY_RTOL * want.abs().max().item())
