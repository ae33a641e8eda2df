"""Training on a data set of one's own without a config: `ldm train my-pictures --preset full`.

    a data set, a cascade -> the stage to go on with -> a DiffusionRun that begins from it -> training.run
                             or its codec            -> an AutoencoderRun of its decoder   ->
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from ldm.config import UserError, apply_override, parse, to_dict
from ldm.weights import read_json
from pipelines.cascade import CascadeConfig
from pipelines.generate import SHIPPED
from pipelines.settings import StageConfig
from training.autoencoder import AutoencoderRun
from training.data import DataConfig, Reader, Row
from training.diffusion import DiffusionRun

Preset = Literal["full", "lora", "control", "inversion", "sr", "decoder"]
PROMPTS = 4
_HELD_OUT = ("validation", "val", "valid", "dev", "test", "combos", "held")
PASSES, FEWEST, MOST = 40, 4_000, 40_000  # over the pictures, and images in all
LARGE = 1024  # the width of a U-Net that is trained as Stable Diffusion's are, with small steps
_RATES = {"lora": (1e-3, 1e-4), "control": (1e-3, 1e-5), "inversion": (1e-2, 5e-3),
          "decoder": (4e-4, 4e-5)}  # of a small and of a large network  # fmt: skip
_CONTROL_DROPOUT = 0.5  # Zhang et al. 2023, sec. 3.4: without a caption the picture told is all there is to go by
# a small network is convolutions more than attentions, and a LoRA of these alone hardly moves it
_LORA = {"rank": 32, "targets": ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2", "conv1", "conv2", "conv_in",
                                 "conv_out", "conv_shortcut"]}  # fmt: skip
_RATES_OF_ALL = (2e-4, 1e-5)


def tuning(pictures: Path, preset: Preset, model: str | Path | None = None,
           overrides: Sequence[str] = ()) -> DiffusionRun:  # fmt: skip
    """A run that goes on training a stage of a cascade folder on other pictures: the base, all of its weights (full),
    a change of low rank (lora), a ControlNet for it (control) or a word for what the pictures show, which is the
    folder's name (inversion), or all of its SR stage (sr). Previews are of the first captions.

    Raises UserError for a model that is no cascade folder or has no such stage, and for data that cannot be used.
    """
    folder, cascade = _begun_from(model)
    stage = _stage(folder, cascade, preset)
    own, validation, rows = _data(pictures, stage, preset, overrides)
    data: dict[str, Any] = {
        "kind": "diffusion", "name": stage.name, "init": str(folder), "data": own, "validation": validation,
        "text": to_dict(cascade.text.placed(str(folder / "text"))),
        **{part: to_dict(getattr(stage, part)) for part in ("unet", "schedule", "denoiser", "sampling")},
        "last": 0.5 if stage.sampling.steps == 1 and stage.denoiser.target != "eps" else 0.0,  # or t = 1 is hardly seen
        "low_res": None if stage.low_res is None else to_dict(stage.low_res),
        "inpainting": stage.inpainting, "posterior": stage.posterior,
        "preview": {"prompts": list(dict.fromkeys(c for row in rows for c in row.captions[:1]))[:PROMPTS]},
        **_lengths(preset, stage, len(rows), overrides),
    }  # fmt: skip
    codec = read_json(folder / stage.codec / "config.json")
    pixels = codec.get("autoencoder") is None
    data["codec"] = None if pixels else str(folder / stage.codec)
    if pixels:
        data |= {"unshuffle": codec["unshuffle"], "grey": codec.get("grey", False)}
    if preset in ("lora", "control"):
        small = max(stage.unet.widths) < LARGE
        data[preset] = dict(_LORA) if preset == "lora" and small else {}
        data |= {"dropout": _CONTROL_DROPOUT} if preset == "control" else {}
    elif preset == "inversion":
        data[preset] = {"word": " ".join(re.findall(r"\w+", pictures.absolute().stem.lower())) or "mine"}
    for item in overrides:
        apply_override(data, item)
    made: DiffusionRun = parse(DiffusionRun, data, f"preset {preset}")
    return made


def decoder(pictures: Path, model: str | Path | None = None, overrides: Sequence[str] = ()) -> AutoencoderRun:
    """A run that goes on training the decoder of a cascade folder's base on other pictures. Its encoder stays, and so
    does all that draws in its latents.

    Raises UserError as `tuning`, and for a base that works on pixels.
    """
    folder, cascade = _begun_from(model)
    stage = _stage(folder, cascade, "decoder")
    codec = read_json(folder / stage.codec / "config.json")
    if codec.get("autoencoder") is None:
        raise UserError(f"{folder}: its base works on pixels: there is no decoder to train")
    own, validation, rows = _data(pictures, stage, "decoder", overrides)
    data: dict[str, Any] = {
        "kind": "autoencoder", "init": str(folder / stage.codec), "codec": codec, "data": own, "validation": validation,
        "reconstruction": {"crop_px": stage.resolution_px, "l1": 0.3, "l2": 10.0, "gradient": 0.3,
                           "decoder_only": True},
        **_lengths("decoder", stage, len(rows), overrides),
    }  # fmt: skip
    data["loop"]["batch"] = 32
    for item in overrides:
        apply_override(data, item)
    made: AutoencoderRun = parse(AutoencoderRun, data, "preset decoder")
    return made


def _begun_from(model: str | Path | None) -> tuple[Path, CascadeConfig]:
    folder = Path(SHIPPED if model is None else model)
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder}: a pipeline of diffusers; write it as a cascade first: ldm import {folder} NEW, and "
                        "then --model NEW")  # fmt: skip
    return folder, parse(CascadeConfig, read_json(folder / "cascade.json"), str(folder / "cascade.json"))


def _data(pictures: Path, stage: StageConfig, preset: Preset, overrides: Sequence[str]
          ) -> tuple[dict[str, Any], dict[str, Any], list[Row]]:  # fmt: skip
    """The sections data and validation, and the rows trained on."""
    begun: dict[str, Any] = {"data": {"path": str(pictures), "size_px": stage.resolution_px}}
    for item in overrides:
        if item.startswith("data."):
            apply_override(begun, item)
    own: DataConfig = parse(DataConfig, begun["data"], f"preset {preset}")
    rows = list(Reader(own).rows)
    own, validation = _split(own, rows)
    begun["data"]["split"] = own.split
    rows = rows if own.split is None else [row for row in rows if row.fields.get("split") == own.split]
    return begun["data"], {"split": validation}, rows


def _lengths(preset: Preset, stage: StageConfig, rows: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The sections optim, ema and loop, in shares of all images."""
    images = min(max(PASSES * rows, FEWEST), MOST)
    for item in overrides:
        images = int(item.partition("=")[2]) if re.fullmatch(r"loop\.images=\d+", item) else images
    rates = _RATES.get(preset, _RATES_OF_ALL)
    return {
        "optim": {"lr": rates[max(stage.unet.widths) >= LARGE], "warmup_images": images // 20},
        "ema": {"halflife_images": max(images // 10, 1)},
        "loop": {"images": images, "batch": 8, "log_every_images": max(images // 20, 1),
                 "preview_every_images": max(images // 4, 1), "save_every_images": max(images // 4, 1)},
    }  # fmt: skip


def _split(data: DataConfig, rows: Sequence[Row]) -> tuple[DataConfig, str | None]:
    """The data's own split to train on and one to hold out, where it names such and nothing else is said; else every
    so many of all is held out."""
    named = {str(row.fields["split"]) for row in rows if row.fields.get("split") is not None}
    held = next((name for name in _HELD_OUT if name in named), None)
    if data.split is not None or "train" not in named or held is None:
        return data, data.split
    return replace(data, split="train"), held


def _stage(folder: Path, cascade: CascadeConfig, preset: Preset) -> StageConfig:
    files = [folder / name / "stage.json" for name in cascade.stages]
    stages: list[StageConfig] = [parse(StageConfig, read_json(file), str(file)) for file in files]
    found = next((s for s in stages if (s.low_res is None) == (preset != "sr")), None)
    if found is None:
        wanted = "enlarges pictures" if preset == "sr" else "draws from text alone"
        raise UserError(f"{folder}: none of its stages {', '.join(cascade.stages)} {wanted}, which preset {preset} "
                        "trains")  # fmt: skip
    return found
