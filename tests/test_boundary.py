"""`ldm eval cascade`: its measures against independent ones, its report, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torch import Tensor

from ldm.config import UserError
from ldm.weights import read_json
from pipelines.cascade import load_cascade
from pipelines.images import to_uint8
from pipelines.join import join
from pipelines.tiles import windows
from tests.tiny import save_tiny_cascade, save_tiny_sr
from training.boundary import (
    Held,
    best,
    colour_shift,
    consistency,
    enlarged,
    intervals,
    kid,
    sr_stage,
    what_counts,
)
from training.boundary_report import evaluate
from training.boundary_tiles import _across, tiled_against_whole
from training.features import Features

EMOJI = Path(__file__).parent / "data/emoji"


@pytest.fixture(scope="module")
def features() -> Features:
    return Features()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    found = [np.array(Image.open(p).convert("RGB").reduce(4)) for p in sorted(EMOJI.rglob("*.png"))[:12]]
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1


@pytest.fixture(scope="module")
def sr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sr(tmp_path_factory.mktemp("sr"))


def test_consistency_is_the_psnr_of_pillows_downsample(pictures: Tensor) -> None:
    small = torch.from_numpy(np.stack([np.array(Image.fromarray(p).reduce(2)) for p in to_uint8(pictures)]))
    small = small.permute(0, 3, 1, 2).float() / 127.5 - 1
    noisy = (pictures + 0.1 * torch.randn_like(pictures)).clamp(-1, 1)
    for drawn, given, found in zip(to_uint8(noisy), to_uint8(small), consistency(noisy, small), strict=True):
        shrunk = np.array(Image.fromarray(drawn).reduce(2))
        assert float(found) == pytest.approx(peak_signal_noise_ratio(given, shrunk), abs=0.3)
    assert float(consistency(pictures, small).min()) > 50


def test_colour_shift_is_in_steps_of_a_byte(pictures: Tensor) -> None:
    dark = pictures.clamp(-0.9, 0.9)
    assert colour_shift(dark + 2 / 127.5, dark).tolist() == pytest.approx([2] * len(dark), rel=1e-4)
    channel = dark.clone()
    channel[:, 0] -= 3 / 127.5
    assert colour_shift(channel, dark).tolist() == pytest.approx([1] * len(dark), rel=1e-4)


def test_features_are_those_of_the_packages_network(features: Features, pictures: Tensor) -> None:
    """Means over the grid of what the classifier gets; ordinary numbers, and a distance like one."""
    with torch.no_grad():
        pooled = features(pictures)
        maps = features.network.forward_features(pictures)
    assert torch.allclose(pooled, maps.mean((2, 3)), atol=1e-5)
    assert features.distance(pictures, pictures).abs().max() < 1e-6
    noise = torch.randn_like(pictures)
    near, far = (features.distance(pictures, pictures + s * noise) for s in (0.05, 0.3))
    assert bool((near < far).all())
    assert torch.allclose(near, features.distance(pictures + 0.05 * noise, pictures), atol=1e-5)
    assert torch.allclose(near[3:4], features.distance(pictures[3:4], pictures[3:4] + 0.05 * noise[3:4]), atol=1e-4)


def test_intervals_draw_whole_groups() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    apart = intervals({"x": values}, [str(i) for i in range(400)])["x"]
    assert apart[0] == pytest.approx(float(values.mean()), rel=1e-5)
    assert apart[2] - apart[1] == pytest.approx(2 * 1.96 / 20, rel=0.15)
    grouped = intervals({"x": values.repeat_interleave(4)}, [str(i // 4) for i in range(1600)])["x"]
    assert grouped[2] - grouped[1] == pytest.approx(apart[2] - apart[1], rel=0.05)


def test_interpolation_is_pillows(pictures: Tensor) -> None:
    found = enlarged(pictures[:2, :, :16, :20], 3, Image.Resampling.LANCZOS)
    wanted = np.array(Image.fromarray(to_uint8(pictures)[1][:16, :20]).resize((60, 48), Image.Resampling.LANCZOS))
    assert np.array_equal(to_uint8(found)[1], wanted)


def test_kid_tells_sets_apart_and_needs_enough(features: Features, pictures: Tensor) -> None:
    assert kid(pictures, pictures, features) is None
    many = torch.cat([pictures.roll(k, -1) for k in range(10)])[..., :32, :32]
    same, other = kid(many[:60], many[60:], features), kid(many[:60] * 0.3, many[60:], features)
    assert same is not None
    assert other is not None
    assert abs(same[0]) < other[0] / 4


def test_the_best_setting_is_the_quickest_of_the_good() -> None:
    def cell(steps: int, level: float, distance: float, agreement: float, guidance: float = 1) -> dict[str, object]:
        sampling = {"steps": steps, "level": level, "guidance": guidance}
        return {"sampling": sampling, "distance": [distance], "consistency_db": [agreement]}

    cells = [cell(1, 0, 0.5, 40), cell(4, 0, 0.301, 36), cell(8, 0, 0.3, 36), cell(8, 0.2, 0.1, 30)]
    assert best([cell(3, 0, 0.301, 36, 2), *cells]) == {
        "sampling": {"steps": 4, "level": 0, "guidance": 1}, "consistent": True}  # fmt: skip
    assert best(cells[3:]) == {"sampling": {"steps": 8, "level": 0.2, "guidance": 1}, "consistent": False}


def test_the_level_is_chosen_on_what_the_base_draws() -> None:
    told = {"steps": 4, "level": 0.0, "guidance": 1.0}
    cells = [{"sampling": told, "distance": [0.3], "consistency_db": [36]}]

    def after(*kids: float | None) -> list[dict[str, object]]:
        return [{"level": 0.1 * k, "kid": None if kid is None else [kid, 0.01]} for k, kid in enumerate(kids)]

    for kids, level in (((0.2, 0.1, 0.15), 0.1), ((0.2, 0.19, 0.185), 0), ((None, None), 0)):
        assert best(cells, after(*kids))["sampling"] == {**told, "level": level}


def test_borders_are_seen(pictures: Tensor) -> None:
    ramp = torch.linspace(-1, 1, 64)
    smooth = (ramp + ramp[:, None]).expand(1, 3, 64, 64).clone()
    where = windows(16, 16, 10, 4)
    border, beside = _across(smooth, where, cell=4, scale=2)
    assert border == pytest.approx(beside)
    smooth[..., 24:] += 0.2
    border, beside = _across(smooth, where, cell=4, scale=2)
    assert border > 2 * beside


def test_what_counts_changes_one_thing_at_a_time(sr: Path, pictures: Tensor) -> None:
    cascade = load_cascade(sr)
    large = pictures[:3, :, :32, :32]
    same = Held(large, torch.nn.functional.avg_pool2d(large, 2), ["a"] * 3, ["x", "y", "z"])
    found = what_counts(cascade, sr_stage(cascade), same)
    assert found["text_changed"] == 0
    assert min(found["level_changed"], found["seed_changed"]) > 0
    other = what_counts(cascade, sr_stage(cascade), replace(same, captions=["a", "b", "c"]))
    assert other["text_changed"] > 0
    assert other["seed_changed"] != found["seed_changed"]


def test_tiled_and_whole(sr: Path) -> None:
    cascade = load_cascade(sr)
    large = torch.rand(2, 3, 32, 32) * 2 - 1
    found = tiled_against_whole(cascade, sr_stage(cascade), Held(large, large, ["a", "b"], ["x", "y"]))
    assert found["tiles"] == 9
    assert found["side_px"] == [64, 64]
    assert found["seam"].keys() == found["consistency_db"].keys() == {"tiled", "whole"}
    assert found["psnr_db"] < 60


def test_the_report_is_whole(sr: Path, tmp_path: Path) -> None:
    """Of a cascade with a base before, beside another stage; the best setting is kept where that is asked for."""
    base = save_tiny_cascade(tmp_path / "base", "bert")
    config = read_json(base / "base/stage.json")
    (base / "base/stage.json").write_text(json.dumps({**config, "resolution_px": 16}))
    model = join([base, sr], tmp_path / "model")
    lines: list[str] = []
    path = evaluate(model, EMOJI, tmp_path / "out", pictures=4, split="train", against=[sr], swept=("level=0,0.2",
                    "steps=1,2", "guidance=1,2"), sweep_pictures=2, tiled=1, save=True, tell=lines.append)  # fmt: skip
    report = json.loads(path.read_text())
    assert report["ground_truth"].keys() == {"bicubic", "lanczos", "codec round trip", "middle", str(sr)}
    for values in report["ground_truth"].values():
        assert values.keys() == {"psnr_db", "ssim", "distance", "colour_shift", "consistency_db"}
        assert all(low <= mean <= high for mean, low, high in values.values())
    assert report["ground_truth"]["bicubic"]["psnr_db"][0] > report["ground_truth"]["middle"]["psnr_db"][0]
    assert len(report["sweep"]) == 8
    assert len({json.dumps(cell["sampling"]) for cell in report["sweep"]}) == 8
    assert [line["level"] for line in report["after_base"]] == [0.0, 0.2]
    assert report["after_base"][0]["kid"] is None
    kept = read_json(model / "middle/stage.json")["sampling"]
    assert kept == report["best"]["sampling"]
    assert load_cascade(model).digest
    with Image.open(tmp_path / "out/curves.png") as image:
        assert image.width > 600
    with Image.open(tmp_path / "out/pictures.png") as image:
        assert image.width > len(report["columns"]) * 32


def test_what_cannot_be_measured_is_refused(sr: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no SR stage"):
        evaluate(tiny_folder, EMOJI, tmp_path / "out")
    with pytest.raises(UserError, match="no SR stage named 'up'"):
        evaluate(sr, EMOJI, tmp_path / "out", stage="up")
    for wrong, reason in (
        ({"swept": ("level=0,0.7",)}, r"beyond the max_level 0\.5"),
        ({"swept": ("steps=1,2000",)}, "from 1 to 1000"),
        ({"swept": ("step=1",)}, "did you mean steps"),
        ({"swept": ("steps",)}, "a field of the sampling, once, and its values"),
        ({"swept": ("steps=1", "steps=2")}, "a field of the sampling, once, and its values"),
        ({"split": "none"}, "has no split .none."),
    ):
        with pytest.raises(UserError, match=reason):
            evaluate(sr, EMOJI, tmp_path / "out", **wrong)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    other = join([sr], tmp_path / "other")
    data = read_json(other / "cascade.json")
    (other / "cascade.json").write_text(json.dumps({**data, "stages": ["sr"]}))
    with pytest.raises(UserError, match="32 -> 64 px cannot stand beside 16 -> 32 px"):
        evaluate(sr, EMOJI, tmp_path / "out", against=[other])
    copied = shutil.copytree(sr, tmp_path / "copied")
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.json").touch()
    with pytest.raises(UserError, match=r"report\.json exists already"):
        evaluate(copied, EMOJI, tmp_path / "report")
