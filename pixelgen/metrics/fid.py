"""FID, sFID, Inception Score, precision and recall, computed as for ADM (arXiv 2105.05233).

Shapes: images (N, H, W, 3) uint8, as in the field's npz files; features of N images: pool (N, D), spatial
(N, S), logits (N, C). Statistics and distances are float64. An extractor is a callable with a `name`, from
uint8 images (B, 3, H, W) to {"pool", "spatial", "logits"}; a figure always belongs to an extractor.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from pixelgen.encoders import INCEPTION
from pixelgen.npz import Rows, Stream, naming, read_npz, write_npz

Array = np.ndarray
Images = Array | Rows | Iterable[Array]  # one array of images, in memory or in a file, or several in turn
A = TypeVar("A", bound=Array | Rows)
ROUNDING = 1e-12  # of |x|²: bounds the error of a float64 squared distance computed as |a|² + |b|² - 2ab


class Extractor(Protocol):
    @property
    def name(self) -> str: ...

    def __call__(self, images: Tensor, /) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True, eq=False)
class Features:
    """What an extractor makes of N images: pool (N, D), spatial (N, S), logits (N, C)."""

    pool: Array
    spatial: Array
    logits: Array

    def __post_init__(self) -> None:
        shapes = [array.shape for array in (self.pool, self.spatial, self.logits)]
        if any(len(shape) != 2 or shape[0] != shapes[0][0] for shape in shapes):
            raise ValueError(f"pool, spatial and logits must be one row for each image, not {shapes}")


@dataclass(frozen=True, eq=False)
class Reference:
    """A training set: mean and covariance of its pool (D,), (D, D) and spatial features (S,), (S, S).

    `images` (N, H, W, 3) uint8, some of the set, serve precision and recall alone; None where none were kept.
    """

    mu: Array
    sigma: Array
    mu_s: Array
    sigma_s: Array
    images: Array | Rows | None

    def __post_init__(self) -> None:
        _check_gaussian(self.mu, self.sigma, "mu, sigma")
        _check_gaussian(self.mu_s, self.sigma_s, "mu_s, sigma_s")
        if self.images is not None:
            _check_images(self.images)


def load_reference(path: str | Path) -> Reference:
    """Read an ADM reference batch: npz with mu, sigma, mu_s, sigma_s and, for precision and recall, arr_0, which stays
    in the file. FileError if it holds anything else."""
    arrays = read_npz(path, ("mu", "sigma", "mu_s", "sigma_s"), optional=("arr_0",), lazy=("arr_0",))
    with naming(path):
        return Reference(images=arrays.pop("arr_0", None), **arrays)


def save_reference(path: str | Path, reference: Reference, images: Stream | None = None) -> None:
    """Write that npz. `images`: those of the reference, where they come a few at a time. Equal references give equal
    bytes."""
    arrays = vars(reference) | ({} if images is None else {"images": images})
    write_npz(path, {"arr_0" if name == "images" else name: array for name, array in arrays.items()
                     if array is not None})


def load_samples(path: str | Path) -> Rows:
    """Generated images (N, H, W, 3) uint8: `arr_0` of an npz, in which they stay until they are read. FileError if it
    holds anything else."""
    rows = read_npz(path, ("arr_0",), lazy=("arr_0",))["arr_0"]
    with naming(path):
        return _check_images(rows)


def _check_images(images: A) -> A:
    if len(images.shape) != 4 or images.shape[3] != 3 or 0 in images.shape or images.dtype != np.uint8:
        raise ValueError(f"images (arr_0) must be (N, H, W, 3) uint8, not {images.shape} {images.dtype}")
    return images


def _check_gaussian(mu: Array, sigma: Array, what: str) -> None:
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or mu.dtype.kind != "f" or sigma.dtype.kind != "f":
        given = f"{mu.shape} {mu.dtype} and {sigma.shape} {sigma.dtype}"
        raise ValueError(f"{what} must be a mean (D,) and a covariance (D, D) of floats, not {given}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{what}: there are values that are not finite")


def feature_batches(extractor: Extractor, images: Images, batch_size: int) -> Iterator[Features]:
    """Features of images, at most `batch_size` at a time."""
    arrays = images.chunks(batch_size) if isinstance(images, Rows) else images
    for array in [arrays] if isinstance(arrays, np.ndarray) else arrays:
        _check_images(array)
        for start in range(0, len(array), batch_size):
            batch = np.array(array[start : start + batch_size].transpose(0, 3, 1, 2), order="C")
            features = extractor(torch.from_numpy(batch))
            yield Features(**{name: value.float().cpu().numpy() for name, value in features.items()})


def extract(extractor: Extractor, images: Images, batch_size: int) -> Features:
    """Features of all the images, in memory: 20 kB an image with Inception."""
    batches = [vars(batch) for batch in feature_batches(extractor, images, batch_size)]
    if not batches:
        raise ValueError("no images")
    return Features(**{name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]})


@dataclass(eq=False)
class Moments:
    """Running mean (D,) and scatter (D, D) of rows (N, D), float64. Two of them merge: workers can share a data set.

    Batches are combined through their own means (Chan, Golub and LeVeque 1983), which is stable where the
    mean is large beside the spread; a sum of squares is not.
    """

    count: int
    mean: Array
    scatter: Array

    @classmethod
    def none(cls, dim: int) -> "Moments":
        """Those of no rows."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def add(self, rows: Array) -> None:
        """Take in rows (N, D)."""
        if len(rows):
            centred = rows.astype(np.float64)
            mean = centred.mean(axis=0)
            centred -= mean
            self._combine(len(rows), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Take in the rows that `other` has seen."""
        if other.count:
            self._combine(other.count, other.mean, other.scatter)

    def _combine(self, count: int, mean: Array, scatter: Array) -> None:
        if mean.shape != self.mean.shape:
            raise ValueError(f"features {mean.shape} do not fit moments of features {self.mean.shape}")
        total, delta = self.count + count, mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self.scatter += scatter + np.outer(delta, delta) * (self.count * count / total)
        self.count = total

    def covariance(self) -> Array:
        """(D, D), unbiased: divided by N - 1."""
        if self.count < 2:
            raise ValueError(f"a covariance needs two images or more, not {self.count}")
        return self.scatter / (self.count - 1)


def mean_and_covariance(rows: Array) -> tuple[Array, Array]:
    """Mean (D,) and unbiased covariance (D, D) of rows (N, D), float64."""
    moments = Moments.none(rows.shape[1])
    for start in range(0, len(rows), 8192):
        moments.add(rows[start : start + 8192])
    return moments.mean, moments.covariance()


def survey(extractor: Extractor, images: Images, batch_size: int) -> tuple[Moments, Moments]:
    """Moments of the pool and of the spatial features of any number of images, in constant memory."""
    pool = spatial = None
    for batch in feature_batches(extractor, images, batch_size):
        if pool is None or spatial is None:
            pool, spatial = Moments.none(batch.pool.shape[1]), Moments.none(batch.spatial.shape[1])
        pool.add(batch.pool)
        spatial.add(batch.spatial)
    if pool is None or spatial is None:
        raise ValueError("no images")
    return pool, spatial


def frechet_distance(mu1: Array, sigma1: Array, mu2: Array, sigma2: Array) -> float:
    """|μ1 - μ2|² + tr(Σ1 + Σ2 - 2(Σ1Σ2)^½): squared Fréchet distance of Gaussians (arXiv 1706.08500, eq. 6).

    Σ1Σ2 has the eigenvalues of AAᵀ with A = Σ1^½Σ2^½, so the trace of its root is the sum of A's singular
    values. No root is taken of a product's rounding error, which shows with fewer images than features.
    """
    if mu1.shape != mu2.shape:
        raise ValueError(f"cannot compare features {mu1.shape} with features {mu2.shape}")
    roots = []
    for mu, sigma in ((mu1, sigma1), (mu2, sigma2)):
        _check_gaussian(mu, sigma, "mean and covariance")
        values, vectors = np.linalg.eigh(sigma.astype(np.float64))
        if max(-values[0], np.abs(sigma - sigma.T).max()) > 1e-4 * np.abs(values).max():  # far above rounding
            raise ValueError("a covariance must be symmetric and without negative eigenvalues")
        roots.append(vectors * np.sqrt(values.clip(min=0)) @ vectors.T)
    difference = mu1.astype(np.float64) - mu2
    trace = np.trace(sigma1, dtype=np.float64) + np.trace(sigma2, dtype=np.float64)
    overlap = np.linalg.svd(roots[0] @ roots[1], compute_uv=False).sum()
    return max(0.0, float(difference @ difference + trace - 2 * overlap))


def log_probabilities(logits: Array) -> Tensor:
    """Log-softmax of logits (N, C), float64."""
    if logits.ndim != 2 or 0 in logits.shape or not np.isfinite(logits).all():
        raise ValueError(f"logits must be (N, C) and finite; these are {logits.shape} or not finite")
    return torch.from_numpy(np.array(logits, np.float64)).log_softmax(dim=1)


def inception_score(logits: Array, split_size: int = 5000, seed: int | None = None) -> float:
    """exp E KL(p(y|x) ‖ p(y)) (arXiv 1606.03498, section 4) of logits (N, C), in [1, C]: mean over splits.

    Splits are consecutive, the last may be shorter. When samples are sorted by class, each split holds few
    classes and scores far too low: `seed` shuffles them first, None keeps their order.
    """
    log_p = log_probabilities(logits)
    if seed is not None:
        log_p = log_p[np.random.RandomState(seed).permutation(len(log_p))]  # its stream never changes
    scores = []
    for split in log_p.split(split_size):
        log_marginal = split.logsumexp(dim=0) - math.log(len(split))
        scores.append((split.exp() * (split - log_marginal)).sum(dim=1).mean().exp().item())
    return float(np.mean(scores))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    products = torch.addmm(b.square().sum(dim=1)[None], a, b.T, alpha=-2)
    return products.add_(a.square().sum(dim=1)[:, None]).clamp_(min=0)


def neighbour_radii(points: Tensor, k: int, chunk: int) -> Tensor:
    """Squared distances (N,) from each of N points (N, D) to its k-th nearest other point."""
    if not 0 < k < len(points):
        raise ValueError(f"{len(points)} points have no neighbour number {k}")
    points, radii = points - points.mean(dim=0), []
    for start in range(0, len(points), chunk):
        distances = _squared_distances(points[start : start + chunk], points)
        distances.diagonal(start).fill_(torch.inf)  # a point itself, by place: its duplicates are neighbours
        radii.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(radii)


def precision_recall(reference: Array, sample: Array, k: int = 3, chunk: int = 512,
                     device: str | torch.device = "cpu") -> tuple[float, float]:
    """Improved precision and recall (arXiv 1904.06991, eqs. 1-2) of features (N, D) and (M, D), in [0, 1].

    Precision is the share of samples in a ball around any reference point that reaches its k-th neighbour;
    recall is the reverse. A ball includes its edge, give or take rounding: a copy is in a ball of radius 0.
    Memory: `chunk` × max(N, M) distances.
    """
    if reference.ndim != 2 or sample.ndim != 2 or reference.shape[1] != sample.shape[1]:
        raise ValueError(f"cannot compare features {reference.shape} with features {sample.shape}")
    if not (np.isfinite(reference).all() and np.isfinite(sample).all()):
        raise ValueError("features with values that are not finite")
    real, fake = (torch.as_tensor(np.array(x, np.float64), device=device) for x in (reference, sample))
    centre = real.mean(dim=0)  # moving all points changes no distance and makes rounding errors smaller
    real, fake = real - centre, fake - centre
    real_radii, fake_radii = neighbour_radii(real, k, chunk), neighbour_radii(fake, k, chunk)
    real_radii += ROUNDING * (real_radii + real.square().sum(dim=1))
    fake_radii += ROUNDING * (fake_radii + fake.square().sum(dim=1))
    precise, recalled = torch.zeros(len(fake), dtype=torch.bool, device=device), 0
    for start in range(0, len(real), chunk):
        distances = _squared_distances(real[start : start + chunk], fake)
        precise |= (distances <= real_radii[start : start + chunk, None]).any(dim=0)
        recalled += int((distances <= fake_radii).any(dim=1).sum())
    return int(precise.sum()) / len(fake), recalled / len(real)


def adm_suite(ref: Reference, real_pool: Array | None, sample: Features, name: str,
              device: str | torch.device = "cpu") -> dict[str, float]:
    """FID, sFID, Inception Score and, given the pool features (N, D) of the reference's images, precision and recall.

    `name` is the extractor's. Only `inception-v3-compat` gives fid, sfid, inception_score, precision, recall;
    "digits", say, gives fd_digits, sfd_digits, inception_score_digits, precision_digits, recall_digits.
    """
    frechet, suffix = ("fid", "") if name == INCEPTION else ("fd", f"_{name}")
    metrics = {
        frechet: frechet_distance(ref.mu, ref.sigma, *mean_and_covariance(sample.pool)),
        f"s{frechet}": frechet_distance(ref.mu_s, ref.sigma_s, *mean_and_covariance(sample.spatial)),
        "inception_score": inception_score(sample.logits, seed=0),
    }
    if real_pool is not None:
        metrics["precision"], metrics["recall"] = precision_recall(real_pool, sample.pool, device=device)
    return {metric + suffix: value for metric, value in metrics.items()}
