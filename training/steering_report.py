"""`ldm eval steering`: does guidance by a classifier's gradient, or CLIP's, bring what it is to bring?

    held-out rows -> prompts, wanted classes -> the base, at each scale -> pictures -> a judge that had no part in it
    -> its mean probability of the wanted class
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.config import UserError
from ldm.progress import advancing
from ldm.weights import load_classifier, write_json
from pipelines.cascade import Cascade, load_cascade
from pipelines.generate import check_out
from pipelines.images import grid, save_png, to_uint8, visible
from pipelines.steering import toward_classes, toward_texts
from training.classifier import among_first, classify, labels_of
from training.data import DataConfig, Reader
from training.environment import environment, prepare_process
from training.judging import Asked, asked_of
from training.quality import Estimate, Resampler
from training.report import Table, plain, write_html

ROWS = 32
SHOWN = 12
FILES = ("report.json", "report.html", "curve.png", "pictures.png")


def evaluate(model: str | Path, data: str | Path, out: str | Path, judge: str | Path, label: str,
             classifier: str | Path | None = None, clip: str | Path | None = None,
             scales: Sequence[float] = (0.0, 1.0, 2.0, 4.0), pictures: int = 256, split: str = "combos",
             overrides: Sequence[str] = (), overwrite: bool = False, device: str | None = None,
             tell: Callable[[str], None] = lambda line: None) -> Path:  # fmt: skip
    """Draw `pictures` by the first stage at each scale, and have a judge look for `label`; returns OUT/report.json.

    By a noise-aware classifier, prompts are captions that do not name the class wanted, or empty where all do; by
    CLIP, captions that name it, where there are such. overrides: sampling, such as "base.guidance=1". Raises UserError
    unless one of the two is given, and where the judge, the classifier or the data do not know the label.
    """
    prepare_process()
    check_out(Path(out), FILES, overwrite)
    if (classifier is None) == (clip is None):
        raise UserError("name what is to guide: either --classifier or --clip")
    verdict = load_classifier(judge)
    if label not in verdict.classes:
        raise UserError(f"{judge}: knows {', '.join(verdict.classes)} and not {label}")
    cascade = load_cascade(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cascade = cascade.only(cascade.stages[0].config.name)
    stage = cascade.stages[0]
    rows = Reader(DataConfig(path=str(data), split=split, size_px=stage.config.resolution_px)).rows
    lacking = next((row.key for row in rows if label not in row.fields), None)
    if lacking is not None:
        raise UserError(f"{lacking}: has no field {label!r}")
    asked = asked_of(rows) if clip is not None else [_unnamed(row, label) for row in rows]
    chosen = [asked[k % len(asked)] for k in range(pictures)]
    wanted = {label: [str(a.fields[label]) for a in chosen]}
    lines: dict[str, dict[str, Estimate]] = {}
    shown = []
    for scale in scales:
        steer = None
        if scale:
            steer = (toward_classes(classifier, stage, wanted, scale) if classifier is not None
                     else toward_texts(str(clip), stage, [a.prompt for a in chosen], scale))  # fmt: skip
        drawn = _drawn(cascade, chosen, overrides, steer)
        lines[f"scale {scale:g}"] = _judged(verdict, label, drawn, chosen)
        shown += visible(to_uint8(drawn[:SHOWN]))
        tell(str(Table("", {f"scale {scale:g}": lines[f"scale {scale:g}"]})).strip())
    by = "a noise-aware classifier" if classifier is not None else "CLIP"
    table = Table(f"The judge on {label}, {pictures} pictures a scale, guided by {by}", lines,
                  note="95% intervals over concepts.")  # fmt: skip
    Path(out).mkdir(parents=True, exist_ok=True)
    _draw(scales, [lines[f"scale {scale:g}"]["probability"] for scale in scales], label, Path(out) / "curve.png")
    save_png(grid(shown, SHOWN), Path(out) / "pictures.png")
    report: dict[str, Any] = {"model": cascade.digest, "split": split, "label": label, "by": by, "pictures": pictures,
                              "measures": plain(lines), **environment()}  # fmt: skip
    write_json(Path(out) / "report.json", report)
    write_html(Path(out) / "report.html", "Guidance by a gradient", report, [table],
               {"curve.png": "The judge's mean probability.", "pictures.png": "The first pictures of each scale."})
    return Path(out) / "report.json"


def _unnamed(row: Any, label: str) -> Asked:
    """With the first caption that does not name the class, or none."""
    name = str(row.fields[label])
    return Asked(next((c for c in row.captions if name not in c), ""), row.key, row.fields)


def _drawn(cascade: Cascade, asked: Sequence[Asked], overrides: Sequence[str], steer: Any) -> Tensor:
    sampling = cascade.sampling(overrides=overrides)
    with advancing("drawing", sampling[0].steps * -(-len(asked) // sampling[0].rows)) as advance:
        return cascade.draw([a.prompt for a in asked], range(len(asked)), sampling,
                            on_step=lambda _done, _of: advance(), steer=steer)[-1]  # fmt: skip


def _judged(judge: Any, label: str, drawn: Tensor, asked: Sequence[Asked]) -> dict[str, Estimate]:
    side = judge.config.side_px
    if drawn.shape[-1] < side:  # the judge shrinks by itself, and does not enlarge
        drawn = drawn.repeat_interleave(side // drawn.shape[-1], 2).repeat_interleave(side // drawn.shape[-1], 3)
    logits = torch.cat([classify(judge, part)[label] for part in torch.split(drawn, ROWS)])
    right = labels_of([{"fields": a.fields} for a in asked], label, judge.classes[label])
    sampler = Resampler([a.group for a in asked])
    return {"probability": sampler.mean(logits.softmax(1).gather(1, right[:, None])[:, 0]),
            "right": sampler.mean(among_first(logits, right, 1).double())}  # fmt: skip


def _draw(scales: Sequence[float], found: Sequence[Estimate], label: str, path: Path) -> None:
    from matplotlib.figure import Figure  # takes a second

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    spans = [[e.value - e.low for e in found], [e.high - e.value for e in found]]
    axes.errorbar(list(scales), [e.value for e in found], yerr=spans, marker="o")
    axes.set_xlabel("scale")
    axes.set_ylabel(f"probability of the {label} wanted")
    figure.savefig(path, dpi=100)
