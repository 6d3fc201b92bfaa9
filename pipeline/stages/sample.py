"""sample: images of every class, or of every prompt, from a trained model.

Ray Data actors draw parts, each written whole, so that finished ones survive an interruption.
"""

import io
import itertools
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cluster import Cluster, read_cluster, work_through
from pipeline.params import NONE, SampleParams, read_params, stage_params
from pipeline.runs import lease, run_directory, run_stage
from pipeline.storage import Artifact, Storage, fresh_directory, read_sealed, write_sealed
from pixelgen.generate import PixelGen
from pixelgen.images import grid
from pixelgen.prompts import Prompt, write_images
from pixelgen.store import Store

MODELS, PROMPTS, WEIGHTS, OUT = (Path("out") / n for n in ("train", "prompts", "weights", "sample"))
SHUFFLE_SEED = 0  # of the order in samples.npz; sorted by class, a split of the Inception Score would see few
GRID_COLUMNS, GRID_ROWS = 10, 10
COMPUTED = 32  # samples that the network always sees at once: no byte depends on the size of a part


@dataclass(frozen=True)
class Part:
    """Some images, the unit of work and of resumption."""

    name: str
    wanted: list  # labels or prompts
    seeds: list[int]


def main() -> None:
    key = sys.argv[1]
    whole, cluster = read_params(), read_cluster()
    params, storage = stage_params(whole.sample, key, "sample"), Storage(whole.storage.root)
    storage.check()
    model, weights = storage.open(MODELS / params.model / "model", "model"), None
    inputs = [params, model.identity]
    prompts: list[Prompt] = []
    if params.prompts == NONE:
        wanted: list = [*range(whole.train[params.model].denoiser.num_classes or 0)] * params.per_prompt
    else:
        prompts = load_prompts(storage.open(PROMPTS / params.prompts, "prompts").local() / "prompts.jsonl")
        wanted = [prompt.text for prompt in prompts for _ in range(params.per_prompt)]
        weights = storage.open(WEIGHTS, "weights")
        inputs += [wanted, *(f["sha256"] for f in weights["files"] if f["path"].startswith("text/"))]
    directory = run_directory("sample", key, *inputs)
    state, parts = storage.run(directory), plan_parts(params, wanted)
    with lease(directory / "driver.lease", patience=5):
        done = state.sizes("part-")
        if missing := [part for part in parts if part.name not in done]:
            work_through([vars(part) for part in missing], Artist, (params, model, weights, state, cluster), cluster,
                         "sample")
        images = (np.load(io.BytesIO(read_sealed(state, part.name)), allow_pickle=False) for part in parts)
        out = fresh_directory(OUT / key)
        if prompts:
            write_prompts(out, images, prompts, params)
        else:
            write_classes(out, images, wanted)
        storage.publish(out, "samples", params, images=len(wanted), run=directory.as_posix())


def load_prompts(path: Path) -> list[Prompt]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [Prompt(line.pop("name"), line["prompt"], line) for line in lines]


def plan_parts(params: SampleParams, wanted: list) -> list[Part]:
    """Image i is of `wanted[i]` and has the seed SEED + i, whatever the size of the parts."""
    numbers = [range(i, min(i + params.part_size, len(wanted))) for i in range(0, len(wanted), params.part_size)]
    return [Part(f"part-{n:06d}.npy", [wanted[i] for i in r], [params.seed + i for i in r])
            for n, r in enumerate(numbers)]


class Artist:
    """What an actor does: it holds the model, and draws parts, each written whole."""

    def __init__(self, params: SampleParams, model: Artifact, weights: Artifact | None, state: Store,
                 cluster: Cluster):
        torch.set_num_threads(cluster.threads_per_worker)
        self.params, self.state = params, state
        self.model = PixelGen.from_pretrained(model.local(), params.weights, cluster.device, params.precision,
                                              params.compile, weights.local() / "text" if weights else None)

    def __call__(self, part: dict[str, Any]) -> None:
        images = self.model.generate(part["wanted"], part["seeds"], self.params.sampler, COMPUTED,
                                     self.params.negative)
        data = io.BytesIO()
        np.save(data, images)
        write_sealed(self.state, part["name"], data.getvalue())


def write_classes(out: Path, parts: Iterable[np.ndarray], wanted: list[int]) -> None:
    """samples.npz (`arr_0`, NHWC uint8, shuffled), labels.npy in the same order, and a grid, one class a column."""
    images, labels = np.concatenate([*parts]), np.asarray(wanted)
    columns = min(GRID_COLUMNS, int(labels.max()) + 1)
    shown = [i for i in range(len(labels)) if labels[i] < columns][:columns * GRID_ROWS]
    grid(images[shown], columns).save(out / "grid.png")
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(images))
    np.savez(out / "samples.npz", arr_0=images[order])
    np.save(out / "labels.npy", labels[order])


def write_prompts(out: Path, parts: Iterable[np.ndarray], prompts: list[Prompt], params: SampleParams) -> None:
    """A folder or picture of each prompt, as the benchmark wants it, in `images`, and a grid of each tag;
    grid.png is of prompts without one."""
    stream = (image for part in parts for image in part)
    first: dict[str, list[np.ndarray]] = {}  # of each grid
    (out / "images").mkdir()
    for prompt in prompts:
        images = np.stack([*itertools.islice(stream, params.per_prompt)])
        write_images(params.layout, out / "images", prompt, images)
        tag = prompt.metadata.get("tag")
        usable = re.fullmatch(r"\w+", str(tag))
        name = "grid" if tag is None else f"grid-{tag if usable else 'other'}"
        first.setdefault(name, []).append(images[0])
    for name, shown in first.items():
        grid(np.stack(shown[:GRID_COLUMNS * GRID_ROWS]), GRID_COLUMNS).save(out / f"{name}.png")


if __name__ == "__main__":
    from pipeline.stages.sample import main as imported  # by name, so that Ray's workers import what they run

    run_stage(imported)
