"""Data sets in tables: folders of Parquet files, and those that `datasets` wrote with save_to_disk.

Scanning a block reads every plain column but not the pictures. These are read batch by batch, so that nothing whole
is held, and their encoded bytes go through the same decoder as files. Nothing is fetched and no script is run.
"""

from __future__ import annotations

import bisect
import math
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldm.config import UserError
from ldm.decode import Source, again
from training.metadata import CAPTION_FIELDS, caption_column, captions_of, other_fields
from training.rows import (
    LAYOUTS,
    DataConfig,
    Row,
    Scan,
    add_row,
    leads_outside,
    shown,
)
from training.sources import Block, Blocks, digest_of

IMAGE_COLUMNS = ("image", "img", "picture", "photo", "png", "jpg", "jpeg", "webp")
BATCH_ROWS = 64
Entries = Callable[[], list[dict[str, Any] | str]]  # plain values of each row, or why they cannot be read


def open_parquet(root: Path, names: list[str], config: DataConfig, shard_items: int, notes: Counter[str]) -> Blocks:
    """Blocks are runs of row groups of at most `shard_items` rows, or one larger row group.

    Files of a split are those named SPLIT-*.parquet, unless the rows have a column `split`. Pictures are read quickly
    in order only: out of order, each costs reading its row group up to it. Raises UserError for wrong columns.
    """
    blocks: list[Block] = []
    splits: Counter[str] = Counter()
    images: dict[Path, str] = {}
    by_row = False
    for name in names:
        path = root / name
        try:
            if leads_outside(root, path):
                raise OSError("a link that leads outside the folder")
            with _parquet(path) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (OSError, pa.ArrowException) as error:
            blocks.append(_unreadable(path, name, _why(error)))
            continue
        images[path], texts, column = _columns(path, schema, config, notes)
        split = re.sub(r"(-\d+)*(-of-\d+)?\.parquet$", "", name, flags=re.IGNORECASE)
        splits[split] += metadata.num_rows
        by_row = by_row or "split" in texts
        if config.split in (None, split) or "split" in texts:
            groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            blocks += _parquet_blocks(path, groups, texts, column, config, shard_items)
    if config.split is not None and config.split not in splits and not by_row:
        have = ", ".join(f"{shown(split)} ({count})" for split, count in sorted(splits.items())) or "none at all"
        raise UserError(f"data.split: {shown(str(root))} has no split {config.split!a}; its files are of {have}.")
    return Blocks(blocks, _ParquetPictures(images), +notes)


def open_saved(root: Path, config: DataConfig, shard_items: int) -> Blocks:
    """What `datasets` saved: blocks are runs of `shard_items` rows. Raises UserError for wrong columns or splits."""
    import datasets  # takes seconds, and few data sets need it

    try:
        loaded = datasets.load_from_disk(str(root))
    except Exception as error:  # whatever its readers of JSON and Arrow raise for damaged files
        raise UserError(f"{shown(str(root))}: `datasets` saved it, but it {_why(error)}") from error
    parts = loaded if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    if config.split is not None and "" not in parts and config.split not in parts:
        have = ", ".join(f"{shown(name)} ({len(part)})" for name, part in parts.items())
        raise UserError(f"data.split: {shown(str(root))} has no split {config.split!a}; it has {have}.")
    blocks: list[Block] = []
    notes: Counter[str] = Counter()
    pictures: dict[Path, Any] = {}
    for name, part in parts.items():
        if name and config.split not in (None, name):
            continue
        for file in part.cache_files:
            if leads_outside(root, Path(file["filename"])):
                raise UserError(f"{shown(file['filename'])}: lies outside {shown(str(root))}")
        path = root / name if name else root
        part = part.with_format(None)
        image, texts, column = _columns(path, part.features.arrow_schema, config, notes)
        if config.split is not None and not name and "split" not in texts:
            raise UserError(f"data.split: {shown(str(root))} has no column `split`, so there are no splits.")
        if isinstance(part.features[image], datasets.Image):
            part = part.cast_column(image, datasets.Image(decode=False))
        pictures[path] = part.select_columns([image])
        plain = part.select_columns(texts)
        for start in range(0, len(part), shard_items):
            stop = min(start + shard_items, len(part))
            read = partial(_saved_entries, plain, start, stop, {"split": name} if name else {})
            split = config.split if not name and "split" in texts else None
            digest = digest_of(part._fingerprint, name, start, stop, split, config.caption_rules)
            label = f"{name + ' ' if name else ''}rows {start} to {stop - 1}"
            count = _count(stop - start, split, config)
            scan = partial(_scan, path, name, start, stop, read, split, column, config)
            blocks.append(Block(label, digest, count, scan))

    def source(row: Row) -> Source | str:
        return _bytes(row, next(iter(pictures[row.path][row.offset].values())))

    return Blocks(blocks, source, +notes)


def _saved_entries(plain: Any, start: int, stop: int, more: dict[str, Any]) -> list[dict[str, Any] | str]:
    try:
        columns = plain[start:stop] if plain.column_names else {}
    except (OSError, pa.ArrowException) as error:
        return [_why(error)] * (stop - start)
    return [{**{name: values[i] for name, values in columns.items()}, **more} for i in range(stop - start)]


def _parquet_blocks(
    path: Path, groups: list[int], texts: list[str], column: str | None, config: DataConfig, shard_items: int
) -> list[Block]:
    runs: list[list[int]] = []
    for number, rows in enumerate(groups):
        if runs and sum(groups[i] for i in runs[-1]) + rows <= shard_items:
            runs[-1].append(number)
        else:
            runs.append([number])
    blocks, size, start = [], path.stat().st_size, 0
    split = config.split if "split" in texts else None
    for run in runs:
        stop = start + sum(groups[i] for i in run)
        read = partial(_parquet_entries, path, {i: groups[i] for i in run}, texts)
        digest = digest_of(path.name, size, start, stop, split, config.caption_rules)
        scan = partial(_scan, path, path.name, start, stop, read, split, column, config)
        name = f"{path.name} rows {start} to {stop - 1}"
        blocks.append(Block(name, digest, _count(stop - start, split, config), scan))
        start = stop
    return blocks


