"""The parity tests can fail: every kind of golden number is changed in turn, and the tests that read it must go red.

One process runs the test files again and again, each time on another changed copy of their golden numbers.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.conftest import golden_dir, models_of

FILES = {  # test file -> the golden files that it reads
    "test_adm.py": ("adm_metrics.json", "adm_metrics.npz"),
    "test_embeddings.py": ("embeddings.json", "embeddings.npz"),
    "test_losses.py": ("loss.json", "loss.npz"),
    "test_models.py": tuple(f"{case['key']}_{part}" for case in list(models_of("JiT"))[:1]
                            for part in ("config.json", "state.npz", "io.npz")),
    "test_samplers.py": ("samplers.json", "samplers.npz"),
    "test_transforms.py": ("transforms.json", "transforms.npz"),
}
DESCRIPTIVE = re.compile(  # numbers that say where a case comes from, and change nothing
    r"relative_|param_seed|closest_distance|float32_rounding|effect_of_that|attn_drop|input_scale|default_split_size")

RUN = """
import contextlib, gc, io, json, os, sys
import pytest
quick = [f"-pno:{name}" for name in ("cacheprovider", "unraisableexception", "threadexception", "logging")]
for test, directory in json.load(sys.stdin):
    gc.freeze()
    for name in [n for n in sys.modules if n.startswith("tests")]:
        del sys.modules[name]
    os.environ["PIXELGEN_GOLDEN"] = directory
    with contextlib.redirect_stdout(io.StringIO()):
        code = pytest.main([test, "-x", "--tb=no", *quick])
    print(int(code), flush=True)
"""


def role(name: str) -> str:
    """Arrays that differ in the number of their case, block or layer only play the same role."""
    return re.sub(r"(?<!period)\d+", "N", name)


def changed(value: np.ndarray) -> np.ndarray:
    """A copy with one entry far off: the largest within [-1, 1], beyond which pixels saturate, or else the largest."""
    value = value.copy()
    size = np.abs(value.astype(np.float64))
    at = np.unravel_index(np.where(size <= 1, size, -1 / np.maximum(size, 1)).argmax(), value.shape)
    if value.dtype.kind == "f":
        value[at] -= np.copysign(max(1.0, size[at]) / 4, value[at])
    else:
        value[at] = value[at] - 3 if value[at] >= 3 else value[at] + 3
    return value


def leaves(node: Any, where: tuple = ()) -> Iterator[tuple]:
    """Paths to the numbers in nested JSON."""
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(child, (*where, key))
    elif isinstance(node, bool | int | float):
        yield where


def mutants(names: tuple[str, ...], out: Path) -> Iterator[tuple[str, Path]]:
    """Directories with all golden files of a test, one of them changed in one number, or without one entry; the first
    without a change."""
    paths = [golden_dir() / name for name in names]

    def write(name: str, path: Path | None = None, content: Any = None) -> tuple[str, Path]:
        directory = out / re.sub(r"\W+", "-", name)
        directory.mkdir()
        for other in paths:
            if other != path:
                (directory / other.name).symlink_to(other.resolve())
        if path and path.suffix == ".npz":
            np.savez(directory / path.name, **content)
        elif path:
            (directory / path.name).write_text(json.dumps(content))
        return name, directory

    yield write("unchanged")
    for path in paths:
        if path.suffix == ".npz":
            with np.load(path) as file:
                arrays = dict(file)
            gates = {name.removesuffix("passes_gate"): v for name, v in arrays.items() if name.endswith("_passes_gate")}
            gate = {name: v for case, v in gates.items() for name in arrays if name.startswith(case)}
            for name in {role(n): n for n in reversed(arrays) if n not in gate or gate[n].any()}.values():
                value, rows = arrays[name].copy(), slice(None)
                if name.endswith("embedding_table.weight"):  # the null label's row: not every other one is used
                    rows = slice(len(value) - 1, None)
                elif name in gate and len(value) == len(gate[name]):  # of a sample that passes every number counts
                    rows = slice(gate[name].argmax(), gate[name].argmax() + 1)
                value[rows] = changed(value[rows])
                yield write(f"{path.name} {name} changed", path, arrays | {name: value})
            name = next(iter(arrays))
            yield write(f"{path.name} {name} gone", path, {k: v for k, v in arrays.items() if k != name})
        else:
            described = json.loads(path.read_text())
            counting = [where for where in leaves(described) if not DESCRIPTIVE.search(str(where))]
            for where in {tuple(k for k in where if isinstance(k, str)): where for where in counting}.values():
                yield write(f"{path.name} {where} changed", path, edited(described, where, drop=False))
            where = where[:-1] if isinstance(where[-1], int) else where
            yield write(f"{path.name} {where} gone", path, edited(described, where, drop=True))


def edited(node: Any, where: tuple, drop: bool) -> Any:
    copy = json.loads(json.dumps(node))
    *parents, key = where
    inner = copy
    for parent in parents:
        inner = inner[parent]
    old = inner[key]
    if drop:
        del inner[key]
    elif isinstance(old, bool):
        inner[key] = not old
    else:
        inner[key] = old + 1 if isinstance(old, int) else old + max(1.0, abs(old)) / 4
    return copy


@pytest.fixture(scope="module")
def exit_codes(tmp_path_factory) -> dict[str, dict[str, int]]:
    """Exit code of every test file on every change of its golden files."""
    named = {test: dict(mutants(names, tmp_path_factory.mktemp(test))) for test, names in FILES.items()}
    jobs = [(str(Path(__file__).with_name(test)), str(path)) for test in FILES for path in named[test].values()]
    process = subprocess.run([sys.executable, "-c", RUN], cwd=Path(__file__).parents[2], input=json.dumps(jobs),
                             capture_output=True, text=True, check=True)
    codes = map(int, process.stdout.split())
    return {test: {name: next(codes) for name in named[test]} for test in FILES}


@pytest.mark.parametrize("test", FILES)
def test_changed_numbers_are_noticed(test, exit_codes):
    codes = exit_codes[test]
    assert codes.pop("unchanged") == pytest.ExitCode.OK
    red = (pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.INTERRUPTED)  # the latter: an error while collecting
    unnoticed = [name for name, code in codes.items() if code not in red]
    assert codes and not unnoticed
