"""The demo's scenes: their prompts, their pixels, and that the detector sees what was drawn."""

import itertools

import numpy as np
import pytest

from pipeline.datasets import DatasetParams
from pipeline.demo import scenes
from pipeline.demo.geometric import GeometricDetector, SceneColors
from pixelgen.metrics.geneval import TAGS, judge_image, score

SOURCE = scenes.Scenes({"short": 0.5, "long": 0.5}, 200, 0.5)
DATA = DatasetParams({"scenes": SOURCE}, (32, 64), "adm", "png", 64, 0.0, 0.0, 64.0, 7)


def test_what_is_held_out_is_never_trained_on():
    assert list(scenes.all_prompts()) == list(TAGS)
    combinations = {scenes.named(p["include"][0]) for p in scenes.held_out("colors")}
    for tag in TAGS[1:]:
        held, used = ({p["prompt"] for p in prompts} for prompts in (scenes.held_out(tag), scenes.trained(tag)))
        assert held and used and not held & used
        assert not any(scenes.named(thing) in combinations for p in scenes.trained(tag) for thing in p["include"])
    colors = scenes.trained("colors")
    assert {p["include"][0]["class"] for p in colors} == set(scenes.SHAPES)
    assert {p["include"][0]["color"] for p in colors} == set(scenes.COLORS)


def test_captions_are_of_training_prompts_alone():
    used = {p["prompt"].removeprefix(scenes.PHOTO) for tag in TAGS for p in scenes.trained(tag)}
    items = SOURCE.listing(DATA)[1]
    assert len(items) == 200
    for item in items:
        short, long = SOURCE.load(DATA, item).captions
        assert short in used and long == f"a photo of {short} on grey"


def test_a_scene_is_a_function_of_its_key():
    first, again = (np.asarray(SOURCE.load(DATA, SOURCE.listing(DATA)[1][3]).image) for _ in range(2))
    assert first.shape == (64, 64, 3) and np.array_equal(first, again)


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("size", [32, 64])
def test_the_detector_sees_what_was_drawn_and_nothing_else(tag, size):
    """Every prompt (a part of the many of color_attr) on its own scene, and on that of the next prompt."""
    prompts = scenes.all_prompts()[tag][::9 if tag == "color_attr" else 1]
    random = np.random.default_rng(1)
    pictures = [np.asarray(scenes.render(scenes.place(p, random), size, random)) for p in prompts]
    judges = GeometricDetector(), SceneColors()

    def right(prompts):
        return [judge_image(image, p, *judges).correct for image, p in zip(pictures, prompts, strict=True)]

    assert np.mean(right(prompts)) >= (0.99 if size == 64 else 0.85)
    assert np.mean(right(prompts[1:] + prompts[:1])) <= 0.1


def test_a_blurred_or_empty_image_shows_nothing():
    grey = np.full((64, 64, 3), 200, np.uint8)
    assert GeometricDetector()(grey) == {}
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert sum(len(found.boxes) for found in GeometricDetector()(noise).values()) == 0


def test_boxes_are_where_the_things_are():
    random = np.random.default_rng(2)
    things = scenes.place(scenes.all_prompts()["color_attr"][40], random)
    found = GeometricDetector()(np.asarray(scenes.render(things, 64, random)))
    for thing in things:
        (box,) = found[thing.shape].boxes
        assert np.abs(box[:4] - 64 * np.array(thing.box)).max() <= 1.5 and 0.9 < box[4] <= 1
        assert found[thing.shape].masks.shape == (1, 64, 64)


def test_the_grammar_is_geneval_s():
    """Every line has what the benchmark's own has."""
    for tag, prompts in scenes.all_prompts().items():
        assert len({p["prompt"] for p in prompts}) == len(prompts)
        for p in prompts:
            assert p["tag"] == tag and p["prompt"].startswith("a photo of ")
            assert ("exclude" in p) == (tag == "counting")
            assert all({"class", "count"} <= w.keys() for w in itertools.chain(p["include"], p.get("exclude", [])))
    assert score([{"tag": "single_object", "correct": True, "metadata": "x"}])["overall"] == 1
