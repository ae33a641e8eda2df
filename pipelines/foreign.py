"""Pipeline folders of diffusers as cascades of one stage, and back.

    model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/ -> ldm.interop -> Stage -> Cascade
    Cascade -> stock components -> save_pretrained

Read: Stable Diffusion 1.x, 2.x and XL, and the x4 upscaler, as bases and as an SR stage. Weights are safetensors.
"""

from __future__ import annotations

import copy
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import nn

from ldm.conditioning import Conditioning
from ldm.config import UserError
from ldm.denoiser import CELL_PX, Denoiser, to_target
from ldm.draws import keyed_generator
from ldm.interop import read_autoencoder, read_schedule, read_scheduler, read_unet, write_scheduler
from ldm.latents import CodecConfig, LatentCodec
from ldm.low_res import LowResConfig
from ldm.models.autoencoder import build_autoencoder
from ldm.models.unet import build_unet
from ldm.noise import NoiseSchedule, per_item
from ldm.pair_text import PairTextEncoder
from ldm.text import TextConfig, TextEncoder, load_text_encoder
from ldm.text_config import TextPart
from ldm.weights import NETWORK_FILE, Codec, folder_digest, load_network, read_json
from pipelines.cascade import Cascade
from pipelines.settings import SamplingConfig, StageConfig
from pipelines.stage import Stage

INDEX = "model_index.json"
BASE, XL, UPSCALER = "StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusionUpscalePipeline"
# steps, guidance and the level of the small picture's noise, as the stock pipelines have them by default
_DEFAULTS: dict[str, dict[str, Any]] = {
    BASE: {"steps": 50, "guidance": 7.5, "rows": 1},
    XL: {"steps": 50, "guidance": 5.0, "rows": 1},
    UPSCALER: {"steps": 75, "guidance": 9.0, "rows": 1, "level": 20},
}
_GIVES_BACK = 0.8
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_PARTS = (*("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"),
          *("scheduler", "low_res_scheduler"))  # fmt: skip


