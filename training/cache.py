"""The cache of what never changes in training: its format, key, manifest and the one reader.

    CACHE/<key>/manifest.json          format, key, counts, SHA-256 of every file, refused items; written last
    CACHE/<key>/items.json             per item: key, fields, indices of its captions
    CACHE/<key>/shard-00000.safetensors   `pixels` (n, S, S, 3) uint8, or `moments` (n, 2C, h, w) float16
    CACHE/<key>/text.safetensors       `states` (tokens, D) float16 of every distinct caption, end to end, and
                                       `offsets` (captions + 1,) int64; caption 0 is the empty one, the null

The key is a digest of what changes the bytes: data fingerprint, how pictures are read, codec, text encoder.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.config import UserError
from ldm.latents import Normalisation

FORMAT = 1
ITEMS, TEXT, MANIFEST = "items.json", "text.safetensors", "manifest.json"


@dataclass(frozen=True)
class CacheKey:
    """What a cache depends on. codec: digest, or None for a cache of pixels; text: digest, or None."""

    data: str
    size_px: int
    background: tuple[int, int, int]
    max_pixels: int
    codec: str | None
    text: str | None

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([FORMAT, vars(self)], sort_keys=True).encode()).hexdigest()

    def folder(self, root: str | Path) -> Path:
        return Path(root) / self.digest[:16]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Cache:
    """Reads a finished cache; tensors are memory-mapped. Raises UserError where it is incomplete or damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if self.manifest["format"] != FORMAT:
                raise UserError(f"{folder}: cache format {self.manifest['format']}, this version reads {FORMAT}")
            for name, entry in self.manifest["files"].items():
                path = folder / name
                if path.stat().st_size != entry["bytes"]:
                    raise ValueError(f"{name} is damaged")
            self.items: list[dict[str, Any]] = json.loads((folder / ITEMS).read_text(encoding="utf-8"))
            shards = [load_file(folder / name) for name in self.manifest["shards"]]
            text = load_file(folder / TEXT) if TEXT in self.manifest["files"] else {}
            self._shards = [next(iter(shard.values())) for shard in shards]
        except (OSError, ValueError, KeyError, StopIteration, SafetensorError) as error:
            raise UserError(f"{folder}: not a whole cache ({error}); delete it and encode again") from None
        self._starts = [0]
        for shard in self._shards:
            self._starts.append(self._starts[-1] + len(shard))
        self._states, self._offsets = text.get("states"), text.get("offsets")

    def __len__(self) -> int:
        return len(self.items)

    def item(self, index: int) -> Tensor:
        """The stored tensor of one item: pixels (S, S, 3) uint8 or moments (2C, h, w) float16."""
        shard = index * len(self._shards) // max(len(self), 1)
        while index < self._starts[shard]:
            shard -= 1
        while index >= self._starts[shard + 1]:
            shard += 1
        return self._shards[shard][index - self._starts[shard]]

    def text(self, captions: list[int]) -> Conditioning:
        """Padded states and mask of cached captions, by caption index; length and mask as the encoder gave."""
        if self._states is None or self._offsets is None:
            return Conditioning()
        length, uses_mask = self.manifest["text"]["max_tokens"], self.manifest["text"]["uses_mask"]
        states = torch.zeros(len(captions), length, self._states.shape[1])
        mask = torch.zeros(len(captions), length, dtype=torch.bool)
        for row, caption in enumerate(captions):
            start, end = int(self._offsets[caption]), int(self._offsets[caption + 1])
            states[row, : end - start] = self._states[start:end].float()
            mask[row, : end - start] = True
        return Conditioning(states, mask if uses_mask else None)

    @property
    def null(self) -> Conditioning:
        """The encoder's output for the empty string, one item."""
        return self.text([0])

    @property
    def normalisation(self) -> Normalisation:
        """Per-channel statistics of the raw latents, measured when the cache was written."""
        found = self.manifest["normalisation"]
        return Normalisation(mean=tuple(found["mean"]), std=tuple(found["std"]))
