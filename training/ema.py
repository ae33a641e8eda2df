"""Exponential moving average of weights, a pure function of the images seen."""

from __future__ import annotations

import copy

import torch
from torch import nn


def decay(images: int, step_images: int, halflife_images: int, ramp: float = 0.05) -> float:
    """Decay of one step of `step_images` after `images` images.

    The half-life is `halflife_images`, but at most the share `ramp` of the images seen (Karras et al. 2024,
    EDM's training loop), so that the average forgets the random start.
    """
    halflife = min(float(halflife_images), images * ramp)
    return float(0.5 ** (step_images / max(halflife, 1e-8)))


class Ema:
    """Keeps an averaged copy of a module; buffers are copied."""

    def __init__(self, module: nn.Module) -> None:
        self.module = copy.deepcopy(module).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, factor: float) -> None:
        """average <- factor * average + (1 - factor) * weights"""
        mine: list[torch.Tensor] = list(self.module.parameters())
        theirs: list[torch.Tensor] = list(module.parameters())
        torch._foreach_lerp_(mine, theirs, 1 - factor)
        for own, new in zip(self.module.buffers(), module.buffers(), strict=True):
            own.copy_(new)
