"""How long work shows itself: a bar on a terminal, plain lines elsewhere, both on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def advancing(label: str, total: int | None, every_s: float = 10.0) -> Iterator[Callable[[], None]]:
    """Gives a function to call after each of `total` parts of the work; lines come every `every_s` seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        # a stdout that goes elsewhere keeps what is printed meanwhile
        console, shared = Console(stderr=True), sys.stdout.isatty()
        with Progress(*columns, console=console, redirect_stdout=shared) as bar:
            task = bar.add_task(label, total=total)
            yield lambda: bar.advance(task)
        return
    start = shown = time.monotonic()
    done = 0

    def advance() -> None:
        nonlocal done, shown
        done += 1
        now = time.monotonic()
        if now - shown >= every_s:
            shown = now
            of = f" of {total}" if total else ""
            print(f"{label}: {done}{of}, {now - start:.0f} s", file=sys.stderr, flush=True)

    yield advance


def progress(items: Iterable[T], label: str, total: int | None = None, every_s: float = 10.0) -> Iterator[T]:
    """Iterate, showing how far it is."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with advancing(label, total, every_s) as advance:
        for item in items:
            yield item
            advance()
