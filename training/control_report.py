"""`ldm eval control`: do pictures keep to what a ControlNet was told?

    held-out pictures -> control_picture -> the base with the ControlNet, at each scale -> control_picture of what it
    drew -> how alike the two are, picture by picture
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from ldm.config import UserError
from ldm.control import control_picture, load_control
from ldm.denoiser import Denoiser
from ldm.progress import advancing
from ldm.weights import write_json
from pipelines.cascade import Cascade, load_cascade
from pipelines.generate import check_out
from pipelines.images import grid, save_png, to_uint8
from training.data import BadImage, DataConfig, Reader
from training.environment import environment, prepare_process
from training.judging import Asked, asked_of
from training.quality import Estimate, Resampler
from training.report import Table, plain, write_html
from training.steps import planes

SHOWN = 12
EDGE = 0.25  # as light or lighter is an edge
FILES = ("report.json", "report.html", "pictures.png")


def evaluate(model: str | Path, data: str | Path, control: str | Path, out: str | Path,
             scales: Sequence[float] = (0.0, 0.5, 1.0), pictures: int = 64, split: str | None = "combos",
             overrides: Sequence[str] = (), overwrite: bool = False, device: str | None = None,
             tell: Callable[[str], None] = lambda line: None) -> Path:  # fmt: skip
    """Draw held-out captions, each told of its own picture, with the same seeds at each scale of the ControlNet's part;
    returns OUT/report.json. Scale 0 is the base alone. Raises UserError for what cannot be used."""
    prepare_process()
    check_out(Path(out), FILES, overwrite)
    cascade = load_cascade(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stage = cascade.stages[0]
    config, factor = stage.config, stage.codec.module.config.factor
    network, told = load_control(Path(control), config.unet, config.shape(factor), factor, stage.codec.latents_digest)
    reader = Reader(DataConfig(path=str(data), split=split, size_px=config.resolution_px))
    count = min(pictures, len(reader.rows))
    rows = [reader.rows[k * len(reader.rows) // count] for k in range(count)]
    try:
        real = planes(torch.stack([torch.from_numpy(reader.read(row).pixels) for row in rows]))
    except BadImage as error:
        raise UserError(f"{data}: {error}; `ldm data check` names the picture") from None
    asked, wanted = asked_of(rows, captions=False), control_picture(real, told)
    sampler = Resampler([a.group for a in asked])
    lines: dict[str, dict[str, Estimate]] = {}
    first: dict[str, Tensor] = {}
    shown = [*to_uint8(real[:SHOWN]), *to_uint8(wanted[:SHOWN] * 2 - 1)]
    for scale in scales:
        denoiser = Denoiser(stage.denoiser.net, stage.denoiser.schedule, stage.denoiser.config)
        denoiser.control, denoiser.control_scale = network, scale
        stage.denoiser, stage.control = denoiser.to(cascade.text.device).eval(), wanted
        drawn = _drawn(cascade.only(config.name), asked, overrides)
        own = control_picture(drawn, told)
        values = {"correlation": correlation(own, wanted)}
        if told.kind == "edges":
            values["F1 within 1 px"] = edges_found(own, wanted)
        first = first or values
        found = {name: sampler.mean(each) for name, each in values.items()}
        if first is not values:
            gain = f", beyond that of scale {scales[0]:g}"
            found |= {name + gain: sampler.mean(each - first[name]) for name, each in values.items()}
        lines[f"scale {scale:g}"] = found
        shown += list(to_uint8(drawn[:SHOWN]))
        tell(str(Table("", {f"scale {scale:g}": found})).strip())
    table = Table(f"How much the {told.kind} drawn are those told, {len(rows)} pictures a scale", lines,
                  note="95% intervals over concepts; those of what is beyond another scale are of the same captions "
                       "and seeds, picture by picture. Scale 0 is the base without the ControlNet.")  # fmt: skip
    Path(out).mkdir(parents=True, exist_ok=True)
    save_png(grid(shown, min(SHOWN, len(rows))), Path(out) / "pictures.png")
    report: dict[str, Any] = {"model": cascade.digest, "split": split, "control": told.kind, "pictures": len(rows),
                              "measures": plain(lines), **environment()}  # fmt: skip
    write_json(Path(out) / "report.json", report)
    write_html(Path(out) / "report.html", "Control", report, [table],
               {"pictures.png": "Real pictures, what was told of them, and what was drawn at each scale."})
    return Path(out) / "report.json"


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, of each pair of pictures: (N, C, H, W) twice -> (N,) float64; 0 where one is flat."""
    a, b = (x.double().flatten(1) - x.double().flatten(1).mean(1, keepdim=True) for x in (a, b))
    found: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)
    return found


def edges_found(found: Tensor, wanted: Tensor) -> Tensor:
    """F1 of edge pixels that have one of the other picture within a pixel: (N, 3, H, W) twice -> (N,) float64."""
    own, other = ((x[:, :1] >= EDGE).double() for x in (found, wanted))
    precision, recall = (
        (a * max_pool2d(b, 3, 1, 1)).flatten(1).sum(1) / a.flatten(1).sum(1).clamp(min=1)
        for a, b in ((own, other), (other, own))
    )
    both: Tensor = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return both


def _drawn(cascade: Cascade, asked: Sequence[Asked], overrides: Sequence[str]) -> Tensor:
    sampling = cascade.sampling(overrides=overrides)
    with advancing("drawing", sampling[0].steps * -(-len(asked) // sampling[0].rows)) as advance:
        return cascade.draw([a.prompt for a in asked], range(len(asked)), sampling,
                            on_step=lambda _done, _of: advance())[-1]  # fmt: skip
