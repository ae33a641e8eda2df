"""Tars and tables: what is found in them, what is refused, and that splits and held-out parts never overlap."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ldm.config import UserError
from training.check import check
from training.data import BadImage, DataConfig, Reader

ROOT = Path(__file__).parent.parent


def pixels_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def samples(numbers: range) -> list[tuple[str, bytes]]:
    """Pictures with a JSON of caption, split (every third is val) and number."""
    found = []
    for i in numbers:
        entry = {"caption": f"picture {i}", "split": "train" if i % 3 else "val", "number": i}
        found += [(f"{i:04}.png", png(i)), (f"{i:04}.json", json.dumps(entry).encode())]
    return found


def table(numbers: range, **columns: Any) -> pa.Table:
    return pa.table({
        "image": [{"bytes": png(i), "path": f"{i}.png"} for i in numbers],
        "caption": [f"picture {i}" for i in numbers],
        "split": ["train" if i % 3 else "val" for i in numbers],
        "number": list(numbers),
        **columns,
    })  # fmt: skip


def make_folder(root: Path) -> None:
    root.mkdir()
    lines = []
    for i in range(40):
        (root / f"{i:04}.png").write_bytes(png(i))
        split = "train" if i % 3 else "val"
        lines.append(json.dumps({"file_name": f"{i:04}.png", "caption": f"picture {i}", "split": split, "number": i}))
    (root / "metadata.jsonl").write_text("\n".join(lines))


def make_tars(root: Path) -> None:
    for number, numbers in enumerate((range(15), range(15, 17), range(17, 40))):
        write_tar(root / f"{number:06}.tar", samples(numbers))


def make_parquet(root: Path) -> None:
    root.mkdir()
    pq.write_table(table(range(25)), root / "a.parquet", row_group_size=4)
    pq.write_table(table(range(25, 40)), root / "b.parquet", row_group_size=100)


def make_saved(root: Path) -> None:
    import datasets

    columns = table(range(40)).to_pydict()
    made = datasets.Dataset.from_dict(columns)
    made.cast_column("image", datasets.Image()).save_to_disk(str(root), num_shards=2)


MADE: dict[str, Callable[[Path], None]] = {
    "folder": make_folder, "tars": make_tars, "parquet": make_parquet, "saved": make_saved
}  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same forty samples in every kind of source. Not to be changed."""
    root = tmp_path_factory.mktemp("sets")
    for name, make in MADE.items():
        make(root / name)
    return root


def config_of(path: Path, **options: Any) -> DataConfig:
    return DataConfig(path=str(path), **{"size_px": 16, **options})


def numbers_of(reader: Reader) -> list[int]:
    return [example.fields["number"] for example in reader]


# ---- every kind of source


