"""Folders as people have them, damaged ones too, and what comes of them, to the word."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.config import ConfigError, UserError, parse
from ldm.decode import Decoding
from tests.pictures import data_config, encoded, fill, noise_picture
from training.check import check
from training.data import DataConfig, Reader, Row, fingerprint, read_image, rows, square


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder for the test to fill. After `_freeze`, its bytes and times of change must stay as they are."""
    root = tmp_path / "set"
    root.mkdir()
    yield root
    if (tmp_path / "before").exists():
        assert _state(root) == json.loads((tmp_path / "before").read_text())


def _state(root: Path) -> list[list[Any]]:
    state = []
    for path in sorted(root.rglob("*")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        state.append([ascii(path), os.lstat(path).st_mtime_ns, os.lstat(path).st_mode, digest])
    return state


def _freeze(root: Path) -> None:
    (root.parent / "before").write_text(json.dumps(_state(root)))


# ---- sidecars


def test_sidecars(folder: Path) -> None:
    good = {
        "plain": (b"a red cat\n", ("a red cat",)),
        "bom_crlf": (b"\xef\xbb\xbfone\r\ntwo \r\n\r\n", ("one", "two")),
        "empty": (b"", ("",)),
        "blank": (b" \n\t\n", ("",)),
        "utf8": ("日本の猫 🐈\u2028tail".encode(), ("日本の猫 🐈\u2028tail",)),
        "hostile": (b"<sd_cpp_extra_args> {} \x1b[31m", ("<sd_cpp_extra_args> {} \x1b[31m",)),
    }
    bad = {
        "utf16": ("a cat".encode("utf-16"), "'utf16.txt' is UTF-16, not UTF-8"),
        "latin1": ("später".encode("latin-1"), "'latin1.txt' is not UTF-8"),
        "binary": (b"cat\0\x01", "'binary.txt' is binary, not text"),
        "large": (b"a" * 65537, "'large.txt': over 65536 bytes"),
    }
    for name, (data, _) in (good | bad).items():
        (folder / f"{name}.png").write_bytes(encoded(noise_picture()))
        (folder / f"{name}.txt").write_bytes(data)
    _freeze(folder)
    found = {row.key: row for row in rows(data_config(folder))}
    assert list(found) == sorted(found)
    for name, (_, captions) in good.items():
        assert found[f"{name}.png"].captions == captions
    for name, (_, reason) in bad.items():
        assert found[f"{name}.png"].fault == reason
    reader = Reader(data_config(folder, max_bad=0.5))
    assert {example.key for example in reader} == {f"{name}.png" for name in good}
    assert reader.report.bad == [(f"{name}.png", bad[name][1]) for name in sorted(bad)]


def test_missing_captions(folder: Path) -> None:
    fill(folder, 2)
    (folder / "red_cat-big.png").write_bytes(encoded(noise_picture()))
    _freeze(folder)
    expected = {"empty": ("",), "filename": ("red cat big",)}
    for policy, captions in expected.items():
        reader = Reader(data_config(folder, missing_caption=policy))
        assert reader.rows[-1].captions == captions
        assert len(list(reader)) == 3
        assert reader.report.notes == {f"no caption ({policy})": 1}
    reader = Reader(data_config(folder, missing_caption="skip"))
    assert len(list(reader)) == 2
    assert reader.report.bad == []  # asked for, so it does not count
    assert reader.report.notes == {"no caption (skip)": 1}
    with pytest.raises(UserError, match=r"red_cat-big\.png: has no caption, and data\.missing_caption is fail"):
        rows(data_config(folder, missing_caption="fail"))


def test_nested_folders_and_litter(folder: Path) -> None:
    for name in ("b/2.PNG", "a/1.png", "z.jpeg", "a/deep er/é\n🐈.png", "-rf.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(encoded(noise_picture(seed=len(name))))
    for name in (".DS_Store", "Thumbs.db", "._z.jpeg", "a/.hidden.png", "b/desktop.ini"):
        (folder / name).write_bytes(b"litter")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.png").write_bytes(b"")
    (folder / "notes.md").write_text("not a sample")
    _freeze(folder)
    reader = Reader(data_config(folder))
    keys = ["-rf.png", "z.jpeg", "a/1.png", "a/deep er/é\n🐈.png", "b/2.PNG"]
    assert [example.key for example in reader] == keys
    assert reader.report.notes == {"no caption (empty)": 5, "ignored: .md": 1}
    assert [row.key for row in rows(data_config(folder, limit=2))] == keys[:2]


def test_links_and_special_files(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(encoded(noise_picture()))
    fill(folder, 3)
    (folder / "inside.png").symlink_to(folder / "000.png")
    (folder / "out.png").symlink_to(secret)
    (folder / "text.png").write_bytes(encoded(noise_picture()))
    (folder / "text.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "again").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    _freeze(folder)
    reader = Reader(data_config(folder, max_bad=0.9))
    assert [example.key for example in reader] == ["000.png", "001.png", "002.png", "inside.png"]
    bad = dict(reader.report.bad)
    assert set(bad) == {"loop.png", "out.png", "pipe.png", "text.png"}
    assert bad["out.png"] == bad["text.png"] == "a link that leads outside the folder"
    assert bad["pipe.png"] == "cannot be read (not a regular file)"
    assert reader.report.notes["linked folder, not followed"] == 1


# ---- metadata.jsonl


def _metadata(folder: Path, lines: list[Any]) -> None:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")


def test_metadata(folder: Path) -> None:
    fill(folder, 5)
    _metadata(folder, [
        {"file_name": "001.png", "caption": "one", "style": "flat", "split": "train"},
        {"file_name": "./000.png", "text": " zero ", "split": "val", "concept": 7},
        {"file_name": "002.png", "captions": ["two", "deux"], "split": "train"},
        "",
        {"file_name": "003.png", "split": "train", "caption": None},
    ])  # fmt: skip
    _freeze(folder)
    found = rows(data_config(folder))
    assert [row.key for row in found] == ["001.png", "000.png", "002.png", "003.png"]
    assert [row.captions for row in found] == [("one",), ("zero",), ("two", "deux"), ("",)]
    assert found[1] == Row(folder / "000.png", ("zero",), "000.png", {"split": "val", "concept": 7})
    reader = Reader(data_config(folder, split="train"))
    read = list(reader)
    assert [example.key for example in read] == ["001.png", "002.png", "003.png"]
    assert read[0].fields == {"style": "flat", "split": "train"}
    assert (read[0].pixels == noise_picture(seed=1)[:, 6:30]).all()
    assert reader.report.notes == {
        "no caption (empty)": 1,
        "picture without a line in metadata.jsonl, such as 004.png": 1,
    }
    with pytest.raises(UserError, match=r"no split 'test'; it has train \(3\), val \(1\)\."):
        rows(data_config(folder, split="test"))


def test_bad_metadata_lines(folder: Path, tmp_path: Path) -> None:
    fill(folder, 9)
    (tmp_path / "secret.png").write_bytes(encoded(noise_picture()))
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    lines: list[Any] = [{"file_name": f"00{i}.png", "caption": "x"} for i in range(6)]
    cases: list[tuple[Any, str, str]] = [
        ('{"file_name": "006.png", "caption": "x",}', "7", "not JSON ("),
        ("[1, 2]", "8", "not a JSON object"),
        ('{"file_name": "006.png", "caption": NaN}', "9", "NaN is not JSON"),
        ("[" * 100_000, "10", "not JSON"),
        ({"caption": "x"}, "11", "no file_name"),
        ({"file_name": "../secret.png"}, "12", "file_name '../secret.png' is not a path below the folder"),
        ({"file_name": "/etc/passwd"}, "13", "file_name '/etc/passwd' is not a path below the folder"),
        ({"file_name": "a\0.png"}, "14", "file_name 'a\\x00.png' is not a path below the folder"),
        ({"file_name": "link.png"}, "15 link.png", "leads outside the folder"),
        ({"file_name": "gone.png"}, "16 gone.png", "no such file"),
        ({"file_name": "train/006.png"}, "17 train/006.png", "no such file; did you mean '006.png'?"),
        ({"file_name": "000.png"}, "18 000.png", "the same file_name as line 1; put several captions into"),
        ({"file_name": "x" * 300}, "19 " + "x" * 300, "no such file"),
    ]
    _metadata(folder, lines + [case[0] for case in cases] + [
        {"file_name": "006.png", "caption": 7},
        {"file_name": "007.png", "captions": ["a", None]},
        '{"file_name": "008.png", "caption": "\\ud83d"}',
    ])  # fmt: skip
    _freeze(folder)
    found = rows(data_config(folder))
    bad = [(row.key, row.fault) for row in found if row.fault]
    assert len(found) == 22
    assert len(bad) == 16
    for (key, fault), (_, where, reason) in zip(bad, cases, strict=False):
        assert key == f"metadata.jsonl:{where}"
        assert fault.startswith(reason)
    assert bad[13:] == [
        ("006.png", "`caption` holds int, not text"),
        ("007.png", "`captions` holds NoneType, not text"),
        ("008.png", "`caption` holds half a surrogate pair, which is no text"),
    ]
    assert "bad   metadata.jsonl:7: not JSON (" in str(check(folder))
    with pytest.raises(UserError, match=r"metadata\.jsonl:7: not JSON"):
        list(Reader(data_config(folder)))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.jsonl", '{"filename": "0.png", "text": "x"}', r"`file_name` is missing; .* by filename\?"),
        ("metadata.jsonl", '{"file_name": "0", "captoins": "x"}', r"s captoins, file_name; .* by 'captoins'\?"),
        ("metadata.json1", "{}", r"metadata\.json1: did you mean metadata\.jsonl\?"),
        ("metadata.tsv", "file_name,text", r"metadata\.tsv: did you mean metadata\.jsonl\?"),
        ("train/metadata.jsonl", "{}", r"found train/metadata\.jsonl; set data\.path to .*/set/train to"),
        ("metadata.jsonl", "", r"no picture to read; found 1 files \.png, 1 files \.jsonl"),
    ],
)
def test_mistaken_metadata(folder: Path, name: str, text: str, message: str) -> None:
    (folder / "000.png").write_bytes(encoded(noise_picture()))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        rows(data_config(folder))


# ---- the whole folder


def test_folders_without_pictures(folder: Path, tmp_path: Path) -> None:
    for path, message in (
        (folder, "no picture to read; found nothing"),
        (tmp_path / "nowhere", "does not exist"),
        (Path(__file__), "is not a folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            rows(data_config(path))
        assert "Accepted layouts:\n  DIR/metadata.jsonl" in str(caught.value)
        assert caught.value.exit_code == 2
    (folder / "a.txt").write_text("only text")
    (folder / ".hidden.png").write_bytes(encoded(noise_picture()))
    with pytest.raises(UserError, match=r"found 1 files \.txt\.\nAccepted layouts"):
        rows(data_config(folder))
    with pytest.raises(UserError, match="no picture to read"):
        check(folder)
    (folder / "photo.JXL").write_bytes(b"")
    with pytest.raises(UserError, match=r"photo\.JXL: \.jxl is not an accepted format; convert it"):
        rows(data_config(folder))
    with pytest.raises(UserError, match=r"no metadata\.jsonl, so there are no splits"):
        rows(data_config(folder, split="train"))


def test_share_of_bad_samples(folder: Path) -> None:
    fill(folder, 20)
    for index in (3, 8, 9, 11, 12, 13):
        (folder / f"{index:03}.png").write_bytes(encoded(noise_picture())[:200])
    _freeze(folder)
    reader = Reader(data_config(folder, max_bad=0.3))
    assert len(reader) == 20
    assert len(list(reader)) == 14
    assert (reader.report.seen, reader.report.kept, len(reader.report.bad)) == (20, 14, 6)
    assert len(list(reader)) == 14  # a second pass counts anew
    assert reader.report.seen == 20
    assert str(reader.report).startswith("20 samples: 14 good, 6 bad\nbad   003.png: truncated\n")

    reader = Reader(data_config(folder, max_bad=0.2))
    with pytest.raises(UserError) as caught:
        list(reader)
    message = str(caught.value)
    assert message.startswith(
        f"{folder}: 5 of the first 13 samples are bad (20 in all); more than data.max_bad = 0.2 allows:\n"
    )
    assert "\n  003.png: truncated\n  008.png: truncated\n" in message
    assert f"`ldm data check {folder}` lists all of them" in message
    assert [key for key, _ in check(folder).bad] == [f"{i:03}.png" for i in (3, 8, 9, 11, 12, 13)]


def test_few_bad_samples_are_all_counted_before_failing(folder: Path) -> None:
    fill(folder, 4)
    (folder / "000.png").write_bytes(b"")
    (folder / "002.png").write_bytes(encoded(noise_picture(23, 99)))
    with pytest.raises(UserError) as caught:
        list(Reader(data_config(folder)))
    assert "2 of the first 4 samples" in str(caught.value)
    assert "\n  000.png: empty\n  002.png: smaller than target (99x23 < 24)\n" in str(caught.value)


def test_all_bad_fails_whatever_the_share(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of the first 2 samples are bad \(2 in all\); none is good"):
        list(Reader(data_config(folder, max_bad=1.0)))


def test_rows_can_be_shared_out(folder: Path) -> None:
    fill(folder, 6)
    (folder / "005.png").write_bytes(b"")
    found = rows(data_config(folder))
    halves = [Reader(data_config(folder, max_bad=0.4), found[part::2]) for part in (0, 1)]
    assert [[example.key[:3] for example in half] for half in halves] == [
        ["000", "002", "004"],
        ["001", "003"],
    ]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF"])
@pytest.mark.parametrize(("height", "width", "size_px"), [(24, 24, 24), (25, 61, 12), (64, 40, 10), (33, 31, 24)])
def test_reader_gives_what_read_image_and_square_give(
    folder: Path, kind: str, height: int, width: int, size_px: int
) -> None:
    for i, mode in enumerate(("RGB", "RGBA", "L", "P", "LA")):
        image = Image.fromarray(
            np.dstack([noise_picture(height, width), noise_picture(height, width, 1)[..., :1]])
        ).convert(mode)
        if kind == "PNG" or mode in ("RGB", "L"):
            image.save(folder / f"{i}.png", kind)
    background = (0, 100, 200)
    config = data_config(folder, size_px=size_px, background=background)
    for row, example in zip(rows(config), Reader(config), strict=True):
        crop, side = read_image(row.path, Decoding(background=background))[0], min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        expected = Image.fromarray(crop[top : top + side, left : left + side])
        if side % size_px:
            expected = expected.resize((size_px, size_px), Image.Resampling.LANCZOS)
        else:
            expected = expected.reduce(side // size_px)
        assert (example.pixels == np.asarray(expected)).all()
        assert (example.pixels == square(crop, size_px)).all()
        assert (Reader(config).read(row).pixels == example.pixels).all()


def test_names_cannot_reach_the_terminal(folder: Path) -> None:
    os.write(handle := os.open(os.fsencode(folder) + b"/\xff\x1b[31m\n.png", os.O_CREAT | os.O_WRONLY), b"")
    os.close(handle)
    fill(folder, 1)
    report = check(folder)
    assert "bad   \\udcff\\x1b[31m\\n.png: empty" in str(report)
    str(report).encode()
    assert len(fingerprint(rows(data_config(folder)))) == 64


def test_check_reports_repeats_and_leaks(folder: Path) -> None:
    fill(folder, 4)
    for name in ("001.png", "002.png"):
        (folder / name).write_bytes((folder / "000.png").read_bytes())
    (folder / "003.png").write_bytes(encoded(noise_picture(12, 50)))
    splits = ["train", "train", "val", "val"]
    lines = [{"file_name": f"00{i}.png", "split": s, "caption": "c"} for i, s in enumerate(splits)]
    _metadata(folder, lines)
    _freeze(folder)
    report = check(folder)
    assert report.notes == {
        "identical picture": 1,
        "identical picture in another split": 1,
    }
    assert report.facts == {
        "shortest sides": "12 px (003.png) to 24 px, median 24",
        "width by height": "1.50 to 4.17",
        "captions": "4, of 4 pictures",
        "splits": "train 2, val 2",
    }
    assert (report.kept, report.bad) == (4, [])
    assert check(folder, size_px=24).bad == [("003.png", "smaller than target (50x12 < 24)")]


def test_fingerprint_follows_what_a_cache_depends_on(folder: Path) -> None:
    fill(folder, 3)
    config = data_config(folder)
    first = fingerprint(rows(config))
    os.utime(folder / "000.png", (1, 1))
    assert fingerprint(rows(config)) == first
    (folder / "000.txt").write_text("another caption")
    second = fingerprint(rows(config))
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes() + b"\0")
    third = fingerprint(rows(config))
    (folder / "002.png").rename(folder / "004.png")
    assert len({first, second, third, fingerprint(rows(config))}) == 4


def test_config_is_checked() -> None:
    assert parse(DataConfig, {"path": "x", "background": [0, 0, 0]}, "c").background == (0, 0, 0)
    for key, value in (
        ("path", ""), ("size_px", 0), ("background", [0, 0, 256]), ("max_pixels", 10**9),
        ("float_range", [1, 0]), ("float_range", [0, float("inf")]), ("animations", "all"),
        ("max_bad", 1.5), ("max_bad", float("nan")), ("limit", 0), ("missing_caption", "guess"),
        ("workers", -1), ("workers", 257), ("read_timeout_s", 0),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            parse(DataConfig, {"path": "x", key: value}, "c")
