"""Every hostile or damaged input is crafted here, and what comes of it is asserted to the word."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from ldm.config import ConfigError, UserError, parse
from training.check import check
from training.data import (
    BadImage,
    DataConfig,
    Reader,
    Row,
    fingerprint,
    read_image,
    rows,
    square,
)

PNG = b"\x89PNG\r\n\x1a\n"


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


def _picture(height: int = 24, width: int = 36, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _encode(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width: int, height: int, depth: int, colour: int, raw: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        PNG + _chunk(b"IHDR", header) + extra + _chunk(b"IDAT", zlib.compress(raw, 9)) + _chunk(b"IEND", b"")
    )


def _read(tmp_path: Path, data: bytes, **options: Any) -> tuple[np.ndarray, list[str]]:
    path = tmp_path / "file.png"
    path.write_bytes(data)
    return read_image(path, **options)


def _reason(tmp_path: Path, data: bytes, **options: Any) -> str:
    with pytest.raises(BadImage) as caught:
        _read(tmp_path, data, **options)
    return str(caught.value)


def _fill(folder: Path, count: int, **sidecar: str) -> None:
    for index in range(count):
        (folder / f"{index:03}.png").write_bytes(_encode(_picture(seed=index)))
        (folder / f"{index:03}.txt").write_text(sidecar.get("text", f"picture {index}"))


def _config(folder: Path, **options: Any) -> DataConfig:
    return DataConfig(path=str(folder), **{"size_px": 24, **options})


# ---- pictures that are refused


def test_empty_file(tmp_path: Path) -> None:
    assert _reason(tmp_path, b"") == "empty"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "not an image (text/html)"),
        (b"\xef\xbb\xbf\n <HTML>gone</HTML>", "not an image (text/html)"),
        (b'{"error": "rate limited"}', "not an image (application/json)"),
        ("zu viele Anfragen, später".encode(), "not an image (text/plain)"),
        (bytes(64), "not an image"),
        (b"\x89PNG", "not an image"),
        (b"8BPS\x00\x01" + bytes(40), "not an accepted format (image/vnd.adobe.photoshop)"),
        (b"%PDF-1.7\n1 0 obj", "not an accepted format (application/pdf)"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
            "not an accepted format (application/postscript)",
        ),
        (b'<?xml version="1.0"?><svg width="9"/>', "not an accepted format (image/svg+xml)"),
        (b"SIMPLE  =                    T", "not an accepted format (image/fits)"),
        (
            b"\x00\x00\x00\x18ftypheic" + bytes(40),
            "not an accepted format (image/heic); convert it to PNG or JPEG",
        ),
    ],
)
def test_other_formats_under_a_picture_name(tmp_path: Path, data: bytes, reason: str) -> None:
    assert _reason(tmp_path, data) == reason


@pytest.mark.parametrize("kind", ["ICNS", "PPM", "TGA", "PCX", "ICO", "EPS", "JPEG2000"])
def test_formats_pillow_reads_but_we_do_not(tmp_path: Path, kind: str) -> None:
    data = _encode(Image.new("RGB", (32, 32), "red"), kind)
    Image.open(io.BytesIO(data)).close()  # Pillow would
    assert _reason(tmp_path, data).startswith("not an")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_truncated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    data = _encode(_picture(48, 64), kind, **options)
    assert _read(tmp_path, data)[0].shape == (48, 64, 3)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some library may have left it
    for cut in (*range(32, len(data), len(data) // 40), len(data) - 4, len(data) - 1):
        assert _reason(tmp_path, data[:cut]) == "truncated", cut


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF"])
def test_truncated_in_the_middle(tmp_path: Path, kind: str) -> None:
    data = _encode(_picture(48, 64), kind)
    assert _reason(tmp_path, data[: len(data) // 2]).startswith(("truncated", "damaged"))


def test_png_with_bad_crc(tmp_path: Path) -> None:
    data = bytearray(_encode(_picture()))
    end = data.rfind(b"IEND")
    data[end - 5] ^= 255  # the last byte of the CRC of the pixel data, the pixels being whole
    Image.open(io.BytesIO(bytes(data))).load()  # Pillow does not look
    assert _reason(tmp_path, bytes(data)) == "damaged (PNG chunk 'IDAT' fails its CRC)"


def test_png_with_broken_pixel_data(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    garbage = PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"\x55" * 99) + _chunk(b"IEND", b"")
    assert _reason(tmp_path, garbage).startswith("damaged (OSError: ")
    bad_header = PNG + _chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 77, 9, 0, 0, 0)) + _chunk(b"IEND", b"")
    assert _reason(tmp_path, bad_header).startswith("damaged (")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_mutated_files_never_raise_anything_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF"):
        data = _encode(_picture(16, 16), kind)
        for _ in range(25):
            mutated = bytearray(data)
            for place in rng.integers(0, len(data), 6):
                mutated[place] = rng.integers(256)
            with contextlib.suppress(BadImage):
                assert _read(tmp_path, bytes(mutated), max_pixels=10_000)[0].dtype == np.uint8


def test_bomb_is_refused_before_its_pixels_are_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packer = zlib.compressobj(9)
    row = bytes(2501)  # 20000 pixels of one bit
    body = b"".join(packer.compress(row * 1000) for _ in range(20)) + packer.flush()
    header = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    bomb = PNG + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")
    assert len(bomb) < 64_000

    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert _reason(tmp_path, bomb) == "too many pixels (400000000 > 64000000)"
    smaller = bomb.replace(header, struct.pack(">IIBBBBB", 12000, 12000, 1, 0, 0, 0, 0))
    smaller = smaller[:29] + struct.pack(">I", zlib.crc32(smaller[12:29])) + smaller[33:]
    assert _reason(tmp_path, smaller) == "too many pixels (144000000 > 64000000)"
    assert _reason(tmp_path, _encode(_picture()), max_pixels=863) == "too many pixels (864 > 863)"


def test_metadata_bomb(tmp_path: Path) -> None:
    text = _chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000), 1))
    assert _reason(tmp_path, _png(1, 1, 8, 0, b"\0\0", text)).startswith("damaged (ValueError: ")


def test_float_pixels(tmp_path: Path) -> None:
    data = _encode(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    assert _reason(tmp_path, data) == "unknown range (float pixels)"
    wide = _encode(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")
    assert _reason(tmp_path, wide) == "unknown range (32-bit integers)"


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path, Path("/dev/zero")):
        with pytest.raises(BadImage, match=r"^cannot be read \(not a regular file\)$"):
            read_image(path)
    with pytest.raises(BadImage, match=r"^cannot be read \(No such file or directory\)$"):
        read_image(tmp_path / "vanished.png")


@pytest.mark.parametrize(
    ("number", "failures", "pauses"),
    [
        (errno.EIO, 2, [0.1, 0.5]),
        (errno.ESTALE, 1, [0.1]),
        (errno.ENOENT, 9, [0.1, 0.5]),
        (errno.EIO, 9, [0.1, 0.5]),
        (errno.EACCES, 9, []),
    ],
)
def test_errors_of_the_file_system_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, failures: int, pauses: list[float]
) -> None:
    (tmp_path / "a.png").write_bytes(_encode(_picture()))
    slept: list[float] = []
    real, left = os.open, [failures]

    def failing(path: Any, *args: Any) -> int:
        if str(path).endswith("a.png") and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(path, *args)

    monkeypatch.setattr(os, "open", failing)
    monkeypatch.setattr(time, "sleep", slept.append)
    if failures < 3:
        assert (read_image(tmp_path / "a.png")[0] == _picture()).all()
    else:
        with pytest.raises(BadImage, match=rf"^cannot be read \({os.strerror(number)}\)$"):
            read_image(tmp_path / "a.png")
    assert slept == pauses


# ---- pictures that are converted


ORIENTED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_orientation_is_applied_once(tmp_path: Path, kind: str, orientation: int) -> None:
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:8, :8], stored[:8, 8:] = (255, 0, 0), (0, 255, 0)  # asymmetric in every way
    stored[8:, :24] = (0, 0, 255)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(
        kind, {}
    )
    pixels, _ = _read(tmp_path, _encode(stored, kind, exif=exif, **options))
    expected = ORIENTED[orientation](stored)
    assert pixels.shape == expected.shape  # measured after turning
    assert np.abs(pixels.astype(int) - expected).max() <= (3 if kind == "JPEG" else 0)


def test_transparency_is_composited(tmp_path: Path) -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0] = (255, 0, 0, 0)  # a hidden colour
    rgba[1, 0], rgba[1, 1], rgba[1, 2] = (10, 20, 30, 255), (0, 0, 0, 51), (200, 100, 0, 128)
    pixels, notes = _read(tmp_path, _encode(rgba))
    assert (pixels[0] == 255).all()
    np.testing.assert_array_equal(pixels[1], [(10, 20, 30), (204, 204, 204), (227, 177, 127)])
    assert notes == ["transparency composited on the background"]
    pixels, _ = _read(tmp_path, _encode(rgba), background=(0, 128, 255))
    assert (pixels[0] == (0, 128, 255)).all()
    opaque = np.dstack([_picture(), np.full((24, 36), 255, np.uint8)])
    pixels, notes = _read(tmp_path, _encode(opaque))
    assert (pixels == opaque[..., :3]).all()
    assert notes == []


def test_grey_and_palette_transparency(tmp_path: Path) -> None:
    grey = np.array([[[0, 0], [100, 255]]], np.uint8)
    pixels, notes = _read(tmp_path, _encode(Image.fromarray(grey, "LA")))
    assert pixels.tolist() == [[[255, 255, 255], [100, 100, 100]]]
    assert notes == ["greyscale", "transparency composited on the background"]

    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    pixels, notes = _read(tmp_path, _encode(palette, transparency=b"\x00\xff\x33"))
    assert pixels.tolist() == [[[255, 255, 255], [0, 255, 0], [204, 204, 255]]]
    assert notes == ["palette", "transparency composited on the background"]
    pixels, _ = _read(tmp_path, _encode(palette, transparency=1))
    assert pixels.tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]

    keyed = _png(2, 1, 8, 2, b"\0\x01\x02\x03\x04\x05\x06", _chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert _read(tmp_path, keyed)[0].tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_16_bit_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None]
    for kind in ("PNG", "TIFF"):
        pixels, notes = _read(tmp_path, _encode(Image.fromarray(ramp), kind))
        assert (pixels == np.arange(256)[None, :, None]).all()
        assert notes == ["16-bit grey scaled to 8 bits"]
    pixels, _ = _read(tmp_path, _encode(Image.fromarray(ramp.astype(np.int32)), "TIFF"))
    assert (pixels == np.arange(256)[None, :, None]).all()
    inverted = _encode(Image.fromarray(ramp), "TIFF", tiffinfo={262: 0})
    assert (_read(tmp_path, inverted)[0] == np.arange(256)[None, ::-1, None]).all()

    raw = b"\0" + struct.pack(">3H", 0, 65535, 257)
    pixels, _ = _read(tmp_path, _png(3, 1, 16, 0, raw, _chunk(b"tRNS", struct.pack(">H", 0))))
    assert pixels[..., 0].tolist() == [[255, 255, 1]]
    colour = _png(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0, 0x80FF, 0xFFFF))
    assert _read(tmp_path, colour)[0].tolist() == [[[0, 128, 255]]]


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    bits = _encode(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))
    assert _read(tmp_path, bits)[0].tolist() == [[[0, 0, 0], [255, 255, 255]]]
    assert _read(tmp_path, bits)[1] == ["1-bit"]
    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    pixels, notes = _read(tmp_path, _encode(cmyk, "JPEG", quality=100))
    assert np.abs(pixels.astype(int) - (0, 255, 255)).max() <= 3
    assert notes == ["CMYK"]


def test_colour_profiles(tmp_path: Path) -> None:
    swapped = _swapped_profile()
    pixels, notes = _read(tmp_path, _encode(Image.new("RGB", (8, 8), (255, 0, 0)), icc_profile=swapped))
    assert np.abs(pixels.astype(int) - (0, 255, 0)).max() <= 2
    assert notes == ["colour profile converted to sRGB"]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels, notes = _read(tmp_path, _encode(_picture(), icc_profile=srgb))
    assert (pixels == _picture()).all()
    assert notes == []
    pixels, notes = _read(tmp_path, _encode(_picture(), icc_profile=b"no profile"))
    assert (pixels == _picture()).all()
    assert notes == ["damaged colour profile ignored"]
    grey = _encode(Image.new("L", (8, 8), 77), icc_profile=srgb)
    assert (_read(tmp_path, grey)[0] == 77).all()
    cmyk = _encode(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100, icc_profile=srgb)
    assert _read(tmp_path, cmyk)[1] == ["CMYK", "colour profile does not fit the pixels, ignored"]


def _swapped_profile() -> bytes:
    """The sRGB profile with red and green primaries exchanged: a gamut no one could confuse with sRGB."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for index in range(struct.unpack(">I", data[128:132])[0]):
        entry = 132 + 12 * index
        name = bytes(data[entry : entry + 4])
        data[entry : entry + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
    return bytes(data).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(
    "exif", [b"Exif\0\0garbage!", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0", b"Exif\0\0"]
)
def test_damaged_exif_costs_no_picture(tmp_path: Path, kind: str, exif: bytes) -> None:
    pixels, notes = _read(tmp_path, _encode(_picture(), kind, exif=exif))
    assert pixels.shape == (24, 36, 3)
    assert set(notes) <= {"damaged metadata ignored"}
    assert notes or exif == b"Exif\0\0"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_animations(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels, notes = _read(
        tmp_path, _encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    )
    assert (pixels == (255, 0, 0)).all()
    assert "first frame of several" in notes


# ---- square


def test_square_crops_the_centre_and_averages_whole_factors() -> None:
    pixels = _picture(32, 45)
    expected = pixels[:, 6:38].reshape(16, 2, 16, 2, 3).mean((1, 3))
    made = square(pixels, 16)
    assert made.dtype == np.uint8
    assert np.abs(made - expected).max() <= 0.5
    assert (square(pixels, 32) == pixels[:, 6:38]).all()
    lanczos = Image.fromarray(pixels[:, 6:38]).resize((20, 20), Image.Resampling.LANCZOS)
    assert (square(pixels, 20) == np.asarray(lanczos)).all()
    assert square(_picture(45, 32), 16).shape == (16, 16, 3)


def test_square_never_enlarges() -> None:
    with pytest.raises(BadImage, match=r"^smaller than target \(48x31 < 32\)$"):
        square(_picture(31, 48), 32)


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
        (folder / f"{name}.png").write_bytes(_encode(_picture()))
        (folder / f"{name}.txt").write_bytes(data)
    _freeze(folder)
    found = {row.key: row for row in rows(_config(folder))}
    assert list(found) == sorted(found)
    for name, (_, captions) in good.items():
        assert found[f"{name}.png"].captions == captions
    for name, (_, reason) in bad.items():
        assert found[f"{name}.png"].fault == reason
    reader = Reader(_config(folder, max_bad=0.5))
    assert {example.key for example in reader} == {f"{name}.png" for name in good}
    assert reader.report.bad == [(f"{name}.png", bad[name][1]) for name in sorted(bad)]


def test_missing_captions(folder: Path) -> None:
    _fill(folder, 2)
    (folder / "red_cat-big.png").write_bytes(_encode(_picture()))
    _freeze(folder)
    expected = {"empty": ("",), "filename": ("red cat big",)}
    for policy, captions in expected.items():
        reader = Reader(_config(folder, missing_caption=policy))
        assert reader.rows[-1].captions == captions
        assert len(list(reader)) == 3
        assert reader.report.notes == {f"no caption ({policy})": 1}
    reader = Reader(_config(folder, missing_caption="skip"))
    assert len(list(reader)) == 2
    assert reader.report.bad == []  # asked for, so it does not count
    assert reader.report.notes == {"no caption (skip)": 1}
    with pytest.raises(UserError, match=r"red_cat-big\.png: has no caption, and data\.missing_caption is fail"):
        rows(_config(folder, missing_caption="fail"))


def test_nested_folders_and_litter(folder: Path) -> None:
    for name in ("b/2.PNG", "a/1.png", "z.jpeg", "a/deep er/é\n🐈.png", "-rf.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(_encode(_picture(seed=len(name))))
    for name in (".DS_Store", "Thumbs.db", "._z.jpeg", "a/.hidden.png", "b/desktop.ini"):
        (folder / name).write_bytes(b"litter")
    (folder / ".git").mkdir()
    (folder / ".git" / "x.png").write_bytes(b"")
    (folder / "notes.md").write_text("not a sample")
    _freeze(folder)
    reader = Reader(_config(folder))
    keys = ["-rf.png", "z.jpeg", "a/1.png", "a/deep er/é\n🐈.png", "b/2.PNG"]
    assert [example.key for example in reader] == keys
    assert reader.report.notes == {"no caption (empty)": 5, "ignored: .md": 1}
    assert [row.key for row in rows(_config(folder, limit=2))] == keys[:2]


def test_links_and_special_files(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(_encode(_picture()))
    _fill(folder, 3)
    (folder / "inside.png").symlink_to(folder / "000.png")
    (folder / "out.png").symlink_to(secret)
    (folder / "text.png").write_bytes(_encode(_picture()))
    (folder / "text.txt").symlink_to(tmp_path / "secret.txt")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "again").symlink_to(folder)
    os.mkfifo(folder / "pipe.png")
    _freeze(folder)
    reader = Reader(_config(folder, max_bad=0.9))
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
    _fill(folder, 5)
    _metadata(folder, [
        {"file_name": "001.png", "caption": "one", "style": "flat", "split": "train"},
        {"file_name": "./000.png", "text": " zero ", "split": "val", "concept": 7},
        {"file_name": "002.png", "captions": ["two", "deux"], "split": "train"},
        "",
        {"file_name": "003.png", "split": "train", "caption": None},
    ])  # fmt: skip
    _freeze(folder)
    found = rows(_config(folder))
    assert [row.key for row in found] == ["001.png", "000.png", "002.png", "003.png"]
    assert [row.captions for row in found] == [("one",), ("zero",), ("two", "deux"), ("",)]
    assert found[1] == Row(folder / "000.png", ("zero",), "000.png", {"split": "val", "concept": 7})
    reader = Reader(_config(folder, split="train"))
    read = list(reader)
    assert [example.key for example in read] == ["001.png", "002.png", "003.png"]
    assert read[0].fields == {"style": "flat", "split": "train"}
    assert (read[0].pixels == _picture(seed=1)[:, 6:30]).all()
    assert reader.report.notes == {
        "no caption (empty)": 1,
        "picture without a line in metadata.jsonl, such as 004.png": 1,
    }
    with pytest.raises(UserError, match=r"no split 'test'; it has train \(3\), val \(1\)\."):
        rows(_config(folder, split="test"))


def test_bad_metadata_lines(folder: Path, tmp_path: Path) -> None:
    _fill(folder, 9)
    (tmp_path / "secret.png").write_bytes(_encode(_picture()))
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
    found = rows(_config(folder))
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
        list(Reader(_config(folder)))


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
    (folder / "000.png").write_bytes(_encode(_picture()))
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        rows(_config(folder))


# ---- the whole folder


def test_folders_without_pictures(folder: Path, tmp_path: Path) -> None:
    for path, message in (
        (folder, "no picture to read; found nothing"),
        (tmp_path / "nowhere", "does not exist"),
        (Path(__file__), "is not a folder"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            rows(_config(path))
        assert "Accepted layouts:\n  DIR/metadata.jsonl" in str(caught.value)
        assert caught.value.exit_code == 2
    (folder / "a.txt").write_text("only text")
    (folder / ".hidden.png").write_bytes(_encode(_picture()))
    with pytest.raises(UserError, match=r"found 1 files \.txt\.\nAccepted layouts"):
        rows(_config(folder))
    with pytest.raises(UserError, match="no picture to read"):
        check(folder)
    (folder / "photo.HEIC").write_bytes(b"")
    with pytest.raises(UserError, match=r"photo\.HEIC: \.heic is not an accepted format; convert it"):
        rows(_config(folder))
    with pytest.raises(UserError, match=r"no metadata\.jsonl, so there are no splits"):
        rows(_config(folder, split="train"))


def test_share_of_bad_samples(folder: Path) -> None:
    _fill(folder, 20)
    for index in (3, 8, 9, 11, 12, 13):
        (folder / f"{index:03}.png").write_bytes(_encode(_picture())[:200])
    _freeze(folder)
    reader = Reader(_config(folder, max_bad=0.3))
    assert len(reader) == 20
    assert len(list(reader)) == 14
    assert (reader.report.seen, reader.report.kept, len(reader.report.bad)) == (20, 14, 6)
    assert len(list(reader)) == 14  # a second pass counts anew
    assert reader.report.seen == 20
    assert str(reader.report).startswith("20 samples: 14 good, 6 bad\nbad   003.png: truncated\n")

    reader = Reader(_config(folder, max_bad=0.2))
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
    _fill(folder, 4)
    (folder / "000.png").write_bytes(b"")
    (folder / "002.png").write_bytes(_encode(_picture(23, 99)))
    with pytest.raises(UserError) as caught:
        list(Reader(_config(folder)))
    assert "2 of the first 4 samples" in str(caught.value)
    assert "\n  000.png: empty\n  002.png: smaller than target (99x23 < 24)\n" in str(caught.value)


def test_all_bad_fails_whatever_the_share(folder: Path) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"2 of the first 2 samples are bad \(2 in all\); none is good"):
        list(Reader(_config(folder, max_bad=1.0)))


def test_rows_can_be_shared_out(folder: Path) -> None:
    _fill(folder, 6)
    (folder / "005.png").write_bytes(b"")
    found = rows(_config(folder))
    halves = [Reader(_config(folder, max_bad=0.4), found[part::2]) for part in (0, 1)]
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
        image = Image.fromarray(np.dstack([_picture(height, width), _picture(height, width, 1)[..., :1]])).convert(mode)
        if kind == "PNG" or mode in ("RGB", "L"):
            image.save(folder / f"{i}.png", kind)
    background = (0, 100, 200)
    config = _config(folder, size_px=size_px, background=background)
    for row, example in zip(rows(config), Reader(config), strict=True):
        crop, side = read_image(row.path, background=background)[0], min(height, width)
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
    _fill(folder, 1)
    report = check(folder)
    assert "bad   \\udcff\\x1b[31m\\n.png: empty" in str(report)
    str(report).encode()
    assert len(fingerprint(rows(_config(folder)))) == 64


def test_check_reports_repeats_and_leaks(folder: Path) -> None:
    _fill(folder, 4)
    for name in ("001.png", "002.png"):
        (folder / name).write_bytes((folder / "000.png").read_bytes())
    (folder / "003.png").write_bytes(_encode(_picture(12, 50)))
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
    _fill(folder, 3)
    config = _config(folder)
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
        ("max_bad", 1.5), ("max_bad", float("nan")), ("limit", 0), ("missing_caption", "guess"),
        ("workers", -1), ("workers", 257), ("read_timeout_s", 0),
    ):  # fmt: skip
        with pytest.raises(ConfigError):
            parse(DataConfig, {"path": "x", key: value}, "c")
