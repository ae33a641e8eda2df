"""One training step of each kind of stage: (networks, batch) -> losses, one per optimizer group, and metrics.

No optimizer and no process here. Draws come from each item's own generator, always in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from ldm.conditioning import Conditioning
from ldm.config import Config
from ldm.denoiser import Denoiser
from ldm.latents import LatentCodec, Normalisation, kl_to_standard_normal, sample_moments
from training.loader import Batch


class StepResult(NamedTuple):
    """losses: one per optimizer group; metrics: detached scalars to log."""

    losses: list[Tensor]
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class ReconstructionConfig(Config):
    """What an autoencoder is trained on: `crop_px` squares, whole pictures shrunk to it or crops at full size.

    kl is the weight of the KL term per latent dimension, gradient that of the L1 of image gradients.
    """

    crop_px: int = 64
    whole: float = 0.5
    mirror: bool = True
    l1: float = 1.0
    l2: float = 1.0
    gradient: float = 1.0
    kl: float = 5e-4

    def __post_init__(self) -> None:
        if self.crop_px < 8:
            raise ValueError("crop_px must be at least 8")
        if not 0 <= self.whole <= 1:
            raise ValueError("whole is a share, from 0 to 1")
        if min(self.l1, self.l2, self.gradient, self.kl) < 0:
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


def autoencoder_step(codec: LatentCodec, pixels: Tensor, noise: Tensor, config: ReconstructionConfig) -> StepResult:
    """L1 + L2 + L1 of image gradients + KL, on pixels (B, 3, H, W) and noise (B, C, h, w)."""
    moments = codec.encode(pixels)
    error = codec.decode(sample_moments(moments, noise)) - pixels
    l1, l2 = error.abs().mean(), (error**2).mean()
    gradient = (error[..., 1:] - error[..., :-1]).abs().mean() + (
        error[..., 1:, :] - error[..., :-1, :]
    ).abs().mean()
    kl = kl_to_standard_normal(moments).mean() / noise[0].numel()
    loss = config.l1 * l1 + config.l2 * l2 + config.gradient * gradient + config.kl * kl
    return StepResult([loss], {"l1": l1.detach(), "mse": l2.detach(), "kl_per_dim": kl.detach()})


class DiffusionInputs(NamedTuple):
    """Everything a diffusion step draws: latents and noise (B, C, h, w), t (B,) float64, conditioning."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    cond: Conditioning


def diffusion_inputs(batch: Batch, denoiser: Denoiser, normalisation: Normalisation, null: Conditioning,
                     dropout: float) -> DiffusionInputs:  # fmt: skip
    """Draw caption, posterior sample, noise, stratified t and text dropout of each item."""
    captions = [batch.cache.captions(i) for i in batch.indices]
    chosen = batch.integers([len(c) for c in captions])
    moments = batch.stored().float()
    shape = (moments.shape[1] // 2, *moments.shape[2:])
    x0 = normalisation.apply(sample_moments(moments, batch.normal(shape)))
    eps = batch.normal(shape)
    u = (torch.tensor(batch.places, dtype=torch.float64) + batch.uniform()) / batch.global_size
    text = batch.cache.text([c[k] for c, k in zip(captions, chosen, strict=True)])
    cond = text.where(batch.uniform() >= dropout, null)
    return DiffusionInputs(x0, eps, denoiser.schedule.draw_t(u), cond)


def diffusion_step(denoiser: Denoiser, inputs: DiffusionInputs) -> StepResult:
    """The denoiser's loss, averaged over the batch."""
    loss = denoiser.loss(*inputs).mean()
    return StepResult([loss], {})
