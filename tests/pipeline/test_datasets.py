"""The sources: what they list, what they refuse as a whole, and what becomes of every kind of file."""

import dataclasses
import errno
import hashlib
import io
import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.datasets import DatasetError, Item, Rejected, decoding, files
from pipeline.demo import digits
from pixelgen.images import adm_crop
from tests.pipeline.folders import folder_params, listing, load_item, make_bad, make_good, make_plain, only, picture

# ------------------------------------------------------------------------------------------------------ digits


def test_digits_have_three_disjoint_splits_that_never_change():
    splits = {name: digits.members(name) for name in ("train", "judge", "heldout")}
    assert [len(part) for part in splits.values()] == [950, 550, 297]
    assert sorted(np.concatenate([*splits.values()]).tolist()) == list(range(1797))
    for name, each in (("train", 95), ("judge", 55)):
        assert np.bincount(digits.bundled()[1][splits[name]]).tolist() == [each] * 10
    golden = {name: hashlib.sha256(part.astype("<i8").tobytes()).hexdigest()[:8] for name, part in splits.items()}
    assert golden == {"train": "d7536c91", "judge": "93c4dd73", "heldout": "cde9d34c"}


def test_digits_list_train_and_heldout_but_never_judge():
    classes, items = digits.Digits().listing(None)
    assert classes == [str(n) for n in range(10)]
    assert len({item.key for item in items}) == len(items) == 950 + 297
    for split in ("train", "heldout"):
        indices = [int(item.key) for item in items if item.split == split]
        assert indices == digits.members(split).tolist()
        assert [item.label for item in items if item.split == split] == digits.bundled()[1][indices].tolist()
    assert items[0].key == f"{digits.members('train')[0]:04}"


def test_digits_give_the_pixels_of_their_shards():
    images, labels = digits.digits("heldout", 32)
    items = [item for item in digits.Digits().listing(None)[1] if item.split == "heldout"]
    assert images.shape == (297, 32, 32, 3) and images.dtype == np.uint8
    assert labels.tolist() == [item.label for item in items]
    assert (images[5] == adm_crop(digits.Digits().load(None, items[5]).image, 32)).all()


def test_digits_use_the_whole_range_of_grey():
    grey = np.stack([np.asarray(digits.image(index)) for index in range(20)])
    assert grey.min() == 0 and grey.max() == 255 and (grey[..., 0] == grey[..., 2]).all()
    assert (grey[..., 0] == np.round(digits.bundled()[0][:20] * 255 / 16)).all()


# ------------------------------------------------------------------------------------- a folder: what it lists


