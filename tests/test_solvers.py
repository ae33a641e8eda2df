"""Euler, Heun, SDE-DPM-Solver++ and UniPC against diffusers, and on targets whose solution is known; grids."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.schedulers import (
    scheduling_dpmsolver_multistep,
    scheduling_euler_discrete,
    scheduling_unipc_multistep,
)
from torch import Tensor

from ldm.denoiser import Prediction, Target
from ldm.grids import GRIDS, karras_grid, log_snr_grid, uniform_grid
from ldm.noise import NoiseSchedule, NoiseScheduleConfig
from ldm.sampling import SAMPLERS, ddim, dpmpp_2m_sde, euler, heun, unipc
from pipelines.cascade import load_cascade
from pipelines.settings import SamplingConfig
from tests.trajectories import (
    PREDICTION_TYPE,
    SHAPE,
    TARGETS,
    Mixture,
    assert_same_path,
    computing_in_float64,
    gaussian,
    give_tables,
    make,
    network,
    noises,
    predictor,
    run,
    run_diffusers,
    timesteps,
)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_euler_and_heun_are_those_of_diffusers(
    monkeypatch: pytest.MonkeyPatch, kind: str, target: Target, name: str, steps: int
) -> None:
    """diffusers keeps x / alpha, and scales it for the network to what ours is."""
    computing_in_float64(monkeypatch, scheduling_euler_discrete)
    schedule = make(kind)
    grid = uniform_grid(steps, schedule)
    classes: dict[str, Any] = {"euler": EulerDiscreteScheduler, "heun": HeunDiscreteScheduler}
    scheduler = classes[name](num_train_timesteps=100, prediction_type=PREDICTION_TYPE[target])
    times = timesteps(grid, schedule)
    alpha, sigma = schedule.alpha_sigma(grid)
    levels = sigma / alpha
    scheduler.set_timesteps(steps)
    if name == "heun":
        times = [times[0], *(k for k in times[1:] for _ in range(2))]
        levels = torch.cat([levels[:1], levels[1:-1].repeat_interleave(2), levels[-1:]])
    scheduler.timesteps, scheduler.sigmas = torch.tensor(times, dtype=torch.float64), levels
    scheduler._step_index = 0
    scheduler.is_scale_input_called = True
    x = gaussian(*SHAPE, seed=1) * torch.sqrt(levels[0] ** 2 + 1)
    path = []
    for k, level in zip(times, levels, strict=False):
        path.append(x / torch.sqrt(level**2 + 1))
        out = network(path[-1], torch.full((SHAPE[0],), float(k)))
        x = scheduler.step(out, scheduler.timesteps[0] if name == "euler" else k, x).prev_sample
    assert_same_path(run(SAMPLERS[name], schedule, grid, target), [*path, x])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "unipc"])
@pytest.mark.parametrize("steps", [1, 2, 3, 30])
def test_multistep_solvers_are_those_of_diffusers(
    monkeypatch: pytest.MonkeyPatch, kind: str, target: Target, name: str, steps: int
) -> None:
    schedule = make(kind)
    grid, shared = uniform_grid(steps, schedule), noises(steps)
    common: dict[str, Any] = {"num_train_timesteps": 100, "solver_order": 2, "final_sigmas_type": "zero",
                              "prediction_type": PREDICTION_TYPE[target]}  # fmt: skip
    if name == "unipc":
        module: Any = scheduling_unipc_multistep
        scheduler: Any = UniPCMultistepScheduler(solver_type="bh2", **common)
    else:
        module = scheduling_dpmsolver_multistep
        scheduler = DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_type="midpoint", **common)
    computing_in_float64(monkeypatch, module)
    give_tables(scheduler, schedule)
    times = timesteps(grid, schedule)
    scheduler.set_timesteps(steps)
    scheduler.timesteps = torch.tensor(times)
    abar = schedule.abar[times]
    scheduler.sigmas = torch.cat([torch.sqrt((1 - abar) / abar), torch.zeros(1, dtype=torch.float64)])
    scheduler._step_index = 0
    given = iter(shared)
    more: Callable[[], dict[str, Any]] = lambda: {} if name == "unipc" else {"variance_noise": next(given)}  # noqa: E731
    theirs = run_diffusers(lambda out, k, x: scheduler.step(out, k, x, **more()).prev_sample, times)
    assert_same_path(run(SAMPLERS[name], schedule, grid, target, shared), theirs)


@pytest.mark.parametrize("kind", ["linear", "cosine", "flow"])
def test_euler_without_churn_is_ddim(kind: str) -> None:
    schedule = make(kind)
    grid = uniform_grid(12, schedule)
    assert_same_path(run(euler, schedule, grid), run(ddim, schedule, grid, eta=0.0))


def edm_sampler(x0_of: Callable[[Tensor, float], Tensor], x: Tensor, levels: list[float], noise: Callable[[], Tensor],
                churn: float, low: float, high: float, scale: float) -> Tensor:  # fmt: skip
    """Karras et al. 2022, Algorithm 2, as printed."""
    count = len(levels) - 1
    for i in range(count):
        gamma = min(churn / count, math.sqrt(2) - 1) if low <= levels[i] <= high else 0.0
        raised = levels[i] + gamma * levels[i]
        if gamma > 0:
            x = x + math.sqrt(raised**2 - levels[i] ** 2) * scale * noise()
        slope = (x - x0_of(x, raised)) / raised
        following = x + (levels[i + 1] - raised) * slope
        if levels[i + 1] != 0:
            other = (following - x0_of(following, levels[i + 1])) / levels[i + 1]
            following = x + (levels[i + 1] - raised) * (slope + other) / 2
        x = following
    return x


@pytest.mark.parametrize("options", [(0.0, 0.0, 99.0, 1.0), (6.0, 0.0, 99.0, 1.0), (6.0, 0.3, 5.0, 1.007)])
def test_heun_with_churn_is_the_printed_algorithm(options: tuple[float, float, float, float]) -> None:
    """On a flow's grid below t = 1, with the exact denoiser of a mixture, which knows no time but the noise level."""
    schedule, target, churn, low, high, scale = make("flow"), Mixture(), *options
    grid = torch.cat([torch.linspace(0.95, 0.05, 12, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    start, shared = gaussian(6, 2, seed=1), [gaussian(6, 2, seed=50 + i) for i in range(12)]

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (c[0] for c in schedule.alpha_sigma(t))
        x0 = target.x0(x, alpha, sigma)
        return Prediction(x0, (x - alpha * x0) / sigma)

    def x0_of(x: Tensor, level: float) -> Tensor:
        return target.x0(x, torch.tensor(1.0, dtype=torch.float64), torch.tensor(level, dtype=torch.float64))

    alpha, sigma = schedule.alpha_sigma(grid)
    ours, theirs = iter(shared), iter(shared)
    found = heun(predict, start, grid, lambda _: next(ours), schedule=schedule, churn=churn, churn_range=(low, high),
                 churn_noise=scale)  # fmt: skip
    levels = (sigma / alpha).tolist()
    wanted = edm_sampler(x0_of, start / alpha[0], levels, lambda: next(theirs), churn, low, high, scale)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2), ("unipc", 3)])
