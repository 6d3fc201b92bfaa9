"""GenEval's rules, relations, overlaps, crops and score against golden numbers."""

import re

import numpy as np
import pytest

from pixelgen.metrics.geneval import COLORS, TEMPLATES, Rules, crop, judge, overlap, relations, score
from tests.parity.conftest import read_arrays, read_json

LISTED, CROPS = read_json("geneval_cases.json"), read_arrays("geneval_crops.npz")
SUMMARY = read_json("geneval_summary.json")
CASES = LISTED.get("cases", [])
CROP_NUMBERS = sorted({int(m[1]) for name in CROPS if (m := re.match(r"crop(\d+)_image$", name))})


def test_cases_were_found():
    assert CASES and CROP_NUMBERS
    assert LISTED["relative_position"] and LISTED["compute_iou"]
    assert SUMMARY["results"]


@pytest.mark.parametrize("case", CASES, ids=[f"{c['id']} {c['name']}" for c in CASES])
def test_verdicts(case):
    boxes = {name: np.array(found, np.float32).reshape(-1, 5) for name, found in case["detections"].items()}

    def colors(name, objects):
        """The recorded answers for these very detections, wherever they stand after sorting."""
        return [case["colors"][name][int(np.flatnonzero((boxes[name] == box).all(1))[0])] for box in objects]

    verdict = judge(case["metadata"], boxes, colors, Rules(**case["options"]))
    expected = case["expected"]
    assert (verdict.correct, verdict.reason) == (expected["correct"], expected["reason"])
    assert {name: found.tolist() for name, found in verdict.kept.items()} == expected["kept"]


def test_the_defaults_are_the_benchmarks():
    assert Rules() == Rules(**LISTED["default_options"])
    assert list(COLORS) == LISTED["colors_in_order"]
    assert [t.format(color="{color}", name="{classname}") for t in TEMPLATES] == LISTED["color_prompt_templates"]


@pytest.mark.parametrize("case", LISTED.get("relative_position", []))
def test_relations(case):
    assert sorted(relations(case["box_a"], case["box_b"], case["position_threshold"])) == sorted(case["relations"])


@pytest.mark.parametrize("case", LISTED.get("compute_iou", []))
def test_overlap(case):
    a, b = (np.array(case[k], np.float32) for k in ("box_a", "box_b"))
    assert overlap(a, b) == pytest.approx(case["iou"], abs=1e-6)


@pytest.mark.parametrize("number", CROP_NUMBERS)
def test_crops(number):
    image, mask, box = (CROPS[f"crop{number}_{k}"] for k in ("image", "mask", "box"))
    assert np.array_equal(crop(image, box, mask), CROPS[f"crop{number}_masked"])
    assert np.array_equal(crop(image, box, None), CROPS[f"crop{number}_unmasked"])


def test_score():
    found, expected = score(SUMMARY["results"]), SUMMARY["expected"]
    assert found["overall"] == pytest.approx(expected["overall"], abs=1e-9)
    for ours, theirs in (("image_accuracy", "image_accuracy"), ("prompt_accuracy", "prompt_accuracy"),
                         ("images", "total_images"), ("prompts", "total_prompts")):
        assert found[ours] == pytest.approx(expected[theirs], abs=1e-9)
    for tag, numbers in expected["per_task"].items():
        assert found[tag] == pytest.approx(numbers["score"], abs=1e-9)
