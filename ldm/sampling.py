"""Samplers: plain functions from noise at grid[0] to a sample at grid[-1].

    name(predict, x, grid, noise, *, schedule, on_step) -> x

`predict(x, t)` is the guided denoiser with its conditioning bound, `x` (B, C, *grid) the start, `grid` a
strictly decreasing 1-D tensor of times (`uniform_grid`), `noise(like)` fresh N(0, 1) shaped like its
argument, `on_step(done, of)` is called after every step. Neither state nor gradients are kept. If the grid
ends at 0, the result is the last x0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from ldm.denoiser import Predict
from ldm.noise import NoiseSchedule, per_item, posterior, posterior_variance

Noise = Callable[[Tensor], Tensor]
OnStep = Callable[[int, int], None]


class Sampler(Protocol):
    """What all entries of `SAMPLERS` share; options of their own have defaults."""

    def __call__(
        self,
        predict: Predict,
        x: Tensor,
        grid: Tensor,
        noise: Noise,
        *,
        schedule: NoiseSchedule,
        on_step: OnStep | None = None,
    ) -> Tensor: ...


def _steps(x: Tensor, grid: Tensor, on_step: OnStep | None) -> Iterator[tuple[Tensor, Tensor]]:
    """(t, s), both (B,) float64 on the CPU, for each step from t to s, which the caller makes."""
    grid = grid.double().cpu()
    if grid.ndim != 1 or len(grid) < 2 or bool((grid.diff() >= 0).any()):
        raise ValueError(f"the grid must be one strictly decreasing row of two times or more, not {grid}")
    count = len(grid) - 1
    for i in range(count):
        yield grid[i].expand(len(x)), grid[i + 1].expand(len(x))
        if on_step is not None:
            on_step(i + 1, count)


@torch.no_grad()
def ddpm(
    predict: Predict,
    x: Tensor,
    grid: Tensor,
    noise: Noise,
    *,
    schedule: NoiseSchedule,
    variance: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling, Ho et al. 2020, Algorithm 2, on any grid.

    `variance` is the var_mix of a network that learned none: 0 the posterior variance ("fixed small"), 1 the
    forward step's ("fixed large").
    """
    for t, s in _steps(x, grid, on_step):
        prediction = predict(x, t)
        mix = variance if prediction.var_mix is None else prediction.var_mix
        x, log_variance = posterior(schedule, x, prediction.x0, t, s, mix)
        if s[0] > 0:
            x = x + torch.exp(log_variance / 2) * noise(x)
    return x


@torch.no_grad()
def ddim(
    predict: Predict,
    x: Tensor,
    grid: Tensor,
    noise: Noise,
    *,
    schedule: NoiseSchedule,
    eta: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Song et al. 2021 (DDIM), eq. 12 and 16: `eta` 0 is deterministic, 1 is ancestral sampling.

    ValueError unless 0 <= eta <= 1. On a flow schedule eta = 0 is the Euler step.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], not {eta}")
    for t, s in _steps(x, grid, on_step):
        prediction = predict(x, t)
        alpha_s, sigma_s = schedule.alpha_sigma(s)
        fresh = eta**2 * posterior_variance(schedule, t, s)
        kept = (sigma_s**2 - fresh).clamp(min=0)  # rounding may put it just below 0 where alpha_t = 0
        x = per_item(alpha_s, x) * prediction.x0 + per_item(kept.sqrt(), x) * prediction.eps
        if eta > 0 and s[0] > 0:
            x = x + per_item(fresh.sqrt(), x) * noise(x)
    return x


@torch.no_grad()
def dpmpp_2m(
    predict: Predict,
    x: Tensor,
    grid: Tensor,
    noise: Noise,
    *,
    schedule: NoiseSchedule,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), Algorithm 2: second order, deterministic.

    The first step and the one to t = 0 are of first order. Where alpha_t = 0 the step h in log(alpha / sigma)
    is infinite: the formulas then become the DDIM step, and a first-order step after it. `noise` is not used.
    """
    previous: tuple[Tensor, Tensor] | None = None
    for t, s in _steps(x, grid, on_step):
        x0 = predict(x, t).x0
        alpha_s, sigma_s = schedule.alpha_sigma(s)
        _, sigma_t = schedule.alpha_sigma(t)
        h = (schedule.log_snr(s) - schedule.log_snr(t)) / 2
        extrapolated = x0
        if previous is not None and s[0] > 0:
            x0_before, h_before = previous
            extrapolated = x0 + per_item(h / (2 * h_before), x) * (x0 - x0_before)
        x = per_item(sigma_s / sigma_t, x) * x - per_item(alpha_s * torch.expm1(-h), x) * extrapolated
        previous = x0, h
    return x


SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}
