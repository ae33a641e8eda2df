"""One training step of each kind of stage: (networks, batch) -> losses, one per optimizer group, and metrics.

No optimizer and no process here. Draws come from each item's own generator, always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

from ldm.conditioning import Conditioning
from ldm.config import Config
from ldm.control import ControlConfig, control_picture
from ldm.denoiser import Denoiser
from ldm.inpainting import condition_known
from ldm.latents import LatentCodec, Normalisation, kl_to_standard_normal, sample_moments
from ldm.low_res import (
    NULL_LEVEL,
    DegradationConfig,
    LowResConfig,
    condition_low_res,
    degrade,
    enlarge,
    local_contrast,
)
from training.cache import Items
from training.features import Features
from training.loader import Batch
from training.tuning import Told

WHOLE_HOLES = 0.2  # the share of items of which an inpainting network is told nothing


class StepResult(NamedTuple):
    """losses: one per optimizer group; metrics: detached scalars to log."""

    losses: list[Tensor]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class ReconstructionConfig(Config):
    """What an autoencoder is trained on: `crop_px` squares, whole pictures shrunk to it or crops at full size.

    kl is the weight of the KL term per latent dimension, gradient that of the L1 of image gradients, perceptual that
    of the distance in features of EfficientNet-Lite0 (needs the extra `eval`). decoder_only: the encoder stays as it
    is, and the decoder learns to decode its means, so that stages trained in its latents go on fitting.
    """

    crop_px: int = 64
    whole: float = 0.5
    mirror: bool = True
    l1: float = 1.0
    l2: float = 1.0
    gradient: float = 1.0
    kl: float = 5e-4
    perceptual: float = 0.0
    decoder_only: bool = False

    def __post_init__(self) -> None:
        if self.crop_px < 8:
            raise ValueError("crop_px must be at least 8")
        if not 0 <= self.whole <= 1:
            raise ValueError("whole is a share, from 0 to 1")
        if min(self.l1, self.l2, self.gradient, self.kl, self.perceptual) < 0:
            raise ValueError("loss weights must not be negative")


def training_squares(batch: Batch, config: ReconstructionConfig) -> Tensor:
    """Pixels (B, 3, crop_px, crop_px) in [-1, 1]: per item a whole picture by area, or a crop, maybe mirrored."""
    whole, mirror = batch.uniform(), batch.uniform()
    stored = list(batch.stored())  # (S, S, 3) uint8
    room = [p.shape[0] - config.crop_px for p in stored]
    tops, lefts = batch.integers([r + 1 for r in room]), batch.integers([r + 1 for r in room])
    squares = []
    for i, pixels in enumerate(stored):
        if whole[i] < config.whole:
            square = avg_pool2d(pixels.permute(2, 0, 1).float(), pixels.shape[0] // config.crop_px)
        else:
            crop = pixels[tops[i] : tops[i] + config.crop_px, lefts[i] : lefts[i] + config.crop_px]
            square = crop.permute(2, 0, 1).float()
        squares.append(square.flip(-1) if config.mirror and mirror[i] < 0.5 else square)
    return torch.stack(squares) / 127.5 - 1


def autoencoder_step(codec: LatentCodec, pixels: Tensor, noise: Tensor, config: ReconstructionConfig,
                     features: Features | None = None) -> StepResult:  # fmt: skip
    """L1 + L2 + L1 of image gradients + KL + perceptual distance, on pixels (B, 3, H, W) and noise (B, C, h, w); of a
    decoder alone without the KL, and the noise is not used."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and not config.decoder_only):
        moments = codec.encode(pixels)
    raw = moments.chunk(2, 1)[0] if config.decoder_only else sample_moments(moments, noise)
    decoded = codec.decode(raw)
    error = decoded - pixels
    l1, l2 = error.abs().mean(), (error**2).mean()
    gradient = (error[..., 1:] - error[..., :-1]).abs().mean() + (
        error[..., 1:, :] - error[..., :-1, :]
    ).abs().mean()
    kl = kl_to_standard_normal(moments).mean() / noise[0].numel()
    loss = config.l1 * l1 + config.l2 * l2 + config.gradient * gradient
    loss = loss if config.decoder_only else loss + config.kl * kl
    metrics = {"l1": l1.detach(), "mse": l2.detach(), "kl_per_dim": kl.detach()}
    if features is not None:
        distance = features.perceptual_distance(decoded, pixels).mean()
        loss, metrics["distance"] = loss + config.perceptual * distance, distance.detach()
    return StepResult([loss], metrics)


@dataclass(frozen=True)
class UpscalingConfig(Config):
    """What an SR stage is trained on: crops of `crop_px` of the large picture (None: all of it), small pictures made
    by `degradation`, and replaced by the null for a share `dropout` of the items, apart from the text's."""

    crop_px: int | None = None
    dropout: float = 0.1
    degradation: DegradationConfig = DegradationConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share, from 0 to below 1, not {self.dropout}")
        if self.crop_px is not None and self.crop_px < 8:
            raise ValueError("crop_px must be at least 8")


