"""Checkpoints of a run: a folder of safetensors + JSON, complete exactly when its manifest verifies.

    RUN/checkpoints/step-000000123456/{model,ema,...,optimizer-0}.safetensors, state.json, manifest.json

All files are written and synced under a temporary name, the manifest last; then the folder is renamed; only then
are old ones pruned.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.config import UserError
from ldm.weights import write_json
from training.files import sha256, sweep, sync, temporary

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
STEPS = "step-" + "[0-9]" * 12


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds. tensors: file stem -> whole tensors; state: JSON, with `images`."""

    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]

    @property
    def images(self) -> int:
        return int(self.state["images"])

    @property
    def size_bytes(self) -> int:
        return sum(v.numel() * v.element_size() for group in self.tensors.values() for v in group.values())


def root(run: Path) -> Path:
    return run / "checkpoints"


def path_of(run: Path, images: int) -> Path:
    return root(run) / f"step-{images:012d}"


def save(run: Path, snapshot: Snapshot, keep: int, facts: dict[str, Any]) -> Path:
    """Write a checkpoint beside the old ones, rename it into place, and only then prune to the newest `keep`.

    Raises UserError where a tensor is not finite: such a state must not replace a good one; OSError where the disk
    refuses. Either way nothing older is touched.
    """
    for stem, tensors in snapshot.tensors.items():
        for name, value in tensors.items():
            if not bool(value.isfinite().all()):
                raise UserError(f"{stem}: {name} is not finite at {snapshot.images} images; nothing was saved", 1)
    root(run).mkdir(parents=True, exist_ok=True)
    sweep(root(run))  # the run's lock keeps out living writers
    free = shutil.disk_usage(root(run)).free
    if free < snapshot.size_bytes * 1.01:
        raise OSError(errno.ENOSPC, f"needs {snapshot.size_bytes / 1e6:.0f} MB, {free / 1e6:.0f} MB are free")
    final = path_of(run, snapshot.images)
    partial = temporary(final)
    try:
        _write(partial, snapshot, facts)
        if final.exists():  # damaged, or the run would have resumed from it
            shutil.rmtree(final)
        os.rename(partial, final)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(root(run))
    older = [p for p in sorted(root(run).glob(STEPS)) if p.name <= final.name]
    for old in older[:-keep]:
        shutil.rmtree(old)
    return final


def _write(folder: Path, snapshot: Snapshot, facts: dict[str, Any]) -> None:
    folder.mkdir()
    for stem, tensors in snapshot.tensors.items():
        try:
            save_file({k: v.contiguous() for k, v in tensors.items()}, folder / f"{stem}.safetensors")
        except SafetensorError as error:
            raise OSError(errno.EIO, f"{stem}.safetensors: {error}; needs {snapshot.size_bytes / 1e6:.1f} MB") from None
    write_json(folder / STATE, snapshot.state)
    files = sorted(folder.iterdir())
    for path in files:
        sync(path)
    listed = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    write_json(folder / MANIFEST, {"format": FORMAT, "images": snapshot.images, **facts, "files": listed})
    sync(folder / MANIFEST)
    sync(folder)


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None where every file is as its manifest says."""
    if ".tmp-" in folder.name:
        return "unfinished; the next save sweeps it"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"format {manifest['format']}, this version reads {FORMAT}"
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
                return f"{name} is damaged"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    return None


def poison(folder: Path) -> str | None:
    """The first tensor of a whole checkpoint that holds a value which is not finite, or None."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                    return f"{path.name}: {name} is not finite"
    return None


def newest(run: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are passed over aloud."""
    for folder in sorted(root(run).glob(STEPS), reverse=True):
        reason = fault(folder)
        if reason is None:
            return folder
        print(f"{folder}: passed over: {reason}", flush=True)
    return None


def load(folder: Path) -> Snapshot:
    """Read a verified checkpoint."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    return Snapshot({p.stem: load_file(p) for p in sorted(folder.glob("*.safetensors"))}, state)


def folders(run: Path) -> list[Path]:
    """What lies in RUN/checkpoints, oldest first, the unfinished last. Raises UserError where there is none."""
    found = [*sorted(root(run).glob(STEPS)), *sorted(root(run).glob("*.tmp-*"))]
    if not found:
        raise UserError(f"{run}: no checkpoints there; name the folder of a run")
    return found


def size_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
