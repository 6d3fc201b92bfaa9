"""The denoiser by what must hold whatever its weights are."""

import math
from unittest import mock

import pytest
import torch

from pixelgen.config import ConfigError
from pixelgen.denoisers.jit import SIZES, JiTOptions
from pixelgen.models import jit_t2i
from pixelgen.models.jit import JiT
from pixelgen.models.jit_t2i import JiTText
from pixelgen.models.layers import (
    Dropout,
    RMSNorm,
    SwiGLU,
    position_table,
    rotary_angles,
    rotate,
    sinusoids,
)
from tests.pixelgen.conftest import some_images, tiny_config, tiny_denoiser, tiny_text

X, T, Y = some_images(5), torch.linspace(0, 1, 5), torch.arange(5)  # the last label is the null label


@pytest.mark.parametrize(("size", "exact", "published"), [("L/16", 458_877_664, "459M"),
                                                          ("XL/16", 676_699_200, "676M")])
def test_number_of_parameters(size, exact, published, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "normal_", lambda weight, **_: weight)  # on this device it is slow to load
    with torch.device("meta"):
        model = JiTOptions(size, 256, 1000).resolve().build()
    count = sum(p.numel() for p in model.parameters())
    assert count == exact
    assert published in (f"{round(count / 1e6)}M", f"{math.floor(count / 1e6)}M")


def test_named_sizes():
    for size in SIZES:
        assert JiTOptions(size, 256, 1000, 0.1).resolve().num_classes == 1000
    with pytest.raises(ConfigError, match=r"size: 'XL/61' is not known \(did you mean 'XL/16'\?\)"):
        JiTOptions("XL/61", 256, 1000)
    with pytest.raises(ConfigError, match="image_size 250 is not a multiple"):
        JiTOptions("XL/16", 250, 1000)


def test_a_fresh_model_returns_zeros_and_its_blocks_are_the_identity():
    model = JiT(tiny_config())
    out, features = model(X, T, Y, 2)
    assert not out.any()
    assert torch.equal(features, model.x_embedder(X) + model.pos_embed)


def test_fresh_weights():
    model = JiT(tiny_config(width=64))
    for weight in (model.y_embedder.embedding_table.weight, model.in_context_posemb, model.t_embedder.mlp[0].weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.3)
    conv = model.x_embedder.proj1.weight  # Xavier: uniform within sqrt(6 / (fan in + fan out)), as a linear layer
    bound = math.sqrt(6 / (3 * 64 + len(conv)))
    assert 0.95 * bound < conv.abs().max() <= bound
    assert not any(m.bias.any() for m in model.modules() if getattr(m, "bias", None) is not None)


@pytest.mark.parametrize("bottleneck", [8, None])
def test_shapes(bottleneck):
    model = tiny_denoiser(bottleneck=bottleneck)
    for block in range(3):
        out, features = model(X, T, Y, block)
        assert out.shape == X.shape
        assert features.shape == (5, 4, 32), "the in-context tokens are not among the features"
    assert model(X, T, Y)[1] is None


def test_the_gradient_reaches_every_parameter():
    model = tiny_denoiser()
    model(X, T, Y)[0].square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert "pos_embed" in dict(model.named_buffers())


def test_samples_do_not_see_each_other():
    model = tiny_denoiser().eval()
    other = X.clone()
    other[1] = 0
    first, second = model(X, T, Y)[0], model(other, T, Y)[0]
    changed = [i for i in range(5) if not torch.equal(first[i], second[i])]
    assert changed == [1]


def test_time_label_and_every_patch_count():
    model = tiny_denoiser().eval()
    out = model(X, T, Y)[0]
    assert not torch.allclose(out, model(X, T.flip(0) * 0.9, Y)[0])
    assert not torch.allclose(out, model(X, T, Y.flip(0))[0])
    for top in (0, 8):
        for left in (0, 8):
            other = X.clone()
            other[:, :, top:top + 8, left:left + 8] *= 0.5
            assert not torch.allclose(out[:, :, 4, 4], model(other, T, Y)[0][:, :, 4, 4])


def test_in_context_tokens_act_from_their_block_on():
    model = tiny_denoiser(in_context_start=1).eval()
    before, after = model(X, T, Y, 1)[1], model(X, T, Y, 2)[1]
    with torch.no_grad():
        model.in_context_posemb += 1
    assert torch.equal(model(X, T, Y, 1)[1], before)
    assert not torch.allclose(model(X, T, Y, 2)[1], after)


@pytest.mark.parametrize(("depth", "middle"), [(4, {1, 2}), (6, {1, 2}), (8, {2, 3, 4, 5})])
def test_dropout_is_in_the_middle_blocks_only(depth, middle):
    model = JiT(tiny_config(depth=depth, dropout=0.3))
    for part in ("attn", "mlp"):
        assert {i for i, b in enumerate(model.blocks) if getattr(b, part).dropout.p == 0.3} == middle
        assert all(getattr(b, part).dropout.p in (0, 0.3) for b in model.blocks)


