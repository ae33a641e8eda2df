"""Inpainting: by a network that was never trained for it, which is held to noisy versions of what is known, or by one
that is told what is known.

    repaint(predict, x, grid, noise, known, hole) -> x         condition_known(pictures, hole, ...) -> (B, C + 1, h, w)

B batch, C channels; x, known are (B, C, *grid), hole is (B, 1, *grid): 1 where a sample is to be made, 0 where x0 is
known.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from ldm.denoiser import Predict
from ldm.latents import LatentCodec, Normalisation
from ldm.noise import NoiseSchedule, per_item, posterior, transition
from ldm.sampling import Noise, OnStep, grid_steps


@torch.no_grad()
def repaint(
    predict: Predict,
    x: Tensor,
    grid: Tensor,
    noise: Noise,
    *,
    schedule: NoiseSchedule,
    known: Tensor,
    hole: Tensor,
    resamples: int = 10,
    variance: float = 0.0,
    on_step: OnStep | None = None,
) -> Tensor:
    """RePaint, Lugmayr et al. 2022, Algorithm 1, on any grid: an ancestral step in the hole, q(x_s | x0) around it,
    and back to t by q(x_t | x_s), `resamples` times a step, so that both become one picture.

    known: x0, of which what lies in the hole is not read. One resample holds the surroundings and no more. on_step is
    called after each step of the grid. ValueError where `resamples` is below 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, not {resamples}")
    hole = hole.to(x)
    for t, s in grid_steps(x, grid, on_step):
        for again in range(resamples):
            prediction = predict(x, t)
            mix = variance if prediction.var_mix is None else prediction.var_mix
            drawn, log_variance = posterior(schedule, x, prediction.x0, t, s, mix)
            around = known
            if s[0] > 0:
                drawn = drawn + torch.exp(log_variance / 2) * noise(x)
                around = schedule.add_noise(known, noise(x), s)
            before = torch.where(hole > 0, drawn, around)
            if again + 1 == resamples or s[0] == 0:
                break
            a, b = (per_item(c, x) for c in transition(schedule, t, s))
            x = a * before + b.sqrt() * noise(x)
        x = before
    return x


def without_hole(pictures: Tensor, hole: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) with the mean of what is known in their holes (B, 1, H, W), since a codec's cells see more
    than their own; white where nothing is known."""
    around = 1 - hole
    count = around.sum((2, 3), keepdim=True)
    mean = (pictures * around).sum((2, 3), keepdim=True) / count.clamp(min=1)
    return torch.where(hole > 0, torch.where(count > 0, mean, 1.0), pictures)


def holed_cells(hole: Tensor, factor: int) -> Tensor:
    """(B, 1, H, W) -> (B, 1, h, w): a cell of `factor` pixels is to be made new where any of them is."""
    return max_pool2d(hole, factor)


def condition_known(pictures: Tensor, hole: Tensor, codec: LatentCodec, normalisation: Normalisation) -> Tensor:
    """What an inpainting network is told, in training and inference alike: latents of the pictures without their hole,
    0 in it, and the hole itself (Rombach et al. 2022, sec. 4.5). Pictures (B, 3, H, W) in [-1, 1], hole (B, 1, H, W)
    -> (B, C + 1, h, w)."""
    latents = normalisation.apply(codec.encode(without_hole(pictures, hole)).chunk(2, 1)[0])
    cells = holed_cells(hole, codec.config.factor).to(latents)
    return torch.cat([latents * (1 - cells), cells], 1)
