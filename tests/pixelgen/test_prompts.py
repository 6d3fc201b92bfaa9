"""Files of prompts: what is read, and what is refused with its place."""

import contextlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixelgen.config import ConfigError
from pixelgen.prompts import Prompt, check_layout, read_prompts, write_images

LINE = {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a photo of a red dog"}


def test_metadata_lines_are_kept_whole(tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps(LINE) + "\n\n" + json.dumps({"prompt": "b"}) + "\n")
    assert read_prompts(tmp_path / "m.jsonl") == [Prompt("00000", LINE["prompt"], LINE),
                                                  Prompt("00001", "b", {"prompt": "b"})]


def test_a_line_of_text_is_a_prompt(tmp_path):
    (tmp_path / "p.txt").write_text("  a dog \n\nein Hund: é\n", "utf-8")
    read = [(p.name, p.text) for p in read_prompts(tmp_path / "p.txt")]
    assert read == [("00000", "a dog"), ("00001", "ein Hund: é")]


def test_a_folder_has_a_prompt_in_each_file(tmp_path):
    for name, text in (("b", "second\n"), ("10", "first, of\ntwo lines")):
        (tmp_path / f"{name}.txt").write_text(text)
    assert [(p.name, p.text) for p in read_prompts(tmp_path)] == [("10", "first, of\ntwo lines"), ("b", "second")]


@pytest.mark.parametrize(("name", "content", "says"), [
    ("m.jsonl", b"{", "line 1: not JSON"), ("m.jsonl", b"[1]", r"line 1: not a JSON object, but '\[1\]'"),
    ("m.jsonl", b'{"tag": "x"}', "prompt 0: there is no prompt"), ("m.jsonl", b'{"prompt": 3}', "there is no prompt"),
    ("m.jsonl", b"\n\n", "no prompts in it"), ("p.txt", b"\xff\xfe", "not UTF-8"), ("p.txt", b"", "no prompts"),
])
def test_what_is_no_prompt_is_refused(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=says):
        read_prompts(tmp_path / name)


def test_missing_prompts_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"x\.txt: no such file"):
        read_prompts(tmp_path / "x.txt")
    with pytest.raises(ConfigError, match=r"no \.txt files"):
        read_prompts(tmp_path)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.sampled_from(["f.txt", "f.jsonl"]))
def test_only_clear_errors_come_out_of_any_bytes(tmp_path_factory, data, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(data)
    with contextlib.suppress(ConfigError):
        assert all(p.text.strip() for p in read_prompts(path))


def test_layouts(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    write_images("geneval", tmp_path, Prompt("00003", LINE["prompt"], LINE), images)
    assert json.loads((tmp_path / "00003/metadata.jsonl").read_text()) == LINE
    for n in range(4):
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"00003/samples/{n:04}.png")), images[n])
    write_images("dpg", tmp_path, Prompt("partiprompts9", "x", {}), images)
    square = np.asarray(Image.open(tmp_path / "partiprompts9.png"))
    assert square.shape == (16, 16, 3)
    for n, (y, x) in enumerate([(0, 0), (0, 8), (8, 0), (8, 8)]):
        assert np.array_equal(square[y:y + 8, x:x + 8], images[n])
    with pytest.raises(ConfigError, match="3 images per prompt: the layout of DPG-Bench shows 4"):
        check_layout("dpg", 3)
    with pytest.raises(ConfigError, match="'npz' is not known"):
        check_layout("npz", 3)
