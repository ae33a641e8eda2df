"""Every hostile or damaged picture is crafted here, and what comes of it is asserted to the word."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import struct
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms, ImageFile, ImageFilter

from tests.pictures import PNG, encoded, noise_picture, png_bytes, png_chunk, read_bytes, refusal
from training.data import BadImage, read_image, square

# ---- pictures that are refused


def test_empty_file(tmp_path: Path) -> None:
    assert refusal(tmp_path, b"") == "empty"


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
            "damaged (its header cannot be read)",
        ),
    ],
)
def test_other_formats_under_a_picture_name(tmp_path: Path, data: bytes, reason: str) -> None:
    assert refusal(tmp_path, data) == reason


@pytest.mark.parametrize("kind", ["ICNS", "PPM", "TGA", "PCX", "ICO", "EPS", "JPEG2000"])
def test_formats_pillow_reads_but_we_do_not(tmp_path: Path, kind: str) -> None:
    data = encoded(Image.new("RGB", (32, 32), "red"), kind)
    Image.open(io.BytesIO(data)).close()  # Pillow would
    assert refusal(tmp_path, data).startswith("not an")


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
def test_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]) -> None:
    data = encoded(noise_picture(48, 64), kind, **options)
    assert read_bytes(tmp_path, data)[0].shape == (48, 64, 3)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some library may have left it
    for cut in (*range(32, len(data), len(data) // 40), len(data) - 4, len(data) - 1):
        assert refusal(tmp_path, data[:cut]) == "truncated", cut


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "AVIF"])
def test_truncated_in_the_middle(tmp_path: Path, kind: str) -> None:
    data = encoded(noise_picture(48, 64), kind)
    assert refusal(tmp_path, data[: len(data) // 2]).startswith(("truncated", "damaged"))


def test_png_with_bad_crc(tmp_path: Path) -> None:
    data = bytearray(encoded(noise_picture()))
    end = data.rfind(b"IEND")
    data[end - 5] ^= 255  # the last byte of the CRC of the pixel data, the pixels being whole
    Image.open(io.BytesIO(bytes(data))).load()  # Pillow does not look
    assert refusal(tmp_path, bytes(data)) == "damaged (PNG chunk 'IDAT' fails its CRC)"


def test_png_with_broken_pixel_data(tmp_path: Path) -> None:
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    garbage = PNG + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"\x55" * 99) + png_chunk(b"IEND", b"")
    assert refusal(tmp_path, garbage).startswith("damaged (OSError: ")
    bad_header = PNG + png_chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 77, 9, 0, 0, 0)) + png_chunk(b"IEND", b"")
    assert refusal(tmp_path, bad_header).startswith("damaged (")


@pytest.mark.filterwarnings("ignore:Truncated File Read")
def test_mutated_files_never_raise_anything_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "AVIF"):
        data = encoded(noise_picture(16, 16), kind)
        for _ in range(25):
            mutated = bytearray(data)
            for place in rng.integers(0, len(data), 6):
                mutated[place] = rng.integers(256)
            with contextlib.suppress(BadImage):
                assert read_bytes(tmp_path, bytes(mutated), max_pixels=10_000)[0].dtype == np.uint8


def test_bomb_is_refused_before_its_pixels_are_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packer = zlib.compressobj(9)
    row = bytes(2501)  # 20000 pixels of one bit
    body = b"".join(packer.compress(row * 1000) for _ in range(20)) + packer.flush()
    header = struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)
    bomb = PNG + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    assert len(bomb) < 64_000

    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert refusal(tmp_path, bomb) == "too many pixels (400000000 > 64000000)"
    smaller = bomb.replace(header, struct.pack(">IIBBBBB", 12000, 12000, 1, 0, 0, 0, 0))
    smaller = smaller[:29] + struct.pack(">I", zlib.crc32(smaller[12:29])) + smaller[33:]
    assert refusal(tmp_path, smaller) == "too many pixels (144000000 > 64000000)"
    assert refusal(tmp_path, encoded(noise_picture()), max_pixels=863) == "too many pixels (864 > 863)"


def test_metadata_bomb(tmp_path: Path) -> None:
    text = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000), 1))
    assert refusal(tmp_path, png_bytes(1, 1, 8, 0, b"\0\0", text)).startswith("damaged (ValueError: ")


def test_float_pixels(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    assert refusal(tmp_path, data) == "unknown range (float pixels): say which values are black and white"


def test_float_pixels_of_a_declared_range(tmp_path: Path) -> None:
    values = np.array([[-2, 0, 2], [3, 8, 9]], np.float32)
    data = encoded(Image.fromarray(values), "TIFF")
    pixels, notes = read_bytes(tmp_path, data, float_range=(-2.0, 8.0))
    assert pixels[..., 0].tolist() == [[0, 51, 102], [128, 255, 255]]
    assert notes == ["float grey scaled to 8 bits", "float grey outside the range, cut off"]
    assert read_bytes(tmp_path, data, float_range=(-2.0, 9.0))[1] == ["float grey scaled to 8 bits"]
    values[0, 0] = np.nan
    damaged = encoded(Image.fromarray(values), "TIFF")
    assert refusal(tmp_path, damaged, float_range=(-2.0, 8.0)) == "float pixels that are not finite"


def test_heic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Image.fromarray(noise_picture(64, 96)).resize((96, 64)).filter(ImageFilter.GaussianBlur(4))
    pillow_heif.register_heif_opener()
    data = encoded(whole, "HEIF", quality=95)
    pixels, notes = read_bytes(tmp_path, data)
    assert notes == []
    assert np.abs(pixels.astype(int) - np.asarray(whole)).max() < 16
    assert refusal(tmp_path, data[:-200]).startswith(("damaged", "truncated"))
    assert refusal(tmp_path, data, max_pixels=100) == "too many pixels (6144 > 100)"
    monkeypatch.delitem(Image.OPEN, "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert refusal(tmp_path, data).startswith("HEIC is read with the extra heic (pip install")
    wide = encoded(Image.fromarray(np.full((4, 4), 70_000, np.int32)), "TIFF")
    assert refusal(tmp_path, wide) == "unknown range (32-bit integers)"


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
    (tmp_path / "a.png").write_bytes(encoded(noise_picture()))
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
        assert (read_image(tmp_path / "a.png")[0] == noise_picture()).all()
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
    options: dict[str, Any] = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(kind, {})
    pixels, _ = read_bytes(tmp_path, encoded(stored, kind, exif=exif, **options))
    expected = ORIENTED[orientation](stored)
    assert pixels.shape == expected.shape  # measured after turning
    assert np.abs(pixels.astype(int) - expected).max() <= (3 if kind == "JPEG" else 0)


def test_transparency_is_composited(tmp_path: Path) -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0] = (255, 0, 0, 0)  # a hidden colour
    rgba[1, 0], rgba[1, 1], rgba[1, 2] = (10, 20, 30, 255), (0, 0, 0, 51), (200, 100, 0, 128)
    pixels, notes = read_bytes(tmp_path, encoded(rgba))
    assert (pixels[0] == 255).all()
    np.testing.assert_array_equal(pixels[1], [(10, 20, 30), (204, 204, 204), (227, 177, 127)])
    assert notes == ["transparency composited on the background"]
    pixels, _ = read_bytes(tmp_path, encoded(rgba), background=(0, 128, 255))
    assert (pixels[0] == (0, 128, 255)).all()
    opaque = np.dstack([noise_picture(), np.full((24, 36), 255, np.uint8)])
    pixels, notes = read_bytes(tmp_path, encoded(opaque))
    assert (pixels == opaque[..., :3]).all()
    assert notes == []


def test_grey_and_palette_transparency(tmp_path: Path) -> None:
    grey = np.array([[[0, 0], [100, 255]]], np.uint8)
    pixels, notes = read_bytes(tmp_path, encoded(Image.fromarray(grey, "LA")))
    assert pixels.tolist() == [[[255, 255, 255], [100, 100, 100]]]
    assert notes == ["greyscale", "transparency composited on the background"]

    palette = Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.putdata([0, 1, 2])
    pixels, notes = read_bytes(tmp_path, encoded(palette, transparency=b"\x00\xff\x33"))
    assert pixels.tolist() == [[[255, 255, 255], [0, 255, 0], [204, 204, 255]]]
    assert notes == ["palette", "transparency composited on the background"]
    pixels, _ = read_bytes(tmp_path, encoded(palette, transparency=1))
    assert pixels.tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]

    keyed = png_bytes(2, 1, 8, 2, b"\0\x01\x02\x03\x04\x05\x06", png_chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3)))
    assert read_bytes(tmp_path, keyed)[0].tolist() == [[[255, 255, 255], [4, 5, 6]]]


def test_16_bit_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None]
    for kind in ("PNG", "TIFF"):
        pixels, notes = read_bytes(tmp_path, encoded(Image.fromarray(ramp), kind))
        assert (pixels == np.arange(256)[None, :, None]).all()
        assert notes == ["16-bit grey scaled to 8 bits"]
    pixels, _ = read_bytes(tmp_path, encoded(Image.fromarray(ramp.astype(np.int32)), "TIFF"))
    assert (pixels == np.arange(256)[None, :, None]).all()
    inverted = encoded(Image.fromarray(ramp), "TIFF", tiffinfo={262: 0})
    assert (read_bytes(tmp_path, inverted)[0] == np.arange(256)[None, ::-1, None]).all()

    raw = b"\0" + struct.pack(">3H", 0, 65535, 257)
    pixels, _ = read_bytes(tmp_path, png_bytes(3, 1, 16, 0, raw, png_chunk(b"tRNS", struct.pack(">H", 0))))
    assert pixels[..., 0].tolist() == [[255, 255, 1]]
    colour = png_bytes(1, 1, 16, 2, b"\0" + struct.pack(">3H", 0, 0x80FF, 0xFFFF))
    assert read_bytes(tmp_path, colour)[0].tolist() == [[[0, 128, 255]]]


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    bits = encoded(Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1"))
    assert read_bytes(tmp_path, bits)[0].tolist() == [[[0, 0, 0], [255, 255, 255]]]
    assert read_bytes(tmp_path, bits)[1] == ["1-bit"]
    cmyk = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    pixels, notes = read_bytes(tmp_path, encoded(cmyk, "JPEG", quality=100))
    assert np.abs(pixels.astype(int) - (0, 255, 255)).max() <= 3
    assert notes == ["CMYK"]


def test_colour_profiles(tmp_path: Path) -> None:
    swapped = _swapped_profile()
    pixels, notes = read_bytes(tmp_path, encoded(Image.new("RGB", (8, 8), (255, 0, 0)), icc_profile=swapped))
    assert np.abs(pixels.astype(int) - (0, 255, 0)).max() <= 2
    assert notes == ["colour profile converted to sRGB"]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    pixels, notes = read_bytes(tmp_path, encoded(noise_picture(), icc_profile=srgb))
    assert (pixels == noise_picture()).all()
    assert notes == []
    pixels, notes = read_bytes(tmp_path, encoded(noise_picture(), icc_profile=b"no profile"))
    assert (pixels == noise_picture()).all()
    assert notes == ["damaged colour profile ignored"]
    grey = encoded(Image.new("L", (8, 8), 77), icc_profile=srgb)
    assert (read_bytes(tmp_path, grey)[0] == 77).all()
    cmyk = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=100, icc_profile=srgb)
    assert read_bytes(tmp_path, cmyk)[1] == ["CMYK", "colour profile does not fit the pixels, ignored"]


def _swapped_profile() -> bytes:
    """The sRGB profile with red and green primaries exchanged: a gamut no one could confuse with sRGB."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for index in range(struct.unpack(">I", data[128:132])[0]):
        entry = 132 + 12 * index
        name = bytes(data[entry : entry + 4])
        data[entry : entry + 4] = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}.get(name, name)
    return bytes(data).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage!", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01\x03\0", b"Exif\0\0"])
