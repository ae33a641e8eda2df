"""One picture file -> 8-bit sRGB pixels, or the reason why not. Hostile and damaged files are expected."""

from __future__ import annotations

import errno
import io
import math
import os
import stat
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageCms, ImageFile

from ldm.file_kinds import BadImage, check_whole, readable_formats, reason_of

Pixels = npt.NDArray[np.uint8]  # (H, W, 3), sRGB
Shape = tuple[int, int]  # width, height
T = TypeVar("T")
MAX_PIXELS_LIMIT = 178_956_970  # Pillow itself refuses larger pictures
_KINDS = {
    "1": "1-bit",
    "L": "greyscale",
    "LA": "greyscale",
    "P": "palette",
    "PA": "palette",
    "CMYK": "CMYK",
    "LAB": "Lab",
    "YCbCr": "YCbCr",
}
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TRANSIENT = {errno.ENOENT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EREMOTEIO, errno.EHOSTDOWN}
RETRY_PAUSES_S = (0.1, 0.5)
TAR_HEADER = 512
_warnings_lock = threading.Lock()


class Source(NamedTuple):
    """Where the bytes of a picture lie: all of `path`, or `size` bytes from `offset` of it, a member of a tar.

    `header` is the CRC of the tar's header before it; `data` are the bytes themselves where they lie in no such file.
    """

    path: str
    offset: int = 0
    size: int | None = None
    header: int = 0
    data: bytes | None = None


@dataclass(frozen=True)
class Decoding:
    """How pictures become 8-bit sRGB.

    background: what transparency is composited on; max_pixels: of a larger one nothing is decoded; float_range: the
    values that are black and white in pictures of floats, which are bad without; animations: their first frame is
    taken, or they are bad; transparency: composited, and as a mask kept beside that.
    """

    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 64_000_000
    float_range: tuple[float, float] | None = None
    animations: Literal["first", "skip"] = "first"
    transparency: Literal["composite", "mask"] = "composite"


_AS_IT_COMES = Decoding()


def read_image(source: str | Path | Source, how: Decoding = _AS_IT_COMES) -> tuple[Pixels, list[str]]:
    """Decode one picture fully to sRGB, uint8 (H, W, 3), and say in short notes what had to be converted.

    Upright (EXIF applied), transparency composited, profiles converted, 16-bit grey scaled. The size is checked before
    any pixel is allocated. Raises BadImage for anything else, whatever the decoder raised. Input and output errors
    are tried again after RETRY_PAUSES_S.

    A damaged JPEG that still decodes cannot be told from a good one.
    """
    image, _, notes = _decode(_read(source, how.max_pixels), how)
    return np.array(image, dtype=np.uint8), notes


def read_layers(
    source: str | Path | Source, how: Decoding
) -> tuple[Pixels, npt.NDArray[np.uint8] | None, list[str]]:
    """As `read_image`, and the transparency (H, W) that was composited: 255 is opaque, None all of it."""
    notes: list[str] = []
    colour, alpha = _layers(_read(source, how.max_pixels), how, notes)
    return np.array(_composited(colour, alpha, how.background)), None if alpha is None else np.array(alpha), notes


def try_fit(source: Source | str, shapes: Sequence[Shape], how: Decoding) -> tuple[Pixels, list[str]] | str:
    """`read_image`, cropped and shrunk to that of `shapes` (width, height) which is nearest to its own: pixels and
    notes, or the reason why not; a str is one that is known already. Of transparency as a mask, pixels have a fourth
    channel, 255 where all is opaque."""
    if isinstance(source, str):
        return source
    try:
        image, alpha, notes = _decode(_read(source, how.max_pixels), how)
        width, height = min(shapes, key=lambda shape: abs(math.log(shape[0] * image.height / shape[1] / image.width)))
        pixels = _fitted(image, width, height)
        if how.transparency == "composite":
            return pixels, notes
        opaque = _fitted(alpha or Image.new("L", image.size, 255), width, height)
        if not opaque.any():
            raise BadImage("nothing of it is opaque")
        return np.dstack([pixels, opaque]), notes
    except BadImage as error:
        return str(error)


def square(pixels: Pixels, size_px: int) -> Pixels:
    """Centre crop to a square, then down to (size_px, size_px, 3): area for whole factors, else Lanczos.

    An odd surplus loses its extra line at the bottom or right. Raises BadImage if a side is under `size_px`.
    """
    return _fitted(Image.fromarray(pixels), size_px, size_px)


