"""Examples -> cache, the one writer.

    rows -> Reader -> Example -> pixels uint8, or LatentCodec.encode -> moments float16  -> shards
                   captions -> distinct captions -> TextEncoder -> real tokens' states float16 -> text.safetensors
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldm.config import UserError
from ldm.latents import LatentCodec, sample_moments
from ldm.progress import progress
from ldm.text import TextEncoder
from ldm.weights import Codec
from training.cache import FORMAT, ITEMS, MANIFEST, TEXT, Cache, CacheKey, sha256
from training.data import Example, Reader, fingerprint

SHARD_ITEMS = 4096
ENCODE_ROWS = 32
CAPTION_ROWS = 512


def encode(reader: Reader, root: str | Path, codec: Codec | None = None,
           text: TextEncoder | None = None) -> Cache:  # fmt: skip
    """The cache of what `reader` reads, written under `root` unless it is there already.

    codec None keeps the pixels themselves; text None keeps no text states.
    Raises UserError when too much of the data is bad or an encoder gives non-finite values.
    """
    key = CacheKey(
        fingerprint(reader.rows), reader.config.size_px, reader.config.background, reader.config.max_pixels,
        codec.digest if codec else None, text.digest if text else None
    )
    folder = key.folder(root)
    if (folder / MANIFEST).exists():
        return Cache(folder)
    partial = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{root}: no cache can be written there ({error.strerror}); name another with cache") from None
    try:
        _write(partial, key, reader, codec, text)
        if not (folder / MANIFEST).exists():  # another process may have written the same meanwhile
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Cache(folder)


def _write(partial: Path, key: CacheKey, reader: Reader, codec: Codec | None, text: TextEncoder | None) -> None:
    captions: dict[str, int] = {"": 0}
    items: list[dict[str, Any]] = []
    moments = _Statistics()
    shards = []
    for number, block in enumerate(_blocks(_tensors(reader, codec, items, captions), SHARD_ITEMS)):
        name = f"shard-{number:05d}.safetensors"
        if codec is not None:
            moments.add(block)
        save_file({"moments" if codec else "pixels": block}, partial / name)
        shards.append(name)
    manifest: dict[str, Any] = {
        "format": FORMAT, "key": vars(key), "count": len(items), "shards": shards,
        "refused": [{"key": k, "reason": reason} for k, reason in reader.report.bad],
    }  # fmt: skip
    if codec is not None:
        manifest["normalisation"] = moments.result()
    if text is not None:
        manifest["text"] = {"max_tokens": text.max_tokens, "uses_mask": text.uses_mask, "captions": len(captions)}
        save_file(_encode_captions(text, list(captions)), partial / TEXT)
    (partial / ITEMS).write_text(json.dumps(items), encoding="utf-8")
    manifest["files"] = {
        p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(partial.iterdir())
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


class _Statistics:
    """Mean and standard deviation per channel of a posterior draw, accumulated in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, moments: Tensor) -> None:
        noise = torch.randn(_half(moments), generator=torch.Generator().manual_seed(self.count))
        raw = sample_moments(moments.float(), noise).double()
        self.count += raw.numel() // raw.shape[1]
        self.total = self.total + raw.sum((0, 2, 3))
        self.squares = self.squares + (raw**2).sum((0, 2, 3))

    def result(self) -> dict[str, list[float]]:
        mean = self.total / self.count
        std = (self.squares / self.count - mean**2).clamp(min=0).sqrt()
        if bool((std < 1e-6).any()):
            raise UserError("a latent channel is constant over the data set: the codec is not trained")
        return {"mean": mean.tolist(), "std": std.tolist()}


def _half(moments: Tensor) -> tuple[int, ...]:
    return (moments.shape[0], moments.shape[1] // 2, *moments.shape[2:])


def _tensors(reader: Reader, codec: Codec | None, items: list[dict[str, Any]],
             captions: dict[str, int]) -> Iterator[Tensor]:  # fmt: skip
    """Batches of pixels or moments in the order of the data; fills `items` and `captions` on the way."""
    for batch in _groups(progress(reader, "encoding", total=len(reader)), ENCODE_ROWS):
        for example in batch:
            indices = [captions.setdefault(c, len(captions)) for c in example.captions or ("",)]
            items.append({"key": example.key, "captions": indices, "fields": example.fields})
        pixels = np.stack([e.pixels for e in batch])
        if codec is None:
            yield torch.from_numpy(pixels)
            continue
        moments = codec_moments(codec.module, torch.from_numpy(pixels)).to(torch.float16).contiguous()
        finite = moments.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise UserError(f"the codec gives non-finite latents for {batch[int((~finite).nonzero()[0])].key}")
        yield moments


@torch.no_grad()
def codec_moments(codec: LatentCodec, pixels: Tensor) -> Tensor:
    """uint8 pixels (B, H, W, 3) -> moments (B, 2C, h, w) float32, always computed at ENCODE_ROWS rows."""
    count = len(pixels)
    padded = torch.cat([pixels, pixels[:1].expand(ENCODE_ROWS - count, *pixels.shape[1:])])
    padded = padded.to(next(codec.parameters()).device)
    return codec.encode(padded.permute(0, 3, 1, 2).float() / 127.5 - 1)[:count].cpu()


def _groups(examples: Iterable[Example], size: int) -> Iterator[list[Example]]:
    group: list[Example] = []
    for example in examples:
        group.append(example)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _blocks(batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Join small batches into shards of about `size` items."""
    held: list[Tensor] = []
    for batch in batches:
        held.append(batch)
        if sum(map(len, held)) >= size:
            yield torch.cat(held)
            held = []
    if held:
        yield torch.cat(held)


def _encode_captions(text: TextEncoder, captions: list[str]) -> dict[str, Tensor]:
    parts, offsets = [], [0]
    for start in progress(range(0, len(captions), CAPTION_ROWS), "encoding captions (blocks of 512)"):
        states, mask = text.encode(captions[start : start + CAPTION_ROWS])
        for row in range(len(states)):
            kept = states[row] if mask is None else states[row][mask[row]]
            parts.append(kept.to(torch.float16).cpu())
            offsets.append(offsets[-1] + len(kept))
    joined = torch.cat(parts)
    if not bool(joined.isfinite().all()):
        raise UserError("the text encoder gives non-finite states")
    return {"states": joined, "offsets": torch.tensor(offsets)}
