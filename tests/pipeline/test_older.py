"""What an earlier version has left is refused by a line that says what to do, and kept by doing it."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline import describe, older, params
from pipeline.__main__ import main
from pipeline.datasets import Source
from pipeline.demo.digits import Digits
from pipeline.older import older_outputs, refuse_older_runs
from pipeline.params import Params, read_params
from pipeline.prompts import PromptSource
from pipeline.storage import Storage, fresh_directory
from pixelgen.config import CaptionConfig, ConfigError, load
from pixelgen.denoisers import Denoiser
from pixelgen.denoisers.jit import JiTOptions
from pixelgen.denoisers.jit_t2i import JiTTextOptions
from pixelgen.errors import StorageError
from pixelgen.samplers.adams_bashforth import AdamsBashforth
from pixelgen.samplers.euler import Euler
from pixelgen.samplers.heun import Heun
from pixelgen.terms import LpipsConfig, ObjectiveConfig, PDinoConfig, RepaConfig

ROOT = Path(__file__).parents[2]
OLDER = Path(__file__).parent / "older"  # files as earlier versions had them


@pytest.fixture
def old(tmp_path, monkeypatch):
    """params.yaml as it was at first: every value written, and what is in run now in fit or beside it."""
    monkeypatch.chdir(tmp_path)
    shutil.copyfile(OLDER / "explicit.yaml", tmp_path / "params.yaml")
    return tmp_path / "params.yaml"


def test_a_file_of_before_is_refused_and_rewritten(old, capsys):
    assert params.main() == 1
    assert ("params.yaml has the form of an earlier version: `python -m pipeline params migrate params.yaml --write` "
            "rewrites it") in capsys.readouterr().err
    assert main(["params", "migrate", "params.yaml"]) == 0
    printed, before = capsys.readouterr().out, old.read_text()
    assert main(["params", "migrate", "params.yaml", "--write"]) == 0
    assert old.read_text() == printed != before
    assert {line.split()[0].split(".")[-1]: line.split(None, 1)[1] for line in describe.diff(old, ROOT / "params.yaml")
            } == {"max_quarantined": "0.0 -> 0.001", "keep_checkpoints": "2 -> 3"}, "the demo's own changes since"
    assert len(printed.splitlines()) < 0.7 * len(before.splitlines())
    assert "pixels of the paper are 32 and 64 here" in printed and "how many are rendered" not in printed
    assert "balance_start: null" in printed, "null is a departure where the default is a number"
    assert main(["params", "migrate", "params.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == printed.splitlines(), "nothing is left to do"


@pytest.mark.parametrize(("file", "today"), [("params.yaml", "params.yaml"), ("t2i-xxl.yaml", "presets/t2i-xxl.yaml")])
def test_sections_of_before_become_those_of_now(tmp_path, file, today):
    with pytest.raises(ConfigError, match=f"{file} has the form of an earlier version: .* migrate .*{file} --write"):
        read_params(OLDER / file)
    new = tmp_path / file
    new.write_text(older.migrated(OLDER / file, params.Params))
    whole, expected = read_params(new), read_params(ROOT / today)
    assert whole.datasets == expected.datasets and whole.prompts == expected.prompts
    lines = new.read_text().splitlines()
    for line in (ROOT / today).read_text().splitlines():
        assert line in lines or not any(f"{{{kind}: " in line for kind in (*Source.kinds, *PromptSource.kinds)), line


@pytest.mark.parametrize("text", [
    "datasets: {d: {sources: {s: {format: digits}}}}", "datasets: {d: {heldout: null}}",
    "prompts: {p: {source: scenes}}", "train: {t: {grid_sampler: {}}}", "train: {t: {fit: {log_every: 3}}}",
    "weights: {networks: [dino]}", "weights: null", "weights: {}", "evaluate: {e: {metric: fid}}",
    "sample: {s: {sampler: {name: heun}}}", "train: {t: {denoiser: {size: L/16}}}",
    "train: {t: {objective: {gated: [lpips]}}}"])
def test_each_section_of_before_is_known(tmp_path, text):
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"p\.yaml has the form of an earlier version: "):
        read_params(tmp_path / "p.yaml")


@pytest.mark.parametrize(("text", "says"), [
    ("weights: [dino]", "top level: key: 'weights' is not known"), ("weights: {sauce: demo}", "'weights' is not known"),
    ("evaluate: {e: {metric: adm, sample: s, reference: none}}", "evaluate.e.metric: expected one kind")])
def test_what_no_version_had_is_not_taken_for_it(tmp_path, text, says):
    sections = dict.fromkeys(("datasets", "reference", "train", "prompts", "sample", "evaluate"), "{}")
    sections.pop(text.partition(":")[0], None)
    (tmp_path / "p.yaml").write_text("\n".join([text, *(f"{name}: {value}" for name, value in sections.items())]))
    with pytest.raises(ConfigError, match=re.escape(says)):
        read_params(tmp_path / "p.yaml")


def test_what_judges_had_for_baselines_stays(tmp_path):
    text = (OLDER / "params.yaml").read_text()
    assert text.count("baselines: true}") == 2
    for written, kept in (("baselines: false}", False), ("}", False), ("baselines: true}", True)):
        changed = text.replace("batch_size: 500, baselines: true}", f"batch_size: 500, {written}")
        (tmp_path / "p.yaml").write_text(changed)
        (tmp_path / "p.yaml").write_text(older.migrated(tmp_path / "p.yaml", Params))
        assert read_params(tmp_path / "p.yaml").evaluate["geneval"].metric.baselines == kept


def test_a_source_keeps_the_comments_of_what_it_keeps(tmp_path):
    text = (OLDER / "t2i-xxl.yaml").read_text()
    line = "long: {format: webdataset, path: data/BLIP3o-Pretrain-Long-Caption, captions: {txt: 1.0}, image: jpg}\n"
    assert line in text
    (tmp_path / "p.yaml").write_text(text.replace(line, """long:  # the most
        format: webdataset  # tars
        path: data/long  # many
        captions: {txt: 1.0}  # one
        image: jpg
        count: null  # nothing
