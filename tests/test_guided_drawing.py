"""Guidance as a user asks for it: negative prompts, a weaker network, updates; each in the picture's recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import UserError
from pipelines.cascade import load_cascade
from pipelines.generate import ModelRequest, generate
from pipelines.images import read_recipe
from tests.tiny import save_tiny_sr, tiny_cascade

PROMPT = "a red heart, noto style"


def drawn(model: Path | ModelRequest, out: Path, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """A picture and its recipe."""
    generate([PROMPT], model, n=1, out=out, **options)
    recipe = read_recipe(out / "0000.png")
    assert recipe is not None
    with Image.open(out / "0000.png") as picture:
        return np.array(picture), recipe


def test_a_negative_prompt_moves_the_picture_and_is_recorded(tiny_folder: Path, tmp_path: Path) -> None:
    plain, recipe = drawn(tiny_folder, tmp_path / "a")
    against, told = drawn(tiny_folder, tmp_path / "b", negative="a cat")
    assert not np.array_equal(plain, against)
    assert told == recipe | {"negative": "a cat"}
    lines: list[str] = []
    without, _ = drawn(tiny_folder, tmp_path / "c", guidance=1.0)
    unused, _ = drawn(tiny_folder, tmp_path / "d", guidance=1.0, negative="a cat", tell=lines.append)
    assert np.array_equal(without, unused)
    assert lines == ["the negative prompt is not used: there is no guidance at 1"]


@pytest.mark.parametrize(
    "update", ["rescale=0.7", "interval=[0.2,0.6]", "parallel=0.0", "max_norm=0.5", "momentum=-0.5"]
)
def test_updates_move_the_picture_and_are_recorded(tiny_folder: Path, tmp_path: Path, update: str) -> None:
    plain, recipe = drawn(tiny_folder, tmp_path / "a")
    assert "update" not in recipe["stages"][0]
    moved, told = drawn(tiny_folder, tmp_path / "b", overrides=[f"base.update.{update}"])
    assert not np.array_equal(plain, moved)
    name, value = update.split("=")
    assert told["stages"][0]["update"][name] == json.loads(value)
    again, _ = drawn(tiny_folder, tmp_path / "c", overrides=[f"base.update.{update}"])
    assert np.array_equal(moved, again)


@pytest.mark.parametrize("option", ["sampler=ddpm variance=1.0", "sampler=ddim eta=1.0", "sampler=heun churn=2.0"])
def test_options_of_samplers_move_the_picture_and_are_recorded(
    tiny_folder: Path, tmp_path: Path, option: str
) -> None:
    sampler, setting = (f"base.{part}" for part in option.split())
    plain, recipe = drawn(tiny_folder, tmp_path / "a", overrides=[sampler])
    moved, told = drawn(tiny_folder, tmp_path / "b", overrides=[sampler, setting])
    assert not np.array_equal(plain, moved)
    name, value = setting.removeprefix("base.").split("=")
    assert name not in recipe["stages"][0]
    assert told["stages"][0][name] == float(value)
    with pytest.raises(UserError, match=f"{name} is of .*; unipc has none"):
        generate([PROMPT], tiny_folder, out=tmp_path / "c", overrides=["base.sampler=unipc", setting])


def test_autoguidance_by_a_weaker_cascade(tiny_folder: Path, tmp_path: Path) -> None:
    weak = tiny_cascade(load_cascade(tiny_folder).text.config)
    with torch.no_grad():
        for parameter in weak.stages[0].denoiser.parameters():
            parameter.mul_(0.9)
    weak.save(tmp_path / "weak")
    plain, _ = drawn(tiny_folder, tmp_path / "a", guidance=1.0)
    asked: dict[str, Any] = {"overrides": ["base.guided=network"]}
    beside = ModelRequest(tiny_folder, weak=tmp_path / "weak")
    guided, recipe = drawn(beside, tmp_path / "b", guidance=2.0, **asked)
    assert not np.array_equal(plain, guided)
    assert recipe["stages"][0]["guided"] == "network"
    assert recipe["weak"] == load_cascade(tmp_path / "weak").digest
    none, _ = drawn(beside, tmp_path / "c", guidance=1.0, **asked)
    assert np.array_equal(plain, none)
    itself, _ = drawn(ModelRequest(tiny_folder, weak=tiny_folder), tmp_path / "d", guidance=7.0, **asked)
    assert np.abs(itself.astype(int) - plain).max() <= 1, "a network tells nothing against itself"


def test_what_cannot_guide_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="guided network needs a weaker network"):
        generate([PROMPT], tiny_folder, out=tmp_path / "a", overrides=["base.guided=network"])
    sr = save_tiny_sr(tmp_path)
    with pytest.raises(UserError, match="weaker model has"):
        generate([PROMPT], ModelRequest(tiny_folder, weak=sr), out=tmp_path / "a", overrides=["base.guided=network"])
    with pytest.raises(UserError, match=r"update.*interval must be two times that rise"):
        generate([PROMPT], tiny_folder, out=tmp_path / "a", overrides=["base.update.interval=[0.6,0.2]"])
    assert not (tmp_path / "a").exists()


def test_updates_work_in_tiles(tmp_path: Path) -> None:
    """Momentum is remembered tile by tile; a picture of one tile is the same drawn whole."""
    cascade = load_cascade(save_tiny_sr(tmp_path)).only("middle")
    stage, low_res = cascade.stages[0], torch.rand(1, 3, 24, 24) * 2 - 1
    pictures = []
    for update in ("momentum=0.0", "momentum=-0.5"):
        sampling = cascade.sampling(overrides=["middle.guidance=3", "middle.steps=3", f"middle.update.{update}"])
        stage.tile_px = 32
        pictures.append(cascade.draw([PROMPT], [3], sampling, low_res)[0])
    assert not torch.equal(*pictures)
