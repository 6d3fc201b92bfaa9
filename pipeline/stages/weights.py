"""weights: the frozen networks, put into files once; no later stage touches a network.

`weights.networks` names them. published: DINOv2-B/14, LPIPS's VGG-16 trunk, Qwen3-1.7B, FID's Inception, GenEval's
Mask2Former and CLIP, downloaded (or copied from a folder) and checked against their hashes. demo: small stand-ins of
the same classes, made here in seconds, and the classifier that scores digits.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline import session
from pipeline.checkout import data_path
from pipeline.cluster import read_cluster
from pipeline.datasets import scenes
from pipeline.datasets.digits import digits
from pipeline.download import download, stated_hash
from pipeline.judges import DigitsJudge, save_digits_classifier, train_digits_classifier
from pipeline.params import WeightsParams, resolved_params
from pipeline.runs import run_stage
from pipeline.storage import Storage, fresh_directory, write_json
from pixelgen.data.captions import PREFIXES
from pixelgen.encoders import inception
from pixelgen.encoders.dino import PATCH, load_dino
from pixelgen.encoders.lpips import load_lpips
from pixelgen.encoders.text import load_text_encoder
from pixelgen.errors import StorageError
from pixelgen.manifest import sha256
from pixelgen.metrics import detector
from pixelgen.metrics.colors import load_colors
from pixelgen.metrics.pretrained import read_weights

OUT = Path("out/weights")


def main() -> None:
    whole = resolved_params("weights")
    torch.set_num_threads(1)  # the same stand-ins on every machine
    storage, cluster = Storage(whole.storage.root), read_cluster()
    storage.check()
    if cluster.address is None:
        session.begin()
    out = fresh_directory(OUT)
    storage.publish(out, "weights", whole.weights, **write_networks(out, whole.weights))


def write_networks(out: Path, params: WeightsParams) -> dict[str, Any]:
    """A folder for each network -> facts for the manifest."""
    facts: dict[str, Any] = {}
    for name in params.networks:
        (out / name).mkdir()
        if params.source == "demo":
            facts |= DEMO[name](out / name, params.seed)
        else:
            found = {item.url: obtain(item, params.directory, out / name / item.name) for item in FILES[name]}
            PREPARE[name](out / name)
            facts["sources"] = facts.get("sources", {}) | found
    return facts


# -------------------------------------------------------------------------------------------------- published


@dataclass(frozen=True)
class File:
    """A published file. `sha256` is as much of its hash as its publisher states in its name; None: its host states
    the hash in the answer's header (a file on the Hub, at a fixed commit)."""

    url: str
    sha256: str | None = None

    @property
    def name(self) -> str:
        return self.url.rsplit("/", 1)[1]


def hub(repository: str, commit: str, *names: str) -> list[File]:
    return [File(f"https://huggingface.co/{repository}/resolve/{commit}/{name}") for name in names]


