"""Palette: colours of the data, the likeliest of each pixel, and what a cascade draws with one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from ldm.cli import app
from ldm.conditioning import Conditioning
from ldm.config import UserError, load
from ldm.lora import PREFIX, LoraConfig, add_lora, save_lora
from ldm.models.palette import Palette, PaletteConfig, common_colours, nearest_colour, pooled
from ldm.weights import load_palette, read_json, save_palette, write_json
from ldm.words import save_words
from pipelines.cascade import load_cascade
from pipelines.images import read_recipe
from pipelines.join import join
from tests.test_presets import SHORT
from tests.tiny import EMOJI
from training.palette import PaletteRun, PaletteTask, colours_of
from training.run import train
from training.tasks import RunConfig, build_task

ROOT = Path(__file__).parent.parent
SMALL = PaletteConfig(colours=6, widths=(8, 16), features=4)
COLOURS = torch.tensor([[255.0, 255, 255], [0, 0, 0], [250, 10, 20], [40, 60, 200], [41, 170, 90], [250, 200, 40]])
PROMPTS = ["red heart, noto style", "blue car"]


def sure(none: float, text_width: int = 8, config: PaletteConfig = SMALL) -> Palette:
    """A palette that takes the nearest colour, unless the logit of none of them is large."""
    torch.manual_seed(0)
    palette = Palette(config, COLOURS, text_width)
    for value in palette.choices.parameters():
        value.data.zero_()
    palette.choices.bias.data[-1] = none
    return palette.eval().requires_grad_(False)


def told(rows: int = 2, width: int = 8) -> Conditioning:
    return Conditioning(torch.randn(rows, 3, width), torch.tensor([[True, True, False]]).expand(rows, -1))


class TestNetwork:
    def test_the_likeliest_colour_is_put_or_the_pixel_kept(self) -> None:
        generator = torch.Generator().manual_seed(1)
        chosen = COLOURS[torch.randint(6, (2, 8, 12), generator=generator)].movedim(-1, 1)
        pictures = (chosen + 30 * torch.randn(chosen.shape, generator=generator)) / 127.5 - 1
        pixels = (pictures.clamp(-1, 1).numpy().astype(np.float64) + 1) * 127.5
        away = ((pixels[:, None] - COLOURS.numpy()[None, :, :, None, None]) ** 2).sum(2)  # (B, K, H, W)
        nearest = COLOURS.numpy()[away.argmin(1)].transpose(0, 3, 1, 2) / 127.5 - 1
        assert np.allclose(sure(-1e4)(pictures, told()).numpy(), nearest, atol=1e-6)
        assert np.allclose(sure(1e4)(pictures, told()).numpy(), pictures.clamp(-1, 1).numpy(), atol=1e-6)
        # p(none) = 1 / (1 + sum of exp(-d^2 / 800)), against the share from which a pixel is kept
        none = 1 / (1 + np.exp(-away / 800).sum(1))[:, None]
        expected = np.where(none < SMALL.keep, nearest, pictures.clamp(-1, 1).numpy())
        assert 0.1 < (none < SMALL.keep).mean() < 0.9
        assert np.allclose(sure(0.0)(pictures, told()).numpy(), expected, atol=1e-6)

    def test_chances_sum_to_one_and_half_precision_leaves_colours_exact(self) -> None:
        torch.manual_seed(0)
        palette = Palette(SMALL, COLOURS, 8).eval()
        features, pixels = torch.randn(50, 4), torch.rand(50, 3) * 255
        found = palette.log_probs(features, pixels)
        assert found.shape == (50, 7)
        assert torch.allclose(found.exp().sum(1), torch.ones(50))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(palette.log_probs(features, pixels), found)

    def test_text_decides(self) -> None:
        torch.manual_seed(0)
        palette, pictures = Palette(SMALL, COLOURS, 8).eval(), torch.rand(1, 3, 16, 16)
        a, b = (palette.features_of(pictures, torch.full((1, 8), value)) for value in (-1.0, 1.0))
        assert not torch.allclose(a, b)

    def test_pooled_text_is_the_mean_of_real_tokens(self) -> None:
        states = torch.randn(2, 4, 8)
        mask = torch.tensor([[True, True, False, False], [True] * 4])
        expected = torch.stack([states[0, :2].mean(0), states[1].mean(0)])
        assert torch.allclose(pooled(Conditioning(states, mask)), expected, atol=1e-6)
        assert torch.allclose(pooled(Conditioning(states)), states.mean(1), atol=1e-6)

    def test_the_nearest_colour_or_none(self) -> None:
        pixels = torch.tensor([[255.0, 254, 253], [3, 0, 0], [0, 5, 0], [45, 60, 200], [128, 128, 128]])
        assert nearest_colour(pixels, COLOURS, 4.0).tolist() == [0, 1, 6, 6, 6]
        assert nearest_colour(pixels, COLOURS, 5.0).tolist() == [0, 1, 1, 3, 6]
        steps = torch.arange(27.0, 252, 32)
        many = torch.cartesian_prod(steps, steps, steps)
        at_the_very_distance = many + torch.tensor([4.0, 0, 0])
        assert torch.equal(nearest_colour(at_the_very_distance, many, 4.0), torch.arange(len(many)))

    def test_common_colours_are_the_commonest_that_are_apart(self) -> None:
        counts = torch.zeros(1 << 24, dtype=torch.int64)
        drawn = ((10, 20, 30, 9), (10, 20, 32, 8), (10, 20, 33, 7), (200, 0, 1, 5), (9, 9, 9, 1))
        for red, green, blue, count in drawn:
            counts[(red << 16) + (green << 8) + blue] = count
        found = common_colours(counts, PaletteConfig(colours=3, same=4.0))  # 2 apart is too near
        assert found.tolist() == [[10, 20, 30], [10, 20, 33], [200, 0, 1]]
        assert len(common_colours(counts, PaletteConfig(colours=9, same=4.0))) == 4

    @pytest.mark.parametrize(("values", "said"), [
        ({"colours": 1}, "colours must be from 2"), ({"same": 0.0}, "same is a distance"),
        ({"keep": 0.0}, "keep is a probability"), ({"widths": ()}, "name a level"), ({"features": 0}, "features be 1"),
        ({"widths": (9,)}, "multiples of norm_groups"),
    ])  # fmt: skip
    def test_what_cannot_be_is_refused(self, values: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            PaletteConfig(**values)


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny cascade whose base has a palette."""
    tmp = tmp_path_factory.mktemp("palette")
    text = load_cascade(tiny_folder).text
    save_palette(sure(-1e4, text.width), text.digest, tmp / "palette")
    write_json(tmp / "palette/training.json", {"images": 1})
    return join([tiny_folder], tmp / "model", palette=tmp / "palette")


