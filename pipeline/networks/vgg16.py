"""LPIPS on VGG-16; the layers above the trunk come with the package `lpips`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.networks.published import File, Published
from pipeline.storage import write_json


@dataclass(frozen=True)
class LpipsVgg16(Published):
    role: ClassVar = "lpips"
    files: ClassVar = [File("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")]

    def config(self, folder: Path) -> dict[str, Any]:
        return {"net": "vgg"}

    def prepare(self, folder: Path) -> None:
        from safetensors.torch import save_file

        from pixelgen.encoders.lpips import load_lpips
        from pixelgen.metrics.pretrained import read_weights

        trunk = folder / self.files[0].name
        state, _ = read_weights(trunk)
        save_file({k: v.contiguous() for k, v in state.items() if k.startswith("features.")},
                  folder / "trunk.safetensors")
        trunk.unlink()
        write_json(folder / "config.json", self.config(folder))
        load_lpips(folder)