@pytest.mark.parametrize("kind", MADE)
class TestEverySource:
    def test_examples(self, sets: Path, kind: str) -> None:
        reader = Reader(config_of(sets / kind), shard_items=10)
        for number, example in enumerate(reader):
            assert example.captions == (f"picture {number}",)
            assert example.fields == {"split": "train" if number % 3 else "val", "number": number}
            assert (example.pixels == pixels_of(number)).all()
        assert (reader.report.seen, reader.report.kept, reader.report.bad) == (40, 40, [])
        assert len(reader) == len(reader.rows) == len({row.key for row in reader.rows}) == 40
        assert len(reader.blocks) > 1
        assert reader.total == (None if kind == "tars" else 40)

    def test_blocks_by_themselves(self, sets: Path, kind: str) -> None:
        reader = Reader(config_of(sets / kind), shard_items=10)
        expected = numbers_of(reader)
        parts = [[e.fields["number"] for e in reader.examples(b, reader.report)] for b in reversed(reader.blocks)]
        assert [number for part in reversed(parts) for number in part] == expected
        for block, part in zip(reversed(reader.blocks), parts, strict=True):
            assert len(block.rows()) == len(part)
            assert block.count in (None, len(part))

    def test_single_reads_in_any_order(self, sets: Path, kind: str) -> None:
        reader = Reader(config_of(sets / kind), shard_items=10)
        for place in np.random.default_rng(0).permutation(40):
            row = reader.rows[place]
            assert (reader.read(row).pixels == pixels_of(row.fields["number"])).all()
        with pytest.raises(BadImage, match="for a reason"):
            reader.read(replace(reader.rows[0], fault="for a reason"))

    def test_split(self, sets: Path, kind: str) -> None:
        val = Reader(config_of(sets / kind, split="val"))
        train = Reader(config_of(sets / kind, split="train"))
        assert numbers_of(val) == list(range(0, 40, 3))
        assert sorted(numbers_of(val) + numbers_of(train)) == list(range(40))
        with pytest.raises(UserError, match="'nowhere'"):
            numbers_of(Reader(config_of(sets / kind, split="nowhere")))

    @pytest.mark.parametrize("split", [None, "train"])
    def test_hold_out(self, sets: Path, kind: str, split: str | None) -> None:
        whole = Reader(config_of(sets / kind, split=split), shard_items=10)
        kept, held = whole.hold_out(4)
        assert sorted(numbers_of(kept) + numbers_of(held)) == numbers_of(whole)
        share = len(numbers_of(held)) / len(numbers_of(whole))
        assert 0.2 <= share <= 0.3
        assert len({whole.fingerprint, kept.fingerprint, held.fingerprint}) == 3
        again, _ = Reader(config_of(sets / kind, split=split), shard_items=10).hold_out(4)
        assert again.fingerprint == kept.fingerprint
        if kind == "folder":
            assert numbers_of(held) == numbers_of(whole)[::4]

    def test_limit(self, sets: Path, kind: str) -> None:
        for limit in (1, 10, 16, 33, 99):
            reader = Reader(config_of(sets / kind, limit=limit), shard_items=10)
            assert numbers_of(reader) == list(range(min(limit, 40)))
            assert reader.total in (None, min(limit, 40))

    def test_workers(self, sets: Path, kind: str) -> None:
        made = [
            [(e.key, e.captions, e.fields, e.pixels.tobytes()) for e in Reader(config_of(sets / kind, workers=count))]
            for count in (0, 1, 3)
        ]
        assert made[0] == made[1] == made[2]

    def test_fingerprint(self, sets: Path, kind: str) -> None:
        first = Reader(config_of(sets / kind)).fingerprint
        assert Reader(config_of(sets / kind)).fingerprint == first
        assert Reader(config_of(sets / kind, limit=7)).fingerprint != first
        assert Reader(config_of(sets / kind, split="train")).fingerprint != first

    def test_check(self, sets: Path, kind: str) -> None:
        report = check(sets / kind, size_px=17)
        assert (report.seen, report.kept, len(report.bad)) == (40, 0, 40)
        assert check(sets / kind).kept == 40

    def test_all_too_small_stops_early(self, sets: Path, kind: str) -> None:
        reader = Reader(config_of(sets / kind, size_px=17), shard_items=10)
        with pytest.raises(UserError, match=r"smaller than target"):
            list(reader)
        assert reader.report.seen < 40


def test_held_out_parts_of_tiny_tars(tmp_path: Path) -> None:
    for number in range(40):
        write_tar(tmp_path / f"{number:02}.tar", samples(range(number, number + 1)))
    kept, held = Reader(config_of(tmp_path)).hold_out(20)
    assert len(numbers_of(held)) == 2
    assert sorted(numbers_of(kept) + numbers_of(held)) == list(range(40))


def test_one_sample_cannot_be_held_out(tmp_path: Path) -> None:
    tmp_path.joinpath("a.png").write_bytes(png(0))
    with pytest.raises(UserError, match="one sample is too few"):
        Reader(config_of(tmp_path)).hold_out(20)


# ---- tars


