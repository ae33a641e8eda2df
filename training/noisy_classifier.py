"""Training of a noise-aware classifier of a stage's latents, for classifier guidance of that stage.

    cached latents or pixels, fields of their rows -> x0 -> x_t at a random t -> NoisyClassifier -> cross-entropies
    -> RUN/final/{config.json, model.safetensors}
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm.conditioning import Conditioning
from ldm.config import UserError
from ldm.draws import keyed_generator
from ldm.models.noisy_classifier import NoisyClassifier, NoisyClassifierConfig
from ldm.noise import NoiseSchedule
from ldm.weights import NoisyClassifierFile, load_noisy_classifier, save_noisy_classifier, write_json
from pipelines.cascade import load_cascade
from pipelines.stage import Stage
from training.classifier import check_labels, classes_of, cross_entropies, labels_of
from training.data import Reader
from training.held_out import EVALUATION_LEVELS
from training.loader import Batch, StepModule
from training.stages import EVALUATION_ROWS, StageRun, written_whole
from training.steps import Frozen, StepResult, raw_latents


@dataclass(frozen=True, kw_only=True)
class NoisyClassifierRun(StageRun):
    """`ldm train` of a noise-aware classifier. model: the cascade whose stage `stage`, a base, it is to guide; codec,
    statistics and schedule are that stage's. labels: fields of the data's rows, every value of which is a class."""

    kind: Literal["noisy_classifier"] = "noisy_classifier"
    model: str
    stage: str = "base"
    labels: tuple[str, ...]
    classifier: NoisyClassifierConfig = NoisyClassifierConfig()
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_labels(self.labels, self.smoothing)

    def load_stage(self) -> Stage:
        """The stage to guide. Raises UserError where there is none, it is no base, or sizes do not fit."""
        stage = load_cascade(self.model).only(self.stage).stages[0]
        if stage.config.low_res is not None:
            raise UserError(f"stage: {self.stage} of {self.model} enlarges pictures; classifier guidance is of a base")
        if self.data.size_px != stage.config.resolution_px:
            raise UserError(f"data.size_px {self.data.size_px}: {self.stage} of {self.model} draws "
                            f"{stage.config.resolution_px} px")  # fmt: skip
        side = stage.config.resolution_px // stage.codec.module.config.factor
        levels = len(self.classifier.widths)
        if side % self.classifier.factor:
            raise UserError(f"classifier.widths: {levels} levels do not fit latents of {side} cells")
        return stage


class NoisyClassifierModule(StepModule):
    """The classifier with its training step as `forward`."""

    def __init__(self, classifier: NoisyClassifier, schedule: NoiseSchedule, frozen: Frozen, smoothing: float) -> None:
        super().__init__()
        self.classifier, self.schedule, self.frozen, self.smoothing = classifier, schedule, frozen, smoothing

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        stored, codec = batch.stored(), self.frozen.codec.config
        side = stored.shape[1] // codec.factor if stored.dtype == torch.uint8 else stored.shape[-1]
        noise = batch.normal((codec.latent_channels, side, side)) if codec.autoencoder else None
        x0 = self.frozen.normalisation.apply(raw_latents(stored, None, self.frozen, noise))
        eps = batch.normal(tuple(x0.shape[1:]))
        u = (torch.tensor(batch.places, dtype=torch.float64) + batch.uniform()) / batch.global_size
        records = [batch.cache.record(i) for i in batch.indices]
        wanted = {name: labels_of(records, name, own) for name, own in self.classifier.classes.items()}
        return x0, eps, self.schedule.draw_t(u), wanted

    def forward(self, inputs: tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]) -> StepResult:
        x0, eps, t, wanted = inputs
        device = next(self.parameters()).device
        x_t = self.schedule.add_noise(x0.to(device), eps.to(device), t)
        return cross_entropies(self.classifier(x_t, self.schedule.network_time(t)), wanted, self.smoothing)


class NoisyClassifierTask:
    """Trains a noise-aware classifier; evaluates the share of held-out latents named right, by noise level."""

    def __init__(self, config: NoisyClassifierRun, readers: tuple[Reader, Reader]) -> None:
        stage = config.load_stage()
        latents = stage.codec.module.config.autoencoder is not None
        self.cache, self.held_out = config.caches(readers, stage.codec if latents else None)
        classes = classes_of(self.cache, config.labels, config.data.path)
        torch.manual_seed(config.seed)
        classifier = NoisyClassifier(config.classifier, stage.config.latent_channels, classes)
        self._file = NoisyClassifierFile(config.classifier, classes, stage.config.latent_channels,
                                         stage.config.schedule, stage.config.normalisation,
                                         stage.codec.latents_digest)  # fmt: skip
        if config.init is not None:
            released, file = load_noisy_classifier(config.init)
            if file != self._file:
                raise UserError(f"init: {config.init} is of another shape, of other classes or of another stage")
            classifier.load_state_dict(released.state_dict())
        frozen = Frozen(stage.codec.module, stage.config.normalisation, Conditioning(), 0.0)
        self.module = NoisyClassifierModule(classifier, stage.denoiser.schedule, frozen, config.smoothing)
        self._chosen = config.validation.chosen(self.held_out)

    @torch.no_grad()
    def evaluate(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, NoisyClassifierModule)
        device = next(module.parameters()).device
        hits: dict[str, float] = {}
        for start in range(0, len(self._chosen), EVALUATION_ROWS):
            indices = self._chosen[start : start + EVALUATION_ROWS]
            x0 = module.frozen.normalisation.apply(raw_latents(self.held_out.stored(indices), None, module.frozen))
            records = [self.held_out.record(i) for i in indices]
            for level in EVALUATION_LEVELS:
                generators = [keyed_generator(0, "evaluation", level, i) for i in indices]
                eps = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators])
                t = torch.full((len(x0),), level / 100, dtype=torch.float64)
                x_t = module.schedule.add_noise(x0, eps, t).to(device)
                for name, logits in module.classifier(x_t, module.schedule.network_time(t)).items():
                    right: Tensor = logits.argmax(1).cpu() == labels_of(records, name, module.classifier.classes[name])
                    key = f"{name}_t{level / 100:.2f}"
                    hits[key] = hits.get(key, 0.0) + float(right.sum())
        return {name: count / len(self._chosen) for name, count in hits.items()}

    def preview(self, module: nn.Module, path: Path) -> None:
        """There is nothing to see."""

    def export(self, module: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        assert isinstance(module, NoisyClassifierModule)
        with written_whole(folder) as partial:
            save_noisy_classifier(module.classifier, self._file, partial)
            write_json(partial / "training.json", facts)
