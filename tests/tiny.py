"""A tiny real cascade: random weights, real classes, the layout that users have on disk."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from ldm.config import load
from ldm.denoiser import DenoiserConfig
from ldm.latents import CodecConfig, LatentCodec, Normalisation
from ldm.low_res import LowResConfig
from ldm.models.autoencoder import AutoencoderConfig
from ldm.models.unet import UNetConfig, UNetShape
from ldm.noise import NoiseScheduleConfig
from ldm.text import TextConfig, load_text_encoder
from ldm.weights import Codec
from pipelines.cascade import Cascade
from pipelines.settings import SamplingConfig, StageConfig
from pipelines.stage import Stage, build_denoiser
from tests.tiny_text import TINY
from training.diffusion import DiffusionTask
from training.tasks import RunConfig, build_task

ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "tests/data/emoji"
PIXELS = ("codec=null", "unshuffle=2", "low_res.scale=2", "low_res.residual=true")
RESOLUTION_PX = 64
CODEC = CodecConfig(
    unshuffle=4, autoencoder=AutoencoderConfig(widths=(16, 16), norm_groups=8, latent_channels=4)
)
UNET = UNetConfig(widths=(16, 32), layers_per_block=1, attention=(False, True), heads=2, norm_groups=8)


def tiny_cascade(text: TextConfig) -> Cascade:
    """One stage at 64 px with 8 x 8 latents, in memory; the same weights every time."""
    encoder = load_text_encoder(text)
    schedule, denoiser = NoiseScheduleConfig(), DenoiserConfig()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        codec = LatentCodec(CODEC).eval().requires_grad_(False)
        network = build_denoiser(UNET, schedule, denoiser, UNetShape(CODEC.latent_channels, encoder.width))
    config = StageConfig(
        name="base",
        resolution_px=RESOLUTION_PX,
        latent_channels=CODEC.latent_channels,
        text_width=encoder.width,
        unet=UNET,
        schedule=schedule,
        denoiser=denoiser,
        sampling=SamplingConfig(steps=3, rows=2),
        normalisation=Normalisation((0.1, -0.2, 0.3, 0.0), (1.5, 0.5, 1.0, 2.0)),
        codec_digest="",
        text_digest=encoder.digest,
    )
    stage = Stage(config, network.eval().requires_grad_(False), Codec(codec, ""))
    return Cascade([stage], encoder)


def save_tiny_cascade(parent: Path, kind: str) -> Path:
    """PARENT/cascade with a text encoder of `kind`, whose own folder is removed again."""
    if kind == "minilm":
        tiny_cascade(TextConfig()).save(parent / "cascade")
        return parent / "cascade"
    text = TextConfig(kind, str(TINY[kind](parent / "text_source")))  # type: ignore[arg-type]
    tiny_cascade(text).save(parent / "cascade")
    shutil.rmtree(parent / "text_source")
    return parent / "cascade"


def save_tiny_sr(parent: Path) -> Path:
    """PARENT/cascade with two SR stages of random weights: 16 -> 32 px in pixels, a residual, and 32 -> 64 px in
    latents."""
    encoder = load_text_encoder(TextConfig(kind="bert", path=str(TINY["bert"](parent / "text_source"))))
    stages = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, side, shape, residual in (
            ("middle", 32, CodecConfig(unshuffle=2, autoencoder=None), True),
            ("sr", 64, CODEC, False),
        ):
            codec = LatentCodec(shape).eval().requires_grad_(False)
            low_res = LowResConfig(scale=2, residual=residual, contrast_floor=0.02 if residual else None)
            channels = shape.latent_channels
            unet = replace(UNET, self_attention=False)
            wide = UNetShape(channels, encoder.width, low_res.channels(shape.factor))
            network = build_denoiser(unet, NoiseScheduleConfig(), DenoiserConfig(), wide)
            config = StageConfig(
                name=name,
                resolution_px=side,
                latent_channels=channels,
                text_width=encoder.width,
                unet=unet,
                schedule=NoiseScheduleConfig(),
                denoiser=DenoiserConfig(),
                sampling=SamplingConfig(steps=2, rows=2, guidance=1.0),
                normalisation=Normalisation((0.0,) * channels, (0.3,) * channels),
                codec_digest="",
                text_digest=encoder.digest,
                codec="pixels" if shape.autoencoder is None else "codec",
                low_res=low_res,
            )
            stages.append(Stage(config, network.eval().requires_grad_(False), Codec(codec, name)))
    Cascade(stages, encoder).save(parent / "cascade")
    return parent / "cascade"


def tiny_task(name: str, overrides: list[str], *more: str) -> DiffusionTask:
    """A diffusion stage of configs/tiny, untrained."""
    made = build_task(load(RunConfig, ROOT / f"configs/tiny/{name}.yaml", [*overrides, *more]))
    assert isinstance(made, DiffusionTask)
    return made
