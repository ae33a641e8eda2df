"""Samplers: plain functions from noise at grid[0] to a sample at grid[-1].

    name(predict, x, grid, noise, *, schedule, on_step) -> x

`predict(x, t)` is the guided denoiser with its conditioning bound, `x` (B, C, *grid) the start, `grid` a
strictly decreasing 1-D tensor of times (`ldm.grids.GRIDS`), `noise(like)` fresh N(0, 1) shaped like its
argument, `on_step(done, of)` is called after every step. Neither state nor gradients are kept. If the grid
ends at 0, the result is the last x0.
"""

from __future__ import annotations

import math
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


def grid_steps(x: Tensor, grid: Tensor, on_step: OnStep | None) -> Iterator[tuple[Tensor, Tensor]]:
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
    for t, s in grid_steps(x, grid, on_step):
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
    for t, s in grid_steps(x, grid, on_step):
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
    return _dpmpp(predict, x, grid, None, schedule, on_step)


def _dpmpp(predict: Predict, x: Tensor, grid: Tensor, noise: Noise | None, schedule: NoiseSchedule,
           on_step: OnStep | None) -> Tensor:  # fmt: skip
    """The solver of the ODE, or with noise that of the SDE."""
    previous: tuple[Tensor, Tensor] | None = None
    for t, s in grid_steps(x, grid, on_step):
        x0 = predict(x, t).x0
        alpha_s, sigma_s = schedule.alpha_sigma(s)
        _, sigma_t = schedule.alpha_sigma(t)
        h = (schedule.log_snr(s) - schedule.log_snr(t)) / 2
        extrapolated = x0
        if previous is not None and s[0] > 0:
            x0_before, h_before = previous
            extrapolated = x0 + per_item(h / (2 * h_before), x) * (x0 - x0_before)
        previous = x0, h
        if noise is None:
            x = per_item(sigma_s / sigma_t, x) * x - per_item(alpha_s * torch.expm1(-h), x) * extrapolated
            continue
        kept = per_item(sigma_s / sigma_t * torch.exp(-h), x) * x
        x = kept - per_item(alpha_s * torch.expm1(-2 * h), x) * extrapolated
        if s[0] > 0:
            x = x + per_item(sigma_s * torch.sqrt(-torch.expm1(-2 * h)), x) * noise(x)
    return x


@torch.no_grad()
def heun(
    predict: Predict,
    x: Tensor,
    grid: Tensor,
    noise: Noise,
    *,
    schedule: NoiseSchedule,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    second_order: bool = True,
    on_step: OnStep | None = None,
) -> Tensor:
    """Karras et al. 2022 (EDM), Algorithm 2: Heun's method on dx/dsigma of x / alpha, with churn.

    The variable is their sigma, here sigma_t / alpha_t. `churn` is S_churn, `churn_range` (S_tmin, S_tmax),
    `churn_noise` S_noise; without churn the result is deterministic. Two network calls a step but for the last,
    and for the first where alpha is 0 and their sigma infinite: those are Euler steps, as all are without
    `second_order`. Churn never goes beyond t = 1. ValueError for a negative churn.
    """
    if churn < 0:
        raise ValueError(f"churn must not be negative, not {churn}")
    count = len(grid) - 1
    for t, s in grid_steps(x, grid, on_step):
        if churn > 0:
            x, t = _churned(x, t, noise, schedule, min(churn / count, math.sqrt(2) - 1), churn_range, churn_noise)
        prediction = predict(x, t)
        alpha_s, sigma_s = schedule.alpha_sigma(s)
        alpha_t, sigma_t = schedule.alpha_sigma(t)
        x = per_item(alpha_s, x) * prediction.x0 + per_item(sigma_s, x) * prediction.eps
        if second_order and s[0] > 0 and alpha_t[0] > 0:
            # eps is dx/dsigma: half a step back along the first slope, and along the second instead
            half = alpha_s * (sigma_s / alpha_s - sigma_t / alpha_t) / 2
            x = x + per_item(half, x) * (predict(x, s).eps - prediction.eps)
    return x


