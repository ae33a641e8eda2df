"""Writing a cache by several processes, by killed processes, and by two jobs at once: always the same bytes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.cascade import Cascade, load_cascade
from tests.encode_job import encode_all

ROOT = Path(__file__).parent.parent
TWO = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PATIENCE_S = 120


def contents(root: Path) -> dict[str, bytes]:
    """Every file of the one cache under `root`, by name."""
    (folder,) = root.iterdir()
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


@pytest.fixture(scope="module")
def cascade(tiny_folder: Path) -> Cascade:
    return load_cascade(tiny_folder)


@pytest.fixture(scope="module")
def straight(cascade: Cascade, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The cache as one process writes it in one go."""
    root = tmp_path_factory.mktemp("straight")
    encode_all(cascade, root)
    return contents(root)


@pytest.fixture
def start(tiny_folder: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts tests/encode_job.py on a cache under tmp_path/cache; whatever still runs in the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def launch(*launcher: str, pause: float = 0) -> subprocess.Popen[str]:
        script = [str(ROOT / "tests/encode_job.py"), str(tiny_folder), str(tmp_path / "cache"), str(pause)]
        threads = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        job = subprocess.Popen(
            [sys.executable, *launcher, *script], env=os.environ | threads, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(job)
        return job

    yield launch
    for job in started:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
        job.communicate()


def wait_for(root: Path, *names: str) -> Path:
    """The folder of the cache under `root`, once it has these files."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        for folder in root.glob("*"):
            if all((folder / name).exists() for name in names):
                return folder
        time.sleep(0.02)
    raise AssertionError(f"{names} did not appear in {[str(p) for p in root.rglob('*')]}")


def end_of(job: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output, waiting for the end."""
    output, _ = job.communicate(timeout=PATIENCE_S)
    return job.returncode, output


def test_two_processes_write_the_same_bytes(start: Any, straight: dict[str, bytes], tmp_path: Path) -> None:
    code, output = end_of(start(*TWO))
    assert code == 0, output
    assert output.count("encoded") == 2
    written = contents(tmp_path / "cache")
    assert written == straight
    assert {"shard-00005.json", "text-00004.safetensors", "index.safetensors", "manifest.json"} <= written.keys()


@pytest.mark.parametrize("phase", [
    "shard-00001.json", pytest.param("text-00001.json", marks=pytest.mark.slow)
])  # fmt: skip
def test_killed_and_started_again(
    start: Any, cascade: Cascade, straight: dict[str, bytes], tmp_path: Path, phase: str
) -> None:
    """SIGKILL among the pictures, and among the captions."""
    job = start(pause=0.2)
    folder = wait_for(tmp_path / "cache", phase)
    job.kill()
    assert end_of(job)[0] == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    done = {p.name: p.stat().st_mtime_ns for p in folder.glob("*.json")}
    encode_all(cascade, tmp_path / "cache")
    assert contents(tmp_path / "cache") == straight
    assert {name: (folder / name).stat().st_mtime_ns for name in done} == done


@pytest.mark.slow
def test_one_of_two_killed(start: Any, cascade: Cascade, straight: dict[str, bytes], tmp_path: Path) -> None:
    """The other process leaves, and one process alone goes on with what both have done."""
    job = start(*TWO, pause=0.5)
    wait_for(tmp_path / "cache", "shard-00000.json", "shard-00001.json")
    found = None
    printed = ""
    while found is None:
        printed += job.stdout.readline()
        found = re.search(r"process 1 has id (\d+)", printed)
    os.kill(int(found[1]), signal.SIGKILL)
    code, output = end_of(job)
    assert code != 0
    assert "encoded" not in output
    encode_all(cascade, tmp_path / "cache")
    assert contents(tmp_path / "cache") == straight


@pytest.mark.slow
def test_second_job_waits_and_goes_on_after_the_first_is_stopped(
    start: Any, straight: dict[str, bytes], tmp_path: Path
) -> None:
    first = start(pause=0.5)
    folder = wait_for(tmp_path / "cache", "shard-00000.json")
    second = start()
    while "waiting for the job that writes this cache" not in (line := second.stdout.readline()):
        assert line, "the second job ended"
    assert second.poll() is None
    first.terminate()
    assert end_of(first)[0] == 3
    code, output = end_of(second)
    assert code == 0, output
    assert contents(tmp_path / "cache") == straight
    assert not list(folder.glob("*.tmp-*"))


def test_bytes_do_not_depend_on_threads(cascade: Cascade, straight: dict[str, bytes], tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3 if before != 3 else 2)
    try:
        encode_all(cascade, tmp_path)
        assert torch.get_num_threads() != before
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path) == straight
