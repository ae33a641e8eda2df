"""Optimizer and learning rate: the rate is a pure function of the images seen."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ldm.config import Config


@dataclass(frozen=True)
class OptimConfig(Config):
    """AdamW with a linear warm-up and a cosine decay to `final` times `lr` at the end of the run."""

    lr: float = 5e-4
    warmup_images: int = 2000
    final: float = 0.02
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr <= 1:
            raise ValueError(f"lr must be above 0 and at most 1, not {self.lr:g}; 1e-4 to 1e-3 is usual")
        if self.warmup_images < 0 or not 0 <= self.final <= 1:
            raise ValueError("warmup_images must not be negative and final is a share, from 0 to 1")
        if not 0 <= self.weight_decay <= 1:
            raise ValueError(f"weight_decay must be from 0 to 1, not {self.weight_decay:g}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError("beta1 and beta2 must be at least 0 and below 1")
        if self.clip <= 0:
            raise ValueError(f"clip must be above 0, not {self.clip:g}")


def learning_rate(config: OptimConfig, images: int, total_images: int) -> float:
    """The rate of the step that begins after `images` of `total_images`."""
    warmup = min(1.0, (images + 1) / max(config.warmup_images, 1))
    cosine = 0.5 * (1 + math.cos(math.pi * min(images / total_images, 1.0)))
    return config.lr * warmup * (config.final + (1 - config.final) * cosine)


def build_optimizer(config: OptimConfig, parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """Fused AdamW; matrices and kernels decay, biases and norms do not."""
    listed = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in listed if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in listed if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [g for g in groups if g["params"]]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)
