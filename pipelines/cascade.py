"""Stage and Cascade: text -> base -> (SR ...) -> pixels.

    prompts -> TextEncoder -> Conditioning -> per stage: noise of each image -> sampler(guided denoiser) -> latents
            -> Normalisation.invert -> LatentCodec.decode -> pixels

A cascade folder: cascade.json, codec/, text/ (unless the text encoder is the packaged one), and per stage a folder
with stage.json and unet/.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.config import Config, UserError, parse, to_dict
from ldm.denoiser import Denoiser, DenoiserConfig
from ldm.draws import keyed_generator
from ldm.guidance import ClassifierFreeGuidance
from ldm.latents import LatentCodec, Normalisation
from ldm.models.unet import UNetConfig, build_unet
from ldm.noise import NoiseSchedule, NoiseScheduleConfig, uniform_grid
from ldm.sampling import SAMPLERS
from ldm.text import TextConfig, TextEncoder, load_text_encoder
from ldm.weights import (
    NETWORK_FILE,
    Codec,
    check_weights_file,
    codec_digest,
    folder_digest,
    load_codec,
    load_network,
    read_json,
    save_codec,
    save_network,
    write_json,
)

FORMAT = 1
MAX_STEPS = 1000
MAX_GUIDANCE = 100.0


@dataclass(frozen=True)
class SamplingConfig(Config):
    """How a stage is sampled. guidance is w of classifier-free guidance, 1 for none.

    rows: pictures per network call, whatever the batch: other shapes give other last bits.
    """

    sampler: Literal["ddpm", "ddim", "dpmpp_2m"] = "dpmpp_2m"
    steps: int = 20
    guidance: float = 3.0
    rows: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"steps must be from 1 to {MAX_STEPS}, not {self.steps}")
        if not 0 <= self.guidance <= MAX_GUIDANCE:
            raise ValueError(f"guidance must be from 0 to {MAX_GUIDANCE:g} (1 is none), not {self.guidance}")
        if not 1 <= self.rows <= 1024:
            raise ValueError(f"rows must be from 1 to 1024, not {self.rows}")


@dataclass(frozen=True)
class StageConfig(Config):
    """stage.json: everything but the weights. The digests say which codec and text encoder it was trained with."""

    name: str
    resolution_px: int
    latent_channels: int
    text_width: int
    unet: UNetConfig
    schedule: NoiseScheduleConfig
    denoiser: DenoiserConfig
    sampling: SamplingConfig
    normalisation: Normalisation
    codec_digest: str
    text_digest: str


@dataclass(frozen=True)
class CascadeConfig(Config):
    """cascade.json: stages in order and the shared parts."""

    format: int
    stages: tuple[str, ...]
    text: TextConfig

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"cascade format {self.format}; this version reads {FORMAT}")
        if not self.stages or any(not name.isidentifier() for name in self.stages):
            raise ValueError(f"stages must be plain folder names, not {self.stages}")
        if len(self.stages) > 1:
            raise ValueError(f"stages {self.stages}: this version draws cascades of one stage")


@dataclass
class Stage:
    """A denoiser with its statistics and sampling defaults. Base and SR stages are this class."""

    config: StageConfig
    denoiser: Denoiser

    @torch.no_grad()
    def sample(self, cond: Conditioning, null: Conditioning, seeds: Sequence[int], side: int,
               sampling: SamplingConfig, on_step: Callable[[int, int], None] | None = None) -> Tensor:  # fmt: skip
        """Raw latents (B, C, side, side) for B conditionings and seeds, `sampling.rows` at a time."""
        parts = []
        for start in range(0, len(seeds), sampling.rows):
            chunk = list(seeds[start : start + sampling.rows])
            index = torch.tensor([*range(start, start + len(chunk)), *[start] * (sampling.rows - len(chunk))])
            full = chunk + [chunk[0]] * (sampling.rows - len(chunk))
            parts.append(self._sample_rows(cond[index], null, full, side, sampling, on_step)[: len(chunk)])
        return self.config.normalisation.invert(torch.cat(parts))

    def _sample_rows(self, cond: Conditioning, null: Conditioning, seeds: list[int], side: int,
                     sampling: SamplingConfig, on_step: Callable[[int, int], None] | None) -> Tensor:  # fmt: skip
        device = next(self.denoiser.parameters()).device
        generators = [keyed_generator(seed, self.config.name, "sampler") for seed in seeds]

        def noise(like: Tensor) -> Tensor:
            draws = [torch.randn(like.shape[1:], generator=g) for g in generators]
            return torch.stack(draws).to(like)

        starts = [keyed_generator(seed, self.config.name, "start") for seed in seeds]
        shape = (self.config.latent_channels, side, side)
        schedule = self.denoiser.schedule
        grid = uniform_grid(sampling.steps, schedule)
        scale = schedule.alpha_sigma(grid[:1])[1].float().to(device)
        x = scale * torch.stack([torch.randn(shape, generator=g) for g in starts]).to(device)
        guided = ClassifierFreeGuidance(self.denoiser, sampling.guidance, null.to(device))
        bound = cond.to(device)
        sampler = SAMPLERS[sampling.sampler]
        return sampler(lambda x, t: guided(x, t, bound), x, grid, noise, schedule=schedule, on_step=on_step)


@dataclass
class Cascade:
    """Stages in order with their shared codec and text encoder."""

    stages: list[Stage]
    codec: Codec
    text: TextEncoder
    digest: str = ""

    def sampling(self, steps: int | None = None, guidance: float | None = None) -> list[SamplingConfig]:
        """Each stage's sampling, with the given values in place of its defaults.

        Raises UserError for values out of range, and for more steps than the schedule has.
        """
        given = {"steps": steps, "guidance": guidance}
        changed = {k: v for k, v in given.items() if v is not None}
        found = []
        for stage in self.stages:
            merged = {**to_dict(stage.config.sampling), **changed}
            found.append(parse(SamplingConfig, merged, f"sampling of {stage.config.name}"))
            try:
                uniform_grid(found[-1].steps, stage.denoiser.schedule)
            except ValueError as error:
                raise UserError(str(error)) from None
        return found

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sequence[SamplingConfig] | None = None,
                 on_step: Callable[[int, int], None] | None = None) -> Tensor:  # fmt: skip
        """Pictures (B, 3, H, W) in [-1, 1], not clipped, on the CPU: one per prompt and seed.

        A picture depends on its prompt, its seed and the sampling only, never on its companions.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"one seed per prompt is needed: {len(prompts)} prompts, {len(seeds)} seeds")
        with torch.no_grad():
            cond, null = Conditioning(*self.text.encode(prompts)), Conditioning(*self.text.encode([""]))
            for stage, options in zip(self.stages, sampling or self.sampling(), strict=True):
                side = stage.config.resolution_px // self.codec.module.config.factor
                raw = stage.sample(cond, null, seeds, side, options, on_step)
            return decode_rows(self.codec.module, raw, options.rows)

    def recipe(self, prompt: str, seed: int, sampling: Sequence[SamplingConfig]) -> dict[str, Any]:
        """What makes a picture again: no time, path, host or number of companions."""
        stages = [{"name": s.config.name, **to_dict(o)} for s, o in zip(self.stages, sampling, strict=True)]
        return {"prompt": prompt, "seed": seed, "model": self.digest, "stages": stages}

    def save(self, folder: Path) -> None:
        """Write the cascade as a folder, complete or not at all. Raises UserError where one exists."""
        if folder.exists():
            raise UserError(f"{folder}: exists; a cascade is not written over")
        partial = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        partial.mkdir(parents=True)
        save_codec(self.codec.module, partial / "codec")
        text = self.text.config
        if text.kind != "minilm":
            (partial / "text").mkdir()
            for name, path in self.text.files.items():
                shutil.copyfile(path, partial / "text" / name)
            text = replace(text, path="text")
        for stage in self.stages:
            save_network(stage.denoiser.net, partial / stage.config.name / "unet")
            config = replace(stage.config, codec_digest=codec_digest(partial / "codec"))
            write_json(partial / stage.config.name / "stage.json", to_dict(config))
        names = tuple(s.config.name for s in self.stages)
        write_json(partial / "cascade.json", to_dict(CascadeConfig(FORMAT, names, text)))
        os.replace(partial, folder)


