"""Processes that read: killed for real, hanging for real, and the results compared with those of no processes."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image

from ldm import decode
from ldm.config import UserError
from training import data as reading
from training import workers
from training.data import DataConfig, Reader
from training.workers import Broken, Pool, Slow

ROOT = Path(__file__).parent.parent
REAL = decode.try_fit


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "PAUSE_S", 0.01)


# ---- functions that the processes call


def square_of(item: int) -> int:
    return item * item


def obey(item: tuple[str, str]) -> str:
    """Do once, or always, what the first word says; a file remembers what was done once."""
    command, marker = item
    if command.startswith("once"):
        try:
            os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return "done"
    if command.endswith("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    if command.endswith("hang"):
        time.sleep(60)
    if command == "raise":
        raise ValueError("a fault of the function")
    return "done"


def echo(item: Any) -> Any:
    return item


def process_of(_: Any) -> int:
    time.sleep(0.005)  # so that both workers get some
    return os.getpid()


def treacherous(source: decode.Source | str, **options: Any) -> Any:
    """As try_fit, but for files whose name says that they hang or kill."""
    name = Path(source if isinstance(source, str) else source.path).name
    obey((name.partition(".")[0].partition("_")[2], ""))
    return REAL(source, **options)


def children() -> set[int]:
    found = set()
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # gone, or a zombie, since it was listed
            if any("training.workers" in part for part in process.cmdline()):
                found.add(process.pid)
    return found


def kill(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---- the pool


@pytest.mark.parametrize("count", [1, 3])
def test_order_and_number_of_results(count: int) -> None:
    pool = Pool(square_of, count, 30)
    for size in (0, 1, 5, 300):
        assert list(pool.map(range(size))) == [i * i for i in range(size)]
    pool.close()


def test_items_are_taken_as_needed() -> None:
    taken = []

    def endless() -> Any:
        while True:
            taken.append(len(taken))
            yield taken[-1]

    results = Pool(square_of, 2, 30).map(endless())
    assert [next(results) for _ in range(100)] == [i * i for i in range(100)]
    assert len(taken) <= 100 + workers.CHUNK * (workers.WINDOW + 1)
    results.close()


def test_two_calls_at_once() -> None:
    pool = Pool(square_of, 2, 30)
    pairs = list(zip(pool.map(range(100)), pool.map(range(100)), strict=True))
    assert pairs == [(i * i, i * i) for i in range(100)]


def test_large_items_and_results() -> None:
    items = [np.full(500_000, i, np.uint8) for i in range(20)]
    assert all((a == b).all() for a, b in zip(Pool(echo, 2, 30).map(items), items, strict=True))


def test_a_killed_process_loses_and_doubles_nothing(tmp_path: Path) -> None:
    items = [("once die" if i % 7 == 3 else "work", str(tmp_path / str(i))) for i in range(40)]
    assert list(Pool(obey, 2, 30).map(items)) == ["done"] * 40
    assert len(list(tmp_path.iterdir())) == 6  # each of them did die


def test_processes_killed_from_outside() -> None:
    pool = Pool(square_of, 2, 30)
    found = []
    for result in pool.map(range(600)):
        if len(found) in (50, 200, 500):
            kill(children())
        found.append(result)
    assert found == [i * i for i in range(600)]
    kill(children())  # while idle
    assert list(pool.map(range(20))) == [i * i for i in range(20)]


def test_an_item_that_always_kills_is_told_when_its_turn_comes() -> None:
    items = [("work", "")] * 9 + [("die", "")] + [("work", "")] * 9
    results = Pool(obey, 2, 30).map(items)
    assert [next(results) for _ in range(9)] == ["done"] * 9
    with pytest.raises(Broken, match="SIGKILL"):
        next(results)


def test_processes_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_PROGRAM", "raise SystemExit(7)")
    with pytest.raises(Broken, match="exit code 7"):
        list(Pool(square_of, 1, 30).map([1]))


def test_a_hang_is_tried_again_and_then_given_up(tmp_path: Path) -> None:
    items = [("work", "")] * 20
    items[2], items[11] = ("once hang", str(tmp_path / "once")), ("hang", "")
    found = list(Pool(obey, 2, 1.0).map(items))
    assert isinstance(found.pop(11), Slow)
    assert found == ["done"] * 19


def test_a_stopped_process_counts_as_hanging() -> None:
    pool = Pool(square_of, 1, 1.0)
    assert list(pool.map([3])) == [9]
    for pid in children():
        os.kill(pid, signal.SIGSTOP)
    assert list(pool.map([4, 5])) == [16, 25]


def test_exceptions_come_with_their_trace() -> None:
    results = Pool(obey, 1, 30).map([("work", ""), ("raise", "")])
    assert next(results) == "done"
    with pytest.raises(RuntimeError, match="ValueError: a fault of the function"):
        next(results)


def test_leaving_early_ends_what_hangs() -> None:
    others = children()
    pool = Pool(obey, 2, 600)
    results = pool.map([("work", "")] * 8 + [("hang", "")] * 8)
    next(results)
    results.close()  # would take minutes, were it to wait
    pool.close()
    assert children() <= others


def test_signals_to_the_whole_job_leave_the_workers_to_their_parent() -> None:
    pool = Pool(process_of, 2, 30)
    before = set(pool.map(range(40)))
    for pid in children():
        for which in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(pid, which)
    assert set(pool.map(range(40))) <= before


def test_workers_are_light() -> None:
    code = "import sys; import training.workers, ldm.decode; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"PIL.Image", "numpy"} <= set(modules.split())
    assert not {"torch", "datasets", "pyarrow", "pydantic", "yaml"} & set(modules.split())


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"  # without a main guard, which multiprocessing's own processes would need
    script.write_text(
        "import os, operator, psutil, signal, time\n"
        "from training.workers import Pool\n"
        "pool = Pool(operator.neg, 2, 30)\n"
        "assert list(pool.map(range(50))) == [-i for i in range(50)]\n"
        "print(*(p.pid for p in psutil.Process().children()), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in done.stdout.split()]
    assert pids
    _, alive = psutil.wait_procs([psutil.Process(p) for p in pids if psutil.pid_exists(p)], timeout=20)
    assert not alive


# ---- reading through it


def fill(folder: Path, count: int) -> None:
    folder.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")
        (folder / f"{i:03}.txt").write_text(f"picture {i}")


def all_of(reader: Reader) -> list[Any]:
    return [(e.key, e.captions, e.fields, e.pixels.tobytes()) for e in reader]


def test_same_examples_whatever_the_number_of_workers(tmp_path: Path) -> None:
    fill(tmp_path / "set", 60)
    for i in (5, 17):
        (tmp_path / "set" / f"{i:03}.png").write_bytes(b"\x89PNG")
    (tmp_path / "set" / "030.txt").write_bytes(b"\xff\xfe")
    config = DataConfig(path=str(tmp_path / "set"), size_px=16, max_bad=0.1)
    alone = Reader(config, shard_items=13)
    expected = all_of(alone)
    assert len(expected) == 57
    for count in (1, 3):
        reader = Reader(replace(config, workers=count), shard_items=13)
        for _ in range(2):
            assert all_of(reader) == expected
            assert vars(reader.report) == vars(alone.report)
    assert alone.report.bad == [
        ("005.png", "not an image"), ("017.png", "not an image"), ("030.png", "'030.txt' is UTF-16, not UTF-8")
    ]  # fmt: skip


def test_killed_while_reading(tmp_path: Path) -> None:
    fill(tmp_path / "set", 200)
    config = DataConfig(path=str(tmp_path / "set"), size_px=16)
    expected = all_of(Reader(config))
    reader, found = Reader(replace(config, workers=2)), []
    for example in reader:
        if len(found) in (10, 90):
            kill(children())
        found.append((example.key, example.captions, example.fields, example.pixels.tobytes()))
    assert found == expected
    assert (reader.report.seen, reader.report.kept) == (200, 200)


def test_a_hanging_file_is_bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "try_fit", treacherous)
    fill(tmp_path / "set", 12)
    os.rename(tmp_path / "set/005.png", tmp_path / "set/005_hang.png")
    config = DataConfig(path=str(tmp_path / "set"), size_px=16, max_bad=0.1, workers=2, read_timeout_s=1)
    reader = Reader(config)
    assert [e.key for e in reader] == [f"{i:03}.png" for i in range(12) if i != 5]
    assert reader.report.bad == [("005_hang.png", "reading took over 1 s")]


def test_a_file_that_kills_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "try_fit", treacherous)
    fill(tmp_path / "set", 12)
    os.rename(tmp_path / "set/005.png", tmp_path / "set/005_die.png")
    reader = Reader(DataConfig(path=str(tmp_path / "set"), size_px=16, workers=2))
    with pytest.raises(UserError, match=r"005_die\.png ends its process, 3 times: signal 9: SIGKILL\. .*workers"):
        list(reader)


@pytest.mark.parametrize("count", [0, 2])
def test_a_file_that_vanishes(tmp_path: Path, count: int) -> None:
    fill(tmp_path / "set", 300)
    reader = Reader(DataConfig(path=str(tmp_path / "set"), size_px=16, workers=count))
    keys = []
    for example in reader:
        if not keys:
            (tmp_path / "set/250.png").unlink()
        keys.append(example.key)
    assert keys == [f"{i:03}.png" for i in range(300) if i != 250]
    assert reader.report.bad == [("250.png", "cannot be read (No such file or directory)")]
