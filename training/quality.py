"""How a set of pictures differs from another, in features (N, D): the field's measures, each by its own paper.

All of it in float64 on the CPU. Intervals hold whole groups together: pictures of one concept rise and fall as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
RESAMPLES = 200
NEIGHBOURS = 3
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
CHUNK = 2048


class Estimate(NamedTuple):
    """A measure with its 95% interval."""

    value: float
    low: float
    high: float


class Resampler:
    """Draws of whole groups with replacement, as counts of each picture; the same for every measure."""

    def __init__(self, groups: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> None:
        names = {name: k for k, name in enumerate(sorted(set(groups)))}
        member = np.array([names[group] for group in groups])
        drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
        self.counts = np.stack([np.bincount(row, minlength=len(names))[member] for row in drawn]).astype(np.float64)

    def mean(self, values: Tensor, weights: Tensor | None = None) -> Estimate:
        """Of values, one a picture: their mean, weighted if asked, and the percentiles of the resampled means."""
        each = values.double().numpy()
        by = np.ones_like(each) if weights is None else weights.double().numpy()
        means = self.counts @ (by * each) / (self.counts @ by)
        low, high = np.quantile(means, [0.025, 0.975])
        return Estimate(float((by * each).sum() / by.sum()), float(low), float(high))

    def spread(self, value: float, resampled: Callable[[Array], float]) -> Estimate:
        """Of a measure of the set: `resampled` computes it from counts. A resample repeats pictures, which moves such
        measures to one side, so the interval is that of the deviations from the resamples' own mean."""
        found = np.array([resampled(row) for row in self.counts])
        low, high = np.quantile(found - found.mean(), [0.025, 0.975])
        return Estimate(value, value + float(low), value + float(high))


class Moments(NamedTuple):
    """Mean (D,) and covariance (D, D) of features, and their number."""

    mean: Array
    covariance: Array
    rows: int


def moments(features: Tensor) -> Moments:
    """Of features (N, D), N at least 2; the covariance over N - 1."""
    x = features.double().numpy()
    return Moments(x.mean(0), np.cov(x, rowvar=False), len(x))


