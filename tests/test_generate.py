"""Pictures from a cascade: the same in any company, with their recipe, and never written over others."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from ldm.config import UserError, to_dict
from ldm.text import TextConfig
from ldm.weights import NETWORK_FILE
from pipelines import generate as module
from pipelines.cascade import Cascade, load_cascade
from pipelines.generate import generate
from pipelines.images import RECIPE_KEY, read_recipe, to_uint8, visible
from tests.tiny import save_tiny_cascade, tiny_cascade
from tests.tiny_text import tiny_clip

PROMPT = "red fire truck, noto style"
HOSTILE = [
    "",
    " \t\n ",
    "cat " * 2560,
    "x" * 10240,
    "nul \0 bell \x07 end",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J",
    "lone \ud800 and \udcff surrogates",
    "👍🏽🇫🇷👩‍👩‍👧" * 30,
    "แมวสีแดง",
    "红色的猫 빨간 고양이",
    "{} {0} %s ${HOME} `id`",
    "<x_extra_args>{\"steps\": 1}</x_extra_args> --seed 3",
    "[bold]not markup[/bold] \u202egnihton",
]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture(scope="session")
def four(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prompts, four pictures each, from seed 7."""
    out = tmp_path_factory.mktemp("four")
    return generate([PROMPT, "blue dog face"], tiny_folder, n=4, seed=7, out=out).parent


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test as soon as a model is loaded."""
    monkeypatch.setattr(module, "load_cascade", lambda *_: pytest.fail("work began before all was checked"))


@pytest.fixture
def copied(tiny_folder: Path, tmp_path: Path) -> Path:
    """A cascade folder that a test may damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "copied"))


# ---- files ---------------------------------------------------------------------------------------


def test_small_pictures_are_enlarged_by_whole_pixels() -> None:
    small = np.random.default_rng(0).integers(0, 256, (2, 24, 16, 3), dtype=np.uint8)
    shown = visible(small)
    assert [p.shape for p in shown] == [(48, 32, 3)] * 2
    for i, k in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert np.array_equal(np.stack(shown)[:, i::2, k::2], small)


