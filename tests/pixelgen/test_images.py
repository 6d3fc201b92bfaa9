"""Pixels to numbers and back, and crops."""

import hashlib

import numpy as np
import pytest
import torch
from PIL import Image

from pixelgen.images import adm_crop, adm_resize, center_crop, grid, plain_crop, resize, to_float, to_uint8


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


@pytest.mark.parametrize(("width", "height", "adm", "plain"), [
    (53, 37, "dc8676b42e0874ad", "e35e4379c6b10fab"), (131, 200, "5f9c46dc542ece72", "3d41d2513d406d45"),
    (33, 97, "b189fb179fe430d5", "d7bb76f2ded7beb4"), (47, 150, "543d8adc687c658b", "297be6ea9c3292bd"),
    (65, 2000, "606de55ca9e3da29", "deacfc13cf7dae15"), (2000, 65, "79023df5e1039677", "e7b69266eabc2db4"),
    (20, 90, "5d01c95cd47fb392", "e70119e518d0f6b7"), (500, 1333, "561c372bf991db34", "23ce60e471a0c3ce")])
def test_crops_are_the_same_bytes_with_every_pillow(width, height, adm, plain):
    """Recorded with Pillow 11.3 and 12.3. Left to itself, 13.0 begins with the height of four of these."""
    y, x = np.mgrid[:height, :width]
    pixels = (x * x + 3 * x * y + 7 * y * y)[..., None] + np.array([0, 50, 100])
    image = Image.fromarray((pixels % 256).astype(np.uint8))
    for crop, digest in ((adm_crop, adm), (plain_crop, plain)):
        assert hashlib.sha256(crop(image, 32).tobytes()).hexdigest()[:16] == digest


def test_the_width_is_resized_first():
    """(0, 1) over (2, 1): rounded after each pass, 1 and 2 make 2; the other way round 1 and 1 would make 1."""
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8))
    assert resize(image, (1, 1), Image.Resampling.BOX).getpixel((0, 0)) == 2


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
