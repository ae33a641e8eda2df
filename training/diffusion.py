"""Training of a diffusion stage, base or SR: its config, its networks put together, its evaluation and previews."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ldm.config import Config, UserError, parse
from ldm.control import ControlConfig, control_picture
from ldm.denoiser import CELL_PX, Denoiser, DenoiserConfig, check_together
from ldm.latents import CodecConfig, LatentCodec, Normalisation, decode_rows
from ldm.lora import LoraConfig
from ldm.low_res import DegradationConfig, LowResConfig
from ldm.models.attention import attend_by
from ldm.models.unet import UNetConfig, build_unet, unet_shape
from ldm.noise import NoiseScheduleConfig
from ldm.text import TextConfig, TextEncoder, load_text_encoder
from ldm.weights import NETWORK_FILE, Codec, load_codec, load_network, read_json, write_json
from ldm.words import InversionConfig
from pipelines.cascade import Cascade
from pipelines.images import grid, save_png, to_uint8
from pipelines.settings import SamplingConfig, StageConfig
from pipelines.stage import Stage, build_denoiser
from training.cache import Items
from training.data import Reader
from training.encode import encode
from training.held_out import EVALUATION_LEVELS, errors_by_level
from training.loader import Batch, StepModule
from training.prior import Mixed, PriorConfig
from training.processes import process_state
from training.stages import StageRun, written_whole
from training.statistics import with_statistics
from training.steps import (
    DiffusionInputs,
    Frozen,
    StepResult,
    UpscalingConfig,
    diffusion_inputs,
    diffusion_step,
    planes,
    small_pictures,
)
from training.tuning import told_by, tuned

PIXELS = "pixels"  # as a codec's digest


@dataclass(frozen=True)
class PreviewConfig(Config):
    """Fixed prompts and seeds drawn before the first step and every n images, `columns` seeds each.

    Of an SR stage the prompts are those of `columns` squared held-out pictures, drawn beside their small and large
    versions, and `prompts` is not read.
    """

    prompts: tuple[str, ...] = ()
    seed: int = 7
    columns: int = 4

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError("columns must be at least 1")


@dataclass(frozen=True, kw_only=True)
class DiffusionRun(StageRun):
    """`ldm train` of a text-conditioned denoiser at `data.size_px`.

    codec: a codec folder, or null for a stage that works on pixels, `unshuffle` squared of them in a grid cell, and
    where `grey` on their mean over colours.
    dropout: the share of items whose text is replaced by the null, for classifier-free guidance.
    low_res: null for a base; upscaling: read where it is not. last: see `Frozen`. inpainting: the network is told what
    is known around a random hole, which for some items is all of the picture; pixels are cached then, and encoded anew.
    lora: train a change of low rank to the network of `init`, and write that alone. control: train a ControlNet for it,
    and write that alone; pixels are cached then too. inversion: learn a word that stands for the pictures, and write
    that alone: one of the three at most. prior: pictures of the kind to be mixed in, of a share of the items.
    posterior: train on draws of the codec's posterior, or on its means: with a codec whose posterior is wide, a network
    that learned the means makes latents free of that noise, and its own errors up to that size hardly show.
    """

    kind: Literal["diffusion"] = "diffusion"
    name: str = "base"
    codec: str | None
    unshuffle: int = 4
    grey: bool = False
    text: TextConfig = TextConfig()
    unet: UNetConfig = UNetConfig()
    schedule: NoiseScheduleConfig = NoiseScheduleConfig()
    denoiser: DenoiserConfig = DenoiserConfig()
    sampling: SamplingConfig = SamplingConfig()
    preview: PreviewConfig = PreviewConfig()
    dropout: float = 0.1
    low_res: LowResConfig | None = None
    upscaling: UpscalingConfig = UpscalingConfig()
    last: float = 0.0
    inpainting: bool = False
    posterior: Literal["draw", "mean"] = "draw"
    lora: LoraConfig | None = None
    control: ControlConfig | None = None
    inversion: InversionConfig | None = None
    prior: PriorConfig | None = None

    SHAPES = MASKS = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.bucket_px is not None and (self.inpainting or self.low_res is not None):
            raise ValueError("data.bucket_px is of a base that is not of inpainting: the others see squares")
        if self.data.transparency == "mask" and (self.low_res is not None or self.denoiser.variance == "learned"):
            raise ValueError("data.transparency as a mask is of a base's training, with denoiser.variance fixed")
        if self.inpainting and self.low_res is not None:
            raise ValueError("inpainting is of a base: a stage that enlarges is told of a small picture")
        tuned = [part for part in (self.lora, self.control, self.inversion) if part is not None]
        if tuned and self.init is None:
            raise ValueError("lora, control and inversion are of a network that has learned: say which with init")
        if len(tuned) > 1:
            raise ValueError("lora, control and inversion are trained one at a time")
        if self.prior is not None and (self.encode != "cached" or self.inversion is not None):
            raise ValueError("prior is mixed from caches, and an inversion would call it by its word: set "
                             "encode=cached and leave inversion out")  # fmt: skip
        if self.control is not None and (self.inpainting or self.low_res is not None):
            raise ValueError("control is of a base that is not of inpainting")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share, from 0 to below 1, not {self.dropout}")
        check_together(self.schedule, self.denoiser)
        if not 0 <= self.last <= 1:
            raise ValueError(f"last is a share, from 0 to 1, not {self.last:g}")
        if self.last and self.denoiser.target == "eps":
            raise ValueError("denoiser.target eps says nothing of x0 at t = 1: with `last` use v, x0 or flow")
        if self.last and self.denoiser.weighting not in ("simple", "edm", "learned"):
            raise ValueError(f"denoiser.weighting {self.denoiser.weighting} gives t = 1 next to no weight: with `last` "
                             "use simple")  # fmt: skip
        if self.last == 1 and self.sampling.steps != 1:
            raise ValueError("a network trained at t = 1 alone (last: 1) draws in one step: set sampling.steps=1")
        if self.schedule.discrete and self.sampling.steps > self.schedule.steps:
            raise ValueError(f"sampling.steps {self.sampling.steps} is beyond schedule.steps {self.schedule.steps}")
        if self.low_res is None and self.upscaling != UpscalingConfig():
            raise ValueError("upscaling is of SR stages: say how they are conditioned with low_res")
        if self.low_res is not None and self.data.size_px % self.low_res.scale:
            raise ValueError(f"data.size_px {self.data.size_px} is no multiple of low_res.scale {self.low_res.scale}")

    @property
    def caches_latents(self) -> bool:
        """Whether latents are cached, with small pictures by area beside them; for any other degradation, pixels."""
        plain = self.upscaling.degradation == DegradationConfig() and not self.inpainting and self.control is None
        return self.codec is not None and plain

    def load_frozen(self) -> tuple[Codec, TextEncoder]:
        """The codec and the text encoder, on this process's device. Raises UserError where sizes do not fit."""
        device = process_state().device
        pixels = LatentCodec(CodecConfig(unshuffle=self.unshuffle, autoencoder=None, grey=self.grey))
        codec = load_codec(self.codec) if self.codec is not None else Codec(pixels, PIXELS)
        codec.module.to(device)
        self.check_sizes(codec.module.config)
        text = load_text_encoder(self.text, device)
        if self.unet.pooled != text.pooled:
            raise UserError(f"unet.pooled {self.unet.pooled}: the text encoder pools {text.pooled} numbers")
        if self.unet.sizes and codec.module.config.factor != CELL_PX:
            raise UserError(f"unet.sizes: networks are told of them in cells of {CELL_PX} px, and the codec's have "
                            f"{codec.module.config.factor}")  # fmt: skip
        return codec, text

    def check_sizes(self, codec: CodecConfig) -> None:
        """Raise UserError where pictures or crops do not fit the grids of a codec and the U-Net."""
        factor, crop = codec.factor, self.upscaling.crop_px
        multiple = factor * self.unet.factor
        for name, side in (("data.size_px", self.data.size_px), ("upscaling.crop_px", crop),
                           ("data.bucket_px", self.data.bucket_px)):  # fmt: skip
            if side is not None and side % (multiple if name != "data.size_px" or self.low_res else factor):
                raise UserError(f"{name} {side} must be a multiple of {multiple}: {factor} px of the codec times "
                                f"{self.unet.factor} of the U-Net's levels")  # fmt: skip
        if crop is not None and crop > self.data.size_px:
            raise UserError(f"upscaling.crop_px {crop} is larger than data.size_px {self.data.size_px}")


