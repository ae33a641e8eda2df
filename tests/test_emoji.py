"""The emoji builder on small packages made here, in the layout of the real ones."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ldm.config import UserError
from training import emoji, emoji_packages
from training.data import DataConfig, Reader
from training.emoji_packages import Source

CIRCLE = '<circle cx="8" cy="8" r="{r}" fill="{fill}"/>'
ENTRIES = [
    {"label": "red heart", "hexcode": "2764-FE0F", "tags": ["love", "emotion"], "group": 0},
    {"label": "grinning face", "hexcode": "1F600", "tags": ["smile"], "group": 0},
    {"label": "man farmer", "hexcode": "1F468-200D-1F33E", "tags": [], "group": 1},
    {"label": "woman farmer", "hexcode": "1F469-200D-1F33E", "tags": [], "group": 1},
    {"label": "flag: France", "hexcode": "1F1EB-1F1F7", "tags": ["FR"], "group": 9},
    {"label": "light bulb", "hexcode": "1F4A1", "tags": ["idea"], "group": 7},
]
NAMES = {"2764": "red-heart", "1f600": "grinning-face", "1f468-200d-1f33e": "man-farmer",
         "1f469-200d-1f33e": "woman-farmer", "1f1eb-1f1f7": "flag-france", "1f4a1": "light-bulb"}  # fmt: skip


def _tarball(folder: Path, source: Source, files: dict[str, object]) -> Source:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in files.items():
            content = json.dumps(data).encode()
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    (folder / source.tarball).write_bytes(buffer.getvalue())
    return replace(source, sha256=hashlib.sha256(buffer.getvalue()).hexdigest())


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    sources = []
    for number, source in enumerate(emoji_packages.SOURCES):
        icons = {
            name: {"body": CIRCLE.format(r=3 + k, fill=f"#{number * 30:02x}{k * 40:02x}80")}
            for k, name in enumerate(NAMES.values())
        }
        icons["red-heart-light"] = icons["red-heart"]
        icons["letter-a"] = icons["red-heart"]
        files: dict[str, object] = {
            "icons.json": {"icons": icons, "width": 16, "height": 16 + 8 * (number == 1)},
            "info.json": {"author": {"name": f"author {number}"}},
        }
        if source.style in ("noto", "twemoji", "fluent flat"):
            files["chars.json"] = NAMES
        sources.append(_tarball(folder, source, files))
    monkeypatch.setattr(emoji_packages, "SOURCES", tuple(sources))
    monkeypatch.setattr(emoji_packages, "UNICODE", _tarball(folder, emoji_packages.UNICODE, {"en/data.json": ENTRIES}))
    return folder


def test_builds_a_folder_that_the_reader_takes(packages: Path, tmp_path: Path) -> None:
    built = emoji.build(tmp_path / "set", packages)
    assert sum(built.counts.values()) == 36
    assert built.dropped["noto blob"] == ["letter-a"]
    rows = [json.loads(line) for line in (tmp_path / "set/metadata.jsonl").read_text().splitlines()]
    assert {r["hexcode"] for r in rows} == {k.upper() for k in NAMES}
    examples = list(Reader(DataConfig(path=str(tmp_path / "set"))))
    assert len(examples) == 36
    assert all(e.pixels.shape == (256, 256, 3) and 3 <= len(e.captions) <= 8 for e in examples)
    heart = next(e for e in examples if e.key == "noto/2764.png")
    assert heart.captions[0] == "red heart, noto style"
    assert (heart.pixels[0, 0] == 255).all()
    assert (heart.pixels[128, 128] == [0, 0, 128]).all()
    blob = next(e for e in examples if e.key == "noto-blob/2764.png")  # 16 x 24, centred in a square
    assert (blob.pixels[84, 128] == [30, 0, 128]).all()


def test_man_and_woman_are_one_cluster_and_one_split(packages: Path, tmp_path: Path) -> None:
    emoji.build(tmp_path / "set", packages)
    rows = [json.loads(line) for line in (tmp_path / "set/metadata.jsonl").read_text().splitlines()]
    farmers = [r for r in rows if r["hexcode"].endswith("1F33E")]
    assert len({r["cluster"] for r in farmers}) == 1
    for style in emoji.STYLES:
        assert len({r["split"] for r in farmers if r["style"] == style}) == 1


def test_near_duplicates_inside_a_style_are_one_cluster() -> None:
    def picture(style: str, code: str) -> emoji.Picture:
        return emoji.Picture(style, code, code, False, [], "", "")

    pictures = [picture("noto", "1F1"), picture("noto", "1F2"), picture("noto", "1F3"), picture("twemoji", "1F4")]
    thumbs = np.zeros((4, 32, 32, 3), dtype=np.float32)
    thumbs[1] += 5.9
    thumbs[2] += 12.0
    emoji.assign_clusters(pictures, thumbs)
    assert [p.cluster for p in pictures] == ["1F1", "1F1", "1F3", "1F4"]


def test_splits_have_the_shares_they_say_and_need_four_designs() -> None:
    pictures = [
        emoji.Picture(style, f"{code:X}", "", False, [], "", "", cluster=f"{code:X}")
        for code in range(3000)
        for style in (emoji.STYLES if code % 2 else emoji.STYLES[:3])
    ]
    emoji.assign_splits(pictures)
    held = {p.cluster for p in pictures if p.split == "concepts"}
    assert 15 <= len(held) <= 48
    assert all(p.split == "concepts" for p in pictures if p.cluster in held)
    combos = [p for p in pictures if p.split == "combos"]
    assert all(int(p.cluster, 16) % 2 for p in combos)
    assert 0.03 < len(combos) / (1500 * 6) < 0.05


def test_a_wrong_tarball_is_refused(packages: Path, tmp_path: Path) -> None:
    path = packages / emoji_packages.SOURCES[2].tarball
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(UserError, match="damaged or not the pinned version"):
        emoji.build(tmp_path / "set", packages)
    assert not (tmp_path / "set").exists()


def test_nothing_is_written_over(packages: Path, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set/mine").write_text("x")
    with pytest.raises(UserError, match="nothing was written"):
        emoji.build(tmp_path / "set", packages)
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["mine"]


def test_test_data_has_all_splits_and_licences() -> None:
    folder = Path(__file__).parent / "data/emoji"
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert {r["split"] for r in rows} == set(emoji.SPLITS)
    assert all(r["licence"] in (folder / "SOURCES.md").read_text() for r in rows)
    assert sum(p.stat().st_size for p in folder.rglob("*")) < 2_000_000


def test_more_designs_change_nothing_else(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A heart and a star in another design: known characters join their clusters in `train`, others are left out."""
    more = Source("crayon", "@iconify-json/crayon", "1.0.0", "MIT", "")
    icons = {name: {"body": CIRCLE.format(r=2, fill="#102030")} for name in ("red-heart", "light-bulb", "dark-star")}
    files = {"icons.json": {"icons": icons, "width": 16, "height": 16}, "info.json": {"author": {"name": "a"}}}
    monkeypatch.setattr(emoji_packages, "MORE_SOURCES", (_tarball(packages, more, files),))
    emoji.build(tmp_path / "plain", packages)
    emoji.build(tmp_path / "more", packages, more=True)
    plain, all_rows = (
        [json.loads(line) for line in (tmp_path / name / "metadata.jsonl").read_text().splitlines()]
        for name in ("plain", "more")
    )
    assert all_rows[: len(plain)] == plain
    added = all_rows[len(plain) :]
    assert [(r["style"], r["hexcode"], r["split"]) for r in added] == [
        ("crayon", "1F4A1", "train"), ("crayon", "2764", "train")
    ]  # fmt: skip
    assert {r["cluster"] for r in added} <= {r["cluster"] for r in plain}
    assert (tmp_path / "more/crayon/2764.png").is_file()
    assert "crayon" in (tmp_path / "more/SOURCES.md").read_text()
    emoji.build(tmp_path / "one", packages, only="crayon")
    alone = [json.loads(line) for line in (tmp_path / "one/metadata.jsonl").read_text().splitlines()]
    assert [(r["file_name"], r["cluster"]) for r in alone] == [(r["file_name"], r["cluster"]) for r in added]
    assert {p.parent.name for p in (tmp_path / "one").glob("*/*.png")} == {"crayon"}
    with pytest.raises(UserError, match="--only 'chalk': no such design; there are noto, "):
        emoji.build(tmp_path / "none", packages, only="chalk")


def test_some_of_a_design_alone_is_held_out() -> None:
    pictures = [emoji.Picture("crayon", f"{k:X}", "", False, [], "", "", f"{k:X}", "train") for k in range(3000)]
    splits = [p.split for p in emoji.held_out_of("crayon", pictures)]
    assert 0.03 < splits.count("combos") / 3000 < 0.05
    assert 0.005 < splits.count("concepts") / 3000 < 0.016
