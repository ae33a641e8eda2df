"""`ldm train my-pictures`: a run without a config, which begins from a released stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import UserError
from pipelines.cascade import load_cascade
from pipelines.foreign import export_pipeline, load_pipeline
from tests.test_foreign import SCHEDULERS, SD1, apart, ours, stable_diffusion, theirs
from tests.tiny import EMOJI, save_tiny_sr
from tests.tiny_text import tiny_clip
from training.presets import decoder, tuning
from training.run import train

SHORT = ["--set", "loop.images=16", "--set", "loop.log_every_images=8", "--set", "loop.preview_every_images=16",
         "--set", "loop.save_every_images=16", "--set", "sampling.steps=2", "--set",
         "optim.warmup_images=0"]  # fmt: skip

SHORT_DECODER = [*SHORT[:8], "--set", "optim.warmup_images=0", "--set", "loop.batch=8"]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight pictures with captions, as anyone might have them."""
    folder = tmp_path / "my pictures"
    folder.mkdir()
    for k, source in enumerate(sorted(EMOJI.rglob("*.png"))[:8]):
        shutil.copyfile(source, folder / f"{k}.png")
        (folder / f"{k}.txt").write_text(f"a picture of {k}", encoding="utf-8")
    return folder


@pytest.mark.parametrize("preset", ["full", "sr"])
def test_one_command_trains_a_stage_of_a_cascade(
    pictures: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tiny_folder if preset == "full" else save_tiny_sr(tmp_path / "tiny")
    words = ["train", str(pictures), "--preset", preset, "--model", str(model), *SHORT]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    final = Path("runs") / f"my pictures-{preset}" / "final"
    assert done.output.splitlines()[-1] == str(final)
    cascade, before = load_cascade(final), load_cascade(model)
    stage = cascade.stages[0]
    old = next(s for s in before.stages if s.config.name == stage.config.name)
    assert (stage.config.low_res is None) == (preset == "full")
    assert stage.config.normalisation == old.config.normalisation
    weights = zip(stage.denoiser.parameters(), old.denoiser.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in weights)
    assert (final.parent / "samples").is_dir()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 0
    assert "train " not in again.output


def test_a_decoder_learns_on_and_joins_the_cascade_again(
    pictures: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["train", str(pictures), "--preset", "decoder", "--model", str(tiny_folder), *SHORT_DECODER]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    final = Path("runs/my pictures-decoder/final")
    assert done.output.splitlines()[-1] == str(final)
    done = CliRunner().invoke(app, ["ckpt", "join", str(tiny_folder), "--out", "mine", "--codec", str(final)])
    assert done.exit_code == 0, done.output
    before, after = (load_cascade(folder).stages[0].codec for folder in (tiny_folder, "mine"))
    assert before.latents_digest == after.latents_digest
    weights = after.module.state_dict()
    changed = {name for name, value in before.module.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed
    assert all(".decoder." in name or ".post_quant_conv." in name for name in changed)
    pixels = shutil.copytree(tiny_folder, tmp_path / "pixels")
    file = pixels / "codec" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "autoencoder": None}), encoding="utf-8")
    with pytest.raises(UserError, match="its base works on pixels: there is no decoder to train"):
        decoder(pictures, pixels)


def test_what_learned_means_goes_on_with_means(pictures: Path, tiny_folder: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "of-means")
    file = model / "base" / "stage.json"
    told = json.loads(file.read_text(encoding="utf-8"))
    assert told["posterior"] == "draw"
    assert tuning(pictures, "lora", model).posterior == "draw"
    file.write_text(json.dumps({**told, "posterior": "mean"}), encoding="utf-8")
    assert tuning(pictures, "lora", model).posterior == "mean"
    final = train(pictures, tmp_path / "run", [*SHORT[1::2], f"cache={tmp_path / 'cache'}"], model=model)
    assert load_cascade(final).stages[0].config.posterior == "mean"


def test_a_split_that_metadata_name_is_held_out(pictures: Path, tiny_folder: Path) -> None:
    for caption in pictures.glob("*.txt"):
        caption.unlink()
    rows = [{"file_name": f"{k}.png", "caption": f"thing {k}", "split": "test" if k > 5 else "train"} for k in range(8)]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    made = tuning(pictures, "full", tiny_folder)
    assert (made.data.split, made.validation.split) == ("train", "test")
    assert made.preview.prompts == tuple(f"thing {k}" for k in range(4))
    own = tuning(pictures, "full", tiny_folder, ["data.split=test"])
    assert (own.data.split, own.validation.split) == ("test", "test")


def test_a_control_net_hears_half_of_the_captions(pictures: Path, tiny_folder: Path) -> None:
    assert [tuning(pictures, preset, tiny_folder).dropout for preset in ("control", "full")] == [0.5, 0.1]


def test_the_rest_is_in_shares_of_the_images_asked_for(pictures: Path, tiny_folder: Path) -> None:
    loop = tuning(pictures, "full", tiny_folder, ["loop.images=2000"]).loop
    assert (loop.images, loop.preview_every_images, loop.log_every_images) == (2000, 500, 100)


def test_captions_are_previewed_and_passes_counted(pictures: Path, tiny_folder: Path) -> None:
    config = tuning(pictures, "full", tiny_folder)
    assert config.preview.prompts == ("a picture of 0", "a picture of 1", "a picture of 2", "a picture of 3")
    assert config.loop.images == 4000
    assert config.init == str(tiny_folder)


def test_what_cannot_be_begun_from_is_refused(pictures: Path, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of its stages base enlarges pictures, which preset sr"):
        tuning(pictures, "sr", tiny_folder)
    (tmp_path / "sd").mkdir()
    (tmp_path / "sd/model_index.json").write_text("{}")
    with pytest.raises(UserError, match="a pipeline of diffusers; write it as a cascade first: ldm import"):
        tuning(pictures, "full", tmp_path / "sd")
    with pytest.raises(UserError, match=r"loop.imagse: unknown key"):
        tuning(pictures, "full", tiny_folder, ["loop.imagse=4"])
    config = tmp_path / "run.yaml"
    config.write_text("kind: diffusion\n")
    refused = CliRunner().invoke(app, ["train", str(config), "--preset", "full"])
    assert isinstance(refused.exception, UserError)
    assert "are of data sets" in str(refused.exception)


def test_stable_diffusion_goes_through_the_trainer_and_back(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Imported, trained for two steps in its own units, written back: the stock pipeline draws what we draw."""
    stock = stable_diffusion(tiny_clip(tmp_path / "clip"), SD1, SCHEDULERS["ddim"]())
    stock.save_pretrained(tmp_path / "stock")
    load_pipeline(tmp_path / "stock").save(tmp_path / "ours")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", str(pictures), "--model", "ours", "--run", "run", *SHORT])
    assert done.exit_code == 0, done.output
    trained = load_cascade(tmp_path / "run/final")
    assert trained.stages[0].config.normalisation.std == pytest.approx((1 / 0.18215,) * 4)
    assert trained.stages[0].config.noise == "in_order"
    export_pipeline(trained, tmp_path / "back")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "back", torch_dtype=torch.float32)
    again.set_progress_bar_config(disable=True)
    found, _ = ours(trained, monkeypatch)
    latents, _ = theirs(again)
    assert apart(found, latents) < 1e-4
    assert apart(theirs(stock)[0], latents) > 1e-4
