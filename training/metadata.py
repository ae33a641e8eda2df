"""What is said of pictures beside them: the lines of a metadata file, and which of its columns has the captions."""

from __future__ import annotations

import csv
import difflib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.config import UserError
from ldm.decode import read_regular

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTION_FIELDS = ("captions", "caption", "text")
LIKELY_FIELDS = ("prompt", "description", "title", "alt_text", "alt", "sentence", "label")  # where none of those is
LIKELY_PARTS = ("caption", "prompt", "description", "text")
MAX_CAPTION_BYTES = 64 * 1024
MAX_METADATA_BYTES = 2**30
Line = tuple[int, dict[str, Any], str]  # its number from 1, its entry, what is wrong with it


def read_metadata(path: Path) -> list[Line]:
    """The lines of a metadata file that are not blank. Raises UserError where it cannot be read at all."""
    try:
        data = read_regular(path, MAX_METADATA_BYTES).removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{path.name!a}: cannot be read ({error.strerror})") from None
    return {".jsonl": _json_lines, ".csv": _csv_lines, ".parquet": _parquet_lines}[path.suffix](path, data)


def _json_lines(path: Path, data: bytes) -> list[Line]:
    found: list[Line] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            try:
                found.append((number, read_entry(line), ""))
            except ValueError as error:
                found.append((number, {}, str(error)))
    return found


def _csv_lines(path: Path, data: bytes) -> list[Line]:
    """A first line of names, and then values; an empty one is none."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path.name!a} is not UTF-8") from None
    csv.field_size_limit(2 * MAX_CAPTION_BYTES)
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    found: list[Line] = []
    try:
        for entry in reader:
            fault = "more values than the first line has names" if None in entry else ""
            found.append((reader.line_num, {k: v or None for k, v in entry.items() if k}, fault))
    except csv.Error as error:
        raise UserError(f"{path.name!a}:{reader.line_num}: {error}") from None
    return found


def _parquet_lines(path: Path, data: bytes) -> list[Line]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        entries = pq.read_table(pa.BufferReader(data)).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path.name!a}: not readable as Parquet ({str(error)[:200]})") from None
    return [(number, entry, "") for number, entry in enumerate(entries, 1)]


def read_entry(line: bytes) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        entry = json.loads(line.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except RecursionError:
        raise ValueError("not JSON (nested too deep)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(entry, dict):
        raise ValueError("not a JSON object")
    return entry


def likely_column(names: Sequence[str]) -> str | None:
    """Which of some columns of text has captions, where none has one of the usual names."""
    lower = {name.lower(): name for name in reversed(names)}
    known = (lower[wanted] for wanted in (*CAPTION_FIELDS, *LIKELY_FIELDS) if wanted in lower)
    parts = (name for name in names if any(part in name.lower() for part in LIKELY_PARTS))
    return next(known, None) or next(parts, None)


def caption_column(place: str, names: Sequence[str], column: str | None = None) -> tuple[str | None, str]:
    """Where the captions of a data set stand, of its columns of text: `column` where it is given, None for the usual
    names, else the likeliest; and what should be said of that.

    Raises UserError where `column` is not there, or captions seem to lie under a misspelt name."""
    if column is not None:
        if column not in names:
            raise UserError(f"data.caption_column: {place}; {column!a} is none of text among them")
        return column, ""
    if set(names) & set(CAPTION_FIELDS):
        return None, ""
    found = likely_column(names)
    if found is not None:
        return found, f"captions are read from {found!a}"
    close = [name for name in names if difflib.get_close_matches(name.lower(), CAPTION_FIELDS, 1, 0.75)]
    if close:
        raise UserError(f"{place}; neither `caption`, `text` nor `captions`: did you mean it by {close[0]!a}? Set "
                        f"data.caption_column={close[0]} to read it")  # fmt: skip
    return None, ""


def captions_of(entry: dict[str, Any], column: str | None = None) -> tuple[str, ...] | None:
    """The captions of an entry, in `column` or under the first usual name that has some; None where there are none.
    Raises ValueError for what is no text."""
    for name in CAPTION_FIELDS if column is None else (column,):
        value = entry.get(name)
        if value is None or value == []:
            continue
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            if not isinstance(text, str):
                raise ValueError(f"`{name}` holds {type(text).__name__}, not text")
            if len(text.encode("utf-8", "surrogatepass")) > MAX_CAPTION_BYTES:
                raise ValueError(f"`{name}` is over {MAX_CAPTION_BYTES} bytes")
            if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
                raise ValueError(f"`{name}` holds half a surrogate pair, which is no text")
        return tuple(text.strip() for text in texts)
    return None


def other_fields(entry: dict[str, Any]) -> dict[str, Any]:
    """What an entry says beside its file and what stands under the usual names of captions; a guessed one stays."""
    return {name: value for name, value in entry.items() if name not in ("file_name", *CAPTION_FIELDS)}
