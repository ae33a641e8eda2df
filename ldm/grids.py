"""Sampling grids: the times at which a sampler calls its network, from 1 down to 0."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ldm.noise import NoiseSchedule

_LOG_SNR_END = 10.0  # of grids, where a schedule has no end of its own
_KARRAS_RHO = 7.0


def uniform_grid(steps: int, schedule: NoiseSchedule) -> Tensor:
    """The times of a sampler with `steps` steps: (steps + 1,) float64, decreasing from 1 to 0, evenly spaced.

    On a discrete schedule they are rounded to its own steps (diffusers' "trailing" spacing). ValueError if
    `steps` is below 1, or above the T of a discrete schedule, where a time would repeat.
    """
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, not {steps}")
    if not schedule.discrete:
        return torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    if steps > schedule.steps:
        raise ValueError(f"the schedule has {schedule.steps} steps, a grid of {steps} would repeat some")
    nearest = [(2 * i * schedule.steps + steps) // (2 * steps) for i in range(steps, -1, -1)]
    return torch.tensor(nearest, dtype=torch.float64) / schedule.steps


def log_snr_grid(steps: int, schedule: NoiseSchedule) -> Tensor:
    """Times evenly spaced in log-SNR (Lu et al. 2022): (steps + 1,) float64, decreasing from 1 to 0.

    From t = 1 to the first step of a discrete schedule, and then to 0; without discrete steps, or where log-SNR is
    infinite at t = 1, between log-SNR of -10 and 10. Times lie between the discrete steps. ValueError if `steps` is
    below 1.
    """
    low, high = log_snr_ends(schedule)
    return _between_ends(torch.linspace(low, high, max(steps, 1), dtype=torch.float64), steps, schedule)


def karras_grid(steps: int, schedule: NoiseSchedule) -> Tensor:
    """As `log_snr_grid`, but evenly spaced in (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5)."""
    low, high = (math.exp(-end / 2 / _KARRAS_RHO) for end in log_snr_ends(schedule))
    roots = torch.linspace(low, high, max(steps, 1), dtype=torch.float64)
    return _between_ends(-2 * _KARRAS_RHO * roots.log(), steps, schedule)


def leading_grid(steps: int, schedule: NoiseSchedule, offset: int = 0, extra: int = 0) -> Tensor:
    """diffusers' "leading" spacing: (steps + 1,) float64 times of the schedule's steps k = i (T // (steps + extra)) +
    offset, the noisiest of which lies short of t = 1, and then 0.

    ValueError for a schedule without steps, and where a time would repeat or lie beyond the last step.
    """
    every = _stride(steps, schedule, extra)
    return _of_steps(torch.arange(steps + extra - 1, extra - 1, -1) * every + offset, schedule)


def linspace_grid(steps: int, schedule: NoiseSchedule) -> Tensor:
    """diffusers' "linspace" spacing of its multistep solvers: steps rounded from T - 1 down to 0, that left out, and
    then t = 0. ValueError as of `leading_grid`."""
    _stride(steps, schedule, 0)
    k = torch.linspace(0, schedule.steps - 1, steps + 1, dtype=torch.float64).round().flip(0)[:-1].long()
    return _of_steps(k, schedule)


def _stride(steps: int, schedule: NoiseSchedule, extra: int) -> int:
    if not schedule.discrete:
        raise ValueError(f"a grid of a schedule's steps needs some, which a {schedule.config.kind} schedule has not")
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, not {steps}")
    if steps + extra > schedule.steps:
        raise ValueError(f"the schedule has {schedule.steps} steps, a grid of {steps} would repeat some")
    return schedule.steps // (steps + extra)


def _of_steps(k: Tensor, schedule: NoiseSchedule) -> Tensor:
    if int(k[0]) >= schedule.steps:
        raise ValueError(f"the grid begins at step {int(k[0])}, beyond the last of {schedule.steps}; take more steps")
    return (torch.cat([k, k.new_tensor([-1])]).double() + 1) / schedule.steps


def to_first_step(grid: Tensor, schedule: NoiseSchedule) -> Tensor:
    """A grid that ends at the first step of a discrete schedule in place of 0, as DDIM's without `set_alpha_to_one`."""
    kept = grid[:-1]
    first = kept.new_tensor([schedule.first_t])
    return torch.cat([kept, first]) if kept[-1] > first[0] + 1e-9 else kept


def log_snr_ends(schedule: NoiseSchedule) -> tuple[float, float]:
    """Log-SNR at t = 1 and at the first noisy time; where infinite, -10 and 10."""
    high, low = schedule.log_snr(torch.tensor([schedule.first_t, 1.0], dtype=torch.float64)).tolist()
    return (low if math.isfinite(low) else -_LOG_SNR_END), (high if math.isfinite(high) else _LOG_SNR_END)


def _between_ends(log_snr: Tensor, steps: int, schedule: NoiseSchedule) -> Tensor:
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, not {steps}")
    inner = schedule.time_of(log_snr[1:])
    return torch.cat([inner.new_ones(1), inner, inner.new_zeros(1)])


GRIDS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform_grid, "log_snr": log_snr_grid, "karras": karras_grid, "leading": leading_grid,
    "linspace": linspace_grid,
}  # fmt: skip
