"""Schedules, forward kernel, posterior, grids and times, against diffusers and against Gaussian algebra."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy import stats

from ldm.grids import uniform_grid
from ldm.noise import NoiseSchedule, NoiseScheduleConfig, posterior, posterior_variance, transition

DISCRETE = ("linear", "scaled_linear", "cosine", "sigmoid")
OF_DIFFUSERS = ("linear", "scaled_linear", "cosine")
ALL = (*DISCRETE, "flow")
DIFFUSERS_NAME = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def make(kind: str, steps: int = 1000) -> NoiseSchedule:
    return NoiseSchedule(NoiseScheduleConfig(kind=kind, steps=steps))


def reference(schedule: NoiseSchedule, **options: object) -> DDPMScheduler:
    """diffusers' scheduler holding our float64 table: it makes its own in float32."""
    scheduler = DDPMScheduler(num_train_timesteps=schedule.steps, clip_sample=False, **options)
    scheduler.alphas_cumprod = schedule.abar
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    return scheduler


def random_pairs(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    u = torch.rand(2, count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return u.amax(0), u.amin(0)


def gaussian(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", OF_DIFFUSERS)
def test_betas_are_those_of_diffusers(kind: str) -> None:
    """Per-step betas: only diffusers' float32 rounding of each one is left, not that of a product."""
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule=DIFFUSERS_NAME[kind])
    abar = torch.cat([torch.ones(1, dtype=torch.float64), make(kind).abar])
    torch.testing.assert_close(1 - abar[1:] / abar[:-1], scheduler.betas.double(), rtol=2e-6, atol=1e-12)


def test_linear_abar_against_a_plain_product() -> None:
    abar, product = make("linear").abar.numpy(), 1.0
    for k in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * k / 999)
        assert abs(abar[k] / product - 1) < 1e-12


def test_cosine_abar_is_the_squared_cosine_until_the_cap() -> None:
    t = np.arange(1, 901) / 1000
    f = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    np.testing.assert_allclose(make("cosine").abar[:900].numpy(), f, rtol=1e-11)
    assert make("cosine").abar[-1] > 0


@pytest.mark.parametrize("kind", DISCRETE)
def test_continuous_t_meets_the_table_and_is_log_linear_between(kind: str) -> None:
    schedule = make(kind, 50)
    k = torch.arange(50, dtype=torch.float64)
    alpha, sigma = schedule.alpha_sigma((k + 1) / 50)
    torch.testing.assert_close(alpha**2, schedule.abar, rtol=1e-12, atol=0)
    torch.testing.assert_close(sigma**2, 1 - schedule.abar, rtol=1e-11, atol=0)
    middle = schedule.alpha_sigma((k[:-1] + 1.5) / 50)[0] ** 2
    torch.testing.assert_close(middle, (schedule.abar[:-1] * schedule.abar[1:]).sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ALL)
def test_ends_and_log_snr(kind: str) -> None:
    schedule = make(kind)
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0.0, 1.0]))
    assert alpha.dtype == sigma.dtype == torch.float64
    assert (alpha[0], sigma[0]) == (1, 0)
    assert alpha[1] < 0.1
    assert sigma[1] > 0.99
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    log_snr = schedule.log_snr(t)
    assert log_snr[0] == math.inf
    assert (log_snr.diff() < 0).all()
    alpha, sigma = schedule.alpha_sigma(t[1:-1])
    torch.testing.assert_close(log_snr[1:-1], torch.log(alpha**2 / sigma**2), rtol=1e-11, atol=1e-11)


