"""The only training loop: accumulate, clip, step, average, log, preview, save. Knows no stage.

    inputs of a batch -> module: losses, metrics -> backward -> agree -> clip -> step -> average -> log, report, save
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import UserError
from ldm.progress import advancing
from training import checkpoint
from training.cache import Items
from training.ema import EmaConfig
from training.engine import Live, LoopConfig, Resume, Task, start
from training.loader import Prepared
from training.log import MetricsLog, Trackers
from training.optim import OptimConfig, learning_rate
from training.posthoc import save_snapshots
from training.processes import together
from training.stop import Interrupted, Stop
from training.watch import LossWatch

MAX_BAD_STEPS = 10
MAX_SCALING_STEPS = 40  # fp16: a gradient scaler halves its scale at each bad step, from 2^16 on


def _step(live: Live, loader: Iterator[Prepared], cache: Items, optim: OptimConfig
          ) -> tuple[dict[str, float], bool]:  # fmt: skip
    """One optimizer step over `batch` images -> metrics, and whether it was taken.

    A loss or gradient that is not finite, on any process, changes nothing on all of them.
    """
    began = time.monotonic()
    config, accelerator = live.config, live.accelerator
    totals: dict[str, Tensor] = {}
    rate = learning_rate(optim, live.images, config.images)
    norm = torch.zeros((), device=accelerator.device)
    seen: list[int] = []
    for optimizer in live.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
    for micro in range(config.accumulation):
        indices, inputs = next(loader)
        seen += indices
        with accelerator.accumulate(live.module):
            if live.sharded:
                live.module.set_requires_gradient_sync(micro == config.accumulation - 1)  # type: ignore[operator]
            with accelerator.autocast():
                losses, metrics = live.module(inputs)
            for number, loss in enumerate(losses):
                accelerator.backward(loss)
                metrics[f"loss{number or ''}"] = loss.detach()
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0) + value.detach().float() / config.accumulation
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(live.module.parameters(), optim.clip).detach()
                norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
                shared = _mean_over_processes(live, {**totals, "grad_norm": norm})
                taken = all(map(math.isfinite, shared.values()))
                _apply(live, taken, math.isfinite(shared["grad_norm"]))
    live.images += config.batch
    if not taken:
        keys = ", ".join(cache.record(i)["key"] for i in seen)
        print(f"step skipped at {live.images} images: loss or gradient not finite on {keys}", flush=True)
    live.seconds += time.monotonic() - began
    return {**shared, "lr": rate}, taken


def _mean_over_processes(live: Live, values: dict[str, Tensor]) -> dict[str, float]:
    """Means over processes of scalars; one that is not finite anywhere is so everywhere."""
    joined = torch.stack([v.to(live.accelerator.device) for v in values.values()])
    if live.accelerator.num_processes > 1:
        joined = live.accelerator.reduce(joined, "mean")
    return dict(zip(values, joined.tolist(), strict=True))


def _apply(live: Live, taken: bool, finite_gradient: bool) -> None:
    scaler = live.accelerator.scaler
    for optimizer in live.optimizers:
        # a gradient scaler skips the step itself, and must see a bad gradient to lower its scale
        if taken or (scaler is not None and not finite_gradient):
            optimizer.step()
        optimizer.zero_grad()
    if scaler is not None and finite_gradient and not taken:
        scaler.update()  # it has looked at the gradients and wants to hear the end of it


def _average(live: Live, run: Path, reporter: _Reporter) -> None:
    """Take a step's weights into the averages; keep those that are to be combined after training."""
    batch, images = live.config.batch, live.images
    applied = live.ema.update(live.bare, images, batch, final=images + batch > live.config.images)
    if applied and live.ema.config.snapshot_due(images, applied):
        try:
            save_snapshots(run, live.ema, images, live.main)
        except OSError as error:
            reporter.alert(f"averages at {images} images not kept: {error.strerror or error}; training goes on")


def _mean(window: list[tuple[dict[str, float], bool]]) -> dict[str, float]:
    """Means over the steps that were taken; over all where none was."""
    kept = [w for w, taken in window if taken] or [w for w, _ in window]
    return {k: sum(w[k] for w in kept) / len(kept) for k in kept[-1]}