def test_damaged_exif_costs_no_picture(tmp_path: Path, kind: str, exif: bytes) -> None:
    pixels, notes = read_bytes(tmp_path, encoded(noise_picture(), kind, exif=exif))
    assert pixels.shape == (24, 36, 3)
    assert set(notes) <= {"damaged metadata ignored"}
    assert notes or exif == b"Exif\0\0"


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame_of_animations(tmp_path: Path, kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    pixels, notes = read_bytes(tmp_path, data)
    assert (pixels == (255, 0, 0)).all()
    assert "first frame of several" in notes
    assert refusal(tmp_path, data, animations="skip") == "several frames"
    assert (read_bytes(tmp_path, encoded(frames[0], kind, **options), animations="skip")[0] == pixels).all()


# ---- square


def test_square_crops_the_centre_and_averages_whole_factors() -> None:
    pixels = noise_picture(32, 45)
    expected = pixels[:, 6:38].reshape(16, 2, 16, 2, 3).mean((1, 3))
    made = square(pixels, 16)
    assert made.dtype == np.uint8
    assert np.abs(made - expected).max() <= 0.5
    assert (square(pixels, 32) == pixels[:, 6:38]).all()
    lanczos = Image.fromarray(pixels[:, 6:38]).resize((20, 20), Image.Resampling.LANCZOS)
    assert (square(pixels, 20) == np.asarray(lanczos)).all()
    assert square(noise_picture(45, 32), 16).shape == (16, 16, 3)


def test_square_never_enlarges() -> None:
    with pytest.raises(BadImage, match=r"^smaller than target \(48x31 < 32\)$"):
        square(noise_picture(31, 48), 32)