def test_sigmoid_abar_is_the_published_function() -> None:
    """The listing of Chen 2023 ("On the importance of noise scheduling"), in plain Python, until the cap on beta."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    abar = make("sigmoid").abar
    for k in range(0, 990, 11):
        t = (k + 1) / 1000
        wanted = (sigmoid(3) - sigmoid(t * 6 - 3)) / (sigmoid(3) - sigmoid(-3))
        assert float(abar[k]) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("kind", DISCRETE)
def test_zero_terminal_is_that_of_diffusers(kind: str) -> None:
    """diffusers' rescaling of the betas, given ours; its float32 leaves a few of 1e-7."""
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    plain = torch.cat([torch.ones(1, dtype=torch.float64), make(kind).abar])
    betas = rescale_zero_terminal_snr(1 - plain[1:] / plain[:-1])
    schedule = NoiseSchedule(NoiseScheduleConfig(kind=kind, zero_terminal=True))
    torch.testing.assert_close(schedule.abar, (1 - betas).cumprod(0), rtol=1e-9, atol=1e-12)
    alpha, sigma = schedule.alpha_sigma(torch.linspace(0, 1, 4001, dtype=torch.float64))
    assert (alpha[-1], sigma[-1]) == (0, 1)
    assert bool((alpha.diff() < 0).all())
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=1e-12, atol=0)
    middle = schedule.alpha_sigma(torch.tensor([0.9995], dtype=torch.float64))[0]
    assert float(middle**2) == pytest.approx(float(schedule.abar[-2]) / 4, rel=1e-9)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_a_shifted_flow_is_that_of_diffusers(shift: float) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    schedule = NoiseSchedule(NoiseScheduleConfig(kind="flow", shift=shift))
    theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
    u = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alpha, sigma = schedule.alpha_sigma(u)
    torch.testing.assert_close(sigma.float(), theirs.sigmas.flip(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(u), rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.network_time(u), theirs.timesteps.flip(0), rtol=1e-5, atol=1e-3)


def test_flow_is_a_straight_line_without_a_table() -> None:
    schedule, t = make("flow"), torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.equal(schedule.alpha_sigma(t)[0], 1 - t)
    assert torch.equal(schedule.alpha_sigma(t)[1], t)
    assert schedule.log_snr(t)[-1] == -math.inf
    with pytest.raises(ValueError, match="abar"):
        _ = schedule.abar


@pytest.mark.parametrize("kind", DISCRETE)
def test_network_time_is_diffusers_timestep(kind: str) -> None:
    k = torch.arange(1000, dtype=torch.float64)
    time = make(kind).network_time((k + 1) / 1000)
    assert time.dtype == torch.float32
    torch.testing.assert_close(time, k.float(), rtol=0, atol=1e-6)
    assert make("flow").network_time(torch.tensor([0.25])).tolist() == [250.0]


@pytest.mark.parametrize("kind", DISCRETE)
def test_add_noise_is_that_of_diffusers(kind: str) -> None:
    schedule, k = make(kind), torch.tensor([0, 1, 17, 500, 998, 999])
    x0, eps = gaussian(6, 3, 4, 4), gaussian(6, 3, 4, 4, seed=2)
    expected = reference(schedule).add_noise(x0, eps, k)
    if kind in OF_DIFFUSERS:  # float32 times are too coarse for the steep end of the sigmoid
        torch.testing.assert_close(schedule.add_noise(x0, eps, (k + 1) / 1000), expected, rtol=1e-6, atol=1e-6)
    exact = schedule.add_noise(x0, eps, (k.double() + 1) / 1000)
    torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-10)


def test_add_noise_keeps_float64_and_never_drops_below_float32() -> None:
    schedule, t = make("cosine"), torch.tensor([0.5], dtype=torch.float64)
    for given, kept in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        x = torch.ones(1, 2, 3, dtype=given)
        assert schedule.add_noise(x, x, t).dtype == kept


