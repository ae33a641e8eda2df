"""Prior preservation (Ruiz et al. 2023, DreamBooth, sec. 3.2): beside a few pictures of one thing, pictures of its kind
as the network drew them before, so that it does not forget the kind.

    items of one's own, repeated + items of the prior, repeated -> Mixed -> the loop, which sees one set
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.config import Config
from ldm.latents import Normalisation
from training.cache import Items


@dataclass(frozen=True)
class PriorConfig(Config):
    """path: pictures of the kind with their captions, as `ldm generate --captions` writes them; share: of the items
    trained on."""

    path: str
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ValueError(f"share must be between 0 and 1, not {self.share:g}")


class Mixed:
    """Two sets as one of which the second makes up a share: each item of the larger need once, the other as often as
    that takes. What is read of it is what is read of `Cache`; statistics are those of the first."""

    def __init__(self, own: Items, prior: Items, share: float) -> None:
        self._sets = (own, prior)
        total = max(len(own) / (1 - share), len(prior) / share)
        self._counts = (round(total * (1 - share)), round(total * share))
        self.key = own.key
        self.shapes = None
        if own.shapes is not None and prior.shapes is not None:
            both = torch.cat([own.shapes, prior.shapes])
            self.shapes = both[[w * len(own) + place for w, place in map(self._place, range(len(self)))]]
        self.manifest = {**own.manifest, "key": {**own.manifest["key"], "prior": prior.manifest["key"]}}

    def __len__(self) -> int:
        return sum(self._counts)

    def stored(self, indices: Sequence[int]) -> Tensor:
        """As `Cache.stored`."""
        return self._gathered([self._place(i) for i in indices], lambda own, places: own.stored(places))

    def low_res(self, indices: Sequence[int]) -> Tensor:
        """As `Cache.low_res`."""
        return self._gathered([self._place(i) for i in indices], lambda own, places: own.low_res(places))

    def opaque(self, indices: Sequence[int]) -> Tensor:
        """As `Cache.opaque`."""
        return self._gathered([self._place(i) for i in indices], lambda own, places: own.opaque(places))

    def captions(self, index: int) -> list[int]:
        """Indices of an item's captions: even ones are of the first set."""
        which, place = self._place(index)
        return [2 * caption + which for caption in self._sets[which].captions(place)]

    def record(self, index: int) -> dict[str, Any]:
        """As `Cache.record`."""
        which, place = self._place(index)
        return self._sets[which].record(place)

    def text(self, captions: Sequence[int]) -> Conditioning:
        """As `Cache.text`."""
        found = [self._sets[caption % 2].text([caption // 2]) for caption in captions]
        return Conditioning.cat(found)

    @property
    def null(self) -> Conditioning:
        """The encoder's output for the empty string, one item."""
        return self._sets[0].null

    @property
    def normalisation(self) -> Normalisation:
        """Of the first set."""
        return self._sets[0].normalisation

    def _place(self, index: int) -> tuple[int, int]:
        """The set of an item, and its place there."""
        which = int(index >= self._counts[0])
        return which, (index - which * self._counts[0]) % len(self._sets[which])

    def _gathered(self, places: Sequence[tuple[int, int]],
                  read: Callable[[Items, Sequence[int]], Tensor]) -> Tensor:  # fmt: skip
        return torch.cat([read(self._sets[which], [place]) for which, place in places])