class DiffusionModule(StepModule):
    """The denoiser with its training step as `forward`."""

    def __init__(self, denoiser: Denoiser, frozen: Frozen) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.frozen = frozen  # no module: its codec is neither trained nor saved
        beginning = {} if frozen.told is None else frozen.told.beginning
        self.text = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(v) for name, v in beginning.items()})
        encodes = frozen.inpainting or frozen.low_res is not None or frozen.control is not None
        self.ahead = frozen.codec.autoencoder is None or not encodes

    @property
    def networks(self) -> list[nn.Module]:
        return [self.denoiser.net]

    def teach(self) -> None:
        """Let the text encoder tell captions as these weights have it, if that is being learned."""
        if self.frozen.told is not None:
            self.frozen.told.learn({name.replace("/", "."): value for name, value in self.text.items()})

    def prepare(self, batch: Batch) -> DiffusionInputs:
        return diffusion_inputs(batch, self.denoiser, self.frozen)

    def forward(self, drawn: DiffusionInputs) -> StepResult:
        device = next(self.denoiser.parameters()).device
        cond = drawn.cond.to(device)
        if self.frozen.told is not None:
            self.teach()
            cond = cond.join(self.frozen.told(drawn.captions))
        opaque = None if drawn.opaque is None else drawn.opaque.to(device)
        inputs = DiffusionInputs(drawn.x0.to(device), drawn.eps.to(device), drawn.t, cond, opaque)
        return diffusion_step(self.denoiser, inputs)


