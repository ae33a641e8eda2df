"""What every stage's training has in common: its config, held-out items, caches, and the folder it ends in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal, Self

from ldm.config import Config
from ldm.text import TextEncoder
from ldm.weights import Codec
from training.cache import Cache, Items
from training.data import DataConfig, Reader
from training.ema import EmaConfig
from training.encode import encode
from training.engine import LoopConfig
from training.files import temporary
from training.online import Online
from training.optim import OptimConfig

EVALUATION_ROWS = 16


@dataclass(frozen=True)
class ValidationConfig(Config):
    """Held-out items: a split of the same data. Where that is the training split itself, which is so for data
    without splits, every `stride`-th item is held out of training. items: evaluate that many of them, evenly
    spread, and not all."""

    split: str | None = "combos"
    stride: int = 20
    items: int | None = None

    def __post_init__(self) -> None:
        if self.stride < 2:
            raise ValueError(f"stride must be at least 2, not {self.stride}")
        if self.items is not None and self.items < 1:
            raise ValueError(f"items must be at least 1, not {self.items}")

    def readers(self, data: DataConfig, shard_items: int) -> tuple[Reader, Reader]:
        """Readers of the training items and of the held-out ones, which have none in common and are squares."""
        seen = Reader(data, shard_items=shard_items)
        if self.split == data.split:
            seen, held = seen.hold_out(self.stride)
        else:
            held = Reader(replace(data, split=self.split), shard_items=shard_items)
        return seen, held.squares()

    def chosen(self, held_out: Cache) -> list[int]:
        """Indices of the items to evaluate."""
        count = min(len(held_out), self.items or len(held_out))
        return [k * len(held_out) // count for k in range(count)]


@dataclass(frozen=True, kw_only=True)
class StageRun(Config):
    """What every `ldm train` says.

    seed: of weights and draws. cache: folder that caches are written to; encode: `cached` computes what never
    changes once, `online` in each step; shard_items: items of a cache's shard. init: a folder of released weights
    to start from, with fresh averages and optimizer.
    """

    data: DataConfig
    loop: LoopConfig
    cache: str = "cache"
    encode: Literal["cached", "online"] = "cached"
    shard_items: int = 4096
    init: str | None = None
    seed: int = 0
    validation: ValidationConfig = ValidationConfig()
    optim: OptimConfig = OptimConfig()
    ema: EmaConfig = EmaConfig()

    SHAPES: ClassVar[bool] = False  # whether it can train on pictures that are not squares
    MASKS: ClassVar[bool] = False  # whether it can leave what is transparent out of its loss

    def __post_init__(self) -> None:
        if self.shard_items < 1:
            raise ValueError("shard_items must be at least 1")
        if self.data.bucket_px is not None and not self.SHAPES:
            raise ValueError("data.bucket_px is of a base's training: this kind of run sees squares")
        if self.data.transparency == "mask" and not self.MASKS:
            raise ValueError("data.transparency as a mask is of a base's training: this kind of run learns all it sees")
        if self.data.bucket_px is not None and (self.encode == "online" or self.loop.cuda_graphs):
            raise ValueError("data.bucket_px sorts items of a cache into batches of several shapes: set encode=cached "
                             "and loop.cuda_graphs=false")  # fmt: skip

    def shortened(self, folder: Path, rows: int) -> Self:
        """For a rehearsal: of at most `rows` items, cached in `folder`."""
        limit = min(self.data.limit or rows, rows)
        return replace(self, cache=str(folder / "cache"), data=replace(self.data, limit=limit))

    def caches(self, readers: tuple[Reader, Reader], codec: Codec | None = None, text: TextEncoder | None = None,
               scale: int | None = None) -> tuple[Items, Cache]:  # fmt: skip
        """The training items, and the held-out ones. Called by all processes."""
        held_out = encode(readers[1], self.cache, codec, text, scale)
        if self.encode == "online":
            return Online(readers[0], codec, text, scale), held_out
        return encode(readers[0], self.cache, codec, text, scale), held_out


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """A folder to fill that takes the place of `folder` once filled; one that is there is kept until then."""
    partial = temporary(folder)
    try:
        yield partial
        if folder.exists():
            old = folder.rename(temporary(folder))
            partial.rename(folder)
            shutil.rmtree(old)
        else:
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
