"""GenEval over images and folders, with a detector that finds squares of plain colours."""

import json

import numpy as np
import pytest
from PIL import Image

from pixelgen import cli
from pixelgen.errors import FileError
from pixelgen.metrics import geneval
from pixelgen.metrics.geneval import (
    ClassDetections,
    Rules,
    evaluate_folder,
    evaluate_image,
    judge_image,
    list_images,
)

SQUARES = {"cup": 200, "dog": 100}  # a class -> the red value of its pixels; the green one is the score in percent
CUP = {"tag": "colors", "prompt": "a photo of a red cup", "include": [{"class": "cup", "count": 1, "color": "red"}]}
DOG = {"tag": "single_object", "prompt": "a photo of a dog", "include": [{"class": "dog", "count": 1}]}


def draw(*squares, size=40):
    """An image with squares (class, score in percent, blue, x, y, side)."""
    image = np.zeros((size, size, 3), np.uint8)
    for name, score, blue, x, y, side in squares:
        image[y: y + side, x: x + side] = SQUARES[name], score, blue
    return image


class Squares:
    name = "squares"

    def __init__(self):
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        found = {}
        for name, red in SQUARES.items():
            here = np.unique(image[image[..., 0] == red], axis=0)
            masks = np.array([(image == color).all(2) for color in here]).reshape(-1, *image.shape[:2])
            boxes = []
            for mask, color in zip(masks, here, strict=True):
                y, x = np.nonzero(mask)
                boxes.append((x.min(), y.min(), x.max() + 1, y.max() + 1, color[1] / 100))
            found[name] = ClassDetections(np.array(boxes, np.float32).reshape(-1, 5), masks)
        return found


class Blue:
    """Red if an object's pixels have much blue in them: told by the mask, not by the box."""

    name = "blue"

    def __init__(self):
        self.seen = []

    def __call__(self, image, class_name, boxes, masks):
        self.seen.append((class_name, boxes.tolist(), [int(m.sum()) for m in masks]))
        return ["red" if image[m][:, 2].mean() > 100 else "green" for m in masks]


def folder(path, *prompts, images=1):
    """A folder in the benchmark's layout whose images all show a red cup with a score of 0.95."""
    for number, prompt in enumerate(prompts):
        samples = path / f"{number:05}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(prompt) + "\n")
        for i in range(images):
            Image.fromarray(draw(("cup", 95, 200, 2 + i, 3, 8))).save(samples / f"{i:04}.png")
    return path


# -------------------------------------------------------------------------------------------------- an image


def test_colours_are_told_by_the_masks_of_the_best_objects():
    image = draw(("cup", 40, 10, 1, 1, 5), ("cup", 90, 200, 10, 10, 6), ("cup", 20, 5, 20, 1, 4),
                 ("cup", 60, 20, 20, 20, 7))
    colors = Blue()
    assert judge_image(image, CUP, Squares(), colors).correct
    assert colors.seen == [("cup", [[10, 10, 16, 16, pytest.approx(0.9)]], [36])]
    two = {**CUP, "include": [{"class": "cup", "count": 3, "color": "red"}]}
    verdict = judge_image(image, two, Squares(), colors)
    assert verdict.reason == "expected red cup>=3, found 1 red; and 1 red, 2 green"
    assert colors.seen[1][2] == [36, 49, 25]  # by score; the one of 0.2 is below the threshold
    np.testing.assert_allclose(verdict.kept["cup"][:, 4], [0.9, 0.6, 0.4])


def test_masks_stay_with_their_boxes_when_overlapping_ones_are_dropped():
    boxes = np.array([[0, 0, 9, 9, 0.8], [0, 0, 9, 8, 0.9], [20, 20, 29, 29, 0.7]], np.float32)
    masks = np.stack([np.full((40, 40), i == 1) for i in range(3)])
    masks[2, :3] = True
    colors = Blue()
    both = {**CUP, "include": [{"class": "cup", "count": 2, "color": "red"}]}
    judge_image(draw(), both, lambda image: {"cup": ClassDetections(boxes, masks)}, colors, Rules(max_overlap=0.5))
    assert colors.seen[0][2] == [1600, 120]


def test_counting_has_its_own_threshold():
    image = draw(("dog", 80, 10, 1, 1, 5))
    counted = {"tag": "counting", "prompt": "a photo of one dog", "include": [{"class": "dog", "count": 1}]}
    assert judge_image(image, DOG, Squares(), Blue()).correct
    assert judge_image(image, counted, Squares(), Blue()).reason == "expected dog>=1, found 0"


# -------------------------------------------------------------------------------------------------- the folder


