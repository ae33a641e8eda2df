"""`ldm eval pictures`: the pictures that a cascade draws for captions it never saw.

    held-out rows -> captions -> Cascade -> pictures -> judge, features -> shares, distances -> report.json, report.html
    training rows -> features once, kept by the data's digest

Beside each number stands the same for real held-out pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.config import UserError, to_dict
from ldm.models.clip import Clip
from ldm.progress import advancing
from ldm.weights import write_json
from pipelines.cascade import Cascade
from pipelines.generate import Model, check_out, request_of
from pipelines.images import grid, save_png, to_uint8
from pipelines.settings import SamplingConfig
from training.data import DataConfig, Reader
from training.environment import environment, prepare_process
from training.features import SHA256
from training.judging import Asked, asked_of, load_judge, nearest_captions, shares, styles_of, verdicts
from training.processes import process_state, together
from training.quality import (
    Coverage,
    Estimate,
    FrechetDistance,
    KernelDistance,
    Resampler,
    cmmd,
    inception_score,
    moments,
    nearest,
    retrieved,
)
from training.report import Table, plain, write_html
from training.seen import FEATURES_PX, Eyes, Seen, reference_of, shared
from training.steps import planes

DRAWN_ROWS = 64
FEW_FRECHET = 1000  # fewer pictures bias the distance by much
FEW_KERNEL = 50
FEW_RESAMPLES = 40  # of measures that take a second each
SHOWN_PAIRS = 10
SHOWN_PICTURES = 48
FILES = ("report.json", "report.html", "pictures.png", "nearest.png")


def evaluate(model: Model, data: str | Path, out: str | Path, judge: str | Path | None = None,
             clip: str | Path | None = None, split: str = "combos", seeds: int = 4, rows: int | None = None,
             stages: Sequence[str] = (), prompts: str | Path | None = None, cache: str | Path = "cache",
             overrides: Sequence[str] = (), overwrite: bool = False, device: str | None = None,
             tell: Callable[[str], None] = lambda line: None) -> Path:  # fmt: skip
    """Draw `seeds` pictures for a caption of each row of `split` and measure them; returns OUT/report.json.

    judge: a classifier's folder, clip: a CLIP's; None leaves out what they find. rows: at most so many, evenly
    spread. stages: those to run, all by default. prompts: a file of other prompts, a JSON object a line with "prompt"
    and the fields that the judge is to find; they have no real pictures to stand beside. cache: where what is seen of
    the training split is kept.
    overrides: sampling, such as "base.guidance=3". device: None is the GPU where there is one.
    Under a launcher every process draws its share. Raises UserError where the parts do not fit together.
    """
    prepare_process()
    check_out(Path(out), FILES, overwrite)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cascade = replace(request_of(model), stages=stages, device=device).load(tell)
    for line in cascade.notes:
        tell(line)
    side = cascade.stages[-1].config.resolution_px
    held = Reader(DataConfig(path=str(data), split=split, size_px=side))
    known = Reader(DataConfig(path=str(data), split="train", size_px=side))
    asked = _spread(read_prompts(prompts), rows) if prompts else asked_in(held, rows)
    eyes = Eyes.of(clip, device)
    with together():
        every = [(a, seed) for a in asked for seed in range(seeds)]
        drawn = drawn_of(cascade, every, cascade.sampling(overrides=overrides))
        reference = reference_of(known, eyes, cache)
        if not process_state().is_main_process:
            return Path(out) / FILES[0]
    each = [a for a, _ in every]
    tell(f"{len(drawn)} pictures of {len(asked)} prompts, {len({a.group for a in asked})} concepts")
    own = eyes.see(drawn)
    real = None if prompts else _read(held, [a.key for a in asked])
    seen_real = None if real is None else eyes.see(real)
    report: dict[str, Any] = {
        "model": cascade.digest, "split": None if prompts else split, "prompts": len(asked), "seeds": seeds,
        "pictures": len(drawn), "reference": {"split": "train", "pictures": len(reference.features)},
        "sampling": [to_dict(s) for s in cascade.sampling(overrides=overrides)],
        "palettes": [stage.config.name for stage in cascade.stages if stage.palette is not None],
        "features": {"network": "EfficientNet-Lite0", "weights": SHA256, "side_px": FEATURES_PX,
                     "resize": "area where it divides, else antialiased bicubic"}, **environment(),
    }  # fmt: skip
    tables = []
    if judge is not None:
        tables.append(_judged(Path(judge), cascade, known, asked, each, drawn, real, reference, report))
    tables.append(_sets(own, seen_real, reference, each, asked, report))
    if eyes.clip is not None:
        tables.append(_similar(eyes.clip, own, seen_real, reference, each, asked, report))
    tables.append(_memory(own, seen_real, reference, each, asked, report))
    for table in tables:
        tell(str(table))
    return _write(Path(out), report, tables, drawn, own, reference, known)


def read_prompts(path: str | Path) -> list[Asked]:
    """Prompts of a file of JSON lines. Raises UserError for a line that is none, by its number."""
    found = []
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            told = json.loads(line)
            prompt = told.pop("prompt")
        except (ValueError, KeyError, AttributeError, TypeError):
            raise UserError(f'{path}:{number}: not a JSON object with "prompt"') from None
        found.append(Asked(str(prompt), f"{path}:{number}", told))
    if not found:
        raise UserError(f"{path}: holds no prompt")
    return found


def asked_in(reader: Reader, count: int | None = None) -> list[Asked]:
    """A prompt of each row of a set, of at most `count` rows, evenly spread."""
    return _spread(asked_of(reader.rows), count)


def _spread(asked: list[Asked], count: int | None) -> list[Asked]:
    if not asked:
        raise UserError("no row has a caption to draw")
    count = min(count or len(asked), len(asked))
    return [asked[k * len(asked) // count] for k in range(count)]


def drawn_of(cascade: Cascade, asked: Sequence[tuple[Asked, int]], sampling: Sequence[SamplingConfig]) -> Tensor:
    """Pictures (N, 3, H, W) in [-1, 1] of prompts and seeds; each process of a launch draws its share."""

    def work(mine: Sequence[tuple[Asked, int]]) -> np.ndarray:
        made = []
        with advancing("drawing", len(mine)) as advance:
            for start in range(0, len(mine), DRAWN_ROWS):
                part = mine[start : start + DRAWN_ROWS]
                made.append(to_uint8(cascade([a.prompt for a, _ in part], [seed for _, seed in part], sampling)))
                for _ in part:
                    advance()
        return np.concatenate(made)

    side = cascade.stages[-1].config.resolution_px
    pictures = np.empty((len(asked), side, side, 3), dtype=np.uint8)
    for places, made in shared(asked, work):
        pictures[places] = made
    return planes(torch.from_numpy(pictures))


def _read(reader: Reader, keys: Sequence[str]) -> Tensor:
    rows = {row.key: row for row in reader.rows}
    return planes(torch.from_numpy(np.stack([reader.read(rows[key]).pixels for key in keys])))


def _judged(folder: Path, cascade: Cascade, known: Reader, asked: list[Asked], every: list[Asked], drawn: Tensor,
            real: Tensor | None, reference: Seen, report: dict[str, Any]) -> Table:  # fmt: skip
    """Shares that the judge finds right: of the drawn pictures, of real ones, and of nearest captions' pictures."""
    judge = load_judge(folder, asked, styles_of(known.rows))
    train = asked_of(known.rows)
    near = nearest_captions(cascade.text, [a.prompt for a in asked], [a.prompt for a in train])
    stand_in = _read(known, [train[i].key for i in near])
    found = {"drawn": (drawn, every), "nearest caption's training picture": (stand_in, asked)}
    if real is not None:
        found["real"] = (real, asked)
    lines: dict[str, dict[str, Estimate]] = {}
    for name, (pictures, wanted) in found.items():
        hits = verdicts(judge, pictures, wanted)
        lines[name] = shares(hits, wanted)
        kept = [i for i, a in enumerate(wanted) if not a.flag]
        if len(kept) < len(wanted):
            fewer = {key: values[kept] for key, values in hits.items()}
            lines[f"{name}, without flags"] = shares(fewer, [wanted[i] for i in kept])
    report["judge"] = plain(lines)
    return Table("Does it show what was asked? The judge's verdict, share of pictures", lines, percent=True,
                 note="concept: the cluster of characters, among the judge's first five or first; style: of those in "
                      "this data. 95% intervals over concepts.")  # fmt: skip


