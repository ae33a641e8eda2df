"""Where a model lies: a folder here, or a repository of the Hugging Face Hub, fetched where it is named so.

    folder, or hf:owner/name -> located -> folder;  a folder of pickles -> unpickled -> a folder of safetensors
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from ldm.config import UserError

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")  # whose weights are read
HUB = "hf:"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CONFIGS = ("*.json", "*.txt")
WEIGHTS = ("*/diffusion_pytorch_model.safetensors", "*/model.safetensors", "*/model-*-of-*.safetensors",
           "*/open_clip_model.safetensors")  # fmt: skip
_PICKLED = {"diffusion_pytorch_model.bin": "diffusion_pytorch_model.safetensors",
            "pytorch_model.bin": "model.safetensors"}  # fmt: skip
_UNUSED = ("safety_checker/*", "feature_extractor/*", "image_encoder/*", "*.fp16.*", "*.non_ema.*")


def located(model: str | Path, wanted: Sequence[str] = (*CONFIGS, *WEIGHTS)) -> Path:
    """The folder of a model: itself, or of `hf:owner/name` what is `wanted` of it, fetched into the Hub's own cache.

    Raises UserError where that fails.
    """
    name = str(model)
    if not name.startswith(HUB):
        if not Path(model).exists() and _ID.fullmatch(name):
            raise UserError(f"{name}: no such folder; if it is an id of the Hugging Face Hub, say {HUB}{name}")
        return Path(model)
    name = name.removeprefix(HUB)
    if not _ID.fullmatch(name):
        raise UserError(f"{model}: an id of the Hub is {HUB}owner/name")
    from huggingface_hub import snapshot_download  # takes seconds

    try:
        return Path(snapshot_download(name, allow_patterns=list(wanted), ignore_patterns=list(_UNUSED)))
    except Exception as error:  # of every kind: no network, no such repository, a gated one, no cached copy
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{model}: cannot be fetched: {told}") from None


@contextmanager
def unpickled(folder: Path) -> Iterator[Path]:
    """A copy of a pipeline folder, there for a while, with pickled weights as safetensors. They are opened as tensors
    alone (`weights_only`), which refuses all else that a pickle can hold. Raises UserError where one holds such."""
    with TemporaryDirectory(prefix="ldm-") as temporary:
        copy = Path(temporary) / folder.name
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            place = copy / path.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            wanted = _PICKLED.get(path.name) if path.parent.name in PARTS else None
            if wanted is None or path.with_name(wanted).exists():
                if path.suffix not in (".bin", ".ckpt", ".pt", ".pth", ".pkl"):
                    _linked(path, place)
                continue
            save_file(_tensors(path), place.with_name(wanted))
        yield copy


@contextmanager
def readable(source: Path, like: Path | None = None, pickles: bool = False) -> Iterator[Path]:
    """A pipeline folder of whatever `ldm import` takes: a folder or Hub id, whose pickles are opened where that is
    asked for, or a single file with a folder or id `like` of the same architecture."""
    if source.is_file():
        from pipelines.single_file import as_folder  # it loads pipelines of diffusers

        if like is None:
            raise UserError(f"{source}: a single file says nothing of its architecture: name a pipeline folder, or "
                            "a Hub id, of the same one with --config")  # fmt: skip
        with as_folder(source, located(like, CONFIGS)) as folder:
            yield folder
    elif pickles:
        place = located(source, (*CONFIGS, *WEIGHTS, *(f"*/{name}" for name in _PICKLED)))
        if not place.is_dir():
            raise UserError(f"{source}: no such folder")
        with unpickled(place) as folder:
            yield folder
    else:
        yield located(source)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: holds more than tensors, or is damaged: {told}") from None
    if not isinstance(found, dict) or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise UserError(f"{path}: not a table of tensors by name")
    return {str(name): value.contiguous().clone() for name, value in found.items()}  # safetensors share no memory


def _linked(path: Path, place: Path) -> None:
    try:
        os.symlink(path.resolve(), place)
    except OSError:  # not on every file system
        shutil.copyfile(path, place)