def _fitted(image: Image.Image, width: int, height: int) -> Pixels:
    own_width, own_height = image.size
    wide = min(own_width, round(own_height * width / height))
    high = min(own_height, round(own_width * height / width))
    if wide < width or high < height:
        target = f"{width}" if width == height else f"{width}x{height}"
        raise BadImage(f"smaller than target ({own_width}x{own_height} < {target})")
    left, top = (own_width - wide) // 2, (own_height - high) // 2
    box = (left, top, left + wide, top + high)
    if wide % width or high % height:
        return np.array(image.crop(box).resize((width, height), Image.Resampling.LANCZOS))
    return np.array(image.reduce((wide // width, high // height), box))


def _decode(data: bytes, how: Decoding) -> tuple[Image.Image, Image.Image | None, list[str]]:
    """The bytes of a file -> upright picture of mode RGB, the alpha composited into it, and notes."""
    notes: list[str] = []
    colour, alpha = _layers(data, how, notes)
    if alpha is not None:
        notes.append("transparency composited on the background")
    return _composited(colour, alpha, how.background), alpha, notes


def _composited(colour: Image.Image, alpha: Image.Image | None, background: tuple[int, int, int]) -> Image.Image:
    if alpha is None:
        return colour
    canvas = Image.new("RGB", colour.size, background)
    canvas.paste(colour, mask=alpha)
    return canvas


def _layers(data: bytes, how: Decoding, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """The bytes of a file -> upright picture of mode RGB and its alpha of mode L, or None where all is opaque."""
    if not data:
        raise BadImage("empty")
    check_whole(data)
    try:
        with _metadata_warnings(notes):
            ImageFile.LOAD_TRUNCATED_IMAGES = False  # other libraries turn it on: grey-filled pictures
            image = Image.open(io.BytesIO(data), formats=readable_formats(data))
            if getattr(image, "is_animated", False):
                if how.animations == "skip":
                    raise BadImage("several frames")
                notes.append("first frame of several")
        with image:
            if image.width * image.height > how.max_pixels:
                raise BadImage(f"too many pixels ({image.width * image.height} > {how.max_pixels})")
            image.load()
            orientation = _orientation(image, notes)
            colour, alpha = _to_rgb(image, how.float_range, notes)
            if orientation in _TRANSPOSE:
                turn = _TRANSPOSE[orientation]
                colour, alpha = colour.transpose(turn), None if alpha is None else alpha.transpose(turn)
            return colour, alpha
    except BadImage:
        raise
    except Exception as error:  # Pillow raises SyntaxError, RuntimeError, struct.error, ...
        raise BadImage(reason_of(error, data, how.max_pixels)) from error


def read_regular(path: str | Path, max_bytes: int, offset: int = 0, size: int | None = None) -> bytes:
    """The bytes of a regular file, or `size` of them from `offset`: fewer where it ends.

    Raises OSError for anything else and for more than `max_bytes`; never blocks on a pipe or device.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # before open: opening a device can already act on it
        raise OSError(errno.EINVAL, "not a regular file")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(handle, "rb", buffering=0) as file:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        wanted = max(found.st_size - offset, 0) if size is None else size
        if wanted > max_bytes:
            raise OSError(errno.EFBIG, f"over {max_bytes} bytes")
        file.seek(offset)
        # no more than there is: a buffer of the limit would cost more than decoding
        parts = [file.read(wanted)]
        while parts[-1] and sum(map(len, parts)) < wanted:
            parts.append(file.read(wanted - sum(map(len, parts))))
    return b"".join(parts)


def _read(source: str | Path | Source, max_pixels: int) -> bytes:
    place = source if isinstance(source, Source) else Source(str(source))
    limit = 8 * max_pixels + 2**26  # 16-bit RGBA uncompressed, and 64 MiB around it
    if place.data is not None:
        if len(place.data) > limit:
            raise BadImage(f"cannot be read (over {limit} bytes)")
        return place.data
    try:
        size = place.size
        if size is None:
            return again(lambda: read_regular(place.path, limit))
        data = again(lambda: read_regular(place.path, limit, place.offset - TAR_HEADER, TAR_HEADER + size))
    except (OSError, ValueError) as error:
        raise BadImage(f"cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if len(data) < TAR_HEADER + size or zlib.crc32(data[:TAR_HEADER]) != place.header:
        raise BadImage("the tar has changed since it was scanned")
    return data[TAR_HEADER:]


def again(read: Callable[[], T]) -> T:
    """What `read` returns. Errors that network file systems get over are tried again after RETRY_PAUSES_S."""
    for pause in RETRY_PAUSES_S:
        try:
            return read()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            time.sleep(pause)
    return read()


@contextmanager
def _metadata_warnings(notes: list[str]) -> Iterator[None]:
    """Turn Pillow's warnings into a note. Python's warning filters are one per process, hence the lock."""
    with _warnings_lock, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
        if any(not issubclass(w.category, Image.DecompressionBombWarning) for w in caught):
            notes.append("damaged metadata ignored")


def _orientation(image: Image.Image, notes: list[str]) -> int:
    """The EXIF orientation, 1 to 8; 1 if there is none. Pillow has already turned TIFF pictures upright."""
    with _metadata_warnings(notes):
        try:
            if image.info.get("exif"):
                Image.Exif().load(image.info["exif"])  # opening a JPEG swallows what this raises
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
        except Exception:  # struct.error, SyntaxError, ...: no damaged tag may cost the picture
            notes.append("damaged metadata ignored")
            value = 1
    return value if value in _TRANSPOSE else 1


def _to_rgb(image: Image.Image, float_range: tuple[float, float] | None,
            notes: list[str]) -> tuple[Image.Image, Image.Image | None]:  # fmt: skip
    """Colour of mode RGB, and alpha of mode L unless all is opaque."""
    if image.mode in _KINDS:
        notes.append(_KINDS[image.mode])
    alpha: Image.Image | None = None
    if image.mode == "F":
        image = _from_float(image, float_range, notes)
    if image.mode.startswith("I"):
        colour, alpha = _from_16_bit(image, notes)
    elif image.has_transparency_data:
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = rgba.getchannel("A")
        colour = rgba.getchannel("R") if image.mode in ("1", "L", "LA", "La") else rgba.convert("RGB")
    elif image.mode in ("L", "RGB", "CMYK"):
        colour = image
    else:
        colour = image.convert("L" if image.mode == "1" else "RGB")
    if image.info.get("icc_profile"):
        colour = _to_srgb(colour, image.info["icc_profile"], notes)
    if colour.mode != "RGB":
        colour = colour.convert("RGB")
    return colour, None if alpha is None or alpha.getextrema() == (255, 255) else alpha


def _from_float(image: Image.Image, float_range: tuple[float, float] | None, notes: list[str]) -> Image.Image:
    """Float grey -> 8-bit grey, rounded over the range; what lies outside is cut off, and noted."""
    if float_range is None:
        raise BadImage("unknown range (float pixels): say which values are black and white")
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise BadImage("float pixels that are not finite")
    low, high = float_range
    notes.append("float grey scaled to 8 bits")
    if values.min() < low or values.max() > high:
        notes.append("float grey outside the range, cut off")
    scaled = (values.astype(np.float64).clip(low, high) - low) / (high - low)
    return Image.fromarray(np.rint(scaled * 255).astype(np.uint8))


def _from_16_bit(image: Image.Image, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    """Integer grey -> (8-bit grey, alpha or None), rounded over the whole range of the file's bits."""
    values = np.asarray(image).astype(np.int64 if image.mode == "I" else np.uint32)
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0] if image.mode != "I" else 16
    top = 2 ** min(int(bits), 16) - 1
    if values.min() < 0 or values.max() > top:
        raise BadImage("unknown range (32-bit integers)")
    notes.append("16-bit grey scaled to 8 bits")
    transparent = image.info.get("transparency")
    alpha = None
    if isinstance(transparent, int):
        alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    if tags.get(262) == 0:  # white is zero, which Pillow leaves to the caller at this depth
        values = top - values
    return Image.fromarray(((values * 255 + top // 2) // top).astype(np.uint8)), alpha


def _to_srgb(colour: Image.Image, icc: bytes, notes: list[str]) -> Image.Image:
    """Apply an ICC profile; the picture as it is, with a note, if the profile is damaged or unfit."""
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        space = str(profile.profile.xcolor_space).strip()
        if space == "RGB" and colour.mode == "L":
            colour = colour.convert("RGB")
        if {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space) != colour.mode:
            notes.append("colour profile does not fit the pixels, ignored")
            return colour
        made = ImageCms.profileToProfile(colour, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        name = profile.profile.profile_description or ""
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.append("damaged colour profile ignored")
        return colour
    if "srgb" not in name.lower():
        notes.append("colour profile converted to sRGB")
    return made if made is not None else colour
