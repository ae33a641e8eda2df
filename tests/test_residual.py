"""Residual SR stages: what they draw of a large picture, its units, its statistics."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

import ldm.low_res
import pipelines.stage
import training.steps
from ldm.conditioning import Conditioning
from ldm.low_res import DegradationConfig, LowResConfig, degrade, local_contrast
from pipelines.settings import SamplingConfig
from tests.tiny import PIXELS, tiny_task
from training.loader import BatchOrder
from training.steps import diffusion_inputs, planes

FLOORS = pytest.mark.parametrize("floor", ["null", "0.02"])


class TestLocalContrast:
    CONFIG = LowResConfig(scale=4, residual=True, contrast_floor=0.02)

    def test_is_the_deviation_under_a_gaussian_window(self) -> None:
        low_res = torch.rand(2, 3, 9, 12, generator=torch.Generator().manual_seed(0)) * 2 - 1
        found = local_contrast(low_res, self.CONFIG, 4)

        def smooth(values: Any) -> Any:
            return gaussian_filter(values, 1.0, axes=(2, 3), mode="nearest", truncate=3)

        y = low_res.double().numpy()
        wanted = np.sqrt((smooth(y**2) - smooth(y) ** 2).mean(1, keepdims=True) + 0.02**2)
        assert found.shape == (2, 1, 9, 12)
        assert np.allclose(found.numpy(), wanted, atol=1e-5)

    @pytest.mark.parametrize(("factor", "side"), [(2, 32), (4, 16), (8, 8)])
    def test_is_its_floor_where_a_picture_is_flat(self, factor: int, side: int) -> None:
        found = local_contrast(torch.full((1, 3, 16, 16), 0.7), self.CONFIG, factor)
        assert found.shape == (1, 1, side, side)
        assert torch.allclose(found, torch.tensor(0.02), rtol=1e-2)

    def test_is_one_without_a_floor(self) -> None:
        assert torch.equal(local_contrast(torch.rand(1, 3, 4, 4), LowResConfig(scale=4), 8), torch.ones(1, 1, 2, 2))

    def test_a_crop_has_the_units_of_the_whole(self, tiny: list[str]) -> None:
        """A crop of a batch is the crop of what the whole picture gives."""
        task = tiny_task("sr", tiny, *PIXELS, "low_res.contrast_floor=0.02", "upscaling.crop_px=32")
        frozen = task.module.frozen
        stored = task.cache.stored([3])
        small = degrade(stored, 2, DegradationConfig())
        whole = training.steps.raw_latents(stored, small, frozen)
        part = training.steps.raw_latents(stored, small, frozen, crop=training.steps.Crop(16, [(5, 9)]))
        assert torch.equal(part, whole[..., 5:21, 9:25])


@FLOORS
def test_a_residual_is_what_the_enlarged_picture_lacks(tiny: list[str], floor: str) -> None:
    task = tiny_task("sr", tiny, *PIXELS, "upscaling.crop_px=null", f"low_res.contrast_floor={floor}")
    frozen = task.module.frozen
    stored = task.cache.stored([0, 1])
    small = degrade(stored, 2, DegradationConfig())
    raw = training.steps.raw_latents(stored, small, frozen)
    assert frozen.low_res is not None
    units = local_contrast(planes(small), frozen.low_res, 2)
    large = frozen.codec.decode(raw * units) + ldm.low_res.enlarge(planes(small), 2)
    assert torch.allclose(large, planes(stored), atol=1e-6)
    stored = task.cache.stored(range(48))
    small = training.steps.small_pictures(task.cache, range(48), stored, frozen)
    x0 = frozen.normalisation.apply(training.steps.raw_latents(stored, small, frozen))
    assert 0.8 < float(x0.std()) < 1.2


@FLOORS
def test_a_residual_in_latents(tiny: list[str], floor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less the latent of the enlarged picture in training, and with it again when drawn."""
    task = tiny_task("sr", tiny, "low_res.residual=true", "upscaling.crop_px=null",
                     f"low_res.contrast_floor={floor}")  # fmt: skip
    frozen, codec = task.module.frozen, task.module.frozen.codec
    stored = task.cache.stored([0, 1])
    small = training.steps.small_pictures(task.cache, [0, 1], stored, frozen)
    assert small is not None
    with torch.no_grad():
        large = codec.encode(ldm.low_res.enlarge(planes(small), 4)).chunk(2, 1)[0]
    assert frozen.low_res is not None
    units = local_contrast(planes(small), frozen.low_res, 8)
    raw = training.steps.raw_latents(stored, small, frozen)
    assert torch.allclose(raw * units + large, stored.float().chunk(2, 1)[0], atol=1e-5)
    noise = torch.randn(2, 8, 8, 8)
    drawn = training.steps.raw_latents(stored, small, frozen, noise)
    assert torch.allclose((drawn - raw) * units, torch.exp(0.5 * stored.float().chunk(2, 1)[1]) * noise, atol=1e-5)
    # a network that knows the answer draws the picture as the codec decodes it
    stage = task.cascade(task.module).stages[0]
    x0 = frozen.normalisation.apply(raw)

    def knows(x: Tensor, t: Tensor, cond: Conditioning) -> Any:
        alpha, sigma = (c.view(-1, 1, 1, 1).float() for c in stage.denoiser.schedule.alpha_sigma(t))
        return pipelines.stage.Prediction(x0, (x - alpha * x0) / sigma)

    monkeypatch.setattr(stage.denoiser, "predict", knows)
    text = Conditioning(*task._text.encode(["a", "b"]))
    made = stage.sample(text, text[:1], [1, 2], SamplingConfig(steps=2, guidance=1, rows=2), planes(small))
    with torch.no_grad():
        wanted = codec.decode(stored.float().chunk(2, 1)[0])
    assert torch.allclose(made, wanted, atol=1e-3)


