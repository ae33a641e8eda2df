"""What a run survives: real kills of real processes, full disks, damaged checkpoints, signals, numbers gone bad."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldm.config import UserError, load
from tests.faults import CONTEXT, INTERRUPTED, output, start_training
from training import checkpoint, encoders, loop, tasks
from training.checkpoint import Snapshot
from training.run import train
from training.stop import Interrupted, Stop
from training.tasks import RunConfig, build_task

ROOT = Path(__file__).parent.parent
STEPS = 20
TEXT = {"base_clip": "clip", "base_t5": "t5"}
# the data holds 93 pictures for training: 320 images end in the fourth epoch
SETTINGS = [f"loop.images={16 * STEPS}", "loop.log_every_images=16", "loop.save_every_images=32",
            "loop.preview_every_images=160", "loop.trackers=[]"]  # fmt: skip


def settings(folder: Path, name: str, *more: str) -> list[str]:
    own = [*SETTINGS, f"data.path={ROOT / 'tests/data/emoji'}", f"cache={folder / 'cache'}"]
    if name != "autoencoder":
        own.append(f"codec={folder / 'autoencoder/final'}")
    if name in TEXT:
        own.append(f"text.path={ROOT / 'tests/data/text' / TEXT[name]}")
    return [*own, *more]


def config_of(name: str) -> Path:
    return ROOT / f"configs/tiny/{name}.yaml"


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.newest(run)
    assert found is not None
    return {f"{p.stem}.{k}": v for p in found.glob("*.safetensors") for k, v in load_file(p).items()}


def assert_equal_ends(a: Path, b: Path) -> None:
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted runs of the tiny configs, by name, written by children as the killed ones are."""
    place = tmp_path_factory.mktemp("faults")
    straight(place, "autoencoder")
    straight(place, "base_t5")
    return place


def straight(place: Path, name: str) -> Path:
    if not (place / name / "final").exists():
        child = start_training(config_of(name), place / name, settings(place, name))
        child.join(120)
        assert child.exitcode == 0, output(place / name)
    return place / name


def kill_until_done(place: Path, name: str, run: Path, kills: int, seed: int, more: tuple[str, ...] = ()) -> list[str]:
    """Train in children; each of the first `kills` gets SIGKILL at a random time. Returns where each was."""
    draw = random.Random(seed)
    ends = []
    for number in range(kills + 1):
        child = start_training(config_of(name), run, settings(place, name, *more))
        if number < kills:
            while child.is_alive() and not (run / "config.yaml").exists():
                time.sleep(0.02)
            child.join(draw.uniform(0.0, 1.5))
            child.kill()
        child.join(120)
        valid = [p.name for p in checkpoint.root(run).glob(checkpoint.STEPS) if checkpoint.fault(p) is None]
        ends.append(f"{child.exitcode} {max(valid, default='no checkpoint')}")
        assert child.exitcode in (0, -signal.SIGKILL), output(run)
        # a run that has saved once never again lacks a whole checkpoint
        assert valid or not any(checkpoint.root(run).glob(checkpoint.STEPS))
    assert child.exitcode == 0, output(run)
    return ends


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


class TestKill:
    @pytest.mark.parametrize(("name", "seed"), [
        pytest.param("autoencoder", 1, marks=pytest.mark.slow), ("base_t5", 2)
    ])  # fmt: skip
    def test_killed_run_ends_bit_equal(self, folder: Path, tmp_path: Path, name: str, seed: int) -> None:
        kill_until_done(folder, name, tmp_path / "run", 2, seed)
        assert_equal_ends(tmp_path / "run", folder / name)

    @pytest.mark.slow
    def test_fifty_kills_over_all_kinds(self, folder: Path, tmp_path: Path) -> None:
        """Run with -s to see where each kill fell."""
        kinds = ["autoencoder", "base", "base_clip", "base_t5", "sr"]
        kills = 0
        for round_number in range(14):
            name = kinds[round_number % len(kinds)]
            straight(folder, name)
            run = tmp_path / f"{name}-{round_number}"
            ends = kill_until_done(folder, name, run, 4, 100 + round_number, ("loop.save_every_images=16",))
            kills += sum(end.startswith("-9") for end in ends)
            print(f"{name}: {', '.join(ends)}", flush=True)
            assert_equal_ends(run, folder / name)
        print(f"{kills} kills", flush=True)
        assert kills >= 50


def tiny_snapshot(images: int) -> Snapshot:
    tensors = {"model": {"weight": torch.full((64,), float(images))}, "ema": {"weight": torch.zeros(64)}}
    return Snapshot(tensors, {"images": images})


