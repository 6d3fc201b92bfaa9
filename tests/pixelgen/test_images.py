"""Pixels to numbers and back, and crops."""

import numpy as np
import pytest
import torch
from PIL import Image

from pixelgen.images import adm_crop, adm_resize, center_crop, grid, plain_crop, to_float, to_uint8


def test_uint8_to_float_and_back_is_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    assert floats.dtype == torch.float32 and floats[0] == -1 and floats[-1] == 1
    assert torch.equal(to_uint8(floats), levels)
    assert torch.equal(to_uint8(floats.double()), levels)


def test_to_uint8_rounds_to_the_nearest_level_and_clips():
    half = 0.5 / 127.5
    around = to_float(torch.arange(1, 255, dtype=torch.uint8))
    for shift, level in ((0.98 * half, 0), (-0.98 * half, 0), (1.02 * half, 1), (-1.02 * half, -1)):
        assert torch.equal(to_uint8(around + shift), (torch.arange(1, 255) + level).to(torch.uint8))
    assert to_uint8(torch.tensor([-7.0, 7.0, -torch.inf, torch.inf])).tolist() == [0, 255, 0, 255]


def test_nan_is_no_pixel():
    with pytest.raises(ValueError, match="NaN"):
        to_uint8(torch.tensor([0.0, torch.nan]))


@pytest.mark.parametrize("width", [9, 31, 32, 33, 64, 65, 130])
@pytest.mark.parametrize("height", [10, 31, 32, 63, 97])
def test_crop_is_a_square_of_the_size_asked_for(width, height):
    image = Image.new("RGB", (width, height), (10, 200, 30))
    resized = adm_resize(image, 32)
    assert min(resized.size) == 32
    pixels = adm_crop(image, 32)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    assert (pixels == (10, 200, 30)).all()


@pytest.mark.parametrize(("width", "height"), [(32, 32), (64, 96), (97, 160), (200, 50), (16, 20), (35, 32),
                                               (32, 37), (39, 32)])
def test_plain_crop_is_that_of_torchvision(width, height):
    from torchvision.transforms import v2

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    expected = v2.Compose([v2.Resize(32, v2.InterpolationMode.BILINEAR), v2.CenterCrop(32)])(image)
    assert np.array_equal(plain_crop(image, 32), expected)


@pytest.mark.parametrize(("width", "height", "left", "top"), [(8, 4, 2, 0), (7, 4, 1, 0), (4, 9, 0, 2), (4, 4, 0, 0)])
def test_center_crop_is_in_the_middle(width, height, left, top):
    pixels = np.arange(width * height, dtype=np.uint8).reshape(height, width)
    cropped = np.asarray(center_crop(Image.fromarray(pixels), 4))
    assert np.array_equal(cropped, pixels[top:top + 4, left:left + 4])


def test_grid_places_images_row_by_row():
    images = np.stack([np.full((4, 6, 3), level, np.uint8) for level in (10, 20, 30)])
    picture = np.asarray(grid(images, columns=2))
    assert picture.shape == (10, 14, 3)
    assert np.array_equal(picture[:4, :6], images[0])
    assert np.array_equal(picture[:4, 8:], images[1])
    assert np.array_equal(picture[6:, :6], images[2])
    assert (picture[4:6] == 255).all() and (picture[:, 6:8] == 255).all() and (picture[6:, 8:] == 255).all()
