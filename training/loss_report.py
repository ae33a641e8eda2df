"""`ldm eval loss`: how wrong each stage's network is by noise level, which is the same whatever draws with it.

    held-out rows -> cache -> evaluation_inputs -> Denoiser.error at fixed levels and noise -> report.json, report.html

Beside the error with its caption stands the error without: what the text tells the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import to_dict
from ldm.weights import write_json
from pipelines.cascade import Cascade, load_cascade
from pipelines.generate import check_out
from pipelines.stage import Stage
from training.cache import Cache
from training.data import DataConfig, Reader
from training.encode import encode
from training.environment import environment, prepare_process
from training.held_out import EVALUATION_LEVELS, errors_by_level
from training.judging import CONCEPT
from training.quality import Estimate, Resampler
from training.report import Table, plain, write_html
from training.steps import Frozen

LEVELS = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100)  # hundredths of t; EVALUATION_LEVELS are among them
FILES = ("report.json", "report.html", "curves.png")


def evaluate(model: str | Path, data: str | Path, out: str | Path, split: str = "combos", rows: int | None = None,
             cache: str | Path = "cache", overwrite: bool = False, device: str | None = None,
             tell: Callable[[str], None] = lambda line: None) -> Path:  # fmt: skip
    """Measure every stage of a cascade on `split`, with and without captions; returns OUT/report.json.

    rows: at most so many pictures, evenly spread. cache: where they are kept, encoded as training reads them. The
    error is the mean square of the network's target, unweighted; of an SR stage with small pictures as they are.
    """
    prepare_process()
    check_out(Path(out), FILES, overwrite)
    cascade = load_cascade(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    lines: dict[str, dict[str, Estimate]] = {}
    for stage in cascade.stages:
        held, frozen = held_out(cascade, stage, data, split, cache)
        count = min(rows or len(held), len(held))
        chosen = [k * len(held) // count for k in range(count)]
        records = [held.record(i) for i in chosen]
        sampler = Resampler([str(r["fields"].get(CONCEPT, r["key"])) for r in records])
        for name, told in ((stage.config.name, True), (f"{stage.config.name}, no text", False)):
            lines[name] = estimates(errors_by_level(stage.denoiser, frozen, held, chosen, LEVELS, told), sampler)
    note = (f"mean: over t = {', '.join(f'{level / 100:g}' for level in EVALUATION_LEVELS)}. 95% intervals over "
            "concepts; stages that predict different things cannot be compared.")  # fmt: skip
    table = Table(f"Mean squared error of the target by t, {split}", lines, note=note)
    tell(str(table))
    report: dict[str, Any] = {
        "model": cascade.digest, "split": split,
        "targets": {stage.config.name: to_dict(stage.config.denoiser) for stage in cascade.stages},
        "errors": plain(lines), **environment(),
    }  # fmt: skip
    Path(out).mkdir(parents=True, exist_ok=True)
    draw_curves(lines, Path(out) / "curves.png")
    write_json(Path(out) / "report.json", report)
    write_html(Path(out) / "report.html", "Error by noise level", report, [table],
               {"curves.png": "Error over t; bars are 95% intervals."})  # fmt: skip
    return Path(out) / "report.json"


def held_out(cascade: Cascade, stage: Stage, data: str | Path, split: str, cache: str | Path) -> tuple[Cache, Frozen]:
    """The split as the stage's training reads it, and the stage's frozen parts."""
    config = stage.config
    reader = Reader(DataConfig(path=str(data), split=split, size_px=config.resolution_px))
    latent = stage.codec.module.config.autoencoder is not None
    scale = config.low_res.scale if config.low_res and latent else None
    held = encode(reader, cache, stage.codec if latent else None, cascade.text, scale)
    return held, Frozen(stage.codec.module, config.normalisation, held.null, 0.0, config.low_res)


def estimates(errors: Mapping[int, Tensor], sampler: Resampler) -> dict[str, Estimate]:
    """The mean error at each level of `errors_by_level`, and that over EVALUATION_LEVELS, with intervals."""
    found = {f"{level / 100:g}": sampler.mean(values) for level, values in errors.items()}
    return {**found, "mean": sampler.mean(torch.stack([errors[level] for level in EVALUATION_LEVELS]).mean(0))}


def draw_curves(lines: Mapping[str, Mapping[str, Estimate]], path: Path) -> None:
    """One curve a line, over t."""
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, line in lines.items():
        found = {float(t): estimate for t, estimate in line.items() if t != "mean"}
        spans = [[e.value - e.low for e in found.values()], [e.high - e.value for e in found.values()]]
        axes.errorbar(list(found), [e.value for e in found.values()], yerr=spans, marker="o", label=name)
    axes.set_xlabel("t")
    axes.set_ylabel("mean squared error of the target")
    axes.legend()
    figure.savefig(path, dpi=100)
