"""The classifier that scores the demo's digits, in place of Inception.

It is trained on a split of its own, which neither the generator nor the networks in its loss ever see.
"""

from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.demo.digits import digits
from pixelgen.tensors import read_safetensors

FILE = "model.safetensors"
SIZE = 32  # pixels on a side of the digits


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


def load_digits_judge(folder: Path, device: torch.device) -> DigitsJudge:
    model = DigitsClassifier()
    model.load_state_dict(read_safetensors(folder / FILE))
    return DigitsJudge(model, device)


def split(name: Literal["train", "judge", "heldout"]) -> tuple[Tensor, Tensor]:
    """Digits (N, 3, 32, 32) uint8 and labels: the loss networks see `train`, the judge `judge`."""
    images, labels = (torch.from_numpy(a) for a in digits(name, SIZE))
    return images.permute(0, 3, 1, 2), labels


def write_judge(out: Path, seed: int) -> dict:
    """The classifier that scores digits."""
    judge = train_digits_classifier(*split("judge"), seed)
    save_file(judge.state_dict(), out / FILE)
    images, labels = split("heldout")
    logits = DigitsJudge(judge, torch.device("cpu"))(images)["logits"]
    return {"judge_accuracy_heldout": share(logits, labels)}


def share(logits: Tensor, labels: Tensor) -> float:
    return round((logits.argmax(1) == labels).float().mean().item(), 4)
