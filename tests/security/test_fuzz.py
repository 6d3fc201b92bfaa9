"""Every reader of files, on thousands of damaged ones: what it documents, or an error of its own that says why."""

import contextlib
import copy
import io
import json
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.datasets import Rejected
from pipeline.datasets.tar import members
from pipeline.params import Params, read_params
from pipeline.storage import Storage
from pixelgen import checkpoint, cli
from pixelgen.checkpoint import CheckpointError
from pixelgen.config import ConfigError, load
from pixelgen.errors import FileError, StorageError
from pixelgen.manifest import MANIFEST, read_manifest
from pixelgen.metrics import fid
from pixelgen.metrics.geneval import _read_prompt, judge
from pixelgen.prompts import read_prompts
from pixelgen.recipe import read_yaml
from tests.pipeline.folders import make_tar, pairs
from tests.pixelgen.conftest import tiny_config, tiny_denoiser
from tests.security.hostile import FIXED, ROOT

DEMO = (ROOT / "presets/demo.yaml").read_bytes()
PARAMS = read_yaml(ROOT / "presets/demo.yaml")
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 3), st.sampled_from([2**63, -(10**300), 1e308, -0.0, float("inf")]),
    st.floats(), st.text(max_size=8), st.sampled_from(["none", "digits", "../x", "\0", "c2i", "${x}", "x" * 999]),
    st.just([]), st.just({}), st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.none()))


