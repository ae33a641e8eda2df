"""The report of `ldm eval cascade`: report.json, curves.png, pictures.png, and the best setting kept in the stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import UserError, parse, to_dict
from ldm.weights import write_json
from pipelines.cascade import Cascade, load_cascade
from pipelines.generate import check_out
from pipelines.images import grid, save_png, to_uint8
from pipelines.settings import SamplingConfig, StageConfig
from pipelines.stage import Stage
from training.boundary import (
    Held,
    after_base,
    against_truth,
    best,
    intervals,
    shown,
    sr_stage,
    sweep,
    what_counts,
)
from training.boundary_tiles import tiled_against_whole
from training.data import BadImage, DataConfig, Reader
from training.environment import environment, prepare_process
from training.features import Features

SHOWN_PICTURES = 12
FILES = ("report.json", "curves.png", "pictures.png")
UNITS = {"psnr_db": "PSNR, dB", "distance": "LPIPS-type distance (efflite0)", "consistency_db": "consistency, dB"}


def evaluate(model: str | Path, data: str | Path, out: str | Path, stage: str | None = None, pictures: int = 96,
             split: str | None = "combos", stride: int | None = None, against: Sequence[str | Path] = (),
             swept: Sequence[str] = ("steps=1,2,4,8",), sweep_pictures: int = 32, tiled: int = 0,
             save: bool = False, overwrite: bool = False, device: str | None = None,
             tell: Callable[[str], None] = lambda line: None) -> Path:  # fmt: skip
    """Measure an SR stage of the cascade `model` on held-out pictures of `data`; returns OUT/report.json.

    pictures: how many, evenly spread over the split; stride: of data without splits, as its training held it out.
    against: other SR cascades to stand beside it. swept: fields of the stage's sampling with their values, such as
    "level=0,0.1", every combination of which is measured on `sweep_pictures` of them; save: keep the best as the
    stage's default. tiled: how many of the large pictures to enlarge in tiles and at once. device: None is the GPU
    where there is one.
    Raises UserError where model, data or settings do not fit together.
    """
    prepare_process()
    check_out(Path(out), FILES, overwrite)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cascade = load_cascade(model, device)
    chosen = sr_stage(cascade, stage)
    config = chosen.config.low_res
    assert config is not None
    settings = settings_of(cascade, chosen, swept)
    others = {str(folder): _peer(folder, chosen, device) for folder in against}
    reader = Reader(DataConfig(path=str(data), split=split, size_px=chosen.config.resolution_px))
    held = _held(reader.hold_out(stride)[1] if stride else reader, pictures, config.scale)
    features = Features().to(device)
    tell(f"{len(held)} pictures of {split or 'the set'}, {len(set(held.groups))} groups; 95% intervals over groups")

    report: dict[str, Any] = {"pictures": len(held), "split": split, "stage": chosen.config.name,
                              "model": cascade.digest, "sampling": to_dict(chosen.config.sampling),
                              **environment()}  # fmt: skip
    found = against_truth(cascade, chosen, others, held, features)
    report["ground_truth"] = {name: intervals(measures, held.groups) for name, (_, measures) in found.items()}
    _tell_table(report["ground_truth"], tell)
    few = held.spread(sweep_pictures)
    report["what_counts"] = what_counts(cascade, chosen, few)
    tell("; ".join(f"{name} {value:.3g}" for name, value in report["what_counts"].items()))
    cells = report["sweep"] = sweep(cascade, chosen, few, features, settings)
    columns = {"small": shown(held.small, config.scale), **{name: p for name, (p, _) in found.items()},
               "truth": held.large}  # fmt: skip
    after: list[dict[str, Any]] = []
    if cascade.stages[0].config.low_res is None:
        least = parse(SamplingConfig, best(cells)["sampling"], "the best cell")
        tried = [replace(least, level=level) for level in dict.fromkeys(s.level for s in settings)]
        drawn, after = after_base(cascade, chosen, held, features, tried)
        columns["base"] = shown(drawn[0], config.scale)
        columns.update({f"level {s.level}": p for s, p in zip(tried, drawn[1:], strict=True)})
        for line in after:
            tell("after the base: " + "  ".join(f"{name} {value}" for name, value in line.items()))
    report["after_base"], report["best"] = after, best(cells, after)
    told = ", ".join(f"{name} {value}" for name, value in report["best"]["sampling"].items())
    tell(f"best setting: {told}; consistent: {report['best']['consistent']}")
    if tiled:
        report["tiled"] = tiled_against_whole(cascade, chosen, held.spread(tiled))
        tell("tiled: " + "  ".join(f"{name} {value}" for name, value in report["tiled"].items()))
    report["columns"] = list(columns)
    path = _write(Path(out), report, columns)
    if save:
        keep(Path(model), chosen.config, parse(SamplingConfig, report["best"]["sampling"], "the best cell"))
    return path


def settings_of(cascade: Cascade, stage: Stage, swept: Sequence[str]) -> list[SamplingConfig]:
    """The stage's sampling with every combination of "FIELD=VALUE,VALUE...". Raises UserError for what it cannot
    have."""
    axes: dict[str, list[str]] = {}
    for axis in swept:
        name, mark, values = axis.partition("=")
        if not mark or name in axes or not all(values.split(",")):
            raise UserError(f"--sweep {axis!a}: a field of the sampling, once, and its values, such as steps=1,2,4")
        axes[name] = [f"{stage.config.name}.{name}={value}" for value in values.split(",")]
    place = cascade.stages.index(stage)
    return [cascade.sampling(overrides=chosen)[place] for chosen in product(*axes.values())]


def _held(reader: Reader, pictures: int, scale: int) -> Held:
    """Pictures spread over a set. Raises UserError for one that cannot be read."""
    rows = reader.rows
    count, found = min(pictures, len(rows)), []
    for row in (rows[k * len(rows) // count] for k in range(count)):
        try:
            found.append(reader.read(row))
        except BadImage as error:
            raise UserError(f"{row.key}: {error}; `ldm data check` lists all that is wrong with a set") from None
    return Held.of(found, scale)


def _peer(folder: str | Path, stage: Stage, device: str) -> Cascade:
    """The SR stage of another cascade that does what `stage` does."""
    cascade = load_cascade(folder, device)
    own = sr_stage(cascade).config
    if (own.resolution_px, own.input_px) != (stage.config.resolution_px, stage.config.input_px):
        raise UserError(f"{folder}: {own.input_px} -> {own.resolution_px} px cannot stand beside "
                        f"{stage.config.input_px} -> {stage.config.resolution_px} px")  # fmt: skip
    return cascade.only(own.name)


def _tell_table(table: dict[str, dict[str, list[float]]], tell: Callable[[str], None]) -> None:
    for name, values in table.items():
        tell(f"{name:18} " + "  ".join(f"{k} {m:.4g} ({a:.4g} to {b:.4g})" for k, (m, a, b) in values.items()))


def _write(out: Path, report: dict[str, Any], columns: dict[str, Tensor]) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    _draw(report["sweep"], out / "curves.png")
    shown_rows = range(min(SHOWN_PICTURES, report["pictures"]))
    tiles = [to_uint8(pictures[i : i + 1])[0] for i in shown_rows for pictures in columns.values()]
    save_png(grid(tiles, len(columns)), out / "pictures.png")
    return out / "report.json"


def keep(model: Path, config: StageConfig, sampling: SamplingConfig) -> None:
    """Make a sampling the default of a stage, in its stage.json."""
    file = model / config.name / "stage.json"
    partial = file.with_name("stage.json.tmp")
    write_json(partial, to_dict(replace(config, sampling=sampling)))
    partial.replace(file)


def _draw(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Curves of each measure over steps, one per setting of the rest, with their intervals."""
    from matplotlib.figure import Figure  # takes a second

    plain = [cell["sampling"] for cell in cells]
    swept = [name for name in plain[0] if name != "steps" and any(told[name] != plain[0][name] for told in plain)]
    curves: dict[str, list[dict[str, Any]]] = {}
    for cell in sorted(cells, key=lambda cell: cell["sampling"]["steps"]):
        curves.setdefault(", ".join(f"{name} {cell['sampling'][name]}" for name in swept), []).append(cell)
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (name, label) in zip(figure.subplots(1, len(UNITS)), UNITS.items(), strict=True):
        for curve, own in curves.items():
            means = [cell[name][0] for cell in own]
            spans = [[max(0.0, m - cell[name][1]) for m, cell in zip(means, own, strict=True)],
                     [max(0.0, cell[name][2] - m) for m, cell in zip(means, own, strict=True)]]  # fmt: skip
            axes.errorbar([cell["sampling"]["steps"] for cell in own], means, yerr=spans, marker="o", label=curve)
        axes.set_xlabel("steps")
        axes.set_title(label)
        axes.set_xscale("log", base=2)
    if swept:
        axes.legend()
    figure.savefig(path, dpi=100)
