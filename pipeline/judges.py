"""What scores samples: the real networks, and the demo's stand-ins for them under names of their own.

The digits classifier is trained on a split of its own, which neither the generator nor the networks inside the loss
ever see, and it shares no weights with them. The geometric detector of scenes is not trained at all.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.datasets import scenes
from pixelgen.metrics.geneval import ColorClassifier, Detector, Found
from pixelgen.tensors import read_safetensors


class DigitsClassifier(nn.Module):
    """A small convolutional network on (B, 3, 32, 32) in [0, 1], seen in grey -> logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.AvgPool2d(2),
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU())
        self.pool = nn.Sequential(nn.Linear(64 * 4 * 4, 64), nn.ReLU())
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, 10), pooled features (B, 64), spatial features (B, 7·4·4)."""
        maps = self.body(images.mean(1, keepdim=True))
        pool = self.pool(maps.flatten(1))
        return self.head(pool), pool, maps[:, :7].permute(0, 2, 3, 1).flatten(1)


class DigitsJudge:
    """The classifier as an extractor (`pixelgen.metrics.fid`); its metrics are named `digits`, never Inception's."""

    name = "digits"

    def __init__(self, classifier: DigitsClassifier, device: torch.device):
        self.classifier, self.device = classifier.to(device).eval().requires_grad_(False), device

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        logits, pool, spatial = self.classifier(images.to(self.device).float() / 255)
        return {"pool": pool, "spatial": spatial, "logits": logits}


def train_digits_classifier(images: Tensor, labels: Tensor, seed: int, steps: int = 300) -> DigitsClassifier:
    """Fit the classifier to uint8 images (N, 3, 32, 32) with small random shifts, scalings and rotations."""
    torch.manual_seed(seed)
    model = DigitsClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    x = images.float() / 255
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,))
        logits, _, _ = model(jitter(x[chosen]))
        loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def jitter(images: Tensor) -> Tensor:
    """Move, turn and scale each image a little: up to 6 % of the side, 10 degrees, 10 %."""
    n = len(images)
    angle = (torch.rand(n) * 2 - 1) * 0.17
    scale = 1 + (torch.rand(n) * 2 - 1) * 0.1
    shift = (torch.rand(n, 2) * 2 - 1) * 0.12
    cos, sin = angle.cos() * scale, angle.sin() * scale
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], -1), torch.stack([sin, cos, shift[:, 1]], -1)], 1)
    field = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, field, padding_mode="border", align_corners=False)


def save_digits_classifier(model: DigitsClassifier, directory: Path) -> None:
    save_file(model.state_dict(), directory / "model.safetensors")


def load_extractor(name: str, weights: Path, device: torch.device) -> Any:
    """The extractor `digits` or `inception` from the output directory of the weights stage."""
    if name == "inception":
        from pixelgen.encoders.inception import load_inception

        return load_inception(weights / "inception" / "model.pth", device)
    model = DigitsClassifier()
    model.load_state_dict(read_safetensors(weights / "digits" / "model.safetensors"))
    return DigitsJudge(model, device)


# ------------------------------------------------------------------------------------------------ coloured shapes

SIDE = 64  # images are brought to this size
TEMPLATE = 24  # pixels of a side of the masks that are compared
LEAST_AREA, LEAST_SIDE = 0.012, 0.12  # of the image; smaller patches of a colour are no things
LIKENESS = 0.85  # intersection over union with the best shape that counts as certain


class GeometricDetector:
    """Finds the shapes of `datasets.scenes` by their colour and outline; a detector for `pixelgen.metrics.geneval`.

    Every pixel takes the nearest of the known colours or the background's, connected pixels of a colour are a thing,
    and its shape is the one that its mask overlaps best. The score is that overlap over `LIKENESS`, at most 1.
    """

    name = "geometric"

    def __init__(self) -> None:
        self.templates = {shape: scenes.silhouette(shape, TEMPLATE) for shape in scenes.SHAPES}

    def __call__(self, image: np.ndarray) -> dict[str, Found]:
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        border = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
        known = np.array([*scenes.COLORS.values(), np.median(border, axis=0)])
        nearest = np.linalg.norm(image[:, :, None] - known, axis=-1).argmin(-1)
        boxes: dict[str, list[list[float]]] = {shape: [] for shape in scenes.SHAPES}
        masks: dict[str, list[np.ndarray]] = {shape: [] for shape in scenes.SHAPES}
        for color in range(len(scenes.COLORS)):
            parts, _ = ndimage.label(nearest == color)
            for number, (rows, columns) in enumerate(ndimage.find_objects(parts), 1):
                mask = parts == number
                cut = mask[rows, columns]
                if cut.sum() < LEAST_AREA * SIDE**2 or min(cut.shape) < LEAST_SIDE * SIDE:
                    continue
                shape, likeness = self._shape(cut)
                boxes[shape].append([columns.start, rows.start, columns.stop, rows.stop,
                                     min(1.0, likeness / LIKENESS)])
                masks[shape].append(mask)
        return {shape: Found(np.array(boxes[shape], np.float32), np.array(masks[shape])) for shape in scenes.SHAPES
                if boxes[shape]}

    def _shape(self, mask: np.ndarray) -> tuple[str, float]:
        """The shape whose silhouette overlaps a cut-out mask best, and by how much."""
        square = Image.fromarray(mask.astype(np.uint8) * 255).resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)
        seen = np.asarray(square) > 127
        likeness = {shape: float((seen & t).sum() / (seen | t).sum()) for shape, t in self.templates.items()}
        return max(likeness.items(), key=lambda pair: pair[1])


class SceneColors:
    """The colour of a thing is the known one that is nearest to the median of its pixels."""

    name = "scene-colors"

    def __call__(self, image: np.ndarray, name: str, boxes: np.ndarray, masks: np.ndarray) -> list[str]:
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        known = np.array([*scenes.COLORS.values()])
        medians = [np.median(image[mask], axis=0) for mask in masks]
        return [list(scenes.COLORS)[int(np.linalg.norm(known - m, axis=-1).argmin())] for m in medians]


def load_judges(name: str, weights: Path, device: torch.device) -> tuple[Detector, ColorClassifier]:
    """GenEval's detector and colour classifier from the output directory of the weights stage, or the demo's own."""
    if name == "geometric":
        return GeometricDetector(), SceneColors()
    from pixelgen.metrics import colors, detector

    return (detector.load_detector(weights / "mask2former" / detector.FILE, device),
            colors.load_colors(weights / "clip", device))
