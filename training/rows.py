"""The samples of a folder, found without decoding: captions in sidecars, or a metadata.jsonl."""

from __future__ import annotations

import difflib
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from ldm.config import Config, UserError
from ldm.decode import MAX_PIXELS_LIMIT, Decoding, Shape, read_regular
from training.metadata import (
    CAPTION_FIELDS,
    MAX_CAPTION_BYTES,
    METADATA,
    caption_column,
    captions_of,
    other_fields,
    read_metadata,
)

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif")
LAYOUTS = f"""Accepted layouts:
  DIR/metadata.jsonl  one JSON object a line, such as {{"file_name": "a.png", "caption": "a cat"}}; "file_name" is
                      relative to DIR, and "captions" may be a list; or metadata.csv or .parquet with such columns
  DIR/**/NAME.png     captions in NAME.txt beside it: UTF-8, one a line
  DIR/CLASS/NAME.png  without any captions: the folder's name is each one's
  DIR/*.tar           WebDataset: NAME.png with NAME.txt or NAME.json, which has the keys of such a line
  DIR/*.parquet, or a folder written by datasets' save_to_disk: an image column, and such a caption column
Pictures: {" ".join(SUFFIXES)}"""
MAX_ASPECT = 2.5
CONVERT = (".jxl", ".jp2", ".exr")
_LITTER = ("thumbs.db", "desktop.ini", "__macosx")


