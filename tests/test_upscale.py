"""`ldm upscale`: any picture of any size, tiles without seams, transparency kept, and clear refusals."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ldm.conditioning import Conditioning
from ldm.config import UserError
from pipelines import upscale as module
from pipelines.cascade import Cascade, load_cascade
from pipelines.images import read_recipe, to_uint8
from pipelines.settings import SamplingConfig
from pipelines.tiles import Window, blended, windows
from pipelines.upscale import enlarging, photographic, upscale
from tests.tiny import save_tiny_sr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two SR stages with random weights: 16 -> 32 px in pixels, 32 -> 64 px in latents; grids in tiles beyond."""
    return save_tiny_sr(tmp_path_factory.mktemp("sr"))


@pytest.fixture(scope="module")
def cascade(folder: Path) -> Cascade:
    return load_cascade(folder)


def picture(path: Path, size: tuple[int, int] = (20, 12), mode: str = "RGB") -> Path:
    values = np.random.default_rng(0).integers(0, 255, (size[1] // 4 + 1, size[0] // 4 + 1, 4), dtype=np.uint8)
    Image.fromarray(values).resize(size).convert(mode).save(path)
    return path


def opened(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def recipe_of_input(path: Path) -> object:
    recipe = read_recipe(path)
    assert recipe is not None
    return recipe["input_sha256"]


class TestWindows:
    @pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 8), (31, 50), (5, 64), (16, 16), (100, 9)])
    def test_they_cover_a_grid_evenly_and_overlap(self, height: int, width: int) -> None:
        found = windows(height, width, 8, 2)
        covered = torch.zeros(height, width)
        for w in found:
            assert (w.height, w.width) == (min(8, height), min(8, width))
            assert 0 <= w.top <= height - w.height
            assert 0 <= w.left <= width - w.width
            w.of(covered).add_(1)
        assert covered.min() >= 1
        for starts in ({w.top for w in found}, {w.left for w in found}):
            assert all(b - a <= 6 for a, b in zip(sorted(starts), sorted(starts)[1:], strict=False))

    def test_an_overlap_that_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="does not fit"):
            windows(10, 10, 4, 4)

    @pytest.mark.parametrize("cells", [1, 4])
    def test_blending_what_was_cut_gives_it_again(self, cells: int) -> None:
        x = torch.randn(1, 3, 21 * cells, 30 * cells)
        where = windows(21, 30, 8, 2)
        made = blended(lambda tiles: torch.cat([w.of(x, cells) for w in tiles]), where, 21, 30, 4, cells)
        assert torch.allclose(made, x, atol=1e-5)

    def test_a_window_counts_less_towards_its_edge(self) -> None:
        where = [Window(0, 0, 1, 8), Window(0, 6, 1, 8)]
        values = iter([torch.zeros(1, 1, 1, 8), torch.ones(1, 1, 1, 8)])
        made = blended(lambda tiles: next(values), where, 1, 14, 1)[0, 0, 0]
        assert bool((made.diff() >= 0).all())
        assert made[:6].tolist() == [0] * 6
        assert made[8:].tolist() == [1] * 6
        assert 0 < made[6] < made[7] < 1