def _churned(
    x: Tensor,
    t: Tensor,
    noise: Noise,
    schedule: NoiseSchedule,
    gamma: float,
    span: tuple[float, float],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Noise added to x at t until sigma / alpha is 1 + gamma times as much, and the time of that."""
    alpha, sigma = schedule.alpha_sigma(t)
    if alpha[0] == 0 or t[0] == 1 or not span[0] <= float(sigma[0] / alpha[0]) <= span[1]:
        return x, t
    raised = schedule.time_of(schedule.log_snr(t) - 2 * math.log1p(gamma))
    alpha_up, sigma_up = schedule.alpha_sigma(raised)
    added = ((sigma_up / alpha_up) ** 2 - (sigma / alpha) ** 2).clamp(min=0).sqrt()
    return per_item(alpha_up / alpha, x) * x + per_item(scale * alpha_up * added, x) * noise(x), raised


@torch.no_grad()
def euler(
    predict: Predict,
    x: Tensor,
    grid: Tensor,
    noise: Noise,
    *,
    schedule: NoiseSchedule,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """Euler's method on the same equation as `heun`, with its churn; without churn it is `ddim` with eta 0."""
    return heun(
        predict, x, grid, noise, schedule=schedule, churn=churn, churn_range=churn_range, churn_noise=churn_noise,
        second_order=False, on_step=on_step,
    )  # fmt: skip


@torch.no_grad()
def dpmpp_2m_sde(
    predict: Predict,
    x: Tensor,
    grid: Tensor,
    noise: Noise,
    *,
    schedule: NoiseSchedule,
    on_step: OnStep | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M), Lu et al. 2022 (arXiv 2211.01095), eq. 19 with the correction of `dpmpp_2m`.

    The first step and the one to t = 0 are of first order; where alpha_t = 0 as there.
    """
    return _dpmpp(predict, x, grid, noise, schedule, on_step)


@torch.no_grad()
def unipc(
    predict: Predict,
    x: Tensor,
    grid: Tensor,
    noise: Noise,
    *,
    schedule: NoiseSchedule,
    on_step: OnStep | None = None,
) -> Tensor:
    """UniPC-2 with B(h) = e^h - 1 on x0, Zhao et al. 2023 (arXiv 2302.04867), Algorithms 5 and 6: deterministic.

    Each prediction also corrects the x it was made at, without another call of the network. The first step and the
    one to t = 0 are of lower order. `noise` is not used.
    """
    known: list[tuple[Tensor, Tensor]] = []  # (x0, log(alpha / sigma)) of the last two times
    before: tuple[Tensor, Tensor] | None = None  # the last step's (x, t)
    for t, s in grid_steps(x, grid, on_step):
        here = predict(x, t).x0, schedule.log_snr(t) / 2
        if before is not None:
            x = _unipc_step(*before, t, known, schedule, here)
        known = [*known[-1:], here]
        before = x, t
        x = _unipc_step(x, t, s, known if s[0] > 0 else known[-1:], schedule)
    return x


def _unipc_step(
    x: Tensor,
    t: Tensor,
    s: Tensor,
    known: list[tuple[Tensor, Tensor]],
    schedule: NoiseSchedule,
    there: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """From t to s by the predictions up to t, the newest last, and by that at s where it is known already."""
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    _, sigma_t = schedule.alpha_sigma(t)
    x0, half_log_snr = known[-1]
    h = schedule.log_snr(s) / 2 - half_log_snr
    b = torch.expm1(-h)
    slope = torch.zeros_like(x)
    # how much of the step the prediction at s corrects, and that before t
    at_s = torch.full_like(h, 0.5)
    if len(known) == 2:
        ratio = (known[0][1] - half_log_snr) / h
        difference = (known[0][0] - x0) / per_item(ratio, x)
        phi_2 = -b / h - 1
        phi_3 = -phi_2 / h - 0.5
        moments = phi_2 / b, 2 * phi_3 / b
        behind = torch.full_like(h, 0.5) if there is None else (moments[0] - moments[1]) / (1 - ratio)
        at_s = moments[0] - behind
        slope = per_item(behind, x) * difference
    if there is not None:
        slope = slope + per_item(at_s, x) * (there[0] - x0)
    return per_item(sigma_s / sigma_t, x) * x - per_item(alpha_s * b, x) * (x0 + slope)


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm, "ddim": ddim, "euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "dpmpp_2m_sde": dpmpp_2m_sde,
    "unipc": unipc,
}  # fmt: skip