@dataclass(frozen=True)
class DataConfig(Config):
    """A folder of pictures with captions, and what to do with the samples that are not fit.

    `max_bad` is the share of bad samples above which reading fails; `limit` keeps the first samples only.
    missing_caption: what stands for one: nothing, the file's name, its folder's, or skip it, or fail; auto is the
    folder's where no picture has a caption and all lie in several folders. caption_column: where captions stand in
    metadata, tars and tables; a likely one by default. bucket_px: pictures keep their shape, of sides that are
    multiples of this and at most size_px^2 pixels, up to MAX_ASPECT : 1; by default squares are cut out of them.
    float_range: the values that are black and white in pictures of floats, which are bad without. animations: their
    first frame is taken, or they are bad. transparency: laid on `background` and learned so, or as a mask laid on it
    and left out of a base's loss.
    `workers` processes read and decode, 0: this one does. With workers, a picture that takes over
    `read_timeout_s` seconds, again and again, is bad; without, reading waits as long as the file system does.
    """

    path: str
    split: str | None = None
    size_px: int = 256
    bucket_px: int | None = None
    background: tuple[int, int, int] = (255, 255, 255)
    max_pixels: int = 64_000_000
    float_range: tuple[float, float] | None = None
    animations: Literal["first", "skip"] = "first"
    transparency: Literal["composite", "mask"] = "composite"
    max_bad: float = 0.01
    missing_caption: Literal["auto", "empty", "filename", "folder", "skip", "fail"] = "auto"
    caption_column: str | None = None
    limit: int | None = None
    workers: int = 0
    read_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path must name a folder")
        if self.size_px < 8:
            raise ValueError(f"size_px must be at least 8, not {self.size_px}")
        if self.bucket_px is not None and (self.bucket_px < 8 or self.size_px % self.bucket_px):
            raise ValueError(f"bucket_px must be at least 8 and divide size_px {self.size_px}, not {self.bucket_px}")
        if not all(0 <= value <= 255 for value in self.background):
            raise ValueError("background must be three numbers from 0 to 255")
        if not 1 <= self.max_pixels <= MAX_PIXELS_LIMIT:
            raise ValueError(f"max_pixels must be from 1 to {MAX_PIXELS_LIMIT}")
        if self.float_range is not None and not -math.inf < self.float_range[0] < self.float_range[1] < math.inf:
            raise ValueError("float_range must be two numbers, the lower first, or null")
        if self.transparency == "mask" and self.bucket_px is not None:
            raise ValueError("transparency as a mask is of squares: leave bucket_px out")
        if not 0 <= self.max_bad <= 1:
            raise ValueError("max_bad must be a share from 0 to 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be at least 1, or null for all")
        if not 0 <= self.workers <= 256:
            raise ValueError("workers must be from 0 to 256 processes")
        if self.read_timeout_s <= 0:
            raise ValueError("read_timeout_s must be over 0 seconds")

    @property
    def shapes(self) -> list[Shape]:
        """(width, height) of what pictures become: for each width the greatest height within the pixels of a square."""
        if self.bucket_px is None:
            return [(self.size_px, self.size_px)]
        unit, most = self.bucket_px, (self.size_px // self.bucket_px) ** 2
        sides = [(wide, most // wide) for wide in range(1, most + 1)]
        kept = [each for each in sides if max(each) <= MAX_ASPECT * min(each)]
        return [(wide * unit, high * unit) for wide, high in kept]

    @property
    def decoding(self) -> Decoding:
        return Decoding(self.background, self.max_pixels, self.float_range, self.animations, self.transparency)

    @property
    def caption_rules(self) -> tuple[str | None, ...]:
        """What decides captions beside the data: part of what a cache depends on."""
        return self.missing_caption, self.caption_column


@dataclass(frozen=True)
class Row:
    """One sample as found. `key` is its path below the folder, posix; `fields` the rest of its metadata line.

    A sample already known to be bad carries the reason in `fault`, so that it is counted wherever it is read.
    The picture is all of the file `path`; in a tar, `size` bytes from `offset`, after
    a header of the CRC `header`; in a table, its row number `offset`.
    """

    path: Path
    captions: tuple[str, ...]
    key: str
    fields: dict[str, Any] = field(default_factory=dict)
    fault: str = ""
    offset: int = 0
    size: int | None = None
    header: int = 0


@dataclass
class Scan:
    """All samples found, the bad ones too, and what was passed over."""

    rows: list[Row] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


def shown(text: str) -> str:
    """File names may hold newlines, terminal codes and broken encodings: none of them reaches a terminal."""
    return text if text.isprintable() else text.encode("unicode_escape").decode("ascii")


def scan_folder(config: DataConfig) -> Scan:
    """Find all samples. Raises UserError, showing the accepted layouts, when there are none."""
    root = Path(config.path).expanduser()
    if not root.is_dir():
        state = "is not a folder" if os.path.lexists(root) else "does not exist"
        raise UserError(f"data.path: {shown(str(root))} {state}.\n{LAYOUTS}")
    scan = Scan()
    keys = _files(root, scan)
    metadata = [name for name in METADATA if name in keys]
    if len(metadata) > 1:
        raise UserError(f"{shown(str(root))}: {' and '.join(metadata)}: keep one of them")
    if metadata:
        _scan_metadata(root, metadata[0], keys, config, scan)
    else:
        _scan_sidecars(root, keys, config, scan)
    if not scan.rows:
        kinds = Counter(os.path.splitext(key)[1] or "no suffix" for key in keys).most_common(5)
        found = ", ".join(f"{count} files {shown(kind)}" for kind, count in kinds) or "nothing"
        notes = "".join(f"\n{note}: {count}" for note, count in scan.notes.items())
        raise UserError(f"{shown(str(root))}: no picture to read; found {found}.{notes}\n{LAYOUTS}")
    scan.rows = scan.rows[: config.limit]
    return scan


def _files(root: Path, scan: Scan) -> dict[str, None]:
    """Keys of all files below `root` in order; hidden files, litter and linked folders are left out."""

    def unreadable(error: OSError) -> None:
        key = Path(error.filename).relative_to(root).as_posix()
        scan.rows.append(Row(Path(error.filename), (), key, fault=f"cannot be read ({error.strerror})"))

    def wanted(name: str) -> bool:
        return not name.startswith(".") and name.casefold() not in _LITTER

    keys: dict[str, None] = {}
    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = sorted(filter(wanted, folders))
        linked = sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        scan.notes["linked folder, not followed"] += linked
        below = Path(folder).relative_to(root)
        keys.update(((below / name).as_posix(), None) for name in sorted(filter(wanted, names)))
    scan.notes = +scan.notes
    return keys


def leads_outside(root: Path, path: Path) -> bool:
    inside = os.path.join(os.path.realpath(root), "")
    return not os.path.realpath(path).startswith(inside)


def add_row(scan: Scan, config: DataConfig, row: Row, read: Callable[[], tuple[str, ...] | None]) -> None:
    """Append a row with the captions `read` gives: None if there are none, ValueError if they are bad."""
    try:
        captions = read()
    except ValueError as error:
        scan.rows.append(replace(row, fault=str(error)))
        return
    if captions is None:
        policy = "empty" if config.missing_caption == "auto" else config.missing_caption
        if policy == "fail":
            raise UserError(f"{shown(row.key)}: has no caption, and data.missing_caption is fail; write one, or set "
                            "another policy")  # fmt: skip
        scan.notes[f"no caption ({policy})"] += 1
        if policy == "skip":
            return
        path = PurePosixPath(row.key)
        name = {"filename": path.stem, "folder": path.parent.name}.get(policy, "")
        captions = (name.replace("_", " ").replace("-", " ").strip(),)
    scan.rows.append(replace(row, captions=captions))


def _scan_sidecars(root: Path, keys: dict[str, None], config: DataConfig, scan: Scan) -> None:
    if config.split is not None:
        raise UserError(f"data.split: {shown(str(root))} has no metadata.jsonl, so there are no splits.")
    sidecars = 0
    if config.missing_caption == "auto" and _class_folders(keys):
        config = replace(config, missing_caption="folder")
    for key in keys:
        stem, suffix = os.path.splitext(key)
        suffix, row = suffix.lower(), Row(root / key, (), key)
        sidecar = root / f"{stem}.txt" if f"{stem}.txt" in keys else None
        if suffix in CONVERT:
            fault = f"{suffix} is not an accepted format; convert it to PNG or JPEG"
            scan.rows.append(replace(row, fault=fault))
        elif suffix in SUFFIXES:
            sidecars += sidecar is not None
            if leads_outside(root, row.path) or (sidecar and leads_outside(root, sidecar)):
                scan.rows.append(replace(row, fault="a link that leads outside the folder"))
            else:
                add_row(scan, config, row, partial(_sidecar, sidecar))
        elif suffix != ".txt":
            scan.notes[f"ignored: {shown(suffix) or 'file without a suffix'}"] += 1
    if not sidecars:
        _refuse_misplaced_metadata(root, keys)


def _class_folders(keys: dict[str, None]) -> bool:
    """Whether nothing has a caption, and all pictures lie in folders, of which there are several."""
    stems = {stem for stem, suffix in map(os.path.splitext, keys) if suffix.lower() in SUFFIXES}
    folders = {os.path.dirname(stem) for stem in stems}
    return len(folders) > 1 and "" not in folders and not any(f"{stem}.txt" in keys for stem in stems)


def _refuse_misplaced_metadata(root: Path, keys: dict[str, None]) -> None:
    for key in keys:
        name = PurePosixPath(key).name
        if "/" in key and name in METADATA:
            folder = shown(str((root / key).parent))
            raise UserError(f"{shown(str(root))}: found {shown(key)}; set data.path to {folder} to read it.")
        if "/" not in key and name.casefold().startswith("metadata."):
            raise UserError(f"{shown(str(root / key))}: did you mean metadata.jsonl?\n{LAYOUTS}")


def _sidecar(path: Path | None) -> tuple[str, ...] | None:
    if path is None:
        return None
    try:
        data = read_regular(path, MAX_CAPTION_BYTES)
    except OSError as error:
        raise ValueError(f"{path.name!a}: {error.strerror}") from None
    return caption_lines(path.name, data)


def caption_lines(name: str, data: bytes) -> tuple[str, ...]:
    """The captions of a text file, one a line. Raises ValueError where it is no UTF-8 text."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{name!a} is UTF-16, not UTF-8")
    if b"\0" in data:
        raise ValueError(f"{name!a} is binary, not text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{name!a} is not UTF-8") from None
    lines = (line.strip() for line in text.replace("\r", "\n").split("\n"))
    return tuple(line for line in lines if line) or ("",)


def _scan_metadata(root: Path, file: str, keys: dict[str, None], config: DataConfig, scan: Scan) -> None:
    if leads_outside(root, root / file):
        raise UserError(f"{shown(str(root / file))}: a link that leads outside the folder; put the file itself there")
    lines = read_metadata(root / file)
    entries = [entry for _, entry, _ in lines if entry]
    column, note = _check_columns(root / file, entries, config.caption_column)
    if note:
        scan.notes[note] += len(entries)
    _check_split(root, entries, config.split)
    named: dict[str, int] = {}
    for number, entry, fault in lines:
        key = _key(entry.get("file_name"))
        first = named.setdefault(key, number) if key else number
        if not fault and config.split is not None and str(entry.get("split")) != config.split:
            continue
        fault = fault or _fault(root, key, keys, entry)
        if first != number:
            fault = f"the same file_name as line {first}; put several captions into `captions`"
        fields = other_fields(entry)
        if fault or key is None:
            where = " ".join(filter(None, (f"{file}:{number}", key)))
            scan.rows.append(Row(root / (key or file), (), where, fields, fault))
        else:
            add_row(scan, config, Row(root / key, (), key, fields), partial(captions_of, entry, column))
    unnamed = [key for key in keys if key not in named and key.lower().endswith(SUFFIXES)]
    if unnamed:
        scan.notes[f"picture without a line in {file}, such as {shown(unnamed[0])}"] += len(unnamed)


def _check_columns(path: Path, entries: list[dict[str, Any]], column: str | None) -> tuple[str | None, str]:
    """What `caption_column` says. Raises UserError when no line at all names files too."""
    columns = sorted({str(key) for entry in entries for key in entry})
    place = f"{shown(str(path))}: columns {', '.join(map(shown, columns)) or 'none'}"
    if entries and "file_name" not in columns:
        close = difflib.get_close_matches("file_name", columns, 1, 0.5)
        hint = f"; did you mean it by {shown(close[0])}?" if close else "."
        raise UserError(f"{place}; `file_name` is missing{hint}\n{LAYOUTS}")
    texts = {key for entry in entries for key, value in entry.items() if isinstance(value, (str, list))}
    known = set(columns) & set(CAPTION_FIELDS)  # of whatever type: it is told where it is wrong
    return caption_column(place, sorted((texts | known) - {"file_name"}), column) if entries else (None, "")


def _check_split(root: Path, entries: list[dict[str, Any]], split: str | None) -> None:
    """Raise UserError, listing the splits that exist, when no line has the wanted one."""
    counts = Counter(str(entry["split"]) for entry in entries if entry.get("split") is not None)
    if split is not None and split not in counts:
        have = ", ".join(f"{shown(name)} ({n})" for name, n in sorted(counts.items())) or "none at all"
        raise UserError(f"data.split: {shown(str(root))} has no split {split!a}; it has {have}.")


def _key(name: Any) -> str | None:
    """A file name as a key, or None when it is no path below the folder."""
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        return None
    path = PurePosixPath(name)
    return None if path.is_absolute() or ".." in path.parts else path.as_posix()


def _fault(root: Path, key: str | None, keys: dict[str, None], entry: dict[str, Any]) -> str:
    name = entry.get("file_name")
    if key is None:
        return "no file_name" if name is None else f"file_name {name!a:.80} is not a path below the folder"
    try:
        if key not in keys and not os.path.lexists(root / key):
            parts = PurePosixPath(key).parts
            near = [k for k in ("/".join(parts[1:]), f"{entry.get('split')}/{key}") if k in keys]
            return f"no such file; did you mean {near[0]!a}?" if near else "no such file"
        return "leads outside the folder" if leads_outside(root, root / key) else ""
    except (OSError, ValueError) as error:
        return f"file_name cannot be used ({type(error).__name__})"
