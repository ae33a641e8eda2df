"""Low-resolution conditioning: one function for training and inference, checked against libraries of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from torch import Tensor
from torch.nn.functional import pixel_unshuffle

import ldm.low_res
import pipelines.stage
import training.steps
from ldm.conditioning import Conditioning
from ldm.low_res import DegradationConfig, LowResConfig, condition_low_res, degrade
from pipelines.settings import SamplingConfig
from tests.tiny import EMOJI, PIXELS, tiny_task
from training.data import DataConfig, Reader
from training.diffusion import DiffusionTask
from training.loader import BatchOrder
from training.steps import condition_pictures, diffusion_inputs, planes

CONFIG = LowResConfig(scale=4)


@pytest.fixture(scope="module")
def large() -> Tensor:
    """Real pictures, (4, 64, 64, 3) uint8."""
    examples = list(Reader(DataConfig(path=str(EMOJI), split="train", size_px=64)))[:4]
    return torch.from_numpy(np.stack([e.pixels for e in examples]))


@pytest.fixture(scope="module")
def task(tiny: list[str]) -> DiffusionTask:
    """The tiny SR stage, untrained: in latents, on crops."""
    return tiny_task("sr", tiny)


class TestConditionLowRes:
    @pytest.mark.parametrize(
        ("scale", "factor", "channels", "side"),
        [(4, 8, 12, 8), (4, 4, 3, 16), (2, 8, 48, 4), (4, 1, 3, 64), (3, 8, 192, 6)],
    )
    def test_no_pixel_is_lost_on_any_grid(self, scale: int, factor: int, channels: int, side: int) -> None:
        config = LowResConfig(scale=scale)
        y = torch.nn.functional.interpolate(torch.rand(2, 3, 4, 4) * 2 - 1, size=(16, 16), mode="bilinear")
        found = condition_low_res(y, torch.zeros(2), torch.zeros(2, channels, side, side), config, factor)
        assert found.shape == (2, config.channels(factor), side, side) == (2, channels, side, side)
        if factor >= scale and factor % scale == 0:
            assert torch.equal(found, pixel_unshuffle(y, factor // scale))
        else:  # the grid is finer: shrinking it gives the smooth picture again
            large = torch.nn.functional.pixel_shuffle(found, 8) if factor == 8 else found
            back = torch.nn.functional.avg_pool2d(large, large.shape[-1] // 16)
            assert (back - y).abs().mean() < 0.03 * (y - y.mean()).abs().mean()

    def test_noise_of_a_level_is_that_of_the_schedule(self) -> None:
        scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
        y, eps = torch.rand(3, 3, 8, 8) * 2 - 1, torch.randn(3, 12, 4, 4)
        k = torch.tensor([0, 299, 999])
        found = condition_low_res(y, (k + 1) / 1000, eps, CONFIG, 8)
        wanted = scheduler.add_noise(pixel_unshuffle(y, 2), eps, k)
        assert torch.allclose(found, wanted, atol=1e-5)

    def test_the_null_is_what_any_picture_is_at_the_highest_level(self) -> None:
        eps, top = torch.randn(1, 12, 4, 4), torch.ones(1)
        null = condition_low_res(torch.zeros(1, 3, 8, 8), top, eps, CONFIG, 8)
        picture = condition_low_res(torch.ones(1, 3, 8, 8), top, eps, CONFIG, 8)
        assert torch.allclose(null, picture, atol=1e-2)

    def test_a_picture_without_a_grid_is_refused(self) -> None:
        with pytest.raises(ValueError, match="has no grid of 8 px"):
            condition_low_res(torch.zeros(1, 3, 7, 8), torch.zeros(1), torch.zeros(1, 12, 4, 4), CONFIG, 8)

    @pytest.mark.parametrize(
        ("wrong", "reason"),
        [({"scale": 1}, "must be from"), ({"scale": 17}, "must be from"), ({"max_level": 1.0}, "must be from"),
         ({"contrast_floor": 0.02}, "is of residual stages"), ({"residual": True, "contrast_floor": 0.0}, "above 0")],
    )  # fmt: skip
    def test_values_out_of_range_are_refused(self, wrong: dict[str, Any], reason: str) -> None:
        with pytest.raises(ValueError, match=reason):
            LowResConfig(**{"scale": 4, **wrong})


class TestDegrade:
    def test_area_is_the_mean_as_pillow_takes_it_and_as_the_other_stages_see_it(self, large: Tensor) -> None:
        found = degrade(large, 4, DegradationConfig()).numpy().astype(int)
        wanted = [np.array(Image.fromarray(p).reduce(4)) for p in large.numpy()]
        assert np.abs(found - np.stack(wanted)).max() <= 1

    @pytest.mark.parametrize(("kernel", "pillow"), [("bicubic", Image.Resampling.BICUBIC), ("nearest", None)])
    def test_kernels(self, large: Tensor, kernel: Any, pillow: Any) -> None:
        found = degrade(large, 4, DegradationConfig(kernels=(kernel,))).numpy().astype(int)
        if pillow is None:
            assert np.array_equal(found, large[:, 2::4, 2::4].numpy())
        else:
            wanted = [np.array(Image.fromarray(p).resize((16, 16), pillow)) for p in large.numpy()]
            assert np.abs(found - np.stack(wanted)).mean() < 1

    def test_each_part_of_the_mix_does_what_it_says(self, large: Tensor) -> None:
        plain = degrade(large, 4, DegradationConfig()).float()

        def made(**parts: Any) -> Tensor:
            generators = [torch.Generator().manual_seed(k) for k in range(4)]
            return degrade(large, 4, DegradationConfig(**parts), generators).float()

        def roughness(x: Tensor) -> float:
            return float((x[:, :, 1:] - x[:, :, :-1]).abs().mean())

        assert roughness(made(blur=1.0, blur_px=(1.0, 1.0))) < 0.8 * roughness(plain)
        grey = torch.full((4, 256, 256, 3), 128, dtype=torch.uint8)
        noisy = degrade(grey, 4, DegradationConfig(noise=1.0, noise_std=(10.0, 10.0)),
                        [torch.Generator().manual_seed(k) for k in range(4)]).float()  # fmt: skip
        assert 9.5 < float(noisy.std()) < 10.5
        grains = degrade(grey, 4, DegradationConfig(noise=1.0, noise_std=(10.0, 10.0), noise_px=(3.0, 3.0)),
                         [torch.Generator().manual_seed(k) for k in range(4)]).float()  # fmt: skip
        assert 9.5 < float(grains.std()) < 10.5
        assert roughness(grains) < 0.3 * roughness(noisy)
        loss = {q: float((made(jpeg=1.0, jpeg_quality=(q, q)) - plain).abs().mean()) for q in (10, 100)}
        assert loss[10] > 1.5 * loss[100] > 0

    def test_colours_move_as_colours(self) -> None:
        """What is flat stays flat, near colours move alike, and far ones each by the deviation asked for."""
        generator = torch.Generator().manual_seed(0)
        colours = torch.randint(60, 195, (16, 4, 4, 3), generator=generator)
        near = colours + torch.tensor([1, -1, 1])
        flat = torch.cat([colours, near], 1).to(torch.uint8).repeat_interleave(4, 1).repeat_interleave(4, 2)
        mix = DegradationConfig(colour=1.0, colour_std=(8.0, 8.0))
        assert mix.random
        moved = degrade(flat, 1, mix, [torch.Generator().manual_seed(k) for k in range(16)])
        assert torch.equal(moved, moved[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2))
        away = (moved.float() - flat.float())[:, ::4, ::4]
        assert 7.0 < float((away**2).mean().sqrt()) < 9.0
        assert float((away[:, :4] - away[:, 4:]).abs().max()) <= 3  # of colours two apart, in whole numbers
        rarely = DegradationConfig(colour=1e-9)
        assert torch.equal(degrade(flat, 1, rarely, [torch.Generator().manual_seed(k) for k in range(16)]), flat)

    def test_a_picture_depends_on_its_own_generator_only(self, large: Tensor) -> None:
        mix = DegradationConfig(("area", "bicubic", "nearest"), blur=0.5, noise=0.5, jpeg=0.5)
        together = degrade(large, 4, mix, [torch.Generator().manual_seed(k) for k in range(4)])
        alone = [degrade(large[k : k + 1], 4, mix, [torch.Generator().manual_seed(k)]) for k in range(4)]
        assert torch.equal(together, torch.cat(alone))
        others = degrade(large, 4, mix, [torch.Generator().manual_seed(k + 9) for k in range(4)])
        assert not torch.equal(together, others)

    def test_grains_of_no_size_are_refused(self) -> None:
        for bounds in ((-1.0, 2.0), (2.0, 1.0)):
            with pytest.raises(ValueError, match="noise_px must be a range from 0 upwards"):
                DegradationConfig(noise_px=bounds)

    def test_sides_that_do_not_divide_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no multiples of 4"):
            degrade(torch.zeros(1, 10, 8, 3, dtype=torch.uint8), 4, DegradationConfig())


class TestOneFunction:
    """Training and inference show the network the same: what would break it makes these fail."""

    def test_there_is_one(self) -> None:
        assert training.steps.condition_low_res is pipelines.stage.condition_low_res is ldm.low_res.condition_low_res

    @pytest.mark.parametrize("options", [(), PIXELS], ids=["latents", "pixels"])
    def test_training_and_inference_get_equal_bits(self, tiny: list[str], options: tuple[str, ...]) -> None:
        task = tiny_task("sr", tiny, *options)
        stage = task.cascade(task.module).stages[0]
        config, factor = stage.config.low_res, stage.codec.module.config.factor
        assert config is not None
        small = training.steps.small_pictures(task.cache, [0, 1], task.cache.stored([0, 1]), task.module.frozen)
        assert small is not None
        side = small.shape[1] * config.scale // factor
        text = Conditioning(*task._text.encode(["a cat", "a dog"]))
        for guided, level in (("text", 0.0), ("text", 0.4), ("low_res", 0.1)):
            sampling = SamplingConfig(level=level, guided=guided)  # type: ignore[arg-type]
            told, against = stage._bind(text, text[:1], stage._draws([5, 6]), sampling, (side, side), planes(small))
            eps = stage._draws([5, 6]).normal("low_res", (config.channels(factor), side, side))
            levels = torch.full((2,), level, dtype=torch.float64)
            assert torch.equal(told.low_res, condition_pictures(small, levels, eps, task.module.frozen))
            assert torch.equal(told.level, levels)
            nothing = torch.ones(2, dtype=torch.float64)
            wanted = nothing if guided == "low_res" else levels
            assert torch.equal(against.low_res, condition_pictures(small, wanted, eps, task.module.frozen))
            assert torch.equal(against.level, wanted)

    @pytest.mark.parametrize("options", [(), PIXELS], ids=["latents", "pixels"])
    def test_the_network_is_told_the_level_of_the_noise_it_gets(
        self, tiny: list[str], options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = tiny_task("sr", tiny, *options, "upscaling.dropout=0.3")
        made: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []

        def spied(low_res: Tensor, level: Tensor, eps: Tensor, *rest: Any) -> Tensor:
            found = condition_low_res(low_res, level, eps, *rest)
            made.append((low_res, level, eps, found))
            return found

        seen: list[tuple[Tensor, Tensor]] = []
        net = task.module.denoiser.net
        forward = net.forward

        def told(x: Tensor, *args: Any, class_labels: Tensor, **kwargs: Any) -> Any:
            seen.append((x, class_labels))
            return forward(x, *args, class_labels=class_labels, **kwargs)

        monkeypatch.setattr(training.steps, "condition_low_res", spied)
        monkeypatch.setattr(pipelines.stage, "condition_low_res", spied)
        monkeypatch.setattr(net, "forward", told)
        batch = BatchOrder(task.cache, 0, 0, 64, 64)[0]
        task.module(task.module.prepare(batch))
        (low_res, level, eps, found), (x, labels) = made[0], seen[0]
        channels = found.shape[1]
        assert torch.allclose(labels.double(), 1000 * level, rtol=1e-6)
        assert x[:, :-channels].shape[1] == task.module.frozen.codec.config.latent_channels
        alpha = torch.cos((level + 0.008) / 1.008 * torch.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)
        alpha, sigma = (x.view(-1, 1, 1, 1) for x in (alpha.clamp(min=1e-3), torch.sqrt(1 - alpha**2)))
        clean = (found - sigma * eps) / alpha
        kept = level < 1
        grid = pixel_unshuffle(low_res, int((channels // 3) ** 0.5))
        assert torch.allclose(clean[kept].float(), grid[kept], atol=2e-2)
        # inference: the noise of the level that was asked for, and that level told
        stage = task.cascade(task.module).stages[0]
        assert stage.config.input_px is not None
        small = torch.zeros(2, 3, stage.config.input_px, stage.config.input_px)
        text = Conditioning(*task._text.encode(["a", "b"]))
        stage.sample(text, text[:1], [1, 2], SamplingConfig(level=0.3, steps=1, guidance=1, rows=2), small)
        (_, level, eps, found), (x, labels) = made[-2], seen[-1]
        assert torch.equal(x[:, -channels:], found)
        assert labels.tolist() == pytest.approx([300, 300])
        assert float(found.std() / eps.std()) == pytest.approx(np.sin(0.3 * np.pi / 2), rel=0.03)

    def test_levels_are_drawn_apart_from_t_up_to_the_highest(self, task: DiffusionTask) -> None:
        frozen = replace(task.module.frozen, upscaling=replace(task.module.frozen.upscaling, dropout=0.25))
        drawn = [diffusion_inputs(batch, task.module.denoiser, frozen)
                 for batch, _ in zip(BatchOrder(task.cache, 0, 0, 16, 16), range(40), strict=False)]  # fmt: skip
        level = torch.cat([d.cond.level for d in drawn if d.cond.level is not None])
        t = torch.cat([d.t for d in drawn])
        kept = level < 1
        assert 0.18 < float((~kept).double().mean()) < 0.32
        assert float(level[kept].max()) < CONFIG.max_level < float(level[kept].max()) + 0.02
        assert float(level[kept].min()) < 0.02
        assert abs(float(torch.corrcoef(torch.stack([level[kept], t[kept]]))[0, 1])) < 0.12
        text = torch.cat([(d.cond.text == frozen.null.text).flatten(1).all(1) for d in drawn])
        assert 0.05 < float(text.double().mean()) < 0.16
        both = float((text & ~kept).double().mean())
        assert both == pytest.approx(float(text.double().mean() * (~kept).double().mean()), abs=0.03)

    def test_the_small_picture_is_the_area_downsample_of_the_large(self, tiny: list[str], task: DiffusionTask) -> None:
        """Cached beside latents, and made of cached pixels."""
        reader = Reader(DataConfig(path=str(EMOJI), split="train", size_px=64))
        pictures = np.stack([e.pixels for e in list(reader)[:3]])
        means = pictures.reshape(3, 16, 4, 16, 4, 3).astype(float).mean((2, 4))
        found = task.cache.low_res([0, 1, 2]).numpy()
        assert np.abs(found - means).max() <= 0.5
        from_pixels = tiny_task("sr", tiny, *PIXELS)
        stored = from_pixels.cache.stored([0, 1, 2])
        made = training.steps.small_pictures(from_pixels.cache, [0, 1, 2], stored, from_pixels.module.frozen)
        means = pictures.reshape(3, 32, 2, 32, 2, 3).astype(float).mean((2, 4))
        assert np.abs(made.numpy() - means).max() <= 0.5  # type: ignore[union-attr]


class TestCrops:
    def test_small_and_large_are_cropped_at_one_place(self, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        """On pixels without noise, the crop of the small picture is the downsample of the crop of the large one."""
        task = tiny_task("sr", tiny, "codec=null", "unshuffle=4", "low_res.max_level=0", "upscaling.dropout=0",
                  "upscaling.crop_px=32")  # fmt: skip
        batch = BatchOrder(task.cache, 0, 0, 16, 16)[0]
        drawn = diffusion_inputs(batch, task.module.denoiser, task.module.frozen)
        assert drawn.x0.shape == (16, 48, 8, 8)
        assert drawn.cond.low_res is not None
        small = drawn.cond.low_res[:, :3]
        means = drawn.x0.view(16, 3, 16, 8, 8).mean(2)
        assert (means - small).abs().max() < 1.5 / 127.5
        whole = training.steps.small_pictures(task.cache, batch.indices, batch.stored(), task.module.frozen)
        assert whole is not None
        assert not torch.allclose(small, planes(whole)[:, :, :8, :8])


@pytest.mark.parametrize("random", [False, True])
def test_what_is_cached_follows_the_degradation(tiny: list[str], random: bool) -> None:
    task = tiny_task("sr", tiny, *(["upscaling.degradation.noise=0.5"] if random else []))
    assert (task.cache.key.codec is None) == random
    assert (task.cache.key.scale is None) == random
    drawn = [diffusion_inputs(BatchOrder(task.cache, 0, at, 8, 8)[0], task.module.denoiser, task.module.frozen)
             for at in (0, 0, 8)]  # fmt: skip
    assert torch.equal(drawn[0].x0, drawn[1].x0)
    assert torch.equal(drawn[0].cond.low_res, drawn[1].cond.low_res)  # type: ignore[arg-type]
    assert not torch.equal(drawn[0].x0, drawn[2].x0)
    assert drawn[0].x0.shape == (8, 8, 4, 4)


def test_online_gives_the_same_inputs(tiny: list[str], task: DiffusionTask) -> None:
    online = tiny_task("sr", tiny, "encode=online")
    for one, other in zip(*(diffusion_inputs(BatchOrder(t.cache, 0, 0, 8, 8)[0], t.module.denoiser, t.module.frozen)
                            for t in (task, online)), strict=True):  # fmt: skip
        if isinstance(one, Conditioning):
            assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("text", "low_res", "level"))
        elif isinstance(one, torch.Tensor):
            assert torch.equal(one, other)
        else:
            assert one == other  # no mask of transparency, no captions that are yet to be told
            assert not one


def test_padding_of_the_text_is_no_text(task: DiffusionTask) -> None:
    """Whatever stands at masked places, in each of a block's attentions."""
    text = Conditioning(*task._text.encode(["a red heart", "a cat"]))
    assert text.text is not None
    assert text.text_mask is not None
    told = Conditioning(low_res=torch.randn(2, 12, 8, 8), level=torch.zeros(2))
    x, t = torch.randn(2, 8, 8, 8), torch.full((2,), 0.7, dtype=torch.float64)
    noisy = torch.where(text.text_mask[..., None], text.text, torch.randn_like(text.text))
    with torch.no_grad():
        plain, other = (task.module.denoiser(x, t, Conditioning(s, text.text_mask).join(told)).x0
                        for s in (text.text, noisy))  # fmt: skip
        changed = task.module.denoiser(x, t, Conditioning(text.text.flip(0), text.text_mask).join(told)).x0
    assert torch.allclose(plain, other, atol=1e-5)
    assert not torch.allclose(plain, changed, atol=1e-5)


