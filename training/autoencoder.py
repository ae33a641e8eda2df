"""Training of a codec: cached pixels -> crops -> autoencoder_step; evaluated by the round trip of held-out pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.config import UserError, to_dict
from ldm.latents import ENCODER, CodecConfig, LatentCodec
from ldm.weights import load_codec, save_codec, write_json
from pipelines.images import grid, save_png, to_uint8
from training.cache import Cache
from training.data import Reader
from training.features import Features
from training.loader import Batch, StepModule
from training.metrics import psnr, ssim
from training.stages import EVALUATION_ROWS, StageRun, written_whole
from training.steps import ReconstructionConfig, StepResult, autoencoder_step, training_squares


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun(StageRun):
    """`ldm train` of an autoencoder."""

    kind: Literal["autoencoder"] = "autoencoder"
    codec: CodecConfig = CodecConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codec.autoencoder is None:
            raise ValueError("codec.autoencoder is null: pixels need no training")
        if self.reconstruction.decoder_only and self.init is None:
            raise ValueError("reconstruction.decoder_only keeps an encoder that has learned: say which with init")
        crop = self.reconstruction.crop_px
        if crop % self.codec.factor or self.data.size_px % crop:
            raise ValueError(
                f"reconstruction.crop_px {crop} must be a multiple of the codec's factor {self.codec.factor} and "
                f"divide data.size_px {self.data.size_px}"
            )


@dataclass
class Perception:
    """What an autoencoder's loss sees with: never trained, saved or averaged."""

    features: Features | None

    def on(self, device: torch.device) -> Features | None:
        return None if self.features is None else self.features.to(device)

    def __deepcopy__(self, memo: object) -> Perception:
        """Itself: averages of a module share it."""
        return self


class AutoencoderModule(StepModule):
    """The codec with its training step as `forward`, as the loop and data parallelism want it."""

    def __init__(self, codec: LatentCodec, config: ReconstructionConfig) -> None:
        super().__init__()
        self.codec = codec
        self.config = config
        self.frozen = Perception(Features() if config.perceptual else None)

    @property
    def networks(self) -> list[nn.Module]:
        own: Any = self.codec.autoencoder
        return [own.encoder, own.decoder]

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        side = self.config.crop_px // self.codec.config.factor
        return training_squares(batch, self.config), batch.normal((self.codec.config.latent_channels, side, side))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> StepResult:
        device = self.codec.device
        pixels, noise = (each.to(device) for each in inputs)
        return autoencoder_step(self.codec, pixels, noise, self.config, self.frozen.on(device))


class AutoencoderTask:
    """Trains a codec; evaluates the round trip through the posterior mean on held-out pictures."""

    def __init__(self, config: AutoencoderRun, readers: tuple[Reader, Reader]) -> None:
        self.cache, self.held_out = config.caches(readers)
        torch.manual_seed(config.seed)
        codec = LatentCodec(config.codec)
        if config.init is not None:
            released = load_codec(config.init).module
            if released.config != config.codec:
                raise UserError(f"init: {config.init} holds another codec than the config's codec section: "
                                f"{to_dict(released.config)}")  # fmt: skip
            codec.load_state_dict(released.state_dict())
        if config.reconstruction.decoder_only:
            hold_encoder(codec)
        self.module = AutoencoderModule(codec, config.reconstruction)
        self._side, self._chosen = config.reconstruction.crop_px, config.validation.chosen(self.held_out)

    def _round_trip(self, module: nn.Module, chosen: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(module, AutoencoderModule)
        device = next(module.parameters()).device
        originals, decoded = [], []
        with torch.no_grad():
            for start in range(0, len(chosen), EVALUATION_ROWS):
                pixels = whole_pictures(self.held_out, chosen[start : start + EVALUATION_ROWS], self._side).to(device)
                mean = module.codec.encode(pixels).chunk(2, dim=1)[0]
                originals.append(pixels.cpu())
                decoded.append(module.codec.decode(mean).cpu())
        return torch.cat(originals), torch.cat(decoded)

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        a, b = self._round_trip(module, self._chosen)
        return {"psnr_db": float(psnr(a, b).mean()), "ssim": float(ssim(a, b).mean()), "pictures": len(a)}

    def preview(self, module: nn.Module, path: Path) -> None:
        a, b = self._round_trip(module, range(min(len(self.held_out), 16)))
        save_png(grid([*to_uint8(a), *to_uint8(b)], columns=len(a)), path)

    def export(self, module: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        assert isinstance(module, AutoencoderModule)
        with written_whole(folder) as partial:
            save_codec(module.codec, partial)
            write_json(partial / "training.json", facts)


def hold_encoder(codec: LatentCodec) -> None:
    """Let training change the decoder alone."""
    for name, parameter in codec.named_parameters():
        parameter.requires_grad_(not name.startswith(ENCODER))


def whole_pictures(cache: Cache, indices: Sequence[int], side_px: int) -> torch.Tensor:
    """Cached pictures, area-downsampled to `side_px`: (B, 3, side_px, side_px) in [-1, 1]."""
    pixels = cache.stored(indices).permute(0, 3, 1, 2).float()
    return nn.functional.avg_pool2d(pixels, pixels.shape[-1] // side_px) / 127.5 - 1
