"""`ldm generate`: prompts -> checked request -> Cascade -> PNG files and a grid."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ldm.config import UserError
from ldm.progress import advancing
from pipelines.cascade import Cascade, load_cascade
from pipelines.control import ControlRequest, controlled
from pipelines.images import grid, save_png, to_uint8
from pipelines.ranking import load_ranker, most_like
from pipelines.settings import MAX_GUIDANCE, MAX_STEPS, SamplingConfig
from pipelines.steering import SteeringRequest, steering

SHIPPED = Path(__file__).parent / "weights" / "emoji"
METADATA = "metadata.jsonl"
MAX_SEED = 2**63 - 1
MAX_PIXELS = 2**26
MAX_PROMPT_CHARS = 20_000


@dataclass(frozen=True)
class ModelRequest:
    """Which networks draw, and where. folder: a cascade, None for the shipped one; stages: the names of those to run,
    all by default; device: None is the GPU where there is one; weak: a cascade whose stages, less trained or smaller,
    those of the same names are guided against where overrides say so, as "base.guided=network"; loras: as of
    `Cascade.merged`; control: of the first stage; embeddings: as of `Cascade.taught`."""

    folder: str | Path | None = None
    stages: Sequence[str] = ()
    device: str | None = None
    weak: str | Path | None = None
    loras: Sequence[str] = ()
    control: ControlRequest | None = None
    embeddings: Sequence[str] = ()

    def load(self, tell: Callable[[str], None]) -> Cascade:
        """Raises UserError for what cannot be used, and where the first stage draws nothing by itself."""
        if self.control is not None and self.weak is not None:
            raise UserError("--control and --weak do not go together: the weaker network has no ControlNet")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        cascade = load_cascade(self.folder or SHIPPED, device).merged(self.loras).taught(self.embeddings)
        cascade = cascade.only(*self.stages) if self.stages else cascade
        if cascade.stages[0].config.low_res is not None:
            name = cascade.stages[0].config.name
            raise UserError(f"stage {name} enlarges pictures and draws none: `ldm upscale` runs it")
        cascade = cascade if self.weak is None else cascade.weakened(load_cascade(self.weak, device))
        return cascade if self.control is None else controlled(cascade, self.control, tell)


Model = str | Path | ModelRequest | None


def request_of(model: Model) -> ModelRequest:
    """A folder alone as a request."""
    return model if isinstance(model, ModelRequest) else ModelRequest(model)


def generate(prompts: Sequence[str], model: Model = None, n: int = 4, seed: int = 7,
             steps: int | None = None, guidance: float | None = None, out: str | Path = "out",
             overwrite: bool = False, overrides: Sequence[str] = (), keep_stages: bool = False,
             best_of: int | None = None, clip: str | Path | None = None, negative: str = "",
             steer: SteeringRequest | None = None, captions: bool = False, size: str = "",
             tell: Callable[[str], None] = lambda line: None) -> Path:  # fmt: skip
    """Write `n` pictures per prompt and grid.png into `out`; returns the grid's path.

    Picture i of prompt j is file j n + i, made with seed + i; seed -1 draws one at random, which the pictures'
    metadata record. steps and guidance are those of the first stage; overrides set anything of any, such as
    "sr.steps=4". keep_stages: write each stage's picture too, as 0000-base.png. best_of: draw so many of each prompt,
    with seed, seed + 1, ..., and keep the `n` that the CLIP in the folder `clip` finds most like it, best first.
    negative: a prompt to guide away from. steer: what else guides the first stage. captions: write metadata.jsonl too,
    with which `out` is a data set. size: of the pictures, as 96x64, width first; squares of the model's own by default.
    tell: gets a line for each thing the user should know (truncation, the seed).
    Raises UserError, before any work, for values out of range, a model that cannot be used, or files in the way.
    """
    candidates = n if best_of is None else best_of
    check_request(prompts, candidates, seed, steps, guidance)
    judge, steer = load_ranker(n, best_of, clip), steer or SteeringRequest()
    steer.check()
    seed, out = seed_of(seed, tell), Path(out)
    names = [f"{k:04d}.png" for k in range(len(prompts) * n)] + ["grid.png"]
    check_out(out, names, overwrite)
    cascade = request_of(model).load(tell)
    kept = [stage.config.name for stage in cascade.stages[:-1]] if keep_stages else []
    names += [f"{k:04d}-{stage}.png" for k in range(len(prompts) * n) for stage in kept] + [METADATA] * captions
    check_out(out, names, overwrite)
    cascade = _sized(cascade, size, len(prompts) * candidates, bool(steer.recipe) or best_of is not None)
    sampling = cascade.sampling(steps, guidance, overrides)
    for line in notes_of(cascade, prompts, negative, sampling):
        tell(line)
    prompts, negative = [prompt[:MAX_PROMPT_CHARS] for prompt in prompts], negative[:MAX_PROMPT_CHARS]
    asked = [(prompt, seed + i) for prompt in prompts for i in range(candidates)]
    calls = sum(o.steps * math.ceil(len(asked) / o.rows) for o in sampling)
    with advancing("denoising", calls) as advance:
        drawn = cascade.draw(
            [p for p, _ in asked], [s for _, s in asked], sampling, on_step=lambda _done, _of: advance(),
            negative=negative, steer=steering(steer, cascade.stages[0], [p for p, _ in asked]),
        )
    if judge is not None:
        best = most_like(judge, prompts, drawn[-1], n)
        drawn, asked = [made[best] for made in drawn], [asked[k] for k in best]
    told = {"steered": steer.recipe} if steer.recipe else {}
    columns = n if len(prompts) > 1 else min(n, math.ceil(math.sqrt(n)))
    with writing(out):
        for stage, made in [*zip(kept, drawn, strict=False), ("", drawn[-1])]:
            own = cascade.upto(stage) if stage else cascade
            for k, picture in enumerate(to_uint8(made)):
                name = f"{k:04d}-{stage}.png" if stage else names[k]
                save_png(picture, out / name, own.recipe(*asked[k], sampling[: len(own.stages)], negative) | told)
        save_png(grid(list(to_uint8(drawn[-1])), columns), out / "grid.png")
        if captions:
            rows = [{"file_name": name, "caption": prompt} for name, (prompt, _) in zip(names, asked, strict=False)]
            (out / METADATA).write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return out / "grid.png"


def _sized(cascade: Cascade, size: str, count: int, judged: bool) -> Cascade:
    """The cascade that draws this size, or where it is empty its own. Raises UserError for what is no size, one too
    large for `count` pictures, and where pictures are `judged`, or a ControlNet told of one, by what knows squares."""
    width = height = cascade.stages[-1].config.resolution_px
    if size:
        found = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
        if found is None:
            raise UserError(f"--size {size!a}: width and height in pixels, as 96x64")
        if judged or cascade.stages[0].control is not None:
            raise UserError("--size: a classifier, a CLIP and a ControlNet see squares; leave it out, or them")
        width, height = int(found[1]), int(found[2])
        cascade = cascade.sized(width, height)
    if count * width * height > MAX_PIXELS:
        side = f"{width} px" if width == height else f"{width}x{height} px"
        most = MAX_PIXELS // width // height
        raise UserError(f"{count} pictures of {side} are too much for one call; at most {most} pictures")
    return cascade


def seed_of(seed: int, tell: Callable[[str], None]) -> int:
    """The seed, or for -1 one drawn at random, which is told."""
    if seed == -1:
        seed = secrets.randbelow(2**32)
        tell(f"seed {seed}")
    return seed


def notes_of(cascade: Cascade, prompts: Sequence[str], negative: str, sampling: Sequence[SamplingConfig]) -> list[str]:
    """What a user should know of a request before it is drawn."""
    asked = [*prompts, negative] if negative else prompts
    notes = [*cascade.notes, *(line for prompt in asked for line in prompt_notes(cascade, prompt))]
    if negative and all(options.guidance == 1 for options in sampling):
        notes.append("the negative prompt is not used: there is no guidance at 1")
    return notes


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Make the folder; what cannot be written there is told as UserError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{out}: not all pictures could be written: {why}", exit_code=1) from error


def check_request(prompts: Sequence[str], n: int, seed: int, steps: int | None, guidance: float | None) -> None:
    """Raise UserError, naming the value and its range, for a request that cannot be met."""
    if not prompts:
        raise UserError("no prompt: give at least one, for example \"a red heart, noto style\"")
    if not 1 <= n <= 10_000:
        raise UserError(f"--n {n}: must be from 1 to 10000")
    if not -1 <= seed <= MAX_SEED - n:
        raise UserError(f"--seed {seed}: must be from 0 to {MAX_SEED - n}, or -1 for a random one")
    if steps is not None and not 1 <= steps <= MAX_STEPS:
        raise UserError(f"--steps {steps}: must be from 1 to {MAX_STEPS}")
    if guidance is not None and not 0 <= guidance <= MAX_GUIDANCE:
        raise UserError(f"--guidance {guidance}: must be from 0 to {MAX_GUIDANCE:g}; 1 is none")


def check_out(out: Path, names: Sequence[str], overwrite: bool) -> None:
    """Raise UserError where `out` cannot take the files, or holds some of them and `overwrite` is not given."""
    try:
        if os.path.lexists(out) and not out.is_dir():
            raise UserError(f"{out}: is a file, not a folder; name another with --out")
        near = next(p for p in (out, *out.absolute().parents) if p.exists())
        blocked = next((name for name in names if (out / name).is_dir()), None)
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}; name another folder with --out") from None
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
        raise UserError(f"{out}: {near} cannot be written to; name another folder with --out")
    if blocked:
        raise UserError(f"{out}: {blocked} is a folder; name another with --out")
    there = [name for name in names if (out / name).exists()]
    if there and not overwrite:
        exist = f"{there[0]} and {len(there) - 1} more exist" if len(there) > 1 else f"{there[0]} exists"
        raise UserError(f"{out}: {exist} already; use --overwrite or another --out")


def prompt_notes(cascade: Cascade, prompt: str) -> list[str]:
    """What a user should know of a prompt before it is drawn: emptiness, truncation."""
    shown = ascii(prompt[:40])
    if not prompt.strip():
        return [f"prompt {shown} is empty: drawn without conditioning"]
    notes = []
    if len(prompt) > MAX_PROMPT_CHARS:
        notes.append(f"prompt {shown}: the first {MAX_PROMPT_CHARS} of {len(prompt)} characters are read")
    used, total = cascade.text.token_count(prompt[:MAX_PROMPT_CHARS])
    if used < total:
        notes.append(f"prompt {shown}: {used} of {total} tokens are used, the rest is cut off")
    return notes
