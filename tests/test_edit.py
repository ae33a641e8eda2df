"""`ldm edit`: from a picture on, whole or in a hole; and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import UserError
from pipelines.cascade import load_cascade
from pipelines.edit import edit
from pipelines.images import read_recipe, to_uint8
from tests.tiny import EMOJI
from training.boundary import round_trip

PROMPT = "a red heart, noto style"


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """128 px, wider than high: the centre square is used."""
    with Image.open(sorted(EMOJI.rglob("*.png"))[3]) as source:
        square = source.convert("RGB").resize((128, 128), Image.Resampling.BOX)
    canvas = Image.new("RGB", (160, 128), (0, 0, 255))
    canvas.paste(square, (16, 0))
    canvas.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    """The right half of the square."""
    shade = np.zeros((128, 160), dtype=np.uint8)
    shade[:, 80:] = 255
    Image.fromarray(shade).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


def shrunk(picture: Path) -> np.ndarray:
    with Image.open(picture) as image:
        return np.array(image.crop((16, 0, 144, 128)).reduce(2)).astype(int)


def test_the_less_strength_the_nearer_the_picture(picture: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """With as good as none it is the codec's round trip of the picture."""
    distances = []
    for strength in (0.02, 0.3, 1.0):
        out = tmp_path / str(strength)
        edit(picture, PROMPT, model=tiny_folder, strength=strength, n=1, steps=100, guidance=1.0, out=out)
        distances.append(np.abs(pixels(out / "0000.png") - shrunk(picture)).mean())
    cascade = load_cascade(tiny_folder)
    whole = torch.from_numpy(shrunk(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    through = to_uint8(round_trip(cascade.codec.module, whole))[0].astype(int)
    assert np.abs(pixels(tmp_path / "0.02/0000.png") - through).mean() < 25
    assert np.abs(pixels(tmp_path / "1.0/0000.png") - through).mean() > 25
    recipe = read_recipe(tmp_path / "0.3/0000.png")
    assert recipe is not None
    assert recipe["edit"]["strength"] == 0.3
    assert set(recipe["edit"]) == {"sha256", "strength"}


def test_what_the_mask_does_not_mark_is_kept_to_the_bit(
    picture: Path, mask: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    for name, composite in (("a", True), ("b", False)):
        edit(picture, PROMPT, mask, tiny_folder, n=2, resamples=2, composite=composite, out=tmp_path / name)
    kept, drawn = pixels(tmp_path / "a/0001.png"), pixels(tmp_path / "b/0001.png")
    assert np.array_equal(kept[:, :32], shrunk(picture)[:, :32])
    assert np.array_equal(kept[:, 32:], drawn[:, 32:])
    assert not np.array_equal(drawn[:, :32], kept[:, :32]), "a codec's round trip changes pixels"
    assert not np.array_equal(kept[:, 32:], shrunk(picture)[:, 32:])
    assert not np.array_equal(pixels(tmp_path / "a/0000.png"), kept), "another seed"
    recipe = read_recipe(tmp_path / "b/0001.png")
    assert recipe is not None
    assert set(recipe["edit"]) == {"sha256", "strength", "mask_sha256", "resamples", "composite"}
    assert pixels(tmp_path / "a/grid.png").shape[1] == 3 * 64 + 4 * 4


def test_what_lies_in_the_hole_is_not_read(picture: Path, mask: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with Image.open(picture) as image:
        other = np.array(image)
    other[:, 80:] = 255 - other[:, 80:]
    Image.fromarray(other).save(tmp_path / "other.png")
    found = []
    for name in ("picture.png", "other.png"):
        edit(tmp_path / name, PROMPT, mask, tiny_folder, n=1, resamples=2, steps=4, out=tmp_path / f"of-{name}")
        found.append(pixels(tmp_path / f"of-{name}/0000.png"))
    assert np.array_equal(*found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "--strength 0: must be above 0"),
        ({"strength": 0.1}, r"--strength 0.1: strength must be at least 0.333 with 3 steps"),
        ({"resamples": 0}, "--resamples 0"),
        ({"n": 0}, "--n 0"),
        ({"picture": "none.png"}, "none.png: cannot be read"),
        ({"mask": "small.png"}, "a mask has the picture's size"),
        ({"mask": "black.png"}, "nothing in it is white"),
    ],
)
def test_what_cannot_be_edited_is_refused(
    picture: Path, tiny_folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    Image.new("L", (64, 64), 255).save(tmp_path / "small.png")
    Image.new("L", (160, 128), 0).save(tmp_path / "black.png")
    asked: dict[str, Any] = {"picture": picture, "model": tiny_folder, "out": tmp_path / "out"} | options
    for name in ("picture", "mask"):
        if isinstance(asked.get(name), str):
            asked[name] = tmp_path / asked[name]
    with pytest.raises(UserError, match=message):
        edit(prompt=PROMPT, **asked)
    assert not (tmp_path / "out").exists()
