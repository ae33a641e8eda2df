"""`ldm generate --best-of`: what is kept, and that it is what those seeds draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import UserError
from pipelines import generate as module
from pipelines.generate import generate
from pipelines.images import read_recipe
from pipelines.ranking import load_ranker, most_like


class Bright:
    """In place of a CLIP: a text asks for a brightness, and pictures are as like it as they are near."""

    def pictures(self, pictures: torch.Tensor) -> torch.Tensor:
        angle = pictures.mean((1, 2, 3))
        return torch.stack([angle.cos(), angle.sin()], 1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        angle = torch.tensor([float(text) for text in texts])
        return torch.stack([angle.cos(), angle.sin()], 1)


def test_the_most_like_of_each_prompt_come_first() -> None:
    brightness = torch.tensor([0.1, 0.5, -0.3, 0.9, 0.1, 0.5, -0.3, 0.9])
    pictures = brightness.view(-1, 1, 1, 1).expand(-1, 3, 4, 4)
    clip: Any = Bright()
    assert most_like(clip, ["0.6", "-0.4"], pictures, 2) == [1, 3, 6, 4]


def test_the_kept_pictures_are_those_of_their_seeds(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_ranker", lambda n, best_of, clip: Bright() if best_of else None)
    generate(["1", "-1"], tiny_folder, n=2, seed=3, out=tmp_path / "best", best_of=5, clip="some", keep_stages=True)
    chosen = [read_recipe(tmp_path / f"best/{k:04d}.png") for k in range(4)]
    assert [recipe["prompt"] for recipe in chosen if recipe] == ["1", "1", "-1", "-1"]
    generate(["1", "-1"], tiny_folder, n=5, seed=3, out=tmp_path / "all")
    every = {(r["prompt"], r["seed"]): np.array(Image.open(path)) for path in (tmp_path / "all").glob("0*.png")
             if (r := read_recipe(path))}  # fmt: skip
    assert len(every) == 10
    for k, recipe in enumerate(chosen):
        assert recipe is not None
        kept = np.array(Image.open(tmp_path / f"best/{k:04d}.png"))
        assert np.array_equal(kept, every[recipe["prompt"], recipe["seed"]])
    means = {key: picture.mean() for key, picture in every.items()}
    brightest = sorted((seed for prompt, seed in means if prompt == "1"), key=lambda s: -means["1", s])
    assert [recipe["seed"] for recipe in chosen[:2] if recipe] == brightest[:2]
    assert not (tmp_path / "best/0004.png").exists()


def test_what_cannot_choose_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    assert load_ranker(4, None, None) is None
    with pytest.raises(UserError, match="name the CLIP that chooses by --clip"):
        generate(["a"], tiny_folder, n=1, out=tmp_path, best_of=2)
    with pytest.raises(UserError, match="--best-of 2: must be at least --n 4"):
        generate(["a"], tiny_folder, n=4, out=tmp_path, best_of=2, clip=tmp_path)
    assert not list(tmp_path.iterdir())
