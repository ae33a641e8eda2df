"""The denoising network: diffusers' UNet2DConditionModel, sized by a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from ldm.config import Config, UserError
from ldm.denoiser import SIZES, DenoiserConfig
from ldm.low_res import LowResConfig


@dataclass(frozen=True)
class UNetConfig(Config):
    """A U-Net with one level per entry of `widths`, each after the first at half the grid.

    attention: per level, whether its blocks attend (self and cross). The middle block always does.
    self_attention: without it blocks attend to the text only, and the middle block not at all, so that cost grows
    with the area of a picture and not with its square: for super-resolution. Per level it leaves the middle block as
    it is. heads and transformer_layers: of each attention, or per level. linear_projection: into and out of it, in
    place of convolutions of one pixel. level_table: entries of a table in which an SR stage looks up its level, 0 where
    the level is embedded as t is.
    pooled_text: whether the text, pooled by attention, is also added to the embedding of t that every block sees
    (Saharia et al. 2022, Imagen, sec. 2.2). adaptive_norm: whether that embedding scales and shifts the normalised
    features of a block (Dhariwal & Nichol 2021, eq. 1) or is added to them. sizes: width of the embedding of each of
    six sizes of the picture and its crop (Podell et al. 2023, SDXL, sec. 2.2), 0 for none; with them goes `pooled`:
    so many numbers of the text's last state are no token but the whole text, embedded beside them.
    """

    widths: tuple[int, ...] = (128, 256)
    layers_per_block: int = 2
    attention: tuple[bool, ...] = (True, True)
    heads: int | tuple[int, ...] = 8
    norm_groups: int = 32
    self_attention: bool | tuple[bool, ...] = True
    pooled_text: bool = False
    adaptive_norm: bool = False
    transformer_layers: int | tuple[int, ...] = 1
    linear_projection: bool = False
    level_table: int = 0
    sizes: int = 0
    pooled: int = 0

    def __post_init__(self) -> None:
        if len(self.attention) != len(self.widths) or not self.widths:
            raise ValueError(f"attention needs one entry per width: {len(self.attention)} for {len(self.widths)}")
        levels = len(self.widths)
        for name in ("heads", "transformer_layers", "self_attention"):
            if len(each_level(getattr(self, name), levels)) != levels:
                raise ValueError(f"{name} is one value, or one for each of {levels} levels")
        heads, layers = each_level(self.heads, levels), each_level(self.transformer_layers, levels)
        if self.norm_groups < 1 or min(heads) < 1:
            raise ValueError(f"norm_groups and heads must be at least 1, not {self.norm_groups} and {self.heads}")
        if not 1 <= min(layers) <= max(layers) <= 32:
            raise ValueError(f"transformer_layers must be 1 to 32, not {self.transformer_layers}")
        if not 0 <= self.level_table <= 10_000:
            raise ValueError(f"level_table must be 0, or at most 10000 entries, not {self.level_table}")
        if (self.sizes > 0) != (self.pooled > 0) or self.sizes < 0 or self.sizes % 2 or self.pooled > 65536:
            raise ValueError(f"sizes and pooled go together, sizes even, not {self.sizes} and {self.pooled}")
        if self.sizes and self.pooled_text:
            raise ValueError("pooled_text and sizes do not go together: either pools the text")
        if self.pooled_text and isinstance(self.heads, tuple):
            raise ValueError("pooled_text needs one number of heads, not one per level")
        if any(w < 1 or w > 8192 or w % self.norm_groups or w % h for w, h in zip(self.widths, heads, strict=True)):
            raise ValueError(
                f"widths {self.widths} must be multiples of norm_groups {self.norm_groups} and heads {self.heads}"
            )
        if not 1 <= self.layers_per_block <= 8:
            raise ValueError("layers_per_block must be 1 to 8")

    @property
    def factor(self) -> int:
        """Grid sides must be multiples of it."""
        return 1 << (len(self.widths) - 1)


def each_level(value: Any, levels: int) -> tuple[Any, ...]:
    """A setting of every level, where it may be one for all."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * levels


class UNetShape(NamedTuple):
    """Channels of latents and width of text; channels more that the input has, of small pictures and of what is known
    around a hole, and that the output has, of a learned variance."""

    latents: int
    text_width: int
    low_res: int = 0
    known: int = 0
    variance: int = 0


def unet_shape(latents: int, text_width: int, factor: int, denoiser: DenoiserConfig, low_res: LowResConfig | None,
               inpainting: bool = False) -> UNetShape:  # fmt: skip
    """The shape of a stage's network, whose codec has `factor` pixels a cell."""
    return UNetShape(latents, text_width, 0 if low_res is None else low_res.channels(factor),
                     latents + 1 if inpainting else 0, denoiser.channels(latents) - latents)  # fmt: skip


def unet_arguments(config: UNetConfig, shape: UNetShape) -> dict[str, Any]:
    """What diffusers' class is built with."""
    table = config.level_table if shape.low_res else 0
    attends = config.self_attention
    return {
        "in_channels": shape.latents + shape.low_res + shape.known,
        "out_channels": shape.latents + shape.variance,
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in config.attention),
        "up_block_types": tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(config.attention)),
        "block_out_channels": config.widths,
        "layers_per_block": config.layers_per_block,
        "attention_head_dim": config.heads,  # diffusers' name for the number of heads
        "transformer_layers_per_block": config.transformer_layers,
        "use_linear_projection": config.linear_projection,
        "cross_attention_dim": shape.text_width,
        "norm_num_groups": config.norm_groups,
        "addition_embed_type": "text" if config.pooled_text else "text_time" if config.sizes else None,
        "addition_time_embed_dim": config.sizes or None,
        "projection_class_embeddings_input_dim": SIZES * config.sizes + config.pooled or None,
        "addition_embed_type_num_heads": config.heads if config.pooled_text else 64,
        "resnet_time_scale_shift": "scale_shift" if config.adaptive_norm else "default",
        "class_embed_type": "timestep" if shape.low_res and not table else None,
        "num_class_embeds": table or None,
        "only_cross_attention": tuple(not a for a in attends) if isinstance(attends, tuple) else not attends,
        "mid_block_type": "UNetMidBlock2D" if attends is False else "UNetMidBlock2DCrossAttn",
    }


def build_unet(config: UNetConfig, shape: UNetShape) -> UNet2DConditionModel:
    """A UNet2DConditionModel with random weights: x_t and what stands beside it, t, text (B, L, text_width) -> like
    x_t, and the variance.

    With small pictures it takes the level as `class_labels`: in thousandths, embedded as t is by weights of its own, or
    as the place in a table. Raises UserError where the heads do not divide a text width that is pooled.
    """
    if isinstance(config.heads, int) and config.pooled_text and shape.text_width % config.heads:
        raise UserError(f"unet.pooled_text: heads {config.heads} must divide the text's width {shape.text_width}")
    return UNet2DConditionModel(**unet_arguments(config, shape))
