"""GenEval in the workflow: whose name a figure carries, and what the demo's baselines are."""

import numpy as np
import pytest
import torch

from pipeline.cluster import Cluster, work_through
from pipeline.datasets import scenes
from pipeline.judges import GeometricDetector, SceneColors
from pipeline.params import read_params
from pipeline.stages import evaluate
from pipeline.stages.evaluate import geneval_name, scene_baselines
from pipeline.storage import Storage
from pixelgen.config import ConfigError
from pixelgen.metrics import fid
from pixelgen.metrics.colors import NAME as CLIP_NAME
from pixelgen.metrics.detector import NAME as DETECTOR_NAME


def test_only_the_benchmark_s_own_networks_make_it_geneval():
    assert geneval_name(DETECTOR_NAME, CLIP_NAME) == "geneval"
    assert geneval_name("mask2former-1a2b3c4d", CLIP_NAME) == f"geneval_mask2former-1a2b3c4d_{CLIP_NAME}"
    assert geneval_name(DETECTOR_NAME, "clip-1a2b3c4d") == f"geneval_{DETECTOR_NAME}_clip-1a2b3c4d"
    assert geneval_name(GeometricDetector().name, SceneColors().name) == "geneval_demo"


def touch(folder, word):
    def work(part):
        (folder / part["name"]).write_text(word)
    return work


@pytest.mark.parametrize(("parts", "workers"), [("a", 2), ("abc", 1)])
def test_what_one_worker_on_this_machine_does_needs_no_ray(tmp_path, monkeypatch, parts, workers):
    monkeypatch.setattr("pipeline.cluster.connect", lambda cluster: pytest.fail("Ray was started"))
    cluster = Cluster(None, workers, 0.5, 0, 1, 0, 1, None)
    work_through([{"name": name} for name in parts], touch, (tmp_path, "done"), cluster, "touch")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(parts, "done")


def test_shuffled_scenes_are_of_another_prompt_of_the_tag(monkeypatch):
    """No model is drawn from here: the untrained one is in the end-to-end test."""
    prompts = [p for tag in scenes.all_prompts() for p in scenes.held_out(tag)[:3] for _ in range(2)]
    seen = []
    monkeypatch.setattr(scenes, "draw", lambda prompt, random: seen.append(prompt) or [])

    class Untrained:
        def generate(self, wanted, seeds, *_, **__):
            assert len({*wanted}) == len(wanted) == len(seeds)
            return np.zeros((len(wanted), 8, 8, 3), np.uint8)

    monkeypatch.setattr("pipeline.stages.evaluate.untrained", lambda *_: Untrained())
    whole = read_params()
    found = scene_baselines(whole, whole.evaluate["geneval"], prompts, None, torch.device("cpu"))
    assert list(found) == ["rendered", "shuffled", "untrained"]
    assert seen[:len(prompts)] == prompts == found["rendered"][0] == found["shuffled"][0]
    others = seen[len(prompts):]
    assert all(a["tag"] == b["tag"] and a["prompt"] != b["prompt"] for a, b in zip(prompts, others, strict=True))
    assert len(found["untrained"][0]) == len(found["untrained"][1]) == len({p["prompt"] for p in prompts})


@pytest.mark.parametrize(("drawn", "kept", "heldout", "says"), [
    (3, 4, 4, "sample c2i has 3 images"), (4, 3, 4, "reference digits has 3 images"),
    (4, 4, 3, "the held-out split of digits, for baselines, has 3 images")])
def test_too_few_images_are_named_before_any_work(tmp_path, monkeypatch, drawn, kept, heldout, says):
    whole, storage = read_params(), Storage(None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "load_extractor", lambda *_: None)
    samples, reference, data = (tmp_path / "out" / name for name in ("sample/c2i", "reference/digits", "shard/digits"))
    for folder in (samples, reference, data):
        folder.mkdir(parents=True)
    np.savez(samples / "samples.npz", np.zeros((drawn, 8, 8, 3), np.uint8))
    np.save(samples / "labels.npy", np.zeros(drawn))
    storage.publish(samples, "samples", {})
    fid.save_reference(reference / "reference.npz", fid.Reference(
        np.zeros(3), np.eye(3), np.zeros(2), np.eye(2), np.zeros((kept, 8, 8, 3), np.uint8)))
    storage.publish(reference, "reference", {})
    (data / "a").touch()
    shards = [{"path": "a", "rows": heldout, "size": 8}]
    storage.publish(data, "dataset", {}, sources={"digits": {"splits": {"heldout": {"shards": shards}}}})
    with pytest.raises(ConfigError, match=f"{says}, too few to score: at least 4 are needed"):
        evaluate.fid(whole, whole.evaluate["fid"], storage, storage.open(samples, "samples"), tmp_path, "cpu")
