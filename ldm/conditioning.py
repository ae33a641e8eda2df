"""Conditioning: what a denoiser is told besides x_t and t. Every member belongs to one item of the batch.

B batch, L tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Text states (B, L, D) float32 with a mask (B, L) of real tokens, or None where all tokens count; what
    `condition_low_res` makes of small pictures, (B, C, h, w), with the level (B,) of the noise in it; what
    `condition_known` makes of pictures with a hole, (B, C + 1, h, w); what a ControlNet is told, (B, 3, H, W)."""

    text: Tensor | None = None
    text_mask: Tensor | None = None
    low_res: Tensor | None = None
    level: Tensor | None = None
    known: Tensor | None = None
    control: Tensor | None = None

    def __len__(self) -> int:
        for value in self._members().values():
            return len(value)
        raise ValueError("an empty Conditioning has no batch size")

    def __getitem__(self, index: slice | Tensor) -> Conditioning:
        return self._map(lambda v: v[index])

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditioning on another device."""
        return self._map(lambda v: v.to(device))

    def expand(self, count: int) -> Conditioning:
        """Repeat a single item `count` times."""
        if len(self) != 1:
            raise ValueError(f"only a single item can be expanded, not {len(self)}")
        return self._map(lambda v: v.expand(count, *v.shape[1:]))

    def join(self, other: Conditioning) -> Conditioning:
        """The members of both, which have none in common."""
        if self._members().keys() & other._members().keys():
            raise ValueError("conditionings with members in common cannot be joined into one")
        return Conditioning(**self._members(), **other._members())

    def where(self, keep: Tensor, null: Conditioning) -> Conditioning:
        """Per item: this conditioning where `keep` (B,) is true, `null` (B or 1 items) elsewhere; same members."""
        other = null._members()
        if other.keys() != self._members().keys():
            raise ValueError("conditionings with different members cannot be mixed")
        return Conditioning(
            **{
                name: torch.where(keep.view(-1, *[1] * (value.ndim - 1)), value, other[name])
                for name, value in self._members().items()
            }
        )

    @staticmethod
    def cat(parts: Sequence[Conditioning]) -> Conditioning:
        """Join along the batch; all parts must hold the same members."""
        names = parts[0]._members().keys()
        if any(p._members().keys() != names for p in parts):
            raise ValueError("conditionings with different members cannot be joined")
        return Conditioning(**{n: torch.cat([p._members()[n] for p in parts]) for n in names})

    def _members(self) -> dict[str, Tensor]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        return Conditioning(**{name: function(value) for name, value in self._members().items()})
