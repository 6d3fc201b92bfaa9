"""Golden numbers of the reference programs: where they are, and how the tests find their cases.

The cases are whatever the directory holds; no file stem, number of cases or size is assumed. A test file that finds
none must fail, so each has a `test_cases_were_found` beside its parametrised tests (which pytest would only skip).
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

torch.set_num_threads(1)  # the models are tiny: more threads only get in each other's way


def golden_dir() -> Path:
    """The directory named by PIXELGEN_GOLDEN, else the copy kept with the tests."""
    return Path(os.environ.get("PIXELGEN_GOLDEN") or Path(__file__).parents[1] / "golden")


def read_json(name: str) -> dict[str, Any]:
    """A golden JSON file; empty if there is none, so that collection goes on and `test_cases_were_found` fails."""
    path = golden_dir() / name
    return json.loads(path.read_text()) if path.is_file() else {}


def read_arrays(name: str) -> dict[str, np.ndarray]:
    path = golden_dir() / name
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def models_of(kind: str) -> Iterator[dict[str, Any]]:
    """The descriptions of the models whose class is `kind`, each with the stem of its files as `key`."""
    for path in sorted(golden_dir().glob("*_config.json")):
        described = json.loads(path.read_text())
        if described["class"] == kind:
            yield described | {"key": path.name.removesuffix("_config.json")}


def tensors(arrays: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, Tensor]:
    """The arrays whose names begin with `prefix`, as tensors, by the rest of their names."""
    return {k.removeprefix(prefix): torch.from_numpy(v) for k, v in arrays.items() if k.startswith(prefix)}


def each(cases: Iterable[Mapping[str, Any]], name: str = "case") -> pytest.MarkDecorator:
    """Parametrise a test over listed cases, each under its own key."""
    cases = list(cases)
    return pytest.mark.parametrize(name, cases, ids=[c["key"] for c in cases])


def unlisted(arrays: Mapping[str, np.ndarray], pattern: str, cases: Iterable[Mapping[str, Any]]) -> set[str]:
    """Keys that arrays carry (the first group of `pattern`) but that no listed case has: their numbers go unchecked."""
    carried = {match[1] for name in arrays if (match := re.match(pattern, name))}
    return carried - {c["key"] for c in cases}


def assert_close(actual: Any, expected: Any, atol: float = 0.0, rtol: float = 0.0) -> None:
    """Equal shapes and |actual - expected| <= atol + rtol·|expected|; NaN equals nothing."""
    actual, expected = (np.asarray(v.detach() if isinstance(v, Tensor) else v, np.float64) for v in (actual, expected))
    assert actual.shape == expected.shape, f"shape {actual.shape} instead of {expected.shape}"
    apart = np.abs(actual - expected)
    wrong = ~(apart <= atol + rtol * np.abs(expected))
    if wrong.any():
        at = np.unravel_index(np.where(wrong, apart, -1).argmax(), wrong.shape)
        raise AssertionError(f"{wrong.sum()} of {wrong.size} numbers are too far off; at {[*map(int, at)]}: "
                             f"{actual[at]} instead of {expected[at]}, tolerance {atol} + {rtol} relative")
