"""Pictures that are not squares: cut to buckets, cached, drawn into batches of one shape, trained on and generated."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import UserError
from ldm.decode import Decoding, Source, try_fit
from ldm.denoiser import Denoiser
from pipelines.cascade import load_cascade
from pipelines.generate import generate
from tests.test_presets import SHORT
from training import diffusion
from training.buckets import Buckets
from training.data import DataConfig, Reader
from training.encode import encode
from training.encoders import codec_moments
from training.loader import BatchOrder
from training.presets import Preset, tuning
from training.run import train
from training.steps import DiffusionInputs, StepResult
from training.stop import Interrupted
from training.tasks import build_task

SHAPES = {"wide": (160, 90), "high": (90, 150), "square": (100, 100)}
BUCKET = "data.bucket_px=16"
UNET = Path("base/unet/diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen pictures of three shapes: nine wide, four high, two square."""
    folder = tmp_path_factory.mktemp("album")
    rng = np.random.default_rng(0)
    for k in range(15):
        name = "wide" if k < 9 else "high" if k < 13 else "square"
        width, height = SHAPES[name]
        coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{name}{k:02d}.png")
        (folder / f"{name}{k:02d}.txt").write_text(f"picture {k}", encoding="utf-8")
    return folder


def test_buckets_are_within_the_pixels_of_a_square() -> None:
    shapes = DataConfig("x", size_px=512, bucket_px=64).shapes
    assert shapes == [(320, 768), (384, 640), (448, 576), (512, 512), (576, 448), (640, 384), (704, 320), (768, 320)]
    assert DataConfig("x", size_px=64, bucket_px=16).shapes == [(48, 80), (64, 64), (80, 48)]
    assert DataConfig("x", size_px=64).shapes == [(64, 64)]


@pytest.mark.parametrize(("name", "expected"), [("wide", (80, 48)), ("high", (48, 80)), ("square", (64, 64))])
def test_a_picture_is_cut_to_the_nearest_shape_as_pillow_would(
    album: Path, name: str, expected: tuple[int, int]
) -> None:
    path = sorted(album.glob(f"{name}*.png"))[0]
    found = try_fit(Source(path), DataConfig("x", size_px=64, bucket_px=16).shapes, Decoding(max_pixels=10**6))
    assert not isinstance(found, str)
    assert found[0].shape == (expected[1], expected[0], 3)
    theirs = np.array(ImageOps.fit(Image.open(path), expected, Image.Resampling.LANCZOS))
    assert np.abs(found[0].astype(int) - theirs).mean() < 1.5  # they cut at fractions of a pixel


def test_a_picture_too_small_for_its_shape_is_told(tmp_path: Path) -> None:
    Image.new("RGB", (70, 40)).save(tmp_path / "a.png")
    found = try_fit(Source(tmp_path / "a.png"), [(48, 80), (64, 64), (80, 48)], Decoding(max_pixels=10**6))
    assert found == "smaller than target (70x40 < 80x48)"


