"""The digits lab's data, and the reports that it reads: guidance by a gradient, and both processes as pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from ldm.config import UserError, load
from ldm.models.classifier import Classifier, ClassifierConfig
from ldm.weights import save_classifier
from tests.tiny import EMOJI, ROOT, save_tiny_sr
from training import digits, process_report, steering_report
from training.data import DataConfig, Reader
from training.run import train
from training.tasks import RunConfig


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "digits"
    digits.build(folder)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each config of the lab, as short as it goes."""
    tmp, final = tmp_path_factory.mktemp("runs"), {}
    short = [f"data.path={data}", f"cache={tmp}/cache", "data.limit=96", "validation.items=8"]
    for name in ("digits", "digits_classifier", "digits_judge"):
        config = load(RunConfig, ROOT / f"configs/labs/{name}.yaml")
        images = 2 * config.loop.batch
        own = [*short, f"loop.images={images}", f"loop.save_every_images={images}", f"loop.log_every_images={images}"]
        own += [f"loop.preview_every_images={images}", "optim.warmup_images=0"]
        own += ["preview.prompts=[seven]", "preview.columns=1", "sampling.steps=5"] if name == "digits" else []
        own += [f"model={final['digits']}"] if name == "digits_classifier" else []
        final[name] = train(ROOT / f"configs/labs/{name}.yaml", tmp / name, own)
    return final


def test_the_data_are_the_digits_of_scikit_learn(data: Path) -> None:
    rows = Reader(DataConfig(str(data), "train", size_px=8)).rows
    found = load_digits()
    reader = Reader(DataConfig(str(data), "train", size_px=8))
    for row in rows[:40]:
        number = int(Path(row.key).stem)
        values = (reader.read(row).pixels.astype(float) * 16 / 255).round()
        assert np.array_equal(values, np.repeat(found.images[number][..., None], 3, -1))
        assert row.captions == (digits.NAMES[found.target[number]],)
        assert row.fields["digit"] == row.captions[0]
    assert 0.07 < len(Reader(DataConfig(str(data), "held", size_px=8)).rows) / len(found.images) < 0.13


def test_digits_are_not_written_over(data: Path) -> None:
    with pytest.raises(UserError, match="exists and is not empty"):
        digits.build(data)


def test_guidance_is_measured_by_a_judge(trained: dict[str, Path], data: Path, tmp_path: Path) -> None:
    told: list[str] = []
    path = steering_report.evaluate(
        trained["digits"], data, tmp_path / "out", trained["digits_judge"], "digit",
        classifier=trained["digits_classifier"], scales=(0.0, 2.0), pictures=12, split="held",
        overrides=["base.steps=4"], tell=told.append,
    )  # fmt: skip
    report = json.loads(path.read_text())
    assert set(report["measures"]) == {"scale 0", "scale 2"}
    for line in report["measures"].values():
        assert 0 <= line["probability"][1] <= line["probability"][0] <= line["probability"][2] <= 1
    assert report["measures"]["scale 0"] != report["measures"]["scale 2"]
    assert [line.split(":")[0] for line in told] == ["scale 0", "scale 2"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == set(steering_report.FILES)


def test_prompts_do_not_name_what_the_classifier_is_to_find(data: Path) -> None:
    row = Reader(DataConfig(str(data), "held", size_px=8)).rows[0]
    assert steering_report._unnamed(row, "digit").prompt == ""
    emoji = Reader(DataConfig(str(EMOJI), "train", size_px=64)).rows[0]
    named = steering_report._unnamed(emoji, "style").prompt
    assert named
    assert emoji.fields["style"] not in named


def test_what_cannot_be_measured_is_refused(trained: dict[str, Path], data: Path, tmp_path: Path) -> None:
    judge, model = trained["digits_judge"], trained["digits"]
    with pytest.raises(UserError, match="either --classifier or --clip"):
        steering_report.evaluate(model, data, tmp_path / "out", judge, "digit")
    with pytest.raises(UserError, match="knows digit and not style"):
        steering_report.evaluate(model, data, tmp_path / "out", judge, "style", classifier=tmp_path)
    blind = tmp_path / "blind"
    shape = ClassifierConfig(side_px=32, widths=(8, 8, 8, 8), blocks=(1, 1, 1, 1), norm_groups=4)
    save_classifier(Classifier(shape, {"colour": ("red",)}), blind)
    with pytest.raises(UserError, match="has no field 'colour'"):
        steering_report.evaluate(model, data, tmp_path / "out", blind, "colour", classifier=tmp_path, split="held")


@pytest.mark.parametrize("which", ["grey", "latents"])
def test_both_processes_are_drawn(
    which: str, trained: dict[str, Path], tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    model, source, split, side = (
        (trained["digits"], data, "held", 64) if which == "grey" else (tiny_folder, EMOJI, "train", 64)
    )
    process_report.evaluate(model, source, tmp_path / "out", split=split, pictures=2)
    with Image.open(tmp_path / "out/forward.png") as forward, Image.open(tmp_path / "out/reverse.png") as reverse:
        columns = process_report.COLUMNS
        assert forward.size == (columns * (side + 4) + 4, 2 * (side + 4) + 4)
        assert reverse.size == (columns * (side + 4) + 4, 4 * (side + 4) + 4)
        first = np.array(forward)[4 : 4 + side, 4 : 4 + side].astype(int)
        last = np.array(forward)[4 : 4 + side, -4 - side : -4].astype(int)
    assert np.abs(first - last).mean() > 10
    reader = Reader(DataConfig(str(source), split, size_px=8 if which == "grey" else 64))
    if which == "grey":
        real = reader.read(reader.rows[0]).pixels.repeat(8, 0).repeat(8, 1).astype(int)
        assert np.abs(first - real).max() <= 1


def test_the_process_of_an_sr_stage_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="which enlarges"):
        process_report.evaluate(save_tiny_sr(tmp_path), EMOJI, tmp_path / "out")
    assert torch.is_grad_enabled()
