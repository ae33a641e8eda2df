"""`ldm eval sweep`: what a base's pictures cost, and how good they are, over settings and over models.

    captions -> the base, for each model and setting -> pictures -> judge, kernel distance; network calls -> frontier
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.config import UserError, to_dict
from ldm.models.classifier import Classifier
from ldm.weights import write_json
from pipelines.cascade import Cascade, load_cascade
from pipelines.generate import check_out
from pipelines.images import grid, save_png, to_uint8
from pipelines.settings import SamplingConfig
from training.boundary_report import settings_of
from training.data import DataConfig, Reader
from training.environment import environment, prepare_process
from training.judging import Asked, load_judge, shares, styles_of, verdicts
from training.picture_report import asked_in, drawn_of
from training.processes import process_state, together
from training.quality import Estimate, KernelDistance, Resampler
from training.report import Table, plain, write_html
from training.seen import Eyes, Seen, reference_of

MAX_CELLS = 24
SHOWN = 8
FILES = ("report.json", "report.html", "frontier.png", "pictures.png")
QUALITY = {"both": "concept among five, and style", "KD-efflite0": "kernel distance, less is better"}
Cell = dict[str, Any]


def evaluate(model: str | Path, data: str | Path, out: str | Path, swept: Sequence[str],
             judge: str | Path | None = None, against: Sequence[str | Path] = (), split: str = "combos",
             pictures: int = 256, cache: str | Path = "cache", overwrite: bool = False, device: str | None = None,
             tell: Callable[[str], None] = lambda line: None) -> Path:  # fmt: skip
    """Draw `pictures` by the first stage of each model with every combination of `swept`, fields of its sampling such
    as "guidance=1,2,4", and measure them; returns OUT/report.json.

    against: other cascades, such as averages of other lengths that `ldm ckpt average` made. Cost is network rows a
    picture. Raises UserError for more than MAX_CELLS combinations.
    """
    prepare_process()
    check_out(Path(out), FILES, overwrite)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    models = {str(folder): _base(folder, device) for folder in (model, *against)}
    settings = {name: settings_of(cascade, cascade.stages[0], swept) for name, cascade in models.items()}
    count = sum(map(len, settings.values()))
    if count > MAX_CELLS:
        raise UserError(f"{count} combinations; at most {MAX_CELLS}: sweep fewer values")
    sides = {cascade.stages[0].config.resolution_px for cascade in models.values()}
    if len(sides) > 1:
        raise UserError(f"--against: the models draw different sizes: {', '.join(map(str, sorted(sides)))} px")
    side = sides.pop()
    held = Reader(DataConfig(path=str(data), split=split, size_px=side))
    asked = asked_in(held, pictures)
    seeds = -(-pictures // len(asked))
    ordered = [(a, seed) for seed in range(seeds) for a in asked][:pictures]
    known = Reader(DataConfig(path=str(data), split="train", size_px=side))
    verdict = None if judge is None else load_judge(judge, asked, styles_of(known.rows))
    eyes = Eyes.of(None, device)
    cells: list[Cell] = []
    shown = []
    with together():
        reference = reference_of(known, eyes, cache)
        for name, cascade in models.items():
            for sampling in settings[name]:
                drawn = drawn_of(cascade, ordered, [sampling])
                if process_state().is_main_process:
                    cells.append(_cell(name, sampling, drawn, [a for a, _ in ordered], verdict, eyes, reference))
                    shown += list(to_uint8(drawn[:SHOWN]))
                    tell(_line(cells[-1], len(models) > 1))
        if not process_state().is_main_process:
            return Path(out) / FILES[0]
    return _write(Path(out), cells, shown, {"split": split, "pictures": len(ordered), **environment()})


def _base(folder: str | Path, device: str) -> Cascade:
    cascade = load_cascade(folder, device)
    first = cascade.stages[0].config
    if first.low_res is not None:
        raise UserError(f"{folder}: begins with stage {first.name}, which draws nothing by itself")
    return cascade.only(first.name)


def _cell(name: str, sampling: SamplingConfig, drawn: torch.Tensor, asked: list[Asked], judge: Classifier | None,
          eyes: Eyes, reference: Seen) -> Cell:  # fmt: skip
    sampler = Resampler([a.group for a in asked])
    kernel = KernelDistance(eyes.see(drawn).features, reference.features)
    found: dict[str, Estimate] = {} if judge is None else dict(shares(verdicts(judge, drawn, asked), asked))
    found["KD-efflite0"] = sampler.spread(kernel(), kernel)
    rows = sampling.steps * (1 if sampling.guidance == 1 else 2)
    return {"model": name, "sampling": to_dict(sampling), "rows_a_picture": rows, "measures": found}


def best_at_cost(cells: Sequence[Cell], measure: str) -> list[int]:
    """The frontier: places of the cells that no other beats in `measure` at no more cost, cheapest first."""
    sign = -1 if measure.startswith("KD") else 1
    score = [sign * cell["measures"][measure].value for cell in cells]
    order = sorted(range(len(cells)), key=lambda i: (cells[i]["rows_a_picture"], -score[i]))
    kept: list[int] = []
    for i in order:
        if not kept or score[i] > score[kept[-1]]:
            kept.append(i)
    return kept


def _label(cell: Cell, several: bool, without: tuple[str, ...] = ()) -> str:
    told = cell["sampling"]
    parts = [f"{name} {told[name]}" for name in ("sampler", "grid", "steps", "guidance") if name not in without]
    return ", ".join([Path(cell["model"]).name, *parts] if several else parts)


def _line(cell: Cell, several: bool) -> str:
    return str(Table("", {_label(cell, several): cell["measures"]})).strip()


def _write(out: Path, cells: list[Cell], shown: list[Any], facts: dict[str, Any]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    several = len({cell["model"] for cell in cells}) > 1
    measures = [name for name in QUALITY if name in cells[0]["measures"]]
    frontier = {name: best_at_cost(cells, name) for name in measures}
    lines = {_label(cell, several): {"network rows a picture": float(cell["rows_a_picture"]), **cell["measures"]}
             for cell in cells}  # fmt: skip
    best = {name: [_label(cells[i], several) for i in places] for name, places in frontier.items()}
    note = " ".join(f"Best at their cost by {name}: {'; '.join(found)}." for name, found in best.items())
    _draw(cells, frontier, several, out / "frontier.png")
    save_png(grid(shown, columns=SHOWN), out / "pictures.png")
    report = {**facts, "cells": [{**cell, "measures": plain({"": cell["measures"]})[""]} for cell in cells],
              "frontier": best}  # fmt: skip
    write_json(out / "report.json", report)
    pictures = {"frontier.png": "Quality over cost.", "pictures.png": "The first pictures of each line, from the top."}
    table = Table(f"{facts['pictures']} pictures of {facts['split']} a line", lines, note=note)
    write_html(out / "report.html", "A base over settings", report, [table], pictures)
    return out / "report.json"


def _draw(cells: Sequence[Cell], frontier: dict[str, list[int]], several: bool, path: Path) -> None:
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(6 * len(frontier), 4), layout="constrained")
    curves: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell["rows_a_picture"]):
        curves.setdefault(_label(cell, several, ("steps",)), []).append(cell)
    for axes, (name, places) in zip(figure.subplots(1, len(frontier), squeeze=False)[0], frontier.items(), strict=True):
        for label, own in curves.items():
            found = [cell["measures"][name] for cell in own]
            spans = [[max(0.0, e.value - e.low) for e in found], [max(0.0, e.high - e.value) for e in found]]
            axes.errorbar([cell["rows_a_picture"] for cell in own], [e.value for e in found], yerr=spans, marker="o",
                          label=label)  # fmt: skip
        axes.step([cells[i]["rows_a_picture"] for i in places], [cells[i]["measures"][name].value for i in places],
                  where="post", color="black", linewidth=0.8)  # fmt: skip
        axes.set_xlabel("network rows a picture")
        axes.set_title(QUALITY[name])
        axes.set_xscale("log", base=2)
    axes.legend()
    figure.savefig(path, dpi=100)
