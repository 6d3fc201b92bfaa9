"""The colour classifier with a small random CLIP and a tokenizer of letters, against the formula written out."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image

from pixelgen.errors import CheckpointError
from pixelgen.metrics import colors
from pixelgen.metrics.colors import load_colors
from pixelgen.metrics.geneval import COLORS, TEMPLATES, crop


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A CLIP of a few thousand weights in save_pretrained's layout, and a vocabulary of letters."""
    from transformers import CLIPConfig, CLIPModel

    folder, letters = tmp_path_factory.mktemp("clip"), "abcdefghijklmnopqrstuvwxyz-"
    words = [*letters, *(f"{c}</w>" for c in letters), "ab", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 77}))
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    network = CLIPModel(CLIPConfig(
        text_config={**shape, "vocab_size": len(words), "max_position_embeddings": 77, "eos_token_id": len(words) - 1,
                     "bos_token_id": len(words) - 2, "pad_token_id": len(words) - 1},
        vision_config={**shape, "image_size": 32, "patch_size": 8}, projection_dim=12))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(directory):
    return load_colors(directory, "cpu")


def scene(n=5, seed=0):
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    boxes, masks = np.zeros((n, 5), np.float32), np.zeros((n, 50, 70), bool)
    for i in range(n):
        x, y, w, h = generator.integers((0, 0, 3, 3), 30)
        boxes[i] = x, y, min(x + w, 70), min(y + h, 50), 0.9
        masks[i, y: y + h, x: x + w] = generator.random((50, 70))[y: y + h, x: x + w] < 0.7
    return image, boxes, masks


def test_an_objects_colour_is_the_nearest_description(classifier):
    image, boxes, masks = scene(20)
    network, expected = classifier.network, []
    descriptions = []
    for color in COLORS:
        each = []
        for template in TEMPLATES:
            tokens = classifier.tokenizer(template.format(color=color, name="hot dog"), return_tensors="pt")
            assert tokens["input_ids"].shape[1] > 10
            x = network.text_projection(network.text_model(**tokens).pooler_output)[0]
            each.append(x / x.norm())
        mean = torch.stack(each).mean(0)
        descriptions.append(mean / mean.norm())
    torch.testing.assert_close(classifier.describe("hot dog"), torch.stack(descriptions), rtol=1e-4, atol=1e-5)
    for box, mask in zip(boxes, masks, strict=True):
        pixels = classifier.prepare(Image.fromarray(crop(image, box, mask)))[None]
        x = network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)[0]
        expected.append(COLORS[int(torch.stack([d @ x / x.norm() for d in descriptions]).argmax())])
    assert classifier(image, "hot dog", boxes, masks) == expected
    assert classifier(image, "hot dog", boxes[:0], masks[:0]) == []


def test_what_is_seen_is_the_masked_crop(classifier):
    image, seen = scene(1)[0], []
    boxes, masks = np.array([[8, 4, 48, 44, 0.9]], np.float32), np.zeros((1, 50, 70), bool)
    masks[0, 4:44, 8:28] = masks[0, 4, 8:48] = True
    handle = classifier.network.vision_model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    classifier(image, "cat", boxes, masks)
    changed = image.copy()
    changed[~masks[0]] = 7  # nothing outside the mask matters
    classifier(changed, "cat", boxes, masks)
    handle.remove()
    assert torch.equal(seen[0], seen[1])
    grey = (np.array([153, 153, 153]) / 255 - colors.MEAN) / colors.STD
    np.testing.assert_allclose(seen[0][0, :, 8:, 20:].flatten(1).T, np.tile(grey, (24 * 12, 1)), atol=1e-5)


@pytest.mark.parametrize("size", [(300, 400), (21, 13), (32, 32), (5, 90), (97, 33)])
def test_a_crop_is_resized_by_its_short_side_cut_in_the_middle_and_normalised(classifier, size):
    height, width = size
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))
    w, h = (int(32 * width / height), 32) if height < width else (32, int(32 * height / width))
    resized = image.resize((w, height), Image.Resampling.BICUBIC).resize((w, h), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
    pixels = np.asarray(resized.crop((left, top, left + 32, top + 32)), np.float64) / 255
    expected = (pixels - (0.48145466, 0.4578275, 0.40821073)) / (0.26862954, 0.26130258, 0.27577711)
    got = classifier.prepare(image).permute(1, 2, 0).numpy()
    assert got.shape == (32, 32, 3)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_descriptions_are_made_once_for_a_class(directory):
    classifier, image = load_colors(directory, "cpu"), scene()
    calls = []
    classifier.network.text_model.register_forward_hook(lambda *_: calls.append(1))
    for name in ("cat", "dog", "cat", "cat"):
        classifier(image[0], name, *image[1:])
    assert len(calls) == 2
    assert not torch.equal(classifier.describe("cat"), classifier.describe("dog"))


def test_only_the_published_weights_and_architecture_carry_the_published_name(directory, monkeypatch):
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()
    heads = ("quick_gelu", 2, "quick_gelu", 2)
    for hashes, architecture, name in (((digest,), colors.PUBLISHED, f"clip-{digest[:8]}"),
                                       (colors.SHA256, heads, f"clip-{digest[:8]}"),
                                       ((digest,), heads, "clip-vit-large-patch14")):
        monkeypatch.setattr(colors, "SHA256", hashes)
        monkeypatch.setattr(colors, "PUBLISHED", architecture)
        assert load_colors(str(directory), "cpu").name == name


def test_weights_that_do_not_fit_are_listed_and_no_code_runs(directory, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    for name in ("config.json", "vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    state = load_file(directory / "model.safetensors")
    save_file(state | {"text_model.embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "model.safetensors")
    load_colors(tmp_path, "cpu")  # a buffer of older versions, in the published file too
    lacking = {k: v for k, v in state.items() if k != "logit_scale"} | {"foo": torch.zeros(1)}
    save_file(lacking, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"weights of CLIPModel; missing \(1\): logit_scale; extra \(1\): foo"):
        load_colors(tmp_path, "cpu")
    (tmp_path / "model.safetensors").write_bytes((directory / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable file"):
        load_colors(tmp_path, "cpu")
    (tmp_path / "model.safetensors").unlink()
    torch.save(Shell(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a readable file of plain tensors"):
        load_colors(tmp_path, "cpu")
    assert "ran code" not in capsys.readouterr().out


class Shell:
    def __reduce__(self):
        return print, ("this pickle ran code",)


def test_missing_files_are_named(directory, tmp_path):
    with pytest.raises(CheckpointError, match="none"):
        load_colors(tmp_path / "none", "cpu")
    with pytest.raises(CheckpointError, match="expected a directory"):
        load_colors(directory / "config.json", "cpu")
    for name in ("config.json", "model.safetensors", "vocab.json"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        load_colors(tmp_path, "cpu")
    (tmp_path / "merges.txt").write_bytes((directory / "merges.txt").read_bytes())
    (tmp_path / "config.json").write_text("no JSON")
    with pytest.raises(CheckpointError, match="not a readable CLIP"):
        load_colors(tmp_path, "cpu")
