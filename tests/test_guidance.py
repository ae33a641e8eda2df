"""Guidance beyond the classifier-free combination: against closed forms of Gaussians and written-out updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.denoiser import Prediction
from ldm.guidance import (
    Autoguidance,
    ClassifierFreeGuidance,
    ClassifierGuidance,
    ClipGuidance,
    Denoises,
    GuidanceInterval,
    Update,
    UpdateConfig,
)
from ldm.noise import NoiseSchedule, NoiseScheduleConfig, per_item

SCHEDULE = NoiseSchedule(NoiseScheduleConfig())
T = torch.tensor([0.3, 0.3], dtype=torch.float64)
NULL = Conditioning(text=torch.zeros(1, 1, 1, dtype=torch.float64))


class Gaussian:
    """The exact denoiser of x0 ~ N(mean, var), with mean = what it is told: E[x0 | x_t]."""

    def __init__(self, var: float = 0.25, shift: float = 0.0, schedule: NoiseSchedule = SCHEDULE) -> None:
        self.var, self.shift, self.schedule, self.rows = var, shift, schedule, list[int]()

    def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        self.rows.append(len(x_t))
        assert cond.text is not None
        mean = cond.text.view(-1, 1, 1, 1) + self.shift
        alpha, sigma = (per_item(c, x_t) for c in self.schedule.alpha_sigma(t))
        x0 = mean + alpha * self.var / (alpha**2 * self.var + sigma**2) * (x_t - alpha * mean)
        return Prediction(x0, (x_t - alpha * x0) / sigma)

    def clip(self, prediction: Prediction, x_t: Tensor, t: Tensor) -> Prediction:
        return prediction

    def __call__(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
        return self.predict(x_t, t, cond)


def told(*means: float) -> Conditioning:
    return Conditioning(text=torch.tensor(means, dtype=torch.float64).view(-1, 1, 1))


def noisy(rows: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(rows, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def consistent(found: Prediction, x: Tensor, t: Tensor = T) -> None:
    alpha, sigma = (per_item(c, x) for c in SCHEDULE.alpha_sigma(t))
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", [UpdateConfig(rescale=0.7), UpdateConfig(parallel=0.2, max_norm=3.0, momentum=-0.5)])
def test_every_update_leaves_a_consistent_prediction(config: UpdateConfig) -> None:
    x = noisy()
    guided = ClassifierFreeGuidance(Gaussian(), 4.0, NULL, Update(config))
    for _ in range(2):
        consistent(guided(x, T, told(1, -1)), x)


def test_rescaling_brings_the_deviation_back() -> None:
    x, cond = noisy(), told(1, -1)
    plain = Gaussian().predict(x, T, cond).x0
    free = ClassifierFreeGuidance(Gaussian(), 4.0, NULL)(x, T, cond).x0
    for share in (0.5, 1.0):
        got = ClassifierFreeGuidance(Gaussian(), 4.0, NULL, Update(UpdateConfig(rescale=share)))(x, T, cond).x0
        for one, whole, before in zip(got, free, plain, strict=True):
            ratio = float(before.std() / whole.std())
            torch.testing.assert_close(one, whole * (share * ratio + 1 - share), rtol=1e-12, atol=0)


def test_a_whole_rescale_has_the_deviation_of_the_better_one() -> None:
    """Where guidance stretches x0 as well as moving it."""
    x, worse, better = noisy(), *(Prediction(noisy(seed=k), noisy(seed=k)) for k in (5, 6))
    got = Update(UpdateConfig(rescale=1.0))(better, worse, 4.0, x, T, SCHEDULE).x0
    free = Update()(better, worse, 4.0, x, T, SCHEDULE).x0
    for one, wanted, before in zip(got, better.x0, free, strict=True):
        assert float(one.std()) == pytest.approx(float(wanted.std()), rel=1e-9)
        assert float(before.std()) > 2 * float(wanted.std())


@pytest.mark.parametrize("momentum", [0.0, -0.5])
@pytest.mark.parametrize("parallel", [0.0, 0.3])
@pytest.mark.parametrize("max_norm", [None, 0.7])
def test_projected_guidance_is_that_of_diffusers(momentum: float, parallel: float, max_norm: float | None) -> None:
    """Three steps, since momentum remembers."""
    ours = Update(UpdateConfig(momentum=momentum, parallel=parallel, max_norm=max_norm))
    theirs = MomentumBuffer(momentum) if momentum else None
    for step in range(3):
        better, worse = (Prediction(noisy(seed=seed), noisy(seed=9)) for seed in (step, step + 5))
        got = ours(better, worse, 3.5, noisy(), T, SCHEDULE).x0
        wanted = normalized_guidance(better.x0, worse.x0, 2.5, theirs, parallel, max_norm or 0.0, True)
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_momentum_is_of_one_batch_alone() -> None:
    x, cond, config = noisy(), told(1, -1), UpdateConfig(momentum=-0.5)
    guided = ClassifierFreeGuidance(Gaussian(), 4.0, NULL, Update(config))
    first, second = guided(x, T, cond).x0, guided(x, T, cond).x0
    assert not torch.allclose(first, second)
    assert torch.equal(ClassifierFreeGuidance(Gaussian(), 4.0, NULL, Update(config))(x, T, cond).x0, first)


def test_a_negative_prompt_takes_the_place_of_the_null() -> None:
    x, cond, net = noisy(), told(1, -1), Gaussian()
    got = ClassifierFreeGuidance(net, 3.0, told(0.5))(x, T, cond).eps
    towards, away = net.predict(x, T, cond).eps, net.predict(x, T, told(0.5, 0.5)).eps
    torch.testing.assert_close(got, 3 * towards - 2 * away)


def test_autoguidance_extrapolates_from_the_weaker_network() -> None:
    x, cond, net, weak = noisy(), told(1, -1), Gaussian(), Gaussian(var=0.6, shift=0.1)
    got = Autoguidance(net, 2.5, weak)(x, T, cond)
    wanted = 2.5 * net.predict(x, T, cond).x0 - 1.5 * weak.predict(x, T, cond).x0
    torch.testing.assert_close(got.x0, wanted)
    consistent(got, x)
    weak.rows.clear()
    assert torch.equal(Autoguidance(net, 1.0, weak)(x, T, cond).x0, net.predict(x, T, cond).x0)
    assert not weak.rows


def test_an_interval_guides_inside_and_nowhere_else() -> None:
    x, cond, net = noisy(), told(1, -1), Gaussian()
    guided = ClassifierFreeGuidance(net, 3.0, NULL)
    limited = GuidanceInterval(guided, 0.2, 0.6)
    for time, inside in ((0.2, False), (0.21, True), (0.6, True), (0.61, False)):
        t = torch.full((2,), time, dtype=torch.float64)
        net.rows.clear()
        got = limited(x, t, cond).x0
        assert net.rows == ([4] if inside else [2])
        assert torch.equal(got, (guided if inside else net)(x, t, cond).x0)
    with pytest.raises(ValueError, match="both sides"):
        limited(x, torch.tensor([0.1, 0.3], dtype=torch.float64), cond)


def class_log_prob(means: Tensor, var: float, wanted: int) -> Callable[[Tensor, Tensor], Tensor]:
    """log p(y = wanted | x_t) of even classes with x0 ~ N(mean, var), in closed form."""

    def found(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (c.view(-1, 1, 1, 1, 1) for c in SCHEDULE.alpha_sigma(t))
        spread = alpha**2 * var + sigma**2
        logits = -((x[:, None] - alpha * means.view(1, -1, 1, 1, 1)) ** 2 / (2 * spread)).flatten(2).sum(2)
        return logits.log_softmax(1)[:, wanted]

    return found


def test_classifier_guidance_at_one_gives_the_class_conditional_model() -> None:
    """Bayes: the score of the mixture plus the gradient of log p(y | x_t) is the score of the class."""
    means, var, x = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64), 0.25, noisy(seed=3)

    class Mixture(Gaussian):
        def predict(self, x_t: Tensor, t: Tensor, cond: Conditioning) -> Prediction:
            parts = [Gaussian.predict(self, x_t, t, told(*[float(m)] * len(x_t))) for m in means]
            weights = torch.stack([class_log_prob(means, var, k)(x_t, t).exp() for k in range(3)])
            eps = sum(w.view(-1, 1, 1, 1) * p.eps for w, p in zip(weights, parts, strict=True))
            alpha, sigma = (per_item(c, x_t) for c in SCHEDULE.alpha_sigma(t))
            return Prediction((x_t - sigma * eps) / alpha, torch.as_tensor(eps))

    guided = ClassifierGuidance(Mixture(var), 1.0, class_log_prob(means, var, 2))
    got = guided(x, T, told(0, 0))
    wanted = Gaussian(var).predict(x, T, told(2, 2))
    torch.testing.assert_close(got.eps, wanted.eps, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.x0, wanted.x0, rtol=1e-9, atol=1e-9)


def test_clip_guidance_climbs_by_the_gradient_through_the_network() -> None:
    """likeness(x0) = -|x0 - c|^2 / 2, and dx0/dx_t of a Gaussian is a number."""
    x, cond, net, scale = noisy(), told(1, -1), Gaussian(), 0.3
    got = ClipGuidance(net, scale, lambda x0: -((x0 - 0.5) ** 2).flatten(1).sum(1) / 2)(x, T, cond)
    alpha, sigma = (float(c[0]) for c in SCHEDULE.alpha_sigma(T))
    plain = net.predict(x, T, cond)
    gradient = (0.5 - plain.x0) * alpha * 0.25 / (alpha**2 * 0.25 + sigma**2)
    torch.testing.assert_close(got.eps, plain.eps - scale * sigma * gradient)
    consistent(got, x)
    assert not got.x0.requires_grad


@pytest.mark.parametrize("kind", ["cosine", "flow"])
def test_a_limit_holds_long_shifts_alone(kind: str) -> None:
    """Of x0, in standard deviations given x_t; in the gradient's direction, and consistent with x_t."""
    schedule = SCHEDULE if kind == "cosine" else NoiseSchedule(NoiseScheduleConfig(kind="flow"))
    x, cond, net = noisy(), told(1, -1), Gaussian(schedule=schedule)
    alpha, sigma = (float(c[0]) for c in schedule.alpha_sigma(T))
    most = 0.5 * sigma / (alpha**2 + sigma**2) ** 0.5
    plain = net.predict(x, T, cond).x0

    def shifts(scale: float, limit: float | None) -> Tensor:
        got = ClassifierGuidance(net, scale, lambda x_t, _: (3 * x_t).flatten(1).sum(1), limit)(x, T, cond)
        torch.testing.assert_close(alpha * got.x0 + sigma * got.eps, x)
        return got.x0 - plain

    free, held = shifts(100.0, None), shifts(100.0, 0.5)
    lengths = held.flatten(1).pow(2).mean(1).sqrt()
    torch.testing.assert_close(lengths, torch.full_like(lengths, most))
    torch.testing.assert_close(held / held.flatten(1).norm(dim=1).view(-1, 1, 1, 1),
                               free / free.flatten(1).norm(dim=1).view(-1, 1, 1, 1))  # fmt: skip
    torch.testing.assert_close(shifts(1e-3, 0.5), shifts(1e-3, None))


