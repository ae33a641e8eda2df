"""The forward process x_t = alpha_t x0 + sigma_t eps, its schedules, posterior, times for training and grids.

t is float64 in [0, 1]: 0 is clean data (alpha 1, sigma 0), 1 the noisiest. Step k = 0 .. T-1 of a discrete
DDPM schedule lies at t = (k + 1) / T; between those points log(abar) is linear in t (alpha, in a last step
to 0). Every schedule quantity is computed in float64 and used in the dtype of the tensor it multiplies, float32 at
least.

B batch, T steps of a discrete schedule; x, x0, eps are (B, C, *grid), t and s are (B,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ldm.config import Config

_COSINE_OFFSET = 0.008
_MAX_BETA = 0.999
_FLOW_T_MARGIN = 1e-4
_LOG_SNR_END = 10.0  # of grids, where a schedule has no end of its own
_KARRAS_RHO = 7.0


@dataclass(frozen=True)
class NoiseScheduleConfig(Config):
    """Which schedule. `beta_start` and `beta_end` are read by `linear` and `scaled_linear` only.

    linear: Ho et al. 2020; scaled_linear: Stable Diffusion (linear in sqrt(beta)); cosine: Nichol & Dhariwal
    2021, eq. 17; sigmoid: Jabri et al. 2022, from -3 to 3; flow: alpha = 1 - t, sigma = t (Lipman et
    al. 2023, Liu et al. 2023). zero_terminal: a discrete schedule rescaled to end in pure noise (Lin et al. 2024,
    Algorithm 1). shift: of a flow's t, for resolutions above that of its training (Esser et al. 2024, eq. 23).
    """

    kind: Literal["linear", "scaled_linear", "cosine", "sigmoid", "flow"] = "cosine"
    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_terminal: bool = False
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas must rise within (0, 1), not from {self.beta_start} to {self.beta_end}")
        if self.shift <= 0 or (self.shift != 1 and self.kind != "flow"):
            raise ValueError(f"shift must be positive, and 1 for all but flow, not {self.shift}")
        if self.zero_terminal and (self.kind == "flow" or self.steps < 2):
            raise ValueError("zero_terminal is of discrete schedules of 2 steps or more; flow ends in noise anyway")

    @property
    def ends_in_noise(self) -> bool:
        """Whether alpha is 0 at t = 1, so that eps does not determine x0 there."""
        return self.zero_terminal or self.kind == "flow"


def _betas(config: NoiseScheduleConfig) -> Tensor:
    start, end, steps = config.beta_start, config.beta_end, config.steps
    if config.kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if config.kind == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64) ** 2
    if config.kind == "cosine":
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.cos((u + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=_MAX_BETA)
    if config.kind == "sigmoid":
        u = torch.arange(steps + 1, dtype=torch.float64) / steps
        f = torch.sigmoid(3 - 6 * u) - torch.sigmoid(u.new_tensor(-3.0))
        return (1 - f[1:] / f[:-1]).clamp(max=_MAX_BETA)
    raise ValueError(f"{config.kind!r} has no betas")


def _zero_terminal(log_abar: Tensor) -> Tensor:
    """(T,) log(abar) moved and stretched in alpha so that its last is log 0 and its first stays."""
    alpha = torch.exp(log_abar / 2)
    moved = (alpha - alpha[-1]) * (alpha[0] / (alpha[0] - alpha[-1]))
    return 2 * moved.log()


class NoiseSchedule:
    """t -> (alpha_t, sigma_t) and what follows from it. Holds no parameters and no device: `t` decides."""

    def __init__(self, config: NoiseScheduleConfig) -> None:
        self.config = config
        self.steps = config.steps
        self.discrete = config.kind != "flow"
        if self.discrete:
            log_abar = torch.log1p(-_betas(config)).cumsum(0)
            if config.zero_terminal:
                log_abar = _zero_terminal(log_abar)
            self._log_abar = torch.cat([log_abar.new_zeros(1), log_abar])  # (T + 1,): entry k is at t = k / T

    @property
    def abar(self) -> Tensor:
        """alpha_t^2 at the T steps, (T,) float64; ValueError for `flow`, which has no steps."""
        if not self.discrete:
            raise ValueError("a flow schedule has no table of abar")
        return self._log_abar[1:].exp()

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), float64, both shaped like `t`."""
        t = t.double()
        if not self.discrete:
            sigma = self.config.shift * t / (1 + (self.config.shift - 1) * t)
            return 1 - sigma, sigma
        table = self._log_abar.to(t.device)
        position = t * self.steps
        k = position.long().clamp(0, self.steps - 1)
        share = position - k
        log_abar = table[k] + share * (table[k + 1] - table[k])
        if self.config.zero_terminal:  # the last step goes to log 0: alpha itself is linear there
            log_abar = torch.where(k == self.steps - 1, table[k] + 2 * torch.log1p(-share), log_abar)
        return torch.exp(log_abar / 2), torch.sqrt(-torch.expm1(log_abar))

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(alpha_t / sigma_t), float64, shaped like `t`: +inf at t = 0, -inf where alpha is 0."""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha.log() - sigma.log())

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The t of a log-SNR, the inverse of `log_snr`: float64, shaped like it; beyond t = 1, 1."""
        log_snr = log_snr.double()
        if not self.discrete:
            sigma = torch.sigmoid(-log_snr / 2)
            return sigma / (self.config.shift - (self.config.shift - 1) * sigma)
        table = self._log_abar.to(log_snr.device)
        log_abar = logsigmoid(log_snr).clamp(min=float(table[-1]))
        k = (torch.searchsorted(-table, -log_abar, right=True) - 1).clamp(0, self.steps - 1)
        share = (log_abar - table[k]) / (table[k + 1] - table[k])
        if self.config.zero_terminal:
            share = torch.where(k == self.steps - 1, -torch.expm1((log_abar - table[k]) / 2), share)
        return (k + share) / self.steps

    def network_time(self, t: Tensor) -> Tensor:
        """What the time embedding gets, float32: diffusers' timestep k if discrete, sigma T for flow."""
        if self.discrete:
            return (t.double() * self.steps - 1).float()
        return (self.alpha_sigma(t)[1] * self.steps).float()

    def draw_t(self, u: Tensor) -> Tensor:
        """Uniform u in [0, 1) -> t for training, float64, shaped like `u`.

        Discrete schedules: uniform over the T steps. Flow: logit-normal(0, 1) (Esser et al. 2024, eq. 19),
        kept 1e-4 away from both ends.
        """
        u = u.double()
        if self.discrete:
            return (torch.floor(u * self.steps) + 1).clamp(max=self.steps) / self.steps
        return torch.sigmoid(torch.special.ndtri(u)).clamp(_FLOW_T_MARGIN, 1 - _FLOW_T_MARGIN)

    def add_noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps, shaped like `x0` (Ho et al. 2020, eq. 4)."""
        alpha, sigma = self.alpha_sigma(t)
        return per_item(alpha, x0) * x0 + per_item(sigma, x0) * eps


def per_item(coefficient: Tensor, x: Tensor) -> Tensor:
    """A (B,) float64 coefficient as (B, 1, ...) on the device of `x`, in its dtype but at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return coefficient.to(dtype).to(x.device).view(-1, *[1] * (x.ndim - 1))


