"""The ADM metrics by closed forms, brute force and identities, and their files when these are damaged."""

import dataclasses
import io
import math
import time
import zipfile

import numpy as np
import pytest
import torch

from pixelgen.errors import FileError
from pixelgen.metrics import fid
from pixelgen.metrics.fid import Features, Moments, Reference

rng = np.random.default_rng


def covariance(dim, seed):
    factor = rng(seed).standard_normal((dim, dim))
    return factor @ factor.T


def reference(images=True, seed=0):
    r = rng(seed)
    pool, spatial = r.standard_normal((40, 5)), r.standard_normal((40, 3))
    kept = r.integers(0, 256, (6, 4, 5, 3)).astype(np.uint8) if images else None
    return Reference(*fid.mean_and_covariance(pool), *fid.mean_and_covariance(spatial), kept)


class Means:
    """An extractor that can be checked by hand."""

    name = "means"

    def __init__(self):
        self.sizes = []

    def __call__(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3 and images.is_contiguous()
        self.sizes.append(len(images))
        x = images.float()
        return {"pool": x.mean((2, 3)), "spatial": x[:, 0, 0, :2], "logits": x.amax((2, 3)) / 50}


# Fréchet distance


def test_frechet_distance_of_diagonal_gaussians():
    s, t, mu = np.array([1.0, 4.0, 9.0]), np.array([4.0, 1.0, 0.0]), np.array([1.0, -2.0, 0.5])
    expected = mu @ mu + ((np.sqrt(s) - np.sqrt(t)) ** 2).sum()
    assert fid.frechet_distance(mu, np.diag(s), 0 * mu, np.diag(t)) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_commuting_covariances():
    basis = np.linalg.qr(rng(1).standard_normal((6, 6)))[0]
    s, t = rng(2).uniform(0.1, 5, (2, 6))
    value = fid.frechet_distance(np.zeros(6), basis * s @ basis.T, np.zeros(6), basis * t @ basis.T)
    assert value == pytest.approx(((np.sqrt(s) - np.sqrt(t)) ** 2).sum(), rel=1e-10)


def test_frechet_distance_of_2x2_covariances():
    a, b = covariance(2, 3), covariance(2, 4)  # tr M^½ = (tr M + 2 √det M)^½ for 2×2 matrices
    root = math.sqrt(np.trace(a @ b) + 2 * math.sqrt(np.linalg.det(a @ b)))
    value = fid.frechet_distance(np.zeros(2), a, np.zeros(2), b)
    assert value == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-10)


def test_frechet_distance_is_zero_symmetric_and_invariant():
    a, b, mu = covariance(8, 5), covariance(8, 6), rng(7).standard_normal(8)
    assert fid.frechet_distance(mu, a, mu, a) == pytest.approx(0, abs=1e-10)
    value = fid.frechet_distance(mu, a, 0 * mu, b)
    assert fid.frechet_distance(0 * mu, b, mu, a) == pytest.approx(value, rel=1e-10)
    q = np.linalg.qr(rng(8).standard_normal((8, 8)))[0]
    assert fid.frechet_distance(q @ mu, q @ a @ q.T, 0 * mu, q @ b @ q.T) == pytest.approx(value, rel=1e-10)


def test_frechet_distance_is_never_negative():
    for seed in range(20):
        a, mu = covariance(16, seed), np.zeros(16)
        assert 0 <= fid.frechet_distance(mu, a, mu, a) < 1e-10


@pytest.mark.parametrize("n", [10, 25])
def test_frechet_distance_of_fewer_images_than_features(n):
    x, y = rng(9).standard_normal((10, 64)), rng(10).standard_normal((n, 64)) + 0.3
    xc, yc = x - x.mean(0), y - y.mean(0)  # tr (Σ1Σ2)^½ from the data, without covariances
    overlap = np.linalg.svd(xc @ yc.T, compute_uv=False).sum() / math.sqrt(9 * (n - 1))
    traces = (xc**2).sum() / 9 + (yc**2).sum() / (n - 1)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + traces - 2 * overlap
    of_x, of_y = fid.mean_and_covariance(x), fid.mean_and_covariance(y)
    assert fid.frechet_distance(*of_x, *of_y) == pytest.approx(expected, rel=1e-7)
    assert fid.frechet_distance(*of_x, *of_x) == pytest.approx(0, abs=1e-10)  # no floor of rounding noise


