"""`ldm data check DIR`: every sample read, and what is wrong with it told. Nothing of the user's is changed.

    rows -> read_image -> Report: counts, faults by path, notes, sizes -> text, and a page with thumbnails
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image

from ldm.config import UserError
from ldm.decode import Pixels, square
from ldm.file_kinds import BadImage
from ldm.progress import progress
from training.data import Report, pixels_of
from training.report import STYLE
from training.rows import DataConfig, Row, shown
from training.sources import Collection, open_source

THUMBNAILS, THUMBNAIL_PX = 200, 96
TokenCount = Callable[[str], tuple[int, int]]


def check(path: str | Path, size_px: int | None = None, tokens: TokenCount | None = None,
          page: str | Path | None = None) -> Report:  # fmt: skip
    """Read every sample of a data set and report all that is wrong, changing nothing.

    Samples under `size_px` are bad when it is given. Identical pictures are counted, those in another split apart.
    tokens: tells of a caption how many of its tokens a text encoder reads, and how many it has. page: an HTML file to
    write, with thumbnails of at most THUMBNAILS samples. Raises UserError where there is no sample at all, or the page
    exists.
    """
    if page is not None and (Path(page).exists() or not Path(page).absolute().parent.is_dir()):
        why = "exists" if Path(page).exists() else "its folder does not exist"
        raise UserError(f"{page}: {why}; name another file with --html")
    config = DataConfig(path=str(path))
    collection = open_source(config, shard_items=4096)
    report = Report(notes=collection.notes)
    counts = [block.count for block in collection.blocks]
    total = None if None in counts else sum(count for count in counts if count is not None)
    seen, thumbnails = _Seen(report, tokens), _Thumbnails(total)
    for row in progress(_scanned(collection, report), "checking", total):
        report.seen += 1
        try:
            pixels = pixels_of(row, collection, config, report.notes)
            if size_px is not None:
                square(pixels, size_px)
        except BadImage as error:
            report.bad.append((row.key, str(error)))
            continue
        report.kept += 1
        seen.add(row, pixels)
        if page is not None:
            thumbnails.add(report.seen, row, pixels)
    report.facts.update(seen.facts())
    if page is not None:
        _write(Path(page), shown(str(path)), report, thumbnails)
    return report


class _Seen:
    """What is counted of good samples."""

    def __init__(self, report: Report, tokens: TokenCount | None) -> None:
        self.notes, self.tokens = report.notes, tokens
        self.split_of: dict[bytes, Any] = {}
        self.splits: Counter[str] = Counter()
        self.short: list[tuple[int, str]] = []
        self.ratios: list[float] = []
        self.captions = 0
        self.longest = (0, 0, "")

    def add(self, row: Row, pixels: Pixels) -> None:
        height, width = pixels.shape[:2]
        self.short.append((min(height, width), row.key))
        self.ratios.append(width / height)
        self.captions += len(row.captions)
        split = row.fields.get("split")
        if split is not None:
            self.splits[str(split)] += 1
        digest = hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()
        if digest in self.split_of:
            same = self.split_of[digest] == split
            self.notes["identical picture" if same else "identical picture in another split"] += 1
        self.split_of.setdefault(digest, split)
        for caption in row.captions if self.tokens is not None else ():
            used, whole = self.tokens(caption)  # type: ignore[misc]
            if used < whole:
                self.notes["caption longer than its text encoder reads"] += 1
                self.longest = max(self.longest, (whole, used, row.key))

    def facts(self) -> dict[str, str]:
        if not self.short:
            return {}
        least, key = min(self.short)
        sides = [side for side, _ in self.short]
        found = {
            "shortest sides": f"{least} px ({shown(key)}) to {max(sides)} px, median {median(sides):g}",
            "width by height": f"{min(self.ratios):.2f} to {max(self.ratios):.2f}",
            "captions": f"{self.captions}, of {len(self.short)} pictures",
        }
        if self.longest[0]:
            whole, used, key = self.longest
            found["longest caption"] = f"{whole} tokens, of which {used} are read ({shown(key)})"
        if self.splits:
            found["splits"] = ", ".join(f"{name} {count}" for name, count in sorted(self.splits.items()))
        return found


class _Thumbnails:
    """Small pictures of samples evenly spread over the set, or of its first where its size is not known."""

    def __init__(self, total: int | None) -> None:
        self.every = max(1, -(-(total or 0) // THUMBNAILS))
        self.found: list[tuple[str, str, str]] = []

    def add(self, number: int, row: Row, pixels: Pixels) -> None:
        if (number - 1) % self.every or len(self.found) >= THUMBNAILS:
            return
        small, data = Image.fromarray(pixels), io.BytesIO()
        small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        small.save(data, "PNG")
        told = base64.b64encode(data.getvalue()).decode()
        height, width = pixels.shape[:2]
        self.found.append((told, f"{shown(row.key)}, {width} x {height}", " | ".join(row.captions)))

    def html(self) -> str:
        return "".join(
            f"<figure><img src='data:image/png;base64,{data}' alt=''><figcaption>{html.escape(caption)}<br>"
            f"<small>{html.escape(name)}</small></figcaption></figure>" for data, name, caption in self.found
        )  # fmt: skip


def _scanned(collection: Collection, report: Report) -> Iterator[Row]:
    for block in collection.blocks:
        scan = block.scan()
        report.notes.update(scan.notes)
        yield from scan.rows


def _write(page: Path, name: str, report: Report, thumbnails: _Thumbnails) -> None:
    title = html.escape(f"{name}: {report.seen} samples, {report.kept} good, {len(report.bad)} bad")
    lines = [*report.facts.items(), *((note, str(count)) for note, count in sorted(report.notes.items()))]
    told = "".join(f"<tr><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>" for a, b in lines)
    bad = "".join(f"<tr><td>{html.escape(shown(key))}</td><td>{html.escape(why)}</td></tr>" for key, why in report.bad)
    style = f"{STYLE} figure {{ display: inline-block; width: 12em; margin: .5em; vertical-align: top }}"
    try:
        page.write_text(
            f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{style}</style>"
            f"<h1>{title}</h1><table>{told}</table>{f'<h2>Bad</h2><table>{bad}</table>' if bad else ''}"
            f"<h2>{len(thumbnails.found)} of them</h2>{thumbnails.html()}</html>\n", encoding="utf-8",
            errors="backslashreplace",
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"{page}: cannot be written ({error.strerror}); name another file with --html", 1) from None