def _sets(own: Seen, real: Seen | None, reference: Seen, every: list[Asked], asked: list[Asked],
          report: dict[str, Any]) -> Table:  # fmt: skip
    """Distances of sets from the training pictures."""
    lines, notes = {}, []
    wanted = moments(reference.features)
    for name, seen, of in (("drawn", own, every), ("real, held out", real, asked)):
        if seen is None:
            continue
        if len(seen.features) < FEW_FRECHET:
            notes.append(f"{name}: {len(seen.features)} pictures are few for FD-efflite0, which is then too large; "
                         "KD-efflite0 has no such bias")  # fmt: skip
        if len(seen.features) < FEW_KERNEL:
            notes.append(f"{name}: under {FEW_KERNEL} pictures no distance of sets is given")
            continue
        groups = [a.group for a in of]
        sampler, few = Resampler(groups), Resampler(groups, resamples=FEW_RESAMPLES)
        frechet, kernel = FrechetDistance(seen.features, wanted), KernelDistance(seen.features, reference.features)
        coverage, score = Coverage(seen.features, reference.features), partial(inception_score, seen.logits)
        lines[name] = {
            "FD-efflite0": few.spread(frechet(), frechet), "KD-efflite0": sampler.spread(kernel(), kernel),
            "precision": sampler.mean(coverage.precision()), "density": sampler.mean(coverage.density()),
            "recall": few.spread(coverage.recall(), coverage.recall),
            "coverage": few.spread(coverage.coverage(), coverage.coverage),
            "IS-efflite0": sampler.spread(score(), score),
        }  # fmt: skip
    report["sets"], report["notes"] = plain(lines), notes
    return Table(f"Against the {len(reference.features)} training pictures, as sets", lines, note=" ".join(notes))


