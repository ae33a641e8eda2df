"""`ldm train` and `ldm encode`: from a config file to a run folder.

    runs/NAME/{config.yaml, environment.json, cache.json, chosen.json, metrics.jsonl, samples/, checkpoints/, final/}
"""

from __future__ import annotations

import gc
import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from ldm.config import UserError, load, to_dict, to_yaml
from ldm.weights import read_json, write_json
from training import checkpoint, loop
from training.cache import Cache
from training.diffusion import DiffusionRun
from training.encode import plan as encode_plan
from training.engine import LoopConfig, Resume, check_precision
from training.environment import environment, prepare_process
from training.files import lock, sweep
from training.log import check_trackers
from training.plan import Plan
from training.posthoc import combine
from training.presets import Preset, decoder, tuning
from training.processes import check_world, process_state, together
from training.shapes import check_shapes
from training.stop import Stop
from training.tasks import AnyRun, RunConfig, build_task, load_parts, with_data

# Changing these between two legs of a run changes no weight but through its length, or by the order of sums.
_FREE = ("loop.images", "loop.accumulation", "loop.processes", "loop.process_timeout_s", "loop.sharding",
         "loop.log_every_images", "loop.preview_every_images", "loop.save_every_images", "loop.keep_checkpoints",
         "loop.trackers", "loop.activation_checkpointing", "loop.workers", "data.workers", "data.read_timeout_s",
         "cache")  # fmt: skip
DRY_ROWS = 64


def train(config_path: str | Path, run: str | Path | None = None, overrides: Sequence[str] = (),
          resume: Resume = "auto", dry_run: bool = False, preset: Preset | None = None,
          model: str | Path | None = None) -> Path:  # fmt: skip
    """Train a stage as its config says; the same call resumes. Returns RUN/final.

    config_path: a YAML file, or a data set, which is then trained on as `preset` says, `full` by default, beginning
    from a stage of `model`, by default the shipped one.
    run: the run folder; None is runs/<config's folder>-<config's name>, or runs/<data set>-<preset>. resume: `must`
    refuses to start anew, `never` to go on. dry_run: check config, data and one step of everything in a temporary
    folder, print the plan and stop.
    Raises UserError for a config or data that cannot be used, or a run folder of another config; Interrupted after a
    signal. Called by every process of a launch.
    """
    if resume not in get_args(Resume):
        raise UserError(f"--resume is one of {', '.join(get_args(Resume))}, not {resume}")
    config_path = Path(config_path)
    if config_path.is_dir():
        preset = preset or "full"
        config = (decoder(config_path, model, overrides) if preset == "decoder"
                  else tuning(config_path, preset, model, overrides))  # fmt: skip
        name = f"{config_path.resolve().name}-{preset}"
    elif (preset is not None or model is not None) and not config_path.exists():
        raise UserError(f"{config_path}: no such folder of pictures")
    elif preset is not None or model is not None:
        raise UserError(f"{config_path}: --preset and --model are of data sets; a config says all of that itself")
    else:
        config = load(RunConfig, config_path, overrides)
        name = f"{config_path.resolve().parent.name}-{config_path.stem}"
    folder = Path(run) if run else Path("runs") / name
    with _prepared(config.loop) as stop:
        if dry_run:
            return _rehearse(config, folder, stop)
        return _train(config, folder, resume, stop)


def shapes(config_path: str | Path, overrides: Sequence[str] = ()) -> str:
    """Check a config by one step on the meta device: no data, no weights, no memory; returns what was found."""
    if Path(config_path).is_dir():
        raise UserError(f"{config_path}: --shapes checks a config, and this is a folder; leave --shapes out")
    return check_shapes(load(RunConfig, config_path, overrides), Path(config_path))


def encode(config_path: str | Path, overrides: Sequence[str] = ()) -> Cache:
    """Write the caches that a training of this config reads, or find them; returns the training cache.

    Called by every process of a launch: each writes its share. Started again after whatever end, it goes on.
    """
    config = load(RunConfig, config_path, overrides)
    with _prepared(config.loop):
        config = replace(with_data(config), encode="cached")
        config = replace(config, prior=None) if isinstance(config, DiffusionRun) else config
        cache = build_task(config).cache
    assert isinstance(cache, Cache)
    return cache


def plan(config_path: str | Path, overrides: Sequence[str] = ()) -> str:
    """What encoding would take, here and for a billion pictures, measured on a few; writes nothing."""
    config = load(RunConfig, config_path, overrides)
    with _prepared(config.loop):
        readers, codec, text = load_parts(config)
        scale = config.low_res.scale if isinstance(config, DiffusionRun) and config.low_res and codec else None
        return encode_plan(readers[0], codec, text, scale)


