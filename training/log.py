"""What a run tells: metrics.jsonl and stdout, which are the record, and trackers, which only get a copy of it."""

from __future__ import annotations

import json
import math
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from accelerate.utils import is_tensorboard_available, is_wandb_available

from ldm.config import UserError

# Only trackers that, as started here, send nothing to another machine unless the user's environment asks for it.
TrackerName = Literal["tensorboard", "wandb"]
INSTALLED = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
MAX_WAITING = 10_000
CLOSE_S = 10.0


def check_trackers(names: Sequence[str]) -> None:
    """Raise UserError where the package of a tracker is not installed. For the time before training."""
    missing = [name for name in names if not INSTALLED[name]()]
    if missing:
        raise UserError(
            f"loop.trackers: {', '.join(missing)}: not installed here. Run `pip install {' '.join(missing)}`, or train "
            "without by --set loop.trackers=[] (metrics.jsonl is written anyway)"
        )


def _start_tensorboard(run: Path, config: Mapping[str, Any], images: int) -> GeneralTracker:
    # steps after the checkpoint that this leg resumes from are done again; TensorBoard then shows the newer ones
    tracker = TensorBoardTracker("tensorboard", run, purge_step=images + 1 if images else 0)
    tracker.start()
    # not store_init_configuration, which adds two folders to the list of runs at every start
    text = json.dumps(config, indent=2, ensure_ascii=False, default=str)
    tracker.log({"config": "\n".join(f"    {line}" for line in text.splitlines())}, step=images)
    return tracker


def _start_wandb(run: Path, config: Mapping[str, Any], images: int) -> GeneralTracker:
    mode = os.environ.get("WANDB_MODE") or "offline"
    if mode == "offline":
        # wandb reports on its own work over the network even then, unless told not to before its import
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # each leg is a run of its own in the group: wandb takes no step twice, and resumes only online
    tracker = WandBTracker(
        "latent-cascade", dir=str(run), group=run.name, name=f"{run.name} from {images}", config=dict(config),
        mode=mode, settings={"console": "off", "silent": True}
    )  # fmt: skip
    tracker.start()
    return tracker


START: dict[str, Callable[[Path, Mapping[str, Any], int], GeneralTracker]] = {
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
}


class _Outlet:
    """One tracker, which only its own thread ever calls. What it has not taken yet waits here, the newest MAX_WAITING.

    Its first failure is said, and ends the attempts; `close` makes one more, with a tracker started anew.
    """

    def __init__(self, name: str, start: Callable[[], GeneralTracker]) -> None:
        self.name = name
        self._start = start
        self._waiting: deque[tuple[dict[str, Any], int]] = deque()
        self._lost = 0
        self._fault = ""
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, values: dict[str, Any], step: int) -> None:
        """Leave values for the thread; never waits for the tracker."""
        with self._changed:
            if len(self._waiting) == MAX_WAITING:
                self._waiting.popleft()
                self._lost += 1
            self._waiting.append((values, step))
            self._changed.notify()

    def close(self) -> None:
        """Let the thread end once nothing waits, or make its second attempt."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def join(self, timeout_s: float) -> None:
        """Wait for the end after `close`, no longer than this, and say what the tracker did not get."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._fault = "no answer in time"
        missing = self._lost + len(self._waiting)
        if self._fault or missing:
            why = self._fault or f"more than {MAX_WAITING} waited"
            print(f"tracker {self.name}: {missing} records not delivered ({why}); metrics.jsonl has them", flush=True)

    def _work(self) -> None:
        try:
            self._deliver()
        except Exception as error:
            if not self._closing:
                print(
                    f"tracker {self.name} failed ({_brief(error)}); training goes on, its records are kept and sent "
                    "once more at the end", flush=True
                )  # fmt: skip
            with self._changed:
                self._changed.wait_for(lambda: self._closing)
            try:
                self._deliver()
            except Exception as again:
                self._fault = _brief(again)

    def _deliver(self) -> None:
        """Start the tracker, hand it what waits until closed and empty, and finish it."""
        tracker = self._start()
        while (record := self._next()) is not None:
            values, step = record
            tracker.log(values, step=step)
            with self._changed:
                # a full queue may have dropped this one, the oldest, meanwhile
                if self._waiting and self._waiting[0] is record:
                    self._waiting.popleft()
        tracker.finish()

    def _next(self) -> tuple[dict[str, Any], int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting[0] if self._waiting else None


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.200}"


class Trackers:
    """Copies of the metrics for Accelerate's trackers, each called by a daemon thread of its own.

    A tracker that is slow, hangs or raises costs the training nothing but a line on stdout. Process 0 makes one,
    after `process_state`. tensorboard writes to RUN/tensorboard; wandb to RUN/wandb, offline unless WANDB_MODE in
    the environment says otherwise.

    names: of TrackerName. config: the resolved config as plain data. images: where this leg of the run starts.
    Raises UserError where a tracker's package is missing.
    """

    def __init__(self, names: Sequence[str], run: Path, config: Mapping[str, Any], images: int = 0) -> None:
        check_trackers(names)
        self._outlets = [_Outlet(name, partial(START[name], run, config, images)) for name in dict.fromkeys(names)]

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Leave numbers and texts measured after `step` training images; returns at once."""
        kept = {k: v for k, v in values.items() if isinstance(v, (int, float, str))}
        for outlet in self._outlets:
            outlet.put(kept, step)

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Let the trackers take what still waits and finish, for at most timeout_s together; says what was lost."""
        deadline = time.monotonic() + timeout_s
        for outlet in self._outlets:
            outlet.close()
        for outlet in self._outlets:
            outlet.join(max(0.0, deadline - time.monotonic()))


def _mend(path: Path) -> None:
    """Complete a last line that lacks only its newline, and remove one that a killed process left torn."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if not size:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            start = text.rfind(b"\n") + 1
            last = text[start:]
        if not last:
            return
        try:
            json.loads(last)
        except ValueError:
            file.truncate(start)
        else:
            file.write(b"\n")


class MetricsLog:
    """Appends one JSON object a line to metrics.jsonl, null for what is not finite, and a short line to stdout.

    The file is mended on opening, so that every line of it parses. The trackers, if any, get a copy under the names
    KIND/NAME; `close` closes them.
    """

    def __init__(self, path: Path, trackers: Trackers | None = None) -> None:
        self.path = path
        self._trackers = trackers
        if path.exists():
            _mend(path)

    def write(self, kind: str, images: int, values: dict[str, Any]) -> None:
        """Record `values` measured after `images` training images."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, "images": images, **finite}) + "\n")
        shown = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in finite.items())
        print(f"{kind} {images:>9} images  {shown}", flush=True)
        if self._trackers is not None:
            self._trackers.log({f"{kind}/{k}": v for k, v in values.items()}, images)

    def alert(self, images: int, text: str) -> None:
        """Record something that a person should look at; the run goes on."""
        self.write("alert", images, {"text": text})

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Close the trackers, waiting for them no longer than timeout_s."""
        if self._trackers is not None:
            self._trackers.close(timeout_s)
