"""Keyed randomness: a draw depends on what it is for, never on who draws it or what is drawn beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def keyed_generator(*key: str | int) -> torch.Generator:
    """A CPU generator that depends on the key alone, such as (seed, stage, purpose) or (seed, "image", position)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class Draws:
    """The noise of some pictures in a stage: float32 draws on the CPU, of each picture by its seed alone.

    in_order: from one generator a seed, each draw after those before it, as diffusers' pipelines draw with a list of
    CPU generators; else from one for each purpose.
    """

    def __init__(self, seeds: Sequence[int], stage: str, in_order: bool = False) -> None:
        self.seeds, self.stage, self.in_order = list(seeds), stage, in_order
        self._generators: dict[str, list[torch.Generator]] = {}

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """The next draws for a purpose, (B, *shape) ~ N(0, I)."""
        purpose = "" if self.in_order else purpose
        if purpose not in self._generators:
            self._generators[purpose] = [
                torch.Generator().manual_seed(seed) if self.in_order else keyed_generator(seed, self.stage, purpose)
                for seed in self.seeds
            ]
        return torch.stack([torch.randn(tuple(shape), generator=g) for g in self._generators[purpose]])