def _similar(clip: Clip, own: Seen, real: Seen | None, reference: Seen, every: list[Asked], asked: list[Asked],
             report: dict[str, Any]) -> Table:  # fmt: skip
    """By CLIP: how like its prompt a picture is, whether the prompt is found by it, and the distance of sets."""
    captions = list(dict.fromkeys(a.prompt for a in asked))
    texts = clip.texts(captions).cpu()
    lines: dict[str, dict[str, Estimate | float]] = {}
    for name, seen, of in (("drawn", own, every), ("real, held out", real, asked)):
        if seen is None:
            continue
        sampler = Resampler([a.group for a in of])
        wanted = torch.tensor([captions.index(a.prompt) for a in of])
        score = 100 * (seen.clip * texts[wanted]).sum(1).clamp(min=0)
        lines[name] = {
            "CLIP score": sampler.mean(score),
            **{f"R@{top}": sampler.mean(retrieved(seen.clip, texts, wanted, top)) for top in (1, 5)},
            "CMMD": cmmd(seen.clip, reference.clip),
        }
    report["clip"] = plain(lines)
    return Table(f"By CLIP, the prompt among {len(captions)} captions", lines)


def _memory(own: Seen, real: Seen | None, reference: Seen, every: list[Asked], asked: list[Asked],
            report: dict[str, Any]) -> Table:  # fmt: skip
    """How near the nearest training picture is, beside the same for real held-out pictures. Several prompts may be of
    one real picture, to the pixel at PIXELS_PX; then it is one witness of them all, and told apart as such."""
    lines: dict[str, dict[str, Estimate | float]] = {}
    sampler = Resampler([a.group for a in every])
    if real is not None:
        places, counts = torch.unique(real.pixels, dim=0, return_inverse=True, return_counts=True)[1:]
        share = dict(zip((a.key for a in asked), (1 / counts[places].double()).tolist(), strict=True))
        weights = torch.tensor([share[a.key] for a in every])
        once = torch.tensor([int((places == k).nonzero()[0]) for k in range(len(counts))])
    for name, space in own.spaces().items():
        near = nearest(space, reference.spaces()[name].double())[0]
        lines[name] = {"median distance": float(near.median())}
        if real is not None:
            known = nearest(real.spaces()[name], reference.spaces()[name].double())[0]
            lines[name] |= {
                "the same of real pictures": float(known.median()),
                "ratio": float(near.median() / known.median()),
                "share nearer than 99% of the real ones": sampler.mean(near < known.quantile(0.01)),
                "that share, each real picture counted once": sampler.mean(
                    near < known[once].quantile(0.01), weights
                ),
            }
    report["nearest_training_picture"] = plain(lines)
    return Table("Distance to the nearest training picture", lines, note="A model that repeats its training pictures "
                 "has a ratio far below 1.")  # fmt: skip


def _write(out: Path, report: dict[str, Any], tables: list[Table], drawn: Tensor, own: Seen, reference: Seen,
           known: Reader) -> Path:  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    shown = to_uint8(drawn[:: max(1, len(drawn) // SHOWN_PICTURES)][:SHOWN_PICTURES])
    save_png(grid(list(shown), columns=8), out / "pictures.png")
    distance, place = nearest(own.features, reference.features.double())
    closest = distance.argsort()[:SHOWN_PAIRS].tolist()
    rows = known.rows
    real = [known.read(rows[int(place[i])]).pixels for i in closest]
    save_png(grid([*to_uint8(drawn[closest]), *real], columns=len(closest)), out / "nearest.png")
    write_json(out / "report.json", report)
    pictures = {
        "pictures.png": "Pictures drawn, evenly spread over the prompts.",
        "nearest.png": "The pictures nearest to a training picture in efflite0 features (above) and those (below).",
    }
    write_html(out / "report.html", "Pictures drawn for held-out captions", report, tables, pictures)
    return out / "report.json"
