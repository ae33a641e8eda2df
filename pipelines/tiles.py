"""Work on a large grid in overlapping windows of one size, blended: memory is bound by the window.

At every denoising step the windows are blended into one prediction for the whole grid (Bar-Tal et al. 2023,
"MultiDiffusion", eq. 5), whose noise is one field over all of it, so that windows cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """A rectangle of grid cells."""

    top: int
    left: int
    height: int
    width: int

    def of(self, x: Tensor, cells: int = 1) -> Tensor:
        """This part of (..., h cells, w cells), where a grid cell is `cells` elements wide."""
        rows = slice(self.top * cells, (self.top + self.height) * cells)
        return x[..., rows, self.left * cells : (self.left + self.width) * cells]


def windows(height: int, width: int, tile: int, overlap: int) -> list[Window]:
    """Windows of `tile` cells a side, or of the grid's side where that is smaller, that cover a grid evenly and
    overlap by at least `overlap` cells."""
    if not 0 <= overlap < tile:
        raise ValueError(f"an overlap of {overlap} does not fit a tile of {tile}")
    h, w = min(tile, height), min(tile, width)
    return [Window(top, left, h, w) for top in _starts(height, h, overlap) for left in _starts(width, w, overlap)]


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    if length == tile:
        return [0]
    count = -(-(length - overlap) // (tile - overlap))
    return [round(k * (length - tile) / (count - 1)) for k in range(count)]


def blended(work: Callable[[Sequence[Window]], Tensor], where: Sequence[Window], height: int, width: int, rows: int,
            cells: int = 1) -> Tensor:  # fmt: skip
    """`work` on the windows of a grid, `rows` at a time, the last call padded -> (1, C, height cells, width cells).

    work: windows -> (rows, C, window's height cells, width cells). A window's weight falls linearly to its edges,
    but for those of the grid.
    """
    total: Tensor | None = None
    weights = torch.zeros(height * cells, width * cells)
    for start in range(0, len(where), rows):
        chosen = list(where[start : start + rows])
        found = work(chosen + [chosen[0]] * (rows - len(chosen)))
        if total is None:
            total = found.new_zeros(found.shape[1], height * cells, width * cells)
        for window, part in zip(chosen, found, strict=False):
            down = _ramp(window.top, window.height, height, cells)
            across = _ramp(window.left, window.width, width, cells)
            weight = down[:, None] * across
            window.of(total, cells).add_(part * weight.to(part))
            window.of(weights, cells).add_(weight)
    assert total is not None
    return (total / weights.to(total))[None]


def _ramp(start: int, size: int, length: int, cells: int) -> Tensor:
    """Weights of a window along one side: 1 in its middle, falling towards an edge that another window covers."""
    at = (torch.arange(size * cells) + 0.5) / cells
    reach = size / 2
    low = at / reach if start > 0 else torch.ones_like(at)
    high = (size - at) / reach if start + size < length else torch.ones_like(at)
    return torch.minimum(low, high).clamp(max=1)
