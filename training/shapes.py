"""`ldm train CONFIG --dry-run --shapes`: one step on the meta device, of a config whose networks fit no machine here.

No data, no weights, no memory: shapes of everything, counted work, and the bytes that training would need.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ldm.conditioning import Conditioning
from ldm.config import UserError, load, parse
from ldm.denoiser import Denoiser
from ldm.latents import CodecConfig, LatentCodec
from ldm.models.classifier import Classifier
from ldm.models.clip import build_clip
from ldm.models.noisy_classifier import NoisyClassifier
from ldm.models.palette import Palette
from ldm.models.sequence import SequenceTransformer
from ldm.models.unet import build_unet, unet_shape
from ldm.noise import NoiseSchedule
from ldm.text import WHOLE, TextConfig, load_text_encoder
from ldm.weights import read_json
from training.autoencoder import AutoencoderRun, hold_encoder
from training.classifier import ClassifierRun, cross_entropies
from training.clip import ClipRun, clip_step, unlock
from training.diffusion import DiffusionRun
from training.noisy_classifier import NoisyClassifierRun
from training.palette import PaletteInputs, PaletteModule, PaletteRun
from training.sequences import SequencesRun
from training.steps import autoencoder_step
from training.tasks import AnyRun, RunConfig

COPIES = 4  # of each parameter in float32: weight, gradient, AdamW's two moments; averages come on top


def check_shapes(config: AnyRun, config_path: Path) -> str:
    """One forward and backward pass of a batch on the meta device; returns what it found, in lines.

    A codec folder that is not there yet is taken from autoencoder.yaml beside the config; of a text encoder that is
    not there only `width` and `max_tokens` are needed. Raises UserError where shapes do not fit.
    """
    try:
        with FlopCounterMode(display=False) as counter:
            module, loss, lines = _STEPS[type(config)](config, config_path)
            forward = counter.get_total_flops()
            torch.autograd.backward(loss)
        work = counter.get_total_flops()
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{config_path}: the shapes do not fit: {error}") from None
    if any(p.requires_grad and p.grad is None for p in module.parameters()):
        unused = next(name for name, p in module.named_parameters() if p.requires_grad and p.grad is None)
        raise UserError(f"{config_path}: {unused} plays no part in the loss")
    parameters = sum(p.numel() for p in module.parameters())
    batch, averages = config.loop.batch, 1 + len(config.ema.powers)
    memory = 4 * parameters * (COPIES + averages)
    return "\n".join([
        f"shapes fit: {config_path}", *lines, f"{parameters / 1e6:.1f} million parameters",
        f"memory without activations: {memory / 1e9:.1f} GB for weights, gradients, optimizer and averages",
        f"work: {forward / batch / 1e9:.1f} GFLOP an image forward, {work / batch / 1e9:.1f} in training; "
        f"{work / batch * config.loop.images / 1e18:.2f} EFLOP for {config.loop.images} images",
    ])  # fmt: skip


def _autoencoder(config: AutoencoderRun, config_path: Path) -> tuple[nn.Module, Tensor, list[str]]:
    with torch.device("meta"):
        codec = LatentCodec(config.codec)
    if config.reconstruction.decoder_only:
        hold_encoder(codec)
    crop = config.reconstruction.crop_px
    pixels = torch.randn(config.loop.batch, 3, crop, crop, device="meta")
    side = crop // config.codec.factor
    noise = torch.randn(len(pixels), config.codec.latent_channels, side, side, device="meta")
    loss = autoencoder_step(codec, pixels, noise, config.reconstruction).losses[0]
    whole = config.data.size_px // config.codec.factor
    return codec, loss, [f"{config.data.size_px} px -> latents {whole} x {whole} x {config.codec.latent_channels}"]


def _diffusion(config: DiffusionRun, config_path: Path) -> tuple[nn.Module, Tensor, list[str]]:
    codec = codec_config(config, config_path)
    config.check_sizes(codec)
    width, tokens, masked = text_shape(config.text)
    low_res = config.low_res
    with torch.device("meta"):
        shape = unet_shape(codec.latent_channels, width, codec.factor, config.denoiser, low_res, config.inpainting)
        net = build_unet(config.unet, shape)
    denoiser = Denoiser(net, NoiseSchedule(config.schedule), config.denoiser)  # a schedule is needed with its values
    if denoiser.uncertainty is not None:
        denoiser.uncertainty.to("meta")
    crop = (config.upscaling.crop_px or config.data.size_px) if low_res else config.data.size_px
    batch, side = config.loop.batch, crop // codec.factor
    mask = torch.ones(batch, tokens, dtype=torch.bool, device="meta") if masked else None
    cond = Conditioning(torch.randn(batch, tokens, width, device="meta"), mask)
    if low_res:
        level = torch.zeros(batch, dtype=torch.float64)
        small_one = torch.randn(batch, shape.low_res, side, side, device="meta")
        cond = cond.join(Conditioning(low_res=small_one, level=level))
    if config.inpainting:
        cond = cond.join(Conditioning(known=torch.randn(batch, shape.known, side, side, device="meta")))
    x0 = torch.randn(batch, codec.latent_channels, side, side, device="meta")
    t = torch.full((batch,), 0.5, dtype=torch.float64)
    loss = denoiser.loss(x0, torch.randn_like(x0), t, cond).mean()
    lines = [f"latents {side} x {side} x {codec.latent_channels} of {crop} px; text {tokens} x {width}"]
    if low_res:
        small = config.data.size_px // low_res.scale
        lines.append(f"told of {small} px by {side} x {side} x {shape.low_res}; makes {config.data.size_px} px")
    return denoiser, loss, lines


def _noisy_classifier(config: NoisyClassifierRun, config_path: Path) -> tuple[nn.Module, Tensor, list[str]]:
    stage = config.load_stage()
    channels, side = stage.config.latent_channels, stage.config.resolution_px // stage.codec.module.config.factor
    with torch.device("meta"):
        network = NoisyClassifier(config.classifier, channels, dict.fromkeys(config.labels, ("a", "b")))
    batch = config.loop.batch
    wanted = {name: torch.zeros(batch, dtype=torch.long, device="meta") for name in config.labels}
    latents = torch.randn(batch, channels, side, side, device="meta")
    loss = cross_entropies(network(latents, torch.zeros(batch)), wanted, 0.0).losses[0]
    return network, loss, [f"latents {side} x {side} x {channels} -> {', '.join(config.labels)}"]


def _palette(config: PaletteRun, config_path: Path) -> tuple[nn.Module, Tensor, list[str]]:
    width, side, batch = text_shape(config.text)[0], config.data.size_px, config.loop.batch
    # for once computed, with random weights: there is no half precision to be left on the meta device
    palette = Palette(config.palette, torch.rand(config.palette.colours, 3) * 255, width)
    inputs = PaletteInputs(torch.randn(batch, 3, side, side), torch.randn(batch, width),
                           torch.zeros(batch, config.pixels, dtype=torch.long),
                           torch.rand(batch, config.pixels, 3) * 255)  # fmt: skip
    module = PaletteModule(palette, config, Conditioning())
    lines = [f"{side} px and text of {width} -> {config.palette.colours} colours, or fewer, of the data"]
    return module, module(inputs).losses[0], lines


def _classifier(config: ClassifierRun, config_path: Path) -> tuple[nn.Module, Tensor, list[str]]:
    with torch.device("meta"):
        network = Classifier(config.classifier, dict.fromkeys(config.labels, ("a", "b")))
    side, batch = config.classifier.side_px, config.loop.batch
    wanted = {name: torch.zeros(batch, dtype=torch.long, device="meta") for name in config.labels}
    pictures = torch.randn(batch, 3, side, side, device="meta")
    loss = cross_entropies(network(pictures), wanted, config.smoothing).losses[0]
    return network, loss, [f"{side} px -> {', '.join(config.labels)}; their classes are the data's, here 2 each"]


def _clip(config: ClipRun, config_path: Path) -> tuple[nn.Module, Tensor, list[str]]:
    encoder = load_text_encoder(config.text, "cpu")
    # for once computed, with random weights: a text tower looks at its mask's values, which meta tensors lack
    model = build_clip(config.clip, encoder.files["config.json"].parent)
    unlock(model, config.unlocked_layers)
    side, batch = config.clip.image_px, config.loop.batch
    pictures = torch.randn(batch, 3, side, side)
    tokens = torch.ones(batch, config.clip.max_tokens, dtype=torch.long)
    loss = clip_step(model.train(), pictures, tokens).losses[0]
    return model, loss, [f"{side} px and {config.clip.max_tokens} tokens -> {encoder.width}"]


def _sequences(config: SequencesRun, config_path: Path) -> tuple[nn.Module, Tensor, list[str]]:
    length, batch = config.mixture.length, config.loop.batch
    with torch.device("meta"):
        net = SequenceTransformer(config.transformer, length, 1, config.denoiser.channels(1))
    denoiser = Denoiser(net, NoiseSchedule(config.schedule), config.denoiser)
    if denoiser.uncertainty is not None:
        denoiser.uncertainty.to("meta")
    x0 = torch.randn(batch, 1, length, device="meta")
    loss = denoiser.loss(x0, torch.randn_like(x0), torch.full((batch,), 0.5, dtype=torch.float64), Conditioning())
    return denoiser, loss.mean(), [f"sequences of {length}"]


def codec_config(config: DiffusionRun, config_path: Path) -> CodecConfig:
    """The codec's shape: of its folder, or of the config beside this one that is to make it."""
    if config.codec is None:
        return CodecConfig(unshuffle=config.unshuffle, autoencoder=None, grey=config.grey)
    file = Path(config.codec) / "config.json"
    if file.is_file():
        found: CodecConfig = parse(CodecConfig, read_json(file), str(file))
        return found
    beside = config_path.with_name("autoencoder.yaml")
    if not beside.is_file():
        raise UserError(f"{config.codec}: no codec there, and no {beside} that would make it")
    made: Any = load(RunConfig, beside)
    return made.codec  # type: ignore[no-any-return]


