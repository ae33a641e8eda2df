"""What the sections of `training.bench` share: repeats, tables, calibration, counted FLOPs, engine and bare loop."""

from __future__ import annotations

import copy
import io
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from ldm.config import load
from training import loop
from training.autoencoder import AutoencoderRun
from training.diffusion import DiffusionRun
from training.engine import Task, start
from training.loader import Batch, BatchOrder, Prepared
from training.optim import build_optimizer
from training.plan import FORMATS
from training.steps import autoencoder_step, diffusion_inputs, diffusion_step, training_squares
from training.stop import Stop
from training.tasks import RunConfig, build_task

ROOT = Path(__file__).parent.parent
ENDLESS = 10**12  # images
CODEC = "pipelines/weights/emoji/codec"
SIDE = 2048
CONV = (32, 128, 32, 32)
R = TypeVar("R")


@dataclass(frozen=True)
class Setup:
    """What a benchmark runs on; all of it travels to other processes as JSON.

    folder: for caches and runs. configs: a folder with autoencoder.yaml, base.yaml and sr.yaml. init: a released
    cascade that fits base.yaml, or None for random weights. overrides: of all configs.
    """

    folder: str
    quick: bool = False
    compile: bool = False
    configs: str = "configs/emoji"
    init: str | None = "pipelines/weights/emoji"
    overrides: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Setup:
        data = json.loads(text)
        return Setup(**{**data, "overrides": tuple(data["overrides"])})

    def times(self, whole: int, quick: int = 2) -> int:
        """How often to repeat something."""
        return quick if self.quick else whole

    def config(self, name: str, *more: str) -> Any:
        """The config of a stage on the pictures of the tests, with the shipped codec."""
        here = [f"data.path={ROOT / 'tests/data/emoji'}", f"cache={Path(self.folder) / 'cache'}", "loop.trackers=[]"]
        config = load(RunConfig, ROOT / self.configs / f"{name}.yaml", [*here, *self.overrides, *more])
        return replace(config, codec=str(ROOT / CODEC)) if isinstance(config.codec, str) else config


class Table:
    """Prints lines of one form: what, median, lowest to highest, of how many, unit, and how it stands to a target."""

    def title(self, text: str) -> None:
        print(f"\n{text}\n  {'':62} {'median':>9}  {'lowest to highest':19}  of  unit", flush=True)

    def line(self, what: str, unit: str, values: Sequence[float], at_most: float | None = None,
             at_least: float | None = None) -> float:  # fmt: skip
        """Print a line; the median is returned, and judged where there is a target."""
        middle = median(values)
        verdict = ""
        if at_most is not None or at_least is not None:
            met = (at_most is None or middle <= at_most) and (at_least is None or middle >= at_least)
            wanted = [f"at least {at_least:g}"] if at_least is not None else []
            wanted += [f"at most {at_most:g}"] if at_most is not None else []
            verdict = f"   target {' and '.join(wanted)}: {'met' if met else 'MISSED'}"
        spread = f"{_short(min(values))} to {_short(max(values))}" if len(values) > 1 else "once"
        print(f"  {what:62} {_short(middle):>9}  {spread:19} {len(values):>3}  {unit}{verdict}", flush=True)
        return middle

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def interleaved(works: Sequence[Callable[[], object]], repeats: int) -> list[list[float]]:
    """Seconds of each work, taken in turn (ABAB...) so that a slow moment meets all; after one round unmeasured."""
    for work in works:
        work()
    rounds = [[seconds(work) for work in works] for _ in range(repeats)]
    return [list(column) for column in zip(*rounds, strict=True)]


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of each pair."""
    return [a / b for a, b in zip(above, below, strict=True)]


class Stopwatch:
    """Adds up the seconds that are spent in some functions."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    @property
    def total(self) -> float:
        return sum(self.calls)

    def timed(self, work: Callable[..., R]) -> Callable[..., R]:
        """The function with its calls timed."""

        def watched(*args: Any, **kwargs: Any) -> R:
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.calls.append(time.perf_counter() - began)

        return watched

    def each(self, items: Iterator[R]) -> Iterator[R]:
        """The items, the wait for each of them timed."""
        following = self.timed(lambda: next(items))
        while True:
            yield following()


def product_speeds(repeats: int) -> list[float]:
    """Float32 matrix products of 2048^3: GFLOP/s of each."""
    a, b = torch.rand(SIDE, SIDE), torch.rand(SIDE, SIDE)
    out = torch.empty(SIDE, SIDE)
    return [2e-9 * SIDE**3 / seconds(lambda: torch.mm(a, b, out=out)) for _ in range(repeats + 1)][1:]


@torch.no_grad()
def convolution_speeds(layout: str, repeats: int) -> list[float]:
    """Float32 3x3 convolutions of 128 channels to 128 on (32, 128, 32, 32): GFLOP/s of each."""
    x = torch.rand(CONV).to(memory_format=FORMATS[layout])
    weight = torch.rand(CONV[1], CONV[1], 3, 3).to(memory_format=FORMATS[layout])
    work = 2e-9 * x.numel() * CONV[1] * 9
    return [work / seconds(lambda: conv2d(x, weight, padding=1)) for _ in range(repeats + 1)][1:]