def test_grouping_and_captions(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [
        ("x/1.jpg", png(1)), ("x/1.txt", b"one\nuno\n"), ("x/1.json", b'{"caption": "unused", "style": "flat"}'),
        ("y/1.PNG", png(2)), ("y/1.json", b'{"captions": ["two", "dos"]}'), ("y/1.seg.png", png(9)),
        ("3.png", png(3)), ("README.md", b"hello"), (".hidden.png", png(9)), ("a.b/4.png", png(4)),
        ("3.text", b"three"), ("5.cls", b"5"), ("5.txt", b"five"), ("5.png", png(5)), ("é🐈.webp", png(6)),
    ])  # fmt: skip
    reader = Reader(config_of(tmp_path))
    found = {e.key: (e.captions, e.fields) for e in reader}
    assert found == {
        "a.tar/x/1": (("one", "uno"), {"style": "flat"}),
        "a.tar/y/1": (("two", "dos"), {}),
        "a.tar/3": (("",), {}),
        "a.tar/a.b/4": (("",), {}),
        "a.tar/5": (("five",), {}),
        "a.tar/é🐈": (("",), {}),
    }
    assert reader.report.notes == {"no caption (empty)": 3, "members of a tar without a picture, ignored": 1}
    assert [e.captions for e in Reader(config_of(tmp_path, missing_caption="filename"))][2] == ("3",)
    assert len(list(Reader(config_of(tmp_path, missing_caption="skip")))) == 3


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names(tmp_path: Path, kind: int) -> None:
    stem = "d" * 90 + "/" + "n" * 80
    write_tar(tmp_path / "a.tar", [(f"{stem}.png", png(1)), (f"{stem}.txt", b"long")], kind)
    (example,) = Reader(config_of(tmp_path))
    assert (example.key, example.captions) == (f"a.tar/{stem}", ("long",))
    assert (example.pixels == pixels_of(1)).all()


def test_bad_samples_in_a_tar(tmp_path: Path) -> None:
    good = [member for i in range(4) for member in ((f"g{i}.png", png(i)), (f"g{i}.txt", b"good"))]
    write_tar(tmp_path / "a.tar", [
        *good, ("a.png", b""), ("b.png", png(1)[:-9]), ("c.png", png(1)), ("c.txt", b"\xff\xfe"), ("d.jxl", b"x"),
        ("e.png", png(1)), ("e.jpg", png(1)), ("f.png", png(1)), ("f.json", b"{"), ("h.png", png(1)),
        ("h.json", b'{"caption": 7}'), ("i.png", png(1)), ("i.txt", b"x" * 70_000), ("j.png", png(1)),
        ("j.png", png(1)), ("k.png", png(1)), ("k.json", b'{"x": NaN}'), ("l.png", png(1)),
        ("l.json", b" " * 2_000_000),
    ])  # fmt: skip
    reader = Reader(config_of(tmp_path, max_bad=0.9))
    assert [example.key for example in reader] == [f"a.tar/g{i}" for i in range(4)]
    assert dict(reader.report.bad) == {
        "a.tar/a": "empty",
        "a.tar/b": "truncated",
        "a.tar/c": "'c.txt' is UTF-16, not UTF-8",
        "a.tar/d": ".jxl is not an accepted format; convert it to PNG or JPEG",
        "a.tar/e": "several members of the same name and kind",
        "a.tar/f": "not JSON (Expecting property name enclosed in double quotes, column 2)",
        "a.tar/h": "`caption` holds int, not text",
        "a.tar/i": "'i.txt': over 65536 bytes",
        "a.tar/j": "several members of the same name and kind",
        "a.tar/k": "NaN is not JSON",
        "a.tar/l": "'l.json': over 1048576 bytes",
    }


def test_links_in_tars_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(9))
    root = tmp_path / "set"
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as tar:
        for name, kind, target in (
            ("a.png", tarfile.SYMTYPE, str(tmp_path / "secret.png")), ("b.png", tarfile.LNKTYPE, "good.png"),
            ("c.png", tarfile.CHRTYPE, ""), ("d.png", tarfile.FIFOTYPE, ""), ("folder", tarfile.DIRTYPE, ""),
        ):  # fmt: skip
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
        member = tarfile.TarInfo("good.png")
        member.size = len(png(1))
        tar.addfile(member, io.BytesIO(png(1)))
    before = sorted(tmp_path.rglob("*"))
    reader = Reader(config_of(root))
    assert [e.key for e in reader] == ["a.tar/good"]
    assert reader.report.notes == {"link or special member of a tar, ignored": 4, "no caption (empty)": 1}
    assert sorted(tmp_path.rglob("*")) == before
    (root / "b.tar").symlink_to(tmp_path / "elsewhere.tar")
    write_tar(tmp_path / "elsewhere.tar", samples(range(2)))
    os.mkfifo(root / "c.tar")
    reader = Reader(config_of(root, max_bad=0.9))
    assert len(list(reader)) == 1
    assert reader.report.bad == [("b.tar", "a link that leads outside the folder"), ("c.tar", "not a regular file")]


