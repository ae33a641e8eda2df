"""What can be trained: each run's config, and its networks put together for the loop.

    ldm train CONFIG -> RunConfig -> build_task (data -> encode -> cache, networks) -> loop.train -> RUN/final
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from ldm.config import Config, tagged
from ldm.latents import CodecConfig, LatentCodec
from ldm.weights import save_codec, write_json
from pipelines.images import grid, save_png, to_uint8
from training.cache import Cache
from training.data import DataConfig
from training.encode import encode
from training.loader import Batch, generator
from training.loop import LoopConfig
from training.metrics import psnr, ssim
from training.optim import OptimConfig
from training.steps import ReconstructionConfig, StepResult, autoencoder_step, training_squares

EVALUATION_ROWS = 16


@dataclass(frozen=True)
class ValidationConfig(Config):
    """Held-out items: the split of the same data, and how many of it."""

    split: str | None = "combos"
    items: int = 256

    def data(self, data: DataConfig) -> DataConfig:
        return replace(data, split=self.split, limit=self.items)


@dataclass(frozen=True)
class AutoencoderRun(Config):
    """`ldm train` of an autoencoder. seed: of weights and draws; cache: folder that caches are written to."""

    kind: Literal["autoencoder"]
    data: DataConfig
    loop: LoopConfig
    cache: str = "cache"
    seed: int = 0
    validation: ValidationConfig = ValidationConfig()
    codec: CodecConfig = CodecConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    optim: OptimConfig = OptimConfig()

    def __post_init__(self) -> None:
        crop = self.reconstruction.crop_px
        if crop % self.codec.factor or self.data.size_px % crop:
            raise ValueError(
                f"reconstruction.crop_px {crop} must be a multiple of the codec's factor {self.codec.factor} and "
                f"divide data.size_px {self.data.size_px}"
            )


class AutoencoderModule(nn.Module):
    """The codec with its training step as `forward`, as the loop and data parallelism want it."""

    def __init__(self, codec: LatentCodec, config: ReconstructionConfig) -> None:
        super().__init__()
        self.codec = codec
        self.config = config

    def forward(self, batch: Batch) -> StepResult:
        device = next(self.codec.parameters()).device
        pixels = training_squares(batch, self.config).to(device)
        side = self.config.crop_px // self.codec.config.factor
        noise = batch.normal((self.codec.config.latent_channels, side, side)).to(device)
        return autoencoder_step(self.codec, pixels, noise, self.config)


class AutoencoderTask:
    """Trains a codec; evaluates the round trip through the posterior mean on held-out pictures."""

    def __init__(self, config: AutoencoderRun) -> None:
        self.cache = encode(config.data, config.cache)
        self.held_out = encode(config.validation.data(config.data), config.cache)
        torch.manual_seed(config.seed)
        self.module = AutoencoderModule(LatentCodec(config.codec), config.reconstruction)
        self._side = config.reconstruction.crop_px

    def _round_trip(self, module: nn.Module, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(module, AutoencoderModule)
        device = next(module.parameters()).device
        originals, decoded = [], []
        with torch.no_grad():
            for start in range(0, count, EVALUATION_ROWS):
                indices = range(start, min(start + EVALUATION_ROWS, count))
                pixels = torch.stack([whole_picture(self.held_out, i, self._side) for i in indices]).to(device)
                mean = module.codec.encode(pixels).chunk(2, dim=1)[0]
                originals.append(pixels.cpu())
                decoded.append(module.codec.decode(mean).cpu())
        return torch.cat(originals), torch.cat(decoded)

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        a, b = self._round_trip(module, len(self.held_out))
        return {"psnr_db": float(psnr(a, b).mean()), "ssim": float(ssim(a, b).mean()), "pictures": len(a)}

    def preview(self, module: nn.Module, path: Path) -> None:
        a, b = self._round_trip(module, min(len(self.held_out), 16))
        save_png(grid([*to_uint8(a), *to_uint8(b)], columns=len(a)), path)

    def export(self, module: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        assert isinstance(module, AutoencoderModule)
        save_codec(module.codec, folder)
        write_json(folder / "training.json", facts)


def whole_picture(cache: Cache, index: int, side_px: int) -> torch.Tensor:
    """A cached picture, area-downsampled to `side_px`: (3, side_px, side_px) in [-1, 1]."""
    pixels = cache.item(index).permute(2, 0, 1).float()
    return nn.functional.avg_pool2d(pixels, pixels.shape[-1] // side_px) / 127.5 - 1


RunConfig = AutoencoderRun


def build_task(config: Any) -> AutoencoderTask:
    """The task of a config: data read, caches written where missing, networks with fresh weights."""
    return AutoencoderTask(config)
