"""What workers do for GenEval: judge a part of the images, or the baselines."""

import json
from typing import Any

import torch

from pipeline.cluster import Cluster
from pipeline.metrics import Task
from pipeline.metrics.geneval import BASELINES, JUDGES, GenEval
from pipeline.storage import write_sealed
from pixelgen.metrics.geneval import PromptedImage, Rules, evaluate_image, judge_image
from pixelgen.store import Store


class JudgeWorker:
    """What an actor does: it holds the judges, leaves their names, which only loaded weights tell, and judges parts."""

    def __init__(self, task: Task, state: Store, cluster: Cluster):
        self.task, self.state, self.device = task, state, cluster.device
        self.images = task.samples.local() / "images"
        metric = task.evaluate.metric
        assert isinstance(metric, GenEval)
        self.metric, self.judges = metric, metric.judges(task.networks.local(), torch.device(cluster.device))
        detector, colors = self.judges
        names = {"detector": detector.name, "color_classifier": colors.name}
        write_sealed(state, JUDGES, json.dumps(names).encode())

    def __call__(self, part: dict[str, Any]) -> None:
        found = self.baselines(part["prompts"]) if part["name"] == BASELINES else self.verdicts(part["images"])
        write_sealed(self.state, part["name"], found.encode())

    def verdicts(self, images: list[tuple[str, dict[str, Any]]]) -> str:
        """A line for each image, a file of the samples and its prompt."""
        given = (PromptedImage(self.images / filename, filename, prompt) for filename, prompt in images)
        return "".join(json.dumps(evaluate_image(image, *self.judges, Rules())) + "\n" for image in given)

    def baselines(self, prompts: list[dict[str, Any]]) -> str:
        """Verdicts by baseline."""
        drawn = self.metric.pictures(prompts, self.task, self.device)
        return json.dumps({which: [{"tag": prompt["tag"], "metadata": prompt["prompt"],
                                    "correct": judge_image(picture, prompt, *self.judges).correct}
                                   for prompt, picture in zip(given, pictures, strict=True)]
                           for which, (given, pictures) in drawn.items()})
