"""The denoising network: diffusers' UNet2DConditionModel, sized by a config."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from ldm.config import Config, UserError


@dataclass(frozen=True)
class UNetConfig(Config):
    """A U-Net with one level per entry of `widths`, each after the first at half the grid.

    attention: per level, whether its blocks attend (self and cross). The middle block always does.
    self_attention: without it blocks attend to the text only, and the middle block not at all, so that cost grows
    with the area of a picture and not with its square: for super-resolution.
    pooled_text: whether the text, pooled by attention, is also added to the embedding of t that every block sees
    (Saharia et al. 2022, Imagen, sec. 2.2). adaptive_norm: whether that embedding scales and shifts the normalised
    features of a block (Dhariwal & Nichol 2021, eq. 1) or is added to them.
    """

    widths: tuple[int, ...] = (128, 256)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (True, True)
    heads: int = 8
    norm_groups: int = 32
    self_attention: bool = True
    pooled_text: bool = False
    adaptive_norm: bool = False

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

    @property
    def factor(self) -> int:
        """Grid sides must be multiples of it."""
        return 1 << (len(self.widths) - 1)


def build_unet(config: UNetConfig, channels: int, text_width: int, low_res_channels: int = 0,
               out_channels: int | None = None) -> UNet2DConditionModel:  # fmt: skip
    """A UNet2DConditionModel with random weights: (B, channels, H, W), t, text (B, L, text_width) -> like x, or
    (B, out_channels, H, W).

    With `low_res_channels` its input has as many channels more, and it takes the level, in thousandths, as
    `class_labels`, embedded as t is, by weights of its own. Raises UserError where the heads do not divide a text
    width that is pooled.
    """
    if config.pooled_text and text_width % config.heads:
        raise UserError(f"unet.pooled_text: heads {config.heads} must divide the text's width {text_width}")
    down = tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention)
    up = tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention))
    return UNet2DConditionModel(
        in_channels=channels + low_res_channels,
        out_channels=out_channels or channels,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=config.widths,
        layers_per_block=config.layers_per_block,
        # diffusers' name for the number of heads
        attention_head_dim=config.heads,
        cross_attention_dim=text_width,
        norm_num_groups=config.norm_groups,
        addition_embed_type="text" if config.pooled_text else None,
        addition_embed_type_num_heads=config.heads,
        resnet_time_scale_shift="scale_shift" if config.adaptive_norm else "default",
        class_embed_type="timestep" if low_res_channels else None,
        only_cross_attention=not config.self_attention,
        mid_block_type="UNetMidBlock2DCrossAttn" if config.self_attention else "UNetMidBlock2D",
    )