def transition(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """(a, b) of q(x_t | x_s) = N(a x_s, b I) for s < t, float64, both (B,)."""
    alpha_t, sigma_t = schedule.alpha_sigma(t)
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    a = alpha_t / alpha_s
    return a, sigma_t**2 - a**2 * sigma_s**2


def posterior_variance(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> Tensor:
    """Variance of q(x_s | x_t, x0) for any s < t, (B,) float64 (Ho et al. 2020, eq. 7); 0 at s = 0."""
    _, b = transition(schedule, t, s)
    return b * (schedule.alpha_sigma(s)[1] / schedule.alpha_sigma(t)[1]) ** 2


def posterior(
    schedule: NoiseSchedule,
    x_t: Tensor,
    x0: Tensor,
    t: Tensor,
    s: Tensor,
    var_mix: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor]:
    """Mean (B, C, *grid) and log-variance (broadcastable to it) of the reverse step from t to any s < t.

    Mean: Ho et al. 2020, eq. 7; x0 itself at s = 0. `var_mix` in [0, 1] goes from the posterior variance (0)
    to that of the forward step (1) in log space: Nichol & Dhariwal 2021, eq. 15. The posterior variance is 0
    at s = 0; as in their code its logarithm there is that of the neighbouring step on an even grid, from
    min(2 t, 1) to half of that. Finite at alpha_t = 0.
    """
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    _, sigma_t = schedule.alpha_sigma(t)
    a, b = transition(schedule, t, s)
    mean = per_item(a * sigma_s**2 / sigma_t**2, x_t) * x_t + per_item(alpha_s * b / sigma_t**2, x_t) * x0
    before = (2 * t).clamp(max=1)
    small = posterior_variance(schedule, torch.where(s > 0, t, before), torch.where(s > 0, s, before / 2))
    log_variance = var_mix * per_item(b.log(), x_t) + (1 - var_mix) * per_item(small.log(), x_t)
    return mean, log_variance


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
    low, high = _log_snr_ends(schedule)
    return _between_ends(torch.linspace(low, high, max(steps, 1), dtype=torch.float64), steps, schedule)


def karras_grid(steps: int, schedule: NoiseSchedule) -> Tensor:
    """As `log_snr_grid`, but evenly spaced in (sigma / alpha)^(1/7) (Karras et al. 2022, eq. 5)."""
    low, high = (math.exp(-end / 2 / _KARRAS_RHO) for end in _log_snr_ends(schedule))
    roots = torch.linspace(low, high, max(steps, 1), dtype=torch.float64)
    return _between_ends(-2 * _KARRAS_RHO * roots.log(), steps, schedule)


def _log_snr_ends(schedule: NoiseSchedule) -> tuple[float, float]:
    first = torch.tensor([1 / schedule.steps if schedule.discrete else 0.0, 1.0], dtype=torch.float64)
    high, low = schedule.log_snr(first).tolist()
    return (low if math.isfinite(low) else -_LOG_SNR_END), (high if math.isfinite(high) else _LOG_SNR_END)


def _between_ends(log_snr: Tensor, steps: int, schedule: NoiseSchedule) -> Tensor:
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, not {steps}")
    inner = schedule.time_of(log_snr[1:])
    return torch.cat([inner.new_ones(1), inner, inner.new_zeros(1)])


GRIDS = {"uniform": uniform_grid, "log_snr": log_snr_grid, "karras": karras_grid}
