"""LatentCodec: pixels <-> moments <-> latents.  Without an autoencoder, latents are the pixels themselves.

    pixels (B, 3, H, W) in [-1, 1] -> space-to-depth -> AutoencoderKL -> moments (B, 2C, h, w) = [mean, log-variance]
    (each space-to-depth once more where the codec folds its latents)
    moments -> a draw, or the mean -> raw latent (B, C, h, w) -> (raw - mean) / std of the stage -> unit variance
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from ldm.config import Config
from ldm.models.autoencoder import AutoencoderConfig, build_autoencoder

LOG_VARIANCE_RANGE = (-30.0, 20.0)
ENCODER = ("autoencoder.encoder.", "autoencoder.quant_conv.")  # how the names of a codec's encoding weights begin


@dataclass(frozen=True)
class CodecConfig(Config):
    """Space-to-depth by `unshuffle`, then an autoencoder, or none for stages that work on pixels. grey: pictures are
    one channel, the mean of their three, and come back grey. fold: so many of the autoencoder's cells along each side
    make one cell of the latents, with fold^2 times its channels: the same numbers on a smaller grid, for a cheaper
    denoiser; it can be changed after training. noise: the deviation of the posterior in all channels, whose means then
    have mean square 1 in each cell; None lets the encoder choose both, and it may say much in few channels, to a
    precision that a denoiser has to meet there."""

    unshuffle: int = 4
    autoencoder: AutoencoderConfig | None = AutoencoderConfig()
    grey: bool = False
    fold: int = 1
    noise: float | None = None

    def __post_init__(self) -> None:
        if self.noise is not None and (self.autoencoder is None or not 0 < self.noise <= 2):
            raise ValueError(f"noise must be above 0 and at most 2, and null without an autoencoder, not {self.noise}")
        if self.unshuffle not in (1, 2, 4, 8):
            raise ValueError(f"unshuffle must be 1, 2, 4 or 8, not {self.unshuffle}")
        if self.fold not in (1, 2, 4) or (self.fold > 1 and self.autoencoder is None):
            raise ValueError(f"fold must be 1, 2 or 4, and 1 without an autoencoder, not {self.fold}")

    @property
    def factor(self) -> int:
        """Pixels per latent cell along each side."""
        own = 2 ** (len(self.autoencoder.widths) - 1) if self.autoencoder else 1
        return self.unshuffle * own * self.fold

    @property
    def latent_channels(self) -> int:
        return self.autoencoder.latent_channels * self.fold**2 if self.autoencoder else self.squares

    @property
    def squares(self) -> int:
        """Channels of a picture after space-to-depth."""
        return (1 if self.grey else 3) * self.unshuffle**2


@dataclass(frozen=True)
class Normalisation(Config):
    """Per-channel mean and standard deviation of raw latents, measured on a stage's own training cache."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if any(not s > 0 for s in self.std):
            raise ValueError("std must be positive")

    def apply(self, raw: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> unit variance per channel."""
        return (raw - self._column(self.mean, raw)) / self._column(self.std, raw)

    def invert(self, latents: Tensor) -> Tensor:
        """Unit-variance latents (B, C, h, w) -> raw."""
        return latents * self._column(self.std, latents) + self._column(self.mean, latents)

    @staticmethod
    def _column(values: tuple[float, ...], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device).view(1, -1, 1, 1)


def sample_moments(moments: Tensor, noise: Tensor) -> Tensor:
    """A draw from the posterior: moments (B, 2C, h, w), noise (B, C, h, w) ~ N(0, I) -> raw latents (B, C, h, w)."""
    mean, log_variance = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * log_variance) * noise


def kl_to_standard_normal(moments: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, I)) per image, in nats summed over the latent: (B, 2C, h, w) -> (B,)."""
    mean, log_variance = moments.chunk(2, dim=1)
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


class LatentCodec(nn.Module):
    """Encodes pixels to moments and decodes raw latents to pixels; knows nothing of any stage's statistics.

    `autoencoder` is None for pixels: moments of the least variance then, and exact decoding.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.autoencoder = (
            build_autoencoder(config.autoencoder, config.squares) if config.autoencoder else None
        )

    @property
    def device(self) -> torch.device:
        """Where the autoencoder is; the CPU without one."""
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [-1, 1], H and W multiples of `config.factor` -> moments (B, 2C, h, w).

        Raises ValueError for other sizes.
        """
        if pixels.shape[-1] % self.config.factor or pixels.shape[-2] % self.config.factor:
            raise ValueError(f"picture sides {tuple(pixels.shape[-2:])} must be multiples of {self.config.factor}")
        pixels = pixels.mean(1, keepdim=True) if self.config.grey else pixels
        squares = pixel_unshuffle(pixels, self.config.unshuffle)
        if self.autoencoder is None:
            return torch.cat([squares, torch.full_like(squares, LOG_VARIANCE_RANGE[0])], dim=1)
        parameters = self.autoencoder.encode(squares).latent_dist.parameters
        mean, log_variance = parameters.chunk(2, dim=1)
        bounded = log_variance.clamp(*LOG_VARIANCE_RANGE)
        if self.config.noise is not None:
            mean = mean * (mean.square().mean(1, keepdim=True) + 1e-6).rsqrt()
            bounded = torch.full_like(mean, 2 * math.log(self.config.noise))
        return torch.cat([pixel_unshuffle(m, self.config.fold) for m in (mean, bounded)], dim=1)

    def decode(self, raw: Tensor) -> Tensor:
        """Raw latents (B, C, h, w) -> pixels (B, 3, H, W), not clipped."""
        raw = pixel_shuffle(raw, self.config.fold)
        squares = raw if self.autoencoder is None else self.autoencoder.decode(raw).sample
        pixels = pixel_shuffle(squares, self.config.unshuffle)
        return pixels.expand(-1, 3, -1, -1) if self.config.grey else pixels


@torch.no_grad()
def decode_rows(codec: LatentCodec, raw: Tensor, rows: int) -> Tensor:
    """Decode raw latents (B, C, h, w), `rows` at a time -> pixels (B, 3, H, W) on the CPU."""
    return torch.cat([codec.decode(part.to(codec.device)).cpu() for part in torch.split(raw, rows)])
