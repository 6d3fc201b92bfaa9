"""The Inception network behind FID."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pipeline.networks.published import File, Published

if TYPE_CHECKING:
    import torch

    from pixelgen.encoders.inception import Inception

FILE = "model.pth"


@dataclass(frozen=True)
class InceptionV3(Published):
    role: ClassVar = "inception"
    files: ClassVar = [File("https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
                            "weights-inception-2015-12-05-6726825d.pth",
                            "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")]

    def prepare(self, folder: Path) -> None:
        (folder / self.files[0].name).rename(folder / FILE)

    def extractor(self, folder: Path, device: "torch.device") -> "Inception":
        from pixelgen.encoders.inception import load_inception

        return load_inception(folder / FILE, device)
