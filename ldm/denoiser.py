"""Denoiser: a network, its noise schedule and what it was trained to predict, behind one contract.

    denoiser(x_t, t, cond) -> Prediction(x0, eps)

B batch, C channels; x_t, x0, eps are (B, C, *grid), t is (B,) float64 in (0, 1]. alpha, sigma and
r = sqrt(alpha^2 + sigma^2) below broadcast against x.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.config import Config
from ldm.draws import keyed_generator
from ldm.noise import NoiseSchedule, per_item

Target = Literal["eps", "x0", "v", "flow"]

_FEATURES = 128
_LOG_SNR_BOUND = 20.0


class Prediction(NamedTuple):
    """x0, eps (B, C, *grid) with x_t = alpha_t x0 + sigma_t eps; `var_mix` in [0, 1] if it is learned."""

    x0: Tensor
    eps: Tensor
    var_mix: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Prediction:
        """Each of them through `function`."""
        return Prediction(
            function(self.x0), function(self.eps), None if self.var_mix is None else function(self.var_mix)
        )


Predict = Callable[[Tensor, Tensor], Prediction]  # (x_t, t) with the conditioning bound


@dataclass(frozen=True)
class DenoiserConfig(Config):
    """What the network was trained for.

    target: eps (Ho et al. 2020), x0, v (Salimans & Ho 2022) or flow, u = eps - x0 (Lipman et al. 2023).
    input_scale: "unit" gives the network x_t / r, "none" x_t itself. clip_x0: bound on |x0|, for pixels.
    weighting: "simple" is the plain squared error of the target; "min_snr" weights the error of x0 by
    min(SNR, min_snr_gamma) (Hang et al. 2023, sec. 3.4); "learned" divides the squared error of the target by what
    it is on average at that noise level, which is learned beside the network (`Uncertainty`).
    """

    target: Target = "v"
    input_scale: Literal["none", "unit"] = "none"
    clip_x0: float | None = None
    weighting: Literal["simple", "min_snr", "learned"] = "simple"
    min_snr_gamma: float = 5.0

    def __post_init__(self) -> None:
        if self.clip_x0 is not None and self.clip_x0 <= 0:
            raise ValueError(f"clip_x0 must be positive, not {self.clip_x0}")
        if self.min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma must be positive, not {self.min_snr_gamma}")


def to_target(kind: Target, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network of this kind should put out for x_t = alpha x0 + sigma eps."""
    if kind == "eps":
        return eps
    if kind == "x0":
        return x0
    if kind == "v":
        return (alpha * eps - sigma * x0) / torch.sqrt(alpha**2 + sigma**2)
    return eps - x0


def from_output(kind: Target, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, eps) from the network's output: the inverse of `to_target` at x = x_t.

    v and flow are finite everywhere; eps does not determine x0 at alpha = 0, nor x0 eps at sigma = 0: what
    the division by zero gives is returned.
    """
    if kind == "eps":
        return (x - sigma * out) / alpha, out
    if kind == "x0":
        return out, (x - alpha * out) / sigma
    if kind == "v":
        r2 = alpha**2 + sigma**2
        rv = torch.sqrt(r2) * out
        return (alpha * x - sigma * rv) / r2, (sigma * x + alpha * rv) / r2
    return (x - sigma * out) / (alpha + sigma), (x + alpha * out) / (alpha + sigma)


def loss_weight(config: DenoiserConfig, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Weight (B,) of the squared error of the target, for (B,) alpha and sigma.

    min_snr: min(SNR, gamma) times (error of x0 / error of the target)^2, which is 1/SNR for eps, 1 for x0,
    1/(SNR + 1) for v and sigma^2 / (alpha + sigma)^2 for flow; written so that it is finite at both ends.
    simple, learned: 1.
    """
    if config.weighting != "min_snr":
        return torch.ones_like(alpha)
    alpha2, bound = alpha**2, config.min_snr_gamma * sigma**2
    if config.target == "eps":
        return (bound / alpha2).clamp(max=1)
    if config.target == "x0":
        return (alpha2 / sigma**2).clamp(max=config.min_snr_gamma)
    if config.target == "v":
        return torch.minimum(alpha2, bound) / (alpha2 + sigma**2)
    return torch.minimum(alpha2, bound) / (alpha + sigma) ** 2


