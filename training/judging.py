"""Do pictures show what their prompts ask for? The verdict of a judge that had no part in making them.

    picture -> Classifier -> logits of cluster and style -> right? against the fields of the caption's row

Beside a cascade's pictures stand real ones (the ceiling) and the training picture of the nearest caption, which can
have the right concept or the right style and, where the pair was held out, never both.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from ldm.config import UserError
from ldm.models.classifier import Classifier
from ldm.text import TextEncoder
from ldm.weights import load_classifier
from training.classifier import TOP, among_first, classify, labels_of
from training.quality import Estimate, Resampler

CONCEPT, STYLE = "cluster", "style"
ROWS = 32


@dataclass(frozen=True)
class Asked:
    """A prompt, and what a picture of it must show: the fields of its row."""

    prompt: str
    key: str
    fields: dict[str, Any]

    @property
    def group(self) -> str:
        """What `Resampler` holds together: all pictures of one concept."""
        return str(self.fields.get(CONCEPT, self.key))

    @property
    def flag(self) -> bool:
        return bool(self.fields.get("flag", False))


def asked_of(rows: Sequence[Any], captions: bool = True) -> list[Asked]:
    """Each row with the first of its captions that names its style, or the first; rows without captions are left
    out, unless none is needed."""
    found = []
    for row in rows:
        style = str(row.fields.get(STYLE, ""))
        named = [c for c in row.captions if style in c] or list(row.captions) or ([] if captions else [""])
        if named:
            found.append(Asked(named[0], row.key, row.fields))
    return found


def load_judge(folder: str | Path, asked: Sequence[Asked], styles: Collection[str]) -> Classifier:
    """A judge that has to tell apart the styles of this data set alone, of however many it was trained on; all of
    these where the set has one style, which it could not miss."""
    judge = load_classifier(folder)
    check_judge(judge, asked)
    keep = [k for k, name in enumerate(judge.classes[STYLE]) if name in styles]
    if len(keep) > 1:
        judge.keep(STYLE, keep)
    return judge


def styles_of(rows: Sequence[Any]) -> set[str]:
    """The styles that rows name."""
    return {str(row.fields[STYLE]) for row in rows if STYLE in row.fields}


def check_judge(judge: Classifier, asked: Sequence[Asked]) -> None:
    """Raise UserError unless the judge has both labels and every row has both fields."""
    for label in (CONCEPT, STYLE):
        if label not in judge.classes:
            raise UserError(f"the judge knows {', '.join(judge.classes)} and not {label}: train one with "
                            f"labels=[{CONCEPT}, {STYLE}], as configs/emoji/judge.yaml")  # fmt: skip
        lacking = next((a for a in asked if label not in a.fields), None)
        if lacking is not None:
            raise UserError(f"{lacking.key}: has no field {label!r}, which the judge is to find in its picture")


def verdicts(judge: Classifier, pictures: Tensor, asked: Sequence[Asked]) -> dict[str, Tensor]:
    """Of each picture (N, 3, H, W) in [-1, 1], 0 or 1: concept_top5, concept_top1, style, and both (top 5 and style).
    The judge looks at the picture and at its mirror image, and the mean of its logits counts.

    A concept or style that the judge has no class for is never right.
    """
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(pictures), ROWS):
        part = pictures[start : start + ROWS]
        logits, mirrored = classify(judge, part), classify(judge, part.flip(-1))
        logits = {label: (each + mirrored[label]) / 2 for label, each in logits.items()}
        records = [{"fields": a.fields} for a in asked[start : start + ROWS]]
        concept, style = (labels_of(records, label, judge.classes[label]) for label in (CONCEPT, STYLE))
        among, first = (among_first(logits[CONCEPT], concept, top) for top in (TOP, 1))
        styled = among_first(logits[STYLE], style, 1)
        for name, hits in (("concept_top5", among), ("concept_top1", first), ("style", styled),
                           ("both", among & styled)):  # fmt: skip
            found.setdefault(name, []).append(hits.double())
    return {name: torch.cat(parts) for name, parts in found.items()}


def shares(found: dict[str, Tensor], asked: Sequence[Asked]) -> dict[str, Estimate]:
    """Of `verdicts`, their means with intervals over concepts."""
    sampler = Resampler([a.group for a in asked], resamples=1000)
    return {name: sampler.mean(hits) for name, hits in found.items()}


@torch.no_grad()
def nearest_captions(text: TextEncoder, prompts: Sequence[str], captions: Sequence[str]) -> list[int]:
    """For each prompt the place of the caption nearest in meaning: by the cosine of the mean of its token states."""
    own, known = (_meanings(text, texts) for texts in (prompts, captions))
    return (own @ known.T).argmax(1).tolist()


def _meanings(text: TextEncoder, texts: Sequence[str]) -> Tensor:
    parts = []
    for start in range(0, len(texts), 256):
        states, mask = text.encode(texts[start : start + 256])
        weights = torch.ones(states.shape[:2]) if mask is None else mask.to(states)
        mean = (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True).clamp(min=1)
        parts.append((mean / mean.norm(dim=1, keepdim=True).clamp(min=1e-12)).float().cpu())
    return torch.cat(parts)


def resized(pictures: Tensor, side_px: int) -> Tensor:
    """Square pictures at another size: by area where that divides theirs, else antialiased bicubic."""
    side = pictures.shape[-1]
    if side % side_px == 0:
        return avg_pool2d(pictures, side // side_px)
    return interpolate(pictures, size=side_px, mode="bicubic", antialias=side > side_px).clamp(-1, 1)
