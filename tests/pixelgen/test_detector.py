"""The detector with small random weights, against mmdet's names, merging and arithmetic, written here once more."""

import hashlib
import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pixelgen.errors import CheckpointError
from pixelgen.metrics import detector
from pixelgen.metrics.detector import CLASSES, find, from_mmdet, load_detector, prepare

SMALL = {
    "backbone_config": {
        "model_type": "swin", "embed_dim": 8, "depths": [1, 2, 1, 1], "num_heads": [1, 2, 2, 2], "window_size": 7,
        "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    "num_labels": 80, "num_queries": 6, "encoder_layers": 2, "decoder_layers": 3, "hidden_dim": 32, "feature_size": 32,
    "mask_feature_size": 32, "dim_feedforward": 48, "encoder_feedforward_dim": 40, "num_attention_heads": 2}


def make(settings):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation

    return Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**settings))


def mmdet_names(settings):
    """mmdet's (2.x) name of every weight -> where transformers 5 keeps it: a module and its parameter; several are
    fused into one along the first axis. Written from mmdet's modules, one after another."""
    names = {}

    def pair(theirs, *ours):
        for kind in ("weight", "bias"):
            names[f"{theirs}.{kind}"] = [f"{our}.{kind}" for our in ours]

    swin, depths = settings["backbone_config"], settings["backbone_config"]["depths"]
    assert swin["model_type"] == "swin"
    encoder, pixels, queries = "model.pixel_level_module.encoder", "model.pixel_level_module.decoder", \
        "model.transformer_module"
    pair("backbone.patch_embed.projection", f"{encoder}.swin.embeddings.patch_embeddings.projection")
    pair("backbone.patch_embed.norm", f"{encoder}.swin.embeddings.norm")
    for s, depth in enumerate(depths):
        pair(f"backbone.norm{s}", f"{encoder}.hidden_states_norms.stage{s + 1}")
        for b in range(depth):
            theirs, ours = f"backbone.stages.{s}.blocks.{b}", f"{encoder}.swin.encoder.layers.{s}.blocks.{b}"
            pair(f"{theirs}.norm1", f"{ours}.layernorm_before")
            pair(f"{theirs}.norm2", f"{ours}.layernorm_after")
            pair(f"{theirs}.attn.w_msa.qkv", *[f"{ours}.attention.{x}_proj" for x in "qkv"])
            pair(f"{theirs}.attn.w_msa.proj", f"{ours}.attention.o_proj")
            names[f"{theirs}.attn.w_msa.relative_position_bias_table"] = [
                f"{ours}.attention.relative_position_bias.relative_position_bias_table"]
            pair(f"{theirs}.ffn.layers.0.0", f"{ours}.mlp.fc1")
            pair(f"{theirs}.ffn.layers.1", f"{ours}.mlp.fc2")
        if s < len(depths) - 1:
            theirs, ours = f"backbone.stages.{s}.downsample", f"{encoder}.swin.encoder.layers.{s}.downsample"
            pair(f"{theirs}.norm", f"{ours}.norm")
            names[f"{theirs}.reduction.weight"] = [f"{ours}.reduction.weight"]
    head = "panoptic_head.pixel_decoder"
    for i in range(3):
        pair(f"{head}.input_convs.{i}.conv", f"{pixels}.input_projections.{i}.0")
        pair(f"{head}.input_convs.{i}.gn", f"{pixels}.input_projections.{i}.1")
    for theirs, ours in (("lateral_convs.0", "adapter_1"), ("output_convs.0", "layer_1")):
        names[f"{head}.{theirs}.conv.weight"] = [f"{pixels}.{ours}.0.weight"]
        pair(f"{head}.{theirs}.gn", f"{pixels}.{ours}.1")
    pair(f"{head}.mask_feature", f"{pixels}.mask_projection")
    names[f"{head}.level_encoding.weight"] = [f"{pixels}.level_embed"]
    for n in range(settings["encoder_layers"]):
        theirs, ours = f"{head}.encoder.layers.{n}", f"{pixels}.encoder.layers.{n}"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            pair(f"{theirs}.attentions.0.{part}", f"{ours}.self_attn.{part}")
        pair(f"{theirs}.norms.0", f"{ours}.self_attn_layer_norm")
        pair(f"{theirs}.ffns.0.layers.0.0", f"{ours}.fc1")
        pair(f"{theirs}.ffns.0.layers.1", f"{ours}.fc2")
        pair(f"{theirs}.norms.1", f"{ours}.final_layer_norm")
    for n in range(settings["decoder_layers"] - 1):
        theirs, ours = f"panoptic_head.transformer_decoder.layers.{n}", f"{queries}.decoder.layers.{n}"
        for kind in ("weight", "bias"):
            names[f"{theirs}.attentions.0.attn.in_proj_{kind}"] = [f"{ours}.cross_attn.in_proj_{kind}"]
            names[f"{theirs}.attentions.1.attn.in_proj_{kind}"] = [f"{ours}.self_attn.{x}_proj.{kind}" for x in "qkv"]
        pair(f"{theirs}.attentions.0.attn.out_proj", f"{ours}.cross_attn.out_proj")
        pair(f"{theirs}.attentions.1.attn.out_proj", f"{ours}.self_attn.out_proj")
        pair(f"{theirs}.norms.0", f"{ours}.cross_attn_layer_norm")
        pair(f"{theirs}.norms.1", f"{ours}.self_attn_layer_norm")
        pair(f"{theirs}.ffns.0.layers.0.0", f"{ours}.fc1")
        pair(f"{theirs}.ffns.0.layers.1", f"{ours}.fc2")
        pair(f"{theirs}.norms.2", f"{ours}.final_layer_norm")
    pair("panoptic_head.transformer_decoder.post_norm", f"{queries}.decoder.layernorm")
    for theirs, ours in (("query_embed", "queries_embedder"), ("query_feat", "queries_features"),
                         ("level_embed", "level_embed")):
        names[f"panoptic_head.{theirs}.weight"] = [f"{queries}.{ours}.weight"]
    pair("panoptic_head.cls_embed", "class_predictor")
    for layer in range(3):
        pair(f"panoptic_head.mask_embed.{2 * layer}", f"{queries}.decoder.mask_predictor.mask_embedder.{layer}.0")
    return names