@dataclass(frozen=True)
class Frozen:
    """What a diffusion stage does not train. null: of the text, one item; dropout: of the text.

    last: the share of items trained at t = 1 alone, where a network sees noise only and learns the mean of what it is
    asked for; with a share of 1, one step draws that. inpainting: whether the network is told what is known.
    posterior: whether latents are draws of the codec's posterior or its means. control: what a ControlNet is told.
    told: tells captions while a word, or a LoRA of the text encoder, is learned; else a cache holds their states.
    """

    codec: LatentCodec
    normalisation: Normalisation
    null: Conditioning
    dropout: float
    low_res: LowResConfig | None = None
    upscaling: UpscalingConfig = UpscalingConfig()
    last: float = 0.0
    inpainting: bool = False
    posterior: Literal["draw", "mean"] = "draw"
    control: ControlConfig | None = None
    told: Told | None = None

    def __deepcopy__(self, memo: object) -> Frozen:
        """Itself: averages of a module share it."""
        return self


class DiffusionInputs(NamedTuple):
    """Everything a diffusion step draws: latents and noise (B, C, h, w), t (B,) float64, conditioning; where
    transparency is a mask, how much of each cell is opaque (B, 1, h, w); captions that are yet to be told, None for the
    null."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    cond: Conditioning
    opaque: Tensor | None = None
    captions: tuple[str | None, ...] = ()


def diffusion_inputs(batch: Batch, denoiser: Denoiser, frozen: Frozen) -> DiffusionInputs:
    """Draw caption, posterior sample, noise, stratified t and text dropout of each item; for SR also what makes the
    small picture, its level, the noise of that level, its dropout and the crop."""
    captions = [batch.cache.captions(i) for i in batch.indices]
    chosen = batch.integers([len(c) for c in captions])
    stored = batch.stored()
    small = small_pictures(batch.cache, batch.indices, stored, frozen, batch.generators)
    factor = frozen.codec.config.factor
    pixels = stored.dtype == torch.uint8
    height, width = (n // factor for n in stored.shape[1:3]) if pixels else stored.shape[-2:]
    crop = _crop(batch, width, frozen)
    # of cached latents the whole is drawn: its noise must not depend on the crop
    cells = (crop.cells, crop.cells) if pixels and crop.places else (height, width)
    drawn = frozen.codec.autoencoder is not None and frozen.posterior == "draw"
    noise = batch.normal((frozen.codec.config.latent_channels, *cells)) if drawn else None
    x0 = frozen.normalisation.apply(raw_latents(stored, small, frozen, noise, crop))
    eps = batch.normal(tuple(x0.shape[1:]))
    u = (torch.tensor(batch.places, dtype=torch.float64) + batch.uniform()) / batch.global_size
    rest = 1 - frozen.last  # of a batch, u spreads over [0, 1) evenly
    t = torch.where(u < rest, denoiser.draw_t((u / max(rest, 1e-9)).clamp(max=1 - 1e-9)), 1.0)
    kept = batch.uniform() >= frozen.dropout
    strings: tuple[str | None, ...] = ()
    if frozen.told is None:
        text = batch.cache.text([c[k] for c, k in zip(captions, chosen, strict=True)])
        cond = text.where(kept, frozen.null)
    else:
        records, cond = [batch.cache.record(i)["captions"] for i in batch.indices], Conditioning()
        strings = tuple(c[k] if keep else None for c, k, keep in zip(records, chosen, kept.tolist(), strict=True))
    if frozen.low_res is not None and small is not None:
        level = frozen.low_res.max_level * batch.uniform()
        level = torch.where(batch.uniform() >= frozen.upscaling.dropout, level, NULL_LEVEL)
        added = batch.normal((frozen.low_res.channels(factor), height, width))
        seen = condition_pictures(small, level, added, frozen)
        cond = cond.join(Conditioning(low_res=crop(seen), level=level))
    if frozen.inpainting:
        pictures = planes(stored)
        hole = random_holes(batch, pictures.shape[-1])
        device = frozen.codec.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            known = condition_known(pictures.to(device), hole.to(device), frozen.codec, frozen.normalisation)
        cond = cond.join(Conditioning(known=known.cpu()))
    if frozen.control is not None:
        cond = cond.join(Conditioning(control=control_picture(planes(stored), frozen.control)))
    return DiffusionInputs(x0, eps, t, cond, opaque_cells(batch.cache, batch.indices, x0.shape), strings)


def opaque_cells(cache: Items, indices: Sequence[int], shape: Sequence[int]) -> Tensor | None:
    """The opaque share of each cell of latents of `shape`, (B, 1, h, w) in [0, 1]; None where transparency is no
    mask."""
    if not cache.key.masked:
        return None
    return adaptive_avg_pool2d(cache.opaque(indices)[:, None].float() / 255, (shape[-2], shape[-1]))


def random_holes(batch: Batch, side: int) -> Tensor:
    """(B, 1, side, side), 1 in a rectangle of 20% to 80% of the sides, anywhere; for WHOLE_HOLES of items in all."""
    whole = batch.uniform() < WHOLE_HOLES
    spans = [(batch.uniform(), batch.uniform()) for _ in range(2)]  # of rows, then of columns: length, place
    hole = torch.zeros(len(batch), 1, side, side)
    for i in range(len(batch)):
        lengths = [max(1, round(side * (0.2 + 0.6 * float(length[i])))) for length, _ in spans]
        top, left = (int(float(place[i]) * (side - n + 1)) for n, (_, place) in zip(lengths, spans, strict=True))
        hole[i, :, top : top + lengths[0], left : left + lengths[1]] = 1
    return torch.where(whole.view(-1, 1, 1, 1), torch.ones_like(hole), hole)


def small_pictures(cache: Items, indices: Sequence[int], stored: Tensor, frozen: Frozen,
                   generators: Sequence[torch.Generator] | None = None) -> Tensor | None:  # fmt: skip
    """Small pictures of items, uint8 (B, S / scale, S / scale, 3): cached, or made now of the pixels `stored`, by
    the stage's degradation; without generators, where that is random, by area. None for a base."""
    if frozen.low_res is None:
        return None
    if stored.dtype != torch.uint8:
        return cache.low_res(indices)
    degradation = frozen.upscaling.degradation
    if degradation.random and generators is None:
        degradation = DegradationConfig()
    return degrade(stored, frozen.low_res.scale, degradation, generators or ())


