"""Sections of `training.bench` on the stages as they are trained, encoded and drawn."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from ldm.text import TextEncoder
from ldm.weights import Codec
from pipelines.cascade import Cascade, load_cascade
from training import autoencoder, diffusion
from training.bench_tools import (
    ROOT,
    Bare,
    Engine,
    Setup,
    Stopwatch,
    Table,
    convolution_speeds,
    interleaved,
    product_speeds,
    ratios,
    seconds,
)
from training.data import Example, Reader
from training.diffusion import DiffusionTask
from training.encode import encode
from training.encoders import ENCODE_ROWS, codec_moments, in_order
from training.loader import Batch
from training.online import Online
from training.plan import FORMATS, peak_bytes
from training.tasks import build_task, load_parts


def machine(setup: Setup, table: Table) -> None:
    """What the machine can do at best."""
    table.title(f"machine: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    repeats = setup.times(15, 3)
    table.line("matrix product 2048^3, float32", "GFLOP/s", product_speeds(repeats))
    for layout in FORMATS:
        table.line(f"3x3 convolution of (32, 128, 32, 32), {layout}", "GFLOP/s", convolution_speeds(layout, repeats))


def stage(setup: Setup, table: Table, name: str) -> None:
    """The engine on a stage against a bare loop, and what else a training takes."""
    engine = Engine(setup, setup.config(name))
    config, live = engine.config, engine.live
    batch, count = config.loop.batch, setup.times(3, 1)
    size = live.plan.parameters / 1e6
    table.title(f"{name}: {size:.2f} million parameters, batch {batch}, {live.plan.memory_format} memory layout")
    saves = []
    for _ in range(setup.times(5)):
        engine.steps(1)
        saves.append(seconds(engine.save))
    peak = peak_bytes()
    bare = Bare(engine.task, config, live.plan.memory_format)
    products: list[float] = []
    loads: list[float] = []
    with _loading(engine) as watch:

        def train() -> None:
            before = watch.total
            engine.steps(count)
            loads.append(watch.total - before)

        works = [train, lambda: _repeat(bare.step, count), lambda: products.append(max(product_speeds(3)))]
        spent, least, _ = interleaved(works, setup.times(7))
    del products[0], loads[0]  # of the round that is not measured
    step = median(spent) / count
    table.line("engine", "images/s", [count * batch / s for s in spent])
    table.line("bare loop, in turn with it", "images/s", [count * batch / s for s in least])
    table.line("time of the engine over that of the bare loop", "", ratios(spent, least), at_most=1.05)
    table.line("loading and draws, of the engine's step", "%", [100 * r for r in ratios(loads, spent)], at_most=2)
    forward, backward = bare.flops()
    table.line("counted per image: forward", "GFLOP", [forward / batch / 1e9])
    table.line("counted per image: backward", "GFLOP", [backward / batch / 1e9])
    work = count * (forward + backward) / 1e9
    for what, each in (("engine", spent), ("bare loop", least)):
        used = [100 * work / s / p for s, p in zip(each, products, strict=True)]
        table.line(f"counted FLOPs of the {what}, of the matrix product's speed", "%", used)
    table.line("one save", "s", saves)
    interval = config.loop.save_every_images / batch * step
    table.line(f"saves every {config.loop.save_every_images} images, of the time", "%",
               [100 * s / (interval + s) for s in saves], at_most=2)  # fmt: skip
    table.line("peak memory of trial, steps and saves", "GB", [peak / 1e9])


def _repeat(work: Callable[[], object], count: int) -> None:
    for _ in range(count):
        work()


@contextmanager
def _loading(engine: Engine) -> Iterator[Stopwatch]:
    """Times what a step does before the network's work: the next batch, what it reads and its draws."""
    watch = Stopwatch()
    engine.loader = watch.each(engine.loader)
    drawn: list[tuple[Any, str]] = [(diffusion, "diffusion_inputs")]
    if engine.config.kind == "autoencoder":
        drawn = [(autoencoder, "training_squares"), (Batch, "normal")]
    with ExitStack() as patches:
        for owner, name in drawn:
            patches.enter_context(patch.object(owner, name, watch.timed(getattr(owner, name))))
        yield watch


def encoding(setup: Setup, table: Table) -> None:
    """Writing a cache against the network calls alone, and what a cache saves in a step."""
    config = setup.config("base")
    readers, codec, text = load_parts(config)
    assert codec is not None and text is not None  # noqa: PT018
    reader, module = readers[0], codec.module
    examples = list(reader)
    pictures = _pixel_groups(examples)
    tokens = text.tokens(list(dict.fromkeys(["", *(c for e in examples for c in e.captions)])))
    captions = [[tokens[i] for i in group] for group in text.groups(tokens)]
    threads = torch.get_num_threads()

    def plain() -> None:
        for pixels in pictures:
            codec_moments(module, pixels)
        for group in captions:
            text.states(group)

    def at_once() -> None:
        list(in_order(lambda pixels: codec_moments(module, pixels), pictures, threads))
        list(in_order(text.states, captions, threads))

    table.title(f"encode: {len(examples)} pictures of {config.data.size_px} px, {len(tokens)} distinct captions")
    works = [lambda: encode(reader, tempfile.mkdtemp(dir=setup.folder), codec, text), plain, at_once,
             lambda: list(reader)]  # fmt: skip
    whole, calls, parallel, reading = interleaved(works, setup.times(9))
    count = len(examples)
    table.line("encode", "images/s", [count / s for s in whole])
    table.line("the same network calls on ready tensors, one by one", "images/s", [count / s for s in calls])
    table.line(f"the same, {threads} at once of one thread each", "images/s", [count / s for s in parallel])
    table.line("reading alone", "images/s", [count / s for s in reading])
    table.line("encode over the calls one by one", "", ratios(calls, whole), at_least=0.85)
    table.line(f"encode over the calls {threads} at once", "", ratios(parallel, whole), at_least=0.85)
    _gain(setup, table, reader, examples, codec, text)


