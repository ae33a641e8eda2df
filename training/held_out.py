"""Errors of a denoiser on held-out items, by noise level, with the same noise every time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.control import control_picture
from ldm.denoiser import Denoiser
from ldm.draws import keyed_generator
from ldm.inpainting import condition_known
from training.cache import Items
from training.stages import EVALUATION_ROWS
from training.steps import Frozen, condition_pictures, opaque_cells, planes, raw_latents, small_pictures

EVALUATION_LEVELS = (10, 30, 50, 70, 90)  # hundredths of t


@torch.no_grad()
def errors_by_level(denoiser: Denoiser, frozen: Frozen, cache: Items, chosen: Sequence[int],
                    levels: Sequence[int], told: bool = True) -> dict[int, Tensor]:  # fmt: skip
    """Mean squared error of the target of each chosen item, (N,), at levels in hundredths of t; an item's noise at a
    level is the same every time. told: with the item's text, or with the null."""
    device = next(denoiser.parameters()).device
    found: dict[int, list[Tensor]] = {level: [] for level in levels}
    for start in range(0, len(chosen), EVALUATION_ROWS):
        indices = chosen[start : start + EVALUATION_ROWS]
        x0, cond = evaluation_inputs(cache, indices, frozen, told)
        opaque = opaque_cells(cache, indices, x0.shape)
        opaque = None if opaque is None else opaque.to(device)
        for level in levels:
            generators = [keyed_generator(0, "evaluation", level, i) for i in indices]
            draws = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in generators])
            t = torch.full((len(x0),), level / 100, dtype=torch.float64)
            error = denoiser.error(x0.to(device), draws.to(device), t, cond.to(device), opaque)
            found[level].append(error.cpu())
    return {level: torch.cat(parts) for level, parts in found.items()}


def evaluation_inputs(cache: Items, indices: Sequence[int], frozen: Frozen, told: bool = True
                      ) -> tuple[Tensor, Conditioning]:  # fmt: skip
    """Normalised latents (B, C, h, w) of whole items, no draw of the posterior, and what a network is told of them:
    their first caption, or where not `told` the null, and their small picture at level 0."""
    stored = cache.stored(indices)
    small = small_pictures(cache, indices, stored, frozen)
    x0 = frozen.normalisation.apply(raw_latents(stored, small, frozen))
    if frozen.told is not None:
        cond = frozen.told([cache.record(i)["captions"][0] if told else None for i in indices])
    else:
        cond = cache.text([cache.captions(i)[0] for i in indices]) if told else frozen.null.expand(len(indices))
    if frozen.inpainting:
        pictures = planes(stored)
        hole = torch.zeros_like(pictures[:, :1])
        hole[..., hole.shape[-1] // 2 :] = 1  # the right half
        device = frozen.codec.device
        known = condition_known(pictures.to(device), hole.to(device), frozen.codec, frozen.normalisation).cpu()
        cond = cond.join(Conditioning(known=known))
    if frozen.control is not None:
        cond = cond.join(Conditioning(control=control_picture(planes(stored), frozen.control)))
    if frozen.low_res is not None and small is not None:
        level = torch.zeros(len(indices), dtype=torch.float64)
        shape = (len(indices), frozen.low_res.channels(frozen.codec.config.factor), *x0.shape[2:])
        cond = cond.join(Conditioning(
            low_res=condition_pictures(small, level, torch.zeros(shape), frozen), level=level
        ))  # fmt: skip
    return x0, cond