def unfolded(value):
    """(…, 4·C) in transformers' order, (column, row, C), -> in that of torch's unfold, which mmdet uses."""
    places = torch.arange(value.shape[-1]).reshape(2, 2, -1)  # column, row, channel
    order = [int(places[column, row, c]) for c in range(places.shape[2]) for row in (0, 1) for column in (0, 1)]
    return value[..., order]


def as_mmdet(network, settings):
    """What mmdet would have saved of this network."""
    state = network.state_dict()
    saved = {theirs: torch.cat([state[our] for our in ours]) for theirs, ours in mmdet_names(settings).items()}
    saved = {k: unfolded(v) if ".downsample." in k else v for k, v in saved.items()}
    for name in [n for n in saved if n.endswith("relative_position_bias_table")]:
        saved[name.replace("bias_table", "index")] = torch.zeros(49, 49, dtype=torch.long)
    return saved


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = make(SMALL).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # a fresh one has zeros and ones, which would hide mistakes
            parameter.add_(0.2 * torch.randn_like(parameter))
    return network


@pytest.fixture(scope="module")
def saved(network):
    return as_mmdet(network, SMALL)


@pytest.fixture(scope="module")
def checkpoint(saved, tmp_path_factory):
    path = tmp_path_factory.mktemp("mmdet") / "w.pth"
    torch.save({"meta": {"mmdet_version": "2.25.0", "CLASSES": ("person",), "seed": 1, "env_info": "x",
                         "hook_msgs": {}}, "state_dict": saved}, path)
    return path


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(detector, "SWIN_S", SMALL)


