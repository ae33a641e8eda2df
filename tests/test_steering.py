"""A noise-aware classifier trained on a stage's latents, and guidance of that stage by it and by CLIP."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from ldm.config import UserError, load
from ldm.latents import CodecConfig, LatentCodec, Normalisation
from ldm.models.clip import Clip, ClipConfig, build_clip
from ldm.models.noisy_classifier import NoisyClassifier, NoisyClassifierConfig
from ldm.text import TextConfig
from ldm.weights import Codec, load_noisy_classifier, save_clip
from pipelines.cascade import Cascade, load_cascade
from pipelines.generate import generate
from pipelines.images import read_recipe
from pipelines.stage import Stage, build_denoiser
from pipelines.steering import SteeringRequest, steering
from tests.tiny import EMOJI, ROOT, UNET, tiny_cascade
from tests.tiny_text import tiny_bert
from training.run import train
from training.tasks import RunConfig, build_task

PROMPT = "a red heart"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base on pixels: an untrained codec's latents say nothing."""
    tiny = tiny_cascade(TextConfig())
    codec = LatentCodec(CodecConfig(unshuffle=8, autoencoder=None))
    channels = codec.config.latent_channels
    config = replace(
        tiny.stages[0].config, latent_channels=channels, codec="pixels",
        normalisation=Normalisation((0.0,) * channels, (0.5,) * channels),
    )  # fmt: skip
    torch.manual_seed(0)
    network = build_denoiser(UNET, config.schedule, config.denoiser, config.shape(8))
    stage = Stage(config, network.eval().requires_grad_(False), Codec(codec, ""))
    folder = tmp_path_factory.mktemp("pixels") / "cascade"
    Cascade([stage], tiny.text).save(folder)
    return folder


@pytest.fixture(scope="module")
def trained(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("noisy")
    overrides = [f"model={model}", f"data.path={EMOJI}", f"cache={tmp}/cache"]
    return train(ROOT / "configs/tiny/noisy_classifier.yaml", tmp / "run", overrides)


def drawn(model: Path, out: Path, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
    generate([PROMPT], model, n=3, out=out, guidance=1.0, steps=10, **options)
    recipe = read_recipe(out / "0000.png")
    assert recipe is not None
    pictures = []
    for k in range(3):
        with Image.open(out / f"{k:04d}.png") as picture:
            pictures.append(np.array(picture))
    return np.stack(pictures), recipe


def test_it_learns(trained: Path) -> None:
    lines = [json.loads(line) for line in (trained.parent / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line["kind"] == "train"][-1]["style_right"] > 0.4 > 2 / 6
    last = next(line for line in reversed(lines) if line["kind"] == "final")
    assert set(last) >= {"style_t0.10", "style_t0.90"}


def test_the_picture_goes_where_the_classifier_points(trained: Path, model: Path, tmp_path: Path) -> None:
    network, _ = load_noisy_classifier(trained)
    stage = load_cascade(model).stages[0]
    wanted = network.classes["style"][1]
    likely = []
    for scale in (0.0, 20.0):
        steer = SteeringRequest(trained, [f"style={wanted}"], scale)
        pictures, recipe = drawn(model, tmp_path / str(scale), steer=steer)
        told = recipe.get("steered", {})
        assert told == ({"toward": [f"style={wanted}"], "classifier_scale": scale} if scale else {})
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        x0 = stage.config.normalisation.apply(stage.codec.module.encode(pixels).chunk(2, 1)[0])
        t = torch.full((3,), 0.05, dtype=torch.float64)
        with torch.no_grad():
            times = stage.denoiser.schedule.network_time(t)
            likely.append(float(network.eval().log_prob(x0, times, {"style": torch.tensor([1, 1, 1])}).mean()))
    assert likely[1] > likely[0]


def test_log_prob_is_the_cross_entropy_of_what_is_asked() -> None:
    """Of all labels asked for, and of no class that is -1."""
    torch.manual_seed(0)
    classes = {"style": ("a", "b", "c"), "kind": ("d", "e")}
    network = NoisyClassifier(NoisyClassifierConfig(widths=(8,), blocks=1, norm_groups=4), 4, classes).eval()
    x, time = torch.randn(3, 4, 4, 4), torch.tensor([1.0, 500.0, 900.0])
    wanted = {"style": torch.tensor([2, 0, -1]), "kind": torch.tensor([1, -1, 0])}
    with torch.no_grad():
        logits, got = network(x, time), network.log_prob(x, time, wanted)
        losses = [cross_entropy(logits[name], each, reduction="none", ignore_index=-1) for name, each in wanted.items()]
    torch.testing.assert_close(got, -(losses[0] + losses[1]))


def test_clip_moves_pictures_toward_the_prompt(tiny_folder: Path, tmp_path: Path) -> None:
    text, folder = tiny_bert(tmp_path / "bert"), tmp_path / "clip"
    torch.manual_seed(0)
    config = ClipConfig(image_px=32, max_tokens=12)
    clip = Clip(build_clip(config, text).eval(), config, lambda texts: torch.zeros(len(texts), 12).long())
    save_clip(clip, text, folder, folder)
    plain, _ = drawn(tiny_folder, tmp_path / "a")
    moved, recipe = drawn(tiny_folder, tmp_path / "b", steer=SteeringRequest(clip=folder, clip_scale=50.0))
    assert recipe["steered"] == {"clip_scale": 50.0}
    assert not np.array_equal(plain, moved)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"classifier": "here"}, "--classifier and --toward go together"),
        ({"toward": ["style=noto"]}, "--classifier and --toward go together"),
        ({"clip_scale": 1.0}, "name the CLIP by --clip"),
        ({"clip": "here", "clip_scale": -1.0}, "--clip-scale -1: must be from 0"),
        ({"classifier": "here", "toward": ["a=b"], "classifier_scale": float("nan")}, "must be from 0"),
    ],
)
def test_requests_that_say_nothing_are_refused(request_: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SteeringRequest(**request_).check()


def test_a_classifier_of_another_stage_or_without_the_class_is_refused(trained: Path, model: Path) -> None:
    stage = load_cascade(model).stages[0]
    refused = {"colour=red": "knows no label 'colour'; it has style", "style=gothic": "no style is named 'gothic'"}
    for toward, message in refused.items():
        with pytest.raises(UserError, match=message):
            steering(SteeringRequest(trained, [toward]), stage, [PROMPT])
    file = trained / "config.json"
    told = json.loads(file.read_text())
    try:
        file.write_text(json.dumps(told | {"latents_digest": "another"}))
        with pytest.raises(UserError, match="was trained on another latents_digest"):
            steering(SteeringRequest(trained, ["style=noto"]), stage, [PROMPT])
    finally:
        file.write_text(json.dumps(told))


def test_a_run_that_does_not_fit_its_stage_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    known = [f"model={tiny_folder}", f"data.path={EMOJI}", f"cache={tmp_path}/cache"]
    for more, message in (("data.size_px=32", "draws 64 px"), ("stage=sr", "no stage is named 'sr'"),
                          ("classifier.widths=[8, 8, 8, 8, 8]", "5 levels do not fit latents of 8 cells"),
                          ("labels=[colour]", "has no field 'colour'")):  # fmt: skip
        more_ = [*known, more, "classifier.norm_groups=8"]
        with pytest.raises(UserError, match=message):
            build_task(load(RunConfig, ROOT / "configs/tiny/noisy_classifier.yaml", more_))
