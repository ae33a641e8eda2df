"""A Transformer denoiser of 1-D sequences, called as a U-Net of pictures is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from torch import Tensor, nn

from ldm.config import Config


@dataclass(frozen=True)
class SequenceTransformerConfig(Config):
    """Pre-norm encoder blocks (Vaswani et al. 2017) over positions of a sequence, each of which is told t."""

    width: int = 64
    layers: int = 3
    heads: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.layers <= 64 or self.heads < 1 or self.width < 1 or self.width % (2 * self.heads):
            raise ValueError(f"width {self.width} must be a multiple of twice heads {self.heads}, and layers 1 to 64")


class Sample(NamedTuple):
    """A network's output, named as diffusers names it."""

    sample: Tensor


class SequenceTransformer(nn.Module):
    """x_t (B, channels, L), network time (B,) -> (B, out_channels, L)."""

    def __init__(self, config: SequenceTransformerConfig, length: int, channels: int, out_channels: int) -> None:
        super().__init__()
        width = config.width
        self.read = nn.Linear(channels, width)
        self.place = nn.Parameter(torch.randn(length, width) / width**0.5)
        self.time = nn.Sequential(
            Timesteps(width, flip_sin_to_cos=True, downscale_freq_shift=0), TimestepEmbedding(width, width)
        )
        block = nn.TransformerEncoderLayer(width, config.heads, 4 * width, dropout=0.0, activation="gelu",
                                           batch_first=True, norm_first=True)  # fmt: skip
        self.blocks = nn.TransformerEncoder(block, config.layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.write = nn.Linear(width, out_channels)

    def forward(self, x_t: Tensor, time: Tensor, **_: Any) -> Sample:
        told = self.time(time.expand(len(x_t)).to(x_t))
        positions = self.read(x_t.transpose(1, 2)) + self.place + told[:, None]
        return Sample(self.write(self.blocks(positions)).transpose(1, 2))
