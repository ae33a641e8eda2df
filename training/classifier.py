"""Training of a classifier of pictures, such as the judge of an evaluation.

    cached pixels, fields of their rows -> classes -> augment -> Classifier -> cross-entropy of each label
    -> RUN/final/{config.json, model.safetensors}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from ldm.config import Config, UserError
from ldm.low_res import DegradationConfig, degrade
from ldm.models.classifier import Classifier, ClassifierConfig, check_by_palette, start_from
from ldm.weights import load_classifier, save_classifier, write_json
from pipelines.images import grid, save_png, to_uint8
from training.cache import Items
from training.data import Reader
from training.loader import Batch, StepModule
from training.stages import EVALUATION_ROWS, StageRun, written_whole
from training.steps import StepResult, planes

TOP = 5


@dataclass(frozen=True)
class AugmentationConfig(Config):
    """How pictures are varied, each draw uniform: scaled by 1 - zoom to 1 + zoom, turned by `degrees` to both sides,
    moved by the share `shift` of their side, colours changed by `colour` as `vary_colours` says, all on white;
    the share `mirror` of them mirrored left to right; then shrunk to the classifier's size by `degradation`."""

    zoom: float = 0.15
    degrees: float = 10.0
    shift: float = 0.08
    colour: float = 0.15
    mirror: float = 0.0
    degradation: DegradationConfig = DegradationConfig()

    def __post_init__(self) -> None:
        if not 0 <= self.mirror <= 1:
            raise ValueError(f"mirror is a share, from 0 to 1, not {self.mirror:g}")
        if not (0 <= self.zoom < 1 and 0 <= self.shift < 1 and 0 <= self.colour < 1 and 0 <= self.degrees <= 180):
            raise ValueError("zoom, shift and colour are shares, from 0 to below 1, and degrees from 0 to 180")


@dataclass(frozen=True, kw_only=True)
class ClassifierRun(StageRun):
    """`ldm train` of a classifier: labels are fields of the data's rows, and every value is a class. recolour: changes
    colours by so much, as `augmentation.colour` does, for the convolutions alone: the palette still sees them."""

    kind: Literal["classifier"] = "classifier"
    labels: tuple[str, ...]
    classifier: ClassifierConfig = ClassifierConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    recolour: float = 0.0
    smoothing: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels(self.labels, self.smoothing)
        check_by_palette(self.classifier, self.labels)
        if not 0 <= self.recolour < 1:
            raise ValueError(f"recolour is a share, from 0 to below 1, not {self.recolour:g}")
        if self.recolour and not self.classifier.palette:
            raise ValueError("recolour hides colours from the convolutions: the palette must see them, set "
                             "classifier.palette")  # fmt: skip
        if self.data.size_px % self.classifier.side_px:
            raise ValueError(f"data.size_px {self.data.size_px} must be a multiple of classifier.side_px "
                             f"{self.classifier.side_px}")  # fmt: skip


def check_labels(labels: Sequence[str], smoothing: float) -> None:
    """Raise ValueError for labels or a smoothing that no classifier can be trained on."""
    if not labels or len(set(labels)) != len(labels):
        raise ValueError("labels must name at least one field of the data, each once")
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing is a share, from 0 to below 1, not {smoothing:g}")


class ClassifierModule(StepModule):
    """The classifier with its training step as `forward`."""

    def __init__(self, classifier: Classifier, config: ClassifierRun) -> None:
        super().__init__()
        self.classifier, self.config = classifier, config

    @property
    def networks(self) -> list[nn.Module]:
        return [self.classifier.trunk]

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        pictures = augment(batch, self.config.classifier.side_px, self.config.augmentation)
        recoloured = vary_colours(pictures, batch, self.config.recolour).clamp(-1, 1) if self.config.recolour else None
        records = [batch.cache.record(i) for i in batch.indices]
        wanted = {name: labels_of(records, name, self.classifier.classes[name]) for name in self.config.labels}
        return pictures, recoloured, wanted

    def forward(self, inputs: tuple[Tensor, Tensor | None, dict[str, Tensor]]) -> StepResult:
        device = next(self.parameters()).device
        pictures, recoloured = (None if each is None else each.to(device) for each in inputs[:2])
        assert pictures is not None
        return cross_entropies(self.classifier(pictures, recoloured), inputs[2], self.config.smoothing)


def cross_entropies(found: dict[str, Tensor], wanted: dict[str, Tensor], smoothing: float) -> StepResult:
    """Sum over labels of the cross-entropy with smoothed targets; found: {label: logits (B, K)}, wanted: {label: class
    (B,)}."""
    losses, metrics = [], {}
    for name, logits in found.items():
        target = wanted[name].to(logits.device)
        losses.append(cross_entropy(logits.float(), target, label_smoothing=smoothing))
        metrics[f"{name}_right"] = (logits.argmax(1) == target).float().mean()
    return StepResult([torch.stack(losses).sum()], metrics)


