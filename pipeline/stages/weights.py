"""weights: the frozen networks, put into files once; no later stage touches a network.

published: DINOv2-B/14, the VGG-16 trunk of LPIPS and FID's Inception, downloaded (or copied from a folder) and
checked against their hashes. demo: small stand-ins of the same classes, made here in seconds, and the classifier that
scores digits.
"""

import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.datasets.digits import digits
from pipeline.judges import DigitsJudge, save_digits_classifier, train_digits_classifier
from pipeline.params import read_params
from pipeline.runs import run_stage
from pipeline.storage import StorageError, fresh_directory, publish, sha256, write_json
from pixelgen.encoders import inception
from pixelgen.encoders.dino import PATCH, load_dino
from pixelgen.encoders.lpips import load_lpips

OUT = Path("out/weights")


def main() -> None:
    params = read_params().weights
    torch.set_num_threads(1)  # the same stand-ins on every machine
    out = fresh_directory(OUT)
    facts = write_demo(out, params.seed) if params.source == "demo" else write_published(out, params.directory)
    publish(out, "weights", params, **facts)


# -------------------------------------------------------------------------------------------------- published


@dataclass(frozen=True)
class File:
    """A published file. `sha256` is as much of its hash as its publisher states in its name; None: its host states
    the hash in the answer's header (a file on the Hub, at a fixed commit)."""

    url: str
    sha256: str | None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


DINO = File("https://huggingface.co/timm/vit_base_patch14_dinov2.lvd142m/resolve/"
            "1dc7cda4727a9f4baa37f3ef407928dd642d0149/model.safetensors", None)
