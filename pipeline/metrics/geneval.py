"""GenEval: the share of images that show their prompt, as its detector and its classifier of colours see them."""

import html
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.metrics import Metric, Task
from pixelgen.config import require

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pipeline.cluster import Cluster
    from pipeline.params import EvaluateParams, Params
    from pixelgen.metrics.geneval import ColorClassifier, Detector
    from pixelgen.store import Store

JUDGES, BASELINES = "judges.json", "baselines.json"
RESULTS = "results.jsonl"  # a line for each image
PAPER = {"": 0.79, "single_object": 0.99, "two_object": 0.88, "counting": 0.59, "colors": 0.90, "position": 0.70,
         "color_attr": 0.70}  # arXiv 2602.02493, PixelGen-XXL/16; "": overall
SHOWN = 8  # images of each tag
Pictures = tuple[list[dict[str, Any]], "np.ndarray"]  # prompts (N) and images (N, H, W, 3) uint8


@dataclass(frozen=True)
class GenEval(Metric):
    layout: ClassVar = "geneval"
    roles: ClassVar[tuple[str, ...]] = ("mask2former", "clip")

    batch_size: int = 128  # images in one unit of work and of resumption
    baselines = False  # whether there are `pictures` that show whether the score measures

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size {self.batch_size} must be at least 1")

    def check(self, params: "Params", where: str, evaluate: "EvaluateParams") -> None:
        super().check(params, where, evaluate)
        source = params.prompts[params.sample[evaluate.sample].prompts]
        require(source.metric == self.kind, f"{where}.metric {self.kind}: prompts of the kind {source.kind} are for "
                f"{source.metric}")

    def judges(self, networks: Path, device: "torch.device") -> "tuple[Detector, ColorClassifier]":
        from pixelgen.metrics.colors import load_colors
        from pixelgen.metrics.detector import FILE, load_detector

        return load_detector(networks / "mask2former" / FILE, device), load_colors(networks / "clip", device)

    def name(self, detector: str, color_classifier: str) -> str:
        """What figures by these judges are called: `geneval` for the benchmark's own networks alone."""
        from pixelgen.metrics import colors
        from pixelgen.metrics import detector as detectors

        official = (detector, color_classifier) == (detectors.NAME, colors.NAME)
        return "geneval" if official else f"geneval_{detector}_{color_classifier}"

    def pictures(self, prompts: list[dict[str, Any]], task: Task, device: str) -> dict[str, Pictures]:
        """Those of each baseline by its name, given the prompt of every image."""
        raise NotImplementedError

    def score(self, task: Task, state: "Store", cluster: "Cluster", out: Path) -> dict[str, Any]:
        from pipeline.cluster import work_through
        from pipeline.metrics.verdicts import JudgeWorker
        from pipeline.storage import read_sealed
        from pixelgen.metrics.geneval import TAGS, list_images, score

        images = list_images(task.samples.local() / "images")
        parts: list[dict[str, Any]] = [
            {"name": f"part-{i:06d}.jsonl", "images": [(m.filename, m.prompt) for m in images[i:i + self.batch_size]]}
            for i in range(0, len(images), self.batch_size)]
        first = [{"name": BASELINES, "prompts": [dict(m.prompt) for m in images]}] if self.baselines else []
        work_through([*first, *parts], JudgeWorker, (task, state, cluster), cluster, "judge", state)
        lines = [line for part in parts for line in read_sealed(state, part["name"]).decode().splitlines()]
        (out / RESULTS).write_text("".join(f"{line}\n" for line in lines))
        records, judges = [json.loads(line) for line in lines], json.loads(read_sealed(state, JUDGES))
        name = self.name(**judges)

        def figures(records: list[dict[str, Any]], suffix: str = "") -> dict[str, float]:
            found = score(records)
            return {f"{name}{suffix}": found["overall"]} | {f"{name}{suffix}_{tag}": found[tag] for tag in TAGS
                                                            if tag in found}

        metrics: dict[str, Any] = figures(records)
        for which, judged in json.loads(read_sealed(state, BASELINES)).items() if first else ():
            metrics |= figures(judged, f"_{which}")
        return metrics | judges | {"prompts": len({record["filename"].split("/")[0] for record in records})}

    def section(self, figures: dict[str, Any], evaluate: "EvaluateParams", samples: Path, scored: Path) -> list[str]:
        """The score by tag beside the paper's and the baselines, and images with prompt and verdict."""
        from pipeline.page import number, picture, table

        name = min((n for n in figures if n.startswith("geneval")), key=len)
        kinds = [k for k in ("", "_rendered", "_shuffled", "_untrained") if f"{name}{k}" in figures]
        rows = [[f"this run ({evaluate.sample})" if not kind else kind.removeprefix("_"),
                 *(number(figures.get("_".join(filter(None, [f"{name}{kind}", tag])))) for tag in PAPER)]
                for kind in kinds]
        verdict = ("<p>The benchmark's own detector and colour classifier: comparable with the paper's row.</p>"
                   if name == "geneval" else f"<p class=warn>Not comparable with the paper's row: {html.escape(name)}, "
                   f"judged by {html.escape(figures['detector'])} and {html.escape(figures['color_classifier'])}, on "
                   f"{figures['prompts']} prompts.</p>")
        records = [json.loads(line) for line in (scored / RESULTS).read_text().splitlines()]
        shown = []
        for tag in dict.fromkeys(r["tag"] for r in records):
            every = [r for r in records if r["tag"] == tag]
            shown.append(f"<h3>{html.escape(tag)}</h3>")
            shown += [picture(samples / "images" / r["filename"], f"{'✓' if r['correct'] else '✗'} {r['prompt']}" + (
                f": {r['reason']}" if r["reason"] else "")) for r in every[::max(1, len(every) // SHOWN)][:SHOWN]]
        paper = [["PixelGen-XXL/16", *(number(v) for v in PAPER.values())]]
        return [f"<p>{figures['samples']['count']} images of prompts</p>", verdict,
                table(["", *(tag or "overall" for tag in PAPER)], rows, paper), *shown]
