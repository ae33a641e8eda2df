"""The commands in the guides are real: each `ldm` line parses, and what runs in seconds is run."""

from __future__ import annotations

import hashlib
import re
import shlex
from pathlib import Path

import click
import numpy as np
import pytest
import typer
from PIL import Image

from ldm.cli import app
from ldm.config import load
from ldm.weights import load_classifier

ROOT = Path(__file__).parent.parent


def commands(guides: bool = True) -> list[str]:
    """Every `ldm ...` line of a fenced block in what there is to read, and of the first lines of the configs; without
    `guides` not those of configs/."""
    found: list[str] = []
    read = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "pipelines/weights/emoji/README.md")]
    for guide in [*read, *(sorted(ROOT.glob("configs/**/*.md")) if guides else [])]:
        for block in re.findall(r"```(?:bash|sh)?\n(.*?)```", guide.read_text(encoding="utf-8"), re.DOTALL):
            found += [line.split("#")[0] for line in block.replace("\\\n", " ").splitlines()]
    for config in sorted(ROOT.glob("configs/**/*.yaml")):
        found += config.read_text(encoding="utf-8").splitlines()[0].lstrip("# ").split(" && ")
    return sorted({re.sub(r"^\S*ldm ", "ldm ", c.strip()) for c in found if re.match(r"\S*ldm ", c.strip())})


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str) -> None:
    root = typer.main.get_command(app)
    words = shlex.split(command)[1:]
    context = click.Context(root, info_name="ldm") if isinstance(root, click.Command) else None
    group = root
    while hasattr(group, "commands") and words and words[0] in group.commands:
        group = group.commands[words.pop(0)]
    parsed = group.make_context("ldm", words, parent=context)
    config = parsed.params.get("config")
    if config is not None and str(config).endswith(".yaml"):
        from training.tasks import RunConfig

        load(RunConfig, ROOT / config, parsed.params.get("overrides") or [])


def shipped_alone(command: str) -> bool:
    """Whether nothing that a reader trains first is needed."""
    return not any(flag in command for flag in ("--model", "--lora", "--control", "--embedding"))


@pytest.mark.parametrize("command", [c for c in commands(False) if c.startswith("ldm generate") and shipped_alone(c)])
def test_generate_commands_run_on_the_shipped_model(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    app(shlex.split(command)[1:], standalone_mode=False)
    assert (tmp_path / capsys.readouterr().out.splitlines()[-1]).is_file()


@pytest.mark.parametrize("command", [c for c in commands(False) if c.startswith("ldm upscale") and "--model" not in c])
def test_upscale_commands_run_on_the_shipped_model(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """my-picture.png is one of the tests' pictures, of 48 px."""
    monkeypatch.chdir(tmp_path)
    source = sorted((ROOT / "tests/data/emoji").rglob("*.png"))[0]
    with Image.open(source) as picture:
        small = picture.convert("RGB").resize((48, 48), Image.Resampling.BOX)
    small.save("my-picture.png")
    app(shlex.split(command)[1:], standalone_mode=False)
    with Image.open(capsys.readouterr().out.splitlines()[-1]) as made:
        assert made.size == (192, 192)
        shrunk = np.asarray(made.resize((48, 48), Image.Resampling.BOX), dtype=np.float64)
    assert 10 * np.log10(255**2 / ((shrunk - np.asarray(small)) ** 2).mean()) > 35


def test_shipped_weights_keep_to_their_sizes() -> None:
    folder = ROOT / "pipelines/weights/emoji"
    assert sum(p.stat().st_size for p in folder.rglob("*.safetensors")) <= 60_000_000
    from pipelines.cascade import load_cascade

    for stage in load_cascade(folder).stages:
        assert sum(p.numel() for p in stage.denoiser.net.parameters()) <= 25_000_000


def test_the_shipped_judge_is_the_one_that_its_recipe_names() -> None:
    folder = ROOT / "training/weights/emoji-judge"
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (ROOT / "configs/emoji/judge.yaml").read_text()
    classes = load_classifier(folder).classes
    styles = re.findall(r"^\| ([a-z0-9 ]+) \| @iconify", (ROOT / "pipelines/weights/emoji/README.md").read_text(), re.M)
    assert len(styles) == 6
    assert set(styles) < set(classes["style"])
    assert len(classes["cluster"]) == 1693


def test_guides_name_only_files_that_exist() -> None:
    for guide in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("configs/**/*.md")]:
        text = guide.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (guide.parent / target).exists(), f"{guide}: {target}"
