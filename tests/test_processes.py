"""Two gloo processes: data parallel, sharded and hybrid trainings against one process; what a lost process costs."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import UserError
from tests.test_faults import ROOT, STEPS, assert_equal_ends, config_of, settings, weights
from training.processes import check_world
from training.run import train

LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
STOP_AT = 7


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """A folder of runs by two processes and one, and what the two processes saw, by run."""
    place = tmp_path_factory.mktemp("two")
    train(config_of("autoencoder"), place / "autoencoder", settings(place, "autoencoder"))
    train(config_of("base_t5"), place / "one", settings(place, "base_t5"))
    full, short = "loop.sharding=full", "loop.images=160"
    train(config_of("base_t5"), place / "short", settings(place, "base_t5", short))

    def job(run: str, *more: str, **how: Any) -> dict[str, Any]:
        own = settings(place, "base_t5", "loop.processes=2", *more)
        return {"config": str(config_of("base_t5")), "run": str(place / run), "overrides": own, **how}

    jobs = [
        job("data_parallel"), job("accumulated", "loop.accumulation=2", short),
        job("sharded", full, short), job("hybrid", "loop.sharding=hybrid", short, machines=2),
        job("resumed", stop_at=STOP_AT), job("resumed", resume="must"),
        job("sharded_resumed", full, short, stop_at=STOP_AT), job("sharded_resumed", full, short, resume="must"),
        job("then_one", stop_at=STOP_AT), job("bad", short, nan_at=4), job("sharded_bad", full, short, nan_at=4),
    ]  # fmt: skip
    file = place / "jobs.json"
    file.write_text(json.dumps(jobs))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *LAUNCH, str(ROOT / "tests/two_processes.py"), str(file)], env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    seen: dict[str, list[dict[str, Any]]] = {}
    for rank in (0, 1):
        for one, result in zip(jobs, json.loads((place / f"jobs-{rank}.json").read_text()), strict=True):
            seen.setdefault(Path(one["run"]).name, []).append(result)
    return place, seen


@pytest.mark.parametrize("run", ["data_parallel", "accumulated", "sharded", "hybrid"])
def test_two_processes_give_the_losses_of_one(two: tuple[Path, Any], run: str) -> None:
    place, seen = two
    one, steps = ("one", STEPS) if run == "data_parallel" else ("short", STEPS // 2)
    assert losses(place / run) == pytest.approx(losses(place / one), rel=1e-4)
    assert [s["steps"] for s in seen[run]] == [steps, steps]


def test_sharded_parameters_and_averages_are_dtensors(two: tuple[Path, Any]) -> None:
    kinds = {run: {tuple(s["kinds"]) for s in seen} for run, seen in two[1].items()}
    assert kinds["data_parallel"] == {("Parameter",)}
    assert kinds["sharded"] == kinds["hybrid"] == {("DTensor",)}
    assert two[1]["sharded"][0]["mesh"] == [2]
    assert two[1]["hybrid"][0]["mesh"] == [2, 1]


@pytest.mark.parametrize(("run", "straight"), [("resumed", "data_parallel"), ("sharded_resumed", "sharded")])
def test_both_leave_together_and_resume_bit_equal(two: tuple[Path, Any], run: str, straight: str) -> None:
    place, seen = two
    # rank 0 and rank 1 of the first leg, then of the second; only rank 1 got the signal
    ends = [s["end"] for s in seen[run]]
    assert ends == ["interrupted, exit code 3", "done"] * 2
    steps = STEPS if run == "resumed" else STEPS // 2
    assert [s["steps"] for s in seen[run]] == [STOP_AT, steps - STOP_AT] * 2
    assert_equal_ends(place / run, place / straight)


def test_one_process_goes_on_with_the_run_of_two(two: tuple[Path, Any]) -> None:
    place = two[0]
    train(config_of("base_t5"), place / "then_one", settings(place, "base_t5"), "must")
    assert losses(place / "then_one") == pytest.approx(losses(place / "one"), rel=1e-4)


@pytest.mark.parametrize("run", ["bad", "sharded_bad"])
def test_a_bad_loss_on_one_process_is_skipped_by_both(two: tuple[Path, Any], run: str) -> None:
    place, seen = two
    assert [s["end"] for s in seen[run]] == ["done", "done"]
    assert all(v.isfinite().all() for v in weights(place / run).values())
    assert [n for n, loss in enumerate(losses(place / run), 1) if loss is None] == [4]


def test_sharded_weights_come_out_as_trained(two: tuple[Path, Any]) -> None:
    a, b = weights(two[0] / "sharded"), weights(two[0] / "short")
    assert a.keys() == b.keys()
    for name in (k for k in a if k.startswith("model.")):
        assert torch.allclose(a[name], b[name], atol=2e-3), name


def test_a_launch_of_another_size_is_refused(two: tuple[Path, Any]) -> None:
    with pytest.raises(UserError, match="asks for 2 processes, but this launch has 1"):
        train(config_of("base_t5"), two[0] / "refused", settings(two[0], "base_t5", "loop.processes=2"))
    with pytest.raises(UserError, match="asks for 3"):
        check_world(3)


def test_processes_that_never_met_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from training.processes import process_state

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="promised 2 processes, but 1 joined"):
        process_state()


def start_two(place: Path, timeout_s: int) -> list[subprocess.Popen[str]]:
    """Two processes of one run, without a launcher that would end one after the other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # long enough not to end by itself
    more = ["loop.images=320000", "loop.processes=2", f"loop.process_timeout_s={timeout_s}"]
    own = [*settings(place, "base_t5"), *more]
    command = [sys.executable, "-m", "ldm", "train", str(config_of("base_t5")), "--run",
               str(place / f"lost{timeout_s}"), *(part for o in own for part in ("--set", o))]  # fmt: skip
    both = []
    for rank in (0, 1):
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "RANK": str(rank), "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        both.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    return both


@pytest.mark.parametrize(("how", "timeout_s"), [
    pytest.param(signal.SIGKILL, 600, id="killed"),
    pytest.param(signal.SIGSTOP, 20, id="silent", marks=pytest.mark.slow),
])  # fmt: skip
def test_the_others_leave_when_one_is_gone(two: tuple[Path, Any], how: int, timeout_s: int) -> None:
    place = two[0]
    first, second = start_two(place, timeout_s)
    try:
        checkpoints, end = place / f"lost{timeout_s}/checkpoints", time.monotonic() + 100
        while not checkpoints.exists() and time.monotonic() < end and first.poll() is None:
            time.sleep(0.2)
        second.send_signal(how)
        said = first.communicate(timeout=60)[0]
        assert first.returncode == 1, said
        assert "process 0 lost the others" in said
        assert "the same command resumes" in said
        assert "Traceback" not in said
    finally:
        for process in (first, second):
            process.kill()
            process.wait()
