"""The cache against its inputs read by other means; damage, interruption, refusals; the same items online; the plan."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm.config import UserError
from ldm.latents import LatentCodec
from pipelines.cascade import Cascade, load_cascade
from tests.encode_job import encode_all
from training import encode as writer
from training import encoders
from training.cache import Cache, padded, save_rows
from training.data import DataConfig, Reader
from training.encode import encode, plan
from training.encoders import LatentSums, in_order
from training.files import lock
from training.loader import BatchOrder
from training.online import Online
from training.stop import Interrupted

DATA = Path(__file__).parent / "data/emoji"
LINES = [json.loads(line) for line in (DATA / "metadata.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def cascade(tiny_folder: Path) -> Cascade:
    return load_cascade(tiny_folder)


@pytest.fixture(scope="module")
def cache(cascade: Cascade, tmp_path_factory: pytest.TempPathFactory) -> Cache:
    """All of tests/data/emoji in shards of 40. Change only copies."""
    return encode(reader_of(DATA), tmp_path_factory.mktemp("cache"), cascade.codec, cascade.text)


def reader_of(folder: Path, shard_items: int = 40, **options: object) -> Reader:
    return Reader(DataConfig(path=str(folder), size_px=64, **options), shard_items=shard_items)  # type: ignore[arg-type]


def folder_of(tmp_path: Path, count: int, broken: tuple[int, ...] = ()) -> Path:
    """Pictures 00.png, 01.png, ... of one colour each with the captions "picture 0" and "any"; some are no pictures."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(count):
        path = folder / f"{i:02d}.png"
        Image.new("RGB", (64, 64), (20 * i, 255 - 20 * i, 7)).save(path)
        path.with_suffix(".txt").write_text(f"picture {i}\nany\n")
        if i in broken:
            path.write_bytes(b"not a picture at all")
    return folder


def picture(index: int) -> np.ndarray:
    """An opaque picture of tests/data/emoji, 256 px, by area to 64 px."""
    image = Image.open(DATA / LINES[index]["file_name"])
    assert image.mode == "RGB"
    return np.array(image.reduce(4))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != ".lock"}


