"""Weights of the loss that `tests/test_denoiser.py` does not take apart, and the decoder's part of the bound."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.denoiser import Denoiser, DenoiserConfig, loss_weight
from ldm.noise import NoiseSchedule, NoiseScheduleConfig, posterior, posterior_kl


@pytest.mark.parametrize(
    ("config", "on_x0"),
    [
        ({"weighting": "soft_min_snr", "min_snr_gamma": 3.0}, lambda snr: snr * 3 / (snr + 3)),
        ({"weighting": "p2", "p2_gamma": 2.0}, lambda snr: snr / (1 + snr) ** 2),
        ({"weighting": "edm"}, lambda snr: snr + 1),
    ],
)
def test_weights_of_x0_are_those_of_the_papers(config: dict[str, Any], on_x0: Callable[[Tensor], Tensor]) -> None:
    """And of eps by its error, which is SNR times that of x0."""
    sigma = torch.tensor([0.1, 0.5, 2.0, 9.0], dtype=torch.float64)
    alpha = torch.tensor([1.0, 0.8, 0.5, 0.3], dtype=torch.float64)
    snr = (alpha / sigma) ** 2
    for target, wanted in (("x0", on_x0(snr)), ("eps", on_x0(snr) / snr)):
        found = loss_weight(DenoiserConfig(target=target, **config), alpha, sigma)
        torch.testing.assert_close(found, wanted)


def test_the_last_step_of_the_bound_is_a_gaussian_decoder() -> None:
    """-log p(x0 | x_t), against torch's own density."""
    schedule = NoiseSchedule(NoiseScheduleConfig(kind="cosine", steps=10))
    generator = torch.Generator().manual_seed(0)
    x_t, x0, found = (torch.randn(3, 2, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    t = torch.full((3,), 0.1, dtype=torch.float64)
    mean, log_variance = posterior(schedule, x_t, found, t, torch.zeros_like(t))
    density = torch.distributions.Normal(mean, torch.exp(log_variance / 2)).log_prob(x0)
    got = posterior_kl(schedule, x_t, x0, found, t, torch.zeros_like(t))
    torch.testing.assert_close(got, -density.flatten(1).mean(1))


def test_the_mean_that_is_learned_is_that_of_the_step_before() -> None:
    """Ho et al. 2020, eq. 7, written out: a network that gives the mean of q(x_{k-1} | x_k, x0) has no error."""
    schedule = NoiseSchedule(NoiseScheduleConfig(kind="linear", steps=10))
    abar, k = schedule.abar, torch.tensor([2, 6, 9])
    beta, before = 1 - abar[k] / abar[k - 1], abar[k - 1]
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    x_k = abar[k].sqrt().view(-1, 1, 1, 1) * x0 + (1 - abar[k]).sqrt().view(-1, 1, 1, 1) * eps
    of_x0, of_x = before.sqrt() * beta / (1 - abar[k]), (1 - beta).sqrt() * (1 - before) / (1 - abar[k])
    mean = of_x0.view(-1, 1, 1, 1) * x0 + of_x.view(-1, 1, 1, 1) * x_k

    class Knows(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

        def forward(self, *_: Any, **__: Any) -> Any:
            return SimpleNamespace(sample=mean)

    denoiser = Denoiser(Knows(), schedule, DenoiserConfig(target="mean"))
    error = denoiser.error(x0, eps, (k + 1).double() / 10, Conditioning())
    assert float(error.max()) < 1e-20