def load_pipeline(folder: str | Path, device: torch.device | str = "cpu") -> Cascade:
    """Read a pipeline folder of diffusers. `notes` of the cascade tell what is drawn otherwise than there.

    Raises UserError where the pipeline, or a part of it, is none that is built here, or is damaged.
    """
    folder = Path(folder)
    index, kind = _index(folder)
    unused = [name for name in _UNUSED if (index.get(name) or [None])[0]]
    said = read_scheduler(_part(folder, "scheduler", "scheduler_config.json"), f"{folder}/scheduler")
    unet, shape = read_unet(_part(folder, "unet", "config.json"), f"{folder / 'unet'}")
    codec, normalisation = _read_codec(folder, device)
    text = _text(folder, index, kind, device)
    low_res, sampling = _low_res(folder, kind, codec.module.config.factor), dict(_DEFAULTS[kind])
    if low_res is not None:
        sampling["level"] = (sampling["level"] + 1) / low_res.levels.steps
    wanted = 0 if low_res is None else low_res.channels(codec.module.config.factor)
    if shape.low_res != wanted:
        raise UserError(f"{folder / 'unet'}: in_channels are {shape.latents + shape.low_res}, of a {kind} they are "
                        f"{shape.latents + wanted}: networks for inpainting are not read")  # fmt: skip
    for what, own, found in (("latents", shape.latents, codec.module.config.latent_channels),
                             ("text width", shape.text_width, text.width),
                             ("pooled text's width", unet.pooled, text.pooled),
                             ("pixels a cell", CELL_PX if unet.sizes else codec.module.config.factor,
                              codec.module.config.factor)):  # fmt: skip
        if own != found:
            raise UserError(f"{folder}: the {what} of unet/ is {own}, that of the part beside it {found}")
    try:
        side = _part(folder, "unet", "config.json").get("sample_size") or 64
        config = StageConfig(
            name="base" if low_res is None else "sr", resolution_px=side * codec.module.config.factor,
            latent_channels=shape.latents, text_width=text.width, unet=unet, schedule=said.schedule,
            denoiser=said.denoiser, sampling=SamplingConfig(**sampling, **said.sampling), normalisation=normalisation,
            codec_digest=codec.digest, text_digest=text.digest, low_res=low_res, noise="in_order",
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from None
    net = load_network(lambda: build_unet(unet, shape), folder / "unet" / NETWORK_FILE)
    denoiser = Denoiser(net, NoiseSchedule(said.schedule), said.denoiser).to(device).eval()
    notes = [*said.notes, *([f"{', '.join(unused)}: not used"] if unused else [])]
    return Cascade([Stage(config, denoiser, codec)], text, folder_digest(folder, INDEX, *_PARTS), notes=tuple(notes))


@torch.no_grad()
def check_target(cascade: Cascade) -> str | None:
    """What speaks against the prediction that the scheduler of a base names; one call of the network tells.

    At the last time almost all of x_t is noise, so that a trained network of eps gives back what it gets, and one of v
    or x0, all but minus x0 or x0, does not. Raises UserError where a network that gives it back is called one of v or
    x0; that one of eps does not may also be for want of training, and is said.
    """
    stage = cascade.stages[0]
    target, factor = stage.denoiser.config.target, stage.codec.module.config.factor
    if stage.config.low_res is not None:
        return None
    side = stage.config.resolution_px // factor
    x = torch.randn(1, stage.config.latent_channels, side, side, generator=keyed_generator("check target"))
    x, t = x.to(stage.device), torch.ones(1, dtype=torch.float64, device=stage.device)
    alpha, sigma = (per_item(c, x) for c in stage.denoiser.schedule.alpha_sigma(t))
    found = stage.denoiser.predict(x, t, Conditioning(*cascade.text.encode([""])).to(stage.device))
    out = to_target(target, found.x0, found.eps, alpha, sigma)
    share = float(torch.corrcoef(torch.stack([out.flatten(), x.flatten()]))[0, 1])
    told = f"on noise alone unet/ gives out what it gets to a correlation of {share:.2f}"
    if target != "eps" and share > _GIVES_BACK:
        raise UserError(f"{told}, as a network of eps does, and scheduler/ calls it one of {target}: set "
                        "prediction_type to epsilon in scheduler/scheduler_config.json")  # fmt: skip
    if target == "eps" and share < _GIVES_BACK / 2:
        return (f"{told}; a trained network of eps gives it back: if pictures are wrong, set prediction_type to "
                "v_prediction in scheduler/scheduler_config.json")  # fmt: skip
    return None


def load_pipeline_text(folder: Path) -> TextEncoder:
    """The text encoder alone of a pipeline folder. Raises UserError where it is none that is read here."""
    return _text(folder, *_index(folder), "cpu")


def pipeline_class(folder: Path) -> str:
    """The class of a pipeline folder. Raises UserError where it is none that is read here."""
    return _index(folder)[1]


def _index(folder: Path) -> tuple[dict[str, Any], str]:
    """model_index.json, and the class that it names."""
    index = read_json(folder / INDEX)
    kind = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(kind, str) or kind not in _DEFAULTS:
        raise UserError(f"{folder / INDEX}: a {kind!a} is not read; {' and '.join(_DEFAULTS)} are")
    return index, kind


def _text(folder: Path, index: Mapping[str, Any], kind: str, device: torch.device | str) -> TextEncoder:
    first = str(folder / "text_encoder")
    if kind != XL:
        return load_text_encoder(TextConfig(kind="clip", path=first), device)
    parts = (TextPart(kind="clip", path=first), TextPart(kind="clip_projection", path=str(folder / "text_encoder_2")))
    empty_is_zero = bool(index.get("force_zeros_for_empty_prompt", True))
    return load_text_encoder(TextConfig(kind="clip_pair", parts=parts, empty_is_zero=empty_is_zero), device)


def _part(folder: Path, name: str, file: str) -> Mapping[str, Any]:
    found = read_json(folder / name / file, infinite=True)
    if not isinstance(found, dict):
        raise UserError(f"{folder / name / file}: not a table of settings")
    return found


def _read_codec(folder: Path, device: torch.device | str) -> tuple[Codec, Any]:
    autoencoder, normalisation = read_autoencoder(_part(folder, "vae", "config.json"), f"{folder / 'vae'}")
    with torch.device("meta"):
        codec = LatentCodec(CodecConfig(1, autoencoder))
    file = folder / "vae" / NETWORK_FILE
    codec.autoencoder = load_network(lambda: build_autoencoder(autoencoder, 3), file, _renamed)
    return Codec(codec.eval().requires_grad_(False).to(device), folder_digest(folder, "vae")), normalisation


def _renamed(name: str) -> str:
    """An autoencoder's tensor by its name of today: attention was called otherwise when most were released."""
    for old, new in _OLD_NAMES.items():
        name = name.replace(f"mid_block.attentions.0.{old}.", f"mid_block.attentions.0.{new}.")
    return name


def _low_res(folder: Path, kind: str, factor: int) -> LowResConfig | None:
    """Of the upscaler: small pictures as large as the latents, with noise of the schedule beside the other."""
    if kind != UPSCALER:
        return None
    place = f"{folder}/low_res_scheduler"
    levels = read_schedule(_part(folder, "low_res_scheduler", "scheduler_config.json"), place)
    most = read_json(folder / INDEX).get("max_noise_level", 350)
    try:
        return LowResConfig(scale=factor, levels=levels, max_level=min((most + 1) / levels.steps, 0.999))
    except (TypeError, ValueError) as error:
        raise UserError(f"{place}: {error}") from None


def export_pipeline(cascade: Cascade, out: str | Path, dtype: torch.dtype = torch.float16) -> Path:
    """Write a cascade of one stage as a folder that the stock pipeline loads; returns it.

    Raises UserError for what no stock pipeline can hold, saying what, and where `out` exists.
    """
    out = Path(out)
    pipeline = stock_pipeline(cascade, dtype)
    if out.exists():
        raise UserError(f"{out}: exists; an export is not written over")
    partial = out.with_name(f"{out.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        pipeline.save_pretrained(partial, safe_serialization=True)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def stock_pipeline(cascade: Cascade, dtype: torch.dtype = torch.float16) -> Any:
    """The stock pipeline of a cascade of one stage. Raises UserError for what none can hold, saying what."""
    stage = cascade.stages[0]
    config, codec = stage.config, stage.codec.module.config
    std, text = config.normalisation.std, cascade.text.config
    refused = {
        f"{len(cascade.stages)} stages: export them one by one, with --stage": len(cascade.stages) > 1,
        f"text encoder {text.kind}: stock pipelines are told by CLIP": text.kind not in ("clip", "clip_pair"),
        "its networks are of Stable Diffusion XL in part": (text.kind == "clip_pair") != (config.unet.sizes > 0),
        "its codec has no autoencoder, squares pixels before it, folds its latents, or is of grey":
        codec.autoencoder is None or codec.unshuffle > 1 or codec.fold > 1 or codec.grey,
        "it is told of holes in another order than stock pipelines": config.inpainting,
        "latents have statistics per channel, and stock pipelines one scale": len(set(std)) > 1
        or any(config.normalisation.mean),
        "it draws residuals of the enlarged picture": config.low_res is not None and config.low_res.residual,
        "levels are embedded as t is, and stock pipelines look them up": config.low_res is not None
        and not config.unet.level_table,
    }
    for why, applies in refused.items():
        if applies:
            raise UserError(f"stage {config.name} cannot be a stock pipeline: {why}")
    return _stock(cascade, stage, dtype)


def _stock(cascade: Cascade, stage: Stage, dtype: torch.dtype) -> Any:
    """The stock pipeline of a stage's networks."""
    config, autoencoder = stage.config, stage.codec.module.autoencoder
    name, settings = write_scheduler(config.schedule, config.denoiser, vars(config.sampling))
    vae = _copied(autoencoder, dtype)
    vae.register_to_config(scaling_factor=1 / config.normalisation.std[0])
    unet = _copied(stage.denoiser.net, dtype)
    unet.register_to_config(sample_size=config.resolution_px // stage.codec.module.config.factor)
    parts = {"vae": vae, "unet": unet, "scheduler": getattr(diffusers, name).from_config(settings)}
    pair = isinstance(cascade.text, PairTextEncoder)
    encoders = cascade.text.parts if isinstance(cascade.text, PairTextEncoder) else [cascade.text]
    for number, encoder in enumerate(encoders):
        end = f"_{number + 1}" if number else ""
        parts |= {f"text_encoder{end}": _copied(encoder.module, dtype), f"tokenizer{end}": _tokenizer(encoder)}
    kind: Any = getattr(diffusers, XL if pair else BASE if config.low_res is None else UPSCALER)
    if pair:
        return kind(**parts, force_zeros_for_empty_prompt=cascade.text.config.empty_is_zero, add_watermarker=False)
    if config.low_res is None:
        return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    levels = config.low_res.levels
    _, told = write_scheduler(levels, config.denoiser, vars(SamplingConfig(sampler="ddpm")))
    noising: Any = diffusers.DDPMScheduler
    return kind(**parts, low_res_scheduler=noising.from_config(told | {"clip_sample": False}),
                max_noise_level=round(config.low_res.max_level * levels.steps) - 1)  # fmt: skip


def _copied(network: Any, dtype: torch.dtype) -> Any:
    return nn.Module.to(copy.deepcopy(network), device="cpu", dtype=dtype)


def _tokenizer(encoder: TextEncoder) -> Any:
    from transformers import CLIPTokenizer  # takes seconds

    place = next(path for name, path in encoder.files.items() if name in ("vocab.json", "tokenizer.json")).parent
    return CLIPTokenizer.from_pretrained(place, local_files_only=True, model_max_length=encoder.max_tokens)
