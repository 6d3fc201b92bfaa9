"""What a stage is made of: the digest is the same for the same meaning, and another one for another."""

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import code, params
from pipeline.params import SECTIONS, read_params

ROOT = Path(__file__).parents[2]
SOURCE = '''"""A module."""

from pixelgen.used import twice

RATES = {"a": 1e-4, b"b": -2, None: ...}


class Thing:
    """A thing."""

    count: int = 3  # of them


def main(x: int, *rest: int) -> str:
    """What it does."""
    match x:
        case 1 | 2:
            return f"{twice(x)!r:>{len(rest)}} of {x:.2f}, {{}} and " "more" f"{x}"
    try:
        return "".join(f"{y}" for y in rest if (z := y) > 0)
    except* ValueError:
        return ""
'''


@pytest.fixture
def digest(tmp_path, monkeypatch):
    """The digest of a stage of this source, after changes of its files."""
    monkeypatch.setattr(code, "ROOT", tmp_path)
    files = {"pipeline/__init__.py": "", "pipeline/stages/__init__.py": "", "pipeline/stages/one.py": SOURCE,
             "pixelgen/__init__.py": "import pixelgen.unused", "pixelgen/used.py": "def twice(x):\n    return 2 * x\n",
             "pixelgen/unused.py": "x = 1", "pixelgen/config.py": "import pixelgen.unused"}

    def write(*kinds, **changes):
        code.parsed.cache_clear(), code.digest.cache_clear()
        for name, text in (files | {f"{name.replace('__', '/')}.py": text for name, text in changes.items()}).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return code.digest("one", frozenset(kinds))

    yield write
    code.parsed.cache_clear(), code.digest.cache_clear()


SAME = [
    ("# of them", "# of the things"), ('"""A module."""', ""), ('    """What it does."""\n', ""),
    ('"""A thing."""', '"""Another description."""'), ("    match x:", "\n    # a match\n    match (x):"),
    ('" "more" f"', "more"), ("1e-4", "0.0001"),
]
CHECKED = SOURCE.replace("    match x:", "    require(x > 0, 'x must be positive')\n    match x:").replace(
    "class Thing:", "def kept(x):\n    return 3 * x\n\n\nclass Thing:")  # with a check, and what estimates call
OTHER = [("count: int = 3", "count: int = 4"), (":.2f", ":.3f"), ("!r", "!s"), ("1 | 2", "2 | 1"), ("1e-4", "1"),
         ("*rest: int", "*rest"), ("-2", "2"), ("> 0", ">= 0"), ("and ", "or "), ("None: ...", "None: None")]


def test_the_digest_is_the_same_under_every_python(digest):
    """A figure from Python 3.11; a test under another one compares its own with it."""
    assert digest() == "ce7e8317a8b60fc8"


