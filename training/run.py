"""`ldm train` and `ldm encode`: from a config file to a run folder.

    runs/NAME/{config.yaml, environment.json, cache.json, metrics.jsonl, samples/, checkpoints/, final/}
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.config import UserError, load, to_dict, to_yaml
from ldm.weights import read_json, write_json
from training import loop
from training.cache import Cache
from training.tasks import RunConfig, build_task

# Changing these between two legs of a run changes no weight but through its length.
_FREE = ("loop.images", "loop.log_every_images", "loop.preview_every_images", "loop.save_every_images",
         "loop.keep_checkpoints", "cache")  # fmt: skip


def train(config_path: str | Path, run: str | Path | None = None, overrides: Sequence[str] = ()) -> Path:
    """Train a stage as its config says; the same call resumes. Returns RUN/final.

    run: the run folder; None is runs/<config's folder>-<config's name>.
    Raises UserError for a config or data that cannot be used, or a run folder of another config.
    """
    config_path = Path(config_path)
    config = load(RunConfig, config_path, overrides)
    # denormal numbers slow a CPU step tenfold where gradients vanish
    torch.set_flush_denormal(True)
    folder = Path(run) if run else Path("runs") / f"{config_path.resolve().parent.name}-{config_path.stem}"
    state = loop.process_state()
    loop.check_precision(config.loop, state.device)
    with state.main_process_first():
        _check(folder, config)
    task = build_task(config)
    environment = _environment(config)
    key = task.cache.manifest["key"]
    with state.main_process_first():
        if (folder / "cache.json").is_file() and read_json(folder / "cache.json") != key:
            raise UserError(
                f"{folder}: was trained on other data, codec or text encoder than the config's paths now hold (see its "
                "cache.json). Name another folder with --run"
            )
        if state.is_main_process:
            (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            write_json(folder / "environment.json", environment)
            write_json(folder / "cache.json", key)
    facts = {"config": to_dict(config), "cache": key, **environment}
    return loop.train(task, config.loop, config.optim, config.seed, folder, facts)


def encode(config_path: str | Path, overrides: Sequence[str] = ()) -> Cache:
    """Write the caches that a training of this config reads, or find them; returns the training cache."""
    return build_task(load(RunConfig, config_path, overrides)).cache


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    items: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            items.update(_flat(value, f"{prefix}{key}."))
        else:
            items[prefix + key] = value
    return items


def _check(folder: Path, config: Any) -> None:
    """Make the run folder, empty, or check that the one there belongs to this config."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file is in the way of the run folder; name another with --run")
    saved = folder / "config.yaml"
    if saved.is_file():
        old, new = _flat(to_dict(load(RunConfig, saved))), _flat(to_dict(config))
        changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k) and k not in _FREE]
        if changed:
            shown = "\n".join(f"  {k}: {old.get(k)} there, {new.get(k)} now" for k in changed)
            raise UserError(f"{folder}: holds a run of another config:\n{shown}\nName another folder with --run")
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists and is not a run folder; nothing was changed. Name another with --run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another with --run") from None


def _environment(config: Any) -> dict[str, Any]:
    packages = ("torch", "diffusers", "transformers", "accelerate", "numpy")
    return {
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory_format": "channels_last" if config.loop.channels_last else "contiguous",
    }