def test_frechet_distance_of_float32_statistics_is_float64():
    a, b, mu = covariance(4, 11), covariance(4, 12), rng(13).standard_normal(4)
    single = [x.astype(np.float32) for x in (mu, a, -mu, b)]
    double = [x.astype(np.float64) for x in single]
    assert fid.frechet_distance(*single) == pytest.approx(fid.frechet_distance(*double), rel=1e-13)


@pytest.mark.parametrize("bad", [
    (np.zeros(3), np.eye(3), np.zeros(4), np.eye(4)),
    (np.zeros(3), np.eye(4), np.zeros(3), np.eye(3)),
    (np.zeros(3), np.eye(3), np.array([0, np.nan, 0]), np.eye(3)),
    (np.zeros(3), np.full((3, 3), np.inf), np.zeros(3), np.eye(3)),
    (np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]]), np.zeros(2), np.eye(2)),
    (np.zeros(2), np.diag([1.0, -0.5]), np.zeros(2), np.eye(2)),
])
def test_frechet_distance_refuses_what_are_not_two_gaussians(bad):
    with pytest.raises(ValueError, match=r"features|covariance"):
        fid.frechet_distance(*bad)


# Mean and covariance


def test_moments_do_not_depend_on_batches_or_on_who_saw_them():
    x = rng(14).standard_normal((103, 7)).astype(np.float32)
    whole = fid.mean_and_covariance(x)
    np.testing.assert_allclose(whole[0], x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole[1], np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)
    for cuts in ([], [1], [50], [0, 1, 2, 60, 60, 103]):
        parts, total = np.split(x, cuts), Moments.none(7)
        for i, part in enumerate(parts):
            worker = Moments.none(7)
            (worker if i % 2 else total).add(part)
            total.merge(worker)
        assert total.count == 103
        np.testing.assert_allclose(total.mean, whole[0], rtol=1e-12)
        np.testing.assert_allclose(total.covariance(), whole[1], rtol=1e-10)


def test_mean_and_covariance_of_many_rows():
    x = rng(30).standard_normal((20_000, 2)) * np.linspace(1, 3, 20_000)[:, None]
    mu, sigma = fid.mean_and_covariance(x)
    np.testing.assert_allclose(mu, x.mean(0), rtol=0, atol=1e-12)
    np.testing.assert_allclose(sigma, np.cov(x, rowvar=False), rtol=1e-10)


def test_moments_are_stable_for_a_large_mean():
    x = rng(15).standard_normal((500, 4))
    shifted, moments = x + 2.0**24, Moments.none(4)
    for batch in np.split(shifted, 20):
        moments.add(batch)
    expected = np.cov(shifted - 2.0**24, rowvar=False)
    np.testing.assert_allclose(moments.covariance(), expected, rtol=0, atol=1e-8)


def test_moments_leave_their_input_and_need_two_rows_of_one_width():
    x = rng(16).standard_normal((5, 3))
    before, moments = x.copy(), Moments.none(3)
    moments.add(x[:1])
    with pytest.raises(ValueError, match="two"):
        moments.covariance()
    moments.add(x[1:])
    np.testing.assert_array_equal(x, before)
    with pytest.raises(ValueError, match="do not fit"):
        moments.add(np.zeros((2, 4)))
    with pytest.raises(ValueError, match="do not fit"):
        moments.add(np.zeros((2, 1)))
    assert moments.count == 5


# Inception Score