def test_dropout_is_for_those_who_draw_its_masks():
    model = tiny_denoiser(depth=4, dropout=0.3, in_context_start=2)
    torch.manual_seed(0)
    masks = model.draw_dropout(1000)
    tokens, width, hidden = 4, model.config.width, model.config.hidden_width
    assert [[m if m is None else (*m.shape,) for m in pair] for pair in masks] == [
        [None, None], [(1000, tokens, width), (1000, tokens, hidden)],
        [(1000, tokens + 2, width), (1000, tokens + 2, hidden)], [None, None]]
    assert all(m.float().mean().item() == pytest.approx(0.7, abs=0.01) for pair in masks[1:3] for m in pair)
    drawn = [[m if m is None else m[:len(X)] for m in pair] for pair in masks]
    assert torch.equal(model(X, T, Y)[0], model(X, T, Y)[0])
    assert torch.equal(model(X, T, Y, dropout=drawn)[0], model(X, T, Y, dropout=drawn)[0])
    assert not torch.allclose(model(X, T, Y, dropout=drawn)[0], model(X, T, Y)[0])
    kept = [[m if m is None else torch.ones_like(m) for m in pair] for pair in drawn]
    for block in model.blocks[1:3]:
        block.attn.dropout.p = block.mlp.dropout.p = 0.0
    torch.testing.assert_close(model(X, T, Y, dropout=kept)[0], model(X, T, Y)[0])


def test_dropout_keeps_the_mean():
    x, mask = torch.ones(100, 1000), torch.rand(100, 1000) < 0.7
    dropped = Dropout(0.3)(x, mask)
    assert torch.equal(dropped != 0, mask) and dropped.mean().item() == pytest.approx(1, abs=0.01)


# --------------------------------------------------------------------------------------------------------- layers


def test_rotation_keeps_lengths_and_makes_products_depend_on_the_offset():
    rows, columns = torch.arange(4), torch.arange(5)
    angles = torch.cat(rotary_angles(16, rows, columns), dim=-1)
    q, k = torch.randn(2, 16, dtype=torch.float64)
    q_rot, k_rot = (rotate(v.expand(1, 1, 20, 16), angles.cos(), angles.sin())[0, 0] for v in (q, k))
    torch.testing.assert_close(q_rot.norm(dim=-1), q.norm().expand(20))
    products = (q_rot @ k_rot.T).view(4, 5, 4, 5)
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 1, 3, 3])
    torch.testing.assert_close(products[3, 2, 1, 4], products[2, 0, 0, 2])
    assert not torch.allclose(products[0, 0, 1, 2], products[0, 0, 2, 1])


def test_rms_norm():
    norm = RMSNorm(8)
    x = torch.randn(4, 8) * 100
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(4))
    assert norm.eps == 1e-6 and not norm(torch.zeros(8)).any()
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_swiglu():
    layer = SwiGLU(4, 6, bias=True)
    x = torch.randn(3, 4)
    a, b = layer.w12(x)[:, :6], layer.w12(x)[:, 6:]
    torch.testing.assert_close(layer(x), layer.w3(a * torch.sigmoid(a) * b))
    for ratio, hidden, text_hidden in ((4.0, 85, 128), (3.0, 64, 96)):  # for classes two thirds of the ratio
        classes, text = JiT(tiny_config(mlp_ratio=ratio)), JiTText(tiny_text(mlp_ratio=ratio))
        assert {block.mlp.w3.in_features for block in classes.blocks} == {hidden}
        assert {block.mlp.w3.in_features for block in [*text.blocks, *text.text_refine_blocks]} == {text_hidden}


@pytest.mark.parametrize("bias", [True, False])
def test_hidden_units_without_weight_change_nothing_but_rounding(bias):
    """In value and gradient, with a mask of dropout; on a GPU, and only there, where the width asks for it."""
    layer, x = SwiGLU(4, 6, bias=bias, dropout=0.5), torch.randn(2, 3, 4, requires_grad=True)
    mask = torch.rand(2, 3, 6) < 0.5
    found = []
    for y in (layer(x, mask), layer.widened(x, mask, 2)):
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)
    with mock.patch.object(SwiGLU, "widened", side_effect=AssertionError):
        layer(x, mask)


def test_sinusoids():
    table = sinusoids(torch.tensor([0.0, 1.0]), 6, 100.0)
    w = torch.tensor([1.0, 100 ** (-1 / 3), 100 ** (-2 / 3)])
    torch.testing.assert_close(table, torch.stack([torch.tensor([1.0, 1, 1, 0, 0, 0]), torch.cat([w.cos(), w.sin()])]))


def test_position_table():
    table = position_table(16, 3).view(3, 3, 16)
    assert torch.equal(table[0, :, :8], table[2, :, :8]), "the first half encodes the column"
    assert torch.equal(table[:, 0, 8:], table[:, 2, 8:]), "the second half encodes the row"
    assert len(table.view(9, 16).unique(dim=0)) == 9


def test_text_denoiser_cuts_and_joins_patches_as_unfold_and_fold_do():
    """As the published weights expect them: patches row by row, the channel slowest inside one."""
    images, linear = some_images(2, 24), torch.nn.functional.linear
    embedder, head = jit_t2i.PatchEmbedder(8, 5, 7), jit_t2i.Head(16, 8)
    wanted = embedder.proj2(embedder.proj1(torch.nn.functional.unfold(images, 8, stride=8).transpose(1, 2)))
    assert torch.equal(embedder(images), wanted)
    tokens = torch.randn(2, 9, 16)
    patches = linear(head.norm(tokens), head.linear.weight, head.linear.bias).transpose(1, 2)
    assert torch.equal(head(tokens), torch.nn.functional.fold(patches, (24, 24), 8, stride=8))