def photo(height=40, width=60, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ------------------------------------------------------------------------------------------------ the weights


def test_mmdets_checkpoint_becomes_the_same_network(network, checkpoint, small):
    loaded = load_detector(checkpoint, "cpu").network
    assert not any(m.training for m in loaded.modules()) and not any(p.requires_grad for p in loaded.parameters())
    ours, unused = loaded.state_dict(), ("swin.layernorm.", "criterion.")
    for name, value in network.state_dict().items():
        assert torch.equal(ours[name], value) or any(u in name for u in unused), name
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for field in ("class_queries_logits", "masks_queries_logits"):
            assert torch.equal(loaded(images)[field], network(images)[field])


def test_every_weight_of_the_real_network_has_a_name_in_mmdet():
    with torch.device("meta"):
        real = make(detector.SWIN_S)
    state, names = real.state_dict(), mmdet_names(detector.SWIN_S)
    targets = [our for ours in names.values() for our in ours]
    assert len(targets) == len(set(targets))
    left = set(state) - set(targets)
    assert left == {"model.pixel_level_module.encoder.swin.layernorm.weight",
                    "model.pixel_level_module.encoder.swin.layernorm.bias", "criterion.empty_weight"}
    theirs = {k: torch.cat([state[our] for our in ours]) for k, ours in names.items()}
    assert sum(v.numel() for v in theirs.values()) == 68_741_083 - 2 * 768
    assert theirs["backbone.stages.2.blocks.17.attn.w_msa.qkv.weight"].shape == (1152, 384)
    assert theirs["panoptic_head.transformer_decoder.layers.8.attentions.1.attn.in_proj_weight"].shape == (768, 256)
    assert theirs["panoptic_head.cls_embed.weight"].shape == (81, 256)
    assert sum(v.numel() for v in from_mmdet(theirs).values()) == sum(v.numel() for v in theirs.values())


@pytest.mark.parametrize("size", [(6, 8), (5, 7)])
def test_patches_are_merged_as_by_mmdet(network, checkpoint, saved, small, size):
    """mmdet unfolds 2×2 windows, normalises and projects; an odd side is padded with zeros at its end."""
    (height, width), channels = size, 8
    x = torch.randn(1, channels, height, width)
    windows = F.unfold(F.pad(x, (0, width % 2, 0, height % 2)), kernel_size=2, stride=2).transpose(1, 2)
    prefix = "backbone.stages.0.downsample."
    normal = F.layer_norm(windows, (4 * channels,), saved[prefix + "norm.weight"], saved[prefix + "norm.bias"])
    expected = normal @ saved[prefix + "reduction.weight"].T
    loaded = load_detector(checkpoint, "cpu").network
    layer = loaded.get_submodule("model.pixel_level_module.encoder.swin.encoder.layers.0.downsample")
    got = layer(x.flatten(2).transpose(1, 2), size)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_windows_look_at_relative_positions_as_mmdets_do(network):
    """mmdet numbers the pair of pixels (h, w), (y, x) of a window 13·(h - y + 6) + (w - x + 6), and so it is here."""
    attention = network.get_submodule("model.pixel_level_module.encoder.swin.encoder.layers.0.blocks.0.attention")
    h, w = torch.arange(49) // 7, torch.arange(49) % 7
    index = 13 * (h[:, None] - h + 6) + (w[:, None] - w + 6)
    table = attention.relative_position_bias.relative_position_bias_table
    assert torch.equal(attention.relative_position_bias()[0], table[index].permute(2, 0, 1))


def test_what_does_not_fit_is_listed(tmp_path, saved, small):
    path = tmp_path / "w.pth"
    without = {k: v for k, v in saved.items() if k not in ("panoptic_head.cls_embed.bias", "backbone.norm2.bias")}
    downsample = "backbone.stages.0.downsample.norm.weight"
    for what, state in {
        r"missing \(2\): class_predictor.bias, .*stage3.bias$": without,
        r"extra \(2\): backbone.norm4.bias, foo$":
            saved | {"foo": torch.zeros(1), "backbone.norm4.bias": torch.ones(8)},
        r"misshaped \(1\): class_predictor.weight \(3, 32\) instead of \(81, 32\)$":
            saved | {"panoptic_head.cls_embed.weight": torch.zeros(3, 32)},
        r"misshaped \(1\): .*downsample.norm.weight \(30,\)": saved | {downsample: torch.zeros(30)},
        r"misshaped \(3\): .*k_proj.weight \(33, 32\)": saved | {
            "panoptic_head.transformer_decoder.layers.0.attentions.1.attn.in_proj_weight": torch.zeros(99, 32)},
        r"missing \(\d+\): .*extra \(1\): bar": {"bar": torch.zeros(())},
    }.items():
        torch.save({"state_dict": state, "meta": {}}, path)
        with pytest.raises(CheckpointError, match=r"w\.pth: not the weights of Mask2Former.*" + what):
            load_detector(path, "cpu")


class Shell:
    def __reduce__(self):
        return print, ("this pickle ran code",)


def test_no_code_of_a_file_runs(tmp_path, checkpoint, saved, small, capsys):
    path = tmp_path / "w.pth"
    for content in ({"state_dict": saved, "meta": Shell()}, Shell(), {"state_dict": {"a": Shell()}}):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"w\.pth: not a readable file of plain tensors"):
            load_detector(path, "cpu")
    for content in ([1, 2], {"state_dict": [1]}, {"a": 1}, 3):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"w\.pth: not a state dict"):
            load_detector(path, "cpu")
    for data in (b"", b"text", checkpoint.read_bytes()[:5000]):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"w\.pth: not a readable file"):
            load_detector(path, "cpu")
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "mask2former"}))
    torch.save(Shell(), folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a readable file"):
        load_detector(folder, "cpu")
    assert "ran code" not in capsys.readouterr().out


def test_a_directory_of_the_hubs_layout_loads_under_another_name(tmp_path, network):
    network.save_pretrained(tmp_path / "hub")
    loaded = load_detector(tmp_path / "hub", "cpu")
    digest = hashlib.sha256((tmp_path / "hub" / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.name == f"mask2former-{digest[:8]}"
    assert all(torch.equal(v, network.state_dict()[k]) for k, v in loaded.network.state_dict().items())
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    config["id2label"] = {str(i): str(i) for i in range(133)}
    config["label2id"] = {str(i): i for i in range(133)}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="133 classes instead of COCO's 80"):
        load_detector(tmp_path / "hub", "cpu")
    (tmp_path / "hub" / "config.json").write_text("no JSON")
    with pytest.raises(CheckpointError, match="hub: not a readable Mask2Former"):
        load_detector(tmp_path / "hub", "cpu")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"none\.pth: no such file or directory"):
        load_detector(tmp_path / "none.pth", "cpu")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_detector(tmp_path, "cpu")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_detector(tmp_path, "cpu")


def test_only_the_published_file_carries_the_benchmarks_name(tmp_path, checkpoint, network, small, monkeypatch):
    digest = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert load_detector(str(checkpoint), "cpu").name == f"mask2former-{digest[:8]}"
    monkeypatch.setattr(detector, "SHA256", digest[:8])
    assert load_detector(checkpoint, "cpu").name == "mask2former-swin-s-mmdet"
    network.save_pretrained(tmp_path)
    monkeypatch.setattr(detector, "SHA256", hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest())
    assert load_detector(tmp_path, "cpu").name != "mask2former-swin-s-mmdet"
    assert detector.FILE.endswith("-743b7d99.pth")


# -------------------------------------------------------------------------------------------------- the image


@pytest.mark.parametrize("size, resized, padded", [
    ((256, 256), (800, 800), (800, 800)), ((1024, 1024), (800, 800), (800, 800)),
    ((300, 400), (800, 1067), (800, 1088)), ((100, 400), (333, 1333), (352, 1344)),
    ((33, 20), (1320, 800), (1344, 800))])
def test_images_are_fitted_and_padded(size, resized, padded):
    image = np.full((*size, 3), 200, np.uint8)
    inputs, got = prepare(image)
    assert got == resized and tuple(inputs.shape) == (1, 3, *padded)
    mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
    h, w = resized
    np.testing.assert_allclose(inputs[0, :, h - 1, w - 1], (200 - mean) / std, atol=1e-5)
    for corner in (inputs[0, :, h:, :], inputs[0, :, :, w:]):  # padded with 128 and normalised like the rest
        expected = np.broadcast_to(((128 - mean) / std)[:, None, None], corner.shape)
        np.testing.assert_allclose(corner, expected, atol=1e-5)


def bilinear(image, height, width):
    """Between the four nearest pixels, whose centres lie at halves: what an image library does without antialiasing."""
    image, out = image.astype(np.float64), np.zeros((height, width, 3))

    def places(length, count):
        at = np.clip((np.arange(count) + 0.5) * length / count - 0.5, 0, length - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, length - 1), at - low

    y0, y1, fy = places(image.shape[0], height)
    x0, x1, fx = places(image.shape[1], width)
    fy, fx = fy[:, None, None], fx[None, :, None]
    top = image[y0][:, x0] * (1 - fx) + image[y0][:, x1] * fx
    bottom = image[y1][:, x0] * (1 - fx) + image[y1][:, x1] * fx
    out[:] = top * (1 - fy) + bottom * fy
    return np.round(out)


@pytest.mark.parametrize("size", [(40, 60), (1000, 1000)])
def test_images_are_resized_between_pixel_centres_without_antialiasing(size):
    image = photo(*size)
    inputs, (h, w) = prepare(image)
    pixels = inputs[0, :, :h, :w].permute(1, 2, 0).numpy() * detector.STD + detector.MEAN
    expected = bilinear(image, h, w)
    np.testing.assert_allclose(pixels, np.round(pixels), atol=1e-3)
    off = np.abs(pixels - expected)
    assert off.max() < 1.01 and (off > 0.01).mean() < 1e-3  # a half may be rounded either way


def test_an_image_of_another_kind_is_refused():
    for image in (photo().astype(np.float32), photo()[..., 0], photo()[..., :2]):
        with pytest.raises(ValueError, match="uint8"):
            prepare(image)


# ------------------------------------------------------------------------------------------- what is found there


def test_classes_are_cocos_with_the_benchmarks_names():
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert [CLASSES[i] for i in (0, 1, 56, 62, 63, 64, 65, 66, 67, 79)] == [
        "person", "bicycle", "chair", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
        "toothbrush"]


def chances(*rows):
    """Class logits whose softmax is 1e-4 but for the classes given for each query."""
    p = torch.full((len(rows), 81), 1e-4)
    for row, given in zip(p, rows, strict=True):
        for label, value in given.items():
            row[label] = value
        row[80] += 1 - row.sum()
    return p.log()


def test_scores_and_boxes_of_handmade_logits():
    masks = torch.full((3, 8, 10), -5.0)
    masks[0, 2:5, 3:9] = 2.0
    masks[1, 0, 0] = 3.0
    masks[1, 7, 9] = 1.0  # corners: the box is the whole image
    found = find(chances({0: 0.7, 2: 0.2}, {2: 0.6}, {2: 0.9}), masks, (8, 10), (8, 10), (8, 10))
    sigmoid = 1 / (1 + np.exp(-np.array([1.0, 2.0, 3.0])))
    person, car = found["person"], found["car"]
    assert person.boxes.dtype == np.float32 and person.masks.dtype == bool
    best = person.boxes.argmax(0)[4]
    np.testing.assert_allclose(person.boxes[best], [3, 2, 9, 5, 0.7 * sigmoid[1]], rtol=1e-5)
    assert np.array_equal(person.masks[best], masks[0].numpy() > 0)
    order = car.boxes[:, 4].argsort()[::-1]
    np.testing.assert_allclose(car.boxes[order[0]], [0, 0, 10, 8, 0.6 * (sigmoid[2] + sigmoid[0]) / 2], rtol=1e-5)
    np.testing.assert_allclose(car.boxes[order[1]], [3, 2, 9, 5, 0.2 * sigmoid[1]], rtol=1e-5)
    assert len(car.boxes) == 2  # the third query is surest, but its mask is empty
    assert all(f.masks.shape == (len(f.boxes), 8, 10) for f in found.values())


def test_no_more_than_a_hundred_pairs_are_kept():
    torch.manual_seed(0)
    logits, masks = torch.randn(5, 81), torch.ones(5, 4, 4)
    found = find(logits, masks, (4, 4), (4, 4), (4, 4))
    got = np.sort(np.concatenate([f.boxes[:, 4] for f in found.values()]))
    expected = np.sort(logits.softmax(-1)[:, :80].flatten().numpy())[-100:] / (1 + np.exp(-1)) / (1 + 1e-6 / 16)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_masks_are_enlarged_cut_and_brought_to_the_image():
    torch.manual_seed(1)
    logits = 3 * torch.randn(2, 4, 6)
    found = find(chances({5: 0.5}, {6: 0.5}), logits, (16, 24), (10, 22), (5, 11))
    for label, query in ((5, 0), (6, 1)):
        whole = F.interpolate(logits[None, query: query + 1], (16, 24), mode="bilinear", align_corners=False)
        small = F.interpolate(whole[:, :, :10, :22], (5, 11), mode="bilinear", align_corners=False)[0, 0]
        best = found[CLASSES[label]].boxes[:, 4].argmax()
        assert np.array_equal(found[CLASSES[label]].masks[best], (small > 0).numpy())
        inside = small[small > 0]
        assert found[CLASSES[label]].boxes[best, 4] == pytest.approx(0.5 * float(inside.sigmoid().mean()), rel=1e-5)


def test_an_image_goes_all_the_way(checkpoint, small):
    found = load_detector(checkpoint, "cpu")(photo(24, 24))
    assert found and set(found) <= set(CLASSES)
    for objects in found.values():
        assert objects.boxes.shape == (len(objects.masks), 5) and objects.masks.shape[1:] == (24, 24)
        for box, mask in zip(objects.boxes, objects.masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box[:4].tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] and 0 < box[4] <= 1
