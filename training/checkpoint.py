"""Checkpoints of a run: a folder of safetensors + JSON, complete exactly when its manifest verifies.

    RUN/checkpoints/step-000000123456/{model,ema,optimizer}.safetensors, state.json, manifest.json (written last)
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.weights import write_json
from training.cache import sha256

MANIFEST = "manifest.json"
STEPS = "step-" + "[0-9]" * 12


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    state = optimizer.state_dict()
    tensors = {f"{i}.{k}": v for i, entry in state["state"].items() for k, v in entry.items()}
    return tensors, {"param_groups": state["param_groups"]}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(run: Path, images: int, model: nn.Module, ema: nn.Module, optimizers: list[torch.optim.Optimizer],
         keep: int, world_size: int, seconds: float) -> Path:  # fmt: skip
    """Write a checkpoint beside the old ones, rename it into place, and only then prune to the newest `keep`."""
    root = run / "checkpoints"
    partial = root / f"step-{images:012d}.tmp-{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    for name, module in (("model", model), ("ema", ema)):
        tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
        save_file(tensors, partial / f"{name}.safetensors")
    groups = []
    for number, optimizer in enumerate(optimizers):
        tensors, scalars = _optimizer_tensors(optimizer)
        groups.append(scalars)
        contiguous = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        save_file(contiguous, partial / f"optimizer-{number}.safetensors")
    write_json(partial / "state.json", {"images": images, "seconds": seconds, "optimizers": groups})
    files = sorted(partial.iterdir())
    for path in files:
        _sync(path)
    listed = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in files}
    write_json(partial / MANIFEST, {"images": images, "world_size": world_size, "files": listed})
    _sync(partial / MANIFEST)
    final = root / f"step-{images:012d}"
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(root)
    older = [p for p in sorted(root.glob(STEPS)) if p.name <= final.name]
    for old in older[:-keep]:
        shutil.rmtree(old)
    return final


def fault(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None where every file is as its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["bytes"] or sha256(path) != entry["sha256"]:
                return f"{name} is damaged"
    except (OSError, ValueError, KeyError) as error:
        return f"{error}"
    return None


def newest(run: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are passed over aloud."""
    for folder in sorted((run / "checkpoints").glob(STEPS), reverse=True):
        reason = fault(folder)
        if reason is None:
            return folder
        print(f"{folder}: passed over: {reason}", flush=True)
    return None


def restore(folder: Path, model: nn.Module, ema: nn.Module,
            optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:  # fmt: skip
    """Load a verified checkpoint into the parts of a run; returns the images seen and the seconds spent."""
    model.load_state_dict(load_file(folder / "model.safetensors"))
    ema.load_state_dict(load_file(folder / "ema.safetensors"))
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    for number, optimizer in enumerate(optimizers):
        entries: dict[int, dict[str, Tensor]] = {}
        for name, value in load_file(folder / f"optimizer-{number}.safetensors").items():
            index, _, key = name.partition(".")
            entries.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": entries, **state["optimizers"][number]})
        for parameter, entry in optimizer.state.items():
            for key, value in entry.items():
                if value.shape == parameter.shape:  # fused kernels want the parameter's own memory layout
                    entry[key] = torch.empty_like(parameter).copy_(value)
    return int(state["images"]), float(state["seconds"])
