"""`ldm eval cascade`: is a fault in the base, in an SR stage, or in the seam between them?

    held-out pictures -> degrade -> SR stage -> against the pictures, and against the small ones it was given
    their captions -> base -> SR stage -> against the small pictures that the base drew, and real ones

Beside the stage stand interpolation, the round trip of the base's codec (the ceiling of any stage in its latents)
and other SR cascades; a sweep over settings names the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate
from torchmetrics.image.kid import KernelInceptionDistance

from ldm.config import UserError, to_dict
from ldm.latents import LatentCodec
from ldm.low_res import DegradationConfig, degrade
from pipelines.cascade import Cascade
from pipelines.images import to_uint8
from pipelines.settings import SamplingConfig
from pipelines.stage import Stage
from training.data import Example
from training.features import Features
from training.metrics import psnr, ssim
from training.steps import planes

RESAMPLES = 1000
KID_SUBSETS = 100
KID_LEAST = 50  # pictures; below, its spread is larger than what it tells apart
CONSISTENT_DB = 35.0
CLOSE = 1.01  # of the least distance: not worth more steps
CODEC_ROWS = 4
Measures = dict[str, Tensor]


@dataclass(frozen=True)
class Held:
    """Held-out pictures (N, 3, H, W) in [-1, 1], their small versions, captions, and the groups of `intervals`."""

    large: Tensor
    small: Tensor
    captions: list[str]
    groups: list[str]

    @staticmethod
    def of(examples: Sequence[Example], scale: int) -> Held:
        """From examples of the stage's size; groups are their concept clusters where the data has them."""
        stored = torch.from_numpy(np.stack([e.pixels for e in examples]))
        small = degrade(stored, scale, DegradationConfig())
        groups = [str(e.fields.get("cluster", e.key)) for e in examples]
        captions = [e.captions[0] if e.captions else "" for e in examples]
        return Held(planes(stored), planes(small), captions, groups)

    def __len__(self) -> int:
        return len(self.large)

    def spread(self, count: int) -> Held:
        """At most so many of them, evenly spread."""
        count = min(count, len(self))
        which = [k * len(self) // count for k in range(count)]
        texts = [self.captions[i] for i in which], [self.groups[i] for i in which]
        return Held(self.large[which], self.small[which], *texts)


def consistency(drawn: Tensor, small: Tensor) -> Tensor:
    """How well pictures, shrunk by area, agree with the small ones they were made of: dB per picture, (B,)."""
    return psnr(avg_pool2d(drawn.clamp(-1, 1), drawn.shape[-1] // small.shape[-1]), small)


def colour_shift(drawn: Tensor, wanted: Tensor) -> Tensor:
    """|mean difference| per picture, averaged over channels, in 1/255: (B, 3, H, W) in [-1, 1] twice -> (B,)."""
    return (drawn.clamp(-1, 1).mean((2, 3)) - wanted.mean((2, 3))).abs().mean(1) * 127.5


def compare(drawn: Tensor, held: Held, features: Features) -> Measures:
    """Measures of each picture against the truth, and against the small picture it was made of."""
    return {
        "psnr_db": psnr(drawn, held.large),
        "ssim": ssim(drawn, held.large),
        "distance": features.distance(drawn, held.large),
        "colour_shift": colour_shift(drawn, held.large),
        "consistency_db": consistency(drawn, held.small),
    }


def intervals(measures: Measures, groups: Sequence[str]) -> dict[str, list[float]]:
    """Mean of each measure with its 95% bootstrap interval, whole groups drawn together."""
    names = sorted(set(groups))
    member = np.array([names.index(group) for group in groups])
    counts = np.bincount(member, minlength=len(names))
    drawn = np.random.default_rng(0).integers(len(names), size=(RESAMPLES, len(names)))
    found = {}
    for name, values in measures.items():
        sums = np.bincount(member, weights=values.double().numpy(), minlength=len(names))
        means = sums[drawn].sum(1) / counts[drawn].sum(1)
        low, high = np.quantile(means, [0.025, 0.975])
        found[name] = [float(values.double().mean()), float(low), float(high)]
    return found


def enlarged(small: Tensor, scale: int, kernel: Image.Resampling) -> Tensor:
    """Pillow's interpolation of small pictures."""
    sides = (small.shape[-1] * scale, small.shape[-2] * scale)
    made = [np.array(Image.fromarray(picture).resize(sides, kernel)) for picture in to_uint8(small)]
    return planes(torch.from_numpy(np.stack(made)))


@torch.no_grad()
def round_trip(codec: LatentCodec, pictures: Tensor) -> Tensor:
    """Through the posterior's mean and back."""
    moved = (x.to(codec.device) for x in torch.split(pictures, CODEC_ROWS))
    parts = [codec.decode(codec.encode(x).chunk(2, 1)[0]).cpu() for x in moved]
    return torch.cat(parts).clamp(-1, 1)


def draw(stage: Cascade, held: Held, sampling: SamplingConfig | None = None, small: Tensor | None = None,
         captions: Sequence[str] | None = None) -> Tensor:  # fmt: skip
    """What an SR cascade makes of small pictures; picture i has seed i."""
    chosen = None if sampling is None else [sampling]
    low_res = held.small if small is None else small
    return stage.draw(captions or held.captions, range(len(low_res)), chosen, low_res)[-1]


def sr_stage(cascade: Cascade, name: str | None = None) -> Stage:
    """The SR stage of a name, or the first. Raises UserError where there is none."""
    found = [s for s in cascade.stages if s.config.low_res is not None and name in (None, s.config.name)]
    if not found:
        raise UserError(f"this cascade has no SR stage{'' if name is None else f' named {name!r}'}")
    return found[0]


def against_truth(cascade: Cascade, stage: Stage, others: dict[str, Cascade], held: Held,
                  features: Features) -> dict[str, tuple[Tensor, Measures]]:  # fmt: skip
    """Pictures and measures of the stage on downsamples of real pictures, and of what it stands beside."""
    config = stage.config.low_res
    assert config is not None
    kernels = {"bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}
    drawn = {name: enlarged(held.small, config.scale, kernel) for name, kernel in kernels.items()}
    codec = cascade.stages[0].codec.module
    if codec.autoencoder is not None:
        drawn["codec round trip"] = round_trip(codec, held.large)
    drawn |= {name: draw(other, held) for name, other in others.items()}
    drawn[stage.config.name] = draw(cascade.only(stage.config.name), held)
    return {name: (pictures, compare(pictures, held, features)) for name, pictures in drawn.items()}


def what_counts(cascade: Cascade, stage: Stage, held: Held) -> dict[str, float]:
    """How the result follows each thing the stage is told: mean |difference| of pixels in 1/255 when the text is
    another picture's, when the level is the highest, when the seed is another; and PSNR to the picture whose small
    version was put in place of the right one, beside PSNR to the right one."""
    own, config = cascade.only(stage.config.name), stage.config
    assert config.low_res is not None
    drawn = draw(own, held)
    high = replace(config.sampling, level=config.low_res.max_level)
    rolled = held.small.roll(1, 0)
    swapped = draw(own, held, small=rolled)
    texts = [*held.captions[-1:], *held.captions[:-1]]
    seeds = own.draw(held.captions, range(1000, 1000 + len(held)), None, held.small)[-1]
    return {
        "text_changed": _difference(draw(own, held, captions=texts), drawn),
        "level_changed": _difference(draw(own, held, high), drawn),
        "seed_changed": _difference(seeds, drawn),
        "psnr_to_the_other_picture_db": float(psnr(swapped, held.large.roll(1, 0)).mean()),
        "psnr_to_the_right_picture_db": float(psnr(swapped, held.large).mean()),
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a.clamp(-1, 1) - b.clamp(-1, 1)).abs().mean() * 127.5)


def after_base(cascade: Cascade, stage: Stage, held: Held, features: Features,
               settings: Sequence[SamplingConfig]) -> tuple[list[Tensor], list[dict[str, Any]]]:  # fmt: skip
    """The stage on what the stages before it draw for the captions: pictures of each setting (after the small ones,
    which come first), and consistency, colour shift and KID against the real pictures."""
    names = [s.config.name for s in cascade.stages]
    before = cascade.only(*names[: names.index(stage.config.name)])
    small = before(held.captions, range(len(held)))
    found, pictures = [], [small]
    for sampling in settings:
        drawn = draw(cascade.only(stage.config.name), held, sampling, small=small)
        pictures.append(drawn)
        found.append({
            "level": sampling.level, "steps": sampling.steps,
            "consistency_db": float(consistency(drawn, small).mean()),
            "colour_shift": float(colour_shift(drawn, small).mean()), "kid": kid(drawn, held.large, features),
        })  # fmt: skip
    return pictures, found


def kid(drawn: Tensor, real: Tensor, features: Features) -> list[float] | None:
    """Kernel distance of the features (Binkowski et al. 2018), mean and standard deviation over subsets; None for
    fewer than KID_LEAST pictures."""
    if min(len(drawn), len(real)) < KID_LEAST:
        return None
    metric = KernelInceptionDistance(feature=features, subsets=KID_SUBSETS, subset_size=min(len(drawn), len(real)) // 2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for pictures, is_real in ((real, True), (drawn, False)):
            for part in torch.split(pictures, CODEC_ROWS):
                metric.update(part, real=is_real)
        mean, spread = metric.compute()
    return [float(mean), float(spread)]


def sweep(cascade: Cascade, stage: Stage, held: Held, features: Features,
          settings: Sequence[SamplingConfig]) -> list[dict[str, Any]]:  # fmt: skip
    """Measures on downsamples of real pictures for each setting."""
    own, cells = cascade.only(stage.config.name), []
    for sampling in settings:
        found = compare(draw(own, held, sampling), held, features)
        cells.append({"sampling": to_dict(sampling), **intervals(found, held.groups)})
    return cells


def best(cells: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """The sampling to draw with, and whether its pictures agree with the small ones to CONSISTENT_DB.

    Of the settings that agree, or of all where none does, the one of fewest network rows a picture whose distance is
    within CLOSE of the least, and of the least level. Where `after` is given, measures of levels on what a base draws,
    the level is that of least KID if it is more than the spreads below that of the least level: noise is to cover what
    a base does wrong, and real small pictures have nothing to cover.
    """
    good = [c for c in cells if c["consistency_db"][0] >= CONSISTENT_DB]
    known = good or list(cells)
    least = min(cell["distance"][0] for cell in known)

    def cost(cell: dict[str, Any]) -> tuple[int, float]:
        told = cell["sampling"]
        return told["steps"] * (1 if told["guidance"] == 1 else 2), told["level"]

    sampling = dict(min((c for c in known if c["distance"][0] <= CLOSE * least), key=cost)["sampling"])
    judged = [line for line in after if line["kid"] is not None]
    if judged:
        first = min(judged, key=lambda line: line["level"])
        other = min(judged, key=lambda line: line["kid"][0])
        apart = first["kid"][0] - other["kid"][0] > first["kid"][1] + other["kid"][1]
        sampling["level"] = other["level"] if apart else first["level"]
    return {"sampling": sampling, "consistent": bool(good)}


def shown(small: Tensor, scale: int) -> Tensor:
    """Small pictures as they are, for a grid: each pixel a square."""
    return interpolate(small, scale_factor=scale, mode="nearest")
