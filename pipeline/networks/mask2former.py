"""GenEval's detector: Mask2Former with a Swin-S backbone, of mmdet."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pipeline.networks.published import File, Published


@dataclass(frozen=True)
class Mask2FormerSwinS(Published):
    role: ClassVar = "mask2former"
    files: ClassVar = [File("https://download.openmmlab.com/mmdetection/v2.0/mask2former/mask2former_swin-s-p4-w7-224_"
                            "lsj_8x2_50e_coco/mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco_20220504_001756-743b7d99."
                            "pth", "743b7d99")]  # mmdet puts the first digits of the hash into the name

    def prepare(self, folder: Path) -> None:
        from pixelgen.metrics.detector import FILE, load_detector

        load_detector(folder / FILE, "cpu")
