"""Folders of pictures -> checked `Example(pixels, captions)`. Nothing of the user's is ever changed."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ldm.config import UserError
from ldm.progress import progress
from training.decode import BadImage, Pixels, read_image
from training.rows import DataConfig, Row, Scan, scan_folder, shown

__all__ = [
    "BadImage", "DataConfig", "Example", "Reader", "Report", "Row",
    "check", "fingerprint", "read_image", "rows", "square",
]  # fmt: skip


@dataclass(frozen=True)
class Example:
    """A checked sample: `pixels` uint8 (size_px, size_px, 3) sRGB; one or more captions, maybe empty."""

    pixels: Pixels
    captions: tuple[str, ...]
    key: str
    fields: dict[str, Any]


@dataclass
class Report:
    """What reading met: `bad` as (key, reason), `notes` counted. `str(report)` lists all of it."""

    seen: int = 0
    kept: int = 0
    bad: list[tuple[str, str]] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.seen} samples: {self.kept} good, {len(self.bad)} bad"]
        lines += [f"bad   {shown(key)}: {reason}" for key, reason in self.bad]
        lines += [f"note  {note}: {count}" for note, count in sorted(self.notes.items())]
        return "\n".join(lines)


class Reader:
    """Iterates over the good samples of a folder; `report` is filled on the way and starts anew each time.

    `rows` narrows it to some samples, as found by `rows(config)`. Raises UserError as soon as more than
    `max_bad` of the samples are certainly bad and five can be shown, at the latest at the end; and if none
    is good.
    """

    def __init__(self, config: DataConfig, rows: Sequence[Row] | None = None) -> None:
        scan = _usable(config) if rows is None else Scan(list(rows))
        self.config = config
        self.rows = scan.rows
        self.report = Report()
        self._notes = scan.notes

    def __len__(self) -> int:
        """The number of samples, bad ones included."""
        return len(self.rows)

    def __iter__(self) -> Iterator[Example]:
        report = self.report
        report.seen, report.kept, report.bad, report.notes = 0, 0, [], Counter(self._notes)
        for row in self.rows:
            report.seen += 1
            try:
                pixels = square(_pixels(row, self.config, report.notes), self.config.size_px)
            except BadImage as error:
                report.bad.append((row.key, str(error)))
                if len(report.bad) >= 5:
                    self._judge()
                continue
            report.kept += 1
            yield Example(pixels, row.captions, row.key, row.fields)
        self._judge()

    def _judge(self) -> None:
        report, total = self.report, len(self.rows)
        allowed = self.config.max_bad * total + 1e-9
        if len(report.bad) > allowed or (total and len(report.bad) == total):
            raise _too_many_bad(report, total, self.config)


def rows(config: DataConfig) -> list[Row]:
    """Scan the folder once, without decoding: metadata order, or sorted order below sorted folders.

    Raises UserError, listing the accepted layouts, when there is no usable sample.
    """
    return _usable(config).rows


def square(pixels: Pixels, size_px: int) -> Pixels:
    """Centre crop to a square, then down to (size_px, size_px, 3): area for whole factors, else Lanczos.

    An odd surplus loses its extra line at the bottom or right. Raises BadImage if a side is under `size_px`.
    """
    height, width = pixels.shape[:2]
    side = min(height, width)
    if side < size_px:
        raise BadImage(f"smaller than target ({width}x{height} < {size_px})")
    top, left = (height - side) // 2, (width - side) // 2
    crop = pixels[top : top + side, left : left + side]
    image = Image.fromarray(crop)
    if side % size_px:
        return np.array(image.resize((size_px, size_px), Image.Resampling.LANCZOS))
    return np.array(image.reduce(side // size_px))


def fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 over key, size in bytes and captions of each row, in order: what a cache of them depends on.

    Contents are not hashed, which would read the whole set: an edit that keeps the size to the byte goes
    unseen. Times of change do not count, so copies of a folder agree.
    """
    digest = hashlib.sha256()
    for row in rows:
        try:
            size = os.stat(row.path).st_size
        except (OSError, ValueError):
            size = -1
        digest.update(json.dumps([row.key, size, row.captions]).encode() + b"\n")
    return digest.hexdigest()


def check(path: str | Path, size_px: int | None = None) -> Report:
    """Read every sample of a folder and report all that is wrong, changing nothing; `ldm data check DIR`.

    Samples under `size_px` are bad when it is given; the shortest side is noted in any case. Identical
    pictures are counted, those in another split apart. Raises UserError when there is no sample at all.
    """
    config = DataConfig(path=str(path))
    scan = scan_folder(config)
    report = Report(notes=scan.notes)
    smallest: tuple[int, str] | None = None
    split_of: dict[bytes, Any] = {}
    for row in progress(scan.rows, "checking"):
        report.seen += 1
        try:
            pixels = _pixels(row, config, report.notes)
            if size_px is not None:
                square(pixels, size_px)
        except BadImage as error:
            report.bad.append((row.key, str(error)))
            continue
        report.kept += 1
        side = min(pixels.shape[:2])
        smallest = min(smallest or (side, row.key), (side, row.key))
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        split = row.fields.get("split")
        if digest in split_of:
            same = split_of[digest] == split
            report.notes["identical picture" if same else "identical picture in another split"] += 1
        split_of.setdefault(digest, split)
    if smallest:
        report.notes[f"shortest side {smallest[0]} px ({shown(smallest[1])})"] = 1
    return report


def _pixels(row: Row, config: DataConfig, notes: Counter[str]) -> Pixels:
    if row.fault:
        raise BadImage(row.fault)
    pixels, found = read_image(row.path, background=config.background, max_pixels=config.max_pixels)
    notes.update(set(found))
    return pixels


def _too_many_bad(report: Report, total: int, config: DataConfig) -> UserError:
    first = "\n".join(f"  {shown(key)}: {reason}" for key, reason in report.bad[:5])
    place, bad = shown(config.path), len(report.bad)
    share = "none is good" if bad == total else f"more than data.max_bad = {config.max_bad:g} allows"
    count = f"{bad} of the first {report.seen} samples are bad ({total} in all)"
    return UserError(
        f"{place}: {count}; {share}:\n{first}\n"
        f"`ldm data check {shlex.quote(place)}` lists all of them. "
        "Repair or remove them, or raise data.max_bad."
    )


def _usable(config: DataConfig) -> Scan:
    scan = scan_folder(config)
    if all(row.fault for row in scan.rows):
        bad = [(row.key, row.fault) for row in scan.rows]
        raise _too_many_bad(Report(seen=len(bad), bad=bad), len(bad), config)
    return scan
