"""Examples -> cache, the one writer. All processes of a launch write it together, and a later launch goes on with it.

    blocks -> Reader -> Example -> pixels uint8, or LatentCodec.encode -> moments float16 -> shards    (own blocks)
    all shards -> distinct captions -> TextEncoder -> real tokens' states float16 -> text files       (own files)
    all of it -> index, manifest                                                                      (process 0)
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, distributed

from ldm.config import UserError
from ldm.progress import advancing, progress
from ldm.text import TextEncoder
from ldm.weights import Codec
from training.cache import CAPTION_BLOCK, FORMAT, INDEX, MANIFEST, Cache, CacheKey, save_rows, shard_name, text_name
from training.data import BadImage, Block, Example, Reader, Report, Row
from training.encoders import LatentSums, beside, caption_states, flat, picture_tensors
from training.files import lock, sha256, sweep, write_atomically
from training.processes import process_state
from training.rows import shown

PATIENCE = timedelta(days=30)  # processes end their shares far apart; the loss of one ends the wait of others at once
PLAN_PICTURES, PLAN_BLOCKS = 64, 8
ENTRY_BYTES = 120  # of a caption in a dict of Python, beside the caption itself


def encode(reader: Reader, root: str | Path, codec: Codec | None = None, text: TextEncoder | None = None,
           scale: int | None = None) -> Cache:  # fmt: skip
    """The cache of what `reader` reads, written under `root` unless it is there already.

    Every process of the launch calls it; their number, and what was interrupted before, change no byte of it.
    codec None keeps the pixels themselves; text None keeps no text states; with a scale, pictures of 1 / scale the
    side are kept too.
    Raises UserError when too much of the data is bad, an encoder gives non-finite values or nothing can be written.
    """
    key = cache_key(reader, codec, text, scale)
    folder = key.folder(root)
    manifest = folder / MANIFEST
    with _team() as team, _disk_errors(folder):
        # only process 0 looks: a network file system may remember for the others that the file is not there
        if not team.agree(team.main and manifest.exists()):
            if team.main:
                folder.mkdir(parents=True, exist_ok=True)
            with lock(folder / ".lock", "waiting for the job that writes this cache") if team.main else nullcontext():
                if not team.agree(team.main and manifest.exists()):
                    _Job(reader, codec, text, key, folder, team).write()
                team.wait()
    return Cache(folder)


def cache_key(reader: Reader, codec: Codec | None, text: TextEncoder | None, scale: int | None = None) -> CacheKey:
    """The key of the cache of these."""
    config = reader.config
    return CacheKey(
        reader.fingerprint, config.size_px, config.decoding,
        codec.digest if codec else None, text.digest if text else None, scale, config.bucket_px
    )  # fmt: skip


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder}: the cache cannot be written ({error}); make room there, or name another place with `cache`. "
            "The same command goes on with what is done"
        ) from None


@dataclass(frozen=True)
class _Team:
    """The processes that write one cache, and how they wait for each other."""

    number: int
    size: int
    group: Any = None

    @property
    def main(self) -> bool:
        return self.number == 0

    def wait(self) -> None:
        """Until every process has come here."""
        if self.group is not None:
            self._finish(distributed.barrier(self.group, async_op=True))

    def agree(self, value: bool) -> bool:
        """What process 0 says."""
        said = torch.tensor([int(value)])
        if self.group is not None:
            self._finish(distributed.broadcast(said, 0, self.group, async_op=True))
        return bool(said)

    def _finish(self, work: Any) -> None:
        while not work.is_completed():  # `wait` itself would hold back signals
            time.sleep(0.01)
        work.wait()


@contextmanager
def _team() -> Iterator[_Team]:
    state = process_state()
    if state.num_processes == 1:
        yield _Team(0, 1)
        return
    group = distributed.new_group(backend="gloo", timeout=PATIENCE)
    yield _Team(state.process_index, state.num_processes, group)
    distributed.destroy_process_group(group)


@dataclass
class _Merged:
    """What all shards hold, in order, without their tensors. Captions are numbered as they appear, "" first."""

    captions: dict[str, int] = field(default_factory=lambda: {"": 0})
    flat: array[int] = field(default_factory=lambda: array("q"))
    first: array[int] = field(default_factory=lambda: array("q", [0]))
    counts: list[int] = field(default_factory=list)
    shapes: list[list[int]] = field(default_factory=list)
    sums: LatentSums = field(default_factory=LatentSums)
    report: Report = field(default_factory=Report)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Job:
    """The writing of one cache. A part is a tensor file and, written after it, the JSON that says it is done."""

    reader: Reader
    codec: Codec | None
    text: TextEncoder | None
    key: CacheKey
    folder: Path
    team: _Team

    def write(self) -> None:
        if self.team.main:
            sweep(self.folder)
        self.team.wait()
        self._write_shards()
        self.team.wait()
        merged = self._merge()
        self.reader.judge(merged.report, final=True)
        captions = list(merged.captions)
        parts = range(-(-len(captions) // CAPTION_BLOCK)) if self.text is not None else range(0)
        for number in progress(self._own(parts), f"encoding captions, {CAPTION_BLOCK} at a time"):
            self._write_text(number, captions[number * CAPTION_BLOCK : (number + 1) * CAPTION_BLOCK])
        self.team.wait()
        if self.team.main:
            self._finish(merged, parts)

    def _own(self, parts: range) -> range:
        """The share of this process."""
        return parts[self.team.number :: self.team.size]

    def _write_shards(self) -> None:
        blocks, report = self.reader.blocks, Report()
        own = self._own(range(len(blocks)))
        counts = [blocks[number].count for number in own]
        total = None if None in counts else sum(count or 0 for count in counts)
        with advancing("encoding pictures", total) as advance:
            for number in own:
                record = self._done(shard_name(number))
                if record is None:
                    record = self._write_shard(number, blocks[number], advance)
                else:
                    for _ in range(record["seen"]):
                        advance()
                _add_to(report, record)
                self.reader.judge(report, final=False)

    def _write_shard(self, number: int, block: Block, advance: Callable[[], None]) -> dict[str, Any]:
        report, sums = Report(), LatentSums()
        items: list[dict[str, Any]] = []
        codec = self.codec.module if self.codec else None

        def tensors() -> Iterator[list[Tensor]]:
            with closing(picture_tensors(self.reader.examples(block, report), codec)) as computed:
                for group, tensor in computed:
                    if codec is not None:
                        sums.add(tensor, number, len(items))
                    shape = {} if self.key.bucket_px is None else {"shape": list(tensor.shape[1:])}
                    for example in group:
                        items.append(_item(example) | shape)
                        advance()
                    if shape:
                        tensor = flat(tensor, self.key.size_px, codec)
                    yield [tensor, *beside(group, self.key)]

        def facts() -> dict[str, Any]:
            seen = {"block": block.name, "seen": report.seen, "refused": report.bad}
            return {**seen, "items": items, "sums": sums.plain()}

        return self._write_part(shard_name(number), lambda path: save_rows(path, self.key.tensors, tensors()), facts)

    def _write_text(self, number: int, captions: list[str]) -> None:
        assert self.text is not None
        text, facts = self.text, {"captions": hashlib.sha256(json.dumps(captions).encode()).hexdigest()}
        done = self._done(text_name(number))
        if done is not None and done["captions"] == facts["captions"]:
            return

        def save(path: Path) -> None:
            states = caption_states(text, captions)
            lengths = torch.tensor([0, *map(len, states)])
            save_file({"states": torch.cat(states), "offsets": lengths.cumsum(0)}, path)

        self._write_part(text_name(number), save, lambda: facts)

    def _write_part(self, stem: str, save: Callable[[Path], None],
                    facts: Callable[[], dict[str, Any]]) -> dict[str, Any]:  # fmt: skip
        tensors = self.folder / f"{stem}.safetensors"
        record = self.folder / f"{stem}.json"
        record.unlink(missing_ok=True)
        write_atomically(tensors, save)
        found = {"key": self.key.digest, **facts(), "file": _file_facts(tensors)}
        write_atomically(record, lambda path: _write_text_file(path, json.dumps(found, default=str)))
        return found

    def _done(self, stem: str) -> dict[str, Any] | None:
        """The JSON of a part, if the part is whole."""
        try:
            found: dict[str, Any] = json.loads((self.folder / f"{stem}.json").read_text(encoding="utf-8"))
            whole = found["key"] == self.key.digest
            whole = whole and found["file"] == _file_facts(self.folder / f"{stem}.safetensors")
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if whole else None

    def _merge(self) -> _Merged:
        """What all shards hold: the same in every process."""
        merged = _Merged()
        for number in range(len(self.reader.blocks)):
            record = self._read_part(shard_name(number), merged.files)
            _add_to(merged.report, record)
            merged.sums.merge(LatentSums(**record["sums"]))
            merged.counts.append(len(record["items"]))
            for item in record["items"]:
                merged.flat.extend(merged.captions.setdefault(c, len(merged.captions)) for c in item["captions"])
                merged.first.append(len(merged.flat))
                merged.shapes += [item["shape"]] if "shape" in item else []
        return merged

    def _read_part(self, stem: str, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The JSON of a part that is done; its files are added to `files`."""
        path = self.folder / f"{stem}.json"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path}: not seen here; all processes must share the folder `cache`") from None
        found: dict[str, Any] = json.loads(data)
        files[f"{stem}.safetensors"] = found["file"]
        files[f"{stem}.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        return found

    def _finish(self, merged: _Merged, texts: range) -> None:
        for number in texts:
            self._read_part(text_name(number), merged.files)
        index = {name: torch.tensor(values, dtype=torch.int64) for name, values in
                 (("first", merged.first), ("captions", merged.flat))}  # fmt: skip
        if merged.shapes:
            index["shapes"] = torch.tensor(merged.shapes)
        write_atomically(self.folder / INDEX, lambda path: save_file(index, path))
        merged.files[INDEX] = _file_facts(self.folder / INDEX)
        text = self.text
        manifest = {
            "format": FORMAT, "key": asdict(self.key), "count": sum(merged.counts), "shards": merged.counts,
            "refused": [{"key": key, "reason": reason} for key, reason in merged.report.bad],
            "normalisation": merged.sums.statistics() if self.codec else None,
            "text": None if text is None else {
                "max_tokens": text.max_tokens, "uses_mask": text.uses_mask, "captions": len(merged.captions)
            },
            "files": merged.files,
        }  # fmt: skip
        write_atomically(self.folder / MANIFEST, lambda path: _write_text_file(path, json.dumps(manifest, indent=1)))


def _add_to(report: Report, record: dict[str, Any]) -> None:
    report.seen += record["seen"]
    report.kept += len(record["items"])
    report.bad += [(key, reason) for key, reason in record["refused"]]


def _file_facts(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _write_text_file(path: Path, content: str) -> None:
    path.write_text(content, encoding="utf-8")


@dataclass(frozen=True)
class _Costs:
    """Of one picture, on average: bytes on disk, bytes of the caption table in memory, seconds of one process."""

    tensor: float
    states: float
    index: float
    record: float
    memory: float
    seconds: float

    @property
    def disk(self) -> float:
        return self.tensor + self.states + self.index + self.record


def plan(reader: Reader, codec: Codec | None, text: TextEncoder | None, scale: int | None = None) -> str:
    """What `encode` will take for this set with the processes of this launch, and for a billion such pictures, in
    lines; measured on up to PLAN_PICTURES pictures from all over the set. Writes nothing.

    Raises UserError where none of them can be read.
    """
    processes, device = process_state().num_processes, process_state().device.type
    blocks = reader.blocks[:: -(-len(reader.blocks) // PLAN_BLOCKS)]
    found = [block.rows() for block in blocks]
    scanned = [row for rows in found for row in rows]
    each = PLAN_PICTURES // len(blocks)
    sample = [row for rows in found for row in rows[:: -(-len(rows) // each) or 1]]
    costs = _measure(reader, scanned, sample, codec, text)
    small = 3 * (reader.config.size_px // scale) ** 2 if scale else 0
    opaque = reader.config.size_px**2 if reader.config.transparency == "mask" else 0
    costs = replace(costs, tensor=costs.tensor + small + opaque)
    total = reader.total or round(len(scanned) / len(blocks) * len(reader.blocks))
    about = "" if reader.total is not None else "about "
    hours = 1e9 * costs.seconds / 3600
    unit = "GPU-hours" if device != "cpu" else f"hours of one process with {torch.get_num_threads()} threads"
    return "\n".join([
        f"{about}{total} pictures in {len(reader.blocks)} shards; measured on {min(len(scanned), PLAN_PICTURES)}",
        f"a picture takes {costs.disk:.0f} bytes: tensor {costs.tensor:.0f}, text states {costs.states:.0f}, "
        f"index {costs.index:.0f}, JSON {costs.record:.0f}",
        f"speed: {1 / costs.seconds:.1f} pictures/s with their captions in one process on this {device}",
        f"this set, {processes} process{'es' if processes > 1 else ''}: {total * costs.seconds / processes / 60:.1f} "
        f"minutes, {total * costs.disk / 1e9:.2f} GB, caption table {total * costs.memory / 1e9:.2f} GB of memory in "
        "each process",
        f"a billion such pictures: {hours:.0f} {unit}, {costs.disk / 1e3:.2f} TB, caption table "
        f"{costs.memory:.0f} GB of memory in each process",
    ])  # fmt: skip


def _measure(reader: Reader, scanned: list[Row], sample: list[Row], codec: Codec | None,
             text: TextEncoder | None) -> _Costs:  # fmt: skip
    """Costs by the encoding of `sample`; how many captions are distinct is counted on all of `scanned`."""
    report = Report()

    def readable() -> Iterator[Example]:
        for row in sample:
            report.seen += 1
            try:
                yield reader.read(row)
            except BadImage as error:
                report.bad.append((row.key, str(error)))

    module = codec.module if codec else None
    list(picture_tensors(islice(readable(), 1), module))  # the first call of a network sets it up
    began = time.monotonic()
    done = list(picture_tensors(readable(), module))
    pictures = [example for group, _ in done for example in group]
    if not pictures:
        raise UserError(f"{reader.config.path}: none of {len(sample)} pictures could be read, such as "
                        f"{shown(sample[0].key)}: {report.bad[0][1]}")  # fmt: skip
    seconds = (time.monotonic() - began) / len(pictures)
    distinct = {caption for row in scanned for caption in row.captions}
    share, uses = len(distinct) / len(scanned), sum(max(len(row.captions), 1) for row in scanned) / len(scanned)
    states = 0.0
    if text is not None:
        some = list(dict.fromkeys(caption for example in pictures for caption in example.captions)) or [""]
        caption_states(text, some[:1])
        began = time.monotonic()
        encoded = caption_states(text, some)
        seconds += (time.monotonic() - began) / len(some) * share
        states = share * (sum(s.numel() * s.element_size() for s in encoded) / len(some) + 8)
    record = sum(len(json.dumps(_item(example))) + 2 for example in pictures) / len(pictures)
    memory = share * ENTRY_BYTES + sum(map(sys.getsizeof, distinct)) / len(scanned) + 8 * (uses + 1)
    tensor = done[0][1][0]
    return _Costs(tensor.numel() * tensor.element_size(), states, 8 * (uses + 1), record, memory, seconds)


def _item(example: Example) -> dict[str, Any]:
    """A kept sample as a shard's JSON has it."""
    return {"key": example.key, "captions": list(example.captions or ("",)), "fields": example.fields}