class FrechetDistance:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features from a reference (Heusel et al. 2017, eq. 6).

    The trace of the root is the sum of the singular values of A R, where C1 = A^T A and C2 = R R^T: no root of a
    matrix that is not symmetric, and of no more rows than there are pictures.
    """

    def __init__(self, features: Tensor, reference: Moments) -> None:
        self._x, self._reference = features.double().numpy(), reference
        values, vectors = np.linalg.eigh(reference.covariance)
        self._root = vectors * np.sqrt(values.clip(0))

    def __call__(self, counts: Array | None = None) -> float:
        """counts: how often each picture counts."""
        weights = np.ones(len(self._x)) if counts is None else counts
        total = weights.sum()
        mean = weights @ self._x / total
        centred = (np.sqrt(weights / (total - 1))[:, None] * (self._x - mean))[weights > 0]
        cross = np.linalg.svd(centred @ self._root, compute_uv=False).sum()
        apart = ((mean - self._reference.mean) ** 2).sum()
        return float(apart + (centred**2).sum() + np.trace(self._reference.covariance) - 2 * cross)


class KernelDistance:
    """Unbiased squared kernel distance with the cubic kernel (x.y / D + 1)^3 (Binkowski et al. 2018, sec. 4).

    Over all pairs rather than subsets: exact for its pictures, and without a draw.
    """

    def __init__(self, features: Tensor, reference: Tensor) -> None:
        x, y = features.double().numpy(), reference.double().numpy()
        width = x.shape[1]

        def kernel(a: Array, b: Array) -> Array:
            return np.asarray((a @ b.T / width + 1) ** 3)

        self._xx = kernel(x, x)
        self._x_to_y = kernel(x, y).mean(1)
        own = sum(float(kernel(y[a : a + CHUNK], y).sum()) for a in range(0, len(y), CHUNK))
        self._yy = (own - float((((y**2).sum(1) / width + 1) ** 3).sum())) / (len(y) * (len(y) - 1))

    def __call__(self, counts: Array | None = None) -> float:
        """counts: how often each picture counts; a picture is not compared with itself."""
        w = np.ones(len(self._xx)) if counts is None else counts
        diagonal = self._xx.diagonal()
        pairs = w.sum() ** 2 - (w**2).sum()
        own = (w @ self._xx @ w - (w**2) @ diagonal) / pairs
        return float(own + self._yy - 2 * w @ self._x_to_y / w.sum())


def cmmd(features: Tensor, reference: Tensor) -> float:
    """1000 times the squared distance of CLIP embeddings under a Gaussian kernel of sigma 10 (Jayasumana et al. 2024,
    eq. 4, as its authors compute it: pairs of a picture with itself count)."""
    x, y = (f.double() / f.double().norm(dim=1, keepdim=True) for f in (features, reference))

    def mean_kernel(a: Tensor, b: Tensor) -> float:
        parts = (torch.exp(-torch.cdist(p, b) ** 2 / (2 * CMMD_SIGMA**2)).sum() for p in torch.split(a, CHUNK))
        return float(sum(parts, torch.zeros(()))) / (len(a) * len(b))

    return CMMD_SCALE * (mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y))


def inception_score(logits: Tensor, counts: Array | None = None) -> float:
    """exp of the mean divergence of p(class | picture) from p(class) (Salimans et al. 2016), over one split."""
    weights = torch.ones(len(logits)).double() if counts is None else torch.from_numpy(counts)
    weights = (weights / weights.sum())[:, None]
    log_p = logits.double().log_softmax(1)
    marginal = (weights * log_p.exp()).sum(0, keepdim=True).clamp(min=1e-300).log()
    return float((weights * log_p.exp() * (log_p - marginal)).sum().exp())


class Coverage:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    Balls reach to each picture's k-th nearest neighbour in its own set. For resamples the balls stay as they are.
    """

    def __init__(self, features: Tensor, reference: Tensor, neighbours: int = NEIGHBOURS) -> None:
        self.neighbours = neighbours
        x, y = features.double(), reference.double()
        self._own_radius, real_radius = radii(x, neighbours), radii(y, neighbours)
        apart = torch.cat([torch.cdist(part, y) for part in torch.split(x, CHUNK)])  # (N, M)
        self._in_real = apart <= real_radius  # picture n lies in the ball of real m
        self._in_own = apart <= self._own_radius[:, None]  # real m lies in the ball of picture n

    def precision(self) -> Tensor:
        """Per picture, whether it lies in a ball of the real ones: (N,)."""
        return self._in_real.any(1).double()

    def density(self) -> Tensor:
        """Per picture, the number of real balls that it lies in, over k: (N,)."""
        return self._in_real.double().sum(1) / self.neighbours

    def recall(self, counts: Array | None = None) -> float:
        """The share of real pictures that lie in a ball of the pictures."""
        return self._share(self._in_own, counts)

    def coverage(self, counts: Array | None = None) -> float:
        """The share of real balls with a picture in them."""
        return self._share(self._in_real, counts)

    @staticmethod
    def _share(inside: Tensor, counts: Array | None) -> float:
        kept = inside if counts is None else inside[torch.from_numpy(counts) > 0]
        return float(kept.any(0).double().mean())


def radii(features: Tensor, neighbours: int) -> Tensor:
    """Distance of each row to its k-th nearest among the others: (N,)."""
    apart = (torch.cdist(part, features) for part in torch.split(features, CHUNK))
    return torch.cat([each.kthvalue(neighbours + 1, dim=1).values for each in apart])


def nearest(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the nearest row of `reference`, and which it is: (N,), (N,)."""
    found = [torch.cdist(part, reference).min(1) for part in torch.split(features.double(), CHUNK)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def retrieved(pictures: Tensor, captions: Tensor, wanted: Tensor, top: int) -> Tensor:
    """Whether the caption a picture was drawn for is among the `top` most similar of all: (N,) of 0 and 1.

    pictures (N, D) and captions (K, D) of unit length; wanted (N,): places in `captions`.
    """
    first = (pictures @ captions.T).topk(min(top, len(captions)), dim=1).indices
    return (first == wanted[:, None]).any(1).double()
