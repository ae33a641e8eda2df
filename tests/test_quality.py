"""Measures of sets of pictures against independent implementations on the same features, and their intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.neighbors import NearestNeighbors
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import poly_mmd

from training.quality import (
    Coverage,
    FrechetDistance,
    KernelDistance,
    Resampler,
    cmmd,
    inception_score,
    moments,
    nearest,
    retrieved,
)


def features(count: int, width: int = 24, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(9)).double() / width**0.5
    return torch.randn(count, width, generator=generator).double() @ mixing + shift


PAIRS = [(features(200, seed=1), features(300, seed=2, shift=0.3)), (features(16, seed=3), features(300, seed=4))]


@pytest.mark.parametrize(("own", "real"), PAIRS)
def test_frechet_distance(own: torch.Tensor, real: torch.Tensor) -> None:
    """Against scipy's matrix root and torchmetrics; the second pair has fewer pictures than features."""
    a, b = moments(own), moments(real)
    found = FrechetDistance(own, b)()
    root = linalg.sqrtm(a.covariance @ b.covariance)
    by_scipy = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * np.real(root))
    by_torchmetrics = _compute_fid(*(torch.from_numpy(x) for x in (a.mean, a.covariance, b.mean, b.covariance)))
    assert found == pytest.approx(float(by_scipy), rel=1e-3)
    assert found == pytest.approx(float(by_torchmetrics), rel=1e-3)


def test_frechet_distance_of_the_same_pictures_is_nothing() -> None:
    own = PAIRS[0][0]
    assert FrechetDistance(own, moments(own))() == pytest.approx(0, abs=1e-9)


def test_kernel_distance() -> None:
    own, real = features(150, seed=1), features(150, seed=2, shift=0.2)  # torchmetrics wants equal numbers
    assert KernelDistance(own, real)() == pytest.approx(float(poly_mmd(real, own)), abs=1e-6)
    other = features(280, seed=3)
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    xx, yy, xy = kernel(own, own), kernel(other, other), kernel(own, other)
    plain = (xx.sum() - xx.trace()) / (150 * 149) + (yy.sum() - yy.trace()) / (280 * 279) - 2 * xy.mean()
    assert KernelDistance(own, other)() == pytest.approx(float(plain), abs=1e-9)


def test_a_count_is_the_picture_as_often_but_never_compared_with_itself() -> None:
    own, real = features(40, seed=1), features(60, seed=2)
    counts = np.random.default_rng(0).integers(0, 3, 40).astype(np.float64)
    repeated = own.repeat_interleave(torch.from_numpy(counts).long(), 0)
    assert FrechetDistance(own, moments(real))(counts) == pytest.approx(FrechetDistance(repeated, moments(real))())
    logits = features(40, width=5)
    again = logits.repeat_interleave(torch.from_numpy(counts).long(), 0)
    assert inception_score(logits, counts) == pytest.approx(inception_score(again))
    whole = np.ones(40)
    assert KernelDistance(own, real)(whole) == KernelDistance(own, real)()
    half = np.r_[np.ones(20), np.zeros(20)]
    assert KernelDistance(own, real)(half) == pytest.approx(KernelDistance(own[:20], real)())
    assert Coverage(own, real).recall(whole) == Coverage(own, real).recall()


def test_precision_recall_density_and_coverage() -> None:
    """Against the definitions over scikit-learn's neighbours."""
    own, real = features(120, seed=1), features(150, seed=2, shift=0.3)
    found = Coverage(own, real, neighbours=3)

    def balls(x: torch.Tensor) -> Any:
        return NearestNeighbors(n_neighbors=4).fit(x).kneighbors(x)[0][:, 3]

    apart = np.linalg.norm(own.numpy()[:, None] - real.numpy()[None], axis=2)
    in_real, in_own = apart <= balls(real)[None], apart <= balls(own)[:, None]
    assert float(found.precision().mean()) == pytest.approx(in_real.any(1).mean(), abs=1e-6)
    assert found.recall() == pytest.approx(in_own.any(0).mean(), abs=1e-6)
    assert float(found.density().mean()) == pytest.approx(in_real.sum() / (3 * 120), abs=1e-6)
    assert found.coverage() == pytest.approx(in_real.any(0).mean(), abs=1e-6)
    assert 0.1 < found.recall() < 0.98, "the sets are to be told apart, not trivially"


