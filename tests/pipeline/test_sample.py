"""What the sample stage writes, and how much memory its driver, and that of reference, needs for it."""

import dataclasses
import subprocess
import sys

import numpy as np
from PIL import Image

from pipeline.params import read_params
from pipeline.stages.sample import plan_parts, write_classes, write_prompts
from pixelgen.images import grid
from pixelgen.prompts import Prompt
from tests.security.hostile import ROOT


def test_a_grid_of_each_tag_and_one_of_prompts_without(tmp_path):
    params = dataclasses.replace(read_params().sample["geneval"], per_prompt=1)
    metadata = [{"tag": "colors"}, {}, {"tag": None}, {"tag": "../x"}, {"tag": "colors"}]
    prompts = [Prompt(str(n), "a dog", described) for n, described in enumerate(metadata)]
    write_prompts(tmp_path, [np.zeros((5, 8, 8, 3), np.uint8)], prompts, params)
    assert {p.name for p in tmp_path.glob("*.png")} == {"grid.png", "grid-colors.png", "grid-other.png"}


def test_every_prompt_gets_its_own_images_however_they_come(tmp_path):
    """Of more prompts than are written at a time, and than a grid shows."""
    params = dataclasses.replace(read_params().sample["geneval"], per_prompt=2)
    prompts = [Prompt(f"{n:05}", f"{n} dogs", {"prompt": f"{n} dogs"}) for n in range(110)]
    images = np.random.default_rng(0).integers(0, 256, (220, 8, 8, 3), np.uint8)
    write_prompts(tmp_path, np.split(images, [3, 50, 51, 200]), prompts, params)
    for n, prompt in enumerate(prompts):
        for k in range(2):
            picture = np.asarray(Image.open(tmp_path / "images" / prompt.name / "samples" / f"{k:04}.png"))
            assert np.array_equal(picture, images[2 * n + k])
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(grid(images[:200:2], 10)))


def test_images_of_classes_are_shuffled_and_keep_their_labels_and_seeds(tmp_path):
    params = dataclasses.replace(read_params().sample["c2i"], seed=100, part_size=7)
    labels = [*range(12)] * 3
    order = np.random.default_rng(0).permutation(36).tolist()
    parts = plan_parts(params, labels, order)
    assert [part.name for part in parts] == [f"part-{n:06d}.npy" for n in range(6)]
    images = np.random.default_rng(1).integers(0, 256, (36, 8, 8, 3), np.uint8)
    assert sorted(seed for part in parts for seed in part.seeds) == [*range(100, 136)]
    assert all(labels[seed - 100] == label for part in parts
               for seed, label in zip(part.seeds, part.labels_or_prompts, strict=True))
    write_classes(tmp_path, (np.stack([images[seed - 100] for seed in part.seeds]) for part in parts), labels, order)
    assert np.array_equal(np.load(tmp_path / "samples.npz")["arr_0"], images[order])
    assert np.array_equal(np.load(tmp_path / "labels.npy"), np.asarray(labels)[order])
    shown = images[[i for i in range(36) if labels[i] < 10]]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(grid(shown, 10)))


MEMORY = """
import io, resource, sys
from pathlib import Path
import numpy as np
from pipeline.stages import reference, sample
from pipeline.storage import read_sealed, write_sealed
from pixelgen.metrics import fid
from pixelgen.npz import write_npz
from pixelgen.store import LocalStore

out, count, each = Path(sys.argv[1]), int(sys.argv[2]), 100
state, names = LocalStore(out / "run"), []

def saved(save, what):
    data = io.BytesIO()
    save(data, what)
    return data.getvalue()

for start in range(0, count, each):
    images = saved(np.save, np.random.default_rng(start).integers(0, 256, (each, 64, 64, 3), np.uint8))
    write_sealed(state, f"part-{start:09}.npy", images)
    write_sealed(state, f"kept-{start:09}-000000.npy", images)
    names.append(f"part-{start:09}.npz")
    moments = {"count": np.array(each), "mean": np.zeros(300), "scatter": np.eye(300)}
    write_sealed(state, names[-1], saved(write_npz, {"extractor": np.array("means")} | {
        f"{of}_{name}": array for of in ("pool", "spatial") for name, array in moments.items()}))
parts = (np.load(io.BytesIO(read_sealed(state, name.replace("npz", "npy")))) for name in names)
sample.write_classes(out, parts, [0] * count, range(count))
extractor, found = reference.merged(state, names)
fid.save_reference(out / "reference.npz", found, reference.kept_images(state, count))
assert len(fid.load_reference(out / "reference.npz").images) == count
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_the_drivers_memory_does_not_grow_with_the_images(tmp_path):
    """The images take 6 and 61 MB."""
    peaks = []
    for count in (500, 5000):
        (folder := tmp_path / str(count)).mkdir()
        done = subprocess.run([sys.executable, "-c", MEMORY, folder, str(count)], cwd=ROOT, capture_output=True,
                              text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    assert abs(peaks[1] - peaks[0]) < 12, f"{peaks} MB"