@pytest.mark.parametrize("kind", ["classifier", "clip"])
def test_no_gradient_is_no_guidance(kind: str) -> None:
    """At scale 0, and where alpha is 0 and x_t says nothing."""

    def fails(*_: Any) -> Tensor:
        raise AssertionError

    x, cond = noisy(), told(1, -1)
    wrap: Callable[..., Denoises] = ClassifierGuidance if kind == "classifier" else ClipGuidance
    assert torch.equal(wrap(Gaussian(), 0.0, fails)(x, T, cond).x0, Gaussian().predict(x, T, cond).x0)
    flow = NoiseSchedule(NoiseScheduleConfig(kind="flow"))
    net, end = Gaussian(schedule=flow), torch.ones(2, dtype=torch.float64)
    got = wrap(net, 2.0, lambda x0, *_: x0.flatten(1).sum(1))(x, end, cond)
    assert torch.equal(got.x0, net.predict(x, end, cond).x0)
    assert bool(got.eps.isfinite().all())


def test_wrappers_combine() -> None:
    """Classifier guidance around an interval around classifier-free guidance is the sum of what each adds."""
    x, cond, net = noisy(), told(1, -1), Gaussian()
    free = ClassifierFreeGuidance(net, 3.0, NULL)
    log_prob = class_log_prob(torch.tensor([-1.0, 0.5], dtype=torch.float64), 0.25, 1)
    both = ClassifierGuidance(GuidanceInterval(free, 0.2, 0.6), 2.0, log_prob)(x, T, cond).eps
    added = ClassifierGuidance(net, 2.0, log_prob)(x, T, cond).eps - net.predict(x, T, cond).eps
    torch.testing.assert_close(both, free(x, T, cond).eps + added)


@pytest.mark.parametrize(
    "bad",
    [{"interval": (0.5, 0.5)}, {"interval": (-0.1, 1.0)}, {"rescale": 1.5}, {"parallel": -0.1}, {"momentum": 1.0},
     {"max_norm": 0.0}, {"max_norm": -math.inf}],
)  # fmt: skip
def test_impossible_updates_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        UpdateConfig(**bad)
