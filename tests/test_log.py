"""The record of a run: metrics.jsonl survives a kill, trackers cost the training nothing, spikes are told."""

from __future__ import annotations

import json
import math
import random
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.config import UserError
from training import log
from training.log import MetricsLog, Trackers, check_trackers
from training.processes import process_state
from training.watch import LossWatch

LONG_S = 60.0


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class TestMetrics:
    def test_one_line_a_record_with_null_for_what_is_not_finite(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        metrics = MetricsLog(tmp_path / "metrics.jsonl")
        metrics.write("train", 32, {"loss": 0.5, "grad_norm": math.inf, "lr": math.nan, "step": 1})
        metrics.alert(64, "loss is high")
        metrics.close()
        assert records(metrics.path) == [
            {"kind": "train", "images": 32, "loss": 0.5, "grad_norm": None, "lr": None, "step": 1},
            {"kind": "alert", "images": 64, "text": "loss is high"},
        ]
        shown = capsys.readouterr().out.splitlines()
        assert [line.split()[:3] for line in shown] == [["train", "32", "images"], ["alert", "64", "images"]]

    def test_every_line_parses_wherever_a_kill_cut_the_last_one(self, tmp_path: Path) -> None:
        first, second = (json.dumps({"kind": "train", "images": n, "loss": 0.25}) for n in (1, 22))
        path = tmp_path / "metrics.jsonl"
        for cut in range(len(second) + 2):
            path.write_text(f"{first}\n" + f"{second}\n"[:cut], encoding="utf-8")
            MetricsLog(path).write("train", 333, {})
            whole = [1, 22] if cut >= len(second) else [1]
            assert [r["images"] for r in records(path)] == [*whole, 333]

    @pytest.mark.parametrize("torn", ["", '{"kind', "\0\0\0"])
    def test_a_file_without_a_whole_line(self, tmp_path: Path, torn: str) -> None:
        path = tmp_path / "metrics.jsonl"
        path.write_text(torn, encoding="utf-8")
        MetricsLog(path).write("train", 1, {})
        assert [r["images"] for r in records(path)] == [1]

    def test_a_long_file_loses_nothing_but_its_torn_line(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.jsonl"
        text = "".join(json.dumps({"kind": "train", "images": n}) + "\n" for n in range(5000))
        path.write_text(text + '{"kind": "tr', encoding="utf-8")
        MetricsLog(path)
        assert path.read_text(encoding="utf-8") == text


class Fake(GeneralTracker):
    """Does what it is told to before it takes values."""

    name = "fake"
    requires_logging_directory = False
    tracker = None

    def __init__(self, before: Callable[[], object] = bool) -> None:
        super().__init__()
        self.before = before
        self.got: list[tuple[dict[str, Any], int]] = []
        self.thread: threading.Thread | None = None
        self.finished = False

    def log(self, values: dict, step: int | None = None, **_: Any) -> None:
        self.thread = threading.current_thread()
        self.before()
        self.got.append((values, step or 0))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put stand-ins behind the names: each start takes the next; an exception among them is raised instead."""
    monkeypatch.setattr(log, "INSTALLED", dict.fromkeys(log.INSTALLED, lambda: True))

    def start(members: Iterator[Fake | Exception], *_: Any) -> Fake:
        member = next(members)
        if isinstance(member, Exception):
            raise member
        return member

    def put(**stand_ins: list[Fake | Exception]) -> None:
        for name, members in stand_ins.items():
            monkeypatch.setitem(log.START, name, partial(start, iter(members)))

    return put


class Unauthorized(Exception):
    """As an HTTP client raises it."""


def refuse() -> None:
    raise Unauthorized("401 Client Error: Unauthorized\nfor url: https://example.org")


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LONG_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Printed:
    """What came on stdout so far, from whichever thread."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys
        self.text = ""

    def __call__(self) -> str:
        self.text += self.capsys.readouterr().out
        return self.text


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printed:
    return Printed(capsys)


class TestTrackers:
    def test_the_log_copies_numbers_and_texts_to_every_tracker(
        self, tmp_path: Path, use: Callable[..., None], printed: Printed
    ) -> None:
        one, two = Fake(), Fake()
        use(tensorboard=[one], wandb=[two])
        metrics = MetricsLog(tmp_path / "metrics.jsonl", Trackers(("tensorboard", "wandb"), tmp_path, {}))
        metrics.write("eval", 10, {"loss": 0.5, "count": 3, "none": None, "list": [1]})
        metrics.alert(20, "look")
        metrics.close()
        expected = [({"eval/loss": 0.5, "eval/count": 3}, 10), ({"alert/text": "look"}, 20)]
        assert one.got == two.got == expected
        assert one.finished
        assert two.finished
        assert "tracker" not in printed()

    def test_a_slow_tracker_is_waited_for_at_the_end_only(
        self, tmp_path: Path, use: Callable[..., None], printed: Printed
    ) -> None:
        gate = threading.Event()
        slow = Fake(gate.wait)
        use(tensorboard=[slow])
        trackers = Trackers(("tensorboard",), tmp_path, {})
        for step in range(100):
            trackers.log({"x": 1.0}, step)
        assert slow.got == []  # and yet all the calls have returned
        gate.set()
        trackers.close(LONG_S)
        assert [step for _, step in slow.got] == list(range(100))
        assert slow.thread is not None
        assert slow.thread is not threading.main_thread()
        assert slow.thread.daemon
        assert printed() == ""

    def test_a_hanging_tracker_neither_holds_up_the_end_nor_the_others(
        self, tmp_path: Path, use: Callable[..., None], printed: Printed
    ) -> None:
        gate = threading.Event()
        hanging, other = Fake(gate.wait), Fake()
        use(wandb=[hanging], tensorboard=[other])
        trackers = Trackers(("wandb", "tensorboard"), tmp_path, {})
        for step in range(3):
            trackers.log({"x": 1.0}, step)
        until(lambda: len(other.got) == 3)
        trackers.close(0.05)
        assert printed() == "tracker wandb: 3 records not delivered (no answer in time); metrics.jsonl has them\n"
        gate.set()

    @pytest.mark.parametrize("first", [Fake(refuse), Unauthorized("401 Client Error: Unauthorized")])
    def test_after_a_failure_all_is_kept_and_sent_once_more(
        self, tmp_path: Path, use: Callable[..., None], printed: Printed, first: Fake | Exception
    ) -> None:
        second = Fake()
        use(wandb=[first, second])
        trackers = Trackers(("wandb",), tmp_path, {})
        trackers.log({"x": 1.0}, 1)
        until(lambda: "failed" in printed())
        for step in (2, 3):
            trackers.log({"x": 1.0}, step)
        trackers.close(LONG_S)
        assert [step for _, step in second.got] == [1, 2, 3]
        assert second.finished
        assert printed() == (
            "tracker wandb failed (Unauthorized: 401 Client Error: Unauthorized); training goes on, its records are "
            "kept and sent once more at the end\n"
        )

    def test_a_second_failure_is_told_and_is_the_last(
        self, tmp_path: Path, use: Callable[..., None], printed: Printed
    ) -> None:
        never = Fake()
        use(wandb=[Fake(refuse), Fake(refuse), never])
        trackers = Trackers(("wandb",), tmp_path, {})
        for step in range(4):
            trackers.log({"x": 1.0}, step)
        until(lambda: "failed" in printed())
        trackers.close(LONG_S)
        assert printed().splitlines()[1:] == [
            "tracker wandb: 4 records not delivered (Unauthorized: 401 Client Error: Unauthorized); metrics.jsonl has "
            "them"
        ]
        assert not never.got

    def test_what_waits_is_bounded(
        self, tmp_path: Path, use: Callable[..., None], printed: Printed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(log, "MAX_WAITING", 10)
        second = Fake()
        use(wandb=[Unauthorized("no"), second])
        trackers = Trackers(("wandb",), tmp_path, {})
        for step in range(25):
            trackers.log({"x": 1.0}, step)
        trackers.close(LONG_S)
        assert [step for _, step in second.got] == list(range(15, 25))
        assert "15 records not delivered (more than 10 waited)" in printed()

    @pytest.mark.parametrize("name", ["wandb", "tensorboard"])
    def test_a_missing_package_is_said_before_anything_starts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        for module in ("wandb", "tensorboard", "tensorboardX"):
            monkeypatch.setitem(sys.modules, module, None)
        for call in (lambda: check_trackers((name,)), lambda: Trackers((name,), tmp_path, {})):
            with pytest.raises(UserError, match=f"pip install {name}"):
                call()
        assert not list(tmp_path.iterdir())

    def test_no_tracker_is_no_work(self, tmp_path: Path) -> None:
        before = threading.active_count()
        trackers = Trackers((), tmp_path, {})
        trackers.log({"x": 1.0}, 1)
        assert threading.active_count() == before
        trackers.close(0.0)


def shown(run: Path, tag: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


class TestTensorBoard:
    def test_its_own_reader_finds_the_values_and_the_config(self, tmp_path: Path, printed: Printed) -> None:
        process_state()
        config = {"loop": {"trackers": ("tensorboard",)}, "name": "größer"}
        metrics = MetricsLog(tmp_path / "metrics.jsonl", Trackers(("tensorboard",), tmp_path, config))
        for images in (0, 3_000_000_000):
            metrics.write("train", images, {"loss": 0.5, "norm": math.nan})
        metrics.alert(7, "look")
        metrics.close(LONG_S)
        assert shown(tmp_path, "train/loss") == [(0, 0.5), (3_000_000_000, 0.5)]
        assert math.isnan(shown(tmp_path, "train/norm")[0][1])
        found = EventAccumulator(str(tmp_path / "tensorboard"))
        found.Reload()
        tags = found.Tags()["tensors"]
        assert set(tags) == {"config/text_summary", "alert/text/text_summary"}
        text = found.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
        assert json.loads(text) == {"loop": {"trackers": ["tensorboard"]}, "name": "größer"}
        assert "tracker" not in printed()

    def test_steps_done_again_after_a_restart_are_shown_once(self, tmp_path: Path) -> None:
        process_state()
        for start, value in ((0, 1.0), (200, 2.0), (0, 3.0)):
            trackers = Trackers(("tensorboard",), tmp_path, {}, start)
            for step in range(start + 100 if start else 0, start + 400, 100):
                trackers.log({"loss": value}, step)
            trackers.close(LONG_S)
            if value == 2.0:
                assert shown(tmp_path, "loss") == [(0, 1), (100, 1), (200, 1), (300, 2), (400, 2), (500, 2)]
            time.sleep(1.1)  # its files are ordered by the second they were made in
        assert shown(tmp_path, "loss") == [(0, 3), (100, 3), (200, 3), (300, 3)]


class TestWandb:
    @pytest.mark.parametrize(("asked", "mode"), [(None, "offline"), ("", "offline"), ("online", "online")])
    def test_it_stays_on_this_machine_unless_the_environment_says_otherwise(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, mode: str
    ) -> None:
        started: dict[str, Any] = {}
        module = types.ModuleType("wandb")
        module.init = lambda **options: started.update(options)  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "wandb", module)
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "x")  # so that it is put back
        monkeypatch.delenv("WANDB_ERROR_REPORTING")
        monkeypatch.delenv("WANDB_MODE", raising=False)
        if asked is not None:
            monkeypatch.setenv("WANDB_MODE", asked)
        log.START["wandb"](tmp_path, {"seed": 1}, 500)
        assert (started["mode"], started["dir"], started["config"]) == (mode, str(tmp_path), {"seed": 1})
        assert log.os.environ.get("WANDB_ERROR_REPORTING") == ("false" if mode == "offline" else None)


def alerts(losses: list[float], watch: LossWatch | None = None) -> list[int]:
    """The steps that are alerted."""
    watch = watch or LossWatch()
    return [n for n, loss in enumerate(losses) if watch.note(n * 32, loss, 1.0) is not None]


def steady(steps: int, seed: int = 0) -> list[float]:
    """A loss of median 0.3 that scatters as a small batch's does: by a factor of 1.3."""
    draw = random.Random(seed)
    return [0.3 * math.exp(draw.gauss(0, 0.26)) for _ in range(steps)]


class TestLossWatch:
    @pytest.mark.parametrize("seed", range(5))
    def test_ordinary_training_is_not_alerted(self, seed: int) -> None:
        falling = [loss * (0.1 + 3 * math.exp(-n / 200)) for n, loss in enumerate(steady(3000, seed))]
        assert alerts(falling) == []

    def test_a_spike_is_told_once_until_it_is_over(self) -> None:
        losses = steady(400)
        for step in (100, 101, 110, 300):
            losses[step] = 4.0
        assert alerts(losses) == [100, 300]

    def test_the_text_says_what_is_needed(self) -> None:
        watch = LossWatch()
        assert alerts([0.5] * 60, watch) == []
        text = watch.note(1920, 6.0, 7.5)
        assert text is not None
        for part in ("loss 6 at 1920 images", "gradient norm 7.5", "over 10 times the median 0.5 of the 60 steps"):
            assert part in text

    @pytest.mark.parametrize(("factor", "alerted"), [(9.9, []), (10.1, [60])])
    def test_the_spike_threshold(self, factor: float, alerted: list[int]) -> None:
        assert alerts([*[0.5] * 60, factor * 0.5, *[0.5] * 60]) == alerted

    @pytest.mark.parametrize(("steps", "alerted"), [(19, []), (20, [119]), (60, [119])])
    def test_a_rise_is_told_at_its_twentieth_step(self, steps: int, alerted: list[int]) -> None:
        assert alerts([*[0.3] * 100, *[1.0] * steps, *[0.3] * 50]) == alerted
        assert alerts([*[0.3] * 100, *[0.8] * steps]) == []

    def test_a_level_that_lasts_becomes_ordinary(self) -> None:
        assert alerts([*[0.3] * 200, *[1.5] * 500]) == [219]
        assert alerts([*[0.3] * 200, *[1.5] * 500, 16.0]) == [219, 700]

    def test_the_first_steps_are_not_judged(self) -> None:
        assert alerts([*[0.3] * 49, 100.0]) == []
        assert alerts([*[0.3] * 50, 100.0]) == [50]

    def test_steps_without_a_finite_loss_are_left_out(self) -> None:
        losses = [*[0.3] * 100, *[1.0, math.nan, math.inf] * 20]
        assert alerts(losses) == [100 + 19 * 3]

    @pytest.mark.parametrize("level", [0.0, 0.01, -0.5])
    def test_losses_around_zero_are_judged_by_their_scatter(self, level: float) -> None:
        draw = random.Random(0)
        losses = [level + draw.gauss(0, 0.1) for _ in range(2000)]
        assert alerts(losses) == []
        assert alerts([*losses, 10.0]) == [2000]
