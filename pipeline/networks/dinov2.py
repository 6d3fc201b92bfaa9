"""DINOv2-B/14, whose features REPA and P-DINO compare."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.networks.published import Published, hub
from pipeline.storage import write_json


@dataclass(frozen=True)
class DinoV2B14(Published):
    role: ClassVar = "dino"
    files: ClassVar = hub("timm/vit_base_patch14_dinov2.lvd142m", "1dc7cda4727a9f4baa37f3ef407928dd642d0149",
                          "model.safetensors")

    def config(self, folder: Path) -> dict[str, Any]:
        return {"architecture": "vit_base_patch14_dinov2", "arguments": {}}

    def prepare(self, folder: Path) -> None:
        from pixelgen.encoders.dino import load_dino

        write_json(folder / "config.json", self.config(folder))
        load_dino(folder, grid=16)