@dataclass(frozen=True)
class Speeds:
    """The best of this machine at a moment, GFLOP/s."""

    product: float
    convolution: float

    @staticmethod
    def measured() -> Speeds:
        found = [convolution_speeds(layout, 3) for layout in FORMATS]
        return Speeds(max(product_speeds(5)), max(map(max, found)))

    def drift(self, after: Speeds) -> str:
        return (
            f"calibration: product {self.product:.0f} GFLOP/s before, {after.product:.0f} after "
            f"({after.product / self.product - 1:+.1%}); convolution {self.convolution:.0f} before, "
            f"{after.convolution:.0f} after ({after.convolution / self.convolution - 1:+.1%})"
        )


def counted_flops(work: Callable[[], R]) -> tuple[R, int]:
    """What `work` returns, and its multiplications and additions in convolutions, products and attention."""
    aten = torch.ops.aten
    # on a CPU, attention is an operator of its own that torch has no formula for, and would count as nothing
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter:
        result = work()
    return result, counter.get_total_flops()


def _attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: object, **__: object) -> int:
    """By shapes (batch, heads, length, width): scores, and their product with the values."""
    return 2 * math.prod(query[:3]) * key[2] * (query[3] + value[3])


def _attention_backward(_grad: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int],
                        *_: object, **__: object) -> int:  # fmt: skip
    """Scores once more; gradients of queries and keys; gradients of weights and values."""
    return 2 * math.prod(query[:3]) * key[2] * (3 * query[3] + 2 * value[3])


def ready_loss(task: Task, config: AutoencoderRun | DiffusionRun,
               batch: Batch) -> Callable[[Any], Tensor]:  # fmt: skip
    """The loss of a module like the task's on one batch that is drawn, read and put together beforehand."""
    own: Any = task.module
    if isinstance(config, AutoencoderRun):
        side = config.reconstruction.crop_px // config.codec.factor
        pixels = training_squares(batch, config.reconstruction)
        noise = batch.normal((config.codec.latent_channels, side, side))
        features = own.frozen.on(pixels.device)
        return lambda module: autoencoder_step(module.codec, pixels, noise, config.reconstruction, features).losses[0]
    inputs = diffusion_inputs(batch, own.denoiser, own.frozen)
    return lambda module: diffusion_step(module.denoiser, inputs).losses[0]


class Bare:
    """The least that training takes: forward, loss, backward, clipping and fused AdamW of a copy of the task's module,
    on tensors that are ready, without averages, logs and processes."""

    def __init__(self, task: Task, config: AutoencoderRun | DiffusionRun,
                 layout: str = "contiguous") -> None:  # fmt: skip
        batch = BatchOrder(task.cache, config.seed, 0, config.loop.batch, config.loop.batch)[0]
        self.loss = ready_loss(task, config, batch)
        self.module = copy.deepcopy(task.module).to(memory_format=FORMATS[layout])
        self.optimizer = build_optimizer(config.optim, self.module.parameters())
        self._clip = config.optim.clip

    def forward_backward(self) -> None:
        """Gradients take the place of those before."""
        self.optimizer.zero_grad()
        torch.autograd.backward(self.loss(self.module))

    def step(self) -> None:
        self.forward_backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), self._clip)
        self.optimizer.step()

    def flops(self) -> tuple[int, int]:
        """Of one batch: forward and loss, backward."""
        self.optimizer.zero_grad()
        loss, forward = counted_flops(lambda: self.loss(self.module))
        return forward, counted_flops(lambda: torch.autograd.backward(loss))[1]


class Engine:
    """A training as `ldm train` runs it, by the loop itself, with saves and reports only where they are asked for."""

    def __init__(self, setup: Setup, config: AutoencoderRun | DiffusionRun) -> None:
        self.config = config
        run = Path(tempfile.mkdtemp(prefix="run-", dir=setup.folder))
        with redirect_stderr(io.StringIO()):  # bars of progress
            self.task = build_task(config)
            self.live = start(self.task, config.loop, config.optim, config.ema, config.seed, run)
        self.loader: Iterator[Prepared] = self.live.loader(self.task.cache, config.seed, ENDLESS)
        self._reporter = loop._Reporter(self.task, self.live, run, {}, Stop())

    def steps(self, count: int) -> None:
        """So many steps with all that the loop does in each."""
        live = self.live
        end = live.images + count * self.config.loop.batch
        live.saved = live.reported = end
        with redirect_stderr(io.StringIO()):
            loop._run(live, self.loader, self.config.optim, end, self._reporter.run, self._reporter)

    def save(self) -> None:
        """One checkpoint."""
        loop._save(self.live, self._reporter.run, self._reporter, must=True)
