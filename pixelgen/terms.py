"""Options of the objective and of its terms. What they compute is in `pixelgen.losses`; nothing heavy is imported here.

That a term is `perceptual`, and the order of the terms, is code: it is part of what names a training.
"""

from dataclasses import dataclass
from typing import ClassVar

from pixelgen.config import require


@dataclass(frozen=True)
class TermConfig:
    """One term of the objective. `pixelgen.losses` has what it computes."""

    perceptual: ClassVar[bool] = False  # whether the adaptive balance weighs it
    networks: ClassVar[tuple[str, ...]] = ()  # the frozen ones that it needs

    weight: float = 0.0  # 0: off
    gated: bool = False  # count samples with t >= gate_threshold alone

    def __post_init__(self) -> None:
        require(self.weight >= 0, f"weight {self.weight} must not be negative")


@dataclass(frozen=True)
class RepaConfig(TermConfig):
    """The alignment of the denoiser's tokens with DINO's (REPA, arXiv 2410.06940)."""

    networks: ClassVar = ("dino",)

    weight: float = 0.5
    block: int = 8  # the tokens entering this block are aligned
    hidden: int | None = None  # width of the head that they pass first; null: the denoiser's

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.block >= 0, f"block {self.block} must not be negative")
        require(self.hidden is None or self.hidden >= 1, "hidden must be at least 1, or null")


@dataclass(frozen=True)
class LpipsConfig(TermConfig):
    """LPIPS between prediction and image."""

    perceptual: ClassVar = True
    networks: ClassVar = ("lpips",)

    weight: float = 0.1
    gated: bool = True


@dataclass(frozen=True)
class PDinoConfig(TermConfig):
    """The distance of the DINO features of prediction and image (P-DINO). Not gated as released; the paper's text gates
    it."""

    perceptual: ClassVar = True
    networks: ClassVar = ("dino",)

    weight: float = 0.01
    block: int = 11  # of DINO, whose normalised patch tokens are compared

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.block >= 0, f"block {self.block} must not be negative")


@dataclass(frozen=True)
class ObjectiveConfig:
    """The training objective (`pixelgen.objective`): flow matching, and terms beside it."""

    repa: RepaConfig = RepaConfig()
    lpips: LpipsConfig = LpipsConfig()
    pdino: PDinoConfig = PDinoConfig()
    gate_threshold: float = 0.3  # gated terms count samples with t >= this; 0: no gate
    balance_start: int | None = 400_000  # step from which the perceptual weight adapts; null: never
    balance_every: int = 50  # steps between its updates
    condition_dropout: float = 0.1  # share of samples trained without their class or prompt
    time_mean: float = -0.8  # t = sigmoid(normal(mean, std)), then shifted
    time_std: float = 0.8  # as time_mean
    timeshift: float = 1.0  # above 1: more of the times close to the noise

    @property
    def terms(self) -> dict[str, TermConfig]:
        """The terms that have a weight, by name."""
        return {name: term for name, term in vars(self).items() if isinstance(term, TermConfig) and term.weight}

    @property
    def networks(self) -> list[str]:
        """The frozen networks that these need."""
        return sorted({network for term in self.terms.values() for network in term.networks})

    def __post_init__(self) -> None:
        require(0 <= self.gate_threshold <= 1, f"gate_threshold {self.gate_threshold} must lie in [0, 1]")
        require(0 <= self.condition_dropout < 1, f"condition_dropout {self.condition_dropout} must lie in [0, 1)")
        require(self.time_std > 0, "time_std must be positive")
        require(self.timeshift > 0, "timeshift must be positive")
        require(self.balance_every > 0, "balance_every must be positive")
        require(self.balance_start is None or any(term.perceptual for term in self.terms.values()),
                "balance_start is set, but there is no perceptual term to balance: set it to null")