def test_order_of_convergence_on_a_mixture(name: str, order: int) -> None:
    """On grids uniform in log-SNR between finite ends, against 4,000 steps of Heun's. UniPC-p is of order p + 1."""
    schedule, target = make("flow"), Mixture()

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (c[0] for c in schedule.alpha_sigma(t))
        x0 = target.x0(x, alpha, sigma)
        return Prediction(x0, (x - alpha * x0) / sigma)

    def drawn(sampler: str, steps: int) -> Tensor:
        grid = schedule.time_of(torch.linspace(-3, 3, steps + 1, dtype=torch.float64))
        return SAMPLERS[sampler](predict, start, grid, torch.randn_like, schedule=schedule)

    start = gaussian(20, 2, seed=3)
    exact = drawn("heun", 4000)
    errors = [float((drawn(name, steps) - exact).pow(2).mean().sqrt()) for steps in (40, 80, 160)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.3)


@pytest.mark.parametrize(
    "options",
    [{"kind": "linear"}, {"kind": "cosine"}, {"kind": "sigmoid"}, {"kind": "scaled_linear", "zero_terminal": True},
     {"kind": "flow"}, {"kind": "flow", "shift": 3.0}],
)  # fmt: skip
def test_time_of_inverts_log_snr(options: dict[str, Any]) -> None:
    schedule = NoiseSchedule(NoiseScheduleConfig(**options))
    t = torch.linspace(1e-4, 1 - 1e-4, 777, dtype=torch.float64)
    torch.testing.assert_close(schedule.time_of(schedule.log_snr(t)), t, rtol=1e-8, atol=1e-10)
    assert schedule.time_of(torch.tensor([-200.0, math.inf])).tolist() == pytest.approx([1, 0], abs=1e-12)


