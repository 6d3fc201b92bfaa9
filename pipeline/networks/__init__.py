"""Frozen networks: what each is for, how its files are had, and how it is first loaded.

Which network plays a role is a parameter; its files lie in out/networks/ROLE.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pixelgen.config import ConfigError, Variant, plain, require

if TYPE_CHECKING:
    import torch

    from pixelgen.metrics.fid import Extractor


class Network(Variant):
    kinds: ClassVar = {
        "dinov2_b14": "pipeline.networks.dinov2:DinoV2B14",
        "lpips_vgg16": "pipeline.networks.vgg16:LpipsVgg16",
        "qwen3_1.7b": "pipeline.networks.qwen3:Qwen3",
        "inception_v3": "pipeline.networks.inception:InceptionV3",
        "mask2former_swin_s": "pipeline.networks.mask2former:Mask2FormerSwinS",
        "clip_vit_l14": "pipeline.networks.clip:ClipVitL14",
        "demo_dino": "pipeline.demo.networks:DemoDino",
        "demo_lpips": "pipeline.demo.networks:DemoLpips",
        "demo_text": "pipeline.demo.networks:DemoText",
        "demo_digits": "pipeline.demo.scorer:DemoDigits",
    }
    role: ClassVar[str]  # what asks for it: the key under `networks`, and the name of its folder
    classifies: ClassVar[bool] = False  # as an extractor: whether its logits are of the classes of the dataset

    @property
    def meaning(self) -> dict[str, Any]:
        """Its kind, and the options on which what it computes may depend: all but where its files come from."""
        options = {name: value for name, value in plain(self)[self.kind].items() if name != "directory"}
        return {"kind": self.kind, **options}

    def make(self, folder: Path) -> dict[str, Any]:
        """Write its files into an empty folder -> facts for the manifest. StorageError if they cannot be had."""
        raise NotImplementedError

    def config(self, folder: Path) -> dict[str, Any]:
        """What its config.json says, or will say. ConfigError if nobody knows before `make` has filled the folder."""
        path = folder / "config.json"
        require(path.is_file(), f"{self.kind} is not there yet: run `dvc repro networks` first")
        return json.loads(path.read_text())

    def extractor(self, folder: Path, device: "torch.device") -> "Extractor":
        """It as what the ADM suite compares features of, from the folder that `make` has filled."""
        raise ConfigError(f"{self.kind} is no extractor of features")


def default_networks() -> dict[str, Network]:
    """What the training and the evaluation of classes need."""
    return {role: Network.of(kind)() for role, kind in (
        ("dino", "dinov2_b14"), ("lpips", "lpips_vgg16"), ("inception", "inception_v3"))}
