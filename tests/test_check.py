"""`ldm data check`: long captions, and the page with thumbnails."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ldm.cli import app
from ldm.config import UserError
from tests.tiny import EMOJI
from training import check as module
from training.check import check


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, captions of which one is long, one empty and one hostile; and a file that is no picture."""
    (tmp_path / "set").mkdir()
    for k, source in enumerate(sorted(EMOJI.rglob("*.png"))[:3]):
        shutil.copyfile(source, tmp_path / f"set/{k}.png")
    for k, text in enumerate(("a " * 30, "", "<script>alert(1)</script>")):
        (tmp_path / f"set/{k}.txt").write_text(text, encoding="utf-8")
    (tmp_path / "set/<b>.png").write_bytes(b"no picture")
    return tmp_path / "set"


def test_captions_are_counted_in_tokens(folder: Path, tiny_folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}
    done = CliRunner().invoke(app, ["data", "check", str(folder), "--model", str(tiny_folder)])
    assert done.exit_code == 1
    lines = done.output.splitlines()
    assert "4 samples: 3 good, 1 bad" in lines
    assert "note  caption longer than its text encoder reads: 2" in lines
    assert "note  no caption (empty): 1" in lines
    assert "fact  longest caption: 32 tokens, of which 20 are read (0.png)" in lines
    assert "fact  shortest sides: 256 px (0.png) to 256 px, median 256" in lines
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_page_shows_pictures_and_what_is_bad_as_text(folder: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    check(folder, page=page)
    text = page.read_text(encoding="utf-8")
    assert text.count("<img src='data:image/png;base64,") == 3
    assert "<script>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<td>&lt;b&gt;.png</td>" in text
    assert "http" not in text
    with pytest.raises(UserError, match="exists; name another file with --html"):
        check(folder, page=page)
    with pytest.raises(UserError, match="its folder does not exist; name another file with --html"):
        check(folder, page=tmp_path / "none/page.html")


def test_thumbnails_are_spread_over_the_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "THUMBNAILS", 2)
    check(folder, page=tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert text.count("<img") == 2
    assert "0.png, 256 x 256" in text
    assert "2.png, 256 x 256" in text
