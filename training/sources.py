"""What a data set consists of, in blocks that can be scanned, read and cached one by one.

    folder -> open_source -> Pictures (files) | Blocks (tars, tables) -> Block -> rows -> Source of a picture's bytes
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import stat
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from ldm.decode import TAR_HEADER, Source, again
from training.metadata import (
    CAPTION_FIELDS,
    MAX_CAPTION_BYTES,
    METADATA,
    captions_of,
    likely_column,
    other_fields,
    read_entry,
)
from training.rows import (
    CONVERT,
    SUFFIXES,
    DataConfig,
    Row,
    Scan,
    add_row,
    caption_lines,
    leads_outside,
    scan_folder,
    shown,
)

MAX_ENTRY_BYTES = 2**20
MAX_HEADER_BYTES = 2**20


@dataclass(frozen=True)
class Block:
    """Some samples of a data set, found together.

    name: what messages call it; fingerprint: digest of what its samples depend on, without their pictures' bytes;
    count: how many there are, None where only scanning can tell; scan: finds them.
    """

    name: str
    fingerprint: str
    count: int | None
    scan: Callable[[], Scan] = field(repr=False, compare=False)

    def rows(self) -> list[Row]:
        """The samples, found anew: no picture is read."""
        return self.scan().rows


class Collection(Protocol):
    """A data set. `notes` are those of finding it, not those of a block."""

    notes: Counter[str]

    @property
    def blocks(self) -> list[Block]: ...

    def source(self, row: Row) -> Source | str:
        """Where the picture of a row lies, or why it cannot be read."""

    def hold_out(self, stride: int) -> tuple[Collection, Collection]:
        """Two collections with no sample in common; the second has every `stride`-th."""


class Pictures:
    """Samples found in one scan of a folder; blocks are runs of `shard_items` of them."""

    def __init__(self, rows: Sequence[Row], shard_items: int, notes: Counter[str]) -> None:
        self.rows, self.notes, self._shard_items = list(rows), notes, shard_items

    @cached_property
    def blocks(self) -> list[Block]:
        made = []
        for start in range(0, len(self.rows), self._shard_items):
            part = self.rows[start : start + self._shard_items]
            name = f"rows {start} to {start + len(part) - 1}"
            made.append(Block(name, fingerprint(part), len(part), partial(Scan, part)))
        return made

    def source(self, row: Row) -> Source:
        return Source(str(row.path), row.offset, row.size, row.header)

    def hold_out(self, stride: int) -> tuple[Pictures, Pictures]:
        kept = [row for i, row in enumerate(self.rows) if i % stride]
        held = self.rows[::stride]
        return Pictures(kept, self._shard_items, Counter()), Pictures(held, self._shard_items, Counter())


def fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 over key, size in bytes and captions of each row, in order: what a cache of them depends on.

    Contents are not hashed, which would read the whole set: an edit that keeps the size to the byte goes
    unseen. Times of change do not count, so copies of a folder agree.
    """
    digest = hashlib.sha256()
    for row in rows:
        try:
            size = os.stat(row.path).st_size
        except (OSError, ValueError):
            size = -1
        digest.update(json.dumps([row.key, size, row.captions]).encode() + b"\n")
    return digest.hexdigest()


