"""`ldm eval codec`: how much of a picture survives its codec, which bounds every stage in its latents.

    held-out pictures -> encode -> posterior mean -> decode -> against the pictures; the same decoded in float16
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.config import UserError, to_dict
from ldm.latents import LatentCodec
from ldm.weights import Codec, load_codec, write_json
from pipelines.cascade import load_cascade
from pipelines.generate import check_out
from pipelines.images import grid, save_png, to_uint8
from training.boundary import CODEC_ROWS, colour_shift, round_trip
from training.data import DataConfig, Reader
from training.environment import environment, prepare_process
from training.features import Features
from training.judging import asked_of
from training.metrics import psnr, ssim
from training.quality import Estimate, FrechetDistance, KernelDistance, Resampler, moments
from training.report import Table, plain, write_html
from training.seen import FEATURES_PX, Eyes
from training.steps import planes

SHOWN = 12
FEW_RESAMPLES = 40
FILES = ("report.json", "report.html", "pictures.png")


def evaluate(model: str | Path, data: str | Path, out: str | Path, split: str = "combos", sizes: Sequence[int] = (64,),
             pictures: int | None = None, overwrite: bool = False, device: str | None = None,
             tell: Callable[[str], None] = lambda line: None) -> Path:  # fmt: skip
    """Measure the round trip of the pictures of `split` at each of `sizes`; returns OUT/report.json.

    model: a codec's folder, or a cascade's, whose first stage's codec it then is. pictures: at most so many, evenly
    spread. Raises UserError where a size does not fit the codec, or the codec is none.
    """
    prepare_process()
    check_out(Path(out), FILES, overwrite)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    codec = _codec(Path(model)).module.to(device)
    wrong = [side for side in sizes if side % codec.config.factor]
    if wrong or codec.autoencoder is None:
        why = f"{wrong[0]} px is no multiple of its {codec.config.factor} px a cell" if wrong else "pixels lose nothing"
        raise UserError(f"{model}: {why}")
    features = Features().to(device)
    lines: dict[str, dict[str, Estimate]] = {}
    shown: list[np.ndarray] = []
    for side in sizes:
        real, groups, plainly = _pictures(data, split, side, pictures)
        made = round_trip(codec, real)
        lines[f"{side} px"] = measures(real, made, groups, features)
        lines[f"{side} px"]["float16 to float32, dB"] = Resampler(groups).mean(half_agrees(codec, real))
        if 2 <= len(plainly) < len(real):
            own = [groups[i] for i in plainly]
            lines[f"{side} px, without flags"] = measures(real[plainly], made[plainly], own, features)
        shown = [*to_uint8(real[:SHOWN]), *to_uint8(made[:SHOWN])]
    note = ("95% intervals over concepts. FD and KD are between the pictures and their round trips, in features of "
            f"EfficientNet-Lite0 at {FEATURES_PX} px.")  # fmt: skip
    table = Table(f"Round trip of {split} through the posterior mean", lines, note=note)
    tell(str(table))
    report: dict[str, Any] = {"codec": to_dict(codec.config), "split": split, "measures": plain(lines),
                              **environment()}  # fmt: skip
    Path(out).mkdir(parents=True, exist_ok=True)
    save_png(grid(shown, columns=len(shown) // 2), Path(out) / "pictures.png")
    write_json(Path(out) / "report.json", report)
    named = {"pictures.png": f"Pictures of {sizes[-1]} px (above) and their round trips (below)."}
    write_html(Path(out) / "report.html", "Round trip of a codec", report, [table], named)
    return Path(out) / "report.json"


def _codec(folder: Path) -> Codec:
    return load_cascade(folder).codec if (folder / "cascade.json").is_file() else load_codec(folder)


def _pictures(data: str | Path, split: str, side: int, count: int | None) -> tuple[Tensor, list[str], list[int]]:
    """Pictures (N, 3, side, side) in [-1, 1], their groups, and the places of those that are no flags."""
    reader = Reader(DataConfig(path=str(data), split=split, size_px=side))
    rows = reader.rows
    count = min(count or len(rows), len(rows))
    rows = [rows[k * len(rows) // count] for k in range(count)]
    asked = asked_of(rows, captions=False)
    pixels = np.stack([reader.read(row).pixels for row in rows])
    return (planes(torch.from_numpy(pixels)), [a.group for a in asked],
            [i for i, a in enumerate(asked) if not a.flag])  # fmt: skip


def measures(real: Tensor, made: Tensor, groups: list[str], features: Features) -> dict[str, Estimate]:
    """Of pictures and their round trips (N, 3, H, W) in [-1, 1]."""
    sampler, few = Resampler(groups), Resampler(groups, resamples=FEW_RESAMPLES)
    eyes = Eyes(features)
    known, own = (eyes.see(x).features for x in (real, made))
    frechet, kernel = FrechetDistance(own, moments(known)), KernelDistance(own, known)
    return {
        "PSNR, dB": sampler.mean(psnr(made, real)), "SSIM": sampler.mean(ssim(made, real)),
        "LPIPS-type distance (efflite0)": sampler.mean(features.distance(made, real)),
        "colour shift, of 255": sampler.mean(colour_shift(made, real)),
        "FD-efflite0": few.spread(frechet(), frechet), "KD-efflite0": sampler.spread(kernel(), kernel),
    }  # fmt: skip


@torch.no_grad()
def half_agrees(codec: LatentCodec, pictures: Tensor) -> Tensor:
    """Decoded in float16 against float32: PSNR in dB per picture, (N,)."""
    half = copy.deepcopy(codec).half()
    found = []
    for part in torch.split(pictures, CODEC_ROWS):
        latent = codec.encode(part.to(codec.device)).chunk(2, dim=1)[0]
        found.append(psnr(half.decode(latent.half()).float(), codec.decode(latent)).cpu())
    return torch.cat(found)