class TestStage:
    def test_tiles_of_one_noise_field(self, cascade: Cascade) -> None:
        """A network that looks at a cell only draws the same in tiles as at once, guided and at a level too."""
        stage = cascade.only("middle").stages[0]
        text, null = (cascade.text.encode([t]) for t in ("cat", ""))
        class PerCell(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = torch.nn.Parameter(torch.ones(1))

            def forward(self, x: torch.Tensor, *args: object, **kwargs: object) -> object:
                made = torch.tanh(x[:, :12] - x[:, -12:])
                return type("Out", (), {"sample": made})

        small = torch.rand(1, 3, 40, 26) * 2 - 1
        options = SamplingConfig(steps=3, guidance=2.0, rows=3, sampler="ddpm", guided="both", level=0.2)
        net = stage.denoiser.net
        stage.denoiser.net = PerCell()
        try:
            tiled = stage.sample(Conditioning(*text), Conditioning(*null), [5], options, small)
            stage.tile_px = 1024
            once = stage.sample(Conditioning(*text), Conditioning(*null), [5], options, small)
        finally:
            stage.tile_px, stage.denoiser.net = None, net
        assert tiled.shape == (1, 3, 80, 52)
        assert torch.allclose(tiled, once, atol=1e-4)

    @pytest.mark.parametrize("size", [(1, 1), (7, 5), (16, 16), (17, 16), (33, 40), (3, 50)])
    def test_any_size(self, cascade: Cascade, size: tuple[int, int]) -> None:
        small = torch.rand(1, 3, *size) * 2 - 1
        pictures = cascade.draw(["cat"], [1], low_res=small)
        assert [tuple(p.shape[-2:]) for p in pictures] == [(2 * size[0], 2 * size[1]), (4 * size[0], 4 * size[1])]
        assert torch.equal(cascade.draw(["cat"], [1], low_res=small)[-1], pictures[-1])

    def test_a_picture_is_the_same_in_any_company(self, cascade: Cascade) -> None:
        for side in (16, 24):
            small = torch.rand(3, 3, side, side) * 2 - 1
            together = cascade.draw(["a", "b", "c"], [1, 2, 3], low_res=small)[-1]
            alone = cascade.draw(["b"], [2], low_res=small[1:2])[-1]
            assert torch.equal(together[1:2], alone)


class TestUpscale:
    def test_files_of_any_kind(self, folder: Path, tmp_path: Path) -> None:
        kinds = {"a.png": ((20, 12), "RGB"), "b.jpg": ((9, 30), "RGB"), "c.webp": ((8, 8), "L"),
                 "d.gif": ((10, 10), "P"), "e.tif": ((10, 6), "CMYK")}  # fmt: skip
        names = [picture(tmp_path / name, size, mode) for name, (size, mode) in kinds.items()]
        lines: list[str] = []
        made = upscale(names, folder, out=tmp_path / "out", tell=lines.append)
        assert [p.name for p in made] == ["a.png", "b.png", "c.png", "d.png", "e.png"]
        assert [opened(p).shape for p in made] == [(48, 80, 3), (120, 36, 3), (32, 32, 3), (40, 40, 3), (24, 40, 3)]
        assert "20 x 12 -> 80 x 48, 2 tiles, 4 steps, about 1.0 GB of memory" in lines[0]
        assert recipe_of_input(made[0]) == hashlib.sha256(names[0].read_bytes()).hexdigest()
        recipe = read_recipe(made[0])
        assert recipe is not None
        assert recipe.keys() == {"prompt", "seed", "model", "stages", "input_sha256"}
        assert not any(str(tmp_path) in str(value) for value in recipe.values())

    @pytest.mark.parametrize("mode", ["RGB", "RGBA"])
    def test_exif_turns_the_picture(self, folder: Path, tmp_path: Path, mode: str) -> None:
        """The enlargement is that of the upright picture, transparency with it."""
        values = np.full((8, 16, len(mode)), 255, np.uint8)
        values[:4, 8:, 0], values[4:, :4, 2] = 0, 60
        values[2:5, 3:9, -1] = 120
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[274] = orientation
            Image.fromarray(values).save(tmp_path / f"{orientation}.png", exif=exif)
            with Image.open(tmp_path / f"{orientation}.png") as image:
                ImageOps.exif_transpose(image).save(tmp_path / f"upright-{orientation}.png", exif=b"")
        turned = upscale(sorted(tmp_path.glob("?.png")), folder, out=tmp_path / "out")
        upright = upscale(sorted(tmp_path.glob("upright-*.png")), folder, out=tmp_path / "out")
        for one, other in zip(turned, upright, strict=True):
            assert np.array_equal(opened(one), opened(other))
        assert [opened(p).shape[:2] for p in turned] == [(32, 64)] * 4 + [(64, 32)] * 4

    def test_transparency_is_kept(self, folder: Path, cascade: Cascade, tmp_path: Path) -> None:
        """Over white lies what the stage drew; clear and opaque parts stay so; the prompt is not of the opacity."""
        values = np.full((16, 16, 4), 255, np.uint8)
        values[:, :8] = (200, 30, 30, 0)
        values[:8, 8:] = (10, 200, 90, 128)
        Image.fromarray(values).save(tmp_path / "a.png")
        lines: list[str] = []
        path = upscale([tmp_path / "a.png"], folder, prompt="a cat", out=tmp_path / "out", tell=lines.append)[0]
        made = opened(path)
        assert made.shape == (64, 64, 4)
        assert "alpha is enlarged too" in lines[0]
        assert not made[:, :28, 3].any()
        assert (made[40:, 40:, 3] == 255).all()
        assert (made[:, :28, :3] == 255).all()
        alpha = values[..., 3:].astype(float) / 255
        over_white = torch.from_numpy((values[..., :3] * alpha + 255 * (1 - alpha)).round()).permute(2, 0, 1)[None]
        drawn = to_uint8(cascade.draw(["a cat"], [0], low_res=over_white.float() / 127.5 - 1)[-1])[0]
        opaque = made[..., 3] == 255
        assert np.array_equal(made[opaque][:, :3], drawn[opaque])
        share = made[..., 3:].astype(float) / 255
        shown = made[..., :3] * share + 255 * (1 - share)
        possible = (drawn >= 255 * (1 - share) - 1) & (share > 0)  # nothing darker lies over white so thinly
        assert np.abs(shown - drawn)[possible].max() < 3
        alphas = torch.from_numpy(values[..., 3]).float().expand(1, 3, 16, 16) / 127.5 - 1
        opacity = to_uint8(cascade.draw([""], [0], low_res=alphas)[-1])[0].mean(-1).round()
        edge = np.zeros((64, 64), bool)
        edge[:, 28:36] = edge[28:36, 28:] = True
        assert np.array_equal(made[..., 3][edge], opacity[edge])

    def test_seed_prompt_and_settings_count(self, folder: Path, tmp_path: Path) -> None:
        source = picture(tmp_path / "a.png")

        def made(name: str, **options: object) -> np.ndarray:
            return opened(upscale([source], folder, out=tmp_path / name, **options)[0])  # type: ignore[arg-type]

        plain = made("0")
        assert np.array_equal(plain, made("1"))
        changes = ({"seed": 3}, {"prompt": "a cat"}, {"overrides": ["sr.steps=1"]}, {"overrides": ["sr.level=0.4"]})
        for number, options in enumerate(changes):
            assert not np.array_equal(plain, made(f"other{number}", **options))
        assert opened(upscale([source], folder, scale=2, out=tmp_path / "two")[0]).shape == (24, 40, 3)
        lines: list[str] = []
        upscale([source], folder, seed=-1, out=tmp_path / "random", tell=lines.append)
        assert lines[0].startswith("seed ")

    def test_photographs_are_told_apart_from_drawings(self) -> None:
        emoji = Path(__file__).parent / "data/emoji"
        assert not any(photographic(opened(p)[..., :3]) for p in list(emoji.rglob("*.png"))[:40])
        noise = np.random.default_rng(0).normal(128, 6, (64, 64, 3)).astype(np.uint8)
        assert photographic(noise)
        assert not photographic(noise[:, :1])


class TestRefused:
    """Nothing is written, and the message says what to do (bad inputs, rows 10 to 20, 53, 54, 59)."""

    def refused(self, *args: object, match: str, **options: object) -> None:
        with pytest.raises(UserError, match=match):
            upscale(*args, **options)  # type: ignore[arg-type]

    def test_scales(self, folder: Path, tmp_path: Path) -> None:
        source, out = picture(tmp_path / "a.png"), tmp_path / "out"
        self.refused([source], folder, scale=1, out=out, match="--scale 1: must be from 2 to 64")
        self.refused([source], folder, scale=3, out=out, match="enlarges by 2 or 4; try --scale 4")
        self.refused([source], folder, scale=16, out=out, match="enlarges by 2 or 4; try --scale 4")
        assert not out.exists()

    def test_models(self, folder: Path, tiny_folder: Path, tmp_path: Path) -> None:
        source = picture(tmp_path / "a.png")
        self.refused([source], tiny_folder, out=tmp_path / "out", match="has no SR stage; train one")
        self.refused([source], tmp_path, out=tmp_path / "out", match="no such file")

    def test_pictures(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "MAX_PIXELS", 10_000)
        out = tmp_path / "out"
        good, large = picture(tmp_path / "good.png"), picture(tmp_path / "large.png", (30, 30))
        (tmp_path / "empty.png").touch()
        (tmp_path / "text.png").write_text("<html>")
        truncated = tmp_path / "cut.png"
        truncated.write_bytes(good.read_bytes()[:60])
        floats = tmp_path / "float.tif"
        Image.fromarray(np.random.default_rng(0).random((8, 8), dtype=np.float32)).save(floats)
        for source, reason in (
            (large, "30 x 30 enlarged 4 times is 120 x 120; at most 10000 pixels are made, of 625"),
            (tmp_path / "empty.png", "empty"),
            (tmp_path / "text.png", "not an image"),
            (truncated, "truncated"),
            (floats, "unknown range"),
            (tmp_path / "none.png", "cannot be read"),
            (tmp_path, "cannot be read"),
        ):
            self.refused([good, source], folder, out=out, match=reason)
        assert not out.exists()

    def test_files_in_the_way(self, folder: Path, tmp_path: Path) -> None:
        source, out = picture(tmp_path / "a.png"), tmp_path / "out"
        self.refused([source, picture(tmp_path / "a.jpg")], folder, out=out, match="would both become")
        self.refused([source], folder, out=tmp_path, overwrite=True, match="written over by its own enlargement")
        self.refused([], folder, out=out, match="no picture")
        self.refused([source], folder, out=source, match="is a file, not a folder")
        upscale([source], folder, out=out)
        before = (out / "a.png").read_bytes()
        self.refused([source], folder, out=out, seed=4, match="exists already; use --overwrite")
        assert (out / "a.png").read_bytes() == before
        upscale([source], folder, out=out, seed=4, overwrite=True)
        assert (out / "a.png").read_bytes() != before

    def test_settings(self, folder: Path, tmp_path: Path) -> None:
        source = picture(tmp_path / "a.png")
        for options, reason in (
            ({"seed": -2}, "--seed -2: must be from 0"),
            ({"overrides": ["sr.steps=0"]}, "steps must be from 1"),
            ({"overrides": ["sr.level=0.7"]}, "beyond the max_level"),
        ):
            self.refused([source], folder, out=tmp_path / "out", match=reason, **options)

    def test_tiles(self, folder: Path, tmp_path: Path) -> None:
        source = picture(tmp_path / "a.png")
        self.refused([source], folder, out=tmp_path / "out", tile=30, match="a multiple of 16 from 32 .* try 32")
        self.refused([source], folder, out=tmp_path / "out", tile=4, match="try 32")
        lines: list[str] = []
        upscale([source], folder, out=tmp_path / "one", tile=2048, tell=lines.append)
        upscale([source], folder, out=tmp_path / "many", tile=32, tell=lines.append)
        assert "one tile" in lines[0]
        assert "6 tiles" in lines[1]

    def test_the_stages_of_a_scale(self, cascade: Cascade) -> None:
        assert [s.config.name for s in enlarging(cascade, 2).stages] == ["middle"]
        assert [s.config.name for s in enlarging(cascade, 4).stages] == ["middle", "sr"]
        assert [s.config.name for s in enlarging(cascade.only("sr"), 2).stages] == ["sr"]

    def test_running_out_of_memory(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*args: object, **kwargs: object) -> None:
            raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(Cascade, "draw", full)
        self.refused([picture(tmp_path / "a.png")], folder, out=tmp_path / "out", match=r"out of memory; .* sr\.rows=1")
