"""The denoising network: diffusers' UNet2DConditionModel, sized by a config."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from ldm.config import Config


@dataclass(frozen=True)
class UNetConfig(Config):
    """A U-Net with one level per entry of `widths`, each after the first at half the grid.

    attention: per level, whether its blocks attend (self and cross). The middle block always does.
    """

    widths: tuple[int, ...] = (128, 256)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (True, True)
    heads: int = 8
    norm_groups: int = 32

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.widths) or not self.widths:
            raise ValueError(f"attention needs one entry per width: {len(self.attention)} for {len(self.widths)}")
        if self.norm_groups < 1 or self.heads < 1:
            raise ValueError(f"norm_groups and heads must be at least 1, not {self.norm_groups} and {self.heads}")
        if any(w < 1 or w > 8192 or w % self.norm_groups or w % self.heads for w in self.widths):
            raise ValueError(
                f"widths {self.widths} must be multiples of norm_groups {self.norm_groups} and heads {self.heads}"
            )
        if not 1 <= self.layers_per_block <= 8:
            raise ValueError("layers_per_block must be 1 to 8")


def build_unet(config: UNetConfig, channels: int, text_width: int) -> UNet2DConditionModel:
    """A UNet2DConditionModel with random weights: (B, channels, H, W), t, text (B, L, text_width) -> like x."""
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention))
    return UNet2DConditionModel(
        in_channels=channels,
        out_channels=channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=config.widths,
        layers_per_block=config.layers_per_block,
        # diffusers' name for the number of heads
        attention_head_dim=config.heads,
        cross_attention_dim=text_width,
        norm_num_groups=config.norm_groups,
    )
