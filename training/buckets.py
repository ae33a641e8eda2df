"""Batches of pictures of one shape, from a set of several: pure functions of (seed, number of the batch).

    shapes of all items -> buckets -> of each an endless stream of its items, cut into batches -> the run's batches
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ldm.draws import keyed_generator

KEPT_ORDERS = 64


class Buckets:
    """Every bucket gives batches as often as its share of the items demands, so that over the epochs each item is
    seen equally often, even where a bucket holds less than a batch."""

    def __init__(self, shapes: Tensor, seed: int, batch: int) -> None:
        """shapes: (items, 3) of the items' tensors; batch: items of a global batch, which is of one bucket."""
        found, which = torch.unique(shapes, dim=0, return_inverse=True)
        self.items = [(which == number).nonzero().flatten() for number in range(len(found))]
        self._seed, self._batch, self._total = seed, batch, len(shapes)
        self._order = lru_cache(KEPT_ORDERS)(self._order_now)
        self._epoch = lru_cache(2)(self._epoch_now)

    def __call__(self, number: int) -> list[int]:
        """The items of a batch of the run, counted from 0."""
        epoch = number * self._batch // self._total
        while self._before(epoch) > number:
            epoch -= 1
        while self._before(epoch + 1) <= number:
            epoch += 1
        bucket, turn = self._epoch(epoch)[number - self._before(epoch)].tolist()
        own = self.items[bucket]
        places = [divmod(place, len(own)) for place in range(turn * self._batch, (turn + 1) * self._batch)]
        return [int(own[self._order(bucket, lap)[place]]) for lap, place in places]

    @cached_property
    def _phases(self) -> list[int]:
        """How far each bucket is into a batch at the start, so that small ones do not all come at once."""
        generator = keyed_generator(self._seed, "phases")
        return torch.randint(self._batch, (len(self.items),), generator=generator).tolist()

    def _turns(self, bucket: int, epoch: int) -> int:
        """Batches that a bucket gave before an epoch."""
        return (epoch * len(self.items[bucket]) + self._phases[bucket]) // self._batch

    def _before(self, epoch: int) -> int:
        """Batches of the run before an epoch."""
        return sum(self._turns(bucket, epoch) for bucket in range(len(self.items)))

    def _epoch_now(self, epoch: int) -> Tensor:
        """(batches, 2) of an epoch, in their order: the bucket of each, and which of its batches it is."""
        made = [(bucket, turn) for bucket in range(len(self.items))
                for turn in range(self._turns(bucket, epoch), self._turns(bucket, epoch + 1))]  # fmt: skip
        mixed = torch.randperm(len(made), generator=keyed_generator(self._seed, "batches", epoch))
        return torch.tensor(made).view(-1, 2)[mixed]

    def _order_now(self, bucket: int, lap: int) -> Tensor:
        """The order in which the items of a bucket come when it goes through them for the `lap`-th time."""
        generator = keyed_generator(self._seed, "order", bucket, lap)
        return torch.randperm(len(self.items[bucket]), generator=generator)