def digest_of(*parts: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class Blocks:
    """Samples in blocks of their own, such as tars. `source` says where the picture of a row lies."""

    def __init__(self, blocks: Sequence[Block], source: Callable[[Row], Source | str], notes: Counter[str]) -> None:
        self.blocks, self.source, self.notes = list(blocks), source, notes

    def hold_out(self, stride: int) -> tuple[Blocks, Blocks]:
        kept, held = ([_part(b, i, stride, held) for i, b in enumerate(self.blocks)] for held in (False, True))
        return Blocks(kept, self.source, self.notes), Blocks(held, self.source, self.notes)

    def first(self, limit: int | None) -> Blocks:
        """The blocks of the first `limit` samples, the last one cut short."""
        if limit is None:
            return self
        kept: list[Block] = []
        for block in self.blocks:
            if limit <= 0:
                break
            count = len(block.rows()) if block.count is None else block.count
            kept.append(block if count <= limit else _head(block, limit))
            limit -= count
        return Blocks(kept, self.source, self.notes)


def _head(block: Block, limit: int) -> Block:
    def scan() -> Scan:
        found = block.scan()
        return Scan(found.rows[:limit], found.notes)

    return Block(block.name, digest_of(block.fingerprint, limit), limit, scan)


def _part(block: Block, number: int, stride: int, held_out: bool) -> Block:
    """The held-out samples of a block or the others. Where to start counting moves on from block to block, so that
    of blocks with fewer than `stride` samples not every one gives its first."""

    def chosen(index: int) -> bool:
        return ((index + number) % stride == 0) == held_out

    def scan() -> Scan:
        found = block.scan()
        return Scan([row for i, row in enumerate(found.rows) if chosen(i)], found.notes)

    count = None if block.count is None else sum(map(chosen, range(block.count)))
    return Block(block.name, digest_of(block.fingerprint, number % stride, stride, held_out), count, scan)


def open_source(config: DataConfig, shard_items: int) -> Collection:
    """Look at `data.path` and find what is there. Raises UserError, listing the accepted layouts, for nothing usable.

    A metadata file or pictures at the top make it a folder of pictures, whatever else is there.
    """
    root = Path(config.path).expanduser()
    names = sorted(os.listdir(root)) if root.is_dir() else []
    if {"dataset_info.json", "state.json"} <= set(names) or "dataset_dict.json" in names:
        from training.tables import open_saved

        return open_saved(root, config, shard_items).first(config.limit)
    visible = [name for name in names if not name.startswith(".")]
    suffixes = {os.path.splitext(name)[1].lower() for name in visible}
    if {*METADATA} & {*names} or suffixes & {*SUFFIXES, *CONVERT} or not suffixes & {".tar", ".parquet"}:
        scan = scan_folder(config)
        return Pictures(scan.rows, shard_items, scan.notes)
    kind = ".tar" if ".tar" in suffixes else ".parquet"
    files = [name for name in visible if name.lower().endswith(kind)]
    notes = Counter(f"ignored: {shown(name)}" for name in visible if name not in files)
    if kind == ".tar":
        return _open_tars(root, files, config, notes).first(config.limit)
    from training.tables import open_parquet

    return open_parquet(root, files, config, shard_items, notes).first(config.limit)


# ---- tars


def _open_tars(root: Path, names: list[str], config: DataConfig, notes: Counter[str]) -> Blocks:
    blocks = []
    for name in names:
        size = (root / name).stat().st_size if (root / name).exists() else -1
        digest = digest_of(name, size, config.split, config.caption_rules)
        blocks.append(Block(name, digest, None, partial(_scan_tar, root, name, config)))
    return Blocks(blocks, _in_file, notes)


def _in_file(row: Row) -> Source:
    return Source(str(row.path), row.offset, row.size, row.header)


class _Bounded(io.FileIO):
    """A file of which no large piece is read at once: tarfile reads a header whole, however long it says it is."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def _scan_tar(root: Path, name: str, config: DataConfig) -> Scan:
    """The samples of a tar: its headers and small text members are read, its pictures are not.

    What lies before any damage is kept; the damage itself is one more, bad sample, named as the tar.
    """
    try:
        return again(partial(_read_tar, root, name, config))
    except OSError as error:
        return Scan([Row(root / name, (), name, fault=f"cannot be read ({error.strerror})")])


def _read_tar(root: Path, name: str, config: DataConfig) -> Scan:
    scan, path, groups = Scan(), root / name, dict[str, list[tarfile.TarInfo]]()
    if leads_outside(root, path):
        fault = "a link that leads outside the folder"
    elif not stat.S_ISREG(os.stat(path).st_mode):
        fault = "not a regular file"
    else:
        with _Bounded(path) as file:
            fault = _group_members(file, groups, scan)
            for stem, members in groups.items():
                _add_group(file, Row(path, (), f"{name}/{stem}"), members, config, scan)
    if fault:
        scan.rows.append(Row(path, (), name, fault=f"{fault}, after {len(groups)} samples" if groups else fault))
    scan.notes = +scan.notes
    return scan


def _group_members(file: io.FileIO, groups: dict[str, list[tarfile.TarInfo]], scan: Scan) -> str:
    """Fill `groups` with the members of each sample, by the part of their name before the first dot of its last part.

    Returns what is wrong with the tar, if anything: tarfile takes a damaged header for the end.
    """
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape") as tar:
            for member in tar:
                if tar.offset <= end:
                    return "damaged: its headers do not follow each other"
                end = tar.offset
                folder, _, last = member.name.rpartition("/")
                if not member.isreg() or member.issparse():
                    scan.notes["link or special member of a tar, ignored"] += not member.isdir()
                elif member.name.startswith("/") or ".." in member.name.split("/"):
                    groups.clear()
                    return f"refused: the name of a member leads outside ({member.name!a:.80})"
                elif not last.startswith("."):
                    stem = last.partition(".")[0]
                    groups.setdefault(f"{folder}/{stem}" if folder else stem, []).append(member)
    except (tarfile.TarError, ValueError, RecursionError) as error:
        return "truncated" if "unexpected end" in str(error) else f"no tar, or damaged ({error})"
    size = file.seek(0, os.SEEK_END)
    file.seek(end)
    mark = file.read(2 * TAR_HEADER)
    if any(mark) and len(mark) >= TAR_HEADER:
        return "damaged: a header cannot be read"
    if len(mark) < 2 * TAR_HEADER:
        return "truncated: its end is not marked"
    if size - end > 2**20:
        return "more follows its end (tars joined into one?)"
    return ""


def _add_group(
    file: io.FileIO, row: Row, members: Iterable[tarfile.TarInfo], config: DataConfig, scan: Scan
) -> None:
    """Append the sample that these members make, if one of them is a picture."""
    by_suffix: dict[str, list[tarfile.TarInfo]] = {}
    for member in members:
        suffix = PurePosixPath(member.name).name.partition(".")[2].lower()
        by_suffix.setdefault(suffix, []).append(member)
    pictures = [m for suffix in SUFFIXES for m in by_suffix.get(suffix[1:], [])]
    if not pictures:
        foreign = next((suffix for suffix in CONVERT if suffix[1:] in by_suffix), None)
        if foreign:
            fault = f"{foreign} is not an accepted format; convert it to PNG or JPEG"
            scan.rows.append(replace(row, fault=fault))
        else:
            scan.notes["members of a tar without a picture, ignored"] += 1
        return
    place, size = pictures[0].offset_data, pictures[0].size
    file.seek(place - TAR_HEADER)
    row = replace(row, offset=place, size=size, header=zlib.crc32(file.read(TAR_HEADER)))
    if place + size > os.fstat(file.fileno()).st_size:
        scan.rows.append(replace(row, fault="truncated"))
        return
    texts = [by_suffix.get(suffix, []) for suffix in ("txt", "json")]
    if len(pictures) > 1 or any(len(found) > 1 for found in texts):
        scan.rows.append(replace(row, fault="several members of the same name and kind"))
        return
    try:
        lines, entry = (_text(file, found[0]) if found else None for found in texts)
        fields = {} if entry is None else read_entry(entry)
    except ValueError as error:
        scan.rows.append(replace(row, fault=str(error)))
        return
    if config.split is not None and str(fields.get("split")) != config.split:
        return
    row, words = replace(row, fields=other_fields(fields)), [k for k, v in fields.items() if isinstance(v, str)]
    column = config.caption_column or (likely_column(words) if not {*fields} & {*CAPTION_FIELDS} else None)
    read = partial(captions_of, fields, column) if lines is None else partial(caption_lines, texts[0][0].name, lines)
    add_row(scan, config, row, read)


def _text(file: io.FileIO, member: tarfile.TarInfo) -> bytes:
    limit = MAX_CAPTION_BYTES if member.name.lower().endswith("txt") else MAX_ENTRY_BYTES
    if member.size > limit:
        raise ValueError(f"{member.name!a}: over {limit} bytes")
    file.seek(member.offset_data)
    data = file.read(member.size)
    if len(data) < member.size:
        raise ValueError(f"{member.name!a}: truncated")
    return data
