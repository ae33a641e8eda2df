"""An orderly end on SIGTERM, SIGINT or SIGUSR1: work that holds state is finished and saved, other work is left."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ldm.config import UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_S = 1.0  # a launcher passes on the signal that the terminal has already sent to its whole group


class Interrupted(UserError):
    """A signal stopped the work; the same command goes on with it."""

    def __init__(self, message: str = "interrupted before the first step; the same command starts again") -> None:
        super().__init__(message, exit_code=3)


class Stop:
    """Collects the signals while it is entered. `requested` says that one came.

    Inside `at_once` a signal raises Interrupted where it arrives; outside it is only noted. A second SIGINT, more
    than a second after the first signal, ends the process as if nothing handled it.
    """

    def __init__(self) -> None:
        self.requested = False
        self._since = 0.0
        self._at_once = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        try:
            for which in SIGNALS:
                self._old[which] = signal.signal(which, self._note)
        except ValueError:
            pass  # not the main thread: the host program handles signals
        return self

    def __exit__(self, *_: object) -> None:
        for which, handler in self._old.items():
            signal.signal(which, handler)
        self._old = {}

    def _note(self, number: int, _frame: Any) -> None:
        if self.requested:
            if number == signal.SIGINT and time.monotonic() - self._since > ECHO_S:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        self.requested, self._since = True, time.monotonic()
        if self._at_once:
            raise Interrupted

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work without state of its own: a signal leaves it at once, by Interrupted."""
        with self._mode(True):
            if self.requested:
                raise Interrupted
            yield

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Work with state, inside `at_once`: a signal is only noted."""
        with self._mode(False):
            yield

    @contextmanager
    def _mode(self, at_once: bool) -> Iterator[None]:
        outer, self._at_once = self._at_once, at_once
        try:
            yield
        finally:
            self._at_once = outer