class TestCache:
    def test_items_are_the_data_sets(self, cache: Cache) -> None:
        assert len(cache) == len(LINES) == 102
        assert cache.manifest["shards"] == [40, 40, 22]
        assert cache.manifest["refused"] == []
        for index, line in enumerate(LINES):
            record = cache.record(index)
            assert (record["key"], record["captions"]) == (line["file_name"], line["captions"])
            assert record["fields"] == {k: v for k, v in line.items() if k not in ("file_name", "captions")}

    def test_moments_are_the_codecs(self, cache: Cache, cascade: Cascade) -> None:
        chosen = [0, 101, 40, 39]
        joined = torch.stack([torch.from_numpy(picture(i)).permute(2, 0, 1).float() / 127.5 - 1 for i in chosen])
        with torch.no_grad():
            wanted = cascade.codec.module.encode(joined)
        stored = cache.stored(chosen)
        assert stored.dtype == torch.float16
        torch.testing.assert_close(stored.float(), wanted, rtol=2e-3, atol=2e-3)

    def test_captions_are_numbered_as_they_appear_after_the_empty_one(self, cache: Cache) -> None:
        numbers: dict[str, int] = {"": 0}
        wanted = [[numbers.setdefault(c, len(numbers)) for c in line["captions"]] for line in LINES]
        assert [cache.captions(i) for i in range(len(cache))] == wanted
        assert cache.manifest["text"]["captions"] == len(numbers)

    def test_text_states_are_those_of_the_encoder(self, cache: Cache, cascade: Cascade) -> None:
        strings = ["", *LINES[0]["captions"], LINES[-1]["captions"][-1]]
        states, mask = cascade.text.encode(strings)
        found = cache.text([0, *cache.captions(0), cache.captions(101)[-1]])
        assert found.text is not None
        assert found.text_mask is not None
        assert mask is not None
        assert torch.equal(found.text_mask, mask)
        assert torch.equal(found.text, states.half().float())
        assert torch.equal(cache.null.text, found.text[:1])  # type: ignore[arg-type]

    def test_statistics_are_those_of_posterior_draws(self, cache: Cache) -> None:
        mean, log_variance = cache.stored(range(102)).double().chunk(2, dim=1)
        found = torch.tensor(cache.normalisation.mean), torch.tensor(cache.normalisation.std)
        wanted = (mean.var((0, 2, 3)) + log_variance.exp().mean((0, 2, 3))).sqrt()
        # the noise of the draws is averaged over 102 pictures of 64 cells
        torch.testing.assert_close(found[1].double(), wanted, rtol=0.03, atol=0)
        torch.testing.assert_close(found[0].double(), mean.mean((0, 2, 3)), rtol=0, atol=0.05)

    def test_pixels_without_a_codec(self, tmp_path: Path) -> None:
        cache = encode(reader_of(DATA), tmp_path)
        assert cache.stored([50]).dtype == torch.uint8
        assert np.array_equal(cache.stored([50])[0].numpy(), picture(50))
        assert cache.text([0]).text is None
        assert BatchOrder(cache, 0, 0, 4, 4)[0].stored().shape == (4, 64, 64, 3)

    def test_an_item_outside_is_refused(self, cache: Cache) -> None:
        for index in (-1, 102):
            with pytest.raises(IndexError):
                cache.stored([index])

    def test_is_written_once_and_keyed_by_its_inputs(self, cascade: Cascade, tmp_path: Path) -> None:
        folder = folder_of(tmp_path, 3)
        first = encode(reader_of(folder), tmp_path / "cache")
        stamp = (first.folder / "manifest.json").stat().st_mtime_ns
        assert encode(reader_of(folder), tmp_path / "cache").folder == first.folder
        assert (first.folder / "manifest.json").stat().st_mtime_ns == stamp
        others = [
            encode(reader_of(folder), tmp_path / "cache", cascade.codec),
            encode(reader_of(folder), tmp_path / "cache", None, cascade.text),
            encode(reader_of(folder, limit=2), tmp_path / "cache"),
            encode(reader_of(folder, background=(0, 0, 0)), tmp_path / "cache"),
        ]
        assert len({cache.folder for cache in (first, *others)}) == 5

    def test_holds_no_held_out_picture(self, tmp_path: Path) -> None:
        seen, held_out = (encode(reader_of(DATA, split=split), tmp_path) for split in ("train", "combos"))
        keys = [{cache.record(i)["key"] for i in range(len(cache))} for cache in (seen, held_out)]
        assert keys[0] == {line["file_name"] for line in LINES if line["split"] == "train"}
        assert keys[1] == {line["file_name"] for line in LINES if line["split"] == "combos"}
        pictures = {picture.numpy().tobytes() for picture in seen.stored(range(len(seen)))}
        assert not any(picture.numpy().tobytes() in pictures for picture in held_out.stored(range(len(held_out))))

    def test_opening_does_not_read_the_tensors(self, tmp_path: Path) -> None:
        """A shard of 3 GB, which a sparse file holds in no space: opening and one item take a few pages of it."""
        cache = encode(reader_of(folder_of(tmp_path, 2)), tmp_path / "cache")
        count, shard = 250_000, cache.folder / "shard-00000.safetensors"
        size = count * 64 * 64 * 3
        header = json.dumps({"pixels": {"dtype": "U8", "shape": [count, 64, 64, 3], "data_offsets": [0, size]}})
        with shard.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header.encode())
            file.truncate(8 + len(header) + size)
        index = {"first": torch.arange(count + 1), "captions": torch.zeros(count, dtype=torch.int64)}
        save_file(index, cache.folder / "index.safetensors")
        manifest = cache.manifest | {"count": count, "shards": [count]}
        for name in ("shard-00000.safetensors", "index.safetensors"):
            manifest["files"][name]["bytes"] = (cache.folder / name).stat().st_size
        (cache.folder / "manifest.json").write_text(json.dumps(manifest))
        before = resident_bytes()
        large = Cache(cache.folder)
        assert large.stored([count - 1, 7]).shape == (2, 64, 64, 3)
        assert large.captions(count - 1) == [0]
        assert resident_bytes() - before < 50e6


def resident_bytes() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