class DiffusionTask:
    """Trains a text-conditioned denoiser; previews as users will run it."""

    def __init__(self, config: DiffusionRun, readers: tuple[Reader, Reader]) -> None:
        codec, text = config.load_frozen()
        latents = config.caches_latents
        scale = config.low_res.scale if config.low_res and latents else None
        self._told = told_by(config, text)
        cached = (codec if latents else None, text if self._told is None else None, scale)
        own, self.held_out = config.caches(readers, *cached)
        self.cache: Items = own
        if config.prior is not None:
            kind = replace(config.data, path=config.prior.path, split=None, caption_column=None,
                           missing_caption="auto")  # fmt: skip
            prior = encode(Reader(kind, shard_items=config.shard_items), config.cache, *cached)
            self.cache = Mixed(own, prior, config.prior.share)
        if self._told is not None:  # its states are in no cache, and it decides them all the same
            key = self.cache.manifest["key"]
            self.cache.manifest["key"] = {**key, "text": text.digest}
        self._codec, self._text, self._preview = codec, text, config.preview
        self._chosen = config.validation.chosen(self.held_out)
        shape = codec.module.config
        channels = shape.latent_channels
        network = unet_shape(channels, text.width, shape.factor, config.denoiser, config.low_res, config.inpainting)
        torch.manual_seed(config.seed)
        denoiser = build_denoiser(config.unet, config.schedule, config.denoiser, network)
        released = None
        if config.init is not None:
            file, released = _unet_file(Path(config.init), config.name), _released(Path(config.init), config.name)
            net = load_network(lambda: build_unet(config.unet, network), file)
            denoiser.net.load_state_dict(net.state_dict())
        self._control, self._tuned = config.control, tuned(config, denoiser, network, codec, text)
        unit = Normalisation(mean=(0.0,) * channels, std=(1.0,) * channels)
        frozen = Frozen(codec.module, unit, self.cache.null, config.dropout, config.low_res, config.upscaling,
                        config.last, config.inpainting, config.posterior, config.control, self._told)  # fmt: skip
        # what was learned before was learned of latents in that stage's own units
        same = released is not None and (config.codec is None or released.codec_digest == codec.digest)
        frozen = (replace(frozen, normalisation=released.normalisation) if released is not None and same
                  else with_statistics(frozen, codec.digest, own))  # fmt: skip
        self._stage = StageConfig(
            name=config.name,
            resolution_px=config.data.size_px,
            latent_channels=channels,
            text_width=text.width,
            unet=config.unet,
            schedule=config.schedule,
            denoiser=config.denoiser,
            sampling=config.sampling,
            normalisation=frozen.normalisation,
            codec_digest=codec.digest,
            text_digest=text.digest,
            codec="codec" if config.codec is not None else PIXELS,
            low_res=config.low_res,
            inpainting=config.inpainting,
            posterior=config.posterior,
            noise="keyed" if released is None else released.noise,
        )
        self.module = DiffusionModule(denoiser, frozen)

    def cascade(self, module: nn.Module) -> Cascade:
        """The one-stage cascade of these weights."""
        assert isinstance(module, DiffusionModule)
        config, schedule = self._stage, module.denoiser.schedule
        module.teach()
        if config.schedule.kind == "learned":
            config = replace(config, schedule=replace(config.schedule, knots=tuple(schedule.knots.tolist())))
        return Cascade([Stage(config, module.denoiser, self._codec)], self._text)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Unweighted loss by noise level on held-out items, with the same noise every time; of an SR stage with
        small pictures as they are."""
        assert isinstance(module, DiffusionModule)
        last = module.frozen.last
        module.teach()
        attend_by(module, self._stage.sampling.attention, process_state().device)
        levels = [*(EVALUATION_LEVELS if last < 1 else ()), *((100,) if last else ())]
        found = errors_by_level(module.denoiser, module.frozen, self.held_out, self._chosen, levels)
        losses = {f"loss_t{level / 100:.2f}": float(errors.mean()) for level, errors in found.items()}
        return {**losses, "loss_mean": sum(losses.values()) / len(losses)}

    def preview(self, module: nn.Module, path: Path) -> None:
        cascade, columns, seed = self.cascade(module), self._preview.columns, self._preview.seed
        if self._control is not None:
            self._preview_control(cascade, path)
            return
        if self._stage.low_res is None:
            prompts = self._preview.prompts
            prompts = prompts if self._told is None else tuple(map(self._told.caption, prompts))
            if prompts:
                seeds = [seed + i for i in range(columns)] * len(prompts)
                pictures = cascade([p for p in prompts for _ in range(columns)], seeds)
                save_png(grid(list(to_uint8(pictures)), columns), path)
            return
        count = min(columns**2, len(self.held_out))
        indices = [k * len(self.held_out) // count for k in range(count)]
        assert isinstance(module, DiffusionModule)
        small, large = self._pictures(indices, module.frozen)
        captions = [self.held_out.record(i)["captions"][0] for i in indices]
        drawn = cascade.draw(captions, [seed + i for i in range(count)], low_res=planes(small))[-1]
        near = interpolate(planes(small), scale_factor=self._stage.low_res.scale, mode="nearest")
        rows = [picture for trio in zip(to_uint8(near), to_uint8(drawn), large, strict=True) for picture in trio]
        save_png(grid(rows, 3 * columns), path)

    def _preview_control(self, cascade: Cascade, path: Path) -> None:
        """Held-out pictures, each beside what is told of it and what is drawn of that."""
        assert self._control is not None
        count = min(self._preview.columns, len(self.held_out))
        indices = [k * len(self.held_out) // count for k in range(count)]
        pictures = planes(self.held_out.stored(indices))
        told = control_picture(pictures, self._control)
        cascade.stages[0].control = told
        drawn = cascade([self.held_out.record(i)["captions"][0] for i in indices], range(len(indices)))
        rows = zip(*(to_uint8(p) for p in (pictures, told * 2 - 1, drawn)), strict=True)
        save_png(grid([picture for row in rows for picture in row], 3), path)

    def _pictures(self, indices: Sequence[int], frozen: Frozen) -> tuple[Tensor, np.ndarray[Any, Any]]:
        """Small pictures (B, s, s, 3) uint8 and large ones, of latents their decoding."""
        stored = self.held_out.stored(indices)
        small = small_pictures(self.held_out, indices, stored, frozen)
        assert small is not None
        if stored.dtype == torch.uint8:
            return small, stored.numpy()
        return small, to_uint8(decode_rows(frozen.codec, stored.float().chunk(2, 1)[0], 1))

    def export(self, module: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        assert isinstance(module, DiffusionModule)
        with written_whole(folder) as partial:
            if self._tuned is not None:
                self._tuned.save(module, partial)
            else:
                self.cascade(module).save(partial)
            write_json(partial / "training.json", facts)


def _unet_file(folder: Path, name: str) -> Path:
    """The U-Net's weights in a cascade, stage or diffusers U-Net folder."""
    inside = (f"{name}/unet", "unet", ".")
    files = [folder / part / NETWORK_FILE for part in inside]
    return next((file for file in files if file.is_file()), files[0])


def _released(folder: Path, name: str) -> StageConfig | None:
    """What is said of the stage that such weights were released with; None where they stand alone."""
    file = next((f for f in (folder / name / "stage.json", folder / "stage.json") if f.is_file()), None)
    return None if file is None else parse(StageConfig, read_json(file), str(file))
