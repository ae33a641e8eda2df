"""What can be trained: each run's config, and its networks put together for the loop.

    ldm train CONFIG -> RunConfig -> build_task (data -> encode -> cache, networks) -> loop.train -> RUN/final
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from ldm.conditioning import Conditioning
from ldm.config import Config, UserError, tagged
from ldm.denoiser import Denoiser, DenoiserConfig
from ldm.draws import keyed_generator
from ldm.latents import CodecConfig, LatentCodec, Normalisation
from ldm.models.unet import UNetConfig
from ldm.noise import NoiseScheduleConfig
from ldm.text import TextConfig, load_text_encoder
from ldm.weights import load_codec, save_codec, write_json
from pipelines.cascade import Cascade, SamplingConfig, Stage, StageConfig, build_denoiser
from pipelines.images import grid, save_png, to_uint8
from training.cache import Cache
from training.data import DataConfig, Reader, rows
from training.encode import encode
from training.loader import Batch
from training.loop import LoopConfig, process_state
from training.metrics import psnr, ssim
from training.optim import OptimConfig
from training.steps import (
    DiffusionInputs,
    ReconstructionConfig,
    StepResult,
    autoencoder_step,
    diffusion_inputs,
    diffusion_step,
    training_squares,
)

EVALUATION_ROWS = 16
EVALUATION_LEVELS = (10, 30, 50, 70, 90)  # hundredths of t


@dataclass(frozen=True)
class ValidationConfig(Config):
    """Held-out items: a split of the same data. Where that is the training split itself, which is so for data
    without splits, every `stride`-th item is held out of training."""

    split: str | None = "combos"
    stride: int = 20

    def __post_init__(self) -> None:
        if self.stride < 2:
            raise ValueError(f"stride must be at least 2, not {self.stride}")

    def readers(self, data: DataConfig) -> tuple[Reader, Reader]:
        """Readers of the training items and of the held-out ones, which have none in common."""
        if self.split != data.split:
            return Reader(data), Reader(replace(data, split=self.split))
        found = rows(data)
        if len(found) < 2:
            raise UserError(f"{data.path}: one sample is too few: one is held out of training")
        kept = [row for i, row in enumerate(found) if i % self.stride]
        return Reader(data, kept), Reader(data, found[:: self.stride])


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
        seen, held_out = config.validation.readers(config.data)
        with process_state().main_process_first():
            self.cache, self.held_out = encode(seen, config.cache), encode(held_out, config.cache)
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



@dataclass(frozen=True)
class PreviewConfig(Config):
    """Fixed prompts and seeds drawn before the first step and every n images, `columns` seeds each."""

    prompts: tuple[str, ...] = ()
    seed: int = 7
    columns: int = 4

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError("columns must be at least 1")


@dataclass(frozen=True)
class DiffusionRun(Config):
    """`ldm train` of a text-conditioned latent denoiser at `data.size_px`. codec: a codec folder.

    dropout: the share of items whose text is replaced by the null, for classifier-free guidance.
    """

    kind: Literal["diffusion"]
    data: DataConfig
    loop: LoopConfig
    codec: str
    cache: str = "cache"
    seed: int = 0
    validation: ValidationConfig = ValidationConfig()
    text: TextConfig = TextConfig()
    unet: UNetConfig = UNetConfig()
    schedule: NoiseScheduleConfig = NoiseScheduleConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    sampling: SamplingConfig = SamplingConfig()
    preview: PreviewConfig = PreviewConfig()
    optim: OptimConfig = OptimConfig()
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share, from 0 to below 1, not {self.dropout}")
        if self.schedule.kind == "flow" and self.denoiser.target == "eps":
            raise ValueError("denoiser.target eps does not determine x0 at t = 1 of a flow schedule: use v, x0 or flow")
        if self.schedule.kind != "flow" and self.sampling.steps > self.schedule.steps:
            raise ValueError(f"sampling.steps {self.sampling.steps} is beyond schedule.steps {self.schedule.steps}")


class DiffusionModule(nn.Module):
    """The denoiser with its training step as `forward`."""

    def __init__(self, denoiser: Denoiser, normalisation: Normalisation, null: Conditioning, dropout: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.normalisation = normalisation
        self.null = null
        self.dropout = dropout

    def forward(self, batch: Batch) -> StepResult:
        device = next(self.denoiser.parameters()).device
        drawn = diffusion_inputs(batch, self.denoiser, self.normalisation, self.null, self.dropout)
        inputs = DiffusionInputs(drawn.x0.to(device), drawn.eps.to(device), drawn.t, drawn.cond.to(device))
        return diffusion_step(self.denoiser, inputs)


class DiffusionTask:
    """Trains a text-conditioned denoiser; previews through the whole cascade, as users will run it."""

    def __init__(self, config: DiffusionRun) -> None:
        # the data first: a wrong folder is told before any network is loaded
        seen, held_out = config.validation.readers(config.data)
        device = process_state().device
        codec, text = load_codec(config.codec), load_text_encoder(config.text, device)
        codec.module.to(device)
        if config.data.size_px % codec.module.config.factor:
            raise UserError(
                f"data.size_px {config.data.size_px} must be a multiple of the codec's factor "
                f"{codec.module.config.factor}"
            )
        with process_state().main_process_first():
            self.cache = encode(seen, config.cache, codec, text)
            self.held_out = encode(held_out, config.cache, codec, text)
        self._codec, self._text, self._preview = codec, text, config.preview
        channels = codec.module.config.latent_channels
        torch.manual_seed(config.seed)
        denoiser = build_denoiser(config.unet, config.schedule, config.denoiser, channels, text.width)
        self._stage = StageConfig(
            name="base",
            resolution_px=config.data.size_px,
            latent_channels=channels,
            text_width=text.width,
            unet=config.unet,
            schedule=config.schedule,
            denoiser=config.denoiser,
            sampling=config.sampling,
            normalisation=self.cache.normalisation,
            codec_digest=codec.digest,
            text_digest=text.digest,
        )
        self.module = DiffusionModule(denoiser, self.cache.normalisation, self.cache.null, config.dropout)

    def cascade(self, module: nn.Module) -> Cascade:
        """The one-stage cascade of these weights."""
        assert isinstance(module, DiffusionModule)
        return Cascade([Stage(self._stage, module.denoiser)], self._codec, self._text)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Loss by noise level on held-out items, with the same noise every time."""
        assert isinstance(module, DiffusionModule)
        device = next(module.parameters()).device
        losses: dict[str, float] = {}
        for level in EVALUATION_LEVELS:
            total = 0.0
            for start in range(0, len(self.held_out), EVALUATION_ROWS):
                indices = range(start, min(start + EVALUATION_ROWS, len(self.held_out)))
                moments = torch.stack([self.held_out.item(i) for i in indices]).float()
                x0 = module.normalisation.apply(moments.chunk(2, dim=1)[0])
                generators = [keyed_generator(0, "evaluation", level, i) for i in indices]
                draws = [torch.randn(x0.shape[1:], generator=g) for g in generators]
                cond = self.held_out.text([self.held_out.items[i]["captions"][0] for i in indices])
                t = torch.full((len(x0),), level / 100, dtype=torch.float64)
                loss = module.denoiser.loss(x0.to(device), torch.stack(draws).to(device), t, cond.to(device))
                total += float(loss.sum())
            losses[f"loss_t{level / 100:.2f}"] = total / len(self.held_out)
        return {**losses, "loss_mean": sum(losses.values()) / len(losses)}

    def preview(self, module: nn.Module, path: Path) -> None:
        prompts, columns = self._preview.prompts, self._preview.columns
        if prompts:
            seeds = [self._preview.seed + i for i in range(columns)] * len(prompts)
            pictures = self.cascade(module)([p for p in prompts for _ in range(columns)], seeds)
            save_png(grid(list(to_uint8(pictures)), columns), path)

    def export(self, module: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        if folder.exists():
            shutil.rmtree(folder)
        self.cascade(module).save(folder)
        write_json(folder / "training.json", facts)


RunConfig = Annotated[AutoencoderRun | DiffusionRun, tagged()]


def build_task(config: AutoencoderRun | DiffusionRun) -> AutoencoderTask | DiffusionTask:
    """The task of a config: data read, caches written where missing, networks with fresh weights."""
    return AutoencoderTask(config) if isinstance(config, AutoencoderRun) else DiffusionTask(config)