class TestCascade:
    def test_what_is_drawn_is_on_the_palette(self, tiny_folder: Path, model: Path) -> None:
        cascade, plain = load_cascade(model), load_cascade(tiny_folder)
        with_it = cascade.only("base").draw(PROMPTS, [3, 4])[-1]
        without = plain.only("base").draw(PROMPTS, [3, 4])[-1]
        found = ((with_it + 1) * 127.5).round().movedim(1, -1).reshape(-1, 3).unique(dim=0)
        assert {tuple(c) for c in found.tolist()} <= {tuple(c) for c in COLOURS.tolist()}
        off = cascade.sampling(overrides=["base.palette=false"])[:1]
        assert torch.equal(cascade.only("base").draw(PROMPTS, [3, 4], off)[-1], without)
        assert not torch.equal(with_it, without)
        assert torch.equal(cascade.only("base").draw(PROMPTS[1:], [4])[-1], with_it[1:])
        assert cascade.digest != plain.digest

    def test_each_picture_is_told_its_own_text(self, tiny_folder: Path) -> None:
        """In calls of two rows, of which the last is padded; and the sides are multiples of both networks'."""
        cascade = load_cascade(tiny_folder)
        stage = cascade.stages[0]
        torch.manual_seed(1)
        deep = PaletteConfig(colours=6, keep=1.0, widths=(8,) * 5, features=4)
        palette = Palette(deep, COLOURS, cascade.text.width).eval().requires_grad_(False)
        palette.choices.weight.data.mul_(40)
        palette.text.weight.data.mul_(40)
        painted = replace(stage, palette=palette)
        assert (stage.multiple_px, painted.multiple_px) == (16, 32)
        prompts = [*PROMPTS, "a dog"]
        cond, null = (Conditioning(*cascade.text.encode(texts)) for texts in (prompts, [""]))
        plain = stage.sample(cond, null, [1, 1, 1], stage.config.sampling)
        found = painted.sample(cond, null, [1, 1, 1], stage.config.sampling)
        assert torch.equal(found, torch.cat([palette(plain[i : i + 1], cond[i : i + 1]) for i in range(3)]))
        assert not torch.equal(found, torch.cat([palette(plain[i : i + 1], null) for i in range(3)]))
        assert not torch.equal(found[:2], palette(plain[:2], cond[1:]))

    def test_it_is_saved_and_read(self, model: Path, tmp_path: Path) -> None:
        cascade = load_cascade(model)
        cascade.save(tmp_path / "again")
        assert load_cascade(tmp_path / "again").digest == cascade.digest
        assert read_json(model / "base/stage.json")["palette"] is True
        assert read_json(model / "training-palette.json") == {"images": 1}
        palette, _ = load_palette(model / "base/palette")
        assert torch.equal(palette.colours, COLOURS)
        (tmp_path / "again/base/palette/model.safetensors").unlink()
        with pytest.raises(UserError, match=r"model.safetensors: no such file"):
            load_cascade(tmp_path / "again")

    def test_the_flag_joins_it_and_a_recipe_says_where_it_is_off(
        self, tiny_folder: Path, model: Path, tmp_path: Path
    ) -> None:
        words = ["ckpt", "join", str(tiny_folder), "--out", str(tmp_path / "m")]
        done = CliRunner().invoke(app, [*words, "--palette", str(model / "base/palette")])
        assert done.exit_code == 0, done.output
        assert load_cascade(tmp_path / "m").digest == load_cascade(model).digest
        for name, more in (("on", []), ("off", ["--set", "base.palette=false"])):
            words = ["generate", "a cat", "--model", str(model), "--n", "1", "--steps", "2", *more]
            done = CliRunner().invoke(app, [*words, "--out", str(tmp_path / name)])
            assert done.exit_code == 0, done.output
        recipes = [read_recipe(tmp_path / name / "0000.png") for name in ("on", "off")]
        assert all(recipes)
        assert ["palette" in recipe["stages"][0] for recipe in recipes if recipe] == [False, True]

    def test_with_weights_or_words_of_other_pictures_it_is_left_out(
        self, tiny_folder: Path, model: Path, tmp_path: Path
    ) -> None:
        net = load_cascade(tiny_folder).stages[0].denoiser.net
        config = LoraConfig(rank=2)
        add_lora(net, config)
        save_lora({PREFIX: net}, config, tmp_path / "lora")
        text = load_cascade(model).text
        save_words({"<it>": torch.zeros(1, text.width)}, tmp_path / "words")
        for tuned in (load_cascade(model).merged([str(tmp_path / "lora")]),
                      load_cascade(model).taught([str(next((tmp_path / "words").iterdir()))])):  # fmt: skip
            assert tuned.stages[0].palette is None
            assert sum("the palette of base is left out" in note for note in tuned.notes) == 1
        twice = load_cascade(model).merged([str(tmp_path / "lora"), f"{tmp_path / 'lora'}:0.5"])
        assert len(twice.notes) == 1

    def test_joining_again_keeps_the_records_of_what_stays(
        self, tiny_folder: Path, model: Path, tmp_path: Path
    ) -> None:
        shutil.copytree(model, tmp_path / "old")
        for part in ("base", "codec"):
            write_json(tmp_path / f"old/training-{part}.json", {"of": part})
        join([tmp_path / "old"], tmp_path / "again")
        assert {p.name for p in (tmp_path / "again").glob("training-*")} == {
            f"training-{part}.json" for part in ("base", "codec", "palette")
        }
        join([tmp_path / "old"], tmp_path / "new", codec=model / "codec", palette=model / "base/palette")
        assert {p.name for p in (tmp_path / "new").glob("training-*")} == {"training-base.json"}

    def test_a_base_that_has_one_is_tuned_without(self, model: Path, tmp_path: Path) -> None:
        own = [f"cache={tmp_path / 'cache'}", *SHORT[1::2]]
        final = train(EMOJI, tmp_path / "run", own, preset="full", model=model)
        assert load_cascade(final).stages[0].palette is None

    def test_what_does_not_fit_is_refused(self, tiny_folder: Path, model: Path, tmp_path: Path) -> None:
        width = load_cascade(tiny_folder).text.width
        save_palette(sure(0.0, width), "0" * 64, tmp_path / "other")
        with pytest.raises(UserError, match="no palette is there; of a run, name RUN/final"):
            join([tiny_folder], tmp_path / "out", palette=tmp_path)
        with pytest.raises(UserError, match="trained with another text encoder"):
            join([tiny_folder], tmp_path / "out", palette=tmp_path / "other")
        deep = PaletteConfig(colours=6, widths=(8,) * 8, features=4)
        save_palette(sure(0.0, width, deep), load_cascade(tiny_folder).text.digest, tmp_path / "deep")
        with pytest.raises(UserError, match="takes sides that are multiples of 256 px"):
            join([tiny_folder], tmp_path / "out", palette=tmp_path / "deep")
        shutil.copytree(model, tmp_path / "changed")
        file = tmp_path / "changed/base/palette/config.json"
        write_json(file, {**read_json(file), "colours": 5})
        with pytest.raises(UserError, match=r"does not fit its config: choices.bias: shape \(7,\), expected \(6,\)"):
            load_cascade(tmp_path / "changed")
        assert not (tmp_path / "out").exists()


