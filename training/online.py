"""The same items as a cache holds, computed when they are asked for: for a data set that is used once, or no disk.

    rows -> Reader.read -> picture_tensors -> moments;  captions of a batch -> caption_states
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.latents import Normalisation
from ldm.progress import progress
from ldm.text import TextEncoder
from ldm.weights import Codec
from training.cache import padded
from training.data import BadImage, Example, Reader, Report
from training.encode import cache_key
from training.encoders import LatentSums, caption_states, opaque_parts, picture_tensors, small_pictures
from training.rows import shown

STATISTICS_ITEMS = 4096
KEPT_PICTURES = 256  # an item's captions are asked for before its tensor


class Online:
    """What `Cache` gives, bit for bit, without a cache: items are read and encoded at every use.

    A sample known to be bad by the scan is no item. A picture that cannot be read is one, since only reading it can
    tell: the next readable one stands in for it, in every respect, so that there are as many items more than in a
    cache, which leaves it out. Statistics of the latents are those of the cache for a set of at most
    STATISTICS_ITEMS pictures; of a larger one only as many are measured, evenly spread, so that the start is quick:
    the standard error of a channel's mean is then at most 1/64 of its standard deviation.

    Every process of a launch has its own, and all are equal. Raises UserError when too much of the data is bad.
    """

    def __init__(self, reader: Reader, codec: Codec | None = None, text: TextEncoder | None = None,
                 scale: int | None = None) -> None:  # fmt: skip
        self.key = cache_key(reader, codec, text, scale)
        self.shapes: Tensor | None = None
        self._reader, self._codec, self._text = reader, codec, text
        self._rows, self._blocks = [], []
        self._report = Report()
        for number, block in enumerate(reader.blocks):
            for row in block.rows():
                self._report.seen += 1
                if row.fault:
                    self._report.bad.append((row.key, row.fault))
                else:
                    self._rows.append(row)
                    self._blocks.append(number)
        reader.judge(self._report, final=True)
        self._numbers = {"": 0}
        for row in self._rows:
            for caption in row.captions:
                self._numbers.setdefault(caption, len(self._numbers))
        self._strings = list(self._numbers)
        self._stand_ins: dict[int, int] = {}
        self._read = lru_cache(KEPT_PICTURES)(self._read_now)
        # as JSON gives it back, which is what it is compared with
        self.manifest: dict[str, Any] = {"key": json.loads(json.dumps(asdict(self.key)))}
        if codec is not None:
            self.manifest["normalisation"] = self._measure(codec)

    def __len__(self) -> int:
        return len(self._rows)

    def stored(self, indices: Sequence[int]) -> Tensor:
        """The tensors of items, stacked: pixels (B, S, S, 3) uint8 or moments (B, 2C, h, w) float16."""
        codec = self._codec.module if self._codec else None
        with closing(picture_tensors(map(self._example, indices), codec)) as computed:
            return torch.cat([tensor for _, tensor in computed])

    def low_res(self, indices: Sequence[int]) -> Tensor:
        """The small pictures of items, stacked: (B, s, s, 3) uint8; of a set with a scale."""
        assert self.key.scale is not None
        return small_pictures([self._example(index) for index in indices], self.key.scale)

    def opaque(self, indices: Sequence[int]) -> Tensor:
        """What is opaque of items, stacked: (B, S, S) uint8; of data whose transparency is a mask."""
        return opaque_parts([self._example(index) for index in indices])

    def captions(self, index: int) -> list[int]:
        """Indices of an item's captions, at least one."""
        return [self._numbers[caption] for caption in self._example(index).captions or ("",)]

    def record(self, index: int) -> dict[str, Any]:
        """An item's `key`, `captions` (the strings) and `fields`."""
        example = self._example(index)
        return {"key": example.key, "captions": list(example.captions or ("",)), "fields": example.fields}

    def text(self, captions: Sequence[int]) -> Conditioning:
        """Padded states and mask of captions, by caption index, computed now, each distinct one once."""
        if self._text is None:
            return Conditioning()
        distinct = list(dict.fromkeys(captions))
        found = caption_states(self._text, [self._strings[caption] for caption in distinct])
        states = dict(zip(distinct, found, strict=True))
        return padded([states[caption] for caption in captions], self._text.max_tokens, self._text.uses_mask)

    @property
    def null(self) -> Conditioning:
        """The encoder's output for the empty string, one item."""
        return self.text([0])

    @property
    def normalisation(self) -> Normalisation:
        """Per-channel statistics of the raw latents, measured at the start."""
        found = self.manifest["normalisation"]
        return Normalisation(mean=tuple(found["mean"]), std=tuple(found["std"]))

    def _example(self, index: int) -> Example:
        """The item, or the next one that can be read."""
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        place = self._stand_ins.get(index, index)
        while (found := self._read(place)) is None:
            place = (place + 1) % len(self)
            self._stand_ins[index] = place
        return found

    def _read_now(self, place: int) -> Example | None:
        """A sample, or None where it cannot be read, which is said and counted once."""
        row = self._rows[place]
        try:
            return self._reader.read(row)
        except BadImage as error:
            if all(key != row.key for key, _ in self._report.bad):
                print(f"{shown(row.key)}: {error}; the next picture stands in for it", flush=True)
                self._report.bad.append((row.key, str(error)))
                self._reader.judge(self._report, final=True)
            return None

    def _measure(self, codec: Codec) -> dict[str, list[float]]:
        """Statistics as the cache's writer takes them, of pictures in the groups in which it takes them."""
        count = min(len(self), STATISTICS_ITEMS)
        chosen = [k * len(self) // count for k in range(count)]
        by_block: dict[int, list[int]] = {}
        for place in chosen:
            by_block.setdefault(self._blocks[place], []).append(place)
        sums = LatentSums()
        for block, places in progress(by_block.items(), "measuring latents (blocks of the data)", len(by_block)):
            own, first = LatentSums(), 0
            for group, moments in picture_tensors(self._readable(places), codec.module):
                own.add(moments, block, first)
                first += len(group)
            sums.merge(own)
        return sums.statistics()

    def _readable(self, places: Sequence[int]) -> Iterator[Example]:
        return (found for found in map(self._read, places) if found is not None)
