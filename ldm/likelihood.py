"""Likelihood: the variational bound term by term, and the exact density of the probability-flow ODE.

    x0 -> prior + the KL of every step + decoder = bound        x0 -> ODE to t = 1, divergence on the way -> log p(x0)

Per dimension of x0. Of pixels, in bits, these are comparable between models; of latents they are not, since a codec's
scale is in them, and say only how well a stage models its own latents.

B batch; x0 is (B, C, *grid), in [-1, 1] for pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm.denoiser import Predict
from ldm.grids import log_snr_ends
from ldm.noise import NoiseSchedule, per_item, posterior, posterior_kl

Decoder = Literal["discretised", "gaussian"]
HALF_STEP = 1 / 255  # of 8-bit pixels in [-1, 1]


class Bound(NamedTuple):
    """-log p(x0) <= prior + the sum of steps + decoder, in bits per dimension.

    prior (B,): KL(q(x_T | x0) || N(0, sigma_T^2)); steps (B, N): of each step of the grid but the last, the noisiest
    first; decoder (B,): -log p(x0 | x_t) of the last time.
    """

    prior: Tensor
    steps: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """(B,)."""
        return self.prior + self.steps.sum(1) + self.decoder


@torch.no_grad()
def variational_bound(predict: Predict, x0: Tensor, grid: Tensor, noise: Callable[[Tensor], Tensor], *,
                      schedule: NoiseSchedule, decoder: Decoder, variance: float = 0.0) -> Bound:  # fmt: skip
    """The bound of the reverse process on a grid of times from 1 to 0, of one draw of each x_t (Ho et al. 2020, eq. 5).

    predict and noise: as of a sampler. decoder: `discretised` gives the mass of 8-bit values (their eq. 13),
    `gaussian` a density, of latents. variance: the var_mix of a network that learned none; `posterior` says what that
    is in the last step. The grid of all T steps gives the bound that is trained.
    """
    grid = grid.double().cpu()
    first = grid[:1].expand(len(x0))
    prior = _to_standard(x0, first, schedule)
    terms = []
    for i in range(len(grid) - 1):
        t, s = (grid[k].expand(len(x0)) for k in (i, i + 1))
        x_t = schedule.add_noise(x0, noise(x0), t)
        prediction = predict(x_t, t)
        mix = variance if prediction.var_mix is None else prediction.var_mix
        if s[0] > 0:
            terms.append(posterior_kl(schedule, x_t, x0, prediction.x0, t, s, mix))
            continue
        mean, log_variance = posterior(schedule, x_t, prediction.x0, t, s, mix)
        log_p = discretised_log_prob if decoder == "discretised" else gaussian_log_prob
        decoded = -log_p(x0, mean, log_variance).flatten(1).mean(1)
    steps = torch.stack(terms, 1) if terms else prior.new_zeros(len(x0), 0)
    return Bound(*(nats / math.log(2) for nats in (prior, steps, decoded)))


def _to_standard(x0: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """KL(N(alpha x0, sigma^2) || N(0, p^2)), (B,) nats per dimension; p is sigma, or 1 where alpha^2 + sigma^2 is."""
    alpha, sigma = schedule.alpha_sigma(t)
    scale = torch.where((alpha**2 + sigma**2 - 1).abs() < 1e-6, torch.ones_like(sigma), sigma)
    ratio = per_item((sigma / scale) ** 2, x0)
    return ((ratio - 1 - ratio.log() + (per_item(alpha / scale, x0) * x0) ** 2) / 2).flatten(1).mean(1)


def gaussian_log_prob(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log N(x; mean, exp(log_variance)), shaped like x."""
    return -((x - mean) ** 2 * torch.exp(-log_variance) + log_variance + math.log(2 * math.pi)) / 2


def discretised_log_prob(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log of the mass that the Gaussian gives to the 8-bit value of x, the outermost ones having all beyond them (Ho
    et al. 2020, eq. 13): shaped like x, whose values are k / 127.5 - 1."""
    deviation = torch.exp(log_variance / 2)
    above, below = (x + HALF_STEP - mean) / deviation, (x - HALF_STEP - mean) / deviation
    inner = _log_difference(above, below)
    found = torch.where(x < -1 + HALF_STEP, torch.special.log_ndtr(above), inner)
    return torch.where(x > 1 - HALF_STEP, torch.special.log_ndtr(-below), found)


def _log_difference(above: Tensor, below: Tensor) -> Tensor:
    """log(Phi(above) - Phi(below)) for above > below, in the tail where it does not vanish."""
    upper = below > 0
    a, b = torch.where(upper, -below, above), torch.where(upper, -above, below)
    log_a, log_b = torch.special.log_ndtr(a), torch.special.log_ndtr(b)
    return log_a + torch.log(-torch.expm1((log_b - log_a).clamp(max=-1e-12)))


def ode_log_likelihood(predict: Predict, x0: Tensor, probe: Callable[[Tensor], Tensor], *, schedule: NoiseSchedule,
                       steps: int = 200, exact: bool = False) -> Tensor:  # fmt: skip
    """Log-density of x0 under the probability-flow ODE, (B,) float64 in bits per dimension (Song et al. 2021, eq. 39).

    Solved by Heun's method, evenly in log-SNR between the ends of `ldm.grids.log_snr_ends`, in
    z = x / sqrt(alpha^2 + sigma^2), which moves alike on every schedule. The density is that of x at the first
    noisy time, which is taken as x0's. probe: draws shaped like its argument with identity covariance,
    such as signs, one for the whole way (Hutchinson's estimate of the divergence); exact: the divergence itself, one
    backward pass a dimension. Network calls: 2 steps + 1, each with a gradient.
    """
    low, high = log_snr_ends(schedule)
    u = torch.linspace(-high / 2, -low / 2, steps + 1, dtype=torch.float64)
    directions = probe(x0).to(x0)
    z, log_det = x0, torch.zeros(len(x0), dtype=torch.float64, device=x0.device)

    def slope(at: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        return _flow_slope(predict, z, at.expand(len(z)), directions, schedule, exact)

    for i in range(steps):
        h = float(u[i + 1] - u[i])
        v, divergence = slope(u[i], z)
        v_next, divergence_next = slope(u[i + 1], z + h * v)
        z = z + h / 2 * (v + v_next)
        log_det = log_det + h / 2 * (divergence + divergence_next)
    log_p = gaussian_log_prob(z, torch.zeros_like(z), torch.zeros_like(z)).flatten(1).double().sum(1) + log_det
    return log_p / x0[0].numel() / math.log(2)


def _flow_slope(predict: Predict, z: Tensor, u: Tensor, directions: Tensor, schedule: NoiseSchedule, exact: bool
                ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d z / d u = s eps - s^2 z for u = log(sigma / alpha), s = sigma / r, and its divergence, (B,) float64."""
    t = schedule.time_of(-2 * u)
    alpha, sigma = schedule.alpha_sigma(t)
    r = per_item((alpha**2 + sigma**2).sqrt(), z)
    unit = per_item(torch.sigmoid(2 * u).sqrt(), z)
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        v = unit * predict(r * z, t).eps - unit**2 * z
        if exact:
            flat, dimensions = v.flatten(1), z[0].numel()
            rows = [torch.autograd.grad(flat[:, k].sum(), z, retain_graph=True)[0].flatten(1)[:, k]
                    for k in range(dimensions)]  # fmt: skip
            divergence = torch.stack(rows, 1).sum(1)
        else:
            (pulled,) = torch.autograd.grad((v * directions).sum(), z)
            divergence = (pulled * directions).flatten(1).sum(1)
    return v.detach(), divergence.detach().double()
