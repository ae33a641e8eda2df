"""The forward process x_t = alpha_t x0 + sigma_t eps, its schedules, posterior, times for training and grids.

t is float64 in [0, 1]: 0 is clean data (alpha 1, sigma 0), 1 the noisiest. Step k = 0 .. T-1 of a discrete
DDPM schedule lies at t = (k + 1) / T; between those points log(abar) is linear in t (alpha, in a last step
to 0). The other schedules are continuous in t. Every schedule quantity is computed in float64 and used in the
dtype of the tensor it multiplies, float32 at least.

B batch, T steps of a discrete schedule; x, x0, eps are (B, C, *grid), t and s are (B,).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ldm.config import Config

_COSINE_OFFSET = 0.008
MAX_STEPS = 100_000  # of a table
_MAX_BETA = 0.999
_T_MARGIN = 1e-4
_MAX_SIGMA = 80.0  # of edm
_EDM_RHO = 7.0
_EDM_LOG_SIGMA = (-1.2, 1.2)
_LEARNED_ENDS = (13.3, -5.0)
_LEARNED_PIECES = 16


@dataclass(frozen=True)
class NoiseScheduleConfig(Config):
    """Which schedule. `beta_start` and `beta_end` are read by `linear` and `scaled_linear` only.

    linear: Ho et al. 2020; scaled_linear: Stable Diffusion (linear in sqrt(beta)); cosine: Nichol & Dhariwal
    2021, eq. 17; sigmoid: Jabri et al. 2022, from -3 to 3; flow: alpha = 1 - t, sigma = t (Lipman et
    al. 2023, Liu et al. 2023); edm: alpha = 1, sigma = 80 t^7 (Karras et al. 2022, eq. 5 with sigma_min 0); learned:
    log-SNR piecewise linear between `knots`, evenly spaced in t, which training moves (Kingma et al. 2021, VDM; the
    ends stay). zero_terminal: a discrete schedule rescaled to end in pure noise (Lin et al. 2024, Algorithm 1). shift:
    of a flow's t, for resolutions above that of its training (Esser et al. 2024, eq. 23).
    """

    kind: Literal["linear", "scaled_linear", "cosine", "sigmoid", "flow", "edm", "learned"] = "cosine"
    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    zero_terminal: bool = False
    shift: float = 1.0
    knots: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps must be from 1 to {MAX_STEPS}, not {self.steps}")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"betas must rise within (0, 1), not from {self.beta_start} to {self.beta_end}")
        if self.shift <= 0 or (self.shift != 1 and self.kind != "flow"):
            raise ValueError(f"shift must be positive, and 1 for all but flow, not {self.shift}")
        if self.zero_terminal and (not self.discrete or self.steps < 2):
            raise ValueError("zero_terminal is of discrete schedules of 2 steps or more; flow ends in noise anyway")
        if self.knots and (self.kind != "learned" or len(self.knots) < 2):
            raise ValueError("knots are of a learned schedule, two or more log-SNRs")
        if any(not b < a for a, b in pairwise(self.knots)):
            raise ValueError(f"knots must fall, from clean to noisy, not {self.knots}")

    @property
    def discrete(self) -> bool:
        """Whether it has T steps and a table of abar."""
        return self.kind not in ("flow", "edm", "learned")

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


class _Curve(Protocol):
    """A family of schedules, for times t (B,) float64."""

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]: ...
    def time_of(self, log_snr: Tensor) -> Tensor: ...
    def network_time(self, t: Tensor) -> Tensor: ...
    def draw_t(self, u: Tensor) -> Tensor: ...
    def bound_weight(self, t: Tensor) -> Tensor: ...


class _Discrete:
    """T steps; between them log(abar) is linear."""

    def __init__(self, config: NoiseScheduleConfig) -> None:
        log_abar = torch.log1p(-_betas(config)).cumsum(0)
        if config.zero_terminal:
            log_abar = _zero_terminal(log_abar)
        self.config, self.steps = config, config.steps
        self.log_abar = torch.cat([log_abar.new_zeros(1), log_abar])  # (T + 1,): entry k is at t = k / T

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        table = self.log_abar.to(t.device)
        position = t * self.steps
        k = position.long().clamp(0, self.steps - 1)
        share = position - k
        log_abar = table[k] + share * (table[k + 1] - table[k])
        if self.config.zero_terminal:  # the last step goes to log 0: alpha itself is linear there
            log_abar = torch.where(k == self.steps - 1, table[k] + 2 * torch.log1p(-share), log_abar)
        return torch.exp(log_abar / 2), torch.sqrt(-torch.expm1(log_abar))

    def time_of(self, log_snr: Tensor) -> Tensor:
        table = self.log_abar.to(log_snr.device)
        log_abar = logsigmoid(log_snr).clamp(min=float(table[-1]))
        k = (torch.searchsorted(-table, -log_abar, right=True) - 1).clamp(0, self.steps - 1)
        share = (log_abar - table[k]) / (table[k + 1] - table[k])
        if self.config.zero_terminal:
            share = torch.where(k == self.steps - 1, -torch.expm1((log_abar - table[k]) / 2), share)
        return (k + share) / self.steps

    def network_time(self, t: Tensor) -> Tensor:
        return (t * self.steps - 1).float()

    def draw_t(self, u: Tensor) -> Tensor:
        return (torch.floor(u * self.steps) + 1).clamp(max=self.steps) / self.steps

    def bound_weight(self, t: Tensor) -> Tensor:
        alpha, sigma = self.alpha_sigma(t)
        s = (t - 1 / self.steps).clamp(min=0)
        first = s < 0.5 / self.steps
        alpha_s, sigma_s = self.alpha_sigma(torch.where(first, t, s))
        ratio = (alpha_s / sigma_s * (sigma / alpha)) ** 2 - 1
        # the step to 0 has no variance of its own: as in `posterior`, that of the step after it
        two = torch.full_like(t, min(2 / self.steps, 1.0))
        (a_1, s_1), (a_2, s_2) = self.alpha_sigma(two / 2), self.alpha_sigma(two)
        decoder = sigma**2 / alpha**2 / ((s_2**2 - (a_2 / a_1 * s_1) ** 2) * (s_1 / s_2) ** 2)
        return self.steps / 2 * torch.where(first, decoder, ratio)


class _Flow:
    """alpha = 1 - sigma; sigma is t, shifted. Times for training are logit-normal."""

    def __init__(self, config: NoiseScheduleConfig) -> None:
        self.shift, self.steps = config.shift, config.steps

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = self.shift * t / (1 + (self.shift - 1) * t)
        return 1 - sigma, sigma

    def time_of(self, log_snr: Tensor) -> Tensor:
        sigma = torch.sigmoid(-log_snr / 2)
        return sigma / (self.shift - (self.shift - 1) * sigma)

    def network_time(self, t: Tensor) -> Tensor:
        return (self.alpha_sigma(t)[1] * self.steps).float()

    def draw_t(self, u: Tensor) -> Tensor:
        return torch.sigmoid(torch.special.ndtri(u)).clamp(_T_MARGIN, 1 - _T_MARGIN)

    def bound_weight(self, t: Tensor) -> Tensor:
        raise ValueError("a flow's log-SNR is infinite at both ends: the bound has no weights there")


class _Edm:
    """alpha = 1, sigma = 80 t^7, so that times evenly spaced are Karras' grid. Log-normal sigma for training."""

    def __init__(self, config: NoiseScheduleConfig) -> None:
        self.steps = config.steps

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), _MAX_SIGMA * t**_EDM_RHO

    def time_of(self, log_snr: Tensor) -> Tensor:
        return torch.exp((-log_snr / 2 - math.log(_MAX_SIGMA)) / _EDM_RHO).clamp(max=1)

    def network_time(self, t: Tensor) -> Tensor:
        return (t * self.steps).float()

    def draw_t(self, u: Tensor) -> Tensor:
        mean, deviation = _EDM_LOG_SIGMA
        log_sigma = mean + deviation * torch.special.ndtri(u.clamp(_T_MARGIN, 1 - _T_MARGIN))
        return self.time_of(-2 * log_sigma)

    def bound_weight(self, t: Tensor) -> Tensor:
        mean, deviation = _EDM_LOG_SIGMA
        z = (self.alpha_sigma(t)[1].log() - mean) / deviation
        return deviation * math.sqrt(2 * math.pi) * torch.exp(z**2 / 2)