class Crop(NamedTuple):
    """The same square of each item's grids: `cells` a side from (top, left); None for the whole."""

    cells: int
    places: list[tuple[int, int]] | None = None

    def __call__(self, grids: Tensor, unit: int = 1) -> Tensor:
        """Of (B, C, h unit, w unit), where a grid cell is `unit` elements wide."""
        if self.places is None:
            return grids
        size = self.cells * unit
        return torch.stack([
            grid[:, top * unit : top * unit + size, left * unit : left * unit + size]
            for grid, (top, left) in zip(grids, self.places, strict=True)
        ])  # fmt: skip


def _crop(batch: Batch, side: int, frozen: Frozen) -> Crop:
    """Nothing is drawn where nothing is cropped."""
    crop = frozen.upscaling.crop_px
    cells = side if crop is None or frozen.low_res is None else crop // frozen.codec.config.factor
    if cells == side:
        return Crop(side)
    tops, lefts = (batch.integers([side - cells + 1] * len(batch)) for _ in range(2))
    return Crop(cells, list(zip(tops, lefts, strict=True)))


@torch.no_grad()
def raw_latents(stored: Tensor, small: Tensor | None, frozen: Frozen, noise: Tensor | None = None,
                crop: Crop | None = None) -> Tensor:  # fmt: skip
    """What is cached of pictures -> raw latents (B, C, h, w) of a crop, on the CPU: a posterior draw, or its mean
    without noise; for a residual stage, less the latent of the enlarged small picture, over its local contrast.

    Pixels are cropped before they are encoded, latents after.
    """
    codec = frozen.codec
    pixels, factor = stored.dtype == torch.uint8, codec.config.factor
    crop = crop or Crop(0)

    def encoded(pictures: Tensor) -> Tensor:
        # half precision would eat a residual, which is a small difference
        with torch.autocast(codec.device.type, enabled=False):
            return codec.encode((crop(pictures, factor) if pixels else pictures).to(codec.device)).float().cpu()

    moments = encoded(planes(stored)) if pixels else stored.float()
    raw = moments.chunk(2, dim=1)[0] if noise is None else sample_moments(moments, noise)
    raw = raw if pixels else crop(raw)
    if frozen.low_res is None or not frozen.low_res.residual or small is None:
        return raw
    low_res = planes(small)
    enlarged = encoded(enlarge(low_res, frozen.low_res.scale)).chunk(2, dim=1)[0]
    return (raw - (enlarged if pixels else crop(enlarged))) / crop(local_contrast(low_res, frozen.low_res, factor))


def condition_pictures(small: Tensor, level: Tensor, noise: Tensor, frozen: Frozen) -> Tensor:
    """`condition_low_res` of uint8 pictures (B, s, s, 3); those at NULL_LEVEL are the null, zeros under its noise."""
    assert frozen.low_res is not None
    shown = planes(small) * (level < NULL_LEVEL).view(-1, 1, 1, 1)
    return condition_low_res(shown, level, noise, frozen.low_res, frozen.codec.config.factor)


def planes(pictures: Tensor) -> Tensor:
    """Pictures (B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


def diffusion_step(denoiser: Denoiser, inputs: DiffusionInputs) -> StepResult:
    """The denoiser's loss, averaged over the batch."""
    loss = denoiser.loss(*inputs[:5]).mean()
    return StepResult([loss], {})
