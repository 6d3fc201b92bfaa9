"""sample: images of every class, or of every prompt, from a trained model.

Ray Data actors draw parts, each written whole, so that finished ones survive an interruption.
"""

import io
import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.cluster import Cluster, read_cluster, work_through
from pipeline.params import NONE, SampleParams, read_params, stage_params
from pipeline.runs import lease, run_directory, run_stage
from pipeline.storage import MANIFEST, fresh_directory, publish, read_manifest, sha256, write_atomic
from pixelgen.generate import PixelGen
from pixelgen.images import grid
from pixelgen.prompts import Prompt, write_images

MODELS, PROMPTS, TEXT, OUT = Path("out/train"), Path("out/prompts"), Path("out/weights/text"), Path("out/sample")
SHUFFLE_SEED = 0  # of the order in samples.npz; sorted by class, a split of the Inception Score would see few
GRID_COLUMNS, GRID_ROWS = 10, 10
COMPUTED = 32  # samples that the network always sees at once: no byte depends on the size of a part


@dataclass(frozen=True)
class Part:
    """Some images, the unit of work and of resumption."""

    path: str
    wanted: list  # labels or prompts
    seeds: list[int]


def main() -> None:
    key = sys.argv[1]
    whole, cluster = read_params(), read_cluster()
    params = stage_params(whole.sample, key, "sample")
    model = MODELS / params.model / "model"
    read_manifest(model, "model")
    inputs = [params, sha256(model / MANIFEST)]
    prompts: list[Prompt] = []
    if params.prompts == NONE:
        wanted: list = [*range(whole.train[params.model].denoiser.num_classes or 0)] * params.per_prompt
    else:
        read_manifest(PROMPTS / params.prompts, "prompts")
        prompts = load_prompts(PROMPTS / params.prompts / "prompts.jsonl")
        wanted = [prompt.text for prompt in prompts for _ in range(params.per_prompt)]
        read_manifest(TEXT.parent, "weights")
        inputs += [wanted, *(sha256(path) for path in sorted(TEXT.iterdir()))]
    directory = run_directory("sample", key, *inputs).resolve()
    parts = plan_parts(params, wanted, directory)
    with lease(directory / "driver.lease", patience=5):
        missing = [p for p in parts if not Path(p.path).exists()]
        if missing:
            arguments = params, model.resolve(), TEXT.resolve() if prompts else None, cluster
            work_through([vars(p) for p in missing], Artist, arguments, cluster, "sample")
        out = fresh_directory(OUT / key)
        if prompts:
            write_prompts(out, parts, prompts, params)
        else:
            write_classes(out, parts)
        publish(out, "samples", params, images=len(wanted))


def load_prompts(path: Path) -> list[Prompt]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [Prompt(line.pop("name"), line["prompt"], line) for line in lines]


def plan_parts(params: SampleParams, wanted: list, directory: Path) -> list[Part]:
    """Image i is of `wanted[i]` and has the seed SEED + i, whatever the size of the parts."""
    numbers = [range(i, min(i + params.part_size, len(wanted))) for i in range(0, len(wanted), params.part_size)]
    return [Part(str(directory / f"part-{n:06d}.npy"), [wanted[i] for i in r], [params.seed + i for i in r])
            for n, r in enumerate(numbers)]


class Artist:
    """What an actor does: it holds the model, and draws parts, each written whole."""

    def __init__(self, params: SampleParams, model: Path, text: Path | None, cluster: Cluster):
        torch.set_num_threads(cluster.threads_per_worker)
        self.params = params
        self.model = PixelGen.from_pretrained(model, params.weights, cluster.device, params.precision, params.compile,
                                              text)

    def __call__(self, part: dict[str, Any]) -> None:
        images = self.model.generate(part["wanted"], part["seeds"], self.params.sampler, COMPUTED,
                                     self.params.negative)
        data = io.BytesIO()
        np.save(data, images)
        write_atomic(Path(part["path"]), data.getvalue())


def write_classes(out: Path, parts: list[Part]) -> None:
    """samples.npz (`arr_0`, NHWC uint8, shuffled), labels.npy in the same order, and a grid, one class a column."""
    images = np.concatenate([np.load(p.path, allow_pickle=False) for p in parts])
    labels = np.concatenate([p.wanted for p in parts])
    columns = min(GRID_COLUMNS, int(labels.max()) + 1)
    shown = [i for i in range(len(labels)) if labels[i] < columns][:columns * GRID_ROWS]
    grid(images[shown], columns).save(out / "grid.png")
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(images))
    np.savez(out / "samples.npz", arr_0=images[order])
    np.save(out / "labels.npy", labels[order])


def write_prompts(out: Path, parts: list[Part], prompts: list[Prompt], params: SampleParams) -> None:
    """A folder or picture of each prompt, as the benchmark wants it, in `images`, and a grid of each tag."""
    stream = (image for p in parts for image in np.load(p.path, allow_pickle=False))
    first: dict[str, list[np.ndarray]] = {}
    (out / "images").mkdir()
    for prompt in prompts:
        images = np.stack([*itertools.islice(stream, params.per_prompt)])
        write_images(params.layout, out / "images", prompt, images)
        tag = str(prompt.metadata.get("tag"))
        first.setdefault(tag if re.fullmatch(r"\w+", tag) else "other", []).append(images[0])
    for tag, shown in first.items():
        grid(np.stack(shown[:GRID_COLUMNS * GRID_ROWS]), GRID_COLUMNS).save(out / f"grid-{tag}.png")


if __name__ == "__main__":
    from pipeline.stages.sample import main as imported  # by name, so that Ray's workers import what they run

    run_stage(imported)
