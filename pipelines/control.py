"""A base with a ControlNet: what it is told is made of a picture that a user gives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ldm.config import UserError
from ldm.control import control_picture, load_control
from ldm.denoiser import Denoiser
from ldm.weights import folder_digest
from pipelines.cascade import Cascade
from pipelines.given import read_file, squared

MAX_SCALE = 10.0


@dataclass(frozen=True)
class ControlRequest:
    """network: a folder as `ldm train --preset control` writes; picture: a file, of whose centre square the control
    picture is made; scale: of what the ControlNet adds, 0 is nothing."""

    network: str | Path
    picture: str | Path
    scale: float = 1.0


def controlled(cascade: Cascade, request: ControlRequest, tell: Callable[[str], None]) -> Cascade:
    """The cascade with a ControlNet beside its first stage. Raises UserError for a network of another model, a picture
    that cannot be read, and a scale out of range."""
    if not 0 <= request.scale <= MAX_SCALE:
        raise UserError(f"--control-scale {request.scale:g}: must be from 0 to {MAX_SCALE:g}")
    stage, folder = cascade.stages[0], Path(request.network)
    config, factor = stage.config, stage.codec.module.config.factor
    network, told = load_control(folder, config.unet, config.shape(factor), factor, stage.codec.latents_digest)
    pixels, digest = read_file(Path(request.picture), tell)
    square = torch.from_numpy(squared(pixels, config.resolution_px)).permute(2, 0, 1)[None].float() / 127.5 - 1
    denoiser = Denoiser(stage.denoiser.net, stage.denoiser.schedule, stage.denoiser.config)
    denoiser.control, denoiser.control_scale = network, request.scale
    own = replace(stage, denoiser=denoiser.to(stage.device).eval(), control=control_picture(square, told))
    made_of = f"{cascade.digest} {folder_digest(folder, 'control.json', 'controlnet')} {digest} {request.scale!r}"
    return replace(cascade, stages=[own, *cascade.stages[1:]],
                   digest=hashlib.sha256(made_of.encode()).hexdigest())  # fmt: skip
