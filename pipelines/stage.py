"""Stage: a denoiser with its codec, statistics and defaults; base and SR stages are this one class.

    Conditioning (and, for SR, small pictures -> condition_low_res) -> noise of each image -> sampler(guided denoiser)
            -> Normalisation.invert -> (x local contrast + the enlarged small picture's latent) -> LatentCodec.decode
            -> (Palette) -> pixels
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ldm.conditioning import Conditioning
from ldm.config import to_dict
from ldm.decode import Shape
from ldm.denoiser import Denoiser, DenoiserConfig, Prediction
from ldm.draws import Draws
from ldm.guidance import Autoguidance, ClassifierFreeGuidance, Denoises, GuidanceInterval, Update
from ldm.inpainting import condition_known, holed_cells, repaint, without_hole
from ldm.low_res import NULL_LEVEL, LowResConfig, condition_low_res, enlarge, local_contrast
from ldm.models.attention import attend_by
from ldm.models.palette import Palette
from ldm.models.unet import UNetConfig, UNetShape, build_unet
from ldm.noise import NoiseSchedule, NoiseScheduleConfig
from ldm.sampling import SAMPLERS
from ldm.weights import Codec
from pipelines.settings import BY_SIGMA, OF_SAMPLERS, SamplingConfig, StageConfig
from pipelines.tiles import Window, blended, windows

OVERLAP = 0.25  # of a tile, at least
OnStep = Callable[[int, int], None]
Steering = Callable[[Denoises, Sequence[int]], Denoises]  # a guided denoiser, and which of the pictures it is to draw


@dataclass(frozen=True)
class Edit:
    """A picture to begin from, of the stage's size: (B, 3, H, W) in [-1, 1], begun at the last time of the sampler's
    grid that is at most `strength` (Meng et al. 2022, SDEdit). hole: (B, 1, H, W), 1 where it is to be made new, None
    for all of it; by a network that is told of it, or else by RePaint with so many resamples, which takes the place of
    the sampler. What the picture has in the hole is not read."""

    pictures: Tensor
    strength: float = 0.6
    hole: Tensor | None = None
    resamples: int = 10

    def __getitem__(self, index: Tensor) -> Edit:
        hole = None if self.hole is None else self.hole[index]
        return replace(self, pictures=self.pictures[index], hole=hole)


@dataclass
class Stage:
    """A denoiser with its codec, its statistics and its sampling defaults.

    tile_px: side of the tiles that larger pictures are drawn in; None is the size it was trained on. weak: a denoiser
    of the same latents, less trained or smaller, for autoguidance. control: what its denoiser's ControlNet is told,
    (1, 3, H, W) for all pictures, or one for each of those asked for. canvas: width and height in pixels of what a base
    draws; None is the square that it was trained on. palette: puts what a base draws onto the colours of its data.
    """

    config: StageConfig
    denoiser: Denoiser
    codec: Codec
    tile_px: int | None = None
    weak: Denoiser | None = None
    control: Tensor | None = None
    canvas: Shape | None = None
    palette: Palette | None = None

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @cached_property
    def multiple_px(self) -> int:
        """Sides of the pictures it makes are multiples of this many pixels."""
        unit = self.codec.module.config.factor * self.config.unet.factor
        return unit if self.palette is None else math.lcm(unit, self.palette.config.factor)

    def settings(self, sampling: SamplingConfig) -> dict[str, Any]:
        """What of a sampling decides its pictures, as plain data."""
        found = to_dict(sampling)
        for name in ("update", "offset", "clean", "attention", "palette", *OF_SAMPLERS):
            if getattr(sampling, name) == getattr(SamplingConfig(), name):
                del found[name]
        if self.config.low_res is None:
            del found["level"]
            if sampling.guided == "text":
                del found["guided"]
            if self.canvas is not None:
                found["canvas"] = list(self.canvas)
        elif self.tile_px is not None:
            found["tile_px"] = self.tile_px
        return found

    @torch.no_grad()
    def sample(self, cond: Conditioning, null: Conditioning, seeds: Sequence[int], sampling: SamplingConfig,
               low_res: Tensor | None = None, on_step: OnStep | None = None, edit: Edit | None = None,
               steer: Steering | None = None) -> Tensor:  # fmt: skip
        """Pictures (B, 3, H, W) in [-1, 1], not clipped, on the CPU, for B conditionings and seeds.

        A base draws its canvas, a square of `resolution_px` by default, or edits some, guided by `steer` too. An SR
        stage enlarges `low_res` (B, 3, h, w) in [-1, 1] of any size; pictures larger than a tile are drawn one by one
        in tiles. Every network call has `sampling.rows` rows, so that a picture does not depend on its companions.
        """
        for network in (self.denoiser, self.weak):
            if network is not None:
                attend_by(network, sampling.attention, self.device)
        if self.config.low_res is None:
            width, height = self.canvas or (self.config.resolution_px, self.config.resolution_px)
            factor = self.codec.module.config.factor
            grid = height // factor, width // factor
            return self._in_rows(cond, null, seeds, sampling, grid, None, on_step, edit, steer)
        if low_res is None:
            raise ValueError(f"stage {self.config.name} enlarges pictures: give some")
        (height, width), scale = low_res.shape[-2:], self.config.low_res.scale
        unit = math.lcm(self.multiple_px, scale) // scale
        below, beside = -height % unit, -width % unit
        whole = pad(low_res, (0, beside, 0, below), mode="replicate") if below or beside else low_res
        factor = self.codec.module.config.factor
        grid = whole.shape[-2] * scale // factor, whole.shape[-1] * scale // factor
        if max(grid) * factor <= (self.tile_px or self.config.resolution_px):
            drawn = self._in_rows(cond, null, seeds, sampling, grid, whole, on_step)
        else:
            drawn = torch.cat([
                self._tiled(cond[i : i + 1], null, seed, sampling, grid, whole[i : i + 1], self.config.low_res, on_step)
                for i, seed in enumerate(seeds)
            ])
        return drawn[..., : height * scale, : width * scale]

    def tiles(self, height: int, width: int) -> list[Window]:
        """The windows in which a latent grid is drawn."""
        tile = (self.tile_px or self.config.resolution_px) // self.codec.module.config.factor
        return windows(height, width, tile, int(OVERLAP * tile))

    def _in_rows(self, cond: Conditioning, null: Conditioning, seeds: Sequence[int], sampling: SamplingConfig,
                 grid: tuple[int, int], low_res: Tensor | None, on_step: OnStep | None,
                 edit: Edit | None = None, steer: Steering | None = None) -> Tensor:  # fmt: skip
        parts, codec = [], self.codec.module
        for start in range(0, len(seeds), sampling.rows):
            chunk = list(seeds[start : start + sampling.rows])
            index = torch.tensor([*range(start, start + len(chunk)), *[start] * (sampling.rows - len(chunk))])
            chosen = [seeds[i] for i in index.tolist()]
            small = None if low_res is None else low_res[index].to(self.device)
            edited = None if edit is None else edit[index]
            draws = self._draws(chosen)
            bound, against = self._bind(cond[index], null, draws, sampling, grid, small)
            if self.control is not None:
                told = self.control.expand(len(seeds), -1, -1, -1)[index].to(self.device)
                bound, against = (each.join(Conditioning(control=told)) for each in (bound, against))
            if self.config.inpainting:
                known = self._known(edited, len(chosen), grid)
                bound, against = bound.join(known), against.join(known)
            guided = self._guided(sampling, against, Update(sampling.update))
            predict = partial(guided if steer is None else steer(guided, index.tolist()), cond=bound)
            raw = self.config.normalisation.invert(self._run(predict, draws, sampling, grid, on_step, edited))
            config = self.config.low_res
            if small is not None and config is not None and config.residual:
                enlarged = codec.encode(enlarge(small, config.scale)).chunk(2, 1)[0]
                raw = raw * local_contrast(small, config, codec.config.factor) + enlarged
            drawn = codec.decode(raw)
            if self.palette is not None and sampling.palette:
                drawn = self.palette(drawn, cond[index].to(self.device))
            parts.append(drawn[: len(chunk)].cpu())
        return torch.cat(parts)

    def _tiled(self, cond: Conditioning, null: Conditioning, seed: int, sampling: SamplingConfig,
               grid: tuple[int, int], low_res: Tensor, config: LowResConfig,
               on_step: OnStep | None) -> Tensor:  # fmt: skip
        codec, small = self.codec.module, low_res.to(self.device)
        blend = partial(blended, where=self.tiles(*grid), height=grid[0], width=grid[1], rows=sampling.rows)
        draws = self._draws([seed])
        bound, against = self._bind(cond, null, draws, sampling, grid, small)

        # each step makes the same calls, and momentum is of a call's tiles
        updates: dict[tuple[Window, ...], Update] = defaultdict(lambda: Update(sampling.update))

        def predict(x: Tensor, t: Tensor) -> Prediction:
            def work(tiles: Sequence[Window]) -> Tensor:
                guided = self._guided(sampling, _cut(against, tiles), updates[tuple(tiles)])
                found = guided(torch.cat([w.of(x) for w in tiles]), t.expand(len(tiles)), _cut(bound, tiles))
                return torch.cat([found.x0, found.eps], 1)

            return Prediction(*blend(work).chunk(2, 1))

        raw = self.config.normalisation.invert(self._run(predict, draws, sampling, grid, on_step))
        if config.residual:
            large, factor = enlarge(small, config.scale), codec.config.factor
            enlarged = blend(lambda w: codec.encode(torch.cat([i.of(large, factor) for i in w])).chunk(2, 1)[0])
            raw = raw * local_contrast(small, config, factor) + enlarged
        return blend(lambda w: codec.decode(torch.cat([i.of(raw) for i in w])), cells=codec.config.factor).cpu()

    def _guided(self, sampling: SamplingConfig, against: Conditioning, update: Update) -> Denoises:
        """The denoiser as `sampling` guides it, for one batch on its way through a sampler."""
        guided: ClassifierFreeGuidance | Autoguidance
        if sampling.guided != "network":
            guided = ClassifierFreeGuidance(self.denoiser, sampling.guidance, against, update)
        elif self.weak is not None:
            guided = Autoguidance(self.denoiser, sampling.guidance, self.weak, update)
        else:
            raise ValueError(f"stage {self.config.name} has no weaker network to be guided against")
        low, high = sampling.update.interval
        return guided if (low, high) == (0, 1) else GuidanceInterval(guided, low, high)

    def _draws(self, seeds: Sequence[int]) -> Draws:
        return Draws(seeds, self.config.name, self.config.noise == "in_order")

    def _bind(self, cond: Conditioning, null: Conditioning, draws: Draws, sampling: SamplingConfig,
              grid: tuple[int, int], low_res: Tensor | None) -> tuple[Conditioning, Conditioning]:  # fmt: skip
        """What the network is told of each picture, and what guidance holds against it."""
        text = cond.to(self.device)
        no_text = (null.expand(len(cond)) if len(null) == 1 else null).to(self.device)
        config, factor = self.config.low_res, self.codec.module.config.factor
        if config is None or low_res is None:
            return text, no_text
        eps = draws.normal("low_res", (config.channels(factor), *grid)).to(self.device)
        levels = torch.full((len(draws.seeds),), sampling.level, dtype=torch.float64)
        small, nothing = (
            Conditioning(low_res=condition_low_res(pictures, level, eps, config, factor), level=level)
            for pictures, level in (
                (low_res, levels),
                (torch.zeros_like(low_res), torch.full_like(levels, NULL_LEVEL)),
            )
        )
        against = (text if sampling.guided == "low_res" else no_text).join(
            small if sampling.guided == "text" else nothing
        )
        return text.join(small), against

    def _known(self, edit: Edit | None, count: int, grid: tuple[int, int]) -> Conditioning:
        """What an inpainting network is told; of all-new pictures, that nothing is known."""
        codec = self.codec.module
        if edit is None or edit.hole is None:
            known = torch.zeros(count, self.config.latent_channels + 1, *grid, device=self.device)
            known[:, -1] = 1
            return Conditioning(known=known)
        pictures, hole = edit.pictures.to(self.device), edit.hole.to(self.device)
        return Conditioning(known=condition_known(pictures, hole, codec, self.config.normalisation))

    def _run(self, predict: Callable[[Tensor, Tensor], Prediction], draws: Draws, sampling: SamplingConfig,
             grid: tuple[int, int], on_step: OnStep | None, edit: Edit | None = None) -> Tensor:  # fmt: skip
        """Normalised latents (B, C, h, w)."""

        def noise(like: Tensor) -> Tensor:
            return draws.normal("sampler", like.shape[1:]).to(like)

        schedule = self.denoiser.schedule
        times = self.times(sampling, edit)
        start = draws.normal("start", (self.config.latent_channels, *grid)).to(self.device)
        if edit is not None:
            factor = self.codec.module.config.factor
            pictures = edit.pictures if edit.hole is None else without_hole(edit.pictures, edit.hole)
            moments = self.codec.module.encode(pictures.to(self.device))
            known = self.config.normalisation.apply(moments.chunk(2, 1)[0])
            x = schedule.add_noise(known, start, times[:1].expand(len(start)))
            if edit.hole is not None and not self.config.inpainting:
                hole = holed_cells(edit.hole, factor).to(self.device)
                return repaint(predict, x, times, noise, schedule=schedule, known=known, hole=hole,
                               resamples=edit.resamples, variance=sampling.variance, on_step=on_step)  # fmt: skip
        else:
            alpha, sigma = schedule.alpha_sigma(times[:1])
            if self.config.noise == "in_order" and (sampling.grid == "leading" or sampling.sampler not in BY_SIGMA):
                sigma = (alpha**2 + sigma**2).sqrt()  # so diffusers begins
            x = sigma.float().to(self.device) * start
        sampler: Any = SAMPLERS[sampling.sampler]
        drawn: Tensor = sampler(predict, x, times, noise, schedule=schedule, on_step=on_step, **sampling.options)
        return drawn

    def times(self, sampling: SamplingConfig, edit: Edit | None = None) -> Tensor:
        """The sampler's grid, of an edit what of it is at most its strength. ValueError where no step is left."""
        times = sampling.times(self.denoiser.schedule)
        kept = times if edit is None else times[times <= edit.strength + 1e-9]
        if len(kept) < 2:
            raise ValueError(f"strength must be at least {float(times[-2]):.3g} with {sampling.steps} steps")
        return kept


def _cut(cond: Conditioning, tiles: Sequence[Window]) -> Conditioning:
    """The conditioning of one picture for each of its tiles."""
    each = cond.expand(len(tiles))
    if cond.low_res is None:
        return each
    return replace(each, low_res=torch.cat([w.of(cond.low_res) for w in tiles]))


def build_denoiser(unet: UNetConfig, schedule: NoiseScheduleConfig, denoiser: DenoiserConfig,
                   shape: UNetShape) -> Denoiser:  # fmt: skip
    """A denoiser with random weights."""
    return Denoiser(build_unet(unet, shape), NoiseSchedule(schedule), denoiser)
