"""`ldm upscale`: picture files -> checked request and plan -> SR stages -> PNG files.

    file -> read_layers -> colour on white, and alpha -> Cascade.draw (each) -> colour and alpha again -> DIR/<name>.png
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ldm.config import UserError
from ldm.decode import BadImage, read_layers
from ldm.progress import advancing
from pipelines.cascade import Cascade, load_cascade
from pipelines.generate import MAX_PROMPT_CHARS, MAX_SEED, SHIPPED, check_out, prompt_notes
from pipelines.images import save_png, to_uint8
from pipelines.stage import SamplingConfig

Picture = npt.NDArray[np.uint8]
MAX_OUTPUT_PIXELS = 2**26
MAX_TILE_PX = 2048
FLAT_SHARE = 0.2  # of a drawing, more neighbouring pixels are equal
BASE_BYTES = 5e8  # of weights and one call's activations
CANVAS_COPIES = 8  # float32 copies of the large picture that are alive at once, latents included


@dataclass(frozen=True)
class Job:
    """A picture to enlarge: its file and where it goes, its size, and whether it has transparency."""

    source: Path
    target: Path
    width: int
    height: int
    alpha: bool

    def calls(self, cascade: Cascade, sampling: Sequence[SamplingConfig]) -> tuple[int, int]:
        """Tiles of the last stage, and steps to wait for, those of alpha included."""
        steps, scale, tiles = 0, 1, 1
        for stage, options in zip(cascade.stages, sampling, strict=True):
            scale *= stage.config.low_res.scale if stage.config.low_res else 1
            cell = stage.codec.module.config.factor
            tiles = len(stage.tiles(-(-self.height * scale // cell), -(-self.width * scale // cell)))
            steps += options.steps
        return tiles, steps * (1 + self.alpha)


def upscale(pictures: Sequence[str | Path], model: str | Path | None = None, scale: int = 4, prompt: str = "",
            seed: int = 0, out: str | Path = "out", overwrite: bool = False, overrides: Sequence[str] = (),
            tile: int | None = None, device: str | None = None,
            tell: Callable[[str], None] = lambda line: None) -> list[Path]:  # fmt: skip
    """Enlarge picture files of any size by the SR stages of a cascade; returns the files written, OUT/<name>.png.

    Pictures are turned as their EXIF says, transparency is kept: colour over white and alpha are enlarged apart, so
    that over white the result is what the stage drew. What is larger than the stage was trained on is drawn in tiles.
    overrides: of the stages' sampling, such as "sr.steps=4". tile: side of the tiles in pixels of the large picture,
    by default the size a stage was trained on. tell: gets the plan of each picture, and notes.
    Raises UserError, before any work, for values out of range, a picture that cannot be read or is too large, a
    model without SR stages or files in the way.
    """
    if not -1 <= seed <= MAX_SEED:
        raise UserError(f"--seed {seed}: must be from 0 to {MAX_SEED}, or -1 for a random one")
    if seed == -1:
        seed = secrets.randbelow(2**32)
        tell(f"seed {seed}")
    if len(prompt) > MAX_PROMPT_CHARS:
        tell(f"prompt {prompt[:40]!a}: the first {MAX_PROMPT_CHARS} of {len(prompt)} characters are read")
        prompt = prompt[:MAX_PROMPT_CHARS]
    check_scale(scale)
    jobs = [_job(Path(picture), Path(out), scale) for picture in pictures]
    _check_targets(jobs, Path(out), overwrite)
    cascade = load_cascade(model or SHIPPED, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cascade = in_tiles(enlarging(cascade, scale), tile)
    sampling = cascade.sampling(overrides=overrides)
    if prompt.strip():
        for line in prompt_notes(cascade, prompt):
            tell(line)
    steps = 0
    for job in jobs:
        tiles, own = job.calls(cascade, sampling)
        steps += own
        tell(_plan(job, scale, tiles, own))
    warned, written = model is not None, []
    with advancing("enlarging", steps) as advance:
        for job in jobs:
            colour, alpha, notes = _read(job.source)
            for note in notes:
                tell(f"{job.source}: {note}")
            if not warned and photographic(colour):
                tell(f"{job.source}: looks like a photograph; the shipped stage has seen emoji only, and draws "
                     "everything in their manner")  # fmt: skip
                warned = True
            written.append(_enlarge(job, colour, alpha, cascade, sampling, prompt, seed, advance))
    return written


def check_scale(scale: int) -> None:
    """Raise UserError for a scale that no stage could have."""
    if not 2 <= scale <= 64:
        raise UserError(f"--scale {scale}: must be from 2 to 64; the shipped stage enlarges by 4")


def enlarging(cascade: Cascade, scale: int) -> Cascade:
    """The SR stages that together enlarge by `scale`. Raises UserError, naming what there is, where none do."""
    found, total, offered = [], 1, []
    for stage in cascade.stages:
        if stage.config.low_res is None:
            continue
        total *= stage.config.low_res.scale
        found.append(stage.config.name)
        if total == scale:
            return cascade.only(*found)
        offered.append(total)
    if not offered:
        raise UserError("--model: this cascade has no SR stage; train one (configs/emoji/sr.yaml) or name another")
    nearest = min(offered, key=lambda s: abs(math.log(s / scale)))
    raise UserError(f"--scale {scale}: this cascade enlarges by {' or '.join(map(str, offered))}; try "
                    f"--scale {nearest}")  # fmt: skip


def in_tiles(cascade: Cascade, tile_px: int | None) -> Cascade:
    """The cascade with tiles of another size. Raises UserError for one that a stage cannot draw."""
    if tile_px is None:
        return cascade
    unit = math.lcm(*(stage.multiple_px for stage in cascade.stages))
    if tile_px % unit or not 2 * unit <= tile_px <= MAX_TILE_PX:
        near = min(max(round(tile_px / unit), 2) * unit, MAX_TILE_PX // unit * unit)
        raise UserError(f"--tile {tile_px}: must be a multiple of {unit} from {2 * unit} to {MAX_TILE_PX}; try {near}")
    return replace(cascade, stages=[replace(stage, tile_px=tile_px) for stage in cascade.stages])


def photographic(picture: Picture) -> bool:
    """Whether few neighbouring pixels of (H, W, 3) are equal, as in photographs and unlike in drawings."""
    if picture.shape[1] < 2:
        return False
    return float((picture[:, 1:] == picture[:, :-1]).all(-1).mean()) < FLAT_SHARE


def _job(source: Path, out: Path, scale: int) -> Job:
    colour, alpha, _ = _read(source)
    height, width = colour.shape[:2]
    if height * width * scale**2 > MAX_OUTPUT_PIXELS:
        raise UserError(
            f"{source}: {width} x {height} enlarged {scale} times is {width * scale} x {height * scale}; at most "
            f"{MAX_OUTPUT_PIXELS} pixels are made, of {MAX_OUTPUT_PIXELS // scale**2}: crop or shrink it"
        )
    return Job(source, out / f"{source.stem}.png", width, height, alpha is not None)


def _read(source: Path) -> tuple[Picture, Picture | None, list[str]]:
    try:
        return read_layers(source, max_pixels=MAX_OUTPUT_PIXELS)
    except BadImage as error:
        raise UserError(f"{source}: {error}") from None


def _check_targets(jobs: Sequence[Job], out: Path, overwrite: bool) -> None:
    if not jobs:
        raise UserError("no picture: name at least one file")
    seen: dict[Path, Path] = {}
    for job in jobs:
        if job.target in seen:
            raise UserError(f"{job.source} and {seen[job.target]} would both become {job.target}; "
                            "rename one, or enlarge them apart")  # fmt: skip
        seen[job.target] = job.source
    check_out(out, [job.target.name for job in jobs], overwrite)
    for job in jobs:
        same = next((other.source for other in jobs if job.target.exists() and other.source.samefile(job.target)), None)
        if same is not None:
            raise UserError(f"{same}: would be written over by its own enlargement; name another folder with --out")


def _plan(job: Job, scale: int, tiles: int, steps: int) -> str:
    width, height = job.width * scale, job.height * scale
    gigabytes = (BASE_BYTES + CANVAS_COPIES * 12 * width * height) / 1e9
    parts = [f"{tiles} tiles" if tiles > 1 else "one tile", f"{steps} steps", f"about {gigabytes:.1f} GB of memory"]
    parts += ["alpha is enlarged too"] if job.alpha else []
    return f"{job.source}: {job.width} x {job.height} -> {width} x {height}, {', '.join(parts)}"


def _enlarge(job: Job, colour: Picture, alpha: Picture | None, cascade: Cascade, sampling: Sequence[SamplingConfig],
             prompt: str, seed: int, advance: Callable[[], None]) -> Path:  # fmt: skip
    def draw(picture: Picture) -> Picture:
        low_res = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
        made = cascade.draw([prompt], [seed], sampling, low_res, lambda _done, _of: advance())[-1]
        first: Picture = to_uint8(made)[0]
        return first

    large = draw(colour)
    if alpha is not None:
        opacity = np.asarray(draw(np.repeat(alpha[..., None], 3, -1)).mean(-1).round(), dtype=np.uint8)
        large = np.dstack([_without_white(large, opacity), opacity])
    recipe = cascade.recipe(prompt, seed, sampling)
    recipe["input_sha256"] = hashlib.sha256(job.source.read_bytes()).hexdigest()
    try:
        job.target.parent.mkdir(parents=True, exist_ok=True)
        save_png(large, job.target, recipe)
    except OSError as error:
        raise UserError(f"{job.target}: cannot be written: {error.strerror or error}", exit_code=1) from error
    return job.target


def _without_white(picture: Picture, opacity: Picture) -> Picture:
    """The colour that gives `picture` where it lies over white with `opacity`; white where nothing is opaque."""
    share = opacity.astype(np.float64)[..., None] / 255
    colour = 255 - (255 - picture.astype(np.float64)) / np.maximum(share, 1 / 255)
    return np.asarray(np.where(share > 0, colour, 255.0).round().clip(0, 255)).astype(np.uint8)
