"""The cache of what never changes in training: its format, key, manifest and the one reader.

    CACHE/<key>/shard-00000.safetensors  `pixels` (n, S, S, 3) uint8 or `moments` (n, 2C, h, w) float16 of block 0;
                                         with a scale also `low_res` (n, S / scale, S / scale, 3) uint8; where
                                         transparency is a mask also `opaque` (n, S, S) uint8; of pictures of several
                                         shapes each flat, with zeros up to the length of a square's
    CACHE/<key>/shard-00000.json         its items (key, captions, fields), refused samples, sums; written after them
    CACHE/<key>/text-00000.safetensors   of CAPTION_BLOCK distinct captions: `states` (tokens, D) float16 end to end,
                                         `offsets` (captions + 1,) int64; caption 0 is the empty one, the null
    CACHE/<key>/text-00000.json          a digest of these captions; written after their states
    CACHE/<key>/index.safetensors        `captions` int64 of all items, end to end; `first` (items + 1,) int64; of
                                         pictures of several shapes `shapes` (items, 3) int64, of the tensors
    CACHE/<key>/manifest.json            format, key, counts, size and SHA-256 of every file, refused; written last
    CACHE/<key>/.lock                    held by the job that writes

The key is a digest of what changes the bytes: data fingerprint, how pictures are read, codec, text encoder.
"""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.config import UserError, parse
from ldm.decode import Decoding
from ldm.latents import Normalisation

FORMAT = 3
CAPTION_BLOCK = 4096
HEADER_BYTES = 512
MANIFEST, INDEX = "manifest.json", "index.safetensors"
OPEN_FILES = 4096  # mapped at once; the kernel allows about 65,000
OPEN_RECORDS = 4


@dataclass(frozen=True)
class CacheKey:
    """What a cache depends on. codec: digest, or None for a cache of pixels; text: digest, or None; scale: of the
    small pictures kept beside the large, or None for none; bucket_px: of pictures that keep their shape."""

    data: str
    size_px: int
    decoding: Decoding
    codec: str | None
    text: str | None
    scale: int | None = None
    bucket_px: int | None = None

    @property
    def masked(self) -> bool:
        """Whether what is opaque of the pictures is kept too."""
        return self.decoding.transparency == "mask"

    @property
    def tensors(self) -> list[str]:
        """The names of what a shard holds."""
        first = "pixels" if self.codec is None else "moments"
        return [first, *(["low_res"] if self.scale else []), *(["opaque"] if self.masked else [])]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps([FORMAT, asdict(self)], sort_keys=True).encode()).hexdigest()

    def folder(self, root: str | Path) -> Path:
        return Path(root) / self.digest[:16]


def shard_name(number: int) -> str:
    """The stem of a block's files."""
    return f"shard-{number:05d}"


def text_name(number: int) -> str:
    """The stem of the files of captions number * CAPTION_BLOCK and on."""
    return f"text-{number:05d}"


def save_rows(path: Path, names: Sequence[str], parts: Iterable[Sequence[Tensor]]) -> None:
    """A safetensors file of tensors whose rows come in parts, so that a shard need not fit in memory.

    The header comes first and needs the number of rows: its place is kept, and filled in last, padded with spaces
    as the format allows. A tensor follows another whole: those after the first wait in files of their own.
    """
    dtypes = {torch.uint8: "U8", torch.float16: "F16"}
    entries = {name: {"dtype": "U8", "shape": [0]} for name in names}
    rows = 0
    with path.open("wb") as file, ExitStack() as stack:
        file.write(bytes(HEADER_BYTES))
        others = [stack.enter_context(TemporaryFile(dir=path.parent)) for _ in names[1:]]
        files: list[Any] = [file, *others]
        for part in parts:
            rows += len(part[0])
            for name, to, tensor in zip(names, files, part, strict=True):
                to.write(tensor.numpy().data)
                entries[name] = {"dtype": dtypes[tensor.dtype], "shape": [rows, *tensor.shape[1:]]}
        begin = 0
        for name, other in zip(names, [None, *others], strict=True):
            if other is not None:
                other.seek(0)
                copyfileobj(other, file)
            end = file.tell() - HEADER_BYTES
            entries[name]["data_offsets"], begin = [begin, end], end
        header = json.dumps(entries).encode().ljust(HEADER_BYTES - 8)
        file.seek(0)
        file.write(len(header).to_bytes(8, "little") + header)


def padded(states: Sequence[Tensor], length: int, uses_mask: bool) -> Conditioning:
    """States (n, D) float16 of each caption's real tokens -> (B, length, D) float32 and the mask of real tokens."""
    # numpy: for tensors as small as these, torch would wait for its threads longer than it computes
    counts = np.array([len(s) for s in states])
    mask = np.arange(length) < counts[:, None]
    out = np.zeros((len(states), length, states[0].shape[1]), np.float32)
    out[mask] = np.concatenate([s.numpy() for s in states])
    return Conditioning(torch.from_numpy(out), torch.from_numpy(mask) if uses_mask else None)