VGG = File("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
INCEPTION = File("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + inception.FILE,
                 inception.SHA256)


def write_published(out: Path, directory: str | None) -> dict:
    """DINOv2-B/14 (timm's file), LPIPS's VGG-16 trunk and Inception, each loaded once to see that it fits."""
    for name in ("dino", "lpips", "inception"):
        (out / name).mkdir()
    dino = obtain(DINO, directory, out / "dino" / "model.safetensors")
    write_json(out / "dino" / "config.json", {"architecture": "vit_base_patch14_dinov2", "arguments": {}})
    load_dino(out / "dino", grid=16)
    trunk = out / "vgg.pth"
    vgg = obtain(VGG, directory, trunk)
    state = torch.load(trunk, weights_only=True)
    save_file({k: v.contiguous() for k, v in state.items() if k.startswith("features.")},
              out / "lpips" / "trunk.safetensors")
    trunk.unlink()
    write_json(out / "lpips" / "config.json", {"net": "vgg"})
    load_lpips(out / "lpips")
    fid = obtain(INCEPTION, directory, out / "inception" / "model.pth")
    return {"sources": {item.url: found for item, found in ((DINO, dino), (VGG, vgg), (INCEPTION, fid))}}


def obtain(item: File, directory: str | None, target: Path) -> str:
    """Copy or download the file to `target` and return its sha256. StorageError if it is not the published one."""
    expected = item.sha256
    if directory is None:
        expected = download(item, target)
    else:
        source = Path(directory) / item.name
        if not source.is_file():
            raise StorageError(f"{source} is missing: put the file from {item.url} there, or set weights.directory to "
                               "null to download it")
        shutil.copyfile(source, target)
    found = sha256(target)
    if expected is not None and not found.startswith(expected):
        target.unlink()
        raise StorageError(f"{item.name} has sha256 {found}, but {expected}… was published: it is damaged or another "
                           f"file; get it anew from {item.url}")
    return found


def download(item: File, target: Path) -> str:
    """Fetch the file; returns the hash that it must have."""
    try:
        request = urllib.request.Request(item.url, headers={"User-Agent": "pixelgen"})
        with urllib.request.urlopen(request, timeout=60) as answer, open(target, "wb") as file:
            expected = item.sha256 or stated_hash(answer)
            shutil.copyfileobj(answer, file)
            length = answer.headers.get("Content-Length")
    except (urllib.error.URLError, OSError) as error:
        raise StorageError(f"{item.url} cannot be downloaded ({error}): fetch {item.name} on another machine, put it "
                           "into a folder and name that folder in weights.directory") from error
    if length is not None and target.stat().st_size != int(length):
        raise StorageError(f"{item.url}: the answer ended after {target.stat().st_size} of {length} bytes; try again")
    if expected is None:
        raise StorageError(f"{item.url}: the host states no sha256 to check the file against")
    return expected


def stated_hash(answer: object) -> str | None:
    """The sha256 by which the Hub's storage names the file, from the last redirect's headers."""
    tags = [answer.headers.get(name, "") for name in ("X-Linked-Etag", "ETag")]  # type: ignore[attr-defined]
    return next((t.strip('"') for t in tags if len(t.strip('"')) == 64), None)


# ------------------------------------------------------------------------------------------------------- demo

STAND_IN: dict[str, Any] = {"architecture": "vit_small_patch14_dinov2",
                            "arguments": {"embed_dim": 64, "depth": 4, "num_heads": 4}}
SIZE, GRID = 32, 2  # of the demo's images, in pixels; patches on a side with 16 px each


def write_demo(out: Path, seed: int) -> dict:
    """The loss networks see the digits' train split, the judge its own."""
    images, labels = (torch.from_numpy(a) for a in digits("train", SIZE))
    dino_accuracy = write_dino(out / "dino", images.permute(0, 3, 1, 2), labels, seed)
    write_trunk(out / "lpips", seed)
    images, labels = (torch.from_numpy(a) for a in digits("judge", SIZE))
    judge = train_digits_classifier(images.permute(0, 3, 1, 2), labels, seed)
    save_digits_classifier(judge, out / "digits")
    images, labels = (torch.from_numpy(a) for a in digits("heldout", SIZE))
    logits = DigitsJudge(judge, torch.device("cpu"))(images.permute(0, 3, 1, 2))["logits"]
    return {"judge_accuracy_heldout": share(logits, labels), "dino_accuracy_train": dino_accuracy}


def share(logits: Tensor, labels: Tensor) -> float:
    return round((logits.argmax(1) == labels).float().mean().item(), 4)


def write_dino(out: Path, images: Tensor, labels: Tensor, seed: int, steps: int = 300) -> float:
    """A small DINOv2-shaped network that was trained to tell the classes by its patch tokens; its accuracy then."""
    import timm

    torch.manual_seed(seed)
    network: Any = timm.create_model(STAND_IN["architecture"], num_classes=0, img_size=GRID * PATCH,
                                **STAND_IN["arguments"])
    head = nn.Linear(network.embed_dim, 10)
    optimizer = torch.optim.AdamW([*network.parameters(), *head.parameters()], lr=1e-3)
    x = F.interpolate(images.float() / 127.5 - 1, size=GRID * PATCH, mode="bicubic")

    def logits(x: Tensor) -> Tensor:
        return head(network.forward_features(x)[:, 1:]).mean(1)

    for _ in range(steps):
        chosen = torch.randint(len(x), (64,))
        loss = F.cross_entropy(logits(x[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out.mkdir()
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, out / "model.safetensors")
    write_json(out / "config.json", STAND_IN)
    with torch.no_grad():
        return share(logits(x), labels)


def write_trunk(out: Path, seed: int) -> None:
    """An AlexNet trunk with random weights: LPIPS keeps much of its meaning with them (arXiv 1801.03924)."""
    from torchvision.models import alexnet

    torch.manual_seed(seed)
    out.mkdir()
    save_file({f"features.{k}": v for k, v in alexnet(weights=None).features.state_dict().items()},
              out / "trunk.safetensors")
    write_json(out / "config.json", {"net": "alex"})


if __name__ == "__main__":
    run_stage(main)
