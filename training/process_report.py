"""`ldm eval process`: the forward process and the reverse one, as pictures.

    held-out pictures -> x0 -> x_t along the grid -> forward.png
    captions -> noise -> sampler: x_t and the network's x0 at each step -> reverse.png
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.config import UserError
from ldm.denoiser import Prediction
from ldm.draws import keyed_generator
from ldm.guidance import ClassifierFreeGuidance
from ldm.sampling import SAMPLERS
from pipelines.cascade import load_cascade
from pipelines.generate import check_out
from pipelines.images import grid, save_png, to_uint8, visible
from pipelines.stage import Stage
from training.data import DataConfig, Reader
from training.environment import prepare_process
from training.steps import planes

COLUMNS = 11
FILES = ("forward.png", "reverse.png")


def evaluate(model: str | Path, data: str | Path, out: str | Path, split: str = "combos", pictures: int = 6,
             overwrite: bool = False, device: str | None = None) -> Path:  # fmt: skip
    """Draw both processes of a cascade's first stage for `pictures` rows of `split`; returns OUT/reverse.png.

    Columns are times, from clean to noise in forward.png and back in reverse.png, where of each picture the upper row
    is x_t and the lower one what the network takes x0 to be. Latents are decoded. Raises UserError for an SR stage.
    """
    prepare_process()
    check_out(Path(out), FILES, overwrite)
    cascade = load_cascade(model, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    stage = cascade.stages[0]
    if stage.config.low_res is not None:
        raise UserError(f"{model}: begins with stage {stage.config.name}, which enlarges; its process is not shown")
    reader = Reader(DataConfig(path=str(data), split=split, size_px=stage.config.resolution_px))
    rows = [reader.rows[k * len(reader.rows) // pictures] for k in range(pictures)]
    real = planes(torch.stack([torch.from_numpy(reader.read(row).pixels) for row in rows]))
    eps = torch.stack([torch.randn(_shape(stage), generator=keyed_generator(0, "process", k)) for k in range(pictures)])
    moments = stage.codec.module.encode(real.to(stage.device))
    x0 = stage.config.normalisation.apply(moments.chunk(2, 1)[0])
    forward = [_shown(stage, stage.denoiser.schedule.add_noise(x0, eps.to(x0), t.expand(pictures)))
               for t in torch.linspace(0, 1, COLUMNS, dtype=torch.float64)]  # fmt: skip
    captions = [(row.captions or ("",))[0] for row in rows]
    cond, null = (Conditioning(*cascade.text.encode(texts)).to(stage.device) for texts in (captions, [""]))
    noisy, guesses = _reversed(stage, eps.to(x0), cond, null)
    both = [part for k in range(pictures) for part in (noisy[k], guesses[k])]
    Path(out).mkdir(parents=True, exist_ok=True)
    save_png(grid([forward[i][k] for k in range(pictures) for i in range(COLUMNS)], COLUMNS), Path(out) / FILES[0])
    save_png(grid([tile for row in both for tile in row], len(both[0])), Path(out) / FILES[1])
    return Path(out) / FILES[1]


def _shape(stage: Stage) -> tuple[int, int, int]:
    side = stage.config.resolution_px // stage.codec.module.config.factor
    return stage.config.latent_channels, side, side


@torch.no_grad()
def _reversed(stage: Stage, eps: Tensor, cond: Conditioning, null: Conditioning) -> tuple[Sequence, Sequence]:  # type: ignore[type-arg]
    """Of each picture its x_t and the x0 found there, at COLUMNS times of the stage's own sampling, decoded."""
    sampling, schedule = stage.config.sampling, stage.denoiser.schedule
    times = sampling.times(schedule)
    guided = partial(ClassifierFreeGuidance(stage.denoiser, sampling.guidance, null), cond=cond)
    seen: list[tuple[Tensor, Tensor]] = []

    def predict(x: Tensor, t: Tensor) -> Prediction:
        found = guided(x, t)
        seen.append((x, found.x0))
        return found

    generator = keyed_generator(0, "process", "sampler")
    start = schedule.alpha_sigma(times[:1])[1].to(eps) * eps
    last = SAMPLERS[sampling.sampler](
        predict, start, times, lambda like: torch.randn(like.shape, generator=generator).to(like), schedule=schedule
    )
    chosen = [seen[k * (len(seen) - 1) // (COLUMNS - 2)] for k in range(COLUMNS - 1)] + [(last, last)]
    columns = [(_shown(stage, x), _shown(stage, x0)) for x, x0 in chosen]
    count = range(len(eps))
    return [[c[0][k] for c in columns] for k in count], [[c[1][k] for c in columns] for k in count]


def _shown(stage: Stage, latents: Tensor) -> list[np.ndarray]:
    return visible(to_uint8(stage.codec.module.decode(stage.config.normalisation.invert(latents.float()))))
