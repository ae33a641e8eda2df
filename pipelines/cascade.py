"""Cascade: text -> base -> SR -> SR ... -> pixels, a loop over stages.

    prompts -> TextEncoder -> Conditioning -> Stage.sample -> 8-bit pictures -> the next Stage.sample -> ...

A cascade folder: cascade.json, codecs by name (codec/), text/ (unless the text encoder is the packaged one), and
per stage a folder with stage.json, unet/ and, where it has one, palette/.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.conditioning import Conditioning
from ldm.config import Config, UserError, apply_override, parse, to_dict
from ldm.denoiser import Denoiser
from ldm.lora import PREFIX, merge_lora, text_networks
from ldm.models.palette import Palette
from ldm.models.unet import build_unet
from ldm.noise import NoiseSchedule
from ldm.text import TextConfig, TextEncoder, load_text_encoder
from ldm.weights import (
    NETWORK_FILE,
    Codec,
    check_weights_file,
    codec_digest,
    folder_digest,
    load_codec,
    load_network,
    load_palette,
    read_json,
    save_codec,
    save_network,
    save_palette,
    write_json,
)
from ldm.words import load_words
from pipelines.fetch import located
from pipelines.settings import MAX_SIDE_PX, SamplingConfig, StageConfig
from pipelines.stage import Edit, OnStep, Stage, Steering

FORMAT = 1


@dataclass(frozen=True)
class CascadeConfig(Config):
    """cascade.json: stages in order and the shared parts."""

    format: int
    stages: tuple[str, ...]
    text: TextConfig

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ValueError(f"cascade format {self.format}; this version reads {FORMAT}")
        if not self.stages or any(not name.isidentifier() for name in self.stages):
            raise ValueError(f"stages must be plain folder names, not {self.stages}")
        if len(set(self.stages)) < len(self.stages):
            raise ValueError(f"stages {self.stages}: a name stands twice")


@dataclass
class Cascade:
    """Stages in order with their shared text encoder; each has the codec it was trained with."""

    stages: list[Stage]
    text: TextEncoder
    digest: str = ""
    weak_digest: str = ""
    notes: tuple[str, ...] = ()  # what a user should know of it

    @property
    def codec(self) -> Codec:
        """The codec of the first stage."""
        return self.stages[0].codec

    def only(self, *names: str) -> Cascade:
        """The cascade of some of the stages, in the order of this one.

        Raises UserError for a name it has not, or where a stage is left without its input's size.
        """
        own = [stage.config.name for stage in self.stages]
        for name in names:
            if name not in own:
                raise UserError(f"no stage is named {name!r}; this cascade has {', '.join(own)}")
        stages = [stage for stage in self.stages if stage.config.name in names]
        check_chain([stage.config for stage in stages])
        return replace(self, stages=stages)

    def upto(self, name: str) -> Cascade:
        """The cascade of the stages up to one."""
        names = [stage.config.name for stage in self.stages]
        return self.only(*names[: names.index(name) + 1])

    def sampling(self, steps: int | None = None, guidance: float | None = None,
                 overrides: Sequence[str] = ()) -> list[SamplingConfig]:  # fmt: skip
        """Each stage's sampling: its defaults, `steps` and `guidance` for the first stage, then `overrides`, such
        as "sr.level=0.1".

        Raises UserError for values out of range, and for more steps than the schedule has.
        """
        merged = [to_dict(stage.config.sampling) for stage in self.stages]
        first = {"steps": steps, "guidance": guidance}
        merged[0].update({k: v for k, v in first.items() if v is not None})
        names = [stage.config.name for stage in self.stages]
        for item in overrides:
            name, _, rest = item.partition(".")
            if name not in names:
                raise UserError(f"--set {item!a}: begin with one of the stages {', '.join(names)}, as in "
                                f"{names[-1]}.steps=8")  # fmt: skip
            apply_override(merged[names.index(name)], rest)
        found = []
        for stage, values in zip(self.stages, merged, strict=True):
            place = f"sampling of {stage.config.name}"
            found.append(parse(SamplingConfig, values, place))
            if found[-1].guided == "network" and stage.weak is None:
                raise UserError(f"{place}: guided network needs a weaker network: name its folder with --weak")
            try:
                replace(stage.config, sampling=found[-1])
                found[-1].times(stage.denoiser.schedule)
            except ValueError as error:
                raise UserError(f"{place}: {error}") from None
        return found

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sequence[SamplingConfig] | None = None,
             low_res: Tensor | None = None, on_step: OnStep | None = None, negative: str = "",
             edit: Edit | None = None, steer: Steering | None = None) -> list[Tensor]:  # fmt: skip
        """What each stage makes: pictures (B, 3, H, W) in [-1, 1], on the CPU, one per prompt and seed, in steps
        of 1/255 as a file would hold them, since that is what the next stage gets.

        low_res: what the first stage enlarges, (B, 3, h, w) in [-1, 1], if it is an SR stage. negative: a prompt to
        guide away from, in place of none. edit: what the first stage begins from, and steer: what
        else guides it, if it is a base.
        A picture depends on its prompt, its seed, its low_res and the sampling only, never on its companions.
        """
        if len(prompts) != len(seeds) or not prompts:
            raise ValueError(f"one seed per prompt is needed: {len(prompts)} prompts, {len(seeds)} seeds")
        made = []
        with torch.no_grad():
            cond, null = Conditioning(*self.text.encode(prompts)), Conditioning(*self.text.encode([negative]))
            for stage, options in zip(self.stages, sampling or self.sampling(), strict=True):
                own = (edit, steer) if stage is self.stages[0] else (None, None)
                low_res = _in_steps(stage.sample(cond, null, seeds, options, low_res, on_step, *own))
                made.append(low_res)
        return made

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int], sampling: Sequence[SamplingConfig] | None = None,
                 on_step: OnStep | None = None) -> Tensor:  # fmt: skip
        """The pictures of the last stage, as `draw` makes them."""
        return self.draw(prompts, seeds, sampling, on_step=on_step)[-1]

    def weakened(self, weak: Cascade) -> Cascade:
        """With each stage's weaker network, for autoguidance, from the stage of the same name in another cascade.

        Raises UserError where none has that name, or one draws other latents or knows another text encoder.
        """
        own = {stage.config.name: stage for stage in weak.stages}
        if weak.text.digest != self.text.digest:
            raise UserError("the weaker model has another text encoder, so it cannot be told the same")
        if not any(stage.config.name in own for stage in self.stages):
            raise UserError(f"the weaker model has stages {', '.join(own)}, and none of this one's names")
        stages = []
        for stage in self.stages:
            other = own.get(stage.config.name)
            if other is None:
                stages.append(stage)
                continue
            for name in ("resolution_px", "schedule", "normalisation", "codec_digest", "low_res"):
                if getattr(other.config, name) != getattr(stage.config, name):
                    raise UserError(f"stage {stage.config.name}: {name} of the weaker model is another")
            stages.append(replace(stage, weak=other.denoiser))
        return replace(self, stages=stages, weak_digest=weak.digest)

    def sized(self, width: int, height: int) -> Cascade:
        """One whose last pictures are of this size, and those of the stages before it so much smaller; the first stage
        must be a base. Raises UserError for a size that its networks cannot draw."""
        scale = math.prod(stage.config.low_res.scale for stage in self.stages if stage.config.low_res is not None)
        base = self.stages[0]
        unit = base.multiple_px * scale
        if width % unit or height % unit or not 0 < min(width, height) <= max(width, height) <= MAX_SIDE_PX:
            raise UserError(f"--size {width}x{height}: this model draws sides that are multiples of {unit} px, up to "
                            f"{MAX_SIDE_PX // unit * unit}")  # fmt: skip
        return replace(self, stages=[replace(base, canvas=(width // scale, height // scale)), *self.stages[1:]])

    def merged(self, loras: Sequence[str]) -> Cascade:
        """With LoRAs added to a stage's weights, and the text encoder's, each "PATH", "PATH:WEIGHT" or
        "STAGE=PATH:WEIGHT"; the first stage by default, and 1. The networks are changed in place. Raises UserError
        where one does not fit, or is none."""
        found = self
        for item in loras:
            head, sign, rest = item.partition("=")
            named = sign == "=" and head.isidentifier()
            place, _, number = (rest if named else item).rpartition(":")
            try:
                path, weight = (place, float(number)) if place else (number, 1.0)
            except ValueError:
                path, weight = f"{place}:{number}", 1.0
            if not math.isfinite(weight):
                raise UserError(f"--lora {item!a}: the weight must be a number")
            stage = self.only(head).stages[0] if named else self.stages[0]
            networks = {PREFIX: stage.denoiser.net, **text_networks(found.text.module)}
            told = f"{stage.config.name} {merge_lora(networks, Path(path), weight)} {weight!r}"
            found = replace(found, digest=hashlib.sha256(f"{found.digest} {told}".encode()).hexdigest())
            base = found.stages[0]
            if base.palette is not None and base.config.name == stage.config.name:
                found = found._unpainted(path)
        return found

    def _unpainted(self, why: str) -> Cascade:
        """Without the palette, which is of the colours of other pictures than those that `why` was trained on."""
        note = f"the palette of {self.stages[0].config.name} is left out: it has other colours than {why} may ask for"
        stages = [replace(stage, palette=None) for stage in self.stages]
        return replace(self, stages=stages, notes=(*self.notes, note))

    def taught(self, embeddings: Sequence[str]) -> Cascade:
        """With words for its text encoder, each "PATH", or "WORD=PATH" for a word of another name. The encoder is
        changed in place. Raises UserError for a file that is none, or of another encoder's width."""
        found = self
        for item in embeddings:
            word, sign, path = item.partition("=") if not Path(item).exists() else ("", "", item)
            words, digest = load_words(Path(path if sign else item))
            if sign and len(words) > 1:
                raise UserError(f"--embedding {item!a}: the file has {len(words)} words: {', '.join(words)}")
            for name, rows in words.items():
                found.text.learn(word if sign else name, rows)
            told = f"{found.digest} {word} {digest}"
            found = replace(found, digest=hashlib.sha256(told.encode()).hexdigest())
            found = found if found.stages[0].palette is None else found._unpainted(path)
        return found

    def recipe(self, prompt: str, seed: int, sampling: Sequence[SamplingConfig], negative: str = "") -> dict[str, Any]:
        """What makes a picture again: no time, path, host or number of companions."""
        stages = [{"name": s.config.name, **s.settings(o)} for s, o in zip(self.stages, sampling, strict=True)]
        found: dict[str, Any] = {"prompt": prompt, "seed": seed, "model": self.digest, "stages": stages}
        weak = self.weak_digest if any(options.guided == "network" for options in sampling) else ""
        return found | {k: v for k, v in (("negative", negative), ("weak", weak)) if v}

    def save(self, folder: Path) -> None:
        """Write the cascade as a folder, complete or not at all. Raises UserError where one exists."""
        if folder.exists():
            raise UserError(f"{folder}: exists; a cascade is not written over")
        partial = folder.with_name(f"{folder.name}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            self._fill(partial)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _fill(self, partial: Path) -> None:
        partial.mkdir(parents=True)
        codecs = {stage.config.codec: stage.codec for stage in self.stages}
        for name, codec in codecs.items():
            save_codec(codec.module, partial / name)
        text = self.text.config.placed("text")
        for name, path in self.text.files.items() if text.kind != "minilm" else ():
            (partial / "text" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, partial / "text" / name)
        for stage in self.stages:
            save_network(stage.denoiser.net, partial / stage.config.name / "unet")
            if stage.palette is not None:
                save_palette(stage.palette, stage.config.text_digest, partial / stage.config.name / "palette")
            digest, palette = codec_digest(partial / stage.config.codec), stage.palette is not None
            config = replace(stage.config, codec_digest=digest, palette=palette)
            write_json(partial / stage.config.name / "stage.json", to_dict(config))
        names = tuple(s.config.name for s in self.stages)
        write_json(partial / "cascade.json", to_dict(CascadeConfig(FORMAT, names, text)))


def _in_steps(pixels: Tensor) -> Tensor:
    return (((pixels.clamp(-1, 1) + 1) * 127.5).round() / 127.5) - 1


def check_chain(stages: Sequence[StageConfig]) -> None:
    """Raise UserError unless each stage but the first enlarges pictures of the size that the one before makes."""
    for before, stage in pairwise(stages):
        name, wanted, made = stage.name, stage.input_px, before.resolution_px
        if wanted is None:
            raise UserError(f"stage {name} is a base, which draws from text alone: it can only be the first")
        if wanted != made:
            raise UserError(f"stage {name} enlarges pictures of {wanted} px, but {before.name} before it makes "
                            f"{made} px; put a stage between them, or leave one out")  # fmt: skip


def load_cascade(folder: str | Path, device: torch.device | str = "cpu") -> Cascade:
    """Read a cascade folder, or a pipeline folder of diffusers, or one of the Hub by its id. Raises UserError where it
    is neither, is damaged, or its parts do not belong together."""
    folder = located(folder)
    if (folder / "model_index.json").is_file() and not (folder / "cascade.json").is_file():
        from pipelines.foreign import load_pipeline  # here, because it makes cascades itself

        return load_pipeline(folder, device)
    if not (folder / "cascade.json").is_file():
        check_weights_file(folder if folder.is_file() else folder / "cascade.json")
    config = parse(CascadeConfig, read_json(folder / "cascade.json"), str(folder / "cascade.json"))
    configs = {n: parse(StageConfig, read_json(p), str(p)) for n in config.stages for p in [folder / n / "stage.json"]}
    for name, own in configs.items():
        if own.name != name:
            raise UserError(f"{folder / name}: holds stage {own.name!r}; a stage's folder has its name")
    check_chain(list(configs.values()))
    codecs = {name: load_codec(folder / name) for name in sorted({c.codec for c in configs.values()})}
    for codec in codecs.values():
        codec.module.to(device)
    text = load_text_encoder(config.text.placed(str(folder / "text")), device)
    stages = [_load_stage(folder / n, c, codecs[c.codec], text.digest, device) for n, c in configs.items()]
    return Cascade(stages, text, folder_digest(folder, "cascade.json", *codecs, "text", *config.stages))


def load_text(folder: str | Path) -> TextEncoder:
    """The text encoder alone of what `load_cascade` reads. Raises UserError as that does."""
    folder = located(folder)
    if (folder / "model_index.json").is_file() and not (folder / "cascade.json").is_file():
        from pipelines.foreign import load_pipeline_text  # as above

        return load_pipeline_text(folder)
    config = parse(CascadeConfig, read_json(folder / "cascade.json"), str(folder / "cascade.json"))
    return load_text_encoder(config.text.placed(str(folder / "text")))


def _load_stage(folder: Path, config: StageConfig, codec: Codec, text_digest: str,
                device: torch.device | str) -> Stage:  # fmt: skip
    for part, mine, found in (("codec", config.codec_digest, codec.digest), ("text", config.text_digest, text_digest)):
        if mine != found:
            raise UserError(
                f"{folder}: was trained with another {part} ({mine[:12]}) than the one beside it ({found[:12]}); "
                "put back the folder as it was saved"
            )
    shape = codec.module.config
    if config.latent_channels != shape.latent_channels:
        raise UserError(f"{folder}: draws {config.latent_channels} channels, its codec has {shape.latent_channels}")
    unit = shape.factor * (config.unet.factor if config.low_res else 1)
    if config.resolution_px % unit:
        raise UserError(f"{folder}: resolution_px {config.resolution_px} is no multiple of {unit}")
    net = load_network(lambda: build_unet(config.unet, config.shape(shape.factor)), folder / "unet" / NETWORK_FILE)
    denoiser = Denoiser(net, NoiseSchedule(config.schedule), config.denoiser).to(device).eval()
    palette = load_own_palette(folder / "palette", config, device) if config.palette else None
    return Stage(config, denoiser, codec, palette=palette)


def load_own_palette(folder: Path, config: StageConfig, device: torch.device | str = "cpu") -> Palette:
    """The palette in a folder, for a stage. Raises UserError where there is none, or it does not fit the stage."""
    if config.low_res is not None:
        raise UserError(f"{folder}: a palette is of a base, and stage {config.name} enlarges")
    palette, file = load_palette(folder)
    if file.text_digest != config.text_digest:
        raise UserError(f"{folder}: was trained with another text encoder ({file.text_digest[:12]}) than stage "
                        f"{config.name} ({config.text_digest[:12]})")  # fmt: skip
    if config.resolution_px % palette.config.factor:
        raise UserError(f"{folder}: takes sides that are multiples of {palette.config.factor} px, and stage "
                        f"{config.name} draws {config.resolution_px}")  # fmt: skip
    return palette.to(device)