@pytest.mark.parametrize("kind", ALL)
def test_transitions_compose(kind: str) -> None:
    """q(x_t | x_s) after q(x_s | x_u) is q(x_t | x_u); from u = 0 it is the closed-form kernel."""
    schedule = make(kind)
    t, s = random_pairs(200)
    for u in (s / 3, torch.zeros_like(s)):
        a1, b1 = transition(schedule, s, u)
        a2, b2 = transition(schedule, t, s)
        a, b = transition(schedule, t, u)
        torch.testing.assert_close(a2 * a1, a, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(a2**2 * b1 + b2, b, rtol=1e-9, atol=1e-12)
    alpha, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(a, alpha, rtol=1e-12, atol=0)
    torch.testing.assert_close(b, sigma**2, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ALL)
def test_posterior_is_gaussian_conditioning(kind: str) -> None:
    """Condition the joint Gaussian of (x_s, x_t) given x0 on x_t: another route to the same two moments."""
    schedule = make(kind)
    t, s = random_pairs(100)
    x0, x_t = gaussian(100, 2, 3), gaussian(100, 2, 3, seed=2)
    alpha_t, sigma_t = (c.view(-1, 1, 1) for c in schedule.alpha_sigma(t))
    alpha_s, sigma_s = (c.view(-1, 1, 1) for c in schedule.alpha_sigma(s))
    covariance = alpha_t / alpha_s * sigma_s**2
    mean, log_variance = posterior(schedule, x_t, x0, t, s)
    expected = alpha_s * x0 + covariance / sigma_t**2 * (x_t - alpha_t * x0)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    variance = sigma_s**2 - covariance**2 / sigma_t**2
    torch.testing.assert_close(log_variance.exp(), variance, rtol=1e-6, atol=1e-13)


@pytest.mark.parametrize("kind", DISCRETE)
@pytest.mark.parametrize("steps", [100, 30])
def test_variances_are_those_of_diffusers(kind: str, steps: int) -> None:
    """Both fixed variances and the learned mix between them, on the whole grid and on a respaced one. The
    last step is left out: diffusers clamps its posterior variance at 1e-20, ours has a floor of its own."""
    schedule = make(kind, 100)
    grid = uniform_grid(steps, schedule)
    t, s = grid[:-2], grid[1:-1]
    k = (t * 100).round().long() - 1
    x = gaussian(len(t), 1, 2)
    for mix, name in ((0.0, "fixed_small"), (1.0, "fixed_large"), (0.3, "learned_range")):
        scheduler = reference(schedule, variance_type=name)
        scheduler.set_timesteps(timesteps=((grid[:-1] * 100).round().long() - 1).tolist())
        learned = torch.tensor(2 * mix - 1, dtype=torch.float64)
        expected = torch.stack([scheduler._get_variance(int(i), predicted_variance=learned) for i in k])
        expected = expected if name == "learned_range" else expected.log()
        got = posterior(schedule, x, x, t, s, mix)[1].flatten()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(
        posterior(schedule, x, x, t, s, torch.full_like(x, 0.3))[1], got.view(-1, 1, 1).expand_as(x)
    )


@pytest.mark.parametrize("kind", DISCRETE)
def test_first_step_log_variance_is_floored_as_in_improved_ddpm(kind: str) -> None:
    schedule = make(kind)
    abar = schedule.abar.numpy()
    second = (1 - abar[1] / abar[0]) * (1 - abar[0]) / (1 - abar[1])
    t, x = torch.tensor([1 / 1000], dtype=torch.float64), gaussian(1, 2, 2)
    log_variance = posterior(schedule, x, x, t, torch.zeros_like(t))[1]
    assert log_variance.item() == pytest.approx(math.log(second), rel=1e-9)
    assert posterior_variance(schedule, t, torch.zeros_like(t)).item() == 0


@pytest.mark.parametrize("kind", ALL)
def test_posterior_at_both_ends(kind: str) -> None:
    """s = 0 gives x0 itself; t = 1, where alpha_T is 0 (flow) or nearly so, stays finite."""
    schedule = make(kind)
    t = torch.tensor([1.0, 1.0, 0.4], dtype=torch.float64)
    x_t, x0 = gaussian(3, 2, 2), gaussian(3, 2, 2, seed=2)
    mean, log_variance = posterior(schedule, x_t, x0, t, torch.zeros_like(t), var_mix=0.5)
    assert torch.equal(mean, x0)
    assert log_variance.isfinite().all()
    s = torch.tensor([0.999, 0.5, 0.3], dtype=torch.float64)
    for mix in (0.0, 1.0):
        mean, log_variance = posterior(schedule, x_t, x0, t, s, mix)
        assert mean.isfinite().all()
        assert log_variance.isfinite().all()
    if kind == "flow":
        torch.testing.assert_close(mean[1], 0.5 * x0[1], rtol=1e-14, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 7, 30, 333, 999, 1000])
