"""Metrics, each one a file: its options, its checks, how it scores samples, and its section of the report."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pixelgen.config import Variant, choose, require

if TYPE_CHECKING:
    from pipeline.cluster import Cluster
    from pipeline.params import EvaluateParams, Params, SampleParams, TrainParams
    from pipeline.storage import Artifact
    from pixelgen.generate import PixelGen
    from pixelgen.store import Store


class Metric(Variant):
    kinds: ClassVar = {
        "adm": "pipeline.metrics.adm:AdmSuite",
        "geneval": "pipeline.metrics.geneval:GenEval",
        "demo_geneval": "pipeline.demo.geneval:DemoGenEval",
    }
    layout: ClassVar[str]  # of the samples that it scores
    compares: ClassVar[bool] = False  # with a reference
    roles: ClassVar[tuple[str, ...]] = ()  # of the frozen networks that it takes
    heldout: bool = False  # whether it takes the images that the dataset of the model holds out

    def check(self, params: "Params", where: str, evaluate: "EvaluateParams") -> None:
        """ConfigError, which begins with `where`, if it cannot score these samples, as far as parameters tell."""
        sample, none = params.sample[evaluate.sample], "none"
        require(sample.layout == self.layout, f"{where}: {evaluate.sample} has layout {sample.layout}, not "
                f"{self.layout}, which {self.kind} scores")
        require((evaluate.reference != none) == self.compares, f"{where}.reference {evaluate.reference}: {self.kind} "
                + ("needs a key of reference" if self.compares else f"has no reference: set it to {none}"))
        if self.compares:
            choose(evaluate.reference, list(params.reference), f"{where}.reference")
            trained_on, reference = params.train[sample.model].dataset, params.reference[evaluate.reference]
            require(reference.dataset == trained_on, f"{where}: the samples imitate {trained_on!r}, but reference "
                    f"{evaluate.reference!r} is of {reference.dataset!r}")
        for role in self.roles:
            params.need(role, f"{where}.metric.{self.kind}")

    def score(self, task: "Task", state: "Store", cluster: "Cluster", out: Path) -> dict[str, Any]:
        """Figures by name. Finished parts of the work lie in `state`; what is worth keeping goes into the folder `out`.
        """
        raise NotImplementedError

    def section(self, figures: dict[str, Any], evaluate: "EvaluateParams", samples: Path, scored: Path) -> list[str]:
        """HTML for the report: the figures, of samples in one folder, with what `score` has left in another."""
        from pipeline.page import figures_of

        return [figures_of(figures)]


@dataclass(frozen=True)
class Task:
    """What is to be scored, as each worker sees it."""

    params: "Params"
    key: str  # of evaluate
    samples: "Artifact"
    networks: "Artifact"
    reference: "Artifact | None"
    dataset: "Artifact | None"  # what the model was trained on, for a metric that takes the images held out

    @property
    def inputs(self) -> list[Any]:
        """What the figures depend on."""
        artifacts = (self.samples, self.networks, self.reference, self.dataset)
        return [self.evaluate, self.sampling, self.train.denoiser, self.train.fit.seed,
                *(artifact and artifact.identity for artifact in artifacts)]

    @property
    def evaluate(self) -> "EvaluateParams":
        return self.params.evaluate[self.key]

    @property
    def sampling(self) -> "SampleParams":
        return self.params.sample[self.evaluate.sample]

    @property
    def train(self) -> "TrainParams":
        return self.params.train[self.sampling.model]

    def untrained(self, device: str) -> "PixelGen":
        """The model that training starts from, before its first step, to be sampled as the trained one was."""
        import torch

        from pixelgen.generate import PixelGen

        torch.manual_seed(self.train.fit.seed)
        denoiser = self.train.denoiser.resolve().build()
        return PixelGen.prepared(denoiser, device, self.sampling.precision, self.sampling.compile,
                                 self.networks.local() / "text")
