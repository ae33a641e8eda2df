"""Which image is seen when, and with which randomness: pure functions of (seed, position in the run)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ldm.draws import keyed_generator
from training.cache import Cache
from training.online import Online


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which epoch `epoch` visits `count` items: (count,) int64."""
    return torch.randperm(count, generator=keyed_generator(seed, "order", epoch))


@dataclass(frozen=True)
class Batch:
    """Items of one micro-batch. places: their places in the global batch of `global_size`, for stratified draws."""

    cache: Cache | Online
    indices: list[int]
    generators: list[torch.Generator]
    places: list[int]
    global_size: int

    def __len__(self) -> int:
        return len(self.indices)

    def stored(self) -> Tensor:
        """The cached tensors of the items, stacked."""
        return self.cache.stored(self.indices)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """N(0, I) of (B, *shape), each row from its own item's generator."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def uniform(self) -> Tensor:
        """U[0, 1) of (B,) float64, each from its own item's generator."""
        return torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in self.generators])

    def integers(self, limits: list[int]) -> list[int]:
        """One draw of 0..limit-1 per item."""
        draws = zip(limits, self.generators, strict=True)
        return [int(torch.randint(limit, (), generator=g)) for limit, g in draws]


def batches(cache: Cache | Online, seed: int, start: int, size: int, global_size: int, stride: int = 1,
            offset: int = 0) -> Iterator[Batch]:  # fmt: skip
    """Micro-batches of `size` from image `start` of the run on, endlessly.

    Of the micro-batches of the run, counted from `start`, this yields every `stride`-th, beginning with number
    `offset`: process `offset` of `stride`. `size * stride * accumulation` must be `global_size`.
    """
    number = offset
    while True:
        first = start + number * size
        positions = range(first, first + size)
        yield Batch(
            cache,
            [int(order(seed, p // len(cache), len(cache))[p % len(cache)]) for p in positions],
            [keyed_generator(seed, "image", p) for p in positions],
            [p % global_size for p in positions],
            global_size,
        )
        number += stride
