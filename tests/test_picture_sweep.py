"""`ldm eval sweep`: every combination is drawn, and the frontier is what no other beats at its cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ldm.config import UserError
from pipelines.cascade import load_cascade
from tests.tiny import EMOJI, save_tiny_sr
from training.data import DataConfig, Reader
from training.features import Features
from training.picture_report import asked_in, drawn_of
from training.picture_sweep import best_at_cost, evaluate
from training.quality import Estimate, KernelDistance
from training.seen import Eyes, reference_of


def cell(rows: int, both: float, distance: float) -> dict[str, Any]:
    told = {"both": Estimate(both, both, both), "KD-efflite0": Estimate(distance, distance, distance)}
    return {"rows_a_picture": rows, "measures": told}


def test_the_frontier_is_what_no_other_beats_at_no_more_cost() -> None:
    cells = [cell(40, 0.5, 0.2), cell(10, 0.3, 0.3), cell(20, 0.2, 0.1), cell(20, 0.4, 0.4), cell(80, 0.5, 0.05)]
    assert best_at_cost(cells, "both") == [1, 3, 0]
    assert best_at_cost(cells, "KD-efflite0") == [1, 2, 4]


def test_every_combination_of_every_model(tiny_folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    told: list[str] = []
    path = evaluate(tiny_folder, EMOJI, tmp_path / "out", ["steps=1,2", "guidance=1,3"], against=[other], pictures=7,
                    split="train", cache=tmp_path / "cache", tell=told.append)  # fmt: skip
    report = json.loads(path.read_text())
    assert len(report["cells"]) == len(told) == 8
    assert [c["rows_a_picture"] for c in report["cells"][:4]] == [1, 2, 2, 4]
    assert {c["model"] for c in report["cells"]} == {str(tiny_folder), str(other)}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {"report.json", "report.html", "frontier.png", "pictures.png"}
    # a cell is what its settings draw, and both models are the same one
    cascade = load_cascade(tiny_folder)
    reader = Reader(DataConfig(path=str(EMOJI), split="train", size_px=64))
    asked = [(a, 0) for a in asked_in(reader, 7)]
    drawn = drawn_of(cascade, asked, cascade.sampling(steps=2, guidance=3.0))
    eyes = Eyes(Features())
    kernel = KernelDistance(eyes.see(drawn).features, reference_of(reader, eyes, tmp_path / "cache").features)
    for k in (3, 7):
        assert report["cells"][k]["measures"]["KD-efflite0"][0] == pytest.approx(kernel(), rel=1e-6)


def test_what_cannot_be_swept_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="25 combinations; at most 24"):
        evaluate(tiny_folder, EMOJI, tmp_path / "out", ["steps=1,2,3,4,5", "guidance=1,2,3,4,5"])
    with pytest.raises(UserError, match="a field of the sampling"):
        evaluate(tiny_folder, EMOJI, tmp_path / "out", ["steps"])
    with pytest.raises(UserError, match="begins with stage middle"):
        evaluate(save_tiny_sr(tmp_path), EMOJI, tmp_path / "out", ["steps=1,2"])
    assert not (tmp_path / "out").exists()
