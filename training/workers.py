"""One function over many items in other processes: results in order, whatever dies or hangs on the way.

The processes are new interpreters that import only what the function needs. They share neither threads nor memory
with this one, as forked ones would, and do not import its main module, as multiprocessing's own would.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from multiprocessing.connection import Connection, Pipe
from typing import Any

CHUNK = 4  # items sent at once, as a message costs about a tenth of decoding a small picture
WINDOW = 16  # chunks begun ahead, or two a worker: some batches, so that workers go on during a step
DEATHS = 3
PAUSE_S = 0.5
START_TIMEOUT_S = 120.0
_PROGRAM = "import sys; from training.workers import serve; serve(int(sys.argv[1]))"


class Broken(Exception):
    """An item ended DEATHS processes that had nothing else to do; the message says how the last one ended."""


class Slow:
    """The result of an item that took longer than the time limit, every time."""


class Pool:
    """Calls `function`, importable by its name, in up to `workers` processes, which start when needed.

    What a process that died had in hand is done again by a new one, item by item. A process that gives no result
    for `timeout_s` seconds is killed, and likewise; an item is given up when it takes so long twice alone.
    """

    def __init__(self, function: Callable[[Any], Any], workers: int, timeout_s: float) -> None:
        self._function, self._workers, self._timeout_s = function, workers, timeout_s
        self._idle: list[_Worker] = []

    def map(self, items: Iterable[Any]) -> Iterator[Any]:
        """The function's result for each item, in order, or Slow; CHUNK * WINDOW items are held at a time.

        Raises Broken when the turn of the item comes that no process survives, and RuntimeError with the trace
        for an exception of the function.
        """
        items = iter(items)
        call = _Call()
        with ThreadPoolExecutor(self._workers, "reading") as threads:
            try:
                pending: deque[Future[list[Any]]] = deque()
                while True:
                    while len(pending) < max(WINDOW, 2 * self._workers) and (chunk := list(islice(items, CHUNK))):
                        pending.append(threads.submit(self._chunk, chunk, call))
                    if not pending:
                        return
                    for good, result in pending.popleft().result():
                        if not good:
                            raise result
                        yield result
            finally:
                call.abandon()
                threads.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """End the processes. Those of a `map` that is still used end with it."""
        while self._idle:
            self._idle.pop().end()

    def __del__(self) -> None:
        self.close()

    def _chunk(self, items: list[Any], call: _Call) -> list[tuple[bool, Any]]:
        """(True, result) or (False, exception) of each item. After a failure they are done one by one."""
        try:
            return self._ask(items, call)
        except (EOFError, OSError):
            return [self._alone(item, call) for item in items]

    def _alone(self, item: Any, call: _Call) -> tuple[bool, Any]:
        deaths = slow = 0
        while not call.abandoned.wait(PAUSE_S if deaths or slow else 0):
            try:
                return self._ask([item], call)[0]
            except TimeoutError:
                slow += 1
                if slow == 2:
                    return True, Slow()
            except (EOFError, OSError) as error:  # the pipe of a dead process, or no process at all
                deaths += 1
                if deaths == DEATHS:
                    return False, Broken(str(error))
        return False, Broken("no longer waited for")

    def _ask(self, items: list[Any], call: _Call) -> list[tuple[bool, Any]]:
        """What a process makes of the items. Raises TimeoutError, or OSError that says how the process ended."""
        worker = self._take()
        call.enter(worker)
        whole = False
        try:
            worker.prepare(self._function)
            replies = worker.ask(items, self._timeout_s)
            whole = True
        except TimeoutError:
            raise
        except (EOFError, OSError):
            raise OSError(worker.end()) from None
        finally:
            call.leave(worker)
            if whole and not call.abandoned.is_set():
                self._idle.append(worker)
            else:
                worker.end()  # once abandoned it has been killed, perhaps with its reply already sent
        return [(good, made if good else RuntimeError(f"in a reading process:\n{made}")) for good, made in replies]

    def _take(self) -> _Worker:
        try:
            return self._idle.pop()
        except IndexError:
            return _Worker()


class _Call:
    """The workers that one `map` is using."""

    def __init__(self) -> None:
        self.abandoned = threading.Event()
        self._lock = threading.Lock()
        self._busy: set[_Worker] = set()

    def enter(self, worker: _Worker) -> None:
        with self._lock:
            self._busy.add(worker)
            if self.abandoned.is_set():
                worker.process.kill()

    def leave(self, worker: _Worker) -> None:
        with self._lock:
            self._busy.discard(worker)

    def abandon(self) -> None:
        """Nobody waits for results any more: what is being done is cut short."""
        with self._lock:
            self.abandoned.set()
            for worker in self._busy:
                worker.process.kill()


class _Worker:
    """A process and the pipe to it, which it outlives by no more than the item in hand."""

    def __init__(self) -> None:
        self._ready = False
        self._pipe, theirs = Pipe()
        # libraries that start threads when they are imported would start one per core in each process
        env = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        env["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, env=env
            )  # fmt: skip

    def prepare(self, function: Callable[[Any], Any]) -> None:
        """Wait for a new process to be ready. Raises EOFError or OSError when it does not come up."""
        if not self._ready:
            self._pipe.send(function)
            if not self._pipe.poll(START_TIMEOUT_S):
                raise EOFError
            self._pipe.recv()
            self._ready = True

    def ask(self, items: list[Any], timeout_s: float) -> list[tuple[bool, Any]]:
        self._pipe.send(items)
        if not self._pipe.poll(timeout_s):
            raise TimeoutError
        replies: list[tuple[bool, Any]] = self._pipe.recv()
        return replies

    def end(self) -> str:
        """End the process and say how it ended."""
        self._pipe.close()
        self.process.kill()
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "it hangs in the kernel"  # in a read that no signal ends; it goes when the read does
        return f"signal {-code}: {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def serve(descriptor: int) -> None:
    """The whole life of a worker process: a function, then items, until this end of the pipe is the last."""
    for which in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(which, signal.SIG_IGN)  # sent to the whole job: its main process decides, and takes us along
    with Connection(descriptor) as pipe:
        try:
            function = pipe.recv()
            pipe.send(True)
            while True:
                pipe.send([_reply(function, item) for item in pipe.recv()])
        except (EOFError, ConnectionError):
            return


def _reply(function: Callable[[Any], Any], item: Any) -> tuple[bool, Any]:
    try:
        return True, function(item)
    except Exception:
        return False, traceback.format_exc()
