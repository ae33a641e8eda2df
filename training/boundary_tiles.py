"""What tiles cost: pictures drawn in tiles against the same drawn at once, and whether the tiles' borders show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.cascade import Cascade
from pipelines.stage import Stage
from pipelines.tiles import Window
from training.boundary import Held, consistency
from training.metrics import psnr

NEIGHBOURS = (1, 2, 3)  # lines beside a border, on both sides, a small pixel apart: its edges are not like its middle


def tiled_against_whole(cascade: Cascade, stage: Stage, held: Held) -> dict[str, Any]:
    """An SR stage on the large pictures, larger than it was trained on.

    seam: the mean |gradient| across the borders of tiles over that of the columns and rows beside them, in tiles and
    at once, where it tells of the pictures alone; consistency_db in both; psnr_db of one against the other. Picture i
    is moved by i small pixels, round its edges: straight lines of drawings lie on even coordinates, as borders do.
    """
    small = torch.cat([picture[None].roll((i, i), (-2, -1)) for i, picture in enumerate(held.large)])
    own = cascade.only(stage.config.name).stages[0]
    assert own.config.low_res is not None
    scale = own.config.low_res.scale
    height, width = (side * scale for side in small.shape[-2:])
    cell = stage.codec.module.config.factor
    where = stage.tiles(height // cell, width // cell)
    found: dict[str, list[Any]] = {"tiled": [], "whole": [], "psnr": [], "consistency": []}
    for i, caption in enumerate(held.captions):
        drawn = {}
        for name, tile in (("tiled", None), ("whole", max(height, width))):
            alone = Cascade([replace(own, tile_px=tile)], cascade.text)
            drawn[name] = alone.draw([caption], [i], low_res=small[i : i + 1])[-1]
            found[name].append(_across(drawn[name], where, cell, scale))
        found["psnr"].append(float(psnr(drawn["tiled"], drawn["whole"])))
        found["consistency"].append([float(consistency(drawn[name], small[i : i + 1])) for name in ("tiled", "whole")])
    seams = {name: np.array(found[name]).sum(0) for name in ("tiled", "whole")}
    agreement = np.array(found["consistency"]).mean(0).tolist()
    return {
        "pictures": len(held), "side_px": [height, width], "tiles": len(where),
        "seam": {name: float(border / beside) for name, (border, beside) in seams.items()},
        "consistency_db": dict(zip(("tiled", "whole"), agreement, strict=True)),
        "psnr_db": float(np.mean(found["psnr"])),
    }  # fmt: skip


def _across(picture: Tensor, where: Sequence[Window], cell: int, scale: int) -> tuple[float, float]:
    """Mean |gradient| across borders, and across the lines beside them, of (1, 3, H, W)."""
    border, beside = [], []
    down = {edge for w in where for edge in (w.top, w.top + w.height)}
    across = {edge for w in where for edge in (w.left, w.left + w.width)}
    for axis, edges in ((-2, down), (-1, across)):
        steps = picture.diff(dim=axis).abs().mean(dim=[d for d in range(4) if d != picture.ndim + axis]).numpy()
        for edge in (e * cell for e in edges if 0 < e * cell < picture.shape[axis]):
            border.append(steps[edge - 1])
            lines = [edge - 1 + side * n * scale for n in NEIGHBOURS for side in (-1, 1)]
            beside += [steps[line] for line in lines if 0 <= line < len(steps)]
    return float(np.mean(border)), float(np.mean(beside))