def test_inception_score_of_certain_and_of_indifferent_classifiers():
    certain = 1000.0 * np.eye(10)[np.arange(200) % 10]
    assert fid.inception_score(certain) == pytest.approx(10, rel=1e-12)
    assert fid.inception_score(certain[:, :1].repeat(10, 1)) == pytest.approx(1, abs=1e-12)
    assert fid.inception_score(1e5 * np.eye(10)[[3] * 7]) == pytest.approx(1, abs=1e-12)  # no log of 0


def test_inception_score_of_known_probabilities():
    p = np.array([[0.5, 0.25, 0.25], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [0.9, 0.05, 0.05]])

    def score(q):
        return math.exp((q * np.log(q / q.mean(0))).sum(1).mean())

    logits = np.log(p) + rng(17).standard_normal((4, 1))  # a constant for each row changes nothing
    assert fid.inception_score(logits) == pytest.approx(score(p), rel=1e-12)
    mean = (score(p[:2]) + score(p[2:])) / 2
    assert fid.inception_score(logits, split_size=2) == pytest.approx(mean, rel=1e-12)
    uneven = (score(p[:3]) + 1.0) / 2  # a shorter last split counts as much as the others
    assert fid.inception_score(logits, split_size=3) == pytest.approx(uneven, rel=1e-12)


def test_inception_score_splits_by_five_thousand_unless_told():
    logits = rng(31).standard_normal((6000, 3)) * np.linspace(0, 5, 6000)[:, None]
    assert fid.inception_score(logits) == fid.inception_score(logits, split_size=5000)
    whole = fid.inception_score(logits, split_size=6000)
    assert fid.inception_score(logits) != pytest.approx(whole, rel=1e-3)