class _Learned:
    """Log-SNR between knots; alpha^2 + sigma^2 = 1."""

    def __init__(self, config: NoiseScheduleConfig, knots: Tensor | None = None) -> None:
        self.steps = config.steps
        self.knots = torch.tensor(config.knots, dtype=torch.float64) if config.knots else torch.linspace(
            *_LEARNED_ENDS, _LEARNED_PIECES + 1, dtype=torch.float64
        )  # fmt: skip
        if knots is not None:
            self.knots = knots.double()

    def _piece(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where t lies: its piece's first log-SNR, the piece's slope, the way into it."""
        table, pieces = self.knots.to(t.device), len(self.knots) - 1
        k = (t * pieces).long().clamp(0, pieces - 1)
        return table[k], (table[k + 1] - table[k]) * pieces, t - k / pieces

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        start, slope, way = self._piece(t)
        log_snr = start + slope * way
        alpha, sigma = torch.exp(logsigmoid(log_snr) / 2), torch.exp(logsigmoid(-log_snr) / 2)
        return torch.where(t > 0, alpha, 1.0), torch.where(t > 0, sigma, 0.0)

    def time_of(self, log_snr: Tensor) -> Tensor:
        table, pieces = self.knots.detach().to(log_snr.device), len(self.knots) - 1
        k = (torch.searchsorted(-table, -log_snr, right=True) - 1).clamp(0, pieces - 1)
        share = ((log_snr - table[k]) / (table[k + 1] - table[k])).clamp(0, 1)
        return torch.where(torch.isposinf(log_snr), 0.0, (k + share) / pieces)

    def network_time(self, t: Tensor) -> Tensor:
        return (t * self.steps).float()

    def draw_t(self, u: Tensor) -> Tensor:
        return u.clamp(min=_T_MARGIN)

    def bound_weight(self, t: Tensor) -> Tensor:
        return -self._piece(t)[1] / 2


class NoiseSchedule:
    """t -> (alpha_t, sigma_t) and what follows from it. Holds no device: `t` decides.

    knots: of a learned schedule, those in training, in place of the config's.
    """

    def __init__(self, config: NoiseScheduleConfig, knots: Tensor | None = None) -> None:
        self.config = config
        self.steps = config.steps
        self.discrete = config.discrete
        self._curve: _Curve
        if config.discrete:
            self._curve = _Discrete(config)
        elif config.kind == "flow":
            self._curve = _Flow(config)
        elif config.kind == "edm":
            self._curve = _Edm(config)
        else:
            self._curve = _Learned(config, knots)

    @property
    def abar(self) -> Tensor:
        """alpha_t^2 at the T steps, (T,) float64; ValueError for a continuous schedule, which has no steps."""
        if not isinstance(self._curve, _Discrete):
            raise ValueError(f"a {self.config.kind} schedule has no table of abar")
        return self._curve.log_abar[1:].exp()

    @property
    def knots(self) -> Tensor:
        """Log-SNRs of a learned schedule, evenly spaced in t; ValueError for any other."""
        if not isinstance(self._curve, _Learned):
            raise ValueError(f"a {self.config.kind} schedule has no knots")
        return self._curve.knots

    @property
    def first_t(self) -> float:
        """The least t that is noisy: the first step of a discrete schedule, else where a learned one begins, or 0."""
        if self.discrete:
            return 1 / self.steps
        return _T_MARGIN if self.config.kind == "learned" else 0.0

    def alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), float64, both shaped like `t`; (1, 0) at t = 0."""
        return self._curve.alpha_sigma(t.double())

    def log_snr(self, t: Tensor) -> Tensor:
        """2 log(alpha_t / sigma_t), float64, shaped like `t`: +inf at t = 0, -inf where alpha is 0."""
        alpha, sigma = self.alpha_sigma(t)
        return 2 * (alpha.log() - sigma.log())

    def time_of(self, log_snr: Tensor) -> Tensor:
        """The t of a log-SNR, the inverse of `log_snr`: float64, shaped like it; beyond t = 1, 1."""
        return self._curve.time_of(log_snr.double())

    def network_time(self, t: Tensor) -> Tensor:
        """What the time embedding gets, float32: diffusers' timestep k if discrete, sigma T for flow, else t T."""
        return self._curve.network_time(t.double())

    def draw_t(self, u: Tensor) -> Tensor:
        """Uniform u in [0, 1) -> t for training, float64, shaped like `u`.

        Discrete schedules: uniform over the T steps. Flow: logit-normal(0, 1) (Esser et al. 2024, eq. 19), kept 1e-4
        away from both ends. edm: log-normal sigma (Karras et al. 2022, table 1). Learned: uniform.
        """
        return self._curve.draw_t(u.double())

    def bound_weight(self, t: Tensor) -> Tensor:
        """The weight (B,) float64 of the squared error of eps that makes its mean over `draw_t` the bound's diffusion
        loss, in nats per dimension.

        Discrete: T times the KL of the step from t, (SNR(s) / SNR(t) - 1) / 2 (Kingma et al. 2021, eq. 14), of the step
        to 0 the Gaussian decoder's exponent, with the variance of the step after it. Continuous: half the density of
        log-SNR over that of `draw_t` (their eq. 17). ValueError for a flow.
        """
        return self._curve.bound_weight(t.double())

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


def posterior_mean_weights(schedule: NoiseSchedule, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Of x_t and of x0 in the mean of q(x_s | x_t, x0), (B,) float64 each (Ho et al. 2020, eq. 7)."""
    alpha_s, sigma_s = schedule.alpha_sigma(s)
    _, sigma_t = schedule.alpha_sigma(t)
    a, b = transition(schedule, t, s)
    return a * sigma_s**2 / sigma_t**2, alpha_s * b / sigma_t**2


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
    of_x, of_x0 = (per_item(c, x_t) for c in posterior_mean_weights(schedule, t, s))
    mean = of_x * x_t + of_x0 * x0
    _, b = transition(schedule, t, s)
    before = (2 * t).clamp(max=1)
    small = posterior_variance(schedule, torch.where(s > 0, t, before), torch.where(s > 0, s, before / 2))
    log_variance = var_mix * per_item(b.log(), x_t) + (1 - var_mix) * per_item(small.log(), x_t)
    return mean, log_variance


def posterior_kl(schedule: NoiseSchedule, x_t: Tensor, x0: Tensor, x0_hat: Tensor, t: Tensor, s: Tensor,
                 var_mix: float | Tensor | None = None) -> Tensor:  # fmt: skip
    """KL(q(x_s | x_t, x0) || p(x_s | x_t)) where p has x0_hat in place of x0 and the variance of `var_mix` (None: the
    posterior's): (B,), in nats per dimension (Ho et al. 2020, eq. 5).

    At s = 0 q is a point, and it is -log p(x0 | x_t), of a Gaussian decoder.
    """
    mean, log_variance = posterior(schedule, x_t, x0, t, s)
    mean_hat, log_variance_hat = posterior(schedule, x_t, x0_hat, t, s, 0.0 if var_mix is None else var_mix)
    square = (mean - mean_hat) ** 2 * torch.exp(-log_variance_hat)
    spread = log_variance_hat - log_variance
    kl = (square + torch.exp(-spread) - 1 + spread) / 2
    decoder = (square + log_variance_hat + math.log(2 * math.pi)) / 2
    last = (s == 0).to(x_t.device).view(-1, *[1] * (x_t.ndim - 1))
    return torch.where(last, decoder, kl).flatten(1).mean(1)
