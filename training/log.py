"""What a run tells: progress lines, metrics.jsonl."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], label: str, total: int | None = None, every_s: float = 10.0) -> Iterator[T]:
    """Iterate with a progress bar on a terminal, and with a plain line every `every_s` seconds elsewhere (stderr)."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, label, total=total, console=Console(stderr=True))
        return
    start = shown = time.monotonic()
    done = 0
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - shown >= every_s:
            shown = now
            of = f" of {total}" if total else ""
            print(f"{label}: {done}{of}, {now - start:.0f} s", file=sys.stderr, flush=True)
    print(f"{label}: {done} done, {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


class MetricsLog:
    """Appends one JSON object a line to metrics.jsonl and a short line to stdout."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, images: int, values: dict[str, Any]) -> None:
        """Record `values` measured after `images` training images."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "images": images, **values}) + "\n")
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        print(f"{kind} {images:>9} images  {shown}", flush=True)