def test_the_layout_is_read_in_order_and_other_files_are_left_aside(tmp_path):
    folder(tmp_path, CUP, DOG, images=2)
    (tmp_path / "00000" / "grid.png").write_bytes(b"no image")
    (tmp_path / "grids").mkdir()
    (tmp_path / "00001" / "samples" / "notes.txt").write_text("")
    (tmp_path / "00001" / "samples" / "small.png").write_text("")
    samples = list_images(tmp_path)
    assert [s.filename for s in samples] == [
        "00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png", "00001/samples/0001.png"]
    assert [s.prompt for s in samples] == [CUP, CUP, DOG, DOG]
    assert all(s.path == tmp_path / s.filename for s in samples)


def test_every_problem_of_a_folder_is_named(tmp_path):
    folder(tmp_path, *[CUP] * 10)
    (tmp_path / "00000" / "metadata.jsonl").unlink()
    (tmp_path / "00001" / "metadata.jsonl").write_text(json.dumps(CUP) + "\n" + json.dumps(CUP) + "\n")
    (tmp_path / "00002" / "metadata.jsonl").write_text('["cup"]')
    (tmp_path / "00003" / "metadata.jsonl").write_text('{"tag": "colors", "prompt": "cup", "include": [{"count": 1}]}')
    (tmp_path / "00004" / "samples" / "0000.png").unlink()
    (tmp_path / "00005" / "samples" / "0000.png").unlink()
    (tmp_path / "00005" / "samples").rmdir()
    path = tmp_path / "00006" / "samples" / "0000.png"
    path.write_bytes(path.read_bytes()[:-30])
    (tmp_path / "00007" / "samples" / "0000.png").write_bytes(b"")
    (tmp_path / "00008" / "metadata.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(FileError) as raised:
        list_images(tmp_path)
    lines = str(raised.value).splitlines()[1:]
    expected = ["00000/metadata.jsonl: ", "00001/metadata.jsonl: ", "00002/metadata.jsonl: expected an object",
                "00003/metadata.jsonl: expected what to include", "00004/samples: no image", "00005/samples: no image",
                "00006/samples/0000.png: not a readable", "00007/samples/0000.png: not a readable", "00008/metadata"]
    assert len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True)), lines
    with pytest.raises(FileError, match="none"):
        list_images(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="no folder 00000"):
        list_images(tmp_path / "empty")


def test_a_record_has_the_benchmarks_fields(tmp_path):
    sample = list_images(folder(tmp_path, CUP))[0]
    record = evaluate_image(sample, Squares(), Blue(), Rules())
    assert list(record)[:7] == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert record["filename"] == "00000/samples/0000.png" and record["tag"] == "colors"
    assert record["prompt"] == CUP["prompt"] and record["correct"] is True and record["reason"] == ""
    assert record["metadata"] == json.dumps(CUP)
    assert json.loads(record["details"]) == {"cup": [[2, 3, 10, 11, pytest.approx(0.95)]]}


def test_an_image_damaged_after_the_listing_is_named(tmp_path):
    sample = list_images(folder(tmp_path, CUP))[0]
    sample.path.write_bytes(sample.path.read_bytes()[:60])
    with pytest.raises(FileError, match=r"samples/0000\.png: not a readable image"):
        evaluate_image(sample, Squares(), Blue(), Rules())


def test_images_of_other_modes_become_rgb(tmp_path):
    sample, seen = list_images(folder(tmp_path, DOG))[0], []
    pixels = np.dstack([draw(("dog", 80, 3, 1, 1, 5)), np.zeros((40, 40), np.uint8)])  # transparent, but a dog
    Image.fromarray(pixels, "RGBA").save(sample.path)

    def look(image):
        seen.append(image)
        return Squares()(image)

    assert evaluate_image(sample, look, Blue(), Rules())["correct"]
    assert seen[0].shape == (40, 40, 3) and seen[0].dtype == np.uint8


def test_a_folder_is_scored_and_recorded(tmp_path):
    images, results = folder(tmp_path / "images", CUP, DOG, images=3), tmp_path / "out" / "results.jsonl"
    seen = []

    def progress(left):
        for sample in left:
            seen.append(sample.filename)
            yield sample

    figures = evaluate_folder(images, Squares(), Blue(), Rules(), results, progress)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["filename"] for line in lines] == seen == [s.filename for s in list_images(images)]
    assert figures == {"colors": 1.0, "single_object": 0.0, "overall": 0.5, "image_accuracy": 0.5,
                       "prompt_accuracy": 0.5, "images": 6, "prompts": 2, "detector": "squares",
                       "color_classifier": "blue"}


def stop_after(number):
    def progress(left):
        for count, sample in enumerate(left):
            if count == number:
                raise KeyboardInterrupt
            yield sample

    return progress