class _Reporter:
    """What the loop tells on the way: log lines, alerts, evaluations and previews. Only process 0 writes."""

    def __init__(self, task: Task, live: Live, run: Path, facts: dict[str, Any], stop: Stop) -> None:
        self.task, self.live, self.run, self.facts, self.stop = task, live, run, facts, stop
        self.log: MetricsLog | None = None
        if live.main:
            trackers = Trackers(live.config.trackers, run, facts.get("config", {}), live.images)
            self.log = MetricsLog(run / "metrics.jsonl", trackers)
        self.watch = LossWatch()
        self.window: list[tuple[dict[str, float], bool]] = []
        self.clock = time.monotonic()

    def write(self, kind: str, values: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(kind, self.live.images, values)

    def alert(self, text: str) -> None:
        if self.log is not None:
            self.log.alert(self.live.images, text)

    def step(self, values: dict[str, float], taken: bool) -> None:
        """Note one step; a line comes every `log_every_images`."""
        live, every = self.live, self.live.config.log_every_images
        self.window.append((values, taken))
        alert = self.watch.note(live.images, values["loss"], values["grad_norm"])
        if alert is not None:
            self.alert(alert)
        if live.images // every > (live.images - live.config.batch) // every:
            speed = len(self.window) * live.config.batch / (time.monotonic() - self.clock)
            self.write("train", {**_mean(self.window), "images_per_s": speed})
            self.window, self.clock = [], time.monotonic()

    def report(self) -> None:
        """Evaluate and draw with the averaged weights: work of process 0, which a signal cuts short."""
        live, module = self.live, self.live.averaged()
        if live.main:
            with suppress(Interrupted), self.stop.at_once():  # the loop looks at `stop.requested` next
                live.measures = self.task.evaluate(module)
                self.write("eval", live.measures)
                try:
                    self.task.preview(module, self.run / "samples" / f"{live.images:09d}.png")
                except (torch.OutOfMemoryError, MemoryError) as error:
                    self.alert(f"no preview: out of memory ({error}); training goes on. Lower preview.columns")
                live.reported = live.images
        else:
            live.reported = live.images

    def finish(self) -> None:
        """Write RUN/final with the averaged weights. Called by all processes."""
        live, module, written = self.live, self.live.averaged(), True
        if live.main:
            written = False
            with suppress(Interrupted), self.stop.at_once():
                fresh = live.reported == live.images and live.measures
                measures = live.measures if fresh else self.task.evaluate(module)
                spent = {"images": live.images, "seconds": round(live.seconds), "plan": vars(live.plan)}
                self.task.export(module, self.run / "final", {**self.facts, **spent, "measures": measures})
                self.write("final", measures)
                written = True
        if live.any(not written):
            raise Interrupted(f"interrupted at {live.images} images, all saved; the same command writes RUN/final")

    def close(self) -> None:
        if self.log is not None:
            self.log.close()


def _save(live: Live, run: Path, reporter: _Reporter, must: bool) -> None:
    """A checkpoint, agreed on by all. A disk that refuses costs the run nothing unless it `must` be saved now."""
    snapshot, failed = live.snapshot(), ""
    facts = {"world_size": live.accelerator.num_processes, "config_digest": reporter.facts.get("config_digest", "")}
    if live.main:
        try:
            checkpoint.save(run, snapshot, live.config.keep_checkpoints, facts)
        except OSError as error:
            failed = f"checkpoint at {live.images} images not saved: {error.strerror or error} ({run})"
            if not must:
                reporter.alert(f"{failed}; the older ones are whole, training goes on")
    live.saved = live.images  # the next try comes at its time
    if live.any(bool(failed)) and must:
        raise UserError(f"{failed or 'checkpoint not saved'}; the older ones are whole. Make room, then resume", 1)


def train(task: Task, config: LoopConfig, optim: OptimConfig, ema: EmaConfig, seed: int, run: Path,
          facts: dict[str, Any], stop: Stop, resume: Resume = "auto", until: int | None = None) -> Path:  # fmt: skip
    """Train to `config.images`, or a step that reaches `until`, from the newest checkpoint on; returns RUN/final.

    Raises Interrupted after a signal once the state is saved, and UserError after steps in a row that were not
    finite, where the last save is refused by the disk, or where another process of the run is gone.
    """
    with together():
        with stop.at_once():
            live = start(task, config, optim, ema, seed, run, resume)
            (run / "samples").mkdir(parents=True, exist_ok=True)
            reporter = _Reporter(task, live, run, facts, stop)
            if live.main and live.images == 0:
                print(live.plan.text(config, len(live.ema.averages), run), flush=True)
        try:
            with stop.noted():
                end = min(config.images, until or config.images)
                with closing(live.loader(task.cache, seed, end)) as loader:
                    _run(live, loader, optim, end, run, reporter)
                reporter.finish()
        finally:
            reporter.close()
    return run / "final"


def _run(live: Live, loader: Iterator[Prepared], optim: OptimConfig, until: int, run: Path,
         reporter: _Reporter) -> None:  # fmt: skip
    config, bad = live.config, 0

    def due(every: int, last: int) -> bool:
        return live.images // every > last // every

    with advancing("training steps", (until - live.images) // config.batch, every_s=600) as advance:
        while True:
            if due(config.preview_every_images, live.reported):
                reporter.report()
            stopping = live.any(reporter.stop.requested)
            done = live.images + config.batch > until
            if live.images > live.saved and (stopping or done or due(config.save_every_images, live.saved)):
                _save(live, run, reporter, must=stopping or done)
            if stopping:
                raise Interrupted(f"interrupted at {live.images} images and saved; the same command resumes")
            if done:
                return
            values, taken = _step(live, loader, reporter.task.cache, optim)
            _average(live, run, reporter)
            reporter.step(values, taken)
            advance()
            bad = 0 if taken else bad + 1
            if bad == (MAX_BAD_STEPS if live.accelerator.scaler is None else MAX_SCALING_STEPS):
                raise UserError(
                    f"{bad} steps in a row had a loss or gradient that is not finite; stopped at {live.images} images. "
                    "Nothing of them reached the weights; the newest checkpoint is the last good state. Look at the "
                    "items named above, or lower optim.lr", exit_code=1
                )  # fmt: skip
