"""The demo's networks: stand-ins of the classes of the published ones, trained or drawn from a seed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipeline.networks import Network


@dataclass(frozen=True)
class StandIn(Network):
    seed: int = 0  # of its weights and of their training

    def make(self, folder: Path) -> dict[str, Any]:
        from pipeline.demo.stand_ins import WRITERS

        return WRITERS[self.role](folder, self.seed)


@dataclass(frozen=True)
class DemoDino(StandIn):
    role: ClassVar = "dino"


@dataclass(frozen=True)
class DemoLpips(StandIn):
    role: ClassVar = "lpips"


@dataclass(frozen=True)
class DemoText(StandIn):
    role: ClassVar = "text"
