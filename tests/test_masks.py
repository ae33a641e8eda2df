"""Transparency as a mask: what is transparent is seen and not learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import ConfigError, load
from ldm.decode import Decoding, Source, try_fit
from ldm.denoiser import to_target
from ldm.draws import keyed_generator
from ldm.noise import per_item
from pipelines.cascade import load_cascade
from tests.test_presets import SHORT
from tests.tiny import ROOT, tiny_task
from training.data import DataConfig, Reader
from training.encode import encode
from training.loader import Batch
from training.online import Online
from training.presets import tuning
from training.tasks import RunConfig, build_task

MASK = "data.transparency=mask"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight pictures of 64 px, each opaque in its left half alone but the last, which is opaque."""
    folder = tmp_path / "cut out"
    folder.mkdir()
    for i in range(8):
        pixels = np.random.default_rng(i).integers(0, 256, (64, 64, 4), np.uint8)
        pixels[..., 3] = 255
        pixels[:, 32:, 3] = 0 if i < 7 else 255
        Image.fromarray(pixels).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a red face")
    return folder


def test_a_picture_keeps_what_is_opaque_of_it(pictures: Path, tmp_path: Path) -> None:
    how = Decoding(background=(9, 9, 9), transparency="mask")
    found = try_fit(Source(str(pictures / "0.png")), [(32, 32)], how)
    assert not isinstance(found, str)
    pixels, notes = found
    expected = np.zeros((32, 32), np.uint8)
    expected[:, :16] = 255
    np.testing.assert_array_equal(pixels[..., 3], expected)
    assert (pixels[:, 16:, :3] == 9).all()
    assert notes == ["transparency composited on the background"]
    whole = try_fit(Source(str(pictures / "7.png")), [(32, 32)], how)
    assert not isinstance(whole, str)
    assert (whole[0][..., 3] == 255).all()
    Image.new("RGBA", (64, 64), (200, 0, 0, 0)).save(tmp_path / "nothing.png")
    assert try_fit(Source(str(tmp_path / "nothing.png")), [(32, 32)], how) == "nothing of it is opaque"


def test_a_cache_and_reading_anew_keep_the_same(pictures: Path, tiny_folder: Path, tmp_path: Path) -> None:
    config = DataConfig(path=str(pictures), size_px=64, transparency="mask")
    codec = load_cascade(tiny_folder).codec
    cached, online = encode(Reader(config), tmp_path / "cache", codec), Online(Reader(config), codec)
    assert cached.opaque([0, 7]).shape == (2, 64, 64)
    assert torch.equal(cached.opaque([0, 7]), online.opaque([0, 7]))
    assert torch.equal(cached.stored([0, 7]), online.stored([0, 7]))
    plain = encode(Reader(DataConfig(path=str(pictures), size_px=64)), tmp_path / "cache", codec)
    assert plain.folder != cached.folder
    assert torch.equal(plain.stored([0, 7]), cached.stored([0, 7]))


def test_the_loss_is_of_what_is_opaque(pictures: Path, tiny_folder: Path, tmp_path: Path) -> None:
    task = build_task(tuning(pictures, "full", tiny_folder, [f"cache={tmp_path / 'cache'}", MASK]))
    module, cache = task.module, task.cache
    places = list(range(len(cache)))
    batch = Batch(cache, places, [keyed_generator("masks", i) for i in places], places, len(places))
    drawn = module.prepare(batch)
    denoiser = module.denoiser
    with torch.no_grad():
        alpha, sigma = (per_item(c, drawn.x0) for c in denoiser.schedule.alpha_sigma(drawn.t))
        x_t = alpha * drawn.x0 + sigma * drawn.eps
        said = to_target(denoiser.config.target, *denoiser.predict(x_t.float(), drawn.t, drawn.cond)[:2], alpha, sigma)
        wanted = to_target(denoiser.config.target, drawn.x0, drawn.eps, alpha, sigma)
        squares = (said - wanted) ** 2
        half = squares.shape[-1] // 2
        halves = [squares[i, ..., : half if cache.record(i)["key"] != "7.png" else None] for i in range(len(cache))]
        by_hand = torch.stack([part.mean() for part in halves]).mean()
        whole = squares.mean()
        loss = module(drawn).losses[0]
    assert loss == pytest.approx(float(by_hand), rel=1e-4)
    assert abs(float(whole) / float(loss) - 1) > 1e-3


def test_a_run_trains(pictures: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", str(pictures), "--preset", "lora", "--model", str(tiny_folder), *SHORT]
    done = CliRunner().invoke(app, [*words, "--set", MASK])
    assert done.exit_code == 0, done.output
    mixed = ["--set", f"prior.path={pictures}", "--run", str(tmp_path / "mixed")]
    done = CliRunner().invoke(app, [*words, "--set", MASK, *mixed])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["data.bucket_px=16"], "of squares"),
        (["denoiser.variance=learned", "schedule.kind=linear"], "variance fixed"),
    ],
)
def test_what_cannot_be_is_refused(pictures: Path, tiny_folder: Path, more: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        tuning(pictures, "full", tiny_folder, [MASK, *more])


@pytest.mark.parametrize(("kind", "reason"), [("autoencoder", "learns all it sees"), ("sr", "of a base's training")])
def test_other_trainings_refuse_it(kind: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load(RunConfig, ROOT / f"configs/tiny/{kind}.yaml", [MASK])


def test_inpainting_leaves_it_out_too(pictures: Path, tmp_path: Path) -> None:
    own = [f"data.path={pictures}", "data.split=null", "validation.split=null", f"cache={tmp_path / 'cache'}", MASK]
    task = tiny_task("inpainting", [*own, "codec=null"])
    batch = Batch(task.cache, [0], [keyed_generator("masks")], [0], 1)
    drawn = task.module.prepare(batch)
    assert drawn.opaque is not None
    height, width = drawn.x0.shape[-2:]
    assert drawn.opaque.shape == (1, 1, height, width)
    assert (drawn.opaque[..., : width // 2] == 1).all()
    assert (drawn.opaque[..., width // 2 :] == 0).all()
