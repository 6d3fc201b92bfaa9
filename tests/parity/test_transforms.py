"""Resizes, crops and the conversions between uint8 and float against golden numbers."""

import numpy as np
import pytest
import torch
from PIL import Image

from pixelgen.images import adm_crop, adm_resize, center_crop, to_float, to_uint8
from tests.parity.conftest import assert_close, each, read_arrays, read_json, unlisted

LISTED, ARRAYS = read_json("transforms.json"), read_arrays("transforms.npz")
CASES = LISTED.get("images", [])


def test_cases_were_found():
    assert CASES


def test_every_array_is_of_a_listed_case():
    assert not unlisted(ARRAYS, r"(?!quant_|dequant_)([^_]+)_", CASES)


def assert_same_pixels(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype == np.uint8
    assert_close(actual, expected, atol=0)


@each(CASES)
def test_crops(case):
    size, key = LISTED["image_size"], case["key"]
    pixels = ARRAYS[f"{key}_input"]
    assert pixels.shape == (case["height"], case["width"], 3)
    image = Image.fromarray(pixels)
    resized = adm_resize(image, size)
    assert resized.size == (case["resized_width"], case["resized_height"])
    assert_same_pixels(adm_crop(image, size), ARRAYS[f"{key}_imagenet"])
    assert_same_pixels(np.asarray(resized), ARRAYS[f"{key}_blip3o_resized"])
    assert_same_pixels(np.asarray(center_crop(resized, size)), ARRAYS[f"{key}_blip3o"])
    assert np.array_equal(ARRAYS[f"{key}_imagenet"], ARRAYS[f"{key}_blip3o"]) == case["the_two_agree"]


@pytest.mark.parametrize("name", ["quant", "quant_image"])
def test_to_uint8(name):
    actual = to_uint8(torch.from_numpy(ARRAYS[f"{name}_input"]))
    assert actual.dtype == torch.uint8
    assert_close(actual, ARRAYS[f"{name}_fp2uint8"])


def test_to_float():
    actual = to_float(torch.from_numpy(ARRAYS["dequant_input"]))
    assert actual.dtype == torch.float32
    assert_close(actual, ARRAYS["dequant_uint82fp"], 1e-6)