def test_an_interrupted_run_goes_on_and_ends_the_same(tmp_path):
    images = folder(tmp_path / "images", CUP, DOG, images=3)
    whole, results = tmp_path / "whole.jsonl", tmp_path / "results.jsonl"
    expected = evaluate_folder(images, Squares(), Blue(), Rules(), whole)
    with pytest.raises(KeyboardInterrupt):
        evaluate_folder(images, Squares(), Blue(), Rules(), results, stop_after(2))
    assert results.read_text().count("\n") == 2
    results.write_bytes(results.read_bytes()[:-20])  # as if cut off in the middle of a line
    detector = Squares()
    assert evaluate_folder(images, detector, Blue(), Rules(), results) == expected
    assert results.read_bytes() == whole.read_bytes() and detector.calls == 5
    assert evaluate_folder(images, detector, Blue(), Rules(), results) == expected
    assert results.read_bytes() == whole.read_bytes() and detector.calls == 5  # nothing was left to do


def test_results_of_other_judges_or_rules_are_not_continued(tmp_path):
    images, results = folder(tmp_path / "images", CUP), tmp_path / "results.jsonl"
    evaluate_folder(images, Squares(), Blue(), Rules(), results)
    before = results.read_bytes()
    other, grey = Squares(), Blue()
    other.name, grey.name = "circles", "grey"
    for detector, colors, rules in ((other, Blue(), Rules()), (Squares(), grey, Rules()),
                                    (Squares(), Blue(), Rules(threshold=0.4))):
        with pytest.raises(FileError, match=r"results\.jsonl is by .*write to another file"):
            evaluate_folder(images, detector, colors, rules, results)
    (tmp_path / "results.jsonl.judges").unlink()
    with pytest.raises(FileError, match=r"exists without results\.jsonl\.judges"):
        evaluate_folder(images, Squares(), Blue(), Rules(), results)
    assert results.read_bytes() == before


@pytest.mark.parametrize("change", ["image", "prompt", "gone"])
def test_results_of_other_images_are_not_continued(tmp_path, change):
    images, results = folder(tmp_path / "images", CUP, images=2), tmp_path / "results.jsonl"
    evaluate_folder(images, Squares(), Blue(), Rules(), results)
    path = images / "00000" / "samples" / "0001.png"
    if change == "image":
        Image.fromarray(draw()).save(path)
    elif change == "gone":
        path.unlink()
    else:
        (images / "00000" / "metadata.jsonl").write_text(json.dumps(DOG))
    with pytest.raises(FileError, match=r"records 00000/samples/000\d\.png, which is not in"):
        evaluate_folder(images, Squares(), Blue(), Rules(), results)


def test_a_results_file_that_is_none_is_refused(tmp_path):
    images, results = folder(tmp_path / "images", CUP), tmp_path / "results.jsonl"
    evaluate_folder(images, Squares(), Blue(), Rules(), results)
    line = results.read_text()
    for content in ("no json\n", "[1]\n", "3\n", '{"filename": "x"}\n', line + line, '{"tag": 1}\n'):
        results.write_text(content)
        with pytest.raises(FileError, match=r"results\.jsonl: "):
            evaluate_folder(images, Squares(), Blue(), Rules(), results)
        assert results.read_text() == content


def test_the_command_prints_and_writes_the_score(tmp_path, monkeypatch, capsys):
    from pixelgen.metrics import colors, detector

    images, asked = folder(tmp_path / "images", CUP, DOG), []
    monkeypatch.setattr(detector, "load_detector", lambda *a: asked.append(a) or Squares())
    monkeypatch.setattr(colors, "load_colors", lambda *a: asked.append(a) or Blue())
    command = ["evaluate", "geneval", str(images), "--detector", "d.pth", "--clip", "clip", "--device", "cpu",
               "--out", str(tmp_path / "r.jsonl")]
    assert cli.main(command) == 0
    assert [(str(path), device) for path, device in asked] == [("d.pth", "cpu"), ("clip", "cpu")]
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines()[1:]] == [
        ["single_object", "0.0000"], ["two_object", "no", "image"], ["counting", "no", "image"], ["colors", "1.0000"],
        ["position", "no", "image"], ["color_attr", "no", "image"], ["overall", "0.5000"]]
    assert "2 images of 2 prompts, by squares and blue" in printed
    assert json.loads((tmp_path / "metrics.json").read_text())["overall"] == 0.5
    (images / "00000" / "metadata.jsonl").unlink()
    assert cli.main(command) == 1
    assert "00000/metadata.jsonl" in capsys.readouterr().err and len(asked) == 2  # before anything slow is loaded
    assert geneval.TAGS[-1] == "color_attr"
