"""Pictures that a user gives: read, put on white, cut to a square."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from ldm.config import UserError
from ldm.decode import Decoding, Source, read_image, read_regular
from ldm.file_kinds import BadImage

Pixels = npt.NDArray[np.uint8]
MAX_FILE_BYTES = 2**30
MAX_PIXELS = 2**26


def read_file(source: Path, tell: Callable[[str], None]) -> tuple[Pixels, str]:
    """A picture file: (H, W, 3) on white, and the digest of the file."""
    try:
        data = read_regular(source, MAX_FILE_BYTES)
        pixels, notes = read_image(Source(str(source), data=data), Decoding(max_pixels=MAX_PIXELS))
    except OSError as error:
        raise UserError(f"{source}: cannot be read ({error.strerror})") from None
    except BadImage as error:
        raise UserError(f"{source}: {error}") from None
    for note in notes:
        tell(f"{source}: {note}")
    return pixels, hashlib.sha256(data).hexdigest()


def squared(pixels: Pixels, side_px: int) -> Pixels:
    """The centre square at `side_px`: by area for whole factors, else Lanczos."""
    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    cut = Image.fromarray(pixels[top : top + side, left : left + side])
    if side % side_px == 0:
        return np.array(cut.reduce(side // side_px))
    return np.array(cut.resize((side_px, side_px), Image.Resampling.LANCZOS))