@st.composite
def damaged(draw, whole: bytes, most: int = 6):
    """Bytes overwritten, removed, inserted, repeated, or the end cut off."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, most))):
        at, what = draw(st.integers(0, max(0, len(data) - 1))), draw(st.integers(0, 5))
        if what == 0:
            data[at:at + 1] = draw(st.binary(min_size=1, max_size=1))
        elif what == 1:
            del data[at:at + draw(st.integers(1, 40))]
        elif what == 2:
            data[at:at] = draw(st.binary(min_size=1, max_size=8))
        elif what == 3:
            data[at:at] = data[at:at + draw(st.integers(1, 200))]
        elif what == 4:
            data[at:at + 4] = draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff", b": [&", b"\n- {"]))
        else:
            del data[at:]
    return bytes(data)


@st.composite
def altered(draw, whole):
    """Plain data with values replaced, keys removed, renamed and added, at any depth."""
    data = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        node = data
        while True:
            keys = list(node) if isinstance(node, dict) else range(len(node))
            key = draw(st.sampled_from(keys)) if keys else None
            if key is None or not isinstance(node[key], (dict, list)) or not node[key] or draw(st.integers(0, 3)) == 0:
                break
            node = node[key]
        what = draw(st.integers(0, 3))
        if key is None or what == 0:
            if isinstance(node, dict):
                node[draw(st.one_of(st.text(max_size=4), st.integers(), st.none()))] = draw(ODD)
            else:
                node.append(draw(ODD))
        elif what == 1:
            del node[key]
        else:
            node[key] = draw(ODD)
    return data


@contextlib.contextmanager
def only(*errors: type[Exception]):
    """Nothing is raised but these, each with a message of some length that fits on a page."""
    try:
        yield
    except errors as error:
        assert type(error) in errors and 5 < len(str(error)) < 20_000, repr(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


# ------------------------------------------------------------------------------------------------ parameters


@settings(FIXED, max_examples=600)
@given(altered(PARAMS))
def test_altered_parameters(data):
    with only(ConfigError):
        load(Params, data)


@settings(FIXED, max_examples=60)
@given(damaged(DEMO))
def test_damaged_parameters(folder, data):
    (folder / "params.yaml").write_bytes(data)
    with only(ConfigError):
        read_params(folder / "params.yaml")


@settings(FIXED, max_examples=800)
@given(st.one_of(st.binary(max_size=60), st.text("{}[]:,-?&*!|>'\"#% \n\tab019.e+_~\\x", max_size=40).map(str.encode)))
def test_any_yaml(folder, data):
    (folder / "any.yaml").write_bytes(data)
    with only(ConfigError):
        read_yaml(folder / "any.yaml")


# ------------------------------------------------------------------------------------------ manifests, prompts


@settings(FIXED, max_examples=300)
@given(st.data())
def test_damaged_manifests(folder, data):
    (folder / "a.bin").write_bytes(b"0123456789")
    if not (folder / MANIFEST).exists():
        Storage(None).publish(folder, "dataset", {}, sources={"x": {"splits": {"train": {"shards": []}}}})
        folder.joinpath("whole.json").write_bytes((folder / MANIFEST).read_bytes())
    (folder / MANIFEST).write_bytes(data.draw(damaged(folder.joinpath("whole.json").read_bytes())))
    with only(StorageError):
        read_manifest(folder, "dataset")


PROMPT = {"tag": "position", "include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1, "color": "red",
          "position": ["left of", 0]}], "exclude": [{"class": "dog", "count": 2}], "prompt": "a cat left of a dog"}


@settings(FIXED, max_examples=400)
@given(st.one_of(altered(PROMPT).map(lambda d: json.dumps(d).encode()), damaged(json.dumps(PROMPT).encode())),
       st.sampled_from(["p.jsonl", "p.txt"]))
def test_damaged_prompts(folder, data, name):
    (folder / name).write_bytes(data)
    with only(ConfigError):
        read_prompts(folder / name)
    with only(ValueError, json.JSONDecodeError, UnicodeDecodeError):
        prompt = _read_prompt(folder / name)
        boxes = np.array([[0, 0, 9, 9, 0.9], [20, 0, 29, 9, 0.95]], np.float32)
        judge(prompt, {"dog": boxes, "cat": boxes}, lambda name, objects: ["red"] * len(objects))


# ------------------------------------------------------------------------------------------------- containers


@pytest.fixture(scope="module")
def tar(folder):
    return make_tar(folder / "t.tar", [("a" * 150 + ".jpg", b"x" * 700), *pairs(1)]).read_bytes()


@settings(FIXED, max_examples=400)
@given(st.data())
def test_damaged_tars(tar, data):
    raw = bytearray(data.draw(damaged(tar)))
    block = 512 * data.draw(st.integers(0, max(0, len(raw) // 512 - 1)))
    if len(raw) >= block + 512:  # repair a checksum, or hardly any damage would be seen as a header
        raw[block + 148:block + 156] = b" " * 8
        raw[block + 148:block + 156] = b"%06o\0 " % sum(raw[block:block + 512])
    with contextlib.suppress(Rejected):
        found = list(members(io.BytesIO(raw)))
        assert len(found) <= len(raw) // 512 + 2
        assert all(m.refused or (m.size >= 0 and not m.name.startswith("/")) for m in found)


@pytest.fixture(scope="module")
def npz(folder):
    file, rng = io.BytesIO(), np.random.default_rng(0)
    np.savez(file, mu=rng.random(3), sigma=np.eye(3), mu_s=rng.random(2), sigma_s=np.eye(2),
             arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    return file.getvalue()


def rewrite(archive, path, change):
    """A sound archive of the members of another, after `change(name, content)`."""
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))


@settings(FIXED, max_examples=400)
@given(st.data())
def test_damaged_references(folder, npz, data):
    (folder / "x.npz").write_bytes(data.draw(damaged(npz)))
    with only(FileError):
        assert fid.load_reference(folder / "x.npz").mu.shape == (3,)


@settings(FIXED, max_examples=300)
@given(st.data())
def test_altered_arrays(folder, npz, data):
    """Damage inside the members of an archive that is sound itself."""
    rewrite(npz, folder / "x.npz",
            lambda _, content: data.draw(damaged(content, 2)) if data.draw(st.booleans()) else content)
    with only(FileError):
        fid.load_reference(folder / "x.npz")


# ------------------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def published(folder):
    state = tiny_denoiser(width=8, heads=1, depth=1, in_context_start=0).state_dict()
    torch.save({"state_dict": {f"{n}.{k}": v for n in ("denoiser", "ema_denoiser") for k, v in state.items()}},
               folder / "whole.ckpt")
    checkpoint.read_published(folder / "whole.ckpt", 0)
    return (folder / "whole.ckpt").read_bytes()


@settings(FIXED, max_examples=300)
@given(st.data())
def test_damaged_checkpoints(folder, published, data):
    (folder / "x.ckpt").write_bytes(data.draw(damaged(published)))
    with only(CheckpointError):
        checkpoint.read_published(folder / "x.ckpt", 0)


@settings(FIXED, max_examples=300)
@given(st.data())
def test_damaged_pickles(folder, published, data):
    """Damage inside the pickle of an archive that is sound itself."""
    rewrite(published, folder / "x.ckpt",
            lambda name, content: data.draw(damaged(content)) if name.endswith("data.pkl") else content)
    with only(CheckpointError):
        checkpoint.read_published(folder / "x.ckpt", 0)


@settings(FIXED, max_examples=300)
@given(altered({"denoiser": "jit", "config": vars(tiny_config())}))
def test_altered_descriptions(folder, data):
    (folder / "config.json").write_text(json.dumps(data))
    with only(CheckpointError, ConfigError):
        checkpoint.read_config(folder)


# --------------------------------------------------------------------------------------------------- commands


WORDS = st.sampled_from([
    "convert", "sample", "evaluate", "geneval", "x.ckpt", "nowhere", "out", "--labels", "--prompts", "--steps",
    "--guidance", "--in-context-start", "--detector", "--clip", "-1", "1e999", "9" * 5000, "nan", "p.txt", "--interval",
    "0", "1", "--seed", "--layout", "dpg", "\0", "--", ""])


@settings(FIXED, max_examples=300)
@given(st.lists(WORDS, max_size=7), st.sampled_from([[], ["sample", "nowhere", "out"], ["convert", "x.ckpt", "out"]]))
def test_any_command(folder, capsys, words, first):
    (folder / "empty").mkdir(exist_ok=True)
    with contextlib.chdir(folder / "empty"):
        try:
            assert cli.main([*first, *words]) == 1
        except SystemExit as end:
            assert end.code == 2
    assert "pixelgen" in capsys.readouterr().err
