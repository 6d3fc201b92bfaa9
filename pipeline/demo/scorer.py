"""The classifier that scores the demo's digits, as a network: see `pipeline.demo.judge`."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.networks import Network

if TYPE_CHECKING:
    import torch

    from pipeline.demo.judge import DigitsJudge


@dataclass(frozen=True)
class DemoDigits(Network):
    role: ClassVar = "digits"
    classifies: ClassVar = True

    seed: int = 0  # of its weights and of their training

    def make(self, folder: Path) -> dict[str, Any]:
        from pipeline.demo.judge import write_judge

        return write_judge(folder, self.seed)

    def extractor(self, folder: Path, device: "torch.device") -> "DigitsJudge":
        from pipeline.demo.judge import load_digits_judge

        return load_digits_judge(folder, device)