def test_inception_score_shuffles_sorted_classes_reproducibly():
    logits = 20.0 * np.eye(10)[np.arange(2000) // 200]
    assert fid.inception_score(logits, split_size=200) == pytest.approx(1, abs=1e-6)
    shuffled = fid.inception_score(logits, split_size=200, seed=0)
    assert 9.5 < shuffled < 10
    assert shuffled == fid.inception_score(logits, split_size=200, seed=0)
    assert shuffled != fid.inception_score(logits, split_size=200, seed=1)


@pytest.mark.parametrize("bad", [np.zeros((0, 4)), np.zeros(4), np.array([[0.0, np.nan]])])
def test_inception_score_refuses_bad_logits(bad):
    with pytest.raises(ValueError, match="logits"):
        fid.inception_score(bad)


# Precision and recall


def brute_force(real, fake, k):
    def balls(x):
        distances = ((x[:, None] - x[None]) ** 2).sum(-1)
        np.fill_diagonal(distances, np.inf)
        return np.sort(distances, axis=1)[:, k - 1]

    distances = ((real[:, None] - fake[None]) ** 2).sum(-1)
    precision = (distances <= balls(real)[:, None]).any(0).mean()
    return precision, (distances <= balls(fake)[None]).any(1).mean()


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_precision_and_recall_against_brute_force(k, chunk):
    real, fake = rng(18).standard_normal((90, 6)), 0.8 * rng(19).standard_normal((70, 6)) + 0.4
    expected = brute_force(real, fake, k)
    assert min(expected) > 0.05 and max(expected) < 0.98 and expected[0] != expected[1]
    assert fid.precision_recall(real, fake, k, chunk) == expected


def test_precision_and_recall_far_from_the_origin():
    real, fake = rng(20).integers(-512, 512, (2, 80, 6)) / 256  # exact in float64 also after the shift
    assert fid.precision_recall(real + 2.0**26, fake + 2.0**26) == brute_force(real, fake, 3)


def test_sets_that_do_not_meet_and_sets_that_are_equal():
    x = rng(21).standard_normal((50, 4))
    assert fid.precision_recall(x, x + 100) == (0, 0)
    assert fid.precision_recall(x, x[::-1]) == (1, 1)


@pytest.mark.parametrize("chunk", [3, 512])
def test_copies_are_found_even_where_balls_have_no_extent(chunk):
    points = rng(22).uniform(1, 2, (5, 300)).astype(np.float32)  # products of these are rounded
    real, fake = np.repeat(points, 4, axis=0), np.repeat(points, 5, axis=0)
    assert fid.precision_recall(real, fake, k=3, chunk=chunk) == (1, 1)
    radii = fid.neighbour_radii(torch.from_numpy(real).double(), 3, chunk)
    assert radii.min() >= 0 and radii.max() < 1e-9
    near = fake + np.float32(1e-4)
    assert fid.precision_recall(real, near, k=3, chunk=chunk) == (0, 0)


def test_a_set_of_one_point_repeated():
    for value in (0.1, 0.5):  # the mean of the second is exact
        point = np.full((6, 3), value)
        assert fid.precision_recall(point, point) == (1, 1)
        assert fid.precision_recall(point, point + 1e-4) == (0, 0)


def test_radii_far_from_the_origin():
    points = torch.from_numpy(rng(32).integers(-512, 512, (40, 6)) / 256)
    near, far = fid.neighbour_radii(points, 3, 16), fid.neighbour_radii(points + 2.0**26, 3, 16)
    torch.testing.assert_close(far, near, rtol=1e-9, atol=0)


def test_a_duplicate_is_a_neighbour_but_a_point_itself_is_not():
    line = torch.tensor([[0.0], [0.0], [1.0], [5.0]], dtype=torch.float64)
    for chunk in (1, 3, 4):
        assert fid.neighbour_radii(line, 1, chunk).tolist() == pytest.approx([0, 0, 1, 16])
        assert fid.neighbour_radii(line, 2, chunk).tolist() == pytest.approx([1, 1, 1, 25])
    for k in (0, 4):
        with pytest.raises(ValueError, match="neighbour"):
            fid.neighbour_radii(line, k, 2)


def test_the_edge_of_a_ball_is_inside():
    real = np.array([[0.1], [0.4], [0.9]])  # k = 1: balls of radius 0.3, 0.3, 0.5
    assert fid.precision_recall(real, np.array([[-0.2], [1.4], [1.41], [-0.21]]), k=1)[0] == 0.5


def test_precision_and_recall_never_hold_all_distances(monkeypatch):
    sizes, distances = [], fid._squared_distances
    monkeypatch.setattr(fid, "_squared_distances", lambda a, b: sizes.append(len(a)) or distances(a, b))
    fid.precision_recall(rng(23).standard_normal((100, 3)), rng(24).standard_normal((90, 3)), chunk=16)
    assert max(sizes) == 16


@pytest.mark.parametrize("real, fake", [
    (np.zeros((9, 3)), np.zeros((9, 4))),
    (np.full((9, 3), np.nan), np.zeros((9, 3))),
    (np.zeros((9, 3)), np.full((9, 3), np.inf)),
    (np.zeros((3, 3)), np.zeros((9, 3))),
])
def test_precision_and_recall_refuse(real, fake):
    with pytest.raises(ValueError, match=r"features|neighbour"):
        fid.precision_recall(real, fake)


# Files


def same(a, b):
    return all(np.array_equal(x, y) and getattr(x, "dtype", 0) == getattr(y, "dtype", 0)
               for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


@pytest.mark.parametrize("images", [True, False])
def test_reference_round_trip_with_equal_bytes(tmp_path, monkeypatch, images):
    original = reference(images)
    fid.save_reference(tmp_path / "a.npz", original)
    assert same(fid.load_reference(tmp_path / "a.npz"), original)
    later = time.localtime(time.time() + 1e6)
    monkeypatch.setattr(time, "localtime", lambda *_: later)
    fid.save_reference(tmp_path / "b.npz", fid.load_reference(tmp_path / "a.npz"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:  # the layout that others read
        expected = {"mu", "sigma", "mu_s", "sigma_s"} | ({"arr_0"} if images else set())
        assert set(archive.files) == expected
        np.testing.assert_array_equal(archive["sigma_s"], original.sigma_s)


def test_reads_what_numpy_writes(tmp_path):
    original = reference()
    arrays = {name: value for name, value in vars(original).items() if name != "images"}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "r.npz", **arrays, arr_0=original.images, labels=np.arange(3))
        assert same(fid.load_reference(tmp_path / "r.npz"), original)
        save(tmp_path / "s.npz", original.images, np.arange(6))
        np.testing.assert_array_equal(fid.load_samples(tmp_path / "s.npz"), original.images)


def test_references_saved_in_another_order_of_memory_have_equal_bytes(tmp_path):
    original = reference()
    fid.save_reference(tmp_path / "a.npz", original)
    other = dataclasses.replace(original, sigma=np.asfortranarray(original.sigma))
    fid.save_reference(tmp_path / "b.npz", other)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("change, message", [
    ({"sigma": None}, "lacks sigma;"),
    ({"mu": None, "mu_s": None}, "lacks mu, mu_s;"),
    ({"mu": np.zeros(4)}, "mu, sigma must"),
    ({"sigma_s": np.zeros((3, 4))}, "mu_s, sigma_s must"),
    ({"mu": np.arange(5)}, "of floats"),
    ({"mu_s": np.array([0, np.nan, 0])}, "mu_s, sigma_s: .*finite"),
    ({"arr_0": np.zeros((6, 4, 5, 3))}, r"images \(arr_0\) must"),
    ({"arr_0": np.zeros((6, 3, 4, 5), np.uint8)}, r"images \(arr_0\) must"),
    ({"arr_0": np.zeros((0, 4, 5, 3), np.uint8)}, r"images \(arr_0\) must"),
    ({"sigma": np.array([{"run": "me"}], dtype=object)}, "allow_pickle"),
])
def test_a_bad_reference_is_refused_by_name(tmp_path, change, message):
    original = {name: value for name, value in vars(reference()).items() if name != "images"} | change
    np.savez(tmp_path / "r.npz", **{name: value for name, value in original.items() if value is not None})
    with pytest.raises(FileError, match=rf"r\.npz: .*{message}"):
        fid.load_reference(tmp_path / "r.npz")


@pytest.mark.parametrize("array", [
    np.zeros((2, 4, 4, 3), np.float32), np.zeros((2, 3, 4, 4), np.uint8), np.zeros((4, 4, 3), np.uint8),
    np.array([object()]),
])
def test_bad_samples_are_refused(tmp_path, array):
    np.savez(tmp_path / "s.npz", array)
    with pytest.raises(FileError, match=r"s\.npz: "):
        fid.load_samples(tmp_path / "s.npz")


def test_files_that_are_no_npz_are_refused(tmp_path):
    path = tmp_path / "s.npz"
    with pytest.raises(FileNotFoundError, match=r"s\.npz"):
        fid.load_samples(path)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 4, 4, 3), np.uint8))
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("arr_0.npy", "not an array")
    for content in (b"", b"text", buffer.getvalue(), (tmp_path / "text.npz").read_bytes()):
        path.write_bytes(content)
        with pytest.raises(FileError, match=r"s\.npz: "):
            fid.load_samples(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_truncated_and_damaged_files_are_refused(tmp_path, save):
    path, images = tmp_path / "s.npz", rng(25).integers(0, 256, (6, 8, 8, 3)).astype(np.uint8)
    save(path, images)
    whole = path.read_bytes()
    for length in range(0, len(whole), 37):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"s\.npz: "):
            fid.load_samples(path)
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            np.testing.assert_array_equal(np.asarray(fid.load_samples(path)), images)  # a field nobody reads
        except FileError as error:
            assert str(error).startswith(f"{path}: ")


