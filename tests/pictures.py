"""Pictures and folders of them made up for tests, sound and damaged."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.decode import Decoding
from training.data import BadImage, DataConfig, read_image

PNG = b"\x89PNG\r\n\x1a\n"


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise_picture(height: int = 24, width: int = 36, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_bytes(width: int, height: int, depth: int, colour: int, raw: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        PNG + png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", zlib.compress(raw, 9)) + png_chunk(b"IEND", b"")
    )


def read_bytes(tmp_path: Path, data: bytes, **options: Any) -> tuple[np.ndarray, list[str]]:
    path = tmp_path / "file.png"
    path.write_bytes(data)
    return read_image(path, Decoding(**options))


def refusal(tmp_path: Path, data: bytes, **options: Any) -> str:
    with pytest.raises(BadImage) as caught:
        read_bytes(tmp_path, data, **options)
    return str(caught.value)


def fill(folder: Path, count: int, **sidecar: str) -> None:
    for index in range(count):
        (folder / f"{index:03}.png").write_bytes(encoded(noise_picture(seed=index)))
        (folder / f"{index:03}.txt").write_text(sidecar.get("text", f"picture {index}"))


def data_config(folder: Path, **options: Any) -> DataConfig:
    return DataConfig(path=str(folder), **{"size_px": 24, **options})