@pytest.mark.parametrize("name", ["../../up.png", "/abs.png", "in/../../up.txt"])
def test_a_tar_whose_names_lead_outside_is_refused(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for each in ("good.png", name, "more.png"):
            member = tarfile.TarInfo(each)
            member.size = len(png(1))
            tar.addfile(member, io.BytesIO(png(1)))
    write_tar(tmp_path / "b.tar", samples(range(2)))
    reader = Reader(config_of(tmp_path, max_bad=0.9))
    assert [e.key for e in reader] == ["b.tar/0000", "b.tar/0001"]
    assert reader.report.bad == [("a.tar", f"refused: the name of a member leads outside ({name!a})")]


def test_truncated_tar_wherever_it_is_cut(tmp_path: Path) -> None:
    write_tar(tmp_path / "whole.tar", samples(range(6)))
    data = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "whole.tar").unlink()
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        end = tar.getmembers()[-1].offset_data + 512
    for cut in (0, 100, 512, 513, *range(1000, end, 700), end, end + 512):
        (tmp_path / "a.tar").write_bytes(data[:cut])
        reader = Reader(config_of(tmp_path, max_bad=1.0))
        report = reader.report
        numbers = []
        with contextlib.suppress(UserError):  # where none is left
            numbers += [e.fields["number"] for e in reader if e.fields]
        assert numbers == list(range(len(numbers)))
        assert len(numbers) >= cut // 3072 - 1
        assert report.bad[-1][0] == "a.tar", cut
        assert report.bad[-1][1].startswith(("truncated", "no tar, or damaged")), (cut, report.bad)
    (tmp_path / "a.tar").write_bytes(data[: end + 1024])
    assert numbers_of(Reader(config_of(tmp_path))) == list(range(6))


