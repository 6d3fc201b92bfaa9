"""The ADM metrics against numbers of ADM's own evaluator (golden `adm_metrics.json`, `adm_metrics.npz`)."""

import numpy as np
import pytest
import torch

from pixelgen.metrics import fid
from tests.parity.conftest import assert_close, each, read_arrays, read_json

CASES, ARRAYS = read_json("adm_metrics.json").get("cases", []), read_arrays("adm_metrics.npz")
KINDS = ["features", "spatial", "mu", "sigma", "radii"]
NAMES = {f"{which}_{kind}" for which in ("ref", "sample") for kind in KINDS}
NAMES |= {"sample_logits", "sample_probs"}


def arrays(case):
    return {name: ARRAYS[f"{case['key']}_{name}"] for name in NAMES}


def in_float16(case):
    """Whether the evaluator took distances in float16; it turns to float32 when they overflow."""
    arithmetic = case["reference_distance_arithmetic"]
    assert arithmetic.startswith(("float16", "float32")), arithmetic
    return arithmetic.startswith("float16")


def test_cases_were_found():
    assert CASES
    assert set(ARRAYS) == {f"{case['key']}_{name}" for case in CASES for name in NAMES}


@each(CASES)
def test_sizes(case):
    a, n, m = arrays(case), case["n_ref"], case["n_sample"]
    assert a["ref_features"].shape == (n, case["dim"]) and a["sample_features"].shape == (m, case["dim"])
    assert a["ref_spatial"].shape == (n, case["spatial_dim"])
    assert a["sample_spatial"].shape == (m, case["spatial_dim"])
    assert a["sample_logits"].shape == (m, case["classes"])


@each(CASES)
@pytest.mark.parametrize("which", ["ref", "sample"])
def test_statistics(case, which):
    a = arrays(case)
    mu, sigma = fid.mean_and_covariance(a[f"{which}_features"])
    for name, value in ((f"{which}_mu", mu), (f"{which}_sigma", sigma)):  # the evaluator's means are float32
        assert_close(value, a[name], atol=1e-5 * np.abs(a[name]).max())


@each(CASES)
def test_frechet_distances(case):
    a, expected = arrays(case), case["expected"]
    stored = fid.frechet_distance(a["ref_mu"], a["ref_sigma"], a["sample_mu"], a["sample_sigma"])
    assert_close(stored, expected["fid"], rtol=1e-4)
    for name, kind in (("fid", "features"), ("sfid", "spatial")):
        ref, sample = (fid.mean_and_covariance(a[f"{which}_{kind}"]) for which in ("ref", "sample"))
        assert_close(fid.frechet_distance(*ref, *sample), expected[name], rtol=1e-4)


@each(CASES)
def test_class_probabilities(case):
    a = arrays(case)
    assert_close(fid.log_probabilities(a["sample_logits"]).exp(), a["sample_probs"], rtol=1e-5, atol=1e-7)


@each(CASES)
@pytest.mark.parametrize("name, size", [
    ("inception_score", "default_split_size"), ("inception_score_splits", "split_size"),
])
def test_inception_score(case, name, size):
    score = fid.inception_score(arrays(case)["sample_logits"], case[size])
    assert_close(score, case["expected"][name], rtol=1e-5)


def float16_error(features, radii):
    """How far off the evaluator's squared distances may be that are truly `radii` (N,), of `features` (N, D).

    float16 keeps a number to within half its epsilon. A distance is |a|² - 2ab + |b|², sums taken in float32. With n
    the largest |a|²: of each norm the squares are rounded and then their sum (4n in all), 2ab (2n), the difference of
    the first two (it is r - |b|², at most n + r) and the result (r). The coordinates themselves are rounded before
    that, which moves r by 2·√r·(|a| + |b|) ≤ 4·√(n·r) halves of epsilon.
    """
    n = np.square(features.astype(np.float64)).sum(1).max()
    return float(np.finfo(np.float16).eps) / 2 * (7 * n + 2 * radii + 4 * np.sqrt(n * radii))


@each(CASES)
@pytest.mark.parametrize("which", ["ref", "sample"])
def test_radii(case, which):
    a = arrays(case)
    features, recorded = a[f"{which}_features"], a[f"{which}_radii"]
    radii = fid.neighbour_radii(torch.from_numpy(features).double(), case["k"], chunk=64).numpy()
    assert_close(radii, recorded, atol=float16_error(features, radii) if in_float16(case) else 1e-4 * recorded)


@each(CASES)
def test_precision_and_recall(case):
    a, double = arrays(case), case["float64_recomputation_of_precision_recall"]
    ours = fid.precision_recall(a["ref_features"], a["sample_features"], case["k"])
    for name, value, n in zip(("precision", "recall"), ours, (case["n_sample"], case["n_ref"]), strict=True):
        assert_close(value, case["expected"][name], atol=0.02 if in_float16(case) else 1e-9)
        assert_close(value, double[f"{name}_float64"], atol=1 / n + 1e-9)


@each(CASES)
def test_suite(case):
    """All five as an evaluation calls them. It shuffles and takes k = 3: other scores cannot be compared."""
    a, expected = arrays(case), case["expected"]
    pool, spatial = fid.mean_and_covariance(a["ref_features"]), fid.mean_and_covariance(a["ref_spatial"])
    ref = fid.Reference(*pool, *spatial, images=None)
    sample = fid.Features(a["sample_features"], a["sample_spatial"], a["sample_logits"])
    metrics = fid.adm_suite(ref, a["ref_features"], sample, "inception-v3-compat")
    assert_close(metrics["fid"], expected["fid"], rtol=1e-4)
    assert_close(metrics["sfid"], expected["sfid"], rtol=1e-4)
    if case["n_sample"] <= case["default_split_size"] == 5000:
        assert_close(metrics["inception_score"], expected["inception_score"], rtol=1e-5)
    if case["k"] == 3:
        for name in ("precision", "recall"):
            assert_close(metrics[name], expected[name], atol=0.02 if in_float16(case) else 1e-9)