def test_guidance_can_act_on_either(task: DiffusionTask) -> None:
    """eps = w eps(x, t, low_res) + (1 - w) eps(x, t), and the same with the text."""
    module = task.module
    stage = task.cascade(module).stages[0]
    text = Conditioning(*task._text.encode(["a red heart", "a cat"]))
    null = Conditioning(*task._text.encode([""]))
    small = torch.rand(2, 3, 16, 16) * 2 - 1
    x, t = torch.randn(2, 8, 8, 8), torch.full((2,), 0.7, dtype=torch.float64)
    from ldm.guidance import ClassifierFreeGuidance

    found: list[Tensor] = []
    guides: Sequence[Any] = ("text", "low_res", "both")
    for guided in guides:
        told, against = stage._bind(text, null, stage._draws([1, 2]), SamplingConfig(guided=guided), (8, 8), small)
        with torch.no_grad():
            got = ClassifierFreeGuidance(module.denoiser, 2.5, against)(x, t, told)
            wanted = 2.5 * module.denoiser(x, t, told).eps - 1.5 * module.denoiser(x, t, against).eps
        assert torch.allclose(got.eps, wanted, atol=1e-4)
        changed = {name for name in ("text", "low_res", "level")
                   if not torch.equal(getattr(told, name), getattr(against, name))}  # fmt: skip
        low_res = {"low_res", "level"}
        assert changed == {"text": {"text"}, "low_res": low_res, "both": {"text"} | low_res}[guided]
        found.append(got.eps)
    assert not torch.allclose(found[0], found[1])
