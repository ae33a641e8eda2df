"""Prior preservation: two sets mixed into one, and training on both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import UserError
from pipelines.generate import generate
from tests.test_presets import SHORT, pictures
from training.presets import tuning
from training.prior import Mixed, PriorConfig
from training.tasks import build_task

__all__ = ["pictures"]


@pytest.fixture
def prior(tiny_folder: Path, tmp_path: Path) -> Path:
    """Three pictures that the network draws, with their captions: a data set."""
    generate(["a red face"], tiny_folder, n=3, seed=1, steps=2, out=tmp_path / "prior", captions=True)
    return tmp_path / "prior"


def test_generated_pictures_are_a_data_set(prior: Path) -> None:
    rows = [json.loads(line) for line in (prior / "metadata.jsonl").read_text().splitlines()]
    assert rows == [{"file_name": f"000{k}.png", "caption": "a red face"} for k in range(3)]


@pytest.mark.parametrize(("share", "counts"), [(0.5, (7, 7)), (0.25, (9, 3)), (0.75, (7, 21))])
def test_every_item_is_there_and_the_shares_hold(
    pictures: Path, prior: Path, tiny_folder: Path, tmp_path: Path, share: float, counts: tuple[int, int]
) -> None:
    more = [f"cache={tmp_path / 'cache'}", f"prior.path={prior}", f"prior.share={share}"]
    task = build_task(tuning(pictures, "full", tiny_folder, more))
    own = build_task(tuning(pictures, "full", tiny_folder, more[:1])).cache
    other = build_task(tuning(prior, "full", tiny_folder, [more[0], "validation.split=null"])).cache
    mixed = task.cache
    assert isinstance(mixed, Mixed)
    assert len(own) == 7  # of eight; every twentieth is held out, the first
    keys = [mixed.record(i)["key"] for i in range(len(mixed))]
    assert (sum(not k.startswith("000") for k in keys), sum(k.startswith("000") for k in keys)) == counts
    assert len(set(keys)) == 7 + 3
    assert len(other) == 2  # of three; the first is held out
    for source, index in ((own, 0), (other, keys.index("0001.png"))):
        place = next(i for i in range(len(source)) if source.record(i)["key"] == keys[index])
        assert torch.equal(mixed.stored([index]), source.stored([place]))
        text, expected = (s.text([s.captions(i)[0]]).text for s, i in ((mixed, index), (source, place)))
        assert torch.equal(text, expected)
    assert torch.equal(mixed.stored([0, len(mixed) - 1])[1:], mixed.stored([len(mixed) - 1]))
    assert torch.equal(mixed.null.text, own.null.text)
    assert mixed.normalisation == own.normalisation


def test_a_run_is_trained_on_both(
    pictures: Path, prior: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", str(pictures), "--preset", "lora", "--model", str(tiny_folder), *SHORT,
             "--set", f"prior.path={prior}"]  # fmt: skip
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "runs/my pictures-lora/cache.json").read_text())
    assert record["prior"]["count" if "count" in record["prior"] else "data"]
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0
    assert "train " not in again.output
    generate(["a blue face"], tiny_folder, n=3, seed=5, steps=2, out=prior, captions=True, overwrite=True)
    other = CliRunner().invoke(app, words)
    assert isinstance(other.exception, UserError)  # another prior is other data, and the run is not gone on with


def test_what_cannot_be_is_refused(pictures: Path, tiny_folder: Path, prior: Path) -> None:
    with pytest.raises(ValueError, match="share must be between 0 and 1"):
        PriorConfig("somewhere", 1.0)
    for preset, more in (("full", ["encode=online"]), ("inversion", [])):
        with pytest.raises(UserError, match="set encode=cached and leave inversion out"):
            tuning(pictures, preset, tiny_folder, [f"prior.path={prior}", *more])
