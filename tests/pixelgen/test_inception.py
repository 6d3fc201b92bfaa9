"""The Inception extractor with random weights, against the network it wraps and a resize written here."""

import hashlib

import numpy as np
import pytest
import torch

from pixelgen.encoders import inception
from pixelgen.encoders.inception import load_inception
from pixelgen.errors import CheckpointError
from pixelgen.metrics import fid


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A weight file of the right layout: random, scaled so that signals neither vanish nor explode."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            """Keep the initial weights: the constructor would insist on a file."""

    folder, generator = tmp_path_factory.mktemp("inception"), torch.Generator().manual_seed(0)
    torch.save({}, folder / "empty.pth")
    state = Blank("blank", ["2048"], feature_extractor_weights_path=folder / "empty.pth").state_dict()
    for name, value in state.items():
        if value.ndim > 1:
            value.copy_(torch.randn(value.shape, generator=generator) * (2 / value[0].numel()) ** 0.5)
        elif name.endswith(("weight", "running_var")):
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
        elif value.is_floating_point():
            value.copy_(0.3 * torch.randn(value.shape, generator=generator))
    torch.save(state, folder / "weights.pth")
    return folder / "weights.pth"


@pytest.fixture(scope="module")
def extractor(weights):
    return load_inception(weights)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 40, 52), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def features(extractor, images):
    return extractor(images)


def test_shapes_and_types(features):
    assert {name: tuple(value.shape) for name, value in features.items()} == {
        "pool": (2, 2048), "spatial": (2, 2023), "logits": (2, 1008)}
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in features.values())
    assert all(value.isfinite().all() and value.std() > 1e-3 for value in features.values())


def test_network_is_frozen(extractor):
    modules, parameters = list(extractor.network.modules()), list(extractor.network.parameters())
    assert not any(m.training for m in modules) and not any(p.requires_grad for p in parameters)


def test_spatial_features_are_seven_channels_in_channels_last_order(extractor, images):
    block, seen = extractor.network.Mixed_6d, {}
    handle = block.register_forward_hook(lambda module, inputs, output: seen.update(x=inputs[0], y=output))
    spatial = extractor(images)["spatial"]
    handle.remove()
    branch = block.branch1x1  # convolution, normalisation and ReLU again, by hand
    expected = torch.conv2d(seen["x"], branch.conv.weight)
    scale = branch.bn.weight / (branch.bn.running_var + 1e-3).sqrt()
    shift = branch.bn.bias - branch.bn.running_mean * scale
    expected = (expected * scale[:, None, None] + shift[:, None, None]).clamp(min=0)
    assert expected.shape == (2, 192, 17, 17) and (spatial == 0).any() and (spatial > 0).any()
    for b, row, column, channel in [(0, 0, 0, 0), (0, 0, 1, 0), (1, 3, 0, 5), (0, 16, 2, 6), (1, 16, 16, 6)]:
        where = (row * 17 + column) * 7 + channel
        torch.testing.assert_close(spatial[b, where], expected[b, channel, row, column], rtol=1e-4, atol=1e-5)
    maps = spatial.view(2, 17, 17, 7).permute(0, 3, 1, 2)
    torch.testing.assert_close(maps, expected[:, :7], rtol=1e-4, atol=1e-5)
    assert torch.equal(maps, seen["y"][:, :7])  # where the block puts this branch


def test_logits_have_no_bias(extractor, features):
    head = extractor.network.fc
    torch.testing.assert_close(features["logits"], features["pool"] @ head.weight.T, rtol=1e-4, atol=1e-4)
    assert (features["logits"] - head(features["pool"])).abs().max() > 0.1  # what the bias would add


def tensorflow_resize(image, size):
    """Bilinear, output pixel i at input i·in/out, no half-pixel offset, no antialiasing: (3, H, W) float."""
    out = np.empty((3, size, size), np.float32)
    for i in range(size):
        for j in range(size):
            y, x = i * image.shape[1] / size, j * image.shape[2] / size
            y0, x0 = int(y), int(x)
            y1, x1 = min(y0 + 1, image.shape[1] - 1), min(x0 + 1, image.shape[2] - 1)
            top = image[:, y0, x0] + (image[:, y0, x1] - image[:, y0, x0]) * (x - x0)
            bottom = image[:, y1, x0] + (image[:, y1, x1] - image[:, y1, x0]) * (x - x0)
            out[:, i, j] = top + (bottom - top) * (y - y0)
    return out


def test_images_are_resized_as_tensorflow_1_does_and_scaled(extractor, images):
    seen = []
    layer = extractor.network.Conv2d_1a_3x3
    handle = layer.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    extractor(images[:1])
    handle.remove()
    expected = (tensorflow_resize(images[0].numpy().astype(np.float32), 299) - 128) / 128
    np.testing.assert_allclose(seen[0][0].numpy(), expected, rtol=0, atol=1e-4)


def test_each_image_stands_alone(extractor, images, features):
    for i in range(2):
        for name, value in extractor(images[i : i + 1]).items():
            torch.testing.assert_close(value[0], features[name][i], rtol=1e-4, atol=1e-4)


def test_convolutions_are_not_left_to_tf32(extractor, images):
    convolution, seen = torch.backends.cudnn.conv, []
    before, convolution.fp32_precision = convolution.fp32_precision, "tf32"
    layer = extractor.network.Conv2d_1a_3x3
    handle = layer.register_forward_pre_hook(lambda *_: seen.append(convolution.fp32_precision))
    extractor(images[:1])
    handle.remove()
    with pytest.raises(ValueError, match="uint8"):
        extractor(images.float())
    after, convolution.fp32_precision = convolution.fp32_precision, before
    assert seen == ["ieee"] and after == "tf32"


def test_extract_takes_images_as_the_field_stores_them(extractor, images, features):
    got = fid.extract(extractor, images.permute(0, 2, 3, 1).numpy(), batch_size=2)
    for name, value in vars(got).items():
        np.testing.assert_array_equal(value, features[name].numpy())


def test_only_the_published_weights_carry_the_published_name(weights, extractor, monkeypatch):
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert extractor.name == f"inception-{digest[:8]}"
    monkeypatch.setattr(inception, "SHA256", digest)
    assert load_inception(str(weights)).name == "inception-v3-compat"
    assert inception.FILE.split("-")[-1] == "6726825d.pth"


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError, match=r"weights-inception-2015-12-05"):
            load_inception(path)


class Shell:
    def __reduce__(self):
        return print, ("this pickle ran code",)


def test_a_file_with_anything_else_is_refused(tmp_path, weights, capsys):
    state = torch.load(weights, weights_only=True)
    short = {name: value for name, value in state.items() if name != "fc.bias"}
    contents = {
        "not the weights.*fc.bias": short,
        "not the weights.*extra.weight": state | {"extra.weight": torch.zeros(1)},
        "not the weights.*size mismatch": state | {"fc.bias": torch.zeros(1000)},
        "not the weights.*Conv2d_1a_3x3": {"state_dict": state},
        "not the weights.*list": [1, 2],
        "plain tensors": {"fc.bias": Shell()},
    }
    path = tmp_path / "w.pth"
    for what, content in contents.items():
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=rf"(?s)w\.pth: .*{what}"):
            load_inception(path)
    for content in (b"", b"text", weights.read_bytes()[:100_000]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"w\.pth: not a readable file"):
            load_inception(path)
    assert "ran code" not in capsys.readouterr().out