def test_statistics_are_kept_beside_the_cache(tiny: list[str]) -> None:
    """Measured once, as training draws: with its degradation, and draws of the posterior."""
    options = (*PIXELS, "upscaling.degradation.noise=1", "upscaling.degradation.noise_std=[40, 40]")
    task = tiny_task("sr", tiny, *options)
    found = task.module.frozen.normalisation
    kept_there = task.cache.folder.glob("statistics-*.json")  # type: ignore[union-attr]
    files = [file for file in kept_there if tuple(json.loads(file.read_text())["std"]) == found.std]
    assert len(files) == 1
    other = {"mean": [0.5] * 12, "std": [2.0] * 12}
    kept = files[0].read_text()
    files[0].write_text(json.dumps(other))
    assert tiny_task("sr", tiny, *options).module.frozen.normalisation.std == (2.0,) * 12
    files[0].write_text(kept)
    plain = tiny_task("sr", tiny, *PIXELS).module.frozen.normalisation
    assert sum(found.std) > 1.1 * sum(plain.std)
    drawn = torch.cat([diffusion_inputs(batch, task.module.denoiser, task.module.frozen).x0
                       for batch, _ in zip(BatchOrder(task.cache, 0, 0, 16, 16), range(6), strict=False)])  # fmt: skip
    assert drawn.std((0, 2, 3)).mean() == pytest.approx(1, abs=0.2)


def test_a_base_learns_draws_of_the_posterior_or_its_means(tiny: list[str]) -> None:
    found = {}
    for posterior in ("draw", "mean"):
        task = tiny_task("base", tiny, f"posterior={posterior}")
        batch = next(iter(BatchOrder(task.cache, 0, 0, 8, 8)))
        frozen = task.module.frozen
        means = frozen.normalisation.apply(batch.stored().float().chunk(2, 1)[0])
        found[posterior] = torch.equal(diffusion_inputs(batch, task.module.denoiser, frozen).x0, means)
    assert found == {"draw": False, "mean": True}
