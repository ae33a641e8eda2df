"""Loss-spike alerts: a step's loss against the steady level of the steps before it."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW_STEPS = 200
MIN_STEPS = 50
SPIKE = 10.0
RISE = 3.0
RISE_STEPS = 20
# The loss of "learned" weighting passes through zero, where a multiple of the median is within its usual scatter.
DEVIATIONS = 6.0
NORMAL = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


class LossWatch:
    """Compares each step's loss with the median of up to 200 steps before it, once there are 50.

    Two things are alerted: a loss over 10 times the median, and losses over 3 times it for 20 steps in a row; both
    only where the loss also lies 6 deviations (from the median absolute deviation) above it. Each is said once, until
    20 steps in a row were ordinary again. A level that lasts becomes the median, and is ordinary then. Nothing needs
    saving: after a resume the watch is blind for 50 steps.
    """

    def __init__(self) -> None:
        self._recent: deque[float] = deque(maxlen=WINDOW_STEPS)
        self._high = 0
        self._ordinary = 0
        self._said: set[str] = set()

    def note(self, images: int, loss: float, grad_norm: float) -> str | None:
        """Take one step's loss, in order; returns the text of an alert, or None.

        images: training images after the step. A non-finite loss is left out: such steps are skipped and counted
        by the loop.
        """
        if not math.isfinite(loss):
            return None
        alert = None
        steps = len(self._recent)
        if steps >= MIN_STEPS:
            level = median(self._recent)
            found = self._judge(loss, level)
            alert = found and (
                f"loss {loss:.4g} at {images} images (gradient norm {grad_norm:.4g}) is {found} {level:.4g} of the "
                f"{steps} steps before; the run goes on. If it does not come down again, resume from an earlier "
                "checkpoint with a lower optim.lr, and look at what the data holds there"
            )
        self._recent.append(loss)
        return alert

    def _judge(self, loss: float, level: float) -> str | None:
        high = loss > RISE * abs(level)
        if high:
            spread = NORMAL * median(abs(value - level) for value in self._recent)
            high = loss - level > DEVIATIONS * spread
        self._high = self._high + 1 if high else 0
        self._ordinary = 0 if high else self._ordinary + 1
        if self._ordinary == RISE_STEPS:
            self._said.clear()
        if high and loss > SPIKE * abs(level):
            return self._once(f"over {SPIKE:g} times the median")
        if self._high >= RISE_STEPS:
            return self._once(f"the {RISE_STEPS}th in a row over {RISE:g} times the median")
        return None

    def _once(self, found: str) -> str | None:
        if found in self._said:
            return None
        self._said.add(found)
        return found
