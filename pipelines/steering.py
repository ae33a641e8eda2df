"""Guidance by a second network: a noise-aware classifier, or CLIP, on top of what else guides a base.

    request -> networks checked against the stage -> Steering: (denoiser, rows of the batch) -> guided denoiser
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import UserError
from ldm.guidance import ClassifierGuidance, ClipGuidance, Denoises
from ldm.weights import load_clip, load_noisy_classifier
from pipelines.stage import Stage, Steering

MAX_SCALE = 10_000.0
LIMIT = 0.5  # of x0's shift, see `ldm.guidance._Uphill`; where x0 is clipped, that is limit enough


@dataclass(frozen=True)
class SteeringRequest:
    """classifier: the folder of a noise-aware classifier; toward: what it is to find, as "style=noto", one label each;
    clip: the folder of a CLIP, for likeness to the prompts. Scales multiply the gradients; 0 is none."""

    classifier: str | Path | None = None
    toward: Sequence[str] = ()
    classifier_scale: float = 1.0
    clip: str | Path | None = None
    clip_scale: float = 0.0

    def check(self) -> None:
        """Raise UserError for what does not go together."""
        for name, scale in (("--classifier-scale", self.classifier_scale), ("--clip-scale", self.clip_scale)):
            if not 0 <= scale <= MAX_SCALE:
                raise UserError(f"{name} {scale:g}: must be from 0 to {MAX_SCALE:g}")
        if (self.classifier is None) != (not self.toward):
            raise UserError("--classifier and --toward go together: a classifier's folder, and what it is to find")
        if self.clip_scale and self.clip is None:
            raise UserError("--clip-scale: name the CLIP by --clip; configs/emoji/clip.yaml trains one")

    @property
    def recipe(self) -> dict[str, Any]:
        """What of it decides pictures, but for the networks' digests."""
        found: dict[str, Any] = {}
        if self.toward and self.classifier_scale:
            found |= {"toward": list(self.toward), "classifier_scale": self.classifier_scale}
        return found | ({"clip_scale": self.clip_scale} if self.clip_scale else {})


def steering(request: SteeringRequest, stage: Stage, prompts: Sequence[str]) -> Steering | None:
    """What wraps the denoiser of a base, for pictures of `prompts`; None where nothing is asked.

    Raises UserError where a classifier was trained on other latents, or does not know a label or a class.
    """
    steps: list[Steering] = []
    if request.classifier is not None and request.classifier_scale:
        each = {item.partition("=")[0]: [item.partition("=")[2]] * len(prompts) for item in request.toward}
        steps.append(toward_classes(request.classifier, stage, each, request.classifier_scale))
    if request.clip is not None and request.clip_scale:
        steps.append(toward_texts(request.clip, stage, prompts, request.clip_scale))
    if not steps:
        return None

    def steered(denoiser: Denoises, rows: Sequence[int]) -> Denoises:
        for step in steps:
            denoiser = step(denoiser, rows)
        return denoiser

    return steered


def toward_classes(folder: str | Path, stage: Stage, wanted: Mapping[str, Sequence[str]], scale: float) -> Steering:
    """Classifier guidance; wanted: of each label, the class of each picture. Raises UserError as `steering`."""
    network, file = load_noisy_classifier(folder)
    own = {"schedule": stage.config.schedule, "normalisation": stage.config.normalisation,
           "latents_digest": stage.codec.latents_digest}  # fmt: skip
    for name, value in own.items():
        if getattr(file, name) != value:
            raise UserError(f"{folder}: was trained on another {name} than stage {stage.config.name} has; train one "
                            "for this model (kind: noisy_classifier)")  # fmt: skip
    places = {}
    for label, names in wanted.items():
        known = network.classes.get(label)
        if known is None:
            raise UserError(f"{folder}: knows no label {label!a}; it has {', '.join(network.classes)}")
        missing = next((name for name in names if name not in known), None)
        if missing is not None:
            raise UserError(f"{folder}: no {label} is named {missing!a}; there are {', '.join(known[:20])}"
                            + (" ..." if len(known) > 20 else ""))  # fmt: skip
        places[label] = torch.tensor([known.index(name) for name in names])
    network = network.eval().requires_grad_(False).to(stage.device)

    def steered(denoiser: Denoises, rows: Sequence[int]) -> Denoises:
        own = {label: each[list(rows)] for label, each in places.items()}

        def log_prob(x_t: Tensor, t: Tensor) -> Tensor:
            return network.log_prob(x_t, stage.denoiser.schedule.network_time(t), own)

        return ClassifierGuidance(denoiser, scale, log_prob, _limit(stage))

    return steered


def toward_texts(folder: str | Path, stage: Stage, prompts: Sequence[str], scale: float) -> Steering:
    """CLIP guidance, toward the prompt of each picture."""
    clip = load_clip(folder)
    clip.requires_grad_(False).to(stage.device)
    texts = clip.texts(prompts)
    sharpness = clip.model.logit_scale.exp()

    def steered(denoiser: Denoises, rows: Sequence[int]) -> Denoises:
        wanted = texts[list(rows)]

        def likeness(x0: Tensor) -> Tensor:
            pictures = stage.codec.module.decode(stage.config.normalisation.invert(x0))
            similar: Tensor = sharpness * (clip.pictures(pictures) * wanted).sum(1)
            return similar

        return ClipGuidance(denoiser, scale, likeness, _limit(stage))

    return steered


def _limit(stage: Stage) -> float | None:
    return LIMIT if stage.config.denoiser.clip_x0 is None else None
