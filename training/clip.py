"""Training of CLIP: pictures and their captions become near, by the contrastive loss of Radford et al. 2021.

    cached pixels -> augment -> picture tower \\
                                               unit vectors -> similarities -> cross-entropy both ways
    a caption of each -> tokens -> text tower /
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ldm.config import UserError
from ldm.models.clip import Clip, ClipConfig, build_clip
from ldm.text import TextEncoder, load_text_encoder
from ldm.text_config import TextConfig
from ldm.weights import load_clip, save_clip, write_json
from training.classifier import AugmentationConfig, augment, show_augmented
from training.data import Reader
from training.features import weights as imagenet
from training.loader import Batch, StepModule
from training.processes import process_state
from training.quality import retrieved
from training.stages import EVALUATION_ROWS, StageRun, written_whole
from training.steps import StepResult, planes

MAX_SCALE = 100.0  # of similarities, as in Radford et al. 2021, sec. 2.5


@dataclass(frozen=True, kw_only=True)
class ClipRun(StageRun):
    """`ldm train` of a CLIP: the picture tower starts from ImageNet's weights (extra `eval`), the text tower is
    `text`, a BERT type, of which the last `unlocked_layers` are trained and the rest stays as it is."""

    kind: Literal["clip"] = "clip"
    text: TextConfig = TextConfig()
    clip: ClipConfig = ClipConfig()
    unlocked_layers: int = 0
    augmentation: AugmentationConfig = AugmentationConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text.kind not in ("minilm", "bert"):
            raise ValueError(f"text.kind {self.text.kind}: the text tower is of a BERT type: minilm or bert")
        if self.unlocked_layers < 0:
            raise ValueError("unlocked_layers must not be negative")
        if self.loop.accumulation > 1:
            raise ValueError("loop.accumulation: a contrastive loss needs its whole batch at once; it must be 1")
        if self.data.size_px % self.clip.image_px:
            raise ValueError(f"data.size_px {self.data.size_px} must be a multiple of clip.image_px "
                             f"{self.clip.image_px}")  # fmt: skip


class ClipModule(StepModule):
    """The model with its training step as `forward`. Batch normalisation keeps its statistics, text no dropout."""

    def __init__(self, model: Any, encoder: TextEncoder, config: ClipRun) -> None:
        super().__init__()
        self.model, self.config, self.frozen = model, config, Captions(encoder, config.clip.max_tokens)

    def train(self, mode: bool = True) -> ClipModule:
        super().train(mode)
        self.model.text.eval()
        for part in self.model.visual.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        return self

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        pictures = augment(batch, self.config.clip.image_px, self.config.augmentation)
        captions = [batch.cache.record(i)["captions"] for i in batch.indices]
        chosen = batch.integers([len(c) for c in captions])
        texts = [c[k] for c, k in zip(captions, chosen, strict=True)]
        return pictures, self.frozen.tokens(texts)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> StepResult:
        device = self.model.logit_scale.device
        pictures, tokens = (each.to(device) for each in inputs)
        return clip_step(self.model, pictures, tokens)


@dataclass
class Captions:
    """Texts -> tokens, by the tokenizer of the text encoder."""

    encoder: TextEncoder
    limit: int

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """(B, limit), padded."""
        found = [ids if len(ids) <= self.limit else [*ids[: self.limit - 1], ids[-1]] for ids in
                 self.encoder.tokens(texts)]  # fmt: skip
        return torch.stack([pad(torch.tensor(ids), (0, self.limit - len(ids)), value=self.encoder.pad_id)
                            for ids in found])  # fmt: skip

    def __deepcopy__(self, memo: object) -> Captions:
        """Itself: averages of a module share it."""
        return self


def clip_step(model: Any, pictures: Tensor, tokens: Tensor) -> StepResult:
    """open_clip's loss over the pictures and tokens of all processes."""
    from open_clip.loss import ClipLoss

    state = process_state()
    loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=state.process_index, world_size=state.num_processes)
    own, texts, scale = model(pictures, tokens)
    scale = scale.clamp(max=MAX_SCALE)
    right = (own @ texts.T).argmax(1) == torch.arange(len(own), device=own.device)
    return StepResult([loss(own, texts, scale)], {"right": right.float().mean(), "scale": scale.detach()})


def unlock(model: Any, layers: int) -> None:
    """Let everything be trained but the text tower before its last `layers`. Raises UserError where it has fewer."""
    own = model.text.transformer.encoder.layer
    if layers > len(own):
        raise UserError(f"unlocked_layers {layers}: the text tower has {len(own)}")
    model.requires_grad_(True)
    model.text.requires_grad_(False)
    for layer in own[len(own) - layers :]:
        layer.requires_grad_(True)


class ClipTask:
    """Trains a CLIP; evaluates how often a held-out picture finds its own caption among all of those."""

    def __init__(self, config: ClipRun, readers: tuple[Reader, Reader]) -> None:
        self.cache, self.held_out = config.caches(readers)
        encoder = load_text_encoder(config.text, "cpu")
        self._text = encoder.files["config.json"].parent
        torch.manual_seed(config.seed)
        if config.init is not None:
            released = load_clip(config.init)
            if released.config != config.clip:
                raise UserError(f"init: {config.init} is a CLIP of another shape: {released.config}")
            model = released.model
        else:
            model = build_clip(config.clip, self._text)
            trunk = {name: value for name, value in imagenet(model.visual.trunk).items() if "classifier" not in name}
            model.visual.trunk.load_state_dict(trunk)
            model.text.transformer.load_state_dict(encoder.module.state_dict())
        unlock(model, config.unlocked_layers)
        self.module = ClipModule(model, encoder, config)
        self._chosen = config.validation.chosen(self.held_out)

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, ClipModule)
        clip = Clip(module.model, module.config.clip, module.frozen.tokens)
        texts = [self.held_out.record(i)["captions"][0] for i in self._chosen]
        known = list(dict.fromkeys(texts))
        with torch.no_grad():
            own = torch.cat([clip.pictures(planes(self.held_out.stored(self._chosen[a : a + EVALUATION_ROWS])))
                             for a in range(0, len(self._chosen), EVALUATION_ROWS)])  # fmt: skip
        wanted = torch.tensor([known.index(text) for text in texts])
        found = {f"recall_at_{top}": float(retrieved(own.cpu(), clip.texts(known).cpu(), wanted, top).mean())
                 for top in (1, 5)}  # fmt: skip
        return {**found, "captions": len(known), "pictures": len(texts)}

    def preview(self, module: nn.Module, path: Path) -> None:
        assert isinstance(module, ClipModule)
        show_augmented(self.cache, module.config.clip.image_px, module.config.augmentation, path)

    def export(self, module: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        assert isinstance(module, ClipModule)
        with written_whole(folder) as partial:
            clip = Clip(module.model, module.config.clip, module.frozen.tokens)
            save_clip(clip, self._text, partial, folder)
            write_json(partial / "training.json", facts)