class Uncertainty(nn.Module):
    """u(log-SNR), the learned logarithm of the mean squared error at a noise level (Karras et al. 2024, eq. 14-15).

    A linear map of fixed random Fourier features and a constant, 0 at the start. At each t the mean of
    error / exp(u) + u is least at u = log(mean error), whatever the target, and there every noise level weighs the
    same. The one parameter is a vector, which weight decay leaves alone as it does biases; the features are of unit
    norm, so that its gradient does not crowd out the network's where both are clipped together.
    """

    frequencies: Tensor
    phases: Tensor

    def __init__(self) -> None:
        super().__init__()
        generator = keyed_generator("uncertainty")
        self.register_buffer("frequencies", 2 * math.pi * torch.randn(_FEATURES, generator=generator))
        self.register_buffer("phases", 2 * math.pi * torch.rand(_FEATURES, generator=generator))
        self.weight = nn.Parameter(torch.zeros(_FEATURES + 1))

    def forward(self, log_snr: Tensor) -> Tensor:
        """(B,) -> (B,) float32; infinite log-SNR counts as 20 of its sign."""
        log_snr = log_snr.to(self.weight).clamp(-_LOG_SNR_BOUND, _LOG_SNR_BOUND)
        # EDM2's input log(sigma / alpha) / 4; products and sums stay in float32 under autocast, matmul would not
        waves = torch.cos(-log_snr[:, None] / 8 * self.frequencies + self.phases) / math.sqrt(_FEATURES)
        return (waves * self.weight[:-1]).sum(1) + self.weight[-1] / math.sqrt(2)


class Denoiser(nn.Module):
    """A diffusers `UNet2DConditionModel` (or one called like it) with its schedule and parameterisation.

    `uncertainty` is trained with the network where the weighting is "learned", and None otherwise; what it learns
    is of no use to inference.
    """

    def __init__(self, net: nn.Module, schedule: NoiseSchedule, config: DenoiserConfig) -> None:
        super().__init__()
        self.net = net
        self.schedule = schedule
        self.config = config
        self.uncertainty = Uncertainty() if config.weighting == "learned" else None

    def forward(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """x0 and eps for x_t; x0 is clipped if the config says so, and eps follows it."""
        return self.clip(self.predict(x_t, t, cond), x_t, t)

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """As `forward`, before clipping: guidance combines these and clips once."""
        alpha, sigma = (per_item(c, x_t) for c in self.schedule.alpha_sigma(t))
        x0, eps = from_output(self.config.target, self._run(x_t, t, cond), x_t, alpha, sigma)
        return Prediction(x0, eps)

    def clip(self, prediction: Prediction, x_t: Tensor, t: Tensor) -> Prediction:
        """Bound |x0| by `clip_x0` and recompute eps from it; unchanged where the config has none."""
        if self.config.clip_x0 is None:
            return prediction
        alpha, sigma = (per_item(c, x_t) for c in self.schedule.alpha_sigma(t))
        x0 = prediction.x0.clamp(-self.config.clip_x0, self.config.clip_x0)
        return prediction._replace(x0=x0, eps=(x_t - alpha * x0) / sigma)

    def loss(self, x0: Tensor, eps: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """What training minimises, per item: (B,), float32 (float64 for float64 data).

        The weighted `error`; for the learned weighting error / exp(u) + u, which can be negative.
        """
        error = self.error(x0, eps, t, cond)
        if self.uncertainty is not None:
            u = self.uncertainty(self.schedule.log_snr(t))
            return error * torch.exp(-u) + u
        return loss_weight(self.config, *self.schedule.alpha_sigma(t)).to(error) * error

    def error(self, x0: Tensor, eps: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """Mean squared error of the target per item, whatever the weighting: (B,), dtype as `loss`."""
        alpha, sigma = (per_item(c, x0) for c in self.schedule.alpha_sigma(t))
        out = self._run(self.schedule.add_noise(x0, eps, t), t, cond)
        difference = out - to_target(self.config.target, x0, eps, alpha, sigma)
        return (difference**2).flatten(1).mean(1)

    def _run(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The network's output for x_t, at least float32 whatever the precision of the network."""
        if self.config.input_scale == "unit":
            alpha, sigma = self.schedule.alpha_sigma(t)
            x = x_t * per_item((alpha**2 + sigma**2).rsqrt(), x_t)
        else:
            x = x_t
        if cond.low_res is not None:
            x = torch.cat([x, cond.low_res.to(x)], 1)
        dtype = next(self.net.parameters()).dtype
        # without self-attention, diffusers' first attention of a block sees the text too, under the other mask
        own = cond.text_mask if getattr(getattr(self.net, "config", None), "only_cross_attention", False) else None
        out: Tensor = self.net(
            x.to(dtype),
            self.schedule.network_time(t).to(x.device),
            encoder_hidden_states=None if cond.text is None else cond.text.to(dtype),
            encoder_attention_mask=cond.text_mask,
            attention_mask=own,
            class_labels=None if cond.level is None else (1000 * cond.level).to(x),
        ).sample
        return out.to(torch.promote_types(x_t.dtype, torch.float32))