@torch.no_grad()
def decode_rows(codec: LatentCodec, raw: Tensor, rows: int) -> Tensor:
    """Decode raw latents (B, C, h, w) `rows` at a time, the last call padded -> pixels (B, 3, H, W) on the CPU."""
    parts = []
    raw = raw.to(next(codec.parameters()).device)
    for start in range(0, len(raw), rows):
        part = raw[start : start + rows]
        padded = torch.cat([part, part[:1].expand(rows - len(part), *part.shape[1:])])
        parts.append(codec.decode(padded)[: len(part)].cpu())
    return torch.cat(parts)


def build_denoiser(unet: UNetConfig, schedule: NoiseScheduleConfig, denoiser: DenoiserConfig,
                   latent_channels: int, text_width: int) -> Denoiser:  # fmt: skip
    """A denoiser with random weights for latents of `latent_channels`."""
    return Denoiser(build_unet(unet, latent_channels, text_width), NoiseSchedule(schedule), denoiser)


def load_cascade(folder: str | Path, device: torch.device | str = "cpu") -> Cascade:
    """Read a cascade folder. Raises UserError where it is not one, is damaged, or its parts do not belong
    together."""
    folder = Path(folder)
    if not (folder / "cascade.json").is_file():
        check_weights_file(folder if folder.is_file() else folder / "cascade.json")
    config = parse(CascadeConfig, read_json(folder / "cascade.json"), str(folder / "cascade.json"))
    codec = load_codec(folder / "codec")
    text_config = config.text if config.text.path is None else replace(config.text, path=str(folder / "text"))
    text = load_text_encoder(text_config, device)
    stages = [_load_stage(folder / name, codec, text, device) for name in config.stages]
    codec.module.to(device)
    digest = folder_digest(folder, "cascade.json", "codec", "text", *config.stages)
    return Cascade(stages, codec, text, digest)


def _load_stage(folder: Path, codec: Codec, text: TextEncoder, device: torch.device | str) -> Stage:
    config = parse(StageConfig, read_json(folder / "stage.json"), str(folder / "stage.json"))
    for part, mine, found in (("codec", config.codec_digest, codec.digest), ("text", config.text_digest, text.digest)):
        if mine != found:
            raise UserError(
                f"{folder}: was trained with another {part} ({mine[:12]}) than the one beside it ({found[:12]}); "
                "put back the folder as it was saved"
            )
    net = load_network(
        lambda: build_unet(config.unet, config.latent_channels, config.text_width), folder / "unet" / NETWORK_FILE
    )
    return Stage(config, Denoiser(net, NoiseSchedule(config.schedule), config.denoiser).to(device).eval())
