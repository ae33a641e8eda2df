"""Moving averages of weights, pure functions of the images seen: by half-life, and of power-function profiles."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ldm.config import Config

UNIFORM = 12**-0.5  # sigma_rel of the plain mean of all weights since the start, the longest power average


@dataclass(frozen=True)
class EmaConfig(Config):
    """The averages kept beside the weights.

    halflife_images: of the average that previews, evaluation and RUN/final use. powers: lengths sigma_rel of
    power-function averages kept as well (Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
    Diffusion Models", section 3.1), such as 0.05 and 0.1: sigma_rel is the spread of the weights averaged over,
    as a share of the run so far. every_steps: optimizer steps from one application to the next.
    snapshot_every_images: how often the power averages are kept for `training.posthoc`, None for never.
    """

    halflife_images: int = 10_000
    powers: tuple[float, ...] = ()
    every_steps: int = 1
    snapshot_every_images: int | None = None

    def __post_init__(self) -> None:
        for name in ("halflife_images", "every_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if not all(0 < power < UNIFORM for power in self.powers):
            raise ValueError(f"powers {self.powers} must lie between 0 and {UNIFORM:.4f}; 0.05 and 0.1 are usual")
        if len({average_name(power) for power in self.powers}) < len(self.powers):
            raise ValueError(f"powers {self.powers} must differ")
        if self.snapshot_every_images is not None and self.snapshot_every_images < 1:
            raise ValueError("snapshot_every_images must be at least 1")
        if self.snapshot_every_images is not None and not self.powers:
            raise ValueError("snapshot_every_images keeps power averages, but powers names none: try [0.05, 0.1]")

    def snapshot_due(self, images: int, applied: int) -> bool:
        """Whether the application after `images` images, which covered the last `applied`, is one to keep."""
        every = self.snapshot_every_images
        return every is not None and images // every > (images - applied) // every


def average_name(power: float) -> str:
    """What the average of this sigma_rel is called in `Ema.averages`, checkpoints and exports."""
    return f"ema-{power:g}"


def decay(images: int, step_images: int, halflife_images: int, ramp: float = 0.05) -> float:
    """Decay of one step of `step_images` after `images` images.

    The half-life is `halflife_images`, but at most the share `ramp` of the images seen (Karras et al. 2024,
    EDM's training loop), so that the average forgets the random start.
    """
    halflife = min(float(halflife_images), images * ramp)
    return float(0.5 ** (step_images / max(halflife, 1e-8)))


def power_exponent(power: float) -> float:
    """gamma of the profile p(t) ~ t^gamma whose standard deviation is `power` (sigma_rel) of its length.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), solved for gamma > 0 (Karras et al. 2024, eq. 126).
    """
    inverse = power**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def power_decay(images: int, step_images: int, power: float) -> float:
    """Decay of a step of `step_images` after `images` images for a power average (Karras et al. 2024, eq. 127).

    0 at the first step: the random start has no part in it. Decays of steps multiply to that of all of them.
    """
    return float((1 - step_images / images) ** (power_exponent(power) + 1))


class Ema:
    """Keeps averaged copies of a module in eval mode, without gradients; buffers are copied.

    averages: "ema", by half-life, and one for each of `config.powers`, named by `average_name`. `module` is "ema".
    Sharded modules: shard the copies as the module itself, and each process averages its own shards.
    """

    def __init__(self, module: nn.Module, config: EmaConfig) -> None:
        self.config = config
        names = ["ema", *map(average_name, config.powers)]
        self.averages: dict[str, nn.Module] = {
            name: copy.deepcopy(module).eval().requires_grad_(False) for name in names
        }

    @property
    def module(self) -> nn.Module:
        return self.averages["ema"]

    @torch.no_grad()
    def update(self, module: nn.Module, images: int, step_images: int, final: bool = False) -> int:
        """Take in the weights after `images` images; called once after every step, with a step's images.

        Applies itself every `config.every_steps` steps, as if the weights had been these since the last time.
        `final`, at the last step, applies what has not been. Which steps apply depends on the arguments only, so
        that a run resumes without further state. Returns the images applied, 0 for none.
        """
        steps = images // step_images
        pending = steps % self.config.every_steps
        if pending and not final:
            return 0
        pending = pending or self.config.every_steps
        factors = [math.prod(decay(images - i * step_images, step_images, self.config.halflife_images)
                             for i in range(pending))]  # fmt: skip
        factors += [power_decay(images, pending * step_images, power) for power in self.config.powers]
        trained = [p.requires_grad for p in module.parameters()]  # an average of the others would turn -0 into 0
        theirs = _local(compress(module.parameters(), trained))
        for average, factor in zip(self.averages.values(), factors, strict=True):
            _reshard(average)
            torch._foreach_lerp_(_local(compress(average.parameters(), trained)), theirs, 1 - factor)
            for own, new in zip(average.buffers(), module.buffers(), strict=True):
                own.copy_(new)
        return pending * step_images


def _local(parameters: Iterable[Tensor]) -> list[Tensor]:
    """The parts of parameters that this process holds."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in parameters]


def _reshard(module: nn.Module) -> None:
    """Free the whole parameters that an evaluation gathered: what is written to those is lost."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