@pytest.mark.parametrize("python", ["python3.11", "python3.12", "python3.13"])
def test_other_pythons_give_the_same_digests(python):
    found = shutil.which(python)
    if not found or subprocess.run([found, "--version"], capture_output=True).returncode:
        pytest.skip(f"there is no {python} here")
    program = ("import json, runpy; digest = runpy.run_path('pipeline/code.py')['digest']; "
               f"print(json.dumps({{stage: digest(stage) for stage in {[*SECTIONS]}}}))")
    told = subprocess.run([found, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert json.loads(told) == {stage: code.digest(stage) for stage in SECTIONS}


@pytest.mark.parametrize(("old", "new"), SAME)
def test_comments_docstrings_and_layout_are_no_part_of_it(digest, old, new):
    before = digest()
    assert old in SOURCE and digest(pipeline__stages__one=SOURCE.replace(old, new)) == before


def test_checks_and_estimates_are_no_part_of_it(digest):
    before = digest(pipeline__stages__one=CHECKED)
    for old, new in ("x > 0", "x >= 0"), ("must be positive", "has to be positive"), ("3 * x", "4 * x"):
        assert old in CHECKED and digest(pipeline__stages__one=CHECKED.replace(old, new)) == before
    assert digest(pipeline__stages__one=CHECKED.replace("kept", "keep")) != before
    assert digest(pipeline__stages__one=CHECKED.replace("require(x > 0", "y = require(x > 0")) != before


def test_only_denoisers_and_encoders_estimate_under_these_names():
    """A method of such a name counts nowhere: it must not be one that makes something."""
    found = {path.relative_to(ROOT).parts[:2] for top in ("pixelgen", "pipeline") for path in (ROOT / top).rglob("*.py")
             for node in ast.walk(ast.parse(path.read_text()))
             if isinstance(node, ast.FunctionDef) and node.name in code.ESTIMATES}
    assert found == {("pixelgen", "denoisers"), ("pixelgen", "encoders")}


@pytest.mark.parametrize(("old", "new"), OTHER)
def test_everything_else_is(digest, old, new):
    before = digest()
    assert old in SOURCE and digest(pipeline__stages__one=SOURCE.replace(old, new)) != before


def test_what_is_imported_counts_and_plumbing_does_not(digest):
    before = digest()
    assert digest(pixelgen__used="def twice(x):\n    return 3 * x\n") != before
    assert digest(pixelgen__unused="x = 2") == before
    with_plumbing = SOURCE.replace("import twice", "import twice\nimport pixelgen.config")
    assert digest(pipeline__stages__one=with_plumbing) != before, "the import itself is code"
    again = digest(pipeline__stages__one=with_plumbing)
    assert digest(pipeline__stages__one=with_plumbing, pixelgen__config="y = 2", pixelgen__unused="x = 2") == again
    inside = SOURCE.replace("    match x:", "    from pixelgen import unused\n    match x:")
    assert digest(pipeline__stages__one=inside) != digest(pipeline__stages__one=inside, pixelgen__unused="x = 2")
    typing = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pixelgen.unused\n" + SOURCE
    assert digest(pipeline__stages__one=typing) == digest(pipeline__stages__one=typing, pixelgen__unused="x = 2")


def test_a_kind_counts_where_it_is_chosen_and_lists_of_kinds_do_not(digest):
    listed = SOURCE.replace("    count: int", '    kinds: ClassVar = {"a": "pixelgen.unused:A"}\n    count: int')
    one = digest("pixelgen.unused", pipeline__stages__one=listed)
    assert digest(pipeline__stages__one=listed) != one != digest("pixelgen.unused:B", pipeline__stages__one=listed)
    assert digest("pixelgen.unused", pipeline__stages__one=listed, pixelgen__unused="x = 2") != one
    more = listed.replace('"}', '", "b": "pixelgen.more:B"}')
    assert more != listed and digest("pixelgen.unused", pipeline__stages__one=more) == one
    assert digest("pixelgen.unused", pipeline__stages__one=listed.replace("kinds", "kind")) != one


@pytest.fixture
def made_of(monkeypatch):
    """The modules of an instance of a stage of the demo."""
    def find(stage, key=""):
        found = set()
        monkeypatch.setattr(params, "digest", lambda stage, kinds: found.update(
            *map(code.closure, [f"pipeline.stages.{stage}", *(kind.partition(":")[0] for kind in kinds)])))
        params.code_digest(read_params(ROOT / "params.yaml"), stage, key)
        return found

    return find


def test_stages_are_made_of_what_they_should_be(made_of):
    train, sample, fid = made_of("train", "c2i"), made_of("sample", "c2i"), made_of("evaluate", "fid")
    assert {"pixelgen.losses", "pixelgen.objective", "pixelgen.train", "pixelgen.models.jit", "pixelgen.data.order",
            "pixelgen.encoders.dino", "pixelgen.ema", "pixelgen.rank"} <= train
    assert not train & {"pixelgen.samplers.heun", "pixelgen.generate"}, "grids are no part of a run"
    assert not train & {"pipeline.datasets", "pipeline.networks", "pipeline.metrics"}, "their files count by themselves"
    assert {"pixelgen.samplers.heun", "pixelgen.models.jit", "pixelgen.images", "pixelgen.generate"} <= sample
    assert not sample & {"pixelgen.losses", "pixelgen.train", "pixelgen.objective", "pixelgen.samplers.euler"}
    assert {"pipeline.metrics.features", "pixelgen.metrics.fid", "pixelgen.samplers.heun", "pipeline.demo.judge"} <= fid
    assert not fid & {"pixelgen.metrics.detector", "pipeline.demo.scenes", "pixelgen.encoders.inception"}
    assert "pipeline.demo.scenes" in made_of("evaluate", "geneval")
    assert {"pipeline.demo.judge", "pixelgen.metrics.fid"} <= made_of("reference", "digits")
    digits, scenes = made_of("shard", "digits"), made_of("shard", "scenes-sft")
    assert {"pipeline.demo.digits", "pixelgen.images", "pixelgen.data.shards"} <= digits - {"pipeline.demo.scenes"}
    assert "pipeline.demo.scenes" in scenes and not scenes & {"pipeline.demo.digits", "pipeline.datasets.parquet"}
    assert "pixelgen.data.captions" not in scenes, "prefixes of prompts are put on in training"
    assert {"pipeline.demo.stand_ins", "pixelgen.data.captions", "pixelgen.images"} <= made_of("networks")
    assert {"pipeline.page", "pipeline.metrics.adm", "pipeline.demo.geneval"} <= made_of("report")
    assert {path.stem for path in (ROOT / "pipeline/stages").glob("[a-z]*.py")} == {*SECTIONS}
    for module in code.PLUMBING:
        assert code.source(module), f"{module} is not there any more"


def test_each_stage_depends_on_its_digest():
    from pixelgen.recipe import read_yaml

    for name, stage in read_yaml(ROOT / "dvc.yaml")["stages"].items():
        described = stage.get("do", stage)
        if name != "params":
            assert {"out/code.json": [f"{name}.${{key}}" if SECTIONS[name] else name]} in described["params"]
            assert not [dep for dep in described.get("deps", []) if dep.endswith(".py")], "the digest stands for files"


def test_the_digests_take_no_torch():
    program = ("import sys; from pipeline.params import *; code_digests(read_params()); "
               "assert not {'torch', 'ray', 'sklearn'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