def text_shape(text: TextConfig) -> tuple[int, int, bool]:
    """Width, tokens and whether padding is told apart: of the encoder, or what the config says of one not here."""
    parts = text.parts or (text,)
    if all(part.path is None or Path(part.path).is_dir() for part in parts):
        encoder = load_text_encoder(text, "cpu")
        return encoder.width, encoder.max_tokens, encoder.uses_mask
    found = []
    for part in parts:
        if part.width is None or part.max_tokens is None:
            raise UserError(f"{part.path}: no text encoder there; to check shapes without it, say its width and "
                            "max_tokens")  # fmt: skip
        found.append((part.width, part.max_tokens))
    widths, tokens = zip(*found, strict=True)
    if text.kind == "clip_pair":  # side by side, and the pooled text as one state more
        return sum(widths), max(tokens) + 1, False
    return max(widths), sum(tokens), parts[-1].kind not in WHOLE


_STEPS: dict[type, Callable[[Any, Path], tuple[nn.Module, Tensor, list[str]]]] = {
    AutoencoderRun: _autoencoder, ClassifierRun: _classifier, ClipRun: _clip, DiffusionRun: _diffusion,
    NoisyClassifierRun: _noisy_classifier, PaletteRun: _palette, SequencesRun: _sequences,
}  # fmt: skip