def test_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(range(6)))
    data = bytearray((tmp_path / "a.tar").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        data[tar.getmembers()[6].offset + 3] ^= 1
    (tmp_path / "a.tar").write_bytes(data)
    reader = Reader(config_of(tmp_path, max_bad=1.0))
    assert numbers_of(reader) == [0, 1, 2]
    assert reader.report.bad == [("a.tar", "damaged: a header cannot be read, after 3 samples")]
    write_tar(tmp_path / "b.tar", samples(range(6, 80)))
    with pytest.raises(UserError, match=r"1 of the first 78 samples are bad; more than data\.max_bad = 0\.1 allows"):
        list(Reader(config_of(tmp_path, max_bad=0.1)))  # half of the tars is damaged
    write_tar(tmp_path / "joined.tar", samples(range(5)))
    both = (tmp_path / "joined.tar").read_bytes() + bytes(2**20) + data
    (tmp_path / "a.tar").write_bytes(both)
    assert check(tmp_path).bad == [("a.tar", "more follows its end (tars joined into one?), after 5 samples")]


def test_hostile_tars(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    write_tar(tmp_path / "a.tar", samples(range(3)))
    good = (tmp_path / "a.tar").read_bytes()
    loop = tarfile.TarInfo("x.png").tobuf()
    size = b"\xff" * 4 + (2**64 - 512).to_bytes(8, "big")  # minus 512 in base 256: the same header again
    loop = loop[:124] + size + loop[136:]
    loop = loop[:148] + b"%06o\0 " % (sum(loop[:148]) + 256 + sum(loop[156:512])) + loop[156:]
    pax = tarfile.TarInfo("p")
    pax.type, pax.size = tarfile.XHDTYPE, 2**33
    names = tarfile.TarInfo("n")
    names.type, names.size = tarfile.GNUTYPE_LONGNAME, 1
    chain = (names.tobuf(tarfile.GNU_FORMAT) + b"a".ljust(512, b"\0")) * 5000
    cases = [loop + good, pax.tobuf(tarfile.GNU_FORMAT) + good, chain + good, b"\x1f\x8b" + good, png(0), bytes(1024)]
    for _ in range(150):
        mutated = bytearray(good)
        for place in rng.integers(0, 4096, 3):
            mutated[place] = rng.integers(256)
        cases.append(bytes(mutated))
    for data in cases:
        (tmp_path / "a.tar").write_bytes(data)
        reader, kept = Reader(config_of(tmp_path, max_bad=1.0)), []
        with contextlib.suppress(UserError):  # where none is left
            kept += list(reader)
        assert len(kept) <= 3
        assert reader.report.kept + len(reader.report.bad) == reader.report.seen


def test_a_tar_that_changes_after_its_scan(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(range(4)))
    reader = Reader(config_of(tmp_path))
    rows = reader.rows
    write_tar(tmp_path / "a.tar", samples(range(10, 11)) + samples(range(4)))
    for row in rows:  # whose places now hold other pictures of the same size
        with pytest.raises(BadImage, match="the tar has changed since it was scanned"):
            reader.read(row)
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(BadImage, match="the tar has changed"):
        reader.read(rows[-1])


@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("count", [0, 2])
def test_unreadable_share(tmp_path: Path, share: float, count: int) -> None:
    members = [(f"{i:03}.png", b"gone" if i % round(1 / share) == 0 else png(i % 7)) for i in range(200)]
    write_tar(tmp_path / "a.tar", members[:100])
    write_tar(tmp_path / "b.tar", members[100:])
    reader = Reader(config_of(tmp_path, workers=count, max_bad=0.02))
    if share < 0.02:
        assert len(list(reader)) == 198
        assert len(reader.report.bad) == 2
        return
    with pytest.raises(UserError, match="not an image") as caught:
        list(reader)
    assert ("none is good" in str(caught.value)) == (share == 1.0)
    if share == 1.0:
        assert reader.report.seen == 100  # the first tar is enough


# ---- tables


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture_path": ["a.png"], "caption": ["a"]}, r"picture_path \(string\), caption .*; none is of pictures"),
        ({"image": [1], "caption": ["a"]}, r"columns image \(int64\), .*none is of pictures"),
        ({"a": [b"x"], "b": [b"x"], "caption": ["a"]}, "none is of pictures"),
        ({"image": [b"x"], "capton": ["a"]}, r"did you mean it by 'capton'\?"),
    ],
)
def test_wrong_columns(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        Reader(config_of(tmp_path))


def test_other_columns(tmp_path: Path) -> None:
    made = pa.table({
        "jpg": pa.array([png(0), png(1), None, b"no", png(4)], pa.large_binary()),
        "captions": [["a", "b"], ["c"], ["d"], ["e"], [7 and "f"]],
        "score": [0.5, float("nan"), 1.0, 1.0, 1.0],
        "mask": [b"m"] * 5,
        "box": [[1, 2]] * 5,
    })  # fmt: skip
    pq.write_table(made, tmp_path / "a.parquet")
    reader = Reader(config_of(tmp_path, max_bad=0.5))
    assert [(e.captions, e.fields) for e in reader] == [
        (("a", "b"), {"score": 0.5}), (("c",), {"score": None}), (("f",), {"score": 1.0})
    ]  # fmt: skip
    bad = [("a.parquet/000000002", "no picture in this row"), ("a.parquet/000000003", "not an image (text/plain)")]
    assert reader.report.bad == bad


def test_pictures_alone_and_paths(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [png(0), png(1)]}), tmp_path / "a.parquet")
    assert [e.captions for e in Reader(config_of(tmp_path))] == [("",), ("",)]
    (tmp_path / "secret.png").write_bytes(png(0))
    row = {"bytes": None, "path": str(tmp_path / "secret.png")}
    root = tmp_path / "set"
    root.mkdir()
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    pq.write_table(pa.table({"image": pa.array([row], kind), "text": ["a"]}), root / "a.parquet")
    assert check(root).bad == [("a.parquet/000000000", "the table holds the path of its picture, not its bytes")]


def test_splits_by_file_name(tmp_path: Path) -> None:
    made = table(range(8)).drop_columns(["split"])
    pq.write_table(made.slice(0, 3), tmp_path / "train-00000-of-00002.parquet")
    pq.write_table(made.slice(3, 3), tmp_path / "train-00001-of-00002.parquet")
    pq.write_table(made.slice(6, 2), tmp_path / "test-00000-of-00001.parquet")
    assert numbers_of(Reader(config_of(tmp_path, split="train"))) == list(range(6))
    assert numbers_of(Reader(config_of(tmp_path))) == [6, 7, 0, 1, 2, 3, 4, 5]
    with pytest.raises(UserError, match=r"no split 'val'; its files are of test \(2\), train \(6\)"):
        Reader(config_of(tmp_path, split="val"))


