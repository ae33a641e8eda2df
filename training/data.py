"""Data sets -> checked `Example(pixels, captions)`. Nothing of the user's is ever changed."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from ldm.config import UserError
from ldm.decode import Pixels, read_image, square, try_fit
from ldm.file_kinds import BadImage
from training.rows import DataConfig, Row, shown
from training.sources import Block, Collection, Pictures, digest_of, fingerprint, open_source
from training.workers import DEATHS, Broken, Pool, Slow

__all__ = [
    "BadImage", "Block", "DataConfig", "Example", "Reader", "Report", "Row",
    "fingerprint", "read_image", "rows", "square",
]  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A checked sample: `pixels` uint8 (size_px, size_px, 3) sRGB, or (H, W, 3) of one of the data's `shapes`; one or
    more captions, maybe empty. opaque: where transparency is a mask, uint8 (size_px, size_px), 255 for all."""

    pixels: Pixels
    captions: tuple[str, ...]
    key: str
    fields: dict[str, Any]
    opaque: Pixels | None = None


@dataclass
class Report:
    """What reading met: `bad` as (key, reason), `notes` counted, `facts` of the whole. `str(report)` lists it all."""

    seen: int = 0
    kept: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    facts: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.seen} samples: {self.kept} good, {len(self.bad)} bad"]
        lines += [f"bad   {shown(key)}: {reason}" for key, reason in self.bad]
        lines += [f"note  {note}: {count}" for note, count in sorted(self.notes.items())]
        lines += [f"fact  {name}: {value}" for name, value in self.facts.items()]
        return "\n".join(lines)


class Reader:
    """The good samples of a data set, in blocks, one by one or all in order.

    Iterating fills `report`, anew each time. `rows` narrows the set to some samples of a folder of pictures, as
    found by `rows(config)`; `shard_items` is the number of samples in a block where the data has no blocks itself.
    """

    def __init__(self, config: DataConfig, rows: Sequence[Row] | None = None, shard_items: int = 4096) -> None:
        self.config = config
        self.report = Report()
        self._collection = _usable(config, shard_items) if rows is None else Pictures(rows, shard_items, Counter())
        read = partial(try_fit, shapes=config.shapes, how=config.decoding)
        self._read, self._pool = read, Pool(read, config.workers, config.read_timeout_s)

    @cached_property
    def blocks(self) -> list[Block]:
        """The parts of the set, in order: each can be read apart from the others."""
        return self._collection.blocks

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of what a cache of this set depends on: names, sizes and captions, not the pictures' bytes."""
        return digest_of([block.fingerprint for block in self.blocks])

    @cached_property
    def _names(self) -> set[str]:
        return {block.name for block in self.blocks}

    @cached_property
    def total(self) -> int | None:
        """The number of samples, bad ones included; None where only scanning all of it can tell."""
        if isinstance(self._collection, Pictures):
            return len(self._collection.rows)
        counts = [block.count for block in self.blocks]
        return None if None in counts else sum(count for count in counts if count is not None)

    @cached_property
    def rows(self) -> list[Row]:
        """All samples, bad ones included: for tars, this scans every one."""
        if isinstance(self._collection, Pictures):
            return self._collection.rows
        return [row for block in self.blocks for row in block.rows()]

    def __len__(self) -> int:
        """The number of samples, bad ones included: for tars, this scans every one."""
        return len(self.rows) if self.total is None else self.total

    def __iter__(self) -> Iterator[Example]:
        """Raises UserError as soon as more than `max_bad` of the samples are certainly bad and five can be shown,
        at the latest at the end; and if none is good."""
        report = self.report
        report.seen, report.kept, report.bad, report.notes = 0, 0, [], Counter(self._collection.notes)
        for block in self.blocks:
            yield from self.examples(block, report)
        self.judge(report, final=True)

    def examples(self, block: Block, report: Report) -> Iterator[Example]:
        """The good samples of one of `blocks` in order; the others, and notes, are added to `report`.

        `data.workers` processes read ahead. Raises UserError as `judge` does, when five bad ones can be shown,
        and for a sample that no process survives reading.
        """
        scan = block.scan()
        report.notes.update(scan.notes)
        for row, found in zip(scan.rows, self._results(scan.rows), strict=True):
            report.seen += 1
            if isinstance(found, str):
                report.bad.append((row.key, found))
                if self.total is not None:
                    self.judge(report, final=False)
                continue
            report.kept += 1
            report.notes.update(set(found[1]))
            yield _example(row, found[0])
        if block is self.blocks[0]:
            self.judge(report, final=False)

    def read(self, row: Row) -> Example:
        """One sample, read now, by this process. Raises BadImage."""
        found = self._read(row.fault or self._collection.source(row))
        if isinstance(found, str):
            raise BadImage(found)
        return _example(row, found[0])

    def judge(self, report: Report, final: bool) -> None:
        """Raise UserError if more than `max_bad` of the set, or all of it, is bad by this report.

        Before the final judgement five bad samples are needed, and of a set whose size is not known all those
        seen must be bad: judge that after a whole block.
        """
        bad, total = len(report.bad), self.total
        if not final and (bad < 5 or (total is None and bad < report.seen)):
            return
        total = report.seen if total is None else total
        if final and not total:
            split = "" if self.config.split is None else f" of split {self.config.split!a}"
            raise UserError(f"{shown(self.config.path)}: there is no sample{split}.")
        # a damaged tar is one bad sample, but what it no longer gives is its share of all tars
        parts = 0 if isinstance(self._collection, Pictures) else len(self.blocks)
        damaged = sum(key in self._names for key, _ in report.bad) if parts else 0
        share = self.config.max_bad
        if bad > share * total + 1e-9 or damaged > share * parts + 1e-9 or (total and bad == total):
            raise _too_many_bad(report, self.total, self.config)

    def hold_out(self, stride: int) -> tuple[Reader, Reader]:
        """Readers of the training items and of the held-out ones, which are every `stride`-th.

        In a folder of pictures these are counted from the first; in tars and tables, within each block from
        a place that depends on the block's number. Raises UserError for a set of fewer than two samples.
        """
        if self.total is not None and self.total < 2:
            raise UserError(f"{self.config.path}: one sample is too few: one is held out of training")
        kept, held = self._collection.hold_out(stride)
        return self._of(kept, self.config), self._of(held, self.config)

    def squares(self) -> Reader:
        """The same samples, cut to squares."""
        if self.config.bucket_px is None:
            return self
        return self._of(self._collection, replace(self.config, bucket_px=None))

    @staticmethod
    def _of(collection: Collection, config: DataConfig) -> Reader:
        made = Reader(config, ())
        made._collection = collection
        return made

    def _results(self, rows: list[Row]) -> Iterator[tuple[Pixels, list[str]] | str]:
        if not self.config.workers:
            for row in rows:
                yield self._read(row.fault or self._collection.source(row))
            return
        whole = [row for row in rows if not row.fault]
        results = self._pool.map(map(self._collection.source, whole))
        for row in rows:
            try:
                found = row.fault or next(results)
            except Broken as error:
                raise UserError(
                    f"{shown(self.config.path)}: reading {shown(row.key)} ends its process, {DEATHS} times: {error}. "
                    "SIGKILL is what a lack of memory looks like: lower data.workers. Else remove the file"
                ) from None
            yield f"reading took over {self.config.read_timeout_s:g} s" if isinstance(found, Slow) else found


