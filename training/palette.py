"""Training of a palette, which puts what a base draws onto the colours of the data.

    cached pixels, states of their captions -> degrade -> Palette -> cross-entropy of the colours they had
    -> RUN/final/{config.json, model.safetensors}
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from ldm.conditioning import Conditioning
from ldm.config import UserError
from ldm.draws import keyed_generator
from ldm.low_res import DegradationConfig, degrade
from ldm.models.palette import Palette, PaletteConfig, common_colours, nearest_colour, pooled
from ldm.text import TextConfig, TextEncoder, load_text_encoder
from ldm.weights import load_palette, save_palette, write_json
from pipelines.images import grid, save_png, to_uint8
from training.cache import Items
from training.data import Reader
from training.loader import Batch, StepModule
from training.processes import process_state
from training.stages import EVALUATION_ROWS, StageRun, written_whole
from training.steps import StepResult, planes

COUNTED, COUNTED_AT_ONCE = 10_000, 64  # pictures whose colours are counted


@dataclass(frozen=True, kw_only=True)
class PaletteRun(StageRun):
    """`ldm train` of a palette for a base that draws `data.size_px`. text: that base's encoder; degradation: what
    moves the colours that it learns to put back; pixels: of each picture, at random places, in a step; dropout: the
    share of items that it is told no text of. init: a palette that learns on, with its own colours."""

    kind: Literal["palette"] = "palette"
    text: TextConfig = TextConfig()
    palette: PaletteConfig = PaletteConfig()
    degradation: DegradationConfig = DegradationConfig(noise=1.0, noise_std=(0.1, 8.0), noise_px=(0.0, 1.0),
                                                       colour=1.0, colour_std=(0.1, 24.0))  # fmt: skip
    pixels: int = 512
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data.size_px % self.palette.factor:
            raise ValueError(f"data.size_px {self.data.size_px} must be a multiple of {self.palette.factor}: the "
                             f"palette.widths name {len(self.palette.widths)} levels")  # fmt: skip
        if not self.degradation.random:
            raise ValueError("degradation leaves every picture as it is, and there would be nothing to learn: set "
                             "degradation.colour")  # fmt: skip
        if not 1 <= self.pixels <= self.data.size_px**2:
            raise ValueError(f"pixels must be from 1 to the {self.data.size_px**2} of a picture, not {self.pixels}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share, from 0 to below 1, not {self.dropout}")

    def load_text(self) -> TextEncoder:
        """The text encoder, on this process's device."""
        return load_text_encoder(self.text, process_state().device)


class PaletteInputs(NamedTuple):
    """Degraded pictures (B, 3, H, W) in [-1, 1], pooled text (B, D), places of pixels (B, P), the colours that they
    should have (B, P, 3) of 255."""

    seen: Tensor
    text: Tensor
    places: Tensor
    wanted: Tensor


class PaletteModule(StepModule):
    """The palette with its training step as `forward`. null: the text's null, one item."""

    def __init__(self, palette: Palette, config: PaletteRun, null: Conditioning) -> None:
        super().__init__()
        self.palette, self.config, self.null = palette, config, null

    def prepare(self, batch: Batch) -> PaletteInputs:
        captions = [batch.cache.captions(i) for i in batch.indices]
        chosen = batch.integers([len(own) for own in captions])
        text = batch.cache.text([own[k] for own, k in zip(captions, chosen, strict=True)])
        text = text.where(batch.uniform() >= self.config.dropout, self.null)
        stored = batch.stored()
        seen = planes(degrade(stored, 1, self.config.degradation, batch.generators))
        whole = stored.flatten(1, 2)  # (B, H W, 3)
        places = torch.stack([torch.randperm(whole.shape[1], generator=g)[: self.config.pixels]
                              for g in batch.generators])  # fmt: skip
        return PaletteInputs(seen, pooled(text), places, _at(whole, places).float())

    def forward(self, inputs: PaletteInputs) -> StepResult:
        seen, text, places, wanted = (each.to(next(self.parameters()).device) for each in inputs)
        known = _at(self.palette.features_of(seen, text).flatten(2).mT, places).flatten(0, 1)
        given = _at((seen.flatten(2).mT + 1) * 127.5, places).flatten(0, 1)
        found = self.palette.log_probs(known, given)
        target = nearest_colour(wanted.flatten(0, 1), self.palette.colours, self.config.palette.same)
        right = (found.argmax(1) == target).float().mean()
        return StepResult([nll_loss(found, target)], {"right": right})