def _pixel_groups(examples: list[Example]) -> list[Tensor]:
    stacked = torch.from_numpy(np.stack([example.pixels for example in examples]))
    return [stacked[a : a + ENCODE_ROWS] for a in range(0, len(stacked), ENCODE_ROWS)]


def _gain(setup: Setup, table: Table, reader: Reader, examples: list[Example], codec: Codec,
          text: TextEncoder) -> None:  # fmt: skip
    """A step that encodes over one that reads the cache, against what its parts measured apart foretell."""
    layout = "loop.memory_format=contiguous"
    cached = Engine(setup, setup.config("base", layout))
    online = Engine(setup, setup.config("base", layout, "encode=online"))
    config, items = online.config, online.task.cache
    bare = Bare(cached.task, config)
    assert isinstance(items, Online)
    batch = config.loop.batch
    rows = [row for block in reader.blocks for row in block.rows() if not row.fault]
    rows = (rows * batch)[:batch]
    chosen = (examples * batch)[:batch]
    pictures = _pixel_groups(chosen)
    tokens = text.tokens([e.captions[i % len(e.captions)] for i, e in enumerate(chosen)])

    def encode_batch() -> None:
        for row in rows:
            reader.read(row)
        for pixels in pictures:
            codec_moments(codec.module, pixels)
        for group in text.groups(tokens):
            text.states([tokens[i] for i in group])

    def online_step() -> None:
        items._read.cache_clear()  # no picture of a large set is still in memory
        online.steps(1)

    works = [lambda: cached.steps(1), online_step, bare.forward_backward, encode_batch]
    quick, slow, network, encoders = ([s / batch for s in each] for each in interleaved(works, setup.times(21)))
    table.line("a step from the cache, per image", "s", quick)
    table.line("a step with `encode: online`, per image", "s", slow)
    table.line("3 U: forward and backward of the U-Net, per image", "s", network)
    table.line("E: reading, codec and text encoder, per image", "s", encoders)
    gain = ratios(slow, quick)
    foretold = ratios([u + e for u, e in zip(network, encoders, strict=True)], network)
    table.line("gain of the cache: online step over cached step", "", gain)
    table.line("foretold: (3 U + E) / 3 U", "", foretold)
    table.line("gain over what was foretold", "", ratios(gain, foretold), at_least=0.9, at_most=1.1)


def drawing(setup: Setup, table: Table) -> None:
    """Where the time of a picture goes, stage by stage: one picture, and as many as make full network calls."""
    if setup.init is not None:
        cascade = load_cascade(ROOT / setup.init)
    else:
        task = build_task(setup.config("base"))
        assert isinstance(task, DiffusionTask)
        cascade = task.cascade(task.module.eval())
    prompts = setup.config("base").preview.prompts
    side = cascade.stages[-1].config.resolution_px
    table.title(f"drawing: pictures of {side} px")
    for count in (1, max(stage.config.sampling.rows for stage in cascade.stages)):
        whole, parts = _drawn(cascade, (prompts * count)[:count], setup.times(5))
        table.line(f"a picture, {count} at once", "s", whole, at_most=5 if cascade.stages[1:] else None)
        for name, found in parts.items():
            table.line(f"  {name}", "s", found)
        for stage in cascade.stages[1:]:
            shares = [100 * r for r in ratios(parts[stage.config.name], whole)]
            table.line(f"  {stage.config.name}, of the whole", "%", shares, at_most=50)


def _drawn(cascade: Cascade, prompts: Sequence[str], repeats: int) -> tuple[list[float], dict[str, list[float]]]:
    """Seconds of a picture, and of what it is made of."""
    watched: dict[str, tuple[Any, str]] = {"text of prompt and null": (cascade.text, "encode")}
    for stage in cascade.stages:
        name, options = stage.config.name, stage.config.sampling
        watched[name] = (stage, "sample")
        watched[f"  {name}'s network, {options.steps} steps, guidance {options.guidance:g}"] = (
            stage.denoiser.net, "forward"
        )  # fmt: skip
        watched[f"  {name}'s decoding"] = (stage.codec.module, "decode")
    parts: dict[str, list[float]] = {name: [] for name in watched}

    def draw() -> None:
        watches = {name: Stopwatch() for name in watched}
        with ExitStack() as patches:
            for name, (owner, method) in watched.items():
                patches.enter_context(patch.object(owner, method, watches[name].timed(getattr(owner, method))))
            cascade(prompts, list(range(len(prompts))))
        for name, watch in watches.items():
            parts[name].append(watch.total / len(prompts))

    (whole,) = interleaved([draw], repeats)
    return [s / len(prompts) for s in whole], {name: found[1:] for name, found in parts.items()}