def test_files_are_prompts_by_seeds_and_a_grid(four: Path) -> None:
    assert sorted(p.name for p in four.iterdir()) == [*(f"{k:04d}.png" for k in range(8)), "grid.png"]
    for k in range(8):
        recipe = read_recipe(four / f"{k:04d}.png")
        assert recipe is not None
        assert recipe["prompt"] == (PROMPT if k < 4 else "blue dog face")
        assert recipe["seed"] == 7 + k % 4
    sheet = pixels(four / "grid.png")
    assert sheet.shape == (2 * 68 + 4, 4 * 68 + 4, 3)
    for k in range(8):
        top, left = 4 + 68 * (k // 4), 4 + 68 * (k % 4)
        assert (sheet[top : top + 64, left : left + 64] == pixels(four / f"{k:04d}.png")).all()


def test_pictures_differ_and_are_not_flat(four: Path) -> None:
    pictures = [pixels(four / f"{k:04d}.png") for k in range(8)]
    assert all(p.shape == (64, 64, 3) and p.std() > 1 for p in pictures)
    assert len({p.tobytes() for p in pictures}) == 8  # both the seed and the prompt count


def test_recipe_is_what_makes_the_picture_and_nothing_else(four: Path, tiny_folder: Path) -> None:
    recipe = read_recipe(four / "0001.png")
    cascade = load_cascade(tiny_folder)
    stage = {"name": "base", "sampler": "dpmpp_2m", "grid": "uniform", "steps": 3, "guidance": 3.0, "rows": 2}
    assert recipe == {"prompt": PROMPT, "seed": 8, "model": cascade.digest, "stages": [stage]}
    with Image.open(four / "0001.png") as image:
        assert list(image.info) == [RECIPE_KEY]  # no time, no software
    assert read_recipe(four / "grid.png") is None


# ---- the same pictures ---------------------------------------------------------------------------


def test_the_same_call_gives_the_same_bytes(four: Path, tiny_folder: Path, tmp_path: Path) -> None:
    grid = generate([PROMPT, "blue dog face"], str(tiny_folder), n=4, seed=7, out=str(tmp_path / "a/b"))
    assert grid == tmp_path / "a/b/grid.png"
    assert files(grid.parent) == files(four)


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_n_changes_no_picture(four: Path, tiny_folder: Path, tmp_path: Path, n: int) -> None:
    generate([PROMPT], tiny_folder, n=n, seed=8, out=tmp_path)
    for i in range(min(n, 3)):  # whole files: metadata do not tell of n either
        assert (tmp_path / f"{i:04d}.png").read_bytes() == (four / f"{i + 1:04d}.png").read_bytes()


def test_prompts_change_no_other_prompts_picture(four: Path, tiny_folder: Path, tmp_path: Path) -> None:
    generate(["blue dog face"], tiny_folder, n=1, seed=7, out=tmp_path / "alone")
    assert (tmp_path / "alone/0000.png").read_bytes() == (four / "0004.png").read_bytes()
    generate(["a cat", PROMPT, "x" * 300], tiny_folder, n=1, seed=9, out=tmp_path / "three")
    assert (tmp_path / "three/0001.png").read_bytes() == (four / "0002.png").read_bytes()


def test_stochastic_sampler_draws_per_picture(tiny_folder: Path) -> None:
    cascade = load_cascade(tiny_folder)
    sampling = [replace(options, sampler="ddpm") for options in cascade.sampling(steps=4)]
    seeds = [1, 2, 3, 4, 5]
    together = cascade([PROMPT] * 5, seeds, sampling)
    assert torch.equal(torch.cat([cascade([PROMPT], [seed], sampling) for seed in seeds]), together)
    assert not torch.equal(together, cascade([PROMPT] * 5, seeds, cascade.sampling(steps=4)))


def test_steps_and_guidance_change_the_picture(four: Path, tiny_folder: Path, tmp_path: Path) -> None:
    for name, options in {"w1": {"guidance": 1.0}, "w9": {"guidance": 9.0}, "s5": {"steps": 5}}.items():
        generate([PROMPT], tiny_folder, n=1, out=tmp_path / name, **options)  # type: ignore[arg-type]
    pictures = [four / "0000.png", *(tmp_path / name / "0000.png" for name in ("w1", "w9", "s5"))]
    assert len({pixels(p).tobytes() for p in pictures}) == 4
    recipe = read_recipe(tmp_path / "w1/0000.png")
    assert recipe is not None
    assert recipe["stages"][0]["guidance"] == 1.0


def test_a_random_seed_is_told_and_recorded(tiny_folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    generate([PROMPT], tiny_folder, n=2, seed=-1, out=tmp_path / "a", tell=told.append)
    seed = int(told[0].removeprefix("seed "))
    generate([PROMPT], tiny_folder, n=2, seed=seed, out=tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    generate([PROMPT], tiny_folder, n=1, seed=-1, out=tmp_path / "c", tell=told.append)
    assert told[0] != told[-1]


# ---- where files go ------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(four: Path, no_model: None, tmp_path: Path) -> None:
    out = Path(shutil.copytree(four, tmp_path / "out"))
    with pytest.raises(UserError, match=r"0000\.png and 8 more exist already; use --overwrite"):
        generate([PROMPT], n=8, out=out)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/grid.png").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"grid\.png exists already"):
        generate([PROMPT], n=2, out=tmp_path / "one")
    assert files(out) == files(four)
    assert files(tmp_path / "one") == {"grid.png": b"mine"}


def test_overwrite_replaces_the_same_names_only(four: Path, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "grid.png").write_bytes(b"mine")
    (tmp_path / "0002.png").write_bytes(b"mine")
    generate([PROMPT], tiny_folder, n=2, seed=7, out=tmp_path, overwrite=True)
    assert (tmp_path / "0001.png").read_bytes() == (four / "0001.png").read_bytes()
    assert pixels(tmp_path / "grid.png").shape == (72, 140, 3)
    assert (tmp_path / "0002.png").read_bytes() == b"mine"


def test_other_files_are_no_obstacle(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert generate([PROMPT], tiny_folder, n=1, out=tmp_path) == tmp_path / "grid.png"


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("out", ["file", "file/below", "file/far/below", "dangling", "n" * 300, "taken"])
def test_a_bad_out_is_refused_before_work(no_model: None, tmp_path: Path, out: str, overwrite: bool) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "taken/0001.png").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"name another|--out") as error:
        generate([PROMPT], n=2, out=tmp_path / out, overwrite=overwrite)
    assert error.value.exit_code == 2
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_told_and_costs_no_picture(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, before = Image.Image.save, b"the picture of yesterday"
    (tmp_path / "0000.png").write_bytes(before)

    def full(self: Image.Image, path: Path, **options: Any) -> None:
        save(self, path, **options)
        with Path("/dev/full").open("wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match="No space left") as error:
        generate([PROMPT], tiny_folder, n=1, out=tmp_path, overwrite=True)
    assert error.value.exit_code == 1
    assert files(tmp_path) == {"0000.png": before}


# ---- requests ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "no prompt"),
        ({"n": 0}, "from 1 to 10000"),
        ({"n": 10**9}, "from 1 to 10000"),
        ({"seed": -2}, "from 0 to"),
        ({"seed": 2**64}, "from 0 to"),
        ({"seed": 2**63 - 1}, "from 0 to"),
        ({"steps": 0}, "from 1 to 1000"),
        ({"steps": -1}, "from 1 to 1000"),
        ({"steps": 10_000}, "from 1 to 1000"),
        ({"guidance": float("nan")}, "from 0 to 100"),
        ({"guidance": float("inf")}, "from 0 to 100"),
        ({"guidance": -5.0}, "from 0 to 100"),
    ],
)
def test_values_out_of_range_are_refused_before_work(
    no_model: None, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        generate(**{"prompts": [PROMPT], "out": tmp_path / "out", **options})
    assert not (tmp_path / "out").exists()


def test_the_product_of_prompts_and_n_is_capped(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 5 * 64**2)
    monkeypatch.setattr(Cascade, "__call__", lambda *_: pytest.fail("drawn in spite of the cap"))
    with pytest.raises(UserError, match="at most 5 pictures"):
        generate(["a", "b"], tiny_folder, n=3, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["bert", "clip"])
def test_any_prompt_is_plain_text(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    told: list[str] = []
    folder = request.getfixturevalue("tiny_folder" if kind == "bert" else "tiny_clip_folder")
    generate(HOSTILE, folder, n=1, steps=1, out=tmp_path, tell=told.append)
    for k, prompt in enumerate(HOSTILE):
        with Image.open(tmp_path / f"{k:04d}.png") as image:
            stored = image.info[RECIPE_KEY]
        assert stored.isascii()
        assert stored.isprintable()
        assert json.loads(stored)["prompt"] == prompt
        assert json.loads(stored)["stages"][0]["steps"] == 1
    assert "".join(told).isascii()
    assert "".join(told).isprintable()
    assert [line for line in told if "drawn without conditioning" in line] == [
        "prompt '' is empty: drawn without conditioning",
        "prompt ' \\t\\n ' is empty: drawn without conditioning",
    ]
    limit = 20 if kind == "bert" else 77
    assert f"prompt '{'cat ' * 10}': {limit} of 2562 tokens are used, the rest is cut off" in told


def test_an_empty_prompt_is_the_null(tiny_folder: Path, tmp_path: Path) -> None:
    for name, guidance in (("a", 1.0), ("b", 5.0)):
        generate(["", "  "], tiny_folder, n=1, guidance=guidance, out=tmp_path / name)
        assert (pixels(tmp_path / name / "0000.png") == pixels(tmp_path / name / "0001.png")).all()


def test_halves_of_a_surrogate_pair_are_recorded_as_the_character_they_spell(
    tiny_folder: Path, tmp_path: Path
) -> None:
    generate(["\ud83d\ude00"], tiny_folder, n=1, steps=1, out=tmp_path)
    recipe = read_recipe(tmp_path / "0000.png")
    assert recipe is not None
    assert recipe["prompt"] == "\U0001f600"


# ---- the folder ----------------------------------------------------------------------------------


def test_saving_a_loaded_cascade_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    once = load_cascade(tiny_folder)
    once.save(tmp_path / "again")
    twice = load_cascade(tmp_path / "again")
    assert files(tmp_path / "again") == files(tiny_folder)
    assert once.digest == twice.digest
    assert to_dict(once.stages[0].config) == to_dict(twice.stages[0].config)
    assert torch.equal(once([PROMPT], [3]), twice([PROMPT], [3]))
    with pytest.raises(UserError, match="not written over"):
        once.save(tmp_path / "again")
    assert [p.name for p in tmp_path.iterdir()] == ["again"]


def test_a_loaded_cascade_draws_as_the_one_in_memory(tmp_path: Path) -> None:
    memory = tiny_cascade(TextConfig("clip", str(tiny_clip(tmp_path / "clip"))))
    memory.save(tmp_path / "saved")
    networks: list[torch.nn.Module] = [memory.stages[0].denoiser, memory.codec.module]
    assert all(p.dtype == torch.float32 for net in networks for p in net.parameters())  # saving left it alone
    for net in networks:
        for parameter in net.parameters():
            parameter.copy_(parameter.half().float())
    loaded = load_cascade(tmp_path / "saved")
    assert torch.equal(loaded([PROMPT, "a"], [3, 4]), memory([PROMPT, "a"], [3, 4]))


def test_networks_load_with_their_stock_classes(tiny_folder: Path) -> None:
    ours = load_cascade(tiny_folder)
    unet = UNet2DConditionModel.from_pretrained(tiny_folder / "base/unet", local_files_only=True)
    vae = AutoencoderKL.from_pretrained(tiny_folder / "codec/vae", local_files_only=True)
    for stock, mine in ((unet, ours.stages[0].denoiser.net), (vae, ours.codec.module.autoencoder)):
        theirs = stock.state_dict()
        assert theirs.keys() == mine.state_dict().keys()
        assert all(torch.equal(theirs[k].float(), v) for k, v in mine.state_dict().items())
        known, built = ({k: v for k, v in net.config.items() if k[0] != "_"} for net in (stock, mine))
        assert json.dumps(known, sort_keys=True) == json.dumps(built, sort_keys=True)


def test_a_clip_cascade_is_self_contained(tiny_clip_folder: Path, tmp_path: Path) -> None:
    assert not (tiny_clip_folder.parent / "text_source").exists()
    moved = Path(shutil.copytree(tiny_clip_folder, tmp_path / "elsewhere"))
    here, there = load_cascade(tiny_clip_folder), load_cascade(moved)
    assert here.digest == there.digest
    assert (to_uint8(here([PROMPT], [5])) == to_uint8(there([PROMPT], [5]))).all()
    assert not any(str(tiny_clip_folder.parent).encode() in data for data in files(moved).values())


def test_the_packaged_text_encoder_is_not_copied(tmp_path: Path) -> None:
    folder = save_tiny_cascade(tmp_path, "minilm")
    assert sorted(p.name for p in folder.iterdir()) == ["base", "cascade.json", "codec"]
    generate(["a red heart"], folder, n=3, out=tmp_path / "three")
    generate(["a red heart"], folder, n=1, seed=9, out=tmp_path / "one")
    assert (tmp_path / "three/0002.png").read_bytes() == (tmp_path / "one/0000.png").read_bytes()


def _flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("part", [f"codec/vae/{NETWORK_FILE}", "text/model.safetensors", "text/vocab.txt"])
def test_altered_parts_are_refused(copied: Path, part: str) -> None:
    if part.endswith(".txt"):
        (copied / part).write_text((copied / part).read_text().replace("cat", "cow"))
    else:
        _flip_last_byte(copied / part)
    with pytest.raises(UserError, match=f"trained with another {part.partition('/')[0]}"):
        load_cascade(copied)


def test_other_weights_are_another_model(copied: Path, tiny_folder: Path) -> None:
    _flip_last_byte(copied / "base/unet" / NETWORK_FILE)
    assert load_cascade(copied).digest != load_cascade(tiny_folder).digest


@pytest.mark.parametrize(
    ("part", "damage", "message"),
    [
        ("cascade.json", None, "no such file"),
        ("cascade.json", b'{"format": 2, "stages": ["base"], "text": {}}', "this version reads 1"),
        ("cascade.json", b'{"format": 1, "stages": ["../base"], "text": {}}', "plain folder names"),
        ("cascade.json", b"\x80\x02}q\x00.", "not readable as JSON"),
        ("base/stage.json", b"[]", "expected sections"),
        ("base/stage.json", None, "cannot be read"),
        (f"base/unet/{NETWORK_FILE}", None, "no such file"),
        (f"base/unet/{NETWORK_FILE}", b"\xff" * 64, "not a whole safetensors file"),
        (f"codec/vae/{NETWORK_FILE}", b"", "not a whole safetensors file"),
        ("text/model.safetensors", b"", "not readable as safetensors"),
    ],
)
def test_damaged_folders_are_refused(copied: Path, part: str, damage: bytes | None, message: str) -> None:
    if damage is None:
        (copied / part).unlink()
    else:
        (copied / part).write_bytes(damage)
    with pytest.raises(UserError, match=message) as error:
        load_cascade(copied)
    assert part.partition("/")[0] in str(error.value)


def test_an_overlong_prompt_is_cut_with_a_message(tiny_folder: Path, tmp_path: Path) -> None:
    told: list[str] = []
    generate(["cat " * 25_000], tiny_folder, 1, out=tmp_path / "a", tell=told.append)
    assert "the first 20000 of 100000 characters are read" in told[0]
    assert "tokens are used" in told[1]
    recipe = read_recipe(tmp_path / "a/0000.png")
    assert recipe is not None
    assert recipe["prompt"] == "cat " * 5_000
