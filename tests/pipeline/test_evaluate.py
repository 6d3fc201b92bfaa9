"""Evaluation in the workflow: whose name a figure carries, parts, baselines, and what the driver does without."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cluster import Cluster, work_through
from pipeline.demo import scenes
from pipeline.demo.geneval import DemoGenEval
from pipeline.metrics import Task, adm, features
from pipeline.metrics.geneval import GenEval
from pipeline.networks import Network
from pipeline.params import read_params
from pipeline.storage import Storage
from pixelgen.checkpoint import export
from pixelgen.config import ConfigError
from pixelgen.data.shards import describe_pieces, encode_shard, read_images
from pixelgen.generate import PixelGen
from pixelgen.metrics import fid
from pixelgen.metrics.colors import NAME as CLIP_NAME
from pixelgen.metrics.detector import NAME as DETECTOR_NAME
from pixelgen.store import LocalStore


def test_only_the_benchmark_s_own_networks_make_it_geneval():
    name = GenEval().name
    assert name(DETECTOR_NAME, CLIP_NAME) == "geneval"
    assert name("mask2former-1a2b3c4d", CLIP_NAME) == f"geneval_mask2former-1a2b3c4d_{CLIP_NAME}"
    assert name(DETECTOR_NAME, "clip-1a2b3c4d") == f"geneval_{DETECTOR_NAME}_clip-1a2b3c4d"
    assert DemoGenEval().name(DETECTOR_NAME, CLIP_NAME) == "geneval_demo", "whatever its judges are called"
    assert [judge.name for judge in DemoGenEval().judges(None, None)] == ["geometric", "scene-colors"]


def touch(folder, word):
    def work(part):
        assert not (folder / part["name"]).exists(), "done again"
        (folder / part["name"]).write_text(word)
    return work


@pytest.mark.parametrize(("parts", "workers"), [("a", 2), ("abc", 1)])
def test_what_one_worker_on_this_machine_does_needs_no_ray(tmp_path, monkeypatch, parts, workers):
    monkeypatch.setattr("pipeline.cluster.connect", lambda cluster: pytest.fail("Ray was started"))
    cluster = Cluster(None, workers, 0.5, 0, 1, 0, 1, None)
    (tmp_path / "b").write_text("done")
    for _ in range(2):
        work_through([{"name": name} for name in parts], touch, (tmp_path, "done"), cluster, "touch",
                     LocalStore(tmp_path))
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys({*parts, "b"}, "done")


def test_shuffled_scenes_are_of_another_prompt_of_the_tag(monkeypatch):
    """No model is drawn from here: the untrained one is in the end-to-end test."""
    prompts = [p for tag in scenes.all_prompts() for p in scenes.held_out(tag)[:3] for _ in range(2)]
    seen = []
    monkeypatch.setattr(scenes, "place", lambda prompt, random: seen.append(prompt) or [])

    class Untrained:
        def generate(self, wanted, seeds, *_, **__):
            assert len({*wanted}) == len(wanted) == len(seeds)
            return np.zeros((len(wanted), 8, 8, 3), np.uint8)

    monkeypatch.setattr(Task, "untrained", lambda task, device: Untrained())
    found = DemoGenEval().pictures(prompts, Task(read_params(), "geneval", None, None, None, None), "cpu")
    assert list(found) == ["rendered", "shuffled", "untrained"]
    assert seen[:len(prompts)] == prompts == found["rendered"][0] == found["shuffled"][0]
    others = seen[len(prompts):]
    assert all(a["tag"] == b["tag"] and a["prompt"] != b["prompt"] for a, b in zip(prompts, others, strict=True))
    assert len(found["untrained"][0]) == len(found["untrained"][1]) == len({p["prompt"] for p in prompts})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_untrained_model_is_sampled_as_the_trained_one(tmp_path, precision):
    """It is the model before the first step of training, made ready as an exported one is."""
    params = read_params()
    chosen = dataclasses.replace(params.sample["c2i"], precision=precision)
    params = dataclasses.replace(params, sample=params.sample | {"c2i": chosen})
    (tmp_path / "networks").mkdir()
    Storage(None).publish(tmp_path / "networks", "networks", {})
    networks = Storage(None).open(tmp_path / "networks", "networks")
    untrained = Task(params, "fid", None, networks, None, None).untrained("cpu")
    torch.manual_seed(params.train["c2i"].fit.seed)
    state = params.train["c2i"].denoiser.resolve().build().state_dict()
    export(tmp_path, params.train["c2i"].denoiser.resolve(), state, state, {})
    trained = PixelGen.from_pretrained(tmp_path, "ema", "cpu", precision)
    assert untrained.precision == trained.precision == precision and not untrained.denoiser.training
    ours, theirs = untrained.denoiser.state_dict(), trained.denoiser.state_dict()
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Makes the task of scoring some samples against a reference and held-out images, all of 8 pixels."""
    def make(drawn, kept, heldout, reference=None):
        whole, storage, random = read_params(), Storage(None), np.random.default_rng(0)
        samples, stored, data, networks = (
            tmp_path / "out" / name for name in ("sample/c2i", "reference/digits", "shard/digits", "networks"))
        for folder in (samples, stored, data, networks):
            folder.mkdir(parents=True)
        np.savez(samples / "samples.npz", random.integers(0, 256, (drawn, 8, 8, 3), np.uint8))
        np.save(samples / "labels.npy", np.zeros(drawn))
        storage.publish(samples, "samples", {}, images=drawn)
        fid.save_reference(stored / "reference.npz", reference or fid.Reference(
            np.zeros(3), np.eye(3), np.zeros(2), np.eye(2), random.integers(0, 256, (kept, 8, 8, 3), np.uint8)))
        storage.publish(stored, "reference", {}, images=kept)
        rows = [{"key": f"{n}", "image": png(random.integers(0, 256, (8, 8, 3), np.uint8)), "label": n % 10}
                for n in range(heldout)]
        (data / "a").write_bytes(shard := encode_shard(rows))
        shards = [{"path": "a", "rows": heldout, "size": 8, "pieces": describe_pieces(shard)}]
        storage.publish(data, "dataset", {}, sources={"digits": {"splits": {"heldout": {"shards": shards}}}})
        storage.publish(networks, "networks", {})
        return Task(whole, "fid", storage.open(samples, "samples"), storage.open(networks, "networks"),
                    storage.open(stored, "reference"), storage.open(data, "dataset"))

    monkeypatch.setattr(features, "extractor_of", lambda _: ("means", MeansNetwork()))
    monkeypatch.setattr(Task, "untrained", lambda task, device: Noise())
    return make


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