def test_against_torch_fidelity() -> None:
    """Run where torch-fidelity is: `pip install --no-deps --target DIR torch-fidelity`, and DIR on PYTHONPATH; its
    package brings along a `tests` of its own, which hides ours."""
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    own, real = features(120, seed=1), features(120, seed=2, shift=0.3)
    plain = {"kid_subsets": 1, "kid_subset_size": 120, "verbose": False, "rng_seed": 0}
    theirs = kid.kid_features_to_metric(own, real, **plain)["kernel_inception_distance_mean"]
    assert KernelDistance(own, real)() == pytest.approx(theirs, abs=1e-6)
    found = prc.prc_features_to_metric(own, real, prc_neighborhood=3, prc_batch_size=50, save_cpu_ram=False,
                                       verbose=False)  # fmt: skip
    assert float(Coverage(own, real).precision().mean()) == pytest.approx(found["precision"], abs=1e-6)
    assert Coverage(own, real).recall() == pytest.approx(found["recall"], abs=1e-6)


def test_inception_score() -> None:
    logits = 3 * features(200, width=10)
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.features = [logits]
    assert inception_score(logits) == pytest.approx(float(metric.compute()[0]), rel=1e-6)
    assert inception_score(torch.full((5, 4), 0.0)) == pytest.approx(1.0)
    assert inception_score(100 * torch.eye(4)) == pytest.approx(4.0)


def test_cmmd_is_the_mean_over_pairs_of_unit_vectors() -> None:
    own, real = features(30, seed=1), features(50, seed=2, shift=0.5)
    x, y = (f / f.norm(dim=1, keepdim=True) for f in (own, real))
    kernel = lambda a, b: torch.exp(-((a[:, None] - b[None]) ** 2).sum(2) / 200).mean()  # noqa: E731
    assert cmmd(own, real) == pytest.approx(float(1000 * (kernel(x, x) + kernel(y, y) - 2 * kernel(x, y))), abs=1e-9)
    assert cmmd(own, own) == pytest.approx(0, abs=1e-9)


def test_nearest_and_retrieved() -> None:
    reference = features(50, seed=2)
    distance, place = nearest(reference[[7, 3]] + 1e-6, reference)
    assert place.tolist() == [7, 3]
    assert distance.max() < 1e-4
    unit = torch.eye(4)
    assert retrieved(unit, unit, torch.arange(4), 1).tolist() == [1, 1, 1, 1]
    assert retrieved(unit[[0]], unit, torch.tensor([2]), 1).tolist() == [0]
    near = torch.tensor([[0.9, 0.4, 0.0, 0.0]])
    assert retrieved(near, unit, torch.tensor([1]), 2).tolist() == [1]


def test_intervals_hold_groups_together() -> None:
    """Ten pictures of one concept are one witness: the interval is as wide as that of ten times fewer pictures."""
    generator = torch.Generator().manual_seed(0)
    each = torch.randn(40, generator=generator).double()
    alone = Resampler([str(i) for i in range(40)], 2000).mean(each)
    tenfold = Resampler([str(i // 10) for i in range(400)], 2000).mean(each.repeat_interleave(10))
    assert tenfold.high - tenfold.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert (alone.high - alone.low) / 2 == pytest.approx(1.96 * float(each.std()) / 40**0.5, rel=0.15)


def test_the_interval_of_a_set_measure_surrounds_it() -> None:
    own, real = features(80, seed=1, shift=0.4), features(300, seed=2)
    sampler, reference = Resampler([str(i) for i in range(80)]), moments(real)
    distance = FrechetDistance(own, reference)
    found = sampler.spread(distance(), distance)
    assert found.low < found.value < found.high
    others = [FrechetDistance(features(80, seed=s, shift=0.4), reference)() for s in range(10, 50)]
    assert (found.high - found.low) / 4 == pytest.approx(float(np.std(others)), rel=0.5)
