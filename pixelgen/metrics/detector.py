"""GenEval's object detector, Mask2Former with a Swin-S backbone (arXiv 2112.01527), as mmdet runs it, without mmdet.

Shapes: Q queries, C classes; image (H, W, 3) uint8 RGB; the network's input (1, 3, H', W') is the image resized to
(h, w) and padded; class logits (Q, C + 1), the last for "nothing"; mask logits (Q, H'/4, W'/4).
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pixelgen.errors import CheckpointError
from pixelgen.metrics.geneval import ClassDetections
from pixelgen.metrics.pretrained import build, read_weights, weights_file
from pixelgen.precision import ieee_fp32
from pixelgen.tensors import reading

Array = np.ndarray
Size = tuple[int, int]  # height, width

NAME = "mask2former-swin-s-mmdet"
FILE = "mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99.pth"
SHA256 = "743b7d99"  # its first digits: mmdet puts them into the file's name
CLASSES = (  # COCO's, in order, three of them under the benchmark's names
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush")
LONG, SHORT = 1333, 800  # an image is scaled until it just fits into these
MULTIPLE, PADDING = 32, 128  # of the padded sides; the grey of the padding
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
TOP = 100  # detections of an image, over queries × classes
SWIN_S: dict[str, Any] = {  # what the checkpoint's own configuration says; the rest are the defaults
    "backbone_config": {
        "model_type": "swin", "embed_dim": 96, "depths": [2, 2, 18, 2], "num_heads": [3, 6, 12, 24], "window_size": 7,
        "out_features": ["stage1", "stage2", "stage3", "stage4"]},
    "num_labels": len(CLASSES), "num_queries": 100, "encoder_layers": 6, "decoder_layers": 10}
UNUSED = r"relative_position_index$|^criterion\.|encoder(\.swin)?\.layernorm\."  # no output depends on them


class Mask2Former:
    """Call with an image: what it shows, by class. Its `name` says whose figures these are."""

    def __init__(self, network: nn.Module, name: str, device: torch.device) -> None:
        self.network, self.name, self.device = network, name, device

    @torch.inference_mode()
    def __call__(self, image: Array) -> dict[str, ClassDetections]:
        inputs, resized = prepare(image)
        with ieee_fp32():
            seen = self.network(pixel_values=inputs.to(self.device))
        height, width = inputs.shape[-2:]
        return find(seen.class_queries_logits[0], seen.masks_queries_logits[0], (height, width), resized,
                    (image.shape[0], image.shape[1]))


def load_detector(path: str | Path, device: str | torch.device) -> Mask2Former:
    """The detector with the weights in `path`: mmdet's published file, or a directory of transformers' such as the
    Hub's `facebook/mask2former-swin-small-coco-instance`. Nothing is downloaded.

    It is named `mask2former-swin-s-mmdet` only with the published file. Other weights, such as the Hub's, load under a
    name with their checksum, so that no figure of theirs passes for the benchmark's.
    Raises CheckpointError when the file is not there or holds anything but weights of this network.
    """
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation  # slow

    path, device = Path(path), torch.device(device)
    file = weights_file(path)
    state, digest = read_weights(file)
    if path.is_dir():
        with reading(path, "Mask2Former"):
            config = Mask2FormerConfig.from_pretrained(path)
        if config.num_labels != len(CLASSES):
            raise CheckpointError(f"{path}: a detector of {config.num_labels} classes instead of COCO's "
                                  f"{len(CLASSES)}")
    else:
        config, state = Mask2FormerConfig(**SWIN_S), from_mmdet(state)
    network = build(Mask2FormerForUniversalSegmentation, config, state, file, UNUSED)
    published = path.is_file() and digest.startswith(SHA256)
    return Mask2Former(network.to(device), NAME if published else f"mask2former-{digest[:8]}", device)


# ------------------------------------------------------------------------------------------- before and after


def prepare(image: Array) -> tuple[Tensor, Size]:
    """The network's input (1, 3, H', W') and the size (h, w) of the image in it, the padding being below and right."""
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"an image must be (H, W, 3) uint8, not {image.shape} {image.dtype}")
    height, width = image.shape[:2]
    scale = min(LONG / max(height, width), SHORT / min(height, width))
    h, w = int(height * scale + 0.5), int(width * scale + 0.5)
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    pixels = F.interpolate(pixels, (h, w), mode="bilinear").round()  # to whole numbers, as an image library does
    pixels = F.pad(pixels, (0, -w % MULTIPLE, 0, -h % MULTIPLE), value=PADDING)  # grey like any other grey
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), (h, w)


