"""sample: images of every class, or of every prompt, from a trained model.

Ray Data actors draw parts, each written whole, so that finished ones survive an interruption.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cluster import Cluster, work_through
from pipeline.params import NONE, SampleParams
from pipeline.parts import read_part, write_array
from pipeline.runs import working
from pipeline.stage import Stage
from pipeline.storage import Artifact, fresh_directory, run_name
from pixelgen.config import plain
from pixelgen.generate import BATCH, PixelGen
from pixelgen.images import grid
from pixelgen.npz import Stream, write_npz
from pixelgen.prompts import Prompt, write_images
from pixelgen.store import Store

SHUFFLE_SEED = 0  # of the order in samples.npz; sorted by class, a split of the Inception Score would see few
GRID_COLUMNS, GRID_ROWS = 10, 10
AT_ONCE = 32  # prompts whose pictures are in memory


@dataclass(frozen=True)
class Part:
    """Some images, the unit of work and of resumption."""

    name: str
    labels_or_prompts: list
    seeds: list[int]


def run(stage: Stage) -> None:
    params: SampleParams = stage.own
    cluster, storage = stage.cluster, stage.storage
    torch.set_num_threads(cluster.threads_per_worker)  # this process draws as a worker does, where there is only one
    model, networks = stage.open("train", params.model), None
    told = {name: value for name, value in plain(params).items() if name not in ("model", "prompts")}
    inputs = [told, model.identity]  # which model it is, not what it is called
    prompts: list[Prompt] = []
    if params.prompts == NONE:
        classes = stage.params.train[params.model].denoiser.num_classes or 0
        labels_or_prompts: list = [*range(classes)] * params.per_prompt
        order = np.random.default_rng(SHUFFLE_SEED).permutation(len(labels_or_prompts)).tolist()
    else:
        prompts = load_prompts(stage.open("prompts", params.prompts).local() / "prompts.jsonl")
        labels_or_prompts = [prompt.text for prompt in prompts for _ in range(params.per_prompt)]
        order = [*range(len(labels_or_prompts))]
        networks = stage.open("networks")
        inputs += [labels_or_prompts, *networks.part("text")]
    directory = stage.run_directory(*inputs)
    state, parts = storage.run(directory), plan_parts(params, labels_or_prompts, order)
    with working(directory):
        work_through([vars(part) for part in parts], SampleWorker, (params, model, networks, state, cluster),
                     cluster, "sample", state)
        images = (read_part(state, part.name) for part in parts)
        out = fresh_directory(stage.out)
        if prompts:
            write_prompts(out, images, prompts, params)
        else:
            write_classes(out, images, labels_or_prompts, order)
        drawn = {"weights": params.weights, "sampler": plain(params.sampler), "seed": params.seed,
                 "precision": params.precision}  # what figures of these samples state
        storage.publish(out, "samples", params, images=len(labels_or_prompts), drawn=drawn, run=run_name(directory))


def load_prompts(path: Path) -> list[Prompt]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [Prompt(line.pop("name"), line["prompt"], line) for line in lines]


def plan_parts(params: SampleParams, labels_or_prompts: Sequence, order: Sequence[int]) -> list[Part]:
    """Image i is of `labels_or_prompts[i]` and has the seed SEED + i. Images are drawn in this order, in which they are
    written: neither it nor the size of the parts changes one of them."""
    numbers = [order[i:i + params.part_size] for i in range(0, len(order), params.part_size)]
    return [Part(f"part-{n:06d}.npy", [labels_or_prompts[i] for i in chosen], [params.seed + i for i in chosen])
            for n, chosen in enumerate(numbers)]


class SampleWorker:
    """What an actor does: it holds the model, and draws parts, each written whole."""

    def __init__(self, params: SampleParams, model: Artifact, networks: Artifact | None, state: Store,
                 cluster: Cluster):
        self.params, self.state = params, state
        self.model = PixelGen.from_pretrained(model.local(), params.weights, cluster.device, params.precision,
                                              params.compile, networks.local() / "text" if networks else None)

    def __call__(self, part: dict[str, Any]) -> None:
        images = self.model.generate(part["labels_or_prompts"], part["seeds"], self.params.sampler, BATCH,
                                     self.params.negative)
        write_array(self.state, part["name"], images)


def write_classes(out: Path, parts: Iterable[np.ndarray], labels: Sequence[int], order: Sequence[int]) -> None:
    """samples.npz (`arr_0`, NHWC uint8, in `order`, so that no split of the Inception Score sees few classes),
    labels.npy in the same order, and a grid, one class a column. In memory is never more than a part, and the grid."""
    columns = min(GRID_COLUMNS, max(labels) + 1)
    shown = [i for i in range(len(labels)) if labels[i] < columns][:columns * GRID_ROWS]
    tiles: dict[int, np.ndarray] = dict.fromkeys(shown, np.empty(0))

    def passing() -> Iterator[np.ndarray]:
        places = iter(order)
        for part in parts:
            tiles.update((i, image.copy()) for i, image in zip(itertools.islice(places, len(part)), part, strict=True)
                         if i in tiles)
            yield part

    rows = passing()
    first = next(rows)
    write_npz(out / "samples.npz", {"arr_0": Stream((len(order), *first.shape[1:]), first.dtype,
                                                    itertools.chain([first], rows))})
    np.save(out / "labels.npy", np.asarray(labels)[order])
    grid(np.stack([*tiles.values()]), columns).save(out / "grid.png")


def write_prompts(out: Path, parts: Iterable[np.ndarray], prompts: list[Prompt], params: SampleParams) -> None:
    """A folder or picture of each prompt, as the benchmark wants it, in `images`, and a grid of each tag;
    grid.png is of prompts without one. Threads compress the pictures of a few prompts at a time."""
    stream = (image for part in parts for image in part)
    first: dict[str, list[np.ndarray]] = {}  # of each grid
    (out / "images").mkdir()

    def write(prompt: Prompt, images: np.ndarray) -> None:
        write_images(params.layout, out / "images", prompt, images)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(prompts), AT_ONCE):
            here = prompts[start:start + AT_ONCE]
            drawn = [np.stack([*itertools.islice(stream, params.per_prompt)]) for _ in here]
            for prompt, images in zip(here, drawn, strict=True):
                tag = prompt.metadata.get("tag")
                usable = re.fullmatch(r"\w+", str(tag))
                tiles = first.setdefault("grid" if tag is None else f"grid-{tag if usable else 'other'}", [])
                if len(tiles) < GRID_COLUMNS * GRID_ROWS:
                    tiles.append(images[0].copy())
            for _ in pool.map(write, here, drawn):
                pass
    for name, tiles in first.items():
        grid(np.stack(tiles), GRID_COLUMNS).save(out / f"{name}.png")

