"""What an earlier version has left is refused by a line that says what to do, and kept by doing it."""

import dataclasses
import json
from pathlib import Path

import pytest

from pipeline import older, params
from pipeline.__main__ import main
from pipeline.older import older_outputs, refuse_older_runs
from pipeline.params import read_params
from pipeline.storage import Storage, fresh_directory
from pixelgen.config import ConfigError
from pixelgen.errors import StorageError
from tests.e2e.workspace import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture
def old(tmp_path, monkeypatch):
    """params.yaml as it was: every value written, and what is in run now in fit or beside it."""
    monkeypatch.chdir(tmp_path)
    data = json.loads(json.dumps(dataclasses.asdict(read_params(ROOT / "params.yaml"))))
    for recipe in data["train"].values():
        run = recipe.pop("run")
        recipe["grid_sampler"] = run.pop("grid_sampler")
        recipe["fit"] |= run
    data["datasets"]["digits"]["heldout"] = None
    yaml.dump(data, tmp_path / "params.yaml")
    text = (tmp_path / "params.yaml").read_text()
    text = text.replace("seed: 1\n", "seed: 1    # another order\n").replace("count: null\n", "count: null  # gone\n")
    (tmp_path / "params.yaml").write_text(text)
    return tmp_path / "params.yaml"


def test_a_file_of_before_is_refused_and_rewritten(old, capsys):
    assert params.main() == 1
    assert ("params.yaml has the form of an earlier version: `python -m pipeline params migrate params.yaml --write` "
            "rewrites it") in capsys.readouterr().err
    assert main(["params", "migrate", "params.yaml"]) == 0
    printed, before = capsys.readouterr().out, old.read_text()
    assert main(["params", "migrate", "params.yaml", "--write"]) == 0
    assert old.read_text() == printed != before
    assert read_params() == read_params(ROOT / "params.yaml")
    assert len(printed.splitlines()) < 0.7 * len(before.splitlines())
    assert "seed: 1    # another order" in printed and "# gone" not in printed
    assert "balance_start: null" in printed, "null is a departure where the default is a number"
    assert main(["params", "migrate", "params.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == printed.splitlines(), "nothing is left to do"


@pytest.mark.parametrize(("text", "says"), [
    ("train: &a {}\n", "no tags (!), anchors"), ("train: {c2i: {fit: {}}}\n", "missing key"),
    ("- 1\n", "expected a mapping"), ("train: {c2i: 3}\n", "missing key"), ("train: [\n", "other.yaml"),
    ("train: {c2i: {fit: 5}}\ndatasets: {a: 3}\n", "missing key")])
def test_what_is_no_file_of_parameters_is_not_rewritten(tmp_path, capsys, text, says):
    path = tmp_path / "other.yaml"
    path.write_text(text)
    assert main(["params", "migrate", str(path), "--write"]) == 1
    assert says in capsys.readouterr().err and path.read_text() == text
    assert main(["params", "migrate", str(tmp_path / "missing.yaml")]) == 1
    assert "missing.yaml" in capsys.readouterr().err


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Finished outputs, and the identity that each had."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_text((ROOT / "params.yaml").read_text())
    identities = {}
    for name in ("weights", "shard/digits", "train/c2i/model"):
        out = fresh_directory(Path("out") / name)
        (out / "file").write_text(name)
        Storage(None).publish(out, name.split("/")[0], {}, counted=3)
        identities[out] = (out / "identity").read_text()
        (out / "identity").unlink()
    return identities


def test_outputs_of_before_are_kept_or_deleted_by_the_user(outputs, capsys):
    assert params.main() == 1
    assert "was made by an earlier version: `python -m pipeline adopt` keeps all that lies in out; " in (
        capsys.readouterr().err)
    assert {*older_outputs()} == {*outputs}
    assert main(["adopt"]) == 0
    assert "now run `dvc commit --force params weights shard@digits`, which" in capsys.readouterr().out, "no curve"
    Path("out/train/c2i/grids").mkdir()
    Path("out/train/c2i/curve.csv").touch()
    assert main(["adopt"]) == 0
    assert "params weights shard@digits train@c2i`" in capsys.readouterr().out
    assert {out: (out / "identity").read_text() for out in outputs} == outputs
    assert Path("out/params.json").exists() and Path("out/code.json").exists(), "what DVC commits, too"
    assert params.main() == 0 and [*older_outputs()] == []


def test_check_lists_what_other_versions_have_made(outputs, capsys):
    assert main(["adopt"]) == main(["check"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("now run"), "nothing to list"
    path = Path("out/weights/manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"versions": manifest["versions"] | {"torch": "2.0"}}))
    assert main(["check"]) == 0
    assert capsys.readouterr().out == f"out/weights: torch 2.0, now {manifest['versions']['torch']}\n"


def test_a_training_of_before_under_a_storage_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"runs/train@c2i/0123456789abcdef/checkpoints/step-00000005.pt.json": 9}
    asked = []

    class Store:
        def sizes(self, prefix):
            asked.append(prefix)
            return {name: size for name, size in names.items() if name.startswith(prefix)}

    monkeypatch.setattr(older, "open_store", lambda root: Store())
    with pytest.raises(StorageError, match="s3://b/p/runs/train@c2i/0123456789abcdef holds .* move it to "
                                           "s3://b/p/runs/train/fedc,"):
        refuse_older_runs("c2i", Path("runs/train/fedc"), "s3://b/p")
    refuse_older_runs("sft", Path("runs/train/fedc"), "s3://b/p")
    assert asked == ["runs/train@c2i/", "runs/train@sft/"]
    Path("runs/train/fedc").mkdir(parents=True)
    refuse_older_runs("c2i", Path("runs/train/fedc"), "s3://b/p")


def test_a_recipe_of_before_is_refused(old):
    with pytest.raises(ConfigError, match="has the form of an earlier version"):
        read_params(old)
