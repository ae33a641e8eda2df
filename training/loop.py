"""The only training loop: accelerate, accumulate, clip, step, average, log, preview, save. Knows no stage."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator, PartialState
from torch import Tensor, nn

from ldm.config import Config, UserError
from ldm.progress import advancing
from training import checkpoint
from training.cache import Cache
from training.ema import Ema, decay
from training.loader import Batch, batches
from training.log import MetricsLog
from training.optim import OptimConfig, build_optimizer, learning_rate

MAX_BAD_STEPS = 10


@dataclass(frozen=True)
class LoopConfig(Config):
    """How long a run is and how often it reports; all progress is counted in images.

    batch is the global batch of one optimizer step, over all processes and `accumulation` micro-batches.
    """

    images: int
    batch: int = 32
    accumulation: int = 1
    ema_halflife_images: int = 10_000
    log_every_images: int = 1_000
    preview_every_images: int = 20_000
    save_every_images: int = 20_000
    keep_checkpoints: int = 2
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    channels_last: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.batch <= 1_000_000 or self.accumulation < 1 or self.batch % self.accumulation:
            raise ValueError(
                f"batch {self.batch} must be from 1 to 1000000 and a multiple of accumulation {self.accumulation}"
            )
        if self.images < self.batch:
            raise ValueError(f"images {self.images} is less than one batch of {self.batch}")
        for name in ("ema_halflife_images", "log_every_images", "preview_every_images", "save_every_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.save_every_images > self.images:
            raise ValueError(
                f"save_every_images {self.save_every_images} is beyond the end of the run at {self.images} images; "
                f"the run would save only at its end: say save_every_images: {self.images} for that"
            )
        if self.keep_checkpoints < 1:
            raise ValueError("keep_checkpoints must be at least 1: a run without a checkpoint cannot resume")


class Task(Protocol):
    """What the loop trains. `module(batch)` is a StepResult."""

    @property
    def module(self) -> nn.Module:
        """Called with a batch in training."""

    @property
    def cache(self) -> Cache:
        """The items trained on."""

    def preview(self, module: nn.Module, path: Path) -> None:
        """Write a preview picture made with these weights."""

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Held-out measures of these weights."""

    def export(self, module: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        """Write these weights as a folder that inference loads."""


class Interrupted(UserError):
    """A signal stopped the run after a save; the same command resumes it."""

    def __init__(self, images: int) -> None:
        super().__init__(f"interrupted at {images} images and saved; the same command resumes", exit_code=3)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT instead of dying of them; a second one acts at once."""
    seen: list[int] = []
    old: dict[signal.Signals, Any] = {}

    def note(number: int, _frame: Any) -> None:
        seen.append(number)
        for which, handler in old.items():
            signal.signal(which, handler)

    try:
        for which in (signal.SIGTERM, signal.SIGINT):
            old[which] = signal.signal(which, note)
    except ValueError:
        pass  # not the main thread: the host program handles signals
    try:
        yield seen
    finally:
        for which, handler in old.items():
            signal.signal(which, handler)


def process_state() -> PartialState:
    """This process among those of the launch. Without `cpu`, Accelerate runs CPU processes apart from each other."""
    return PartialState(cpu=not torch.accelerator.is_available())


def cpu_has_bf16() -> bool:
    """Whether this CPU computes in bfloat16 (AVX512-BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def check_precision(config: LoopConfig, device: torch.device) -> None:
    """Refuse half precision where it is tens of times slower than single, or does not exist."""
    if config.mixed_precision == "no":
        return
    if device.type == "cpu" and not (config.mixed_precision == "bf16" and cpu_has_bf16()):
        raise UserError(
            f"loop.mixed_precision: {config.mixed_precision} is refused on this CPU: it has no instructions for it, "
            "and convolutions run tens of times slower than in float32. Set loop.mixed_precision=no"
        )
    if config.mixed_precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("loop.mixed_precision: this GPU has no bfloat16; use fp16 or no")


@dataclass
class _Run:
    """The live parts of a run."""

    accelerator: Accelerator
    module: nn.Module
    ema: Ema
    optimizers: list[Any]
    images: int
    seconds: float

    @property
    def bare(self) -> nn.Module:
        return self.accelerator.unwrap_model(self.module)  # type: ignore[no-any-return]

    @property
    def bare_optimizers(self) -> list[torch.optim.Optimizer]:
        return [o.optimizer for o in self.optimizers]


def _start(task: Task, config: LoopConfig, optim: OptimConfig, run: Path) -> _Run:
    accelerator = Accelerator(
        cpu=process_state().device.type == "cpu",
        mixed_precision=config.mixed_precision, gradient_accumulation_steps=config.accumulation
    )
    check_precision(config, accelerator.device)
    if config.batch % (accelerator.num_processes * config.accumulation):
        raise UserError(
            f"loop.batch {config.batch} is not a multiple of {accelerator.num_processes} processes x "
            f"{config.accumulation} accumulation"
        )
    module = task.module.to(accelerator.device)
    if config.channels_last:
        module = module.to(memory_format=torch.channels_last)
    ema = Ema(module)
    optimizers = [build_optimizer(optim, module.parameters())]
    found = checkpoint.newest(run)
    images, seconds = 0, 0.0
    if found is not None:
        images, seconds = checkpoint.restore(found, module, ema.module, list(optimizers))
        if accelerator.is_main_process:
            print(f"resuming from {found} at {images} images", flush=True)
    prepared = accelerator.prepare(module, *optimizers)
    return _Run(accelerator, prepared[0], ema, list(prepared[1:]), images, seconds)


def _step(live: _Run, loader: Iterator[Batch], config: LoopConfig, optim: OptimConfig) -> dict[str, float]:
    """One optimizer step over `batch` images; returns metrics. A non-finite gradient changes nothing."""
    began = time.monotonic()
    totals: dict[str, Tensor] = {}
    rate = learning_rate(optim, live.images, config.images)
    norm = torch.zeros(())
    keys: list[str] = []
    for optimizer in live.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    for _ in range(config.accumulation):
        batch = next(loader)
        keys += [batch.cache.items[i]["key"] for i in batch.indices]
        with live.accelerator.accumulate(live.module):
            losses, metrics = live.module(batch)
            for number, loss in enumerate(losses):
                live.accelerator.backward(loss)
                metrics[f"loss{number or ''}"] = loss.detach()
            if live.accelerator.sync_gradients:
                norm = live.accelerator.clip_grad_norm_(live.module.parameters(), optim.clip).detach()
                # a gradient scaler, in fp16, skips the step itself and must see it to lower its scale
                if bool(norm.isfinite()) or live.accelerator.scaler is not None:
                    for optimizer in live.optimizers:
                        optimizer.step()
                for optimizer in live.optimizers:
                    optimizer.zero_grad()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0) + value.detach() / config.accumulation
    live.images += config.batch
    live.seconds += time.monotonic() - began
    if bool(norm.isfinite()):
        live.ema.update(live.bare, decay(live.images, config.batch, config.ema_halflife_images))
    else:
        print(f"step skipped: non-finite gradient on {', '.join(keys)}", flush=True)
    shared = live.accelerator.reduce(totals, "mean") if totals else totals
    result = {name: float(value) for name, value in shared.items()}
    return {**result, "grad_norm": float(norm), "lr": rate}


def _mean(window: list[dict[str, float]]) -> dict[str, float]:
    """Means over the steps that were taken; over all where none was."""
    taken = [w for w in window if math.isfinite(w["grad_norm"])] or window
    return {k: sum(w[k] for w in taken) / len(taken) for k in taken[-1]}


def train(task: Task, config: LoopConfig, optim: OptimConfig, seed: int, run: Path,
          facts: dict[str, Any]) -> Path:  # fmt: skip
    """Train to `config.images`, resuming from the newest checkpoint of `run`; returns RUN/final.

    Raises Interrupted after SIGTERM or SIGINT once the state is saved, and UserError after ten steps in a row
    with non-finite gradients.
    """
    live = _start(task, config, optim, run)
    log = MetricsLog(run / "metrics.jsonl")
    main = live.accelerator.is_main_process
    world, rank = live.accelerator.num_processes, live.accelerator.process_index
    size = config.batch // (world * config.accumulation)
    loader = batches(task.cache, seed, live.images, size, config.batch, world, rank)
    (run / "samples").mkdir(parents=True, exist_ok=True)

    def report() -> None:
        if main:
            log.write("eval", live.images, task.evaluate(live.ema.module))
            task.preview(live.ema.module, run / "samples" / f"{live.images:09d}.png")

    def save() -> None:
        if main:
            checkpoint.save(run, live.images, live.bare, live.ema.module, live.bare_optimizers,
                            config.keep_checkpoints, world, live.seconds)  # fmt: skip
        live.accelerator.wait_for_everyone()

    def due(every: int) -> bool:
        return live.images // every > (live.images - config.batch) // every

    if live.images == 0:
        report()
    window: list[dict[str, float]] = []
    clock, bad, saved = time.monotonic(), 0, live.images
    steps = (config.images - live.images) // config.batch
    with _signals() as seen, advancing("training steps", steps, every_s=600) as advance:
        for _ in range(steps):
            window.append(_step(live, loader, config, optim))
            advance()
            # all processes leave together, whichever of them the signal reached
            stop = bool(live.accelerator.reduce(torch.tensor(len(seen), device=live.accelerator.device), "sum"))
            bad = 0 if math.isfinite(window[-1]["grad_norm"]) else bad + 1
            if bad == MAX_BAD_STEPS:
                raise UserError(f"{bad} steps in a row had non-finite gradients; stopped at {live.images} images", 1)
            if due(config.log_every_images) and main:
                speed = len(window) * config.batch / (time.monotonic() - clock)
                log.write("train", live.images, {**_mean(window), "images_per_s": speed})
                window, clock = [], time.monotonic()
            if due(config.preview_every_images):
                report()
            if due(config.save_every_images) or stop:
                save()
                saved = live.images
            if stop:
                raise Interrupted(live.images)
    if saved != live.images:
        save()
    if main:
        _export(task, live, run / "final", {**facts, "ema_halflife_images": config.ema_halflife_images}, log)
    live.accelerator.wait_for_everyone()
    return run / "final"


def _export(task: Task, live: _Run, folder: Path, facts: dict[str, Any], log: MetricsLog) -> None:
    measures = task.evaluate(live.ema.module)
    spent = {"images": live.images, "seconds": round(live.seconds)}
    task.export(live.ema.module, folder, {**facts, **spent, "measures": measures})
    log.write("final", live.images, measures)