def save_and_die(run: Path, boundary: int, count: Path) -> None:
    """Save at 16 images; then at 32, and die before or after the `boundary`-th call that touches the disk."""
    checkpoint.save(run, tiny_snapshot(16), 1, {})
    passed = 0

    def gate() -> None:
        nonlocal passed
        if passed == boundary:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    def gated(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            gate()
            result = function(*args, **kwargs)
            gate()
            return result

        return call

    for owner, name in ((checkpoint, "save_file"), (checkpoint, "write_json"), (checkpoint, "sync"), (os, "rename"),
                        (shutil, "rmtree"), (Path, "mkdir"), (os, "unlink")):  # fmt: skip
        setattr(owner, name, gated(getattr(owner, name)))
    checkpoint.save(run, tiny_snapshot(32), 1, {})
    count.write_text(str(passed))


def test_death_at_every_write_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    boundary, kept = 0, []
    while not (tmp_path / "count").exists():
        run = tmp_path / str(boundary)
        child = CONTEXT.Process(target=save_and_die, args=(run, boundary, tmp_path / "count"))
        child.start()
        child.join(60)
        found = checkpoint.newest(run)
        assert found is not None, f"no whole checkpoint after boundary {boundary}"
        images = checkpoint.load(found).images
        assert float(load_file(found / "model.safetensors")["weight"][0]) == images
        kept.append(images)
        # the next save sweeps what was left
        checkpoint.save(run, tiny_snapshot(48), 1, {})
        assert [p.name for p in checkpoint.root(run).iterdir()] == ["step-000000000048"]
        boundary += 1
    assert int((tmp_path / "count").read_text()) == boundary - 1 > 25
    assert kept == sorted(kept)
    assert set(kept) == {16, 32}


class TestDisk:
    @pytest.mark.parametrize("number", [
        errno.ENOSPC, *(pytest.param(n, marks=pytest.mark.slow) for n in (errno.EDQUOT, errno.EIO, errno.EROFS))
    ])  # fmt: skip
    def test_a_refused_save_costs_nothing(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        number: int,
    ) -> None:  # fmt: skip
        real, calls = checkpoint.write_json, []

        def refuse(path: Path, data: Any) -> None:
            calls.append(path)
            if 3 <= len(calls) <= 4:
                raise OSError(number, os.strerror(number))
            real(path, data)

        monkeypatch.setattr(checkpoint, "write_json", refuse)
        train(config_of("base_t5"), tmp_path / "run", settings(folder, "base_t5"))
        assert f"not saved: {os.strerror(number)}" in capsys.readouterr().out
        assert_equal_ends(tmp_path / "run", folder / "base_t5")
        assert not list(checkpoint.root(tmp_path / "run").glob("*.tmp-*"))

    @pytest.mark.slow
    def test_a_file_limit_of_the_system_stops_the_last_save_with_a_message(self, folder: Path, tmp_path: Path) -> None:
        limit = (200_000, 200_000)
        child = start_training(config_of("base_t5"), tmp_path / "run", settings(folder, "base_t5"),
                               resource.setrlimit, (resource.RLIMIT_FSIZE, limit))  # fmt: skip
        child.join(120)
        said = output(tmp_path / "run")
        assert child.exitcode == 1, said
        assert "not saved" in said
        assert "Traceback" not in said
        child = start_training(config_of("base_t5"), tmp_path / "run", settings(folder, "base_t5"))
        child.join(120)
        assert_equal_ends(tmp_path / "run", folder / "base_t5")

    def test_too_little_room_is_known_before_writing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint.save(tmp_path, tiny_snapshot(16), 1, {})
        usage = shutil.disk_usage(tmp_path)._replace(free=100)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(OSError, match="needs 0 MB, 0 MB are free"):
            checkpoint.save(tmp_path, tiny_snapshot(32), 1, {})
        assert [p.name for p in checkpoint.root(tmp_path).iterdir()] == ["step-000000000016"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def newer(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": checkpoint.FORMAT + 1}))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda c: os.truncate(c / "ema.safetensors", 100),
    "bit flipped": lambda c: flip(c / "model.safetensors"),
    "missing file": lambda c: (c / "optimizer-0.safetensors").unlink(),
    "empty file": lambda c: os.truncate(c / "state.json", 0),
    "state changed": lambda c: flip(c / "state.json"),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "manifest of nonsense": lambda c: (c / "manifest.json").write_text("[]"),
    "newer format": newer,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_seen_and_passed_over_aloud(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(folder / "base_t5", run)  # a copy is as good as the original
    newest, older = sorted(checkpoint.root(run).iterdir(), reverse=True)
    DAMAGE[kind](newest)
    assert checkpoint.newest(run) == older
    assert f"{newest}: passed over" in capsys.readouterr().out
    shutil.rmtree(older)
    for resume in ("auto", "must"):
        with pytest.raises(UserError, match="none of its checkpoints is whole"):
            train(config_of("base_t5"), run, settings(folder, "base_t5"), resume)  # type: ignore[arg-type]
    assert newest.exists()


def test_resume_must_and_never(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint"):
        train(config_of("base_t5"), tmp_path / "new", settings(folder, "base_t5"), "must")
    with pytest.raises(UserError, match="never starts anew"):
        train(config_of("base_t5"), folder / "base_t5", settings(folder, "base_t5"), "never")
    with pytest.raises(UserError, match="one of auto, must, never"):
        train(config_of("base_t5"), tmp_path / "new", settings(folder, "base_t5"), "always")  # type: ignore[arg-type]


def test_a_copied_run_goes_on_elsewhere(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "moved" / "run"
    shutil.copytree(folder / "base_t5", run)
    for name in sorted(checkpoint.root(run).iterdir())[1:]:
        shutil.rmtree(name)
    shutil.rmtree(run / "final")
    train(config_of("base_t5"), run, settings(folder, "base_t5"), "must")
    assert_equal_ends(run, folder / "base_t5")


def hold_at_step(step: int, mark: Path) -> None:
    """The training waits at this step for ever."""
    real, count = loop._step, 0

    def waiting(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == step:
            mark.touch()
            time.sleep(600)
        return real(*args)

    loop._step = waiting  # type: ignore[assignment]


def test_a_second_process_is_refused_and_a_dead_one_holds_no_lock(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start_training(config_of("base_t5"), run, settings(folder, "base_t5"), hold_at_step, (6, tmp_path / "mark"))
    wait_for((tmp_path / "mark").exists, 60)
    with pytest.raises(UserError, match=rf'another process is writing there \(\{{"pid": {child.pid}, "host"'):
        train(config_of("base_t5"), run, settings(folder, "base_t5"))
    child.kill()
    child.join(60)
    train(config_of("base_t5"), run, settings(folder, "base_t5"))
    assert_equal_ends(run, folder / "base_t5")


def signal_in(place: str, number: int) -> None:
    """Make the training get a signal in the midst of a part of its work, which then would last for minutes."""
    def slow(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), number)
        time.sleep(300)

    def step(*args: Any) -> Any:
        os.kill(os.getpid(), number)
        taken = real_step(*args)
        # a scheduler tells the workers too, and is not their parent
        subprocess.run(["kill", f"-{number}", *(str(w.pid) for w in multiprocessing.active_children())], check=True)
        return taken

    real_step = loop._step
    if place == "step":
        loop._step = step  # type: ignore[assignment]
    elif place == "evaluation":
        tasks.DiffusionTask.evaluate = slow  # type: ignore[method-assign]
    elif place == "preview":
        tasks.DiffusionTask.preview = slow  # type: ignore[method-assign]
    elif place == "encode":
        encoders.LatentSums.add = slow  # type: ignore[method-assign]
    elif place == "start":
        tasks.load_text_encoder = slow  # type: ignore[attr-defined]


@pytest.mark.parametrize(("place", "number"), [
    ("step", signal.SIGTERM), ("preview", signal.SIGUSR1), ("encode", signal.SIGINT),
    *(pytest.param(place, number, marks=pytest.mark.slow) for place, number in (
        ("step", signal.SIGINT), ("step", signal.SIGUSR1), ("evaluation", signal.SIGINT), ("preview", signal.SIGTERM),
        ("encode", signal.SIGTERM), ("encode", signal.SIGUSR1), ("start", signal.SIGUSR1), ("start", signal.SIGINT),
    )),
])  # fmt: skip
def test_signals_leave_in_order(folder: Path, tmp_path: Path, place: str, number: int) -> None:
    workers = 2 if place == "step" else 0
    run, more = tmp_path / "run", (f"cache={tmp_path / 'cache'}", f"loop.workers={workers}")
    child = start_training(config_of("base_t5"), run, settings(folder, "base_t5", *more), signal_in, (place, number))
    child.join(100)
    assert child.exitcode == INTERRUPTED, output(run)
    assert "Traceback" not in output(run)
    if place == "step":
        assert checkpoint.newest(run) is not None
    child = start_training(config_of("base_t5"), run, settings(folder, "base_t5", *more))
    child.join(100)
    assert child.exitcode == 0, output(run)
    assert_equal_ends(run, folder / "base_t5")
    assert (run / "samples/000000000.png").exists()


def test_a_second_interrupt_leaves_at_once(folder: Path, tmp_path: Path) -> None:
    child = start_training(config_of("base_t5"), tmp_path / "run", settings(folder, "base_t5"), hold_at_step,
                           (3, tmp_path / "mark"))  # fmt: skip
    wait_for((tmp_path / "mark").exists, 60)
    os.kill(child.pid, signal.SIGINT)
    os.kill(child.pid, signal.SIGINT)  # a launcher's echo of the first
    time.sleep(1.3)
    assert child.is_alive()
    os.kill(child.pid, signal.SIGINT)
    child.join(10)
    assert child.exitcode == -signal.SIGINT


def test_stop_notes_outside_and_raises_inside_at_once() -> None:
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
        with pytest.raises(Interrupted), stop.at_once():
            pytest.fail("not reached")
    with Stop() as stop, stop.at_once(), pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGTERM)
    with Stop() as stop, stop.at_once(), stop.noted():
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


class TestNumbers:
    """Values that are not finite, wherever they come from, reach neither a checkpoint nor the averages."""

    @pytest.fixture
    def config(self, folder: Path) -> Any:
        return load(RunConfig, config_of("base_t5"), settings(folder, "base_t5"))

    def run(self, config: Any, task: Any, run: Path) -> Path:
        with Stop() as stop:
            return loop.train(task, config.loop, config.optim, config.ema, 0, run, {}, stop)

    def test_one_bad_loss_is_skipped(
        self, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task, real, count = build_task(config), loop._step, 0

        def step(live: Any, *args: Any) -> Any:
            nonlocal count
            count += 1
            if count != 5:
                return real(live, *args)
            before = {k: v.clone() for k, v in live.bare.state_dict().items()}
            hook = live.bare.register_forward_hook(
                lambda m, a, out: out._replace(losses=[out.losses[0] * float("inf")])
            )
            result = real(live, *args)
            hook.remove()
            assert all(torch.equal(v, before[k]) for k, v in live.bare.state_dict().items())
            return result

        monkeypatch.setattr(loop, "_step", step)
        self.run(config, task, tmp_path)
        assert count == STEPS
        out = capsys.readouterr().out
        assert out.count("step skipped") == 1
        assert ".png" in out.partition("step skipped")[2].partition("\n")[0]
        assert all(v.isfinite().all() for v in weights(tmp_path).values())

    @pytest.mark.parametrize("where", ["weight", "gradient", "latent"])
    def test_a_source_of_bad_numbers_stops_the_run(self, config: Any, tmp_path: Path, where: str) -> None:
        task = build_task(config)
        parameter = task.module.denoiser.net.conv_in.weight
        if where == "weight":
            with torch.no_grad():
                parameter[0, 0, 0, 0] = float("nan")
        elif where == "gradient":
            parameter.register_hook(lambda g: g.index_fill(0, torch.tensor([0]), float("nan")))
        else:
            stored = task.cache.stored
            task.cache.stored = lambda indices: stored(indices) * float("nan")  # type: ignore[method-assign]
        with pytest.raises(UserError, match=r"10 steps in a row|conv_in.weight is not finite at 32 images"):
            self.run(config, task, tmp_path)
        found = checkpoint.newest(tmp_path)
        assert found is None or all(v.isfinite().all() for v in load_file(found / "ema.safetensors").values())

    @pytest.mark.parametrize("where", ["optimizer", "average"])
    def test_a_poisoned_state_is_never_saved(
        self, config: Any, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task, real, count = build_task(config), loop._step, 0

        def step(live: Any, *args: Any) -> Any:
            nonlocal count
            count += 1
            if count == 4:
                if where == "optimizer":
                    state = next(iter(live.optimizers[0].optimizer.state.values()))
                    state["exp_avg"].view(-1)[0] = float("nan")
                else:
                    next(live.ema.module.parameters()).data.view(-1)[0] = float("nan")
            return real(live, *args)

        monkeypatch.setattr(loop, "_step", step)
        with pytest.raises(UserError, match="is not finite at 64 images; nothing was saved"):
            self.run(config, task, tmp_path)
        found = checkpoint.newest(tmp_path)
        assert found is not None
        assert checkpoint.load(found).images == 32
