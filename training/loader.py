"""Which image is seen when, and with which randomness: pure functions of (seed, position in the run).

    batch `number` of the run -> Batch -> StepModule.prepare -> inputs    here, or ahead in other processes
"""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldm.config import UserError
from ldm.draws import keyed_generator
from training.buckets import Buckets
from training.cache import Items
from training.stop import SIGNALS


@lru_cache(maxsize=2)
def order(seed: int, epoch: int, count: int) -> Tensor:
    """The order in which epoch `epoch` visits `count` items: (count,) int64."""
    return torch.randperm(count, generator=keyed_generator(seed, "order", epoch))


@dataclass(frozen=True)
class Batch:
    """Items of one micro-batch. places: their places in the global batch of `global_size`, for stratified draws."""

    cache: Items
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


class StepModule(nn.Module, ABC):
    """Networks with their training step: `module(module.prepare(batch))` is a StepResult.

    ahead: whether `prepare` needs no network, so that it can be done before its turn, by another process. networks:
    those that a step calls once each, on tensors of the same shapes at every step.
    """

    ahead = True

    @property
    def networks(self) -> list[nn.Module]:
        return []

    @abstractmethod
    def prepare(self, batch: Batch) -> Any:
        """All that the step reads and draws, on the CPU; tensors, in tuples or dataclasses if there are several."""


class Prepared(NamedTuple):
    """The items of a micro-batch, and what `StepModule.prepare` made of them."""

    indices: list[int]
    inputs: Any


@dataclass(frozen=True)
class BatchOrder:
    """The micro-batches of `size` from image `start` of the run on, by number. Of every `stride` of them, process
    `offset` has one; `size * stride * accumulation` must be `global_size`. Of pictures of several shapes, all of a
    global batch are of one. Raises UserError where these begin amid such a batch."""

    cache: Items
    seed: int
    start: int
    size: int
    global_size: int
    stride: int = 1
    offset: int = 0

    def __post_init__(self) -> None:
        if self.cache.shapes is not None and self.start % self.global_size:
            raise UserError(f"loop.batch {self.global_size}: {self.start} images were seen in batches of another size, "
                            "and with data.bucket_px all of a batch are of one shape; set it back")  # fmt: skip

    def __iter__(self) -> Iterator[Batch]:
        """Endlessly."""
        return (self[number] for number in count())

    @cached_property
    def _buckets(self) -> Buckets | None:
        return None if self.cache.shapes is None else Buckets(self.cache.shapes, self.seed, self.global_size)

    def _items(self, positions: range) -> list[int]:
        """What the run sees at these positions, which are of one global batch."""
        if self._buckets is not None:
            number, first = divmod(positions.start, self.global_size)
            return self._buckets(number)[first : first + len(positions)]
        items = len(self.cache)
        return [int(order(self.seed, p // items, items)[p % items]) for p in positions]

    def __getitem__(self, number: int) -> Batch:
        """This process's batch of a number, counted from 0."""
        first = self.start + (self.offset + number * self.stride) * self.size
        positions = range(first, first + self.size)
        return Batch(
            self.cache,
            self._items(positions),
            [keyed_generator(self.seed, "image", p) for p in positions],
            [p % self.global_size for p in positions],
            self.global_size,
        )


class _Steps(Dataset[Prepared]):
    def __init__(self, wanted: BatchOrder, module: StepModule) -> None:
        self.wanted, self.module = wanted, module

    def __getitem__(self, number: int) -> Prepared:
        batch = self.wanted[number]
        return Prepared(batch.indices, self.module.prepare(batch))


def prepared(wanted: BatchOrder, module: StepModule, steps: int, workers: int = 0) -> Generator[Prepared]:
    """The first `steps` of them, prepared; `workers` processes work ahead until it is closed, which changes no bit."""
    made = _Steps(wanted, module)
    if not workers:
        yield from (made[number] for number in range(steps))
        return
    # forked: they share the mapped caches, and need nothing of the GPU
    yield from DataLoader(made, batch_size=None, sampler=range(steps), num_workers=workers, worker_init_fn=_endure,
                          multiprocessing_context="fork")  # fmt: skip


def _endure(_: int) -> None:
    """Outlive the signals that stop a run, which schedulers send to all its processes: its own one ends it in order."""
    for which in SIGNALS:
        signal.signal(which, signal.SIG_IGN)
