"""`ldm eval loss` on tiny cascades."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ldm.denoiser import to_target
from ldm.draws import keyed_generator
from pipelines.cascade import load_cascade
from tests.tiny import EMOJI, save_tiny_sr
from training.data import DataConfig, Reader
from training.encode import encode
from training.held_out import EVALUATION_LEVELS
from training.loss_report import LEVELS, evaluate


@torch.no_grad()
def test_the_report(tiny_folder: Path, tmp_path: Path) -> None:
    """A figure of the report against the error written out here."""
    told: list[str] = []
    path = evaluate(tiny_folder, EMOJI, tmp_path / "out", cache=tmp_path / "cache", tell=told.append)
    errors = json.loads(path.read_text())["errors"]
    assert set(errors) == {"base", "base, no text"}
    assert "base, no text: 0.01" in told[0]
    assert set(errors["base"]) == {"mean", *(f"{level / 100:g}" for level in LEVELS)}
    for line in errors.values():
        assert all(low <= value <= high for value, low, high in line.values())
        assert line["mean"][0] == pytest.approx(sum(line[f"{k / 100:g}"][0] for k in EVALUATION_LEVELS) / 5)
    cascade = load_cascade(tiny_folder)
    stage = cascade.stages[0]
    held = encode(Reader(DataConfig(str(EMOJI), "combos", size_px=64)), tmp_path / "cache", stage.codec, cascade.text)
    t, each = torch.tensor([0.5], dtype=torch.float64), []
    for i in range(len(held)):
        x0 = stage.config.normalisation.apply(held.stored([i]).float().chunk(2, 1)[0])
        eps = torch.randn(x0.shape[1:], generator=keyed_generator(0, "evaluation", 50, i))[None]
        alpha, sigma = (c.item() for c in stage.denoiser.schedule.alpha_sigma(t))
        cond = held.text(held.captions(i)[:1])
        time = stage.denoiser.schedule.network_time(t)
        told_net = {"encoder_hidden_states": cond.text, "encoder_attention_mask": cond.text_mask}
        out = stage.denoiser.net(alpha * x0 + sigma * eps, time, **told_net).sample
        wanted = to_target("v", x0, eps, torch.tensor(alpha), torch.tensor(sigma))
        each.append(float(((out - wanted) ** 2).mean()))
    assert errors["base"]["0.5"][0] == pytest.approx(sum(each) / len(each), rel=1e-4)
    page = (tmp_path / "out/report.html").read_text()
    assert "curves.png" in page
    assert (tmp_path / "out/curves.png").is_file()


def test_super_resolution_stages_are_measured_too(tmp_path: Path) -> None:
    """On pixels and in latents, each with its small pictures."""
    path = evaluate(save_tiny_sr(tmp_path), EMOJI, tmp_path / "out", rows=4, cache=tmp_path / "cache")
    errors = json.loads(path.read_text())["errors"]
    assert set(errors) == {"middle", "middle, no text", "sr", "sr, no text"}
    assert errors["sr"]["mean"] != errors["sr, no text"]["mean"]
