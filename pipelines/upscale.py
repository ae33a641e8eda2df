"""`ldm upscale`: picture files -> checked request and plan -> SR stages -> PNG files.

    file -> read_layers -> colour on white, and alpha -> Cascade.draw (each) -> colour and alpha again -> DIR/<name>.png
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ldm.config import UserError
from ldm.decode import Decoding, Source, read_layers, read_regular
from ldm.file_kinds import BadImage
from ldm.progress import advancing
from pipelines.cascade import Cascade, load_cascade
from pipelines.generate import MAX_PROMPT_CHARS, MAX_SEED, SHIPPED, check_out, prompt_notes, seed_of, writing
from pipelines.given import MAX_FILE_BYTES, MAX_PIXELS
from pipelines.images import save_png, to_uint8
from pipelines.settings import SamplingConfig

Picture = npt.NDArray[np.uint8]
MAX_TILE_PX = 2048
FLAT_SHARE = 0.2  # of a drawing, more neighbouring pixels are equal
# what a plan says of memory: the program with its weights, copies of the widest level in one call of a network,
# and float32 copies of the large picture, latents included
BASE_BYTES, CALL_COPIES, CANVAS_COPIES = 1e9, 12, 8


@dataclass(frozen=True)
class Job:
    """A picture to enlarge: its file and where it goes, its size, and whether it has transparency."""

    source: Path
    target: Path
    width: int
    height: int
    alpha: bool

    def plan(self, cascade: Cascade, sampling: Sequence[SamplingConfig]) -> tuple[int, int, float]:
        """Tiles of the last stage, steps to wait for, and about how many bytes of memory are needed."""
        steps, scale, tiles, calls = 0, 1, 1, 0.0
        for stage, options in zip(cascade.stages, sampling, strict=True):
            scale *= stage.config.low_res.scale if stage.config.low_res else 1
            cell = stage.codec.module.config.factor
            windows = stage.tiles(-(-self.height * scale // cell), -(-self.width * scale // cell))
            tiles, count = len(windows), 1 + self.alpha
            steps += options.steps * (count if tiles > 1 else math.ceil(count / options.rows))
            rows = options.rows * (1 if options.guidance == 1 else 2)
            cells = windows[0].height * windows[0].width
            calls = max(calls, 4.0 * rows * cells * stage.config.unet.widths[0] * CALL_COPIES)
        canvas = 12.0 * CANVAS_COPIES * (1 + self.alpha) * self.width * self.height * scale**2
        return tiles, steps, BASE_BYTES + calls + canvas


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
    seed = seed_of(seed, tell)
    check_scale(scale)
    jobs = [_job(Path(picture), Path(out), scale) for picture in pictures]
    _check_targets(jobs, Path(out), overwrite)
    cascade = load_cascade(model or SHIPPED, device or ("cuda" if torch.cuda.is_available() else "cpu"))
    for line in cascade.notes:
        tell(line)
    cascade = in_tiles(enlarging(cascade, scale), tile)
    sampling = cascade.sampling(overrides=overrides)
    if prompt.strip():
        for line in prompt_notes(cascade, prompt):
            tell(line)
    prompt = prompt[:MAX_PROMPT_CHARS]
    steps = 0
    for job in jobs:
        tiles, own, memory = job.plan(cascade, sampling)
        steps += own
        parts = [f"{tiles} tiles" if tiles > 1 else "one tile", f"{own} steps"]
        parts += [f"about {memory / 1e9:.1f} GB of memory"]
        parts += ["alpha is enlarged too"] if job.alpha else []
        size = f"{job.width} x {job.height} -> {job.width * scale} x {job.height * scale}"
        tell(f"{job.source}: {size}, {', '.join(parts)}")
    warned, written = model is not None, []
    with advancing("enlarging", steps) as advance:
        for job in jobs:
            read = _read(job.source)
            for note in read.notes:
                tell(f"{job.source}: {note}")
            if not warned and photographic(read.colour):
                tell(f"{job.source}: looks like a photograph; the shipped stage has seen emoji only, and draws "
                     "everything in their manner")  # fmt: skip
                warned = True
            made = _enlarged(job, read, cascade, sampling, prompt, seed, advance)
            recipe = {**cascade.recipe(prompt, seed, sampling), "input_sha256": read.sha256}
            with writing(Path(out)):
                save_png(made, job.target, recipe)
            written.append(job.target)
    return written


def check_scale(scale: int) -> None:
    """Raise UserError for a scale that no stage could have."""
    if not 2 <= scale <= 64:
        raise UserError(f"--scale {scale}: must be from 2 to 64")


def enlarging(cascade: Cascade, scale: int) -> Cascade:
    """SR stages in a row that together enlarge by `scale`, the first such. Raises UserError, naming what there is,
    where none do."""
    scales = {stage.config.name: stage.config.low_res.scale for stage in cascade.stages if stage.config.low_res}
    names = list(scales)
    runs = [names[a:b] for a in range(len(names)) for b in range(a + 1, len(names) + 1)]
    offered = {math.prod(scales[name] for name in run): run for run in reversed(runs)}
    if scale in offered:
        return cascade.only(*offered[scale])
    if not offered:
        raise UserError("--model: this cascade has no SR stage; train one (configs/emoji/sr.yaml) or name another")
    nearest = min(offered, key=lambda s: abs(math.log(s / scale)))
    raise UserError(f"--scale {scale}: this cascade enlarges by {' or '.join(map(str, sorted(offered)))}; try "
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


class _Read(NamedTuple):
    """A picture file: colour (H, W, 3) on white, alpha (H, W) or None, notes, and the digest of the file."""

    colour: Picture
    alpha: Picture | None
    notes: list[str]
    sha256: str


def _job(source: Path, out: Path, scale: int) -> Job:
    read = _read(source)
    height, width = read.colour.shape[:2]
    if height * width * scale**2 > MAX_PIXELS:
        raise UserError(
            f"{source}: {width} x {height} enlarged {scale} times is {width * scale} x {height * scale}; at most "
            f"{MAX_PIXELS} pixels are made, of {MAX_PIXELS // scale**2}: crop or shrink it"
        )
    return Job(source, out / f"{source.stem}.png", width, height, read.alpha is not None)


def _read(source: Path) -> _Read:
    try:
        data = read_regular(source, MAX_FILE_BYTES)
        colour, alpha, notes = read_layers(Source(str(source), data=data), Decoding(max_pixels=MAX_PIXELS))
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from None
    except BadImage as error:
        raise UserError(f"{source}: {error}") from None
    return _Read(colour, alpha, notes, hashlib.sha256(data).hexdigest())


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


def _enlarged(job: Job, read: _Read, cascade: Cascade, sampling: Sequence[SamplingConfig], prompt: str, seed: int,
              advance: Callable[[], None]) -> Picture:  # fmt: skip
    """(H, W, 3), or with transparency (H, W, 4), uint8."""
    given = [read.colour]
    if read.alpha is not None:
        given.append(np.repeat(read.alpha[..., None], 3, -1))
    low_res = torch.from_numpy(np.stack(given)).permute(0, 3, 1, 2).float() / 127.5 - 1
    prompts = [prompt, ""][: len(given)]  # the prompt is not of the opacity
    try:
        made = cascade.draw(prompts, [seed] * len(given), sampling, low_res, lambda _done, _of: advance())[-1]
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"{job.source}: out of memory; try a smaller --tile, or fewer rows in a call with "
                            f"--set {cascade.stages[-1].config.name}.rows=1", exit_code=1) from None  # fmt: skip
        raise
    large = to_uint8(made)
    if read.alpha is None:
        first: Picture = large[0]
        return first
    opacity = _opacity(large[1], read.alpha)
    return np.dstack([_without_white(large[0], opacity), opacity])


def _opacity(drawn: Picture, alpha: Picture) -> Picture:
    """Opacity as drawn, but clear and opaque where the picture given is so all around: no veil, no holes."""
    scale = len(drawn) // len(alpha)
    around = np.lib.stride_tricks.sliding_window_view(np.pad(alpha, 1, mode="edge"), (3, 3))
    found = np.asarray(drawn.mean(-1).round()).astype(np.uint8)
    for value in (0, 255):
        same = (around == value).all((-1, -2)).repeat(scale, 0).repeat(scale, 1)
        found[same] = value
    return found


def _without_white(picture: Picture, opacity: Picture) -> Picture:
    """The colour that gives `picture` where it lies over white with `opacity`; white where nothing is opaque."""
    share = opacity.astype(np.float64)[..., None] / 255
    colour = 255 - (255 - picture.astype(np.float64)) / np.maximum(share, 1 / 255)
    return np.asarray(np.where(share > 0, colour, 255.0).round().clip(0, 255)).astype(np.uint8)
