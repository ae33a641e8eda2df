"""What can be trained: each run's config, and its networks put together for the loop.

    ldm train CONFIG -> RunConfig -> build_task (data -> encode -> cache, networks) -> loop.train -> RUN/final
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import nn

from ldm.conditioning import Conditioning
from ldm.config import Config, UserError, tagged, to_dict
from ldm.denoiser import Denoiser, DenoiserConfig
from ldm.draws import keyed_generator
from ldm.latents import CodecConfig, LatentCodec, Normalisation
from ldm.models.unet import UNetConfig, build_unet
from ldm.noise import NoiseScheduleConfig
from ldm.text import TextConfig, TextEncoder, load_text_encoder
from ldm.weights import NETWORK_FILE, Codec, load_codec, load_network, save_codec, write_json
from pipelines.cascade import Cascade, SamplingConfig, Stage, StageConfig, build_denoiser
from pipelines.images import grid, save_png, to_uint8
from training.cache import Cache
from training.data import DataConfig, Reader
from training.ema import EmaConfig
from training.encode import encode
from training.engine import LoopConfig
from training.files import temporary
from training.loader import Batch
from training.metrics import psnr, ssim
from training.online import Online
from training.optim import OptimConfig
from training.processes import process_state
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

    def readers(self, data: DataConfig, shard_items: int) -> tuple[Reader, Reader]:
        """Readers of the training items and of the held-out ones, which have none in common."""
        seen = Reader(data, shard_items=shard_items)
        if self.split == data.split:
            return seen.hold_out(self.stride)
        return seen, Reader(replace(data, split=self.split), shard_items=shard_items)


@dataclass(frozen=True, kw_only=True)
class StageRun(Config):
    """What every `ldm train` says.

    seed: of weights and draws. cache: folder that caches are written to; encode: `cached` computes what never
    changes once, `online` in each step; shard_items: items of a cache's shard. init: a folder of released weights
    to start from, with fresh averages and optimizer.
    """

    data: DataConfig
    loop: LoopConfig
    cache: str = "cache"
    encode: Literal["cached", "online"] = "cached"
    shard_items: int = 4096
    init: str | None = None
    seed: int = 0
    validation: ValidationConfig = ValidationConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()

    def __post_init__(self) -> None:
        if self.shard_items < 1:
            raise ValueError("shard_items must be at least 1")

    def caches(self, readers: tuple[Reader, Reader], codec: Codec | None = None,
               text: TextEncoder | None = None) -> tuple[Cache | Online, Cache]:  # fmt: skip
        """The training items, and the held-out ones. Called by all processes."""
        held_out = encode(readers[1], self.cache, codec, text)
        if self.encode == "online":
            return Online(readers[0], codec, text), held_out
        return encode(readers[0], self.cache, codec, text), held_out


@dataclass(frozen=True, kw_only=True)
class AutoencoderRun(StageRun):
    """`ldm train` of an autoencoder."""

    kind: Literal["autoencoder"] = "autoencoder"
    codec: CodecConfig = CodecConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
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
        self.cache, self.held_out = config.caches(load_parts(config)[0])
        torch.manual_seed(config.seed)
        codec = LatentCodec(config.codec)
        if config.init is not None:
            released = load_codec(config.init).module
            if released.config != config.codec:
                raise UserError(f"init: {config.init} holds another codec than the config's codec section: "
                                f"{to_dict(released.config)}")  # fmt: skip
            codec.load_state_dict(released.state_dict())
        self.module = AutoencoderModule(codec, config.reconstruction)
        self._side = config.reconstruction.crop_px

    def _round_trip(self, module: nn.Module, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert isinstance(module, AutoencoderModule)
        device = next(module.parameters()).device
        originals, decoded = [], []
        with torch.no_grad():
            for start in range(0, count, EVALUATION_ROWS):
                indices = list(range(start, min(start + EVALUATION_ROWS, count)))
                pixels = whole_pictures(self.held_out, indices, self._side).to(device)
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
        with written_whole(folder) as partial:
            save_codec(module.codec, partial)
            write_json(partial / "training.json", facts)


def whole_pictures(cache: Cache, indices: list[int], side_px: int) -> torch.Tensor:
    """Cached pictures, area-downsampled to `side_px`: (B, 3, side_px, side_px) in [-1, 1]."""
    pixels = cache.stored(indices).permute(0, 3, 1, 2).float()
    return nn.functional.avg_pool2d(pixels, pixels.shape[-1] // side_px) / 127.5 - 1


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `folder` once filled; one that is there is kept until then."""
    partial = temporary(folder)
    try:
        yield partial
        if folder.exists():
            old = folder.rename(temporary(folder))
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)



