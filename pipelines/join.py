"""`ldm ckpt join`: stages that were trained apart -> one cascade folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from ldm.config import UserError
from ldm.weights import Codec, load_codec
from pipelines.cascade import FORMAT, Cascade, CascadeConfig, check_chain, load_cascade, load_own_palette
from pipelines.stage import Stage


def join(folders: Sequence[str | Path], out: str | Path, codec: str | Path | None = None,
         palette: str | Path | None = None) -> Path:  # fmt: skip
    """Write the stages of cascade folders, in order, as one cascade into `out`; returns it.

    codec: one that takes the place of every codec with the same encoder, such as one whose decoder learned on. Raises
    UserError where there is none such. palette: a palette's folder, for the first stage.
    Raises UserError where a stage does not enlarge what the one before makes, names repeat, or `out` exists. Stages
    may differ in their codecs, but share the text encoder of the first folder that must be all of theirs.
    """
    parts = [load_cascade(folder) for folder in folders]
    stages: list[Stage] = []
    taken: dict[str, str] = {}
    for part, folder in zip(parts, folders, strict=True):
        if part.text.digest != parts[0].text.digest:
            raise UserError(f"{folder}: another text encoder than that of {folders[0]}; train one stage again with it")
        for stage in part.stages:
            name = next(n for n in _codec_names(stage.config.codec) if taken.get(n, stage.codec.digest)
                        == stage.codec.digest)  # fmt: skip
            taken[name] = stage.codec.digest
            stages.append(replace(stage, config=replace(stage.config, codec=name)))
    names = tuple(stage.config.name for stage in stages)
    try:
        CascadeConfig(FORMAT, names, parts[0].text.config)
    except ValueError as error:
        raise UserError(str(error)) from None
    check_chain([stage.config for stage in stages])
    if codec is not None:
        stages = _with_codec(stages, load_codec(codec), str(codec))
    if palette is not None:
        stages[0] = replace(stages[0], palette=load_own_palette(Path(palette), stages[0].config))
    Cascade(stages, parts[0].text).save(Path(out))
    for part, folder in zip(parts, folders, strict=True):
        name = "-".join(stage.config.name for stage in part.stages)
        if (Path(folder) / "training.json").is_file():
            shutil.copyfile(Path(folder) / "training.json", Path(out) / f"training-{name}.json")
        for card in Path(folder).glob("training-*.json"):  # of what was joined before
            shutil.copyfile(card, Path(out) / card.name)
    for part_name, own in (("codec", codec), ("palette", palette)):
        if own is not None:
            (Path(out) / f"training-{part_name}.json").unlink(missing_ok=True)
            if (Path(own) / "training.json").is_file():
                shutil.copyfile(Path(own) / "training.json", Path(out) / f"training-{part_name}.json")
    return Path(out)


def _with_codec(stages: Sequence[Stage], codec: Codec, name: str) -> list[Stage]:
    """Stages with another codec, where that encodes to the same latents."""
    fits = [stage.codec.module.autoencoder is not None and stage.codec.latents_digest == codec.latents_digest
            for stage in stages]  # fmt: skip
    if not any(fits):
        raise UserError(f"{name}: no stage draws in the latents of this encoder")
    return [replace(stage, codec=codec) if same else stage for stage, same in zip(stages, fits, strict=True)]


def _codec_names(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}_{number}" for number in count(2))
