"""RePaint on correlated Gaussians, whose conditional is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ldm.denoiser import Prediction
from ldm.grids import uniform_grid
from ldm.inpainting import repaint
from ldm.noise import NoiseSchedule, NoiseScheduleConfig
from ldm.sampling import ddpm

SCHEDULE = NoiseSchedule(NoiseScheduleConfig(kind="cosine"))
RHO = 0.9
COVARIANCE = torch.tensor([[1.0, RHO], [RHO, 1.0]], dtype=torch.float64)
COUNT = 4000


def predict(x: Tensor, t: Tensor) -> Prediction:
    """E[x0 | x_t] of x0 ~ N(0, COVARIANCE) over the two cells of a grid."""
    alpha, sigma = (float(c[0]) for c in SCHEDULE.alpha_sigma(t))
    gain = alpha * COVARIANCE @ torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2).double())
    x0 = (x.flatten(1) @ gain.T).view_as(x)
    return Prediction(x0, (x - alpha * x0) / sigma)


def painted(value: float, resamples: int, steps: int = 50) -> Tensor:
    """Draws of the second cell where the first is `value`, (COUNT,)."""
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype)

    known = torch.tensor([value, 777.0], dtype=torch.float64).view(1, 1, 1, 2).expand(COUNT, 1, 1, 2)
    hole = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    grid = uniform_grid(steps, SCHEDULE)
    found = repaint(predict, noise(known), grid, noise, schedule=SCHEDULE, known=known, hole=hole, resamples=resamples)
    assert torch.equal(found[..., 0], known[..., 0])
    return found[:, 0, 0, 1]


def test_resampling_brings_the_hole_to_its_conditional() -> None:
    """N(rho x, 1 - rho^2). One pass falls short of the mean, and more resamples come nearer; the value that the known
    picture has in the hole is never read."""
    errors = [abs(float(painted(1.5, resamples).mean()) - RHO * 1.5) for resamples in (1, 4, 16)]
    assert errors[0] > 2 * errors[1] > 2 * errors[2], errors
    drawn = painted(1.5, 16)
    assert errors[2] < 0.05
    # 50 steps with the posterior's variance make it a little too narrow
    assert float(drawn.std()) == pytest.approx((1 - RHO**2) ** 0.5, rel=0.15)


def test_without_a_known_part_it_is_ancestral_sampling() -> None:
    x = torch.randn(8, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grid, results = uniform_grid(10, SCHEDULE), []
    for around in (True, False):
        generator = torch.Generator().manual_seed(2)
        taken: list[Tensor] = []

        def noise(like: Tensor, generator: torch.Generator = generator, taken: list[Tensor] = taken) -> Tensor:
            taken.append(torch.randn(like.shape, generator=generator, dtype=like.dtype))
            return taken[-1]

        def every_other(like: Tensor, noise: object = noise) -> Tensor:
            """`repaint` draws for the surroundings too."""
            kept = noise(like)  # type: ignore[operator]
            noise(like)  # type: ignore[operator]
            return kept

        if around:
            hole = torch.ones(1, 1, 1, 2)
            results.append(repaint(predict, x, grid, noise, schedule=SCHEDULE, known=x, hole=hole, resamples=1))
        else:
            results.append(ddpm(predict, x, grid, every_other, schedule=SCHEDULE))
    torch.testing.assert_close(*results)


def test_no_resample_is_refused() -> None:
    x, grid = torch.zeros(1, 1, 1, 2), uniform_grid(5, SCHEDULE)
    with pytest.raises(ValueError, match="at least 1"):
        repaint(predict, x, grid, torch.randn_like, schedule=SCHEDULE, known=x, hole=x, resamples=0)
