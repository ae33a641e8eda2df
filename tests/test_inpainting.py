"""RePaint on correlated Gaussians, whose conditional is known; what an inpainting network is told, and one trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ldm.config import UserError, load
from ldm.denoiser import Prediction
from ldm.grids import uniform_grid
from ldm.inpainting import condition_known, repaint
from ldm.latents import CodecConfig, LatentCodec, Normalisation
from ldm.noise import NoiseSchedule, NoiseScheduleConfig
from ldm.sampling import ddpm
from pipelines.cascade import load_cascade
from pipelines.edit import edit
from tests.tiny import CODEC, EMOJI, ROOT, tiny_task
from training.loader import Batch
from training.run import train
from training.steps import diffusion_inputs, random_holes
from training.tasks import RunConfig

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


def test_the_surroundings_have_the_noise_of_their_time() -> None:
    """q(x_s | x0) around the hole, which noise of a known size shows."""
    known = torch.tensor([0.7, 5.0], dtype=torch.float64).view(1, 1, 1, 2)
    hole = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    seen: list[tuple[float, float]] = []

    def watched(x: Tensor, t: Tensor) -> Prediction:
        seen.append((float(t[0]), float(x[0, 0, 0, 0])))
        return predict(x, t)

    grid = uniform_grid(5, SCHEDULE)
    repaint(watched, known, grid, torch.ones_like, schedule=SCHEDULE, known=known, hole=hole, resamples=1)
    for time, value in seen[1:]:
        alpha, sigma = (float(c) for c in SCHEDULE.alpha_sigma(torch.tensor(time, dtype=torch.float64)))
        assert value == pytest.approx(alpha * 0.7 + sigma, abs=1e-6)
    assert [time for time, _ in seen] == grid[:-1].tolist()


def test_no_resample_is_refused() -> None:
    x, grid = torch.zeros(1, 1, 1, 2), uniform_grid(5, SCHEDULE)
    with pytest.raises(ValueError, match="at least 1"):
        repaint(predict, x, grid, torch.randn_like, schedule=SCHEDULE, known=x, hole=x, resamples=0)


UNIT = Normalisation((0.0,) * 4, (1.0,) * 4)


def overrides(tmp: Path) -> list[str]:
    """On the latents of an untrained codec."""
    from ldm.weights import save_codec

    torch.manual_seed(0)
    save_codec(LatentCodec(CODEC), tmp / "codec")
    return [f"codec={tmp}/codec", f"data.path={EMOJI}", f"cache={tmp}/cache"]


@torch.no_grad()
def test_nothing_of_a_hole_reaches_what_the_network_is_told() -> None:
    torch.manual_seed(0)
    codec, pictures = LatentCodec(CODEC), torch.rand(2, 3, 32, 32) * 2 - 1
    hole = torch.zeros(2, 1, 32, 32)
    hole[:, :, 9:20, 5:] = 1
    told = condition_known(pictures, hole, codec, UNIT)
    assert told.shape == (2, 5, 4, 4)
    other = torch.where(hole > 0, torch.rand(2, 3, 32, 32), pictures)
    assert torch.equal(condition_known(other, hole, codec, UNIT), told)
    assert told[0, 4].tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert (told[:, :4] * told[:, 4:]).abs().max() == 0
    pixels = LatentCodec(CodecConfig(unshuffle=8, autoencoder=None))
    plain = condition_known(pictures, hole, pixels, Normalisation((0.0,) * 192, (1.0,) * 192))
    torch.testing.assert_close(plain[:, :192, 0], pixels.encode(pictures)[:, :192, 0])


def test_training_draws_holes_and_tells_of_them(tmp_path: Path) -> None:
    task = tiny_task("inpainting", overrides(tmp_path))
    count = min(64, len(task.cache))
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    batch = Batch(task.cache, list(range(count)), generators, list(range(count)), count)
    holes = random_holes(batch, 64)
    shares = holes.mean((1, 2, 3))
    assert 0.05 < float((shares == 1).float().mean()) < 0.4
    partial = shares[shares < 1]
    assert float(partial.min()) > 0.03
    assert float(partial.max()) < 0.65
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    inputs = diffusion_inputs(Batch(task.cache, list(range(count)), generators, list(range(count)), count),
                              task.module.denoiser, task.module.frozen)  # fmt: skip
    assert inputs.cond.known is not None
    assert inputs.cond.known.shape == (count, 5, 8, 8)
    assert set(inputs.cond.known[:, 4].unique().tolist()) == {0.0, 1.0}


def test_a_trained_one_fills_a_hole_by_any_sampler(tmp_path: Path) -> None:
    """What is known is told and not held: RePaint has no part in it, so resamples change nothing."""
    more = ["loop.images=64", "loop.save_every_images=64", "loop.preview_every_images=64", "loop.log_every_images=64"]
    final = train(ROOT / "configs/tiny/inpainting.yaml", tmp_path / "run", [*overrides(tmp_path), *more])
    assert load_cascade(final).stages[0].config.inpainting
    picture, mask = sorted(EMOJI.rglob("*.png"))[5], np.zeros((256, 256), dtype=np.uint8)
    mask[:, 128:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    found = []
    for name, resamples, sampler in (("a", 1, "dpmpp_2m"), ("b", 9, "dpmpp_2m"), ("c", 1, "heun")):
        edit(picture, "a cat", tmp_path / "mask.png", final, resamples=resamples, n=1, out=tmp_path / name,
             overrides=[f"base.sampler={sampler}"])  # fmt: skip
        with Image.open(tmp_path / name / "0000.png") as made:
            found.append(np.array(made.convert("RGB")))
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])
    with Image.open(picture) as source:
        known = np.array(source.convert("RGB").reduce(4))[:, :32]
    assert np.array_equal(found[0][:, :32], known)


def test_a_stage_that_enlarges_cannot_be_one() -> None:
    with pytest.raises(UserError, match="inpainting is of a base"):
        load(RunConfig, ROOT / "configs/tiny/sr.yaml", ["inpainting=true"])