def test_discrete_grids(steps: int) -> None:
    grid = uniform_grid(steps, make("cosine"))
    assert grid.dtype == torch.float64
    assert grid.shape == (steps + 1,)
    assert (grid[0], grid[-1]) == (1, 0)
    assert (grid.diff() < 0).all()
    k = grid * 1000
    torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-9)
    torch.testing.assert_close(grid, torch.linspace(1, 0, steps + 1).double(), rtol=0, atol=0.5001e-3)


@pytest.mark.parametrize("steps", [1, 10, 50, 250])
def test_even_grids_are_the_trailing_timesteps_of_diffusers(steps: int) -> None:
    scheduler = DDPMScheduler(timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    grid = uniform_grid(steps, make("linear"))
    assert ((grid[:-1] * 1000).round().long() - 1).tolist() == scheduler.timesteps.tolist()


def test_grids_refuse_what_they_cannot_make() -> None:
    for kind in ("cosine", "flow"):
        with pytest.raises(ValueError, match="at least 1"):
            uniform_grid(0, make(kind))
    with pytest.raises(ValueError, match="repeat"):
        uniform_grid(11, make("linear", 10))
    assert uniform_grid(2000, make("flow")).shape == (2001,)
    assert uniform_grid(4, make("flow")).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_draw_t_is_uniform_over_the_steps() -> None:
    schedule = make("cosine", 8)
    t = schedule.draw_t((torch.arange(8000, dtype=torch.float64) + 0.5) / 8000)
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == [k / 8 for k in range(1, 9)]
    assert counts.tolist() == [1000] * 8
    ends = schedule.draw_t(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ends.tolist() == [1 / 8, 1]


def test_draw_t_of_flow_is_logit_normal() -> None:
    """At even quantiles u the logit of t must be the standard normal quantile of the standard library."""
    from statistics import NormalDist

    u = (torch.arange(999, dtype=torch.float64) + 1) / 1000
    logits = torch.tensor([NormalDist().inv_cdf(float(v)) for v in u], dtype=torch.float64)
    expected = 1 / (1 + torch.exp(-logits))
    t = make("flow").draw_t(u)
    assert t.dtype == torch.float64
    torch.testing.assert_close(t, expected, rtol=1e-10, atol=1e-10)
    ends = make("flow").draw_t(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([1e-4, 1 - 1e-4], abs=3e-4)
    assert ((ends > 0) & (ends < 1)).all()


def test_draw_t_of_edm_has_log_normal_sigma() -> None:
    """ln sigma ~ N(-1.2, 1.2^2) at even quantiles (Karras et al. 2022, table 1), and sigma = 80 t^7."""
    u = (torch.arange(999, dtype=torch.float64) + 1) / 1000
    schedule = make("edm")
    t = schedule.draw_t(u)
    alpha, sigma = schedule.alpha_sigma(t)
    np.testing.assert_allclose(sigma.log().numpy(), stats.norm.ppf(u.numpy(), -1.2, 1.2), rtol=1e-9)
    torch.testing.assert_close(sigma, 80 * t**7, rtol=1e-12, atol=0)
    assert torch.equal(alpha, torch.ones_like(alpha))


@pytest.mark.parametrize("kind", ["edm", "learned"])
def test_the_bound_of_a_continuous_schedule_weighs_by_the_density_of_log_snr(kind: str) -> None:
    """Half the inverse of the density that `draw_t` gives log-SNR (Kingma et al. 2021, eq. 17), here by differences of
    its quantiles."""
    schedule = make(kind)
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    step = 1e-6
    before, after = (schedule.log_snr(schedule.draw_t(u + h)) for h in (-step, step))
    wanted = (before - after) / (2 * step) / 2
    torch.testing.assert_close(schedule.bound_weight(schedule.draw_t(u)), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "bad",
    [{"steps": 0}, {"beta_start": 0.0}, {"beta_start": 0.5, "beta_end": 0.1}, {"beta_end": 1.0}, {"shift": 2.0},
     {"kind": "flow", "shift": 0.0}, {"kind": "flow", "zero_terminal": True}, {"steps": 1, "zero_terminal": True}],
)  # fmt: skip
def test_impossible_schedules_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        NoiseScheduleConfig(**bad)
