"""Pictures on disk: PNG with the recipe in its metadata, and grids."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

RECIPE_KEY = "latent-cascade"


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Pixels (B, 3, H, W) in [-1, 1], clipped -> (B, H, W, 3) uint8."""
    scaled = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 1).contiguous().numpy()


def visible(pictures: np.ndarray) -> list[np.ndarray]:
    """Pictures (B, H, W, 3), enlarged by whole pixels as often as they fit into 64 px, where one can see them."""
    times = max(1, 64 // pictures.shape[1])
    return list(pictures.repeat(times, 1).repeat(times, 2))


def grid(pictures: Sequence[np.ndarray], columns: int, gap_px: int = 4) -> np.ndarray:
    """Pictures (H, W, 3) uint8 of one size, row by row on white, `gap_px` apart."""
    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // columns)
    shape = (rows * (height + gap_px) + gap_px, columns * (width + gap_px) + gap_px, 3)
    canvas = np.full(shape, 255, dtype=np.uint8)
    for i, picture in enumerate(pictures):
        top = gap_px + (i // columns) * (height + gap_px)
        left = gap_px + (i % columns) * (width + gap_px)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def save_png(picture: np.ndarray, path: Path, recipe: dict[str, Any] | None = None) -> None:
    """Write (H, W, 3) or (H, W, 4) uint8 as PNG, whole or not at all. The recipe, escaped to ASCII, goes into a text
    chunk; equal input gives equal bytes."""
    info = PngInfo()
    if recipe is not None:
        info.add_text(RECIPE_KEY, json.dumps(recipe, sort_keys=True))
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        Image.fromarray(picture).save(partial, format="PNG", pnginfo=info)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_recipe(path: Path) -> dict[str, Any] | None:
    """The recipe a picture was made by, or None where it carries none."""
    with Image.open(path, formats=["PNG"]) as image:
        text = image.info.get(RECIPE_KEY)
    return json.loads(text) if isinstance(text, str) else None
