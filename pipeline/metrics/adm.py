"""FID, sFID, Inception Score, precision and recall of images of classes, as ADM's suite has them, by any extractor.

Actors leave the features of a part of the images each, and one of them makes figures of all
(`pipeline.metrics.features`). The baselines give the Fréchet distance a scale: its floor from held-out real images, its
ceiling from the untrained model.
"""

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.metrics import Metric, Task
from pixelgen.config import require

if TYPE_CHECKING:
    from pipeline.cluster import Cluster
    from pipeline.params import EvaluateParams
    from pixelgen.store import Store

FIGURES = "figures.json"
LEAST = 4  # images: each has to have a third neighbour
PART = 4000  # images whose features are one unit of work and of resumption
COMPUTED = "computed from the training split"  # a reference that is not a published file
SUITE = ("fid", "sfid", "inception_score", "precision", "recall")
# arXiv 2602.02493: tables of class-to-image results and of the ablation (L/16, 200k steps, no guidance)
PAPER = [
    ("PixelGen-XL/16, 80 epochs, no guidance",
     {"fid": 5.11, "inception_score": 159.2, "precision": 0.72, "recall": 0.63}),
    ("PixelGen-XL/16, 160 epochs, guidance 2.25",
     {"fid": 1.83, "inception_score": 293.6, "precision": 0.79, "recall": 0.63}),
    ("ablation: JiT-L/16 + REPA", {"fid": 23.67, "recall": 0.63}),
    ("ablation: + LPIPS", {"fid": 10.00, "recall": 0.59}),
    ("ablation: + P-DINO", {"fid": 7.46, "recall": 0.58}),
    ("ablation: + noise gate at 0.3", {"fid": 7.53, "recall": 0.60}),
]


@dataclass(frozen=True)
class AdmSuite(Metric):
    layout: ClassVar = "npz"
    compares: ClassVar = True

    batch_size: int = 128  # images at a time
    baselines: bool = False  # also score held-out real images and an untrained model

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size {self.batch_size} must be at least 1")

    @property
    def heldout(self) -> bool:  # type: ignore[override]
        return self.baselines

    def score(self, task: Task, state: "Store", cluster: "Cluster", out: Path) -> dict[str, Any]:
        from pipeline.cluster import work_through
        from pipeline.metrics.features import FeatureWorker, FigureWorker
        from pipeline.storage import read_sealed

        parts = plan_parts(self.counts(task))
        work_through(parts, FeatureWorker, (task, state, cluster), cluster, "features", state)
        work_through([{"name": FIGURES, "parts": parts}], FigureWorker, (task, state, cluster), cluster, "figures",
                     state)
        reference = task.params.reference[task.evaluate.reference]
        return json.loads(read_sealed(state, FIGURES)) | {"reference": {
            "dataset": reference.dataset, "npz": reference.npz or COMPUTED}}

    def counts(self, task: Task) -> dict[str, int]:
        """How many images of each source are looked at. ConfigError if they are too few."""
        assert task.reference
        counts = {"samples": task.samples["images"]}
        if task.reference["images"]:  # without, there are no precision and recall
            counts["reference"] = task.reference["images"]
        if task.dataset:
            counts["heldout"] = counts["untrained"] = task.dataset.split("heldout").total
        told = {"samples": f"sample {task.evaluate.sample}", "reference": f"reference {task.evaluate.reference}",
                "heldout": f"the held-out split of {task.train.dataset}, for baselines,"}
        for source, count in counts.items():
            require(count >= LEAST, f"{told.get(source, source)} has {count} images, too few to score: at least "
                    f"{LEAST} are needed")
        return counts

    def section(self, figures: dict[str, Any], evaluate: "EvaluateParams", samples: Path, scored: Path) -> list[str]:
        """The figures, the paper's under them, and the samples they were computed from."""
        from pipeline.page import figures_of, number, picture, table

        ours = [f"this run ({evaluate.sample})", *(number(figures.get(name)) for name in SUITE)]
        paper = [[name, *(number(row.get(m)) for m in SUITE)] for name, row in PAPER]
        reasons = incomparable(figures)
        verdict = ("<p>Same extractor, number of samples and a published reference: comparable with the paper's rows."
                   "</p>" if not reasons else
                   f"<p class=warn>Not comparable with the paper's rows: {'; '.join(reasons)}.</p>")
        named = {k: v for k, v in figures.items() if k not in SUITE}
        return [
            f"<p>{figures['samples']['count']} samples by {html.escape(figures['extractor'])}</p>",
            verdict,
            picture(samples / "grid.png", "samples, one class a column", scale=2),
            figures_of(named) if named else "",
            table(["", *SUITE], [ours], paper),
        ]


def incomparable(figures: dict[str, Any]) -> list[str]:
    """Why the figures must not be set beside the paper's; empty if they may."""
    from pixelgen.encoders import INCEPTION

    reasons = []
    if figures["extractor"] != INCEPTION:
        reasons.append(f"features of the {figures['extractor']!r} extractor, not of Inception")
    if figures["samples"]["count"] != 50_000:
        reasons.append(f"{figures['samples']['count']} samples instead of 50,000")
    if figures["reference"]["npz"] == COMPUTED:
        reasons.append("the reference was computed here, from this dataset")
    return reasons


def plan_parts(counts: dict[str, int]) -> list[dict[str, Any]]:
    """All images of all sources in a row, cut into parts of PART: each has some pieces (source, start, stop)."""
    parts: list[dict[str, Any]] = []
    room = 0
    for source, count in counts.items():
        start = 0
        while start < count:
            if room == 0:
                parts.append({"name": f"part-{len(parts):06d}.npz", "pieces": []})
                room = PART
            stop = min(start + room, count)
            parts[-1]["pieces"].append((source, start, stop))
            room, start = room - (stop - start), stop
    return parts
