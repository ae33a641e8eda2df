"""The guides: every command of each runs, in order, on tiny models and a few pictures."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from ldm.cli import app
from tests.test_presets import SHORT, SHORT_DECODER
from tests.tiny import EMOJI, ROOT, save_tiny_sr

GUIDES = sorted((ROOT / "configs/guides").glob("*.md"))
SHIPPED = "pipelines/weights/emoji"


def commands(guide: Path) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("ldm ")]


def small(words: list[str], model: Path) -> list[str]:
    """The same command on a tiny model, of a few images."""
    words = [str(model) if word == SHIPPED else word for word in words]
    own = [] if "--model" in words else ["--model", str(model)]
    if words[0] == "train":
        return [*words, *own, *(SHORT_DECODER if "decoder" in words else SHORT)]
    if words[0] == "generate":
        return [*words, *own, "--steps", "2", "--n", "2", "--overwrite"]
    if words[0] == "upscale":
        return [*words, "--scale", "2"]
    return [*words, *own] if words[:2] == ["data", "check"] else words


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the guides' reader has: folders of captioned pictures, and a small picture."""
    sources = sorted(EMOJI.rglob("*.png"))
    for name, count, caption in (("my-pictures", 10, "a picture of {}"), ("openmoji", 10, "thing {}, openmoji style"),
                                 ("my-robot", 4, "a zorp robot")):  # fmt: skip
        (tmp_path / name).mkdir()
        for k, source in enumerate(sources[:count]):
            shutil.copyfile(source, tmp_path / name / f"{k}.png")
            (tmp_path / name / f"{k}.txt").write_text(caption.format(k), encoding="utf-8")
    with Image.open(sources[0]) as picture:
        picture.convert("RGB").resize((48, 48)).save(tmp_path / "my-picture.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.stem)
def test_every_command_of_a_guide_runs(guide: Path, place: Path, tiny_folder: Path) -> None:
    model = save_tiny_sr(place / "tiny") if guide.stem == "upscaler" else tiny_folder
    own = [words for words in commands(guide) if words[:2] != ["data", "emoji"]]  # that one fetches packages
    assert len(own) >= 3
    for words in own:
        done = CliRunner().invoke(app, small(words, model))
        assert done.exit_code == 0, f"ldm {shlex.join(words)}\n{done.output}\n{done.exception}"


def test_guides_are_a_page_and_found_from_the_readme() -> None:
    told = (ROOT / "README.md").read_text(encoding="utf-8")
    for guide in GUIDES:
        assert f"](configs/guides/{guide.name})" in told
        assert len(guide.read_text(encoding="utf-8").splitlines()) <= 60