def augment(batch: Batch, side_px: int, config: AugmentationConfig) -> Tensor:
    """The batch's pictures, varied: (B, 3, side_px, side_px) in [-1, 1]."""
    pictures = planes(batch.stored())
    if config.mirror:
        pictures = torch.where((batch.uniform() < config.mirror).view(-1, 1, 1, 1), pictures.flip(-1), pictures)
    u = _signed(batch, 4)
    scale, angle = 1 + config.zoom * u[0], math.radians(config.degrees) * u[1]
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    theta = torch.stack([cos, -sin, 2 * config.shift * u[2], sin, cos, 2 * config.shift * u[3]], 1).view(-1, 2, 3)
    at = affine_grid(theta, list(pictures.shape), align_corners=False)
    pictures = grid_sample(pictures - 1, at, align_corners=False) + 1  # beyond the border it is white
    stored = torch.from_numpy(to_uint8(vary_colours(pictures, batch, config.colour)))
    return planes(degrade(stored, stored.shape[1] // side_px, config.degradation, batch.generators))


def vary_colours(pictures: Tensor, batch: Batch, share: float) -> Tensor:
    """Pictures (B, 3, H, W) with brightness, contrast, saturation and, by half as much, the balance of the three
    colours changed by up to `share`, each by its own draw."""
    draws = _signed(batch, 6) * share
    bright, contrast, colourful = draws[:3].view(3, -1, 1, 1, 1)
    grey: Tensor = pictures.mean(1, keepdim=True)
    pictures = grey + (pictures - grey) * (1 + colourful)
    mean = pictures.mean((1, 2, 3), keepdim=True)
    balance = draws[3:].T.reshape(-1, 3, 1, 1) / 2
    varied: Tensor = mean + (pictures - mean) * (1 + contrast) + bright + balance
    return varied


def _signed(batch: Batch, count: int) -> Tensor:
    """Draws of U[-1, 1): (count, B)."""
    return torch.stack([batch.uniform() for _ in range(count)]).float() * 2 - 1


def show_augmented(cache: Items, side_px: int, config: AugmentationConfig, path: Path) -> None:
    """Write what `augment` makes of the first items; the same at every time."""
    first = list(range(min(len(cache), 16)))
    batch = Batch(cache, first, [torch.Generator().manual_seed(i) for i in first], first, len(first))
    save_png(grid(list(to_uint8(augment(batch, side_px, config))), columns=8), path)


def labels_of(records: Sequence[dict[str, Any]], name: str, classes: Sequence[str]) -> Tensor:
    """The classes of records: (B,) int64, -1 for one that is not among `classes`."""
    places = {value: k for k, value in enumerate(classes)}
    return torch.tensor([places.get(str(record["fields"][name]), -1) for record in records])


def classes_of(cache: Items, labels: Sequence[str], data: str) -> dict[str, tuple[str, ...]]:
    """Every value of each field among the items, sorted. Raises UserError for a field that an item lacks."""
    found: dict[str, set[str]] = {name: set() for name in labels}
    for index in range(len(cache)):
        record = cache.record(index)
        for name, values in found.items():
            if name not in record["fields"]:
                raise UserError(f"labels: {record['key']} of {data} has no field {name!r}; it has "
                                f"{', '.join(sorted(record['fields'])) or 'none'}")  # fmt: skip
            values.add(str(record["fields"][name]))
    return {name: tuple(sorted(values)) for name, values in found.items()}


class ClassifierTask:
    """Trains a classifier; evaluates the shares of held-out pictures whose class is first, and among the first 5."""

    def __init__(self, config: ClassifierRun, readers: tuple[Reader, Reader]) -> None:
        self.cache, self.held_out = config.caches(readers)
        classes = classes_of(self.cache, config.labels, config.data.path)
        torch.manual_seed(config.seed)
        classifier = Classifier(config.classifier, classes)
        if config.init is not None:
            try:
                start_from(classifier, load_classifier(config.init))
            except ValueError:
                raise UserError(f"init: {config.init} is a classifier of another shape: `classifier` may differ from "
                                "its config.json in side_px alone") from None  # fmt: skip
        self.module = ClassifierModule(classifier, config)
        self._chosen = config.validation.chosen(self.held_out)

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, ClassifierModule)
        classifier, hits = module.classifier, dict[str, float]()
        for start in range(0, len(self._chosen), EVALUATION_ROWS):
            chosen = self._chosen[start : start + EVALUATION_ROWS]
            found = classify(classifier, planes(self.held_out.stored(chosen)))
            for name, logits in found.items():
                wanted = labels_of([self.held_out.record(i) for i in chosen], name, classifier.classes[name])
                for top in (1, TOP):
                    right = float(among_first(logits, wanted, top).sum())
                    hits[f"{name}_top{top}"] = hits.get(f"{name}_top{top}", 0.0) + right
        return {name: count / len(self._chosen) for name, count in hits.items()} | {"pictures": len(self._chosen)}

    def preview(self, module: nn.Module, path: Path) -> None:
        assert isinstance(module, ClassifierModule)
        show_augmented(self.cache, module.config.classifier.side_px, module.config.augmentation, path)

    def export(self, module: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        assert isinstance(module, ClassifierModule)
        with written_whole(folder) as partial:
            save_classifier(module.classifier, partial)
            write_json(partial / "training.json", facts)


@torch.no_grad()
def classify(classifier: Classifier, pictures: Tensor) -> dict[str, Tensor]:
    """Logits of pictures (B, 3, H, W) in [-1, 1], on the CPU."""
    device = next(classifier.parameters()).device
    return {name: logits.float().cpu() for name, logits in classifier(pictures.to(device)).items()}


def among_first(logits: Tensor, wanted: Tensor, top: int) -> Tensor:
    """Whether the wanted class is among the `top` of highest logit: (B, K), (B,) -> (B,) bool. -1 is in none."""
    first = logits.topk(min(top, logits.shape[1]), dim=1).indices
    return (first == wanted[:, None]).any(1)