@pytest.mark.parametrize("kind", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("name", ["log_snr", "karras"])
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_grids_fall_from_one_to_zero(kind: str, name: str, steps: int) -> None:
    grid = GRIDS[name](steps, make(kind, 1000))
    assert grid.shape == (steps + 1,)
    assert (grid[0], grid[-1]) == (1, 0)
    assert bool((grid.diff() < 0).all())


def test_spacing_is_even_in_what_it_says() -> None:
    schedule: NoiseSchedule = make("linear", 1000)
    gaps = schedule.log_snr(log_snr_grid(20, schedule)[:-1]).diff()
    torch.testing.assert_close(gaps, gaps[:1].expand(19), rtol=1e-9, atol=1e-9)
    scheduler = EulerDiscreteScheduler(use_karras_sigmas=True)
    scheduler.set_timesteps(20)
    alpha, sigma = schedule.alpha_sigma(karras_grid(20, schedule))
    torch.testing.assert_close((sigma / alpha).float(), scheduler.sigmas, rtol=2e-3, atol=1e-6)
    with pytest.raises(ValueError, match="at least 1"):
        karras_grid(0, schedule)


@pytest.mark.parametrize("kind", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("sampler", [dpmpp_2m_sde, heun])
def test_stochastic_solvers_have_the_moments_of_a_mixture(kind: str, sampler: Callable[..., Tensor]) -> None:
    count, target, schedule = 2000, Mixture(), make(kind, 1000)
    generator = torch.Generator().manual_seed(7)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (c[0] for c in schedule.alpha_sigma(t))
        x0 = target.x0(x.double(), alpha, sigma)
        return Prediction(x0.float(), ((x - alpha * x0) / sigma).float())

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    options = {"churn": 20.0} if sampler is heun else {}
    start = torch.randn(count, 2, generator=generator)
    x = sampler(predict, start, log_snr_grid(120, schedule), noise, schedule=schedule, **options)
    mean, covariance = target.moments()
    apart = x.double() - mean
    products = apart.unsqueeze(2) * apart.unsqueeze(1)
    for values, expected in ((apart, torch.zeros(2)), (products, covariance)):
        error = (values.mean(0) - expected).abs() / (values.std(0) / math.sqrt(count))
        assert bool((error < 4).all()), error


def test_unipc_calls_the_network_once_a_step() -> None:
    schedule, seen = make("cosine"), []
    grid = uniform_grid(9, schedule)
    unipc(predictor(schedule, "v", seen), gaussian(*SHAPE, seed=1), grid, torch.randn_like, schedule=schedule)
    assert len(seen) == 9


def test_a_negative_churn_is_refused() -> None:
    with pytest.raises(ValueError, match="churn"):
        run(heun, make("flow"), torch.tensor([1.0, 0.0]), churn=-1.0)


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_coefficients_leave_float32_pictures_in_float32(name: str) -> None:
    schedule = make("cosine")
    plain = predictor(schedule, "v")

    def predict(x: Tensor, t: Tensor) -> Prediction:
        assert x.dtype == torch.float32
        found = plain(x, t)
        return Prediction(found.x0.float(), found.eps.float())

    x = SAMPLERS[name](predict, torch.randn(*SHAPE), uniform_grid(5, schedule), torch.randn_like, schedule=schedule)
    assert x.dtype == torch.float32


def test_every_sampler_draws_on_every_grid(tiny_folder: Path) -> None:
    hints = get_type_hints(SamplingConfig)
    assert (set(get_args(hints["sampler"])), set(get_args(hints["grid"]))) == (set(SAMPLERS), set(GRIDS))
    cascade, seen = load_cascade(tiny_folder), []
    for sampler, grid in itertools.product(SAMPLERS, GRIDS):
        options = cascade.sampling(steps=4, overrides=[f"base.sampler={sampler}", f"base.grid={grid}"])
        seen.append(cascade(["a cat"], [1], options))
        assert bool(seen[-1].isfinite().all())
    same = [(a, b) for a, b in itertools.combinations(range(len(seen)), 2) if torch.equal(seen[a], seen[b])]
    assert len(same) == len(GRIDS), "euler without churn is ddim, and nothing else is like another"
