"""`ldm edit`: a picture, and maybe a mask -> the base from there on, and the stages after it -> PNG files.

    file -> read_image -> square of the cascade's size -> area -> Edit of the base -> Cascade.draw
         -> what lies outside the mask put back, pixel by pixel -> DIR/0000.png ...
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from ldm.config import UserError
from ldm.progress import advancing
from pipelines.cascade import Cascade
from pipelines.generate import (
    MAX_PROMPT_CHARS,
    Model,
    check_out,
    check_request,
    notes_of,
    request_of,
    seed_of,
    writing,
)
from pipelines.given import Pixels, read_file, squared
from pipelines.images import grid, save_png, to_uint8
from pipelines.stage import Edit

MAX_RESAMPLES = 100
HALF = 128  # of a mask's grey: as light or lighter is the hole


def edit(picture: str | Path, prompt: str, mask: str | Path | None = None, model: Model = None,
         strength: float | None = None, resamples: int = 10, composite: bool = True, n: int = 4, seed: int = 7,
         steps: int | None = None, guidance: float | None = None, negative: str = "", out: str | Path = "out",
         overwrite: bool = False, overrides: Sequence[str] = (),
         tell: Callable[[str], None] = lambda line: None) -> Path:  # fmt: skip
    """Draw `n` pictures that begin from a file, with seed, seed + 1, ..., and write them with grid.png into `out`;
    returns the grid's path. In the grid the picture given stands first.

    The centre square of the picture is used, at the size that the cascade draws. strength: the time to begin at, 1 is
    from noise alone; 0.6 by default, with a mask 1. mask: a picture of the same size, white where it is to be made
    new; what is black is put back after drawing, unless `composite` is false. resamples: of RePaint, with a mask.
    Raises UserError, before any work, for values out of range, files that cannot be read or do not fit, or in the way.
    """
    check_request([prompt], n, seed, steps, guidance)
    strength = strength if strength is not None else (0.6 if mask is None else 1.0)
    if not 0 < strength <= 1:
        raise UserError(f"--strength {strength:g}: must be above 0 and at most 1")
    if not 1 <= resamples <= MAX_RESAMPLES:
        raise UserError(f"--resamples {resamples}: must be from 1 to {MAX_RESAMPLES}")
    seed, out = seed_of(seed, tell), Path(out)
    names = [*(f"{k:04d}.png" for k in range(n)), "grid.png"]
    check_out(out, names, overwrite)
    given, digest = read_file(Path(picture), tell)
    told = {"sha256": digest, "strength": strength}
    marked = None
    if mask is not None:
        marked, digest = _marked(Path(mask), given, tell)
        told |= {"mask_sha256": digest, "resamples": resamples, "composite": composite}
    cascade = request_of(model).load(tell)
    sampling = cascade.sampling(steps, guidance, overrides)
    for line in notes_of(cascade, [prompt], negative, sampling):
        tell(line)
    prompt, negative = prompt[:MAX_PROMPT_CHARS], negative[:MAX_PROMPT_CHARS]
    large = squared(given, cascade.stages[-1].config.resolution_px)
    where = None if marked is None else squared(marked, len(large))
    begun = _begun(cascade, large, where, strength, resamples, n)
    try:
        times = [cascade.stages[0].times(sampling[0], begun)]
    except ValueError as error:
        raise UserError(f"--strength {strength:g}: {error}") from None
    calls = sum(math.ceil(n / o.rows) * (o.steps if k else len(times[0]) - 1) for k, o in enumerate(sampling))
    with advancing("denoising", calls) as advance:
        seeds = [seed + i for i in range(n)]
        drawn = cascade.draw([prompt] * n, seeds, sampling, on_step=lambda _done, _of: advance(), negative=negative,
                             edit=begun)[-1]  # fmt: skip
    pictures = to_uint8(drawn)
    if where is not None and composite:
        pictures = np.where(where[..., :1] >= HALF, pictures, large)
    with writing(out):
        for name, made, number in zip(names, pictures, seeds, strict=False):
            save_png(made, out / name, cascade.recipe(prompt, number, sampling, negative) | {"edit": told})
        save_png(grid([large, *pictures], n + 1), out / "grid.png")
    return out / "grid.png"


def _marked(mask: Path, given: Pixels, tell: Callable[[str], None]) -> tuple[Pixels, str]:
    """A mask's file: (H, W, 3), 255 where a picture is to be made new and else 0, and the digest of the file."""
    shade, digest = read_file(mask, tell)
    if shade.shape != given.shape:
        raise UserError(f"{mask}: {shade.shape[1]} x {shade.shape[0]}, but the picture is {given.shape[1]} x "
                        f"{given.shape[0]}; a mask has the picture's size")  # fmt: skip
    hole = shade.mean(-1, keepdims=True) >= HALF
    if not hole.any():
        raise UserError(f"{mask}: nothing in it is white, so there is nothing to make new")
    return np.repeat(hole, 3, 2).astype(np.uint8) * 255, digest


def _begun(cascade: Cascade, large: Pixels, where: Pixels | None, strength: float, resamples: int, n: int) -> Edit:
    """What the base begins from: the large picture by area, and a hole where any pixel of it is."""
    side = cascade.stages[0].config.resolution_px
    factor = len(large) // side
    pixels = torch.from_numpy(large).permute(2, 0, 1)[None].float() / 127.5 - 1
    small = torch.nn.functional.avg_pool2d(pixels, factor).expand(n, -1, -1, -1)
    hole = None
    if where is not None:
        marked = torch.from_numpy(where[..., 0] >= HALF)[None, None].float()
        hole = torch.nn.functional.max_pool2d(marked, factor).expand(n, -1, -1, -1)
    return Edit(small, strength, hole, resamples)
