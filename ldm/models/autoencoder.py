"""The convolutional part of a codec: diffusers' AutoencoderKL, sized by a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from ldm.config import Config


@dataclass(frozen=True)
class AutoencoderConfig(Config):
    """An AutoencoderKL on `channels` input channels; each entry of `widths` after the first halves the grid.
    quant_conv: whether a convolution of one pixel stands on both sides of the latents."""

    widths: tuple[int, ...] = (96, 192)
    layers_per_block: int = 1
    latent_channels: int = 16
    mid_attention: bool = False
    norm_groups: int = 32
    quant_conv: bool = False

    def __post_init__(self) -> None:
        if self.norm_groups < 1:
            raise ValueError(f"norm_groups must be at least 1, not {self.norm_groups}")
        if not self.widths or any(w < 1 or w > 4096 or w % self.norm_groups for w in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of norm_groups {self.norm_groups}, at most 4096")
        if not 1 <= self.latent_channels <= 256 or not 1 <= self.layers_per_block <= 8:
            raise ValueError("latent_channels must be 1 to 256 and layers_per_block 1 to 8")


def autoencoder_arguments(config: AutoencoderConfig, channels: int) -> dict[str, Any]:
    """What diffusers' class is built with."""
    levels = len(config.widths)
    return {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": config.widths,
        "layers_per_block": config.layers_per_block,
        "latent_channels": config.latent_channels,
        "norm_num_groups": config.norm_groups,
        "mid_block_add_attention": config.mid_attention,
        "use_quant_conv": config.quant_conv,
        "use_post_quant_conv": config.quant_conv,
        # a codec's scale belongs to the stage, which measures it; 1.0 keeps stock loaders from guessing SD's
        "scaling_factor": 1.0,
    }


def build_autoencoder(config: AutoencoderConfig, channels: int) -> AutoencoderKL:
    """An AutoencoderKL with random weights that maps (B, channels, H, W) to moments and back."""
    return AutoencoderKL(**autoencoder_arguments(config, channels))