@dataclass(frozen=True)
class PreviewConfig(Config):
    """Fixed prompts and seeds drawn before the first step and every n images, `columns` seeds each."""

    prompts: tuple[str, ...] = ()
    seed: int = 7
    columns: int = 4

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError("columns must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DiffusionRun(StageRun):
    """`ldm train` of a text-conditioned latent denoiser at `data.size_px`. codec: a codec folder.

    dropout: the share of items whose text is replaced by the null, for classifier-free guidance.
    """

    kind: Literal["diffusion"] = "diffusion"
    codec: str
    text: TextConfig = TextConfig()
    unet: UNetConfig = UNetConfig()
    schedule: NoiseScheduleConfig = NoiseScheduleConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    sampling: SamplingConfig = SamplingConfig()
    preview: PreviewConfig = PreviewConfig()
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
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
        readers, codec, text = load_parts(config)
        assert codec is not None and text is not None  # noqa: PT018
        self.cache, self.held_out = config.caches(readers, codec, text)
        self._codec, self._text, self._preview = codec, text, config.preview
        channels = codec.module.config.latent_channels
        torch.manual_seed(config.seed)
        denoiser = build_denoiser(config.unet, config.schedule, config.denoiser, channels, text.width)
        if config.init is not None:
            net = load_network(lambda: build_unet(config.unet, channels, text.width), _unet_file(Path(config.init)))
            denoiser.net.load_state_dict(net.state_dict())
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
        """Unweighted loss by noise level on held-out items, with the same noise every time."""
        assert isinstance(module, DiffusionModule)
        device = next(module.parameters()).device
        losses: dict[str, float] = {}
        for level in EVALUATION_LEVELS:
            total = 0.0
            for start in range(0, len(self.held_out), EVALUATION_ROWS):
                indices = range(start, min(start + EVALUATION_ROWS, len(self.held_out)))
                moments = self.held_out.stored(list(indices)).float()
                x0 = module.normalisation.apply(moments.chunk(2, dim=1)[0])
                generators = [keyed_generator(0, "evaluation", level, i) for i in indices]
                draws = [torch.randn(x0.shape[1:], generator=g) for g in generators]
                cond = self.held_out.text([self.held_out.captions(i)[0] for i in indices])
                t = torch.full((len(x0),), level / 100, dtype=torch.float64)
                error = module.denoiser.error(x0.to(device), torch.stack(draws).to(device), t, cond.to(device))
                total += float(error.sum())
            losses[f"loss_t{level / 100:.2f}"] = total / len(self.held_out)
        return {**losses, "loss_mean": sum(losses.values()) / len(losses)}

    def preview(self, module: nn.Module, path: Path) -> None:
        prompts, columns = self._preview.prompts, self._preview.columns
        if prompts:
            seeds = [self._preview.seed + i for i in range(columns)] * len(prompts)
            pictures = self.cascade(module)([p for p in prompts for _ in range(columns)], seeds)
            save_png(grid(list(to_uint8(pictures)), columns), path)

    def export(self, module: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        with written_whole(folder) as partial:
            self.cascade(module).save(partial)
            write_json(partial / "training.json", facts)


def _unet_file(folder: Path) -> Path:
    """The U-Net's weights in a cascade, stage or diffusers U-Net folder."""
    inside = ("base/unet", "unet", ".")
    files = [folder / part / NETWORK_FILE for part in inside]
    return next((file for file in files if file.is_file()), files[0])


RunConfig = Annotated[AutoencoderRun | DiffusionRun, tagged()]


def load_parts(config: AutoencoderRun | DiffusionRun) -> tuple[tuple[Reader, Reader], Codec | None, TextEncoder | None]:
    """Readers of training and held-out items, and the frozen networks that encode them, on this process's device."""
    # the data first: a wrong folder is told before any network is loaded
    readers = config.validation.readers(config.data, config.shard_items)
    if isinstance(config, AutoencoderRun):
        return readers, None, None
    device = process_state().device
    codec, text = load_codec(config.codec), load_text_encoder(config.text, device)
    codec.module.to(device)
    factor = codec.module.config.factor
    if config.data.size_px % factor:
        raise UserError(f"data.size_px {config.data.size_px} must be a multiple of the codec's factor {factor}")
    return readers, codec, text


def build_task(config: AutoencoderRun | DiffusionRun) -> AutoencoderTask | DiffusionTask:
    """The task of a config: data read, caches written where missing, networks with fresh weights or those of `init`.

    Called by all processes of a launch.
    """
    return AutoencoderTask(config) if isinstance(config, AutoencoderRun) else DiffusionTask(config)
