"""GenEval's rules on the demo's scenes: judged by geometry, with baselines that show whether the score measures."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.metrics import Task
from pipeline.metrics.geneval import GenEval, Pictures

if TYPE_CHECKING:
    import torch

    from pixelgen.metrics.geneval import ColorClassifier, Detector


@dataclass(frozen=True)
class DemoGenEval(GenEval):
    roles: ClassVar[tuple[str, ...]] = ()

    baselines: bool = False  # also score scenes rendered from the prompts, from other prompts, and an untrained model

    def judges(self, networks: Path, device: "torch.device") -> "tuple[Detector, ColorClassifier]":
        from pipeline.demo.geometric import GeometricDetector, SceneColors

        return GeometricDetector(), SceneColors()

    def name(self, detector: str, color_classifier: str) -> str:
        return "geneval_demo"

    def pictures(self, prompts: list[dict[str, Any]], task: Task, device: str) -> dict[str, Pictures]:
        """Scenes of the prompts, scenes of the next prompt of the same tag, and the untrained model's images."""
        import numpy as np

        from pipeline.demo import scenes
        from pixelgen.generate import BATCH
        from pixelgen.metrics.geneval import TAGS

        random, size = np.random.default_rng(0), task.train.denoiser.image_size
        different = {prompt["prompt"]: prompt for prompt in prompts}
        unlike: dict[str, dict[str, Any]] = {}
        for tag in TAGS:
            mine = [prompt for prompt in different.values() if prompt["tag"] == tag]
            unlike |= {prompt["prompt"]: other for prompt, other in zip(mine, mine[1:] + mine[:1], strict=True)}

        def rendered(prompts: list[dict[str, Any]]) -> np.ndarray:
            return np.stack([np.asarray(scenes.render(scenes.place(p, random), size, random)) for p in prompts])

        drawn = task.untrained(device).generate([*different], range(len(different)), task.sampling.sampler, BATCH,
                                                task.sampling.negative)
        return {"rendered": (prompts, rendered(prompts)),
                "shuffled": (prompts, rendered([unlike[prompt["prompt"]] for prompt in prompts])),
                "untrained": ([*different.values()], drawn)}
