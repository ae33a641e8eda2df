"""`ldm eval likelihood` on tiny bases, in latents and on grey pixels."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ldm.config import UserError
from ldm.latents import CodecConfig, LatentCodec, Normalisation
from ldm.text import TextConfig
from ldm.weights import Codec, load_codec, save_codec
from pipelines.cascade import Cascade, load_cascade
from pipelines.stage import Stage, build_denoiser
from tests.tiny import EMOJI, UNET, save_tiny_sr, tiny_cascade
from training.likelihood_report import evaluate

GREY = CodecConfig(unshuffle=8, autoencoder=None, grey=True)


@pytest.fixture
def grey_folder(tmp_path: Path) -> Path:
    """A base of random weights on the mean of the colours."""
    tiny, channels = tiny_cascade(TextConfig()), 64
    config = replace(tiny.stages[0].config, latent_channels=channels, codec="pixels",
                     normalisation=Normalisation((0.0,) * channels, (1.0,) * channels))  # fmt: skip
    torch.manual_seed(0)
    network = build_denoiser(UNET, config.schedule, config.denoiser, config.shape(GREY.factor))
    Cascade([Stage(config, network.eval(), Codec(LatentCodec(GREY), ""))], tiny.text).save(tmp_path / "grey")
    return tmp_path / "grey"


def test_bits_of_latents_are_called_so(tiny_folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    path = evaluate(tiny_folder, EMOJI, tmp_path / "out", split="train", rows=6, steps=5, ode_steps=4,
                    cache=tmp_path / "cache", tell=told.append)  # fmt: skip
    report = json.loads(path.read_text())
    bound = {name: value[0] for name, value in report["measures"]["bound"].items()}
    assert bound["bits/dim"] == pytest.approx(bound["prior"] + bound["steps"] + bound["decoder"])
    assert bound["prior"] < 0.01 < bound["steps"]
    assert report["unit"].startswith("the codec's latents")
    assert "Bits per dimension of the codec's latents" in told[0]
    again = evaluate(tiny_folder, EMOJI, tmp_path / "again", split="train", rows=6, steps=5, ode_steps=4,
                     cache=tmp_path / "cache")  # fmt: skip
    assert json.loads(again.read_text())["measures"] == report["measures"], "the same noise every time"
    assert "steps.png" in (tmp_path / "out/report.html").read_text()


def test_bits_of_pixels_are_those_of_bytes(grey_folder: Path, tmp_path: Path) -> None:
    """A network that knows nothing needs about the 8 bits of a byte, and more where it is sure of the wrong."""
    path = evaluate(grey_folder, EMOJI, tmp_path / "out", split="train", rows=4, steps=20, ode_steps=10,
                    cache=tmp_path / "cache")  # fmt: skip
    report = json.loads(path.read_text())
    assert report["unit"] == "8-bit pixels"
    assert report["measures"]["bound"]["bits/dim"][0] > 4
    assert report["measures"]["probability-flow ODE"]["bits/dim"][0] > 4


def test_grey_codec(tmp_path: Path) -> None:
    pictures = torch.rand(2, 3, 16, 16) * 2 - 1
    moments = LatentCodec(GREY).encode(pictures)
    assert moments.shape == (2, 128, 2, 2)
    back = LatentCodec(GREY).decode(moments.chunk(2, 1)[0])
    torch.testing.assert_close(back, pictures.mean(1, keepdim=True).expand(-1, 3, -1, -1))
    save_codec(LatentCodec(GREY), tmp_path / "codec")
    assert load_codec(tmp_path / "codec").module.config == GREY


def test_what_has_no_likelihood_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    cascade = load_cascade(save_tiny_sr(tmp_path))
    cascade.save(tmp_path / "sr")
    with pytest.raises(UserError, match="begins with stage middle, which enlarges"):
        evaluate(tmp_path / "sr", EMOJI, tmp_path / "out")
    with pytest.raises(UserError, match="--steps 2000"):
        evaluate(tiny_folder, EMOJI, tmp_path / "out", steps=2000, cache=tmp_path / "cache")
