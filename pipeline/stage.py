"""The door to all stages: `python -m pipeline NAME [KEY]` gives each its parameters, cluster, storage and folders."""

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkout import runs
from pipeline.cluster import Cluster, read_cluster
from pipeline.params import Params, code_digest, fingerprint, instances, resolved_params
from pipeline.storage import Artifact, Storage

OUT = Path("out")
KINDS = {"networks": "networks", "shard": "dataset", "reference": "reference", "train": "model", "prompts": "prompts",
         "sample": "samples"}  # of the outputs that other stages read


@dataclass(frozen=True)
class Stage:
    """One instance of a stage."""

    name: str
    key: str  # of the section of params.yaml; empty for a stage of which there is one
    params: Params  # of this run: see `resolved_params`
    cluster: Cluster
    storage: Storage

    @property
    def out(self) -> Path:
        """Where its output goes."""
        return OUT / self.name / self.key

    @property
    def own(self) -> Any:
        """The parameters of this instance."""
        return instances(self.params, self.name)[self.key]

    def open(self, name: str, key: str = "") -> Artifact:
        """The finished output of another stage. StorageError if there is none."""
        return self.storage.open(OUT / name / key / ("model" if name == "train" else ""), KINDS[name])

    def run_directory(self, *parts: Any) -> Path:
        """Where the run with these parameters and inputs, and with today's code, has its state."""
        return runs() / self.name / fingerprint([*parts, code_digest(self.params, self.name, self.key)])


def run(name: str, key: str) -> None:
    """Run an instance of a stage. Whatever can be wrong with its surroundings is found before its work."""
    params, cluster = resolved_params(name, key), read_cluster()
    stage = Stage(name, key, params, cluster, Storage(params.storage.root))
    stage.storage.check()
    importlib.import_module(f"pipeline.stages.{name}").run(stage)