def _example(row: Row, pixels: Pixels) -> Example:
    opaque = pixels[..., 3] if pixels.shape[2] > 3 else None
    return Example(np.ascontiguousarray(pixels[..., :3]), row.captions, row.key, row.fields, opaque)


def rows(config: DataConfig) -> list[Row]:
    """All samples, found without decoding: metadata order, or sorted order below sorted folders.

    Raises UserError, listing the accepted layouts, when there is no usable sample.
    """
    return Reader(config).rows


def pixels_of(row: Row, collection: Collection, config: DataConfig, notes: Counter[str]) -> Pixels:
    """A sample's picture, whole; what was done to it is noted. Raises BadImage where it cannot be read."""
    source = row.fault or collection.source(row)
    if isinstance(source, str):
        raise BadImage(source)
    pixels, found = read_image(source, config.decoding)
    notes.update(set(found))
    return pixels


def _too_many_bad(report: Report, total: int | None, config: DataConfig) -> UserError:
    first = "\n".join(f"  {shown(key)}: {reason}" for key, reason in report.bad[:5])
    place, bad = shown(config.path), len(report.bad)
    share = "none is good" if bad == (total or report.seen) else f"more than data.max_bad = {config.max_bad:g} allows"
    in_all = "" if total is None else f" ({total} in all)"
    return UserError(
        f"{place}: {bad} of the first {report.seen} samples are bad{in_all}; {share}:\n{first}\n"
        f"`ldm data check {shlex.quote(place)}` lists all of them. "
        "Repair or remove them, or raise data.max_bad."
    )


def _usable(config: DataConfig, shard_items: int) -> Collection:
    collection = open_source(config, shard_items)
    if isinstance(collection, Pictures) and all(row.fault for row in collection.rows):
        bad = [(row.key, row.fault) for row in collection.rows]
        raise _too_many_bad(Report(seen=len(bad), bad=bad), len(bad), config)
    return collection
