"""evaluate: samples -> metrics/KEY.json, with all that the figures depend on.

Ray Data actors look at the images in parts, which survive an interruption; this process collects what they have found.
"""

from pathlib import Path

import torch

from pipeline.metrics import Task
from pipeline.runs import working
from pipeline.stage import Stage
from pipeline.storage import Storage, fresh_directory, run_name, write_json
from pixelgen.config import plain

METRICS = Path("metrics")


def run(stage: Stage) -> None:
    params, cluster = stage.own, stage.cluster
    torch.set_num_threads(cluster.threads)
    sampling, metric = stage.params.sample[params.sample], params.metric
    task = Task(stage.params, stage.key, stage.open("sample", params.sample), stage.open("networks"),
                stage.open("reference", params.reference) if metric.compares else None,
                stage.open("shard", stage.params.train[sampling.model].dataset) if metric.heldout else None)
    directory = stage.run_directory(*task.inputs)
    out = fresh_directory(stage.out)
    with working(directory):
        found = metric.score(task, stage.storage.run(directory), cluster, out)
    figures = {
        **{name: round(value, 6) if isinstance(value, float) else value for name, value in found.items()},
        "samples": {"count": task.samples["images"], "weights": sampling.weights, "precision": sampling.precision,
                    "seed": sampling.seed},
        "sampler": plain(sampling.sampler),
    }
    METRICS.mkdir(exist_ok=True)
    write_json(METRICS / f"{stage.key}.json", figures)
    Storage(None).publish(out, "evaluation", params, run=run_name(directory), figures=figures)
