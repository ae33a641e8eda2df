"""`ldm eval likelihood`: how many bits a dimension a base needs for held-out pictures.

    held-out rows -> cache -> x0, caption -> variational_bound on a grid -> prior, each step, decoder
                                          -> ode_log_likelihood          -> report.json, report.html

Of pixels, bits of 8-bit values; of latents, of a density in their own units, and labelled so: a codec's scale is in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import UserError
from ldm.draws import keyed_generator
from ldm.grids import uniform_grid
from ldm.likelihood import Bound, ode_log_likelihood, variational_bound
from ldm.weights import write_json
from pipelines.cascade import load_cascade
from pipelines.generate import check_out
from pipelines.stage import Stage
from training.environment import environment, prepare_process
from training.held_out import evaluation_inputs
from training.judging import CONCEPT
from training.loss_report import held_out
from training.quality import Estimate, Resampler
from training.report import Table, plain, write_html
from training.stages import EVALUATION_ROWS

FILES = ("report.json", "report.html", "steps.png")
LEVELS_OF_BYTE = 255 / 2  # 8-bit values per unit of [-1, 1]


def evaluate(model: str | Path, data: str | Path, out: str | Path, split: str = "combos", rows: int = 32,
             steps: int | None = None, ode_steps: int = 100, cache: str | Path = "cache", overwrite: bool = False,
             device: str | None = None, tell: Callable[[str], None] = lambda line: None) -> Path:  # fmt: skip
    """Measure the first stage of a cascade, a base, on `rows` pictures of `split`, told their first caption, without
    guidance; returns OUT/report.json.

    steps: of the grid of the bound; None is all T of a discrete schedule, or 1000. ode_steps: of Heun's method for the
    ODE; 0 leaves it out. Raises UserError for an SR stage, whose likelihood is of what a small picture lacks.
    """
    prepare_process()
    check_out(Path(out), FILES, overwrite)
    cascade = load_cascade(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stage = cascade.stages[0]
    if stage.config.low_res is not None:
        raise UserError(f"{model}: begins with stage {stage.config.name}, which enlarges; likelihood is of a base")
    held, frozen = held_out(cascade, stage, data, split, cache)
    count = min(rows, len(held))
    chosen = [k * len(held) // count for k in range(count)]
    schedule = stage.denoiser.schedule
    steps = steps or schedule.steps
    try:
        grid = uniform_grid(steps, schedule)
    except ValueError as error:
        raise UserError(f"--steps {steps}: {error}") from None
    pixels = stage.codec.module.config.autoencoder is None
    sampler = Resampler([str(r["fields"].get(CONCEPT, r["key"])) for r in map(held.record, chosen)])
    found: list[Bound] = []
    density: list[Tensor] = []
    for start in range(0, count, EVALUATION_ROWS):
        indices = chosen[start : start + EVALUATION_ROWS]
        x0, cond = evaluation_inputs(held, indices, frozen)
        predict = partial(stage.denoiser, cond=cond.to(stage.device))
        x0 = x0.to(stage.device)
        generators = [keyed_generator(0, "likelihood", i) for i in indices]
        noise = partial(_noise, generators)
        found.append(variational_bound(predict, x0, grid, noise, schedule=schedule,
                                       decoder="discretised" if pixels else "gaussian"))  # fmt: skip
        if ode_steps:
            density.append(_ode_bits(predict, x0, generators, stage, ode_steps))
    bound = Bound(*(torch.cat(parts).cpu() for parts in zip(*found, strict=True)))
    lines = {"bound": _measures(bound, sampler)}
    if density:
        lines["probability-flow ODE"] = {"bits/dim": sampler.mean(torch.cat(density))}
    unit = "8-bit pixels" if pixels else "the codec's latents, which no other codec's can be compared with"
    note = (f"{count} pictures, {x0[0].numel()} dimensions each. The bound is of the reverse process on {steps} steps, "
            f"one draw of each; the ODE of {ode_steps} steps of Heun's method, one probe.")  # fmt: skip
    table = Table(f"Bits per dimension of {unit}, {split}", lines, note=note)
    tell(str(table))
    Path(out).mkdir(parents=True, exist_ok=True)
    _draw(grid, bound, Path(out) / "steps.png")
    report: dict[str, Any] = {
        "model": cascade.digest, "split": split, "unit": unit, "pictures": count, "steps": steps,
        "ode_steps": ode_steps, "measures": plain(lines), **environment(),
    }  # fmt: skip
    write_json(Path(out) / "report.json", report)
    write_html(Path(out) / "report.html", "Likelihood", report, [table],
               {"steps.png": "Bits per dimension of each step, and summed from the noisy end."})  # fmt: skip
    return Path(out) / "report.json"


def _noise(generators: Sequence[torch.Generator], like: Tensor) -> Tensor:
    return torch.stack([torch.randn(like.shape[1:], generator=g) for g in generators]).to(like)


def _ode_bits(predict: Any, x0: Tensor, generators: Sequence[torch.Generator], stage: Stage, steps: int) -> Tensor:
    """Of pixels with uniform noise of one step of a byte, so that a density bounds their mass (Theis et al. 2016)."""
    if stage.codec.module.config.autoencoder is None:
        spread = torch.stack([torch.rand(x0.shape[1:], generator=g) for g in generators]).to(x0)
        x0 = x0 + (spread - 0.5) / LEVELS_OF_BYTE
    probe = partial(_signs, generators)
    log_p = ode_log_likelihood(predict, x0, probe, schedule=stage.denoiser.schedule, steps=steps).cpu()
    return -log_p + (math.log2(LEVELS_OF_BYTE) if stage.codec.module.config.autoencoder is None else 0.0)


def _signs(generators: Sequence[torch.Generator], like: Tensor) -> Tensor:
    return torch.stack([torch.randint(0, 2, like.shape[1:], generator=g) * 2 - 1 for g in generators]).to(like)


def _measures(bound: Bound, sampler: Resampler) -> dict[str, Estimate]:
    return {
        "bits/dim": sampler.mean(bound.total), "prior": sampler.mean(bound.prior),
        "steps": sampler.mean(bound.steps.sum(1)), "decoder": sampler.mean(bound.decoder),
    }  # fmt: skip


def _draw(grid: Tensor, bound: Bound, path: Path) -> None:
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(10, 4), layout="constrained")
    each, whole = figure.subplots(1, 2)
    terms = bound.steps.mean(0)
    each.semilogy(grid[:-2], terms.clamp(min=1e-9))
    each.set_title("bits per dimension of the step from t")
    whole.plot(grid[:-2], float(bound.prior.mean()) + terms.cumsum(0))
    whole.axhline(float(bound.total.mean()), color="black", linewidth=0.8, label="with the decoder")
    whole.set_title("prior and steps, from t = 1 down to t")
    whole.legend()
    for axes in (each, whole):
        axes.set_xlabel("t")
    figure.savefig(path, dpi=100)