def _at(rows: Tensor, places: Tensor) -> Tensor:
    """Of (B, N, C) those at (B, P): (B, P, C)."""
    return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[-1]))


def colours_of(cache: Items, config: PaletteConfig) -> Tensor:
    """The commonest colours of a cache's pictures, evenly spread COUNTED of them at most: (K, 3) of 255."""
    count = min(len(cache), COUNTED)
    chosen = [k * len(cache) // count for k in range(count)]
    counts = torch.zeros(1 << 24, dtype=torch.int64)
    for start in range(0, count, COUNTED_AT_ONCE):
        pixels = cache.stored(chosen[start : start + COUNTED_AT_ONCE]).flatten(0, -2).long()
        counts += torch.bincount((pixels[:, 0] << 16) + (pixels[:, 1] << 8) + pixels[:, 2], minlength=len(counts))
    return common_colours(counts, config)


class PaletteTask:
    """Trains a palette; evaluates how far held-out pictures are from what they were, degraded and put back."""

    def __init__(self, config: PaletteRun, readers: tuple[Reader, Reader]) -> None:
        text = config.load_text()
        self._text_digest = text.digest
        self.cache, self.held_out = config.caches(readers, None, text)
        torch.manual_seed(config.seed)
        if config.init is None:
            palette = Palette(config.palette, colours_of(self.cache, config.palette), text.width)
        else:
            palette, file = load_palette(config.init)
            if replace(file.palette, keep=config.palette.keep) != config.palette or file.text_digest != text.digest:
                raise UserError(f"init: {config.init} is a palette of another shape or `same`, or of another text "
                                "encoder")  # fmt: skip
            palette.config = config.palette
            palette.train().requires_grad_(True)
        self.module = PaletteModule(palette, config, self.cache.null)
        self._chosen = config.validation.chosen(self.held_out)

    @torch.no_grad()
    def _put_back(self, module: nn.Module, indices: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Held-out pictures as they are, degraded, the same every time, and put back: (B, 3, H, W) in [-1, 1]."""
        assert isinstance(module, PaletteModule)
        device, stored = next(module.parameters()).device, self.held_out.stored(indices)
        generators = [keyed_generator(0, "palette", i) for i in indices]
        seen = planes(degrade(stored, 1, module.config.degradation, generators))
        told = self.held_out.text([self.held_out.captions(i)[0] for i in indices])
        return planes(stored), seen, module.palette(seen.to(device), told.to(device)).cpu()

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        """Root mean squared differences, of 255, and the share of pixels that are within `same` of what they were."""
        assert isinstance(module, PaletteModule)
        squares, right = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
        for start in range(0, len(self._chosen), EVALUATION_ROWS):
            real, *found = self._put_back(module, self._chosen[start : start + EVALUATION_ROWS])
            for k, pictures in enumerate(found):
                apart = (pictures - real).double() * 127.5
                squares[k] += (apart**2).mean((1, 2, 3)).sum()
                right[k] += (apart.norm(dim=1) <= module.config.palette.same).double().mean((1, 2)).sum()
        rms, share = (squares / len(self._chosen)).sqrt().tolist(), (right / len(self._chosen)).tolist()
        return {"rms_degraded": rms[0], "rms": rms[1], "right_degraded": share[0], "right": share[1],
                "pictures": len(self._chosen)}  # fmt: skip

    def preview(self, module: nn.Module, path: Path) -> None:
        count = min(len(self.held_out), 16)
        shown = self._put_back(module, [k * len(self.held_out) // count for k in range(count)])
        save_png(grid([picture for pictures in shown[1:] + shown[:1] for picture in to_uint8(pictures)], count), path)

    def export(self, module: nn.Module, folder: Path, facts: dict[str, Any]) -> None:
        assert isinstance(module, PaletteModule)
        with written_whole(folder) as partial:
            save_palette(module.palette, self._text_digest, partial)
            write_json(partial / "training.json", facts)
