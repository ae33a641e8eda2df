"""Sections of `training.bench` on single choices, on and off; some need a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from training.bench_tools import ROOT, Bare, Engine, Setup, Table, interleaved, ratios, seconds
from training.diffusion import DiffusionTask
from training.ema import Ema, EmaConfig, decay
from training.environment import prepare_process
from training.loader import BatchOrder
from training.plan import FORMATS
from training.processes import process_state
from training.shard import blocks
from training.steps import diffusion_inputs
from training.tasks import build_task

DRAWS = 200
POOL_ROUNDS = 64
VANISHING = 1e-36  # of a loss: its gradients are then denormal numbers, and not yet zero


def levers(setup: Setup, table: Table) -> None:
    """Each choice of the engine against what it was chosen over."""
    config = setup.config("base")
    task = build_task(config)
    bare = Bare(task, config)
    (steps,) = interleaved([bare.step], setup.times(5))
    table.title(f"levers: base, batch {config.loop.batch}, contiguous")
    step = table.line("a bare step, to compare with", "ms", [1e3 * s for s in steps])
    _optimizers(setup, table, bare, step)
    _averages(setup, table, bare, config, step)
    _layouts(setup, table, "base", task, config)
    other = setup.config("autoencoder")
    _layouts(setup, table, "autoencoder", build_task(other), other)
    _stratification(setup, table)
    _prepared(setup, table)
    if setup.compile:
        _compiled(setup, table, bare, Bare(task, config))


def _compare(table: Table, step: float, names: list[str], found: list[list[float]]) -> None:
    """Lines of variants, each with its time, and over that of the first."""
    for number, (name, each) in enumerate(zip(names, found, strict=True)):
        table.line(name, f"ms, {100 * 1e3 * median(each) / step:.1f} % of the step", [1e3 * s for s in each])
        if number:
            table.line("  over the first of these", "", ratios(each, found[0]))


def _optimizers(setup: Setup, table: Table, bare: Bare, step: float) -> None:
    bare.forward_backward()
    own = bare.optimizer
    groups = [{k: g[k] for k in ("params", "weight_decay", "lr", "betas")} for g in own.param_groups]
    kinds: dict[str, dict[str, bool]] = {"fused": {"fused": True}, "foreach": {"foreach": True},
                                         "plain": {"foreach": False}}  # fmt: skip
    made = [torch.optim.AdamW([dict(g) for g in groups], **kind) for kind in kinds.values()]  # type: ignore[arg-type]
    found = interleaved([optimizer.step for optimizer in made], setup.times(9))
    _compare(table, step, [f"AdamW {kind}" for kind in kinds], found)


def _averages(setup: Setup, table: Table, bare: Bare, config: Any, step: float) -> None:
    batch, half = config.loop.batch, config.ema.halflife_images
    window = 8
    kept = {every: Ema(bare.module, EmaConfig(halflife_images=half, every_steps=every)) for every in (1, 4, window)}

    def applied(every: int) -> Callable[[], None]:
        def work() -> None:
            for number in range(1, window + 1):
                kept[every].update(bare.module, number * batch, batch)

        return work

    @torch.no_grad()
    def one_by_one() -> None:
        for number in range(1, window + 1):
            share = 1 - decay(number * batch, batch, half)
            for own, new in zip(kept[1].module.parameters(), bare.module.parameters(), strict=True):
                own.lerp_(new, share)

    works = [applied(1), one_by_one, applied(4), applied(window)]
    found = [[s / window for s in each] for each in interleaved(works, setup.times(5))]
    names = ["average of weights by _foreach_lerp_, every step", "average parameter by parameter, every step",
             *(f"average by _foreach_lerp_, every {every} steps" for every in (4, window))]  # fmt: skip
    _compare(table, step, names, found)


def _layouts(setup: Setup, table: Table, name: str, task: Any, config: Any) -> None:
    first, second = (Bare(task, config, layout) for layout in FORMATS)
    contiguous, last = interleaved([first.step, second.step], setup.times(5))
    images = config.loop.batch
    table.line(f"{name}: contiguous", "images/s", [images / s for s in contiguous])
    table.line(f"{name}: channels_last", "images/s", [images / s for s in last])
    table.line(f"{name}: time contiguous over channels_last", "", ratios(contiguous, last))


@torch.no_grad()
def _stratification(setup: Setup, table: Table) -> None:
    """How much the loss of a batch scatters: batches of t from each stratum, and of t from anywhere.

    Batches are drawn from a pool of items' losses, each computed once, by the trained network where there is one.
    """
    config = setup.config("base", *([] if setup.init is None else [f"init={ROOT / setup.init}"]))
    task = build_task(config)
    assert isinstance(task, DiffusionTask)
    own: Any = task.module
    size = config.loop.batch
    loader = iter(BatchOrder(task.cache, config.seed, 0, size, size))
    pool = torch.stack([
        own.denoiser.loss(*diffusion_inputs(next(loader), own.denoiser, own.frozen)[:4])
        for _ in range(setup.times(POOL_ROUNDS, 8))
    ])  # fmt: skip
    generator = torch.Generator().manual_seed(config.seed)

    def variance(chosen: Tensor) -> float:
        return float(chosen.mean(1).var())

    stratified, independent = [], []
    for _ in range(5):
        rounds = torch.randint(len(pool), (DRAWS, size), generator=generator)
        anywhere = torch.randint(pool.numel(), (DRAWS, size), generator=generator)
        stratified.append(variance(pool[rounds, torch.arange(size)]))
        independent.append(variance(pool.flatten()[anywhere]))
    table.line(f"variance of a batch's loss over {DRAWS} draws, stratified t", "", stratified)
    table.line(f"variance of a batch's loss over {DRAWS} draws, independent t", "", independent)
    table.line("variance independent over stratified", "", ratios(independent, stratified))


def _prepared(setup: Setup, table: Table) -> None:
    """What `prepare_process` sets, in processes of their own, in turn."""
    threads = torch.get_num_threads()
    rounds = setup.times(2, 1)
    for jobs, steps, what in (
        (("steps", "steps-malloc"), "a step", "glibc's malloc as it is"),
        (("denormal", "denormal-kept"), "a step of denormal gradients", "denormals kept"),
    ):
        found = [[_in_process(setup, job, threads) for job in jobs] for _ in range(rounds)]
        for stage in found[0][0]:
            on, off = ([s for each in found for s in each[which][stage]] for which in (0, 1))
            table.line(f"{stage}: {steps}, prepared process", "s", on)
            table.line(f"{stage}: {steps}, {what}", "s", off)
            table.line("  over the prepared process", "", ratios(off, on))


def _compiled(setup: Setup, table: Table, bare: Bare, other: Bare) -> None:
    for block in blocks(other.module):
        block.compile()
    table.line("torch.compile of the blocks: first step", "s", [seconds(other.step)])
    plain, compiled = interleaved([bare.step, other.step], setup.times(5))
    table.line("time without torch.compile over with it", "", ratios(plain, compiled))


def processes(setup: Setup, table: Table) -> None:
    """One process with all threads against two with half of them each, same global batch."""
    half = max(1, torch.get_num_threads() // 2)
    batch = setup.config("base").loop.batch
    table.title(f"processes: base, global batch {batch}")
    one, two = [], []
    for _ in range(setup.times(4, 1)):
        one += [batch / s for s in _in_process(setup, "engine", 2 * half)["base"]]
        two += [batch / s for s in _in_process(setup, "engine", half, 2)["base"]]
    table.line(f"one process, {2 * half} threads", "images/s", one)
    table.line(f"two processes, {half} thread{'s' if half > 1 else ''} each", "images/s", two)
    table.line("two processes over one", "", ratios(two, one), at_least=0.85)


def _in_process(setup: Setup, job: str, threads: int, count: int = 1) -> dict[str, list[float]]:
    """What a job finds in `count` new processes: seconds of its steps, by stage."""
    command = [sys.executable]
    if count > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    command += ["-m", "training.bench", "--setup", setup.to_json(), "--job", job]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"job {job} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_job(setup: Setup, job: str) -> None:
    """In a process of `_in_process`: print what the job finds as JSON."""
    if job == "steps-malloc":
        torch.set_flush_denormal(True)
    else:
        prepare_process()
    if job == "denormal-kept":
        torch.set_flush_denormal(False)
    if job == "engine":
        found = _engine_steps(setup)
    elif job.startswith("denormal"):
        found = {"autoencoder": _bare_steps(setup, "autoencoder", VANISHING)}
    else:
        found = {name: _bare_steps(setup, name, 1.0) for name in ("autoencoder", "base")}
    if process_state().is_main_process:
        print(json.dumps(found), flush=True)


def _bare_steps(setup: Setup, name: str, scale: float) -> list[float]:
    config = setup.config(name)
    bare = Bare(build_task(config), config)
    loss = bare.loss
    bare.loss = lambda module: scale * loss(module)
    return interleaved([bare.step], setup.times(3))[0]


def _engine_steps(setup: Setup) -> dict[str, list[float]]:
    engine = Engine(setup, setup.config("base", "loop.memory_format=contiguous"))
    (found,) = interleaved([lambda: engine.steps(1)], setup.times(5))
    return {"base": found}
