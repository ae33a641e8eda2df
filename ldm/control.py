"""ControlNet (Zhang et al. 2023): a copy of a U-Net's first half that is told of a picture, added to the frozen U-Net.

    a picture -> control_picture -> ControlNetModel(x_t, t, text) -> residuals -> UNet2DConditionModel

A control picture is made of a picture by one function, in training and inference alike. B batch.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from diffusers.models.controlnets.controlnet import ControlNetModel
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d, interpolate, pad

from ldm.config import Config, UserError, parse, to_dict
from ldm.models.unet import UNetConfig, UNetShape, unet_arguments
from ldm.weights import NETWORK_FILE, load_network, read_json, save_network, write_json

FOLDER, SETTINGS = "controlnet", "control.json"
_COPIED = ("conv_in", "time_proj", "time_embedding", "class_embedding", "add_embedding", "down_blocks", "mid_block")


@dataclass(frozen=True)
class ControlConfig(Config):
    """What of a picture a ControlNet is told: its edges, its colours in `squares` x `squares`, or the picture shrunk
    to so many pixels a side and enlarged again, smoothly (low_res)."""

    kind: Literal["edges", "colours", "low_res"] = "edges"
    squares: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.squares <= 256:
            raise ValueError(f"squares must be from 1 to 256, not {self.squares}")


@dataclass(frozen=True)
class ControlFile(Config):
    """control.json: what the network beside it is told, and `Codec.latents_digest` of the latents it was trained in."""

    control: ControlConfig
    latents_digest: str


def control_picture(pictures: Tensor, config: ControlConfig) -> Tensor:
    """What a ControlNet is told: pictures (B, 3, H, W) in [-1, 1] -> (B, 3, H, W) in [0, 1].

    Edges are the length of Sobel's gradient of the mean colour; a step of half of the range, or more, is white.
    """
    if config.kind == "edges":
        grey = pad(pictures.mean(1, keepdim=True), [1] * 4, mode="replicate")
        across = pictures.new_tensor([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]]).view(1, 1, 3, 3) / 8
        slope = conv2d(grey, across) ** 2 + conv2d(grey, across.transpose(2, 3)) ** 2
        return (2 * slope.sqrt()).clamp(max=1).expand(-1, 3, -1, -1)
    small = adaptive_avg_pool2d(pictures, config.squares)
    mode, size = ("nearest" if config.kind == "colours" else "bicubic"), tuple(pictures.shape[-2:])
    return ((interpolate(small, size=size, mode=mode) + 1) / 2).clamp(0, 1)


def build_control(config: UNetConfig, shape: UNetShape, factor: int) -> ControlNetModel:
    """A ControlNetModel for such a U-Net in latents of `factor` pixels a cell, with random weights. It has no mask of
    the text: padding, whose states are 0, is seen as it is, in training and inference alike."""
    known = inspect.signature(ControlNetModel.__init__).parameters
    arguments = {name: value for name, value in unet_arguments(config, shape).items() if name in known}
    widths = tuple(16 * 2**k for k in range(round(math.log2(factor)) + 1))
    return ControlNetModel(**arguments, conditioning_embedding_out_channels=widths)


def copied_control(network: nn.Module, config: UNetConfig, shape: UNetShape, factor: int) -> ControlNetModel:
    """One that begins as the U-Net's own first half, and changes nothing: what it adds goes through zeros."""
    if config.sizes:
        raise UserError("control: a network that is told of sizes, as Stable Diffusion XL is, can have none here yet")
    control = build_control(config, shape, factor)
    for name in _COPIED:
        part = getattr(control, name, None)
        if isinstance(part, nn.Module):
            part.load_state_dict(getattr(network, name).state_dict())
    told = control.controlnet_cond_embedding
    for layer in (told.conv_in, *told.blocks):  # PyTorch's own beginning shrinks a picture a thousandfold on its way
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        nn.init.zeros_(layer.bias)
    return control


def save_control(control: nn.Module, file: ControlFile, folder: Path) -> None:
    """Write control.json, and controlnet/ as diffusers has it, in float16."""
    save_network(control, folder / FOLDER)
    write_json(folder / SETTINGS, to_dict(file))


def load_control(folder: Path, config: UNetConfig, shape: UNetShape, factor: int,
                 latents_digest: str) -> tuple[ControlNetModel, ControlConfig]:  # fmt: skip
    """Read a folder of `save_control`. Raises UserError where it is none, or of another network or codec."""
    file: ControlFile = parse(ControlFile, read_json(folder / SETTINGS), str(folder / SETTINGS))
    if file.latents_digest != latents_digest:
        raise UserError(f"{folder}: was trained in the latents of another codec than this model's")
    network = load_network(lambda: build_control(config, shape, factor), folder / FOLDER / NETWORK_FILE)
    return network, file.control
