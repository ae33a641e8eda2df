"""Pictures as evaluation sees them, and the training pictures, seen once and kept.

    pictures -> Eyes.see -> Seen: features, logits, small pixels, CLIP's vectors
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.models.clip import Clip
from ldm.progress import advancing
from ldm.weights import CLIP_FILE, folder_digest, load_clip
from training.data import Reader
from training.features import SHA256, Features
from training.files import write_atomically
from training.judging import resized
from training.processes import process_state
from training.steps import planes

FEATURES_PX = 128
PIXELS_PX = 32
READ_ROWS = 32


class Seen(NamedTuple):
    """Pictures as evaluation sees them: features (N, 1280) and logits (N, 1000) of EfficientNet-Lite0 at FEATURES_PX,
    the pictures themselves at PIXELS_PX, (N, 3 PIXELS_PX^2) in [-1, 1], and unit vectors (N, D) of a CLIP, if any."""

    features: Tensor
    logits: Tensor
    pixels: Tensor
    clip: Tensor

    def spaces(self) -> dict[str, Tensor]:
        """Where near and far are measured."""
        return {"efflite0": self.features, f"pixels at {PIXELS_PX} px": self.pixels}


@dataclass(frozen=True)
class Eyes:
    """The networks that look at pictures; digest: of the CLIP's folder."""

    network: Features
    clip: Clip | None = None
    digest: str = "none"

    @staticmethod
    def of(clip: str | Path | None, device: str) -> Eyes:
        network = Features().to(device)
        if clip is None:
            return Eyes(network)
        return Eyes(network, load_clip(clip).to(device), folder_digest(Path(clip), "open_clip_config.json", CLIP_FILE))

    @torch.no_grad()
    def see(self, pictures: Tensor) -> Seen:
        """Pictures (N, 3, H, W) in [-1, 1]."""
        found = [self.network.pooled(resized(part, FEATURES_PX)) for part in torch.split(pictures, READ_ROWS)]
        features, logits = (torch.cat(parts) for parts in zip(*found, strict=True))
        embedded = torch.zeros(len(pictures), 0) if self.clip is None else self.clip.pictures(pictures).cpu()
        return Seen(features, logits, resized(pictures, PIXELS_PX).flatten(1), embedded)


def shared(items: Sequence[Any], work: Callable[[Sequence[Any]], Any]) -> list[Any]:
    """`work` on this process's items, every so many-th; what all processes made, each with the places it is of."""
    state = process_state()
    rank, world = state.process_index, state.num_processes
    mine = [(list(range(rank, len(items), world)), work(items[rank::world]))] if rank < len(items) else []
    return gather_object(mine) if world > 1 else mine


def reference_of(reader: Reader, eyes: Eyes, cache: str | Path) -> Seen:
    """What is seen of all pictures of a set: computed once, then read from CACHE/seen-DIGEST.safetensors."""
    side = reader.config.size_px
    key = f"{reader.fingerprint} {side} {FEATURES_PX} {PIXELS_PX} {SHA256} {eyes.digest}"
    name = f"seen-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    path = Path(cache) / name
    if not path.is_file():
        rows = reader.rows

        def work(mine: Sequence[Any]) -> Seen:
            parts = []
            with advancing("features of the training pictures", len(mine)) as advance:
                for start in range(0, len(mine), READ_ROWS):
                    pixels = [reader.read(row).pixels for row in mine[start : start + READ_ROWS]]
                    parts.append(eyes.see(planes(torch.from_numpy(np.stack(pixels)))))
                    for _ in pixels:
                        advance()
            return Seen(*map(torch.cat, zip(*parts, strict=True)))

        found = shared(rows, work)
        order = torch.tensor([place for places, _ in found for place in places]).argsort()
        joined = map(torch.cat, zip(*(seen for _, seen in found), strict=True))
        whole = {name: x[order].contiguous() for name, x in zip(Seen._fields, joined, strict=True)}
        if process_state().is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: save_file(whole, file))
        process_state().wait_for_everyone()
    return Seen(**load_file(path))
