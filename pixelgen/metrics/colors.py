"""GenEval's colour classifier: CLIP ViT-L/14 (arXiv 2103.00020) without training, by the nearest of ten descriptions.

Shapes: image (H, W, 3) uint8 RGB; n objects with boxes (n, 5) and masks (n, H, W) bool; embeddings (·, D), unit length.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pixelgen.errors import CheckpointError
from pixelgen.images import plain_crop
from pixelgen.metrics.geneval import COLORS, TEMPLATES, crop
from pixelgen.metrics.pretrained import build, read_weights, weights_file
from pixelgen.precision import ieee_fp32
from pixelgen.tensors import reading

Array = np.ndarray

NAME = "clip-vit-large-patch14"
SHA256 = (  # of the Hub's openai/clip-vit-large-patch14: model.safetensors and pytorch_model.bin
    "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
    "f1a17cdbe0f36fec524f5cafb1c261ea3bbbc13e346e0f74fc9eb0460dedd0d3")
PUBLISHED = ("quick_gelu", 16, "quick_gelu", 12)  # what shapes do not tell: activation and heads, image and text
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH = 16


class ClipColors:
    """Call with an image, a class and objects of it: the colour of each. Its `name` says whose figures these are."""

    def __init__(self, network: Any, tokenizer: Any, name: str, device: torch.device) -> None:
        self.network, self.tokenizer, self.name, self.device = network, tokenizer, name, device
        self._described: dict[str, Tensor] = {}

    def prepare(self, image: Image.Image) -> Tensor:
        """What the network sees of an RGB image: (3, S, S) of its middle, the short side resized to S, normalised."""
        size = self.network.config.vision_config.image_size
        pixels = torch.tensor(plain_crop(image, size, Image.Resampling.BICUBIC)) / 255
        return ((pixels - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)

    @torch.inference_mode()
    @ieee_fp32()
    def __call__(self, image: Array, class_name: str, boxes: Array, masks: Array) -> list[str]:
        crops = [self.prepare(Image.fromarray(crop(image, *each))) for each in zip(boxes, masks, strict=True)]
        names = []
        for start in range(0, len(crops), BATCH):
            pooled = self.network.vision_model(torch.stack(crops[start: start + BATCH]).to(self.device)).pooler_output
            likeness = F.normalize(self.network.visual_projection(pooled), dim=-1) @ self.describe(class_name).T
            names += [COLORS[best] for best in likeness.argmax(1).tolist()]
        return names

    def describe(self, class_name: str) -> Tensor:
        """(10, D): of each colour the mean of its templates' embeddings."""
        if class_name not in self._described:
            texts = [t.format(color=color, name=class_name) for color in COLORS for t in TEMPLATES]
            tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
            pooled = self.network.text_model(**tokens).pooler_output
            embedded = F.normalize(self.network.text_projection(pooled), dim=-1)
            means = embedded.unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
            self._described[class_name] = F.normalize(means, dim=-1)
        return self._described[class_name]


def load_colors(path: str | Path, device: str | torch.device) -> ClipColors:
    """The classifier in a directory of transformers' such as the Hub's `openai/clip-vit-large-patch14`, with its
    tokenizer. Nothing is downloaded.

    It is named `clip-vit-large-patch14` only with the published weights and architecture, else by their checksum.
    Raises CheckpointError when the directory is not there or holds anything but a CLIP.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer  # slow

    path, device = Path(path), torch.device(device)
    if path.is_file():
        raise CheckpointError(f"{path}: a file; expected a directory with a CLIP and its tokenizer")
    file = weights_file(path)
    if not (path / "tokenizer.json").is_file() and not all((path / n).is_file() for n in ("vocab.json", "merges.txt")):
        raise CheckpointError(f"{path}: no tokenizer.json there, nor vocab.json and merges.txt")
    state, digest = read_weights(file)
    with reading(path, "CLIP"):
        config, tokenizer = CLIPConfig.from_pretrained(path), CLIPTokenizer.from_pretrained(path)
    network = build(CLIPModel, config, state, file, unused=r"position_ids$")
    eyes, words = network.config.vision_config, network.config.text_config
    told = (eyes.hidden_act, eyes.num_attention_heads, words.hidden_act, words.num_attention_heads)
    name = NAME if digest in SHA256 and told == PUBLISHED else f"clip-{digest[:8]}"
    return ClipColors(network.to(device), tokenizer, name, device)