def test_damaged_parquet(tmp_path: Path) -> None:
    for name in ("a", "b"):
        pq.write_table(table(range(40)), tmp_path / f"{name}.parquet", row_group_size=10, compression="none")
    data = bytearray((tmp_path / "b.parquet").read_bytes())
    (tmp_path / "b.parquet").write_bytes(data[:-100])
    reader = Reader(config_of(tmp_path, max_bad=0.6))
    assert len(list(reader)) == 40
    assert [key for key, _ in reader.report.bad] == ["b.parquet"]
    with pytest.raises(UserError, match=r"b\.parquet: cannot be read"):
        list(Reader(config_of(tmp_path)))
    place = data.index(png(20))
    data[place + 40 : place + 60] = bytes(20)  # in a picture: seen by its own checks
    (tmp_path / "b.parquet").write_bytes(data)
    assert [key for key, _ in check(tmp_path).bad] == ["b.parquet/000000020"]
    data[place - 300 : place + 300] = bytes(600)  # over the border of two row groups: neither can be read
    (tmp_path / "b.parquet").write_bytes(data)
    assert [key for key, _ in check(tmp_path).bad] == [f"b.parquet/{i:09}" for i in range(10, 30)]


def test_saved_with_splits(tmp_path: Path) -> None:
    import datasets

    parts = {name: datasets.Dataset.from_dict(table(part).drop_columns(["split"]).to_pydict())
             for name, part in (("train", range(7)), ("test", range(7, 9)))}  # fmt: skip
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "set"))
    reader = Reader(config_of(tmp_path / "set"))
    assert [(e.fields["number"], e.fields["split"]) for e in reader] == [
        *((i, "train") for i in range(7)), (7, "test"), (8, "test")
    ]  # fmt: skip
    assert numbers_of(Reader(config_of(tmp_path / "set", split="test"))) == [7, 8]
    with pytest.raises(UserError, match=r"has no split 'val'; it has train \(7\), test \(2\)"):
        Reader(config_of(tmp_path / "set", split="val"))
    with pytest.raises(UserError, match="no column `split`, so there are no splits"):
        Reader(config_of(tmp_path / "set/train", split="val"))
    for file in (tmp_path / "set/train").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(UserError, match="`datasets` saved it, but it cannot be read"):
        Reader(config_of(tmp_path / "set"))


# ---- what is looked at


def test_pictures_at_the_top_make_a_folder_of_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    write_tar(tmp_path / "old.tar", samples(range(3)))
    reader = Reader(config_of(tmp_path))
    assert [e.key for e in reader] == ["a.png"]
    assert reader.report.notes["ignored: .tar"] == 1


def test_what_lies_beside_tars_is_told(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", samples(range(3)))
    (tmp_path / "stats.json").write_text("{}")
    reader = Reader(config_of(tmp_path))
    assert len(list(reader)) == 3
    assert reader.report.notes == {"ignored: stats.json": 1}


def test_links_that_lead_back(tmp_path: Path) -> None:
    root = tmp_path / "set"
    (root / "a/b").mkdir(parents=True)
    (root / "a/x.png").write_bytes(png(0))
    (root / "a/b/up").symlink_to(root)
    (root / "a/b/self").symlink_to("self")
    (root / "a/b/one").symlink_to(root / "a/b/two")
    (root / "a/b/two").symlink_to(root / "a/b/one")
    (root / "a/b/y.png").symlink_to(root / "a/b/y.png")
    reader = Reader(config_of(root, max_bad=0.9))
    assert [e.key for e in reader] == ["a/x.png"]
    assert [key for key, _ in reader.report.bad] == ["a/b/y.png"]


@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_other_locales(tmp_path: Path, locale: str) -> None:
    write_tar(tmp_path / "tars/ü.tar", [("é🐈.png", png(1)), ("é🐈.txt", "späte 猫".encode())])
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/é🐈.png").write_bytes(png(1))
    (tmp_path / "pictures/é🐈.txt").write_bytes("späte 猫".encode())
    code = (
        "from training.data import *\n"
        "for name in ('tars', 'pictures'):\n"
        f"    for e in Reader(DataConfig(path={str(tmp_path)!r} + '/' + name, size_px=16, workers=1)):\n"
        "        print(ascii(e.key), ascii(e.captions))\n"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG", "PYTHONUTF8", "PYTHONIO"))}
    env |= {"LC_ALL": locale, "LANG": locale}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    caption = ascii(("späte 猫",))
    assert done.stdout.splitlines() == [f"{'ü.tar/é🐈'!a} {caption}", f"{'é🐈.png'!a} {caption}"], done.stderr