class TestTraining:
    @pytest.fixture(scope="class")
    def run(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        tmp = tmp_path_factory.mktemp("palette")
        return train(ROOT / "configs/tiny/palette.yaml", tmp / "run", overrides(tmp, "loop.images=960")).parent

    def test_it_learns_to_put_colours_back(self, run: Path) -> None:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [line["loss"] for line in lines if line["kind"] == "train"]
        assert losses[-1] < 0.7 * losses[0]
        last = next(line for line in reversed(lines) if line["kind"] == "final")
        assert last["right"] > last["right_degraded"] + 0.1
        assert sorted(p.name for p in (run / "samples").iterdir())[0] == "000000000.png"

    def test_what_it_was_released_as_goes_on(self, run: Path, tmp_path: Path) -> None:
        more = [f"init={run / 'final'}", "palette.keep=0.5"]
        config = load(RunConfig, ROOT / "configs/tiny/palette.yaml", overrides(run.parent, *more))
        task = build_task(config)
        assert isinstance(task, PaletteTask)
        released, _ = load_palette(run / "final")
        assert released.config.keep == PaletteConfig().keep
        started: Any = task.module
        assert started.palette.config.keep == 0.5
        assert all(torch.equal(a, b) for a, b in zip(started.palette.parameters(), released.parameters(), strict=True))
        with pytest.raises(UserError, match="a palette of another shape"):
            build_task(load(RunConfig, ROOT / "configs/tiny/palette.yaml",
                            overrides(run.parent, more[0], "palette.features=8")))  # fmt: skip

    def test_encoding_in_each_step_changes_no_loss(self, run: Path, tmp_path: Path) -> None:
        found = []
        for way in ("cached", "online"):
            more = [f"cache={run.parent / 'cache'}", f"encode={way}", "loop.log_every_images=32"]
            train(ROOT / "configs/tiny/palette.yaml", tmp_path / way, overrides(tmp_path, *more))
            lines = [json.loads(line) for line in (tmp_path / way / "metrics.jsonl").read_text().splitlines()]
            found.append([line["loss"] for line in lines if line["kind"] == "train"])
        assert len(found[0]) == 10
        assert found[1] == pytest.approx(found[0], rel=1e-3)  # a cache holds states in half precision

    def test_its_colours_are_the_commonest_of_the_data(self, run: Path) -> None:
        config = load(RunConfig, ROOT / "configs/tiny/palette.yaml", overrides(run.parent))
        assert isinstance(config, PaletteRun)
        cache = PaletteTask(config, config.validation.readers(config.data, config.shard_items)).cache
        pixels = cache.stored(list(range(len(cache)))).reshape(-1, 3).numpy()
        values, counts = np.unique(pixels, axis=0, return_counts=True)
        found = colours_of(cache, config.palette)
        assert found[0].tolist() == values[counts.argmax()].tolist()
        assert len(found) == config.palette.colours
        assert torch.pdist(found).min() > config.palette.same / 2

    @pytest.mark.parametrize(("more", "said"), [
        ("data.size_px=30", "data.size_px 30 must be a multiple of 4"), ("pixels=5000", "pixels must be from 1"),
        ("dropout=1.0", "dropout is a share"), ("degradation={}", "degradation leaves every picture as it is"),
    ])  # fmt: skip
    def test_what_cannot_be_trained_is_refused(self, tmp_path: Path, more: str, said: str) -> None:
        with pytest.raises(UserError, match=said):
            load(RunConfig, ROOT / "configs/tiny/palette.yaml", overrides(tmp_path, more))


def overrides(tmp: Path, *more: str) -> list[str]:
    data = f"data.path={ROOT / 'tests/data/emoji'}"
    return [data, f"cache={tmp / 'cache'}", "loop.images=320", "loop.log_every_images=160",
            "loop.preview_every_images=320", "loop.save_every_images=320", "loop.trackers=[]", *more]  # fmt: skip
