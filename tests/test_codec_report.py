"""`ldm eval codec` on a tiny codec."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ldm.config import UserError
from ldm.latents import LatentCodec
from ldm.weights import load_codec
from tests.tiny import CODEC, EMOJI, save_tiny_sr
from training.boundary import round_trip
from training.codec_report import evaluate, half_agrees
from training.metrics import psnr


def test_the_report(tiny_folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    path = evaluate(tiny_folder, EMOJI, tmp_path / "a", split="train", sizes=(64, 32), pictures=24, tell=told.append)
    report = json.loads(path.read_text())
    assert {"64 px", "32 px"} <= set(report["measures"])
    whole = report["measures"]["64 px"]
    for value, low, high in whole.values():
        assert low <= value <= high
    assert whole["float16 to float32, dB"][0] > 45
    assert "PSNR, dB" in told[0]
    assert "pictures.png" in (tmp_path / "a/report.html").read_text()
    alone = evaluate(tiny_folder / "codec", EMOJI, tmp_path / "b", split="train", pictures=24)
    assert json.loads(alone.read_text())["measures"]["64 px"] == whole


def test_half_precision_is_compared_with_single(tiny_folder: Path) -> None:
    codec = load_codec(tiny_folder / "codec").module
    pictures = torch.rand(3, 3, 32, 32) * 2 - 1
    agrees = half_agrees(codec, pictures)
    assert agrees.shape == (3,)
    assert (agrees > psnr(round_trip(codec, pictures), pictures)).all()
    assert next(codec.parameters()).dtype == torch.float32, "the codec itself is left as it is"


def test_what_cannot_be_measured_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    assert LatentCodec(CODEC).config.factor == 8
    with pytest.raises(UserError, match="60 px is no multiple of its 8 px a cell"):
        evaluate(tiny_folder, EMOJI, tmp_path / "out", sizes=(60,))
    with pytest.raises(UserError, match="pixels lose nothing"):
        evaluate(save_tiny_sr(tmp_path), EMOJI, tmp_path / "out")