FILES = {
    "dino": hub("timm/vit_base_patch14_dinov2.lvd142m", "1dc7cda4727a9f4baa37f3ef407928dd642d0149",
                "model.safetensors"),
    "text": hub("Qwen/Qwen3-1.7B", "70d244cc86ccca08cf5af4e1e306ecf908b1ad5e", "config.json",
                "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
                "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
    "clip": hub("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41", "config.json",
                "model.safetensors", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json",
                "vocab.json", "merges.txt", "special_tokens_map.json"),
    "lpips": [File("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")],
    "inception": [File("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/" + inception.FILE,
                       inception.SHA256)],
    "mask2former": [File("https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_lsj_"
                         "8x2_50e_coco/" + detector.FILE, detector.SHA256)],
}


def prepare_dino(folder: Path) -> None:
    write_json(folder / "config.json", {"architecture": "vit_base_patch14_dinov2", "arguments": {}})
    load_dino(folder, grid=16)


def prepare_lpips(folder: Path) -> None:
    trunk = folder / FILES["lpips"][0].name
    state, _ = read_weights(trunk)
    save_file({k: v.contiguous() for k, v in state.items() if k.startswith("features.")}, folder / "trunk.safetensors")
    trunk.unlink()
    write_json(folder / "config.json", {"net": "vgg"})
    load_lpips(folder)


PREPARE: dict[str, Callable[[Path], Any]] = {  # what is still to be done with the files, and a first loading of them
    "dino": prepare_dino,
    "lpips": prepare_lpips,
    "inception": lambda folder: (folder / inception.FILE).rename(folder / "model.pth"),
    "text": lambda folder: load_text_encoder(folder, length=128, precision="bf16"),
    "mask2former": lambda folder: detector.load_detector(folder / detector.FILE, "cpu"),
    "clip": lambda folder: load_colors(folder, "cpu"),
}


def obtain(item: File, directory: str | None, target: Path) -> str:
    """Copy or download the file to `target` and return its sha256. StorageError if it is not the published one."""
    expected = item.sha256
    if directory is None:
        remedy = (f"fetch {item.name} on another machine, put it into FOLDER/{target.parent.name} and set "
                  "weights.directory to FOLDER")
        expected = expected or stated_hash(item.url, remedy)
        download(item.url, target, remedy)
    else:
        source = data_path(directory) / target.parent.name / item.name
        if not source.is_file():
            raise StorageError(f"{source} is missing: put the file from {item.url} there, or set weights.directory to "
                               "null to download it")
        shutil.copyfile(source, target)
    found = git_blob(target) if expected is not None and len(expected) == 40 else sha256(target)
    if expected is not None and not found.startswith(expected):
        target.unlink()
        raise StorageError(f"{item.name} has hash {found}, but {expected}… was published: it is damaged or another "
                           f"file; get it anew from {item.url}")
    return sha256(target)


def git_blob(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


# ------------------------------------------------------------------------------------------------------- demo

STAND_IN: dict[str, Any] = {"architecture": "vit_small_patch14_dinov2",
                            "arguments": {"embed_dim": 64, "depth": 4, "num_heads": 4}}
SIZE, GRID = 32, 2  # of the digits, in pixels; patches on a side with 16 px each
TEXT: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64}
VOCABULARY = 512
LOUDER = 5  # times the usual token embeddings: what random layers add to them shall not drown them


def split(name: Literal["train", "judge", "heldout"]) -> tuple[Tensor, Tensor]:
    """Digits (N, 3, 32, 32) uint8 and labels: the loss networks see `train`, the judge `judge`."""
    images, labels = (torch.from_numpy(a) for a in digits(name, SIZE))
    return images.permute(0, 3, 1, 2), labels


def write_judge(out: Path, seed: int) -> dict:
    """The classifier that scores digits."""
    judge = train_digits_classifier(*split("judge"), seed)
    save_digits_classifier(judge, out)
    images, labels = split("heldout")
    logits = DigitsJudge(judge, torch.device("cpu"))(images)["logits"]
    return {"judge_accuracy_heldout": share(logits, labels)}


def share(logits: Tensor, labels: Tensor) -> float:
    return round((logits.argmax(1) == labels).float().mean().item(), 4)


def write_dino(out: Path, seed: int, steps: int = 300) -> dict:
    """A small DINOv2-shaped network that was trained to tell digits by its patch tokens; its accuracy then."""
    import timm

    images, labels = split("train")
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
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, out / "model.safetensors")
    write_json(out / "config.json", STAND_IN)
    with torch.no_grad():
        return {"dino_accuracy_train": share(logits(x), labels)}


def write_trunk(out: Path, seed: int) -> dict:
    """An AlexNet trunk with random weights: LPIPS keeps much of its meaning with them (arXiv 1801.03924)."""
    from torchvision.models import alexnet

    torch.manual_seed(seed)
    save_file({f"features.{k}": v for k, v in alexnet(weights=None).features.state_dict().items()},
              out / "trunk.safetensors")
    write_json(out / "config.json", {"net": "alex"})
    return {}


def write_text(out: Path, seed: int) -> dict:
    """A small Qwen3 with random weights, and a tokenizer that was trained on the captions of scenes."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    texts = [template.format(prompt["prompt"].removeprefix(scenes.PHOTO))
             for prompts in scenes.all_prompts().values() for prompt in prompts
             for template in (*scenes.CAPTIONS.values(), *(prefix + "{}" for prefix in PREFIXES))]
    pieces = ByteLevelBPETokenizer()
    pieces.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=["<|endoftext|>"])
    out.mkdir(exist_ok=True)
    pieces.save_model(str(out))
    tokenizer = Qwen2Tokenizer.from_pretrained(out)
    tokenizer.save_pretrained(out)
    torch.manual_seed(seed)
    network = Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **TEXT))
    with torch.no_grad():
        network.embed_tokens.weight *= LOUDER
    network.save_pretrained(out)
    return {"tokens": len(tokenizer)}


DEMO: dict[str, Callable[[Path, int], dict]] = {
    "dino": write_dino, "lpips": write_trunk, "text": write_text, "digits": write_judge}


if __name__ == "__main__":
    run_stage(main)
