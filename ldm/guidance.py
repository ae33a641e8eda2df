"""Guidance: wrappers of a denoiser that are called like one and can be wrapped again.

    ClassifierFreeGuidance, Autoguidance: away from a worse prediction
    ClassifierGuidance, ClipGuidance: up a gradient
    GuidanceInterval: any of them, at some times only

Each has `predict`, unclipped, for what wraps it, and called clips once, as the innermost denoiser says.
B batch, C channels; x_t, x0, eps are (B, C, *grid), t is (B,).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.config import Config
from ldm.denoiser import Prediction
from ldm.noise import NoiseSchedule, per_item


class Denoises(Protocol):
    """A `Denoiser`, or a wrapper of one."""

    @property
    def schedule(self) -> NoiseSchedule: ...
    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction: ...
    def clip(self, prediction: Prediction, x_t: Tensor, t: Tensor) -> Prediction: ...
    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction: ...


@dataclass(frozen=True)
class UpdateConfig(Config):
    """How guidance applies the difference d = x0_better - x0_worse. As it is: x0_worse + w d = x0_better + (w - 1) d.

    interval: of t, (low, high]: outside it there is no guidance (Kynkaanniemi et al. 2024). rescale: share by which
    the deviation of the guided x0 is brought back to that of x0_better (Lin et al. 2024, eq. 15-16, on x0). APG (Sadat
    et al. 2025, Algorithm 1): momentum adds so much of the d before, negative as a rule; max_norm bounds the 2-norm of
    d; of its part along x0_better only the share `parallel` is kept.
    """

    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    momentum: float = 0.0
    max_norm: float | None = None
    parallel: float = 1.0

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            raise ValueError(f"interval must be two times that rise within 0 to 1, not {low:g} to {high:g}")
        if not (0 <= self.rescale <= 1 and 0 <= self.parallel <= 1):
            raise ValueError("rescale and parallel are shares, from 0 to 1")
        if not -1 < self.momentum < 1:
            raise ValueError(f"momentum must be between -1 and 1, not {self.momentum:g}")
        if self.max_norm is not None and self.max_norm <= 0:
            raise ValueError(f"max_norm must be positive, not {self.max_norm:g}")

    @property
    def linear(self) -> bool:
        """Whether the difference is applied as it is, wherever it is."""
        return (self.rescale, self.momentum, self.max_norm, self.parallel) == (0.0, 0.0, None, 1.0)


class Update:
    """Applies the difference of two predictions. Momentum is state: of one batch on its way through a sampler."""

    def __init__(self, config: UpdateConfig | None = None) -> None:
        self.config = config or UpdateConfig()
        self._before: Tensor | None = None

    def __call__(self, better: Prediction, worse: Prediction, scale: float, x_t: Tensor, t: Tensor,
                 schedule: NoiseSchedule) -> Prediction:  # fmt: skip
        """x0 and eps, which still satisfy x_t = alpha x0 + sigma eps; the variance is that of `better`."""
        if self.config.linear:
            x0, eps = (w + scale * (b - w) for b, w in ((better.x0, worse.x0), (better.eps, worse.eps)))
            return better._replace(x0=x0, eps=eps)
        config, difference = self.config, better.x0 - worse.x0
        if config.momentum:
            if self._before is not None:
                difference = difference + config.momentum * self._before
            self._before = difference
        if config.max_norm is not None:
            difference = difference * (config.max_norm / _norm(difference)).clamp(max=1)
        if config.parallel < 1:
            unit = better.x0 / _norm(better.x0)
            along = (difference * unit).flatten(1).sum(1).view(-1, *[1] * (unit.ndim - 1)) * unit
            difference = difference - (1 - config.parallel) * along
        x0 = better.x0 + (scale - 1) * difference
        if config.rescale:
            x0 = x0 * (config.rescale * _deviation(better.x0) / _deviation(x0) + 1 - config.rescale)
        alpha, sigma = (per_item(c, x_t) for c in schedule.alpha_sigma(t))
        return better._replace(x0=x0, eps=(x_t - alpha * x0) / sigma)


def _norm(x: Tensor) -> Tensor:
    """Of each item, broadcastable to it; never 0."""
    return x.flatten(1).norm(dim=1).clamp(min=1e-12).view(-1, *[1] * (x.ndim - 1))


def _deviation(x: Tensor) -> Tensor:
    return x.flatten(1).std(dim=1).clamp(min=1e-12).view(-1, *[1] * (x.ndim - 1))


class _Guided(ABC):
    """A wrapper around `denoiser`."""

    def __init__(self, denoiser: Denoises) -> None:
        self.denoiser = denoiser

    @property
    def schedule(self) -> NoiseSchedule:
        """That of the innermost denoiser."""
        return self.denoiser.schedule

    @abstractmethod
    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """Guided x0 and eps, not clipped."""

    def clip(self, prediction: Prediction, x_t: Tensor, t: Tensor) -> Prediction:
        """As the innermost denoiser clips."""
        return self.denoiser.clip(prediction, x_t, t)

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """x_t (B, C, *grid), t (B,) -> guided x0 and eps, which still satisfy x_t = alpha x0 + sigma eps."""
        return self.clip(self.predict(x_t, t, cond), x_t, t)


class ClassifierFreeGuidance(_Guided):
    """eps = w eps_cond + (1 - w) eps_null, and so for x0 (Ho & Salimans 2022, eq. 6; w is 1 + theirs).

    `scale` w as in diffusers: 1 is no guidance, and then the network gets B rows. Otherwise it gets one call
    of 2 B rows: B null, then B conditional. `null` holds one item, or one per row; where it is another prompt's
    conditioning, that is the negative prompt. If the denoiser clips, the combination is clipped and not its parts.
    """

    def __init__(self, denoiser: Denoises, scale: float, null: Conditioning, update: Update | None = None) -> None:
        super().__init__(denoiser)
        self.scale, self.null, self.update = scale, null, update or Update()

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """As called, not clipped."""
        if self.scale == 1:
            return self.denoiser.predict(x_t, t, cond)
        null = self.null.expand(len(x_t)) if len(self.null) == 1 else self.null
        both = self.denoiser.predict(torch.cat([x_t, x_t]), torch.cat([t, t]), Conditioning.cat([null, cond]))
        worse, better = both.map(lambda v: v.chunk(2)[0]), both.map(lambda v: v.chunk(2)[1])
        return self.update(better, worse, self.scale, x_t, t, self.schedule)


class Autoguidance(_Guided):
    """Away from a weaker network, told the same: less trained or smaller (Karras et al. 2024b, eq. 2).

    weak: predicts on the same schedule. scale: w; 1 is no guidance, and then the weak network is not called.
    """

    def __init__(self, denoiser: Denoises, scale: float, weak: Denoises, update: Update | None = None) -> None:
        super().__init__(denoiser)
        self.scale, self.weak, self.update = scale, weak, update or Update()

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """As called, not clipped."""
        better = self.denoiser.predict(x_t, t, cond)
        if self.scale == 1:
            return better
        return self.update(better, self.weak.predict(x_t, t, cond), self.scale, x_t, t, self.schedule)


class GuidanceInterval(_Guided):
    """The guidance it wraps at times in (low, high], and there alone (Kynkaanniemi et al. 2024).

    ValueError for a batch whose times lie on both sides: samplers bring all of a batch to the same time.
    """

    def __init__(self, guided: ClassifierFreeGuidance | Autoguidance | _Uphill, low: float, high: float) -> None:
        super().__init__(guided)
        self.plain, self.low, self.high = guided.denoiser, low, high

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """As called, not clipped."""
        inside = (t > self.low) & (t <= self.high)
        if bool(inside.any()) != bool(inside.all()):
            raise ValueError("the times of a batch lie on both sides of the guidance interval")
        return (self.denoiser if bool(inside.all()) else self.plain).predict(x_t, t, cond)


class _Uphill(_Guided):
    """eps - scale sigma g, and x0 to match, for a gradient g of a logarithm at x_t; nothing where alpha is 0.

    limit: the root mean square of x0's shift is held to so many standard deviations of x0 given x_t, as data of unit
    variance have it, sigma / sqrt(alpha^2 + sigma^2). Without it x0 moves by scale sigma^2 / alpha g, which near t = 1
    has no bound: a true gradient vanishes there as alpha does, and a network's does not.
    """

    def __init__(self, denoiser: Denoises, scale: float, limit: float | None = None) -> None:
        super().__init__(denoiser)
        self.scale, self.limit = scale, limit

    def _climb(self, prediction: Prediction, gradient: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (per_item(c, gradient) for c in self.schedule.alpha_sigma(t))
        step = torch.where(alpha > 0, self.scale * sigma * gradient, torch.zeros_like(gradient))
        of_step = torch.where(alpha > 0, sigma / alpha, torch.zeros_like(alpha))
        if self.limit is not None:
            most = self.limit * sigma / (alpha**2 + sigma**2).sqrt()
            far = _norm(of_step * step) / gradient[0].numel() ** 0.5
            step = step * (most / far).clamp(max=1)
        return prediction._replace(x0=prediction.x0 + of_step * step, eps=prediction.eps - step)


class ClassifierGuidance(_Uphill):
    """By the gradient of log p(y | x_t) of a noise-aware classifier (Dhariwal & Nichol 2021, eq. 14).

    log_prob: (x_t, t) -> (B,), such as the log-softmax of the wanted class.
    """

    def __init__(self, denoiser: Denoises, scale: float, log_prob: Callable[[Tensor, Tensor], Tensor],
                 limit: float | None = None) -> None:  # fmt: skip
        super().__init__(denoiser, scale, limit)
        self.log_prob = log_prob

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """As called, not clipped."""
        prediction = self.denoiser.predict(x_t, t, cond)
        if self.scale == 0:
            return prediction
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.log_prob(x, t).sum(), x)
        return self._climb(prediction, gradient, t)


class ClipGuidance(_Uphill):
    """By the gradient, at x_t and through the network, of the likeness of x0 to a text (Nichol et al. 2022, GLIDE,
    sec. 2.4, by x0 in place of a CLIP that knows noise, as Bansal et al. 2023, eq. 4).

    likeness: x0 -> (B,), such as the cosine of CLIP's embeddings of the decoded x0 and of the prompt.
    """

    def __init__(self, denoiser: Denoises, scale: float, likeness: Callable[[Tensor], Tensor],
                 limit: float | None = None) -> None:  # fmt: skip
        super().__init__(denoiser, scale, limit)
        self.likeness = likeness

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        """As called, not clipped."""
        if self.scale == 0:
            return self.denoiser.predict(x_t, t, cond)
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            found = self.denoiser.predict(x, t, cond)
            (gradient,) = torch.autograd.grad(self.likeness(found.x0).sum(), x)
        return self._climb(found.map(Tensor.detach), gradient, t)
