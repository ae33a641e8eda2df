"""Cascades of several stages, trained and drawn end to end: 16 -> 32 -> 64 px, in pixels and in latents."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config import UserError, load, to_dict
from ldm.weights import load_codec, read_json, write_json
from pipelines.cascade import Cascade, load_cascade
from pipelines.generate import ModelRequest, generate
from pipelines.images import to_uint8
from pipelines.join import join
from training.run import train
from training.tasks import RunConfig

ROOT = Path(__file__).parent.parent
PROMPTS = ["red heart, noto style", "blue car", "cat face"]
SHARED = [f"data.path={ROOT / 'tests/data/emoji'}", "loop.images=160", "loop.log_every_images=80",
          "loop.preview_every_images=160", "loop.save_every_images=160", "loop.trackers=[]"]  # fmt: skip
STAGES = {
    "base": ("base", ["codec=null", "unshuffle=2", "data.size_px=16", "denoiser.clip_x0=1.5"]),
    "middle": ("sr", ["name=middle", "codec=null", "unshuffle=2", "data.size_px=32", "low_res.scale=2",
                      "low_res.residual=true", "low_res.contrast_floor=0.02", "upscaling.crop_px=16"]),
    "sr": ("sr", ["low_res.scale=2", "data.size_px=64"]),
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for a moment: ae, base (16 px, pixels), middle (32 px, pixels, residual), sr (64 px, latents)."""
    tmp = tmp_path_factory.mktemp("stages")
    shared = [*SHARED, f"cache={tmp / 'cache'}"]
    train(ROOT / "configs/tiny/autoencoder.yaml", tmp / "ae", shared)
    for name, (config, more) in STAGES.items():
        codec = [] if "codec=null" in more else [f"codec={tmp / 'ae/final'}"]
        train(ROOT / f"configs/tiny/{config}.yaml", tmp / name, [*shared, *codec, *more])
    return tmp


@pytest.fixture(scope="module")
def three(runs: Path) -> Path:
    """All of them in one folder."""
    return join([runs / name / "final" for name in STAGES], runs / "three")


@pytest.fixture(scope="module")
def cascade(three: Path) -> Cascade:
    return load_cascade(three)