class TestDamage:
    @pytest.mark.parametrize("name", ["shard-00001.safetensors", "shard-00000.json", "text-00000.safetensors"])
    def test_a_changed_size_is_refused(self, cache: Cache, tmp_path: Path, name: str) -> None:
        copy = shutil.copytree(cache.folder, tmp_path / "copy")
        (copy / name).write_bytes((copy / name).read_bytes()[:-1])
        with pytest.raises(UserError, match=rf"{name} is damaged.*delete it and encode again"):
            Cache(copy)

    def test_a_missing_file_is_refused(self, cache: Cache, tmp_path: Path) -> None:
        copy = shutil.copytree(cache.folder, tmp_path / "copy")
        (copy / "shard-00002.json").unlink()
        with pytest.raises(UserError, match="not a whole cache"):
            Cache(copy)

    @pytest.mark.parametrize("manifest", ['{"format": 1}', "{", "[]", '{"format": 2}'])
    def test_another_format_is_refused(self, tmp_path: Path, manifest: str) -> None:
        (tmp_path / "manifest.json").write_text(manifest)
        with pytest.raises(UserError, match="delete it and encode again"):
            Cache(tmp_path)

    def test_unfinished_parts_are_written_again_and_whole_ones_kept(self, cascade: Cascade, tmp_path: Path) -> None:
        folder = encode_all(cascade, tmp_path).folder
        straight = contents(folder)
        stamps = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
        (folder / "manifest.json").unlink()
        (folder / "shard-00000.json").unlink()
        (folder / "shard-00001.json").write_text('{"key"')
        data = bytearray((folder / "shard-00002.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "shard-00002.safetensors").write_bytes(data)
        (folder / "text-00003.safetensors").unlink()
        (folder / "shard-00004.safetensors.tmp-0123abcd").write_bytes(b"half")
        encode_all(cascade, tmp_path)
        assert contents(folder) == straight
        again = {n for n, stamp in stamps.items() if (folder / n).stat().st_mtime_ns != stamp and n != ".lock"}
        parts = {f"{p}.{s}" for p in ("shard-00000", "shard-00001", "shard-00002", "text-00003")
                 for s in ("json", "safetensors")}  # fmt: skip
        assert again == {"manifest.json", "index.safetensors"} | parts

    @pytest.mark.parametrize("function", ["codec_moments", "write_atomically"])
    @pytest.mark.parametrize("at", [2, 5])
    def test_an_interruption_leaves_nothing_half_written(
        self, cascade: Cascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, at: int
    ) -> None:
        module = encoders if function == "codec_moments" else writer
        real, calls = getattr(module, function), 0

        def interrupted(*args: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                raise Interrupted
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, function, interrupted)
            with pytest.raises(Interrupted):
                encode_all(cascade, tmp_path / "cache")
        (folder,) = (tmp_path / "cache").iterdir()
        names = set(contents(folder))
        assert "manifest.json" not in names
        assert not [name for name in names if ".tmp-" in name]
        with lock(folder / ".lock"):
            pass
        encode_all(cascade, tmp_path / "cache")
        encode_all(cascade, tmp_path / "straight")
        assert contents(folder) == contents(tmp_path / "straight" / folder.name)

    def test_a_place_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("a file in the way")
        with pytest.raises(UserError, match=r"cannot be written.*name another place"):
            encode(reader_of(DATA), tmp_path / "cache")


class TestRefused:
    @pytest.mark.parametrize("shard_items", [1, 4, 40])
    def test_bad_pictures_are_left_out_and_listed(self, cascade: Cascade, tmp_path: Path, shard_items: int) -> None:
        reader = reader_of(folder_of(tmp_path, 10, broken=(3, 4)), shard_items, max_bad=0.2)
        cache = encode(reader, tmp_path / "cache", cascade.codec, cascade.text)
        assert [cache.record(i)["key"] for i in range(len(cache))] == [f"{i:02d}.png" for i in (0, 1, 2, 5, 6, 7, 8, 9)]
        assert [entry["key"] for entry in cache.manifest["refused"]] == ["03.png", "04.png"]
        assert all("not an image" in entry["reason"] for entry in cache.manifest["refused"])
        assert cache.stored([2, 3]).shape == (2, 8, 8, 8)
        assert cache.captions(3) == [cache.captions(0)[0] + 4, cache.captions(0)[1]]

    def test_too_many_over_all_shards_stop_it(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"03\.png"):
            encode(reader_of(folder_of(tmp_path, 10, broken=(3, 9)), 4, max_bad=0.1), tmp_path / "cache")
        assert not list((tmp_path / "cache").glob("*/manifest.json"))

    def test_non_finite_latents_name_the_picture(
        self, cascade: Cascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = encoders.codec_moments

        def moments(codec: LatentCodec, pixels: torch.Tensor) -> torch.Tensor:
            return real(codec, pixels).masked_fill((pixels == 255).all(3).all(2).all(1)[:, None, None, None], np.nan)

        monkeypatch.setattr(encoders, "codec_moments", moments)
        folder = folder_of(tmp_path, 5)
        Image.new("RGB", (64, 64), "white").save(folder / "03.png")
        with pytest.raises(UserError, match=r"03\.png: the codec gives non-finite"):
            encode(reader_of(folder), tmp_path / "cache", cascade.codec)

    def test_non_finite_states_name_the_caption(
        self, cascade: Cascade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = cascade.text.states
        unlucky = cascade.text.tokens(["picture 3"])[0]

        def states(tokens: list[list[int]]) -> torch.Tensor:
            found = real(tokens)
            for row, ids in enumerate(tokens):
                if ids == unlucky:
                    found[row, 0, 0] = float("inf")
            return found

        monkeypatch.setattr(cascade.text, "states", states)
        with pytest.raises(UserError, match="non-finite states for 'picture 3'"):
            encode(reader_of(folder_of(tmp_path, 5)), tmp_path / "cache", None, cascade.text)


class TestOnline:
    def test_gives_what_the_cache_gives(self, cache: Cache, cascade: Cascade) -> None:
        online = Online(reader_of(DATA), cascade.codec, cascade.text)
        assert len(online) == len(cache)
        assert online.key == cache.key
        assert online.manifest["key"] == cache.manifest["key"]
        assert online.normalisation == cache.normalisation
        chosen = [101, 3, 3, 77]
        assert torch.equal(online.stored(chosen), cache.stored(chosen))
        assert [online.record(i) for i in chosen] == [cache.record(i) for i in chosen]
        captions = [c for i in chosen for c in cache.captions(i)]
        assert [c for i in chosen for c in online.captions(i)] == captions
        ours, theirs = online.text(captions), cache.text(captions)
        assert torch.equal(ours.text, theirs.text)  # type: ignore[arg-type]
        assert torch.equal(ours.text_mask, theirs.text_mask)  # type: ignore[arg-type]
        assert torch.equal(online.null.text, cache.null.text)  # type: ignore[arg-type]

    def test_pixels_without_a_codec(self, tmp_path: Path) -> None:
        online, cache = Online(reader_of(DATA)), encode(reader_of(DATA), tmp_path)
        assert torch.equal(online.stored([5, 60]), cache.stored([5, 60]))
        assert torch.equal(BatchOrder(online, 1, 0, 8, 8)[0].stored(), BatchOrder(cache, 1, 0, 8, 8)[0].stored())
        assert online.text([0]).text is None

    def test_statistics_leave_out_what_the_cache_leaves_out(self, cascade: Cascade, tmp_path: Path) -> None:
        reader = reader_of(folder_of(tmp_path, 10, broken=(3,)), 4, max_bad=0.1)
        cache = encode(reader, tmp_path / "cache", cascade.codec)
        assert Online(reader, cascade.codec).normalisation == cache.normalisation

    def test_of_a_large_set_some_are_measured(
        self, cache: Cache, cascade: Cascade, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("training.online.STATISTICS_ITEMS", 50)
        found = Online(reader_of(DATA), cascade.codec).normalisation
        assert found != cache.normalisation
        assert found.std == pytest.approx(cache.normalisation.std, rel=0.3)

    def test_the_next_picture_stands_in_for_one_that_is_gone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = folder_of(tmp_path, 10, broken=(9,))
        online = Online(reader_of(folder, max_bad=0.2))
        (folder / "04.png").unlink()
        for _ in range(2):
            assert online.record(4) == online.record(5)
            assert online.captions(9) == online.captions(0)
            assert online.stored([4])[0, 0, 0].tolist() == [100, 155, 7]
        printed = capsys.readouterr().out
        assert printed.count("04.png: ") == printed.count("09.png: ") == 1
        (folder / "06.png").unlink()
        with pytest.raises(UserError, match=r"06\.png"):
            online.stored([6])


def test_plan_says_what_encoding_then_takes(cascade: Cascade, tmp_path: Path) -> None:
    reader = reader_of(DATA, 16)
    text = plan(reader, cascade.codec, cascade.text)
    cache = encode(reader, tmp_path, cascade.codec, cascade.text)
    sizes = {p.name: p.stat().st_size for p in cache.folder.iterdir()}
    found = {name: float(number) for name, number in re.findall(r"(bytes|tensor|states|index|JSON):? (\d+)", text)}
    assert found["tensor"] == 2 * cache.stored([0]).numel()
    for name, pattern in (("states", "text-.*safetensors"), ("index", "index.*"), ("JSON", "shard-.*json")):
        wanted = sum(size for file, size in sizes.items() if re.fullmatch(pattern, file)) / len(cache)
        assert found[name] == pytest.approx(wanted, rel=0.2), name
    assert "102 pictures in 7 shards; measured on 64" in text
    assert "a billion such pictures" in text


def test_plan_of_unreadable_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of 3 pictures could be read"):
        plan(reader_of(folder_of(tmp_path, 3, broken=(0, 1, 2))), None, None)


def test_sums_do_not_depend_on_grouping() -> None:
    moments = torch.randn(10, 6, 4, 4, generator=torch.Generator().manual_seed(0)).half()
    whole, parts = LatentSums(), LatentSums()
    whole.add(moments, 3, 0)
    for start in (0, 4):
        parts.add(moments[start : start + 4 if start == 0 else None], 3, start)
    assert parts.statistics()["mean"] == pytest.approx(whole.statistics()["mean"], rel=1e-9)
    assert parts.statistics()["std"] == pytest.approx(whole.statistics()["std"], rel=1e-9)
    assert LatentSums(**json.loads(json.dumps(whole.plain()))).statistics() == whole.statistics()


def test_rows_in_parts_make_one_safetensors_file(tmp_path: Path) -> None:
    whole = torch.randn(7, 4, 3).half()
    bytes_ = (whole * 20).to(torch.uint8).flatten(1)
    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    save_rows(tmp_path / "rows", ["x"], ([whole[part]] for part in parts))
    assert torch.equal(load_file(tmp_path / "rows")["x"], whole)
    save_rows(tmp_path / "two", ["x", "y"], ([whole[part], bytes_[part]] for part in parts))
    found = load_file(tmp_path / "two")
    assert torch.equal(found["x"], whole)
    assert torch.equal(found["y"], bytes_)
    save_rows(tmp_path / "none", ["x"], iter([]))
    with safe_open(tmp_path / "none", "pt") as file:
        assert len(file.get_tensor("x")) == 0


def test_padded_states_and_mask() -> None:
    states = [torch.ones(2, 3).half(), torch.full((4, 3), 2.0).half()]
    found = padded(states, 5, True)
    assert found.text is not None
    assert found.text_mask is not None
    assert found.text[..., 0].tolist() == [[1, 1, 0, 0, 0], [2, 2, 2, 2, 0]]
    assert found.text_mask.tolist() == [[True, True, False, False, False], [True, True, True, True, False]]
    assert padded(states, 5, False).text_mask is None


def test_work_is_done_in_order_a_few_items_ahead() -> None:
    taken = []

    def items() -> object:
        for i in range(100):
            taken.append(i)
            yield i

    found = in_order(lambda i: (i, torch.get_num_threads()), items(), 2)  # type: ignore[arg-type]
    assert [next(found) for _ in range(20)] == [(i, 1) for i in range(20)]
    assert len(taken) < 30
    found.close()


def test_a_changed_caption_is_another_cache(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, 3)
    first = encode(reader_of(folder), tmp_path / "cache")
    (folder / "01.txt").write_text("other")
    second = encode(reader_of(folder), tmp_path / "cache")
    assert second.folder != first.folder
    assert second.record(1)["captions"] == ["other"]
    assert replace(second.key, data=first.key.data) == first.key