class Items(Protocol):
    """What training reads of a data set; `Cache` says what each member gives."""

    manifest: dict[str, Any]
    key: CacheKey
    shapes: Tensor | None

    def __len__(self) -> int: ...

    def stored(self, indices: Sequence[int]) -> Tensor: ...

    def low_res(self, indices: Sequence[int]) -> Tensor: ...

    def opaque(self, indices: Sequence[int]) -> Tensor: ...

    def captions(self, index: int) -> list[int]: ...

    def record(self, index: int) -> dict[str, Any]: ...

    def text(self, captions: Sequence[int]) -> Conditioning: ...

    @property
    def null(self) -> Conditioning: ...

    @property
    def normalisation(self) -> Normalisation: ...


class Cache:
    """Reads a finished cache, whose tensors are memory-mapped: opening it reads the manifest alone.

    Raises UserError where it is incomplete or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            if self.manifest["format"] != FORMAT:
                raise ValueError(f"its format is {self.manifest['format']}, this version reads {FORMAT}")
            for name, entry in self.manifest["files"].items():
                if (folder / name).stat().st_size != entry["bytes"]:
                    raise ValueError(f"{name} is damaged")
            self.key = parse(CacheKey, self.manifest["key"], MANIFEST)
            self._starts = [0, *accumulate(self.manifest["shards"])]
            index = load_file(folder / INDEX)
            self._first, self._captions = index["first"], index["captions"]
            self.shapes = index.get("shapes")
            if not len(self._first) - 1 == self._starts[-1] == self.manifest["count"]:
                raise ValueError("its counts disagree")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise self._unusable(error) from None
        self._mapped = lru_cache(OPEN_FILES)(self._map)
        self._records = lru_cache(OPEN_RECORDS)(self._load_records)

    def __len__(self) -> int:
        return int(self.manifest["count"])

    def stored(self, indices: Sequence[int]) -> Tensor:
        """The stored tensors of items, stacked: pixels (B, S, S, 3) uint8 or moments (B, 2C, h, w) float16.

        shapes: (items, 3) of these tensors, where they differ; None for squares. Items asked for together must be of
        one shape.
        """
        found = self._rows(self.key.tensors[0], indices)
        if self.shapes is None:
            return found
        shape, *others = torch.unique(self.shapes[list(indices)], dim=0).tolist()
        if others:
            raise ValueError(f"items of {1 + len(others)} shapes cannot be stacked")
        return found[:, : math.prod(shape)].reshape(len(found), *shape)

    def low_res(self, indices: Sequence[int]) -> Tensor:
        """The small pictures of items, stacked: (B, s, s, 3) uint8; of a cache with a scale."""
        return self._rows("low_res", indices)

    def opaque(self, indices: Sequence[int]) -> Tensor:
        """What is opaque of items, stacked: (B, S, S) uint8; of a cache where transparency is a mask."""
        return self._rows("opaque", indices)

    def _rows(self, name: str, indices: Sequence[int]) -> Tensor:
        found = []
        for index in indices:
            shard, place = self._place(index)
            found.append(self._mapped(shard_name(shard))[name][place].numpy())
        return torch.from_numpy(np.stack(found))

    def captions(self, index: int) -> list[int]:
        """Indices of an item's captions, at least one."""
        return self._captions[int(self._first[index]) : int(self._first[index + 1])].tolist()

    def record(self, index: int) -> dict[str, Any]:
        """An item's `key`, `captions` (the strings) and `fields`."""
        shard, place = self._place(index)
        return self._records(shard)[place]

    def text(self, captions: Sequence[int]) -> Conditioning:
        """Padded states and mask of cached captions, by caption index; length and mask as the encoder gave."""
        facts = self.manifest["text"]
        if facts is None:
            return Conditioning()
        states = []
        for caption in captions:
            number, place = divmod(caption, CAPTION_BLOCK)
            mapped = self._mapped(text_name(number))
            start, end = mapped["offsets"][place : place + 2].tolist()
            states.append(mapped["states"][start:end])
        return padded(states, facts["max_tokens"], facts["uses_mask"])

    @property
    def null(self) -> Conditioning:
        """The encoder's output for the empty string, one item."""
        return self.text([0])

    @property
    def normalisation(self) -> Normalisation:
        """Per-channel statistics of the raw latents, measured when the cache was written."""
        found = self.manifest["normalisation"]
        return Normalisation(mean=tuple(found["mean"]), std=tuple(found["std"]))

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of an item, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        shard = bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _map(self, stem: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / f"{stem}.safetensors")
        except (OSError, SafetensorError) as error:
            raise self._unusable(error) from None

    def _load_records(self, shard: int) -> list[dict[str, Any]]:
        try:
            found = json.loads((self.folder / f"{shard_name(shard)}.json").read_text(encoding="utf-8"))
            return list(found["items"])
        except (OSError, ValueError, KeyError) as error:
            raise self._unusable(error) from None

    def _unusable(self, error: Exception) -> UserError:
        return UserError(f"{self.folder}: not a whole cache ({error}); delete it and encode again")