def find(class_logits: Tensor, mask_logits: Tensor, padded: Size, resized: Size, size: Size
         ) -> dict[str, ClassDetections]:
    """The TOP pairs of query and class in an image of `size`. A score is the class's probability times the mean
    certainty inside the mask; a box is the mask's tightest, its end one past the last pixel."""
    logits = F.interpolate(mask_logits[None], padded, mode="bilinear")[..., :resized[0], :resized[1]]
    logits = F.interpolate(logits, size, mode="bilinear")[0]
    masks = logits > 0
    certainty = (logits.sigmoid() * masks).sum((1, 2)) / (masks.sum((1, 2)) + 1e-6)
    (top, bottom), (left, right) = _extent(masks.any(2)), _extent(masks.any(1))
    boxes = torch.stack([left, top, right, bottom], dim=1).float()

    chances = class_logits.softmax(-1)[:, :-1]
    best, order = chances.flatten().topk(min(TOP, chances.numel()))
    queries, labels = order // chances.shape[1], order % chances.shape[1]
    scored = torch.cat([boxes[queries], (best * certainty[queries])[:, None]], dim=1).cpu().numpy()
    seen = masks.any(2).any(1)[queries]  # an empty mask has no box, and score 0
    found = {}
    for label in labels[seen].unique().tolist():
        chosen = (labels == label) & seen
        found[CLASSES[label]] = ClassDetections(scored[chosen.cpu().numpy()], masks[queries[chosen]].cpu().numpy())
    return found


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, L) bool -> the first occupied place and one past the last, for each row."""
    first, after = occupied.int().argmax(1), occupied.shape[1] - occupied.int().flip(1).argmax(1)
    return first, after


# ------------------------------------------------------------------------------------------- mmdet's checkpoint

BACKBONE, PIXELS, QUERIES = "model.pixel_level_module.encoder.", "model.pixel_level_module.decoder.", \
    "model.transformer_module."
RENAMES = (  # applied in turn; {a,b} stands for as many tensors, cut along the first axis
    (r"^backbone\.patch_embed\.projection\.", BACKBONE + "embeddings.patch_embeddings.projection."),
    (r"^backbone\.patch_embed\.norm\.", BACKBONE + "embeddings.norm."),
    (r"^backbone\.norm0\.", BACKBONE + "hidden_states_norms.stage1."),
    (r"^backbone\.norm1\.", BACKBONE + "hidden_states_norms.stage2."),
    (r"^backbone\.norm2\.", BACKBONE + "hidden_states_norms.stage3."),
    (r"^backbone\.norm3\.", BACKBONE + "hidden_states_norms.stage4."),
    (r"^backbone\.stages\.", BACKBONE + "encoder.layers."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.w_msa\.qkv\.", ".attention.self.{query,key,value}."),
    (r"\.attn\.w_msa\.proj\.", ".attention.output.dense."),
    (r"\.attn\.w_msa\.relative_position_bias_table$", ".attention.self.relative_position_bias_table"),
    (r"\.ffn\.layers\.0\.0\.", ".intermediate.dense."),
    (r"\.ffn\.layers\.1\.", ".output.dense."),
    (r"^panoptic_head\.pixel_decoder\.level_encoding\.weight$", PIXELS + "level_embed"),
    (r"^panoptic_head\.pixel_decoder\.mask_feature\.", PIXELS + "mask_projection."),
    (r"^panoptic_head\.pixel_decoder\.input_convs\.(\d)\.conv\.", PIXELS + r"input_projections.\1.0."),
    (r"^panoptic_head\.pixel_decoder\.input_convs\.(\d)\.gn\.", PIXELS + r"input_projections.\1.1."),
    (r"^panoptic_head\.pixel_decoder\.lateral_convs\.0\.conv\.", PIXELS + "adapter_1.0."),
    (r"^panoptic_head\.pixel_decoder\.lateral_convs\.0\.gn\.", PIXELS + "adapter_1.1."),
    (r"^panoptic_head\.pixel_decoder\.output_convs\.0\.conv\.", PIXELS + "layer_1.0."),
    (r"^panoptic_head\.pixel_decoder\.output_convs\.0\.gn\.", PIXELS + "layer_1.1."),
    (r"^panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.0\.",
     PIXELS + r"encoder.layers.\1.self_attn_layer_norm."),
    (r"^panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.norms\.1\.",
     PIXELS + r"encoder.layers.\1.final_layer_norm."),
    (r"^panoptic_head\.pixel_decoder\.encoder\.layers\.(\d+)\.attentions\.0\.",
     PIXELS + r"encoder.layers.\1.self_attn."),
    (r"^panoptic_head\.pixel_decoder\.encoder\.", PIXELS + "encoder."),
    (r"^panoptic_head\.transformer_decoder\.post_norm\.", QUERIES + "decoder.layernorm."),
    (r"^panoptic_head\.transformer_decoder\.layers\.", QUERIES + "decoder.layers."),
    (r"\.attentions\.0\.attn\.", ".cross_attn."),  # of the transformer decoder, which attends to the image first
    (r"\.attentions\.1\.attn\.in_proj_", ".self_attn.{q,k,v}_proj."),
    (r"\.attentions\.1\.attn\.", ".self_attn."),
    (r"\.norms\.0\.", ".cross_attn_layer_norm."),
    (r"\.norms\.1\.", ".self_attn_layer_norm."),
    (r"\.norms\.2\.", ".final_layer_norm."),
    (r"\.ffns\.0\.layers\.0\.0\.", ".fc1."),
    (r"\.ffns\.0\.layers\.1\.", ".fc2."),
    (r"^panoptic_head\.query_embed\.", QUERIES + "queries_embedder."),
    (r"^panoptic_head\.query_feat\.", QUERIES + "queries_features."),
    (r"^panoptic_head\.level_embed\.", QUERIES + "level_embed."),
    (r"^panoptic_head\.cls_embed\.", "class_predictor."),
    (r"^panoptic_head\.mask_embed\.0\.", QUERIES + "decoder.mask_predictor.mask_embedder.0.0."),
    (r"^panoptic_head\.mask_embed\.2\.", QUERIES + "decoder.mask_predictor.mask_embedder.1.0."),
    (r"^panoptic_head\.mask_embed\.4\.", QUERIES + "decoder.mask_predictor.mask_embedder.2.0."),
)


def from_mmdet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """mmdet's weights under the Hub's names. What has no counterpart keeps its name, for the strict loader to list."""
    converted = {}
    for name, value in state.items():
        if re.search(r"^backbone\..*\.downsample\.", name) and value.ndim and value.shape[-1] % 4 == 0:
            # Merged pixels lie channel by channel, (C, row, column), in mmdet; the Hub's order is (column, row, C).
            value = value.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if (several := re.search(r"\{(.*)\}", name)) and value.ndim:
            parts = several[1].split(",")
            for part, piece in zip(parts, value.tensor_split(len(parts)), strict=True):
                converted[name.replace(several[0], part)] = piece
        else:
            converted[name] = value
    return converted
