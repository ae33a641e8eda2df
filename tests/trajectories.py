"""Whole trajectories of samplers, ours and those of diffusers, and a target whose exact denoiser is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ldm.denoiser import Predict, Prediction, Target, from_output
from ldm.noise import NoiseSchedule, NoiseScheduleConfig, per_item

PREDICTION_TYPE: dict[Target, str] = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
TARGETS = list(PREDICTION_TYPE)
SHAPE = (2, 3, 4)
TOLERANCE = 1e-8  # of the largest value in the trajectory; both sides compute in float64


def make(kind: str, steps: int = 100) -> NoiseSchedule:
    return NoiseSchedule(NoiseScheduleConfig(kind=kind, steps=steps))


def gaussian(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def noises(count: int) -> list[Tensor]:
    return [gaussian(*SHAPE, seed=100 + i) for i in range(count)]


def network(x: Tensor, time: Tensor) -> Tensor:
    """A deterministic, nonlinear, time-dependent stand-in for a trained network; rows do not mix."""
    phase = (time.double() / 37).view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(1.3 * x + torch.sin(phase)) - 0.2 * x.roll(1, -1) * torch.cos(phase)


def predictor(schedule: NoiseSchedule, target: Target, seen: list[Tensor] | None = None) -> Predict:
    """`network` read as this target; every x it is shown goes to `seen`."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        if seen is not None:
            seen.append(x)
        alpha, sigma = (per_item(c, x) for c in schedule.alpha_sigma(t))
        out = network(x, schedule.network_time(t).round())
        return Prediction(*from_output(target, out, x, alpha, sigma))

    return predict


def run(
    sampler: Callable[..., Tensor],
    schedule: NoiseSchedule,
    grid: Tensor,
    target: Target = "v",
    shared: Sequence[Tensor] = (),
    **options: float,
) -> list[Tensor]:
    """Every x of our sampler, from the common start to the result, with these noises."""
    seen: list[Tensor] = []
    source = iter(shared)
    predict = predictor(schedule, target, seen)
    start = gaussian(*SHAPE, seed=1)
    final = sampler(predict, start, grid, lambda _: next(source), schedule=schedule, **options)
    return [*seen, final]


def timesteps(grid: Tensor, schedule: NoiseSchedule) -> list[int]:
    return ((grid[:-1] * schedule.steps).round().long() - 1).tolist()


def give_tables(scheduler: object, schedule: NoiseSchedule) -> None:
    """Our float64 table into diffusers' scheduler, so that algorithms are compared and not float32 tables."""
    scheduler.alphas_cumprod = schedule.abar
    scheduler.alphas = torch.cat([schedule.abar[:1], schedule.abar[1:] / schedule.abar[:-1]])
    scheduler.betas = 1 - scheduler.alphas
    scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)


def run_diffusers(step: Callable[[Tensor, int, Tensor], Tensor], times: list[int]) -> list[Tensor]:
    path = [gaussian(*SHAPE, seed=1)]
    for k in times:
        out = network(path[-1], torch.full((SHAPE[0],), float(k)))
        path.append(step(out, k, path[-1]))
    return path


def assert_same_path(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs)
    scale = max(float(x.abs().max()) for x in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE * scale)


def computing_in_float64(monkeypatch: pytest.MonkeyPatch, module: object) -> None:
    """diffusers casts x to float32 in every step of this scheduler; let its `torch.float32` be float64."""
    monkeypatch.setattr(module, "torch", SimpleNamespace(**{**vars(torch), "float32": torch.float64}))


class Mixture:
    """A 2-D Gaussian mixture and its exact denoiser E[x0 | x_t], in closed form."""

    weight = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    mean = torch.tensor([[-1.0, 0.2], [0.8, 0.9], [0.5, -1.1]], dtype=torch.float64)
    covariance = torch.tensor(
        [[[0.10, 0.05], [0.05, 0.20]], [[0.30, -0.10], [-0.10, 0.15]], [[0.05, 0.0], [0.0, 0.08]]],
        dtype=torch.float64,
    )

    def moments(self) -> tuple[Tensor, Tensor]:
        mean = self.weight @ self.mean
        apart = self.mean - mean
        second = self.covariance + apart.unsqueeze(2) * apart.unsqueeze(1)
        return mean, (self.weight.view(-1, 1, 1) * second).sum(0)

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        spread = alpha**2 * self.covariance + sigma**2 * torch.eye(2, dtype=torch.float64)  # (K, 2, 2)
        apart = x.unsqueeze(1) - alpha * self.mean  # (B, K, 2)
        whitened = torch.einsum("kij,bkj->bki", torch.linalg.inv(spread), apart)
        mahalanobis = (whitened * apart).sum(2)
        log_joint = self.weight.log() - 0.5 * (torch.logdet(spread) + mahalanobis)
        given_k = self.mean + torch.einsum("kij,bkj->bki", alpha * self.covariance, whitened)
        return (torch.softmax(log_joint, 1).unsqueeze(2) * given_k).sum(1)