# Extraction and the suite


def test_extract_does_not_depend_on_batches():
    images = rng(26).integers(0, 256, (11, 4, 5, 3)).astype(np.uint8)
    extractor = Means()
    features = fid.extract(extractor, images, 4)
    assert extractor.sizes == [4, 4, 3]
    np.testing.assert_allclose(features.pool, images.mean((1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(features.spatial, images[:, 0, :2, 0])
    for stream, size in ((np.split(images, [3, 10]), 2), (iter(np.split(images, [7])), 100)):
        assert same(fid.extract(Means(), stream, size), features)


def test_extract_refuses_anything_but_images():
    empty, first = np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 3, 4, 4), np.uint8)
    for bad in (first, empty, np.zeros((2, 4, 4, 3)), []):
        with pytest.raises(ValueError, match="images"):
            fid.extract(Means(), bad, 4)


def test_features_must_belong_to_the_same_images():
    with pytest.raises(ValueError, match="one row"):
        Features(np.zeros((3, 2)), np.zeros((3, 2)), np.zeros((4, 2)))
    with pytest.raises(ValueError, match="one row"):
        Features(np.zeros((3, 2)), np.zeros(3), np.zeros((3, 2)))


def test_moments_of_a_stream_are_those_of_the_whole():
    images = rng(27).integers(0, 256, (30, 4, 5, 3)).astype(np.uint8)
    pool, spatial = fid.survey(Means(), iter(np.split(images, [1, 17])), 8)
    features = fid.extract(Means(), images, 30)
    expected = *fid.mean_and_covariance(features.pool), *fid.mean_and_covariance(features.spatial)
    for got, array in zip((pool.mean, pool.covariance(), spatial.mean, spatial.covariance()), expected, strict=True):
        np.testing.assert_allclose(got, array, rtol=1e-10)
    with pytest.raises(ValueError, match="no images"):
        fid.survey(Means(), [], 8)


def test_suite_names_figures_after_their_extractor():
    images = rng(28).integers(0, 256, (2, 40, 4, 5, 3)).astype(np.uint8)
    real, sample = fid.extract(Means(), images[0], 16).pool, fid.extract(Means(), images[1], 16)
    ref = Reference(*fid.mean_and_covariance(real), *fid.mean_and_covariance(sample.spatial + 1), None)
    metrics = fid.adm_suite(ref, real, sample, "inception-v3-compat")
    assert list(metrics) == ["fid", "sfid", "inception_score", "precision", "recall"]
    pool, spatial = fid.mean_and_covariance(sample.pool), fid.mean_and_covariance(sample.spatial)
    assert metrics["fid"] == fid.frechet_distance(ref.mu, ref.sigma, *pool)
    assert metrics["sfid"] == fid.frechet_distance(ref.mu_s, ref.sigma_s, *spatial)
    assert metrics["inception_score"] == fid.inception_score(sample.logits, seed=0)
    assert (metrics["precision"], metrics["recall"]) == fid.precision_recall(real, sample.pool)
    assert all(type(value) is float for value in metrics.values())
    digits = fid.adm_suite(ref, real, sample, "digits")
    names = ["fd_digits", "sfd_digits", "inception_score_digits", "precision_digits", "recall_digits"]
    assert list(digits) == names and list(digits.values()) == list(metrics.values())
    assert list(fid.adm_suite(ref, None, sample, "digits")) == names[:3]
    itself = fid.adm_suite(ref, real, fid.extract(Means(), images[0], 16), "digits")
    assert itself["fd_digits"] == pytest.approx(0, abs=1e-6) and itself["recall_digits"] == 1


def test_suite_shuffles_samples_sorted_by_class():
    logits = 30 * np.eye(10, dtype=np.float32)[np.arange(20000) // 2000]
    features = rng(29).standard_normal((20000, 2)).astype(np.float32)
    ref = Reference(np.zeros(2), np.eye(2), np.zeros(2), np.eye(2), None)
    score = fid.adm_suite(ref, None, Features(features, features, logits), "toy")["inception_score_toy"]
    assert score == pytest.approx(10, abs=0.05)