class Means:
    """Pool: mean of each channel. Spatial: two pixels. Logits: the largest value of each channel."""

    name = "means"

    def __call__(self, images):
        x = images.double()
        return {"pool": x.mean((2, 3)), "spatial": x[:, 0, :2, 0], "logits": x.amax((2, 3)) / 50}


class MeansNetwork(Network):
    def extractor(self, folder, device):
        return Means()


class Noise:
    """An untrained model: image i is of its seed and class alone."""

    def generate(self, wanted, seeds, sampler, batch_size):
        assert len(wanted) <= batch_size == 32
        return np.stack([np.random.default_rng([label, seed]).integers(0, 256, (8, 8, 3), np.uint8)
                         for label, seed in zip(wanted, seeds, strict=True)])


@pytest.mark.parametrize(("drawn", "kept", "heldout", "says"), [
    (3, 4, 4, "sample c2i has 3 images"), (4, 3, 4, "reference digits has 3 images"),
    (4, 4, 3, "the held-out split of digits, for baselines, has 3 images")])
def test_too_few_images_are_named_before_any_work(task, tmp_path, monkeypatch, drawn, kept, heldout, says):
    monkeypatch.setattr("pipeline.cluster.work_through", lambda *_: pytest.fail("work was done"))
    with pytest.raises(ConfigError, match=f"{says}, too few to score: at least 4 are needed"):
        suite(task(drawn, kept, heldout), LocalStore(tmp_path))


def suite(task, state, cluster=None):
    return task.evaluate.metric.score(task, state, cluster or ONE, None)


def numbers(found):
    return {name: value for name, value in found.items() if isinstance(value, float)}


ONE = Cluster(None, 1, 0.5, 0, 1, 0, 1, None)


def test_figures_are_those_of_all_images_however_they_are_cut(task, tmp_path, monkeypatch):
    """By the library's functions on all of them at once."""
    given = task(40, 30, 50)
    found = suite(given, LocalStore(tmp_path / "whole"))
    folder = tmp_path / "out"
    reference = fid.load_reference(folder / "reference/digits/reference.npz")
    drawn = Noise().generate([i % 10 for i in range(32)], range(32), None, 32), \
        Noise().generate([i % 10 for i in range(32, 50)], range(32, 50), None, 32)
    real = (images for images, _ in read_images(given.dataset.split("heldout")))
    sample, kept, heldout, untrained = (fid.extract(Means(), images, 100) for images in (
        fid.load_samples(folder / "sample/c2i/samples.npz"), reference.images, real, np.concatenate(drawn)))
    expected = fid.adm_suite(reference, kept.pool, sample, "means")
    expected["fd_means_floor"], expected["fd_means_ceiling"] = (
        fid.frechet_distance(reference.mu, reference.sigma, *fid.mean_and_covariance(of.pool))
        for of in (heldout, untrained))
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["extractor"] == "means" and found["reference"]["dataset"] == "digits"

    monkeypatch.setattr(adm, "PART", 37)
    assert [part["pieces"] for part in adm.plan_parts({"a": 40, "b": 30, "c": 0, "d": 5})] == [
        [("a", 0, 37)], [("a", 37, 40), ("b", 0, 30), ("d", 0, 4)], [("d", 4, 5)]]
    state = LocalStore(tmp_path / "parts")
    assert numbers(suite(given, state)) == pytest.approx(numbers(found))
    assert len(state.sizes("part-")) == 5  # 170 images
    state.delete("part-000002.npz")
    state.delete("figures.json")
    seen = []

    def counted(*given):
        seen.append(fid.extract(*given))
        return seen[-1]

    monkeypatch.setattr(features, "extract", counted)
    assert numbers(suite(given, state)) == pytest.approx(numbers(found))
    assert sum(len(found.pool) for found in seen) == 37, "finished parts are not done again"


def test_the_driver_of_fid_needs_no_gpu(task, tmp_path, monkeypatch):
    """Workers elsewhere have one; here, whatever asks for it fails."""
    def elsewhere(parts, make, arguments, cluster, *rest):
        *before, told = arguments
        assert told.device == "cuda"
        work_through(parts, make, (*before, ONE), ONE, *rest)

    monkeypatch.setattr("pipeline.cluster.work_through", elsewhere)
    remote = dataclasses.replace(ONE, gpus_per_worker=1, readers="self")
    assert suite(task(4, 4, 4), LocalStore(tmp_path), remote)["extractor"] == "means"


def test_a_reference_without_images_gives_no_precision(task, tmp_path):
    without = fid.Reference(np.zeros(3), np.eye(3), np.zeros(2), np.eye(2), None)
    found = suite(task(4, 0, 4, without), LocalStore(tmp_path))
    assert "fd_means" in found and "precision_means" not in found