"""))
    new = older.migrated(tmp_path / "p.yaml", params.Params)
    assert all(f"# {kept}\n" in new for kept in ("the most", "many", "one")) and "# nothing" not in new
    assert older.migrated(tmp_path / "p.yaml", params.Params).count("# many") == 1
GRID = Euler(25, 2.25, (0.1, 0.9))
RECIPE = """
weights: {source: demo, networks: [dino, lpips, digits]}
datasets: {digits: {sources: {digits: {format: digits}}, image_sizes: [32]}}
reference: {}
train:
  c2i:
    dataset: digits
    init: none
    denoiser: {jit: {size: demo/16, image_size: 32, num_classes: 10}}
    objective: {OBJECTIVE}
    run: {RUN}
prompts: {}
sample: {c2i: {model: c2i, prompts: none, SAMPLE}}
evaluate: {}
"""


def migrated(tmp_path, **parts):
    """What a file with such parts becomes."""
    text = RECIPE
    for name, part in [*parts.items(), ("RUN", ""), ("SAMPLE", ""), ("OBJECTIVE", "repa: {block: 2}")]:
        text = text.replace(name, part)
    (tmp_path / "some.yaml").write_text(text)
    with pytest.raises(ConfigError, match="has the form of an earlier version"):
        read_params(tmp_path / "some.yaml")
    (tmp_path / "some.yaml").write_text(older.migrated(tmp_path / "some.yaml", Params))
    return (tmp_path / "some.yaml").read_text(), read_params(tmp_path / "some.yaml")


@pytest.mark.parametrize(("sampler", "grids", "becomes"), [
    ("{name: heun, order: null, steps: 20}", "{steps: 10, guidance: 2.25}  # few",
     [Heun(20), dataclasses.replace(GRID, steps=10)]),
    ("{guidance: 2.0}", "{name: heun}", [Heun(guidance=2.0), Heun(25, 2.25, (0.1, 0.9))]),
    ("{name: adams_bashforth, order: 3}", "{name: euler, steps: 25}", [AdamsBashforth(order=3), GRID]),
])
def test_a_sampler_is_written_by_its_kind(tmp_path, sampler, grids, becomes):
    """And what the default of its place has is gone: grids are drawn by Euler 25, samples by Heun 50."""
    text, found = migrated(tmp_path, SAMPLE=f"sampler: {sampler}", RUN=f"\n      grid_sampler: {grids}\n")
    assert [found.sample["c2i"].sampler, found.train["c2i"].run.grid_sampler] == becomes
    assert "name:" not in text and "order: null" not in text and ("grid_sampler" in text) == (becomes[1] != GRID)


@dataclasses.dataclass(frozen=True)
class Toy(Source):
    count: int = 3
    size: int = 5
    captions = None

    def tasks(self, data):
        return [], []

    def read(self, data, task):
        return iter(())


@dataclasses.dataclass(frozen=True)
class Holder:
    same: Source = Toy(count=7)
    other: Source = Digits()


def test_defaults_of_a_kind_go_too(monkeypatch):
    monkeypatch.setitem(Source.kinds, "toy", f"{__name__}:Toy")
    written = {"same": {"toy": {"count": 7, "size": 6}}, "other": {"toy": {"count": 3, "size": 6}}}
    older.reduce(written, load(Holder, written))
    assert written == {"same": {"toy": {"size": 6}}, "other": {"toy": {"size": 6}}}
@pytest.mark.parametrize(("objective", "becomes"), [
    ("repa_block: 2, gated: [lpips]", ObjectiveConfig(RepaConfig(block=2))),
    ("repa_block: 2, repa_hidden: 9, pdino_block: 3, pdino_weight: 0.5, gated: [pdino, lpips]",
     ObjectiveConfig(RepaConfig(block=2, hidden=9), pdino=PDinoConfig(0.5, True, 3))),
    ("repa_weight: 0, lpips_weight: 0.2, gated: [], gate_threshold: 0",
     ObjectiveConfig(RepaConfig(0), LpipsConfig(0.2, False), gate_threshold=0)),
    ("repa_weight: 0, lpips_weight: 0, pdino_weight: 0, gated: [], balance_start: null",
     ObjectiveConfig(RepaConfig(0), LpipsConfig(0, False), PDinoConfig(0), balance_start=None)),
])
def test_the_options_of_a_term_stand_together(tmp_path, objective, becomes):
    text, found = migrated(tmp_path, OBJECTIVE=f"\n      {objective}\n")
    assert found.train["c2i"].objective == becomes
    assert "_weight" not in text and "_block" not in text and "gated: [" not in text


@pytest.mark.parametrize(("written", "becomes"), [
    ("{size: demo/16, image_size: 32, num_classes: 7, dropout: 0.5}\n    text: null",
     JiTOptions("demo/16", 32, 7, 0.5)),
    ("{size: demo-text/16, image_size: 32}\n    text: {prefix_probability: 0.5, short_words: 16}",
     JiTTextOptions("demo-text/16", 32)),
    ("{size: demo-text/16, image_size: 32, num_classes: null, dropout: 0.0}\n    text: {short_words: 3}",
     JiTTextOptions("demo-text/16", 32, CaptionConfig(short_words=3))),
])
def test_a_denoiser_is_written_by_its_kind(written, becomes):
    data = YAML(typ="safe", pure=True).load(f"train:\n  a:\n    denoiser: {written}\n")
    older.rewrite(data)
    assert load(Denoiser, data["train"]["a"].pop("denoiser")) == becomes and data == {"train": {"a": {}}}


def test_what_is_moved_keeps_its_comment(tmp_path):
    old = "\n      repa_block: 2  # of six\n      balance_start: null"
    text, _ = migrated(tmp_path, **{"{OBJECTIVE}": old})
    assert re.search(r"^        block: 2 +# of six$", text, re.M)


@pytest.mark.parametrize(("text", "says"), [
    ("train: &a {}\n", "no tags (!), anchors"), ("train: {c2i: {fit: {}}}\n", "missing key"),
    ("- 1\n", "expected a mapping"), ("train: {c2i: 3}\n", "missing key"), ("train: [\n", "other.yaml"),
    ("train: {c2i: {fit: 5}}\ndatasets: {a: 3}\n", "missing key"),
    ("train: {c2i: {run: 5, grid_sampler: {}}}\ndatasets: {a: {sources: [x]}}\nprompts: {a: {source: [x]}}\n",
     "missing key")])
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
    for name in ("networks", "shard/digits", "train/c2i/model"):
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
    assert "now run `dvc commit --force params networks shard@digits`, which" in capsys.readouterr().out, "no curve"
    Path("out/train/c2i/grids").mkdir()
    Path("out/train/c2i/curve.csv").touch()
    assert main(["adopt"]) == 0
    assert "params networks shard@digits train@c2i`" in capsys.readouterr().out
    assert {out: (out / "identity").read_text() for out in outputs} == outputs
    assert Path("out/params.json").exists() and Path("out/code.json").exists(), "what DVC commits, too"
    assert params.main() == 0 and [*older_outputs()] == []


def test_the_networks_of_before_are_taken_over(outputs, capsys):
    """The stage was called weights."""
    for out, identity in outputs.items():
        (out / "identity").write_text(identity)
    manifest = json.loads(Path("out/networks/manifest.json").read_text())
    Path("out/networks/manifest.json").write_text(json.dumps(manifest | {"kind": "weights"}))
    Path("out/networks").rename("out/weights")
    assert main(["adopt"]) == 0
    said = capsys.readouterr().out
    assert "now run `dvc commit --force params networks shard@digits`, which" in said and "out/networks: " in said
    assert not Path("out/weights").exists() and json.loads(Path("out/networks/manifest.json").read_text()) == manifest
    assert Path("out/networks/identity").read_text() == outputs[Path("out/networks")]
    assert main(["adopt"]) == 0 and Path("out/networks/file").read_text() == "networks"


def test_check_lists_what_other_versions_have_made(outputs, capsys):
    assert main(["adopt"]) == main(["check"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("now run"), "nothing to list"
    path = Path("out/networks/manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"versions": manifest["versions"] | {"torch": "2.0"}}))
    assert main(["check"]) == 0
    assert capsys.readouterr().out == f"out/networks: torch 2.0, now {manifest['versions']['torch']}\n"


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
