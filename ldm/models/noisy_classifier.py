"""Noise-aware classifier: what a noisy latent will show, for classifier guidance (Dhariwal & Nichol 2021, sec. 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from ldm.config import Config


@dataclass(frozen=True)
class NoisyClassifierConfig(Config):
    """Residual blocks that are told t: `blocks` for each of `widths`, each after the first at half the grid."""

    widths: tuple[int, ...] = (64, 128)
    blocks: int = 2
    norm_groups: int = 16
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not self.widths or not 1 <= self.blocks <= 8:
            raise ValueError("widths must name a level or more, and blocks be 1 to 8")
        if self.norm_groups < 1 or any(w < 1 or w > 4096 or w % self.norm_groups for w in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of norm_groups {self.norm_groups}, at most 4096")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share, from 0 to below 1, not {self.dropout}")

    @property
    def factor(self) -> int:
        """Grid sides must be multiples of it."""
        return 1 << (len(self.widths) - 1)


class NoisyClassifier(nn.Module):
    """x_t (B, C, h, w) and the network time (B,) of its noise (`NoiseSchedule.network_time`) -> {label: logits}.

    channels: C; classes: the names that each label can take, in the order of its logits.
    """

    def __init__(self, config: NoisyClassifierConfig, channels: int, classes: dict[str, tuple[str, ...]]) -> None:
        super().__init__()
        self.config, self.channels, self.classes = config, channels, classes
        first, embedded = config.widths[0], 4 * config.widths[0]
        self.time = nn.Sequential(
            Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0), TimestepEmbedding(first, embedded)
        )
        self.first = nn.Conv2d(channels, first, 3, padding=1)
        blocks: list[nn.Module] = []
        before = first
        for level, width in enumerate(config.widths):
            if level:
                blocks.append(Downsample2D(before, use_conv=True, name="op"))  # under "conv" it has two names
            for _ in range(config.blocks):
                blocks.append(
                    ResnetBlock2D(in_channels=before, out_channels=width, temb_channels=embedded,
                                  groups=config.norm_groups, dropout=config.dropout)
                )  # fmt: skip
                before = width
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.Sequential(nn.GroupNorm(config.norm_groups, before), nn.SiLU())
        self.heads = nn.ModuleDict({name: nn.Linear(before, len(own)) for name, own in classes.items()})

    def forward(self, x_t: Tensor, time: Tensor) -> dict[str, Tensor]:
        told = self.time(time.to(x_t))
        x = self.first(x_t)
        for block in self.blocks:
            x = block(x, told) if isinstance(block, ResnetBlock2D) else block(x)
        features = self.last(x).mean((2, 3))
        return {name: head(features) for name, head in self.heads.items()}

    def log_prob(self, x_t: Tensor, time: Tensor, wanted: dict[str, Tensor]) -> Tensor:
        """Sum over labels of log p(wanted | x_t), (B,); wanted: {label: class (B,)}, -1 where it does not matter."""
        total = x_t.new_zeros(len(x_t))
        for name, logits in self(x_t, time).items():
            if name in wanted:
                target = wanted[name].to(logits.device)
                own = logits.float().log_softmax(1).gather(1, target.clamp(min=0)[:, None])[:, 0]
                total = total + torch.where(target >= 0, own, torch.zeros_like(own))
        return total
