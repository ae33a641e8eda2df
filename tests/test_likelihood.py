"""The bound and the ODE's density against what Gaussian algebra and independent recursions give."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from ldm.denoiser import Predict, Prediction
from ldm.grids import log_snr_ends, uniform_grid
from ldm.likelihood import (
    HALF_STEP,
    discretised_log_prob,
    gaussian_log_prob,
    ode_log_likelihood,
    variational_bound,
)
from ldm.noise import NoiseSchedule, NoiseScheduleConfig, per_item

MEAN, DEVIATION = 0.3, 0.5
KINDS = ("linear", "cosine", "sigmoid", "flow", "edm", "learned")


def exact(schedule: NoiseSchedule) -> Predict:
    """E[x0 | x_t] of x0 ~ N(0.3, 0.5^2 I)."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (per_item(c, x) for c in schedule.alpha_sigma(t))
        x0 = MEAN + alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2) * (x - alpha * MEAN)
        return Prediction(x0, (x - alpha * x0) / sigma)

    return predict


def draws(generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def data(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return MEAN + DEVIATION * torch.randn(count, 1, 2, dtype=torch.float64, generator=generator)


def recursion(schedule: NoiseSchedule, x0: np.ndarray, eps: list[np.ndarray]) -> tuple[float, list[float], float]:
    """The bound in nats per dimension, from betas alone, step by step, as Ho et al. 2020 write it: sec. 2 and 3."""
    alphas = np.diff(np.log(np.r_[1.0, schedule.abar.numpy()]))
    abar, count = np.exp(np.cumsum(alphas)), len(alphas)
    prior = float(np.mean((abar[-1] * x0**2 + (1 - abar[-1]) - 1 - np.log(1 - abar[-1])) / 2))
    steps, decoder = [], 0.0
    for k in range(count - 1, -1, -1):
        x = np.sqrt(abar[k]) * x0 + np.sqrt(1 - abar[k]) * eps[count - 1 - k]
        posterior_of = DEVIATION**2 * abar[k] + 1 - abar[k]
        guess = MEAN + np.sqrt(abar[k]) * DEVIATION**2 / posterior_of * (x - np.sqrt(abar[k]) * MEAN)
        beta, before = 1 - np.exp(alphas[k]), (abar[k - 1] if k else 1.0)
        tilde = beta * (1 - before) / (1 - abar[k])
        if k:
            scale = np.sqrt(before) * beta / (1 - abar[k])
            steps.append(float(np.mean((scale * (x0 - guess)) ** 2 / (2 * tilde))))
        else:  # the variance that the step after it has
            second = (1 - np.exp(alphas[1])) * (1 - abar[0]) / (1 - abar[1])
            decoder = float(-norm.logpdf(x0, guess, math.sqrt(second)).mean())
    return prior, steps, decoder


@pytest.mark.parametrize("kind", ["linear", "cosine", "sigmoid"])
def test_the_bound_is_that_of_an_independent_recursion(kind: str) -> None:
    schedule = NoiseSchedule(NoiseScheduleConfig(kind=kind, steps=40))  # type: ignore[arg-type]
    x0, noise = data(64), draws(torch.Generator().manual_seed(1))
    grid = uniform_grid(40, schedule)
    found = variational_bound(exact(schedule), x0, grid, noise, schedule=schedule, decoder="gaussian")
    generator = torch.Generator().manual_seed(1)
    eps = [torch.randn(x0.shape, generator=generator, dtype=x0.dtype).numpy() for _ in range(40)]
    prior, steps, decoder = (np.array(part) / math.log(2) for part in recursion(schedule, x0.numpy(), eps))
    assert float(found.prior.mean()) == pytest.approx(float(prior), rel=1e-6)
    np.testing.assert_allclose(found.steps.mean(0).numpy(), steps, rtol=1e-6)
    assert float(found.decoder.mean()) == pytest.approx(float(decoder), rel=1e-6)
    assert float(found.total.mean()) == pytest.approx(float(prior + steps.sum() + decoder), rel=1e-6)


def test_the_bound_tightens_as_steps_grow_and_never_passes_the_truth() -> None:
    """With the exact denoiser of a Gaussian and the forward step's variance; 3e4 draws leave 0.02 bits of chance."""
    x0 = data(16384)
    truth = float(-gaussian_log_prob(x0, number(MEAN), number(2 * math.log(DEVIATION))).mean()) / math.log(2)
    gaps = []
    for steps in (4, 10, 40, 320):
        schedule = NoiseSchedule(NoiseScheduleConfig(kind="cosine", steps=steps))
        noise = draws(torch.Generator().manual_seed(2))
        found = variational_bound(exact(schedule), x0, uniform_grid(steps, schedule), noise, schedule=schedule,
                                  decoder="gaussian", variance=1.0)  # fmt: skip
        gaps.append(float(found.total.mean()) - truth)
    assert all(b < a for a, b in pairwise(gaps[:3])), gaps
    assert gaps[2] > 0
    assert abs(gaps[3]) < 0.02, gaps


@pytest.mark.parametrize("kind", KINDS)
def test_the_density_of_the_ode_is_the_closed_form(kind: str) -> None:
    """To 1e-3 bits per dimension: the flow of a Gaussian is affine, from N(0, 1) at t = 1 to the first noisy time."""
    schedule = NoiseSchedule(NoiseScheduleConfig(kind=kind))  # type: ignore[arg-type]
    x0, signs = data(16), lambda like: torch.randn_like(like).sign()
    found = ode_log_likelihood(exact(schedule), x0, signs, schedule=schedule)
    (mean, deviation), (mean_1, deviation_1) = (
        (MEAN * math.sqrt(share), math.sqrt(share * DEVIATION**2 + 1 - share))
        for share in (1 / (1 + math.exp(-log_snr)) for log_snr in log_snr_ends(schedule)[::-1])
    )
    ratio = deviation_1 / deviation
    truth = gaussian_log_prob((x0 - mean) * ratio + mean_1, torch.zeros(()), torch.zeros(())).flatten(1).mean(1)
    truth = truth + math.log(ratio)
    torch.testing.assert_close(found, truth / math.log(2), rtol=0, atol=1e-3)
    by_rows = ode_log_likelihood(exact(schedule), x0, signs, schedule=schedule, exact=True)
    torch.testing.assert_close(by_rows, found, rtol=0, atol=1e-9)


def test_hutchinsons_estimate_is_unbiased() -> None:
    """A linear denoiser that mixes dimensions: the divergence is a trace, of which one probe sees a noisy part."""
    schedule = NoiseSchedule(NoiseScheduleConfig(kind="cosine"))
    mix = torch.eye(4, dtype=torch.float64) * 0.5 + 0.1

    def predict(x: Tensor, t: Tensor) -> Prediction:
        """Of x0 ~ N(0, mix)."""
        alpha, sigma = (float(c[0]) for c in schedule.alpha_sigma(t))
        gain = alpha * mix @ torch.linalg.inv(alpha**2 * mix + sigma**2 * torch.eye(4, dtype=torch.float64))
        x0 = (x.flatten(1) @ gain.T).view_as(x)
        return Prediction(x0, (x - alpha * x0) / sigma)

    x0 = torch.randn(1, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).expand(256, -1, -1)
    generator = torch.Generator().manual_seed(4)
    signs = lambda like: (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)  # noqa: E731
    found = ode_log_likelihood(predict, x0, signs, schedule=schedule, steps=60)
    truth = torch.distributions.MultivariateNormal(torch.zeros(4).double(), mix).log_prob(x0[0, 0]) / 4 / math.log(2)
    assert float(found.std()) > 0.01
    assert abs(float(found.mean() - truth)) < 4 * float(found.std()) / 16 + 1e-3
    whole = ode_log_likelihood(predict, x0[:1], signs, schedule=schedule, steps=60, exact=True)
    assert float(whole) == pytest.approx(float(truth), abs=1e-3)


@pytest.mark.parametrize("deviation", [1e-3, 0.02, 0.5, 5.0])
def test_masses_of_all_values_sum_to_one(deviation: float) -> None:
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean in (-1.0, -0.2, 0.9961, 1.3):
        log_p = discretised_log_prob(values, number(mean), number(2 * math.log(deviation)))
        assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-9)
        assert bool((log_p <= 1e-12).all())


def test_masses_are_those_of_scipy_far_into_the_tails() -> None:
    values = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    got = discretised_log_prob(values, number(0.1), number(2 * math.log(0.05)))
    inner = values[1:-1].numpy()
    law = norm(0.1, 0.05)
    right = law.logsf(inner - HALF_STEP), law.logsf(inner + HALF_STEP)
    left = law.logcdf(inner + HALF_STEP), law.logcdf(inner - HALF_STEP)
    more, less = (np.where(inner > 0.1, a, b) for a, b in zip(right, left, strict=True))
    wanted = more + np.log(-np.expm1(less - more))
    np.testing.assert_allclose(got[1:-1].numpy(), wanted, rtol=1e-9)