def test_labels_follow_the_names_of_the_folders(tmp_path):
    for name in ("n02", "n01", "Ωmega", "n10/deep/er"):
        (tmp_path / name).mkdir(parents=True)
        picture(0).save(tmp_path / name / "a.png")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "SHA256SUMS").touch()
    classes, items = listing(folder_params(tmp_path))
    assert classes == ["n01", "n02", "n10", "Ωmega"]
    assert [(i.key, i.label) for i in items] == [("n01/a.png", 0), ("n02/a.png", 1), ("n10/deep/er/a.png", 2),
                                                 ("Ωmega/a.png", 3)]
    stat = os.stat(tmp_path / "n01" / "a.png")
    assert (items[0].size, items[0].mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def test_every_file_below_a_class_is_an_item_and_no_folder_is(tmp_path):
    good = make_good(tmp_path / "data" / "good")
    bad = make_bad(tmp_path / "data" / "bad", tmp_path / "outside")
    _, items = listing(folder_params(tmp_path / "data"))
    assert [i.key for i in items] == [i.key for i in listing(folder_params(tmp_path / "data"))[1]]
    assert {i.key for i in items} == {f"good/{name}" for name in good} | {f"bad/{name}" for name in bad}


def test_items_are_listed_in_order_of_name_whatever_the_disk_says(tmp_path):
    (tmp_path / "a" / "m").mkdir(parents=True)
    names = ["z.png", "m/z.png", "m/a.png", "b.png", "Z.png", "10.png", "9.png"]
    for name in names:
        picture(0).save(tmp_path / "a" / name)
    keys = [item.key for item in listing(folder_params(tmp_path))[1]]
    assert keys == [f"a/{name}" for name in ("10.png", "9.png", "Z.png", "b.png", "m/a.png", "m/z.png", "z.png")]


def test_the_heldout_split_depends_on_the_path_alone(tmp_path):
    make_plain(tmp_path / "a", classes=2, each=100)
    make_plain(tmp_path / "b", classes=3, each=110)
    few, many = ({i.key: i.split for i in listing(folder_params(tmp_path / name, heldout=0.2))[1]}
                 for name in "ab")
    assert few.items() <= many.items()
    assert 25 <= list(few.values()).count("heldout") <= 55
    more = {i.key: i.split for i in listing(folder_params(tmp_path / "a", heldout=0.4))[1]}
    assert all(more[key] == "heldout" for key, split in few.items() if split == "heldout")
    none = listing(folder_params(tmp_path / "a", heldout=0.0))[1]
    assert {i.split for i in none} == {"train"}


def absent(root):
    pass


def a_file(root):
    root.touch()


def flat(root):
    make_good(root)
    for path in root.rglob("*"):
        if path.is_dir():
            path.rename(root / f".{path.name}")
            break


def empty_class(root):
    make_plain(root)
    (root / "hollow" / "hollower").mkdir(parents=True)


def linked_class(root):
    make_plain(root)
    (root / "alias").symlink_to("class0")


@pytest.mark.parametrize(("make", "message"), [
    (absent, "data: No such file or directory; .* readable folder"), (a_file, "data: Not a directory"),
    (flat, "data has no sub-folders: put"), (empty_class, "hollow: empty, .* add images"),
    (linked_class, "alias: classes must not be links: move or copy")])
def test_a_folder_that_cannot_be_used_is_refused_before_any_image_is_read(tmp_path, monkeypatch, make, message):
    make(tmp_path / "data")
    monkeypatch.setattr(Image, "open", lambda *a, **k: pytest.fail("an image was opened"))
    with pytest.raises(DatasetError, match=f"(?s){tmp_path}.*{message}"):
        listing(folder_params(tmp_path / "data"))


def test_a_class_that_is_held_out_altogether_is_refused(tmp_path):
    make_plain(tmp_path, classes=5, each=1)
    with pytest.raises(DatasetError, match=r"class\d, .*held out at heldout 0.99: .*lower heldout"):
        listing(folder_params(tmp_path, heldout=0.99))


# -------------------------------------------------------------------------------- a folder: what becomes of files


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    good = make_good(root / "data" / "good")
    bad = make_bad(root / "data" / "bad", root / "outside")
    params = folder_params(root / "data")
    return params, good, bad, {item.key: item for item in listing(params)[1]}


def load(hostile, name):
    params, _, _, items = hostile
    return load_item(params, items[f"good/{name}"]).image


def test_every_good_file_is_read_as_rgb_without_a_warning(hostile):
    params, good, _, items = hostile
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = {name: load_item(params, items[f"good/{name}"]).image for name in good}
    assert {image.mode for image in images.values()} == {"RGB"} and len(images) == 15
    assert all(adm_crop(image, 32).shape == (32, 32, 3) for image in images.values())


def test_pillows_remarks_are_not_passed_on(hostile, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)  # of 1920: more than this and less than twice as many
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(hostile, "plain.jpg").size == (48, 40)


def test_every_bad_file_is_rejected_with_its_reason(hostile):
    params, _, bad, items = hostile
    for name, reason in bad.items():
        with pytest.raises(Rejected, match=reason):
            load_item(params, items[f"bad/{name}"])


def test_reasons_do_not_tell_where_the_folder_lies(hostile):
    params, _, bad, items = hostile
    for name in bad.keys() - {"circle.png"}:
        with pytest.raises(Rejected) as caught:
            load_item(params, items[f"bad/{name}"])
        assert only(params).path not in str(caught.value)


@pytest.mark.parametrize("name", ["plain.jpg", "grey.jpg", "cmyk.jpg", "rotated.jpg", "small.tiff", "bits.png"])
def test_opaque_images_become_rgb_as_in_adm(hostile, name):
    with Image.open(f"{only(hostile[0]).path}/good/{name}") as image:
        assert np.array_equal(load(hostile, name), image.convert("RGB"))


def test_exif_orientation_is_not_applied(hostile):
    assert load(hostile, "rotated.jpg").size == (48, 40)


def test_transparency_is_laid_on_white(hostile):
    pixels, base = np.asarray(load(hostile, "rgba.png")).astype(float), np.asarray(picture(1)).astype(float)
    alpha = np.asarray(Image.linear_gradient("L").resize((48, 40)))[..., None] / 255
    assert np.abs(pixels - (alpha * base + (1 - alpha) * 255)).max() <= 1
    with Image.open(f"{only(hostile[0]).path}/good/palette.png") as image:
        clear = np.asarray(image) == 0
    pixels = np.asarray(load(hostile, "palette.png"))
    assert clear.any() and (pixels[clear] == 255).all() and not (pixels[~clear] == 255).all(-1).any()


def test_sixteen_bit_grey_keeps_its_upper_byte(hostile):
    pixels = np.asarray(load(hostile, "sixteen.png"))[..., 0].ravel()
    assert (pixels == np.linspace(0, 65535, 48 * 40).astype(np.uint16) >> 8).all()


def test_an_animation_gives_its_first_frame(hostile):
    assert load(hostile, "animated.gif").getcolors() == [(48 * 40, (255, 0, 0))]


def test_pillows_setting_to_accept_truncated_files_stays_off(hostile):
    from PIL import ImageFile

    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_size_limits_are_exact(tmp_path):
    (tmp_path / "a").mkdir()
    for width, height in ((8, 8), (7, 8), (2000, 2000), (2001, 2000), (8, 31_250), (8, 31_251)):
        Image.new("L", (width, height)).save(tmp_path / "a" / f"{width}x{height}.png")
    params = folder_params(tmp_path)  # image_size 32: 8 pixels are enlarged 4 times; at most 4 megapixels
    verdicts = {}
    for item in listing(params)[1]:
        try:
            verdicts[item.key[2:-4]] = load_item(params, item).image.size
        except Rejected as reason:
            verdicts[item.key[2:-4]] = str(reason)[:9]
    assert verdicts == {"8x8": (8, 8), "7x8": "too small", "2000x2000": (2000, 2000), "2001x2000": "too large",
                        "8x31250": (8, 31_250), "8x31251": "too large"}


def test_a_file_that_changes_or_goes_after_the_listing_is_rejected(tmp_path):
    make_plain(tmp_path, classes=1, each=3)
    params = folder_params(tmp_path)
    touched, gone, kept = listing(params)[1]
    os.utime(tmp_path / touched.key, ns=(0, touched.mtime_ns + 1))
    (tmp_path / gone.key).unlink()
    with pytest.raises(Rejected, match="changed after"):
        load_item(params, touched)
    with pytest.raises(Rejected, match="no file"):
        load_item(params, gone)
    with pytest.raises(Rejected, match="changed after"):
        load_item(params, dataclasses.replace(kept, size=kept.size + 1))
    assert load_item(params, kept).image.size == (48, 40)


def test_a_file_that_cannot_be_opened_is_rejected(tmp_path, monkeypatch):
    make_plain(tmp_path, classes=1, each=1)
    item = listing(folder_params(tmp_path))[1][0]

    def refuse(path, mode):  # chmod would not stop a test that runs as root
        raise PermissionError(errno.EACCES, "Permission denied", path)

    monkeypatch.setattr(files, "open", refuse, raising=False)
    with pytest.raises(Rejected, match="^PermissionError: Permission denied$"):
        load_item(folder_params(tmp_path), item)


def test_a_folder_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
    make_plain(tmp_path, classes=1, each=1)

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetError, match=f"{tmp_path}/class0: Permission denied; .*readable"):
        listing(folder_params(tmp_path))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damaged_files_are_read_or_rejected_and_nothing_else(tmp_path_factory, data):
    file = io.BytesIO()
    picture(3).save(file, data.draw(st.sampled_from(decoding.FORMATS)))
    raw = bytearray(file.getvalue())
    for position in data.draw(st.lists(st.integers(0, len(raw) - 1), max_size=8)):
        raw[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged" / "image"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(raw[:data.draw(st.integers(len(raw) // 2, len(raw)))])
    stat = path.stat()
    try:
        item = Item("damaged/image", 0, "train", stat.st_size, stat.st_mtime_ns)
        image = load_item(folder_params(path.parent.parent), item).image
    except Rejected as reason:
        assert str(reason)
    else:
        assert image.mode == "RGB" and adm_crop(image, 8).shape == (8, 8, 3)
