"""Parameter files that make more of themselves than is written in them."""

import pytest

from pipeline import cluster
from pipeline.params import read_params
from pixelgen.config import ConfigError
from pixelgen.recipe import check_yaml, read_yaml
from tests.security.hostile import ROOT, peak_memory

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGED = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
HOSTILE = {
    "laughs": (LAUGHS + "weights: *a11\n", "line 1: no tags"),
    "quoted in an error": (
        LAUGHS.replace("a0:", "weights:").replace("a11:", "datasets:"), "line 1: no tags"),
    "merged": (MERGED, "line 1: no tags"), "a circle": ("train: &t [*t]", "no tags"),
    "an anchor": ("a: &b c", "no tags"),
    "an object": ("a: !!python/object/apply:os.mkdir [trace]", "no tags"), "a tag": ("a: !b c", "no tags"),
    "a standard tag": ("a: !!set {x}", "no tags"), "a tagged map": ("--- !!omap\n- a: 1\n", "no tags"),
    "lists": ("[" * 500, "line 1: more than 20 levels"),
    "maps": ("".join(" " * n + "a:\n" for n in range(300)), "levels"),
    "keys": ("? " * 5000, "levels"), "a long number": ("a: " + "9" * 5000, "a value of more than 3,000"),
    "a number in hex": ("a: 0x" + "f" * 5000, "a value of more than 3,000"), "no month": ("a: 2001-13-45", "month"),
    "large": ("a: [" + "x, " * 100_000 + "]", "more than 65,536 characters"),
    "two": ("a: 1\n---\nb: 2\n", "single document"),
    "bytes": (b"\xff\xfe", "utf-8"), "a null byte": ("a: \0", "not allowed"),
    "twice": ("a: 1\na: 2\n", "duplicate key"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_yaml_is_refused(tmp_path, monkeypatch, name):
    text, says = HOSTILE[name]
    (tmp_path / "local.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(cluster, "CLUSTERS", tmp_path)
    monkeypatch.delenv("PIXELGEN_CLUSTER", raising=False)
    monkeypatch.chdir(tmp_path)
    for read in (read_yaml, read_params, lambda path: cluster.read_cluster()):
        with pytest.raises(ConfigError, match=rf"local\.yaml is not valid YAML: (.|\n)*{says}"):
            read(tmp_path / "local.yaml")
    assert [p.name for p in tmp_path.iterdir()] == ["local.yaml"]


def test_a_bomb_takes_neither_time_nor_memory(tmp_path):
    for name in ("laughs", "merged", "lists"):
        (tmp_path / f"{name}.yaml").write_text(HOSTILE[name][0])
    program = """
for name in ("laughs", "merged", "lists"):
    try:
        params.read_params(Path(sys.argv[1]) / f"{name}.yaml")
    except ConfigError as error:
        print(name, len(str(error)) < 1000)
print(r.getrusage(r.RUSAGE_SELF).ru_utime - used < 10)
"""
    before = ("import sys; from pathlib import Path; from pipeline import params; "
              "from pixelgen.config import ConfigError; params.read_params(); "
              "used = r.getrusage(r.RUSAGE_SELF).ru_utime")
    said, grown = peak_memory(program, str(tmp_path), before=before)
    assert said.splitlines() == ["laughs True", "merged True", "lists True", "True"] and grown < 50


@pytest.mark.parametrize("path", [p for p in sorted(ROOT.glob("*.yaml")) + sorted(ROOT.glob("*/**/*.yaml"))
                                  if ".venv" not in p.parts], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_our_own_files_are_far_from_the_limits(path):
    text = path.read_text()
    check_yaml(text)
    assert len(text) < 2**15
