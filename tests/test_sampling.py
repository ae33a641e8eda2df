"""Samplers against diffusers, step by step, and on targets whose exact denoiser and solution are known."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.schedulers import (
    scheduling_ddpm,
    scheduling_dpmsolver_multistep,
    scheduling_flow_match_euler_discrete,
)
from torch import Tensor

from ldm.denoiser import Prediction, Target
from ldm.grids import uniform_grid
from ldm.noise import per_item, posterior
from ldm.sampling import SAMPLERS, ddim, ddpm, dpmpp_2m
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
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("steps", [100, 30, 1])
def test_ddpm_is_that_of_diffusers(
    monkeypatch: pytest.MonkeyPatch, kind: str, target: Target, variance: str, steps: int
) -> None:
    """Full grid, a respaced one that does not divide T, and a single step; every x is compared.

    One difference: the last step of a respaced grid goes from k > 0 to clean data, and diffusers, which asks
    for k > 0 only, adds the noise of "fixed_large" to the finished sample. Ours returns x0, so the noise
    shared for that step is zero. Left out: its "fixed_large_log", which takes the root of a logarithm below 0.
    """
    schedule = make(kind)
    grid = uniform_grid(steps, schedule)
    scheduler = DDPMScheduler(
        num_train_timesteps=100,
        variance_type=variance,
        prediction_type=PREDICTION_TYPE[target],
        clip_sample=False,
    )
    give_tables(scheduler, schedule)
    scheduler.set_timesteps(timesteps=timesteps(grid, schedule))
    shared = [*noises(steps - 1), torch.zeros(SHAPE).double()]
    for_diffusers = iter(shared)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(for_diffusers))
    theirs = run_diffusers(lambda out, k, x: scheduler.step(out, k, x).prev_sample, timesteps(grid, schedule))
    mix = float(variance == "fixed_large")
    assert_same_path(run(ddpm, schedule, grid, target, shared, variance=mix), theirs)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["learned_range", "learned"])
@pytest.mark.parametrize("steps", [100, 30])
def test_ddpm_with_a_learned_variance_is_that_of_diffusers(
    monkeypatch: pytest.MonkeyPatch, kind: str, variance: str, steps: int
) -> None:
    """A network with channels for the variance: of a mix, and of the variance itself, which is the mix that gives it.
    The noise of the last step is zero, as above."""
    schedule = make(kind)
    grid = uniform_grid(steps, schedule)
    times = timesteps(grid, schedule)
    scheduler = DDPMScheduler(num_train_timesteps=100, variance_type=variance, clip_sample=False)
    give_tables(scheduler, schedule)
    scheduler.set_timesteps(timesteps=times)
    shared = [*noises(steps - 1), torch.zeros(SHAPE).double()]
    for_diffusers, for_ours = iter(shared), iter(shared)
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: next(for_diffusers))

    def step(out: Tensor, k: int, x: Tensor) -> Tensor:
        said = torch.sin(3 * x)
        said = said if variance == "learned_range" else 0.01 * (2 + said)
        return scheduler.step(torch.cat([out, said], 1), k, x).prev_sample

    seen: list[Tensor] = []
    plain, after = predictor(schedule, "eps", seen), dict(itertools.pairwise(grid.tolist()))

    def predict(x: Tensor, t: Tensor) -> Prediction:
        mix = (torch.sin(3 * x) + 1) / 2
        if variance == "learned":
            s = t.new_full((len(t),), after[float(t[0])])
            small, large = (posterior(schedule, x, x, t, s, m)[1] for m in (0.0, 1.0))
            mix = ((0.01 * (2 + torch.sin(3 * x))).log() - small) / (large - small)
        return plain(x, t)._replace(var_mix=mix)

    final = ddpm(predict, gaussian(*SHAPE, seed=1), grid, lambda _: next(for_ours), schedule=schedule)
    assert_same_path([*seen, final], run_diffusers(step, times))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("steps", [100, 20])
def test_ddim_is_that_of_diffusers(kind: str, target: Target, eta: float, steps: int) -> None:
    """diffusers' DDIM takes the previous time to be T // steps below, whatever its list of times says: only
    grids whose number of steps divides T can be compared."""
    schedule = make(kind)
    grid = uniform_grid(steps, schedule)
    scheduler = DDIMScheduler(
        num_train_timesteps=100,
        prediction_type=PREDICTION_TYPE[target],
        clip_sample=False,
        timestep_spacing="trailing",
    )
    give_tables(scheduler, schedule)
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == timesteps(grid, schedule)
    shared = noises(steps)
    for_diffusers = iter(shared)
    theirs = run_diffusers(
        lambda out, k, x: scheduler.step(out, k, x, eta=eta, variance_noise=next(for_diffusers)).prev_sample,
        timesteps(grid, schedule),
    )
    assert_same_path(run(ddim, schedule, grid, target, shared, eta=eta), theirs)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [100, 30])
def test_ddim_with_eta_one_is_ddpm(kind: str, steps: int) -> None:
    """Song et al. 2021, sec. 4.1: the same ancestral step, on respaced grids of any spacing too."""
    schedule, shared = make(kind), noises(steps)
    grid = uniform_grid(steps, schedule)
    assert_same_path(
        run(ddim, schedule, grid, shared=shared, eta=1.0), run(ddpm, schedule, grid, shared=shared)
    )


@pytest.mark.parametrize("kind", ["linear", "cosine"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("steps", [1, 2, 10, 30])
@pytest.mark.parametrize("lower_order_final", [True, False])
def test_dpmpp_2m_is_that_of_diffusers(
    monkeypatch: pytest.MonkeyPatch, kind: str, target: Target, steps: int, lower_order_final: bool
) -> None:
    """Order 2, midpoint, final sigma 0. With that final sigma diffusers' last step is of first order whatever
    `lower_order_final` says, and so is ours: no difference remains."""
    computing_in_float64(monkeypatch, scheduling_dpmsolver_multistep)
    schedule = make(kind)
    grid = uniform_grid(steps, schedule)
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=100,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        prediction_type=PREDICTION_TYPE[target],
        final_sigmas_type="zero",
        lower_order_final=lower_order_final,
    )
    give_tables(scheduler, schedule)
    times = timesteps(grid, schedule)
    scheduler.set_timesteps(timesteps=times)
    abar = schedule.abar[times]
    scheduler.sigmas = torch.cat([torch.sqrt((1 - abar) / abar), torch.zeros(1, dtype=torch.float64)])
    theirs = run_diffusers(lambda out, k, x: scheduler.step(out, k, x).prev_sample, times)
    assert_same_path(run(dpmpp_2m, schedule, grid, target), theirs)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m"])
@pytest.mark.parametrize("steps", [1, 2, 3, 25])
def test_flow_is_that_of_diffusers(monkeypatch: pytest.MonkeyPatch, name: str, steps: int) -> None:
    """From t = 1, where alpha is 0 and log(alpha / sigma) infinite. DDIM on a flow is its Euler step."""
    schedule = make("flow")
    grid = uniform_grid(steps, schedule)
    if name == "ddim":
        computing_in_float64(monkeypatch, scheduling_flow_match_euler_discrete)
        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=100)
    else:
        computing_in_float64(monkeypatch, scheduling_dpmsolver_multistep)
        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=100, prediction_type="flow_prediction", use_flow_sigmas=True
        )
    scheduler.set_timesteps(steps)
    scheduler.sigmas = grid
    scheduler.set_begin_index(0)
    path = [gaussian(*SHAPE, seed=1)]
    for t, k in zip(grid[:-1], scheduler.timesteps, strict=True):
        out = network(path[-1], (t * 100).round().expand(2))
        path.append(scheduler.step(out, k, path[-1]).prev_sample)
    assert_same_path(run(SAMPLERS[name], schedule, grid, "flow"), path)


@pytest.mark.parametrize("kind", ["linear", "cosine", "flow"])
@pytest.mark.parametrize(
    ("name", "options", "steps"),
    [
        ("ddpm", {"variance": 0.0}, 500),
        ("ddpm", {"variance": 1.0}, 500),
        ("ddim", {"eta": 0.0}, 250),
        ("ddim", {"eta": 1.0}, 500),
        ("dpmpp_2m", {}, 100),
    ],
)
def test_mean_and_covariance_of_a_mixture(
    kind: str, name: str, options: dict[str, float], steps: int
) -> None:
    """Within 4 standard errors from 2000 samples started at N(0, I), in float32 as in use."""
    count, target, schedule = 2000, Mixture(), make(kind, 1000)
    generator = torch.Generator().manual_seed(7)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (c[0] for c in schedule.alpha_sigma(t))
        x0 = target.x0(x.double(), alpha, sigma)
        return Prediction(x0.float(), ((x - alpha * x0) / sigma).float())

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    grid = uniform_grid(steps, schedule)
    start = torch.randn(count, 2, generator=generator)
    x = SAMPLERS[name](predict, start, grid, noise, schedule=schedule, **options)
    assert x.dtype == torch.float32
    mean, covariance = target.moments()
    apart = x.double() - mean
    products = apart.unsqueeze(2) * apart.unsqueeze(1)
    for values, expected in ((apart, torch.zeros(2)), (products, covariance)):
        error = (values.mean(0) - expected).abs() / (values.std(0) / math.sqrt(count))
        assert (error < 4).all(), error


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpmpp_2m", 2)])
def test_order_of_convergence_on_a_gaussian(name: str, order: int) -> None:
    """For N(m, s^2) the probability-flow ODE has a closed form: (x - alpha m) / sqrt(alpha^2 s^2 + sigma^2)
    is constant. Doubling the steps must divide the error by 2^order, away from the first-order end at 0."""
    m, s, schedule = 0.7, 0.4, make("flow")

    def spread(t: float) -> float:
        return math.sqrt((1 - t) ** 2 * s**2 + t**2)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = (per_item(c, x) for c in schedule.alpha_sigma(t))
        apart = (x - alpha * m) / (alpha**2 * s**2 + sigma**2)
        return Prediction(m + alpha * s**2 * apart, sigma * apart)

    start = gaussian(50, 1, seed=3)
    exact = 0.9 * m + spread(0.1) * (start - 0.1 * m) / spread(0.9)
    errors = []
    for steps in (40, 80, 160):
        grid = torch.linspace(0.9, 0.1, steps + 1, dtype=torch.float64)
        x = SAMPLERS[name](predict, start, grid, torch.randn_like, schedule=schedule)
        errors.append(float((x - exact).abs().max()))
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def seeded_noise(seeds: list[int]) -> Callable[[Tensor], Tensor]:
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return lambda like: torch.stack([torch.randn(like.shape[1:], generator=g).double() for g in generators])


@pytest.mark.parametrize("kind", ["linear", "cosine", "flow"])
@pytest.mark.parametrize(
    ("name", "options"), [("ddpm", {}), ("ddim", {}), ("ddim", {"eta": 1.0}), ("dpmpp_2m", {})]
)
def test_rows_do_not_see_each_other(kind: str, name: str, options: dict[str, float]) -> None:
    """A row is bit-equal whatever the other rows of its batch hold, and the same on its own."""
    schedule = make(kind)
    grid, predict, shared = uniform_grid(20, schedule), predictor(schedule, "v"), gaussian(1, 3, 4, seed=1)

    def sample(others: list[int]) -> Tensor:
        start = torch.cat([*(gaussian(1, 3, 4, seed=i) for i in others), shared])
        noise = seeded_noise([*others, 1])
        return SAMPLERS[name](predict, start, grid, noise, schedule=schedule, **options)[-1]

    row = sample([2, 3, 4])
    assert torch.equal(row, sample([5, 6, 7]))
    torch.testing.assert_close(sample([]), row, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("kind", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("steps", [1, 4])
def test_the_result_is_the_last_x0(name: str, kind: str, steps: int) -> None:
    schedule, last, progress = make(kind), [], []

    def predict(x: Tensor, t: Tensor) -> Prediction:
        last.append(predictor(schedule, "v")(x, t))
        return last[-1]

    def record(done: int, of: int) -> None:
        progress.append((done, of))

    start, grid = gaussian(*SHAPE, seed=1), uniform_grid(steps, schedule)
    x = SAMPLERS[name](predict, start, grid, torch.randn_like, schedule=schedule, on_step=record)
    assert torch.equal(x, last[-1].x0)
    assert progress == [(i + 1, steps) for i in range(steps)]


def test_ddpm_uses_a_learned_variance() -> None:
    """A network's var_mix of 0 or 1 everywhere is that fixed variance, whatever `variance` says."""
    schedule, results = make("cosine"), {}
    plain = predictor(schedule, "v")
    for learned, variance in ((0.0, 0.7), (None, 0.0), (1.0, 0.7), (None, 1.0)):

        def predict(x: Tensor, t: Tensor, mix: float | None = learned) -> Prediction:
            return plain(x, t)._replace(var_mix=None if mix is None else torch.full_like(x, mix))

        shared = iter(noises(20))
        start, grid, noise = gaussian(*SHAPE, seed=1), uniform_grid(20, schedule), lambda _, n=shared: next(n)
        results[learned, variance] = ddpm(predict, start, grid, noise, schedule=schedule, variance=variance)
    torch.testing.assert_close(results[0.0, 0.7], results[None, 0.0], rtol=0, atol=1e-12)
    torch.testing.assert_close(results[1.0, 0.7], results[None, 1.0], rtol=0, atol=1e-12)
    assert not torch.allclose(results[None, 0.0], results[None, 1.0], atol=1e-3)


@pytest.mark.parametrize("name", list(SAMPLERS))
@pytest.mark.parametrize("grid", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5, 0.0]])
def test_impossible_grids_are_refused(name: str, grid: list[float]) -> None:
    with pytest.raises(ValueError, match="decreasing"):
        run(SAMPLERS[name], make("flow"), torch.tensor(grid))


@pytest.mark.parametrize("eta", [-0.1, 1.5])
def test_impossible_eta_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match="eta"):
        run(ddim, make("flow"), torch.tensor([1.0, 0.0]), eta=eta)
