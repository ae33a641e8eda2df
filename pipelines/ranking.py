"""Choosing among pictures by CLIP: draw many, keep those most like their prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ldm.config import UserError
from ldm.models.clip import Clip
from ldm.weights import load_clip


def load_ranker(n: int, best_of: int | None, folder: str | Path | None) -> Clip | None:
    """The CLIP that ranks, if any is to. Raises UserError where it is not there, or cannot choose `n`."""
    if best_of is None:
        return None
    if folder is None:
        raise UserError("--best-of: name the CLIP that chooses by --clip; configs/emoji/clip.yaml trains one")
    if best_of < n:
        raise UserError(f"--best-of {best_of}: must be at least --n {n}, the number to keep")
    return load_clip(folder)


@torch.no_grad()
def most_like(clip: Clip, prompts: Sequence[str], pictures: Tensor, n: int) -> list[int]:
    """Of pictures (P K, 3, H, W), K of each prompt in turn, the places of the `n` most like it, best first."""
    found = clip.pictures(pictures)
    own = clip.texts(prompts).repeat_interleave(len(found) // len(prompts), dim=0)
    similar = (found * own).sum(1).view(len(prompts), -1)
    first = torch.arange(len(prompts), device=similar.device)[:, None] * similar.shape[1]
    places: list[int] = (similar.topk(n, dim=1).indices + first).flatten().tolist()
    return places