def _parquet_entries(path: Path, groups: dict[int, int], texts: list[str]) -> list[dict[str, Any] | str]:
    entries: list[dict[str, Any] | str] = []
    for group, rows in groups.items():
        try:
            with again(partial(_parquet, path)) as file:
                read = file.read_row_group(group, columns=texts, use_threads=False)
                found = read.to_pylist() if texts else [{}] * rows
        except (OSError, pa.ArrowException) as error:
            found = [_why(error)] * rows
        entries += found
    return entries


def _count(rows: int, split: str | None, config: DataConfig) -> int | None:
    return rows if split is None and config.missing_caption != "skip" else None


def _scan(path: Path, name: str, start: int, stop: int, read: Entries, split: str | None, column: str | None,
          config: DataConfig) -> Scan:  # fmt: skip
    scan = Scan()
    keys = [f"{name}/{index:09d}" if name else f"{index:09d}" for index in range(start, stop)]
    for index, key, entry in zip(range(start, stop), keys, read(), strict=True):
        if isinstance(entry, str):
            scan.rows.append(Row(path, (), key, fault=entry))
        elif split is None or str(entry.get("split")) == split:
            fields = {k: _plain(v) for k, v in other_fields(entry).items()}
            add_row(scan, config, Row(path, (), key, fields, offset=index), partial(captions_of, entry, column))
    scan.notes = +scan.notes
    return scan


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _columns(path: Path, schema: pa.Schema, config: DataConfig, notes: Counter[str]
             ) -> tuple[str, list[str], str | None]:  # fmt: skip
    """The column of pictures, those of text and plain values, and that of captions as `caption_column` says, noted.
    Raises UserError where there is none."""
    able = [f.name for f in schema if _holds_bytes(f.type)]
    named = [name for wanted in IMAGE_COLUMNS for name in able if name.lower() == wanted]
    found = named[:1] or (able if len(able) == 1 else [])
    place = f"{shown(str(path))}: columns {', '.join(f'{shown(f.name)} ({f.type})' for f in schema)}"
    if not found:
        raise UserError(
            f"{place}; none is of pictures: bytes, or bytes and path, named {', '.join(IMAGE_COLUMNS)}\n{LAYOUTS}"
        )
    words = [f.name for f in schema if f.name not in able and _is_text(f.type)]
    column, note = caption_column(place, [*words, *(n for n in CAPTION_FIELDS if n in schema.names and n not in words)],
                                  config.caption_column)  # fmt: skip
    if note:
        notes[note] += 1
    texts = [f.name for f in schema if f.name not in able and (f.name in words or _is_plain(f.type))]
    return found[0], texts, column


def _is_binary(kind: pa.DataType) -> bool:
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())


def _holds_bytes(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    """Text, or lists of it."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def _is_plain(kind: pa.DataType) -> bool:
    if kind in (pa.string(), pa.large_string(), pa.string_view(), pa.bool_()):
        return True
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _bytes(row: Row, value: Any) -> Source | str:
    if isinstance(value, dict):
        if value.get("bytes") is None and value.get("path"):
            return "the table holds the path of its picture, not its bytes"
        value = value.get("bytes")
    return "no picture in this row" if value is None else Source(str(row.path), data=value)


class _ParquetPictures:
    """The bytes of pictures of Parquet files: the batch around the last one is held."""

    def __init__(self, columns: dict[Path, str]) -> None:
        self._columns = columns
        self._open: tuple[Path, int] | None = None  # file and row group
        self._batches: Any = None
        self._batch: Any = ()
        self._first = 0

    def __call__(self, row: Row) -> Source | str:
        try:
            return _bytes(row, again(lambda: self._value(row.path, row.offset)))
        except (OSError, pa.ArrowException) as error:
            return _why(error)

    def _value(self, path: Path, index: int) -> Any:
        opened, self._open = self._open, None  # unless what follows succeeds
        if opened is None or opened[0] != path or index < self._first:
            self._file, opened = _parquet(path), None
            groups = (self._file.metadata.row_group(i).num_rows for i in range(self._file.metadata.num_row_groups))
            self._starts = list(accumulate(groups, initial=0))
        if index >= self._starts[-1]:
            raise OSError("the file has changed since it was scanned")
        group = bisect.bisect_right(self._starts, index) - 1
        if opened != (path, group):
            self._batch, self._first = (), self._starts[group]
            self._batches = self._file.iter_batches(
                BATCH_ROWS, row_groups=[group], columns=[self._columns[path]], use_threads=False
            )
        while index >= self._first + len(self._batch):
            self._first += len(self._batch)
            batch = next(self._batches, None)
            if batch is None:
                raise OSError("its row group has fewer rows than it says")
            self._batch = batch.column(0)
        self._open = (path, group)
        return self._batch[index - self._first].as_py()


def _parquet(path: Path) -> pq.ParquetFile:
    if not path.is_file():
        raise OSError("no regular file")  # opening a pipe would wait for what it may never get
    # buffered and without reading ahead: else a whole row group of pictures would be held
    return pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)


def _unreadable(path: Path, name: str, fault: str) -> Block:
    return Block(name, digest_of(name, fault), 1, lambda: Scan([Row(path, (), name, fault=fault)]))


def _why(error: BaseException) -> str:
    text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]
    return f"cannot be read ({shown(text[:160])})"