def test_training_lowers_the_loss_and_shows_pictures(runs: Path) -> None:
    for name in STAGES:
        lines = [json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
        evaluated = [line["loss_mean"] for line in lines if line["kind"] == "eval"]
        assert evaluated[-1] < evaluated[0]
        assert (runs / name / "samples/000000000.png").is_file()


def test_three_stages_are_one_folder(three: Path, cascade: Cascade) -> None:
    assert [s.config.name for s in cascade.stages] == list(STAGES)
    assert [s.config.resolution_px for s in cascade.stages] == [16, 32, 64]
    cards = {f"training-{name}.json" for name in STAGES}
    assert {p.name for p in three.iterdir()} == {"cascade.json", "pixels", "codec", *STAGES, *cards}
    assert cascade.stages[0].codec is cascade.stages[1].codec


def test_each_stage_gets_what_the_one_before_would_save(cascade: Cascade) -> None:
    """Run alone on the picture of a file, a stage makes what it makes in the cascade, bit for bit."""
    pictures = cascade.draw(PROMPTS, [3, 4, 5])
    assert [tuple(p.shape) for p in pictures] == [(3, 3, side, side) for side in (16, 32, 64)]
    for before, after, name in zip(pictures, pictures[1:], ("middle", "sr"), strict=False):
        saved = torch.from_numpy(to_uint8(before)).permute(0, 3, 1, 2).float() / 127.5 - 1
        alone = cascade.only(name).draw(PROMPTS, [3, 4, 5], low_res=saved)[-1]
        assert torch.equal(alone, after)


def test_a_seed_holds_through_all_stages_in_any_company(cascade: Cascade) -> None:
    together = cascade(PROMPTS, [3, 4, 5])
    alone = torch.cat([cascade([p], [s]) for p, s in zip(PROMPTS, [3, 4, 5], strict=True)])
    assert torch.equal(together, alone)
    assert not torch.allclose(cascade(PROMPTS[:1], [9]), together[:1])


def test_stages_are_swapped_and_left_out(cascade: Cascade, runs: Path) -> None:
    assert cascade.only("base", "middle")(PROMPTS, [1, 2, 3]).shape[-1] == 32
    other = load_cascade(runs / "middle/final")
    swapped = Cascade([cascade.stages[0], other.stages[0]], cascade.text)
    assert torch.equal(swapped(PROMPTS, [1, 2, 3]), cascade.only("base", "middle")(PROMPTS, [1, 2, 3]))
    with pytest.raises(UserError, match="sr enlarges pictures of 32 px, but base before it makes 16 px"):
        cascade.only("base", "sr")
    with pytest.raises(UserError, match="no stage is named 'midle'; this cascade has base, middle, sr"):
        cascade.only("midle")


def test_options_are_those_of_a_stage(cascade: Cascade) -> None:
    found = cascade.sampling(steps=5, overrides=["sr.steps=2", "sr.level=0.25", "middle.guidance=1.5"])
    assert [o.steps for o in found] == [5, 4, 2]
    assert [o.level for o in found] == [0, 0, 0.25]
    assert found[1].guidance == 1.5
    for wrong, reason in (
        ("upper.steps=2", "begin with one of the stages base, middle, sr"),
        ("sr.levle=0.1", "level"),
        ("sr.level=0.9", "beyond the max_level 0.5"),
        ("base.level=0.1", "of small pictures; this stage takes none"),
        ("sr.steps", "expected a.b=value"),
    ):
        with pytest.raises(UserError, match=reason):
            cascade.sampling(overrides=[wrong])


def test_every_picture_can_be_kept(three: Path, cascade: Cascade, tmp_path: Path) -> None:
    generate(PROMPTS[:2], three, n=1, seed=4, out=tmp_path / "out", keep_stages=True)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert names == ["0000-base.png", "0000-middle.png", "0000.png", "0001-base.png", "0001-middle.png", "0001.png",
                     "grid.png"]  # fmt: skip
    drawn = cascade.draw(PROMPTS[:2], [4, 4])
    for stage, suffix in zip(drawn, ("-base", "-middle", ""), strict=True):
        with Image.open(tmp_path / f"out/0001{suffix}.png") as image:
            assert np.array_equal(np.array(image), to_uint8(stage)[1])
    generate(PROMPTS[:1], ModelRequest(three, ["base"]), n=1, out=tmp_path / "base")
    with Image.open(tmp_path / "base/0000.png") as image:
        assert image.size == (16, 16)
    with pytest.raises(UserError, match="enlarges pictures and draws none"):
        generate(PROMPTS[:1], ModelRequest(three, ["sr"]), n=1, out=tmp_path / "sr")


class TestParts:
    """A stage beside parts it was not trained with is refused (row 53 of bad inputs)."""

    def changed(self, three: Path, tmp_path: Path, stage: str, **values: object) -> Path:
        folder = Path(shutil.copytree(three, tmp_path / "changed"))
        data = read_json(folder / stage / "stage.json")
        write_json(folder / stage / "stage.json", {**data, **values})
        return folder

    def test_another_codec(self, three: Path, tmp_path: Path) -> None:
        folder = self.changed(three, tmp_path, "sr", codec="pixels")
        with pytest.raises(UserError, match="was trained with another codec"):
            load_cascade(folder)

    def test_another_size(self, three: Path, tmp_path: Path) -> None:
        folder = self.changed(three, tmp_path, "middle", resolution_px=64)
        with pytest.raises(UserError, match="enlarges pictures of 32 px, but base before it makes 16 px"):
            load_cascade(folder)

    def test_another_scale(self, three: Path, cascade: Cascade, tmp_path: Path) -> None:
        config = cascade.stages[2].config.low_res
        assert config is not None
        folder = self.changed(three, tmp_path, "sr", low_res={**to_dict(config), "scale": 4})
        with pytest.raises(UserError, match="enlarges pictures of 16 px, but middle before it makes 32 px"):
            load_cascade(folder)

    def test_weights_of_another_conditioning(self, three: Path, tmp_path: Path) -> None:
        folder = self.changed(three, tmp_path, "middle", low_res=None)
        with pytest.raises(UserError, match="can only be the first"):
            load_cascade(folder)

    def test_order_and_text_encoder(self, runs: Path, three: Path, tiny_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="base is a base, which draws from text alone"):
            join([runs / "middle/final", runs / "base/final"], tmp_path / "a")
        with pytest.raises(UserError, match="another text encoder than that of"):
            join([runs / "base/final", tiny_folder], tmp_path / "b")
        with pytest.raises(UserError, match="a name stands twice"):
            join([runs / "base/final", runs / "base/final"], tmp_path / "c")
        with pytest.raises(UserError, match="exists"):
            join([runs / "base/final"], three)


def test_a_decoder_that_learned_on_takes_the_place_of_the_first(runs: Path, three: Path, tmp_path: Path) -> None:
    """The encoder is the same byte for byte, so that a stage's latents are; what it draws is decoded otherwise."""
    more = [*SHARED, f"cache={runs / 'cache'}", f"init={runs / 'ae/final'}", "reconstruction.decoder_only=true"]
    train(ROOT / "configs/tiny/autoencoder.yaml", tmp_path / "decoder", more)
    old, new = (load_codec(folder / "final").module for folder in (runs / "ae", tmp_path / "decoder"))
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(old.encode(x), new.encode(x))
    raw = old.encode(x).chunk(2, 1)[0]
    assert not torch.equal(old.decode(raw), new.decode(raw))
    joined = load_cascade(join([three], tmp_path / "joined", tmp_path / "decoder/final"))
    assert [stage.codec.module.config.autoencoder is None for stage in joined.stages] == [True, True, False]
    assert torch.equal(joined.stages[-1].codec.module.decode(raw), new.decode(raw))
    with pytest.raises(UserError, match="no stage draws in the latents of this encoder"):
        join([runs / "base/final"], tmp_path / "none", tmp_path / "decoder/final")
    with pytest.raises(UserError, match="decoder_only keeps an encoder that has learned: say which with init"):
        load(RunConfig, ROOT / "configs/tiny/autoencoder.yaml", ["reconstruction.decoder_only=true"])


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (["upscaling.crop_px=24"], "upscaling.crop_px 24 must be a multiple of 16"),
        (["upscaling.crop_px=128"], "upscaling.crop_px 128 is larger than data.size_px 64"),
        (["low_res.scale=3"], "no multiple of low_res.scale 3"),
        (["low_res=null"], "upscaling is of SR stages"),
        (["upscaling.dropout=1"], "dropout is a share"),
        (["upscaling.degradation.kernels=[box]"], "kernels"),
        (["upscaling.degradation.jpeg_quality=[30, 200]"], "ends at 100"),
        (["low_res.levels.kind=flow"], "alpha above 0"),
        (["last=0.5", "denoiser.target=eps"], "says nothing of x0 at t = 1"),
        (["last=0.5"], "min_snr gives t = 1 next to no weight"),
        (["last=1", "denoiser.weighting=simple"], "draws in one step"),
        (["last=1.5"], "last is a share"),
    ],
)
def test_configs_that_cannot_be_are_refused(runs: Path, wrong: list[str], reason: str, tmp_path: Path) -> None:
    overrides = [*SHARED, f"cache={runs / 'cache'}", f"codec={runs / 'ae/final'}", *wrong]
    with pytest.raises(UserError, match=reason):
        load(RunConfig, ROOT / "configs/tiny/sr.yaml", overrides).load_frozen()


def test_a_regressor_is_the_same_stage_at_the_last_time(runs: Path, tmp_path: Path) -> None:
    overrides = [*SHARED, f"cache={runs / 'cache'}", f"codec={runs / 'ae/final'}", "last=1", "denoiser.target=x0",
                 "denoiser.weighting=simple", "sampling.steps=1", *STAGES["sr"][1]]  # fmt: skip
    train(ROOT / "configs/tiny/sr.yaml", tmp_path / "run", overrides)
    small = torch.rand(1, 3, 32, 32) * 2 - 1
    ordinary, regressor = load_cascade(runs / "sr/final"), load_cascade(tmp_path / "run/final")
    spread = []
    for stage in (ordinary, regressor):
        one, other = (stage.draw(["cat"], [seed], low_res=small)[-1] for seed in (1, 2))
        spread.append(float((one - other).abs().mean()))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {"loss_t1.00"} < lines[-1].keys()
    assert spread[1] < 0.5 * spread[0]
