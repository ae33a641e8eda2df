"""What a picture file is, from its bytes, and why it cannot be read."""

from __future__ import annotations

import codecs
import re
import zlib

from PIL import Image, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
_PNG = b"\x89PNG\r\n\x1a\n"
_FOREIGN = (
    (b"8BPS", "image/vnd.adobe.photoshop"),
    (b"%PDF", "application/pdf"),
    (b"%!PS", "application/postscript"),
    (b"\xc5\xd0\xd3\xc6", "application/postscript"),
    (b"icns", "image/icns"),
    (b"SIMPLE  =", "image/fits"),
    (b"\x00\x00\x00\x0cJXL ", "image/jxl"),
    (b"\xff\x0a", "image/jxl"),
    (b"\x00\x00\x00\x0cjP  ", "image/jp2"),
    (b"\x00\x00\x01\x00", "image/x-icon"),
    (b"v/1\x01", "image/x-exr"),
    (b"PK\x03\x04", "application/zip"),
    (b"\x1f\x8b", "application/gzip"),
    (b"PAR1", "application/vnd.apache.parquet"),
)
_READABLE = (_PNG, b"\xff\xd8\xff", b"GIF8", b"RIFF", b"BM", b"II*\x00", b"MM\x00*")


class BadImage(Exception):
    """A picture that cannot be used; the message is the reason, fit for a report."""


def readable_formats(data: bytes) -> tuple[str, ...]:
    """The names by which Pillow may open these bytes. What reads HEIC, the extra `heic`, is loaded when one is met."""
    if not _is_heic(data):
        return FORMATS
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return FORMATS
    register_heif_opener()
    return (*FORMATS, "HEIF")


def _is_heic(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")


def check_whole(data: bytes) -> None:
    """Raise BadImage for a PNG or WebP file that ends early, and for a PNG chunk that fails its CRC.

    Pillow reads a PNG without its end and ignores the CRC of pixel data; its WebP decoder gives no reason.
    """
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP" and len(data) < 8 + int.from_bytes(data[4:8], "little"):
        raise BadImage("truncated")
    if not data.startswith(_PNG):
        return
    view, start, kind = memoryview(data), len(_PNG), b""
    while kind != b"IEND":
        end = start + 12 + int.from_bytes(view[start : start + 4], "big")
        if len(data) < max(end, start + 12):
            raise BadImage("truncated")
        kind = bytes(view[start + 4 : start + 8])
        if zlib.crc32(view[start + 4 : end - 4]) != int.from_bytes(view[end - 4 : end], "big"):
            raise BadImage(f"damaged (PNG chunk {kind.decode('latin-1')!a} fails its CRC)")
        start = end


def reason_of(error: Exception, data: bytes, max_pixels: int) -> str:
    text = str(error)
    if isinstance(error, UnidentifiedImageError):
        return _what_else(data)
    if isinstance(error, Image.DecompressionBombError):
        found = re.search(r"\d+", text)
        return f"too many pixels ({found.group() if found else '?'} > {max_pixels})"
    if "truncated" in text.lower():
        return "truncated"
    shown = "".join(c if c.isprintable() else "?" for c in text[:120])
    return f"damaged ({type(error).__name__}: {shown})"


def _what_else(data: bytes) -> str:
    """Why no accepted decoder knows this file, from its first bytes."""
    if data.startswith(b"\xff\xd8\xff") and b"\xff\xd9" not in data:
        return "truncated"
    if _is_heic(data) and "HEIF" not in Image.OPEN:
        return "HEIC is read with the extra heic (pip install 'latent-cascade[heic]'); or convert it to PNG or JPEG"
    if data.startswith(_READABLE) or _is_heic(data) or data[4:12] in (b"ftypavif", b"ftypavis"):
        return "damaged (its header cannot be read)"
    for magic, kind in _FOREIGN:
        if data.startswith(magic):
            return f"not an accepted format ({kind})"
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(data[:1024]).lstrip().lower()
    except UnicodeDecodeError:
        return "not an image"
    if not all(c.isprintable() or c.isspace() for c in text):
        return "not an image"
    for mark, kind in (("<html", "text/html"), ("<!doctype html", "text/html"), ("<svg", "image/svg+xml")):
        if mark in text:
            return f"not an image ({kind})" if kind == "text/html" else f"not an accepted format ({kind})"
    return f"not an image ({'application/json' if text.startswith(('{', '[')) else 'text/plain'})"