def average(run: Path, length: float, out: Path, images: int | None = None) -> Path:
    """Write the average of sigma_rel `length` after `images` images, from a run's snapshots, as `ldm train` would
    write RUN/final; returns `out`. Raises UserError where the snapshots do not give it or `out` exists."""
    if out.exists():
        raise UserError(f"{out}: exists; name a new folder with --out")
    weights = combine(run, length, images)
    config = load(RunConfig, run / "config.yaml")
    with _prepared(config.loop):
        task = build_task(config)
        task.module.load_state_dict(weights)
        facts = {"config": to_dict(config), "average": {"sigma_rel": length, "images": images}, **environment()}
        task.export(task.module.eval(), out, {**facts, "measures": task.evaluate(task.module)})
    return out


@contextmanager
def _prepared(config: LoopConfig) -> Iterator[Stop]:
    """The process as training wants it; a signal leaves at once until the loop holds state."""
    prepare_process()
    with Stop() as stop, together(), stop.at_once():
        state = process_state(config.process_timeout_s)
        check_world(config.processes)
        check_precision(config, state.device)
        check_trackers(config.trackers)
        yield stop


def _train(config: AnyRun, folder: Path, resume: Resume, stop: Stop,
           until: int | None = None) -> Path:  # fmt: skip
    state, now = process_state(), environment()
    with ExitStack() as held:
        with state.main_process_first():
            _check(folder, config)
            if state.is_main_process:
                held.enter_context(lock(folder / ".lock"))
                sweep(folder)
        task = build_task(config)
        key = task.cache.manifest["key"]
        with state.main_process_first():
            _check_record(folder, key, now)
            if state.is_main_process:
                (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
                write_json(folder / "environment.json", now)
                write_json(folder / "cache.json", key)
        plain = to_dict(config)
        digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
        facts = {"config": plain, "config_digest": digest, "cache": key, **now}
        return loop.train(task, config.loop, config.optim, config.ema, config.seed, folder, facts, stop, resume, until)


def _rehearse(config: AnyRun, folder: Path, stop: Stop) -> Path:
    """Two steps with all that goes with them, the second after a resume, in a folder that goes away."""
    if process_state().num_processes > 1:
        raise UserError("--dry-run checks one process; start it without a launcher")
    batch = config.loop.batch
    with tempfile.TemporaryDirectory(prefix="ldm-dry-run-") as temporary:
        run = Path(temporary) / "run"
        own = replace(config.loop, trackers=(), save_every_images=batch, preview_every_images=batch)
        small = replace(config.shortened(Path(temporary), DRY_ROWS), loop=own)
        _train(small, run, "never", stop, until=batch)
        gc.collect()  # its networks hang in cycles, and the second step needs their memory
        _train(small, run, "must", stop, until=2 * batch)
        assert checkpoint.newest(run) is not None
        chosen = Plan(**read_json(run / "chosen.json"))
        averages = 1 + len(config.ema.powers)
    print(f"dry run: config, at most {DRY_ROWS} items of the data, two steps, report, save, resume and export worked; "
          f"nothing was written to {folder}\n{chosen.text(config.loop, averages, folder)}", flush=True)  # fmt: skip
    return folder


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
            raise UserError(
                f"{folder}: holds a run of another config:\n{shown}\nName another folder with --run; "
                "--init takes over the weights of a finished one"
            )
    elif folder.exists() and any(path.name != ".lock" for path in folder.iterdir()):
        raise UserError(f"{folder}: exists and is not a run folder; nothing was changed. Name another with --run")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); name another with --run") from None


def _check_record(folder: Path, key: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse other data than the run began with; say where equal bits can no longer be expected."""
    if (folder / "cache.json").is_file() and read_json(folder / "cache.json") != key:
        raise UserError(
            f"{folder}: was trained on other data, codec or text encoder than the config's paths now hold (see its "
            "cache.json). Name another folder with --run"
        )
    if (folder / "environment.json").is_file():
        old, new = _flat(read_json(folder / "environment.json")), _flat(now)
        changed = [f"{k} {old.get(k)} -> {new[k]}" for k in new if old.get(k) != new[k]]
        if changed and process_state().is_main_process:
            print(f"not bit for bit as in one go from here on: {', '.join(changed)}", flush=True)