def test_every_item_is_seen_equally_often_in_batches_of_one_shape() -> None:
    counts = {(3, 5): 3, (4, 4): 50, (5, 3): 7}
    shapes = torch.tensor([[8, *shape] for shape, count in counts.items() for _ in range(count)])
    draw = Buckets(shapes, seed=1, batch=8)
    seen: Counter[int] = Counter()
    batches = [draw(number) for number in range(60 * 40 // 8)]  # forty epochs of 60 items
    for batch in batches:
        assert len(batch) == 8
        assert len(shapes[batch].unique(dim=0)) == 1
        seen.update(batch)
    assert set(seen) == set(range(60))
    assert all(abs(count - 40) <= 3 for count in seen.values()), seen  # a batch of three items has one thrice
    again = Buckets(shapes, seed=1, batch=8)
    assert [again(number) for number in (299, 0, 17)] == [batches[number] for number in (299, 0, 17)]
    assert [Buckets(shapes, seed=2, batch=8)(number) for number in range(5)] != batches[:5]
    firsts = [sorted(i for b in batches[k : k + 7] for i in b) for k in (0, 7)]
    assert firsts[0] != firsts[1]


def test_processes_share_each_batch(album: Path, tmp_path: Path) -> None:
    cache = encode(Reader(DataConfig(str(album), size_px=64, bucket_px=16)), tmp_path)
    whole = [BatchOrder(cache, 3, 0, 4, 4)[number] for number in range(8)]
    for number, batch in enumerate(whole):
        parts = [BatchOrder(cache, 3, 0, 2, 4, 2, rank)[number] for rank in (0, 1)]
        assert [*parts[0].indices, *parts[1].indices] == batch.indices
        assert [p.places for p in parts] == [[0, 1], [2, 3]]
        assert len({tuple(p.stored().shape[1:]) for p in (*parts, batch)}) == 1
    assert BatchOrder(cache, 3, 8, 4, 4)[0].indices == whole[2].indices
    with pytest.raises(UserError, match="6 images were seen in batches of another size"):
        BatchOrder(cache, 3, 6, 4, 4)


@pytest.mark.parametrize("latents", [True, False])
def test_a_cache_gives_back_each_picture_in_its_shape(
    album: Path, tiny_folder: Path, tmp_path: Path, latents: bool
) -> None:
    reader = Reader(DataConfig(str(album), size_px=64, bucket_px=16))
    codec = load_cascade(tiny_folder).codec if latents else None
    cache = encode(reader, tmp_path, codec)
    places = {cache.record(i)["key"]: i for i in range(len(cache))}
    assert len(places) == 15
    for example in reader:
        pixels = torch.from_numpy(example.pixels)[None]
        expected = pixels if codec is None else codec_moments(codec.module, pixels).half()
        found = cache.stored([places[example.key]])
        assert found.shape == expected.shape
        assert torch.allclose(found.float(), expected.float(), atol=1e-2)
    with pytest.raises(ValueError, match="items of 2 shapes cannot be stacked"):
        cache.stored([places["wide00.png"], places["square14.png"]])


def test_a_run_on_several_shapes_resumes_bit_for_bit(
    album: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[int, ...]] = []
    stops: list[int] = []
    real = diffusion.diffusion_step

    def step(denoiser: Denoiser, inputs: DiffusionInputs) -> StepResult:
        seen.append(tuple(inputs.x0.shape[2:]))
        if len(seen) in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(denoiser, inputs)

    monkeypatch.setattr(diffusion, "diffusion_step", step)
    more = [BUCKET, *SHORT[1::2], "loop.batch=4", "loop.images=48", "loop.memory_format=contiguous"]

    def run(name: str) -> Path:
        return train(album, tmp_path / name, more, preset="full", model=tiny_folder)

    straight = run("straight")
    assert set(seen) == {(6, 10), (10, 6), (8, 8)}
    stops.append(len(seen) + 7)
    with pytest.raises(Interrupted):
        run("halved")
    weights = [load_file(run("halved") / UNET), load_file(straight / UNET)]
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_held_out_pictures_are_squares(album: Path, tiny_folder: Path, tmp_path: Path) -> None:
    task = build_task(tuning(album, "full", tiny_folder, [BUCKET, f"cache={tmp_path}"]))
    assert task.cache.shapes is not None
    assert len(task.cache.shapes) == 14
    assert task.held_out.shapes is None


def test_a_prior_may_have_other_shapes(album: Path, tiny_folder: Path, tmp_path: Path) -> None:
    more = [BUCKET, f"cache={tmp_path}", f"prior.path={album}", "prior.share=0.5"]
    mixed = build_task(tuning(album, "full", tiny_folder, more)).cache
    assert mixed.shapes is not None
    for index in (0, 9, len(mixed) - 1):
        assert list(mixed.stored([index]).shape[1:]) == mixed.shapes[index].tolist()


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("data.bucket_px=24", "must be at least 8 and divide size_px 64"),
        ("data.bucket_px=8", "data.bucket_px 8 must be a multiple of 16"),
        ("encode=online", "set encode=cached"),
        ("inpainting=true", "data.bucket_px is of a base that is not of inpainting"),
    ],
)
def test_what_does_not_fit_is_refused(
    album: Path, tiny_folder: Path, tmp_path: Path, override: str, reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        build_task(tuning(album, "full", tiny_folder, [BUCKET, f"cache={tmp_path}", override]))


def test_other_stages_refuse(tiny: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bucket_px is of a base's training"):
        train(Path("configs/tiny/autoencoder.yaml"), tmp_path / "run", [*tiny[:2], "data.bucket_px=16"])


def test_pictures_of_any_shape_are_generated(tiny_folder: Path, tmp_path: Path) -> None:
    words = ["generate", "a red face", "--model", str(tiny_folder), "--n", "2", "--size", "80x48", "--out"]
    done = CliRunner().invoke(app, [*words, str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    picture = Image.open(tmp_path / "out/0001.png")
    assert picture.size == (80, 48)
    recipe = json.loads(picture.text["recipe"]) if "recipe" in picture.text else picture.text
    assert "[80, 48]" in json.dumps(recipe)
    alone = generate(["a red face"], tiny_folder, n=1, seed=8, size="80x48", out=tmp_path / "alone")
    assert (alone.parent / "0000.png").read_bytes() == (tmp_path / "out/0001.png").read_bytes()


@pytest.mark.parametrize(
    ("size", "reason"),
    [("80", "width and height in pixels, as 96x64"), ("80x40", "multiples of 16 px"), ("0x64", "multiples of 16 px"),
     ("65536x65536", "too much for one call")],
)  # fmt: skip
def test_a_size_that_cannot_be_is_told(tiny_folder: Path, tmp_path: Path, size: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        generate(["a red face"], tiny_folder, n=1, size=size, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("preset", ["lora", "control"])
def test_what_is_tuned_takes_shapes_too(
    album: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: Preset
) -> None:
    monkeypatch.chdir(tmp_path)
    final = train(album, tmp_path / "run", [BUCKET, *SHORT[1::2], "loop.batch=4"], preset=preset, model=tiny_folder)
    assert any(final.rglob("*.safetensors"))
